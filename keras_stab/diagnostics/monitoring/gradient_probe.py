"""How far the groups of a batch agree about the gradient, during training."""

import keras
import numpy as np

from keras_stab.backend import devices
from keras_stab.backend import tracing
from keras_stab.batches import iterate_whole
from keras_stab.diagnostics.targets import check_targets
from keras_stab.gradients.oracle import GradientOracle
from keras_stab.gradients.small_problems import min_norm_weights_and_measures
from keras_stab.numerics.gram_measures import GROUP_MEASURES
from keras_stab.numerics.gram_measures import weight_entropy


class GradientProbe:
    """Group gradients of some batches at the current weights.

    The model runs in training mode; nothing that it would assign is kept.

    Args:
        model: A compiled and built `keras.Model`.
        data: As for `StabilityMonitor(probe=...)`.
        groups: Int, K.
        batch_size: Int, rows in a batch cut from arrays.
    """

    def __init__(self, model, data, groups, batch_size):
        self._model = model
        # Shuffling the data must leave the training as it is too.
        with devices.replayed(devices.random_state()):
            batches, _ = iterate_whole(data, batch_size, model)
            self._batches = list(devices.pooled(batches))
        if not self._batches:
            raise ValueError(
                "`probe` holds no batches (a generator can be used only "
                f"once). Received: probe of type {type(data).__name__}"
            )
        check_targets("probe", data, self._batches, model)
        self._groups = groups
        self._variables = None
        self._function = tracing.compiled(self._measures)

    def measure(self):
        """The figures of `GROUP_MEASURES` and the entropy of the weights."""
        if self._variables is None:  # now all are built
            self._variables = [
                *self._model.variables,
                *self._model.metrics_variables,
                *self._model.optimizer.variables,
            ]
        values = [tracing.read(v) for v in self._variables]
        answers = []
        with devices.replayed(devices.random_state()):
            for batch in self._batches:
                answers.append(self._function(values, batch))
        weights, measures = (
            np.array([keras.ops.convert_to_numpy(a) for a in column])
            for column in zip(*answers)
        )
        figures = dict(zip(GROUP_MEASURES, measures.mean(axis=0).tolist()))
        entropies = [weight_entropy(row) for row in weights]
        return {**figures, "weight_entropy": float(np.mean(entropies))}

    def _measures(self, values, batch):
        mapping = list(zip(self._variables, values))
        with keras.StatelessScope(mapping), tracing.no_gradients():
            oracle = GradientOracle(self._model, *batch)
            groups = oracle.group_gradients(self._groups)
            return min_norm_weights_and_measures(
                groups.gram(),
                groups.present,
                keras.ops.cast(groups.rows, "float32"),
                "exclude",
                "drop",
            )
