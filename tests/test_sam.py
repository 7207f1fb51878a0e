"""SAM: vectors, invariants, what each pass may touch, bad input."""

import contract
import keras
import numpy as np
import pytest
import small_classifier
from hypothesis import given
from hypothesis import strategies as st
from interpolation_cases import float64

import keras_stab
from keras_stab.gradients.oracle import GradientOracle
from keras_stab.numerics.ascent import ascent
from keras_stab.numerics.ascent import cosine
from keras_stab.numerics.ascent import global_norm
from keras_stab.numerics.vectors import inner

JIT = "auto" if keras.backend.backend() == "torch" else True
ROWS = {
    "SAM_davda54_rho0.05_sgdm": {"rho": 0.05},
    "ASAM_davda54_rho2_sgdm": {"rho": 2.0, "adaptive": "all"},
    "SAM_interval3_rho0.1_sgdm": {"rho": 0.1, "interval": 3},
}


@pytest.mark.parametrize("name", ROWS)
def test_vectors(name):
    run = small_classifier.SAM["runs"][name]
    optimizer = keras_stab.SAM(small_classifier.base(run), **ROWS[name])
    small_classifier.assert_follows(run, optimizer)


@pytest.mark.parametrize("name", list(ROWS)[:2])
def test_perturbed_gradient_of_the_vectors(name):
    run = small_classifier.SAM["runs"][name]
    model = small_classifier.network()
    optimizer = keras_stab.SAM("sgd", **ROWS[name])
    model.compile(optimizer, small_classifier.LOGITS)
    optimizer.build(model.trainable_variables)
    x, y = map(keras.ops.convert_to_tensor, small_classifier.batch(0))
    oracle = GradientOracle(model, x, y)
    answer = small_classifier.flattened(optimizer.estimate(oracle))
    np.testing.assert_allclose(answer, run["grad_perturbed_step0"], atol=2e-6)


# ---- Mathematics ----------------------------------------------------------


def perturbation(*arguments):
    direction, factor, _ = ascent(*arguments)
    return [factor * part for part in direction]


@given(st.integers(0, 1000), st.sampled_from([1e-4, 1.0, 1e12]))
def test_perturbation_has_the_radius_and_ignores_the_scale(seed, size):
    generator = np.random.default_rng(seed)
    gradients = [
        generator.normal(size=shape).astype("float32") for shape in ((3, 2), 4)
    ]
    scales = [np.abs(generator.normal(size=g.shape)) for g in gradients]
    scales = [s.astype("float32") for s in scales]
    as_tensors = keras.ops.convert_to_tensor
    tensors = [as_tensors(g * np.float32(size)) for g in gradients]
    plain = perturbation(tensors, [1.0, 1.0], 0.5)
    np.testing.assert_allclose(float(global_norm(plain)), 0.5, rtol=2e-6)
    adaptive = perturbation(tensors, [as_tensors(s) for s in scales], 0.5)
    over_t = [as_tensors(np.array(e) / s) for e, s in zip(adaptive, scales)]
    np.testing.assert_allclose(float(global_norm(over_t)), 0.5, rtol=1e-5)
    again = perturbation([as_tensors(g) for g in gradients], [1.0, 1.0], 0.5)
    for one, other in zip(plain, again):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-5)


def test_no_gradient_no_perturbation():
    zeros = [keras.ops.zeros((3,)), keras.ops.zeros(())]
    for part in perturbation(zeros, [1.0, 1.0], 0.1):
        assert np.all(np.array(part) == 0.0)
    assert float(cosine(inner(zeros, zeros), global_norm(zeros) ** 2)) == 0.0


def test_a_norm_in_half_precision_does_not_overflow():
    big = [keras.ops.full((4,), 3e4, dtype="float16")]
    assert float(global_norm(big)) == pytest.approx(6e4, rel=1e-3)


class Quadratic(keras.Model):
    """Loss `w'Aw / 2` of a vector w."""

    matrix = np.array([[2.0, 0.3], [0.3, 0.5]], "float32")

    def __init__(self, start=(1.0, -2.0)):
        super().__init__()
        self.w = self.add_weight(shape=(2,), initializer="zeros", name="w")
        self.w.assign(start)

    def call(self, inputs):
        return inputs

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        w = keras.ops.convert_to_tensor(self.w)
        product = keras.ops.matmul(keras.ops.convert_to_tensor(self.matrix), w)
        return 0.5 * keras.ops.sum(w * product)


