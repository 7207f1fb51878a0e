"""The dispatching train step is right for every kind of model.

The oracle is stock Keras: the gradient of some rows is what one SGD step of
learning rate 1 on these rows alone takes off the weights. A min-norm solution
by enumeration, in float64, then says what a step of GRAIN has to do.
"""

import itertools
import warnings

import keras
import keras_stab
import numpy as np
import pytest
from keras import layers
from keras import ops
from keras.optimizers import SGD
from keras.optimizers import Adam
from keras.optimizers import LossScaleOptimizer
from keras_stab import GRAIN
from keras_stab.optimizers.wrapper import GradientMethod
from model_cases import BACKEND
from model_cases import CASES
from model_cases import RANDOM_CASES
from model_cases import Case
from model_cases import Multiply
from model_cases import Subclassed
from model_cases import UnseededNoise
from model_cases import dense
from model_cases import dict_model
from model_cases import functional
from model_cases import regression
from model_cases import sequential
from model_cases import set_state
from model_cases import state
from model_cases import take
from model_cases import unbuilt
from reference import min_norm_by_enumeration

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "jax":
    import jax
else:
    import torch

LEARNING_RATE = 0.1


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
        return oracle.at([ops.zeros(v.shape) for v in oracle.variables])(
        ).gradient()


# ---- The reference --------------------------------------------------------


class Reference:
    """Steps of GRAIN(SGD), made of steps of stock SGD."""

    def __init__(self, case, data):
        self.model = case.make(SGD(1.0), run_eagerly=True)
        # Builds everything, and moves neither weights, statistics nor seeds.
        self.model.test_on_batch(*data)
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
            take(data, slice(k, None, groups))
            for k in range(min(groups, rows))
        ]
        gradients, group_logs, _ = zip(
            *[self.stock_step(start, part) for part in parts]
        )
        weights, direction = min_norm(np.stack(gradients))
        if groups > 1 and np.all(np.isfinite(mean)):
            # Otherwise a test could not tell GRAIN from its inner optimizer.
            assert np.linalg.norm(direction - mean) > 0.02 * np.linalg.norm(
                mean
            )
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
    return [
        take(data, slice(i, i + size)) for i in range(0, count(data), size)
    ]


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


@pytest.mark.parametrize(
    "groups, arguments",
    [(2, {}), (3, {"run_eagerly": True})],
    ids=["even", "uneven_eager"],
)
@pytest.mark.parametrize("name", CASES)
def test_step_is_the_min_norm_step(name, groups, arguments):
    case = CASES[name]
    data = case.data(10)
    reference = Reference(case, data)
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
    expected, _, solution = reference.step(
        reference.start, (x, y, weights), 3
    )
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
    keras.backend.clear_session()
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


def assert_same(result, expected):
    assert result[0] == expected[0]
    for value, wanted in zip(result[1], expected[1], strict=True):
        np.testing.assert_array_equal(value, wanted)


@pytest.mark.parametrize("name", [*CASES, *RANDOM_CASES])
def test_doing_nothing_is_the_stock_step(name):
    case = {**CASES, **RANDOM_CASES}[name]
    assert_same(fit_result(case, Plain(Adam())), fit_result(case, Adam()))


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
    stock = fit_result(case, Adam(), run_eagerly=True)
    again = fit_result(case, AskAgain(Adam()), run_eagerly=True)
    assert_same(again, stock)
