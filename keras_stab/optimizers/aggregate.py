"""Aggregate: the gradient of a step by a rule from those of groups."""

from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_stab.arguments import checked_count
from keras_stab.arguments import checked_number
from keras_stab.gradients.small_problems import weights_by_function
from keras_stab.numerics.aggregation import RULES
from keras_stab.numerics.aggregation import CAGrad
from keras_stab.numerics.aggregation import Rule
from keras_stab.optimizers.group_aggregation import GroupAggregation
from keras_stab.optimizers.group_aggregation import unknown_rows
from keras_stab.optimizers.group_arguments import asks_for_sizes
from keras_stab.optimizers.group_arguments import check_used
from keras_stab.optimizers.group_arguments import checked_rule
from keras_stab.optimizers.state import add_state
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
    - `"cagrad"`: the d that maximises $\min_k \langle d, g_k \rangle$ over
      $|d - \bar g| \le c |\bar g|$, with the mean $\bar g$.
    - `"pcgrad"`: each $g_k$ meets the others in a random order and gives up
      its component against one that it conflicts with; then the mean.
    - `"mean"`: $\lambda_k = 1 / K$, for comparison.
    - A function of your own, see `keras_stab.methods`.

    With `groups="losses"` there is a group for each loss that the model was
    compiled with, as in multi-task learning: $g_k$ is the gradient of

    $$
    K w_k L_k + R
    $$

    on all rows. $w_k$ is the weight of $L_k$ in `compile(loss_weights=...)`
    and R the sum of regularisers and `add_loss`, so that the mean of the $g_k$
    is the gradient of the model's loss.

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
            inner optimizer itself. `"losses"`: one for each of the 2 to 64
            losses of `compile`, each on all rows; `across`, `engine` and
            `grouping`, which say how to split rows, are left out then, and
            each of `sizes` is the rows of the batch. `None` stands for 8, or
            for 1 per replica. Defaults to `None`.
        across: As in `GRAIN`: `None` for parts of each batch, `"replicas"`, or
            `"batches"` for K successive batches. Where the optimizer does not
            see the rows of a gradient, each of `sizes` is 1. Defaults to
            `None`.
        engine: `"auto"`, `"one_pass"` or `"microbatch"`, as in `GRAIN`.
            Defaults to `"auto"`.
        grouping: `"interleaved"`, `"contiguous"` or `None`, as in `GRAIN`.
            Defaults to `None`.
        c: Float from 0 up to 1, the radius of the ball for `"cagrad"`; `None`
            stands for 0.5 there. Defaults to `None`.
        seed: Int of at least 0, the seed of the orders for `"pcgrad"`, new
            ones at every step; `None` stands for 0 there. All processes that
            train one model need the same. Defaults to `None`.
        name: String or `None`.

    Raises:
        ValueError: If an argument is out of range, belongs on the inner
            optimizer, or the inner optimizer cannot be used; in training, with
            `groups="losses"`, if there is one loss only, or the model has a
            `compute_loss` of its own.
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
        By default the gradients are those of groups of rows, where the papers
        have one for each row or, as with `groups="losses"`, for each task.
        UPGrad and CAGrad are solved to a certificate, without the published
        package's regularisation of the Gram matrix. PCGrad is the mean of the
        projected gradients, where the paper has their sum, so that learning
        rates keep their meaning; CAGrad is not rescaled. The promise of a rule
        is about $d$, not about a momentum or Adam step made from it.

    Cost:
        That of `GRAIN`, but for the K x K problem: K of them for `"upgrad"`.
        With `groups="losses"` one forward pass and K backward passes, and
        during a step K gradients (4 K bytes per weight).

    References:
        - Quinton, Rey, 2024, "Jacobian Descent for Multi-Objective
          Optimization", arXiv:2406.16232
        - Yu et al., 2020, "Gradient Surgery for Multi-Task Learning",
          arXiv:2001.06782
        - Liu et al., 2021, "Conflict-Averse Gradient Descent for Multi-task
          Learning", arXiv:2110.14048
        - Desideri, 2012, "Multiple-gradient descent algorithm (MGDA) for
          multiobjective optimization", C. R. Acad. Sci. Paris 350
    """

    default_groups = 8

    def __init__(
        self,
        inner_optimizer: str | dict | keras.optimizers.Optimizer = "adamw",
        rule: str | dict | Callable[..., Any] = "upgrad",
        groups: int | str | None = None,
        across: str | None = None,
        engine: str = "auto",
        grouping: str | None = None,
        c: float | None = None,
        seed: int | None = None,
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            inner_optimizer, groups, across, engine, grouping, name, **kwargs
        )
        self.rule = checked_rule(rule, RULES)
        self.c = checked_number("c", c, minimum=0.0, below=1.0, optional=True)
        self.seed = checked_count("seed", seed, 0, optional=True)
        check_used("c", c, self.rule, "cagrad")
        check_used("seed", seed, self.rule, "pcgrad")
        self._orders: Orders | None = None

    def build(self, variables: Iterable[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        if self.rule == "pcgrad":
            # By an initializer: while TensorFlow traces a step, an assignment
            # would be a part of it.
            self._order_seed = add_state(
                self, "order_seed", (2,), initializer=self._first_state
            )
            self._orders = Orders(self._order_seed)

    def _first_state(self, shape, dtype=None):
        return keras.ops.convert_to_tensor([self.seed or 0, 0], dtype)

    @property
    def solver(self) -> Rule:
        if self.rule == "cagrad" and self.c is not None:
            return CAGrad(self.c)
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

    def _draws(self, groups):
        return None if self._orders is None else self._orders.draw(groups)

    def apply_in_order(
        self, gradients: list[Any], variables: list[keras.Variable]
    ) -> None:
        super().apply_in_order(gradients, variables)
        if self._orders is not None:
            self._orders.advance()

    def get_config(self) -> dict[str, Any]:
        rule = self.rule
        if not isinstance(rule, str):
            rule = keras.saving.serialize_keras_object(rule)
        return {
            **super().get_config(),
            "rule": rule,
            "c": self.c,
            "seed": self.seed,
        }


class Orders:
    """Random numbers that are new at every step, from a state that is saved.

    Args:
        state: A variable, `[seed, steps]`.
    """

    def __init__(self, state):
        self._state = state
        # Its own state is never moved.
        self._generator = keras.random.SeedGenerator(0)

    def draw(self, groups):
        """Uniform numbers `(K, K)`; assigns nothing."""
        own = self._generator.state
        words = keras.ops.cast(self._state.value, own.dtype)
        with keras.StatelessScope([(own, words)]):
            return keras.random.uniform(
                (groups, groups), dtype="float32", seed=self._generator
            )

    def advance(self):
        """To the numbers of the next step."""
        self._state.assign(self._state.value + np.array([0, 1], "int32"))
