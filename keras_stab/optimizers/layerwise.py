"""What LARS and LAMB share: who is decayed, who is adapted."""

import keras

from keras_stab.optimizers.arguments import checked_number
from keras_stab.optimizers.exclusions import as_patterns
from keras_stab.optimizers.exclusions import excluded_variables


class LayerwiseOptimizer(keras.optimizers.Optimizer):
    """Base of optimizers that scale each variable's step to its norm.

    The weight decay is a part of the update rule: Keras's own, which comes
    before it, stays off.

    Attributes:
        weight_decay_rate: Float.
        decayed: One boolean a variable, after `build`.
        adapted: One boolean a variable, after `build`.
    """

    def __init__(
        self,
        learning_rate,
        weight_decay,
        exclude_1d,
        decay_exclude,
        adaptation_exclude,
        trust_clip,
        name,
        **kwargs,
    ):
        super().__init__(
            learning_rate=learning_rate, weight_decay=None, name=name, **kwargs
        )
        if not isinstance(exclude_1d, bool):
            raise ValueError(
                f"`exclude_1d` must be a boolean. Received: {exclude_1d!r}"
            )
        self.weight_decay_rate = 0.0
        if weight_decay is not None:
            self.weight_decay_rate = checked_number(
                "weight_decay", weight_decay, 0.0
            )
        self.exclude_1d = exclude_1d
        self.decay_exclude = as_patterns("decay_exclude", decay_exclude)
        self.adaptation_exclude = as_patterns(
            "adaptation_exclude", adaptation_exclude
        )
        self.also_not_decayed = []
        self.trust_clip = trust_clip
        if trust_clip is not None:
            self.trust_clip = checked_number(
                "trust_clip", trust_clip, 0.0, forbidden=(0.0,)
            )
        # A schedule or callable has no number to be checked.
        self.configured_rate = (
            learning_rate if isinstance(learning_rate, float) else None
        )

    def build(self, variables):
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
        self.decayed = [not (a or b) for a, b in zip(not_decayed, more)]
        self.adapted = [not excluded for excluded in not_adapted]

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        """Leaves more variables out, given themselves or by path patterns."""
        if self.built:
            raise ValueError(
                "`exclude_from_weight_decay()` can only be called before the "
                "optimizer is built"
            )
        added = as_patterns("var_list", [*(var_list or []), *(var_names or [])])
        self.also_not_decayed += added

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "weight_decay": self.weight_decay_rate,
                "exclude_1d": self.exclude_1d,
                "decay_exclude": self.decay_exclude,
                "adaptation_exclude": self.adaptation_exclude,
                "trust_clip": self.trust_clip,
            }
        )
        if self.also_not_decayed:
            config["also_not_decayed"] = list(self.also_not_decayed)
        return config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        more = config.pop("also_not_decayed", [])
        optimizer = super().from_config(config, custom_objects=custom_objects)
        optimizer.also_not_decayed = list(more)
        return optimizer
