"""LAMB: Adam with each layer's step scaled to the size of its weights."""

from typing import Any

import keras

from keras_stab.arguments import checked_boolean
from keras_stab.arguments import checked_fraction
from keras_stab.arguments import checked_number
from keras_stab.backend import in_place
from keras_stab.backend import many_tensors
from keras_stab.backend import tracing
from keras_stab.numerics.norms import at_most
from keras_stab.numerics.norms import common_dtype
from keras_stab.numerics.norms import in_full_precision
from keras_stab.optimizers.layerwise.layerwise_optimizer import (
    LayerwiseOptimizer,
)
from keras_stab.registration import registered
from keras_stab.types import LearningRate


@registered
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
        name: String.
        **kwargs: `trust_clip`, `exclude_1d`, `decay_exclude`,
            `adaptation_exclude` and `track_trust_ratios`, as in `LARS`, and
            further arguments of every Keras optimizer.

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
        The only function of the weight norm is an upper bound, which is
        optional; variables of one dimension are left out by default.

    References:
        - You et al., 2020, "Large Batch Optimization for Deep Learning:
          Training BERT in 76 minutes", arXiv:1904.00962
    """

    arguments: tuple[str, ...] = (
        "beta_1",
        "beta_2",
        "epsilon",
        "bias_correction",
        "trust_ratio",
        "weight_norm_max",
    )

    def __init__(
        self,
        learning_rate: LearningRate = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-6,
        weight_decay: float | None = 0.01,
        bias_correction: bool = True,
        trust_ratio: bool = True,
        weight_norm_max: float | None = None,
        *,
        name: str = "lamb",
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, weight_decay, name, **kwargs)
        self.beta_1 = checked_fraction("beta_1", beta_1, zero=True, one=False)
        self.beta_2 = checked_fraction("beta_2", beta_2, zero=True, one=False)
        self.epsilon = checked_number("epsilon", epsilon, 0.0)
        self.bias_correction = checked_boolean(
            "bias_correction", bias_correction
        )
        self.trust_ratio = checked_boolean("trust_ratio", trust_ratio)
        self.weight_norm_max = checked_number(
            "weight_norm_max", weight_norm_max, 0.0, optional=True
        )

    def build(self, variables: list[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        self.momentums, self.velocities = self.add_optimizer_variables(
            variables, ["momentum", "velocity"]
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
        weights = many_tensors.each_value(variables)
        first = [self.momentums[i] for i in indices]
        second = [self.velocities[i] for i in indices]
        quicker = in_place.is_quicker([*variables, *first, *second], gradients)
        directions = self._directions_in_place if quicker else self._directions

        def decayed_directions():
            updates = directions(first, second, gradients)
            if decay:
                updates = many_tensors.each_sum(updates, weights, decay)
            return updates

        updates = tracing.in_kernel(decayed_directions, variables)
        rates = in_full_precision(keras.ops.convert_to_tensor(learning_rate))
        if self.trust_ratio and adapted:
            ratios = self._trust_ratios(weights, updates)
            self.note_ratios(indices, ratios)
            rates = keras.ops.cast(rates, ratios.dtype) * ratios
        tracing.in_kernel(
            lambda: in_place.subtract_each(
                self, variables, weights, updates, rates
            ),
            variables,
        )

    def _directions_in_place(self, first, second, gradients):
        in_place.update_moments(first, gradients, self.beta_1, 1)
        in_place.update_moments(second, gradients, self.beta_2, 2)
        corrections = [1.0, 1.0]
        if self.bias_correction:
            corrections = [
                in_place.bias_correction(beta, self.iterations + 1)
                for beta in (self.beta_1, self.beta_2)
            ]
        return in_place.quotients(first, second, corrections, self.epsilon)

    def _directions(self, first, second, gradients):
        squares = many_tensors.each_product(gradients, gradients)
        return many_tensors.each_quotient(
            self._moments(first, self.beta_1, gradients),
            self._moments(second, self.beta_2, squares),
            self.epsilon,
        )

    def _moments(self, slots, beta, values):
        """Brings the slots up to date; returns the corrected moments."""
        moments = many_tensors.each_sum(
            many_tensors.each_product(many_tensors.each_value(slots), beta),
            values,
            1.0 - beta,
        )
        many_tensors.assign_each(self, slots, moments)
        if not self.bias_correction:
            return moments
        dtype = common_dtype(moments)
        step = keras.ops.cast(self.iterations + 1, dtype)
        power = keras.ops.power(keras.ops.convert_to_tensor(beta, dtype), step)
        return many_tensors.each_product(moments, 1.0 / (1.0 - power))

    def _trust_ratios(self, weights, updates):
        weight_norms = many_tensors.each_norm(weights)
        update_norms = many_tensors.each_norm(updates)
        if self.weight_norm_max is not None:
            weight_norms = at_most(weight_norms, self.weight_norm_max)
        defined = keras.ops.logical_and(weight_norms > 0, update_norms > 0)
        return self.clipped_ratios(weight_norms, update_norms, defined)
