"""RecoverFromSpikes: what counts as a spike, and what a skipped step leaves."""

import csv

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import layers
from marks import ON_TORCH
from marks import slow_but_on_torch

import keras_stab
from keras_stab.backend import updates
from keras_stab.numerics import unusual

BATCH, BATCHES, LENGTH = 8, 24, 8
RANDOM = np.random.default_rng(5)
X = RANDOM.normal(size=(BATCHES * BATCH, 6)).astype("float32")
Y = RANDOM.integers(0, 3, len(X))
# Batches that a run must not notice: not finite, and finite but far off.
NAN, HEAVY = 5, 17


def network(optimizer, **arguments):
    keras.utils.set_random_seed(4)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="tanh"),
            layers.BatchNormalization(),
            layers.Dropout(0.2, seed=3),
            layers.Dense(3),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, weighted_metrics=["accuracy"], **arguments)
    return model


def recover(**arguments):
    return keras_stab.RecoverFromSpikes(**{"window": LENGTH, **arguments})


def fit(model, *callbacks, x=X, y=Y, weights=None, **arguments):
    arguments = {"batch_size": BATCH, "shuffle": False, "verbose": 0} | (
        arguments
    )
    return model.fit(
        x,
        y,
        sample_weight=np.ones(len(x), "float32")
        if weights is None
        else weights,
        callbacks=list(callbacks),
        **arguments,
    ).history


def state(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def counts(model):
    return keras.ops.convert_to_numpy(model.spike_watch.counts).tolist()


def with_broken_batches(weight=1e4):
    x, weights = X.copy(), np.ones(len(X), "float32")
    x[NAN * BATCH, 1] = np.nan
    weights[HEAVY * BATCH : (HEAVY + 1) * BATCH] = weight
    return x, weights


def without_them():
    number = np.arange(len(X)) // BATCH
    return np.flatnonzero((number != NAN) & (number != HEAVY))


OPTIMIZERS = {
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "accumulation": lambda: keras.optimizers.SGD(
        0.1, momentum=0.9, gradient_accumulation_steps=3
    ),
    "schedule": lambda: keras.optimizers.AdamW(
        keras_stab.WarmupCosine(0.01, 5, 40), global_clipnorm=1.0
    ),
    "nest": lambda: keras_stab.WeightAveraging(
        keras_stab.Lookahead(keras_stab.SAM(keras_stab.GRAIN("adam", 2)))
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_leaves_no_trace(name):
    x, weights = with_broken_batches()
    model = network(OPTIMIZERS[name]())
    history = fit(model, recover(), x=x, weights=weights)
    wanted = network(OPTIMIZERS[name]())
    keep = without_them()
    expected = fit(wanted, recover(), x=X[keep], y=Y[keep])
    for skipped, never_came in zip(state(model), state(wanted), strict=True):
        np.testing.assert_array_equal(skipped, never_came)
    assert history.pop("spikes/count") == [2]
    assert expected.pop("spikes/count") == [0]
    assert history["loss"] == expected["loss"]
    assert history["accuracy"] == expected["accuracy"]


@slow_but_on_torch
@pytest.mark.parametrize("name", ["Adam", "nest"])
def test_without_reading_a_number(name, monkeypatch):
    """As on an accelerator, where PyTorch takes back what it has assigned."""
    monkeypatch.setattr(updates, "host_views", lambda *arguments: None)
    test_a_skipped_step_leaves_no_trace(name)


@pytest.mark.skipif(ON_TORCH, reason="Keras has it on no PyTorch")
def test_several_steps_at_a_time():
    x, weights = with_broken_batches()
    ends = []
    for steps in (1, 3):
        model = network("adam", steps_per_execution=steps)
        history = fit(model, recover(), x=x, weights=weights, epochs=2)
        ends.append(state(model))
        assert history["spikes/count"] == [2, 2]
    for one, three in zip(*ends, strict=True):
        np.testing.assert_allclose(one, three, rtol=1e-5, atol=1e-6)


def test_a_calm_run_is_the_same_with_it():
    ends = []
    for callbacks in ([], [recover()]):
        model = network(keras.optimizers.SGD(0.1, momentum=0.9))
        fit(model, *callbacks, epochs=2)
        ends.append(state(model))
    assert counts(model)[unusual.SPIKES] == 0
    for old, new in zip(*ends, strict=True):
        # XLA rounds batch-norm statistics otherwise in another program.
        within = 0.0 if ON_TORCH else 1e-6
        np.testing.assert_allclose(old, new, rtol=within, atol=within)


def test_other_callbacks_see_no_trace_either():
    """TerminateOnNaN would end a run at the loss of the skipped batch."""
    x, weights = with_broken_batches()
    losses = []
    seen = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: losses.append(logs["loss"])
    )
    stop = keras.callbacks.TerminateOnNaN()
    fit(network("adam"), recover(), stop, seen, x=x, weights=weights)
    assert len(losses) == BATCHES and np.all(np.isfinite(losses))
    assert losses[NAN] == losses[NAN - 1]


def test_a_loss_scaler_skips_by_itself():
    """What overflows under a scale is no spike, and halves the scale."""
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.01), initial_scale=2.0**127
    )
    model = network(optimizer, auto_scale_loss=False)
    weights = np.full(len(X), 100.0, "float32")
    history = fit(model, recover(threshold=1e3), weights=weights)
    assert float(keras.ops.convert_to_numpy(optimizer.dynamic_scale)) < 2.0**127
    assert history["spikes/count"] == [0]
    # A loss that is not finite is one, and the scale is not to blame.
    scale = float(keras.ops.convert_to_numpy(optimizer.dynamic_scale))
    x, _ = with_broken_batches()
    history = fit(model, recover(threshold=1e3), x=x, weights=weights)
    assert history["spikes/count"] == [1]
    assert scale == float(keras.ops.convert_to_numpy(optimizer.dynamic_scale))


