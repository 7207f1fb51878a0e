"""What Keras does around RAPP, Lookahead and extragradient; refusals."""

import contract
import interpolation_cases as cases
import keras
import numpy as np
import pytest
from interpolation_cases import BACKEND
from interpolation_cases import SGD
from interpolation_cases import Adam

import keras_stab
from keras_stab.constraints import Box
from keras_stab.constraints import SquaredL2

RAPP = keras_stab.RAPP
CEGPlus = keras_stab.CEGPlus
Lookahead = keras_stab.Lookahead
ExtraGradient = keras_stab.ExtraGradient

KINDS = {
    "RAPP": lambda: RAPP(0.1),
    "CEGPlus": lambda: CEGPlus(0.1),
    "adaptive": lambda: CEGPlus(0.1, "adaptive", minty_constant=-0.01),
    "Lookahead": lambda: Lookahead(SGD(0.1)),
    "ExtraGradient": lambda: ExtraGradient(SGD(0.1)),
    "OptimisticGradient": lambda: keras_stab.OptimisticGradient(SGD(0.1)),
    "PastExtraGradient": lambda: keras_stab.PastExtraGradient(SGD(0.1)),
}
GRADIENTS = np.random.default_rng(5).normal(size=(14, 2)).round(3)


def fed(optimizer, gradients, start=(1.0, 0.5)):
    """The points to which gradients lead, and the variables."""
    pair = [keras.Variable(z, name=n) for z, n in zip(start, "xy")]
    return feed(optimizer, gradients, pair), pair


def feed(optimizer, gradients, pair):
    points = []
    for gradient in gradients:
        tensors = [keras.ops.convert_to_tensor(float(g)) for g in gradient]
        optimizer.apply(tensors, pair)
        points.append([float(v.numpy()) for v in pair])
    return np.array(points)


def players(*optimizers):
    return keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(optimizers[0], {"y": optimizers[1]})
    )


def trained_weights(model):
    return [np.array(v.numpy()) for v in model.trainable_variables]


# ---- The race on TensorFlow -----------------------------------------------


class Bilinear(keras.Model):
    """Loss `sum(a b)`: no gradient depends on its own variable."""

    def __init__(self):
        super().__init__()
        self.a = self.add_weight(shape=(10,), initializer="ones", name="a")
        self.b = self.add_weight(shape=(10,), initializer="ones", name="b")

    def call(self, inputs):
        return inputs

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        return keras.ops.sum(self.a * self.b)


@pytest.mark.parametrize("kind", KINDS)
def test_no_assignment_overtakes_a_gradient(kind):
    """Twenty fits are alike and right; with Keras's own step few are."""
    model = Bilinear()
    model.compile(KINDS[kind]())
    model.optimizer.build(model.trainable_variables)
    start = [np.array(v.numpy()) for v in model.optimizer.variables]
    walk = cases.Walk(KINDS[kind](), lambda x, y: (y, x), [1.0, 1.0])
    walk.step(20)
    ends = []
    for _ in range(20 if BACKEND == "tensorflow" else 1):
        model.set_weights([np.ones(10), np.ones(10)])
        for variable, value in zip(model.optimizer.variables, start):
            variable.assign(value)
        model.fit(np.ones((20, 1)), batch_size=1, shuffle=False, verbose=0)
        keras_stab.return_trained_weights(model)
        ends.append(model.get_weights())
        contract.assert_same_bits(ends[0], ends[-1])
    for actual, wanted in zip(ends[0], walk.point()):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5)


# ---- Counting -------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_of_accumulated_gradients_is_one_update(kind):
    plain = KINDS[kind]()
    config = plain.get_config()
    inside = config.get("inner_optimizer")
    (inside["config"] if inside else config)["gradient_accumulation_steps"] = 2
    windows = type(plain).from_config(config)
    wanted, _ = fed(plain, GRADIENTS[:7])
    actual, _ = fed(windows, np.repeat(GRADIENTS[:7], 2, axis=0))
    np.testing.assert_allclose(actual[1::2], wanted, atol=1e-6)
    # In between nothing moves.
    np.testing.assert_array_equal(actual[2::2], actual[1:-1:2])
    assert int(windows.iterations) == 7


