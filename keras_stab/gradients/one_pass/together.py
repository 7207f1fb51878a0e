"""Contributions of several variables, answered for together.

Token products of several layers are added up before their blocks are summed.
On PyTorch every operation is a launch, so that many small ones take longer
than their arithmetic: there small variables share them too.
"""

import math

from keras_stab.backend import devices
from keras_stab.backend import exchange
from keras_stab.backend import group_weights
from keras_stab.backend import products
from keras_stab.backend import together
from keras_stab.gradients.one_pass.contributions import Product
from keras_stab.gradients.one_pass.contributions import Stored
from keras_stab.gradients.one_pass.shared_rows import OnDevices
from keras_stab.gradients.one_pass.token_products import ghost_gram
from keras_stab.numerics.norms import in_full_precision

# Weights of a variable up to which copying its K gradients costs less than the
# operations that this saves.
_SMALL = 2**13


class Apart:
    """Contributions that share nothing.

    Args:
        parts: Dict of contributions.
    """

    def __init__(self, parts):
        self._parts = parts

    def grams(self):
        """Matrices `(K, K)` that add up to the inner products, a list."""
        return [part.gram() for part in self._parts.values()]

    def combine(self, weights):
        """Dict of the weighted sums."""
        return {k: part.combine(weights) for k, part in self._parts.items()}


class SmallOnes(Apart):
    """`Stored` of small variables, as one matrix `(K, P)`."""

    def __init__(self, parts):
        super().__init__(parts)
        stacks = [part.stack() for part in parts.values()]
        self._shapes = [tuple(stack.shape[1:]) for stack in stacks]
        self._matrix = together.side_by_side(stacks)

    def grams(self):
        return [products.inner_products(self._matrix)]

    def combine(self, weights):
        whole = group_weights.combine(weights, self._matrix)
        return dict(
            zip(self._parts, products.unpack_group([whole], self._shapes))
        )


class Ghosts(Apart):
    """`Product` in the form "ghost" with tokens in common, of one matrix."""

    def grams(self):
        parts = list(self._parts.values())
        factors = [(part.left, part.right) for part in parts]
        if not devices.EAGER:
            return [ghost_gram(factors, parts[0].tokens)]
        factors = [[in_full_precision(t[0]) for t in pair] for pair in factors]
        return [together.token_grams(factors)]


def gathered(by_variable, groups, aligned):
    """The contributions of all variables, as a list of `Apart`.

    Args:
        by_variable: Dict of contributions.
        groups: K.
        aligned: Whether groups lie whole on one of several devices.
    """
    if exchange.computes_on_each_device():
        return [OnDevices(by_variable, groups, aligned)]
    kinds: dict[tuple, dict] = {}
    for key, part in by_variable.items():
        kinds.setdefault(_kind(part), {})[key] = part
    return [kind[0](parts) for kind, parts in kinds.items()]


def _kind(part):
    """The class that serves a contribution, and what it may be joined with."""
    if type(part) is Stored and devices.EAGER:
        stack = part.stack()
        if math.prod(stack.shape[1:]) <= _SMALL:
            return SmallOnes, stack.dtype
    elif type(part) is Product and part.work.choice == "ghost":
        heads, _, rows, _ = part.left.shape
        known = rows is not None and heads == 1
        if known and part.left.dtype == part.right.dtype:
            return Ghosts, rows, part.left.dtype
    return (Apart,)
