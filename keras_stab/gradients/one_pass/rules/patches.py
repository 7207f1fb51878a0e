"""Convolutions as products of matrices: the windows that a kernel sees."""

import itertools

import keras

from keras_stab.backend import products


def unfold(images, kernel_size, strides, dilation, padding):
    """Every window of the input, flattened.

    Args:
        images: Tensor `(B, *spatial, c)`, channels last.
        kernel_size, strides, dilation: Tuples, one entry per spatial axis.
        padding: `"valid"`, `"same"` or `"causal"`.

    Returns:
        Tensor `(B, positions, volume * c)`, in the order of a flattened
        kernel `(*kernel_size, c, filters)`.
    """
    spatial = images.shape[1:-1]
    pads, counts = paddings(spatial, kernel_size, strides, dilation, padding)
    padded = keras.ops.pad(images, [(0, 0), *pads, (0, 0)])
    windows = []
    for offset in itertools.product(*(range(k) for k in kernel_size)):
        cut = tuple(
            slice(o * d, o * d + (count - 1) * s + 1, s)
            for o, d, s, count in zip(offset, dilation, strides, counts)
        )
        windows.append(padded[(slice(None), *cut)])
    stacked = keras.ops.stack(windows, axis=-2)
    positions = 1
    for count in counts:
        positions *= count
    width = len(windows) * images.shape[-1]
    return products.reshape(stacked, (-1, positions, width))


def paddings(spatial, kernel_size, strides, dilation, padding):
    """Zeros before and after, and positions of the kernel, for each axis."""
    pads, counts = [], []
    for size, kernel, stride, step in zip(
        spatial, kernel_size, strides, dilation
    ):
        span = (kernel - 1) * step + 1
        if padding == "same":
            count = -(-size // stride)
            total = max((count - 1) * stride + span - size, 0)
            pads.append((total // 2, total - total // 2))
        else:
            pads.append((span - 1, 0) if padding == "causal" else (0, 0))
            count = (size + pads[-1][0] - span) // stride + 1
        counts.append(count)
    return pads, counts
