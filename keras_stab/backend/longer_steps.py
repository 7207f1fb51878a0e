"""A step that was made, made longer where a mask holds."""

import keras

from keras_stab.backend import look_ahead
from keras_stab.backend import tracing
from keras_stab.backend.devices import BACKEND

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "torch":
    import torch

    _INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def before_step(variables, room=None):
    """The values of the variables, for `lengthen`, which may overwrite them.

    Args:
        variables: List of variables.
        room: A list, which keeps the memory of an earlier call where that is
            used again (see `look_ahead.remember`); `None` for new memory.
    """
    if room is None or BACKEND != "torch" or torch.compiler.is_compiling():
        return [tracing.snapshot(v) for v in variables]
    room[:] = look_ahead.remember(variables, room)
    return room


def lengthen(variables, before, masks, factor, decays):
    """Moves weights `factor` times further than a step did.

    Args:
        variables: The variables, after the step.
        before: What `before_step` returned before it.
        masks: Boolean tensors, where to do so.
        factor: Scalar tensor or float.
        decays: For each variable the fraction of `before` that the step took
            away and that is not to be multiplied, a scalar; `None` for 0.
    """
    if BACKEND == "torch":
        with torch.no_grad():
            _lengthen_in_place(
                [v.value for v in variables], before, masks, factor, decays
            )
        return
    after = [tracing.read(v) for v in variables]
    if BACKEND == "tensorflow":
        values = tracing.in_kernel(
            lambda: _lengthened_by_bits(after, before, masks, factor, decays),
            after,
        )
    else:
        values = _lengthened(after, before, masks, factor, decays)
    for variable, value in zip(variables, values):
        variable.assign(value)


def _lengthened(after, before, masks, factor, decays):
    values = []
    for new, old, mask, decay in zip(after, before, masks, decays):
        extra = new - old
        if decay is not None:
            extra = extra + keras.ops.cast(decay, extra.dtype) * old
        extra = keras.ops.cast(factor, extra.dtype) * extra
        # Neither `old + (1 + factor) * step` nor a product with the mask: the
        # first is not `new` to the last bit, the second lets a NaN in.
        values.append(keras.ops.where(mask, new + extra, new))
    return values


def _lengthened_by_bits(after, before, masks, factor, decays):
    """The same on TensorFlow, where a choice by a mask takes twice as long."""
    values = []
    for new, old, mask, decay in zip(after, before, masks, decays):
        back = old - new
        if decay is not None:
            back = back - keras.ops.cast(decay, back.dtype) * old
        back = keras.ops.cast(factor, back.dtype) * back
        integer = f"int{8 * back.dtype.size}"
        bits = tf.bitcast(back, integer) * tf.cast(mask, integer)
        # Backwards, as below.
        values.append(new - tf.bitcast(bits, back.dtype))
    return values


def _lengthen_in_place(after, before, masks, factor, decays):
    """In a few passes over the weights; overwrites `before`."""
    if torch.is_tensor(factor) and factor.device.type == "cpu":
        factor = factor.item()
    # Of one variable after another, each still in the cache of a CPU.
    spare = before[0].new_empty(max(old.numel() for old in before))
    for new, old, mask, decay in zip(after, before, masks, decays):
        room = None
        if old.dtype == spare.dtype and old.device == spare.device:
            room = spare[: old.numel()].view(old.shape)
        # The step backwards: what is cleared is then subtracted as +0, which
        # changes no bit of a weight, not even of -0.
        part = None if decay is None else torch.mul(old, decay, out=room)
        back = old.sub_(new)
        if part is not None:
            back.sub_(part)
        _clear_outside(back, mask, room)
        if torch.is_tensor(factor):
            new.sub_(back.mul_(factor))
        else:
            new.sub_(back, alpha=factor)


def _clear_outside(tensor, mask, room):
    """Writes 0 where the mask does not hold, whatever stands there.

    Args:
        room: Memory like that of the tensor, to be written over; or `None`.
    """
    if tensor.device.type != "cpu":
        tensor.masked_fill_(~mask, 0.0)
        return
    # Fills and choices by a mask go one by one on a CPU: forty times slower.
    integer = _INTEGERS[tensor.element_size()]
    if room is None:
        room = torch.empty_like(tensor)
    tensor.view(integer).mul_(room.view(integer).copy_(mask))
