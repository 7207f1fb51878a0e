"""What a use of a variable adds to group gradients, in the cheapest form.

Each class answers for one variable: `gram()`, the inner products of its K
group gradients, `(K, K)`; `combine(weights)`, their weighted sum, of the
variable's shape; `stack()`, all K of them, `(K, *shape)`; `inner(tensor)`,
the inner product of each with a tensor of that shape, `(K,)`.
"""

import dataclasses
import math

import keras

from keras_stab.backend import group_weights
from keras_stab.backend import products
from keras_stab.gradients.one_pass.token_products import all_tokens
from keras_stab.gradients.one_pass.token_products import ghost_gram
from keras_stab.gradients.one_pass.token_products import sum_blocks
from keras_stab.gradients.one_pass.work import matrix_work
from keras_stab.gradients.one_pass.work import work_of
from keras_stab.numerics.norms import in_full_precision


class Stored:
    """The K gradients themselves.

    Args:
        stack: Tensor `(K, *shape)`.
        tokens: Rows times positions.
        work: The `Work`, when it is not that of a vector of weights.
    """

    def __init__(self, stack, tokens=0, work=None):
        self._stack = in_full_precision(stack)
        self.tokens = tokens
        groups, *shape = self._stack.shape
        self.work = work or work_of(tokens, 1, math.prod(shape), 1, groups)

    def stack(self):
        return self._stack

    def gram(self):
        return products.inner_products(self._stack)

    def combine(self, weights):
        return group_weights.combine(weights, self._stack)

    def inner(self, tensor):
        return products.inner_products(self._stack, tensor)


class Product:
    """Gradients of a matrix: `left_k' right_k` over the tokens of group k.

    From token products ("ghost"): with L = left left' and R = right right',
    entry (i, j) of the Gram is the sum of L R over the tokens of i and j. Or
    from the K gradients ("store"), whichever is cheaper.

    Args:
        left: Tensor `(H, K, n, d)`; H separate matrices.
        right: Tensor `(H, K, n, p)`.
        fold: From `(M, H, d, p)` to `(M, *shape)`; `None` for `(d, p)`.
        tokens: K n as far as known when the step is traced.
    """

    def __init__(self, left, right, fold=None, tokens=None):
        self.left, self.right = left, right
        self.fold = fold if fold is not None else _drop_heads
        heads, groups, rows, inputs = left.shape
        outputs = right.shape[3]
        self.tokens = groups * rows if tokens is None else tokens
        self.work = matrix_work(self.tokens, inputs, outputs, heads, groups)
        self._heads = None

    def joined(self, other):
        """The contribution of both uses: their tokens, side by side."""
        return Product(
            keras.ops.concatenate([self.left, other.left], axis=2),
            keras.ops.concatenate([self.right, other.right], axis=2),
            self.fold,
            self.tokens + other.tokens,
        )

    def stack(self):
        return self.fold(self._unfolded())

    def _unfolded(self):
        """The K gradients as they come, `(K, H, d, p)`."""
        if self._heads is None:
            heads = products.weight_product(self.left, self.right)
            self._heads = products.swapaxes(heads, 0, 1)
        return self._heads

    def gram(self):
        if self.work.choice == "store":
            return products.inner_products(self._unfolded())
        return ghost_gram([(self.left, self.right)], self.tokens)

    def combine(self, weights):
        if self.work.choice == "store":
            whole = group_weights.combine(weights, self._unfolded())
            return self.fold(whole[None])[0]
        left, right = group_weights.weighted_factors(
            weights, self.left, self.right
        )
        product = products.weight_product(all_tokens(left), all_tokens(right))
        return self.fold(product[None])[0]

    def inner(self, tensor):
        return products.inner_products(self.stack(), tensor)


