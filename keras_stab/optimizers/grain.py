"""GRAIN: group aggregation via a min-norm objective."""

from collections.abc import Iterable
from typing import Any

import keras

from keras_stab.arguments import checked_choice
from keras_stab.backend import many_tensors
from keras_stab.backend import products
from keras_stab.backend import updates
from keras_stab.gradients.engines import ENGINES
from keras_stab.gradients.oracle import GradientOracle
from keras_stab.gradients.plan import Plan
from keras_stab.gradients.planning import plan_for
from keras_stab.gradients.small_problems import min_norm_weights_and_measures
from keras_stab.numerics.gram_measures import GROUP_MEASURES
from keras_stab.numerics.gram_measures import weight_entropy
from keras_stab.optimizers.batch_window import BatchWindow
from keras_stab.optimizers.batch_window import HasWindow
from keras_stab.optimizers.figures import add_figures
from keras_stab.optimizers.figures import finite_figures
from keras_stab.optimizers.figures import read_figures
from keras_stab.optimizers.grain_arguments import check_inner
from keras_stab.optimizers.grain_arguments import checked_grouping
from keras_stab.optimizers.grain_arguments import checked_groups
from keras_stab.optimizers.groups_of_replicas import GroupsOfReplicas
from keras_stab.optimizers.state import add_state
from keras_stab.optimizers.state import widest_dtype
from keras_stab.registration import registered


@registered
class GRAIN(HasWindow, GroupsOfReplicas):
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
            inner optimizer itself. `None` stands for 4, or for 1 per replica.
            Defaults to `None`.
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

    plain_gradient_hint = (
        '. Or use GRAIN(..., across="batches"), which takes plain gradients '
        'in any training loop, or across="replicas" in those of processes'
    )

    def __init__(
        self,
        inner_optimizer: str | dict | keras.optimizers.Optimizer = "adamw",
        groups: int | None = None,
        across: str | None = None,
        engine: str = "auto",
        zero_groups: str = "exclude",
        grouping: str | None = None,
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(inner_optimizer, name=name, **kwargs)
        self.across = checked_choice(
            "across", across, (None, "batches", "replicas")
        )
        self.groups = checked_groups(groups, across)
        self.grouping = checked_grouping(grouping, across)
        self.engine = checked_choice("engine", engine, ENGINES)
        self.zero_groups = checked_choice(
            "zero_groups", zero_groups, ("exclude", "literal")
        )
        self._plan = None
        check_inner(self.inner_optimizer, across, engine)

    def build(self, variables: Iterable[keras.Variable]) -> None:
        if self.built:
            return
        variables = list(variables)
        super().build(variables)
        wide = widest_dtype(variables)
        self._total = self._all_groups()
        self._weights = add_state(self, "group_weights", (self._total,), wide)
        self._figures = add_figures(self, GROUP_MEASURES, wide)
        if self.across == "batches" and self.groups > 1:
            self._window = BatchWindow(self, variables, self.groups)

    @property
    def wants_oracle(self) -> bool:
        return self.across != "batches" and self._all_groups() > 1

    @property
    def rounds_as_keras(self) -> bool:
        return self._all_groups() == 1

    def _rule(self):
        return "replicas" if self.across == "replicas" else self.grouping

    def estimate(self, oracle: GradientOracle) -> list[Any]:
        if not self.wants_oracle:
            return super().estimate(oracle)
        groups = oracle.group_gradients(
            self._all_groups(), self.engine, self._rule()
        )
        self._plan = groups.plan
        weights, measures = min_norm_weights_and_measures(
            groups.gram(),
            groups.present,
            products.as_float(groups.rows),
            self.zero_groups,
            oracle.nonfinite,
        )
        oracle.notes[self] = (weights, measures)
        return groups.combine(weights, oracle.wants_whole(self))

    def apply_in_order(
        self, gradients: list[Any], variables: list[keras.Variable]
    ) -> None:
        if self._all_groups() == 1:
            updates.apply_gradients(
                self.inner_optimizer, gradients, variables, exactly=True
            )
            return
        if self.across == "batches":
            note = self._window.push(
                gradients,
                variables,
                self.zero_groups,
                (self._weights.value, self._figures.value),
            )
        else:
            note = self.handed_over
            super().apply_in_order(gradients, variables)
        values = note[0], finite_figures(note[1])
        many_tensors.assign_each(self, [self._weights, self._figures], values)

    def diagnostics(self) -> dict[str, Any]:
        """The weights and figures of the last step, read from the device.

        Returns:
            Dict: `weights`, a list of K floats; `residual` (the solver's
            certificate), `norm_ratio` ($|d|$ over the norm of the mean),
            `support_size`, `conflict_rate`, `min_cosine`, `excluded`,
            `nonfinite`, `gradient_norm_squared` and `gradient_noise`, floats;
            NaN where one is not known, as the noise per row is not with
            `across="batches"`, where `nonfinite` counts the batches that the
            last window skipped. All are 0 before the first step.
        """
        if not self.built:
            raise ValueError("There are no figures before the first step")
        weights = keras.ops.convert_to_numpy(self._weights.value)
        return {
            "weights": [float(w) for w in weights],
            **read_figures(self._figures, GROUP_MEASURES),
        }

    def stability_metrics(self) -> dict[str, Any]:
        """For `StabilityMonitor`: `diagnostics()` and the weights' entropy."""
        figures = self.diagnostics()
        figures["weight_entropy"] = weight_entropy(figures["weights"])
        return figures

    def plan(
        self,
        model: keras.Model | None = None,
        x: Any = None,
        y: Any = None,
        sample_weight: Any = None,
    ) -> Plan:
        """How group gradients are computed, and at what predicted cost.

        Args:
            model: A compiled `keras.Model`, to plan for it without training;
                by default the plan of the last step that was traced (on
                PyTorch: run) is returned.
            x, y, sample_weight: One batch for `model`.

        Returns:
            A `Plan`: `engine`, `reason`, `groups`, `works` (per variable),
            `extra_work`, `bytes`, `grouping`, `traffic` (between devices) and,
            if a model was given, `step_ratio`. Printed, or at the end of a
            cell of a notebook, it is a table.

        Raises:
            ValueError: If no step was made yet and no model is given, or the
                method takes plain gradients and needs no plan.
        """
        if not self.wants_oracle:
            raise ValueError(
                'With groups=1 or across="batches" plain gradients are taken: '
                "there is nothing to plan"
            )
        if model is not None:
            batch = (x, y, sample_weight)
            self._plan = plan_for(
                model, batch, self._all_groups(), self.engine, self._rule()
            )
        if self._plan is None:
            raise ValueError(
                "There is no plan before the first step. Train, or call "
                "plan(model, x, y) with one batch"
            )
        return self._plan

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "groups": self.groups,
            "across": self.across,
            "engine": self.engine,
            "zero_groups": self.zero_groups,
            "grouping": self.grouping,
        }
