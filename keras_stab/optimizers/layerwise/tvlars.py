"""TVLARS: LARS with a rate that falls with time instead of a warm-up."""

import math
import warnings
from typing import Any

import keras
import numpy as np

from keras_stab.arguments import checked_choice
from keras_stab.arguments import checked_number
from keras_stab.numerics.time_factor import from_durations
from keras_stab.numerics.time_factor import time_factor
from keras_stab.optimizers.layerwise.lars import LARS
from keras_stab.registration import registered
from keras_stab.types import LearningRate

_OFFICIAL = {
    "alpha": 0.1,
    "delay": -1.0,
    "floor": 0.0,
    "factor_scope": "adapted",
    "norm_max": 10.0,
    "epsilon": 0.0,
    "nesterov": False,
    "momentum_style": "outside",
}
_PAPER = {"alpha": 1.0, "floor": 1e-3, "factor_scope": "all"}


@registered
class TVLARS(LARS):
    r"""LARS whose layer-wise rate is multiplied by a factor of time.

    At update $t$, counted from 0, the ratio $r$ of `LARS` becomes

    $$
    r \, \phi(t), \qquad
    \phi(t) = \phi_{\min} + \frac{1}{\alpha + e^{\lambda (t - d_e)}}
    $$

    which starts at the plateau $1 / \alpha + \phi_{\min}$ and falls along a
    sigmoid around update $d_e$ to $\phi_{\min}$: no warm-up, but a delay. Set
    `decay_rate` and `delay` from the length of the run, for example by
    `TVLARS.from_steps(hold_steps, decay_steps)`: they do not carry over to
    runs of another length.

    Args:
        learning_rate: As in `LARS`. Defaults to 1.0.
        decay_rate: $\lambda$, at least 0, per update.
        delay: $d_e$, in updates; may be negative.
        alpha: $\alpha$, at least 0. Defaults to 1.0.
        floor: $\phi_{\min}$, at least 0. With 0 training freezes in the end.
            Defaults to 1e-3.
        factor_scope: `"all"`: the factor multiplies every variable's step;
            `"adapted"`: only where the ratio is really used. Defaults to
            `"all"`.
        variant: `"paper"`, or `"official"` for the rule of the published code
            ($\alpha = 0.1$, $d_e = -1$, $\phi_{\min} = 0$, the factor on
            adapted variables only, norms of at most 10), which ignores its
            own delay. Defaults to `"paper"`.
        **kwargs: The arguments of `LARS`.

    Raises:
        ValueError: As `LARS`; also if `decay_rate` or `delay` is missing, or
            an argument contradicts `variant="official"`.

    The clock is `iterations`: updates, not accumulated micro-batches nor
    steps that a loss scaler skips; it is saved.

    Example:

    >>> import keras_stab
    >>> optimizer = keras_stab.TVLARS.from_steps(100, 400, learning_rate=2.0)
    >>> [round(float(p), 2) for p in optimizer.phi([0, 100, 500, 9999])]
    [0.97, 0.9, 0.1, 0.0]

    Departures from the paper:
        The full text was not available to us, so the factor has the form on
        which two summaries agree. Unlike in the published code the delay is
        honoured, the clock is saved and no norm is clamped.

    References:
        - Do et al., 2023, "Revisiting LARS for Large Batch Training
          Generalization of Neural Networks", arXiv:2309.14053
    """

    arguments: tuple[str, ...] = (
        "decay_rate",
        "delay",
        "alpha",
        "floor",
        "factor_scope",
        "variant",
    )

    def __init__(
        self,
        learning_rate: LearningRate = 1.0,
        momentum: float = 0.9,
        weight_decay: float | None = 0.0,
        trust_coefficient: float = 1e-3,
        decay_rate: float | None = None,
        delay: float | None = None,
        alpha: float | None = None,
        floor: float | None = None,
        factor_scope: str | None = None,
        variant: str = "paper",
        name: str = "tvlars",
        **kwargs: Any,
    ) -> None:
        checked_choice("variant", variant, ("paper", "official"))
        own = {
            "delay": delay,
            "alpha": alpha,
            "floor": floor,
            "factor_scope": factor_scope,
        }
        if variant == "official":
            _check_official({**own, **kwargs})
            settings = {n: _OFFICIAL[n] for n in own}
            kwargs = {
                **kwargs,
                **{n: v for n, v in _OFFICIAL.items() if n not in own},
            }
        else:
            settings = {
                n: _PAPER.get(n) if value is None else value
                for n, value in own.items()
            }
        for argument, value in (
            ("decay_rate", decay_rate),
            ("delay", settings["delay"]),
        ):
            if value is None:
                raise ValueError(
                    f"`{argument}` must be given: no default suits runs of "
                    "every length. TVLARS.from_steps(hold_steps, decay_steps) "
                    f"computes it. Received: {argument}=None"
                )
        super().__init__(
            learning_rate,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            name=name,
            **kwargs,
        )
        self.variant = variant
        self.decay_rate = checked_number("decay_rate", decay_rate, 0.0)
        self.delay = checked_number("delay", settings["delay"])
        self.alpha = checked_number("alpha", settings["alpha"], 0.0)
        self.floor = checked_number("floor", settings["floor"], 0.0)
        self.factor_scope = checked_choice(
            "factor_scope", settings["factor_scope"], ("all", "adapted")
        )
        if variant == "paper":
            self._warn_of_freezing()

    @classmethod
    def from_steps(
        cls,
        hold_steps: float,
        decay_steps: float,
        alpha: float = 1.0,
        **kwargs: Any,
    ) -> "TVLARS":
        """A TVLARS for a run of known length.

        Args:
            hold_steps: Updates until the factor is 90 % of its plateau.
            decay_steps: Updates from there until it is 10 %.
            alpha: As in the constructor, above 0.
            **kwargs: Further arguments of the constructor.
        """
        hold_steps = checked_number("hold_steps", hold_steps, 0.0)
        decay_steps = checked_number("decay_steps", decay_steps, above=0.0)
        alpha = checked_number("alpha", alpha, above=0.0)
        decay_rate, delay = from_durations(hold_steps, decay_steps, alpha)
        return cls(decay_rate=decay_rate, delay=delay, alpha=alpha, **kwargs)

    def phi(self, step: Any) -> np.ndarray:
        """The factor at update `step`; a number, list or array, in NumPy."""
        return keras.ops.convert_to_numpy(
            self._factor(np.asarray(step, "float32"))
        )

    def _factor(self, step, dtype="float32"):
        return time_factor(
            step, self.decay_rate, self.delay, self.alpha, self.floor, dtype
        )

    def _scale(self, ratios, defined, dtype):
        factor = self._factor(self.iterations, dtype)
        if self.factor_scope == "adapted":
            one = keras.ops.ones_like(factor)
            factor = keras.ops.where(defined, factor, one)
        return ratios * factor

    def _warn_of_freezing(self):
        if self.floor > 0 or self.decay_rate == 0:
            return
        # Where the factor is 1 % of the plateau, or of its first value.
        psi = math.log(99 * self.alpha) if self.alpha > 0 else math.log(100)
        step = psi / self.decay_rate + (self.delay if self.alpha > 0 else 0)
        warnings.warn(
            f"With floor=0 training freezes: from update {max(step, 0):.0f} on "
            "the steps are below 1 % of the first ones. Set a floor above 0, "
            "with which TVLARS becomes LARS in the end.",
            stacklevel=3,
        )


def _check_official(given):
    for argument, value in given.items():
        wanted = _OFFICIAL.get(argument, value)
        if value is not None and value != wanted:
            raise ValueError(
                f'variant="official" has {argument}={wanted!r}. Leave it out, '
                f"or use the paper's variant. Received: {argument}={value!r}"
            )
