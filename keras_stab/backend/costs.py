"""What a computation costs: operations, multiply-adds and memory traffic.

Counted from what Python sees of it, without a clock, so that two runs count
the same. `Machine` then says how long each takes here.
"""

import functools
import math
import time
from typing import NamedTuple

import keras
import numpy as np

from keras_stab.backend import tracing
from keras_stab.backend.devices import BACKEND

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "jax":
    import jax
elif BACKEND == "torch":
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry


class Cost(NamedTuple):
    """Of a computation.

    Attributes:
        operations: Dispatched one by one.
        multiply_adds: Of products and convolutions.
        bytes: Read and written by operations.
    """

    operations: float
    multiply_adds: float
    bytes: float

    def seconds(self, machine):
        """Predicted for a `Machine`."""
        return sum(own * each for own, each in zip(self, machine))


class Machine(NamedTuple):
    """Seconds per operation, per multiply-add and per byte."""

    operation: float
    multiply_add: float
    byte: float


# Of a compiled step; PyTorch's are measured. XLA runs through kernels, the
# graph of TensorFlow through operations.
_SECONDS_AN_OPERATION = {"jax": 0.15e-6, "tensorflow": 2e-6}


@functools.cache
def machine():
    """The `Machine` that this process runs on, measured once.

    A product, a sum of large tensors and, where Python dispatches operations,
    a step of a tiny layer: a few milliseconds.
    """
    ops = keras.ops
    matrix = ops.ones((512, 512))
    long = ops.ones((2**20,))
    product = tracing.compiled(lambda a: ops.matmul(a, a))
    added = tracing.compiled(lambda a: a + 1.0)
    return Machine(
        _SECONDS_AN_OPERATION.get(BACKEND) or _dispatch(),
        _quickest(product, matrix) / 512**3,
        _quickest(added, long) / (8 * 2**20),
    )


def _dispatch():
    """Seconds of an operation that Python dispatches, inside of a layer."""
    layer = keras.layers.Dense(1)
    layer.build((1, 1))
    weights = [v.value for v in layer.trainable_variables]

    def step(x):
        with torch.enable_grad():
            return torch.autograd.grad(layer(x).sum(), weights)

    x = torch.ones((1, 1), device=weights[0].device)
    return _quickest(step, x, 20) / cost_of(step, x).operations


def _quickest(function, argument, times=5):
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        np.asarray(keras.ops.convert_to_numpy(function(argument)[0]).flat[0])
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def cost_of(function, inputs):
    """The `Cost` of `function(inputs)`, which assigns nothing."""
    if BACKEND == "torch":
        with _Counter() as counter:
            function(inputs)
        return Cost(counter.operations, counter.multiply_adds, counter.bytes)
    if BACKEND == "jax":
        return _of_equations(jax.make_jaxpr(function)(inputs).jaxpr)
    traced = tf.function(function, autograph=False)
    return _of_graph(traced.get_concrete_function(inputs).graph)


if BACKEND == "torch":

    class _Counter(TorchDispatchMode):
        """Counts what is dispatched inside of it."""

        def __init__(self):
            super().__init__()
            self.operations = self.multiply_adds = self.bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            answer = function(*args, **(kwargs or {}))
            self.operations += 1
            packet = function.overloadpacket
            if packet is torch.ops.aten.convolution_backward:
                # Which the registry counts once for every group of channels.
                self.multiply_adds += _of_convolution(*args)
            elif packet in flop_registry:
                flops = flop_registry[packet](
                    *args, **(kwargs or {}), out_val=answer
                )
                self.multiply_adds += flops // 2
            if not function.is_view:
                for leaf in keras.tree.flatten([args, answer]):
                    if torch.is_tensor(leaf):
                        self.bytes += leaf.numel() * leaf.element_size()
            return answer

    def _of_convolution(gradient, inputs, kernel, *options):
        transposed, wanted = options[4], options[-1]
        steps = inputs if transposed else gradient
        each = steps.numel() * math.prod(kernel.shape[1:])
        return sum(wanted[:2]) * each


