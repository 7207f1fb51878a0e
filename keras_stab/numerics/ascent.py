"""The perturbation of sharpness-aware methods."""

import keras

from keras_stab.numerics.norms import in_full_precision
from keras_stab.numerics.vectors import inner


def global_norm(tensors):
    """The Euclidean norm of all tensors together, in full precision."""
    tensors = [in_full_precision(t) for t in tensors]
    return keras.ops.sqrt(inner(tensors, tensors))


def ascent(gradients, scales, radius):
    """`radius T^2 g / |T g|`, zero where the gradient is.

    Args:
        gradients: List of tensors, g.
        scales: List of tensors or floats, T, one per gradient.
        radius: Scalar, the norm of the perturbations divided by T.

    Returns:
        List of tensors, the perturbations, in full precision.
    """
    gradients = [in_full_precision(g) for g in gradients]
    scaled = [t * g for t, g in zip(scales, gradients)]
    factor = length_factor(radius, global_norm(scaled))
    return [
        keras.ops.cast(factor, s.dtype) * (t * s)
        for t, s in zip(scales, scaled)
    ]


def length_factor(radius, norm):
    """What gives a vector of some norm the length `radius`; none if it is 0."""
    if not isinstance(radius, float):
        radius = keras.ops.cast(radius, norm.dtype)
    return radius / (norm + 1e-12)


def cosine(left, right):
    """The cosine between two lists of tensors; 0 where one of them is zero."""
    left, right = (
        [in_full_precision(t) for t in part] for part in (left, right)
    )
    return cosine_from(
        inner(left, right), global_norm(left) * global_norm(right)
    )


def cosine_from(product, norms):
    """The same, from the inner product and the product of the norms."""
    safe = keras.ops.where(norms > 0, norms, keras.ops.ones_like(norms))
    return product / safe
