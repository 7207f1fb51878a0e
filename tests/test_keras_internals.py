"""Pins what we assume about Keras below its public names.

Checked on Keras 3.15.1. When one of these fails after an upgrade of Keras,
`keras_stab/keras_internals.py` is the file to look at.
"""

import inspect

import keras
import numpy as np
import pytest

import keras_stab
from keras_stab import keras_internals

CHECKED_ON = "3.15.1"


def compiled_model():
    inputs = keras.Input((4,))
    hidden = keras.layers.Dropout(0.5)(keras.layers.Dense(3)(inputs))
    model = keras.Model(inputs, hidden)
    model.compile("sgd", "mse")
    return model


def test_the_version_that_was_checked():
    """Within one minor release nothing below should move."""
    checked = CHECKED_ON.split(".")[:2]
    assert keras.__version__.split(".")[:2] == checked


def test_keras_model_defines_no_train_step():
    keras_stab.uninstall()
    try:
        assert "train_step" not in vars(keras.Model)
        assert any("train_step" in vars(c) for c in keras.Model.__mro__)
    finally:
        keras_stab.install()
    assert "train_step" in vars(keras.Model)


def test_keras_model_defines_no_fit_either():
    """`install` wraps what the backend's trainer defines."""
    names = ("make_train_function", "fit", "evaluate", "predict")
    keras_stab.uninstall()
    try:
        before = {name: getattr(keras.Model, name) for name in names}
        assert not set(names) & set(vars(keras.Model))
    finally:
        keras_stab.install()
    for name in names:
        assert vars(keras.Model)[name].__wrapped__ is before[name]


def test_values_and_layouts_of_variables():
    variable = keras.Variable(1.0)
    assert keras_internals.has_value(variable)
    assert keras_internals.layout(variable) is None
    if keras.backend.backend() == "jax":
        # What `fit` does while it holds the values itself.
        variable._value = None
        assert not keras_internals.has_value(variable)


def test_the_state_of_a_step_is_forgotten():
    model = compiled_model()
    kernel = model.trainable_variables[0]

    def fail(batch, logs):
        raise KeyError("on purpose")

    with pytest.raises(KeyError):
        model.evaluate(
            np.ones((2, 4)),
            np.ones((2, 3)),
            verbose=0,
            callbacks=[keras.callbacks.LambdaCallback(on_test_batch_end=fail)],
        )
    # Only the trainer of JAX keeps it.
    keeps = keras.backend.backend() == "jax"
    assert bool(getattr(model, "_jax_state", None)) == keeps
    keras_internals.forget_step_state(model)
    kernel.assign(np.ones((4, 3)))
    if keeps:
        model.jax_state_sync()
    np.testing.assert_array_equal(kernel, 1.0)


