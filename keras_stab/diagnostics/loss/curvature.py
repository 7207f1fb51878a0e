"""How sharp the loss is where a model stands."""

import functools
import warnings

import keras
import numpy as np

from keras_stab import keras_internals
from keras_stab.arguments import checked_count
from keras_stab.arguments import checked_number
from keras_stab.diagnostics.loss.dataset_loss import DatasetLoss
from keras_stab.diagnostics.loss.layers import variables_of_layers
from keras_stab.diagnostics.loss.sharpness_figures import Sharpness
from keras_stab.numerics import spectrum

MEASURES = ("eigenvalue", "trace", "sam")


def sharpness(
    model,
    data,
    loss=None,
    measures=MEASURES,
    layers=None,
    rho=0.05,
    ascent_steps=5,
    trace_products=30,
    eigenvalue_products=100,
    tolerance=1e-4,
    training=False,
    steps=None,
    batch_size=32,
    seed=0,
    verbose=1,
):
    r"""Measures how sharp the loss is at the weights of a model.

    With $L$ the mean loss of all the data, penalties included, and $H$ its
    Hessian at the trainable weights $w$:

    - `"eigenvalue"`: the largest eigenvalue of $H$, by the method of Lanczos;
    - `"trace"`: $\operatorname{tr} H$, by Hutch++;
    - `"sam"`: $\max_{|e| \le \rho} L(w + e) - L(w)$: along the gradient, as
      SAM itself takes it, and the largest value on a way of several steps
      $e \leftarrow \rho \nabla L(w + e) / |\nabla L(w + e)|$, projected
      gradient ascent with long steps.

    The batches are pooled exactly: a batch of $n$ of $N$ rows counts $n / N$,
    also a short last one, as in `evaluate`. Nothing of the model changes:
    weights, statistics, seeds, metrics, optimizer.

    Args:
        model: A built or unbuilt `keras.Model`. Its weights are those that it
            holds now: for an average, call this inside
            `with keras_stab.averaged_weights(model):`.
        data: Arrays `(x, y)` or `(x, y, sample_weight)`, cut into batches of
            `batch_size`; or batches of those: a list, a `tf.data.Dataset`, a
            `PyDataset`, a PyTorch `DataLoader`. They are gone through many
            times and are therefore kept in memory.
        loss: A `keras.losses.Loss`, its name, or a function of
            `(y, y_pred)`; `None` for what the model was compiled with.
            Defaults to `None`.
        measures: Which of the three. Defaults to all.
        layers: `None`; `"all"`, for the figures of every layer with weights
            of its own, the others held fixed; or a list of layers, or of their
            names or paths, each with what is inside it. The traces come free;
            the other two cost for every layer what they cost for the model.
            Defaults to `None`.
        rho: Float above 0, the radius. Defaults to 0.05.
        ascent_steps: Int, gradients on the way. Defaults to 5.
        trace_products: Int of at least 3, products with the Hessian for the
            trace; a third as many vectors are kept. Defaults to 30.
        eigenvalue_products: Int, the most products for the eigenvalue; you
            are warned when they are not enough. Defaults to 100.
        tolerance: Float, of the eigenvalue: it stops when the error is known
            to be below that, relatively. It is usually far smaller. Defaults
            to 1e-4.
        training: Whether layers run as in training: batch-norm by the
            statistics of the batch, dropout with the same masks at every
            place. Defaults to `False`.
        steps: Int, the most batches to use; `None` for all. Defaults to
            `None`.
        batch_size: Int, rows in a batch cut from arrays. Defaults to 32.
        seed: Int, of the random vectors. Defaults to 0.
        verbose: 1 for a progress bar, which counts passes over the data, 0
            for none. Defaults to 1.

    Returns:
        A `Sharpness`, with the figures as attributes; printed, it is a table.

    Raises:
        ValueError: If there is no loss, no batch or no trainable weight, an
            argument is out of range, no layer has a given name, or the loss
            or a derivative is not finite.

    Example:

    >>> import keras, keras_stab, numpy as np
    >>> model = keras.Sequential([keras.layers.Dense(1, use_bias=False)])
    >>> x, y = np.diag([3.0, 1.0]), np.zeros((2, 1))
    >>> found = keras_stab.sharpness(model, (x, y), loss="mse", verbose=0)
    >>> round(found.largest_eigenvalue, 3), round(found.trace, 3)
    (9.0, 10.0)

    Departures from the paper:
        Foret et al. measure along the gradient only; from a place where it is
        zero the ascent starts in a random direction. The largest eigenvalue
        is that of the algebraic order, not of the size: a saddle with a
        large negative curvature is not sharp.

    Cost:
        A product with the Hessian costs some two gradients, in time and in
        memory. The eigenvalue keeps 4 vectors of the size of the weights, the
        trace `trace_products / 3`. `benchmarks/sharpness_time.py` measures it.

    References:
        - Foret, Kleiner, Mobahi, Neyshabur, 2020, "Sharpness-Aware
          Minimization for Efficiently Improving Generalization",
          arXiv:2010.01412
        - Meyer, Musco, Musco, Woodruff, 2020, "Hutch++: Optimal Stochastic
          Trace Estimation", arXiv:2010.09649
        - Yao, Gholami, Keutzer, Mahoney, 2019, "PyHessian: Neural Networks
          Through the Lens of the Hessian", arXiv:1912.07145
    """
    measures = _checked_measures(measures)
    rho = checked_number("rho", rho, 0.0, forbidden=(0.0,))
    tolerance = checked_number("tolerance", tolerance, 0.0)
    checked_count("ascent_steps", ascent_steps, 1)
    checked_count("trace_products", trace_products, 3)
    checked_count("eigenvalue_products", eigenvalue_products, 1)
    checked_count("seed", seed, 0)
    whole = DatasetLoss(model, data, loss, training, steps, batch_size)
    parts = variables_of_layers(model, layers, whole.variables)
    _warn_of_half_precision(model)
    bar = _Bar(whole, verbose)
    here, gradient = whole.with_gradient(whole.zeros())
    bar.update()
    result = _start(whole, here, gradient, whole.sizes)
    known = {id(v): i for i, v in enumerate(whole.variables)}
    for name, variables in parts.items():
        sizes = [whole.sizes[known[id(v)]] for v in variables]
        own = whole.vectors.times(whole.mask(variables), gradient)
        result.layers[name] = _start(whole, here, own, sizes)
    probe = functools.partial(_signs, whole, seed)
    if "trace" in measures:
        _measure_trace(whole, probe, trace_products, result, parts, known, bar)
    for name, own in [(None, result), *result.layers.items()]:
        only = _unchanged
        if name is not None:
            mask = whole.mask(parts[name])
            only = functools.partial(whole.vectors.times, mask)
        start = only(whole.random(keras.random.normal, _seed(seed, 0)))
        if "eigenvalue" in measures:
            _measure_eigenvalue(
                whole, only, start, eigenvalue_products, tolerance, own, bar
            )
            _check_convergence(own, name, tolerance)
        if "sam" in measures:
            _measure_sam(
                whole, only, gradient, start, rho, ascent_steps, own, bar
            )
    result.passes = whole.passes
    bar.close()
    return result


