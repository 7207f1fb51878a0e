"""The dispatching train step is right for every kind of model.

The oracle is stock Keras: the gradient of some rows is what one SGD step of
learning rate 1 on these rows alone takes off the weights. A min-norm solution
by enumeration, in float64, then says what a step of GRAIN has to do.
"""

import functools
import itertools
import warnings

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops
from keras.optimizers import SGD
from keras.optimizers import Adam
from keras.optimizers import LossScaleOptimizer
from marks import quick
from model_cases import BACKEND
from model_cases import CASES
from model_cases import RANDOM_CASES
from model_cases import Case
from model_cases import Multiply
from model_cases import Subclassed
from model_cases import UnseededNoise
from model_cases import dense
from model_cases import functional
from model_cases import regression
from model_cases import sequential
from model_cases import set_state
from model_cases import state
from model_cases import take
from reference import min_norm_by_enumeration

from keras_stab import GRAIN
from keras_stab import Lookahead
from keras_stab.optimizers.gradient_method import GradientMethod

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "jax":
    import jax
else:
    import torch

LEARNING_RATE = 0.1

# What does not need a compiled step runs without, except on JAX, where each
# operation would be compiled by itself.
QUICKLY = {"run_eagerly": BACKEND != "jax"}


pytestmark = pytest.mark.usefixtures("quick_compilation")


class Plain(GradientMethod):
    """Does nothing: hands on the gradient of the batch."""

    def estimate(self, oracle):
        oracle.notes[self] = ()
        return oracle.gradient()


class AskAgain(GradientMethod):
    """Asks elsewhere first, and hands on a second answer at the weights."""

    def estimate(self, oracle):
        oracle.notes[self] = ()
        oracle.at([ops.ones(v.shape) for v in oracle.variables]).gradient()
        oracle.gradient()
        nowhere = [ops.zeros(v.shape) for v in oracle.variables]
        return oracle.at(nowhere).gradient()


# ---- The reference --------------------------------------------------------


class Reference:
    """Steps of GRAIN(SGD), made of steps of stock SGD."""

    def __init__(self, case, data):
        self.model = case.make(SGD(1.0), **QUICKLY)
        if not self.model.built:
            self.model(data[0])
        self.start = state(self.model)
        self.trained = [
            any(v is t for t in self.model.trainable_variables)
            for v in self.model.variables
        ]

    def stock_step(self, start, data):
        """The gradient of these rows, the logs, and the state after."""
        set_state(self.model, start)
        logs = self.model.train_on_batch(*data, return_dict=True)
        after = state(self.model)
        gradient = [
            b.astype("float64").ravel() - a.astype("float64").ravel()
            for b, a, trained in zip(start, after, self.trained)
            if trained
        ]
        return np.concatenate(gradient), logs, after

    def step(self, start, data, groups):
        """What a step of GRAIN(SGD(LEARNING_RATE), groups) has to give.

        Returns the state after it, the logs, and the weights lambda.
        """
        mean, logs, after = self.stock_step(start, data)
        rows = count(data)
        parts = [
            take(data, slice(k, None, groups)) for k in range(min(groups, rows))
        ]
        gradients, group_logs, _ = zip(
            *[self.stock_step(start, part) for part in parts]
        )
        weights, direction = min_norm(np.stack(gradients))
        # Otherwise a test could not tell GRAIN from its inner optimizer.
        if np.all(np.isfinite(mean)):
            assert LEARNING_RATE * np.max(np.abs(direction - mean)) > 1e-4
        for key in logs:
            if key.endswith("loss"):
                logs[key] = sum(
                    count(part) / rows * log[key]
                    for part, log in zip(parts, group_logs)
                )
        end = []
        for before, stock, trained in zip(start, after, self.trained):
            if trained:
                part, direction = np.split(direction, [before.size])
                stock = before - LEARNING_RATE * part.reshape(before.shape)
            end.append(stock)
        return end, logs, weights

    def fit(self, batches, groups):
        """The same over several batches: the state, and the epoch's loss."""
        values = self.start
        losses = []
        for data in batches:
            values, logs, _ = self.step(values, data, groups)
            losses.append(logs["loss"])
        sizes = [count(data) for data in batches]
        return values, np.average(losses, weights=sizes)


