"""Contributions whose rows several devices share, for a compiled step.

Each device multiplies what its own rows give. A product of tokens needs those
of the others, which are gathered; K gradients are cut along the weights; and
one weighted gradient is summed over the devices, as that of a plain step is.
"""

import math

from keras_stab.backend import exchange
from keras_stab.backend import group_weights
from keras_stab.backend import products
from keras_stab.backend import sharding
from keras_stab.gradients.one_pass.contributions import Product
from keras_stab.gradients.one_pass.contributions import Stored
from keras_stab.gradients.one_pass.token_products import ghost_blocks


class SharedProduct:
    """A `Product` whose tokens lie on several devices.

    Args:
        product: The `Product`.
        dimension: The axis of its factors along which devices have their own:
            1, groups, or 2, tokens of a group.
    """

    def __init__(self, product, dimension):
        self._product, self._dimension = product, dimension
        self._slices = None
        if self._stores():
            self._slices, self._shapes = self._cut()

    def _stores(self):
        """Whether the K gradients are formed."""
        if self._dimension == 2:
            return self._product.work.choice == "store"
        by_gradients, by_tokens = self._numbers_sent()
        return by_gradients <= by_tokens

    def sent(self):
        """How many numbers each device sends, up to `(D - 1) / D`."""
        return self._numbers_sent()[self._slices is None]

    def _numbers_sent(self):
        """With K gradients formed, and with products of tokens.

        A device exchanges gradients, its own or all of them, and gathers one;
        or it gathers all tokens and sums one gradient.
        """
        product = self._product
        heads, groups, _, inputs = product.left.shape
        outputs = product.right.shape[3]
        weights = heads * inputs * outputs
        tokens = product.tokens * heads * (inputs + outputs)
        if self._dimension == 1:
            groups //= exchange.batch_shares()
        return (groups + 1) * weights, 2 * weights + tokens

    def gram(self):
        if self._slices is not None:
            return products.total(
                [products.inner_products(part) for part in self._slices]
            )

        def blocks(own, everything):
            return ghost_blocks(*own, *everything)

        factors = [self._product.left, self._product.right]
        # Of own groups a device has rows of the matrix, of own tokens terms.
        return sharding.with_those_of_all(
            blocks, factors, self._dimension, adds=self._dimension == 2
        )

    def combine(self, weights):
        fold = self._product.fold
        if self._slices is not None:
            parts = [group_weights.combine(weights, s) for s in self._slices]
            (whole,) = exchange.whole(parts, self._shapes)
            return fold(whole[None])[0]
        factors = group_weights.weighted_factors(
            weights, self._product.left, self._product.right
        )
        return fold(products.product_of_all_groups(*factors)[None])[0]

    def _cut(self):
        """The K gradients cut along the weights, and the shape of one."""

        def own_product(left, right):
            return products.swapaxes(products.weight_product(left, right), 0, 1)

        product = self._product
        heads, _, _, inputs = product.left.shape
        shapes = [(heads, inputs, product.right.shape[3])]
        factors = product.left, product.right
        if self._dimension == 1:
            stacks = [own_product(*factors)]
            return sharding.cut_along_weights(stacks, aligned=True), shapes
        slices, _ = sharding.sum_into_slices(
            lambda scatter, own, _: ([scatter(own_product(*own))], []),
            factors,
            (),
            self._dimension,
        )
        return slices, shapes


class OnDevices:
    """As `Apart`, of contributions whose rows several devices share.

    Args:
        parts: Dict of contributions.
        groups: K.
        aligned: Whether every group lies whole on a device.
    """

    def __init__(self, parts, groups, aligned):
        self._parts = {}
        stored = {}
        self._sent = 0
        for key, part in parts.items():
            dimension = 1 if aligned else 2
            if type(part) is Stored and aligned:
                stored[key] = part.stack()
            elif type(part) is Product and _can_share(part, dimension):
                part = SharedProduct(part, dimension)
            self._parts[key] = part
            if isinstance(part, SharedProduct):
                self._sent += part.sent()
            elif key in stored:
                own = stored[key].shape[0] // exchange.batch_shares()
                self._sent += (own + 1) * math.prod(stored[key].shape[1:])
            else:  # left to the compiler, which sums K gradients whole
                numbers = part.work.inputs * part.work.outputs
                self._sent += 2 * groups * numbers
        self._cut = exchange.cut(list(stored.values()), [], aligned)
        self._stored = list(stored)

    def sent(self):
        """How many numbers each device sends in a step, up to `(D - 1) / D`."""
        return self._sent

    def grams(self):
        """Matrices `(K, K)` that add up to the inner products, a list."""
        stored = [products.inner_products(part) for part in self._cut.slices]
        return stored + [
            part.gram()
            for key, part in self._parts.items()
            if key not in self._stored
        ]

    def combine(self, weights):
        """Dict of the weighted sums."""
        parts = [group_weights.combine(weights, s) for s in self._cut.slices]
        whole = exchange.whole(parts, self._cut.shapes)
        return {
            k: part.combine(weights)
            for k, part in self._parts.items()
            if k not in self._stored
        } | dict(zip(self._stored, whole))


def _can_share(product, dimension):
    return product.left.shape[dimension] % exchange.batch_shares() == 0