# Elementwise operations are joined with what they feed on.
_READ_AND_WRITTEN = ("dot_general", "conv_general_dilated", "sort")
_REDUCED = ("reduce", "argmax", "cumsum", "gather", "scatter", "select_and")


def _of_equations(jaxpr):
    total = Cost(0, 0, 0)
    live = {v for v in jaxpr.outvars if not hasattr(v, "val")}
    for equation in reversed(jaxpr.eqns):
        if live.isdisjoint(equation.outvars):
            continue  # the compiler drops it
        live.update(v for v in equation.invars if not hasattr(v, "val"))
        name, parameters = equation.primitive.name, equation.params
        inner = [
            getattr(value, "jaxpr", value)
            for value in parameters.values()
            if hasattr(getattr(value, "jaxpr", value), "eqns")
        ]
        if inner:
            times = parameters.get("length", 1) if name == "scan" else 1
            for one in map(_of_equations, inner):
                total = Cost(*(a + times * b for a, b in zip(total, one)))
            continue
        sizes = [
            math.prod(v.aval.shape)
            for v in [*equation.invars, *equation.outvars]
        ]
        operations = multiply_adds = moved = 0
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            multiply_adds = sizes[-1] * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            numbers = parameters["dimension_numbers"]
            kernel = equation.invars[1].aval.shape
            outputs = kernel[numbers.rhs_spec[0]]
            multiply_adds = sizes[-1] * sizes[1] // outputs
        if name in _READ_AND_WRITTEN or name.startswith(_REDUCED):
            moved = 4 * sum(sizes)
            operations = 1
        total = Cost(
            total.operations + operations,
            total.multiply_adds + multiply_adds,
            total.bytes + moved,
        )
    return total


# Operations that take as long as to enter a function compiled by itself.
_KERNEL = 100
_NOT_RUN = ("Const", "Placeholder", "NoOp", "Identity", "ReadVariableOp")
_NOT_MOVED = (
    "Reshape",
    "Shape",
    "ExpandDims",
    "Squeeze",
    "StopGradient",
    "StridedSlice",
)
_CONVOLUTIONS = {
    "Conv2D": ("output", 1),
    "DepthwiseConv2dNative": ("output", 1),
    "Conv2DBackpropInput": (2, 1),
    "DepthwiseConv2dNativeBackpropInput": (2, 1),
    "Conv2DBackpropFilter": (2, "output"),
    "DepthwiseConv2dNativeBackpropFilter": (2, "output"),
}


def _of_graph(graph):
    operations = multiply_adds = moved = 0
    for each in _run(graph):
        operations += _KERNEL if "PartitionedCall" in each.type else 1
        if not each.outputs:
            continue
        result = _size(each.outputs[0])
        if each.type in ("MatMul", "BatchMatMulV2"):
            turned = each.get_attr(
                "transpose_a" if each.type == "MatMul" else "adj_x"
            )
            shape = each.inputs[0].shape
            multiply_adds += result * (shape[-2 if turned else -1] or 1)
        elif each.type in _CONVOLUTIONS:
            along, kernel = _CONVOLUTIONS[each.type]
            if kernel == "output":
                kernel = each.outputs[0].shape
            else:
                kernel = each.inputs[kernel].shape
                if kernel.rank == 1:  # its shape alone is given
                    kernel = each.inputs[1].shape
            steps = result if along == "output" else _size(each.inputs[along])
            kernel = kernel[:2] if "Depthwise" in each.type else kernel[:3]
            multiply_adds += steps * math.prod(kernel)
        if each.type not in _NOT_MOVED:
            moved += 4 * (result + sum(_size(t) for t in each.inputs))
    return Cost(operations, multiply_adds, moved)


def _run(graph):
    """The operations that the outputs of a graph depend on."""
    waiting = [tensor.op for tensor in graph.outputs]
    needed = {}
    while waiting:
        each = waiting.pop()
        if each.name not in needed:
            needed[each.name] = each
            waiting += [t.op for t in each.inputs] + each.control_inputs
    return [e for e in needed.values() if e.type not in _NOT_RUN]


def _size(tensor):
    if tensor.shape.rank is None:
        return 1
    return math.prod(n or 1 for n in tensor.shape)
