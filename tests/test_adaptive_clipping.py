"""AdaptiveClipping: the vectors, the history, precision, nests, refusals."""

import json
from contextlib import nullcontext
from pathlib import Path

import contract
import keras
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies
from interpolation_cases import float64
from marks import quick
from marks import slow_but_on_torch

import keras_stab
from keras_stab.backend import updates
from keras_stab.numerics import clipping

VECTORS = json.loads(
    (Path(__file__).parent / "vectors" / "clipping.json").read_text()
)
PROBLEM = VECTORS["problem"]
FLOAT32 = "float32".__eq__
CASES = pytest.mark.parametrize("name", VECTORS["cases"])


def clip(optimizer, gradients, variables):
    gradients = [
        None if g is None else keras.ops.convert_to_tensor(g, v.dtype)
        for g, v in zip(gradients, variables)
    ]
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer.apply(gradients, variables)
        return
    # On JAX it has a stateless form alone.
    updates.apply_gradients(optimizer, gradients, variables)


def variables_of(values, dtype="float32"):
    return [
        keras.Variable(np.array(value, "float64"), dtype=dtype, name=name)
        for name, value in values.items()
    ]


def numbers(variable):
    return np.array(keras.ops.convert_to_numpy(variable), "float64")


@CASES
@pytest.mark.parametrize("dtype", quick(["float32", "float64"], FLOAT32))
def test_twenty_steps_are_those_of_the_authors(name, dtype):
    # AutoClip's code shrinks what it does not clip by one in a million.
    tolerance = {"float32": 3e-6, "float64": 1e-6}[dtype]
    case = VECTORS["cases"][name]
    with float64() if dtype == "float64" else nullcontext():
        variables = variables_of(PROBLEM["init"], dtype)
        optimizer = keras_stab.AdaptiveClipping(
            keras.optimizers.SGD(PROBLEM["rate"]), **case["settings"]
        )
        for step, gradients in enumerate(PROBLEM["grads"], start=1):
            clip(optimizer, gradients.values(), variables)
            wanted = case["params_after_step"].get(str(step), {})
            for variable in variables if wanted else []:
                np.testing.assert_allclose(
                    numbers(variable),
                    wanted[variable.name],
                    rtol=tolerance,
                    atol=tolerance,
                    err_msg=f"{variable.name} at {step}",
                )


@CASES
def test_the_reference_is_the_authors_code_too(name):
    """What the contract suite holds other batches and backends against."""
    case = VECTORS["cases"][name]
    settings = {"clipping": 0.01, "epsilon": 1e-3, "percentile": 10}
    settings |= case["settings"]
    rule = settings.pop("rule")
    own = {k: settings[k] for k in case["settings"] if k != "rule"}
    limits = {
        "percentile": lambda: reference.PercentileLimit(settings["percentile"]),
        "zclip": lambda: reference.ScoreLimit(**own),
    }
    limit = limits.get(rule, lambda: None)()
    weights = [np.array(v, "float64") for v in PROBLEM["init"].values()]
    for t, gradients in enumerate(PROBLEM["grads"]):
        gradients = [np.array(g, "float64") for g in gradients.values()]
        if rule == "agc":
            gradients = [
                reference.clipped_by_unit(
                    g, w, settings["clipping"], settings["epsilon"]
                )
                for g, w in zip(gradients, weights)
            ]
        else:
            gradients = reference.clipped_by_norm(gradients, limit)
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in gradients))
        wanted = case["clipped_norms"][t]
        np.testing.assert_allclose(norm, wanted, rtol=2e-6)
        weights = [w - 0.1 * g for w, g in zip(weights, gradients)]


# ---- Thresholds -----------------------------------------------------------


@given(
    strategies.lists(strategies.floats(1e-3, 1e3), min_size=1, max_size=12),
    strategies.integers(1, 12),
    strategies.floats(0, 100),
)
def test_percentiles_are_those_of_numpy(values, count, percent):
    count = min(count, len(values))
    history = np.zeros(12, "float32")
    history[: len(values)] = values
    found = clipping.percentile(
        keras.ops,
        keras.ops.convert_to_tensor(history),
        keras.ops.convert_to_tensor(count, "float32"),
        percent,
    )
    wanted = np.percentile(history[:count].astype("float64"), percent)
    np.testing.assert_allclose(numbers(found), wanted, rtol=1e-4)


@pytest.mark.parametrize(
    "shape, axes",
    [
        ((), None),
        ((7,), None),
        ((1, 5), None),
        ((1, 1, 1, 4), None),
        ((3, 4), (0,)),
        ((3, 4, 2), (0,)),
        ((3, 3, 2, 4), (0, 1, 2)),
        ((2, 3, 3, 2, 4), (0, 1, 2, 3)),
    ],
)
def test_units(shape, axes):
    assert clipping.unit_axes(shape) == axes


