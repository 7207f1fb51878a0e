"""WeightAveraging, AveragedSGD, ScheduleFree: vectors, counting, theory."""

import json
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_stab
from keras_stab.backend import tracing
from keras_stab.backend import updates
from keras_stab.numerics import averaging
from keras_stab.optimizers.averaging.averaging_rules import checked_rule
from keras_stab.optimizers.averaging.averaging_rules import rule

VECTORS = json.loads(
    (Path(__file__).parent / "vectors" / "averaging.json").read_text()
)
PROBLEM = VECTORS["problem"]
JAX = keras.backend.backend() == "jax"
RULES = {
    name: case
    for name, case in VECTORS["averages"].items()
    if "average_after_step" in case
}


def array(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor), "float64")


def close(actual, wanted, tolerance):
    """|a - b| <= tolerance (1 + |b|)."""
    np.testing.assert_allclose(
        array(actual), wanted, rtol=tolerance, atol=tolerance
    )


@pytest.fixture
def float64():
    """Float64 variables; JAX has none unless it is told."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    if JAX:
        import jax

        jax.config.update("jax_enable_x64", True)
    yield
    keras.config.set_floatx("float32")
    if JAX:
        jax.config.update("jax_enable_x64", False)


@pytest.fixture(params=["float32", "float64"])
def precision(request):
    if request.param == "float64":
        request.getfixturevalue("float64")
    return request.param


def variables():
    return {
        name: keras.Variable(
            np.array(value), dtype=keras.config.floatx(), name=name
        )
        for name, value in PROBLEM["init"].items()
    }


def step(optimizer, model, gradients):
    optimizer.apply(
        [
            keras.ops.convert_to_tensor(np.array(gradients[k]), v.dtype)
            for k, v in model.items()
        ],
        list(model.values()),
    )


# ---- Rules ----------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_vectors(name, precision):
    case = RULES[name]
    settings = dict(case["settings"])
    if "warmup_power" in settings:  # "2/3", in words
        settings["warmup_power"] = 2 / 3
    tolerance = 2e-6 if precision == "float32" else 1e-12
    optimizer = keras_stab.WeightAveraging(
        keras.optimizers.SGD(0.1), **settings
    )
    model = variables()
    raw = VECTORS["averages"]["raw_sgd"]["params_after_step"]
    for t, gradients in enumerate(PROBLEM["grads"], start=1):
        step(optimizer, model, gradients)
        for key, value in raw.get(str(t), {}).items():
            close(model[key], value, tolerance)
        wanted = case["average_after_step"].get(str(t))
        if wanted is None:
            continue
        assert optimizer.averaged == wanted["n_averaged"]
        for key, slot in zip(model, optimizer.averages):
            assert slot.dtype == precision
            if key in wanted:
                close(slot, wanted[key], tolerance)


def test_coefficients():
    decays = VECTORS["decays"]
    for n, decay in decays["ema_warmup_decay"]["by_n"].items():
        count = keras.ops.convert_to_tensor(float(n))
        warm = averaging.exponential(count, 1.0, 1.0, 2 / 3)
        assert float(warm) == pytest.approx(1 - decay, abs=1e-6)
    for n, decay in decays["dynamic_decay_0.99"]["by_n"].items():
        count = keras.ops.convert_to_tensor(float(n))
        dynamic = averaging.dynamic_exponential(count, 0.99)
        assert float(dynamic) == pytest.approx(1 - decay, abs=1e-6)
    profile = VECTORS["power_profile"]
    for width, exponent in profile["exponent_by_relative_std"].items():
        assert averaging.power_exponent(float(width)) == pytest.approx(
            exponent, rel=1e-9
        )
    for t, beta in profile["beta_for_std_0.1_by_t"].items():
        power = rule("power", checked_rule("power", {"relative_std": 0.1}))
        count = keras.ops.convert_to_tensor(float(t) - 1.0)
        assert float(power(count)) == pytest.approx(1 - beta, abs=1e-6)


def test_a_power_coefficient_keeps_its_digits():
    late = averaging.power(keras.ops.convert_to_tensor(1e6 - 1), 6.93720)
    exact = -np.expm1(7.93720 * np.log1p(-1e-6))
    assert float(late) == pytest.approx(exact, rel=1e-5)


def test_a_polynomial_of_degree_0_and_a_warm_up_of_power_1_are_the_mean():
    for n in (1.0, 7.0, 100.0):
        n = keras.ops.convert_to_tensor(n)
        mean = float(averaging.uniform(n))
        assert float(averaging.polynomial(n, 0.0)) == pytest.approx(mean)
        warm = averaging.exponential(n, 1.0, 1.0, 1.0)
        assert float(warm) == pytest.approx(mean)


@pytest.mark.parametrize("compensated", [True, False])
def test_a_long_mean(compensated):
    """w = 1 + 5e-5 i / N: a plain float32 mean never leaves 1."""
    count = 1_000
    values = (1.0 + 5e-5 * np.arange(count) / count).astype("float32")
    optimizer = keras_stab.AveragedSGD(1.0, compensated=compensated)
    w = keras.Variable(values[:1])
    before = values[0]
    for value in values:
        gradient = keras.ops.convert_to_tensor([before - value])
        optimizer.apply([gradient], [w])
        before = value
    error = abs(average_of(optimizer) - values.mean(dtype="float64"))
    assert error < 1e-6 if compensated else error > 1e-5


# PyTorch runs the loop in Python.
LONG = [10_000, pytest.param(100_000, marks=pytest.mark.slow)]


@pytest.mark.parametrize(
    "count", LONG if keras.backend.backend() == "torch" else [100_000]
)
def test_a_mean_of_many_weights(count):
    def one_more(i, state):
        average, error = state
        i = keras.ops.cast(i, "float32")
        value = 1.0 + 1e-3 * i / count
        return averaging.moved_exactly(
            average, error, value, averaging.uniform(i)
        )

    def all_of_them():
        zero = keras.ops.zeros(())
        return keras.ops.fori_loop(0, count, one_more, (zero, zero))

    average = tracing.concretely(lambda _: all_of_them(), [])[0]
    wanted = 1.0 + 1e-3 * (count - 1) / 2 / count
    assert abs(float(average) - wanted) < 1e-6


# ---- Counting -------------------------------------------------------------


def scalar(optimizer, start=10.0, dtype="float32"):
    """A scalar weight, and a function that makes one step."""
    w = keras.Variable(start, dtype=dtype)
    optimizer.build([w])

    def apply(gradient=1.0):
        gradient = keras.ops.convert_to_tensor(gradient, dtype)
        # A loss scaler works in the stateless form only, on JAX.
        updates.apply_gradients(optimizer, [gradient], [w])
        return float(array(w.value))

    return w, apply


def average_of(optimizer):
    return float(array(optimizer.averages[0].value).reshape(()))


def test_accumulation_counts_real_updates():
    inner = keras.optimizers.SGD(1.0, gradient_accumulation_steps=2)
    optimizer = keras_stab.WeightAveraging(inner, method="ema", decay=0.5)
    _, apply = scalar(optimizer)
    wanted = VECTORS["keras_ema"]["required_ema_0.5_accumulation_2"]
    for i, (weight, average) in enumerate(wanted):
        assert apply() == weight
        assert optimizer.averaged == (i + 1) // 2
        if average is not None:
            assert average_of(optimizer) == average


def test_start_and_period():
    optimizer = keras_stab.WeightAveraging(
        keras.optimizers.SGD(1.0), start_step=2, period=3
    )
    _, apply = scalar(optimizer)
    counts = []
    for _ in range(9):
        apply()
        counts.append(optimizer.averaged)
    assert counts == [0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert average_of(optimizer) == np.mean([7.0, 4.0, 1.0])


def test_the_first_average_is_a_copy_and_infinities_before_it_are_harmless():
    optimizer = keras_stab.WeightAveraging(
        keras.optimizers.SGD(1.0), start_step=2
    )
    w, apply = scalar(optimizer, 0.1)
    apply(-np.inf)
    w.assign(0.1)
    apply(0.3)
    assert average_of(optimizer) == 0.0
    after = apply(1 / 3)
    assert average_of(optimizer) == after


def test_a_skipped_step_is_not_averaged():
    optimizer = keras_stab.WeightAveraging(keras.optimizers.SGD(1.0))
    scaler = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1.0)
    _, apply = scalar(scaler)
    apply(1.0)
    apply(np.nan)
    assert (optimizer.averaged, average_of(optimizer)) == (1, 9.0)
    apply(0.5)  # the scale was halved
    assert (optimizer.averaged, average_of(optimizer)) == (2, 8.5)


def test_half_precision_weights_have_a_float32_average():
    case = VECTORS["keras_ema"]["bfloat16"]
    optimizer = keras_stab.WeightAveraging(
        keras.optimizers.SGD(1e-3), method="ema", decay=0.999
    )
    w, apply = scalar(optimizer, 1.0, "bfloat16")
    for _ in range(50):
        apply(-10.0)
    assert float(w.value) == case["weight"]
    assert optimizer.averages[0].dtype == "float32"
    error = average_of(optimizer) - case["required_average"]
    assert abs(error) < case["tolerance"]


def test_several_optimizers_in_one_model():
    def averaging_of(rate):
        return keras_stab.WeightAveraging(keras.optimizers.SGD(rate))

    parts = {"a": averaging_of(1.0), "b": averaging_of(2.0)}
    optimizer = keras.optimizers.MultiOptimizer(lambda v: parts[v.name])
    weights = [keras.Variable(5.0, name=name) for name in parts]
    for _ in range(2):
        optimizer.apply([keras.ops.ones(())] * 2, weights)
    averages = [average_of(part) for part in parts.values()]
    assert averages == [3.5, 2.0]
    around = keras_stab.WeightAveraging(
        keras.optimizers.MultiOptimizer(lambda v: keras.optimizers.SGD(1.0))
    )
    _, apply = scalar(around)
    apply()
    assert (around.averaged, average_of(around)) == (1, 9.0)


# ---- Arguments ------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "mean"}, "one of .*'uniform', 'ema', 'polynomial'"),
        ({"method": "ema", "decay": 1.0}, r"in \[0, 1\)"),
        ({"method": "ema", "warmup_gamma": 0.0}, "must be above 0"),
        ({"method": "ema", "warmup_power": 0.5}, "needs `warmup_gamma`"),
        (
            {"method": "ema", "dynamic": True, "warmup_gamma": 1.0},
            "two warm-ups",
        ),
        ({"decay": 0.9}, 'belongs to method="ema"'),
        ({"method": "polynomial", "exponent": -1}, "at least 0"),
        ({"method": "power", "relative_std": 0.3}, r"in \[1e-06, 0.2887\)"),
        ({"period": 0}, "at least 1"),
        ({"period": 2.5}, "an integer"),
        ({"start_step": -1}, "at least 0"),
        ({"start_step": 0.75}, "an integer"),
        ({"compensated": "yes"}, "a boolean"),
        ({"learning_rate": 0.1}, "belong on the inner one"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        keras_stab.WeightAveraging("sgd", **arguments)


@pytest.mark.parametrize(
    "inner",
    [
        lambda: keras_stab.WeightAveraging("sgd"),
        lambda: keras_stab.GRAIN(keras_stab.AveragedSGD()),
        lambda: keras_stab.ScheduleFree.sgd(),
        lambda: keras.optimizers.SGD(use_ema=True),
    ],
)
def test_nested_averages_are_refused(inner):
    for outer in (keras_stab.WeightAveraging, keras_stab.ScheduleFree):
        with pytest.raises(ValueError, match="[Ll]eave one of the two out"):
            outer(inner())


def test_from_run():
    make = keras_stab.WeightAveraging.from_run
    assert make("sgd", epochs=10, steps_per_epoch=10).start_step == 75
    assert make("sgd", epochs=1, steps_per_epoch=3, tail=1).start_step == 0
    assert make("sgd", epochs=1, steps_per_epoch=3, tail=0.01).start_step == 2
    inner = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
    assert make(inner, epochs=10, steps_per_epoch=10).start_step == 19
    with pytest.raises(ValueError, match="in .0, 1."):
        make("sgd", epochs=1, steps_per_epoch=3, tail=1.5)
    with pytest.raises(ValueError, match="leave it out"):
        make("sgd", epochs=1, steps_per_epoch=3, start_step=2)


def test_averaged_sgd_of_a_run_and_its_config():
    optimizer = keras_stab.AveragedSGD.from_run(
        0.1,
        final_learning_rate=0.02,
        epochs=4,
        steps_per_epoch=10,
        momentum=0.9,
        clipnorm=2.0,
    )
    schedule = keras.optimizers.schedules.deserialize(
        optimizer.get_config()["learning_rate"]
    )
    rates = [float(schedule(t)) for t in (0, 30, 40)]
    assert rates == pytest.approx([0.1, 0.02, 0.02])
    config = keras.saving.serialize_keras_object(optimizer)
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == optimizer.get_config()
    assert (again.start_step, again.inner_optimizer.momentum) == (30, 0.9)
    assert again.inner_optimizer.clipnorm == 2.0


def test_schedules():
    cases = VECTORS["schedules"]

    def check(schedule, steps, wanted):
        again = type(schedule).from_config(schedule.get_config())
        for made in (schedule, again):
            rates = [float(made(s)) for s in steps]
            np.testing.assert_allclose(rates, wanted, rtol=1e-6)

    case = cases["swa_linear"]
    start = case["settings"]["start_epoch"]
    check(
        keras_stab.ConstantTail(
            0.1, 0.05, 0.9 * start, decay_from=0.5 * start, shape="linear"
        ),
        case["epoch"],
        case["learning_rate"],
    )
    for name, arguments in (
        ("averaged_sgd_multistep", (8e-4, None, 0, "steps", [4, 8, 12])),
        ("averaged_sgd_cosine", (0.02, 20)),
        ("swalr_linear", (0.05, 5, 0, "linear")),
        ("swalr_cosine", (0.05, 5)),
    ):
        if name in cases:
            wanted = cases[name]["values"]
            schedule = keras_stab.ConstantTail(0.1, *arguments)
            check(schedule, range(len(wanted)), wanted)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "takes `tail_step`"),
        ({"tail_step": 5, "decay_from": 5}, "above `decay_from`"),
        ({"tail_step": 5, "shape": "steps"}, "takes `milestones`"),
        ({"shape": "steps", "milestones": [4, 2]}, "must rise"),
        ({"tail_step": 5, "shape": "square"}, "one of"),
    ],
)
def test_wrong_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        keras_stab.ConstantTail(0.1, 0.02, **arguments)


# ---- Schedule-Free --------------------------------------------------------


class Prescribed(keras.Model):
    """Its gradients are its inputs, whatever the weights are."""

    def __init__(self):
        super().__init__()
        self.parts = {
            name: self.add_weight(
                shape=np.shape(value),
                name=name,
                initializer=keras.initializers.Constant(np.array(value)),
            )
            for name, value in PROBLEM["init"].items()
        }

    def call(self, x):
        return x["row"]

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        return sum(
            keras.ops.sum(x[name][0] * w) for name, w in self.parts.items()
        )


def prescribed_data():
    floatx = keras.config.floatx()
    data = {
        name: np.array([g[name] for g in PROBLEM["grads"]], floatx)
        for name in PROBLEM["init"]
    }
    return {**data, "row": np.zeros((20, 1), floatx)}


@pytest.mark.parametrize("form", ["sgd", "adamw"])
def test_schedule_free_vectors(form, precision):
    """Graph `fit` from weights that are not zero."""
    case = VECTORS["schedule_free"][form]
    settings = dict(case["settings"])
    settings["step_power"] = settings.pop("r")
    optimizer = getattr(keras_stab.ScheduleFree, form)(**settings)
    model, data = Prescribed(), prescribed_data()
    model.compile(optimizer)
    tolerance = 5e-6 if precision == "float32" else 1e-10
    for t in range(20):
        row = {name: value[t : t + 1] for name, value in data.items()}
        model.fit(row, batch_size=1, verbose=0)
        wanted = case["after_step"].get(str(t + 1))
        if wanted is None:
            continue
        x = {name: array(w.value) for name, w in model.parts.items()}
        z = {n: array(s.value) for n, s in zip(x, optimizer.iterates)}
        y = {name: 0.9 * x[name] + 0.1 * z[name] for name in x}
        for point, values in {"x": x, "y": y, "z": z}.items():
            for name, value in wanted[point].items():
                close(values[name], value, tolerance)


def test_schedule_free_takes_state_from_y_and_costs_one_pass():
    passes = []

    class Noting(keras.layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(), initializer="ones", name="w")
            self.seen = self.add_weight(shape=(), trainable=False, name="seen")

        def call(self, x, training=False):
            if training:
                passes.append(None)
                self.seen.assign(1.0 * self.w)
            return x * self.w

    layer = Noting()
    model = keras.Sequential([layer])
    optimizer = keras_stab.ScheduleFree.sgd(0.5, beta=0.5)
    model.compile(optimizer, "mse", run_eagerly=True)
    ones = np.ones((4, 1), "float32")
    model.train_on_batch(ones, 0 * ones)
    x, z = float(layer.w.value), float(optimizer.iterates[0].value)
    assert (x, z) == (0.0, 0.0)
    layer.w.assign(2.0)
    passes.clear()
    model.train_on_batch(ones, 0 * ones)
    assert float(layer.seen.value) == 0.5 * 2.0 + 0.5 * z
    assert len(passes) == 1


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: keras_stab.ScheduleFree("adamw"), "place of `beta_1`"),
        (
            lambda: keras_stab.ScheduleFree(
                keras.optimizers.SGD(0.1, momentum=0.9)
            ),
            "place of `momentum`",
        ),
        (
            lambda: keras_stab.ScheduleFree(
                keras.optimizers.SGD(0.1, weight_decay=0.1)
            ),
            "Give `weight_decay` to ScheduleFree",
        ),
        (lambda: keras_stab.ScheduleFree("sgd", beta=1.0), r"in \[0, 1\)"),
        (
            lambda: keras_stab.ScheduleFree("sgd").exclude_from_weight_decay(),
            "decay_exclude",
        ),
        (
            lambda: keras_stab.ScheduleFree("sgd").build(
                [keras.Variable(1.0, dtype="bfloat16")]
            ),
            "half precision",
        ),
    ],
)
def test_wrong_schedule_free(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("form", ["sgd", "adamw"])
def test_schedule_free_in_place_is_the_same(form, monkeypatch):
    """Where Python reads whether there is an update, and where it cannot."""

    def trained():
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        make = getattr(keras_stab.ScheduleFree, form)
        optimizer = make(0.1, weight_decay=0.1)
        model.compile(optimizer, "mse")
        x = np.random.default_rng(0).normal(size=(24, 3)).astype("float32")
        model.fit(x, x[:, :2], batch_size=4, verbose=0, shuffle=False)
        return [array(v.value) for v in [*model.weights, *optimizer.iterates]]

    wanted = trained()
    monkeypatch.setattr(updates, "is_known", lambda condition: False)
    for value, other in zip(trained(), wanted):
        close(value, other, 2e-6)


def test_schedule_free_refuses_plain_gradients():
    w = keras.Variable(1.0)
    with pytest.raises(RuntimeError, match="plain gradients"):
        keras_stab.ScheduleFree.sgd().apply([keras.ops.ones(())], [w])


# ---- Theory ---------------------------------------------------------------

CHAINS = 8_000
EXECUTED = 1 if keras.backend.backend() == "torch" else 100
RATES = {
    "exponential": (0.4, 0.1, 0.05, 0.025),
    "quadratic": (0.1, 1.0),
    "well": (0.02, 0.6),
}


class Toys(keras.Model):
    """Many chains of SGD on one-dimensional objectives, noise N(0, 1)."""

    def __init__(self):
        super().__init__()
        self.chains = {
            name: self.add_weight(
                shape=(len(rates), CHAINS),
                initializer=keras.initializers.Constant(
                    2.0 if name == "well" else 0.0
                ),
                name=name,
            )
            for name, rates in RATES.items()
        }
        self.seed = keras.random.SeedGenerator(0)

    def call(self, x):
        return x

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        ops = keras.ops
        noise = keras.random.normal((1, CHAINS), seed=self.seed)
        # Opposite noise in pairs of chains: what is linear in it cancels.
        half = noise[:, : CHAINS // 2]
        noises = {"exponential": ops.concatenate([half, -half], axis=1)}
        loss = 0.0
        for name, w in self.chains.items():
            slope = SLOPES[name](w) + noises.get(name, noise)
            rates = ops.reshape(
                ops.convert_to_tensor(RATES[name], "float32"), (-1, 1)
            )
            loss = loss + ops.sum(w * ops.stop_gradient(rates * slope))
        return loss


def slope_of_well(x):
    well = keras.ops.exp(-keras.ops.square(x - 2.0) / 0.02)
    return 0.2 * x + 90.0 * (x - 2.0) * well


SLOPES = {
    "exponential": lambda x: keras.ops.exp(x) - 1.0,
    "quadratic": lambda x: x,
    "well": slope_of_well,
}


def well(x):
    return 0.1 * x**2 - 0.9 * np.exp(-((x - 2.0) ** 2) / 0.02)


def run_toys(steps, burn_in):
    """Last weights and averages of every toy, by name: [rates, chains]."""
    model = Toys()
    optimizer = keras_stab.AveragedSGD(1.0, start_step=burn_in)
    model.compile(optimizer, steps_per_execution=EXECUTED)
    model.fit(
        np.zeros((steps, 1), "float32"), batch_size=1, shuffle=False, verbose=0
    )
    assert optimizer.averaged == steps - burn_in
    keras_stab.return_trained_weights(model)
    last = {name: array(w.value) for name, w in model.chains.items()}
    return {
        name: (last[name], array(slot.value))
        for name, slot in zip(model.chains, optimizer.averages)
    }


def test_theory():
    toys = run_toys(1_500, 500)
    # The average is nearer to the minimum of the smoothed objective: the RMS
    # of the last weights goes as rate ** 1/2, the bias of the average as the
    # rate.
    last, average = toys["exponential"]
    rates = np.array(RATES["exponential"])
    centre = -(rates**2) / 2
    # v = w - rate f'(w) is what descends on the smoothed objective.
    v = last - rates[:, None] * (np.exp(last) - 1.0)
    distance = np.mean((v - centre[:, None]) ** 2, axis=1)
    rms = np.sqrt(distance)
    bias = average.mean(axis=1) - centre
    known = {row["eta"]: row for row in VECTORS["toys"]["toy_exp"]["rows"]}
    for i, rate in enumerate(rates):
        row = known[rate]
        assert rms[i] == pytest.approx(row["rms_iterate"], rel=0.04)
        assert bias[i] == pytest.approx(row["bias_avg_w"], rel=0.06)
    small = slice(1, None)
    slope = np.polyfit(np.log(rates[small]), np.log(rms[small]), 1)[0]
    assert slope == pytest.approx(0.467, abs=0.03)
    slope = np.polyfit(np.log(rates[small]), np.log(-bias[small]), 1)[0]
    assert slope == pytest.approx(0.905, abs=0.05)
    ratio = -bias[small] / distance[small]
    assert np.all((0.47 < ratio) & (ratio < 0.53))
    # n Var(average) -> 1 and Var(last) = rate / (2 - rate) on a quadratic.
    last, average = toys["quadratic"]
    for i, rate in enumerate(RATES["quadratic"]):
        variance = 1_000 * np.var(average[i])
        assert variance == pytest.approx(1.0, abs=0.07)
        assert np.var(last[i]) == pytest.approx(rate / (2 - rate), rel=0.07)
    # A small rate stays in a sharp well, a large one leaves it.
    last, average = toys["well"]
    assert np.mean(np.abs(average[0] - 2.0) < 0.3) >= 0.99
    assert np.mean(np.abs(last[0] - 2.0) < 0.3) >= 0.99
    assert abs(np.mean(average[1])) < 0.15
    assert np.mean(well(last[1])) > 0.15
    assert np.mean(well(average[1])) < 0.1 * np.mean(well(last[1]))


@pytest.mark.slow
def test_theory_of_the_well_at_full_length():
    """The average of 10,000 weights is as good as the whole objective says."""
    last, average = run_toys(20_000, 10_000)["well"]
    assert np.mean(np.abs(average[0] - 2.0) < 0.3) >= 0.99
    assert np.mean(np.abs(last[0] - 2.0) < 0.3) >= 0.99
    assert abs(np.mean(average[1])) < 0.15
    assert np.std(average[1]) < 0.09
    assert np.mean(well(average[1])) < 0.002
    assert np.mean(well(last[1])) > 0.15


def test_a_run_that_ends_before_the_first_average_warns():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras_stab.AveragedSGD(0.1, start_step=5), "mse")
    x, y = np.ones((8, 2)), np.ones((8, 1))
    with pytest.warns(UserWarning, match="after 4 updates.*at update 5"):
        model.fit(x, y, batch_size=2, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.fit(x, y, batch_size=2, verbose=0)
