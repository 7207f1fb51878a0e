"""The three measures of `sharpness`, for the weights of a model or a layer.

`only` keeps the part of a vector that belongs to the layer; `own` is the
`Sharpness` that gets the figures.
"""

import keras
import numpy as np

from keras_stab.numerics import spectrum


def trace(whole, seed, products, result, parts, known, bar):
    """Measures the trace for the model and, at no cost, for its layers."""

    def product(vector):
        answer = whole.hessian_product(vector)
        bar.update()
        return answer

    def probe(index):
        """Random signs; the same for a seed and index."""
        uniform = whole.random(keras.random.uniform, _seed(seed, index + 1))
        return [
            2.0 * keras.ops.cast(part < 0.5, part.dtype) - 1.0
            for part in uniform
        ]

    found = spectrum.trace(
        product, whole.vectors, whole.by_variable, probe, products
    )
    check_finite("The trace of the Hessian", found.parts.sum())
    result.trace = float(found.parts.sum())
    count = len(found.samples)
    if count > 1:
        spread = np.std(found.samples, ddof=1)
        result.trace_error = float(spread / count**0.5)
    for name, variables in parts.items():
        own = sum(found.parts[known[id(v)]] for v in variables)
        result.layers[name].trace = float(own)


def eigenvalue(whole, only, start, most, tolerance, own, bar):
    """Measures the largest eigenvalue with `most` products at most."""

    def product(vector):
        return only(whole.hessian_product(vector))

    found = spectrum.largest_eigenvalue(
        product,
        whole.vectors,
        start,
        most,
        tolerance,
        lambda estimate: bar.update(largest_eigenvalue=estimate.value),
    )
    check_finite("A product with the Hessian", found.value + found.error)
    own.largest_eigenvalue, own.eigenvalue_error = found


def sam(whole, only, gradient, start, rho, steps, own, bar):
    """Measures the rise of the loss in a ball of radius `rho`."""
    uphill = only(gradient)
    if own.gradient_norm == 0.0:
        uphill = start
    shift = whole.vectors.scaled(rho / whole.vectors.norm(uphill), uphill)
    rises = []
    for _ in range(steps):
        there, uphill = whole.with_gradient(shift)
        rises.append(there - own.loss)
        bar.update(sam=rises[-1])
        check_finite("The loss on the way up", there)
        uphill = only(uphill)
        size = whole.vectors.norm(uphill)
        check_finite("The gradient on the way up", size)
        if size == 0.0:
            break
        shift = whole.vectors.scaled(rho / size, uphill)
    own.sam_first_order = rises[0] if own.gradient_norm > 0.0 else 0.0
    own.sam = max(0.0, *rises)


def random_start(whole, seed):
    """A random vector, which starts the search for the eigenvalue."""
    return whole.random(keras.random.normal, _seed(seed, 0))


def _seed(seed, index):
    # Variables take successive seeds.
    return (seed * 1000003 + index * 10007) % 2**30


def check_finite(what, value):
    if not np.isfinite(value):
        raise ValueError(
            f"{what} is not finite on these data and weights. Received: {value}"
        )
