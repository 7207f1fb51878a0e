"""Weights that are put into a model between two calls of `fit`."""

import contextlib
import warnings

import contract
import keras
import numpy as np
import pytest

import keras_stab

X, Y = contract.data(12)
# In the middle of every cycle.
BEFORE = 7

REMEMBERING = [
    row
    for row in contract.ROWS
    if row.second_weights
    or row.name in ("ScheduleFree", "ExtraGradient-separate", "GRAIN-batches")
]
ROWS = pytest.mark.parametrize("row", contract.parameters(REMEMBERING))


def trained(row, batches=BEFORE):
    model = contract.compiled(
        row.build(keras.optimizers.SGD(0.05)),
        contract.classifier(dropout=False),
    )
    fit(model, 0, batches)
    return model


def fit(model, first, last, **arguments):
    rows = slice(first * contract.BATCH, last * contract.BATCH)
    contract.fit(model, X[rows], Y[rows], **arguments)


def put_others(model, seed=11):
    """Weights of a model that has trained otherwise."""
    draw = np.random.default_rng(seed)
    weights = [
        w + draw.normal(size=w.shape).astype("float32")
        for w in trainable_weights(model)
    ]
    for variable, value in zip(model.trainable_variables, weights):
        variable.assign(value)
    return weights


def trainable_weights(model):
    return [
        np.array(keras.ops.convert_to_numpy(v))
        for v in model.trainable_variables
    ]


@contextlib.contextmanager
def silent():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Other weights")
        warnings.filterwarnings("ignore", "The model has batch-norm layers")
        yield


@contextlib.contextmanager
def noticed(times=1):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    found = [w for w in seen if "Other weights" in str(w.message)]
    assert len(found) == times


@ROWS
def test_fit_begins_again_from_what_it_finds(row):
    by_itself, by_hand = trained(row), trained(row)
    for model in (by_itself, by_hand):
        put_others(model)
    by_hand.optimizer.restart()
    with silent():
        fit(by_hand, BEFORE, 12)
    with noticed():
        fit(by_itself, BEFORE, 12)
    contract.assert_same_bits(
        contract.state(by_hand), contract.state(by_itself)
    )
    # Once: what `fit` left behind now are its own weights.
    with silent():
        fit(by_itself, 0, 5)


@ROWS
def test_at_rate_zero_nothing_moves(row):
    """As in stock Keras; nor does the average come from weights before."""
    model = trained(row)
    model.optimizer.learning_rate = 0.0
    weights = put_others(model)
    with noticed():
        fit(model, BEFORE, 12)
    contract.assert_same_bits(weights, trainable_weights(model))
    if row.second_weights == "average":
        with keras_stab.averaged_weights(model, X):
            contract.assert_same_bits(weights, trainable_weights(model))


@pytest.mark.parametrize(
    "row", contract.parameters([contract.row("ScheduleFree")])
)
def test_best_weights_of_early_stopping(row):
    model = contract.compiled(
        row.build(keras.optimizers.SGD(0.05)),
        contract.classifier(dropout=False),
    )
    best = {}

    def keep(epoch, logs):
        if epoch == 0:
            best["weights"] = model.get_weights()

    stopping = keras.callbacks.EarlyStopping(
        monitor="epoch", mode="min", restore_best_weights=True
    )
    logging = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: logs.update(epoch=epoch)
    )
    keeping = keras.callbacks.LambdaCallback(on_epoch_end=keep)
    fit(model, 0, 3, epochs=4, callbacks=[logging, stopping, keeping])
    contract.assert_same_bits(best["weights"], model.get_weights())
    model.optimizer.learning_rate = 0.0
    start = trainable_weights(model)
    with noticed():
        fit(model, 3, 6)
    contract.assert_same_bits(start, trainable_weights(model))


LENDING = [row for row in REMEMBERING if row.second_weights]


@pytest.mark.parametrize("row", contract.parameters(LENDING))
def test_best_weights_stay_where_a_later_callback_lends_others(row):
    model = contract.compiled(
        row.build(keras.optimizers.SGD(0.05)),
        contract.classifier(dropout=False),
    )
    stopping = keras.callbacks.EarlyStopping(
        monitor="epoch", mode="min", restore_best_weights=True
    )
    logging = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: logs.update(epoch=epoch)
    )
    swapping = (
        keras_stab.AveragedWeights(swap_on_epoch=True)
        if row.second_weights == "average"
        else keras_stab.SwapSlowWeights(swap_on_epoch=True)
    )
    fit(model, 0, 7, epochs=4, callbacks=[logging, stopping, swapping])
    contract.assert_same_bits(stopping.best_weights, model.get_weights())
    model.optimizer.learning_rate = 0.0
    start = trainable_weights(model)
    fit(model, 3, 6)
    contract.assert_same_bits(start, trainable_weights(model))


