"""Eigenvalues and trace of a symmetric matrix that is known by its products.

Vectors are flat tensors; `product(vector)` multiplies by the matrix.
"""

import collections

import keras
import numpy as np

# `error`: no eigenvalue is further away than that from the one given.
Eigenvalue = collections.namedtuple("Eigenvalue", ["value", "error"])
Trace = collections.namedtuple("Trace", ["parts", "samples"])


def inner(left, right):
    """A float. By a sum: float32 dot products of long vectors are rounded
    one after another on some backends, and lose 10 % at 20 million elements.
    """
    return float(keras.ops.convert_to_numpy(keras.ops.sum(left * right)))


def norm(vector):
    """The Euclidean norm, a float."""
    return inner(vector, vector) ** 0.5


def largest_eigenvalue(product, start, most, tolerance, report=None):
    """The algebraically largest eigenvalue, by the method of Lanczos.

    Three vectors are kept. Without another orthogonalisation rounding makes
    copies of eigenvalues that were found, which the largest survives.

    Args:
        product: Function.
        start: Vector, not zero, that has a part along the eigenvector.
        most: Int, products at most.
        tolerance: Float; stops when `error <= tolerance * |value|`.
        report: Function that is given each estimate, or `None`.

    Returns:
        An `Eigenvalue`.
    """
    diagonal, beside = [], []
    vector, before, beta = start * (1.0 / norm(start)), None, 0.0
    for _ in range(most):
        following = product(vector)
        diagonal.append(inner(following, vector))
        following = following - diagonal[-1] * vector
        if before is not None:
            following = following - beta * before
        beta = norm(following)
        values, vectors = np.linalg.eigh(
            np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        )
        scale = max(abs(values[0]), abs(values[-1]))
        found = Eigenvalue(float(values[-1]), beta * abs(vectors[-1, -1]))
        if report is not None:
            report(found)
        if not np.isfinite(scale + beta):
            break
        # The second: everything that the start can reach was seen.
        if found.error <= tolerance * abs(found.value) or beta <= 1e-7 * scale:
            break
        beside.append(beta)
        before, vector = vector, following * (1.0 / beta)
    return found


def trace(product, parts, probe, products):
    """The trace, by Hutch++: a part of the matrix exactly, the rest by lot.

    A third of the products finds the space in which the matrix is large, a
    third gives the trace there, and the last third estimates the trace beside
    it, with an error that is no larger than that of the plain estimate. A
    matrix of a rank below the first third comes out exactly.

    Args:
        product: Function.
        parts: Function `(left, right)`, the inner products of pieces of two
            vectors, a NumPy array: the trace comes in these pieces.
        probe: Function from an int to a vector of random signs.
        products: Int of at least 3, how many may be made.

    Returns:
        A `Trace`: `parts`, an array, and `samples`, the spread of which tells
        the error: arrays of the sums that `parts` is the mean of.
    """
    third = products // 3
    basis = []
    for i in range(third):
        direction = product(probe(i))
        size = norm(direction)
        # Twice: the first time leaves rounding errors behind.
        for _ in range(2):
            direction = _without(direction, basis)
        rest = norm(direction)
        if rest > 1e-5 * size:
            basis.append(direction * (1.0 / rest))
    known = sum(parts(vector, product(vector)) for vector in basis)
    samples = []
    for i in range(third, products - third):
        vector = probe(i)
        for _ in range(2):
            vector = _without(vector, basis)
        samples.append(known + parts(vector, product(vector)))
    return Trace(np.mean(samples, axis=0), [float(s.sum()) for s in samples])


def _without(vector, basis):
    for other in basis:
        vector = vector - inner(vector, other) * other
    return vector
