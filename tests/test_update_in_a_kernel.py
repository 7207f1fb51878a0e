"""TensorFlow compiles the update of an optimizer inside a method."""

import contract
import keras
import numpy as np
import pytest

import keras_stab
from keras_stab.backend import tracing

# The other backends compile the whole step, or nothing.
COMPILES = keras.backend.backend() == "tensorflow"


class OwnRule(keras.optimizers.SGD):
    pass


class OwnSchedule(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return 0.1


COMPILED = {
    "adamw": lambda: keras.optimizers.AdamW(
        keras.optimizers.schedules.CosineDecay(0.01, 20), global_clipnorm=1.0
    ),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, use_ema=True),
    "warm-up": lambda: keras.optimizers.SGD(
        keras_stab.schedules.LinearWarmup(0.1, 5), momentum=0.9
    ),
}
NOT_COMPILED = {
    "rule": lambda: OwnRule(0.1),
    "schedule": lambda: keras.optimizers.SGD(OwnSchedule()),
    "function": lambda: keras.optimizers.SGD(lambda: 0.1),
    "accumulation": lambda: keras.optimizers.SGD(
        0.1, gradient_accumulation_steps=2
    ),
}


def trained(monkeypatch, inner, size):
    """The weights, and how many kernels were traced."""
    kernels = []
    in_kernel = tracing.in_kernel

    def counted(function, variables):
        kernels.append(function)
        return in_kernel(function, variables)

    with monkeypatch.context() as patch:
        patch.setattr(tracing, "in_kernel", counted)
        patch.setattr(tracing, "WORTH_A_KERNEL", size)
        optimizer = keras_stab.GRAIN(inner(), groups=2)
        model = contract.compiled(optimizer, jit_compile=False)
        contract.fit(model, *contract.data(20))
    return model.get_weights(), len(kernels)


@pytest.mark.parametrize("inner", COMPILED)
def test_it_is_the_same_update(monkeypatch, inner):
    weights, kernels = trained(monkeypatch, COMPILED[inner], 0)
    assert (kernels > 0) == COMPILES
    expected, _ = trained(monkeypatch, COMPILED[inner], 10**9)
    for actual, wanted in zip(weights, expected):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("inner", NOT_COMPILED)
def test_what_users_wrote_is_not_compiled(monkeypatch, inner):
    assert trained(monkeypatch, NOT_COMPILED[inner], 0)[1] == 0
