"""The rows of a batch: how many there are, and parts of them.

A size is a Python int, or on TensorFlow a scalar tensor when the batch
dimension is unknown while the step is traced.
"""

import math

import keras
import numpy as np

from keras_stab.backend import devices
from keras_stab.backend import products
from keras_stab.backend import tracing


def batch_size(x, y=None, sample_weight=None):
    """The number of rows, after checking that every leaf has that many.

    Raises:
        ValueError: If a leaf is sparse, ragged or a scalar, or the leaves
            disagree about the number of rows; the leaf is named.
    """
    lengths = _lengths(x, y, sample_weight)
    static = {p: int(n) for p, n in lengths.items() if n is not None}
    if len(set(static.values())) > 1:
        received = ", ".join(f"{p} with {n} rows" for p, n in static.items())
        raise ValueError(f"{_ONE_ROW_PER_SAMPLE}. Received: {received}")
    if static:
        return next(iter(static.values()))
    if lengths:
        return length(leaves((x, y, sample_weight))[0])
    raise ValueError("The batch holds no data. Received: x=None")


def length(leaf):
    """The rows of one part of a batch."""
    known = leaf.shape[0]
    return keras.ops.shape(leaf)[0] if known is None else int(known)


def length_checks(batch):
    """Conditions for `tracing.checked`: all parts have the same number of rows.

    An empty list where all lengths are known: `batch_size` compared those.
    """
    if devices.KNOWS_SHAPES:
        return []
    lengths = _lengths(*batch)
    if None not in lengths.values():
        return []
    first, *others = leaves(batch)
    first = keras.ops.shape(first)[0]
    message = (
        f"{_ONE_ROW_PER_SAMPLE}. Received: parts of different length among "
        f"{', '.join(lengths)}"
    )
    return [
        (keras.ops.equal(keras.ops.shape(leaf)[0], first), message)
        for leaf in others
    ]


_ONE_ROW_PER_SAMPLE = (
    "Every part of the batch must have one row per sample, so that groups of "
    "samples can be cut"
)


def _lengths(x, y, sample_weight):
    """The leading dimension of every leaf, `None` where unknown."""
    lengths = {}
    batch = {"x": x, "y": y, "sample_weight": sample_weight}
    for name, part in batch.items():
        if part is None:
            continue
        if keras.ops.is_tensor(part):  # without tree operations
            _check_leaf(name, part)
            lengths[name] = part.shape[0]
            continue
        for path, leaf in keras.tree.flatten_with_path(part):
            if leaf is not None:
                label = name + "".join(f"[{key!r}]" for key in path)
                _check_leaf(label, leaf)
                lengths[label] = leaf.shape[0]
    return lengths


def _check_leaf(label, leaf):
    if not tracing.is_dense(leaf):
        raise ValueError(
            "Groups of samples can be cut from dense tensors only; convert "
            "sparse and ragged inputs first, or compile with the inner "
            f"optimizer. Received: {label} of type {type(leaf).__name__}"
        )
    if getattr(leaf.shape, "rank", len) is None or len(leaf.shape) == 0:
        raise ValueError(
            f"{_ONE_ROW_PER_SAMPLE}. Received: {label}, a scalar or a tensor "
            "of unknown rank"
        )


def check_not_empty(size):
    """Raises a `ValueError` for a batch that is known to hold no rows."""
    if is_static(size) and size == 0:
        raise ValueError("The batch holds no rows")


def is_static(size):
    """Whether a size is known while the step is traced."""
    return isinstance(size, int)


def present(sizes):
    """Booleans `(K,)`, `False` for a group without rows; an array if known."""
    if all(is_static(n) for n in sizes):
        return np.array([n > 0 for n in sizes])
    return keras.ops.stack([n > 0 for n in sizes])


def merge_first_axes(tensor):
    """From `[a, b, ...]` to `[a b, ...]`."""
    shape = tuple(tensor.shape)
    if None in shape:
        shape = keras.ops.shape(tensor)
    return products.reshape(tensor, (shape[0] * shape[1],) + tuple(shape[2:]))


def part_of(size, fraction):
    """How many rows a fraction of a batch is, rounded up."""
    if is_static(size):
        return max(1, math.ceil(fraction * size))
    rows = fraction * keras.ops.cast(size, "float32")
    return keras.ops.cast(keras.ops.ceil(rows), "int32")


def spread(data, count, size):
    """`count` rows of every leaf of `size` rows, evenly spread."""
    if is_static(size) and size % count == 0:
        return map_tensors(lambda leaf: leaf[:: size // count], data)
    index = keras.ops.floor_divide(
        keras.ops.arange(count, dtype="int32") * size, count
    )
    return map_tensors(lambda leaf: keras.ops.take(leaf, index, axis=0), data)


def map_tensors(function, data):
    """Applies a function to every tensor of a structure; keeps `None`."""
    # The usual cases without tree operations, which take as long as a layer.
    if data is None or keras.ops.is_tensor(data):
        return None if data is None else function(data)
    if type(data) is tuple:
        return tuple(map_tensors(function, part) for part in data)
    return keras.tree.map_structure(
        lambda leaf: None if leaf is None else function(leaf), data
    )


def leaves(data):
    """The parts of a nested structure that are not `None`, as a list."""
    if data is None or keras.ops.is_tensor(data):  # without tree operations
        return [] if data is None else [data]
    return [leaf for leaf in keras.tree.flatten(data) if leaf is not None]


def as_tensors(data):
    """The same structure, with tensors where there were arrays."""
    return map_tensors(keras.ops.convert_to_tensor, data)