def test_separate_moments_with_accumulation_and_rates():
    inner = Adam(0.1, gradient_accumulation_steps=2)
    optimizer = ExtraGradient(inner, moments="separate")
    plain = ExtraGradient(Adam(0.1), moments="separate")
    wanted, _ = fed(plain, GRADIENTS[:5])
    actual, _ = fed(optimizer, np.repeat(GRADIENTS[:5], 2, axis=0))
    np.testing.assert_allclose(actual[1::2], wanted, atol=1e-6)
    assert int(optimizer.iterations) == 5
    optimizer.learning_rate = 0.25
    other = optimizer.extrapolation_optimizer
    assert float(other.learning_rate) == float(inner.learning_rate) == 0.25
    assert int(inner.iterations) + int(other.iterations) == 5


@pytest.mark.parametrize("kind, length", [("RAPP", 3), ("Lookahead", 5)])
def test_cycles_start_from_the_weights_that_are_there(kind, length):
    """After `load_weights`, in the middle of a run."""
    optimizer = KINDS[kind]()
    _, pair = fed(optimizer, GRADIENTS[:length])
    for variable, value in zip(pair, (0.25, -2.0)):
        variable.assign(value)
    actual = feed(optimizer, GRADIENTS[:length], pair)
    wanted, _ = fed(KINDS[kind](), GRADIENTS[:length], (0.25, -2.0))
    np.testing.assert_allclose(actual, wanted, atol=1e-6)


def test_many_weights_go_back_as_few_do():
    """Large ones are compiled by themselves on TensorFlow."""
    points = []
    for count in (3, 2**20):
        values = np.resize(np.linspace(-1.0, 1.0, 3), count)
        variable = keras.Variable(values.astype("float32"))
        optimizer = Lookahead(SGD(0.5), sync_period=2, slow_step_size=0.25)
        for _ in range(3):
            gradient = keras.ops.copy(variable.value)
            optimizer.apply([gradient], [variable])
        points.append(np.array(variable.numpy()))
    # To 1/4 in two steps, a quarter of the way there, and a step more.
    factor = (1.0 - 0.25 * 0.75) * 0.5
    np.testing.assert_allclose(points[0], factor * values[:3], atol=1e-6)
    np.testing.assert_allclose(points[1], np.resize(points[0], 2**20))


def test_a_cycle_keeps_its_rate():
    """A schedule is read at the first gradient of a cycle."""
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [1, 4], [0.5, 0.3, 0.1]
    )
    points, _ = fed(RAPP(schedule, 3, 0.5), GRADIENTS[:9])
    anchor, wanted = np.array([1.0, 0.5]), []
    for cycle, rate in enumerate((0.5, 0.3, 0.1)):
        for gradient in GRADIENTS[3 * cycle : 3 * cycle + 3]:
            wanted.append(anchor - rate * gradient)
        anchor = wanted[-1] = 0.5 * (anchor + wanted[-1])
    np.testing.assert_allclose(points, wanted, atol=1e-6)


def test_rows_without_a_gradient_go_back_to_the_anchor():
    """Embeddings give sparse gradients on TensorFlow."""
    model = keras.Sequential(
        [keras.layers.Embedding(4, 2), keras.layers.Dense(1)]
    )
    model.compile(RAPP(0.5), loss="mse")
    model.build((None, 1))
    start = model.get_weights()[0]
    for row in (1, 2):
        model.train_on_batch(np.array([[row]]), np.ones((1, 1, 1)))
        moved = model.get_weights()[0]
        others = [i for i in range(4) if i != row]
        assert np.any(moved[row] != start[row])
        np.testing.assert_array_equal(moved[others], start[others])


