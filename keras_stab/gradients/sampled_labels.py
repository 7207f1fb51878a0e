"""Labels drawn from the model's own predictions, and their likelihood.

Where the loss is a negative log-likelihood, the model's outputs are a
distribution of labels. The squared gradient of the loss, at labels drawn from
it, is on average the diagonal of the Fisher matrix, which for these losses is
the Gauss-Newton matrix.
"""

import functools
import math

import keras

from keras_stab import keras_internals
from keras_stab.backend import devices
from keras_stab.backend import jacobians
from keras_stab.numerics.norms import in_full_precision

_losses = keras.losses
_TINY = 1e-7


class SampledLabels:
    r"""The likelihood of sampled labels, as a loss for `oracle.with_loss`.

    If the training loss is $\sum_i c_i l_i$, over all labels of all outputs
    and with weights, masks and reductions in $c_i$, this is
    $\sum_i \sqrt{c_i / n} \, l_i$ with n labels in all: n times the square of
    its gradient has the expectation $\sum_i c_i F_i$. Label smoothing,
    regularisers and `add_loss` are left out.

    Args:
        model: A compiled `keras.Model`.
        generator: A `keras.random.SeedGenerator`.
        seed: Tensor `(2,)`, the state that it draws from; its own is kept.

    Attributes:
        count: n, after a call.
    """

    def __init__(self, model, generator, seed):
        check_losses(model)
        self._model, self._generator, self._seed = model, generator, seed
        self.count = None

    def __call__(self, y, y_pred, sample_weight):
        heads = keras_internals.compiled_heads(
            self._model, y, y_pred, sample_weight
        )
        total, self.count = 0.0, 0
        with keras.StatelessScope([(self._generator.state, self._seed)]):
            for head in heads:
                kind = _KINDS[head.loss.fn]
                arguments = keras_internals.loss_arguments(head.loss)
                y_pred = in_full_precision(head.y_pred)
                values, each = kind(y_pred, arguments, self._generator)
                shares = _shares(head, arguments, values)
                total += keras.ops.sum(keras.ops.sqrt(shares) * values)
                self.count += _size(values) * each
        return total / keras.ops.sqrt(keras.ops.cast(self.count, total.dtype))


def check_losses(model):
    """Raises a `ValueError` for a loss that implies no label distribution."""
    if type(model).compute_loss is not keras.Model.compute_loss:
        raise ValueError(_unknown(f"compute_loss of {type(model).__name__}"))
    losses = [e.loss for e in keras_internals.loss_entries(model)]
    if not losses:
        raise ValueError(_unknown("no loss in `compile`"))
    for loss in losses:
        own = keras_internals.is_loss_of_keras(loss)
        if not own or loss.fn not in _KINDS:
            name = getattr(getattr(loss, "fn", None), "__name__", None)
            raise ValueError(_unknown(name or type(loss).__name__))


def _unknown(received):
    return (
        "The labels that the model expects can be drawn for cross-entropies, "
        "KL divergence, mean squared and mean absolute error and Poisson "
        "losses of Keras. For another loss pass `label_sampler`, or use "
        'curvature="second_moment" or curvature="gradient", which need no '
        f"labels. Received: {received}"
    )


def _shares(head, arguments, like):
    """How much of each value of an output is in the training loss."""
    shape = keras.ops.shape(like)
    ignored = arguments.get("ignore_class")
    mask = keras_internals.get_mask(head.y_pred)
    if (
        devices.EAGER
        and head.sample_weight is None
        and ignored is None
        and mask is None
        and 0 not in shape
    ):
        shares = _even_share(head.loss.reduction, tuple(shape), like.dtype)
    else:
        valid = None
        if ignored is not None:
            y = keras.ops.reshape(keras.ops.cast(head.y, "int32"), shape)
            valid = keras.ops.not_equal(y, ignored)
        shares = _reduced_shares(head, valid, shape, like.dtype)
    if head.weight is not None:
        shares = shares * head.weight
    return keras.ops.stop_gradient(keras.ops.maximum(shares, 0.0))


# Remembered: found by a gradient, it is a large part of a small Fisher pass.
@functools.lru_cache(maxsize=64)
def _even_share(reduction, shape, dtype):
    """The share of every value, where all have the same, a tensor `(1,)`."""
    ones = keras.ops.ones(shape, dtype)
    loss = keras.losses.MeanSquaredError(reduction=reduction)
    head = keras_internals.Head(loss, None, None, ones, None)
    shares = keras.ops.reshape(_reduced_shares(head, None, shape, dtype), -1)
    return shares[:1]


def _reduced_shares(head, valid, shape, dtype):
    """The derivatives of the reduced loss by its values."""

    class Given(keras.losses.Loss):
        """Reduces given values as the compiled loss does its own."""

        def call(self, y, y_pred):
            if valid is not None:
                keras_internals.set_mask(self.values, valid)
            return self.values

    given = Given(reduction=head.loss.reduction, dtype=dtype)
    ones = keras.ops.ones(shape, dtype)

    def reduced(values):
        # A copy of the values: the mask must not stay attached to them.
        given.values = values[0] * 1.0
        return [given(head.y_pred, head.y_pred, head.sample_weight)]

    one = keras.ops.ones((), dtype)
    (shares,) = jacobians.vector_jacobian(reduced, [ones], [one])
    return shares