def one_step(model, optimizer):
    model.compile(optimizer)
    model.train_on_batch(np.ones((1, 1), "float32"))
    return np.array(keras.ops.convert_to_numpy(model.w))


def test_on_a_quadratic():
    optimizer = keras_stab.SAM(keras.optimizers.SGD(0.1), rho=0.2)
    after = one_step(Quadratic(), optimizer)
    w, matrix = np.array([1.0, -2.0]), Quadratic.matrix
    gradient = matrix @ w
    at = w + 0.2 * gradient / np.linalg.norm(gradient)
    np.testing.assert_allclose(after, w - 0.1 * matrix @ at, rtol=2e-6)
    figures = optimizer.diagnostics()
    gap = at @ matrix @ at / 2 - w @ matrix @ w / 2
    assert figures["sharpness_gap"] == pytest.approx(gap, rel=1e-4)
    assert figures["gradient_norm"] == pytest.approx(np.linalg.norm(gradient))
    assert figures["perturbation_norm"] == pytest.approx(0.2)


def test_zero_gradient_moves_nothing():
    model = Quadratic(start=(0.0, 0.0))
    after = one_step(model, keras_stab.SAM(keras.optimizers.SGD(0.1)))
    np.testing.assert_array_equal(after, [0.0, 0.0])


def test_adaptive_form_ignores_scales_of_layers():
    """Bias-free two-layer linear network: W1 a and W2 / a are the same."""

    def loss_near_by(a):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Dense(4, use_bias=False),
                keras.layers.Dense(2, use_bias=False),
            ]
        )
        first, second = model.get_weights()
        model.set_weights([first * a, second / a])
        optimizer = keras_stab.SAM("sgd", rho=0.5, adaptive="all")
        model.compile(optimizer, "mse")
        generator = np.random.default_rng(0)
        x = generator.normal(size=(8, 3)).astype("float32")
        loss = model.train_on_batch(x, x[:, :2])
        return loss + optimizer.diagnostics()["sharpness_gap"]

    assert loss_near_by(8.0) == pytest.approx(loss_near_by(1.0), rel=1e-4)


def test_official_adaptive_form_leaves_offsets_alone():
    """T is 1 for biases and offsets, |w| + eta elsewhere."""
    model = contract.classifier(dropout=False)
    optimizer = keras_stab.SAM("sgd", rho=0.5, adaptive=True, eta=0.25)
    x, y = contract.data(1)
    shifts = shifts_of(model, optimizer, x, y)
    data = map(keras.ops.convert_to_tensor, (x, y))
    gradients = GradientOracle(model, *data).gradient()
    lengths = []
    for variable, e, g in zip(model.trainable_variables, shifts, gradients):
        scale = 1.0
        if not variable.path.endswith(("bias", "beta")):
            value = keras.ops.convert_to_numpy(variable)
            scale = np.abs(value) + 0.25
        e, g = (keras.ops.convert_to_numpy(t) for t in (e, g))
        # The bias before batch-norm has a gradient of rounding alone.
        large = np.abs(g) > 1e-6
        lengths.append((e / np.where(large, scale**2 * g, 1.0))[large])
    lengths = np.concatenate(lengths)
    np.testing.assert_allclose(lengths, lengths[0], rtol=1e-5)


class Quartic(keras.Model):
    """Loss `sum(w^4) / 4`."""

    def __init__(self):
        super().__init__(dtype="float64")
        self.w = self.add_weight(shape=(2,), initializer="zeros", name="w")
        self.w.assign([1.1, -0.7])

    def call(self, inputs):
        return inputs

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        square = self.w * self.w
        return keras.ops.sum(square * square) / 4.0


@pytest.mark.parametrize(
    "arguments, scale",
    [
        ({}, lambda w: np.ones(2)),
        ({"adaptive": "all"}, np.abs),
        ({"adaptive": True, "eta": 0.25}, lambda w: np.abs(w) + 0.25),
        ({"interval": 2}, lambda w: np.ones(2)),
    ],
    ids=["sam", "asam", "asam_eta", "interval"],
)
def test_in_double_precision(arguments, scale):
    with float64():
        model = Quartic()
        sam = keras_stab.SAM(keras.optimizers.SGD(0.125), rho=0.2, **arguments)
        model.compile(sam)
        model.train_on_batch(np.ones((1, 1)))
        after = keras.ops.convert_to_numpy(model.w)
        length = sam.diagnostics()["gradient_norm"]
    w = np.array([1.1, -0.7])
    g, t = w**3, scale(w)
    at = w + 0.2 * t**2 * g / np.linalg.norm(t * g)
    np.testing.assert_allclose(after, w - 0.125 * at**3, rtol=1e-12)
    assert length == pytest.approx(np.linalg.norm(g), rel=1e-12)


