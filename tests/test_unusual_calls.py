"""One pass for layers that are called in less usual ways."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops
from layer_cases import random_biases
from test_one_pass import answer
from test_one_pass import array
from test_one_pass import assert_engines_agree

import keras_stab
from keras_stab import keras_internals
from keras_stab.gradients.one_pass import layer_rules

pytestmark = pytest.mark.usefixtures("quick_compilation")

PATCHES, WIDTH = 4, 6


def pooled(x):
    x = layers.Dense(WIDTH, activation="tanh")(x)
    return layers.Dense(2)(layers.GlobalAveragePooling1D()(x))


class Called(layers.Layer):
    """A layer of the caller's own around others, without weights itself."""

    def __init__(self, function, *inner):
        super().__init__()
        self.inner, self.function = inner, function

    def call(self, x):
        return self.function(x, *self.inner)


def sequence_model(function, *inner):
    inputs = keras.Input((PATCHES, 3))
    x = layers.Dense(WIDTH)(inputs)
    model = keras.Model(inputs, pooled(Called(function, *inner)(x)))
    random_biases(model)
    return model


def sequences(rows):
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, PATCHES, 3)).astype("float32")
    return x, rng.normal(size=(rows, 2)).astype("float32")


def position_ids():
    return ops.expand_dims(ops.arange(PATCHES), 0)


# ---- Outputs that are the same for all rows --------------------------------


def patch_encoder(x, table):
    """As in Keras's example of a vision transformer."""
    return x + table(position_ids())


def without_row_axis(x, table):
    """As in Keras's example of text classification with a transformer."""
    return x + table(ops.arange(PATCHES))


def changed_first(x, table, dense, norm):
    return x * norm(dense(table(position_ids()))) + dense(x)


def used_both_ways(x, table):
    ids = ops.cast(ops.abs(x[..., 0]) * 3, "int32") % PATCHES
    return x + table(position_ids()) * table(ids)


def table(size=PATCHES):
    return layers.Embedding(size, WIDTH, name="positions")


SAME_FOR_ALL = {
    "patch_encoder": lambda: sequence_model(patch_encoder, table()),
    "without_row_axis": lambda: sequence_model(without_row_axis, table()),
    "changed_first": lambda: sequence_model(
        changed_first,
        table(),
        layers.Dense(WIDTH, activation="tanh"),
        layers.LayerNormalization(),
    ),
    "used_both_ways": lambda: sequence_model(used_both_ways, table()),
}


@pytest.mark.parametrize(
    "name, rows",
    [("patch_encoder", 12), ("patch_encoder", 2)]
    + [(name, 7) for name in SAME_FOR_ALL],
)
def test_a_call_that_is_the_same_for_all_rows(name, rows):
    keras.utils.set_random_seed(2)
    model = SAME_FOR_ALL[name]()
    assert_engines_agree(model, sequences(rows), groups=3)


def first_row(x, table):
    """Right for all rows, but row 0 of a spread output would bear it all."""
    return x + table(position_ids())[0]


def repeated(x, table):
    return x + ops.repeat(table(position_ids()), ops.shape(x)[0], axis=0)


def summed(x, table):
    return x + ops.sum(table(position_ids()), axis=0, keepdims=True)


REFUSED = {"first_row": first_row, "repeated": repeated, "summed": summed}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_spread_over_rows_names_the_layer(name):
    model = sequence_model(REFUSED[name], table())
    model.compile(keras_stab.GRAIN("sgd", engine="one_pass"), "mse")
    with pytest.raises(ValueError, match="layer 'positions'.*all rows"):
        model.train_on_batch(*sequences(8))
    optimizer = keras_stab.GRAIN("sgd")
    model.compile(optimizer, "mse")
    model.train_on_batch(*sequences(8))
    assert "layer 'positions'" in optimizer.plan().reason