def test_units_by_pattern():
    """Rows of a table, filters of a one-dimensional convolution."""
    shapes = {
        "embeddings": (4, 3),
        "conv1d_kernel": (3, 2, 2),
        "kernel": (2, 2),
    }
    variables = variables_of({n: np.ones(s) for n, s in shapes.items()})
    optimizer = keras_stab.AdaptiveClipping(
        keras.optimizers.SGD(1.0),
        clipping=0.1,
        unit_axes={"embeddings": 1, "conv1d": (0, 1)},
    )
    gradients = [100.0 * np.ones(s) for s in shapes.values()]
    gradients[0][0] = 1e-6
    clip(optimizer, gradients, variables)
    rows, filters, columns = map(numbers, variables)
    np.testing.assert_allclose(rows, [[1 - 1e-6] * 3] + [[0.9] * 3] * 3, 1e-5)
    np.testing.assert_allclose(filters, np.full((3, 2, 2), 0.9), 1e-5)
    np.testing.assert_allclose(columns, np.full((2, 2), 0.9), 1e-5)
    again = keras_stab.AdaptiveClipping.from_config(optimizer.get_config())
    assert again.get_config() == optimizer.get_config()
    for wrong, message in [
        ({"embedings": 1}, "matches no variable.*conv1d_kernel"),
        ({"kernel": 3}, "an axis that a variable does not have.*conv1d_kernel"),
    ]:
        with pytest.raises(ValueError, match=message):
            keras_stab.AdaptiveClipping("sgd", unit_axes=wrong).build(variables)


RULES = pytest.mark.parametrize(
    "settings",
    [
        {"rule": "agc", "clipping": 0.1},
        {"rule": "percentile", "percentile": 50, "history_length": 4},
        {"rule": "zclip", "warmup_steps": 2, "z_threshold": 0.5},
    ],
    ids=lambda settings: settings["rule"],
)


@RULES
def test_what_is_excluded_or_missing_counts_in_no_norm(settings):
    ends = []
    for beside in (1.0, 1e6):
        variables = variables_of({"first": [1.0, 2.0], "last": 1.0, "off": 1.0})
        optimizer = keras_stab.AdaptiveClipping(
            keras.optimizers.SGD(0.1), exclude=["last"], **settings
        )
        for size in (1.0, 2.0, 3.0, 50.0):
            gradients = [np.array([size, 0.0]), beside, None]
            variables[2].trainable = False
            clip(optimizer, gradients, variables)
        ends.append([numbers(v) for v in variables])
        np.testing.assert_allclose(ends[-1][1], 1.0 - 0.4 * beside, 1e-5)
        assert ends[-1][2] == 1.0
        figures = optimizer.stability_metrics()
        assert figures["norm"] == pytest.approx(50.0)
        assert figures["last_clipped_share"] == 1.0
    np.testing.assert_array_equal(ends[0][0], ends[1][0])


@RULES
def test_what_is_not_finite_or_zero_is_handed_on_and_not_counted(settings):
    """The history goes on from the gradients before."""
    ends = []
    for bad in ([], [np.nan, np.inf, 0.0]):
        variables = variables_of({"w": [1.0, 2.0]})
        optimizer = keras_stab.AdaptiveClipping(
            keras.optimizers.SGD(0.1), **settings
        )
        for size in (1.0, 2.0, 3.0, *bad, 50.0):
            if size == 50.0:
                variables[0].assign([1.0, 2.0])
            clip(optimizer, [np.array([size, 0.0])], variables)
            if not np.isfinite(size):
                assert not np.all(np.isfinite(numbers(variables[0])))
                variables[0].assign([1.0, 2.0])
        assert np.all(np.isfinite(numbers(variables[0])))
        ends.append(numbers(variables[0]))
        # The figures tell of the gradient of zeros too.
        assert optimizer.stability_metrics()["counted"] == 4 + bool(bad)
    np.testing.assert_array_equal(*ends)


# ---- Figures --------------------------------------------------------------


def test_figures_of_units():
    variables = variables_of({"w": np.ones((4, 2))})
    optimizer = keras_stab.AdaptiveClipping("sgd", clipping=0.5)
    with pytest.raises(ValueError, match="before the first step"):
        optimizer.stability_metrics()
    one = np.zeros((4, 2))
    one[:, 1] = 3.0
    clip(optimizer, [one], variables)
    clip(optimizer, [0.01 * one], variables)
    assert optimizer.stability_metrics() == {
        "norm": pytest.approx(0.06),
        "threshold": 0.5,
        "last_clipped_share": 0.0,
        "clipped_share": 0.25,
        "counted": 2,
    }


