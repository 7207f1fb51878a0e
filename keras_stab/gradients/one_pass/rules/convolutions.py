"""Convolutions of one to three dimensions."""

import dataclasses
import functools
import math

import keras

from keras_stab.backend import convolutions
from keras_stab.backend import devices
from keras_stab.backend import jacobians
from keras_stab.backend import products
from keras_stab.gradients.one_pass.contributions import Product
from keras_stab.gradients.one_pass.contributions import Stored
from keras_stab.gradients.one_pass.layer_rules import register_layer_rule
from keras_stab.gradients.one_pass.rules.patches import paddings
from keras_stab.gradients.one_pass.rules.patches import unfold
from keras_stab.gradients.one_pass.rules.sums import bias_gradients
from keras_stab.gradients.one_pass.rules.sums import is_added_along_its_axis
from keras_stab.gradients.one_pass.work import matrix_work


def _convolution_rule(layer, call):
    """A product with the windows as inputs, where that is cheaper."""
    if layer.lora_enabled:
        return []
    inputs, gradient = call.args[0], call.gradient
    answer = []
    last = layer.data_format == "channels_last"
    images = gradient if last else keras.ops.moveaxis(gradient, 1, -1)
    if layer.use_bias:
        shape = layer.bias.shape + (() if last else (1,) * layer.rank)
        if not is_added_along_its_axis(shape, gradient.shape):
            return []
        answer.append(
            (layer.bias, bias_gradients(layer.bias, call.grouped(images)))
        )
    positions = math.prod(images.shape[1:-1])
    *size, channels, filters = (int(n) for n in layer.kernel.shape)
    volume = math.prod(size)
    work = matrix_work(
        call.tokens(positions),
        volume * channels,
        filters,
        1,
        call.groups,
    )
    # The windows of a 1x1 kernel are its inputs: one product of matrices for
    # all groups. PyTorch's own gradient, for strides and fewer than 8 channels,
    # writes past its memory on processors with AVX2 alone (oneDNN 3.12).
    if layer.groups > 1 or (work.choice == "store" and volume > 1):
        work = dataclasses.replace(work, choice="store")
        stack = _convolution_gradients(layer, call)
        answer.append((layer.kernel, Stored(stack, work.tokens, work)))
        return answer
    windows = unfold(
        inputs if last else keras.ops.moveaxis(inputs, 1, -1),
        layer.kernel_size,
        layer.strides,
        layer.dilation_rate,
        layer.padding,
    )
    images = products.reshape(images, (-1, positions, filters))
    factors = [
        products.reshape(call.grouped(t), (1, call.groups, -1, t.shape[-1]))
        for t in (windows, images)
    ]
    fold = _fold_kernel(tuple(layer.kernel.shape))
    answer.append((layer.kernel, Product(*factors, fold, work.tokens)))
    return answer


# Cached: contributions of several calls of a layer share the function.
@functools.cache
def _fold_kernel(shape):
    return lambda heads: products.reshape(heads, (heads.shape[0],) + shape)


def _convolution_gradients(layer, call):
    lone = devices.EAGER and layer.filters == 1
    # Compiled steps drop the convolution below, whose outputs nothing uses.
    if devices.EAGER and not lone:
        found = _without_outputs(layer, call)
        if found is not None:
            return found
    kernel = keras.ops.cast(call.value(layer.kernel), call.gradient.dtype)
    # PyTorch cannot differentiate a kernel of one filter for a single row, nor
    # in double precision: it gets a second one, which reaches nothing.
    axis = -1 if layer.data_format == "channels_last" else 1
    gradients = []
    for k in range(call.groups):
        (inputs, *_), _, (cotangent,) = call.group(k)

        def convolve(values, inputs=inputs):
            (kernel,) = values
            if not lone:
                return [_convolve(layer, inputs, kernel)]
            twice = keras.ops.concatenate([kernel, kernel], axis=-1)
            outputs = _convolve(layer, inputs, twice)
            return [keras.ops.split(outputs, 2, axis=axis)[0]]

        gradients += jacobians.vector_jacobian(convolve, [kernel], [cotangent])
    return keras.ops.stack(gradients)


def _without_outputs(layer, call):
    """The gradients by themselves, where the backend can; or `None`."""
    inputs, gradient = call.grouped(call.args[0]), call.grouped(call.gradient)
    if layer.data_format != "channels_last":
        inputs = keras.ops.moveaxis(inputs, 2, -1)
        gradient = keras.ops.moveaxis(gradient, 2, -1)
    pads, _ = paddings(
        inputs.shape[2:-1],
        layer.kernel_size,
        layer.strides,
        layer.dilation_rate,
        layer.padding,
    )
    return convolutions.kernel_gradients(
        inputs,
        gradient,
        tuple(layer.kernel.shape),
        layer.strides,
        pads,
        layer.dilation_rate,
        layer.groups,
    )


def _convolve(layer, inputs, kernel):
    padding = layer.padding
    if padding == "causal":
        missing = (layer.kernel_size[0] - 1) * layer.dilation_rate[0]
        time = [missing, 0]
        last = layer.data_format == "channels_last"
        pads = [time, [0, 0]] if last else [[0, 0], time]
        inputs, padding = keras.ops.pad(inputs, [[0, 0], *pads]), "valid"
    return keras.ops.conv(
        inputs,
        kernel,
        strides=list(layer.strides),
        padding=padding,
        data_format=layer.data_format,
        dilation_rate=layer.dilation_rate,
    )


for _type in (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D):
    register_layer_rule(_type, before_activation=True)(_convolution_rule)
