"""AveragedWeights, averaged_weights, export_averaged: a lent average."""

import warnings

import contract
import keras
import numpy as np
import pytest
from callback_cases import Failing

import keras_stab

X, Y = contract.data(8)


def compiled(start_step=0, optimizer=None, **arguments):
    """Batch-norm but no dropout: a resumed run is to be the same."""
    if optimizer is None:
        optimizer = keras_stab.WeightAveraging(
            keras.optimizers.SGD(0.1, momentum=0.9), start_step=start_step
        )
    return contract.compiled(
        optimizer, contract.classifier(dropout=False), **arguments
    )


def trained(start_step=0, batches=8, **arguments):
    model = compiled(start_step, **arguments)
    rows = batches * contract.BATCH
    with warnings.catch_warnings():  # nothing averaged, in some tests
        warnings.simplefilter("ignore")
        contract.fit(model, X[:rows], Y[:rows])
    return model


@pytest.fixture(scope="module")
def model():
    """Trained once; every test leaves it as it was."""
    return trained()


@pytest.fixture(autouse=True)
def unchanged(request):
    if "model" not in request.fixturenames:
        yield
        return
    model = request.getfixturevalue("model")
    before = contract.state(model)
    yield
    contract.assert_same_bits(before, contract.state(model))
    assert not model.optimizer.swapped


def averages(model):
    return [slot.numpy() for slot in model.optimizer.averages]


def values(variables):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def assert_holds_the_average(model):
    contract.assert_same_bits(
        values(model.trainable_variables), averages(model)
    )


def loss_with_average(model, data=X):
    with keras_stab.averaged_weights(model, data):
        return model.evaluate(X, Y, verbose=0)[0]


# ---- The context manager --------------------------------------------------


def test_swaps_and_swaps_back(model):
    before = values(model.variables)
    with keras_stab.averaged_weights(model, X) as same:
        assert same is model
        assert_holds_the_average(model)
        statistics = model.get_layer("norm").get_weights()[2:]
        hidden = model.get_layer("first").output
        hidden = keras.Model(model.input, hidden).predict(X, verbose=0)
        np.testing.assert_allclose(
            statistics[0], hidden.mean(axis=0), atol=1e-5
        )
        with keras_stab.averaged_weights(model):  # once is enough
            assert_holds_the_average(model)
        assert_holds_the_average(model)
    contract.assert_same_bits(before, values(model.variables))


def test_an_exception_swaps_back(model):
    with pytest.raises(KeyError), keras_stab.averaged_weights(model, X):
        raise KeyError
    bad = np.full_like(X[:4], np.nan)
    with pytest.raises(ValueError, match="not finite.*'norm'"):
        with keras_stab.averaged_weights(model, bad):
            pass


def test_an_average_after_an_error_inside(model):
    """An error that the user handles does not end the block."""
    with keras_stab.averaged_weights(model, X):
        with pytest.raises(Exception):
            model.evaluate(X[:, :2], Y, verbose=0)
        assert_holds_the_average(model)


def test_nested_statistics_are_refused(model):
    with keras_stab.averaged_weights(model, X):
        with pytest.raises(ValueError, match="outer"):
            with keras_stab.averaged_weights(model, X):
                pass


def test_warns_about_batch_norm(model):
    with pytest.warns(UserWarning, match="batch-norm layers.*pass training"):
        with keras_stab.averaged_weights(model):
            pass


def test_training_inside_goes_on_from_the_trained_weights():
    straight, inside = trained(), trained()
    contract.fit(straight, X, Y)
    with keras_stab.averaged_weights(inside, X):
        contract.fit(inside, X, Y)
        after = contract.state(inside)
    contract.assert_same_bits(after, contract.state(inside))
    contract.assert_same_bits(after, contract.state(straight))


def test_no_average_yet():
    model = trained(start_step=100)
    with pytest.raises(ValueError, match="no average yet.*at update 100.*8 up"):
        with keras_stab.averaged_weights(model, X):
            pass
    with pytest.raises(ValueError, match="no average yet"):
        keras_stab.export_averaged(model)


