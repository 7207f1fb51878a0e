"""LARS: layer-wise adaptive rate scaling."""

import warnings
from typing import Any

import keras

from keras_stab.arguments import checked_boolean
from keras_stab.arguments import checked_choice
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
class LARS(LayerwiseOptimizer):
    r"""SGD with momentum, each layer's step scaled to the size of its weights.

    With the gradient $g$, the weights $w$ and $d = g + \beta w$ (weight decay
    $\beta$, where it is not excluded), for each variable

    $$
    r = \eta \frac{\|w\|}{\|d\| + \epsilon}, \qquad
    m \leftarrow \mu m + r d, \qquad
    w \leftarrow w - \gamma m
    $$

    with trust coefficient $\eta$, momentum $\mu$ and learning rate $\gamma$.
    $r = 1$ where a norm is zero and for variables that are not adapted: so a
    matrix of zeros moves at the first step.

    Args:
        learning_rate: $\gamma$: float, schedule or callable. Defaults to 1.0.
        momentum: $\mu$, in [0, 1). Defaults to 0.9.
        weight_decay: $\beta$, coupled: inside the norm. Defaults to 0.0.
        trust_coefficient: $\eta$, above 0. Defaults to 1e-3.
        epsilon: Added to the denominator. Defaults to 0.0.
        nesterov: Whether the step looks ahead; needs momentum. Defaults to
            `False`.
        momentum_style: `"outside"`: the learning rate multiplies the momentum
            buffer; `"inside"`: it goes into the buffer, which then keeps the
            old scale for a while when the rate drops. Defaults to
            `"outside"`.
        norm: Denominator of $r$. `"combined"`: $\|g + \beta w\|$;
            `"separate"`: $\|g\| + \beta \|w\|$. Defaults to `"combined"`.
        clip_mode: `"lars"`, or `"larc"`: $r$ is at most the learning rate,
            divided by it. Defaults to `"lars"`.
        excluded_lr_scale: Multiplies the learning rate of variables that are
            not adapted, which would otherwise take the raw rate. Defaults to
            1.0.
        norm_max: Largest value of either norm, or `None`. Only for parity
            with code that clamps them. Defaults to `None`.
        name: String.
        trust_clip: Largest $r$, or `None`. Defaults to `None`.
        exclude_1d: Whether variables of at most one dimension (biases,
            scales) are neither decayed nor adapted. Defaults to `True`.
        decay_exclude: List of variables and of regular expressions for their
            paths that are not decayed; it replaces `exclude_1d` for the decay.
            An empty list excludes nothing. Defaults to `None`.
        adaptation_exclude: The same for the ratio $r$.
        track_trust_ratios: Whether the ratios of the last update are kept, a
            scalar per variable, for `trust_ratios()`. Defaults to `False`.
        **kwargs: Further arguments of every Keras optimizer: clipping, EMA,
            `loss_scale_factor`, `gradient_accumulation_steps`.

    Raises:
        ValueError: If an argument is out of range, or a pattern matches no
            variable.

    The scale of the gradient does not matter to adapted variables without
    weight decay: clipping and loss scaling touch only the others.

    Example:

    >>> import keras, keras_stab
    >>> model = keras.Sequential([keras.layers.Dense(2)])
    >>> model.compile(keras_stab.LARS(0.5, weight_decay=1e-4), loss="mse")
    >>> x, y = keras.ops.ones((8, 3)), keras.ops.ones((8, 2))
    >>> history = model.fit(x, y, verbose=0)

    Departures from the paper:
        Momentum outside of the learning rate and the norm of the sum are the
        defaults, as in most code; both conventions of the paper are options.

    References:
        - You, Gitman, Ginsburg, 2017, "Large Batch Training of Convolutional
          Networks", arXiv:1708.03888
    """

    arguments: tuple[str, ...] = (
        "momentum",
        "trust_coefficient",
        "epsilon",
        "nesterov",
        "momentum_style",
        "norm",
        "clip_mode",
        "excluded_lr_scale",
        "norm_max",
    )

    def __init__(
        self,
        learning_rate: LearningRate = 1.0,
        momentum: float = 0.9,
        weight_decay: float | None = 0.0,
        trust_coefficient: float = 1e-3,
        epsilon: float = 0.0,
        nesterov: bool = False,
        momentum_style: str = "outside",
        norm: str = "combined",
        *,
        clip_mode: str = "lars",
        excluded_lr_scale: float = 1.0,
        norm_max: float | None = None,
        name: str = "lars",
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, weight_decay, name, **kwargs)
        self.momentum = checked_fraction(
            "momentum", momentum, zero=True, one=False
        )
        self.trust_coefficient = checked_number(
            "trust_coefficient", trust_coefficient, above=0.0
        )
        self.epsilon = checked_number("epsilon", epsilon, 0.0)
        self.nesterov = checked_boolean("nesterov", nesterov)
        self.momentum_style = checked_choice(
            "momentum_style", momentum_style, ("outside", "inside")
        )
        self.norm = checked_choice("norm", norm, ("combined", "separate"))
        self.clip_mode = checked_choice(
            "clip_mode", clip_mode, ("lars", "larc")
        )
        self.excluded_lr_scale = checked_number(
            "excluded_lr_scale", excluded_lr_scale, 0.0
        )
        self.norm_max = checked_number("norm_max", norm_max, 0.0, optional=True)
        if self.nesterov and not self.momentum:
            raise ValueError(
                "`nesterov` needs `momentum` above 0. Received: momentum=0.0"
            )
        if self.clip_mode == "larc" and self.trust_clip is not None:
            raise ValueError(
                'clip_mode="larc" clips the ratio at the learning rate. Leave '
                f"`trust_clip` out. Received: trust_clip={self.trust_clip}"
            )

    def build(self, variables: list[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        self.momentums = self.add_optimizer_variables(variables, "momentum")
        self._warn_of_raw_rates()

    def update_alike(
        self,
        indices: list[int],
        gradients: list[Any],
        variables: list[keras.Variable],
        learning_rate: Any,
        decay: float,
        adapted: bool,
    ) -> None:
        rate = in_full_precision(keras.ops.convert_to_tensor(learning_rate))
        weights = many_tensors.each_value(variables)
        directions = gradients
        if decay:
            directions = many_tensors.each_sum(gradients, weights, decay)
        ratios, defined = 1.0, False
        if adapted:
            ratios, defined = self._trust_ratios(
                weights, gradients, directions, decay, rate
            )
            self.note_ratios(indices, ratios)
        else:
            rate = rate * self.excluded_lr_scale
        scale = self._scale(ratios, defined, common_dtype(directions))
        slots = [self.momentums[i] for i in indices]
        if in_place.is_quicker([*variables, *slots], directions):
            self._move_in_place(variables, slots, directions, scale, rate)
            return
        tracing.in_kernel(
            lambda: self._move(
                variables, weights, slots, directions, scale, rate
            ),
            variables,
        )

    def _move(self, variables, weights, slots, directions, scale, rate):
        steps = many_tensors.each_product(directions, scale)
        if self.momentum_style == "inside":
            steps = many_tensors.each_product(steps, rate)
        buffers = many_tensors.each_sum(
            steps, many_tensors.each_value(slots), self.momentum
        )
        many_tensors.assign_each(self, slots, buffers)
        updates = buffers
        if self.nesterov:
            updates = many_tensors.each_sum(steps, buffers, self.momentum)
        if self.momentum_style == "outside":
            updates = many_tensors.each_product(updates, rate)
        many_tensors.assign_each(
            self, variables, many_tensors.each_sum(weights, updates, -1.0)
        )

    def _move_in_place(self, variables, slots, directions, scale, rate):
        """The same where numbers are at hand and memory traffic is the cost."""
        if self.momentum_style == "inside":
            scale, rate = scale * rate, 1.0
        scale = scale if isinstance(scale, float) else scale.tolist()
        rate = float(rate)
        in_place.scale(slots, self.momentum)
        in_place.add(slots, directions, scale)
        factor = -rate * self.momentum if self.nesterov else -rate
        in_place.add(variables, many_tensors.each_value(slots), factor)
        if self.nesterov:
            scales = scale if isinstance(scale, list) else [scale] * len(slots)
            in_place.add(variables, directions, [-rate * s for s in scales])

    def _trust_ratios(self, weights, gradients, directions, decay, rate):
        """The ratios of adapted variables, and where they are defined."""
        weight_norms = self._clamped(many_tensors.each_norm(weights))
        if self.norm == "combined":
            norms = tested = self._clamped(many_tensors.each_norm(directions))
        else:
            tested = self._clamped(many_tensors.each_norm(gradients))
            norms = tested + decay * weight_norms
        defined = keras.ops.logical_and(weight_norms > 0, tested > 0)
        ratios = self.clipped_ratios(
            self.trust_coefficient * weight_norms, norms + self.epsilon, defined
        )
        if self.clip_mode == "larc":
            rate = keras.ops.cast(rate, ratios.dtype)
            ratios = at_most(ratios / rate, 1.0)
        return ratios, defined

    def _scale(self, ratios, defined, dtype):
        """What multiplies the directions; TVLARS includes its factor here."""
        del defined, dtype
        return ratios

    def _clamped(self, norms):
        if self.norm_max is None:
            return norms
        return at_most(norms, self.norm_max)

    def _warn_of_raw_rates(self):
        rate = self.configured_rate
        if rate is None or rate <= 2.0 or self.excluded_lr_scale != 1.0:
            return
        if not all(self.adapted):
            warnings.warn(
                "Variables that are not adapted (biases, scales) take the raw "
                f"learning rate {rate:g}, which may diverge. Set "
                f"excluded_lr_scale, for example to {0.1 / rate:.2g}.",
                stacklevel=3,
            )
