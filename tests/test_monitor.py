"""StabilityMonitor: its figures, where they go, and what it leaves alone."""

import csv
import math
import sys
import types

import keras
import numpy as np
import pytest
from keras import layers

import keras_stab
from keras_stab.diagnostics.monitoring.gradient_probe import GradientProbe
from keras_stab.diagnostics.monitoring.method_figures import method_figures
from keras_stab.diagnostics.monitoring.outputs import CsvRows

RANDOM = np.random.default_rng(2)
X = RANDOM.normal(size=(30, 4)).astype("float32")
Y = RANDOM.integers(0, 3, 30)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def network(optimizer):
    keras.utils.set_random_seed(4)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(5, activation="relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.Dense(3),
        ]
    )
    model.compile(optimizer, LOSS)
    return model


def fit(model, *callbacks, **arguments):
    arguments = {"batch_size": 6, "epochs": 2, "verbose": 0, **arguments}
    history = model.fit(X, Y, callbacks=list(callbacks), **arguments)
    return history.history


def state(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def test_a_plain_optimizer_is_probed_and_trains_the_same():
    """Batch-norm, dropout, momentum, a shuffled order: not one bit differs."""
    ends, histories = [], []
    for probed in (False, True):
        model = network(keras.optimizers.SGD(0.1, momentum=0.9))
        monitor = keras_stab.StabilityMonitor(
            every=2, probe=(X, Y), groups=3, batch_size=15
        )
        histories.append(fit(model, *[monitor] * probed))
        ends.append(state(model))
    for old, new in zip(*ends, strict=True):
        np.testing.assert_array_equal(old, new)
    assert histories[0]["loss"] == histories[1]["loss"]
    # 5 batches an epoch; the last of them ends with it.
    steps = [(s["epoch"], s["step"]) for s in monitor.samples]
    assert steps == [(0, 2), (0, 4), (1, 6), (1, 8), (1, 10)]
    for key in ("conflict_rate", "norm_ratio", "weight_entropy", "residual"):
        own = [s[f"probe/{key}"] for s in monitor.samples]
        epochs = [np.mean(own[:2]), np.mean(own[2:])]
        assert histories[1][f"probe/{key}"] == pytest.approx(epochs)
    for sample in monitor.samples:
        assert 0.0 < sample["probe/weight_entropy"] <= math.log(3) + 1e-6
        assert 0.0 < sample["probe/norm_ratio"] <= 1.0
    noise, size = (
        histories[1][f"probe/{key}"]
        for key in ("gradient_noise", "gradient_norm_squared")
    )
    for n, s, scale in zip(noise, size, histories[1]["probe/noise_scale"]):
        assert scale == pytest.approx(n / s) if s > 0 else math.isnan(scale)


def test_nested_methods_tell_what_they_know(tmp_path):
    path = tmp_path / "figures.csv"
    optimizer = keras_stab.WeightAveraging(
        keras_stab.GRAIN(
            keras_stab.LARS(0.5, track_trust_ratios=True), groups=2
        )
    )
    model = network(optimizer)
    monitor = keras_stab.StabilityMonitor(csv=path)
    history = fit(model, monitor)
    sample = monitor.samples[-1]
    assert [s["step"] for s in monitor.samples] == [5, 10]
    # GRAIN, by its own diagnostics.
    grain = optimizer.inner_optimizer
    figures = grain.diagnostics()
    weights = figures.pop("weights")
    for key, value in figures.items():
        assert sample[f"grain/{key}"] == value
        assert history[f"grain/{key}"][-1] == value
    assert [sample[f"grain/weights/{k}"] for k in range(2)] == weights
    entropy = -sum(w * math.log(w) for w in weights if w > 0)
    assert sample["grain/weight_entropy"] == pytest.approx(entropy)
    assert "grain/weights/0" not in history
    # LARS: the two kernels are adapted.
    ratios = {
        path: float(ratio)
        for path, ratio in grain.inner_optimizer.trust_ratios().items()
    }
    assert len(ratios) == 2
    for name, ratio in ratios.items():
        assert sample[f"lars/trust_ratios/{name}"] == pytest.approx(ratio)
    largest = history["lars/largest_trust_ratio"][-1]
    assert largest == pytest.approx(max(ratios.values()))
    # The average, and what `fit` has set aside for it.
    keras_stab.return_trained_weights(model)
    own = [v.numpy().ravel() for v in model.trainable_variables]
    averages = [v.numpy().ravel() for v in optimizer.averages]
    own, averages = np.concatenate(own), np.concatenate(averages)
    distance = np.linalg.norm(own - averages) / np.linalg.norm(own)
    assert sample["weightaveraging/distance"] == pytest.approx(
        distance, rel=1e-4
    )
    with keras_stab.averaged_weights(model, X):
        lent = optimizer.stability_metrics()["distance"]
        assert float(lent) == pytest.approx(distance, rel=1e-4)
    # The file holds the same.
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for name, value in sample.items():
        assert float(rows[-1][name]) == pytest.approx(value, nan_ok=True)


def test_flat_masks_and_what_an_optimizer_of_ones_own_tells():
    class Own(keras.optimizers.SGD):
        def stability_metrics(self):
            return {
                "rate": self.learning_rate,
                "halves": {"all": keras.ops.ones(()) / 2},
            }

    optimizer = keras_stab.IRE(
        keras.optimizers.Adam(0.01),
        curvature="second_moment",
        update_every=1,
    )
    model = network(optimizer)
    assert "figures before" in str(
        pytest.raises(ValueError, optimizer.stability_metrics).value
    )
    monitor = keras_stab.StabilityMonitor(every=4)
    history = fit(model, monitor, steps_per_epoch=5, epochs=2)
    figures = optimizer.diagnostics()
    assert [s["step"] for s in monitor.samples] == [4, 8]
    assert all(0 <= s["ire/mask_churn"] < 1 for s in monitor.samples)
    assert history["ire/flat_fraction"] == [figures["flat_fraction"]] * 2
    metrics = optimizer.stability_metrics()
    churn = 1.0 - figures["sharp_overlap"]
    assert metrics["mask_churn"] == pytest.approx(churn)
    several = keras.optimizers.SGD(0.1)
    several.optimizers = [Own(0.25), Own(0.5)]
    assert method_figures(several) == {
        "own/rate": 0.25,
        "own/halves/all": 0.5,
        "own_1/rate": 0.5,
        "own_1/halves/all": 0.5,
    }


TWO_SETS = {
    "lookahead": keras_stab.Lookahead(keras.optimizers.SGD(1.0), 2),
    "rapp": keras_stab.RAPP(1.0, inner_steps=2, track_diagnostics=True),
    "extragradient": keras_stab.ExtraGradient(keras.optimizers.SGD(1.0)),
}


@pytest.mark.parametrize("name", TWO_SETS)
def test_methods_with_anchors_tell_how_far_they_are(name):
    optimizer = TWO_SETS[name]
    nothing = {"distance": 0.0, "phase": 0.0}
    if name != "rapp":
        found = method_figures(optimizer)
        assert found == {f"{name}/{key}": v for key, v in nothing.items()}
    w = keras.Variable([3.0, 4.0])
    optimizer.apply([keras.ops.convert_to_tensor([-3.0, -4.0])], [w])
    found = method_figures(optimizer)
    assert found[f"{name}/distance"] == pytest.approx(0.5)  # from 5 to 10
    assert found[f"{name}/phase"] == 1
    if name == "rapp":
        assert found["rapp/residual"] == pytest.approx(5.0)
    optimizer.apply([keras.ops.convert_to_tensor([-3.0, -4.0])], [w])
    found = method_figures(optimizer)
    assert found[f"{name}/distance"] == found[f"{name}/phase"] == 0


def test_noise_scale_of_simulated_gradients():
    """Row i has the gradient x_i: every figure is known."""
    random = np.random.default_rng(0)
    mean = np.array([0.5, 0.0, -1.0, 0.2, 0.1], "float32")
    deviation = np.array([1.0, 3.0, 2.0, 1.0, 0.5], "float32")
    rows = mean + deviation * random.normal(size=(4096, 5)).astype("float32")
    model = keras.Sequential(
        [keras.Input((5,)), layers.Dense(1, use_bias=False)]
    )
    model.compile("sgd", lambda y, y_pred: keras.ops.mean(y_pred, axis=-1))
    data = (rows, np.zeros((4096, 1), "float32"))
    found = GradientProbe(model, data, groups=8, batch_size=64).measure()
    trace = np.square(deviation).sum()
    assert found["gradient_noise"] == pytest.approx(trace, rel=0.1)
    norm = np.square(mean).sum()
    assert found["gradient_norm_squared"] == pytest.approx(norm, rel=0.1)
    # Exactly, from the means of the groups: row i is in group i mod 8.
    groups = rows.reshape(64, 8, 8, 5).mean(axis=1)
    whole = groups.mean(axis=1, keepdims=True)
    spread = np.square(groups - whole).sum(axis=(1, 2)) / 7
    assert found["gradient_noise"] == pytest.approx(8 * spread.mean(), rel=1e-3)
    conflicts = (groups @ whole.transpose(0, 2, 1) < 0).mean()
    assert found["conflict_rate"] == pytest.approx(conflicts, abs=1e-6)
    # Without any noise.
    data = (np.repeat(rows[:1], 64, axis=0), data[1][:64])
    found = GradientProbe(model, data, groups=8, batch_size=64).measure()
    assert found["gradient_noise"] == pytest.approx(0.0, abs=1e-3)
    assert found["conflict_rate"] == 0.0
    assert found["norm_ratio"] == pytest.approx(1.0, rel=1e-4)


# ---- Outputs --------------------------------------------------------------


def test_a_new_column_of_a_csv_file(tmp_path):
    path = tmp_path / "figures.csv"
    path.write_text("of an earlier run\n")
    rows = CsvRows(path)
    rows.write({"step": 1, "a": 0.5})
    rows.write({"step": 2, "a": 0.25})
    rows.write({"step": 3, "b/c": 2.0})
    rows.write({"step": 4, "a": 1.0, "b/c": 3.0})
    lines = path.read_text().split()
    assert lines == ["step,a,b/c", "1,0.5,", "2,0.25,", "3,,2.0", "4,1.0,3.0"]


def test_tensorboard(tmp_path, monkeypatch):
    """By a stand-in for the writer of the package `tensorboard`."""
    seen = []

    class Writer:
        def __init__(self, folder):
            seen.append(folder)

        def add_scalar(self, tag, data, step):
            seen.append((tag, data, step))

        def flush(self):
            seen.append("flush")

    module = types.ModuleType("tensorboard.summary")
    module.Writer = Writer
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("x"))
    monkeypatch.setitem(sys.modules, "tensorboard.summary", module)
    stock = keras.callbacks.TensorBoard(str(tmp_path))
    monitor = keras_stab.StabilityMonitor(tensorboard=stock)
    sample = {"step": 3, "epoch": 0, "grain/conflict_rate": 0.5}
    for output in monitor._outputs:
        output.write(sample)
    assert seen == [
        str(tmp_path / "train"),
        ("grain/conflict_rate", 0.5, 3),
        "flush",
    ]
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    with pytest.raises(ImportError, match=r"needs tensorboard.*\[diagnostics"):
        keras_stab.StabilityMonitor(tensorboard=tmp_path)


