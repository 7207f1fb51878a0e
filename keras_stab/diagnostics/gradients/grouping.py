"""The rows that are measured, as arrays, and the group of each."""

import keras
import numpy as np

from keras_stab.arguments import checked_count


def arrays(data):
    """NumPy arrays of equally many rows, at least one."""

    def array(leaf):
        if leaf is None:
            return None
        if not hasattr(leaf, "shape"):
            leaf = np.asarray(leaf)
        leaf = keras.ops.convert_to_numpy(leaf)
        if leaf.dtype == np.float64:
            leaf = leaf.astype(keras.config.floatx())
        return leaf

    data = keras.tree.map_structure(array, data)
    leaves = [leaf for leaf in keras.tree.flatten(data) if leaf is not None]
    lengths = {len(leaf) if leaf.shape else -1 for leaf in leaves}
    if len(lengths) != 1 or min(lengths) < 1:
        raise ValueError(
            "`x`, `y` and `sample_weight` must be arrays with equally many "
            "rows, at least one; take the arrays out of a data set first. "
            f"Received: {sorted(lengths)} rows"
        )
    return data


def numbers_of(groups, count):
    """The group of every row, `(N,)` of ints."""
    if isinstance(groups, str):
        if groups != "rows":
            raise ValueError(
                '`groups` must be an int, one int per row, "rows" or "losses". '
                f"Received: groups={groups!r}"
            )
        return np.arange(count)
    if np.ndim(groups) == 0:
        groups = checked_count("groups", groups, 1)
        if groups > count:
            raise ValueError(
                "Each group needs a row. Received: "
                f"groups={groups} for {count} rows"
            )
        return np.arange(count) % groups
    numbers = np.asarray(groups)
    whole = np.issubdtype(numbers.dtype, np.integer)
    if numbers.shape != (count,) or not whole or numbers.min() < 0:
        raise ValueError(
            "`groups` must hold the number of its group, an int from 0, for "
            f"each of {count} rows. Received: groups of shape {numbers.shape} "
            f"and dtype {numbers.dtype}"
        )
    return numbers
