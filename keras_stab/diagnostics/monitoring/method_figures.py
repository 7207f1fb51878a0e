"""What the methods in an optimizer report about training."""

import keras
import numpy as np

from keras_stab.nesting import whole_nest


def reporting(optimizer):
    """The optimizers in a nest that report figures, by name."""
    found = {}
    for each in whole_nest(optimizer):
        if not _reporter(each):
            continue
        name = type(each).__name__.lower()
        known = sum(key.partition("_")[0] == name for key in found)
        found[f"{name}_{known}" if known else name] = each
    return found


def method_figures(optimizer):
    """All their figures: floats by name, `"grain/norm_ratio"`.

    A figure of several parts gives a float per part, with a third part in
    its name: `"grain/weights/0"`.
    """
    return {
        f"{name}/{key}": value
        for name, each in reporting(optimizer).items()
        for key, value in _flat(_reporter(each)())
    }


def _reporter(optimizer):
    """The method by which an optimizer reports its figures, or `None`."""
    for name in ("stability_metrics", "diagnostics"):
        if callable(getattr(optimizer, name, None)):
            return getattr(optimizer, name)
    return None


def _flat(figures):
    for key, value in figures.items():
        if isinstance(value, (list, tuple)):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            yield from ((f"{key}/{k}", v) for k, v in _flat(value))
        elif isinstance(value, (bool, int, float, np.number)):
            yield key, float(value)
        else:
            yield key, float(keras.ops.convert_to_numpy(value))
