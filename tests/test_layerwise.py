"""LARS, TVLARS, LAMB and their schedules against the vectors."""

import contextlib
import json
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from marks import ON_TORCH

import keras_stab
from keras_stab.backend import in_place

VECTORS = json.loads(
    (Path(__file__).parent / "vectors" / "tvlars.json").read_text()
)
PROBLEM = VECTORS["problem"]
TVLARS_ONLY = {"decay_rate", "delay", "alpha", "floor", "variant"}


def array(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor), "float64")


def variables(dtype="float32", init=None):
    init = PROBLEM["init"] if init is None else init
    return {
        name: keras.Variable(np.array(value), dtype=dtype, name=name)
        for name, value in init.items()
    }


def apply(optimizer, model, gradients):
    optimizer.apply(
        [
            keras.ops.convert_to_tensor(np.array(g), model[name].dtype)
            for name, g in gradients.items()
        ],
        list(model.values()),
    )


def optimizer_of(settings):
    kind = keras_stab.LARS
    if TVLARS_ONLY & set(settings):
        kind = keras_stab.TVLARS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(**settings)


def close(actual, wanted, tolerance=2e-6, message=""):
    """|a - b| <= tolerance (1 + |b|)."""
    np.testing.assert_allclose(
        array(actual), wanted, rtol=tolerance, atol=tolerance, err_msg=message
    )


def run(optimizer, case, names=None, dtype="float32", tolerance=2e-6):
    model = variables(dtype)
    # "2.0 for t = 0..9, 0.2 for t >= 10", in words.
    drops = "learning_rate_by_step_index" in case
    for step, gradients in enumerate(PROBLEM["grads"]):
        if drops:
            optimizer.learning_rate = 2.0 if step < 10 else 0.2
        apply(optimizer, model, gradients)
        wanted = case["params_after_step"].get(str(step + 1), {})
        for name, value in wanted.items():
            if names is None or (name, step + 1) in names or name in names:
                close(model[name], value, tolerance, f"{name} at {step + 1}")
    return model


def resolved(name):
    return VECTORS["lars"].get(name) or VECTORS["lamb"][name]


@pytest.mark.parametrize("name", VECTORS["lars"])
def test_lars_vectors(name):
    case = resolved(name)
    names = None
    if name == "apex_larc_scale":  # it drops the decay with the ratio
        names = {"w1", "b1", "gamma", "zero", *(("w2", s) for s in (1, 2, 3))}
    run(optimizer_of(case["settings"]), case, names)


@pytest.mark.parametrize("name", VECTORS["lamb"])
def test_lamb_vectors(name):
    case = resolved(name)
    run(keras_stab.LAMB(**case["settings"]), case)


@contextlib.contextmanager
def float64():
    """Variables and the learning rate in double precision."""
    with contextlib.ExitStack() as stack:
        if keras.backend.backend() == "jax":
            import jax

            stack.enter_context(jax.enable_x64())
        keras.config.set_floatx("float64")
        try:
            yield
        finally:
            keras.config.set_floatx("float32")


@pytest.mark.parametrize(
    "name, tolerance",
    [
        ("lars_default", 1e-12),
        ("lars_fast", 1e-12),
        ("lars_adapt_all", 1e-12),
        # The published code rounds its factor to float32, and so do we.
        ("tvlars_head_default", 1e-6),
        ("tvlars_head_fast", 1e-6),
        ("tvlars_head_adapt_all", 1e-6),
        ("official", 1e-12),
        ("optax", 1e-12),
        ("optax_no_decay", 1e-12),
    ],
)
def test_vectors_in_double_precision(name, tolerance):
    case = resolved(name)
    with float64():
        if name in VECTORS["lars"]:
            optimizer = optimizer_of(case["settings"])
        else:
            optimizer = keras_stab.LAMB(**case["settings"])
        run(optimizer, case, dtype="float64", tolerance=tolerance)


