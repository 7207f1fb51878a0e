"""AdaptiveClipping: gradients clipped at thresholds that follow the run."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras

from keras_stab.arguments import checked_choice
from keras_stab.backend import devices
from keras_stab.backend import few_numbers
from keras_stab.backend import many_tensors
from keras_stab.backend import tracing
from keras_stab.backend import update_kernel
from keras_stab.backend import updates
from keras_stab.optimizers.clipping.rules import RULES
from keras_stab.optimizers.exclusions import as_patterns
from keras_stab.optimizers.exclusions import excluded_variables
from keras_stab.optimizers.figures import add_figures
from keras_stab.optimizers.figures import finite_figures
from keras_stab.optimizers.figures import read_figures
from keras_stab.optimizers.state import widest_dtype
from keras_stab.optimizers.wrapper import Wrapper
from keras_stab.registration import registered

FIGURES = (
    "norm",
    "threshold",
    "last_clipped_share",
    "clipped_share",
    "counted",
)


@registered
class AdaptiveClipping(Wrapper):
    r"""Clips gradients at a threshold that follows the training.

    The inner optimizer is given $c\,g$ in place of the gradient $g$.
    `rule="agc"`, for each unit $i$ of a layer (the weights that lead to one
    output) and its weights $w_i$:

    $$
    c_i = \min\left(1, \lambda \, \frac{\max(\|w_i\|, \epsilon)}{\|g_i\|}
    \right)
    $$

    The other two clip all gradients together, $c = \min(1, \tau / \|g\|)$.
    `rule="percentile"`: $\tau$ is the p-th percentile of the norms until now,
    this one included. `rule="zclip"`, with running mean $\mu$ and variance
    $\sigma^2$ of the norms, the score $z = (\|g\| - \mu) / \sigma$ and
    $\tau = \mu + \sigma \zeta^2 / z$ where $z > \zeta$ (otherwise nothing is
    clipped), of the norm $n = \min(\|g\|, \tau)$ that is left:

    $$
    \mu \leftarrow \alpha \mu + (1 - \alpha) n, \qquad
    \sigma^2 \leftarrow \alpha \sigma^2 + (1 - \alpha) (n - \mu)^2
    $$

    Args:
        inner_optimizer: Keras optimizer, name or config, that is given the
            clipped gradient. Its own clipping comes after this: for `max_norm`
            of ZClip's code set its `global_clipnorm`. Defaults to `"adamw"`.
        rule: `"agc"`, `"percentile"` (AutoClip) or `"zclip"`. Defaults to
            `"agc"`. The arguments of the other rules are refused.
        exclude: Variables, or regular expressions for their paths, that are
            not clipped and count in no norm. AGC's authors leave out the last
            layer. Defaults to `None`: all are clipped.
        clipping: For `"agc"`. Float, $\lambda$; `None` for 0.01.
        epsilon: For `"agc"`. Float, $\epsilon$, the norm that weights have at
            least; `None` for 0.001.
        unit_axes: For `"agc"`. Dict from regular expressions for paths to the
            axes, an int or several, over which the norm of a unit is taken,
            as in `{"conv1d": (0, 1), "embeddings": 1}`. `None`, and for other
            variables: the first axis of two or three, all but the last of
            more; a vector is one unit.
        percentile: For `"percentile"`. Float from 0 to 100, p; `None` for 10.
        history_length: For `"percentile"`. Int, the norms that are kept;
            `None` for 1000.
        z_threshold: For `"zclip"`. Float, $\zeta$; `None` for 2.5.
        decay: For `"zclip"`. Float in (0, 1), $\alpha$; `None` for 0.97.
        warmup_steps: For `"zclip"`. Int, gradients whose mean and variance
            the averages start from; none of them is clipped. `None` for 25.
        name: String or `None`.

    Raises:
        ValueError: If an argument is out of range, belongs to another rule or
            on the inner optimizer, or a pattern matches no variable.

    What is clipped is the gradient that arrives: around or inside `GRAIN`,
    `SAM` and `IRE` the one which they choose, in both orders, never those that
    they look at; inside `OptimisticGradient` the extrapolated one. It is that
    of the whole batch on several devices, and without the factor of a loss
    scaler. With `gradient_accumulation_steps` each gradient is clipped, and
    counted, before they are added. One that is zero or not finite is handed
    on as it is and enters no history. `restart` keeps the history.

    Example: a gradient of norm 4 for weights of norm 2.

    >>> import keras, keras_stab
    >>> weights = keras.Variable([2.0, 0.0])
    >>> optimizer = keras_stab.AdaptiveClipping(
    ...     keras.optimizers.SGD(1.0), rule="agc", clipping=0.25
    ... )
    >>> optimizer.apply([keras.ops.convert_to_tensor([4.0, 0.0])], [weights])
    >>> round(float(weights[0]), 4)
    1.5

    Departures from the paper:
        AGC: none; the paper does not say what a unit of a one-dimensional
        convolution is, its code takes the first axis. AutoClip: the history
        is that of the last `history_length` gradients, not of all. ZClip:
        none. All: what is not finite, or zero, enters no history.

    Cost:
        No extra gradient. `"agc"` reads weights and gradients once more, the
        others the gradients; `"percentile"` keeps `history_length` numbers.
        `benchmarks/step_time.py` measures it.

    References:
        - Brock, De, Smith, Simonyan, 2021, "High-Performance Large-Scale
          Image Recognition Without Normalization", arXiv:2102.06171
        - Seetharaman, Wichern, Pardo, Le Roux, 2020, "AutoClip: Adaptive
          Gradient Clipping for Source Separation Networks", arXiv:2007.14469
        - Kumar, Owen, Roy Chowdhury, Guera, 2025, "ZClip: Adaptive Spike
          Mitigation for LLM Pre-Training", arXiv:2504.02507
    """

    # In a PyTorch process group `fit` brings the gradients together for
    # optimizers that have this.
    handed_over = None

    def __init__(
        self,
        inner_optimizer: str | dict | keras.optimizers.Optimizer = "adamw",
        rule: str = "agc",
        exclude: Sequence[str | keras.Variable] | None = None,
        clipping: float | None = None,
        epsilon: float | None = None,
        unit_axes: Mapping[str, int | Sequence[int]] | None = None,
        percentile: float | None = None,
        history_length: int | None = None,
        z_threshold: float | None = None,
        decay: float | None = None,
        warmup_steps: int | None = None,
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(inner_optimizer, name=name, **kwargs)
        self.rule = checked_choice("rule", rule, tuple(RULES))
        self.exclude = as_patterns("exclude", exclude)
        self._rule = _made(
            rule,
            clipping=clipping,
            epsilon=epsilon,
            unit_axes=unit_axes,
            percentile=percentile,
            history_length=history_length,
            z_threshold=z_threshold,
            decay=decay,
            warmup_steps=warmup_steps,
        )

    def build(self, variables: Iterable[keras.Variable]) -> None:
        if self.built:
            return
        variables = list(variables)
        super().build(variables)
        excluded = excluded_variables("exclude", self.exclude, False, variables)
        # Variables that are assigned their gradient are not weights.
        self._included = [
            not (left_out or v.overwrite_with_gradient)
            for v, left_out in zip(variables, excluded)
        ]
        dtype = widest_dtype(variables)
        self._rule.build(self, variables, dtype)
        self._figures = add_figures(self, FIGURES, dtype)

    def apply_in_order(
        self, gradients: list[Any], variables: list[keras.Variable]
    ) -> None:
        inner = self.inner_optimizer
        gradients = [
            tracing.densify(g) if included else g
            for g, included in zip(gradients, self._included)
        ]
        loss_scale = self.scale_loss(1.0)
        totals = devices.sum_shares(gradients)

        def update():
            with tracing.no_gradients():
                clipped = self._clipped(
                    gradients, totals, variables, loss_scale
                )
            updates.apply_gradients(inner, updates.barrier(clipped), variables)

        update_kernel.as_one_kernel(inner, gradients, variables, update)

    def _clipped(self, gradients, totals, variables, loss_scale):
        places = [
            i
            for i, gradient in enumerate(gradients)
            if gradient is not None and self._included[i]
        ]
        if not places:
            return gradients
        outcome = self._rule.clip(
            places,
            many_tensors.each_value([totals[i] for i in places]),
            [gradients[i] for i in places],
            [variables[i] for i in places],
            loss_scale,
        )
        self._count(outcome)
        answer = list(gradients)
        for i, gradient in zip(places, outcome.gradients):
            answer[i] = gradient
        return answer

    def _count(self, outcome):
        """Notes what was done, unless the norm is not finite."""
        ops, _, (figures,) = few_numbers.namespace(
            self._figures.dtype, [], [self._figures]
        )
        share, mean, counted = outcome.share, figures[3], figures[4]
        mean = mean + (share - mean) / (counted + 1.0)
        now = (outcome.norm, outcome.threshold, share, mean, counted + 1.0)
        now = finite_figures(ops.stack(now))
        now = ops.where(ops.isfinite(outcome.norm), now, figures)
        few_numbers.store([self._figures], [figures], [now])

    def stability_metrics(self) -> dict[str, float]:
        """For `StabilityMonitor`: figures of the gradients that arrived.

        Returns:
            Dict of floats, read from the device: `norm` and `threshold` of
            the last gradient that was finite (for `"agc"` the threshold is
            `clipping`, a ratio; infinite while `"zclip"` warms up);
            `last_clipped_share`, the part of its units that was clipped, or
            for the other rules 0 or 1; `clipped_share`, the mean of these
            since the start; `counted`, the gradients in that mean.
        """
        if not self.built:
            raise ValueError("There are no figures before the first step")
        return read_figures(self._figures, FIGURES)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        arguments = {
            name: None for kind in RULES.values() for name in kind.arguments
        }
        own = {name: getattr(self._rule, name) for name in self._rule.arguments}
        return {
            **config,
            "rule": self.rule,
            "exclude": self.exclude,
            **arguments,
            **own,
        }


def _made(rule, **arguments):
    """The rule, from its own arguments; `None` stands for its defaults."""
    kind = RULES[rule]
    for name, value in arguments.items():
        if value is not None and name not in kind.arguments:
            owner = next(k for k in RULES if name in RULES[k].arguments)
            raise ValueError(
                f'`{name}` is an argument of rule="{owner}": leave it out, or '
                f"choose that rule. Received: {name}={value!r} with "
                f'rule="{rule}"'
            )
    given = {
        name: default if arguments[name] is None else arguments[name]
        for name, default in kind.arguments.items()
    }
    return kind(**given)
