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
    spans = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation)]
    before, after, counts = [], [], []
    for size, span, stride in zip(spatial, spans, strides):
        if padding == "same":
            count = -(-size // stride)
            total = max((count - 1) * stride + span - size, 0)
            pads = (total // 2, total - total // 2)
        else:
            pads = (span - 1, 0) if padding == "causal" else (0, 0)
            count = (size + pads[0] - span) // stride + 1
        before.append(pads[0])
        after.append(pads[1])
        counts.append(count)
    padded = keras.ops.pad(images, [(0, 0), *zip(before, after), (0, 0)])
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
