"""Eigenvalues and trace of a symmetric matrix, from products with vectors.

`product(vector)` multiplies by the matrix; `vectors` is a `Vectors`.
"""

import collections

import numpy as np

# `error`: there is an eigenvalue within this distance.
Eigenvalue = collections.namedtuple("Eigenvalue", ["value", "error"])
Trace = collections.namedtuple("Trace", ["parts", "samples"])


def largest_eigenvalue(product, vectors, start, most, tolerance, report=None):
    """The algebraically largest eigenvalue, by the method of Lanczos.

    Three vectors are kept. Since the others are not orthogonalised again,
    rounding makes copies of eigenvalues that were found, which does not harm
    the largest.

    Args:
        product: Function.
        vectors: `Vectors`.
        start: Vector, not zero, that has a part along the eigenvector.
        most: Int, products at most.
        tolerance: Float; stops when `error <= tolerance * |value|`.
        report: Function that is given each estimate, or `None`.

    Returns:
        An `Eigenvalue`.
    """
    diagonal, beside = [], []
    vector = vectors.scaled(1.0 / vectors.norm(start), start)
    before, beta = vector, 0.0
    for _ in range(most):
        following, along, beta = vectors.three_terms(
            product(vector), beta, before, vector
        )
        if not np.isfinite(along + beta):
            return Eigenvalue(float("nan"), float("nan"))
        diagonal.append(along)
        values, rotation = np.linalg.eigh(
            np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        )
        scale = max(abs(values[0]), abs(values[-1]))
        found = Eigenvalue(
            float(values[-1]), float(beta * abs(rotation[-1, -1]))
        )
        if report is not None:
            report(found)
        # The second condition: the Krylov space of the start is exhausted.
        if found.error <= tolerance * abs(found.value) or beta <= 1e-7 * scale:
            break
        beside.append(beta)
        before, vector = vector, vectors.scaled(1.0 / beta, following)
    return found


def trace(product, vectors, parts, probe, products):
    """The trace, by Hutch++: a part of it exactly, the rest from samples.

    The first third of the products finds the subspace in which the matrix is
    large, the second gives the trace there, and the last estimates the trace
    of the remainder, with no larger error than the plain estimate. A
    matrix of a rank below the first third comes out exactly.

    Args:
        product: Function.
        vectors: `Vectors`.
        parts: Function `(left, right)`, the inner products of pieces of two
            vectors, a NumPy array: the trace comes in these pieces.
        probe: Function from an int to a vector of random signs.
        products: Int of at least 3, how many may be made.

    Returns:
        A `Trace`: `parts`, an array, and `samples`, estimates of the sum of
        `parts`, which is their mean; their spread shows the error.
    """
    third = products // 3

    def without(basis, vector):
        # Twice: the first time leaves rounding errors behind.
        for other in [*basis, *basis]:
            vector = vectors.without(vector, other)
        return vector

    basis = []
    for i in range(third):
        direction = product(probe(i))
        size = vectors.norm(direction)
        direction = without(basis, direction)
        rest = vectors.norm(direction)
        if rest > 1e-5 * size:
            basis.append(vectors.scaled(1.0 / rest, direction))
    known = sum(parts(vector, product(vector)) for vector in basis)
    samples = []
    for i in range(third, products - third):
        vector = without(basis, probe(i))
        samples.append(known + parts(vector, product(vector)))
    return Trace(np.mean(samples, axis=0), [float(s.sum()) for s in samples])