def test_vision_transformer_of_the_example_in_fit():
    """The weights after some steps are those of the microbatch engine."""
    results = []
    for engine in ("one_pass", "microbatch"):
        keras.utils.set_random_seed(5)
        model = SAME_FOR_ALL["patch_encoder"]()
        model.compile(keras_stab.GRAIN("sgd", engine=engine), "mse")
        model.fit(*sequences(14), batch_size=6, shuffle=False, verbose=0)
        results.append([array(w) for w in model.trainable_variables])
    for one, two in zip(*results):
        np.testing.assert_allclose(one, two, atol=2e-6)


# ---- Ids of an embedding ---------------------------------------------------


def token_model(layer, *call):
    inputs = keras.Input((PATCHES,), dtype="int32")
    model = keras.Model(inputs, pooled(layer(inputs, *call)))
    random_biases(model)
    return model


def ids(rows, low):
    rng = np.random.default_rng(rows)
    x = rng.integers(low, 9, size=(rows, PATCHES)).astype("int32")
    x[:, 0] = -1
    return x, rng.normal(size=(rows, 2)).astype("float32")


@pytest.mark.parametrize("size", [9, 400], ids=["small", "large"])
@pytest.mark.parametrize(
    "kind", [layers.Embedding, layers.ReversibleEmbedding, "lora"]
)
def test_negative_ids_count_from_the_end_of_the_table(kind, size):
    keras.utils.set_random_seed(3)
    if kind == "lora":
        layer = layers.Embedding(size, WIDTH)
        model = token_model(layer)
        layer.enable_lora(2)
        layer.lora_embeddings_b.assign(np.ones((2, WIDTH), "float32"))
    else:
        layer = kind(size, WIDTH)
        model = token_model(layer)
    assert_engines_agree(model, ids(7, low=-9), groups=3)


# ---- Fewer rows than groups ------------------------------------------------


def warned_of_empty_groups(batch_size, rows=10):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    x, y = np.ones((rows, 2), "float32"), np.ones((rows, 1), "float32")
    model.compile(keras_stab.GRAIN("sgd", groups=5), "mse")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for start in range(0, rows, batch_size):
            part = slice(start, start + batch_size)
            model.train_on_batch(x[part], y[part])
    return [str(w.message) for w in caught if "of 5 groups" in str(w.message)]


def test_more_groups_than_rows_are_told_once():
    (message,) = warned_of_empty_groups(batch_size=2)
    assert "of 5 groups 3 are empty" in message
    assert "Received: groups=5, a batch of 2 rows" in message


def test_a_short_last_batch_is_not_told():
    assert not warned_of_empty_groups(batch_size=6, rows=8)


# ---- A loss of the model's own ----------------------------------------------


class OwnLoss(keras.Model):
    """Its loss is not that of `compile`, and its layer tells no shape."""

    def __init__(self):
        super().__init__()
        self.scaled = Scaled()

    def call(self, x):
        return self.scaled(x)

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        return ops.mean(ops.square(y - y_pred))


class Scaled(layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=shape[-1:], initializer="ones")

    def call(self, x):
        return x * self.scale


@pytest.mark.parametrize("called", [True, False])
def test_a_compiled_loss_that_is_never_used(called, monkeypatch):
    """It is never built; the model is not built once more in every step."""
    model = OwnLoss()
    x, y = np.ones((8, 2), "float32"), np.full((8, 2), 2.0, "float32")
    if called:
        model(x)
    model.compile(keras_stab.GRAIN(keras.optimizers.SGD(0.5)), "mse")
    model.fit(x, y, batch_size=4, verbose=0)
    np.testing.assert_allclose(array(model.scaled.scale), 1.75, rtol=1e-5)
    built = []
    monkeypatch.setattr(model, "_symbolic_build", lambda **_: built.append(1))
    keras_internals.build_for(model, (x, y))
    assert not built


# ---- Arguments of a call ---------------------------------------------------


def by_name(x, dense):
    return dense(inputs=x)


