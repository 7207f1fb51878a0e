"""Products of matrices and groups, in the precision that each needs."""

import math

import keras
import numpy as np

from keras_stab.backend import tracing
from keras_stab.backend.devices import BACKEND
from keras_stab.numerics.norms import common_dtype
from keras_stab.numerics.norms import in_full_precision

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "jax":
    import jax
    import jax.numpy as jnp
elif BACKEND == "torch":
    import torch


def pack_groups(groups):
    """Stacks K lists of gradients into the form that products want.

    One stack `[K, *shape]` per variable, which keeps a variable's sharding; on
    PyTorch, where every operation is a launch, one matrix `[K, P]`.
    """
    if BACKEND != "torch":
        stacks = zip(*groups)
        return [in_full_precision(keras.ops.stack(list(s))) for s in stacks]
    if not groups[0]:
        return []
    flat = [torch.cat([g.reshape(-1) for g in group]) for group in groups]
    return [in_full_precision(torch.stack(flat))]


def unpack_group(combined, shapes):
    """One list of gradients, from one combination of a packed form."""
    if BACKEND != "torch" or not combined:
        return combined
    sizes = [math.prod(shape) for shape in shapes]
    pieces = torch.split(combined[0], sizes)
    return [p.reshape(tuple(s)) for p, s in zip(pieces, shapes)]


def unpack_groups(packed, shapes):
    """One stack `[K, *shape]` per variable, from the packed form."""
    if BACKEND != "torch" or not packed:
        return packed
    sizes = [math.prod(shape) for shape in shapes]
    pieces = torch.split(packed[0], sizes, dim=1)
    return [p.reshape(len(p), *shape) for p, shape in zip(pieces, shapes)]


def inner_products(stack, other=None):
    """All inner products of the slices of `[K, *shape]`, in full precision.

    With `other`, of shape `[*shape]`, its inner product with each slice.
    Accelerators otherwise use TF32 or bfloat16 in float32 products.
    """
    with_self = other is None
    if BACKEND == "jax" and keras.distribution.distribution() is not None:
        # Flattening would gather a sharded variable on every device.
        axes = list(range(1, stack.ndim))
        own = axes if with_self else list(range(stack.ndim - 1))
        return jnp.tensordot(
            stack,
            stack if with_self else other,
            axes=(axes, own),
            precision=jax.lax.Precision.HIGHEST,
        )
    groups = stack.shape[0]
    matrix = reshape(stack, (groups, -1))
    right = matrix if with_self else reshape(other, (1, -1))
    if BACKEND == "jax":
        highest = jax.lax.Precision.HIGHEST
        products = jnp.matmul(matrix, right.T, precision=highest)
    elif BACKEND == "tensorflow":
        if _uses_tensor_float_32():
            rows = [
                tf.reduce_sum(matrix * right[i], axis=1)
                for i in range(right.shape[0])
            ]
            products = tf.stack(rows, axis=1)
        else:
            products = tf.matmul(matrix, right, transpose_b=True)
    else:
        with highest_precision():
            products = matrix @ right.T
    return products if with_self else products[:, 0]


def exact_products(left, right):
    """`left right'` of matrices of rows, in full precision.

    Accelerators otherwise use TF32 or bfloat16 in float32 products.
    """
    left, right = _alike(left, right)
    if BACKEND == "jax":
        highest = jax.lax.Precision.HIGHEST
        if left.ndim == 3 and left.shape[0] == 1:  # up to three times as fast
            return jnp.matmul(left[0], right[0].T, precision=highest)[None]
        right = jnp.swapaxes(right, -1, -2)
        return jnp.matmul(left, right, precision=highest)
    if BACKEND == "tensorflow":
        dtype = left.dtype
        if _uses_tensor_float_32():
            left, right = tf.cast(left, "float64"), tf.cast(right, "float64")
        return tf.cast(tf.matmul(left, right, transpose_b=True), dtype)
    with highest_precision():
        if left.dim() == 3 and left.shape[0] == 1:  # faster than a batch
            return (left[0] @ right[0].mT)[None]
        return left @ right.mT


def _alike(left, right):
    """Both in full precision, in the wider one of their dtypes."""
    left, right = in_full_precision(left), in_full_precision(right)
    if left.dtype != right.dtype:
        dtype = common_dtype([left, right])
        left, right = (keras.ops.cast(t, dtype) for t in (left, right))
    return left, right


def weight_product(left, right):
    """`left' right`, a weight gradient: rounded like ordinary ones.

    In the precision of its factors; returned in full precision.
    """
    if left.dtype != right.dtype:
        left, right = _alike(left, right)
    if BACKEND == "jax":
        # Summed in full precision too.
        dtype = "float64" if left.dtype == "float64" else "float32"
        if left.ndim == 3 and left.shape[0] == 1:  # faster than a batch
            left, right = left[0].T, right[0]
            return jnp.matmul(left, right, preferred_element_type=dtype)[None]
        left = jnp.swapaxes(left, -1, -2)
        return jnp.matmul(left, right, preferred_element_type=dtype)
    if BACKEND == "tensorflow":
        product = tf.matmul(left, right, transpose_a=True)
    elif left.dim() == 3 and left.shape[0] == 1:
        product = (left[0].mT @ right[0])[None]
    else:
        product = left.mT @ right
    return in_full_precision(product)