def test_no_averaging_optimizer():
    model = contract.compiled("sgd")
    with pytest.raises(ValueError, match="holds no WeightAveraging"):
        with keras_stab.averaged_weights(model):
            pass
    with pytest.raises(ValueError, match="holds no WeightAveraging"):
        contract.fit(model, X, Y, callbacks=[keras_stab.AveragedWeights()])


def test_models_without_an_optimizer():
    uncompiled = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    for wrong, received in (
        (uncompiled, "a model that is not compiled"),
        (keras_stab.AveragedSGD(0.1), "Received: <"),
    ):
        for call in (keras_stab.export_averaged, enter):
            with pytest.raises(ValueError, match="A compiled keras") as error:
                call(wrong)
            assert received in str(error.value)


def enter(model):
    with keras_stab.averaged_weights(model):
        pass


def test_found_inside_other_optimizers():
    def averaging():
        return keras_stab.WeightAveraging(keras.optimizers.SGD(0.1))

    for optimizer in (
        keras.optimizers.LossScaleOptimizer(averaging()),
        keras_stab.GRAIN(averaging(), groups=1),
        keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(
                averaging(), {"first/.*": averaging()}
            )
        ),
    ):
        model = compiled(optimizer=optimizer, auto_scale_loss=False)
        contract.fit(model, X, Y)
        before = values(model.variables)
        with keras_stab.averaged_weights(model, X):
            lent = values(model.trainable_variables)
        contract.assert_same_bits(before, values(model.variables))
        for a, b in zip(lent, values(model.trainable_variables)):
            assert not np.array_equal(a, b)


# ---- Export ---------------------------------------------------------------


def test_export(model):
    plain = keras_stab.export_averaged(model, X)
    assert not plain.compiled and model.compiled
    contract.assert_same_bits(
        values(plain.trainable_variables), averages(model)
    )
    plain.compile(loss=model.loss)
    loss = plain.evaluate(X, Y, verbose=0)
    assert loss == pytest.approx(loss_with_average(model), rel=1e-6)
    plain.layers[1].set_weights([w * 0 for w in plain.layers[1].get_weights()])


class Unclonable(keras.Model):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, x):
        return self.layer(x)


def test_export_of_a_model_that_cannot_be_cloned():
    model = Unclonable(keras.layers.Dense(3))
    model.compile(keras_stab.AveragedSGD(0.1), "mse")
    x = np.ones((4, 6), "float32")
    model.fit(x, x[:, :3], verbose=0)
    with pytest.raises(ValueError, match="cannot be cloned; save it inside"):
        keras_stab.export_averaged(model)
    assert model.compiled


# ---- The callback ---------------------------------------------------------


def test_evaluate_and_predict_with_the_callback(model):
    callback = keras_stab.AveragedWeights(X)
    wanted = loss_with_average(model)
    assert wanted != pytest.approx(model.evaluate(X, Y, verbose=0)[0])
    for _ in range(2):
        loss = model.evaluate(X, Y, verbose=0, callbacks=[callback])[0]
        assert loss == pytest.approx(wanted, rel=1e-6)
    with keras_stab.averaged_weights(model, X):
        outputs = model.predict(X, verbose=0)
    np.testing.assert_allclose(
        model.predict(X, verbose=0, callbacks=[callback]), outputs, rtol=1e-6
    )


@pytest.mark.parametrize("call", ["evaluate", "predict"])
@pytest.mark.parametrize("good_batches", [0, 2])
def test_a_call_that_raises_swaps_back(model, call, good_batches):
    """Also on JAX, where Keras itself loses the model's values then."""

    def batches():
        for _ in range(good_batches):
            yield X[:16], Y[:16]
        yield X[:16, :2], Y[:16]

    with pytest.raises(Exception):
        getattr(model, call)(
            batches(), verbose=0, callbacks=[keras_stab.AveragedWeights(X)]
        )


@pytest.mark.parametrize("moment", ["on_test_batch_end", "on_epoch_end"])
def test_a_fit_that_raises_swaps_back(moment):
    callbacks = [
        keras_stab.AveragedWeights(X, swap_on_epoch=True),
        Failing(moment),
    ]
    failed, straight = compiled(), compiled()
    with pytest.raises(KeyError):
        contract.fit(failed, X, Y, validation_data=(X, Y), callbacks=callbacks)
    assert not failed.optimizer.swapped
    contract.fit(straight, X, Y)
    contract.assert_same_bits(
        values(straight.variables), values(failed.variables)
    )


