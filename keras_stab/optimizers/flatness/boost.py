"""The longer step of IRE along flat weights."""

import keras

from keras_stab import keras_internals
from keras_stab.backend import tracing


def decay_rates(optimizer, variables, gradients):
    """The fraction of each variable that decoupled weight decay takes away.

    One scalar per variable, `None` for one that does not decay: it is
    excluded, or has no gradient.
    """
    if not optimizer.weight_decay:
        return [None] * len(variables)
    rate = keras.ops.convert_to_tensor(optimizer.learning_rate) + 0.0
    return [
        rate * optimizer.weight_decay
        if g is not None and keras_internals.is_decayed(optimizer, v)
        else None
        for v, g in zip(variables, gradients)
    ]


def boost_step(variable, before, decay, boost, chosen):
    """Moves chosen weights `boost` times further than the step did.

    Args:
        before: The weights before the step.
        decay: The fraction of `before` that decoupled weight decay took away
            in the step, which is not boosted; `None` for nothing.
        boost: Scalar.
        chosen: Boolean tensor of the variable's shape.
    """
    after = tracing.read_after(variable)
    extra = after - before
    if decay is not None:
        extra = extra + keras.ops.cast(decay, extra.dtype) * before
    extra = keras.ops.cast(boost, extra.dtype) * extra
    # Neither `before + (1 + boost) * delta` nor a product with the mask: the
    # first is not `after` to the last bit, the second lets a NaN in.
    variable.assign(keras.ops.where(chosen, after + extra, after))
    if variable.constraint is not None:
        variable.assign(variable.constraint(tracing.read_after(variable)))
