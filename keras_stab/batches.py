"""Batches, from whatever `fit` takes as data."""

import numbers

import keras
import numpy as np


def iterate(data, batch_size, model=None):
    """The inputs `x` of every batch, and how many there are, if known.

    Args:
        data: Arrays as for `fit` (`x`, a dict, a tuple `(x, y, ...)`), cut
            into batches; or an iterable of batches.
        batch_size: Int, for arrays.
        model: The model that they are for, if it may preprocess its data.
    """
    if isinstance(data, tuple) and not preprocesses(model):
        data = (_unpacked(data)[0],)
    batches, count = _iterate(data, batch_size)
    parts = (own_batch(model, *_unpacked(batch)) for batch in batches)
    return (_as_tensors(x) for x, _, _ in parts), count


def iterate_whole(data, batch_size, model=None):
    """As `iterate`; a batch is the tuple `(x, y, sample_weight)`."""
    batches, count = _iterate(data, batch_size)
    parts = (own_batch(model, *_unpacked(batch)) for batch in batches)
    return map(_as_tensors, parts), count


def own_batch(model, x, y=None, sample_weight=None):
    """A batch as `fit` of a model passes it to the train step.

    The tasks of KerasHub, and every model with a method `preprocess_samples`,
    make their inputs (and labels) from raw data themselves.

    Returns:
        Tuple `(x, y, sample_weight)`.
    """
    if not preprocesses(model):
        return x, y, sample_weight
    parts = _with_python_strings(_with_arrays((x, y, sample_weight)))
    return _unpacked(model.preprocess_samples(*parts))


def preprocesses(model):
    """Whether `fit` of the model takes other data than its train step."""
    return callable(getattr(model, "preprocess_samples", None))


def _unpacked(batch):
    """The batch as `(x, y, sample_weight)`."""
    if _is_text(batch):
        return batch, None, None
    return keras.utils.unpack_x_y_sample_weight(batch)


def _iterate(data, batch_size):
    if isinstance(data, (dict, tuple)) or _is_array(data) or _is_text(data):
        return _cut(data, batch_size)
    if isinstance(data, keras.utils.PyDataset):
        count = data.num_batches
        if count is None:
            return (data[i] for i in _forever()), None
        return (data[i] for i in range(count)), count
    try:
        batches = iter(data)
    except TypeError as error:
        raise ValueError(
            "`data` must be arrays or an iterable of batches. Received: data "
            f"of type {type(data).__name__}"
        ) from error
    return batches, _length(data)


def _cut(data, batch_size):
    data = _with_arrays(data)
    leaves = [leaf for leaf in keras.tree.flatten(data) if leaf is not None]
    for leaf in leaves:
        if not getattr(leaf, "shape", ()):
            raise ValueError(
                "`data` must hold arrays with one row per sample. Received: "
                f"{leaf!r} in data of type {type(data).__name__}"
            )
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
                None if leaf is None else leaf[start : start + batch_size]
            ),
            data,
        )

    return (batch(start) for start in starts), len(starts)


def _as_tensors(data):
    return keras.tree.map_structure(_to_tensor, data)


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
    try:
        return keras.ops.convert_to_tensor(leaf)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "The data hold something other than tensors. Text needs a model "
            "that preprocesses it (`preprocess_samples`, as KerasHub's tasks "
            "do), or must be made into numbers first. Received: an "
            f"array of dtype {leaf.dtype}"
        ) from error


def _with_arrays(data):
    """The data with arrays for lists of strings or numbers, and for tables."""
    if type(data) in (tuple, list) and not _is_column(data):
        return type(data)(_with_arrays(part) for part in data)
    if isinstance(data, dict):
        return {key: _with_arrays(part) for key, part in data.items()}
    if hasattr(data, "to_numpy"):
        array = data.to_numpy()
        # As `fit`: a column of a table is one feature, or one target.
        return array[:, None] if array.ndim == 1 else array
    return np.asarray(data) if _is_column(data) else data


def _is_column(data):
    """Whether it is a list of strings or numbers, or of lists of them."""
    if not isinstance(data, list) or not data:
        return False
    kinds = (str, bytes, numbers.Number)
    return all(isinstance(part, kinds) or _is_column(part) for part in data)


def _with_python_strings(data):
    """The data with lists of Python strings for arrays of strings."""
    if isinstance(data, np.ndarray) and data.dtype.kind in "USO":
        return _decoded(data.tolist())
    if isinstance(data, tuple):
        return tuple(_with_python_strings(part) for part in data)
    if isinstance(data, dict):
        return {key: _with_python_strings(part) for key, part in data.items()}
    return data


def _decoded(value):
    if isinstance(value, list):
        return [_decoded(part) for part in value]
    return value.decode() if isinstance(value, bytes) else value


def _is_array(data):
    """Whether it is one array, tensor of any framework, or table."""
    return hasattr(data, "shape") and hasattr(data, "__array__")


def _is_text(data):
    """Whether it is a list of strings, which is one input."""
    return (
        isinstance(data, list)
        and bool(data)
        and isinstance(data[0], (str, bytes))
    )


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
