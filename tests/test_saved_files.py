"""Files that version 0.1 wrote still load, and training goes on from them."""

import json

import keras
import numpy as np
import pytest
import saved_cases


def record_of(method):
    return json.loads((saved_cases.FOLDER / f"{method}.json").read_text())


def assert_equal(model, expected, **tolerance):
    values = saved_cases.state(model)
    assert len(values) == len(expected)
    for value, number in zip(values, expected):
        number = np.asarray(number, "float64").astype(value.dtype)
        # That version kept NaN for what is not known; now it is a number.
        number = np.where(np.isnan(number), -np.finfo("f4").max, number)
        np.testing.assert_allclose(value, number, **tolerance)


def loaded(method, kind):
    if kind == "keras":
        model = keras.models.load_model(saved_cases.FOLDER / f"{method}.keras")
        # JAX wrote the file, and with it that the step is compiled.
        model.jit_compile = keras.backend.backend() == "jax"
        return model
    model = saved_cases.compiled(method)
    model.optimizer.build(model.trainable_variables)
    model.load_weights(saved_cases.FOLDER / f"{method}.weights.h5")
    return model


@pytest.mark.parametrize("method", saved_cases.METHODS)
def test_files_of_version_0_1(method):
    """Every bit is read; then the steps are those of that version."""
    record = record_of(method)
    continued = []
    for kind in ("keras", "weights"):
        model = loaded(method, kind)
        assert_equal(model, record["saved"], rtol=0)
        saved_cases.fit(
            model, saved_cases.BEFORE, saved_cases.BEFORE + saved_cases.AFTER
        )
        # Another processor, or another backend, rounds in other ways.
        assert_equal(model, record["continued"], rtol=2e-4, atol=2e-5)
        continued.append(saved_cases.state(model))
    for one, other in zip(*continued, strict=True):
        np.testing.assert_array_equal(one, other)
