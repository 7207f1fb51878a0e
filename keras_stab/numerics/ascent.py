"""The perturbation of sharpness-aware methods."""

import keras

from keras_stab.numerics.norms import in_full_precision


def global_norm(tensors):
    """The Euclidean norm of all tensors together, in float32."""
    squares = [
        keras.ops.cast(
            keras.ops.sum(keras.ops.square(in_full_precision(t))), "float32"
        )
        for t in tensors
    ]
    return keras.ops.sqrt(sum(squares[1:], squares[0]))


def ascent(gradients, scales, radius):
    """`radius T^2 g / |T g|`, zero where the gradient is.

    Args:
        gradients: List of tensors, g.
        scales: One tensor or float a gradient, T.
        radius: Scalar.

    Returns:
        The perturbations in float32, and the norm of the gradients.
    """
    gradients = [in_full_precision(g) for g in gradients]
    scaled = [t * g for t, g in zip(scales, gradients)]
    factor = radius / (global_norm(scaled) + 1e-12)
    return [factor * (t * s) for t, s in zip(scales, scaled)]


def cosine(left, right):
    """The cosine between two lists of tensors; 0 where one of them is zero."""
    product = sum(
        keras.ops.sum(in_full_precision(a) * in_full_precision(b))
        for a, b in zip(left, right)
    )
    norms = global_norm(left) * global_norm(right)
    safe = keras.ops.where(norms > 0, norms, keras.ops.ones_like(norms))
    return keras.ops.cast(product, "float32") / safe
