"""The perturbation of sharpness-aware methods."""

import keras

from keras_stab.numerics.norms import in_full_precision
from keras_stab.numerics.vectors import inner


def global_norm(tensors):
    """The Euclidean norm of all tensors together, in full precision."""
    tensors = [in_full_precision(t) for t in tensors]
    return keras.ops.sqrt(inner(tensors, tensors))


def ascent(gradients, scales, radius, norm=global_norm):
    """The perturbation `radius T^2 g / |T g|`, zero where the gradient is.

    Args:
        gradients: List of tensors, g.
        scales: List of tensors or floats, T, one per gradient; `None` for 1.
        radius: Scalar, the norm of the perturbations divided by T.
        norm: As `global_norm`.

    Returns:
        The direction, a list of tensors in full precision, and the factor that
        makes the perturbation of it; the norms of the gradients and of the
        perturbation.
    """
    direction = [in_full_precision(g) for g in gradients]
    length = reach = norm_of_gradients = norm(direction)
    if scales is not None:
        scaled = [t * g for t, g in zip(scales, direction)]
        length = norm(scaled)
        direction = [t * s for t, s in zip(scales, scaled)]
        reach = norm(direction)
    if not isinstance(radius, float):
        radius = keras.ops.cast(radius, length.dtype)
    factor = radius / (length + 1e-12)
    return direction, factor, (norm_of_gradients, factor * reach)


def cosine(product, norms):
    """The cosine of two vectors, 0 where one of them is zero.

    Args:
        product: Their inner product.
        norms: The product of their norms.
    """
    safe = keras.ops.where(norms > 0, norms, keras.ops.ones_like(norms))
    return product / safe