def _unchanged(vector):
    return vector


def _start(whole, here, gradient, sizes):
    size = whole.vectors.norm(gradient)
    _check_finite("The loss", here)
    _check_finite("The gradient of the loss", size)
    return Sharpness(here, size, int(sum(sizes)))


def _measure_trace(whole, probe, products, result, parts, known, bar):
    def product(vector):
        answer = whole.hessian_product(vector)
        bar.update()
        return answer

    found = spectrum.trace(
        product, whole.vectors, whole.by_variable, probe, products
    )
    _check_finite("The trace of the Hessian", found.parts.sum())
    result.trace = float(found.parts.sum())
    count = len(found.samples)
    if count > 1:
        spread = np.std(found.samples, ddof=1)
        result.trace_error = float(spread / count**0.5)
    for name, variables in parts.items():
        own = sum(found.parts[known[id(v)]] for v in variables)
        result.layers[name].trace = float(own)


def _measure_eigenvalue(whole, only, start, most, tolerance, own, bar):
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
    _check_finite("A product with the Hessian", found.value + found.error)
    own.largest_eigenvalue, own.eigenvalue_error = found


def _check_convergence(own, name, tolerance):
    error, value = own.eigenvalue_error, abs(own.largest_eigenvalue)
    # What rounding in float32 leaves is no lack of products.
    if error > max(tolerance, 1e-5) * value:
        where = "" if name is None else f" of layer {name!r}"
        warnings.warn(
            f"The largest eigenvalue{where} is known up to {error:.2g} only: "
            "raise `eigenvalue_products` or `tolerance`. Received: an "
            f"eigenvalue of {own.largest_eigenvalue:.4g}",
            stacklevel=3,
        )


