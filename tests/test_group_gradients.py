"""group_gradients: the gradients of rows and groups, one by one."""

import contract
import keras
import numpy as np
import pytest
from marks import quick
from marks import slow_but_on_torch

import keras_stab
from keras_stab.backend import devices
from keras_stab.backend import differentiation
from keras_stab.backend import tracing

ROWS = 14


def data(seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(ROWS, 4)).astype("float32")
    weight = random.uniform(0.5, 2.0, ROWS).astype("float32")
    return x, random.integers(0, 3, ROWS), weight


def network(**arguments):
    """Dropout, batch-norm and a penalty: what depends on the mode, or not."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, activation="tanh", kernel_regularizer="l2"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5, seed=3),
            keras.layers.Dense(3),
        ]
    )
    model.layers[1].moving_mean.assign(0.1 * np.arange(5))
    model.compile(
        "adam",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **arguments,
    )
    return model


def gradient(model, x, y, weight):
    """Keras's own loss, differentiated once."""
    values = [tracing.read(v) for v in model.trainable_variables]

    def loss(values):
        pairs = list(zip(model.trainable_variables, values))
        with keras.StatelessScope(pairs, collect_losses=True) as scope:
            y_pred = model(x, training=False)
            total = model.loss(
                y, y_pred, None if weight is None else weight
            ) + sum(v.regularizer(w) for v, w in pairs if v.regularizer)
        del scope
        return total, ()

    _, found = differentiation.value_and_gradients(loss, values)
    return np.concatenate(
        [np.ravel(keras.ops.convert_to_numpy(g)) for g in found]
    ).astype("float64")


def expected(model, x, y, weight, numbers):
    """The gradients of all groups, one a row."""
    return np.stack(
        [
            gradient(
                model,
                x[numbers == k],
                y[numbers == k],
                None if weight is None else weight[numbers == k],
            )
            for k in range(numbers.max() + 1)
        ]
    )


