"""Rollback: after a spike, training goes on from the last good snapshot."""

import warnings

import keras

from keras_stab.backend import tracing
from keras_stab.callbacks.spike_figures import counts_of
from keras_stab.numerics import unusual
from keras_stab.trainer.fitting import lend
from keras_stab.trainer.lending import lenders
from keras_stab.trainer.lending import take_back_from_fit


class Rollback:
    """Takes snapshots, and puts one back when a spike was seen.

    Args:
        model: A compiled model.
        watch: Its `SpikeWatch`, which counts the spikes.
        snapshots: The `Snapshots` of the model.
        settings: The `RecoverFromSpikes`.
    """

    def __init__(self, model, watch, snapshots, settings):
        self._model, self._watch = model, watch
        self._snapshots = snapshots
        self._settings = settings
        self._last = self._seen = self._epoch = 0
        # Whether the best snapshot is the end of the training.
        self._has_begun = self._ended = False
        # Metrics of an epoch without what was taken back, at its end.
        self.logs = {}

    def begin(self):
        """At the start of a call of `fit`."""
        self._has_begun = self._ended = False

    def begin_epoch(self, epoch):
        """Before the first step, when other callbacks have loaded state."""
        self._epoch, self.logs = epoch, {}
        if self._has_begun:
            return
        counts = counts_of(self._watch)
        self._last = int(counts[unusual.STEPS])
        self._seen = int(counts[unusual.SPIKES])
        self._has_begun = True

    def before_step(self, step):
        """Looks at the count of spikes when it is time.

        Args:
            step: Int, the steps made so far.
        """
        if self._snapshots.newest is None:
            self._take_first()
        settings = self._settings
        takes = self._passes(step, settings.snapshot_every)
        if takes or self._passes(step, settings.check_every):
            tracing.sync_state(self._model)
            if not self._recovered() and takes:
                self._snapshots.take(self._epoch)
        self._last = step

    def after_steps(self):
        """At the end of an epoch, or before a validation."""
        model = self._model
        taken_back = take_back_from_fit(model)
        try:
            # A callback of the user's has lent other weights: later, then.
            if any(method.swapped for method in lenders(model)):
                return
            tracing.sync_state(model)
            if self._ended:
                self._snapshots.put_back(self._snapshots.best, self._epoch)
            elif self._recovered():
                self.logs = {
                    name: float(keras.ops.convert_to_numpy(value))
                    for name, value in model.get_metrics_result().items()
                }
        finally:
            if taken_back:
                lend(model)

    def _passes(self, step, every):
        return step // every > self._last // every

    def _take_first(self):
        model = self._model
        if not model.built:  # a model of TensorFlow, until its first step
            return
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        tracing.sync_state(model)
        self._snapshots.take(self._epoch)

    def _recovered(self):
        """Whether there was a spike; a snapshot is put back then."""
        counts = counts_of(self._watch)
        spikes = int(counts[unusual.SPIKES])
        if spikes == self._seen:
            return False
        self._seen = spikes
        if self._snapshots.newest is None:
            return False
        counts[unusual.RECOVERIES] += 1
        most = self._settings.max_recoveries
        snapshot = self._snapshots.good
        if most is not None and counts[unusual.RECOVERIES] > most:
            self._ended = True
            self._model.stop_training = True
            snapshot = self._snapshots.best
            warnings.warn(
                f"Training stops with the best snapshot after {most} "
                f"recoveries, since max_recoveries={most}",
                stacklevel=2,
            )
        self._snapshots.put_back(snapshot, self._epoch)
        counts[unusual.KEPT] = snapshot.kept
        if self._settings.rate_factor != 1.0:
            counts[unusual.COOLING] = self._settings.cool_down
        self._watch.counts.assign(counts)
        return True
