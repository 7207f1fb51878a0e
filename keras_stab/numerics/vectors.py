"""Vectors that are lists of tensors."""

import keras


class Vectors:
    """What can be done with such vectors.

    Args:
        compiled: Function that compiles a function of lists of tensors, or
            leaves it as it is.
    """

    def __init__(self, compiled=lambda function: function):
        self._inner = compiled(_inner)
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
            What is left of `following - beta * before` beside the unit vector
            `vector`, its inner product with that, and its norm.
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
    # Compiled functions would be made anew for each value of a float.
    return keras.ops.convert_to_tensor(factor, vector[0].dtype)


def _inner(left, right):
    # By sums: dot products of long float32 vectors round after each element
    # on some backends, and lose 10 % at 20 million elements.
    return sum(keras.ops.sum(a * b) for a, b in zip(left, right))


def _plus(left, factor, right):
    return [a + factor * b for a, b in zip(left, right)]


def _scaled(factor, vector):
    return [factor * a for a in vector]


def _times(left, right):
    return [a * b for a, b in zip(left, right)]


def _without(vector, other):
    return _plus(vector, -_inner(vector, other), other)


def _three_terms(following, beta, before, vector):
    following = _plus(following, -beta, before)
    along = _inner(following, vector)
    rest = _plus(following, -along, vector)
    return rest, keras.ops.stack([along, _inner(rest, rest)])
