"""The number by which weights are known again."""

import keras
import numpy as np

from keras_stab.backend import fingerprint as module
from keras_stab.backend.fingerprint import fingerprint

GOLDEN = 3411584656


def tensors(dtype="float32"):
    """The same numbers everywhere; also an empty one and a scalar."""
    values = [
        np.linspace(-2.0, 3.0, 35).reshape(7, 5),
        np.zeros((0, 3)),
        np.array(2.5),
        np.array([1.0, -0.5, 1e-30]),
    ]
    return [keras.ops.convert_to_tensor(v.astype(dtype)) for v in values]


def changed(index, function):
    found = tensors()
    found[index] = function(found[index])
    return fingerprint(found)


def test_it_is_the_same_on_every_backend():
    assert fingerprint(tensors()) == GOLDEN
    assert fingerprint([]) == fingerprint(tensors()[1:2]) == 0


def test_every_change_shows():
    ops = keras.ops
    numbers = [
        fingerprint(tensors()),
        fingerprint(tensors()[::-1]),
        changed(0, lambda t: -t),
        changed(0, lambda t: 2.0 * t),
        changed(0, lambda t: ops.flip(t, axis=0)),
        changed(0, lambda t: ops.reshape(ops.transpose(t), (7, 5))),
        changed(2, lambda t: t * (1.0 + 2e-7)),
        changed(3, lambda t: -t),
        changed(3, ops.zeros_like),
    ]
    assert len(set(numbers)) == len(numbers)


def test_parts_make_the_whole(monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 4)
    assert fingerprint(tensors()) == GOLDEN


def test_other_precisions():
    half = [keras.ops.cast(t, "bfloat16") for t in tensors()]
    as_single = [keras.ops.cast(t, "float32") for t in half]
    assert fingerprint(half) == fingerprint(as_single) != GOLDEN
