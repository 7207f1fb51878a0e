"""reestimate_batch_norm: exact figures, any data, nothing else changed."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_stab

layers = keras.layers
CASE = json.loads(
    (Path(__file__).parent / "vectors" / "averaging.json").read_text()
)["batch_norm"]
X = np.array(CASE["X"], "float32")
Y = np.zeros((len(X), 1), "float32")
BATCHES = np.split(X, np.cumsum(CASE["batch_sizes"])[:-1])


def state(model):
    variables = [*model.variables, *model.metrics_variables]
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def model(inputs=None, **options):
    """Batch-norm of `X W'`, with dropout and metrics around it."""
    inputs = keras.Input((3,)) if inputs is None else inputs
    x = inputs["x"] if isinstance(inputs, dict) else inputs
    x = layers.Dense(2, use_bias=False, name="linear")(x)
    x = layers.BatchNormalization(momentum=0.9, name="norm", **options)(x)
    x = layers.Dropout(0.5, seed=3)(x)
    made = keras.Model(inputs, layers.Dense(1)(x))
    made.get_layer("linear").set_weights([np.transpose(CASE["W"])])
    return made


class Loader:
    """Batches as a PyTorch DataLoader gives them: lists of tensors."""

    def __iter__(self):
        import torch

        return ([torch.from_numpy(x), torch.zeros(len(x))] for x in BATCHES)

    def __len__(self):
        return len(BATCHES)


class Sequence(keras.utils.PyDataset):
    def __len__(self):
        return len(BATCHES)

    def __getitem__(self, index):
        return BATCHES[index], np.zeros(len(BATCHES[index]))


def dataset():
    import tensorflow as tf

    return tf.data.Dataset.from_generator(
        lambda: ((x, Y[: len(x)]) for x in BATCHES),
        output_signature=(
            tf.TensorSpec((None, 3), "float32"),
            tf.TensorSpec((None, 1), "float32"),
        ),
    )


DATA = {
    "array": lambda: X,
    "tensor": lambda: keras.ops.convert_to_tensor(X),
    "pair": lambda: (X, Y),
    "list of arrays": lambda: BATCHES,
    "list of triples": lambda: [(x, x, x) for x in BATCHES],
    "generator": lambda: ((x, x) for x in BATCHES),
    "PyDataset": Sequence,
    "DataLoader": Loader,
    "tf.data": dataset,
}


@pytest.mark.parametrize("kind", DATA)
def test_exact_whatever_the_data(kind):
    network = model()
    network.compile("sgd", "mse", metrics=["mae"])
    network.evaluate(X, Y, verbose=0)
    before = state(network)
    norm = network.get_layer("norm")
    keras_stab.reestimate_batch_norm(
        network, DATA[kind](), batch_size=4, verbose=0
    )
    mean, variance = norm.get_weights()[2:]
    np.testing.assert_allclose(mean, CASE["exact"]["mean"], atol=1e-6)
    np.testing.assert_allclose(variance, CASE["exact"]["var"], atol=4e-6)
    assert norm.momentum == 0.9
    # Everything else: put the old statistics back and compare.
    changed = {id(norm.moving_mean), id(norm.moving_variance)}
    variables = [*network.variables, *network.metrics_variables]
    for variable, old, new in zip(variables, before, state(network)):
        if id(variable) not in changed:
            np.testing.assert_array_equal(old, new)


def test_dicts():
    inputs = {"x": keras.Input((3,), name="x")}
    for data in ({"x": X}, [{"x": x} for x in BATCHES], ({"x": X}, Y)):
        network = model(inputs)
        keras_stab.reestimate_batch_norm(network, data, batch_size=4, verbose=0)
        mean = network.get_layer("norm").get_weights()[2]
        np.testing.assert_allclose(mean, CASE["exact"]["mean"], atol=1e-6)


def test_a_large_mean_keeps_its_variance():
    network = keras.Sequential([layers.BatchNormalization()])
    x = 1e4 + np.random.default_rng(0).normal(size=(999, 1))
    keras_stab.reestimate_batch_norm(network, x, batch_size=100, verbose=0)
    exact = x.astype("float32").astype("float64").var()
    assert network.get_weights()[3][0] == pytest.approx(exact, rel=1e-3)


def test_images_of_several_sizes_and_a_shared_layer():
    norm = layers.BatchNormalization(center=False, scale=False)
    inputs = keras.Input((None, 3))
    network = keras.Model(inputs, [norm(inputs), norm(2.0 * inputs)])
    random = np.random.default_rng(0)
    batches = [random.normal(size=(2, n, 3)).astype("float32") for n in (4, 7)]
    keras_stab.reestimate_batch_norm(network, batches, verbose=0)
    seen = np.concatenate([b.reshape(-1, 3) for b in batches])
    seen = np.concatenate([seen, 2.0 * seen])
    mean, variance = norm.get_weights()
    np.testing.assert_allclose(mean, seen.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(variance, seen.var(axis=0), rtol=1e-5)


def test_masked_positions_do_not_count():
    network = keras.Sequential(
        [
            layers.Input((3,), dtype="int32"),
            layers.Embedding(4, 2, mask_zero=True),
            layers.BatchNormalization(),
        ]
    )
    ids = np.array([[1, 2, 0], [3, 0, 0]])
    keras_stab.reestimate_batch_norm(network, ids, verbose=0)
    table, _, _, mean, variance = network.get_weights()
    seen = table[[1, 2, 3]]
    np.testing.assert_allclose(mean, seen.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(variance, seen.var(axis=0), atol=1e-6)


def test_frozen_layers_keep_their_statistics():
    network = model()
    network.get_layer("norm").trainable = False
    before = state(network)
    keras_stab.reestimate_batch_norm(network, X, verbose=0)
    for old, new in zip(before, state(network)):
        np.testing.assert_array_equal(old, new)


def test_steps_and_progress(capsys):
    network = model()
    keras_stab.reestimate_batch_norm(network, BATCHES, steps=1)
    assert "1/1" in capsys.readouterr().out
    hidden = BATCHES[0] @ np.transpose(CASE["W"])
    mean = network.get_layer("norm").get_weights()[2]
    np.testing.assert_allclose(mean, hidden.mean(axis=0), atol=1e-6)


def nan_in_the_second_batch():
    return [BATCHES[0], np.full_like(BATCHES[1], np.nan)]


class Own(layers.BatchNormalization):
    def call(self, inputs, training=None, mask=None):
        return super().call(inputs, training, mask)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"data": []}, "no batches"),
        ({"data": X[:0]}, "no batches"),
        ({"data": 3}, "iterable of batches"),
        ({"data": X, "steps": 0}, "`steps` must be an integer of at least 1"),
        ({"data": X, "batch_size": 1.5}, "`batch_size` must be an integer"),
        ({"data": ([X, X[:2]], Y)}, "same number of rows"),
        ({"data": nan_in_the_second_batch()}, "not finite"),
    ],
)
def test_bad_input_changes_nothing(arguments, message):
    network = model()
    before = state(network)
    with pytest.raises(ValueError, match=message):
        keras_stab.reestimate_batch_norm(network, verbose=0, **arguments)
    for old, new in zip(before, state(network)):
        np.testing.assert_array_equal(old, new)
    assert "call" not in vars(network.get_layer("norm"))


def test_not_a_model():
    with pytest.raises(ValueError, match="must be a keras.Model or a layer"):
        keras_stab.reestimate_batch_norm(X, model(), verbose=0)


def test_layers_with_other_statistics_are_refused():
    with pytest.raises(ValueError, match="renorm=True"):
        keras_stab.reestimate_batch_norm(model(renorm=True), X, verbose=0)
    network = keras.Sequential([keras.Input((3,)), Own()])
    with pytest.raises(ValueError, match="`call` of its own"):
        keras_stab.reestimate_batch_norm(network, X, verbose=0)


def test_an_unused_layer_warns():
    network = Branched()
    network(X)
    with pytest.warns(UserWarning, match="was not used"):
        keras_stab.reestimate_batch_norm(network, X, verbose=0)


class Branched(keras.Model):
    """One of its layers is used outside of training only."""

    def __init__(self):
        super().__init__()
        self.used = layers.BatchNormalization()
        self.unused = layers.BatchNormalization()

    def call(self, x, training=False):
        return self.used(x, training=training) if training else self.unused(x)