class Scattered:
    """Gradients of a table: token t adds `rows_t` to row `ids_t`.

    Args:
        ids: Integer tensor `(K, n)`, at least 0.
        rows: Tensor `(K, n, d)`.
        size: V, the rows of the table.
        tokens: K n as far as known when the step is traced.
    """

    def __init__(self, ids, rows, size, tokens=None):
        self.ids = keras.ops.cast(ids, "int32")
        self.rows = in_full_precision(rows)
        self.size = size
        groups = rows.shape[0]
        self.tokens = groups * rows.shape[1] if tokens is None else tokens
        self._groups = groups
        used = min(size, self.tokens)
        self.work = dataclasses.replace(
            work_of(self.tokens, used, rows.shape[2], 1, groups),
            ordinary=2 * self.tokens * rows.shape[2],
            again=0,
        )

    def joined(self, other):
        return Scattered(
            keras.ops.concatenate([self.ids, other.ids], axis=1),
            keras.ops.concatenate([self.rows, other.rows], axis=1),
            self.size,
            self.tokens + other.tokens,
        )

    def stack(self):
        return self._sum(self.ids, self.size)

    def gram(self):
        """Forms no K tables: only rows that occur, at most one per token."""
        ids = products.reshape(self.ids, (-1,))
        if self.size <= self.tokens:
            return products.inner_products(self.stack())
        order = keras.ops.argsort(ids)
        in_order = keras.ops.take(ids, order, axis=0)
        changes = keras.ops.cast(in_order[1:] != in_order[:-1], "int32")
        rank = keras.ops.concatenate([changes[:1] * 0, changes], axis=0)
        rank = keras.ops.cumsum(rank)
        # `rank[i]` is that of token `order[i]`; put it back in place.
        ranks = keras.ops.take(rank, keras.ops.argsort(order), axis=0)
        ranks = products.reshape(ranks, keras.ops.shape(self.ids))
        count = keras.ops.shape(ids)[0]
        return products.inner_products(self._sum(ranks, count))

    def combine(self, weights):
        rows = group_weights.weighted_rows(weights, self.rows)
        return products.segment_sum(
            products.reshape(rows, (-1, rows.shape[2])),
            products.reshape(self.ids, (-1,)),
            self.size,
        )

    def inner(self, tensor):
        tensor = in_full_precision(tensor)
        there = keras.ops.take(tensor, self.ids, axis=0)
        return keras.ops.sum(there * self.rows, axis=(1, 2))

    def _sum(self, ids, size):
        """The table of each group, `(K, size, d)`."""
        first = keras.ops.arange(self._groups, dtype="int32")[:, None] * size
        width = self.rows.shape[2]
        summed = products.segment_sum(
            products.reshape(self.rows, (-1, width)),
            products.reshape(ids + first, (-1,)),
            self._groups * size,
        )
        return products.reshape(summed, (self._groups, size, width))


class Tied:
    """One table that is looked up and multiplied by: both contributions."""

    def __init__(self, scattered, product):
        self.scattered, self.product = scattered, product
        self.tokens = scattered.tokens + product.tokens
        self.work = product.work

    def stack(self):
        return self.scattered.stack() + self.product.stack()

    def gram(self):
        if self.work.choice == "store":
            return products.inner_products(self.stack())
        cross = self._cross()
        return (
            self.scattered.gram()
            + self.product.gram()
            + cross
            + keras.ops.transpose(cross)
        )

    def combine(self, weights):
        return self.scattered.combine(weights) + self.product.combine(weights)

    def inner(self, tensor):
        return self.scattered.inner(tensor) + self.product.inner(tensor)

    def _cross(self):
        """Entry (i, j): looked-up tokens t of i against tokens s of j.

        The table's gradient is `left' right` with left (n, V): token t picks
        column `ids_t` of it.
        """
        left = all_tokens(self.product.left)[0]
        right = all_tokens(self.product.right)[0]
        groups, _, width = self.scattered.rows.shape
        rows = products.reshape(self.scattered.rows, (-1, width))
        ids = products.reshape(self.scattered.ids, (-1,))
        picked = keras.ops.take(in_full_precision(left), ids, axis=1)
        pairs = keras.ops.transpose(picked)
        pairs = pairs * products.exact_products(rows, right)
        return sum_blocks(pairs, groups, groups)


def join(first, second):
    """One contribution from two uses of the same variable."""
    kinds = {type(first), type(second)}
    if kinds == {Scattered, Product}:
        scattered = first if isinstance(first, Scattered) else second
        product = second if scattered is first else first
        if product.left.shape[0] == 1:
            return Tied(scattered, product)
    if kinds == {Scattered} or (kinds == {Product} and _match(first, second)):
        return first.joined(second)
    if Tied in kinds and kinds != {Tied}:
        tied, other = (
            (first, second) if isinstance(first, Tied) else (second, first)
        )
        if isinstance(other, Scattered):
            return Tied(tied.scattered.joined(other), tied.product)
        if isinstance(other, Product) and _match(tied.product, other):
            return Tied(tied.scattered, tied.product.joined(other))
    return Stored(first.stack() + second.stack(), first.tokens + second.tokens)


def _drop_heads(heads):
    return heads[:, 0]


def _match(first, second):
    return (
        first.fold is second.fold
        and first.left.shape[0] == second.left.shape[0]
        and first.left.shape[3] == second.left.shape[3]
        and first.right.shape[3] == second.right.shape[3]
    )
