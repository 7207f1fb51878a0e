"""Aggregate: the gradient of a step by a rule from those of groups."""

from collections.abc import Callable
from typing import Any

import keras

from keras_stab.gradients.small_problems import weights_by_function
from keras_stab.numerics.aggregation import RULES
from keras_stab.numerics.aggregation import Rule
from keras_stab.optimizers.group_aggregation import GroupAggregation
from keras_stab.optimizers.group_aggregation import unknown_rows
from keras_stab.optimizers.group_arguments import asks_for_sizes
from keras_stab.optimizers.group_arguments import checked_rule
from keras_stab.registration import registered


@registered
class Aggregate(GroupAggregation):
    r"""Replaces the mean gradient with a combination that a rule chooses.

    The rows of a batch are split into K groups with gradients $g_1, \dots,
    g_K$, each of the model's own loss on the rows of that group. The inner
    optimizer is given

    $$
    d = \sum_k \lambda_k g_k, \qquad
    \lambda = A(G), \qquad G_{ij} = \langle g_i, g_j \rangle
    $$

    in place of the mean gradient. A sees inner products alone, so no K
    gradients need to exist one by one.

    - `"upgrad"`: $d = \frac{1}{K} \sum_k \pi(g_k)$, where $\pi(g)$ is the
      vector nearest to g with $\langle \pi(g), g_j \rangle \ge 0$ for all j.
      To first order no group's loss increases, and groups that agree get the
      mean.
    - `"min_norm"`: the shortest convex combination: `GRAIN`, step for step.
    - `"mean"`: $\lambda_k = 1 / K$, for comparison.
    - A function of your own, see `keras_stab.methods`.

    Args:
        inner_optimizer: Keras optimizer, name or config, that makes a step from
            $d$. Defaults to `"adamw"`.
        rule: One of the names above; or a function `rule(gram)` or `rule(gram,
            sizes)` that returns the weights, `(K,)`. It is written in
            `keras.ops` and runs as a part of the compiled step. `gram` is
            `(K, K)`, in float32 or float64; `sizes` is `(K,)`, the rows in
            each group, in the same dtype. Both are 0 where a group takes no
            part (it has no rows, or a gradient that is not finite), and its
            weight does not count. Register the function as serializable to
            save the model. Defaults to `"upgrad"`.
        groups: Int from 1 to 64, K; with `across="replicas"` those of each
            replica. At least 8 rows per group are advised. 1 in all is the
            inner optimizer itself. `None` stands for 8, or for 1 per replica.
            Defaults to `None`.
        across: As in `GRAIN`: `None` for parts of each batch, `"replicas"`, or
            `"batches"` for K successive batches. Where the optimizer does not
            see the rows of a gradient, each of `sizes` is 1. Defaults to
            `None`.
        engine: `"auto"`, `"one_pass"` or `"microbatch"`, as in `GRAIN`.
            Defaults to `"auto"`.
        grouping: `"interleaved"`, `"contiguous"` or `None`, as in `GRAIN`.
            Defaults to `None`.
        name: String or `None`.

    Raises:
        ValueError: If an argument is out of range, belongs on the inner
            optimizer, or the inner optimizer cannot be used.
        RuntimeError: If it is given plain gradients (`across=None`).

    A group with a NaN or infinite gradient is dropped and counted; under a
    `LossScaleOptimizer` (`mixed_float16`) it makes the scaler skip the step.
    `diagnostics()` reads the weights and figures of the last step.

    Example:

    >>> import keras, keras_stab
    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> optimizer = keras_stab.Aggregate("sgd", "upgrad", groups=2)
    >>> model.compile(optimizer=optimizer, loss="mse")
    >>> x, y = keras.ops.ones((8, 3)), keras.ops.ones((8, 1))
    >>> history = model.fit(x, y, batch_size=8, verbose=0)
    >>> [round(w, 3) for w in optimizer.diagnostics()["weights"]]
    [0.5, 0.5]

    Departures from the paper:
        The gradients are those of groups of rows, where the papers have one
        for each task or row. UPGrad is solved to a certificate, without the
        published package's regularisation of the Gram matrix. The promise of a
        rule is about $d$, not about a momentum or Adam step made from it.

    Cost:
        That of `GRAIN`, but for the K x K problem: K of them for `"upgrad"`.

    References:
        - Quinton, Rey, 2024, "Jacobian Descent for Multi-Objective
          Optimization", arXiv:2406.16232
        - Desideri, 2012, "Multiple-gradient descent algorithm (MGDA) for
          multiobjective optimization", C. R. Acad. Sci. Paris 350
    """

    default_groups = 8

    def __init__(
        self,
        inner_optimizer: str | dict | keras.optimizers.Optimizer = "adamw",
        rule: str | dict | Callable[..., Any] = "upgrad",
        groups: int | None = None,
        across: str | None = None,
        engine: str = "auto",
        grouping: str | None = None,
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            inner_optimizer, groups, across, engine, grouping, name, **kwargs
        )
        self.rule = checked_rule(rule, RULES)

    @property
    def solver(self) -> Rule:
        return RULES[self.rule]

    def solve(
        self,
        gram: Any,
        present: Any,
        nonfinite: str,
        rows: Any = None,
        sizes: Any = None,
    ) -> Any:
        if isinstance(self.rule, str):
            return super().solve(gram, present, nonfinite, rows, sizes)
        if not asks_for_sizes(self.rule):
            sizes = None
        elif sizes is None:
            sizes = [1] * gram.shape[0]
        return weights_by_function(
            self.rule,
            gram,
            present,
            unknown_rows() if rows is None else rows,
            nonfinite,
            sizes,
        )

    def get_config(self) -> dict[str, Any]:
        rule = self.rule
        if not isinstance(rule, str):
            rule = keras.saving.serialize_keras_object(rule)
        return {**super().get_config(), "rule": rule}
