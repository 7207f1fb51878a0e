"""Updates of variables and optimizers inside any compiled step."""

import contextlib

import keras

from keras_stab.backend import devices
from keras_stab.backend import tracing
from keras_stab.backend import update_kernel
from keras_stab.backend.devices import BACKEND

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "jax":
    import jax
elif BACKEND == "torch":
    import torch


def apply_gradients(optimizer, gradients, variables, exactly=False):
    """Calls the optimizer, in a way that works inside any compiled step.

    Args:
        exactly: Whether to round as Keras does in a step without this.
    """
    if BACKEND == "jax":
        # A LossScaleOptimizer anywhere below branches on finite gradients,
        # which JAX allows in the stateless form only.
        _assign_state(
            optimizer, variables, _stateless(optimizer, gradients, variables)
        )
        return
    given = _without_frozen(gradients, variables)
    if exactly:
        optimizer.apply(*given)
    else:
        _apply(optimizer, *given)


def _apply(optimizer, gradients, variables):
    update_kernel.as_one_kernel(
        optimizer,
        gradients,
        variables,
        lambda: optimizer.apply(gradients, variables),
    )


def apply_gradients_if(condition, optimizer, make_gradients, variables):
    """As `apply_gradients`, only when the boolean tensor holds.

    `make_gradients()` is evaluated inside the branch.
    """
    if BACKEND == "jax":
        state = jax.lax.cond(
            condition,
            lambda: _stateless(optimizer, make_gradients(), variables),
            lambda: (
                [v.value for v in variables],
                [v.value for v in optimizer.variables],
            ),
        )
        _assign_state(optimizer, variables, state)
    elif BACKEND == "tensorflow":

        def update():
            _apply(optimizer, *_without_frozen(make_gradients(), variables))
            return True

        tf.cond(condition, update, lambda: False)
    elif bool(condition):
        optimizer.apply(*_without_frozen(make_gradients(), variables))


def _without_frozen(gradients, variables):
    """Leaves out what was frozen after the optimizer was built.

    Such a variable has no gradient, of which Keras would warn in every step.
    """
    kept = [
        i
        for i, (gradient, variable) in enumerate(zip(gradients, variables))
        if gradient is not None or variable.trainable
    ]
    return [gradients[i] for i in kept], [variables[i] for i in kept]


def _stateless(optimizer, gradients, variables):
    return optimizer.stateless_apply(
        [v.value for v in optimizer.variables],
        gradients,
        [v.value for v in variables],
    )


def _assign_state(optimizer, variables, state):
    for variable, value in zip(variables, state[0]):
        variable.assign(value)
    for variable, value in zip(optimizer.variables, state[1]):
        variable.assign(value)


def barrier(gradients):
    """All gradients are computed before any weight is assigned.

    In TensorFlow's graph mode without XLA an assignment can overtake the
    read of a variable by another gradient, when the gradient of the assigned
    variable does not depend on its own value. Keras's own step has that race.
    """
    if BACKEND != "tensorflow":
        return gradients
    present = [g for g in gradients if g is not None]
    with tf.control_dependencies(
        [g.values if isinstance(g, tf.IndexedSlices) else g for g in present]
    ):
        return [None if g is None else tf.identity(g) for g in gradients]


def write_slot(variable, index, value):
    """Assigns `variable[index] = value` without copying the other slots."""
    if BACKEND == "tensorflow":
        slices = tf.IndexedSlices(value[None], tf.reshape(index, (1,)))
        variable.value.scatter_update(slices)
    elif BACKEND == "torch":
        with torch.no_grad():
            variable.value.index_copy_(0, index.reshape(1).long(), value[None])
    else:
        variable.assign(
            jax.lax.dynamic_update_index_in_dim(variable.value, value, index, 0)
        )


def exchange(variable, value):
    """Gives a variable another value and returns the old one.

    Where the backend allows it no number is copied, so nothing else may hold
    the tensor `value`.
    """
    if BACKEND == "torch":
        old = variable.value.data
        variable.value.data = value
        return old
    old = tracing.read(variable)
    variable.assign(value)
    return old


