"""GRAIN: group aggregation via a min-norm objective."""

from typing import Any

import keras

from keras_stab.arguments import checked_choice
from keras_stab.numerics.aggregation import MinNorm
from keras_stab.numerics.aggregation import Rule
from keras_stab.optimizers.group_aggregation import GroupAggregation
from keras_stab.registration import registered


@registered
class GRAIN(GroupAggregation):
    r"""Replaces the mean gradient with one that conflicts with no group.

    The rows of a batch are split into K groups (row i belongs to group
    i mod K, see `grouping`) with gradients $g_1, \dots, g_K$, each of the
    model's own loss on the rows of that group. The inner optimizer is given

    $$
    d = \sum_k \lambda_k g_k, \qquad
    \lambda = \arg\min_{\lambda \ge 0, \, \sum_k \lambda_k = 1}
        \Big\| \sum_k \lambda_k g_k \Big\|^2
    $$

    in place of the mean gradient. Then $\langle d, g_k \rangle \ge |d|^2$ for
    every k: to first order, a step along $-d$ increases no group's loss.

    Args:
        inner_optimizer: Keras optimizer, name or config, that makes a step from
            $d$. Clipping, weight decay, moments and learning rate are its
            own. Defaults to `"adamw"`.
        groups: Int from 1 to 64, K; with `across="replicas"` those of each
            replica. At least 8 rows per group are advised. 1 in all is the
            inner optimizer itself. `"losses"`: one for each loss that the
            model was compiled with, each on all rows, as in `Aggregate`; then
            `across`, `engine` and `grouping` are left out. `None` stands for
            4, or for 1 per replica. Defaults to `None`.
        across: `None`: the groups are parts of each batch; works in `fit`
            and `train_on_batch` of any `keras.Model`. `"replicas"`: as
            `None`, and each group lies whole on one of the devices that share
            a batch, so that their gradients are exchanged at the price of a
            mean (1.5 times that under `MirroredStrategy`). `"batches"`: the K
            groups are K successive batches and the weights move after every
            K-th; takes plain gradients, so it works in any training loop, but
            keeps K gradients as state. Defaults to `None`.
        engine: How group gradients are computed. `"microbatch"`: the ordinary
            gradient of each group, which works for any model. `"one_pass"`:
            one forward and one backward pass for all groups, for models
            whose layers do not mix the rows of a batch (Keras's own
            `BatchNormalization` is served). `"auto"` takes the cheaper one
            that works; `plan()` says which and why. Defaults to `"auto"`.
        grouping: `"interleaved"`: row i of a batch belongs to group i mod K.
            `"contiguous"`: the groups are blocks of B/K successive rows,
            rounded up, so that the last ones may be shorter or empty; with
            `groups=K` one device computes what K devices do with
            `across="replicas"`, where no other rule is possible. `None`
            stands for the one that fits `across`. Defaults to `None`.
        zero_groups: `"exclude"`: a group whose gradient is below 1e-7 of the
            largest gets weight 0. `"literal"`: $d$ vanishes then, as the
            formula says. Defaults to `"exclude"`.
        name: String or `None`.

    Raises:
        ValueError: If an argument is out of range, belongs on the inner
            optimizer, or the inner optimizer cannot be used.
        RuntimeError: If it is given plain gradients (`across=None`).

    A group with a NaN or infinite gradient is dropped and counted; under a
    `LossScaleOptimizer` (`mixed_float16`) it makes the scaler skip the step.
    `diagnostics()` reads the weights and figures of the last step.

    In a PyTorch process group `fit` of every process trains one model, and
    group k is the union of their rows of group k. With `across="replicas"`
    `apply` also takes the gradients of a process's own rows, before any are
    summed (DistributedDataParallel: inside of `no_sync()`), in place of an
    all-reduce; a loss scaler then goes inside of GRAIN.

    Example:

    >>> import keras, keras_stab
    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> optimizer = keras_stab.GRAIN("sgd", groups=2)
    >>> model.compile(optimizer=optimizer, loss="mse")
    >>> x, y = keras.ops.ones((8, 3)), keras.ops.ones((8, 1))
    >>> history = model.fit(x, y, batch_size=8, verbose=0)
    >>> [round(w, 3) for w in optimizer.diagnostics()["weights"]]
    [0.5, 0.5]

    Departures from the paper:
        Only its abstract was available to us. K, the grouping rule, the solver,
        the treatment of zero and non-finite groups and the defaults are ours,
        and none of its tables was reproduced. The guarantee above is about
        $d$, not about a momentum or Adam step made from it.

    Cost:
        `"one_pass"`: one forward pass, one backward pass and some products
        per layer; during a step it holds the layers' inputs and output
        gradients, or K gradients where those are smaller. `"microbatch"`: the
        work of a plain step in K parts; during a step it holds K gradients
        (4 K bytes per weight). `across="batches"` keeps K gradients.
        Measurements are in `benchmarks/results`.

    References:
        - Bui, Yao, Wang, 2026, "GRAIN: Group Aggregation via Min-Norm
          Objective", arXiv:2606.22917
        - Desideri, 2012, "Multiple-gradient descent algorithm (MGDA) for
          multiobjective optimization", C. R. Acad. Sci. Paris 350
    """

    def __init__(
        self,
        inner_optimizer: str | dict | keras.optimizers.Optimizer = "adamw",
        groups: int | str | None = None,
        across: str | None = None,
        engine: str = "auto",
        zero_groups: str = "exclude",
        grouping: str | None = None,
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            inner_optimizer, groups, across, engine, grouping, name, **kwargs
        )
        self.zero_groups = checked_choice(
            "zero_groups", zero_groups, ("exclude", "literal")
        )

    @property
    def solver(self) -> Rule:
        return MinNorm(self.zero_groups)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "zero_groups": self.zero_groups}