@pytest.mark.parametrize("name", ["lars_default", "lars_fast"])
def test_tvlars_without_a_factor_is_lars(name):
    case = resolved(name)
    optimizer = keras_stab.TVLARS(
        **case["settings"], decay_rate=0.0, delay=0.0, alpha=0.0, floor=0.0
    )
    run(optimizer, case)


# ---- The factor of time and the schedules ---------------------------------


def test_phi():
    for case in VECTORS["schedules"]["phi"]["cases"]:
        settings = {k: case[k] for k in ("decay_rate", "delay", "alpha")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = keras_stab.TVLARS(**settings, floor=case["floor"])
        phi = np.array(optimizer.phi(case["t"]), "float64")
        wanted = np.array(case["phi"])
        psi = case["decay_rate"] * (np.array(case["t"]) - case["delay"])
        bound = 5e-7 * (1 + np.abs(psi)) * wanted + 1e-30
        assert np.all(np.abs(phi - wanted) <= bound)
        assert np.all(np.isfinite(phi)) and np.all(np.diff(phi) <= 0)


def test_phi_of_the_published_code():
    case = VECTORS["schedules"]["phi_official"]
    for decay_rate, values in case["values_by_decay_rate"].items():
        rate = float(decay_rate)
        optimizer = keras_stab.TVLARS(decay_rate=rate, variant="official")
        phi = np.array(optimizer.phi(case["t"]), "float64")
        psi = rate * (np.array(case["t"]) + 1)
        bound = 5e-7 * (1 + np.abs(psi)) * np.array(values) + 1e-30
        assert np.all(np.abs(phi - values) <= bound)


def test_phi_is_finite_far_out():
    optimizer = keras_stab.TVLARS(decay_rate=1.0, delay=50.0)
    phi = optimizer.phi(np.arange(0, 10_000, 100))
    assert np.all(np.isfinite(phi)) and np.all(np.diff(phi) <= 0)
    assert float(optimizer.phi(50)) == pytest.approx(0.5 + 1e-3)


def test_from_steps():
    for alpha in (0.5, 1.0, 3.0):
        optimizer = keras_stab.TVLARS.from_steps(100, 300, alpha, floor=0.01)
        held, decayed = optimizer.phi([100, 400]) - 0.01
        assert held * alpha == pytest.approx(0.9, rel=1e-4)
        assert decayed * alpha == pytest.approx(0.1, rel=1e-4)


def test_warmup_polynomial():
    case = VECTORS["schedules"]["mlperf_warmup_polynomial"]
    settings = case["settings"]
    schedule = keras_stab.WarmupPolynomial(
        settings["base"],
        settings["warmup_steps"],
        settings["total_steps"],
        settings["end"],
        settings["power"],
    )
    values = [float(schedule(step)) for step in range(len(case["values"]))]
    np.testing.assert_allclose(values, case["values"], rtol=1e-6, atol=1e-9)


SCHEDULES = {
    "polynomial": lambda: keras_stab.WarmupPolynomial(1.0, 3, 10),
    "cosine": lambda: keras_stab.WarmupCosine(1.0, 3, 10),
    "sigmoid": lambda: keras_stab.TimeVaryingSigmoid(1.0, 0.5, delay=5),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_in_any_optimizer(name):
    schedule = SCHEDULES[name]()
    config = keras.optimizers.schedules.serialize(schedule)
    again = keras.optimizers.schedules.deserialize(config)
    assert again.get_config() == schedule.get_config()
    x, y = np.ones((8, 3), "float32"), np.zeros((8, 2), "float32")
    for kind in (keras.optimizers.SGD, keras_stab.LARS):
        model = keras.Sequential([keras.layers.Dense(2)])
        model.compile(kind(learning_rate=schedule), "mse")
        model.fit(x, y, batch_size=4, verbose=0)
        assert float(model.optimizer.learning_rate) == pytest.approx(
            float(schedule(2))
        )
        config = model.optimizer.get_config()
        built = type(model.optimizer).from_config(dict(config))
        assert built.get_config() == config


# ---- Properties -----------------------------------------------------------


def two_dimensional(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        "a": rng.normal(size=(4, 3)) * scale,
        "b": rng.normal(size=(3, 2)) * scale,
    }


@pytest.mark.parametrize("norm", ["combined", "separate"])
def test_the_scale_of_gradients_does_not_matter(norm):
    moves = []
    for scale in (1.0, 2.0**13):
        model = variables(init=two_dimensional())
        before = {name: array(v) for name, v in model.items()}
        apply(keras_stab.LARS(norm=norm), model, two_dimensional(1, scale))
        moves.append({n: array(v) - before[n] for n, v in model.items()})
    for name in moves[0]:
        largest = np.abs(moves[0][name]).max()
        np.testing.assert_allclose(
            moves[0][name], moves[1][name], atol=1e-6 * max(largest, 1.0)
        )


def test_the_first_relative_step():
    model = variables(init=two_dimensional())
    before = {name: array(v) for name, v in model.items()}
    optimizer = keras_stab.TVLARS(
        2.0, trust_coefficient=0.02, decay_rate=0.1, delay=5.0
    )
    apply(optimizer, model, two_dimensional(1))
    wanted = 2.0 * 0.02 * float(optimizer.phi(0))
    for name, variable in model.items():
        step = np.linalg.norm(array(variable) - before[name])
        relative = step / np.linalg.norm(before[name])
        assert relative == pytest.approx(wanted, abs=5e-7)


@pytest.mark.parametrize("nesterov", [False, True])
def test_inside_is_outside_at_a_constant_rate(nesterov):
    ends = []
    for style in ("inside", "outside"):
        model = variables()
        optimizer = keras_stab.LARS(
            0.5, trust_coefficient=0.02, momentum_style=style, nesterov=nesterov
        )
        for gradients in PROBLEM["grads"]:
            apply(optimizer, model, gradients)
        ends.append(model)
    for name in ends[0]:
        close(ends[0][name], array(ends[1][name]), 4e-6)


@pytest.mark.parametrize("kind", ["LARS", "TVLARS", "LAMB"])
def test_zeros(kind):
    arguments = {"decay_rate": 0.1, "delay": 3.0} if kind == "TVLARS" else {}
    optimizer = getattr(keras_stab, kind)(0.1, weight_decay=0.01, **arguments)
    model = variables(init={"zero": np.zeros((3, 2)), "w": np.ones((3, 2))})
    apply(optimizer, model, {"zero": np.ones((3, 2)), "w": np.zeros((3, 2))})
    assert np.all(array(model["zero"]) != 0)  # the first step is a raw one
    assert np.all(np.isfinite(array(model["w"])))
    apply(optimizer, model, dict.fromkeys(model, np.zeros((3, 2))))
    for variable in model.values():
        assert np.all(np.isfinite(array(variable)))


def test_half_precision_norms_do_not_overflow():
    init = {"w": np.full((64, 64), 8.0)}  # its squares add up to 262144
    model = variables("float16", init)
    optimizer = keras_stab.LARS(1.0, trust_coefficient=0.1)
    apply(optimizer, model, {"w": np.full((64, 64), 30.0)})
    np.testing.assert_allclose(array(model["w"]), 7.2, rtol=1e-3)


def test_accumulation_is_the_full_batch():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 3)).astype("float32")
    y = rng.normal(size=(16, 2)).astype("float32")
    ends = []
    for batch, steps in ((8, None), (4, 2)):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        optimizer = keras_stab.TVLARS(
            1.0,
            trust_coefficient=0.02,
            decay_rate=0.5,
            delay=1.0,
            gradient_accumulation_steps=steps,
        )
        model.compile(optimizer, "mse")
        model.fit(x, y, batch_size=batch, epochs=3, shuffle=False, verbose=0)
        assert int(optimizer.iterations) == 6
        ends.append(model.get_weights())
    for one, other in zip(*ends):
        np.testing.assert_allclose(one, other, atol=1e-6)


