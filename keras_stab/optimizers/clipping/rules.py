"""The rules of `AdaptiveClipping`: what a gradient is multiplied by."""

from typing import Any
from typing import NamedTuple

import keras

from keras_stab.arguments import checked_count
from keras_stab.arguments import checked_fraction
from keras_stab.arguments import checked_number
from keras_stab.backend import few_numbers
from keras_stab.backend import many_tensors
from keras_stab.backend import unit_norms
from keras_stab.numerics import clipping
from keras_stab.optimizers.clipping.unit_axes import checked_unit_axes
from keras_stab.optimizers.clipping.unit_axes import resolved_axes
from keras_stab.optimizers.state import add_state


class Clipped(NamedTuple):
    """The outcome of a rule.

    Attributes:
        gradients: List of tensors.
        ops: What computes with the scalars that follow.
        norm: Of all gradients together.
        threshold: What was compared with it.
        share: The part that was clipped, of 0 to 1.
    """

    gradients: list
    ops: Any
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
        self._dtype = dtype
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
        norms = unit_norms.unit_norms(totals, axes)
        values = many_tensors.each_value(variables)
        ops, (norms, weight_norms), _ = few_numbers.namespace(
            self._dtype, [norms, unit_norms.unit_norms(values, axes)], []
        )
        norms = unscaled(ops, norms, loss_scale)
        factors, clips = clipping.unit_factors(
            ops, norms, weight_norms, self.clipping, self.epsilon
        )
        share = ops.mean(clips)
        if ops is keras.ops or share > 0:
            gradients = unit_norms.units_scaled(
                gradients, axes, few_numbers.as_tensor(factors)
            )
        norm = ops.sqrt(ops.sum(ops.square(norms)))
        threshold = ops.full_like(norm, self.clipping)
        return Clipped(gradients, ops, norm, threshold, share)


class _ByNorm:
    """Base of rules that clip all gradients together by their norm.

    A subclass defines `judge`, and in `state_shapes` what it keeps.
    """

    def build(self, optimizer, variables, dtype):
        self._dtype = dtype
        self.state = [
            add_state(optimizer, name, shape, dtype)
            for name, shape in self.state_shapes().items()
        ]

    def state_shapes(self):
        """Shapes of the variables that it keeps, by name."""
        raise NotImplementedError

    def clip(self, places, totals, gradients, variables, loss_scale):
        """As `UnitWise.clip`."""
        ops, (norm,), old = few_numbers.namespace(
            self._dtype, [many_tensors.total_norm(totals)], self.state
        )
        norm = unscaled(ops, norm, loss_scale)
        # Others would spoil what is kept; they go on as they are.
        counts = ops.logical_and(norm > 0, ops.isfinite(norm))
        known = ops.where(counts, norm, ops.ones_like(norm))
        clips, threshold, new = self.judge(ops, known, *old)
        clips = ops.logical_and(counts, clips)
        factor = threshold / (known + clipping.SMALLEST_NORM)
        factor = ops.where(clips, factor, ops.ones_like(known))
        new = [ops.where(counts, b, a) for a, b in zip(old, new)]
        few_numbers.store(self.state, old, new)
        if ops is keras.ops or clips:
            factor = few_numbers.as_factor(factor)
            gradients = many_tensors.each_product(gradients, factor)
        share = ops.where(clips, ops.ones_like(known), 0.0)
        return Clipped(gradients, ops, norm, threshold, share)

    def judge(self, ops, norm, *state):
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

    def state_shapes(self):
        # The next place, and how many places are taken.
        return {"norms": (self.history_length,), "place": (), "taken": ()}

    def judge(self, ops, norm, norms, place, taken):
        length = self.history_length
        places = ops.arange(length, dtype=norms.dtype)
        norms = ops.where(places == place, norm, norms)
        taken = ops.where(taken < length, taken + 1.0, taken)
        place = ops.where(place < length - 1, place + 1.0, 0.0 * place)
        threshold = clipping.percentile(ops, norms, taken, self.percentile)
        return norm > threshold, threshold, (norms, place, taken)


class ZScore(_ByNorm):
    """Outliers are clipped: norms far above the mean of those until now."""

    arguments = {"z_threshold": 2.5, "decay": 0.97, "warmup_steps": 25}

    def __init__(self, z_threshold, decay, warmup_steps):
        self.z_threshold = checked_number("z_threshold", z_threshold, above=0.0)
        self.decay = checked_fraction("decay", decay, one=False)
        self.warmup_steps = checked_count("warmup_steps", warmup_steps, 1)

    def state_shapes(self):
        return {"mean": (), "variance": (), "seen": ()}

    def judge(self, ops, norm, mean, variance, seen):
        warm = seen >= self.warmup_steps
        is_outlier, threshold = clipping.z_threshold(
            ops, mean, variance, self.z_threshold, norm
        )
        is_outlier = ops.logical_and(warm, is_outlier)
        # What was cut off does not count.
        kept = ops.where(is_outlier, threshold, norm)
        first = clipping.running_moments(mean, variance, seen, norm)
        later = clipping.decayed_moments(mean, variance, self.decay, kept)
        moments = [ops.where(warm, b, a) for a, b in zip(first, later)]
        threshold = ops.where(warm, threshold, float("inf"))
        return (
            is_outlier,
            threshold,
            (*moments, ops.where(warm, seen, seen + 1.0)),
        )


def unscaled(ops, norms, loss_scale):
    """The norms without the factor of a loss scaler, a float or tensor."""
    if isinstance(loss_scale, float):
        return norms if loss_scale == 1.0 else norms / loss_scale
    if ops is keras.ops:
        return norms / ops.cast(loss_scale, norms.dtype)
    return norms / float(loss_scale)


RULES: dict[str, Any] = {
    "agc": UnitWise,
    "percentile": Percentile,
    "zclip": ZScore,
}