def test_figures_of_outliers():
    variables = variables_of({"w": [1.0, 0.0]})
    optimizer = keras_stab.AdaptiveClipping(
        "sgd", "zclip", warmup_steps=2, z_threshold=2.0
    )
    seen = []
    for size in (1.0, 3.0, 3.0, 12.0):
        clip(optimizer, [np.array([size, 0.0])], variables)
        seen.append(optimizer.stability_metrics())
    assert [s["threshold"] for s in seen[:2]] == [np.inf, np.inf]
    assert seen[2]["threshold"] == pytest.approx(2.0 + 2.0 * 1.0)
    assert [s["last_clipped_share"] for s in seen] == [0, 0, 0, 1]
    assert seen[3]["clipped_share"] == 0.25
    # Not far above the mean: the further away, the closer to it.
    assert 2.0 < seen[3]["threshold"] < 4.0


# ---- Precision and nests --------------------------------------------------


@RULES
@pytest.mark.parametrize("inside", [False, True])
def test_a_loss_scaler_changes_nothing(settings, inside):
    scaler = keras.optimizers.LossScaleOptimizer

    def build(kind, inner):
        return kind(inner, **settings)

    method = keras_stab.AdaptiveClipping
    stock = build(method, keras.optimizers.SGD(0.1))
    scaled = (
        build(method, scaler(keras.optimizers.SGD(0.1), initial_scale=1024.0))
        if inside
        else scaler(
            build(method, keras.optimizers.SGD(0.1)), initial_scale=1024.0
        )
    )
    ends = []
    for optimizer, scale in ((stock, 1.0), (scaled, 1024.0)):
        variables = variables_of({"w": [[1.0, 2.0], [3.0, 4.0]], "b": [1.0]})
        optimizer.build(variables)
        for size in (1.0, 2.0, 3.0, np.nan, 50.0):
            if np.isnan(size) and optimizer is stock:
                continue
            gradients = [size * np.ones((2, 2)), np.array([size])]
            clip(optimizer, [scale * g for g in gradients], variables)
            if np.isnan(size):
                scale /= 2
        ends.append([numbers(v) for v in variables])
    for a, b in zip(*ends):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@slow_but_on_torch
@pytest.mark.parametrize("kind", [keras_stab.GRAIN, keras_stab.SAM])
@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "agc"},
        {"rule": "percentile"},
        {"rule": "zclip", "warmup_steps": 2, "z_threshold": 0.01},
    ],
    ids=lambda settings: settings["rule"],
)
def test_around_and_inside_a_method_that_chooses_the_gradient(kind, settings):
    """What it chose is clipped, and not what it looked at: in both orders."""
    x, y = contract.data(6)
    x[-contract.BATCH :] *= 10.0

    def trained(build):
        keras.utils.set_random_seed(3)
        model = keras.Sequential(
            [
                keras.Input((contract.FEATURES,)),
                keras.layers.Dense(8, activation="relu"),
                keras.layers.Dense(contract.CLASSES),
            ]
        )
        contract.compiled(build(keras.optimizers.SGD(0.5)), model)
        contract.fit(model, x, y)
        return model.trainable_weights[0].numpy()

    def clipped(inner):
        return keras_stab.AdaptiveClipping(inner, **settings)

    outside = trained(lambda inner: clipped(kind(inner)))
    inside = trained(lambda inner: kind(clipped(inner)))
    np.testing.assert_allclose(outside, inside, atol=1e-6)
    assert not np.allclose(outside, trained(kind), atol=1e-4)


# ---- Refusals -------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rule": "norm"}, "rule"),
        ({"clipping": 0.0}, "clipping"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"unit_axes": [0]}, "must be a dict"),
        ({"unit_axes": {"[": 0}}, "does not compile"),
        ({"unit_axes": {"a": -1}}, "unit_axes"),
        ({"exclude": "last"}, "list of path patterns"),
        ({"percentile": 10}, 'argument of rule="percentile".*Received'),
        ({"rule": "zclip", "clipping": 1.0}, 'argument of rule="agc"'),
        ({"rule": "percentile", "percentile": 101}, "percentile"),
        ({"rule": "percentile", "history_length": 0}, "history_length"),
        ({"rule": "zclip", "decay": 1.0}, "decay"),
        ({"rule": "zclip", "warmup_steps": 0}, "warmup_steps"),
        ({"rule": "zclip", "z_threshold": 0.0}, "z_threshold"),
    ],
    ids=str,
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        keras_stab.AdaptiveClipping("sgd", **settings)


def test_a_pattern_of_excluded_variables_must_match():
    with pytest.raises(ValueError, match="`exclude` matches no variable"):
        keras_stab.AdaptiveClipping("sgd", exclude=["lost"]).build(
            variables_of({"w": [1.0]})
        )