@contextlib.contextmanager
def exchanged(variables, others):
    """Within it, variables and others hold each other's values."""
    pairs = list(zip(variables, others))
    if BACKEND == "torch":  # looked up once: that takes most of the time
        pairs = [(v.value, other.value) for v, other in pairs]

    def exchange_all():
        for variable, other in pairs:
            if BACKEND == "torch":
                variable.data, other.data = other.data, variable.data
            else:
                old = exchange(variable, tracing.read(other))
                exchange(other, old)

    exchange_all()
    try:
        yield
    finally:
        exchange_all()


def is_known(condition):
    """Whether Python can read a boolean tensor without waiting for a device."""
    return BACKEND == "torch" and condition.device.type == "cpu"


def if_known(scalar):
    """A scalar tensor as a number, where Python can read it at once."""
    return scalar.item() if is_known(scalar) else scalar


def host_views(variables, tensors):
    """NumPy arrays in the memory of variables; writing to them assigns.

    `None` where Python would have to wait for a device to read the variables
    or the tensors.
    """
    if BACKEND != "torch" or torch.compiler.is_compiling():
        return None
    values = [v.value for v in variables]
    if any(t.device.type != "cpu" for t in [*values, *tensors]):
        return None
    return [value.numpy() for value in values]


def all_hold(conditions):
    """Whether booleans, or boolean tensors, all hold; of the same kind."""
    unknown = [c for c in conditions if not isinstance(c, bool)]
    known = all(c for c in conditions if isinstance(c, bool))
    if not unknown or not known:
        return known
    if len(unknown) == 1:
        return unknown[0]
    return keras.ops.all(keras.ops.stack(unknown))


def assign_changed(changed, condition, variables, values):
    """Assigns values where a boolean, or boolean tensor, holds.

    Args:
        changed: Where this does not hold, the values are the variables' own.
        condition: Where to assign.
    """
    if changed is False or condition is False:
        return
    if condition is True and (changed is True or BACKEND == "jax"):
        for variable, value in zip(variables, values):
            variable.assign(value)
        return
    assign_if(
        all_hold([changed, condition]),
        BACKEND == "jax",
        variables,
        lambda: values,
    )


def choose(condition, make_first, make_second, often=True):
    """`make_first()` where the boolean tensor holds, else `make_second()`.

    Both return lists of tensors of the same shapes and dtypes. Only one of
    them is computed where a branch costs nothing.

    Args:
        often: As for `assign_if`.
    """
    if is_known(condition):
        return make_first() if bool(condition) else make_second()
    if (
        BACKEND == "tensorflow"
        and devices.updates_under_conditions()
        and not tracing.traces_kernel()
    ):
        return tf.cond(condition, make_first, make_second)
    if BACKEND == "jax" and not often:
        return jax.lax.cond(condition, make_first, make_second)
    return select(condition, make_first(), make_second())


def select(condition, firsts, seconds):
    """The first or the second tensors, both of which are computed."""
    return [
        keras.ops.where(condition, first, second)
        for first, second in zip(firsts, seconds)
    ]


def assign_if(condition, often, variables, make_values, in_kernel=True):
    """Assigns `make_values()` where the boolean tensor holds.

    Args:
        often: Whether a branch costs more than it saves, since it cannot be
            fused with what is around it: where the condition holds in most
            steps, or the values are cheap next to what made their parts.
        in_kernel: Whether TensorFlow may assign inside a kernel.
    """
    if BACKEND == "tensorflow" and devices.updates_under_conditions():

        def assign():
            for variable, value in zip(variables, make_values()):
                variable.assign(value)

        def assign_all():
            if in_kernel:
                tracing.in_kernel(assign, variables)
            else:
                assign()
            return True

        tf.cond(condition, assign_all, lambda: False)
        return
    if is_known(condition):
        if bool(condition):
            with torch.no_grad():
                torch._foreach_copy_(
                    [v.value for v in variables], make_values()
                )
        return
    if BACKEND == "jax" and not often:
        values = jax.lax.cond(
            condition, make_values, lambda: [v.value for v in variables]
        )
    else:
        # tf.distribute allows no update under a condition, and PyTorch would
        # wait for the accelerator.
        values = [
            keras.ops.where(condition, value, v.value)
            for value, v in zip(make_values(), variables)
        ]
    for variable, value in zip(variables, values):
        variable.assign(value)