def count(data):
    return len(keras.tree.flatten(data)[0])


def min_norm(gradients):
    """The min-norm weights and combination of rows, as specified."""
    finite = np.all(np.isfinite(gradients), axis=1)
    squares = np.sum(np.where(finite[:, None], gradients, 0.0) ** 2, axis=1)
    included = finite & (squares > 1e-14 * squares.max())
    chosen = gradients[included]
    weights = np.zeros(len(gradients))
    weights[included] = min_norm_by_enumeration(chosen @ chosen.T)
    return weights, weights[included] @ chosen


def batches_of(data, size):
    return [take(data, slice(i, i + size)) for i in range(0, count(data), size)]


def assert_state(model, expected, tolerance=2e-5):
    for variable, value, wanted in zip(
        model.variables, state(model), expected, strict=True
    ):
        np.testing.assert_allclose(
            value, wanted, rtol=tolerance, atol=tolerance, err_msg=variable.path
        )


def assert_logs(logs, expected):
    assert set(logs) == set(expected)
    for key in expected:
        np.testing.assert_allclose(
            logs[key], expected[key], rtol=2e-5, err_msg=key
        )


def grain(groups, learning_rate=LEARNING_RATE):
    return GRAIN(SGD(learning_rate), groups=groups)


# ---- One step of GRAIN ----------------------------------------------------


# Much like another case, and long to compile.
LIKE_OTHERS = (
    "subclassed_training",
    "shared_layers",
    "sample_weight_mean",
    "compute_loss_without_training",
    "add_loss_only",
    "two_batch_norms",
    "masked_lstm",
    "gaussian_noise",
)


@pytest.mark.parametrize(
    "name", quick(list(CASES), lambda name: name not in LIKE_OTHERS)
)
def test_step_is_the_min_norm_step(name):
    case = CASES[name]
    data = case.data(10)
    reference = Reference(case, data)
    # Groups of 5 rows, then of 4, 3 and 3.
    for groups, arguments in [(2, {}), (3, QUICKLY)]:
        expected, logs, _ = reference.step(reference.start, data, groups)
        if not case.pooled:
            expected = expected_batch_norms(reference, data, groups, expected)
        model = case.make(grain(groups), **arguments)
        assert_logs(model.train_on_batch(*data, return_dict=True), logs)
        assert_state(model, expected)


def expected_batch_norms(reference, data, groups, expected):
    """Moving statistics by the formula, from those of each group alone."""
    rows = count(data)
    parts = [take(data, slice(k, None, groups)) for k in range(groups)]
    shares = [count(part) / rows for part in parts]
    states = [reference.stock_step(reference.start, p)[2] for p in parts]
    expected = list(expected)
    position = {id(v): i for i, v in enumerate(reference.model.variables)}
    for layer in reference.model.layers:
        if isinstance(layer, layers.BatchNormalization):
            i = position[id(layer.moving_mean)]
            j = position[id(layer.moving_variance)]
            means = [s[i].astype("float64") for s in states]
            mean = sum(p * m for p, m in zip(shares, means))
            expected[i] = mean
            expected[j] = sum(
                p * (s[j] + (m - mean) ** 2 / (1 - layer.momentum))
                for p, s, m in zip(shares, states, means)
            )
    return expected


@pytest.mark.parametrize("name", ["functional", "dicts", "masked_loss"])
def test_fewer_rows_than_groups(name):
    case = CASES[name]
    data = case.data(3)
    reference = Reference(case, data)
    expected, logs, weights = reference.step(reference.start, data, 4)
    model = case.make(grain(4))
    assert_logs(model.train_on_batch(*data, return_dict=True), logs)
    assert_state(model, expected)
    diagnostics = model.optimizer.diagnostics()
    np.testing.assert_allclose(
        diagnostics["weights"], [*weights, 0.0], atol=2e-5
    )


