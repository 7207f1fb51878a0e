"""The Gram matrix of weight gradients from products of tokens ("ghost")."""

import keras

from keras_stab.backend import products

# From here on half of the token products is worth more operations.
_MANY_TOKENS = 128


def token_pairs(tokens):
    """How many pairs of tokens `ghost_gram` multiplies, of N in all."""
    pairs = tokens**2
    return pairs if tokens < _MANY_TOKENS else pairs * 3 // 4


def ghost_gram(left, right, tokens):
    """Inner products of `left_k' right_k` without forming them.

    For many tokens only the blocks (i, j) with i in the first half or j in
    the second are formed: the rest follows by symmetry.
    """
    groups = left.shape[1]
    if groups == 1 or tokens < _MANY_TOKENS:
        return ghost_blocks(left, right, left, right)
    half = groups // 2
    first = left[:, :half], right[:, :half]
    second = left[:, half:], right[:, half:]
    corner = ghost_blocks(*first, *second)
    top = [ghost_blocks(*first, *first), corner]
    bottom = [keras.ops.transpose(corner), ghost_blocks(*second, *second)]
    halves = [keras.ops.concatenate(part, axis=1) for part in (top, bottom)]
    return keras.ops.concatenate(halves, axis=0)


def ghost_blocks(left, right, other_left, other_right):
    """Inner products of the groups of two pairs of factors, `(K, K')`."""
    pairs = products.exact_products(
        all_tokens(left), all_tokens(other_left)
    ) * products.exact_products(all_tokens(right), all_tokens(other_right))
    pairs = pairs[0] if pairs.shape[0] == 1 else products.sum_over(pairs, 0)
    return sum_blocks(pairs, left.shape[1], other_left.shape[1])


def sum_blocks(pairs, groups, others):
    """Sums the blocks of a matrix of tokens by tokens, group by group."""
    width = pairs.shape[1] or keras.ops.shape(pairs)[1]
    pairs = products.reshape(pairs, (-1, others, width // others))
    pairs = products.sum_over(pairs, 2)
    pairs = products.reshape(pairs, (groups, -1, others))
    return products.sum_over(pairs, 1)


def all_tokens(factor):
    """From `(H, K, n, d)` to `(H, K n, d)`."""
    return products.reshape(factor, (factor.shape[0], -1, factor.shape[3]))
