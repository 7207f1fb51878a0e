"""Values of variables, and functions that a backend traces or compiles."""

import contextlib
import contextvars
import functools
import math

import keras
import numpy as np

from keras_stab.backend import devices
from keras_stab.backend.devices import BACKEND

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "jax":
    import jax
    import jax.numpy as jnp
elif BACKEND == "torch":
    import torch


def read(variable):
    """The value of a variable, as a tensor that can be differentiated."""
    if BACKEND == "tensorflow":
        return tf.convert_to_tensor(variable.value)
    return variable.value


def snapshot(variable):
    """The value of a variable, which later assignments do not change."""
    if BACKEND == "torch":
        return variable.value.detach().clone()
    return read(variable)


def read_after(variable):
    """The value after earlier assignments, as a separate tensor."""
    if BACKEND == "jax":
        # Without this the compiler may compute it twice, rounded differently.
        return jax.lax.optimization_barrier(variable.value)
    return read(variable)


def concrete_value(variable):
    """The value as an array, even while TensorFlow traces a step."""
    if BACKEND == "tensorflow":
        with tf.init_scope():
            return variable.value.numpy()
    return keras.ops.convert_to_numpy(variable.value)


def sync_state(model):
    """Gives variables the values of the last step, in the middle of `fit`."""
    if devices.FUNCTIONAL:
        model.jax_state_sync()


def is_dense(leaf):
    """Whether rows can be cut from this leaf of a batch."""
    if isinstance(leaf, np.ndarray):  # a step that runs eagerly
        return True
    if BACKEND == "tensorflow":
        # Sparse and ragged tensors count as tensors to TensorFlow.
        return isinstance(leaf, tf.Tensor)
    if BACKEND == "torch":
        return torch.is_tensor(leaf) and leaf.layout == torch.strided
    return isinstance(leaf, jax.Array)


def densify(gradient):
    """A dense tensor, also from a sparse embedding gradient."""
    if BACKEND == "tensorflow" and isinstance(gradient, tf.IndexedSlices):
        return tf.convert_to_tensor(gradient)
    return gradient


def with_gradients():
    """Context in which gradients can be taken, where Keras evaluates too."""
    if BACKEND == "torch":
        return torch.enable_grad()
    return contextlib.nullcontext()


def no_gradients():
    """A scope in which nothing is recorded for differentiation."""
    if BACKEND == "torch":
        return torch.no_grad()
    return contextlib.nullcontext()


def compiled(function):
    """The function, compiled where the backend compiles train steps."""
    if BACKEND == "jax":
        return jax.jit(function)
    if BACKEND == "tensorflow":
        return tf.function(function, autograph=False)
    return function


@functools.cache
def as_kernel(function):
    """The function compiled by itself; on TensorFlow by XLA, as one kernel."""
    if BACKEND == "jax":
        return jax.jit(function)
    return _kernel(function)


_traces_kernel = contextvars.ContextVar("traces_kernel", default=False)


def traces_kernel():
    """Whether what runs now becomes a part of a kernel on TensorFlow.

    There a branch copies, and other forms of a sum are quicker than in a graph.
    """
    return _traces_kernel.get()


def _kernel(function):
    def traced(*args):
        token = _traces_kernel.set(True)
        try:
            return function(*args)
        finally:
            _traces_kernel.reset(token)

    return tf.function(traced, jit_compile=True, autograph=False)


def apart(function):
    """The function, for sums over tensors that it is given.

    On JAX a function of its own: XLA takes it into the step only after it has
    turned the products that gradients are, and reads in order what it sums.
    Otherwise it takes five times as long, in whichever order they lie.
    """
    return as_kernel(function) if BACKEND == "jax" else function


# Elements of tensors from which compiling a kernel for them pays.
WORTH_A_KERNEL = 2**16


