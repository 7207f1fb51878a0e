"""On PyTorch, Adam inside a method moves the weights in one pass."""

import contract
import keras
import numpy as np
import pytest
from marks import ON_TORCH

import keras_stab
from keras_stab import keras_internals
from keras_stab.backend import in_place
from keras_stab.backend import tracing


class OwnAdam(keras.optimizers.Adam):
    pass


def cosine():
    return keras.optimizers.schedules.CosineDecay(0.01, 20)


SERVED = {
    "adam": lambda: keras.optimizers.Adam(0.01, beta_2=0.99, epsilon=1e-3),
    "adamw": lambda: keras.optimizers.AdamW(cosine(), global_clipnorm=1.0),
    "average": lambda: keras.optimizers.Adam(0.01, use_ema=True),
    "accumulation": lambda: keras.optimizers.AdamW(
        0.01, gradient_accumulation_steps=2
    ),
}
NOT_SERVED = {
    "own rule": lambda: OwnAdam(0.01),
    "amsgrad": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
}


def trained(monkeypatch, optimizer, size):
    """The variables after training, and how many passes there were."""
    passes = []
    step = in_place.step_of_adam

    def counted(*args):
        passes.append(args)
        step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(in_place, "step_of_adam", counted)
        patch.setattr(tracing, "WORTH_A_KERNEL", size)
        model = contract.compiled(optimizer)
        contract.fit(model, *contract.data(20))
    assert keras_internals.UPDATE_STEP not in vars(optimizer)
    values = [*model.get_weights(), *(v.numpy() for v in optimizer.variables)]
    return values, len(passes)


@pytest.mark.parametrize("inner", SERVED)
def test_it_is_the_same_update(monkeypatch, inner):
    def optimizer():
        return keras_stab.GRAIN(SERVED[inner](), groups=2)

    values, passes = trained(monkeypatch, optimizer(), 0)
    assert (passes > 0) == ON_TORCH
    expected, passes = trained(monkeypatch, optimizer(), 10**9)
    assert passes == 0
    for actual, wanted in zip(values, expected):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_formula(monkeypatch, dtype):
    monkeypatch.setattr(tracing, "WORTH_A_KERNEL", 0)
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(3, 4))
    variable = keras.Variable(weights, dtype=dtype)
    first = second = 0.0
    optimizer = keras_stab.WeightAveraging(keras.optimizers.Adam(0.125))
    for step in range(1, 6):
        gradient = rng.normal(size=(3, 4))
        optimizer.apply([keras.ops.cast(gradient, dtype)], [variable])
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        rate = 0.125 * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        weights = weights - rate * first / (np.sqrt(second) + 1e-7)
    # JAX has float64 only where that is asked for, and on TensorFlow Keras
    # takes the decay rates of Adam from float32.
    exact = ON_TORCH and dtype == "float64"
    tolerance = 1e-12 if exact else 1e-5
    np.testing.assert_allclose(variable.numpy(), weights, tolerance, tolerance)


@pytest.mark.parametrize("inner", NOT_SERVED)
def test_other_rules_run_as_before(monkeypatch, inner):
    optimizer = keras_stab.GRAIN(NOT_SERVED[inner](), groups=2)
    assert trained(monkeypatch, optimizer, 0)[1] == 0


def test_one_group_is_the_inner_optimizer(monkeypatch):
    optimizer = keras_stab.GRAIN(keras.optimizers.AdamW(0.01), groups=1)
    assert trained(monkeypatch, optimizer, 0)[1] == 0


def test_the_rule_of_keras_is_back_after_an_error(monkeypatch):
    def fail(*_):
        raise FloatingPointError

    inner = keras.optimizers.Adam(0.01)
    optimizer = keras_stab.WeightAveraging(inner)
    w = keras.Variable([1.0])
    optimizer.build([w])
    monkeypatch.setattr(optimizer, "apply_in_order", fail)
    with pytest.raises(FloatingPointError):
        optimizer.apply([keras.ops.ones(1)], [w])
    assert keras_internals.UPDATE_STEP not in vars(inner)


@pytest.mark.skipif(not ON_TORCH, reason="of tensors of PyTorch")
def test_gradients_in_another_order_of_memory(monkeypatch):
    """The kernel reads memory as it lies."""
    monkeypatch.setattr(tracing, "WORTH_A_KERNEL", 0)
    gradient = np.arange(6.0, dtype="float32").reshape(2, 3)
    weights = []
    for tensor in (
        keras.ops.convert_to_tensor(gradient),
        keras.ops.transpose(keras.ops.convert_to_tensor(gradient.T.copy())),
    ):
        # An empty weight and a frozen one beside it.
        w, empty, frozen = (
            keras.Variable(np.ones(shape, "float32"))
            for shape in ((2, 3), (0, 2), (2,))
        )
        optimizer = keras_stab.WeightAveraging(keras.optimizers.Adam(0.1))
        optimizer.build([frozen, w, empty])
        frozen.trainable = False
        for _ in range(3):
            none = keras.ops.zeros((0, 2))
            optimizer.apply([None, tensor, none], [frozen, w, empty])
        weights.append(w.numpy())
    np.testing.assert_array_equal(*weights)
    assert (weights[0] < 1.0).sum() == 5
