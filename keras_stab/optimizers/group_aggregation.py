"""Methods that combine the gradients of groups by their Gram matrix."""

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_stab.arguments import checked_choice
from keras_stab.backend import many_tensors
from keras_stab.backend import products
from keras_stab.backend import updates
from keras_stab.gradients.by_loss import LOSSES
from keras_stab.gradients.engines import ENGINES
from keras_stab.gradients.oracle import GradientOracle
from keras_stab.gradients.plan import Plan
from keras_stab.gradients.planning import plan_for
from keras_stab.gradients.small_problems import weights_and_measures
from keras_stab.numerics.aggregation import Rule
from keras_stab.numerics.gram_measures import GROUP_MEASURES
from keras_stab.numerics.gram_measures import weight_entropy
from keras_stab.numerics.min_norm import MAX_GROUPS
from keras_stab.optimizers.batch_window import BatchWindow
from keras_stab.optimizers.batch_window import HasWindow
from keras_stab.optimizers.figures import UNKNOWN
from keras_stab.optimizers.figures import add_figures
from keras_stab.optimizers.figures import finite_figures
from keras_stab.optimizers.figures import read_figures
from keras_stab.optimizers.group_arguments import check_inner
from keras_stab.optimizers.group_arguments import check_losses_alone
from keras_stab.optimizers.group_arguments import checked_grouping
from keras_stab.optimizers.group_arguments import checked_groups
from keras_stab.optimizers.groups_of_replicas import GroupsOfReplicas
from keras_stab.optimizers.state import add_state
from keras_stab.optimizers.state import widest_dtype


class GroupAggregation(HasWindow, GroupsOfReplicas):
    """Base of `GRAIN` and `Aggregate`, which differ in the rule alone.

    A subclass has a `solver`, the `Rule` that makes the weights, or defines
    `solve` itself.

    Args:
        inner_optimizer, groups, across, engine, grouping, name: As in `GRAIN`.
    """

    default_groups = 4

    def __init__(
        self,
        inner_optimizer: str | dict | keras.optimizers.Optimizer,
        groups: int | str | None,
        across: str | None,
        engine: str,
        grouping: str | None,
        name: str | None,
        **kwargs: Any,
    ):
        super().__init__(inner_optimizer, name=name, **kwargs)
        self.across = checked_choice(
            "across", across, (None, "batches", "replicas")
        )
        self.groups = checked_groups(groups, across, self.default_groups)
        self.engine = checked_choice("engine", engine, ENGINES)
        if self._by_loss:
            check_losses_alone(across, engine, grouping)
            self.grouping = None
        else:
            self.grouping = checked_grouping(grouping, across)
        self._plan: Plan | None = None
        kind = type(self).__name__
        check_inner(kind, self.inner_optimizer, across, engine)

    @property
    def solver(self) -> Rule:
        """The rule."""
        raise NotImplementedError

    @property
    def plain_gradient_hint(self) -> str:
        name = type(self).__name__
        if self._by_loss:
            return (
                '. With groups="losses" that loss must come from '
                "`compile(loss=...)`, one for each output"
            )
        return (
            f'. Or use {name}(..., across="batches"), which takes plain '
            'gradients in any training loop, or across="replicas" in those of '
            "processes"
        )

    def build(self, variables: Iterable[keras.Variable]) -> None:
        if self.built:
            return
        variables = list(variables)
        super().build(variables)
        wide = widest_dtype(variables)
        self._total = self._all_groups()
        # Places of losses that there are not keep what stands for no number.
        first = keras.initializers.Constant(UNKNOWN if self._by_loss else 0.0)
        self._weights = add_state(
            self, "group_weights", (self._total,), wide, first
        )
        self._figures = add_figures(self, GROUP_MEASURES, wide)
        if self.across == "batches" and self.groups > 1:
            self._window = BatchWindow(self, variables, self.groups)

    @property
    def _by_loss(self):
        return self.groups == LOSSES

    def _all_groups(self) -> int:
        # How many losses there are is not known before the first step.
        return MAX_GROUPS if self._by_loss else super()._all_groups()

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
        groups = self._groups_of(oracle)
        self._plan = groups.plan
        weights, measures = self._solved(oracle, groups)
        oracle.notes[self] = (self._in_all_places(weights), measures)
        return groups.combine(weights, oracle.wants_whole(self))

    def _in_all_places(self, weights):
        missing = self._total - weights.shape[0]
        if not missing:
            return weights
        return keras.ops.pad(weights, [[0, missing]], constant_values=UNKNOWN)

    def _groups_of(self, oracle):
        """The `GroupGradients` of a step."""
        if self._by_loss:
            return oracle.loss_gradients()
        return oracle.group_gradients(
            self._all_groups(), self.engine, self._rule()
        )

    def _solved(self, oracle, groups):
        """Their weights and figures."""
        rows = products.as_float(groups.rows)
        if self._by_loss:  # which differ by more than their rows
            rows = unknown_rows()
        return self.solve(
            groups.gram(), groups.present, oracle.nonfinite, rows, groups.sizes
        )

    def solve(
        self,
        gram: Any,
        present: Any,
        nonfinite: str,
        rows: Any = None,
        sizes: Any = None,
    ) -> Any:
        if rows is None:
            rows = unknown_rows()
        draws = self._draws(gram.shape[0])
        return weights_and_measures(
            self.solver, gram, present, rows, nonfinite, draws
        )

    def _draws(self, groups):
        """Random numbers for a rule that wants them, as in `solve_rule`."""
        return None

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
            last window skipped, and as neither of the last two is with
            `groups="losses"`. All are 0 before the first step, and there are
            no weights of losses yet.
        """
        if not self.built:
            raise ValueError("There are no figures before the first step")
        weights = keras.ops.convert_to_numpy(self._weights.value)
        figures = read_figures(self._figures, GROUP_MEASURES)
        if self._by_loss:
            weights = weights[weights > UNKNOWN]
            # An estimate from groups of rows, which these are not.
            figures["gradient_norm_squared"] = float("nan")
        return {"weights": [float(w) for w in weights], **figures}

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
            self._plan = plan_for(model, batch, self._groups_of, self._solved)
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
            "grouping": self.grouping,
        }


def unknown_rows():
    """Rows that are not known: then there is no estimate of noise per row."""
    return np.float32("nan")
