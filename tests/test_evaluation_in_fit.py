"""`fit` evaluates and ends with averages and slow weights, unasked."""

import warnings

import contract
import keras
import numpy as np
import pytest
from callback_cases import Failing
from marks import quick
from marks import slow_but_on_torch

import keras_stab
from keras_stab.trainer.lending import outermost_lenders

X, Y = contract.data(12)
# In the middle of every cycle.
BEFORE = 7
FIRST = slice(0, BEFORE * contract.BATCH)
REST = slice(BEFORE * contract.BATCH, 12 * contract.BATCH)

LENDING = [
    row
    for row in contract.ROWS
    if row.second_weights in ("average", "slow") and not row.slow
]
ROWS = pytest.mark.parametrize(
    "row",
    quick(LENDING, lambda row: row.name in ("WeightAveraging", "Lookahead")),
    ids=lambda row: row.name,
)


@pytest.fixture(autouse=True)
def no_word_of_batch_norm():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "From the end of `fit`")
        warnings.filterwarnings("ignore", "The model has batch-norm layers")
        yield


def compiled(row, **arguments):
    row = contract.row(row) if isinstance(row, str) else row
    return contract.compiled(
        row.build(contract.INNER["adamw"]()),
        contract.classifier(dropout=False),
        **arguments,
    )


def with_trained_weights(row):
    """The same model, whose `fit` lends nothing."""
    model = compiled(row)
    for method in outermost_lenders(model.optimizer):
        method.evaluate_with = "trained"
    return model


def fit(model, rows=FIRST, **arguments):
    return contract.fit(model, X[rows], Y[rows], lent=True, **arguments)


def train(row, rows=FIRST, **arguments):
    model = compiled(row)
    fit(model, rows, **arguments)
    return model


def evaluated(model):
    return model.evaluate(X, Y, batch_size=64, verbose=0)[0]


def copies(variables):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def swapped(model):
    return any(m.swapped for m in outermost_lenders(model.optimizer))


