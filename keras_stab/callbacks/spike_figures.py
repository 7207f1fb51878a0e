"""What RecoverFromSpikes tells of an epoch."""

import warnings

import keras
import numpy as np

from keras_stab.numerics import unusual


def counts_of(watch):
    """The counts of a `SpikeWatch`, read from the device."""
    return np.array(keras.ops.convert_to_numpy(watch.counts))


def figures_of(watch, before, threshold, rolls_back):
    """The figures of an epoch, for the logs.

    Args:
        watch: A `SpikeWatch`.
        before: Its counts at the start of the epoch.
        threshold: As for `RecoverFromSpikes`.
        rolls_back: Whether spikes are taken back.
    """
    counts = counts_of(watch)
    new = counts - before
    figures = {"spikes/count": int(new[unusual.SPIKES])}
    if rolls_back:
        figures["spikes/rollbacks"] = int(new[unusual.RECOVERIES])
    window = keras.ops.convert_to_numpy(watch.window)
    loss = norm = float("nan")
    if counts[unusual.KEPT] >= len(window):
        limits = unusual.usual_limits(np, window, threshold)
        loss, norm = float(limits[0]), float(np.exp(limits[1]))
    figures["spikes/loss_limit"] = loss
    figures["spikes/gradient_norm_limit"] = norm
    return figures


def are_too_many(watch, before, most):
    """Whether more spikes were skipped than may be; warns of that.

    Args:
        watch: A `SpikeWatch`.
        before: Its counts at the start of the epoch.
        most: Int or `None`.
    """
    counts = counts_of(watch)
    total = int(counts[unusual.SPIKES])
    if most is not None and total > most:
        warnings.warn(
            f"Training stops: {total} spikes were skipped, more than "
            f"max_recoveries={most}",
            stacklevel=3,
        )
        return True
    new = counts - before
    steps, spikes = int(new[unusual.STEPS]), int(new[unusual.SPIKES])
    if steps and 2 * spikes > steps:
        warnings.warn(
            f"{spikes} of the {steps} steps of an epoch were skipped as "
            "spikes. If the loss of every batch is NaN, the weights were lost "
            "before: load earlier ones",
            stacklevel=3,
        )
    return False
