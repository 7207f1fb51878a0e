"""The Gram matrix of weight gradients from products of tokens ("ghost")."""

import keras

from keras_stab.backend import products

# From here on half of the token products is worth more operations.
_MANY_TOKENS = 128


def token_pairs(tokens):
    """How many pairs of tokens `ghost_gram` multiplies, of N in all."""
    pairs = tokens**2
    return pairs if tokens < _MANY_TOKENS else pairs * 3 // 4


def ghost_gram(factors, tokens):
    """Inner products of `left_k' right_k` without forming them, added up.

    The products of all factors are summed before their blocks are: a pass
    over pairs of tokens less for each. For many tokens (or as many as come)
    only the rows of the first half of the groups, and the last block of the
    second half, are formed: the rest follows by symmetry.

    Args:
        factors: List of pairs of tensors `(H, K, n, d)` and `(H, K, n, p)`;
            K and n are the same in all of them.
        tokens: K n as far as known when the step is traced.
    """
    _, groups, rows, _ = factors[0][0].shape
    if groups == 1 or (rows is not None and tokens < _MANY_TOKENS):
        return _blocks(factors, factors)
    half = groups // 2
    first = [[t[:, :half] for t in pair] for pair in factors]
    second = [[t[:, half:] for t in pair] for pair in factors]
    top, corner = _blocks(first, factors), _blocks(second, second)
    left = keras.ops.transpose(top[:, half:])
    bottom = keras.ops.concatenate([left, corner], axis=1)
    return keras.ops.concatenate([top, bottom], axis=0)


def ghost_blocks(left, right, other_left, other_right):
    """Inner products of the groups of two pairs of factors, `(K, K')`."""
    return _blocks([(left, right)], [(other_left, other_right)])


def _blocks(factors, others):
    total = None
    for (left, right), (other_left, other_right) in zip(factors, others):
        pairs = products.exact_products(
            all_tokens(left), all_tokens(other_left)
        ) * products.exact_products(all_tokens(right), all_tokens(other_right))
        heads = pairs.shape[0]
        pairs = pairs[0] if heads == 1 else products.sum_over(pairs, 0)
        total = pairs if total is None else total + pairs
    groups, other_groups = factors[0][0].shape[1], others[0][0].shape[1]
    return sum_blocks(total, groups, other_groups)


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