# ---- When it is off -------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [{"rho": 0.0}, {"start_step": 1000}, {"interval": 1000, "start_step": 900}],
    ids=str,
)
def test_off_is_the_inner_optimizer_bit_for_bit(arguments):
    x, y = contract.data(4)
    plain = contract.compiled(contract.INNER["adamw"](), jit_compile=JIT)
    off = contract.compiled(
        keras_stab.SAM(contract.INNER["adamw"](), **arguments),
        jit_compile=JIT,
    )
    for model in (plain, off):
        contract.fit(model, x, y)
    contract.assert_same_bits(plain.get_weights(), off.get_weights())


def test_interval_start_and_stop_say_when():
    """Two passes leave a trace in the diagnostics."""
    x, y = contract.data(1)
    optimizer = keras_stab.SAM("sgd", interval=2, start_step=1, stop_step=5)
    model = contract.compiled(optimizer)
    seen = []
    for _ in range(7):
        before = optimizer.diagnostics() if seen else None
        model.train_on_batch(x, y)
        seen.append(optimizer.diagnostics() != before)
    # Before update 1 there are no figures to differ from.
    assert seen[1:] == [True, False, True, False, False, False]


def test_rho_as_a_schedule():
    x, y = contract.data(1)
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [1], [0.1, 0.3]
    )
    optimizer = keras_stab.SAM("sgd", rho=schedule)
    model = contract.compiled(optimizer)
    norms = []
    for _ in range(4):
        model.train_on_batch(x, y)
        norms.append(optimizer.diagnostics()["perturbation_norm"])
    np.testing.assert_allclose(norms, [0.1, 0.1, 0.3, 0.3], rtol=1e-5)
    again = keras_stab.SAM.from_config(optimizer.get_config())
    assert again.get_config() == optimizer.get_config()


def test_a_schedule_of_rho_is_given_a_tensor():
    """As from Keras, also where the step is known as a number."""

    class Halved(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            assert keras.ops.is_tensor(step)
            return 0.1 / (1.0 + keras.ops.cast(step, "float32"))

    optimizer = keras_stab.SAM("sgd", rho=Halved())
    contract.compiled(optimizer).train_on_batch(*contract.data(1))
    norm = optimizer.diagnostics()["perturbation_norm"]
    np.testing.assert_allclose(norm, 0.1, rtol=1e-5)


def test_rho_in_proportion_to_the_learning_rate():
    x, y = contract.data(1)
    rate = keras_stab.WarmupCosine(0.1, warmup_steps=2, total_steps=4)
    optimizer = keras_stab.SAM(
        keras.optimizers.SGD(rate), rho=0.2, rho_schedule="learning_rate"
    )
    model = contract.compiled(optimizer)
    norms = []
    for _ in range(4):
        model.train_on_batch(x, y)
        norms.append(optimizer.diagnostics()["perturbation_norm"])
    # Half of the rate at update 1 and at update 3, nearly: the floor is 1e-3.
    np.testing.assert_allclose(norms, [0.0, 0.1, 0.2, 0.1001], atol=1e-6)


# ---- What each pass may touch ---------------------------------------------


def test_state_metrics_and_loss_are_those_of_a_plain_step():
    x, y = contract.data(1)
    plain = contract.compiled("sgd")
    sam = contract.compiled(keras_stab.SAM("sgd", rho=0.5))
    logs = [model.train_on_batch(x, y) for model in (plain, sam)]
    np.testing.assert_allclose(logs[0], logs[1], rtol=2e-6)
    for one, other in zip(
        plain.non_trainable_variables, sam.non_trainable_variables
    ):
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(one),
            keras.ops.convert_to_numpy(other),
            rtol=1e-6,
        )