def test_group_without_weight_is_left_out():
    case = CASES["sample_weight"]
    x, y, weights = case.data(10)
    weights[1::3] = 0.0
    reference = Reference(case, (x, y, weights))
    expected, _, solution = reference.step(reference.start, (x, y, weights), 3)
    assert solution[1] == 0.0
    model = case.make(grain(3))
    model.train_on_batch(x, y, weights)
    assert_state(model, expected)
    assert model.optimizer.diagnostics()["excluded"] == 1.0
    assert model.optimizer.diagnostics()["nonfinite"] == 0.0


def test_one_group_is_the_inner_optimizer():
    case = RANDOM_CASES["dropout"]
    stock = fit_result(case, Adam())
    assert_same(fit_result(case, GRAIN(Adam(), groups=1)), stock)


# ---- A method that changes nothing ----------------------------------------


def fit_result(case, optimizer, **arguments):
    """History, model and optimizer state of a short fit."""
    # Also forgets the global seed generator, which then starts again.
    keras.backend.clear_session(free_memory=False)
    model = case.make(optimizer, **arguments)
    x, y, sample_weight = case.data(12)
    history = model.fit(
        x,
        y,
        sample_weight=sample_weight,
        batch_size=4,
        epochs=2,
        shuffle=False,
        verbose=0,
    )
    inner = model.optimizer
    while isinstance(inner, GradientMethod):
        inner = inner.inner_optimizer
    variables = [ops.convert_to_numpy(v.value) for v in inner.variables]
    return history.history, state(model) + variables


# TensorFlow's graph optimizer rounds otherwise on the two sides of the barrier
# that a wrapper puts before assignments; under XLA the contract suite asks for
# the same bits there too.
ROUNDING = 2e-6 if BACKEND == "tensorflow" else 0.0