@pytest.mark.parametrize("kind", [*KINDS, "reset", "pullback", "separate"])
def test_state_is_saved_at_every_phase(kind):
    make = KINDS.get(kind)
    if kind == "separate":
        make = lambda: ExtraGradient(Adam(0.1), moments=kind)  # noqa: E731
    elif make is None:
        make = lambda: Lookahead(  # noqa: E731
            SGD(0.1, momentum=0.9), inner_state=kind
        )
    wanted, _ = fed(make(), GRADIENTS)
    for stop in range(1, 6):
        first = make()
        _, pair = fed(first, GRADIENTS[:stop])
        second = make()
        second.build(pair)
        for variable, saved in zip(second.variables, first.variables):
            variable.assign(saved.numpy())
        rest = feed(second, GRADIENTS[stop:], pair)
        np.testing.assert_array_equal(rest, wanted[stop:])


def test_gradients_a_step_and_memory():
    counts = {kind: make().evaluations_per_step for kind, make in KINDS.items()}
    assert counts == {
        "RAPP": 3,
        "CEGPlus": 2,
        "adaptive": 2,
        "Lookahead": 1,
        "ExtraGradient": 2,
        "OptimisticGradient": 1,
        "PastExtraGradient": 1,
    }
    scaled = keras.optimizers.LossScaleOptimizer(RAPP(0.1, 4))
    assert Lookahead(scaled).evaluations_per_step == 4
    variable = keras.Variable(np.zeros((2, 3)))
    for kind, make in KINDS.items():
        optimizer = make()
        optimizer.build([variable])
        copies = [v for v in optimizer.variables if tuple(v.shape) == (2, 3)]
        assert len(copies) == (2 if kind in ("CEGPlus", "adaptive") else 1)


def test_the_rates_of_players_are_reached():
    multi = players(SGD(0.1), SGD(0.2))
    optimizer = Lookahead(multi)
    assert optimizer.optimizers is multi.optimizers
    assert not hasattr(Lookahead("sgd"), "optimizers")
    assert len(list(keras_stab.nesting.whole_nest(optimizer))) == 4


# ---- Refusals -------------------------------------------------------------