# ---- On a network ---------------------------------------------------------

WEIGHTS = ("W1", "b1", "W2", "b2")


def tanh_losses(optimizer, steps, check=lambda step, weights: None):
    """Losses before each step on mean((tanh(X W1 + b1) W2 + b2 - Y)^2)."""
    problem = VECTORS["autodiff"]["problem"]
    model = keras.Sequential(
        [
            keras.Input((len(problem["X"][0]),)),
            keras.layers.Dense(len(problem["b1"]), "tanh"),
            keras.layers.Dense(len(problem["b2"])),
        ]
    )
    model.set_weights([np.array(problem[name]) for name in WEIGHTS])
    model.compile(optimizer, "mse")
    x, y = (np.array(problem[name], "float32") for name in ("X", "Y"))
    losses = []
    for step in range(steps):
        losses.append(float(model.train_on_batch(x, y)))
        check(step + 1, model.get_weights())
    return losses


@pytest.mark.parametrize(
    "name", ["tvlars_official", "tvlars_official_adapt_all", "lars"]
)
def test_network_vectors(name):
    case = VECTORS["autodiff"][name]

    def check(step, weights):
        wanted = case["params_after_step"].get(str(step), {})
        for key, actual in zip(WEIGHTS, weights):
            if key in wanted:
                close(actual, wanted[key], 4e-6, f"{key} at {step}")

    wanted = case["loss_before_step"]
    losses = tanh_losses(optimizer_of(case["settings"]), len(wanted), check)
    np.testing.assert_allclose(losses, wanted, atol=1e-6)


