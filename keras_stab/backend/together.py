"""One operation for several layers, on PyTorch, where each is a launch."""

import math

from keras_stab.backend.devices import BACKEND
from keras_stab.backend.products import highest_precision

if BACKEND == "torch":
    import torch


def side_by_side(stacks):
    """Tensors `(K, *shape)` as one matrix `(K, P)`, on PyTorch."""
    return torch.cat([s.reshape(s.shape[0], -1) for s in stacks], dim=1)


# Fewer tokens are not worth an operation of their own.
_TOKENS_OF_A_STRIP = 64


def token_grams(factors):
    """The sum of the Grams of several products `left_k' right_k`, on PyTorch.

    From products of tokens with tokens, in strips of the upper triangle; the
    rest follows by symmetry. The products of all factors are added up first,
    their blocks summed once.

    Args:
        factors: List of pairs of tensors `(K, n, d)` and `(K, n, p)`, in full
            precision; K and n are the same in all of them.
    """
    groups, rows = factors[0][0].shape[:2]
    flat = [
        [t.reshape(groups * rows, t.shape[2]) for t in pair] for pair in factors
    ]
    high = min(groups, max(1, math.ceil(_TOKENS_OF_A_STRIP / max(rows, 1))))
    if groups * rows < 2 * _TOKENS_OF_A_STRIP:
        high = groups
    gram = None
    with highest_precision():
        for first in range(0, groups, high):
            last = min(first + high, groups)
            start, end = first * rows, last * rows
            pairs = None
            for left, right in flat:
                left = left[start:end] @ left[start:].mT
                right = right[start:end] @ right[start:].mT
                if pairs is None:
                    pairs = left.mul_(right)
                else:
                    pairs = pairs.addcmul_(left, right)
            pairs = pairs.view(last - first, rows, groups - first, rows)
            sums = pairs.sum((1, 3))
            if high == groups:
                return sums
            if gram is None:
                gram = sums.new_empty((groups, groups))
            gram[first:last, first:] = sums
            gram[first:, first:last] = sums.mT
    return gram