def _size(tensor):
    size = math.prod(tensor.shape) if None not in tensor.shape else None
    if size is None:
        size = keras.ops.prod(keras.ops.shape(tensor))
    return size


# ---- Kinds of losses ------------------------------------------------------

# Each takes the outputs, the arguments of the loss and a seed generator, and
# returns one value per row (or position) and the number of labels in it.


def _categorical(y_pred, arguments, generator):
    axis = arguments.get("axis", -1)
    logits = keras.ops.moveaxis(y_pred, axis, -1)
    if not arguments.get("from_logits", False):
        logits = keras.ops.log(keras.ops.clip(logits, _TINY, 1.0))
    classes = logits.shape[-1]
    flat = keras.ops.reshape(logits, (-1, classes))
    # PyTorch refuses to draw from NaN; the gradient will be NaN anyway.
    flat = keras.ops.nan_to_num(
        keras.ops.stop_gradient(flat), nan=0.0, posinf=1e30, neginf=-1e30
    )
    drawn = _categories(flat, generator)
    drawn = keras.ops.reshape(drawn, keras.ops.shape(logits)[:-1])
    log_shares = keras.ops.log_softmax(logits, axis=-1)
    # Not by indices, whose gradient is a slow scatter on some backends.
    chosen = keras.ops.one_hot(drawn, classes, dtype=logits.dtype)
    return -keras.ops.sum(chosen * log_shares, axis=-1), 1


def _binary(y_pred, arguments, generator):
    if arguments.get("from_logits", False):
        logits = y_pred
    else:
        share = keras.ops.clip(y_pred, _TINY, 1.0 - _TINY)
        logits = keras.ops.log(share) - keras.ops.log1p(-share)
    share = keras.ops.sigmoid(keras.ops.stop_gradient(logits))
    uniform = _uniform(logits, generator)
    y = keras.ops.cast(uniform < share, logits.dtype)
    return _joined(keras.ops.softplus(logits) - y * logits, arguments)


def _squared(y_pred, arguments, generator):
    noise = _normal(y_pred, generator)
    y = keras.ops.stop_gradient(y_pred) + noise * math.sqrt(0.5)
    return _joined(keras.ops.square(y_pred - y), arguments)


def _absolute(y_pred, arguments, generator):
    uniform = _uniform(y_pred, generator) - 0.5
    far = 1.0 - 2.0 * keras.ops.abs(uniform)
    noise = -keras.ops.sign(uniform) * keras.ops.log(
        keras.ops.maximum(far, _TINY)
    )
    y = keras.ops.stop_gradient(y_pred) + noise
    return _joined(keras.ops.abs(y_pred - y), arguments)


def _poisson(y_pred, arguments, generator):
    """Draws with normal noise that has the variance of a Poisson variable.

    Keras draws no Poisson variables; the Fisher matrix depends on nothing but
    the variance.
    """
    rate = keras.ops.maximum(keras.ops.stop_gradient(y_pred), 0.0)
    noise = _normal(y_pred, generator)
    y = rate + keras.ops.sqrt(rate) * noise
    return _joined(y_pred - y * keras.ops.log(y_pred + _TINY), arguments)


# Processes that share a batch draw the numbers of one device: those for the
# rows of all of them, if these are equally many, and keep their own.


def _categories(logits, generator):
    own, rows = _own_rows(logits), logits.shape[0]
    if own is not None:
        others = (own.start, rows * devices.ranks() - own.stop)
        logits = keras.ops.pad(logits, (others, (0, 0)))
    drawn = keras.random.categorical(logits, 1, seed=generator)
    return drawn if own is None else drawn[own]


def _uniform(like, generator):
    return _drawn(keras.random.uniform, like, generator)


def _normal(like, generator):
    return _drawn(keras.random.normal, like, generator)


def _drawn(draw, like, generator):
    own, shape = _own_rows(like), keras.ops.shape(like)
    if own is not None:
        shape = (shape[0] * devices.ranks(), *shape[1:])
    drawn = draw(shape, dtype=like.dtype, seed=generator)
    return drawn if own is None else drawn[own]


def _own_rows(tensor):
    """Where the rows of this process are among those of all; `None` for one."""
    if devices.ranks() == 1:
        return None
    first = devices.rank() * tensor.shape[0]
    return slice(first, first + tensor.shape[0])


def _joined(values, arguments):
    """Sums the labels of a row, whose loss is the mean over them."""
    axis = arguments.get("axis", -1)
    labels = values.shape[axis]
    if labels is None:
        labels = keras.ops.shape(values)[axis]
    root = keras.ops.sqrt(keras.ops.cast(labels, values.dtype))
    return keras.ops.sum(values, axis=axis) / root, labels


_KINDS = {
    _losses.categorical_crossentropy: _categorical,
    _losses.sparse_categorical_crossentropy: _categorical,
    _losses.kl_divergence: _categorical,
    _losses.binary_crossentropy: _binary,
    _losses.mean_squared_error: _squared,
    _losses.mean_absolute_error: _absolute,
    _losses.poisson: _poisson,
}
