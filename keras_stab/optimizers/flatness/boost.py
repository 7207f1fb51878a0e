"""The longer step of IRE along flat weights."""

import keras

from keras_stab import keras_internals
from keras_stab.backend import longer_steps
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


def boost_steps(variables, before, masks, boost, decays):
    """Moves flat weights `boost` times further than the step did.

    Args:
        variables: The variables, after the step.
        before: What `longer_steps.before_step` returned before it.
        masks: Boolean tensors.
        boost: Scalar.
        decays: As from `decay_rates`; that part of the step is not boosted.
    """
    longer_steps.lengthen(variables, before, masks, boost, decays)
    for variable in variables:
        if variable.constraint is not None:
            variable.assign(variable.constraint(tracing.read_after(variable)))
