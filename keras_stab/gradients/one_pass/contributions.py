"""What a use of a variable adds to group gradients, in the cheapest form.

Each class answers for one variable: `gram()`, the inner products of its K
group gradients, `(K, K)`; `combine(weights)`, their weighted sum, of the
variable's shape; `stack()`, all K of them, `(K, *shape)`; `inner(tensor)`,
the inner product of each with a tensor of that shape, `(K,)`.
"""

import dataclasses
import math

import keras

from keras_stab.backend import devices
from keras_stab.backend import products

# From here on half of the token products is worth more operations.
_MANY_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Work:
    """Predicted multiply-adds of one contribution, beyond a stock step.

    Attributes:
        tokens: N, rows times positions.
        inputs, outputs: d and p, the sides of the weight matrix.
        ghost: Of the Gram from token products; `None` where there are none.
        store: Of the K gradients, with the memory traffic that they cause.
        again: Of reading the weights for each group anew, forward and back,
            as small batches do.
        ordinary: Of the layer in a stock step, 3 N d p.
        choice: `"ghost"` or `"store"`.
        bytes: Kept until the combination, in the chosen form.
    """

    tokens: int
    inputs: int
    outputs: int
    ghost: int | None
    store: int
    again: int
    ordinary: int
    choice: str
    bytes: int

    @property
    def extra(self):
        return self.ghost if self.choice == "ghost" else self.store


def matrix_work(tokens, inputs, outputs, heads, groups):
    """The `Work` of K gradients of H matrices, from token products or not."""
    pairs = tokens**2
    if tokens >= _MANY_TOKENS:
        pairs = pairs * 3 // 4  # see `ghost_gram`
    ghost = pairs * heads * (inputs + outputs)
    return _work(tokens, inputs, outputs, heads, groups, ghost)


def cheaper_form(ghost, store):
    """The name of the form with less predicted work."""
    return "ghost" if ghost < store else "store"


def _work(tokens, inputs, outputs, heads, groups, ghost=None):
    traffic = 100 if devices.has_accelerator() else 10
    weights = heads * inputs * outputs
    store = int(groups * weights * ((groups + 1) / 2 + 1 + 3 * traffic))
    cheaper = "store" if ghost is None else cheaper_form(ghost, store)
    held = groups * weights
    if cheaper == "ghost":
        held = tokens * heads * (inputs + outputs)
    return Work(
        tokens=tokens,
        inputs=inputs,
        outputs=outputs,
        ghost=ghost,
        store=store,
        again=2 * (groups - 1) * weights * traffic,
        ordinary=3 * tokens * weights,
        choice=cheaper,
        bytes=4 * held,
    )


