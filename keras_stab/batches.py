"""Batches, from whatever `fit` takes as data."""

import keras
import numpy as np


def iterate(data, batch_size):
    """The inputs `x` of every batch, and how many there are, if known.

    Args:
        data: Arrays as for `fit` (`x`, a dict, a tuple `(x, y, ...)`), cut
            into batches; or an iterable of batches.
        batch_size: Int, for arrays.
    """
    return _iterate(data, batch_size, _first_part)


def iterate_whole(data, batch_size):
    """As `iterate`; a batch is the tuple `(x, y, sample_weight)`."""
    return _iterate(data, batch_size, keras.utils.unpack_x_y_sample_weight)


def _iterate(data, batch_size, part):
    def tensors(batch):
        return keras.tree.map_structure(_to_tensor, part(batch))

    if isinstance(data, (dict, tuple)) or _is_array(data):
        return _cut(part(data), batch_size)
    if isinstance(data, keras.utils.PyDataset):
        count = data.num_batches
        if count is None:
            return (tensors(data[i]) for i in _forever()), None
        return (tensors(data[i]) for i in range(count)), count
    try:
        batches = iter(data)
    except TypeError as error:
        raise ValueError(
            "`data` must be arrays or an iterable of batches. Received: data "
            f"of type {type(data).__name__}"
        ) from error
    return map(tensors, batches), _length(data)


def _first_part(batch):
    x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
    return x


def _to_tensor(leaf):
    """A tensor; also from one of another backend, as a data set may give."""
    if leaf is None or keras.ops.is_tensor(leaf):
        return leaf
    if hasattr(leaf, "detach"):
        leaf = leaf.detach().cpu()
    if hasattr(leaf, "numpy"):
        leaf = leaf.numpy()
    leaf = np.asarray(leaf)
    if leaf.dtype == np.float64:
        leaf = leaf.astype(keras.config.floatx())
    return keras.ops.convert_to_tensor(leaf)


def _cut(x, batch_size):
    leaves = [leaf for leaf in keras.tree.flatten(x) if leaf is not None]
    sizes = {int(leaf.shape[0]) for leaf in leaves}
    if len(sizes) != 1:
        raise ValueError(
            "All inputs must have the same number of rows. Received: "
            f"{sorted(sizes)} rows"
        )
    (rows,) = sizes
    starts = range(0, rows, batch_size)

    def batch(start):
        return keras.tree.map_structure(
            lambda leaf: (
                None
                if leaf is None
                else _to_tensor(leaf[start : start + batch_size])
            ),
            x,
        )

    return (batch(start) for start in starts), len(starts)


def _is_array(data):
    return keras.ops.is_tensor(data) or isinstance(data, np.ndarray)


def _length(data):
    try:
        return max(0, len(data))
    except TypeError:  # generators, data sets of unknown length
        return None


def _forever():
    index = 0
    while True:
        yield index
        index += 1
