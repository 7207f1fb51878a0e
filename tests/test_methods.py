"""The door for methods: what is promised, and that it answers right."""

import inspect

import contract
import keras
import numpy as np
import pytest

from keras_stab.methods import GradientMethod
from keras_stab.methods import GradientOracle
from keras_stab.methods import GroupGradients

pytestmark = pytest.mark.usefixtures("quick_compilation")

# What a method of a user may rely on. A name that goes, or an argument that
# changes, is a change of the public interface: say so in the changelog.
PROMISED = {
    GradientMethod: {
        "estimate": ["oracle"],
        "build": ["variables"],
        "apply_in_order": ["gradients", "variables"],
        "get_config": [],
    },
    GradientOracle: {
        "gradient": [],
        "group_gradients": ["groups", "engine", "rule"],
        "loss_gradients": [],
        "at": ["shift", "factor"],
        "with_loss": ["loss"],
        "with_compiled_loss": [],
        "with_labels": ["sampler"],
        "with_new_noise": [],
        "head": ["fraction"],
        "keep_forward": [],
        "gradient_of_outputs": ["loss"],
    },
    GroupGradients: {
        "gram": [],
        "combine": ["weights", "whole"],
        "inner": ["vector"],
        "stacks": [],
    },
}


@pytest.mark.parametrize(
    "kind, name",
    [(kind, name) for kind, names in PROMISED.items() for name in names],
)
def test_what_is_promised(kind, name):
    function = getattr(kind, name)
    _, *parameters = inspect.signature(function).parameters
    assert parameters == PROMISED[kind][name]
    assert inspect.getdoc(function)
    assert name in inspect.getdoc(kind) or kind is not GradientOracle


def test_attributes_are_documented():
    for kind, names in {
        GradientOracle: "model batch variables values notes nonfinite",
        GroupGradients: "sizes present rows plan",
    }.items():
        attributes = inspect.getdoc(kind).partition("Attributes:")[2]
        for name in names.split():
            assert f"{name}:" in attributes


def model_and_oracle(regularised=False, rows=16):
    x, y = contract.data(2)
    keras.utils.set_random_seed(3)
    penalty = keras.regularizers.L2(0.1) if regularised else None
    model = keras.Sequential(
        [
            keras.Input((contract.FEATURES,)),
            keras.layers.Dense(
                8, activation="tanh", kernel_regularizer=penalty
            ),
            keras.layers.Dense(contract.CLASSES),
        ]
    )
    contract.compiled(keras.optimizers.SGD(0.1), model)
    contract.fit(model, x, y)
    batch = [keras.ops.convert_to_tensor(a[:rows]) for a in (x, y)]
    return model, GradientOracle(model, *batch)


def flat(gradients):
    parts = [keras.ops.convert_to_numpy(g).ravel() for g in gradients]
    return np.concatenate(parts).astype("float64")


@pytest.mark.parametrize("engine", ["one_pass", "microbatch"])
@pytest.mark.parametrize("rows", [16, 15])
@pytest.mark.parametrize("regularised", [False, True])
def test_group_gradients_answer_alike(engine, rows, regularised):
    """Gram, combinations and inner products are of the same vectors."""
    _, oracle = model_and_oracle(regularised, rows)
    groups = oracle.group_gradients(4, engine)
    assert isinstance(groups, GroupGradients)
    assert groups.plan.engine == engine
    assert sum(groups.sizes) == groups.rows == rows
    each = np.array(
        [
            flat(groups.combine(keras.ops.convert_to_tensor(row)))
            for row in np.eye(4, dtype="float32")
        ]
    )
    gram = keras.ops.convert_to_numpy(groups.gram())
    np.testing.assert_allclose(gram, each @ each.T, rtol=1e-4, atol=1e-6)
    vector = oracle.gradient()
    inner = keras.ops.convert_to_numpy(groups.inner(vector))
    np.testing.assert_allclose(inner, each @ flat(vector), rtol=1e-4, atol=1e-6)
    # The gradient is the mean over rows of those of the groups.
    mean = np.array(groups.sizes) / rows @ each
    np.testing.assert_allclose(mean, flat(vector), atol=1e-5)
    some = [vector[0], None, None, None]
    inner = keras.ops.convert_to_numpy(groups.inner(some))
    first = each[:, : flat(vector[:1]).size]
    np.testing.assert_allclose(inner, first @ flat(some[:1]), atol=1e-5)


def test_groups_without_rows_have_no_inner_products():
    _, oracle = model_and_oracle(rows=3)
    with pytest.warns(UserWarning, match="needs a row"):
        groups = oracle.group_gradients(4, "microbatch")
    inner = keras.ops.convert_to_numpy(groups.inner(oracle.gradient()))
    assert inner.shape == (4,) and inner[3] == 0 and np.all(inner[:3] != 0)


class Extrapolated(GradientMethod):
    """The gradient a little further down; it leaves no note."""

    def estimate(self, oracle):
        return oracle.at(oracle.gradient(), -0.05).gradient()


def test_a_method_needs_no_note():
    x, y = contract.data(3)
    model = contract.compiled(
        Extrapolated(keras.optimizers.SGD(0.05)), model_and_oracle()[0]
    )
    stock = model_and_oracle()[0]
    stock.set_weights(model.get_weights())
    for method in (model, stock):
        method.train_on_batch(x[:16], y[:16])
    differences = [
        np.abs(a - b).max()
        for a, b in zip(model.get_weights(), stock.get_weights())
    ]
    assert 1e-6 < max(differences) < 0.05
    with pytest.raises(RuntimeError, match="takes its own"):
        model.optimizer.apply(
            [keras.ops.ones(v.shape) for v in model.trainable_variables],
            model.trainable_variables,
        )