@ROWS
def test_own_weights_are_no_others(row, tmp_path):
    """After evaluation, saving, loading, and training by other means."""
    model = trained(row)
    path = tmp_path / "model.keras"
    weights_path = tmp_path / "model.weights.h5"
    with silent():
        model.evaluate(X, Y, verbose=0)
        model.save(path)
        model.save_weights(weights_path)
        if row.second_weights:
            with model.optimizer.swap_weights(model):
                model.evaluate(X, Y, verbose=0)
        model.train_on_batch(X[:16], Y[:16])
        model.train_on_batch(X[16:32], Y[16:32])
        fit(model, 0, 2)
        # In the same model: the state belongs to the weights again.
        model.load_weights(weights_path)
        fit(model, BEFORE, 12)
        loaded = keras.models.load_model(path)
        fit(loaded, BEFORE, 12)
    contract.assert_same_bits(contract.state(model), contract.state(loaded))


LOOKAHEAD = contract.row("Lookahead")


def test_weights_put_into_a_loaded_model(tmp_path):
    path = tmp_path / "model.keras"
    trained(LOOKAHEAD).save(path)
    loaded = keras.models.load_model(path)
    put_others(loaded)
    with noticed():
        fit(loaded, BEFORE, 12)


def test_a_batch_after_fit_begins_again_once():
    model = trained(LOOKAHEAD)
    put_others(model)
    with noticed():
        model.train_on_batch(X[:16], Y[:16])
        model.train_on_batch(X[:16], Y[:16])
        fit(model, BEFORE, 12)


def test_no_word_where_nothing_is_remembered():
    """Between two cycles Lookahead goes on from any weights."""
    model = trained(LOOKAHEAD, batches=8)
    put_others(model)
    with silent():
        fit(model, BEFORE, 12)


def test_a_loop_of_ones_own():
    """Of what was trained by other means than `fit` nothing is concluded."""
    model = trained(LOOKAHEAD)
    gradients = [keras.ops.ones(v.shape) for v in model.trainable_variables]
    model.optimizer.apply(gradients, model.trainable_variables)
    with silent():
        fit(model, BEFORE, 12)


def test_a_state_that_is_set_by_hand():
    """Weights and state of another model belong to each other."""
    model, other = trained(LOOKAHEAD), trained(LOOKAHEAD)
    put_others(other)
    other.optimizer.restart()
    fit(other, 0, 2)
    fit(model, 0, 2)
    model.set_weights(other.get_weights())
    model.optimizer.set_weights(other.optimizer.variables)
    with silent():
        fit(model, BEFORE, 12)
        fit(other, BEFORE, 12)
    contract.assert_same_bits(contract.state(model), contract.state(other))


def test_a_nest_begins_again_as_a_whole():
    def build():
        return keras.optimizers.LossScaleOptimizer(
            keras_stab.Lookahead(
                keras_stab.ExtraGradient(keras.optimizers.SGD(0.05))
            )
        )

    model = contract.compiled(
        build(), contract.classifier(dropout=False), auto_scale_loss=False
    )
    fit(model, 0, BEFORE)
    model.optimizer.learning_rate = 0.0
    weights = put_others(model)
    with noticed():
        fit(model, BEFORE, 12)
    contract.assert_same_bits(weights, trainable_weights(model))


def test_restart_needs_the_trained_weights():
    model = trained(contract.row("WeightAveraging"))
    with keras_stab.averaged_weights(model, X):
        with pytest.raises(ValueError, match="outside of `swap_weights`"):
            model.optimizer.restart()


def test_restart_of_a_projected_method():
    """Weights that are put in may lie outside of the set."""
    box = keras_stab.constraints.Box(-0.5, 0.5)
    w = keras.Variable([0.25])
    optimizer = keras_stab.RAPP(0.1, inner_steps=3, proximal=box)
    for _ in range(4):
        optimizer.apply([keras.ops.zeros(1)], [w])
    w.assign([2.0])
    optimizer.restart()
    assert optimizer.updates == 6
    optimizer.apply([keras.ops.zeros(1)], [w])
    assert float(keras.ops.convert_to_numpy(w)[0]) == 0.5


def test_restart_before_build_is_harmless():
    keras_stab.Lookahead("sgd").restart()


def test_restart_reaches_methods_inside():
    inner = keras_stab.Lookahead(keras.optimizers.SGD(0.05))
    model = contract.compiled(
        keras_stab.SAM(inner), contract.classifier(dropout=False)
    )
    fit(model, 0, BEFORE)
    assert inner.stability_metrics()["phase"] == 2
    model.optimizer.restart()
    assert inner.stability_metrics()["phase"] == 0
