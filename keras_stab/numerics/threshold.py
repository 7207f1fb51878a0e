"""The k-th smallest of many scores, exactly, without a sort.

The bit patterns of floats that are not negative, read as integers, are in
the order of the floats. Compared as integers they stay exact where a compiler
takes subnormal floats for zero.
"""

import fractions
import math

import keras

INFINITY_BITS = 0x7F800000  # of float32; NaN lies above
_HIGHEST = 2**31 - 1


def rank_of(fraction, count):
    """`fraction * count`, rounded down without error, from 1 to `count`."""
    exact = int(fractions.Fraction(str(fraction)) * count)
    return min(max(exact, 1), count)


def bits_of(scores):
    """The bit patterns of float scores of at least 0, as int32."""
    return keras.ops.view(keras.ops.cast(scores, "float32"), dtype="int32")


def count_true(masks):
    """How many entries of boolean tensors hold, an int32 scalar."""
    total = sum(keras.ops.sum(keras.ops.cast(m, "int32")) for m in masks)
    return keras.ops.cast(total, "int32")  # JAX may sum in int64


def kth_smallest(patterns, k, count=count_true, guesses=()):
    """The k-th smallest of all entries of several int32 tensors.

    A bracket around it is narrowed by counts, each of which may be summed over
    shards. The counts at its ends say where to look next, so that about 15 of
    them are enough.

    Args:
        patterns: List of tensors without negative entries.
        k: Int from 1 to the number of entries.
        count: As `count_true`.
        guesses: Int32 scalar tensors, where to look first.

    Returns:
        An int32 scalar tensor.
    """
    ops = keras.ops

    def unfinished(turn, side, low, high, excess, *distances):
        return ops.logical_and(excess > 0, high - low > 1)

    # Fewer than k entries are below `low`, at least k below `high`: the excess
    # is how many more.
    def narrowed(turn, side, low, high, excess, to_low, to_high):
        width = high - low
        share = ops.cast(width, "float32") * (to_low / (to_low + to_high))
        # In halves at every third turn, which bounds their number.
        guess = ops.where(turn % 3 == 2, width // 2, ops.cast(share, "int32"))
        return looked_at(guess, side, low, high, excess, to_low, to_high, turn)

    def looked_at(guess, side, low, high, excess, to_low, to_high, turn):
        trial = low + ops.clip(guess, 1, high - low - 1)
        found = count([p < trial for p in patterns]) - k
        is_low = found < 0
        distance = ops.cast(ops.abs(found), "float32") + 0.5
        # False position; an end that stays twice counts for half (Illinois).
        to_high = ops.where(side < 0, to_high / 2, to_high)
        to_low = ops.where(side > 0, to_low / 2, to_low)
        return (
            turn + 1,
            ops.cast(ops.where(is_low, -1, 1), "int32"),
            ops.where(is_low, trial, low),
            ops.where(is_low, high, trial),
            ops.where(is_low, excess, found),
            ops.where(is_low, distance, to_low),
            ops.where(is_low, to_high, distance),
        )

    # JAX takes no maximum of nothing.
    patterns = [p for p in patterns if math.prod(p.shape)]
    entries = sum(math.prod(p.shape) for p in patterns)
    start = (0, 0, 0, _HIGHEST, entries - k, k + 0.5, entries - k + 0.5)
    start = tuple(
        ops.convert_to_tensor(x, "int32" if isinstance(x, int) else "float32")
        for x in start
    )
    for guess in guesses:
        turn, side, low, *others = start
        start = looked_at(guess - low, side, low, *others, turn)
    high = ops.while_loop(unfinished, narrowed, start)[3]
    below = [ops.max(ops.where(p < high, p, 0)) for p in patterns]
    return ops.max(ops.stack(below))