GROUPS = {
    "rows": ("rows", np.arange(ROWS)),
    "three": (3, np.arange(ROWS) % 3),
    "given": (np.arange(ROWS) ** 2 % 4 % 3, np.arange(ROWS) ** 2 % 4 % 3),
}
GROUPS["given"] = (GROUPS["given"][0].tolist(), GROUPS["given"][1])


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize(
    "batch_size, engine",
    quick(
        [(ROWS, "auto"), (5, "one_pass"), (5, "microbatch")],
        lambda case: case[1] == "auto",
    ),
)
def test_gram_and_combinations(name, batch_size, engine):
    """Also where a batch is short, and where pairs of batches are needed."""
    groups, numbers = GROUPS[name]
    model, (x, y, weight) = network(), data()
    found = keras_stab.group_gradients(
        model, x, y, groups, weight, batch_size, engine=engine, verbose=0
    )
    rows = expected(model, x, y, weight, numbers)
    gram = rows @ rows.T
    np.testing.assert_allclose(found.gram, gram, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(
        found.norms, np.linalg.norm(rows, axis=1), rtol=2e-5
    )
    lengths = np.linalg.norm(rows, axis=1)
    cosines = gram / lengths[:, None] / lengths[None, :]
    np.testing.assert_allclose(found.cosines, cosines, atol=2e-5)
    np.testing.assert_array_equal(found.sizes, np.bincount(numbers))
    assert found.engine == ("one_pass" if engine == "auto" else engine)
    weights = np.linspace(-1.0, 2.0, len(rows))
    combined = found.combine(weights)
    shapes = [tuple(v.shape) for v in model.trainable_variables]
    assert [c.shape for c in combined] == shapes
    flat = np.concatenate([c.ravel() for c in combined])
    np.testing.assert_allclose(flat, weights @ rows, rtol=2e-4, atol=2e-6)


def test_nothing_in_the_model_changes():
    model, (x, y, weight) = network(), data()
    model.fit(x, y, batch_size=7, verbose=0)
    before = contract.state(model)
    metrics = [keras.ops.convert_to_numpy(v) for v in model.metrics_variables]
    generator = devices.random_state()
    for training in (False, True):
        keras_stab.group_gradients(
            model, x, y, 2, weight, training=training, verbose=0
        ).combine([1.0, 1.0])
    contract.assert_same_bits(before, contract.state(model))
    contract.assert_same_bits(
        metrics,
        [keras.ops.convert_to_numpy(v) for v in model.metrics_variables],
    )
    assert not devices.drew_since(generator)


def test_at_other_weights_nothing_is_compiled_again():
    """It is the weights of the moment that count."""
    model, (x, y, _) = network(), data()
    first = keras_stab.group_gradients(model, x, y, "rows", verbose=0)
    known = vars(model)["_keras_stab_memory"].known["batch gradients"]["found"]
    model.fit(x, y, batch_size=7, verbose=0)
    again = keras_stab.group_gradients(model, x, y, "rows", verbose=0)
    assert not np.allclose(first.gram, again.gram, rtol=1e-3)
    rows = expected(model, x, y, None, np.arange(ROWS))
    np.testing.assert_allclose(again.gram, rows @ rows.T, rtol=2e-5, atol=2e-6)
    now = vars(model)["_keras_stab_memory"].known["batch gradients"]["found"]
    assert now is known


class OwnLoss(keras.Model):
    """A loss that is no mean over rows, and no layer of its own."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(2)

    def call(self, inputs):
        return self.dense(inputs)

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        return keras.ops.square(keras.ops.sum(y_pred))


def test_a_loss_that_is_no_mean_over_rows():
    """Each group is then evaluated by itself, and that is said."""
    model = OwnLoss()
    model.compile("sgd")
    x = data()[0]
    found = keras_stab.group_gradients(model, x, groups=2, verbose=0)
    assert found.engine == "microbatch" and "mean over rows" in found.reason
    kernel, bias = model.get_weights()
    for k in range(2):
        own = x[k::2]
        total = 2.0 * np.sum(own @ kernel + bias)
        by_kernel = total * np.tile(own.sum(0)[:, None], 2)
        square = np.sum(by_kernel**2) + 2 * (total * len(own)) ** 2
        np.testing.assert_allclose(found.gram[k, k], square, rtol=1e-4)
    with pytest.raises(ValueError, match="mean over rows.*Received"):
        keras_stab.group_gradients(
            model, x, groups=2, engine="one_pass", verbose=0
        )


def test_what_does_not_fit_is_refused_or_not_formed():
    model, (x, y, _) = network(), data()
    measure = keras_stab.group_gradients
    with pytest.raises(ValueError, match="`memory_limit`.*Received"):
        measure(model, x, y, engine="microbatch", memory_limit=100, verbose=0)
    found = measure(model, x, y, 4, batch_size=7, memory_limit=100, verbose=0)
    assert found.engine == "one_pass" and "not fit" in found.reason


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"groups": "row"}, '"rows" or "losses"'),
        ({"groups": 0}, "groups"),
        ({"groups": ROWS + 1}, "Each group needs a row"),
        ({"groups": [0, 1]}, "for each of 14 rows"),
        ({"groups": np.zeros(ROWS)}, "an int from 0"),
        ({"groups": np.arange(ROWS) - 1}, "an int from 0"),
        ({"engine": "fast"}, "engine"),
        ({"batch_size": 0}, "batch_size"),
        ({"training": 1}, "training"),
        ({"verbose": 2}, "verbose"),
        ({"y": np.zeros(3, int)}, "equally many rows"),
        ({"y": None}, "without targets"),
        ({"model": "net"}, "must be a keras.Model"),
        ({"model": keras.Sequential([keras.layers.Dense(1)])}, "has no loss"),
    ],
    ids=str,
)
def test_refusals(arguments, message):
    x, y, _ = data()
    given = {"model": None, "x": x, "y": y, "groups": 2, "verbose": 0}
    given |= arguments
    if given["model"] is None:
        given["model"] = network()
    with pytest.raises(ValueError, match=message):
        keras_stab.group_gradients(**given)


def test_weights_of_a_combination():
    model, (x, y, _) = network(), data()
    found = keras_stab.group_gradients(model, x, y, 2, verbose=0)
    with pytest.raises(ValueError, match="each of the 2 groups.*Received"):
        found.combine([1.0])


@slow_but_on_torch
def test_a_frozen_model_has_no_gradients():
    model, (x, y, _) = network(), data()
    model.trainable = False
    with pytest.raises(ValueError, match="no trainable weights"):
        keras_stab.group_gradients(model, x, y, verbose=0)
