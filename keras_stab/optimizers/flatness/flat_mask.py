"""Which weights are flat: masks, or averaged scores, kept as variables."""

import math

import keras

from keras_stab.backend import many_tensors
from keras_stab.backend import ranking
from keras_stab.backend import tracing
from keras_stab.backend import updates
from keras_stab.numerics.threshold import bits_of
from keras_stab.numerics.threshold import rank_of
from keras_stab.optimizers.figures import add_figures
from keras_stab.optimizers.figures import finite_figures
from keras_stab.optimizers.figures import read_figures
from keras_stab.optimizers.state import add_slot
from keras_stab.optimizers.state import add_state

_NO_SCORE = float("inf")
FIGURES = ("flat_fraction", "sharp_overlap", "curvature_trace")


class FlatMask:
    """The flat weights: a given fraction of all, those of smallest score.

    Without averaging the masks themselves are kept, one byte per weight; with
    it the averaged scores, four bytes per weight, and the bit pattern of the
    threshold, from which the masks follow. Before the first refresh no weight
    is flat.

    Args:
        optimizer: The optimizer that keeps them as variables.
        variables: The weights.
        included: One boolean per variable; the others are never flat.
        fraction: Float in (0, 1], the flat fraction.
        momentum: Float in [0, 1), of the average.
    """

    def __init__(self, optimizer, variables, included, fraction, momentum):
        self._fraction, self._momentum = fraction, momentum
        # Memory for `Boost`, not state: what it holds is not read again.
        self.room = []
        self._state = []
        self._position = {}
        dtype = "float32" if momentum else "bool"
        kind = "curvature" if momentum else "flat"
        # Infinity: no score yet, and not flat if it stays so. Unlike NaN it
        # equals itself, which JAX on several processes checks on loading.
        no_score = keras.initializers.Constant(_NO_SCORE)
        initializer = no_score if momentum else "zeros"
        for i, (variable, chosen) in enumerate(zip(variables, included)):
            if not chosen:
                continue
            self._position[i] = len(self._state)
            self._state.append(
                add_slot(optimizer, variable, kind, dtype, initializer)
            )
        self._weights = len(self._state)
        self._state.append(
            add_state(
                optimizer,
                "threshold_bits",
                initializer=keras.initializers.Constant(-1),
            )
        )
        self._state += [
            add_figures(optimizer, FIGURES),
            add_state(optimizer, "refreshes"),
            add_state(optimizer, "skipped_refreshes"),
        ]

    def values(self):
        """The state now, a list of tensors."""
        return [v.value for v in self._state]

    def assign(self, values, refreshed, where):
        """Assigns the state, if there was a refresh, where a boolean holds."""
        updates.assign_changed(refreshed, where, self._state, values)

    def refreshed(self, roots, size):
        """The state after a refresh; the same masks if it must be skipped.

        Args:
            roots: One tensor per variable, whose square is the score; `None`
                leaves a variable out of the ranking.
            size: Scalar that makes scores of different refreshes comparable.
        """
        new = self.values()
        places = {
            place: keras.ops.reshape(
                # TensorFlow forgets the shape of a sparse gradient.
                keras.ops.cast(tracing.densify(roots[i]), "float32"),
                new[place].shape,
            )
            for i, place in self._position.items()
            if roots[i] is not None
        }
        if not places:
            new[-1] = new[-1] + 1
            return new
        present = list(places.values())
        slots, new[self._weights :] = tracing.in_kernel(
            lambda: _ranked(
                self._fraction,
                self._momentum,
                [new[place] for place in places],
                new[self._weights :],
                present,
                size,
            ),
            present,
        )
        for place, slot in zip(places, slots):
            new[place] = slot
        return new

    def flat(self, index, values=None):
        """The mask of one variable, `None` where it is never flat."""
        if index not in self._position:
            return None
        values = self.values() if values is None else values
        value = values[self._position[index]]
        if self._momentum:
            return bits_of(value) <= values[self._weights]
        return value

    def figures(self, variables):
        """The diagnostics, read from the device."""
        figures, refreshes, skipped = self._state[self._weights + 1 :]
        return {
            **read_figures(figures, FIGURES),
            "refreshes": int(refreshes.numpy()),
            "skipped_refreshes": int(skipped.numpy()),
            "flat_fractions": {
                variables[i].path: float(
                    keras.ops.convert_to_numpy(self.flat(i)).mean()
                )
                for i in self._position
            },
        }


def _ranked(fraction, momentum, slots, state, roots, size):
    """Slots and other state after a refresh; see `FlatMask.refreshed`."""
    ops = keras.ops
    shapes = [r.shape for r in roots]
    old = many_tensors.pack_vector(slots)
    scores = [ops.abs(r) for r in many_tensors.pack_vector(roots)]
    threshold, measures, refreshes, skipped = state
    count = ranking.count_true
    entries = sum(math.prod(s.shape) for s in scores)
    patterns = [bits_of(s) for s in scores]
    # All zero (an empty batch, or no step yet) gives no ranking.
    usable = ranking.can_be_ranked(patterns, entries)
    trace = sum(map(many_tensors.sum_of_squares, scores)) * size
    before = old
    if momentum:
        before = [bits_of(o) <= threshold for o in old]
        scores = [
            _averaged(momentum, o, size * ops.square(s))
            for o, s in zip(old, scores)
        ]
        patterns = [bits_of(s) for s in scores]
    # Without an average the roots are ranked: squares underflow to ties.
    new_threshold = ranking.kth_smallest(patterns, rank_of(fraction, entries))
    masks = [p <= new_threshold for p in patterns]
    sharp = entries - count(before)
    either = [ops.logical_or(b, m) for b, m in zip(before, masks)]
    overlap = _as_float(entries - count(either)) / _as_float(
        ops.maximum(sharp, 1)
    )
    overlap = ops.where(refreshes > 0, overlap, ops.zeros_like(overlap))
    figures = [_as_float(count(masks)) / entries, overlap, trace]
    new = [
        *(scores if momentum else masks),
        new_threshold,
        finite_figures(ops.stack(figures)),
        refreshes + 1,
        skipped + 0,
    ]
    kept = [*old, threshold, measures, refreshes, skipped + 1]
    if not momentum:
        # Always true, but known only when all else has read the old masks:
        # a compiler can then overwrite them in place of a copy.
        usable = ops.logical_and(usable, overlap <= 1.0)
    chosen = updates.choose(usable, lambda: new, lambda: kept)
    slots = many_tensors.unpack_vector(chosen[: len(old)], shapes)
    return slots, chosen[len(old) :]


def _averaged(momentum, old, score):
    old = keras.ops.where(old < _NO_SCORE, old, 0.0)
    return momentum * old + (1.0 - momentum) * score


def _as_float(count):
    return keras.ops.cast(count, "float32")