# ---- Bad input ------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"every": 0}, '`every` must be "epoch" or an integer'),
        ({"every": "batch"}, '`every` must be "epoch" or an integer'),
        ({"groups": 1}, "`groups` must be an integer from 2 to 64"),
        ({"groups": 65}, "`groups` must be an integer from 2 to 64"),
        ({"batch_size": 0}, "`batch_size` must be an integer"),
        ({"csv": "no/such/folder/a.csv"}, "in a folder that exists"),
        ({"csv": "."}, "the path of a file"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        keras_stab.StabilityMonitor(**arguments)


def test_a_shuffled_probe_leaves_the_training_as_it_is():
    import torch

    ends = []
    for probed in (False, True):
        model = network("sgd")  # has dropout
        pairs = list(zip(X, Y))
        probe = torch.utils.data.DataLoader(pairs, 10, shuffle=True)
        monitor = keras_stab.StabilityMonitor(every=2, probe=probe, groups=2)
        torch.manual_seed(3)
        fit(model, *[monitor] * probed)
        ends.append(state(model))
    for old, new in zip(*ends, strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("probe", [X, [X[:6], X[6:]], {"x": X}])
def test_a_probe_without_targets(probe):
    """It is noticed before anything is trained."""
    model = network("sgd")
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"pass probe=\(x, y\)") as error:
        fit(model, keras_stab.StabilityMonitor(probe=probe))
    assert type(probe).__name__ in str(error.value)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_loss_of_the_model_needs_no_targets():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(1)

        def call(self, x):
            return self.dense(x)

        def compute_loss(self, x, y, y_pred, sample_weight, training=True):
            return keras.ops.mean(keras.ops.square(y_pred))

    model = Own()
    model.compile("sgd", run_eagerly=True)
    monitor = keras_stab.StabilityMonitor(probe=X, groups=2)
    model.fit(X, verbose=0, callbacks=[monitor])
    assert 0.0 < monitor.samples[0]["probe/norm_ratio"] <= 1.0
    found = keras_stab.sharpness(model, X, measures="sam", verbose=0)
    assert found.loss > 0.0


def test_nothing_to_look_at():
    model = network("sgd")
    with pytest.raises(ValueError, match="pass StabilityMonitor"):
        fit(model, keras_stab.StabilityMonitor())
    with pytest.raises(ValueError, match="`probe` holds no batches"):
        fit(model, keras_stab.StabilityMonitor(probe=[]))
    model = network(keras_stab.LARS(0.1))
    model.optimizer.build(model.trainable_variables)
    monitor = keras_stab.StabilityMonitor()
    monitor.set_model(model)
    monitor.set_params({"steps": 5})
    monitor.on_train_begin()
    monitor.on_epoch_begin(0)
    with pytest.raises(ValueError, match="track_trust_ratios=True"):
        monitor.on_epoch_end(0)


def test_nothing_is_read_between_samples():
    """Keras reads the loss after each batch for those who ask to see it."""
    stock = keras.callbacks.Callback
    for name in ("on_train_batch_end", "on_batch_end"):
        assert getattr(keras_stab.StabilityMonitor, name) is getattr(
            stock, name
        )

    class Asked(keras.optimizers.SGD):
        times = 0

        def stability_metrics(self):
            Asked.times += 1
            return {"times": Asked.times}

    monitor = keras_stab.StabilityMonitor(every=3)
    monitor.set_model(network(Asked(0.1)))
    monitor.set_params({"steps": 10})
    monitor.on_train_begin()
    monitor.on_epoch_begin(0)
    for batch in range(10):
        monitor.on_train_batch_begin(batch)
        monitor.on_train_batch_end(batch)
    logs = {}
    monitor.on_epoch_end(0, logs)
    assert [s["step"] for s in monitor.samples] == [3, 6, 9]
    assert Asked.times == 3 and logs == {"asked/times": 2.0}
