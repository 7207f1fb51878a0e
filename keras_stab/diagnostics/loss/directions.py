"""Directions in weight space, along which the loss is looked at."""

import keras
import numpy as np


def filter_normalised(variables, values, random):
    """A random direction in which each filter has the norm of its weights.

    A filter is a slice along the last axis, which in dense and convolutional
    layers leads to one output; in an embedding it is a row. Biases and scales
    (one dimension) stay where they are.

    Args:
        variables: The weights.
        values: Their values, NumPy arrays.
        random: NumPy generator.

    Returns:
        List of NumPy arrays.
    """
    direction = []
    for variable, value in zip(variables, values):
        if value.ndim <= 1:
            direction.append(np.zeros_like(value))
            continue
        noise = random.normal(size=value.shape)
        by_row = variable.name == "embeddings"
        axes = tuple(range(1, value.ndim) if by_row else range(value.ndim - 1))
        size = _norms(value, axes) / _norms(noise, axes)
        direction.append((noise * size).astype(value.dtype))
    return direction


def _norms(array, axes):
    squares = np.square(array.astype("float64"))
    return np.sqrt(squares.sum(axis=axes, keepdims=True))


def checked_direction(variables, direction):
    """The direction as NumPy arrays, if it fits the variables."""
    arrays = [keras.ops.convert_to_numpy(part) for part in direction]
    shapes = [a.shape for a in arrays]
    wanted = [tuple(v.shape) for v in variables]
    if shapes != wanted:
        raise ValueError(
            "A direction must have one array per trainable variable, of the "
            f"variable's shape. Received: shapes {shapes}, expected {wanted}"
        )
    return arrays


def weights_of(model, other):
    """The weights of another solution as NumPy arrays, by `id` of variables.

    Args:
        model: The model whose variables are meant.
        other: A model like it, or what its `get_weights` returns.
    """
    if isinstance(other, keras.Model):
        other = other.get_weights()
    shapes = [tuple(np.shape(w)) for w in other]
    wanted = [tuple(v.shape) for v in model.weights]
    if shapes != wanted:
        raise ValueError(
            "`to` must be a model like this one, or its `get_weights()`. "
            f"Received: weights of shapes {shapes}, expected {wanted}"
        )
    return {id(v): np.asarray(w) for v, w in zip(model.weights, other)}
