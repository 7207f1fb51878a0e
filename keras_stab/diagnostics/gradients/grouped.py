"""The gradients of groups of rows, or of losses, of a compiled model."""

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_stab import keras_internals
from keras_stab.arguments import checked_boolean
from keras_stab.arguments import checked_choice
from keras_stab.arguments import checked_count
from keras_stab.batches import own_batch
from keras_stab.diagnostics.gradients.engines import OfGroups
from keras_stab.diagnostics.gradients.engines import OfLosses
from keras_stab.diagnostics.gradients.engines import OfRows
from keras_stab.diagnostics.gradients.engines import Rows
from keras_stab.diagnostics.gradients.grouping import arrays
from keras_stab.diagnostics.gradients.grouping import numbers_of
from keras_stab.diagnostics.targets import check_loss
from keras_stab.diagnostics.targets import check_targets
from keras_stab.gradients.by_loss import LOSSES
from keras_stab.gradients.by_loss import count_losses
from keras_stab.gradients.one_pass.units import Refusal

ENGINES = ("auto", "one_pass", "microbatch")


@dataclasses.dataclass(frozen=True, eq=False)
class GradientGroups:
    r"""What `group_gradients` found; K groups, each with a gradient $g_k$.

    Attributes:
        gram: Array `(K, K)` of float64, $\langle g_i, g_j \rangle$ over all
            trainable weights.
        sizes: Array `(K,)`, rows in each group; for losses, all rows.
        engine: `"one_pass"`, or `"microbatch"` where each gradient was formed;
            `"one_forward"` for losses.
        reason: String, why.
        names: For losses, K strings in the order of `gram`: what `fit` logs
            them under, without the `_loss`. Otherwise `None`.
    """

    gram: np.ndarray
    sizes: np.ndarray
    engine: str
    reason: str
    _combine: Callable = dataclasses.field(repr=False)
    names: tuple[str, ...] | None = None

    @property
    def norms(self) -> np.ndarray:
        """The norms $|g_k|$, `(K,)`."""
        return np.sqrt(np.maximum(np.diag(self.gram), 0.0))

    @property
    def cosines(self) -> np.ndarray:
        """The cosines of all pairs, `(K, K)`; 0 with a gradient of zero."""
        norms = self.norms
        products = norms[:, None] * norms[None, :]
        safe = np.where(products > 0, products, 1.0)
        return np.where(products > 0, np.clip(self.gram / safe, -1.0, 1.0), 0.0)

    def combine(self, weights: Sequence[float]) -> list[np.ndarray]:
        r"""The combination $\sum_k \lambda_k g_k$, at the same weights.

        One more pass over the data where the gradients were not formed: the
        model must still hold the weights at which the Gram matrix was taken,
        or what it holds now counts.

        Args:
            weights: K numbers, $\lambda$. Groups of weight 0 do not enter,
                even when their gradient is not finite.

        Returns:
            List of arrays, one per trainable variable of the model.

        Raises:
            ValueError: If there are not K weights.
        """
        given = np.asarray(weights, "float64")
        if given.shape != self.sizes.shape:
            raise ValueError(
                "`weights` must hold one number for each of the "
                f"{len(self.sizes)} groups. Received: weights of shape "
                f"{given.shape}"
            )
        return self._combine(given)


