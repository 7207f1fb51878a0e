"""The one-pass engine against the microbatch engine."""

import keras
import numpy as np
import pytest
from layer_cases import CASES
from layer_cases import random_biases

import keras_stab
from keras_stab import keras_internals
from keras_stab.gradients import autodiff
from keras_stab.gradients import contributions
from keras_stab.gradients.oracle import GradientOracle


def array(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor), "float32")


def tensors(data):
    return keras.tree.map_structure(
        lambda leaf: (
            None if leaf is None else keras.ops.convert_to_tensor(leaf)
        ),
        data,
    )


def answer(model, data, groups, engine, weights):
    """Gram matrix, combination, plan, loss and outputs, without a step."""
    plans = []

    def ask(data, weights):
        oracle = GradientOracle(model, *data)
        gradients = oracle.group_gradients(groups, engine)
        plans.append(gradients.plan)
        outcome = oracle.outcome
        return (
            gradients.gram(),
            gradients.combine(weights),
            outcome.loss,
            outcome.y_pred,
        )

    if keras.backend.backend() == "jax":  # one compilation, not one an op
        import jax

        ask = jax.jit(ask)
    data = (*tensors(data), None)[:3]
    with autodiff.no_gradients():
        results = ask(data, keras.ops.convert_to_tensor(weights))
    return *results, plans[0]


def assert_engines_agree(model, data, groups, tolerance=1e-4):
    if not model.compiled:
        model.compile("sgd", "mse")
    keras_internals.build_for(model, data)
    weights = np.linspace(0.1, 1.0, groups).astype("float32")
    weights /= weights.sum()
    gram, combined, loss, y_pred, plan = answer(
        model, data, groups, "one_pass", weights
    )
    other_gram, other, other_loss, other_y_pred, _ = answer(
        model, data, groups, "microbatch", weights
    )
    gram, other_gram = array(gram), array(other_gram)
    scale = np.abs(other_gram).max()
    np.testing.assert_allclose(gram, other_gram, atol=tolerance * scale)
    largest = max(np.abs(array(g)).max() for g in other if g is not None)
    for variable, one, two in zip(model.trainable_variables, combined, other):
        if two is None:
            assert one is None, variable.path
            continue
        two = array(two)
        np.testing.assert_allclose(
            array(one),
            two,
            # Some gradients vanish but for rounding: keys of attention.
            atol=tolerance * np.abs(two).max() + 1e-6 * largest,
            err_msg=variable.path,
        )
    np.testing.assert_allclose(float(loss), float(other_loss), rtol=1e-5)
    for one, two in zip(
        keras.tree.flatten(y_pred), keras.tree.flatten(other_y_pred)
    ):
        np.testing.assert_allclose(array(one), array(two), atol=1e-5)
    solved, expected = (
        array(
            keras_stab.min_norm_weights(keras.ops.convert_to_tensor(g)).weights
        )
        for g in (gram, other_gram)
    )
    direction, reference = (w @ other_gram for w in (solved, expected))
    np.testing.assert_allclose(direction, reference, atol=1e-4 * scale)
    return plan


@pytest.mark.parametrize("rows, form", [(12, "ghost"), (7, "store")])
@pytest.mark.parametrize("name", CASES)
def test_engines_agree(name, rows, form, monkeypatch):
    """In groups of equal and of unequal size, in either form."""
    monkeypatch.setattr(contributions, "cheaper_form", lambda *_: form)
    build, data = CASES[name]
    keras.utils.set_random_seed(2)
    model = random_biases(build())
    x = data(rows)
    y = np.random.default_rng(5).normal(size=(rows, 3)).astype("float32")
    assert_engines_agree(model, (x, y), groups=3)