class Stored:
    """The K gradients themselves.

    Args:
        stack: Tensor `(K, *shape)`.
        tokens: Rows times positions.
        work: The `Work`, when it is not that of a vector of weights.
    """

    def __init__(self, stack, tokens=0, work=None):
        self._stack = products.to_float32(stack)
        self.tokens = tokens
        groups, *shape = self._stack.shape
        self.work = work or _work(tokens, 1, math.prod(shape), 1, groups)

    def stack(self):
        return self._stack

    def gram(self):
        return products.inner_products(self._stack)

    def combine(self, weights):
        return products.combine(weights, self._stack)

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
        self._stack = None

    def joined(self, other):
        """The contribution of both uses: their tokens, side by side."""
        return Product(
            keras.ops.concatenate([self.left, other.left], axis=2),
            keras.ops.concatenate([self.right, other.right], axis=2),
            self.fold,
            self.tokens + other.tokens,
        )

    def stack(self):
        if self._stack is None:
            heads = products.weight_product(self.left, self.right)
            self._stack = self.fold(products.swapaxes(heads, 0, 1))
        return self._stack

    def gram(self):
        if self.work.choice == "store":
            return products.inner_products(self.stack())
        return ghost_gram(self.left, self.right, self.tokens)

    def combine(self, weights):
        if self.work.choice == "store":
            return products.combine(weights, self.stack())
        left = products.without_dropped(weights, self.left, axis=1)
        right = products.weighted_rows(weights, self.right, axis=1)
        product = products.weight_product(_all_tokens(left), _all_tokens(right))
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
        self.rows = products.to_float32(rows)
        self.size = size
        groups = rows.shape[0]
        self.tokens = groups * rows.shape[1] if tokens is None else tokens
        self._groups = groups
        used = min(size, self.tokens)
        self.work = dataclasses.replace(
            _work(self.tokens, used, rows.shape[2], 1, groups),
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
        """Never K tables: only the rows that occur, at most one a token."""
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
        rows = products.weighted_rows(weights, self.rows)
        return keras.ops.segment_sum(
            products.reshape(rows, (-1, rows.shape[2])),
            products.reshape(self.ids, (-1,)),
            num_segments=self.size,
        )

    def inner(self, tensor):
        tensor = products.to_float32(tensor)
        there = keras.ops.take(tensor, self.ids, axis=0)
        return keras.ops.sum(there * self.rows, axis=(1, 2))

    def _sum(self, ids, size):
        """The table of each group, `(K, size, d)`."""
        first = keras.ops.arange(self._groups, dtype="int32")[:, None] * size
        width = self.rows.shape[2]
        summed = keras.ops.segment_sum(
            products.reshape(self.rows, (-1, width)),
            products.reshape(ids + first, (-1,)),
            num_segments=self._groups * size,
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
        left = _all_tokens(self.product.left)[0]
        right = _all_tokens(self.product.right)[0]
        groups, _, width = self.scattered.rows.shape
        rows = products.reshape(self.scattered.rows, (-1, width))
        ids = products.reshape(self.scattered.ids, (-1,))
        picked = keras.ops.take(products.to_float32(left), ids, axis=1)
        pairs = keras.ops.transpose(picked)
        pairs = pairs * products.exact_products(rows, right)
        return _sum_blocks(pairs, groups, groups)


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


def ghost_gram(left, right, tokens):
    """Inner products of `left_k' right_k` without forming them.

    For many tokens only the blocks (i, j) with i in the first half or j in
    the second are formed: the rest follows by symmetry.
    """
    groups = left.shape[1]
    if groups == 1 or tokens < _MANY_TOKENS:
        return _ghost_blocks(left, right, left, right)
    half = groups // 2
    first = left[:, :half], right[:, :half]
    second = left[:, half:], right[:, half:]
    corner = _ghost_blocks(*first, *second)
    top = [_ghost_blocks(*first, *first), corner]
    bottom = [keras.ops.transpose(corner), _ghost_blocks(*second, *second)]
    halves = [keras.ops.concatenate(part, axis=1) for part in (top, bottom)]
    return keras.ops.concatenate(halves, axis=0)


def _ghost_blocks(left, right, other_left, other_right):
    pairs = products.exact_products(
        _all_tokens(left), _all_tokens(other_left)
    ) * products.exact_products(_all_tokens(right), _all_tokens(other_right))
    pairs = pairs[0] if pairs.shape[0] == 1 else products.sum_over(pairs, 0)
    return _sum_blocks(pairs, left.shape[1], other_left.shape[1])


def _sum_blocks(pairs, groups, others):
    """Sums the blocks of a matrix of tokens by tokens, group by group."""
    width = pairs.shape[1] or keras.ops.shape(pairs)[1]
    pairs = products.reshape(pairs, (-1, others, width // others))
    pairs = products.sum_over(pairs, 2)
    pairs = products.reshape(pairs, (groups, -1, others))
    return products.sum_over(pairs, 1)


def _all_tokens(factor):
    """From `(H, K, n, d)` to `(H, K n, d)`."""
    return products.reshape(factor, (factor.shape[0], -1, factor.shape[3]))


def _drop_heads(heads):
    return heads[:, 0]


def _match(first, second):
    return (
        first.fold is second.fold
        and first.left.shape[0] == second.left.shape[0]
        and first.left.shape[3] == second.left.shape[3]
        and first.right.shape[3] == second.right.shape[3]
    )