@pytest.mark.parametrize("rate", [3.0, 10.0])
def test_scaled_excluded_variables_do_not_diverge(rate):
    def losses(rate, scale):
        optimizer = keras_stab.TVLARS(
            rate,
            trust_coefficient=0.02 / rate,
            weight_decay=5e-4,
            decay_rate=1e-3,
            variant="official",
            excluded_lr_scale=scale,
        )
        return tanh_losses(optimizer, 60)

    np.testing.assert_allclose(
        losses(rate, 1.0 / rate), losses(1.0, 1.0), atol=1e-5
    )


def test_trust_ratios_of_a_run():
    case = resolved("lars_fast")
    model = variables()
    optimizer = keras_stab.LARS(**case["settings"], track_trust_ratios=True)
    for step, gradients in enumerate(PROBLEM["grads"]):
        apply(optimizer, model, gradients)
        ratios = optimizer.trust_ratios()
        assert set(ratios) == {v.path for v in model.values() if v.ndim > 1}
        recorded = case["trust_ratio"]
        for name, wanted in zip(
            recorded["order"], recorded["by_step_index"][str(step)]
        ):
            # Recorded before the rule for norms of zero.
            close(ratios[model[name].path], wanted or 1.0)


@pytest.mark.parametrize("kind", ["LARS", "TVLARS", "LAMB"])
def test_trust_ratios_of_compiled_steps(kind):
    arguments = {"decay_rate": 0.1, "delay": 3.0} if kind == "TVLARS" else {}
    optimizer = getattr(keras_stab, kind)(
        0.01, **arguments, track_trust_ratios=True
    )
    model = small_network()
    model.compile(optimizer, "mse")
    x, y = np.ones((8, 3), "float32"), np.zeros((8, 2), "float32")
    model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    ratios = optimizer.trust_ratios()
    assert set(ratios) == {
        model.get_layer(n).kernel.path for n in ("first", "last")
    }
    assert all(0 < float(r) < np.inf for r in ratios.values())
    with pytest.raises(ValueError, match="track_trust_ratios=True"):
        keras_stab.LARS(0.1).trust_ratios()


