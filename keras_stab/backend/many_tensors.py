"""One operation for each of many tensors.

Lists in, lists out. On PyTorch one call serves all tensors; elsewhere the
step is compiled and a call per tensor costs nothing.
"""

import math

import keras
import numpy as np

from keras_stab.backend import tracing
from keras_stab.backend.devices import BACKEND
from keras_stab.numerics.ascent import global_norm
from keras_stab.numerics.norms import common_dtype
from keras_stab.numerics.norms import in_full_precision
from keras_stab.numerics.vectors import inner

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "torch":
    import torch


def each_value(variables):
    """Tensors of variables or tensors, in full precision."""
    if BACKEND == "torch":
        values = [
            v.value if isinstance(v, keras.Variable) else v for v in variables
        ]
        half = (torch.float16, torch.bfloat16)
        return [v.float() if v.dtype in half else v for v in values]
    return [
        in_full_precision(keras.ops.convert_to_tensor(tracing.densify(v)))
        for v in variables
    ]


def each_sum(tensors, others, factor=1.0):
    """`tensor + factor * other`; the factor is a float or scalar tensor."""
    if BACKEND == "torch":
        if torch.is_tensor(factor):
            if factor.device.type != "cpu":
                others = torch._foreach_mul(others, factor)
            factor = 1.0 if factor.device.type != "cpu" else factor.item()
        return torch._foreach_add(tensors, others, alpha=factor)
    if isinstance(factor, float):
        return [t + factor * other for t, other in zip(tensors, others)]
    return [
        t + keras.ops.cast(factor, t.dtype) * other
        for t, other in zip(tensors, others)
    ]


def assign_sum(optimizer, variables, tensors, others, factor):
    """`assign_each` of `each_sum`, without a copy where that can be.

    The tensors may be the values of the variables themselves.
    """
    in_place = BACKEND == "torch" and all(
        v.value.dtype == t.dtype == other.dtype and t.device.type == "cpu"
        for v, t, other in zip(variables, tensors, others)
    )
    if not in_place:
        sums = each_sum(tensors, others, factor)
        assign_each(optimizer, variables, sums)
        return
    factor = float(factor)
    with torch.no_grad():
        for variable, tensor, other in zip(variables, tensors, others):
            torch.add(tensor, other, alpha=factor, out=variable.value)


def each_product(tensors, factors):
    """`factor * tensor`.

    Args:
        factors: A number or scalar tensor for all of them, a vector with one
            for each, or a list of tensors of their shapes.
    """
    is_vector = len(getattr(factors, "shape", ())) > 0
    if BACKEND == "torch":
        return torch._foreach_mul(
            tensors, factors.unbind() if is_vector else factors
        )
    if is_vector:
        factors = keras.ops.unstack(factors, num=len(tensors))
    elif not isinstance(factors, list):
        factors = [factors] * len(tensors)
    return [
        t * (f if isinstance(f, float) else keras.ops.cast(f, t.dtype))
        for t, f in zip(tensors, factors)
    ]


def each_between(tensors, others, weight):
    """`tensor + weight * (other - tensor)`; the weight is a float."""
    if BACKEND == "torch":
        return torch._foreach_lerp(tensors, others, weight)
    if BACKEND == "tensorflow" and are_large(tensors):
        # One pass instead of three; what is small is not worth compiling.
        return tracing.as_kernel(_between)(tensors, others, weight)
    return _between(tensors, others, weight)


def _between(tensors, others, weight):
    return [t + weight * (other - t) for t, other in zip(tensors, others)]


LARGE = 2**20


def are_large(tensors):
    """Whether passing over the tensors takes longer than a kernel launch."""
    return sum(math.prod(t.shape) for t in tensors) >= LARGE


def each_quotient(tensors, others, epsilon):
    """`tensor / (sqrt(other) + epsilon)`."""
    if BACKEND == "torch":
        roots = torch._foreach_sqrt(others)
        torch._foreach_add_(roots, epsilon)
        return torch._foreach_div(tensors, roots)
    return [
        t / (keras.ops.sqrt(other) + epsilon)
        for t, other in zip(tensors, others)
    ]


