"""`get_state_tree` and `set_state_tree`, which Orbax checkpoints use."""

import warnings

import contract
import keras
import numpy as np
import pytest

import keras_stab

X, Y = contract.data(12)
# In the middle of every cycle.
BEFORE = 7

LENDING = [
    row for row in contract.ROWS if row.second_weights in ("average", "slow")
]


def compiled(build):
    model = contract.compiled(build(), contract.classifier(dropout=False))
    model.optimizer.build(model.trainable_variables)
    return model


def fit(model, first, last):
    rows = slice(first * contract.BATCH, last * contract.BATCH)
    contract.fit(model, X[rows], Y[rows])


def saved(model):
    """The tree as a checkpoint holds it: arrays of its own."""
    return keras.tree.map_structure(
        np.array, model.get_state_tree(value_format="numpy_array")
    )


def straight(build):
    model = compiled(build)
    fit(model, 0, BEFORE)
    fit(model, BEFORE, 12)
    return contract.state(model)


def assert_resumes(build, tree):
    model = compiled(build)
    model.set_state_tree(tree)
    fit(model, BEFORE, 12)
    contract.assert_same_bits(straight(build), contract.state(model))


@pytest.fixture(autouse=True)
def no_word_of_batch_norm():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The model has batch-norm layers")
        yield


def build_of(row, inner="adamw"):
    return lambda: row.build(contract.INNER[inner]())


@pytest.mark.parametrize("row", contract.parameters(LENDING))
def test_a_tree_taken_while_weights_are_lent(row):
    """What was set aside is in it, and training goes on from that."""
    model = compiled(build_of(row))
    fit(model, 0, BEFORE)
    trained = model.get_weights()
    with model.optimizer.swap_weights(model):
        tree = saved(model)
        lent = model.get_weights()
    assert any(not np.array_equal(a, b) for a, b in zip(trained, lent))
    assert_resumes(build_of(row), tree)
    loaded = compiled(build_of(row))
    loaded.set_state_tree(tree)
    assert loaded.optimizer.swapped
    contract.assert_same_bits(lent, loaded.get_weights())


@pytest.mark.parametrize(
    "row", contract.parameters([contract.row("Lookahead")])
)
def test_a_tree_taken_between_is_that_of_keras(row):
    model = compiled(build_of(row))
    fit(model, 0, BEFORE)
    tree = saved(model)
    flat = keras.tree.flatten(tree["optimizer_variables"])
    assert len(flat) == len(model.optimizer.variables)
    assert_resumes(build_of(row), tree)
    # Weights that were set aside before belong to the state that is gone.
    loaded = compiled(build_of(row))
    fit(loaded, 0, BEFORE + 1)
    with loaded.optimizer.swap_weights(loaded):
        loaded.set_state_tree(tree)
        assert not loaded.optimizer.swapped
    contract.assert_same_bits(contract.state(model), contract.state(loaded))


def test_statistics_that_were_set_aside():
    build = build_of(contract.row("WeightAveraging"))
    model = compiled(build)
    fit(model, 0, BEFORE)
    with keras_stab.averaged_weights(model, X):
        tree = saved(model)
    assert_resumes(build, tree)


def test_half_precision():
    keras.config.set_dtype_policy("bfloat16")
    build = build_of(contract.row("WeightAveraging"))
    model = compiled(build)
    fit(model, 0, BEFORE)
    with model.optimizer.swap_weights(model):
        tree = saved(model)
    assert_resumes(build, tree)


def inside_others():
    return keras.optimizers.LossScaleOptimizer(
        keras_stab.Lookahead(
            keras_stab.Lookahead("adam", sync_period=2), sync_period=4
        )
    )


def of_two_parts():
    return keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            keras_stab.RAPP(0.1), {"first/.*": keras_stab.RAPP(0.05)}
        )
    )


@pytest.mark.parametrize("build", [inside_others, of_two_parts])
def test_optimizers_around_them(build):
    """Of one kind twice: names differ in the tree and in the new model."""
    model = compiled(build)
    fit(model, 0, BEFORE)
    callback = keras_stab.SwapSlowWeights(swap_on_epoch=True)
    callback.set_model(model)
    callback.on_epoch_end(0)
    tree = saved(model)
    assert_resumes(build, tree)


def test_an_optimizer_that_is_not_built():
    build = build_of(contract.row("Lookahead"))
    model = compiled(build)
    fit(model, 0, BEFORE)
    with model.optimizer.swap_weights(model):
        tree = saved(model)
    loaded = contract.compiled(build(), contract.classifier(dropout=False))
    with pytest.warns(UserWarning, match="not built.*optimizer.build"):
        loaded.set_state_tree(tree)


def test_tensors_of_a_tree_stay_as_they_are():
    """Training after `set_state_tree` does not reach into the tree."""
    build = build_of(contract.row("Lookahead"))
    model = compiled(build)
    fit(model, 0, BEFORE)
    with model.optimizer.swap_weights(model):
        tree = model.get_state_tree()["optimizer_variables"]
        tree = {"optimizer_variables": tree}
        name = model.optimizer.name
        kept = tree["optimizer_variables"][name]["trained_weights"]
        before = keras.tree.map_structure(
            lambda t: np.array(keras.ops.convert_to_numpy(t)), kept
        )
    fit(model, BEFORE, 12)
    after = keras.tree.map_structure(keras.ops.convert_to_numpy, kept)
    keras.tree.map_structure(np.testing.assert_array_equal, before, after)
