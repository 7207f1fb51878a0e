"""The k-th smallest of many scores, exactly, without a sort.

The bit patterns of floats that are not negative, read as integers, are in
the order of the floats. Compared as integers they stay exact where a compiler
takes subnormal floats for zero.
"""

import fractions

import keras


def rank_of(fraction, count):
    """`fraction * count`, rounded down without error, from 1 to `count`."""
    exact = int(fractions.Fraction(str(fraction)) * count)
    return min(max(exact, 1), count)


def bits_of(scores):
    """The bit patterns of float scores of at least 0, as int32."""
    return keras.ops.view(keras.ops.cast(scores, "float32"), dtype="int32")


def kth_smallest(patterns, k):
    """The k-th smallest of all entries of several int32 tensors.

    One bit after another: 31 counts, of which each may be summed over shards.

    Args:
        patterns: List of tensors without negative entries.
        k: Int from 1 to the number of entries.

    Returns:
        An int32 scalar tensor.
    """

    def one_bit(i, found):
        trial = found + keras.ops.left_shift(_one(), 30 - i)
        below = sum(
            keras.ops.sum(keras.ops.cast(p < trial, "int32")) for p in patterns
        )
        return keras.ops.where(below < k, trial, found)

    return keras.ops.fori_loop(0, 31, one_bit, keras.ops.zeros((), "int32"))


def _one():
    return keras.ops.ones((), "int32")
