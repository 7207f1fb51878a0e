"""Counts of many entries, and the k-th smallest of them."""

import math

import keras
import numpy as np

from keras_stab.backend import tracing
from keras_stab.backend.devices import BACKEND
from keras_stab.numerics import threshold

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "jax":
    import jax.numpy as jnp
elif BACKEND == "torch":
    import torch

_INT16 = 2**15 - 1


def count_true(masks):
    """How many entries of boolean tensors hold, an int32 scalar."""
    if BACKEND == "torch":
        if masks[0].device.type == "cpu":
            total = sum(int(np.count_nonzero(m.numpy())) for m in masks)
            return torch.tensor(total, dtype=torch.int32)
        return sum(torch.count_nonzero(m) for m in masks).to(torch.int32)
    return threshold.count_true([_column_counts(m) for m in masks])


def _column_counts(mask):
    """Counts along the last axis, in int16; the mask itself if that is none.

    XLA adds columns of small integers four times as fast as it counts in one
    go on a CPU.
    """
    rows = math.prod(mask.shape[:-1])
    if len(mask.shape) < 2 or rows > _INT16:
        return mask
    axes = tuple(range(len(mask.shape) - 1))
    if BACKEND == "jax":
        return jnp.sum(mask, axis=axes, dtype="int16")
    return tf.reduce_sum(tf.cast(mask, "int16"), axis=axes)


def can_be_ranked(patterns, entries):
    """Whether all scores are finite, and one is not 0.

    Args:
        patterns: As in `kth_smallest`.
        entries: How many there are in all.
    """
    if BACKEND == "torch":
        largest = torch.stack([p.max() for p in patterns if p.numel()]).max()
        return (largest > 0) & (largest < threshold.INFINITY_BITS)
    finite = count_true([p < threshold.INFINITY_BITS for p in patterns])
    positive = count_true([p > 0 for p in patterns])
    return keras.ops.logical_and(finite == entries, positive > 0)


def kth_smallest(patterns, k):
    """As `threshold.kth_smallest`; where it is quicker by another way."""
    if BACKEND == "torch":
        flat = patterns[0]
        if len(patterns) > 1:
            flat = torch.cat([p.reshape(-1) for p in patterns])
        flat = flat.reshape(-1)
        if flat.device.type == "cpu":
            # NumPy's selection is thirty times as fast as PyTorch's.
            return torch.tensor(np.partition(flat.numpy(), k - 1)[k - 1])
        return torch.kthvalue(flat, k).values
    if BACKEND == "tensorflow":
        return tracing.as_kernel(_kth_after_sample)(patterns, k)
    return threshold.kth_smallest(patterns, k, count_true)


# Prime, so that a sample is not of a few columns only.
_EVERY = 61


def _kth_after_sample(patterns, k):
    """Looks at a sample first: half as many passes over all entries."""
    sample = [tf.reshape(p, (-1,))[::_EVERY] for p in patterns]
    entries, size = (
        sum(math.prod(p.shape) for p in tensors)
        for tensors in (patterns, sample)
    )
    guesses = []
    if entries >= tracing.WORTH_A_KERNEL:
        rank = k * size / entries
        # Three standard deviations of what a sample has below the k-th.
        off = 1.0 + 3.0 * math.sqrt(rank * (1.0 - k / entries))
        for place, beyond in ((rank - off, 0), (rank + off, 1)):
            place = min(max(int(place), 1), size)
            found = threshold.kth_smallest(sample, place, count_true)
            guesses.append(found + beyond)
    return threshold.kth_smallest(patterns, k, count_true, guesses)
