"""Batch-norm statistics at the weights that a model holds now."""

import contextlib
import math
import warnings
from typing import Any

import keras
import numpy as np

from keras_stab import keras_internals
from keras_stab.arguments import checked_count
from keras_stab.backend import devices
from keras_stab.backend import tracing
from keras_stab.batches import iterate


def reestimate_batch_norm(
    model: keras.Layer,
    data: Any,
    steps: int | None = None,
    batch_size: int = 32,
    verbose: int = 1,
) -> None:
    r"""Computes the statistics of all batch-norm layers again.

    Moving statistics that other weights left behind do not fit weights that
    were averaged, interpolated or loaded. This passes data through the model
    in training mode and assigns, for every batch-norm layer, the mean and the
    (biased) variance of all $N$ elements that each channel saw,

    $$
    m = \frac1N \sum_b n_b m_b, \qquad
    v = \frac1N \sum_b n_b \big(v_b + (m_b - m)^2\big),
    $$

    pooled over batches $b$ of any sizes $n_b$, in float64. Nothing else of
    the model changes: not the weights, dropout seeds, metrics, `momentum`, or
    the statistics of layers with `trainable=False`, which training leaves
    alone too. When anything fails, the old statistics stay.

    Args:
        model: A `keras.Model` (or layer). It need not be compiled.
        data: Arrays as for `fit`: `x`, a dict of inputs, or a tuple
            `(x, y)` or `(x, y, sample_weight)`, cut into batches of
            `batch_size`. Or batches: a list or other iterable of any of
            those, a `tf.data.Dataset`, a `PyDataset` or a PyTorch
            `DataLoader`. Only `x` is used. With `keras.distribution` on
            several processes of JAX each passes its own rows, as for `fit`.
        steps: Int, the maximum number of batches to use; `None` for all.
            Some 50 to 400 are usually enough. Defaults to `None`.
        batch_size: Int, rows per batch cut from arrays. Use that of training,
            because the inputs of deeper layers depend on it. Defaults to 32.
        verbose: 1 for a progress bar, 0 for none. Defaults to 1.

    Raises:
        ValueError: If there are no batches, an argument is out of range, the
            data give a statistic that is not finite, or a layer keeps other
            statistics than these (`renorm=True`, a `call` of its own).

    Example:

    >>> import keras, keras_stab, numpy as np
    >>> model = keras.Sequential([keras.layers.BatchNormalization()])
    >>> x = np.array([[0.0], [2.0], [4.0]])
    >>> keras_stab.reestimate_batch_norm(model, x, batch_size=2, verbose=0)
    >>> [round(float(w[0]), 3) for w in model.get_weights()[2:]]
    [2.0, 2.667]

    Departures from the paper:
        SWA (Izmailov et al.) weights unbiased batch variances and leaves out
        the spread of the batch means; torch's `update_bn` also gives small
        batches the weight of large ones. The figures here are exact.

    References:
        - Izmailov et al., 2018, "Averaging Weights Leads to Wider Optima and
          Better Generalization", arXiv:1803.05407
    """
    if not isinstance(model, keras.Layer):
        raise ValueError(
            "`model` must be a keras.Model or a layer. Received: model of "
            f"type {type(model).__name__}"
        )
    checked_count("steps", steps, 1, optional=True)
    checked_count("batch_size", batch_size, 1)
    batches, total = iterate(data, batch_size, model)
    batches = devices.pooled(batches)
    if steps is not None:
        total = steps if total is None else min(steps, total)
    first = next(batches, None)
    if first is None:
        raise ValueError(
            "`data` holds no batches (a generator can be used only once). "
            f"Received: data of type {type(data).__name__}"
        )
    if not model.built:
        model(first)
    layers = batch_norm_layers(model)
    if not layers:
        return
    bar = keras.utils.Progbar(total) if verbose else None
    moments = {id(layer): _Moments() for layer in layers}
    # Whatever the forward passes assign stays in this scope.
    with (
        tracing.no_gradients(),
        devices.replayed(devices.random_state()),
        keras.StatelessScope(),
        _watched(layers, moments),
    ):
        batch, done = first, 0
        while batch is not None:
            if keras_internals.accepts_training(model):
                model(batch, training=True)
            else:
                model(batch)
            done += 1
            if bar is not None:
                bar.update(done, finalize=done == total)
            batch = next(batches, None) if done != steps else None
    if bar is not None and done != total:
        bar.update(done, finalize=True)
    _assign(layers, moments)


