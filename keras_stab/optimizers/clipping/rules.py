"""The rules of `AdaptiveClipping`: what a gradient is multiplied by."""

from typing import Any
from typing import NamedTuple

import keras

from keras_stab.arguments import checked_count
from keras_stab.arguments import checked_fraction
from keras_stab.arguments import checked_number
from keras_stab.backend import many_tensors
from keras_stab.backend import tracing
from keras_stab.backend import unit_norms
from keras_stab.backend import updates
from keras_stab.numerics import clipping
from keras_stab.optimizers.clipping.unit_axes import checked_unit_axes
from keras_stab.optimizers.clipping.unit_axes import resolved_axes
from keras_stab.optimizers.state import add_state


class Clipped(NamedTuple):
    """The outcome of a rule; all but the gradients are scalar tensors.

    Attributes:
        gradients: List of tensors.
        norm: Of all gradients together.
        threshold: What was compared with it.
        share: The part that was clipped, of 0 to 1.
    """

    gradients: list
    norm: Any
    threshold: Any
    share: Any


class UnitWise:
    """The norm of each unit is at most `clipping` times that of its weights."""

    arguments = {"clipping": 0.01, "epsilon": 1e-3, "unit_axes": None}

    def __init__(self, clipping, epsilon, unit_axes):
        self.clipping = checked_number("clipping", clipping, above=0.0)
        self.epsilon = checked_number("epsilon", epsilon, above=0.0)
        self.unit_axes = checked_unit_axes(unit_axes)

    def build(self, optimizer, variables, dtype):
        self._axes = resolved_axes(self.unit_axes, variables)

    def clip(self, places, totals, gradients, variables, loss_scale):
        """The `Clipped` gradients.

        Args:
            places: Their indices among the variables that were built.
            totals: Those of the whole batch, in full precision.
            gradients: Those to be clipped, which are shares of them under
                `tf.distribute`.
            variables: The variables.
            loss_scale: What all of them are multiplied by, or 1.
        """
        axes = [self._axes[i] for i in places]
        norms = _unscaled(unit_norms.unit_norms(totals, axes), loss_scale)
        values = many_tensors.each_value(variables)
        factors, clipped = clipping.unit_factors(
            norms,
            unit_norms.unit_norms(values, axes),
            self.clipping,
            self.epsilon,
        )
        share = keras.ops.mean(keras.ops.cast(clipped, norms.dtype))
        if not (updates.is_known(share) and float(share) == 0.0):
            gradients = unit_norms.units_scaled(gradients, axes, factors)
        norm = keras.ops.sqrt(keras.ops.sum(keras.ops.square(norms)))
        threshold = keras.ops.full_like(norm, self.clipping)
        return Clipped(gradients, norm, threshold, share)


class _ByNorm:
    """Base of rules that clip all gradients together by their norm.

    A subclass keeps what it has seen in `state`, and defines `judge`.
    """

    def clip(self, places, totals, gradients, variables, loss_scale):
        """As `UnitWise.clip`."""
        ops = keras.ops
        norm = _unscaled(many_tensors.total_norm(totals), loss_scale)
        # Others would spoil what is kept; they go on as they are.
        counts = ops.logical_and(norm > 0, ops.isfinite(norm))
        known = ops.where(counts, norm, ops.ones_like(norm))
        old = [tracing.read(v) for v in self.state]
        clips, threshold, new = self.judge(known, *old)
        clips = ops.logical_and(counts, clips)
        factor = threshold / (known + clipping.SMALLEST_NORM)
        factor = ops.where(clips, factor, ops.ones_like(factor))
        share = ops.cast(clips, norm.dtype)
        for variable, before, after in zip(self.state, old, new):
            variable.assign(ops.where(counts, after, before))
        if not (updates.is_known(share) and float(share) == 0.0):
            gradients = many_tensors.each_product(gradients, factor)
        return Clipped(gradients, norm, threshold, share)

    def judge(self, norm, *state):
        """Whether it clips a norm, the threshold, and the state after it."""
        raise NotImplementedError


class Percentile(_ByNorm):
    """At most a percentile of the norms until now, this one included."""

    arguments = {"percentile": 10.0, "history_length": 1000}

    def __init__(self, percentile, history_length):
        self.percentile = checked_number(
            "percentile", percentile, 0.0, maximum=100.0
        )
        self.history_length = checked_count("history_length", history_length, 1)

    def build(self, optimizer, variables, dtype):
        shape = (self.history_length,)
        self.state = [
            add_state(optimizer, "norms", shape, dtype),
            # The next place, and how many places are taken.
            add_state(optimizer, "place"),
            add_state(optimizer, "taken"),
        ]

    def judge(self, norm, norms, place, taken):
        ops = keras.ops
        length = self.history_length
        here = ops.arange(length, dtype="int32") == place
        norms = ops.where(here, norm, norms)
        taken = ops.where(taken < length, taken + 1, taken)
        threshold = clipping.percentile(norms, taken, self.percentile)
        state = norms, (place + 1) % length, taken
        return norm > threshold, threshold, state


class ZScore(_ByNorm):
    """Outliers are clipped: norms far above the mean of those until now."""

    arguments = {"z_threshold": 2.5, "decay": 0.97, "warmup_steps": 25}

    def __init__(self, z_threshold, decay, warmup_steps):
        self.z_threshold = checked_number("z_threshold", z_threshold, above=0.0)
        self.decay = checked_fraction("decay", decay, one=False)
        self.warmup_steps = checked_count("warmup_steps", warmup_steps, 1)

    def build(self, optimizer, variables, dtype):
        self.state = [
            add_state(optimizer, "mean", dtype=dtype),
            add_state(optimizer, "variance", dtype=dtype),
            add_state(optimizer, "warmup"),
        ]

    def judge(self, norm, mean, variance, seen):
        ops = keras.ops
        warm = seen >= self.warmup_steps
        is_outlier, threshold = clipping.z_threshold(
            mean, variance, self.z_threshold, norm
        )
        is_outlier = ops.logical_and(warm, is_outlier)
        # What was cut off does not count.
        kept = ops.where(is_outlier, threshold, norm)
        first = clipping.running_moments(
            mean, variance, ops.cast(seen, norm.dtype), norm
        )
        later = clipping.decayed_moments(mean, variance, self.decay, kept)
        moments = [ops.where(warm, b, a) for a, b in zip(first, later)]
        infinity = ops.full_like(norm, float("inf"))
        threshold = ops.where(warm, threshold, infinity)
        state = *moments, ops.where(warm, seen, seen + 1)
        return is_outlier, threshold, state


def _unscaled(norms, loss_scale):
    """The norms without the factor of a loss scaler, a float or tensor."""
    if isinstance(loss_scale, float):
        return norms if loss_scale == 1.0 else norms / loss_scale
    return norms / keras.ops.cast(loss_scale, norms.dtype)


RULES = {"agc": UnitWise, "percentile": Percentile, "zclip": ZScore}