def _measure_sam(whole, only, gradient, start, rho, steps, own, bar):
    uphill = only(gradient)
    if own.gradient_norm == 0.0:
        uphill = start
    shift = whole.vectors.scaled(rho / whole.vectors.norm(uphill), uphill)
    rises = []
    for _ in range(steps):
        there, uphill = whole.with_gradient(shift)
        rises.append(there - own.loss)
        bar.update(sam=rises[-1])
        _check_finite("The loss on the way up", there)
        uphill = only(uphill)
        size = whole.vectors.norm(uphill)
        _check_finite("The gradient on the way up", size)
        if size == 0.0:
            break
        shift = whole.vectors.scaled(rho / size, uphill)
    own.sam_first_order = rises[0] if own.gradient_norm > 0.0 else 0.0
    own.sam = max(0.0, *rises)


def _signs(whole, seed, index):
    """Random signs; the same for a seed and index."""
    uniform = whole.random(keras.random.uniform, _seed(seed, index + 1))
    return [
        2.0 * keras.ops.cast(part < 0.5, part.dtype) - 1.0 for part in uniform
    ]


def _seed(seed, index):
    # Variables take successive seeds.
    return (seed * 1000003 + index * 10007) % 2**30


class _Bar:
    """Counts passes over the data; how many there will be is not known."""

    def __init__(self, whole, verbose):
        self._whole = whole
        self._bar = None
        if verbose:
            self._bar = keras.utils.Progbar(
                None,
                unit_name="pass",
                stateful_metrics=["largest_eigenvalue", "sam"],
            )

    def update(self, **values):
        if self._bar is not None:
            self._bar.update(self._whole.passes, list(values.items()))

    def close(self):
        if self._bar is not None:
            self._bar.update(self._whole.passes, finalize=True)


def _warn_of_half_precision(model):
    for layer in [model, *keras_internals.all_layers(model)]:
        if layer.compute_dtype in ("float16", "bfloat16"):
            warnings.warn(
                "Second derivatives in half precision are rounded by a percent "
                "or more. Measure a float32 copy of the model. Received: layer "
                f"{layer.name!r} that computes in {layer.compute_dtype}",
                stacklevel=3,
            )
            return


def _checked_measures(measures):
    if isinstance(measures, str):
        measures = (measures,)
    measures = tuple(measures)
    if not measures or not set(measures) <= set(MEASURES):
        raise ValueError(
            f"`measures` must be some of {MEASURES}. Received: "
            f"measures={measures!r}"
        )
    return measures


def _check_finite(what, value):
    if not np.isfinite(value):
        raise ValueError(
            f"{what} is not finite on these data and weights. Received: {value}"
        )