def group_gradients(
    model: keras.Model,
    x: Any,
    y: Any = None,
    groups: int | str | Sequence[int] = 8,
    sample_weight: Any = None,
    batch_size: int = 256,
    training: bool = False,
    engine: str = "auto",
    memory_limit: int = 2**30,
    verbose: int = 1,
) -> GradientGroups:
    r"""Measures gradients of groups of rows or of losses: products, cosines.

    With $L_k$ the loss that the model was compiled with, penalties included,
    on the rows of group k alone, and $g_k = \nabla L_k$ at the weights that
    the model holds:

    $$
    G_{ij} = \langle g_i, g_j \rangle, \qquad
    \cos_{ij} = \frac{G_{ij}}{|g_i| |g_j|}, \qquad
    \sum_k \lambda_k g_k
    $$

    Rows that a model fits against all others, with wrong labels say, show in
    them, and so do groups that pull apart. The figures are exact, up to
    rounding. Nothing in the model changes: weights, statistics, seeds,
    metrics, optimizer.

    With `groups="losses"` there is a group for each loss that the model was
    compiled with, and a negative cosine says which tasks are in conflict. As
    in `Aggregate`, with the same code, $g_k$ is the gradient of

    $$
    K w_k L_k + R
    $$

    on all rows, with the weight $w_k$ of $L_k$ in
    `compile(loss_weights=...)` and all penalties R, regularisers and
    `add_loss`. So the mean of the $g_k$ is the gradient of the model's loss.

    Args:
        model: A compiled `keras.Model`.
        x: Array, or a nested structure of them, one row per sample.
        y: The targets, likewise; `None` where the loss needs none.
        groups: Int K: row i is in group i mod K, as for `GRAIN`. N ints, one
            per row: the number of its group, from 0. `"rows"`: each row is a
            group. `"losses"`: each of the 2 to 64 losses of `compile` is one,
            on all rows. Defaults to 8.
        sample_weight: Array of N weights, one for each output, or `None`, as
            for `fit`.
        batch_size: Int, rows that the model sees at once; two such batches in
            the one-pass engine. Where the rows of a group or loss are several
            batches, its gradient is the mean of theirs, by their rows.
            Defaults to 256.
        training: Whether layers run as in training, batch-norm by the
            statistics of those rows of a group that are in one batch.
            Defaults to `False`: no dropout, and moving statistics.
        engine: `"one_pass"` takes all inner products from the forward and
            backward passes of pairs of batches, and forms no gradient;
            `"microbatch"` forms the gradient of each group and keeps them.
            `"auto"`: for `"rows"`, and where all rows are one batch, the
            first if the model allows it; else the second, if it fits into
            `memory_limit`. Left out with `groups="losses"`: one forward pass
            and one back per loss give the K gradients, which are kept.
            Defaults to `"auto"`.
        memory_limit: Int, bytes that gradients which are kept may take.
            Defaults to 1 GiB.
        verbose: 1 for a progress bar over batches, 0 for none. Defaults to 1.

    Returns:
        A `GradientGroups`.

    Raises:
        ValueError: If the model has no loss or no trainable weight, an
            argument is out of range, a number of rows does not fit, or the
            gradients would take more than `memory_limit`; with
            `groups="losses"`, if there is one loss only, or the model has a
            `compute_loss` of its own.

    Example:

    >>> import keras, keras_stab, numpy as np
    >>> model = keras.Sequential([keras.layers.Dense(1, use_bias=False)])
    >>> model.compile(loss="mse")
    >>> x, y = np.eye(2), np.ones((2, 1))
    >>> _ = model(x); model.set_weights([np.zeros((2, 1))])
    >>> found = keras_stab.group_gradients(model, x, y, "rows", verbose=0)
    >>> found.gram.round(3).tolist()
    [[4.0, 0.0], [0.0, 4.0]]
    >>> found.combine([0.5, 0.5])[0].round(3).tolist()
    [[-1.0], [-1.0]]

    Two tasks that want opposite things of one output:

    >>> inputs = keras.Input((2,))
    >>> shared = keras.layers.Dense(1, kernel_initializer="zeros")(inputs)
    >>> model = keras.Model(inputs, {"up": shared, "down": shared})
    >>> model.compile(loss={"up": "mse", "down": "mse"})
    >>> y = {"up": y, "down": -y}
    >>> found = keras_stab.group_gradients(model, x, y, "losses", verbose=0)
    >>> found.names, found.cosines.round(3).tolist()
    (('up', 'down'), [[1.0, -1.0], [-1.0, 1.0]])

    Departures from the paper:
        None: the figures are definitions. They are those of one moment, where
        TracIn sums them over many.

    Cost:
        `"one_pass"`: N / `batch_size` batches make half as many squared pairs,
        of a forward and a backward pass each; kept are `(K, K)` numbers.
        `"microbatch"`: one pass over the data; kept are K gradients.
        `groups="losses"`: likewise, with K passes back for one forward.

    References:
        - Pruthi, Liu, Sundararajan, Kale, 2020, "Estimating Training Data
          Influence by Tracing Gradient Descent", arXiv:2002.08484
        - McCandlish, Kaplan, Amodei et al., 2018, "An Empirical Model of
          Large-Batch Training", arXiv:1812.06162
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            "`model` must be a keras.Model. Received: model of type "
            f"{type(model).__name__}"
        )
    check_loss(model)
    batch_size = checked_count("batch_size", batch_size, 1)
    training = checked_boolean("training", training)
    engine = checked_choice("engine", engine, ENGINES)
    memory_limit = checked_count("memory_limit", memory_limit, 1, 2**62)
    verbose = checked_count("verbose", verbose, 0, 1)
    by_loss = isinstance(groups, str) and groups == LOSSES
    if by_loss and engine != "auto":
        raise ValueError(
            'With groups="losses" every group has all rows, and its gradient '
            "comes from one forward pass: leave `engine` out. Received: "
            f"engine={engine!r}"
        )
    data = arrays(own_batch(model, x, y, sample_weight))
    check_targets("y", y, [data], model)
    rows = Rows(model, data, batch_size, training, verbose)
    if by_loss:
        return _of_losses(model, rows, memory_limit)
    numbers = numbers_of(groups, rows.count)
    sizes = np.bincount(numbers)
    kinds: dict[str, Any] = {"one_pass": OfRows, "microbatch": OfGroups}
    order, reason = _order(engine, groups, rows, len(sizes), memory_limit)
    for name in order:
        try:
            made = kinds[name](rows, numbers, sizes, memory_limit)
            gram = made.gram()
        except Refusal as refusal:
            reason = str(refusal)
            if name == order[-1]:
                raise ValueError(_told(name, reason, model)) from refusal
            continue
        return GradientGroups(gram, sizes, name, reason, made.combine)
    raise AssertionError  # the loop returns or raises


def _of_losses(model, rows, memory_limit):
    count = count_losses(model)
    try:
        made = OfLosses(rows, count, memory_limit)
    except Refusal as refusal:
        raise ValueError(
            f"The gradients of the losses are all kept: {refusal}. Use a "
            f"larger `memory_limit`. Received: model {model.name!r}"
        ) from refusal
    return GradientGroups(
        made.gram(),
        np.full(count, rows.count),
        "one_forward",
        "one forward pass, one back per loss",
        made.combine,
        tuple(entry.name for entry in keras_internals.loss_entries(model)),
    )


def _order(engine, groups, rows, count, memory_limit):
    """The engines to try, one after the other, and why the first."""
    if engine != "auto":
        return [engine], "asked for"
    if isinstance(groups, str) or rows.count <= rows.batch_size:
        return ["one_pass", "microbatch"], "no gradient is formed"
    if rows.bytes_of(count) <= memory_limit:
        return ["microbatch"], "one pass over the data, whose gradients fit"
    return ["one_pass"], "the gradients of all groups would not fit"


def _told(name, reason, model):
    other = "microbatch" if name == "one_pass" else "one_pass"
    return (
        f"engine={name!r} cannot give the gradients of these groups: {reason}. "
        f"Use fewer rows or groups, a larger `memory_limit`, or try "
        f"engine={other!r}. Received: model {model.name!r}"
    )
