"""LAMB: Adam with each layer's step scaled to the size of its weights."""

import keras

from keras_stab import keras_internals
from keras_stab.numerics.norms import in_full_precision
from keras_stab.numerics.norms import l2_norm
from keras_stab.numerics.norms import ratio_or_one
from keras_stab.optimizers.arguments import checked_learning_rate
from keras_stab.optimizers.arguments import checked_number
from keras_stab.optimizers.layerwise import LayerwiseOptimizer


@keras.saving.register_keras_serializable(package="keras_stab")
class LAMB(LayerwiseOptimizer):
    r"""Adam whose step is scaled, layer by layer, to the norm of the weights.

    With Adam's bias-corrected moments $\hat m$ and $\hat v$, for each variable

    $$
    u = \frac{\hat m}{\sqrt{\hat v} + \epsilon} + \beta w, \qquad
    w \leftarrow w - \gamma \frac{\|w\|}{\|u\|} u
    $$

    The weight decay $\beta$ is inside the ratio, as published (that of
    `keras.optimizers.Lamb` is outside). The ratio is 1 where a norm is zero
    and for variables that are not adapted.

    Args:
        learning_rate: $\gamma$: float, schedule or callable. Defaults to
            1e-3.
        beta_1, beta_2: Decay of the moments, in [0, 1). Default to 0.9 and
            0.999.
        epsilon: $\epsilon$. Defaults to 1e-6.
        weight_decay: $\beta$. Defaults to 0.01.
        bias_correction: Whether the moments are corrected for their start at
            zero. Defaults to `True`.
        trust_ratio: Whether the ratio is used at all. Defaults to `True`.
        weight_norm_max: Largest norm of the weights in the ratio, or `None`.
            Defaults to `None`.
        trust_clip: Largest ratio, or `None`. Defaults to `None`.
        exclude_1d, decay_exclude, adaptation_exclude: As in `LARS`.
        name: String.
        **kwargs: Further arguments of every Keras optimizer.

    Raises:
        ValueError: If an argument is out of range, or a pattern matches no
            variable.

    Example:

    >>> import keras, keras_stab
    >>> model = keras.Sequential([keras.layers.Dense(2)])
    >>> model.compile(keras_stab.LAMB(0.01), loss="mse")
    >>> x, y = keras.ops.ones((8, 3)), keras.ops.ones((8, 2))
    >>> history = model.fit(x, y, verbose=0)

    Departures from the paper:
        No function of the weight norm but an optional upper bound; variables
        of one dimension are left out by default.

    References:
        - You et al., 2020, "Large Batch Optimization for Deep Learning:
          Training BERT in 76 minutes", arXiv:1904.00962
    """

    def __init__(
        self,
        learning_rate=1e-3,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-6,
        weight_decay=0.01,
        bias_correction=True,
        trust_ratio=True,
        weight_norm_max=None,
        trust_clip=None,
        exclude_1d=True,
        decay_exclude=None,
        adaptation_exclude=None,
        name="lamb",
        **kwargs,
    ):
        super().__init__(
            learning_rate=checked_learning_rate(learning_rate),
            weight_decay=weight_decay,
            exclude_1d=exclude_1d,
            decay_exclude=decay_exclude,
            adaptation_exclude=adaptation_exclude,
            trust_clip=trust_clip,
            name=name,
            **kwargs,
        )
        self.beta_1 = checked_number("beta_1", beta_1, 0.0, 1.0)
        self.beta_2 = checked_number("beta_2", beta_2, 0.0, 1.0)
        self.epsilon = checked_number("epsilon", epsilon, 0.0)
        self.bias_correction = bool(bias_correction)
        self.trust_ratio = bool(trust_ratio)
        self.weight_norm_max = weight_norm_max
        if weight_norm_max is not None:
            self.weight_norm_max = checked_number(
                "weight_norm_max", weight_norm_max, 0.0
            )

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self.momentums, self.velocities = self.add_optimizer_variables(
            variables, ["momentum", "velocity"]
        )

    def update_step(self, gradient, variable, learning_rate):
        index = keras_internals.variable_index(self, variable)
        weights = in_full_precision(keras.ops.convert_to_tensor(variable))
        gradient = in_full_precision(keras.ops.convert_to_tensor(gradient))
        moments = []
        step = keras.ops.cast(self.iterations + 1, weights.dtype)
        for slot, beta, value in (
            (self.momentums[index], self.beta_1, gradient),
            (self.velocities[index], self.beta_2, gradient * gradient),
        ):
            moment = in_full_precision(slot.value)
            moment = beta * moment + (1.0 - beta) * value
            self.assign(slot, keras.ops.cast(moment, slot.dtype))
            if self.bias_correction:
                power = keras.ops.power(
                    keras.ops.cast(beta, weights.dtype), step
                )
                moment = moment / (1.0 - power)
            moments.append(moment)
        update = moments[0] / (keras.ops.sqrt(moments[1]) + self.epsilon)
        if self.weight_decay_rate and self.decayed[index]:
            update = update + self.weight_decay_rate * weights
        rate = keras.ops.cast(learning_rate, weights.dtype)
        if self.trust_ratio and self.adapted[index]:
            rate = rate * self._ratio(weights, update)
        self.assign(
            variable, keras.ops.cast(weights - rate * update, variable.dtype)
        )

    def _ratio(self, weights, update):
        weight_norm, update_norm = l2_norm(weights), l2_norm(update)
        if self.weight_norm_max is not None:
            weight_norm = keras.ops.minimum(weight_norm, self.weight_norm_max)
        defined = keras.ops.logical_and(weight_norm > 0, update_norm > 0)
        ratio = ratio_or_one(weight_norm, update_norm, defined)
        if self.trust_clip is not None:
            ratio = keras.ops.minimum(ratio, self.trust_clip)
        return ratio

    def get_config(self):
        config = super().get_config()
        for name in (
            "beta_1",
            "beta_2",
            "epsilon",
            "bias_correction",
            "trust_ratio",
            "weight_norm_max",
        ):
            config[name] = getattr(self, name)
        return config