def test_describe():
    model = small_network()
    optimizer = keras_stab.LARS(
        0.1, weight_decay=1e-4, decay_exclude=["last/"], adaptation_exclude=[]
    )
    with pytest.raises(ValueError, match="build"):
        optimizer.describe()
    optimizer.build(model.trainable_variables)
    lines = {
        line.split()[0]: line.split()[-2:]
        for line in optimizer.describe().splitlines()[1:]
    }
    first, last = model.get_layer("first"), model.get_layer("last")
    assert lines[last.kernel.path] == ["no", "yes"]
    assert lines[first.bias.path] == ["yes", "yes"]


# ---- Exclusions and bad input ---------------------------------------------


def small_network():
    return keras.Sequential(
        [
            keras.Input((3,), name="x"),
            keras.layers.Dense(4, name="first"),
            keras.layers.LayerNormalization(name="norm"),
            keras.layers.Dense(2, name="last"),
        ],
        name="net",
    )


@pytest.mark.parametrize("kind", ["LARS", "LAMB"])
def test_exclusions(kind):
    model = small_network()
    kernel = model.get_layer("first").kernel
    optimizer = getattr(keras_stab, kind)(
        0.1, decay_exclude=["norm/", kernel], adaptation_exclude=[]
    )
    again = type(optimizer).from_config(optimizer.get_config())
    for each in (optimizer, again):
        each.build(model.trainable_variables)
        paths = [v.path for v in model.trainable_variables]
        left_out = {p for p, decayed in zip(paths, each.decayed) if not decayed}
        assert left_out == {p for p in paths if "norm/" in p} | {kernel.path}
        assert all(each.adapted)


def test_the_rule_of_dimensions():
    model = small_network()
    optimizer = keras_stab.LARS(0.1)
    optimizer.build(model.trainable_variables)
    wanted = [len(v.shape) > 1 for v in model.trainable_variables]
    assert optimizer.decayed == wanted and optimizer.adapted == wanted


def test_keras_own_way_to_exclude():
    model = small_network()
    optimizer = keras_stab.LARS(0.1, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["last/"])
    optimizer.build(model.trainable_variables)
    # In addition to the rule of dimensions, as in Keras to what it has.
    wanted = [
        "last/" not in v.path and len(v.shape) > 1
        for v in model.trainable_variables
    ]
    assert optimizer.decayed == wanted
    with pytest.raises(ValueError, match="before the optimizer is built"):
        optimizer.exclude_from_weight_decay(var_names=["first/"])


def test_a_pattern_that_matches_nothing():
    model = small_network()
    optimizer = keras_stab.LARS(0.1, decay_exclude=["batch_norm"])
    with pytest.raises(ValueError, match="'batch_norm'.*first/kernel"):
        optimizer.build(model.trainable_variables)


BAD = [
    ("LARS", {"learning_rate": -1.0}, "learning_rate"),
    ("LARS", {"learning_rate": float("nan")}, "learning_rate"),
    ("LARS", {"learning_rate": "fast"}, "learning_rate"),
    ("LARS", {"momentum": 1.0}, "momentum"),
    ("LARS", {"weight_decay": -0.1}, "weight_decay"),
    ("LARS", {"trust_coefficient": 0.0}, "trust_coefficient"),
    ("LARS", {"epsilon": -1e-8}, "epsilon"),
    ("LARS", {"nesterov": True, "momentum": 0.0}, "nesterov"),
    ("LARS", {"momentum_style": "beside"}, "momentum_style"),
    ("LARS", {"norm": "max"}, "norm"),
    ("LARS", {"trust_clip": 0.0}, "trust_clip"),
    ("LARS", {"clip_mode": "larc", "trust_clip": 1.0}, "trust_clip"),
    ("LARS", {"decay_exclude": "bias"}, "list"),
    ("LARS", {"decay_exclude": [3]}, "strings or variables"),
    ("LARS", {"exclude_1d": 1}, "exclude_1d"),
    ("TVLARS", {}, "decay_rate"),
    ("TVLARS", {"decay_rate": 0.1}, "delay.*from_steps"),
    ("TVLARS", {"decay_rate": -0.1, "delay": 0}, "decay_rate"),
    ("TVLARS", {"decay_rate": 0.1, "delay": 0, "alpha": -1.0}, "alpha"),
    (
        "TVLARS",
        {"decay_rate": 0.1, "variant": "official", "alpha": 1.0},
        "official.*alpha=0.1",
    ),
    (
        "TVLARS",
        {"decay_rate": 0.1, "variant": "official", "nesterov": True},
        "official.*nesterov=False",
    ),
    ("LAMB", {"beta_1": 1.0}, "beta_1"),
    ("LAMB", {"weight_norm_max": -1.0}, "weight_norm_max"),
    ("WarmupPolynomial", {"warmup_steps": 5, "total_steps": 5}, "total_steps"),
    ("WarmupCosine", {"warmup_steps": -1, "total_steps": 5}, "warmup_steps"),
]


