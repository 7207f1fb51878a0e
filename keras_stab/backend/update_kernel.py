"""The update of an optimizer as one kernel, in a step that is not compiled."""

import keras

from keras_stab.backend import tracing
from keras_stab.backend.devices import BACKEND

if BACKEND == "tensorflow":
    import tensorflow as tf


def as_one_kernel(optimizer, gradients, variables, function):
    """Runs `function()`, which applies gradients, compiled if that is quicker.

    In a step of TensorFlow that is not compiled, the rules of Keras are up to
    twenty passes over the weights. What follows from the update may be in the
    function too.

    Args:
        optimizer: What it applies the gradients with.
        gradients: List of tensors or `None`, made outside of it.
        variables: The weights.
        function: Function without arguments.
    """
    if _is_compilable(optimizer, gradients, variables):
        return tracing.in_kernel(function, variables)
    return function()


def _is_compilable(optimizer, gradients, variables):
    """Whether TensorFlow can compile all that an update runs.

    Known of the optimizers of Keras; what users wrote may do anything.
    """
    kind = type(optimizer)
    if (
        BACKEND != "tensorflow"
        or tf.executing_eagerly()
        or tf.distribute.has_strategy()
        or not optimizer.built
        or not (
            getattr(keras.optimizers, kind.__name__, None) is kind
            or getattr(optimizer, "compiled_by_itself", False)
        )
        or hasattr(optimizer, "inner_optimizer")
        or hasattr(optimizer, "optimizers")  # their parts may do anything
        or optimizer.gradient_accumulation_steps
        or any(v.constraint is not None for v in variables)
        or not all(g is None or isinstance(g, tf.Tensor) for g in gradients)
    ):
        return False
    state = [*optimizer.variables, *variables]
    return len({v.value.device for v in state}) == 1 and _has_known_rate(
        optimizer
    )


def _has_known_rate(optimizer):
    """Whether the learning rate is a number, or a schedule of Keras or ours."""
    if isinstance(optimizer.learning_rate, keras.Variable):
        return True
    known = keras.optimizers.schedules
    kinds = [
        type(each)
        for each in vars(optimizer).values()
        if isinstance(each, known.LearningRateSchedule)
    ]
    own = __name__.partition(".")[0]
    return bool(kinds) and all(
        getattr(known, kind.__name__, None) is kind
        or kind.__module__.partition(".")[0] == own
        for kind in kinds
    )