class Draw(keras.layers.Layer):
    """Adds noise that only its seed tells."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.generator = keras.random.SeedGenerator(3)

    def call(self, inputs):
        noise = keras.random.normal(
            keras.ops.shape(inputs), seed=self.generator
        )
        return inputs + noise


@pytest.mark.parametrize("independent", [False, True])
def test_noise_of_the_second_pass(independent):
    """A weight that changes nothing shows it: the gap is that of the noise."""
    model = keras.Sequential([keras.Input((2,)), Draw(), keras.layers.Dense(1)])
    optimizer = keras_stab.SAM("sgd", rho=1e-6, independent_noise=independent)
    model.compile(optimizer, "mse")
    model.train_on_batch(np.ones((4, 2), "float32"), np.ones((4, 1), "float32"))
    gap = abs(optimizer.diagnostics()["sharpness_gap"])
    assert gap > 1e-3 if independent else gap < 1e-4
    # The stored seed is one step on, whatever the second pass drew.
    seed = keras.ops.convert_to_numpy(model.non_trainable_variables[0])
    assert seed.tolist() == [3, 1]


def test_regulariser_and_sample_weights_are_in_both_passes():
    def model():
        keras.utils.set_random_seed(0)
        dense = keras.layers.Dense(
            1, use_bias=False, kernel_regularizer=keras.regularizers.L2(0.3)
        )
        return keras.Sequential([keras.Input((2,)), dense])

    x = np.array([[1.0, 2.0], [0.5, -1.0]], "float32")
    y = np.array([[1.0], [0.0]], "float32")
    share = np.array([1.0, 3.0], "float32")
    trained = model()
    w = trained.get_weights()[0].astype("float64")
    trained.compile(keras_stab.SAM(keras.optimizers.SGD(0.1), rho=0.4), "mse")
    trained.train_on_batch(x, y, sample_weight=share)

    def gradient(w):
        return x.T @ (share[:, None] * (x @ w - y)) + 2 * 0.3 * w

    g = gradient(w)
    h = gradient(w + 0.4 * g / np.linalg.norm(g))
    np.testing.assert_allclose(trained.get_weights()[0], w - 0.1 * h, rtol=1e-5)


def shifts_of(model, optimizer, x, y):
    """By how much each variable is moved for the second pass."""
    optimizer.build(model.trainable_variables)
    model.compile(optimizer, small_classifier.LOGITS)
    shifts = []

    class Spy(GradientOracle):
        def at(self, shift, factor=1.0):
            shifts.extend(None if s is None else factor * s for s in shift)
            return super().at(shift, factor)

    optimizer.estimate(Spy(model, *map(keras.ops.convert_to_tensor, (x, y))))
    return shifts


def test_variables_can_be_left_out():
    def perturbed(**arguments):
        model = contract.classifier(dropout=False)
        optimizer = keras_stab.SAM("sgd", rho=1.0, **arguments)
        shifts = shifts_of(model, optimizer, *contract.data(1))
        names = [v.path.split("/")[-1] for v in model.trainable_variables]
        return [n for n, s in zip(names, shifts) if s is not None]

    assert perturbed(variable_filter="normalization") == ["gamma", "beta"]
    kernels = perturbed(variable_filter=lambda path: path.endswith("kernel"))
    assert kernels == ["kernel", "kernel"]
    assert len(perturbed()) == 6


def test_variables_left_out_are_found_after_a_layer_was_frozen():
    """Not by their positions among those that are trained today."""
    model = contract.classifier(dropout=False)
    optimizer = keras_stab.SAM("sgd", variable_filter="normalization")
    optimizer.build(model.trainable_variables)
    model.get_layer("first").trainable = False
    shifts = shifts_of(model, optimizer, *contract.data(1))
    names = [v.path.split("/")[-1] for v in model.trainable_variables]
    assert [n for n, s in zip(names, shifts) if s is not None] == [
        "gamma",
        "beta",
    ]


def test_rows_of_a_table_that_are_not_looked_up_stay():
    """Also where the gradient of the table is sparse."""
    inputs = keras.Input((2,), dtype="int32")
    x = keras.layers.Flatten()(keras.layers.Embedding(5, 3)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    ids = np.array([[1, 3], [3, 1]], "int32")
    optimizer = keras_stab.SAM("sgd", rho=0.5)
    shifts = shifts_of(model, optimizer, ids, np.array([0, 2], "int32"))
    table = keras.ops.convert_to_numpy(shifts[0])
    moved = np.any(table != 0.0, axis=1)
    np.testing.assert_array_equal(moved, [False, True, False, True, False])
    assert float(global_norm(shifts)) == pytest.approx(0.5, rel=1e-5)


def test_weights_are_as_before_when_the_second_pass_overflows():
    """The first pass is finite; the scaler skips the step, halves once."""
    keras.config.set_dtype_policy("mixed_float16")
    x, y = contract.data(1)
    model = contract.compiled(keras_stab.SAM("sgd", rho=1e30))
    before = model.get_weights()
    model.train_on_batch(x, y)
    after = [v for v in model.trainable_variables]
    kept = [w for w, v in zip(before, model.weights) if v.trainable]
    contract.assert_same_bits(
        kept[: len(after)], [keras.ops.convert_to_numpy(v) for v in after]
    )
    assert float(model.optimizer.dynamic_scale) == 2.0**14


# ---- Nesting and bad input ------------------------------------------------


def test_around_grain():
    """The combined direction at w, then the combined direction at w + e."""
    x, y = map(keras.ops.convert_to_tensor, contract.data(1))
    model = contract.classifier(dropout=False)
    grain = keras_stab.GRAIN("sgd", groups=4)
    optimizer = keras_stab.SAM(grain, rho=0.1)
    contract.compiled(optimizer, model)
    optimizer.build(model.trainable_variables)
    oracle = GradientOracle(model, x, y)
    answer = optimizer.estimate(oracle)
    first = grain.estimate(GradientOracle(model, x, y))
    length = float(global_norm(first))
    shifted = GradientOracle(model, x, y).at([0.1 * g / length for g in first])
    for one, other in zip(answer, grain.estimate(shifted)):
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(one),
            keras.ops.convert_to_numpy(other),
            atol=1e-5,
        )


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"rho": -0.1}, "`rho` must be at least 0"),
        ({"rho": "big"}, "`rho` must be a number"),
        ({"eta": -1.0}, "`eta` must be at least 0"),
        ({"interval": 0}, "`interval` must be an integer of at least 1"),
        ({"interval": 2.0}, "`interval` must be an integer"),
        ({"start_step": -1}, "`start_step` must be an integer"),
        ({"start_step": 5, "stop_step": 5}, "`stop_step`.*at least 6"),
        ({"adaptive": "some"}, "`adaptive` must be one of"),
        ({"variable_filter": "biases"}, "`variable_filter` must be None"),
        ({"rho_schedule": "learning_rate"}, "reference_learning_rate"),
        ({"reference_learning_rate": 0.1}, "has no effect"),
        ({"momentum": 0.9}, r"SAM\(keras.optimizers.SGD\(momentum"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        keras_stab.SAM("sgd", **arguments)


def test_figures_of_a_broken_step_are_told_but_not_kept_as_nan():
    x, y = contract.data(1)
    optimizer = keras_stab.SAM(keras.optimizers.SGD(0.0))
    model = contract.compiled(optimizer)
    model.train_on_batch(np.full_like(x, np.nan), y)
    assert np.isnan(optimizer.diagnostics()["gradient_norm"])
    (figures,) = optimizer.own_variables
    assert np.all(np.isfinite(keras.ops.convert_to_numpy(figures)))


def test_a_filter_that_keeps_nothing():
    optimizer = keras_stab.SAM(variable_filter=lambda path: False)
    with pytest.raises(ValueError, match="leaves no variable"):
        optimizer.build([keras.Variable(np.ones(2, "float32"))])


def test_undefined_nestings():
    with pytest.raises(ValueError, match="inside the other method"):
        keras_stab.GRAIN(keras_stab.SAM("sgd"))
    with pytest.raises(ValueError, match="SAM inside SAM"):
        keras_stab.SAM(keras_stab.SAM("sgd"))


def test_plain_gradients_are_refused():
    weights = [keras.Variable(np.ones(2, "float32"))]
    optimizer = keras_stab.SAM("sgd")
    optimizer.build(weights)
    with pytest.raises(RuntimeError, match="received plain gradients"):
        optimizer.apply([keras.ops.ones(2)], weights)
    with pytest.raises(ValueError, match="before the first step"):
        keras_stab.SAM("sgd").diagnostics()


@pytest.mark.parametrize("method", ["SAM", "IRE"])
def test_schedule_free_stays_outside(method):
    """It has a point of its own, at which gradients are taken."""
    inner = keras_stab.ScheduleFree.sgd(0.1)
    with pytest.raises(ValueError, match=rf"ScheduleFree\({method}\(...\)\)"):
        getattr(keras_stab, method)(inner)
