"""The losses of K groups of rows, from the outputs for all rows."""

import contextlib

import keras
import numpy as np

from keras_stab import keras_internals
from keras_stab.backend import jacobians
from keras_stab.gradients import rows
from keras_stab.gradients.one_pass.units import Refusal
from keras_stab.numerics.norms import in_full_precision

_losses = keras.losses
# Means over rows of a value that depends on one row alone.
_ROW_WISE = {
    _losses.binary_crossentropy,
    _losses.binary_focal_crossentropy,
    _losses.categorical_crossentropy,
    _losses.categorical_focal_crossentropy,
    _losses.categorical_hinge,
    _losses.cosine_similarity,
    _losses.hinge,
    _losses.huber,
    _losses.kl_divergence,
    _losses.log_cosh,
    _losses.mean_absolute_error,
    _losses.mean_absolute_percentage_error,
    _losses.mean_squared_error,
    _losses.mean_squared_logarithmic_error,
    _losses.poisson,
    _losses.sparse_categorical_crossentropy,
    _losses.squared_hinge,
}


class GroupLosses:
    """Computes what `compute_loss` gives for the rows of each group alone.

    The general way calls it once per group. When every loss is a mean over rows
    of Keras's own, one call for all rows does: the loss of group k is the
    part of its rows times B / n_k, a factor that the answers get afterwards
    (`factors`).
    """

    def __init__(self, oracle, layout):
        self._oracle, self._layout = oracle, layout
        self._model = oracle.model
        own = type(self._model).compute_loss
        self._overridden = own is not keras.Model.compute_loss
        self._regularised = [
            v for v in oracle.variables if v.regularizer is not None
        ]
        self._at_once = False
        if self._overridden and self._regularised:
            raise Refusal(
                "compute_loss is the model's own: what it makes of the "
                f"regulariser of {self._regularised[0].path!r} is not known"
            )

    def __call__(self, x, y, y_pred, sample_weight):
        """Returns the sum of the group losses, and the loss of the batch."""
        self._check_outputs(y_pred)
        self._at_once = self._is_mean_over_rows(y_pred)
        if not (self._at_once or self._layout.is_static):
            raise Refusal(
                "the number of rows is not known while the step is traced, "
                "and the loss is not a mean over rows of Keras's own"
            )
        oracle, layout = self._oracle, self._layout
        with self._without_regularisers():
            if self._at_once:
                loss = keras_internals.compute_loss(
                    self._model, x, y, y_pred, sample_weight
                )
                total = loss
            else:
                total = loss = 0.0
                for k, size in enumerate(layout.sizes):
                    if size == 0:
                        continue
                    parts = [
                        layout.group(part, k)
                        for part in (x, y, y_pred, sample_weight)
                    ]
                    _cut_masks(y_pred, parts[2], layout, k)
                    own = keras_internals.compute_loss(self._model, *parts)
                    total = total + own
                    loss = loss + (size / layout.size) * own
        penalties = [
            v.regularizer(value)
            for v, value in zip(oracle.variables, oracle.values)
            if v.regularizer is not None
        ]
        return total, loss + sum(penalties) if penalties else loss

    def factors(self):
        """What gradients by the rows of each group must be multiplied by.

        Then they are those of the group losses. A number that is the same for
        all groups, or a vector `(K,)`; `None` for 1.
        """
        layout = self._layout
        if not self._at_once:
            return None
        if layout.sorted:
            return float(layout.groups)
        if layout.is_static:
            return np.array([layout.size / max(n, 1) for n in layout.sizes])
        sizes = keras.ops.cast(keras.ops.stack(layout.sizes), "float64")
        whole = keras.ops.cast(layout.size, "float64")
        return whole / keras.ops.maximum(sizes, 1.0)

    def regularisation_gradients(self):
        """The gradient of each weight regulariser, by variable identity."""
        oracle = self._oracle
        answer = {}
        for variable, value in zip(oracle.variables, oracle.values):
            if variable.regularizer is None:
                continue

            def penalty(values, regulariser=variable.regularizer):
                return [regulariser(values[0])]

            one = keras.ops.ones((), value.dtype)
            (gradient,) = jacobians.vector_jacobian(penalty, [value], [one])
            if gradient is not None:
                answer[id(variable)] = in_full_precision(gradient)
        return answer

    def _check_outputs(self, y_pred):
        size = self._layout.size
        for leaf in rows.leaves(y_pred):
            leading = leaf.shape[0] if len(leaf.shape) else 0
            if self._layout.is_static and leading != size:
                raise Refusal(
                    "an output of the model is not one row per sample"
                )

    def _is_mean_over_rows(self, y_pred):
        losses = [e.loss for e in keras_internals.loss_entries(self._model)]
        return (
            not self._overridden
            and bool(losses)
            and all(map(_is_row_wise, losses))
            and all(
                len(leaf.shape) > 1 and keras_internals.get_mask(leaf) is None
                for leaf in rows.leaves(y_pred)
            )
        )

    @contextlib.contextmanager
    def _without_regularisers(self):
        """Keeps them out of every group's loss; they are added once."""
        kept = [v.regularizer for v in self._regularised]
        try:
            for variable in self._regularised:
                variable.regularizer = None
            yield
        finally:
            for variable, regulariser in zip(self._regularised, kept):
                variable.regularizer = regulariser


def _is_row_wise(loss):
    if not keras_internals.is_loss_of_keras(loss):
        return False
    arguments = keras_internals.loss_arguments(loss)
    return (
        loss.fn in _ROW_WISE
        and loss.reduction == "sum_over_batch_size"
        and arguments.get("ignore_class") is None
        and arguments.get("axis", -1) == -1
    )


def _cut_masks(whole, part, layout, k):
    for leaf, cut in zip(keras.tree.flatten(whole), keras.tree.flatten(part)):
        mask = keras_internals.get_mask(leaf)
        if mask is not None:
            keras_internals.set_mask(cut, layout.group(mask, k))
