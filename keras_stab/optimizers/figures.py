"""Figures of the last step, kept as one vector that is always finite.

An unknown figure is read as NaN. Stored as NaN it would do harm: on several
processes JAX compares what each of them loads, and NaN does not equal itself.
So the lowest number of float32 is stored for it, and the highest one for
infinity.
"""

import keras
import numpy as np

from keras_stab.backend import products
from keras_stab.optimizers.state import add_state

NAME = "measures"
HIGHEST = float(np.finfo("float32").max)
UNKNOWN = -HIGHEST


def add_figures(optimizer, names, dtype="float32"):
    """The variable; all figures are 0 before the first step."""
    return add_state(optimizer, NAME, (len(names),), dtype)


def is_figures(variable):
    """Whether `add_figures` made the variable."""
    return variable.name == NAME


def finite_figures(values):
    """The values that are stored for figures, a tensor or NumPy array."""
    if isinstance(values, np.ndarray):
        return np.nan_to_num(
            values, nan=UNKNOWN, posinf=HIGHEST, neginf=UNKNOWN
        )
    return products.nan_to_num(values, UNKNOWN, HIGHEST)


def read_figures(variable, names):
    """A dict of floats, read from the device."""
    values = keras.ops.convert_to_numpy(variable.value).astype("float64")
    values = np.where(values <= UNKNOWN, np.nan, values)
    values = np.where(values >= HIGHEST, np.inf, values)
    return dict(zip(names, values.tolist()))
