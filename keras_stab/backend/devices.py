"""Which backend runs, on which devices, with which random numbers.

The only module that asks Keras for its backend. What the rest of the library
needs to know of it is a capability with a name of its own.
"""

import contextlib

import keras
import numpy as np

BACKEND = keras.backend.backend()
# Whether Python runs every operation of every step, instead of tracing one.
EAGER = BACKEND == "torch"
# Whether a step is a pure function of values: inside `fit` variables hold no
# values, what no model owns is a constant, and a missing gradient is zero;
# tensors made in a differentiated function do not outlive it, and a loop over
# groups is one operation.
FUNCTIONAL = BACKEND == "jax"
# Whether every dimension of a batch is known while Python sees a step.
KNOWS_SHAPES = BACKEND != "tensorflow"

if BACKEND not in ("tensorflow", "jax", "torch"):
    raise ImportError(
        "keras_stab trains models on the TensorFlow, JAX and PyTorch backends "
        f"of Keras. Received: KERAS_BACKEND={BACKEND}"
    )

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "jax":
    import jax
    from jax.experimental import multihost_utils
elif BACKEND == "torch":
    import torch


def backend_name():
    """String, what `KERAS_BACKEND` calls it."""
    return BACKEND


def updates_under_conditions():
    """Whether a step may assign variables under a condition."""
    # tf.distribute merges the replicas' calls, which no branch may do.
    return BACKEND != "tensorflow" or replicas() == 1


def replicas():
    """How many replicas trace this step together, in one program.

    Each of them hands `optimizer.apply` a share of the gradients, which it
    sums.
    """
    if BACKEND == "tensorflow":
        return tf.distribute.get_strategy().num_replicas_in_sync
    return 1


def ranks():
    """How many processes train together, each with rows of its own.

    Those of a PyTorch process group. What the optimizer is given must be the
    same on all of them.
    """
    if BACKEND == "torch" and torch.distributed.is_available():
        if torch.distributed.is_initialized():
            return torch.distributed.get_world_size()
    return 1


def rank():
    """The number of this process, from 0 to `ranks() - 1`."""
    return torch.distributed.get_rank() if ranks() > 1 else 0


def whole_loss(loss):
    """The loss that users see: Keras computes a replica's share of it."""
    if BACKEND == "tensorflow" and replicas() > 1:
        return loss * replicas()
    return loss


def sum_shares(gradients):
    """Sums over the replicas the gradients that an optimizer was given.

    A replica of TensorFlow hands over its share of them; elsewhere they are
    those of all rows. A missing one stays `None`.
    """
    if replicas() == 1:
        return gradients
    present = [tf.convert_to_tensor(g) for g in gradients if g is not None]
    summed = iter(sum_over_replicas(present))
    return [None if g is None else next(summed) for g in gradients]


def sum_over_replicas(tensors):
    """Sums each tensor over the replicas; they all get the same result.

    `None` in the list stays.
    """
    present = [t for t in tensors if t is not None]
    if replicas() == 1 or not present:
        return tensors
    context = tf.distribute.get_replica_context()
    summed = iter(context.all_reduce(tf.distribute.ReduceOp.SUM, present))
    return [None if t is None else next(summed) for t in tensors]


def has_accelerator():
    """Whether the step runs on a GPU or TPU."""
    if BACKEND == "jax":
        return jax.default_backend() != "cpu"
    if BACKEND == "tensorflow":
        return bool(tf.config.list_logical_devices("GPU"))
    return torch.cuda.is_available()


def random_state():
    """The state of a generator that lives outside Keras's variables."""
    if BACKEND != "torch":
        return None
    devices = range(torch.cuda.device_count())
    if not torch.cuda.is_initialized():
        devices = []
    return (
        torch.get_rng_state(),
        {d: torch.cuda.get_rng_state(d) for d in devices},
    )


def drew_since(state):
    """Whether that generator gave numbers since `state` was taken."""
    if state is None:
        return False
    now = random_state()
    return not torch.equal(state[0], now[0]) or any(
        not torch.equal(value, now[1][device])
        for device, value in state[1].items()
    )


@contextlib.contextmanager
def replayed(state):
    """Draws the same random numbers again, then returns to where it was."""
    if state is None:
        yield
        return
    now = random_state()
    _set_random_state(state)
    try:
        yield
    finally:
        _set_random_state(now)


def _set_random_state(state):
    torch.set_rng_state(state[0])
    for device, value in state[1].items():
        torch.cuda.set_rng_state(value, device)


def pooled(batches):
    """The batches of all processes, from those that each of them passes.

    As `fit` does: with `keras.distribution` on several processes, each passes
    rows of its own, which together are one batch. Otherwise nothing changes.

    Args:
        batches: Iterable of nested structures of arrays, one row per sample.

    Yields:
        The same structures.
    """
    if BACKEND != "jax" or jax.process_count() == 1:
        yield from batches
        return
    distribution = keras.distribution.distribution()
    if distribution is None:  # each process trains a model of its own
        yield from batches
        return

    def share(leaf):
        layout = distribution.get_data_layout(leaf.shape).backend_layout
        return jax.make_array_from_process_local_data(layout, np.asarray(leaf))

    batches = iter(batches)
    while _agreed_rows(batch := next(batches, None)) is not None:
        yield keras.tree.map_structure(
            lambda leaf: None if leaf is None else share(leaf), batch
        )


def _agreed_rows(batch):
    """Rows in a batch, the same number on all processes, or `None`."""
    leaves = [leaf for leaf in keras.tree.flatten(batch) if leaf is not None]
    own = len(leaves[0]) if leaves else -1
    rows = multihost_utils.process_allgather(np.array(own)).tolist()
    if len(set(rows)) > 1:
        received = ["none" if n < 0 else str(n) for n in rows]
        raise ValueError(
            "All processes must pass equally many batches, with equally many "
            "rows in each: together these are one batch, as in `fit`. "
            f"Received: a batch of {', '.join(received)} rows on processes 0 "
            f"to {len(rows) - 1}"
        )
    return None if own < 0 else own