COSINE = keras.optimizers.schedules.CosineDecay(0.1, 9)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RAPP(weight_decay=0.1), "SquaredL2"),
        (lambda: RAPP(use_ema=True), r"WeightAveraging\(RAPP"),
        (lambda: RAPP(relaxation=0.0), "relaxation"),
        (lambda: RAPP(relaxation=1.5), "relaxation"),
        (lambda: RAPP(inner_steps=0), "inner_steps"),
        (lambda: RAPP(proximal=3), "proximal"),
        (lambda: CEGPlus(alpha=2.0), "alpha"),
        (lambda: CEGPlus(alpha="Adaptive"), 'or "adaptive"'),
        (lambda: ExtraGradient(update_scale=0.0), "update_scale"),
        (lambda: ExtraGradient(moments="other"), "moments"),
        (lambda: ExtraGradient(RAPP()), "moves with every gradient"),
        (lambda: ExtraGradient(SGD(use_ema=True)), "Put it outside"),
        (lambda: keras_stab.OptimisticGradient("sgd", "no"), "initial_update"),
        (lambda: Lookahead(sync_period=0), "sync_period"),
        (lambda: Lookahead(slow_step_size=0.0), "slow_step_size"),
        (lambda: Lookahead(slow_step_size=1.1), "slow_step_size"),
        (lambda: Lookahead(Lookahead("sgd", 3), 5), "multiple"),
        (lambda: Lookahead(SGD(use_ema=True)), "Put it outside"),
        (lambda: Lookahead(inner_state="drop"), "inner_state"),
        (lambda: Lookahead(learning_rate=0.1), "inner one"),
        (lambda: Lookahead(SGD(COSINE), inner_state="reset"), "schedule"),
        (lambda: Lookahead(RAPP(), inner_state="reset"), "not wrapped"),
        (
            lambda: Lookahead(ExtraGradient(), inner_state="pullback"),
            "not wrapped",
        ),
        (
            lambda: Lookahead(
                players(SGD(), SGD(gradient_accumulation_steps=2))
            ),
            "accumulate",
        ),
        (
            lambda: Lookahead(players(SGD(), RAPP())).evaluations_per_step,
            "different numbers",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class StartsAsCopy(keras.optimizers.SGD):
    """With a slot that starts as a copy of the weights."""

    def build(self, variables):
        super().build(variables)
        self.copies = [
            self.add_variable_from_reference(
                v,
                "copy",
                initializer=lambda shape, dtype, v=v: keras.ops.copy(v.value),
            )
            for v in variables
        ]


@pytest.mark.parametrize(
    "make, constraint, message",
    [
        (RAPP, keras.constraints.UnitNorm(), "convex"),
        (CEGPlus, keras.constraints.MinMaxNorm(), "convex"),
        (lambda: RAPP(proximal={"bias": Box(0.0, 1.0)}), None, "no variable"),
        (lambda: RAPP(proximal=SquaredL2(1.0)), Box(0.0, 1.0), "more than one"),
        (
            lambda: Lookahead(SGD(), inner_state="pullback"),
            None,
            "interpolates momentum",
        ),
        (
            lambda: Lookahead(StartsAsCopy(), inner_state="reset"),
            None,
            "copy of the",
        ),
    ],
)
def test_what_is_refused_when_the_weights_are_known(make, constraint, message):
    variable = keras.Variable([[1.0, 2.0]], name="kernel")
    variable.constraint = constraint
    with pytest.raises(ValueError, match=message):
        make().build([variable])


def test_without_relaxation_there_is_a_warning():
    with pytest.warns(UserWarning, match="relaxation=1"):
        RAPP(relaxation=1.0)


@pytest.mark.parametrize("rate", [0.5, 1.5])
def test_diagnostics_of_rapp(rate):
    """In the game x y the estimate is the rate, and the residual |z|."""
    optimizer = RAPP(rate, 3, track_diagnostics=True)
    walk = cases.Walk(optimizer, cases.FIELDS["bilinear"], [3.0, 4.0])
    walk.step(3)
    if rate >= 1.0:
        with pytest.warns(UserWarning, match="do not contract"):
            figures = optimizer.diagnostics()
    else:
        figures = optimizer.diagnostics()
    assert figures["contraction"] == pytest.approx(rate, rel=1e-5)
    assert figures["residual"] == pytest.approx(5.0, rel=1e-5)
    with pytest.raises(ValueError, match="track_diagnostics"):
        RAPP().diagnostics()


def test_operators_are_saved():
    by_path = {"kernel": SquaredL2(2.0), "bias": Box(-1.0, None)}
    for proximal in (by_path, SquaredL2(2.0), keras.constraints.NonNeg()):
        optimizer = RAPP(proximal=proximal)
        again = RAPP.from_config(optimizer.get_config())
        assert again.get_config() == optimizer.get_config()
        assert isinstance(again.proximal, type(proximal))


def test_constraints_of_keras_are_projections():
    variable = keras.Variable([1.0, -2.0])
    variable.constraint = keras.constraints.NonNeg()
    optimizer = RAPP(0.5, 2, 0.5)
    for _ in range(2):
        optimizer.apply([keras.ops.convert_to_tensor([1.0, 1.0])], [variable])
    # From the feasible anchor (1, 0) half the way to (0.5, 0).
    np.testing.assert_allclose(variable.numpy(), [0.75, 0.0])
    assert isinstance(variable.constraint, keras.constraints.NonNeg)


# ---- Which weights are evaluated ------------------------------------------


def test_what_is_lent():
    """Slow weights or anchor in a cycle, the weights themselves after it."""
    model = keras.Sequential()
    cycles = [
        (RAPP(0.1, 3), 3),
        (CEGPlus(0.1), 2),
        (ExtraGradient(SGD(0.1)), 2),
        (Lookahead(Lookahead(SGD(0.1), 2), 4), 4),
        (Lookahead(CEGPlus(0.1), 2), 4),
    ]
    for optimizer, length in cycles:
        points, pair = fed(optimizer, GRADIENTS[:length])
        ends = points[-1]
        for i, gradient in enumerate(GRADIENTS[:length]):
            inside = feed(optimizer, [gradient], pair)[0]
            with optimizer.swap_weights(model):
                with optimizer.swap_weights(model):
                    lent = [float(v.numpy()) for v in pair]
            np.testing.assert_array_equal(
                lent, ends if i < length - 1 else inside
            )
            back = [float(v.numpy()) for v in pair]
            np.testing.assert_array_equal(back, inside)


def test_cegplus_lends_feasible_weights():
    params = {"gamma": 1.0, "alpha": 1.0}
    walk = cases.walk("quadratic_box", "CEG+", params, [1.0, 0.5])
    walk.step(2)
    assert np.abs(walk.point()).max() > 1.1
    for optimizer in (walk.optimizer, Lookahead(walk.optimizer)):
        optimizer.build([walk.z])
        (value,) = optimizer.evaluation_values()
        wanted = np.clip(walk.point(), -1.1, 1.1)
        np.testing.assert_allclose(keras.ops.convert_to_numpy(value), wanted)


def test_the_callback_evaluates_the_slow_weights(tmp_path):
    x, y = contract.data(7)
    model = contract.compiled(
        Lookahead(Adam(0.05)), contract.classifier(dropout=False)
    )
    swap = keras_stab.SwapSlowWeights(batch_norm_data=x)
    history = contract.fit(
        model, x, y, validation_data=(x, y), callbacks=[swap]
    ).history
    trained = model.get_weights()
    fast = model.evaluate(x, y, verbose=0)[0]
    swap = keras_stab.SwapSlowWeights(batch_norm_data=x)
    slow = model.evaluate(x, y, verbose=0, callbacks=[swap])[0]
    assert history["val_loss"][0] == pytest.approx(slow, rel=1e-5)
    assert abs(slow - fast) > 1e-4
    contract.assert_same_bits(trained, model.get_weights())
    # A file that is written inside holds both sets.
    with pytest.warns(UserWarning, match="batch-norm"):
        with model.optimizer.swap_weights(model):
            model.save(tmp_path / "lent.keras")
            lent = trained_weights(model)
    again = keras.models.load_model(tmp_path / "lent.keras")
    contract.assert_same_bits(lent, trained_weights(again))
    for each in (model, again):
        contract.fit(each, x, y)
    contract.assert_same_bits(contract.state(model), contract.state(again))
    contract.compiled("sgd", model)
    with pytest.raises(ValueError, match="no slow weights"):
        contract.fit(model, x, y, callbacks=[keras_stab.SwapSlowWeights()])


def test_an_average_of_anchors():
    optimizer = keras_stab.WeightAveraging(RAPP(0.1, 3), start_step=2, period=3)
    points, _ = fed(optimizer, GRADIENTS[:9])
    averages = [float(a.numpy()) for a in optimizer.averages]
    np.testing.assert_allclose(averages, points[2::3].mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize("method", ["OptimisticGradient", "PastExtraGradient"])
def test_a_step_in_place_is_the_same_step(method):
    """A constraint that changes nothing leads along the general way.

    On PyTorch, who holds a tensor of the state sees each update.
    """

    def memory(optimizer):
        if BACKEND != "torch":
            return None
        return [v.value.data_ptr() for v in optimizer.variables]

    ways = []
    for constraint in (None, keras.constraints.MaxNorm(1e6)):
        optimizer = getattr(keras_stab, method)(Adam(0.1))
        weights = keras.Variable([[1.0, -2.0], [0.5, 3.0]], name="w")
        weights.constraint = constraint
        optimizer.build([weights])
        points, at_first = [], memory(optimizer)
        for gradient in GRADIENTS[:6]:
            tensor = keras.ops.convert_to_tensor(np.outer([1, 2], gradient))
            optimizer.apply([keras.ops.cast(tensor, "float32")], [weights])
            points.append(np.array(weights.numpy()))
        assert memory(optimizer) == at_first
        points += [np.array(v.numpy()) for v in optimizer.variables]
        ways.append(points)
    for quick, general in zip(*ways, strict=True):
        np.testing.assert_allclose(quick, general, rtol=1e-5, atol=1e-6)