def in_inference(x, norm):
    return norm(x, training=False)


ARGUMENTS = {
    "by_name": (by_name, lambda: layers.Dense(WIDTH, activation="tanh")),
    "batch_norm": (in_inference, layers.BatchNormalization),
    "batch_norm_of_middle_axis": (
        in_inference,
        lambda: layers.BatchNormalization(axis=1),
    ),
    "batch_norm_without_weights": (
        in_inference,
        lambda: layers.BatchNormalization(center=False, scale=False),
    ),
    "batch_norm_without_scale": (
        in_inference,
        lambda: layers.BatchNormalization(scale=False),
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_a_call(name):
    keras.utils.set_random_seed(4)
    function, make = ARGUMENTS[name]
    assert_engines_agree(
        sequence_model(function, make()), sequences(7), groups=3
    )


def test_batch_norm_that_is_refused_is_named():
    for layer in (
        layers.BatchNormalization(renorm=True, name="norm"),
        layers.BatchNormalization(
            renorm=True, center=False, scale=False, name="norm"
        ),
    ):
        model = sequence_model(lambda x, norm: norm(x), layer)
        optimizer = keras_stab.GRAIN("sgd")
        model.compile(optimizer, "mse")
        model.train_on_batch(*sequences(12))
        assert "'norm' (BatchNormalization)" in optimizer.plan().reason


def test_positions_given_to_a_table_of_keras_hub():
    import keras_hub as hub

    given = np.array([[2, 0, 3, 1]], "int32")

    def call(x, table):
        one = table(x, positions=ops.convert_to_tensor(given))
        return x + one + ops.flip(table(x, start_index=1), axis=1)

    layer = hub.layers.PositionEmbedding(sequence_length=PATCHES + 1)
    model = sequence_model(call, layer)
    assert_engines_agree(model, sequences(12), groups=3)
    assert_engines_agree(model, sequences(PATCHES), groups=2)


FALLS_BACK = {
    "lora": lambda: layers.Conv1D(WIDTH, 2, activation="tanh"),
    "repeated_letter": lambda: layers.EinsumDense(
        "abc,cd->abd", output_shape=(None, WIDTH), activation="tanh"
    ),
}


@pytest.mark.parametrize("name", FALLS_BACK)
def test_a_rule_that_falls_back_before_an_activation(name, monkeypatch):
    """The gradient before the activation meets the layer without it."""
    keras.utils.set_random_seed(6)
    layer = FALLS_BACK[name]()
    model = sequence_model(lambda x, layer: layer(x), layer)
    if name == "lora":
        layer.enable_lora(2)
        for variable in layer.trainable_variables:
            variable.assign(
                keras.random.normal(variable.shape, seed=len(variable.path))
            )
    else:
        rules = dict(layer_rules._RULES)
        rules[layers.EinsumDense] = (lambda layer, call: [], True)
        monkeypatch.setattr(layer_rules, "_RULES", rules)
    assert_engines_agree(model, sequences(12), groups=3)


def test_sequences_without_tokens():
    """A batch whose second input has length zero."""
    first = keras.Input((PATCHES,), dtype="int32")
    second = keras.Input((None,), dtype="int32")
    embedding = layers.Embedding(9, WIDTH)
    x = layers.Concatenate(axis=1)([embedding(first), embedding(second)])
    model = keras.Model([first, second], pooled(x))
    model.compile("sgd", "mse")
    x, y = ids(6, low=0)
    data = ((np.abs(x), np.zeros((6, 0), "int32")), y)
    keras_internals.build_for(model, data)
    weights = np.full(3, 1 / 3, "float32")
    *one, plan = answer(model, data, 3, "auto", weights)
    *two, _ = answer(model, data, 3, "microbatch", weights)
    np.testing.assert_allclose(array(one[0]), array(two[0]), rtol=1e-4)
    assert plan.engine in ("one_pass", "microbatch")
