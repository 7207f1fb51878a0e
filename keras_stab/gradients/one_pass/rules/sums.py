"""Sums over rows and positions: gradients of biases and scales."""

from keras_stab.backend import products
from keras_stab.numerics.norms import in_full_precision


def bias_gradients(bias, gradient):
    """Sums `(K, n, ...)` down to `(K, *bias.shape)`."""
    gradient = in_full_precision(gradient)
    rank = len(gradient.shape) - 2
    shape = (1,) * (rank - len(bias.shape)) + tuple(bias.shape)
    axes = [1] + [
        i + 2
        for i, size in enumerate(shape)
        if size == 1 or i < rank - len(bias.shape)
    ]
    total = products.sum_over(gradient, tuple(axes))
    return products.reshape(total, (-1,) + tuple(bias.shape))


def is_added_along_its_axis(bias, outputs):
    """Whether a bias is added along its own axis, and so may be summed.

    Keras 3.15 on TensorFlow adds one with a single axis longer than 1 along
    the last axis of that length, or else the second.

    Args:
        bias: Shape of the bias, aligned with the last axes of `outputs`.
        outputs: Shape of what it is added to, with all rows.
    """
    long = [i - len(bias) for i, size in enumerate(bias) if size > 1]
    if len(long) != 1:
        return True
    size, axis = bias[long[0]], len(outputs) + long[0]
    if outputs[-1] == size:
        return axis == len(outputs) - 1
    return outputs[1] != size or axis == 1


def sums_along_axes(layer, call, tensor):
    """Sums over rows and all axes but those that are normalised."""
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    rank = len(tensor.shape)
    kept = {axis % rank + 1 for axis in axes}
    grouped = in_full_precision(call.grouped(tensor))
    others = tuple(a for a in range(1, rank + 1) if a not in kept)
    return products.sum_over(grouped, others)