def each_norm(tensors):
    """Euclidean norms, a vector; of tensors in full precision."""
    dtype = common_dtype(tensors)
    if BACKEND == "torch":
        norms = torch._foreach_norm(tensors)
        return torch.stack([n.to(getattr(torch, dtype)) for n in norms])
    norms = [keras.ops.sqrt(sum_of_squares(t)) for t in tensors]
    return keras.ops.stack([keras.ops.cast(n, dtype) for n in norms])


def total_norm(tensors):
    """The Euclidean norm of all together; of tensors in full precision."""
    if BACKEND == "torch":
        return torch.linalg.vector_norm(each_norm(tensors))
    if BACKEND == "jax":
        return tracing.apart(global_norm)(tensors)
    dtype = common_dtype(tensors)
    squares = [keras.ops.cast(sum_of_squares(t), dtype) for t in tensors]
    return keras.ops.sqrt(sum(squares))


def shifted(tensors, shifts, factor=None):
    """`tensor + factor * shift`, in the dtype of the tensor.

    Args:
        shifts: List of tensors; `None` keeps a tensor as it is.
        factor: Scalar tensor or float; `None` for 1.
    """
    present = [i for i, s in enumerate(shifts) if s is not None]
    result = list(tensors)
    at_once = BACKEND == "torch" and all(
        tensors[i].dtype == shifts[i].dtype
        and tensors[i].dtype in (torch.float32, torch.float64)
        for i in present
    )
    if at_once and present:
        moved = each_sum(
            [tensors[i].detach() for i in present],
            [shifts[i] for i in present],
            1.0 if factor is None else factor,
        )
        for i, tensor in zip(present, moved):
            result[i] = tensor
        return result
    for i in present:
        shift = shifts[i]
        if factor is not None:
            shift = keras.ops.cast(factor, shift.dtype) * shift
        result[i] = tensors[i] + keras.ops.cast(shift, tensors[i].dtype)
    return result


def sum_of_squares(tensor):
    if BACKEND == "tensorflow" and not tracing.traces_kernel():
        return 2.0 * tf.nn.l2_loss(tensor)  # in one pass
    return tracing.apart(_sum_of_squares)(tensor)


def _sum_of_squares(tensor):
    squares = keras.ops.square(tensor)
    if len(tensor.shape) > 1:
        # Columns are quicker; without `relu` XLA would make it one sum again.
        squares = keras.ops.relu(keras.ops.sum(squares, axis=0))
    return keras.ops.sum(squares)


def inner_product(tensors, others):
    """The inner product of two lists of tensors, in full precision."""
    if BACKEND != "torch":
        return tracing.apart(inner)(tensors, others)
    dtype = getattr(torch, common_dtype(tensors))
    parts = torch._foreach_mul(tensors, others)
    return torch.stack([p.sum().to(dtype) for p in parts]).sum()


def assign_each(optimizer, variables, values):
    """Assigns as Keras's own optimizers do, in the dtype of the variable."""
    if BACKEND == "torch":
        pairs = [(v.value, new) for v, new in zip(variables, values)]
        pairs = [(old, new) for old, new in pairs if new is not old]
        if pairs:
            with torch.no_grad():
                torch._foreach_copy_(*zip(*pairs))
        return
    for variable, value in zip(variables, values):
        optimizer.assign(variable, keras.ops.cast(value, variable.dtype))


def pack_vector(tensors):
    """One vector of several tensors, in the form in which products are fast.

    On PyTorch, where every operation is a launch, one flat tensor; elsewhere
    the tensors as they are.
    """
    if BACKEND != "torch":
        return list(tensors)
    return [torch.cat([t.reshape(-1) for t in tensors])]


def unpack_vector(vector, shapes):
    """Undoes `pack_vector`."""
    if BACKEND != "torch":
        return vector
    pieces = torch.split(vector[0], [int(np.prod(s)) for s in shapes])
    return [p.reshape(s) for p, s in zip(pieces, shapes)]
