"""The running average of squared gradients that some optimizers keep."""

import keras

from keras_stab.optimizers.layerwise.lamb import LAMB
from keras_stab.optimizers.state import slot_name

WITH_SECOND_MOMENT = (
    keras.optimizers.Adam,
    keras.optimizers.Nadam,
    keras.optimizers.Lamb,
    keras.optimizers.RMSprop,
    LAMB,
)


def second_moment_roots(optimizer, variables):
    """Its roots, one tensor per variable; `None` for the statistics of fp8.

    Raises:
        ValueError: If the state does not have the names that Keras gives it.
    """
    slots = (v for v in optimizer.variables if v.path.endswith("_velocity"))
    roots = []
    for variable in variables:
        if variable.overwrite_with_gradient:
            roots.append(None)
            continue
        slot = next(slots, None)
        name = slot_name(variable, "velocity")
        if slot is None or not slot.path.endswith(name):
            raise ValueError(
                f"{type(optimizer).__name__} keeps no second moment under the "
                'name that Keras gives it: use curvature="gradient". '
                f"Expected: {name}"
            )
        roots.append(keras.ops.sqrt(slot.value))
    return roots
