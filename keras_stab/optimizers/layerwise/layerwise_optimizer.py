"""What LARS and LAMB share: which variables are decayed, which adapted."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_stab import keras_internals
from keras_stab.arguments import checked_boolean
from keras_stab.arguments import checked_number
from keras_stab.backend import many_tensors
from keras_stab.backend import tracing
from keras_stab.numerics.norms import at_most
from keras_stab.numerics.norms import ratio_or_one
from keras_stab.object_arguments import checked_learning_rate
from keras_stab.optimizers.exclusions import as_patterns
from keras_stab.optimizers.exclusions import excluded_variables
from keras_stab.optimizers.state import add_state
from keras_stab.optimizers.updates_together import UpdatesTogether
from keras_stab.text_table import as_text
from keras_stab.types import LearningRate
from keras_stab.types import Tensor


class LayerwiseOptimizer(UpdatesTogether):
    """Base of optimizers that scale each variable's step to its norm.

    Its arguments are those that `LARS` and `LAMB` have in common; `LARS`
    describes them. The weight decay is a part of the update rule: Keras's own,
    which comes before it, stays off. A subclass defines `update_alike`, and
    names its own arguments in `arguments`.

    Attributes:
        weight_decay_rate: Float.
        decayed: One boolean per variable, after `build`.
        adapted: One boolean per variable, after `build`.
    """

    arguments: tuple[str, ...] = (
        "exclude_1d",
        "decay_exclude",
        "adaptation_exclude",
        "trust_clip",
        "track_trust_ratios",
    )
    together_everywhere = True

    def __init__(
        self,
        learning_rate: LearningRate,
        weight_decay: float | None,
        name: str,
        exclude_1d: bool = True,
        decay_exclude: Sequence[str | keras.Variable] | None = None,
        adaptation_exclude: Sequence[str | keras.Variable] | None = None,
        trust_clip: float | None = None,
        track_trust_ratios: bool = False,
        **kwargs: Any,
    ) -> None:
        learning_rate = checked_learning_rate(learning_rate)
        super().__init__(
            learning_rate=learning_rate, weight_decay=None, name=name, **kwargs
        )
        self.weight_decay_rate = checked_number(
            "weight_decay", 0.0 if weight_decay is None else weight_decay, 0.0
        )
        self.exclude_1d = checked_boolean("exclude_1d", exclude_1d)
        self.decay_exclude = as_patterns("decay_exclude", decay_exclude)
        self.adaptation_exclude = as_patterns(
            "adaptation_exclude", adaptation_exclude
        )
        self.also_not_decayed: list[str] = []
        self.trust_clip = checked_number(
            "trust_clip", trust_clip, above=0.0, optional=True
        )
        self.track_trust_ratios = checked_boolean(
            "track_trust_ratios", track_trust_ratios
        )
        # A schedule or callable has no number to be checked.
        self.configured_rate = (
            learning_rate if isinstance(learning_rate, float) else None
        )

    def build(self, variables: list[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        # Resolved here, by path: in `update_step` TensorFlow passes variables
        # that have none.
        not_decayed, not_adapted, more = (
            excluded_variables(argument, patterns, self.exclude_1d, variables)
            for argument, patterns in (
                ("decay_exclude", self.decay_exclude),
                ("adaptation_exclude", self.adaptation_exclude),
                ("exclude_from_weight_decay", self.also_not_decayed),
            )
        )
        # Variables that are assigned their gradient are not weights.
        weights = [not v.overwrite_with_gradient for v in variables]
        self.decayed = [
            weight and not (a or b)
            for weight, a, b in zip(weights, not_decayed, more)
        ]
        self.adapted = [
            weight and not excluded
            for weight, excluded in zip(weights, not_adapted)
        ]
        self._ratios = [None] * len(variables)
        if self.track_trust_ratios:
            self._ratios = [
                add_state(self, "trust_ratio", dtype="float32")
                if adapted
                else None
                for adapted in self.adapted
            ]

    # ---- The update -------------------------------------------------------

    def update_step(
        self, gradient: Any, variable: Any, learning_rate: Any
    ) -> None:
        self.update_steps([gradient], [variable], learning_rate)

    def update_steps(
        self,
        gradients: list[Any],
        variables: list[keras.Variable],
        learning_rate: Any,
    ) -> None:
        """Groups variables that are treated alike, and updates each group."""
        kinds: dict[tuple, list] = {}
        for gradient, variable in zip(gradients, variables):
            index = keras_internals.variable_index(self, variable)
            kind = self.decayed[index], self.adapted[index]
            kinds.setdefault(kind, []).append((index, gradient, variable))
        for (decayed, adapted), members in kinds.items():
            indices, own_gradients, own_variables = zip(*members)
            self.update_alike(
                list(indices),
                many_tensors.each_value(own_gradients),
                list(own_variables),
                learning_rate,
                self.weight_decay_rate if decayed else 0.0,
                adapted,
            )

    def update_alike(
        self,
        indices: list[int],
        gradients: list[Any],
        variables: list[keras.Variable],
        learning_rate: Any,
        decay: float,
        adapted: bool,
    ) -> None:
        """Moves variables and slots; all are decayed and adapted, or none.

        Args:
            indices: Their places among all variables.
            gradients: Tensors in full precision.
            variables: The variables.
            learning_rate: Number or tensor.
            decay: The weight decay; 0 where there is none.
            adapted: Whether the ratio is used.
        """
        raise NotImplementedError

    def note_ratios(self, indices: list[int], ratios: Tensor) -> None:
        """Keeps a vector of trust ratios, if it is asked for."""
        if self.track_trust_ratios:
            many_tensors.assign_each(
                self,
                [self._ratios[i] for i in indices],
                keras.ops.unstack(ratios, num=len(indices)),
            )

    def clipped_ratios(
        self, numerator: Tensor, denominator: Tensor, defined: Tensor
    ) -> Tensor:
        """Quotients, 1 where not defined, at most `trust_clip`."""
        ratios = ratio_or_one(numerator, denominator, defined)
        if self.trust_clip is not None:
            ratios = at_most(ratios, self.trust_clip)
        return ratios

    # ---- What it does to which variable -----------------------------------

    def trust_ratios(self) -> dict[str, Any]:
        """The ratio of each adapted variable at the last update, by path.

        Needs `track_trust_ratios=True`. Scalar tensors: reading one as a
        number waits for the device.
        """
        if not self.track_trust_ratios:
            raise ValueError(
                f"Make {type(self).__name__} with track_trust_ratios=True, "
                "which keeps the ratios of the last update. Received: "
                "track_trust_ratios=False"
            )
        variables = keras_internals.built_variables(self)
        return {
            v.path: keras.ops.convert_to_tensor(ratio)
            for v, ratio in zip(variables, self._ratios)
            if ratio is not None
        }

    def stability_metrics(self) -> dict[str, Any]:
        """For `StabilityMonitor`: the trust ratios, if they are tracked."""
        if not self.track_trust_ratios or not any(self.adapted):
            return {}
        kept = [tracing.read(r) for r in self._ratios if r is not None]
        ratios = keras.ops.convert_to_numpy(keras.ops.stack(kept))
        return {
            "smallest_trust_ratio": ratios.min(),
            "median_trust_ratio": np.median(ratios),
            "largest_trust_ratio": ratios.max(),
            "trust_ratios": dict(zip(self.trust_ratios(), ratios)),
        }

    def describe(self) -> str:
        """A table, as text: which variables are decayed and adapted."""
        if not self.built:
            raise ValueError(
                f"{type(self).__name__} is resolved when it is built: call "
                "`optimizer.build(model.trainable_variables)` first"
            )
        variables = keras_internals.built_variables(self)
        return as_text(
            ("variable", "shape", "decayed", "adapted"),
            (
                (v.path, str(tuple(v.shape)), _yes(d), _yes(a))
                for v, d, a in zip(variables, self.decayed, self.adapted)
            ),
        )

    def exclude_from_weight_decay(
        self,
        var_list: list[keras.Variable] | None = None,
        var_names: list[str] | None = None,
    ) -> None:
        """Leaves more variables out, given themselves or by path patterns."""
        if self.built:
            raise ValueError(
                "`exclude_from_weight_decay()` can only be called before the "
                "optimizer is built"
            )
        added = as_patterns("var_list", [*(var_list or []), *(var_names or [])])
        self.also_not_decayed += added

    # ---- Saving -----------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        for kind in type(self).__mro__:
            for name in vars(kind).get("arguments", ()):
                config[name] = getattr(self, name)
        config["weight_decay"] = self.weight_decay_rate
        if self.also_not_decayed:
            config["also_not_decayed"] = list(self.also_not_decayed)
        return config

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict | None = None
    ) -> "LayerwiseOptimizer":
        config = dict(config)
        more = config.pop("also_not_decayed", [])
        optimizer = super().from_config(config, custom_objects=custom_objects)
        optimizer.also_not_decayed = list(more)
        return optimizer


def _yes(condition):
    return "yes" if condition else "no"
