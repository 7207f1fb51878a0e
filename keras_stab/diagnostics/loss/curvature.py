"""How sharp the loss is where a model stands."""

import functools
import warnings
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras

from keras_stab import keras_internals
from keras_stab.arguments import checked_choices
from keras_stab.arguments import checked_count
from keras_stab.arguments import checked_number
from keras_stab.diagnostics.loss import measuring
from keras_stab.diagnostics.loss.dataset_loss import DatasetLoss
from keras_stab.diagnostics.loss.layers import variables_of_layers
from keras_stab.diagnostics.loss.sharpness_figures import Sharpness

SHARPNESS_MEASURES = ("eigenvalue", "trace", "sam")


def sharpness(
    model: keras.Model,
    data: Any,
    loss: keras.losses.Loss | str | Callable | None = None,
    measures: str | Sequence[str] = SHARPNESS_MEASURES,
    layers: str | keras.Layer | Sequence[str | keras.Layer] | None = None,
    rho: float = 0.05,
    ascent_steps: int = 5,
    trace_products: int = 30,
    eigenvalue_products: int = 100,
    tolerance: float = 1e-4,
    training: bool = False,
    steps: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    verbose: int = 1,
) -> Sharpness:
    r"""Measures how sharp the loss is at the weights of a model.

    With $L$ the mean loss of all the data, penalties included, and $H$ its
    Hessian at the trainable weights $w$:

    - `"eigenvalue"`: the largest eigenvalue of $H$, by the method of Lanczos;
    - `"trace"`: $\operatorname{tr} H$, by Hutch++;
    - `"sam"`: $\max_{|e| \le \rho} L(w + e) - L(w)$: along the gradient, as
      SAM itself takes it, and the largest value on a path of several steps
      $e \leftarrow \rho \nabla L(w + e) / |\nabla L(w + e)|$, projected
      gradient ascent with long steps.

    The batches are pooled exactly, as in `evaluate`: a batch of $n$ of $N$
    rows, even a short last one, counts $n / N$. Nothing in the model changes:
    weights, statistics, seeds, metrics, optimizer.

    Args:
        model: A built or unbuilt `keras.Model`. Its weights are those that it
            holds now: for an average, call this inside
            `with keras_stab.averaged_weights(model):`.
        data: Arrays `(x, y)` or `(x, y, sample_weight)`, cut into batches of
            `batch_size`; or batches of those: a list, a `tf.data.Dataset`, a
            `PyDataset`, a PyTorch `DataLoader`. They are needed many times
            and are therefore kept in memory. With `keras.distribution` on
            several processes of JAX each passes its own rows, as for `fit`,
            and all find what all rows give.
        loss: A `keras.losses.Loss`, its name, or a function of
            `(y, y_pred)`; `None` for what the model was compiled with.
            Defaults to `None`.
        measures: Which of the three, a name or a list of names. Defaults to
            all.
        layers: `"all"` for the figures of every layer that has weights of its
            own, with all other weights held fixed; or a list of layers, as
            objects, names or paths, each with the layers inside it; or `None`.
            The traces cost nothing more; the other two cost as much for each
            layer as for the model. Defaults to `None`.
        rho: Float above 0, the radius. Defaults to 0.05.
        ascent_steps: Int, steps of the ascent. Defaults to 5.
        trace_products: Int of at least 3, products with the Hessian for the
            trace; a third as many vectors are kept. Defaults to 30.
        eigenvalue_products: Int, the maximum number of products for the
            eigenvalue; a warning says when they were too few. Defaults to
            100.
        tolerance: Float, the bound of the eigenvalue's relative error at which
            its computation stops; the error itself is usually far smaller.
            Defaults to 1e-4.
        training: Whether layers run as in training: batch-norm by the
            statistics of the batch, dropout with the same masks at every
            point. Defaults to `False`.
        steps: Int, the maximum number of batches to use; `None` for all.
            Defaults to `None`.
        batch_size: Int, rows per batch cut from arrays. Defaults to 32.
        seed: Int, seed of the random vectors. Defaults to 0.
        verbose: 1 for a progress bar, which counts passes over the data, 0
            for none. Defaults to 1.

    Returns:
        A `Sharpness` with the figures as attributes; `print` shows a table.

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
        Foret et al. measure along the gradient only; where it is zero, the
        ascent starts in a random direction. The largest eigenvalue is the
        algebraically largest, not the largest in magnitude: a saddle with a
        large negative curvature is not sharp.

    Cost:
        A product with the Hessian costs about as much time and memory as two
        gradients. The eigenvalue keeps 4 vectors of the size of the weights,
        the trace `trace_products / 3`. `benchmarks/sharpness_time.py` measures
        the time.

    References:
        - Foret, Kleiner, Mobahi, Neyshabur, 2020, "Sharpness-Aware
          Minimization for Efficiently Improving Generalization",
          arXiv:2010.01412
        - Meyer, Musco, Musco, Woodruff, 2020, "Hutch++: Optimal Stochastic
          Trace Estimation", arXiv:2010.09649
        - Yao, Gholami, Keutzer, Mahoney, 2019, "PyHessian: Neural Networks
          Through the Lens of the Hessian", arXiv:1912.07145
    """
    if isinstance(measures, str):
        measures = (measures,)
    measures = checked_choices("measures", measures, SHARPNESS_MEASURES)
    rho = checked_number("rho", rho, above=0.0)
    tolerance = checked_number("tolerance", tolerance, 0.0)
    checked_count("ascent_steps", ascent_steps, 1)
    checked_count("trace_products", trace_products, 3)
    checked_count("eigenvalue_products", eigenvalue_products, 1)
    seed = checked_count("seed", seed, 0)
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
    if "trace" in measures:
        measuring.trace(whole, seed, trace_products, result, parts, known, bar)
    for name, own in [(None, result), *result.layers.items()]:
        only = _unchanged
        if name is not None:
            mask = whole.mask(parts[name])
            only = functools.partial(whole.vectors.times, mask)
        start = only(measuring.random_start(whole, seed))
        if "eigenvalue" in measures:
            measuring.eigenvalue(
                whole, only, start, eigenvalue_products, tolerance, own, bar
            )
            _check_convergence(own, name, tolerance)
        if "sam" in measures:
            measuring.sam(
                whole, only, gradient, start, rho, ascent_steps, own, bar
            )
    result.passes = whole.passes
    bar.close()
    return result


def _unchanged(vector):
    return vector


def _start(whole, here, gradient, sizes):
    size = whole.vectors.norm(gradient)
    measuring.check_finite("The loss", here)
    measuring.check_finite("The gradient of the loss", size)
    return Sharpness(here, size, int(sum(sizes)))


def _check_convergence(own, name, tolerance):
    error, value = own.eigenvalue_error, abs(own.largest_eigenvalue)
    # Rounding in float32 leaves an error that more products do not remove.
    if error > max(tolerance, 1e-5) * value:
        where = "" if name is None else f" of layer {name!r}"
        warnings.warn(
            f"The largest eigenvalue{where} is known only to within "
            f"{error:.2g}: raise `eigenvalue_products` or `tolerance`. "
            f"Received: an eigenvalue of {own.largest_eigenvalue:.4g}",
            stacklevel=3,
        )


class _Bar:
    """Counts passes over the data; their total is not known beforehand."""

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
