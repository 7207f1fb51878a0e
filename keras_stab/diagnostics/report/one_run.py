"""One run: calls the user's function and sorts what it returns."""

import math
import numbers
import time

import keras
import numpy as np

# What backends raise when memory runs out; by name, because no backend is
# imported here.
OUT_OF_MEMORY = ("ResourceExhaustedError", "OutOfMemoryError")
NOT_METRICS = ("predictions", "targets")


def perform(build_and_fit, make_optimizer, seeds):
    """Trains once.

    Returns:
        Dict: `metrics` (numbers by name), `curves` (lists of numbers by
        name), `predictions` and `targets` (lists of classes, or `None`),
        `seconds`, and `failure` (a sentence, or `None`).

    Raises:
        Exception: What `build_and_fit` raises, except for errors of diverged
            training or missing memory, which give a record with a `failure`.
    """
    keras.utils.set_random_seed(seeds.initialisation)
    start = time.perf_counter()
    record = {
        "metrics": {},
        "curves": {},
        "predictions": None,
        "targets": None,
        "failure": None,
    }
    try:
        result = build_and_fit(make_optimizer(), seeds)
    except Exception as error:
        if not is_failure(error):
            raise
        record["failure"] = f"{type(error).__name__}: {error}"[:500]
    else:
        record.update(sort_result(result))
    record["seconds"] = time.perf_counter() - start
    return record


def is_failure(error):
    """Whether an exception is a failure of training, not of the code.

    These are `FloatingPointError`, `OverflowError`, `MemoryError`, and what
    the backends raise when memory runs out or one of their checks finds NaN.
    """
    if isinstance(error, (FloatingPointError, OverflowError, MemoryError)):
        return True
    kinds = [kind.__name__ for kind in type(error).__mro__]
    if any(kind in OUT_OF_MEMORY for kind in kinds):
        return True
    text = str(error)
    if any(kind in ("JaxRuntimeError", "XlaRuntimeError") for kind in kinds):
        return "RESOURCE_EXHAUSTED" in text
    # TensorFlow's check_numerics.
    return "InvalidArgumentError" in kinds and ("NaN" in text or "Inf" in text)


def sort_result(result):
    """The parts of what `build_and_fit` returned."""
    result = result if isinstance(result, dict) else _named(result)
    metrics, curves = {}, {}
    for name, value in result.items():
        if name in NOT_METRICS:
            continue
        array = _as_array(name, value)
        if array.ndim == 0:
            metrics[name] = float(array)
        else:
            curves[name] = [float(x) for x in array]
    if not metrics:
        raise ValueError(
            "`build_and_fit` must return a number or a dict that holds at "
            f"least one number. Received: {result!r}"
        )
    predictions, diverged = _classes("predictions", result.get("predictions"))
    targets, _ = _classes("targets", result.get("targets"))
    if None not in (predictions, targets) and (
        len(predictions) != len(targets)
    ):
        raise ValueError(
            f"{len(predictions)} predictions and {len(targets)} targets do "
            "not belong together."
        )
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    failure = None
    if bad:
        failure = ", ".join(f"{name} is {metrics[name]}" for name in bad)
    elif diverged:
        failure = "predictions are not finite"
    return {
        "metrics": metrics,
        "curves": curves,
        "predictions": predictions,
        "targets": targets,
        "failure": failure,
    }


def _named(result):
    """A number that stands alone, as a dict."""
    kinds = (numbers.Number, np.generic, np.ndarray)
    if isinstance(result, kinds) or keras.ops.is_tensor(result):
        return {"score": result}
    raise ValueError(
        "`build_and_fit` must return a number or a dict of numbers by name, "
        "such as `history.history['val_loss'][-1]` or what "
        "`model.evaluate(..., return_dict=True)` returns. Received: "
        f"{result!r}"
        + (" (a function without `return`)" if result is None else "")
    )


def _as_array(name, value):
    """A number or a list of them as float64."""
    kinds = (numbers.Number, list, tuple, np.ndarray, np.generic)
    if not isinstance(value, kinds):
        # A tensor of the backend.
        if keras.ops.is_tensor(value):
            value = keras.ops.convert_to_numpy(value)
        else:
            raise ValueError(
                f"{name!r} must be a number or a list of numbers. Received: "
                f"{value!r}"
            )
    try:
        array = np.asarray(value, dtype="float64")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name!r} must hold numbers. Received: {value!r}"
        ) from error
    if array.ndim > 1:
        raise ValueError(
            f"{name!r} must be a number or a list of numbers. Received an "
            f"array of shape {array.shape}"
        )
    return array


def _classes(name, value):
    """List of classes, and whether a score for one was not finite."""
    if value is None:
        return None, False
    if keras.ops.is_tensor(value):
        value = keras.ops.convert_to_numpy(value)
    array = np.asarray(value)
    if array.ndim == 2 and array.shape[1] > 1:
        finite = np.all(np.isfinite(array))
        return array.argmax(axis=-1).tolist(), not finite
    if array.ndim != 1 or array.dtype.kind not in "iub" or not len(array):
        raise ValueError(
            f"{name!r} must be classes (whole numbers, shape [rows]) or a "
            "score for each class (shape [rows, classes]). Turn one "
            "probability per row into classes: `(p > 0.5).astype(int)[:, 0]`. "
            f"Received: shape={array.shape}, dtype={array.dtype}"
        )
    return array.astype(int).tolist(), False