def test_half_precision():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        # Heavier ones overflow, which is for the scaler.
        x, weights = with_broken_batches(300.0)
        optimizer = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.Adam(0.01), initial_scale=4.0
        )
        model = network(optimizer, auto_scale_loss=False)
        history = fit(model, recover(), x=x, weights=weights)
    finally:
        keras.config.set_dtype_policy("float32")
    assert history["spikes/count"] == [2]
    assert all(np.all(np.isfinite(v)) for v in state(model))


def test_the_rate_is_lower_in_a_cool_down():
    """As by a callback that sets the rate of each step, which stays as seen."""
    x, weights = with_broken_batches()
    factor, steps, rate = 0.25, 4, 0.1
    optimizer = keras.optimizers.SGD(rate)
    model = network(optimizer)
    fit(
        model,
        recover(rate_factor=factor, cool_down=steps),
        x=x,
        weights=weights,
    )
    assert float(optimizer.learning_rate) == pytest.approx(rate)
    assert counts(model)[unusual.COOLING] == 0

    class Rates(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            low = NAN <= batch < NAN + steps
            low = low or HEAVY - 1 <= batch < HEAVY - 1 + steps
            if hasattr(self.model, "jax_state_sync"):
                self.model.jax_state_sync()
            self.model.optimizer.learning_rate = rate * (factor if low else 1)

    wanted = network(keras.optimizers.SGD(rate))
    keep = without_them()
    fit(wanted, Rates(), x=X[keep], y=Y[keep])
    for cooled, expected in zip(state(model), state(wanted), strict=True):
        if cooled.shape and cooled.dtype == "float32":
            np.testing.assert_allclose(cooled, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(ON_TORCH, reason="PyTorch traces nothing")
def test_nothing_is_traced_twice():
    traces = []

    def accuracy(y, y_pred):
        traces.append(None)
        return keras.metrics.sparse_categorical_accuracy(y, y_pred)

    model = network("adam")
    model.compile(
        "adam",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[accuracy],
    )
    callback = recover()
    fit(model, callback, epochs=2)
    fit(model, epochs=1)
    known = len(traces)
    for callbacks in ([callback], [], [callback], []):
        fit(model, *callbacks, epochs=2)
    assert len(traces) == known


def test_the_next_fit_is_not_watched():
    x, _ = with_broken_batches()
    model = network("adam")
    callback = recover()
    fit(model, callback, x=x)
    before = counts(model)
    fit(model, x=x)
    assert counts(model) == before
    assert not np.all(np.isfinite(state(model)[0]))
    assert "train_step" not in vars(model)


def test_an_error_ends_the_watch():
    model = network("adam")

    def fail(batch, logs):
        raise KeyError("on purpose")

    failing = keras.callbacks.LambdaCallback(on_train_batch_begin=fail)
    with pytest.raises(KeyError):
        fit(model, recover(), failing)
    assert "train_step" not in vars(model)
    fit(model)


def plain_network():
    """Without dropout, whose seeds Keras does not save."""
    keras.utils.set_random_seed(4)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="tanh"),
            layers.BatchNormalization(),
            layers.Dense(3),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras_stab.IRE("adam"), loss)
    return model


def test_a_model_that_was_watched_saves_and_loads(tmp_path):
    model = plain_network()
    fit(model, recover())
    path = tmp_path / "model.keras"
    model.save(path)
    again = keras.models.load_model(path)
    for old, new in zip(state(model), state(again), strict=True):
        np.testing.assert_array_equal(old, new)


def test_figures_and_files(tmp_path):
    x, weights = with_broken_batches()
    path = tmp_path / "spikes.csv"
    history = fit(
        network("adam"), recover(csv=path), x=x, weights=weights, epochs=2
    )
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [BATCHES, 2 * BATCHES]
    for name in ("count", "loss_limit", "gradient_norm_limit"):
        logged = history[f"spikes/{name}"]
        assert [float(row[f"spikes/{name}"]) for row in rows] == logged
        assert np.all(np.isfinite(logged))


