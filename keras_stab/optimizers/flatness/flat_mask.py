"""Which weights are flat: masks, or averaged scores, kept as variables."""

import math

import keras

from keras_stab.backend import products
from keras_stab.backend import tracing
from keras_stab.numerics.threshold import bits_of
from keras_stab.numerics.threshold import kth_smallest
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

    def assign(self, values, where):
        """Assigns the state of a refresh where the boolean tensor holds."""
        for variable, value in zip(self._state, values):
            old = variable.value
            if value is not old:  # PyTorch, when no refresh was due
                variable.assign(keras.ops.where(where, value, old))

    def refreshed(self, roots, size):
        """The state after a refresh; the same masks if it must be skipped.

        Args:
            roots: One tensor per variable, whose square is the score; `None`
                leaves a variable out of the ranking.
            size: Scalar that makes scores of different refreshes comparable.
        """
        ops = keras.ops
        old = self.values()
        measures, refreshes, skipped = old[self._weights + 1 :]
        present = [i for i in self._position if roots[i] is not None]
        if not present:
            return [*old[: self._weights + 1], measures, refreshes, skipped + 1]
        # TensorFlow forgets the shape of a sparse gradient.
        scores = [
            ops.reshape(
                ops.abs(ops.cast(tracing.densify(roots[i]), "float32")),
                old[self._position[i]].shape,
            )
            for i in present
        ]
        usable = _all([ops.all(ops.isfinite(s)) for s in scores])
        # All zero (an empty batch, or no step yet) gives no ranking.
        usable = ops.logical_and(
            usable, ops.logical_not(_all([ops.all(s == 0.0) for s in scores]))
        )
        trace = sum(ops.sum(ops.square(s)) for s in scores) * size
        if self._momentum:
            scores = [
                self._averaged(old[self._position[i]], size * ops.square(s))
                for i, s in zip(present, scores)
            ]
        # Without an average the roots are ranked: squares underflow to ties.
        patterns = [bits_of(s) for s in scores]
        count = sum(math.prod(p.shape) for p in patterns)
        threshold = products.kth_smallest(
            patterns, rank_of(self._fraction, count), kth_smallest
        )
        new = list(old)
        new[self._weights] = threshold
        masks = [p <= threshold for p in patterns]
        for i, score, mask in zip(present, scores, masks):
            new[self._position[i]] = score if self._momentum else mask
        before = [self.flat(i, old) for i in present]
        new[self._weights + 1] = finite_figures(
            ops.stack([*_comparison(before, masks, count, refreshes), trace])
        )
        new[self._weights + 2] = refreshes + 1
        chosen = [ops.where(usable, n, o) for n, o in zip(new, old)]
        chosen[self._weights + 3] = skipped + 1 - ops.cast(usable, "int32")
        return chosen

    def _averaged(self, old, score):
        old = keras.ops.where(old < _NO_SCORE, old, 0.0)
        return self._momentum * old + (1.0 - self._momentum) * score

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


def _all(conditions):
    return keras.ops.all(keras.ops.stack(conditions))


def _comparison(before, after, count, refreshes):
    """The flat fraction, and how much of the sharp set stayed sharp."""

    def total(masks):
        return sum(keras.ops.sum(keras.ops.cast(m, "float32")) for m in masks)

    sharp = [keras.ops.logical_not(m) for m in before]
    stayed = [
        keras.ops.logical_and(s, keras.ops.logical_not(m))
        for s, m in zip(sharp, after)
    ]
    overlap = total(stayed) / keras.ops.maximum(total(sharp), 1.0)
    none_yet = keras.ops.zeros((), "float32")
    overlap = keras.ops.where(refreshes > 0, overlap, none_yet)
    return total(after) / count, overlap
