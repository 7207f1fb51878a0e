"""State that optimizers keep in addition to the slots of Keras."""

from keras_stab import keras_internals


def add_state(
    optimizer, name, shape=(), dtype="int32", initializer="zeros", layout=None
):
    """A variable of the optimizer that is the same on every replica."""
    return optimizer.add_variable(
        shape=shape,
        initializer=initializer,
        dtype=dtype,
        aggregation="only_first_replica",
        layout=layout,
        name=name,
    )


def add_slot(optimizer, variable, name, dtype, initializer="zeros"):
    """The same in the shape of a weight, spread over devices like it."""
    return add_state(
        optimizer,
        slot_name(variable, name),
        variable.shape,
        dtype,
        initializer,
        keras_internals.layout(variable),
    )


def slot_name(variable, kind):
    """The name that Keras gives a slot of this kind for a weight."""
    return f"{flat_path(variable)}_{kind}"


def flat_path(variable):
    """The path of a variable, as a name without folders."""
    return variable.path.replace("/", "_")


def moving(gradients, variables, slots):
    """Positions of the variables that a method itself may move.

    Not those that take their gradient as their value, which have no slot, nor
    those of a layer that was frozen after the optimizer was built.
    """
    return [
        i
        for i, (gradient, variable, slot) in enumerate(
            zip(gradients, variables, slots)
        )
        if slot is not None and (gradient is not None or variable.trainable)
    ]


def widest_dtype(variables):
    """Dtype of scalars that enter into updates of these variables."""
    wide = any(variable.dtype == "float64" for variable in variables)
    return "float64" if wide else "float32"
