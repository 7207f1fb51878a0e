"""GRAIN itself: vectors, theorems, groups across batches, bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import contract
import keras
import numpy as np
import pytest
import reference
from marks import ON_TORCH
from workers import twenty_steps

import keras_stab
from keras_stab.gradients.oracle import GradientOracle

HERE = Path(__file__).parent
VECTORS = json.loads((HERE / "vectors" / "grain.json").read_text())
LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

pytestmark = pytest.mark.usefixtures("quick_compilation")


# ---- Vectors --------------------------------------------------------------


def vector_model(case):
    parameters = case["parameters"]
    penalty = case["l2_on_kernel_1"]
    layers = [
        keras.layers.Dense(
            len(parameters["bias_1"]),
            activation="tanh",
            kernel_regularizer=keras.regularizers.L2(penalty)
            if penalty
            else None,
        ),
        keras.layers.Dense(len(parameters["bias_2"])),
    ]
    if "ids" in case:
        x = np.array(case["ids"], "int32")
        table = np.array(parameters["embedding"])
        first = [
            keras.Input(x.shape[1:], dtype="int32"),
            keras.layers.Embedding(*table.shape),
            keras.layers.GlobalAveragePooling1D(),
        ]
    else:
        x = np.array(case["x"], "float32")
        first = [keras.Input(x.shape[1:])]
    model = keras.Sequential(first + layers)
    model.set_weights([np.array(v) for v in parameters.values()])
    return model, x


@pytest.mark.parametrize(
    "case", VECTORS["model_steps"], ids=lambda case: case["id"]
)
@pytest.mark.parametrize("run_eagerly", [False] if ON_TORCH else [False, True])
def test_model_steps(case, run_eagerly):
    model, x = vector_model(case)
    optimizer = keras_stab.GRAIN(
        keras.optimizers.SGD(case["sgd_learning_rate"]), groups=case["groups"]
    )
    model.compile(optimizer, LOGITS, run_eagerly=run_eagerly)
    loss = model.train_on_batch(
        x,
        np.array(case["y"]),
        sample_weight=np.array(case["sample_weight"], "float32")
        if "sample_weight" in case
        else None,
    )
    tolerance = case["tolerance"]
    assert loss == pytest.approx(case["logged_loss"], abs=1e-5)
    for actual, wanted in zip(
        model.get_weights(), case["parameters_after"].values()
    ):
        np.testing.assert_allclose(
            actual, wanted, atol=tolerance["parameters_after"]
        )
    figures = optimizer.diagnostics()
    np.testing.assert_allclose(
        figures["weights"], case["weights"], atol=tolerance["weights"]
    )
    assert abs(figures["residual"]) <= 1e-6
    assert figures["excluded"] == len(case["excluded"])


class Quadratics(keras.Model):
    """Row k carries the loss `(x - c_k)' H_k (x - c_k) / 2`."""

    def __init__(self, case):
        super().__init__()
        self.point = self.add_weight(
            shape=(len(case["start"]),), initializer="zeros", name="point"
        )
        self.point.assign(case["start"])
        self.centres = np.array(case["centres"], "float32")
        self.hessians = np.array(case["hessians"], "float32")

    def call(self, index):
        index = keras.ops.cast(index[:, 0], "int32")
        centres = keras.ops.take(self.centres, index, axis=0)
        hessians = keras.ops.take(self.hessians, index, axis=0)
        offset = self.point - centres
        return 0.5 * keras.ops.einsum("ki,kij,kj->k", offset, hessians, offset)

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        return keras.ops.mean(y_pred)

    def losses_at_point(self):
        """In float64: of losses near 80, float32 keeps only 1e-5."""
        offset = np.array(self.point, "float64") - self.centres
        return 0.5 * np.einsum("ki,kij,kj->k", offset, self.hessians, offset)


def base_optimizer(case):
    rate = case["learning_rate"]
    if case["base_optimizer"] == "adamw":
        return keras.optimizers.AdamW(rate, **case["base_hyperparameters"])
    return keras.optimizers.SGD(rate, **case["base_hyperparameters"])


# From this step on, where weights are solved for in float32; at the one before,
# a group is all but out of the hull, and the last bit of the Gram matrix says
# whether 5e-5 of its gradient (norm 18, rate 1/8) is left in the step: 1e-4.
WEAKLY_ACTIVE = {} if ON_TORCH else {"five_quadratics_sgd": (10, 2e-4)}


@pytest.mark.parametrize(
    "case", VECTORS["trajectories"], ids=lambda case: case["id"]
)
def test_trajectories(case):
    model = Quadratics(case)
    groups = len(case["centres"])
    optimizer = keras_stab.GRAIN(base_optimizer(case), groups=groups)
    model.compile(optimizer)
    rows = np.arange(groups, dtype="float32")[:, None]
    step = 0
    first, least = WEAKLY_ACTIVE.get(case["id"], (0, 0.0))
    for row in case["trajectory"]:
        if row["step"] > step:
            count = row["step"] - step
            model.fit(
                np.tile(rows, (count, 1)),
                batch_size=groups,
                shuffle=False,
                verbose=0,
            )
            step = row["step"]
        np.testing.assert_allclose(
            np.array(model.point),
            row["point"],
            atol=max(row["tolerance"], least if step >= first else 0.0),
        )


def test_every_group_descends():
    """L_k falls by (rate / 2) |d|^2 or more if rate <= 1 / smoothness."""
    case = next(
        c for c in VECTORS["trajectories"] if c["id"] == "five_quadratics_sgd"
    )
    smoothness = max(np.linalg.eigvalsh(h)[-1] for h in case["hessians"])
    rate = 0.9 / smoothness
    groups = len(case["centres"])
    rows = np.arange(groups, dtype="float32")[:, None]

    def smallest_margin(optimizer):
        model = Quadratics(case)
        model.compile(optimizer)
        margins = []
        for _ in range(40):
            before = model.losses_at_point()
            start = np.array(model.point, "float64")
            model.train_on_batch(rows)
            direction = (start - np.array(model.point)) / rate
            descent = before - model.losses_at_point()
            least = rate / 2 * direction @ direction
            margins.append(np.min((descent - least) / before))
        return min(margins)

    grain = keras_stab.GRAIN(keras.optimizers.SGD(rate), groups=groups)
    assert smallest_margin(grain) >= -1e-6
    assert smallest_margin(keras.optimizers.SGD(rate)) < -1e-3


# ---- Theorems on a network ------------------------------------------------


def group_and_combined_gradients(model, x, y, groups):
    """What the oracle answers, outside of a train step."""
    x = keras.ops.convert_to_tensor(x)
    y = keras.ops.convert_to_tensor(y)
    oracle = GradientOracle(model, x, y)
    answer = oracle.group_gradients(groups)
    gram = answer.gram()
    weights = keras_stab.min_norm_weights(gram).weights
    direction = answer.combine(weights)
    singles = []
    for k in range(groups):
        one = np.eye(groups, dtype="float32")[k]
        singles.append(answer.combine(keras.ops.convert_to_tensor(one)))

    def arrays(gradients):
        return [keras.ops.convert_to_numpy(g) for g in gradients]

    return (
        arrays(direction),
        [arrays(single) for single in singles],
        keras.ops.convert_to_numpy(gram),
    )


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_no_group_is_in_conflict(groups):
    x, y = contract.data(4)
    model = contract.compiled(keras_stab.GRAIN("sgd", groups=groups))
    contract.fit(model, x, y, batch_size=32)
    direction, singles, gram = group_and_combined_gradients(
        model, x[:32], y[:32], groups
    )
    reference.assert_no_conflict(direction, singles)
    reference.assert_shorter_than_mean(direction, singles)
    flat = [np.concatenate([g.ravel() for g in s]) for s in singles]
    expected = [[a @ b for b in flat] for a in flat]
    np.testing.assert_allclose(gram, expected, rtol=1e-4, atol=1e-6)


def test_the_assertion_can_fail():
    """Conflicting groups: their mean does not pass for a min-norm point."""
    singles = [[np.array([1.0, 0.0])], [np.array([-4.0, 3.0])]]
    mean = [np.array([-1.5, 1.5])]
    with pytest.raises(AssertionError):
        reference.assert_no_conflict(mean, singles)


def test_equal_groups_give_the_inner_trajectory():
    x, y = contract.data(6)
    # Every row four times in a row: the groups of a batch are equal.
    x, y = np.repeat(x, 4, axis=0), np.repeat(y, 4, axis=0)
    results = []
    for optimizer in ("sgd", keras_stab.GRAIN("sgd", groups=4)):
        keras.utils.set_random_seed(3)
        model = keras.Sequential(
            [
                keras.Input((contract.FEATURES,)),
                keras.layers.Dense(8, activation="tanh"),
                keras.layers.Dense(3),
            ]
        )
        contract.compiled(optimizer, model)
        contract.fit(model, x, y, batch_size=64)
        results.append(model.get_weights())
    for a, b in zip(*results):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_loss_scale_changes_nothing():
    x, y = contract.data(4)
    figures = []
    for factor in (None, 2.0**15):
        inner = keras.optimizers.SGD(0.1, loss_scale_factor=factor)
        optimizer = keras_stab.GRAIN(inner, groups=4)
        contract.fit(contract.compiled(optimizer), x, y)
        figures.append(optimizer.diagnostics())
    np.testing.assert_allclose(
        figures[0]["weights"], figures[1]["weights"], atol=1e-5
    )
    assert figures[0]["gradient_noise"] == pytest.approx(
        figures[1]["gradient_noise"], rel=1e-4
    )


# ---- Across batches -------------------------------------------------------


def plain_network():
    keras.utils.set_random_seed(5)
    return keras.Sequential(
        [
            keras.Input((contract.FEATURES,)),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dense(3),
        ]
    )


def test_batches_are_the_groups_of_the_joined_batch():
    x, y = contract.data(12)
    apart = keras_stab.GRAIN(
        keras.optimizers.AdamW(0.01), groups=4, across="batches"
    )
    model = contract.compiled(apart, plain_network())
    contract.fit(model, x, y)
    together = keras_stab.GRAIN(keras.optimizers.AdamW(0.01), groups=4)
    joined = contract.compiled(together, plain_network())
    rows = contract.BATCH

    def interleaved(a):
        windows = a.reshape(-1, 4, rows, *a.shape[1:])
        return np.swapaxes(windows, 1, 2).reshape(a.shape)

    contract.fit(joined, interleaved(x), interleaved(y), batch_size=4 * rows)
    for a, b in zip(model.get_weights(), joined.get_weights()):
        np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_allclose(
        apart.diagnostics()["weights"],
        together.diagnostics()["weights"],
        atol=1e-4,
    )
    assert np.isnan(apart.diagnostics()["gradient_noise"])


def test_batches_in_a_custom_loop():
    """Only `apply`: no model, no train step."""
    vectors = np.array([[1.0, 2, 0], [2, -1, 1], [-1, 1, 3]])
    point = keras.Variable(np.zeros(3), dtype="float32")
    optimizer = keras_stab.GRAIN(
        keras.optimizers.SGD(1.0), groups=3, across="batches"
    )
    optimizer.build([point])
    for _ in range(2):
        for vector in vectors:
            optimizer.apply([keras.ops.convert_to_tensor(vector, "float32")])
    expected = -2 * np.array([24, 15, 21]) / 23
    np.testing.assert_allclose(np.array(point), expected, atol=1e-5)
    assert int(optimizer.iterations) == 2
    # A missing gradient leaves its variable alone.
    with pytest.raises(ValueError, match="No gradients"):
        for _ in range(3):
            optimizer.apply([None])


def test_a_bad_batch_is_replaced_by_the_next():
    vectors = np.array([[3.0, 0], [np.nan, 1], [0, 4]])
    point = keras.Variable(np.zeros(2), dtype="float32")
    optimizer = keras_stab.GRAIN(
        keras.optimizers.SGD(1.0), groups=2, across="batches"
    )
    optimizer.build([point])
    for vector in vectors:
        optimizer.apply([keras.ops.convert_to_tensor(vector, "float32")])
    np.testing.assert_allclose(np.array(point), [-1.92, -1.44], atol=1e-5)
    for variable in optimizer.variables[2:]:
        assert np.all(np.isfinite(keras.ops.convert_to_numpy(variable)))


def test_skipped_batches_are_counted():
    """Per window, at once, and zero again in a window without any."""
    point = keras.Variable(np.zeros(2), dtype="float32")
    optimizer = keras_stab.GRAIN(
        keras.optimizers.SGD(1.0), groups=2, across="batches"
    )
    optimizer.build([point])
    good, bad = [3.0, 1.0], [np.nan, 1.0]
    counts = []
    for vector in (bad, good, bad, bad, good, good, good, bad, good, good):
        optimizer.apply([keras.ops.convert_to_tensor(vector, "float32")])
        counts.append(optimizer.diagnostics()["nonfinite"])
    assert counts == [1, 1, 2, 3, 3, 3, 0, 1, 1, 1]
    assert int(optimizer.iterations) == 3


# ---- Backends -------------------------------------------------------------


def test_backends_agree():
    """Each backend's suite compares with the next: all three, pairwise."""
    ring = ["tensorflow", "jax", "torch"]
    other = ring[(ring.index(keras.backend.backend()) + 1) % 3]
    done = subprocess.run(
        [sys.executable, twenty_steps.__file__],
        env=os.environ | {"KERAS_BACKEND": other},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours = twenty_steps.answers()
    for across in ("none", "batches"):
        for a, b in zip(ours[across], theirs[across]):
            np.testing.assert_allclose(a, b, atol=1e-5)


# ---- Bad input ------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"groups": 0}, "groups"),
        ({"groups": 65}, "1 to 64"),
        ({"groups": 2.0}, "integer"),
        ({"groups": True}, "integer"),
        ({"groups": "4"}, "integer"),
        ({"engine": "fast"}, "engine"),
        ({"across": "epochs"}, "across"),
        ({"zero_groups": "keep"}, "zero_groups"),
        ({"grouping": "rows"}, "grouping"),
        (
            {"across": "replicas", "grouping": "interleaved"},
            'leave `grouping` out, or use "contiguous"',
        ),
        ({"across": "batches", "grouping": "contiguous"}, "nothing is split"),
        ({"across": "batches", "engine": "microbatch"}, "engine"),
        ({"learning_rate": 0.1}, "AdamW\\(learning_rate=0.1\\)"),
        ({"clipnorm": 1.0}, "inner"),
        ({"group": 4}, "did you mean `groups`"),
        (
            {"nothing_like_it": 4},
            "it has `across`, `engine`, `grouping`, `groups`",
        ),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        keras_stab.GRAIN("adamw", **arguments)


def test_an_unknown_inner_optimizer():
    with pytest.raises(ValueError):
        keras_stab.GRAIN("no_such_optimizer")


def test_accumulation_below_batches():
    inner = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        keras_stab.GRAIN(inner, across="batches")


def test_a_gradient_method_inside():
    with pytest.raises(ValueError, match="inside the other method"):
        keras_stab.GRAIN(keras_stab.GRAIN("sgd"))


def test_clipping_after_grain_warns():
    for clipping in ("clipnorm", "clipvalue"):
        with pytest.warns(UserWarning, match=clipping):
            keras_stab.GRAIN(keras.optimizers.SGD(0.1, **{clipping: 1.0}))


def test_an_inner_optimizer_of_another_model():
    x, y = contract.data(2)
    inner = keras.optimizers.SGD(0.1)
    contract.fit(contract.compiled(inner), x, y)
    with pytest.raises(ValueError, match="other variables"):
        model = contract.compiled(keras_stab.GRAIN(inner))
        model.optimizer.build(model.trainable_variables)


def test_an_inner_optimizer_goes_on_with_its_own_state():
    x, y = contract.data(4)
    inner = keras.optimizers.AdamW(0.01)
    model = contract.compiled(inner)
    contract.fit(model, x, y)
    contract.compiled(keras_stab.GRAIN(inner), model)
    contract.fit(model, x, y)
    assert int(inner.iterations) == 8


def test_an_optimizer_of_another_model():
    x, y = contract.data(2)
    optimizer = keras_stab.GRAIN("sgd")
    contract.fit(contract.compiled(optimizer), x, y)
    with pytest.raises(ValueError, match="Unknown variable"):
        contract.fit(contract.compiled(optimizer), x, y)


def test_plain_gradients():
    point = keras.Variable(np.zeros(3))
    optimizer = keras_stab.GRAIN("sgd")
    with pytest.raises(RuntimeError, match='across="batches"'):
        optimizer.apply([keras.ops.ones(3)], [point])
    np.testing.assert_array_equal(np.array(point), 0.0)


def test_diagnostics_before_the_first_step():
    with pytest.raises(ValueError, match="before the first step"):
        keras_stab.GRAIN("sgd").diagnostics()


def test_a_saved_state_that_does_not_fit(tmp_path):
    x, y = contract.data(2)
    path = str(tmp_path / "m.weights.h5")
    model = contract.compiled(keras_stab.GRAIN("sgd", groups=4))
    contract.fit(model, x, y)
    model.save_weights(path)
    other = contract.compiled(keras_stab.GRAIN("sgd", groups=8))
    other.optimizer.build(other.trainable_variables)
    with pytest.raises(ValueError, match="does not fit"):
        other.load_weights(path)