def assert_same(result, expected):
    for name, values in expected[0].items():
        close = pytest.approx(values, abs=ROUNDING, rel=ROUNDING)
        assert result[0][name] == close
    for value, wanted in zip(result[1], expected[1], strict=True):
        np.testing.assert_allclose(value, wanted, atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.parametrize("name", [*CASES, *RANDOM_CASES])
def test_doing_nothing_is_the_stock_step(name):
    case = {**CASES, **RANDOM_CASES}[name]
    stock = fit_result(case, SGD(0.1, momentum=0.9))
    assert_same(fit_result(case, Plain(SGD(0.1, momentum=0.9))), stock)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_doing_nothing_in_low_precision(policy):
    keras.config.set_dtype_policy(policy)
    case = CASES["batch_norm"]
    stock = fit_result(case, Adam())
    keras.config.set_dtype_policy(policy)
    # The scaler on top holds the inner optimizer's variables as well.
    history, values = fit_result(case, Plain(Adam()))
    assert_same((history, values), stock)


@pytest.mark.parametrize("name", [*RANDOM_CASES, "two_batch_norms"])
def test_every_question_sees_the_same_state(name):
    case = {**CASES, **RANDOM_CASES}[name]
    assert_same(fit_result(case, AskAgain(SGD())), fit_result(case, SGD()))


# ---- Randomness -----------------------------------------------------------


class Seen(keras.metrics.Metric):
    """Keeps the outputs that the metrics were given."""

    def __init__(self, shape):
        super().__init__(name="seen")
        self.outputs = self.add_variable(shape, "zeros", name="outputs")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.outputs.assign(y_pred)

    def result(self):
        return ops.sum(self.outputs)


RANDOM_LAYERS = {
    "dropout": lambda: layers.Dropout(0.5),
    "seeded_dropout": lambda: layers.Dropout(0.5, seed=5),
    "gaussian_noise": lambda: layers.GaussianNoise(0.3),
}
if BACKEND != "jax":
    RANDOM_LAYERS["unseeded_noise"] = UnseededNoise


def seeds(model):
    return [
        ops.convert_to_numpy(v.value)
        for v in model.non_trainable_variables
        if v.name == "seed_generator_state"
    ]


@pytest.mark.parametrize("rows", [8, 7], ids=["even", "uneven"])
@pytest.mark.parametrize("name", RANDOM_LAYERS)
def test_every_group_draws_its_own_numbers(name, rows):
    x = np.ones((rows, 16), "float32")
    y = np.random.default_rng(0).uniform(2.0, 5.0, x.shape).astype("float32")
    case = Case(
        sequential(RANDOM_LAYERS[name], Multiply, inputs=(16,)),
        lambda rows: (x, y, None),
    )
    seen = Seen(x.shape)
    model = case.make(grain(4), metrics=[seen])
    loss = model.train_on_batch(x, y, return_dict=True)["loss"]
    outputs = np.array(ops.convert_to_numpy(seen.outputs.value))
    groups = [outputs[k::4] for k in range(4)]
    for one, other in itertools.combinations(groups, 2):
        smaller = min(len(one), len(other))
        assert np.any(one[:smaller] != other[:smaller])

    # Loss, gradient and metrics come from one draw. The only weight, factor,
    # is 1: the outputs are their own derivatives.
    errors = [outputs[k::4] - y[k::4] for k in range(4)]
    losses = [np.mean(e**2) for e in errors]
    sizes = [len(e) for e in errors]
    np.testing.assert_allclose(
        loss, np.average(losses, weights=sizes), rtol=1e-5
    )
    slopes = [np.mean(2 * e * g) for e, g in zip(errors, groups)]
    direction = min_norm(np.reshape(slopes, (4, 1)))[1]
    assert abs(direction[0]) > 0.1
    np.testing.assert_allclose(
        ops.convert_to_numpy(model.trainable_variables[0].value),
        1.0 - LEARNING_RATE * direction[0],
        rtol=1e-5,
    )

    stock = case.make(SGD(LEARNING_RATE))
    stock.train_on_batch(x, y)
    np.testing.assert_array_equal(seeds(model), seeds(stock))
    model.trainable_variables[0].assign(1.0)
    model.train_on_batch(x, y)
    assert np.any(ops.convert_to_numpy(seen.outputs.value) != outputs)


if BACKEND == "jax":

    @pytest.mark.parametrize("groups", [1, 2])
    def test_unseeded_numbers_are_refused_as_in_a_stock_step(groups):
        case = Case(sequential(UnseededNoise, dense(2)), regression)
        model = case.make(grain(groups))
        with pytest.raises(ValueError, match="only use seeded random ops"):
            model.train_on_batch(*case.data(8))


# ---- Batch normalisation --------------------------------------------------


def test_group_of_one_row_is_refused_by_batch_norm():
    case = CASES["batch_norm"]
    model = case.make(grain(4))
    with pytest.raises(ValueError, match="batch_norm.*a group of one row"):
        model.train_on_batch(*case.data(7))


@pytest.mark.parametrize(
    "name", ["frozen_batch_norm", "convolution_batch_norm"]
)
def test_group_of_one_row_is_enough_elsewhere(name):
    case = CASES[name]
    data = case.data(3)
    reference = Reference(case, data)
    expected, logs, _ = reference.step(reference.start, data, 3)
    model = case.make(grain(3))
    assert_logs(model.train_on_batch(*data, return_dict=True), logs)
    assert_state(model, expected)


def test_frozen_batch_norm_keeps_its_statistics():
    case = CASES["frozen_batch_norm"]
    model = case.make(grain(2))
    model.train_on_batch(*case.data(8))
    np.testing.assert_array_equal(model.layers[1].moving_mean.numpy(), 0.0)
    np.testing.assert_array_equal(model.layers[1].moving_variance.numpy(), 1.0)


# ---- Missing gradients ----------------------------------------------------


def test_missing_gradients_warn_as_in_a_stock_step():
    def warned(optimizer):
        case = CASES["disconnected"]
        model = case.make(optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.train_on_batch(*case.data(8))
        texts = [str(w.message) for w in caught]
        return {"unused" in t for t in texts if "do not exist" in t}

    assert warned(grain(2)) == warned(SGD())


def test_model_without_trainable_weights():
    def outcome(optimizer):
        model = functional()
        model.trainable = False
        model.compile(optimizer=optimizer, loss="mse")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                model.train_on_batch(*regression(8))
                result = "trained"
            except ValueError as error:
                result = str(error)
        return result, any("trainable weights" in str(w) for w in caught)

    assert outcome(grain(2)) == outcome(SGD())


# ---- Every way to train ---------------------------------------------------

MODES = {"default": {}, "eager": {"run_eagerly": True}}
if BACKEND == "tensorflow":
    MODES["compiled"] = {"jit_compile": True}
if BACKEND == "jax":
    MODES["uncompiled"] = {"jit_compile": False}
if BACKEND != "torch":
    MODES["several_steps"] = {"steps_per_execution": 3}


@pytest.mark.parametrize("mode", MODES)
def test_fit_in_every_mode(mode):
    check_fit(**MODES[mode])


if BACKEND == "torch":

    def test_fit_with_torch_compile():
        """Gradients that are taken by hand are beyond it: not compiled."""
        with pytest.warns(UserWarning, match="of GRAIN .* runs uncompiled"):
            check_fit(jit_compile=True)

    def test_torch_compile_is_left_to_keras(monkeypatch):
        """For optimizers that take no gradients, and for evaluation."""
        compiled = []
        monkeypatch.setattr(
            torch, "compile", lambda f: compiled.append(f.__qualname__) or f
        )
        for optimizer in (Lookahead(SGD()), grain(2)):
            model = CASES["functional"].make(optimizer, jit_compile=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.make_train_function()
            model.make_test_function()
            assert model.jit_compile
        steps = [name.split(".")[1] for name in compiled]
        assert steps == [
            "make_train_function",
            "make_test_function",
            "make_test_function",
        ]


@functools.cache
def expected_fit():
    """Five batches; the last has fewer rows than there are groups."""
    case = CASES["functional"]
    data = case.data(23)
    return data, Reference(case, data).fit(batches_of(data, 5), 4)


def check_fit(**arguments):
    (x, y, _), (expected, loss) = expected_fit()
    model = CASES["functional"].make(grain(4), **arguments)
    history = model.fit(x, y, batch_size=5, shuffle=False, verbose=0).history
    assert_state(model, expected, tolerance=5e-5)
    np.testing.assert_allclose(history["loss"], loss, rtol=5e-5)


def test_train_on_batch_before_fit():
    case = CASES["sequential_unbuilt"]
    data = case.data(12)
    reference = Reference(case, data)
    first, second = batches_of(data, 6)
    expected, _ = reference.fit([first, second], 2)
    model = case.make(grain(2))
    model.train_on_batch(*first)
    model.fit(*second[:2], batch_size=6, shuffle=False, verbose=0)
    assert_state(model, expected)


@pytest.mark.parametrize("kind", ["sample_weight", "class_weight"])
def test_weights_in_fit(kind):
    x, y, weights = CASES["sample_weight"].data(10)
    arguments = {"sample_weight": weights}
    if kind == "class_weight":
        y = (np.arange(10) % 3 == 0).astype("int32")
        weights = np.where(y, 4.0, 0.5).astype("float32")
        arguments = {"class_weight": {0: 0.5, 1: 4.0}}
    loss = "mse" if kind == "sample_weight" else from_logits()
    case = Case(functional, lambda rows: None, lambda: {"loss": loss})
    reference = Reference(case, (x, y, weights))
    batches = batches_of((x, y, weights), 5)
    expected, epoch_loss = reference.fit(batches, 2)
    model = case.make(grain(2))
    history = model.fit(
        x, y, batch_size=5, shuffle=False, verbose=0, **arguments
    ).history
    assert_state(model, expected)
    np.testing.assert_allclose(history["loss"], epoch_loss, rtol=1e-5)


def from_logits():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def test_evaluation_is_untouched():
    case = RANDOM_CASES["dropout"]
    x, y, _ = case.data(8)
    model = case.make(grain(2))
    before = model.evaluate(x, y, verbose=0)
    history = model.fit(
        x, y, batch_size=4, validation_data=(x, y), epochs=2, verbose=0
    ).history
    kernel, bias, factor = [v.numpy() for v in model.trainable_variables]
    outputs = (x @ kernel + bias) * factor
    np.testing.assert_allclose(
        model.predict(x, verbose=0), outputs, rtol=1e-4, atol=1e-5
    )
    after = np.mean((outputs - y) ** 2)
    np.testing.assert_allclose(history["val_loss"][-1], after, rtol=1e-5)
    np.testing.assert_allclose(
        model.evaluate(x, y, verbose=0), after, rtol=1e-5
    )
    assert after < before


def test_compiling_again():
    case = CASES["functional"]
    data = case.data(10)
    reference = Reference(case, data)
    model = case.make(grain(2))
    model.train_on_batch(*data)
    expected, _, _ = reference.step(reference.start, data, 2)
    assert_state(model, expected)

    stock = case.make(Adam())
    stock.test_on_batch(*data)
    set_state(stock, state(model))
    model.compile(optimizer=Adam(), loss="mse")
    for each in (model, stock):
        each.train_on_batch(*data)
    for value, wanted in zip(state(model), state(stock)):
        np.testing.assert_array_equal(value, wanted)

    model.compile(optimizer=grain(3), loss="mse")
    expected, _, _ = reference.step(state(model), data, 3)
    model.train_on_batch(*data)
    assert_state(model, expected)


if BACKEND == "tensorflow":

    class Traced(Subclassed):
        """Counts how often its step is traced."""

        traces = 0

        def train_step(self, data):
            self.traces += 1
            return super().train_step(data)

    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_unknown_batch_dimension(jit_compile):
        case = Case(Traced, regression)
        x, y, _ = data = case.data(13)
        reference = Reference(case, data)
        expected, loss = reference.fit(batches_of(data, 5), 4)
        batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(5)
        assert batches.element_spec[0].shape[0] is None
        stock = case.make(SGD(), jit_compile=jit_compile)
        model = case.make(grain(4), jit_compile=jit_compile)
        stock.fit(batches, verbose=0)
        history = model.fit(batches, verbose=0).history
        assert_state(model, expected, tolerance=5e-5)
        np.testing.assert_allclose(history["loss"], loss, rtol=5e-5)
        for each in (stock, model):
            each.fit(batches.skip(1), epochs=2, verbose=0)
        assert model.traces == stock.traces

    def test_group_of_one_row_with_unknown_batch_dimension():
        case = CASES["batch_norm"]
        x, y, _ = case.data(7)
        batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(7)
        model = case.make(grain(4))
        with pytest.raises(tf.errors.InvalidArgumentError, match="one row"):
            model.fit(batches, verbose=0)


# ---- Models with a step of their own --------------------------------------


class Announcing(Subclassed):
    """Adds to the logs of the step that it inherits."""

    def train_step(self, *state_and_data):
        result = super().train_step(*state_and_data)
        logs = result[0] if BACKEND == "jax" else result
        logs["answer"] = ops.ones(()) * 42.0
        return result


class OwnGradients(Subclassed):
    """Takes plain gradients, as the guides of Keras show."""

    if BACKEND == "tensorflow":

        def train_step(self, data):
            x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
            with tf.GradientTape() as tape:
                loss = self.compute_loss(y=y, y_pred=self(x, training=True))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    elif BACKEND == "torch":

        def train_step(self, data):
            x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
            self.zero_grad()
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
            loss.backward()
            gradients = [v.value.grad for v in self.trainable_variables]
            with torch.no_grad():
                self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    else:

        def train_step(self, state, data):
            x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
            trainable, others, optimizer, metrics = state

            def loss(trainable):
                y_pred, _ = self.stateless_call(trainable, others, x)
                return self.compute_loss(y=y, y_pred=y_pred)

            value, gradients = jax.value_and_grad(loss)(trainable)
            trainable, optimizer = self.optimizer.stateless_apply(
                optimizer, gradients, trainable
            )
            return {"loss": value}, (trainable, others, optimizer, metrics)


def test_own_step_that_ends_in_the_inherited_one():
    case = Case(Announcing, regression)
    data = case.data(10)
    reference = Reference(case, data)
    expected, logs, _ = reference.step(reference.start, data, 2)
    model = case.make(grain(2))
    assert_logs(model.train_on_batch(*data, return_dict=True), logs)
    assert logs["answer"] == 42.0
    assert_state(model, expected)


def test_own_step_with_plain_gradients():
    case = Case(OwnGradients, regression)
    stock = case.make(SGD())
    stock.train_on_batch(*case.data(8))
    model = case.make(grain(2))
    words = r"`compute_loss.*super\(\)\.train_step.*keras_stab\.Game"
    with pytest.raises(RuntimeError, match=words):
        model.train_on_batch(*case.data(8))


# ---- Precision ------------------------------------------------------------


def diagnostics(model):
    optimizer = model.optimizer
    if isinstance(optimizer, LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer.diagnostics()


@functools.cache
def solved_weights(policy="float32", **arguments):
    keras.config.set_dtype_policy(policy)
    case = CASES["functional"]
    model = case.make(GRAIN(SGD(0.1, **arguments), groups=3))
    model.train_on_batch(*case.data(12))
    return diagnostics(model)["weights"], state(model)


@pytest.mark.parametrize(
    "policy, arguments, tolerance",
    [
        ("float32", {"loss_scale_factor": 2.0**15}, 1e-5),
        ("float32", {"loss_scale_factor": 1000.0}, 1e-5),
        ("mixed_float16", {}, 1e-2),
        ("mixed_bfloat16", {}, 5e-2),
    ],
)
def test_weights_do_not_depend_on_precision(policy, arguments, tolerance):
    expected, expected_state = solved_weights()
    weights, values = solved_weights(policy, **arguments)
    assert 0.0 < max(expected) < 1.0
    np.testing.assert_allclose(weights, expected, atol=tolerance)
    for value, wanted in zip(values, expected_state):
        np.testing.assert_allclose(value, wanted, atol=tolerance)


def inner_state(optimizer):
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return [
        np.array(ops.convert_to_numpy(v.value)) for v in optimizer.variables
    ]


@pytest.mark.parametrize(
    "place, value", [("on_top", 1e30), ("on_top", np.nan), ("inside", np.inf)]
)
def test_overflow_skips_the_step(place, value):
    if place == "on_top":
        keras.config.set_dtype_policy("mixed_float16")
        optimizer = GRAIN(Adam(), groups=3)
    else:
        optimizer = GRAIN(LossScaleOptimizer(Adam()), groups=3)
    case = CASES["functional"]
    x, y, _ = case.data(12)
    model = case.make(optimizer)
    scaler = model.optimizer if place == "on_top" else optimizer.inner_optimizer
    model.train_on_batch(x, y)
    before = state(model) + inner_state(optimizer)
    bad = x.copy()
    bad[4] = value
    model.train_on_batch(bad, y)
    for kept, wanted in zip(state(model) + inner_state(optimizer), before):
        np.testing.assert_array_equal(kept, wanted)
    assert float(scaler.dynamic_scale.numpy()) == 2.0**14
    assert int(scaler.step_counter.numpy()) == 0

    model.train_on_batch(x, y)
    after = state(model) + inner_state(optimizer)
    assert all(np.all(np.isfinite(v)) for v in after)
    assert int(optimizer.iterations.numpy()) == 2
    assert np.any(after[0] != before[0])


def test_scaler_inside():
    case = CASES["functional"]
    data = case.data(12)
    reference = Reference(case, data)
    expected, logs, _ = reference.step(reference.start, data, 3)
    model = case.make(GRAIN(LossScaleOptimizer(SGD(LEARNING_RATE)), groups=3))
    assert_logs(model.train_on_batch(*data, return_dict=True), logs)
    assert_state(model, expected)


def test_two_scalers_are_refused():
    keras.config.set_dtype_policy("mixed_float16")
    case = CASES["functional"]
    model = case.make(GRAIN(LossScaleOptimizer(SGD()), groups=2))
    with pytest.raises(ValueError, match="2 nested LossScaleOptimizers"):
        model.train_on_batch(*case.data(8))


@pytest.mark.parametrize("rows", [12, 11], ids=["even", "uneven"])
def test_bad_row_without_loss_scaling(rows):
    case = CASES["batch_norm"]
    x, y, _ = case.data(rows)
    x[4] = np.nan
    reference = Reference(case, (x, y, None))
    expected, _, weights = reference.step(reference.start, (x, y, None), 3)
    assert weights[1] == 0.0
    model = case.make(grain(3))
    model.train_on_batch(x, y)
    for variable, value, wanted in zip(model.variables, state(model), expected):
        assert np.all(np.isfinite(value))
        if variable.trainable:
            np.testing.assert_allclose(value, wanted, rtol=2e-5, atol=2e-5)
    figures = model.optimizer.diagnostics()
    assert figures["nonfinite"] == 1.0
    np.testing.assert_allclose(figures["weights"], weights, atol=2e-5)


# ---- Data that cannot be cut ----------------------------------------------


class Beside(Subclassed):
    """Takes an input that it does not use."""

    def call(self, inputs):
        return super().call(inputs["x"])


def uncuttable():
    leaves = {
        "short": (np.zeros((5, 2), "float32"), "with 5 rows"),
        "scalar": (np.array(2.0, "float32"), "a scalar"),
    }
    dense = np.eye(8, dtype="float32")
    if BACKEND == "tensorflow":
        leaves["sparse"] = (tf.sparse.from_dense(dense), "SparseTensor")
        ragged = tf.RaggedTensor.from_row_splits(
            np.zeros(9, "float32"), [0, 2, 3, 4, 5, 6, 7, 8, 9]
        )
        leaves["ragged"] = (ragged, "RaggedTensor")
    elif BACKEND == "torch":
        leaves["sparse"] = (torch.from_numpy(dense).to_sparse(), "Tensor")
    else:
        leaves["sparse"] = (
            jax.experimental.sparse.BCOO.fromdense(dense),
            "BCOO",
        )
    return leaves


# TensorFlow may leave the number of rows open while it traces: the check is
# then part of the graph.
AT_RUN_TIME = (ValueError,)
if BACKEND == "tensorflow":
    AT_RUN_TIME += (tf.errors.InvalidArgumentError,)


@pytest.mark.parametrize("kind", uncuttable())
def test_leaf_that_cannot_be_cut_is_named(kind):
    leaf, problem = uncuttable()[kind]
    x, y, _ = regression(8)
    model = Beside()
    model.compile(optimizer=grain(2), loss="mse")
    model.train_on_batch({"x": x, "beside": x}, y)
    with pytest.raises(AT_RUN_TIME) as error:
        model.train_on_batch({"x": x, "beside": leaf}, y)
    assert "beside" in str(error.value)
    if isinstance(error.value, ValueError):
        assert problem in str(error.value)


@pytest.mark.parametrize("name", ["y", "sample_weight"])
def test_targets_of_another_length_are_named(name):
    x, y, weights = CASES["sample_weight"].data(8)
    model = functional()
    model.compile(optimizer=grain(2), loss="mse")
    model.train_on_batch(x, y, weights)
    data = {"x": x, "y": y, "sample_weight": weights}
    data[name] = data[name][:6]
    before = model.get_weights()
    with pytest.raises(AT_RUN_TIME, match=f"Received: .*{name}"):
        model.train_on_batch(**data)
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)
