"""Vectors that are lists of tensors."""

import keras

from keras_stab.numerics.norms import common_dtype


def inner(left, right):
    """The inner product of two lists of tensors in full precision, a scalar."""
    # By sums: dot products of long float32 vectors round after each element
    # on some backends, and lose 10 % at 20 million elements.
    dtype = common_dtype(left)
    return sum(
        keras.ops.cast(keras.ops.sum(a * b), dtype) for a, b in zip(left, right)
    )


class Vectors:
    """Arithmetic of such vectors, compiled where that helps.

    Args:
        compiled: Function that compiles a function of lists of tensors, or
            leaves it as it is.
    """

    def __init__(self, compiled=lambda function: function):
        self._inner = compiled(inner)
        self._plus = compiled(_plus)
        self._scaled = compiled(_scaled)
        self._times = compiled(_times)
        self._without = compiled(_without)
        self._three_terms = compiled(_three_terms)

    def inner(self, left, right):
        """The inner product, a float."""
        return float(keras.ops.convert_to_numpy(self._inner(left, right)))

    def norm(self, vector):
        """The Euclidean norm, a float."""
        return self.inner(vector, vector) ** 0.5

    def plus(self, left, factor, right):
        """`left + factor * right` for a float."""
        return self._plus(left, _as_tensor(factor, right), right)

    def scaled(self, factor, vector):
        """`factor * vector` for a float."""
        return self._scaled(_as_tensor(factor, vector), vector)

    def without(self, vector, other):
        """The vector less its part along the unit vector `other`."""
        return self._without(vector, other)

    def three_terms(self, following, beta, before, vector):
        """One step of Lanczos, with one read.

        Returns:
            The part of `following - beta * before` that is orthogonal to the
            unit vector `vector`, its inner product with that, and its norm.
        """
        rest, figures = self._three_terms(
            following, _as_tensor(beta, following), before, vector
        )
        along, square = keras.ops.convert_to_numpy(figures).tolist()
        return rest, along, square**0.5

    def times(self, left, right):
        """The product of the elements."""
        return self._times(left, right)


def _as_tensor(factor, vector):
    # A compiled function would be traced again for each value of a float.
    return keras.ops.convert_to_tensor(factor, vector[0].dtype)


def _plus(left, factor, right):
    return [a + factor * b for a, b in zip(left, right)]


def _scaled(factor, vector):
    return [factor * a for a in vector]


def _times(left, right):
    return [a * b for a, b in zip(left, right)]


def _without(vector, other):
    return _plus(vector, -inner(vector, other), other)


def _three_terms(following, beta, before, vector):
    following = _plus(following, -beta, before)
    along = inner(following, vector)
    rest = _plus(following, -along, vector)
    return rest, keras.ops.stack([along, inner(rest, rest)])
