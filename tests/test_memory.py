"""Models are freed, with whatever was found out about them."""

import gc
import weakref

import contract
import keras
import pytest
from marks import slow_but_on_torch

import keras_stab
from keras_stab.diagnostics import sharpness
from keras_stab.memory import remembered


@slow_but_on_torch
def test_models_are_freed_after_training():
    def train(row):
        optimizer = row.build(contract.INNER["momentum"]())
        model = contract.compiled(optimizer, contract.classifier())
        x, y = contract.data(2)
        model.fit(x, y, batch_size=contract.BATCH, verbose=0)
        model.evaluate(x, y, verbose=0)
        return weakref.ref(model), weakref.ref(model.trainable_variables[0])

    rows = [row for row in contract.ROWS if not row.nested]
    references = {row.name: train(row) for row in rows}
    gc.collect()
    for name, alive in references.items():
        assert [each() for each in alive] == [None, None], name


class KnowsItsModel(keras.layers.Dense):
    """As some libraries have it, and as a bound method given as a loss does."""

    def attach(self, model):
        vars(self)["its_model"] = model


def train_in_one_pass(model):
    model.compile(keras_stab.GRAIN("sgd", groups=2, engine="one_pass"), "mse")
    model.fit(*data(), verbose=0)


def measure_its_sharpness(model):
    model.compile("sgd", model.layers[0].its_model.own_loss)
    sharpness(model, data(), measures="sam", verbose=0)


class WithLoss(keras.Sequential):
    def own_loss(self, y, y_pred):
        return keras.ops.mean(keras.ops.square(y - y_pred))


def data():
    return keras.ops.ones((8, 3)), keras.ops.ones((8, 2))


@slow_but_on_torch
@pytest.mark.parametrize("use", [train_in_one_pass, measure_its_sharpness])
def test_models_that_their_parts_know_are_freed(use):
    """What is remembered of a model may lead back to it."""

    def used():
        layer = KnowsItsModel(2)
        model = WithLoss([keras.Input((3,)), layer])
        layer.attach(model)
        use(model)
        return weakref.ref(model)

    model = used()
    gc.collect()
    assert model() is None


def test_what_is_remembered_is_not_saved(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    remembered(model, "topic")["layer"] = model.layers[0]
    assert remembered(model, "topic") == {"layer": model.layers[0]}
    assert remembered(model, "another") == {}
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert remembered(loaded, "topic") == {}
    assert remembered(keras.models.clone_model(model), "topic") == {}