def test_validation_uses_the_average_and_training_does_not_notice():
    plain, averaged = compiled(), compiled()
    contract.fit(plain, X, Y, epochs=3)
    history = contract.fit(
        averaged,
        X,
        Y,
        epochs=3,
        validation_data=(X, Y),
        callbacks=[keras_stab.AveragedWeights(X, swap_on_epoch=True)],
    ).history
    contract.assert_same_bits(contract.state(plain), contract.state(averaged))
    wanted = loss_with_average(averaged)
    assert history["val_loss"][-1] == pytest.approx(wanted, rel=1e-6)
    # And once more: Keras's own averages fail in the second `fit` on JAX.
    for model in (plain, averaged):
        contract.fit(model, X, Y)
    contract.assert_same_bits(contract.state(plain), contract.state(averaged))


def test_before_the_first_average_the_trained_weights_are_evaluated():
    model = compiled(start_step=8)
    with pytest.warns(UserWarning, match="no average yet: the trained") as seen:
        history = contract.fit(
            model,
            X,
            Y,
            epochs=2,
            validation_data=(X, Y),
            callbacks=[keras_stab.AveragedWeights(X)],
        ).history
    assert sum("no average yet" in str(w.message) for w in seen) == 1
    raw = compiled(start_step=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        contract.fit(raw, X, Y)
    loss = raw.evaluate(X, Y, verbose=0)[0]
    assert history["val_loss"][0] == pytest.approx(loss, rel=1e-6)
    wanted = loss_with_average(model)
    assert history["val_loss"][1] == pytest.approx(wanted, rel=1e-6)


# ---- Files ----------------------------------------------------------------


@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_checkpoints_hold_both_sets(swap_on_epoch, tmp_path):
    """`ModelCheckpoint` and `EarlyStopping` on metrics of the average."""
    path = tmp_path / "best.keras"
    model = compiled()
    contract.fit(
        model,
        X,
        Y,
        epochs=3,
        validation_data=(X, Y),
        callbacks=[
            keras_stab.AveragedWeights(X, swap_on_epoch=swap_on_epoch),
            keras.callbacks.ModelCheckpoint(path, monitor="val_loss"),
            keras.callbacks.EarlyStopping(monitor="val_loss", patience=9),
        ],
    )
    loaded = keras.models.load_model(path)
    assert loaded.optimizer.swapped == swap_on_epoch
    contract.assert_same_bits(averages(model), averages(loaded))
    wanted = loss_with_average(model)
    if swap_on_epoch:  # it is a model with the average, statistics included
        loss = loaded.evaluate(X, Y, verbose=0)[0]
    else:
        contract.assert_same_bits(
            values(model.variables), values(loaded.variables)
        )
        loss = loss_with_average(loaded)
    assert loss == pytest.approx(wanted, rel=1e-6)
    for each in (model, loaded):
        contract.fit(each, X, Y)
    contract.assert_same_bits(contract.state(model), contract.state(loaded))


def test_a_weights_file_holds_both_sets(model, tmp_path):
    path = tmp_path / "model.weights.h5"
    with keras_stab.averaged_weights(model, X):
        model.save_weights(path)
    loaded = compiled()
    loaded.optimizer.build(loaded.trainable_variables)
    loaded.load_weights(path)
    assert loaded.optimizer.swapped
    assert_holds_the_average(loaded)
    loaded.make_train_function()  # as `fit` and `train_on_batch` do
    contract.assert_same_bits(contract.state(model), contract.state(loaded))


def test_half_precision_weights_come_back(tmp_path):
    keras.config.set_dtype_policy("bfloat16")
    model = trained()
    before = values(model.variables)
    with keras_stab.averaged_weights(model, X):
        path = tmp_path / "model.keras"
        model.save(path)
    contract.assert_same_bits(before, values(model.variables))
    loaded = keras.models.load_model(path)
    assert loaded.optimizer.averages[0].dtype == "float32"
    for each in (model, loaded):
        contract.fit(each, X, Y)
    contract.assert_same_bits(contract.state(model), contract.state(loaded))
