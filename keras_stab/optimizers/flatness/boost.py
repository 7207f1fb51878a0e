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


class Boost:
    """Moves flat weights further than a step does that is made in between.

    Args:
        variables: The variables, before the step.
        flat: For each of them its mask, `None` where it is not boosted; or an
            empty list, if none is.
        room: A list that one step leaves to the next.
    """

    def __init__(self, variables, flat, room):
        chosen = [i for i, mask in enumerate(flat) if mask is not None]
        self._chosen = chosen
        self._variables = [variables[i] for i in chosen]
        self._masks = [flat[i] for i in chosen]
        self._before = longer_steps.before_step(self._variables, room)

    def finish(self, where, boost, decays):
        """After the step.

        Args:
            where: Boolean, or boolean tensor, whether to boost it.
            boost: Scalar, how many times further.
            decays: As from `decay_rates`; that part of it is not boosted.
        """
        if not self._chosen or where is False:
            return
        masks = self._masks
        if where is not True:
            masks = [mask & where for mask in masks]
        decays = [decays[i] for i in self._chosen]
        longer_steps.lengthen(
            self._variables, self._before, masks, boost, decays
        )
        for variable in self._variables:
            if variable.constraint is not None:
                value = variable.constraint(tracing.read_after(variable))
                variable.assign(value)