def test_too_many_spikes_end_the_training():
    x, weights = with_broken_batches()
    model = network("adam")
    with pytest.warns(UserWarning, match="more than max_recoveries=1"):
        history = fit(
            model, recover(max_recoveries=1), x=x, weights=weights, epochs=3
        )
    assert len(history["loss"]) == 1


def test_lost_weights_are_told_of():
    model = network("adam")
    fit(model)
    model.layers[0].kernel.assign(np.full((6, 8), np.nan, "float32"))
    with pytest.warns(UserWarning, match="the weights were lost before"):
        fit(model, recover())


class TakesItsGradients(keras.Model):
    def train_step(self, *arguments):
        *rest, data = arguments
        return {"loss": 0.0} if not rest else ({"loss": 0.0}, rest[0])


def test_what_cannot_be_watched_is_refused():
    inputs = keras.Input((6,))
    model = TakesItsGradients(inputs, layers.Dense(3)(inputs))
    model.compile("sgd", "mse")
    with pytest.raises(RuntimeError, match="takes its gradients by itself"):
        model.fit(X, X[:, :3], callbacks=[recover()], verbose=0)
    schedule = OPTIMIZERS["schedule"]()
    with pytest.raises(ValueError, match="LearningRateScheduler"):
        fit(network(schedule), recover(rate_factor=0.5))


@pytest.mark.parametrize(
    "arguments",
    [
        {"action": "repeat"},
        {"threshold": 0.0},
        {"window": 4},
        {"monitor": "accuracy"},
        {"monitor": ()},
        {"rate_factor": 1.5},
        {"cool_down": 0},
        {"max_recoveries": -1},
    ],
)
def test_arguments(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        keras_stab.RecoverFromSpikes(**arguments)


# ---- The rule ---------------------------------------------------------------

NUMBERS = st.floats(-1e3, 1e3, width=32)


@given(
    st.lists(st.tuples(NUMBERS, NUMBERS), min_size=LENGTH, max_size=LENGTH),
    st.tuples(*[st.floats(width=32)] * 2),
    st.integers(0, 3 * LENGTH),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_numpy_and_the_backend_judge_alike(window, values, kept, scaled):
    """NumPy is what runs on a processor with PyTorch."""
    rule = unusual.Rule(3.0, (True, True), 0.5, 7)
    window, values = np.array(window, "float32"), np.array(values, "float32")
    state = np.array([kept, kept, 1, 2, 0], "int32")
    needed = (True, not scaled)
    with np.errstate(all="ignore"):
        wanted = unusual.judge(np, window, state, values, needed, rule)
    found = unusual.judge(
        keras.ops,
        *map(keras.ops.convert_to_tensor, (window, state, values)),
        needed,
        rule,
    )
    for ours, theirs in zip(found, wanted):
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(ours), theirs, rtol=1e-6
        )


@given(
    st.lists(NUMBERS, min_size=32, max_size=32),
    st.lists(st.floats(1e3, 1e30), min_size=7, max_size=7),
    st.permutations(range(32)),
)
@settings(max_examples=60, deadline=None)
def test_spikes_move_the_limit_little(values, spikes, order):
    """Fewer than a quarter of spikes: no higher than usual values reach."""
    usual = np.array(values, "float32")
    mixed = usual.copy()
    mixed[order[:7]] = spikes
    columns = np.stack([mixed, mixed], axis=1)
    limits = unusual.usual_limits(np, columns[order], 3.0)
    low, high = float(usual.min()), float(usual.max())
    spread = 1.4826 * (high - low)
    floor = 0.05 * max(abs(low), abs(high), 1.0)
    assert np.all(limits <= high + 3.0 * max(spread, floor) + 1e-2)
    assert np.all(limits >= low)


def test_normal_values_have_the_limit_of_their_deviation():
    draws = np.random.default_rng(0).normal(5.0, 2.0, size=(4001, 2))
    limits = unusual.usual_limits(np, draws, 4.0)
    np.testing.assert_allclose(limits, 5.0 + 4.0 * 2.0, rtol=0.05)


def test_a_new_level_is_usual_after_half_a_window():
    rule = unusual.Rule(10.0, (True, True), 1.0, 0)
    window = np.zeros((LENGTH, 2), "float32")
    counts = np.zeros(5, "int32")
    usual = []
    for level in [1.0] * LENGTH + [3.0] * LENGTH:
        found = unusual.judge(
            np, window, counts, np.float32([level, 0.0]), (True, True), rule
        )
        window[found.place], counts = found.row, found.counts
        usual.append(bool(found.usual))
    assert all(usual[:LENGTH])
    assert usual[LENGTH:] == [False] * (LENGTH // 2) + [True] * (LENGTH // 2)