def in_kernel(function, variables):
    """Runs `function()`, which may assign, as one kernel of a traced graph.

    On TensorFlow, whose graphs are not compiled by default: every operation
    is a pass over the weights, with a tensor of its own.
    """
    size = sum(math.prod(v.shape) for v in variables)
    if (
        BACKEND != "tensorflow"
        or tf.executing_eagerly()
        or devices.replicas() > 1
        or size < WORTH_A_KERNEL
    ):
        return function()
    return _kernel(function)()


def concretely(function, inputs):
    """Runs `function(inputs) -> list of tensors` now, even in a traced step.

    Nothing that the step traces may enter it.

    Args:
        inputs: List of arrays, which compiled code does not hold as constants.
    """
    if BACKEND == "jax":
        # Compiled ahead of the call: neither is a part of the step's trace,
        # and not every operation is compiled by itself. For one run it is not
        # worth optimising.
        options = {"xla_backend_optimization_level": "0"}
        compiled = jax.jit(function).lower(inputs).compile(options)
        return [np.asarray(t) for t in compiled(inputs)]
    if BACKEND == "tensorflow":
        with tf.init_scope():
            # As a graph, like a step: values inside a loop cannot be read
            # there either.
            traced = tf.function(function, autograph=False)
            return [t.numpy() for t in traced(inputs)]
    with torch.no_grad():
        return [t.cpu().numpy() for t in function(inputs)]


def traced(function, inputs):
    """Runs `function(inputs)` for what Python sees, assigning nothing."""
    if BACKEND == "jax":
        jax.eval_shape(function, inputs)
        return
    with no_gradients():
        function(inputs)


def shapes_of(function):
    """The shapes of the tensors that `function()` would return."""
    if BACKEND == "jax":
        return [s.shape for s in jax.eval_shape(function)]
    if BACKEND == "tensorflow":
        with tf.init_scope():
            return [t.shape for t in function()]
    with torch.no_grad():
        try:
            # Of tensors that have a shape and no values.
            with keras.device("meta"):
                return [t.shape for t in function()]
        except Exception:
            # An operation that wants values, or an error that is to be told.
            return [t.shape for t in function()]


def stacked(structures):
    """Equal structures of arrays as one, whose leaves have a new first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *structures)


def scan(function, carry, inputs):
    """Runs `carry, out = function(carry, input)` over leading slices."""
    return jax.lax.scan(function, carry, inputs)


def evaluate_if(condition, function, otherwise):
    """`function()` when the boolean tensor holds, else `otherwise()`.

    `otherwise` receives the structure of the first branch's result.
    """
    seen = []

    def first():
        result = function()
        leaves = keras.tree.flatten(result)
        seen.append(result)
        # Unconnected gradients are a matter of the model, not of the batch.
        return [leaf for leaf in leaves if leaf is not None]

    def second():
        leaves = keras.tree.flatten(otherwise(seen[0]))
        return [leaf for leaf in leaves if leaf is not None]

    try:
        flat = iter(tf.cond(condition, first, second))
    except RuntimeError as error:
        if devices.replicas() == 1 or "merge_call" not in str(error):
            raise
        raise ValueError(
            "The number of rows in a batch is not known while the step is "
            "traced, so that each group is evaluated under a condition, in "
            "which tf.distribute lets no layer exchange statistics between "
            "replicas. Pass a tf.data.Dataset batched with "
            "drop_remainder=True, or use no synchronised layers. Received: "
            f"a strategy with {devices.replicas()} replicas"
        ) from error
    leaves = keras.tree.flatten(seen[0])
    leaves = [None if leaf is None else next(flat) for leaf in leaves]
    return keras.tree.pack_sequence_as(seen[0], leaves)


def checked(data, conditions):
    """The same tensors, once every condition holds; for sizes unknown before.

    Args:
        data: Nested structure of tensors, on which the step depends: nothing
            is assigned when a check fails.
        conditions: List of pairs: boolean scalar tensor, message.
    """
    checks = [
        tf.debugging.assert_equal(condition, True, message=message)
        for condition, message in conditions
    ]
    with tf.control_dependencies([c for c in checks if c is not None]):
        return keras.tree.map_structure(
            lambda t: None if t is None else tf.identity(t), data
        )