def test_build_for():
    model = keras.Sequential([keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    x, y = np.ones((2, 4), "float32"), np.ones((2, 3), "float32")
    keras_internals.build_for(model, (x, y))
    assert model.built and model.optimizer.built
    assert model._compile_loss.built


def test_accepts_training():
    class Without(keras.Model):
        def call(self, inputs):
            return inputs

    assert keras_internals.accepts_training(compiled_model())
    assert not keras_internals.accepts_training(Without())


def test_compute_loss_and_loss_tracker():
    model = compiled_model()
    x, y = keras.ops.ones((2, 4)), keras.ops.ones((2, 3))
    loss = keras_internals.compute_loss(model, x, y, y * 3, None)
    assert float(loss) == 4.0
    assert keras_internals.loss_tracker(model).name == "loss"
    assert keras_internals.loss_tracker(model) in model.metrics


def test_losses_are_built_by_themselves():
    model = compiled_model()
    assert keras_internals.compile_loss(model) is model._compile_loss
    assert not keras_internals.loss_is_built(model)
    x, y = keras.ops.ones((2, 4)), keras.ops.ones((2, 3))
    keras_internals.build_loss(model, y, model(x))
    assert keras_internals.loss_is_built(model)
    assert not model.optimizer.built
    model = keras.Sequential()
    assert keras_internals.compile_loss(model) is None
    assert keras_internals.loss_is_built(model)


def test_all_layers_are_found_however_deep():
    inner = keras.Sequential([keras.layers.Dense(2, name="deep")])
    model = keras.Sequential([keras.Input((2,)), inner])
    names = [layer.name for layer in keras_internals.all_layers(model)]
    assert "deep" in names and model.name not in names


def test_weights_to_train_are_found_when_they_are_frozen():
    dense, norm = keras.layers.Dense(2), keras.layers.BatchNormalization()
    model = keras.Sequential([keras.Input((3,)), dense, norm])
    model.trainable = False
    found = keras_internals.weights_to_train(model)
    assert found == [dense.kernel, dense.bias, norm.gamma, norm.beta]


def test_masks():
    layer = keras.layers.Embedding(5, 2, mask_zero=True)
    output = layer(np.array([[1, 0]]))
    mask = keras_internals.get_mask(output)
    assert np.array_equal(keras.ops.convert_to_numpy(mask), [[True, False]])
    other = keras.ops.ones((1, 2))
    keras_internals.set_mask(other, mask)
    assert keras_internals.get_mask(other) is mask


def test_built_variables_and_keys():
    model = compiled_model()
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    built = keras_internals.built_variables(optimizer)
    assert [v.path for v in built] == [
        v.path for v in model.trainable_variables
    ]
    keys = {keras_internals.variable_key(optimizer, v) for v in built}
    assert len(keys) == len(built)


def test_seed_states_are_recognised():
    model = compiled_model()
    seeds = [
        v
        for v in model.non_trainable_variables
        if keras_internals.is_seed_state(v)
    ]
    assert len(seeds) == 1
    generator = keras.random.SeedGenerator(3)
    assert keras_internals.is_seed_state(generator.state)


@pytest.mark.parametrize("as_dict", [False, True])
def test_compiled_heads_and_losses(as_dict):
    inputs = keras.Input((4,))
    outputs = {
        "a": keras.layers.Dense(2, name="a")(inputs),
        "b": keras.layers.Dense(3, name="b")(inputs),
    }
    losses, weights = {"a": "mse", "b": "mae"}, {"a": 1.0, "b": 0.5}
    if not as_dict:
        outputs = list(outputs.values())
        losses, weights = ["mse", "mae"], [1.0, 0.5]
    model = keras.Model(inputs, outputs)
    model.compile("sgd", losses, loss_weights=weights)
    ones = keras.ops.ones
    y = [ones((5, 2)), ones((5, 3))]
    share = [ones((5,)), 2.0 * ones((5,))]
    if as_dict:
        y, share = dict(zip("ab", y)), dict(zip("ab", share))
    y_pred = keras.tree.map_structure(lambda part: 3.0 * part, y)
    loss = keras_internals.compiled_loss(model, y, y_pred, share)
    assert float(loss) == 4.0 + 0.5 * 2.0 * 2.0
    heads = keras_internals.compiled_heads(model, y, y_pred, share)
    assert [tuple(h.y_pred.shape) for h in heads] == [(5, 2), (5, 3)]
    assert [tuple(h.y.shape) for h in heads] == [(5, 2), (5, 3)]
    assert [float(h.sample_weight[0]) for h in heads] == [1.0, 2.0]
    assert [h.weight for h in heads] == [1.0, 0.5]
    kinds = [keras.losses.mean_squared_error, keras.losses.mean_absolute_error]
    assert [h.loss.fn for h in heads] == kinds
    entries = keras_internals.loss_entries(model)
    assert [e.loss for e in entries] == [h.loss for h in heads]


@pytest.mark.parametrize("targets", ["as the outputs", "dict", "tuple"])
def test_single_losses_are_those_of_compute_loss(targets):
    """To the last bit, with outputs that are not in the order of names."""
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(3, kernel_regularizer="l2")(inputs)
    outputs = [
        keras.layers.Dense(1, name="right", activity_regularizer="l1")(hidden),
        keras.layers.Dense(2, name="left")(hidden),
    ]
    model = keras.Model(inputs, outputs)
    model.compile(
        "sgd",
        {"left": "mse", "right": "mae"},
        loss_weights={"left": 0.3, "right": 3.0},
    )
    ones = keras.ops.ones
    y = [ones((5, 1)), 2.0 * ones((5, 2))]
    if targets == "dict":
        y = dict(zip(("right", "left"), y))
    elif targets == "tuple":
        y = tuple(y)
    share = [keras.ops.arange(5.0), ones((5,))]
    y_pred = model(0.5 * ones((5, 4)))
    arguments = model, y, y_pred, share
    expected = model.compute_loss(None, *arguments[1:])
    total, each = keras_internals.compiled_losses(*arguments)
    assert float(total) == float(keras_internals.compiled_loss(*arguments))
    penalties = keras_internals.penalties(model)
    assert len(penalties) == 2
    assert float(keras.ops.sum([total, *penalties])) == float(expected)
    assert len(each) == 2 and float(sum(each)) == pytest.approx(float(total))
    heads = keras_internals.compiled_heads(*arguments)
    assert [tuple(head.y.shape) for head in heads] == [(5, 1), (5, 2)]
    for head, value in zip(heads, each):
        again = head.loss(head.y, head.y_pred, head.sample_weight)
        assert float(again * head.weight) == float(value)
    # Their metrics are those of a step; heads alone leave them as they are.
    counts = [float(metric.count) for metric in model.metrics[1:]]
    assert counts == [15.0, 15.0]


def test_losses_beyond_the_first_of_one_output():
    """Keras trains with the first of them."""
    model = compiled_model()
    model.compile("sgd", ["mse", "mae"])
    y = keras.ops.ones((5, 3))
    arguments = model, y, 3.0 * y, None
    assert float(keras_internals.compiled_loss(*arguments)) == 4.0
    assert len(keras_internals.loss_entries(model)) == 2
    total, each = keras_internals.compiled_losses(*arguments)
    assert [float(total), *map(float, each)] == [4.0, 4.0]


def test_update_steps_of_an_accumulating_optimizer():
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    weight = keras.Variable(np.ones(2, "float32"))
    optimizer.build([weight])
    seen = []
    for _ in range(4):
        seen.append(bool(keras_internals.is_update_step(optimizer)))
        optimizer.apply([keras.ops.ones(2)], [weight])
    assert seen == [False, True, False, True]


def test_set_updates():
    """Of full windows; one that is filled in part stays so."""
    w = keras.Variable([1.0])
    for steps, calls in ((None, 7), (3, 8)):
        optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=steps)
        for _ in range(5):
            optimizer.apply([keras.ops.ones(1)], [w])
        keras_internals.set_updates(optimizer, 7 if steps is None else 2)
        assert int(optimizer.iterations) == (7 if steps is None else 2)
        assert int(optimizer.variables[0]) == calls


def test_decayed_variables():
    model = compiled_model()
    kernel, bias = model.trainable_variables
    optimizer = keras.optimizers.AdamW()
    optimizer.exclude_from_weight_decay(var_list=[bias])
    optimizer.build([kernel, bias])
    assert keras_internals.is_decayed(optimizer, kernel)
    assert not keras_internals.is_decayed(optimizer, bias)


def test_the_rule_and_the_moments_of_adam():
    """A function set on an instance runs in place of the rule of its class."""
    model = compiled_model()
    kernel, bias = model.trainable_variables
    optimizer = keras.optimizers.AdamW()
    optimizer.build([kernel, bias])
    moments = keras_internals.adam_moments(optimizer, [bias])
    for (slot,), name in zip(moments, ("momentum", "velocity")):
        assert slot.path.endswith(f"bias_{name}")
    calls = []
    vars(optimizer)[keras_internals.UPDATE_STEP] = lambda *args: calls.append(
        args
    )
    optimizer.apply([keras.ops.ones(3)], [bias])
    ((gradients, variables, rate),) = calls
    assert len(gradients) == 1 and variables[0] is bias
    assert float(rate) == float(optimizer.learning_rate)


def test_averages_of_an_optimizer():
    for averages in (False, True):
        model = compiled_model()
        optimizer = keras.optimizers.SGD(use_ema=averages)
        optimizer.build(model.trainable_variables)
        assert hasattr(optimizer, keras_internals.AVERAGES) == averages


def test_every_function_there_is_documented():
    for name, function in inspect.getmembers(
        keras_internals, inspect.isfunction
    ):
        assert function.__doc__, name
