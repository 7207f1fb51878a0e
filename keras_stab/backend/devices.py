"""Which backend runs, on which devices, with which random numbers.

The only module that asks Keras for its backend. What the rest of the library
needs to know of it is a capability with a name of its own.
"""

import contextlib

import keras

BACKEND = keras.backend.backend()
# Whether Python runs every operation of every step, instead of tracing one.
EAGER = BACKEND == "torch"
# Whether a step is a pure function of values: inside of `fit` variables hold
# none of their own, what no model owns is a constant, and a missing gradient
# is zero; tensors made in a function that is differentiated end with it, and a
# loop over groups is one operation.
FUNCTIONAL = BACKEND == "jax"

if BACKEND not in ("tensorflow", "jax", "torch"):
    raise ImportError(
        "keras_stab trains models on the TensorFlow, JAX and PyTorch backends "
        f"of Keras. Received: KERAS_BACKEND={BACKEND}"
    )

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "jax":
    import jax
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
    """How many replicas of this step run in step, summing their gradients."""
    if BACKEND == "tensorflow":
        return tf.distribute.get_strategy().num_replicas_in_sync
    if BACKEND == "torch" and torch.distributed.is_available():
        if torch.distributed.is_initialized():
            return torch.distributed.get_world_size()
    return 1


def whole_loss(loss):
    """The loss that users see: Keras computes a replica's share of it."""
    if BACKEND == "tensorflow" and replicas() > 1:
        return loss * replicas()
    return loss


def sum_groups(stacks, sizes):
    """Joins the groups of all replicas: their gradients and their rows.

    Keras gives a replica 1/R of the gradient of its own mean loss. That adds
    up to the mean over all rows only where every replica has as many of them;
    in a short batch it does not, and one may have none of a group. So group k,
    of n_k rows on a replica and N_k in all, is weighted by R n_k / N_k.
    """
    if replicas() == 1:
        return stacks, sizes
    if BACKEND != "tensorflow":
        return sum_over_replicas(stacks), sizes
    # As one float tensor: tf.distribute refuses to add several int32 tensors
    # at a time, and not every collective of a GPU knows integers.
    own = tf.cast(tf.stack(sizes), "float32")
    (total,) = sum_over_replicas([own])
    factors = replicas() * tf.math.divide_no_nan(own, total)
    weighted = []
    for stack in stacks:
        column = factors[: stack.shape[0]]
        column = tf.reshape(column, (-1,) + (1,) * (len(stack.shape) - 1))
        weighted.append(tf.where(column > 0.0, column * stack, 0.0))
    return sum_over_replicas(weighted), tf.unstack(tf.cast(total, "int32"))


def sum_over_replicas(tensors):
    """Sums each tensor over the replicas; they all get the same result.

    `None` in the list stays.
    """
    present = [t for t in tensors if t is not None]
    if replicas() == 1 or not present:
        return tensors
    if BACKEND == "tensorflow":
        context = tf.distribute.get_replica_context()
        summed = context.all_reduce(tf.distribute.ReduceOp.SUM, present)
        summed = iter(summed)
        return [None if t is None else next(summed) for t in tensors]
    raise RuntimeError(
        "keras_stab takes gradients with torch.autograd.grad, which bypasses "
        "the gradient synchronisation of DistributedDataParallel: the workers "
        "would silently train apart. Use one process, or GRAIN with "
        'across="batches" in your own DDP loop, which takes synchronised '
        f"gradients. Received: {replicas()} workers"
    )


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
