"""Norms of the units of many tensors, and factors for each unit."""

import functools
import math

import keras

from keras_stab.backend import many_tensors
from keras_stab.backend import tracing
from keras_stab.backend.devices import BACKEND
from keras_stab.numerics.norms import common_dtype

if BACKEND == "torch":
    import torch


def unit_norms(tensors, axes):
    """Euclidean norms of all units, one vector.

    Args:
        tensors: List of tensors in full precision.
        axes: For each the axes of a unit, a tuple, or `None` where all of it
            is one unit.
    """
    dtype = common_dtype(tensors)
    if BACKEND == "torch":
        # Sums of squares: a norm over the first axis takes six times as long.
        squares = torch._foreach_mul(tensors, tensors)
        sums = [
            s.sum() if a is None else s.sum(dim=a)
            for s, a in zip(squares, axes)
        ]
        sums = [s.reshape(-1).to(getattr(torch, dtype)) for s in sums]
        return torch.sqrt(torch.cat(sums))
    sums = [
        many_tensors.sum_of_squares(t)
        if a is None
        else tracing.apart(_sum_of_squares_over(a))(t)
        for t, a in zip(tensors, axes)
    ]
    sums = [keras.ops.cast(keras.ops.reshape(s, (-1,)), dtype) for s in sums]
    return keras.ops.sqrt(keras.ops.concatenate(sums))


@functools.cache
def _sum_of_squares_over(axes):
    return lambda t: keras.ops.sum(keras.ops.square(t), axis=axes)


def units_scaled(tensors, axes, factors):
    """Tensors whose units are multiplied by factors, in the order of norms.

    Args:
        tensors: List of tensors; each keeps its dtype.
        axes: As for `unit_norms`.
        factors: Vector.
    """
    shapes = [_kept(t.shape, a) for t, a in zip(tensors, axes)]
    sizes = [math.prod(shape) for shape in shapes]
    if BACKEND == "torch":
        pieces = torch.split(factors, sizes)
        return [
            t * piece.view(shape).to(t.dtype)
            for t, piece, shape in zip(tensors, pieces, shapes)
        ]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    pieces = keras.ops.split(factors, ends) if ends else [factors]
    return [
        t * keras.ops.cast(keras.ops.reshape(piece, shape), t.dtype)
        for t, piece, shape in zip(tensors, pieces, shapes)
    ]


def _kept(shape, axes):
    """The shape of one number per unit, which broadcasts."""
    if axes is None:
        return (1,) * len(shape)
    return tuple(1 if i in axes else size for i, size in enumerate(shape))