class Noting(keras.callbacks.Callback):
    """Notes the weights that callbacks see at the end of an epoch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(copies(self.model.trainable_variables))


# ---- A run that is evaluated equals one that is not -----------------------


@ROWS
def test_fit_evaluate_save_load_evaluate_fit(row, tmp_path):
    silent = with_trained_weights(row)
    fit(silent)
    trained = contract.state(silent)
    model = train(row)
    assert swapped(model) and not swapped(silent)
    # The model has what a `with` block would lend.
    with silent.optimizer.swap_weights(silent):
        lent, wanted = silent.get_weights(), evaluated(silent)
    contract.assert_same_bits(lent, model.get_weights())
    assert wanted != evaluated(silent)
    assert evaluated(model) == wanted
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    contract.assert_same_bits(lent, loaded.get_weights())
    assert evaluated(loaded) == pytest.approx(wanted, rel=1e-6)
    fit(silent, REST)
    for each in (model, loaded):
        fit(each, REST)
        keras_stab.return_trained_weights(each)
        contract.assert_same_bits(contract.state(silent), contract.state(each))
    again = train(row)
    keras_stab.return_trained_weights(again)
    contract.assert_same_bits(trained, contract.state(again))


@ROWS
def test_train_on_batch_goes_on_from_the_trained_weights(row):
    straight = with_trained_weights(row)
    for model in (straight, lending := train(row)):
        if model is straight:
            fit(model)
        model.train_on_batch(X[: contract.BATCH], Y[: contract.BATCH])
        assert not swapped(model)
    contract.assert_same_bits(contract.state(straight), contract.state(lending))


@ROWS
def test_validation_and_callbacks_see_the_evaluation_weights(row):
    noting = Noting()
    plain, model = with_trained_weights(row), compiled(row)
    fit(plain, epochs=2)
    history = fit(
        model,
        epochs=2,
        callbacks=[noting],
        validation_data=(X[REST], Y[REST]),
    ).history
    last = noting.seen[-1]
    trained = copies(plain.trainable_variables)
    assert any(np.any(a != b) for a, b in zip(last, trained))
    contract.assert_same_bits(last, copies(model.trainable_variables))
    loss = model.evaluate(X[REST], Y[REST], batch_size=16, verbose=0)[0]
    assert history["val_loss"][-1] == pytest.approx(loss, rel=1e-6)
    keras_stab.return_trained_weights(model)
    contract.assert_same_bits(contract.state(plain), contract.state(model))


@slow_but_on_torch
def test_several_players():
    """Each method lends once, and only those that are asked for it."""

    def build():
        rapp = keras_stab.RAPP(0.05, evaluate_with="trained")
        return keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(
                keras_stab.RAPP(0.1), {"first/.*": rapp}
            )
        )

    models = [
        contract.compiled(build(), contract.classifier(dropout=False))
        for _ in range(2)
    ]
    fit(models[0])
    contract.fit(models[1], X[FIRST], Y[FIRST])
    lent, trained = (copies(m.trainable_variables) for m in models)
    paths = [v.path for v in models[0].trainable_variables]
    for path, a, b in zip(paths, lent, trained):
        assert np.array_equal(a, b) == path.startswith("first")


@slow_but_on_torch
def test_methods_inside_others_lend_once():
    def build():
        return keras_stab.WeightAveraging(
            keras_stab.Lookahead("adam", sync_period=4)
        )

    model = contract.compiled(build(), contract.classifier(dropout=False))
    fit(model)
    averaging, lookahead = model.optimizer, model.optimizer.inner_optimizer
    assert averaging.swapped and not lookahead.swapped
    # What is inside was not told that other weights had come.
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "From the end of `fit`")
        fit(model, REST)
    straight = contract.compiled(build(), contract.classifier(dropout=False))
    straight.optimizer.evaluate_with = "trained"
    fit(straight)
    fit(straight, REST)
    keras_stab.return_trained_weights(model)
    contract.assert_same_bits(contract.state(straight), contract.state(model))


# ---- When there is nothing to lend ----------------------------------------


@slow_but_on_torch
def test_nothing_is_lent_before_the_first_average_or_the_first_cycle():
    for optimizer in (
        keras_stab.WeightAveraging("sgd", start_step=100),
        keras_stab.Lookahead("sgd", sync_period=100),
        keras_stab.OptimisticGradient("sgd"),
    ):
        model = contract.compiled(optimizer, contract.classifier(False))
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "WeightAveraging averaged nothing"
            )
            fit(model, validation_data=(X[REST], Y[REST]))
        assert not model.optimizer.swapped
        before = contract.classifier(False).get_weights()
        assert any(np.any(a != b) for a, b in zip(before, model.get_weights()))


@slow_but_on_torch
def test_at_the_end_of_a_cycle_the_weights_are_the_slow_ones():
    model = contract.compiled(keras_stab.Lookahead("sgd", sync_period=4))
    fit(model, slice(0, 8 * contract.BATCH))
    assert not model.optimizer.swapped


@slow_but_on_torch
def test_an_argument_turns_it_off():
    build = contract.row("WeightAveraging").build
    method = build(contract.INNER["sgd"]())
    config = method.get_config()
    assert config["evaluate_with"] == "evaluation"
    config["evaluate_with"] = "trained"
    again = type(method).from_config(config)
    assert again.get_config()["evaluate_with"] == "trained"
    model = contract.compiled(again)
    fit(model)
    assert not model.optimizer.swapped and model.optimizer.averaged
    for kind in (keras_stab.AveragedSGD, keras_stab.RAPP, keras_stab.CEGPlus):
        assert kind(0.1, evaluate_with="trained").evaluate_with == "trained"
        with pytest.raises(ValueError, match="must be one of"):
            kind(0.1, evaluate_with="slow")


@slow_but_on_torch
def test_a_callback_that_trains_leaves_nothing_unlent():
    class Training(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            fit(self.model)

    model = train("WeightAveraging", callbacks=[Training()])
    assert model.optimizer.swapped


# ---- Other ways to lend, other weights ------------------------------------


@slow_but_on_torch
def test_a_callback_of_the_user_has_its_own_rules():
    callback = keras_stab.AveragedWeights()
    model = train("WeightAveraging", callbacks=[callback])
    assert not model.optimizer.swapped


@slow_but_on_torch
@pytest.mark.parametrize("place", ["list", "position", "one", "container"])
def test_callbacks_however_they_are_given(place):
    noting = Noting()
    model = compiled("WeightAveraging")
    x, y = X[FIRST], Y[FIRST]
    if place == "position":
        model.fit(x, y, contract.BATCH, 1, 0, [noting])
    else:
        given = {"list": [noting, None], "one": noting}
        container = keras.callbacks.CallbackList(
            [noting], add_history=True, model=model
        )
        given = given.get(place, container)
        model.fit(x, y, contract.BATCH, verbose=0, callbacks=given)
        if place == "container":
            assert container.callbacks[0] is noting
    assert model.optimizer.swapped
    contract.assert_same_bits(noting.seen[0], copies(model.trainable_variables))


def test_blocks_and_callbacks_after_fit():
    """They lend in place of `fit`, and leave the model as it was."""
    model = train("WeightAveraging")
    lent = contract.state(model)
    with keras_stab.averaged_weights(model, X):
        with_statistics = evaluated(model)
        assert with_statistics != model.evaluate(X[FIRST], Y[FIRST], verbose=0)
    contract.assert_same_bits(lent, contract.state(model))
    assert model.optimizer.swapped
    callback = keras_stab.AveragedWeights(X)
    loss = model.evaluate(X, Y, batch_size=64, verbose=0, callbacks=[callback])[
        0
    ]
    assert loss == pytest.approx(with_statistics, rel=1e-6)
    contract.assert_same_bits(lent, contract.state(model))
    plain = keras_stab.export_averaged(model, X)
    assert plain.count_params() == model.count_params()
    contract.assert_same_bits(lent, contract.state(model))
    assert model.optimizer.swapped


def test_other_weights_put_in_after_fit_are_trained():
    """What was set aside does not come back over them."""
    model = train("Lookahead")
    start = contract.classifier(dropout=False).get_weights()
    model.set_weights(start)
    with pytest.warns(UserWarning, match="Other weights were put into"):
        fit(model, slice(0, contract.BATCH))
    keras_stab.return_trained_weights(model)
    moved = [np.max(np.abs(a - b)) for a, b in zip(start, model.get_weights())]
    # One step of AdamW from there.
    assert 0 < max(moved[:2]) < 2e-2


@slow_but_on_torch
def test_blocks_and_callbacks_keep_other_weights_that_were_put_in():
    model = train("WeightAveraging")
    other = contract.classifier(dropout=False).get_weights()
    model.set_weights(other)
    with keras_stab.averaged_weights(model):
        pass
    contract.assert_same_bits(other, model.get_weights())
    model = train("WeightAveraging")
    model.set_weights(other)
    model.evaluate(X, Y, verbose=0, callbacks=[keras_stab.AveragedWeights()])
    contract.assert_same_bits(other, model.get_weights())


@slow_but_on_torch
def test_restart_after_fit_goes_on_from_what_the_model_holds():
    model = train("WeightAveraging")
    lent = copies(model.trainable_variables)
    model.optimizer.restart()
    assert not model.optimizer.swapped and not model.optimizer.averaged
    contract.assert_same_bits(lent, copies(model.trainable_variables))


@slow_but_on_torch
def test_early_stopping_restores_evaluation_weights():
    noting = Noting()
    model = compiled("WeightAveraging")
    stopping = keras.callbacks.EarlyStopping(
        "val_loss", mode="max", patience=1, restore_best_weights=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(
            model,
            epochs=4,
            callbacks=[stopping, noting],
            validation_data=(X[REST], Y[REST]),
        )
    assert stopping.stopped_epoch
    best = noting.seen[stopping.best_epoch]
    contract.assert_same_bits(best, copies(model.trainable_variables))
    assert stopping.best_epoch < len(noting.seen) - 1
    assert not model.optimizer.swapped
    with pytest.warns(UserWarning, match="Other weights were put into"):
        fit(model)


def test_a_checkpoint_of_an_epoch_holds_both_sets(tmp_path):
    path = tmp_path / "last.keras"
    model = train(
        "Lookahead", callbacks=[keras.callbacks.ModelCheckpoint(path)]
    )
    loaded = keras.models.load_model(path)
    assert loaded.optimizer.lent_by_fit
    contract.assert_same_bits(model.get_weights(), loaded.get_weights())
    for each in (model, loaded):
        fit(each, REST)
        keras_stab.return_trained_weights(each)
    contract.assert_same_bits(contract.state(model), contract.state(loaded))


@slow_but_on_torch
def test_a_backup_of_an_epoch_resumes(tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path)

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyError("on purpose")

    straight, resumed = compiled("Lookahead"), compiled("Lookahead")
    fit(straight, epochs=4)
    with pytest.raises(KeyError):
        fit(resumed, epochs=4, callbacks=[backup, Stop()])
    again = compiled("Lookahead")
    again.optimizer.build(again.trainable_variables)
    fit(again, epochs=4, callbacks=[keras.callbacks.BackupAndRestore(tmp_path)])
    for model in (straight, again):
        keras_stab.return_trained_weights(model)
    contract.assert_same_bits(contract.state(straight), contract.state(again))


# ---- Errors ---------------------------------------------------------------


@pytest.mark.parametrize(
    "moment", ["on_test_batch_end", "on_epoch_end", "on_train_batch_end"]
)
def test_a_fit_that_raises_gives_the_trained_weights_back(moment):
    model, straight = compiled("WeightAveraging"), compiled("WeightAveraging")
    validation = (X[REST], Y[REST])
    with pytest.raises(KeyError):
        fit(
            model,
            epochs=2,
            validation_data=validation,
            callbacks=[Failing(moment)],
        )
    assert not model.optimizer.swapped
    if moment == "on_train_batch_end":
        return
    contract.fit(straight, X[FIRST], Y[FIRST])
    contract.assert_same_bits(
        copies(straight.trainable_variables),
        copies(model.trainable_variables),
    )


def test_a_fit_that_raises_before_the_first_step():
    """On JAX the variables are empty while the step is traced."""
    build = contract.row("WeightAveraging").build
    # Without weight decay: on TensorFlow Keras's own step decays the weights
    # although the batch does not fit.
    model, straight = (
        contract.compiled(
            build(contract.INNER["sgd"]()), contract.classifier(dropout=False)
        )
        for _ in range(2)
    )
    fit(model)
    contract.fit(straight, X[FIRST], Y[FIRST])
    with pytest.raises(Exception, match=r"(?i)shape|size|incompatible"):
        model.fit(X[FIRST][:, :-1], Y[FIRST], verbose=0)
    contract.assert_same_bits(straight.get_weights(), model.get_weights())
    fit(model)  # nothing of the optimizer is lost


@slow_but_on_torch
def test_nothing_of_a_call_that_raised_comes_back_later():
    model = train("WeightAveraging")
    with pytest.raises(KeyError):
        model.evaluate(
            X, Y, verbose=0, callbacks=[Failing("on_test_batch_end")]
        )
    keras_stab.return_trained_weights(model)
    trained = contract.state(model)
    with pytest.raises(Exception, match=r"(?i)shape|size|incompatible"):
        model.evaluate(X[:, :-1], Y, verbose=0)
    contract.assert_same_bits(trained, contract.state(model))


def test_a_step_of_ones_own_is_refused():
    model = train("WeightAveraging")
    before = contract.state(model)
    gradients = [keras.ops.ones(v.shape) for v in model.trainable_variables]
    with pytest.raises(RuntimeError, match="swap_out|return_trained_weights"):
        model.optimizer.apply(gradients, model.trainable_variables)
    contract.assert_same_bits(before, contract.state(model))
    keras_stab.return_trained_weights(model)
    model.optimizer.apply(gradients, model.trainable_variables)


@slow_but_on_torch
def test_batch_norm_is_told_of_once():
    model = compiled("WeightAveraging")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(model, epochs=2)
        fit(model)
    told = [w for w in seen if "batch-norm" in str(w.message)]
    assert len(told) == 1
    assert "AveragedWeights(batch_norm_data=...)" in str(told[0].message)
