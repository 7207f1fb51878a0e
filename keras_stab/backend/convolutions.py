"""Gradients of the kernels of convolutions, group by group."""

from keras_stab.backend.devices import BACKEND

if BACKEND == "torch":
    import torch


def kernel_gradients(inputs, gradient, shape, strides, pads, dilation, groups):
    """The K gradients of a kernel, without running the convolution again.

    On PyTorch, in single precision; `None` elsewhere.

    Args:
        inputs, gradient: Tensors `(K, n, *spatial, c)`: inputs, and gradients
            for the outputs.
        shape: That of the kernel, `(*size, c, filters)`.
        strides, dilation: Tuples, one entry per spatial axis.
        pads: Pairs of zeros before and after, one pair per spatial axis.
        groups: Groups of channels.
    """
    if BACKEND != "torch" or inputs.dtype != torch.float32:
        return None
    if gradient.dtype != inputs.dtype:
        return None
    *size, channels, filters = shape
    padding = [before for before, _ in pads]
    if any(before != after for before, after in pads):
        flat = [n for pair in reversed(pads) for n in pair]
        inputs = torch.nn.functional.pad(inputs, [0, 0, *flat])
        padding = [0] * len(pads)
    inputs, gradient = inputs.movedim(-1, 2), gradient.movedim(-1, 2)
    # Only its shape matters.
    kernel = inputs.new_empty((filters, channels, *size))
    found = [
        torch.ops.aten.convolution_backward(
            own,
            rows,
            kernel,
            None,
            list(strides),
            padding,
            list(dilation),
            False,
            [0] * len(pads),
            groups,
            [False, True, False],
        )[1]
        for own, rows in zip(gradient, inputs)
    ]
    return torch.stack(found).movedim((1, 2), (-1, -2))