@pytest.mark.parametrize("kind, arguments, message", BAD)
def test_bad_arguments(kind, arguments, message):
    arguments = {"learning_rate": 1.0} | arguments
    with pytest.raises(ValueError, match=message):
        getattr(keras_stab, kind)(**arguments)


@pytest.mark.parametrize("rate", [1, np.float32(0.5), np.int64(2)])
def test_any_number_is_a_learning_rate(rate):
    for kind in (keras_stab.LARS, keras_stab.LAMB):
        assert float(kind(rate).learning_rate) == float(rate)


def test_a_factor_that_freezes_training():
    with pytest.warns(UserWarning, match="from update 96 on"):
        keras_stab.TVLARS(decay_rate=0.1, delay=50.0, floor=0.0)


def test_raw_rates_of_excluded_variables():
    model = small_network()
    with pytest.warns(UserWarning, match="raw learning rate 10"):
        keras_stab.LARS(10.0).build(model.trainable_variables)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = keras_stab.LARS(10.0, excluded_lr_scale=0.01)
        optimizer.build(model.trainable_variables)


@pytest.mark.parametrize("kind", [keras_stab.LARS, keras_stab.LAMB])
def test_scales_of_float8_layers_have_no_trust_ratio(kind):
    layer = keras.layers.Dense(3)
    layer.build((None, 4))
    layer.quantize("float8")
    optimizer = kind(0.1, exclude_1d=False, track_trust_ratios=True)
    optimizer.build(layer.trainable_variables)
    weights = {layer.kernel.path, layer.bias.path}
    assert set(optimizer.trust_ratios()) == weights
    for row in optimizer.describe().splitlines()[1:]:
        name = row.split()[0]
        assert ("yes" in row) == (name in weights) or "/" not in name


def test_schedules_of_a_float64_model():
    from keras_stab import schedules

    with float64():
        for schedule, expected in (
            (schedules.WarmupPolynomial(0.3, 3, 20), 0.3 * 2 / 3),
            (schedules.WarmupCosine(0.3, 3, 20), 0.3 * 2 / 3),
            (schedules.LinearWarmup(0.3, 7), 0.3 * 3 / 7),
            (
                schedules.ConstantTail(0.3, 0.1, 7, shape="linear"),
                0.3 - 0.2 * 2 / 7,
            ),
            (
                schedules.TimeVaryingSigmoid(0.3, 0.1, 7.0, floor=0.0),
                0.3 / (1.0 + np.exp(0.1 * (2 - 7))),
            ),
        ):
            rate = float(keras.ops.convert_to_numpy(schedule(2)))
            np.testing.assert_allclose(rate, expected, rtol=1e-14)


def test_a_compiled_step_reads_no_number():
    """Each would be another program to compile at each step."""
    tensors, answers = [keras.ops.ones(2)], []

    def step(tensor):
        answers.append(in_place.is_quicker([], tensors))
        return tensor + 1.0

    step(*tensors)
    if ON_TORCH:
        import torch

        step = torch.compile(step, backend="eager")
    step(*tensors)
    assert answers == [ON_TORCH, False]