def product_of_all_groups(left, right):
    """The sum of `left_k' right_k` over K groups, of factors `(H, K, n, d)`.

    Without laying all tokens side by side, which on JAX would gather those
    of other devices.
    """
    dtype = "float64" if left.dtype == "float64" else "float32"
    return jnp.einsum(
        "hknd,hknp->hdp", left, right, preferred_element_type=dtype
    )


def total(matrices):
    """The sum of matrices in full precision, in the widest of their dtypes."""
    if BACKEND != "torch":  # which does so by itself
        dtype = common_dtype(matrices)
        matrices = [keras.ops.cast(m, dtype) for m in matrices]
    return sum(matrices[1:], matrices[0])


class highest_precision:
    """Full float32 in matrix products of PyTorch, where it is not so anyway.

    A class, since a generator takes as long as a small product.
    """

    def __enter__(self):
        self._before = torch.get_float32_matmul_precision()
        if self._before != "highest":
            torch.set_float32_matmul_precision("highest")

    def __exit__(self, *_):
        if self._before != "highest":
            torch.set_float32_matmul_precision(self._before)


def _uses_tensor_float_32():
    return tf.config.experimental.tensor_float_32_execution_enabled() and (
        bool(tf.config.list_physical_devices("GPU"))
    )


def on_small_matrix(function, *arrays):
    """Runs a K x K computation where it is cheapest.

    JAX: in the compiled step. TensorFlow: compiled by itself, since dozens
    of tiny graph operations cost more than the mathematics. PyTorch: NumPy
    on the host, the one read of a step (K x K floats).

    Args:
        function: From arrays to a tuple of arrays.
        arrays: The matrix, and others. Floats come back in its precision.
    """
    if BACKEND != "torch":
        return tracing.as_kernel(function)(
            *[keras.ops.convert_to_tensor(a) for a in arrays]
        )
    arrays = [
        in_full_precision(a.detach()).cpu().numpy()
        if torch.is_tensor(a)
        else np.asarray(a)
        for a in arrays
    ]
    dtype = "float64" if arrays[0].dtype == np.float64 else "float32"

    def to_tensor(value):
        value = np.asarray(value)
        if value.dtype == np.float64:
            value = value.astype(dtype)
        return torch.from_numpy(value)  # stays on the host: K numbers

    return tuple(to_tensor(value) for value in function(*arrays))


def as_looked_up(ids, rows, size):
    """Which rows of a table a lookup took, and their gradients.

    Negative ids count from the end of the table, as in the lookup. What lies
    beyond the table has no gradient; PyTorch refuses to look it up.

    Args:
        ids: Int32 tensor.
        rows: Tensor of the shape of `ids` and one axis more.
        size: Int, the rows of the table.
    """
    if BACKEND == "torch":
        return ids.remainder(size), rows
    ids = keras.ops.where(ids < 0, ids + size, ids)
    inside = keras.ops.logical_and(ids >= 0, ids < size)
    zero = keras.ops.zeros((), rows.dtype)
    return (
        keras.ops.where(inside, ids, 0),
        keras.ops.where(inside[..., None], rows, zero),
    )


def segment_sum(tensor, ids, count):
    """`keras.ops.segment_sum`, of ids from 0 to `count - 1`."""
    if BACKEND == "torch":
        zeros = tensor.new_zeros((count, *tensor.shape[1:]))
        return zeros.index_add_(0, ids, tensor)
    return keras.ops.segment_sum(tensor, ids, num_segments=count)


# These are `keras.ops` without its checks, which on PyTorch take as long as a
# small operation.


def as_float(size):
    """A float32 scalar of a number of rows."""
    if isinstance(size, int):
        return np.float32(size)
    return keras.ops.cast(size, "float32")


def beside(array, tensor):
    """A tensor of a small array, with the dtype and device of another one."""
    if BACKEND == "torch":
        return torch.as_tensor(array, dtype=tensor.dtype, device=tensor.device)
    return keras.ops.cast(array, tensor.dtype)


def nan_to_num(tensor, nan, infinity):
    """`keras.ops.nan_to_num`; minus infinity becomes what NaN does."""
    if BACKEND == "torch":
        return tensor.nan_to_num(nan, infinity, nan)
    return keras.ops.nan_to_num(tensor, nan, infinity, nan)


def reshape(tensor, shape):
    """`keras.ops.reshape`."""
    if BACKEND == "torch":
        return tensor.reshape(shape)
    return (jnp if BACKEND == "jax" else tf).reshape(tensor, shape)


def sum_over(tensor, axes):
    """`keras.ops.sum`."""
    if BACKEND == "torch":
        return tensor.sum(dim=axes)
    return keras.ops.sum(tensor, axis=axes)


def swapaxes(tensor, first, second):
    """`keras.ops.swapaxes`."""
    if BACKEND == "torch":
        return tensor.transpose(first, second)
    return keras.ops.swapaxes(tensor, first, second)