def batch_norm_layers(model):
    """The batch-norm layers whose statistics change in training."""
    layers = []
    for layer in [model, *keras_internals.all_layers(model)]:
        if not isinstance(layer, keras.layers.BatchNormalization):
            continue
        if layer.trainable and layer not in layers:
            layers.append(layer)
    return layers


def moving_statistics(model):
    """Means and variances of those layers, in a fixed order."""
    return [
        variable
        for layer in batch_norm_layers(model)
        for variable in (layer.moving_mean, layer.moving_variance)
    ]


class _Moments:
    """Count, mean and squared deviations per channel, in float64."""

    def __init__(self):
        self.count = 0.0
        self.mean = 0.0
        self.deviations = 0.0

    def add(self, count, mean, variance):
        # Merged pair by pair (Chan et al.): the difference of two large
        # sums would lose the variance of channels with a large mean.
        total = self.count + count
        if total == 0.0:  # every position was masked
            return
        shift = mean - self.mean
        self.deviations = (
            self.deviations
            + count * variance
            + np.square(shift) * self.count * count / total
        )
        self.mean = self.mean + shift * count / total
        self.count = total


@contextlib.contextmanager
def _watched(layers, moments):
    """Every call of the layers adds to their moments."""

    def watch(layer):
        call = layer.call

        def watching(inputs, training=None, mask=None):
            if training:
                moments[id(layer)].add(*_batch_moments(layer, inputs, mask))
            return call(inputs, training=training, mask=mask)

        return watching

    for layer in layers:
        _refuse_other_statistics(layer)
    # Past `Layer.__setattr__`, which would track the function.
    for layer in layers:
        vars(layer)["call"] = watch(layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["call"]


def _batch_moments(layer, inputs, mask):
    """Elements per channel, their mean and their variance, on the host."""
    ops = keras.ops
    x = ops.cast(inputs, "float64" if "64" in str(inputs.dtype) else "float32")
    axis = layer.axis % len(x.shape)
    axes = [a for a in range(len(x.shape)) if a != axis]
    # By sums: on some backends `ops.mean` computes float64 in float32.
    if mask is None:
        count = float(math.prod(int(x.shape[a]) for a in axes))
        mean = ops.sum(x, axis=axes, keepdims=True) / max(count, 1.0)
        squares = ops.sum(ops.square(x - mean), axis=axes)
        variance = squares / max(count, 1.0)
    else:
        weights = ops.expand_dims(ops.cast(mask, x.dtype), -1)
        weights = ops.broadcast_to(
            weights, [1 if a == axis else x.shape[a] for a in range(x.ndim)]
        )
        count = float(ops.convert_to_numpy(ops.sum(weights)))
        share = max(count, 1.0)
        # A selection: masked positions may hold NaN.
        kept = ops.where(weights > 0, x, ops.zeros((), x.dtype))
        mean = ops.sum(kept, axis=axes, keepdims=True) / share
        squares = ops.where(
            weights > 0, ops.square(x - mean), ops.zeros((), x.dtype)
        )
        variance = ops.sum(squares, axis=axes) / share
    mean, variance = (
        np.asarray(ops.convert_to_numpy(t), "float64").reshape(-1)
        for t in (mean, variance)
    )
    return count, mean, variance


def _assign(layers, moments):
    for layer in layers:
        seen = moments[id(layer)]
        if seen.count and not (
            np.all(np.isfinite(seen.mean))
            and np.all(np.isfinite(seen.deviations))
        ):
            raise ValueError(
                "The data give batch-norm statistics that are not finite; the "
                f"old ones stay. Received: layer {layer.path!r}"
            )
    for layer in layers:
        seen = moments[id(layer)]
        if not seen.count:
            warnings.warn(
                f"The batch-norm layer {layer.path!r} was not used on these "
                "data and keeps its statistics",
                stacklevel=3,
            )
            continue
        layer.moving_mean.assign(seen.mean)
        layer.moving_variance.assign(seen.deviations / seen.count)


def _refuse_other_statistics(layer):
    if layer.renorm:
        raise ValueError(
            "A layer with `renorm=True` keeps statistics that no pass over "
            f"data gives exactly. Received: layer {layer.path!r}"
        )
    if type(layer).call is not keras.layers.BatchNormalization.call:
        raise ValueError(
            "A batch-norm layer with a `call` of its own may keep other "
            f"statistics. Received: layer {layer.path!r} of type "
            f"{type(layer).__name__}"
        )
