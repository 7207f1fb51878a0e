"""Small models that hold every kind of layer with weights."""

import keras
import numpy as np
from keras import layers
from keras import ops

RNG = np.random.default_rng


def floats(*shape):
    def make(rows):
        return RNG(rows).normal(size=(rows, *shape)).astype("float32")

    return make


def tokens(length, size):
    def make(rows):
        return RNG(rows).integers(0, size, (rows, length)).astype("int32")

    return make


def stack(*parts, shape):
    """A Sequential model that ends in three outputs."""

    def build():
        return keras.Sequential(
            [layers.Input(shape), *[part() for part in parts], _Head()]
        )

    return build


class _Head(layers.Layer):
    """Means over all axes but rows and channels, without weights."""

    def call(self, x):
        axes = tuple(range(1, len(x.shape) - 1))
        x = ops.mean(x, axis=axes) if axes else x
        return ops.tanh(x[:, :3])


def random_biases(model):
    """Initial zeros and ones would hide mistakes."""
    for i, variable in enumerate(model.trainable_variables):
        noise = RNG(i).normal(size=variable.shape) * 0.3
        variable.assign(variable + noise.astype("float32"))
    return model


def attention(kind, **arguments):
    def build():
        inputs = keras.Input((4, 6))
        x = kind(**arguments)(inputs, inputs)
        return keras.Model(inputs, _Head()(x))

    return build


class Positions(layers.Layer):
    """No rule is registered for it."""

    def build(self, shape):
        self.table = self.add_weight(shape=shape[1:], name="table")

    def call(self, x):
        return x + self.table


class TwoOutputs(layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=shape[-1:], name="scale")
        self.shift = self.add_weight(shape=shape[-1:], name="shift")

    def call(self, x):
        return {"scaled": x * self.scale, "shifted": x + ops.tanh(self.shift)}


def two_outputs():
    inputs = keras.Input((5,))
    parts = TwoOutputs()(inputs)
    return keras.Model(
        inputs, _Head()(parts["scaled"] * ops.tanh(parts["shifted"]))
    )


class FirstUnused(layers.Layer):
    """No rule is registered for it, and not all of it is used."""

    def build(self, shape):
        self.scale = self.add_weight(shape=shape[-1:], name="scale")

    def call(self, x):
        return ops.cos(x * self.scale), ops.sin(x * self.scale)


def first_unused():
    inputs = keras.Input((5,))
    return keras.Model(inputs, _Head()(FirstUnused()(inputs)[1]))


def shared():
    """One layer called three times, with sequences of different length."""
    inputs = keras.Input((6, 5))
    dense = layers.Dense(5, activation="tanh")
    einsum = layers.EinsumDense("abc,cd->abd", output_shape=(None, 5))
    norm = layers.LayerNormalization()
    x = norm(einsum(dense(dense(inputs))))
    x = norm(einsum(dense(x[:, :2])))
    return keras.Model(inputs, _Head()(x))


def shared_convolution():
    inputs = keras.Input((5, 5, 3))
    convolution = layers.Conv2D(3, 2, padding="same", activation="relu")
    return keras.Model(inputs, _Head()(convolution(convolution(inputs))))


def shared_embedding():
    inputs = keras.Input((4,), dtype="int32")
    table = layers.Embedding(7, 5)
    x = table(inputs) * ops.tanh(table(ops.flip(inputs, axis=1))[:, :4])
    return keras.Model(inputs, _Head()(x))


def tied(tie_weights=True, soft_cap=None, extra=False, lookup=True):
    def build():
        inputs = keras.Input((4,), dtype="int32")
        table = layers.ReversibleEmbedding(
            9, 5, tie_weights=tie_weights, logit_soft_cap=soft_cap
        )
        x = table(inputs)
        if extra:
            x = x + table(ops.flip(inputs, axis=1))
        if not lookup:
            x = ops.stop_gradient(x)
        x = layers.Dense(5, activation="tanh")(x)
        logits = table(x, reverse=True)
        if extra:
            logits = logits + table(ops.tanh(x), reverse=True)
        return keras.Model(inputs, _Head()(logits))

    return build


def regularised():
    inputs = keras.Input((5,))
    l1, l2 = keras.regularizers.L1(0.02), keras.regularizers.L2(0.1)
    x = layers.Dense(6, kernel_regularizer=l2, bias_regularizer=l2)(inputs)
    x = layers.LayerNormalization(gamma_regularizer=l1)(x)
    return keras.Model(inputs, layers.Dense(3, kernel_regularizer=l1)(x))


def lora(build):
    def built():
        model = build()
        for layer in model.layers:
            if hasattr(layer, "enable_lora"):
                layer.enable_lora(2, lora_alpha=3.0)
        return model

    return built


def folded_rows():
    """Inside, a row of the batch is several leading rows."""
    inputs = keras.Input((4, 5))
    x = layers.Dense(6, activation="relu")(ops.reshape(inputs, (-1, 5)))
    x = Scaled()(x)
    return keras.Model(inputs, _Head()(ops.reshape(x, (-1, 4, 6))))


class Scaled(layers.Layer):
    """No rule is registered for it."""

    def build(self, shape):
        self.scale = self.add_weight(shape=shape[-1:], name="scale")

    def call(self, x, by=None):
        return ops.sin(x * self.scale)


def several_inputs():
    left, right = (
        keras.Input((3,), name="left"),
        keras.Input((4,), name="right"),
    )
    a, b = layers.Dense(5)(left), layers.Dense(5, use_bias=False)(right)
    x = layers.Dense(3)(ops.tanh(a * b))
    return keras.Model({"left": left, "right": right}, x)


def several_inputs_data(rows):
    return {"left": floats(3)(rows), "right": floats(4)(rows)}


def partly_frozen():
    model = stack(
        lambda: layers.Dense(6, activation="relu"),
        lambda: layers.Dense(6),
        lambda: layers.Dense(3),
        shape=(5,),
    )()
    model.layers[1].trainable = False
    return model


def _sequence(*parts):
    return stack(*parts, shape=(4, 6)), floats(4, 6)


def _images(*parts, shape=(6, 5, 4)):
    return stack(*parts, shape=shape), floats(*shape)


CASES = {
    "dense": (
        stack(
            lambda: layers.Dense(7, activation="gelu"),
            lambda: layers.Dense(3),
            shape=(5,),
        ),
        floats(5),
    ),
    "dense_sequence": _sequence(lambda: layers.Dense(5, "relu")),
    "dense_with_layer_activation": _sequence(
        lambda: layers.Dense(5, activation=layers.LeakyReLU())
    ),
    "dense_with_trained_activation": _sequence(
        lambda: layers.Dense(5, activation=layers.PReLU(shared_axes=[1]))
    ),
    "einsum": _sequence(
        lambda: layers.EinsumDense(
            "abc,cde->abde",
            output_shape=(None, 2, 3),
            bias_axes="de",
            activation="tanh",
        )
    ),
    "einsum_ellipsis": _sequence(
        lambda: layers.EinsumDense(
            "...x,xy->...y", output_shape=5, bias_axes="y"
        )
    ),
    "einsum_heads": _sequence(
        lambda: layers.EinsumDense(
            "abc,bcd->abd", output_shape=(4, 3), bias_axes="b"
        )
    ),
    "einsum_transposed": _sequence(
        lambda: layers.EinsumDense("abc,db->adc", output_shape=(3, 6))
    ),
    "einsum_summed": _sequence(
        lambda: layers.EinsumDense("abc,cd->ad", output_shape=(5,))
    ),
    "attention": (
        attention(layers.MultiHeadAttention, num_heads=2, key_dim=3),
        floats(4, 6),
    ),
    "grouped_attention": (
        attention(
            layers.GroupQueryAttention,
            head_dim=3,
            num_query_heads=4,
            num_key_value_heads=2,
        ),
        floats(4, 6),
    ),
    "embedding": (
        stack(lambda: layers.Embedding(7, 5), shape=(4,)),
        tokens(4, 7),
    ),
    "large_embedding": (
        stack(lambda: layers.Embedding(999, 5), shape=(4,)),
        tokens(4, 999),
    ),
    "convolution_1d": _sequence(
        lambda: layers.Conv1D(4, 3, padding="causal", dilation_rate=2)
    ),
    "convolution_2d": _images(
        lambda: layers.Conv2D(5, (3, 2), strides=2, activation="relu"),
        lambda: layers.Conv2D(4, 2, padding="same", strides=(2, 1)),
    ),
    "convolution_grouped": _images(lambda: layers.Conv2D(4, 3, groups=2)),
    "convolution_dilated": _images(
        lambda: layers.Conv2D(4, 3, dilation_rate=2, padding="same")
    ),
    "convolution_3d": _images(
        lambda: layers.Conv3D(3, 2, padding="same"), shape=(3, 3, 3, 2)
    ),
    "depthwise": _images(lambda: layers.DepthwiseConv2D(2)),
    "separable": _images(lambda: layers.SeparableConv2D(3, 2)),
    "transposed": _images(lambda: layers.Conv2DTranspose(3, 2)),
    "layer_norm": _sequence(
        lambda: layers.LayerNormalization(axis=[1, 2]),
        lambda: layers.LayerNormalization(center=False),
        lambda: layers.LayerNormalization(scale=False),
    ),
    "rms_norm": _sequence(lambda: layers.RMSNormalization()),
    "group_norm": _images(lambda: layers.GroupNormalization(2)),
    "lstm": _sequence(lambda: layers.LSTM(3, return_sequences=True)),
    "bidirectional": _sequence(lambda: layers.Bidirectional(layers.GRU(3))),
    "time_distributed": _sequence(
        lambda: layers.TimeDistributed(layers.Dense(3))
    ),
    "positions": _sequence(Positions, lambda: layers.Dense(3)),
    "two_outputs": (two_outputs, floats(5)),
    "first_unused": (first_unused, floats(5)),
    "shared": (shared, floats(6, 5)),
    "shared_convolution": (shared_convolution, floats(5, 5, 3)),
    "shared_embedding": (shared_embedding, tokens(4, 7)),
    "tied": (tied(), tokens(4, 9)),
    "tied_soft_cap": (tied(soft_cap=2.0), tokens(4, 9)),
    "tied_twice": (tied(extra=True), tokens(4, 9)),
    "tied_lookup_cut_off": (tied(lookup=False), tokens(4, 9)),
    "untied": (tied(tie_weights=False), tokens(4, 9)),
    "regularised": (regularised, floats(5)),
    "folded_rows": (folded_rows, floats(4, 5)),
    "several_inputs": (several_inputs, several_inputs_data),
    "partly_frozen": (partly_frozen, floats(5)),
}
CASES["lora_dense"] = (lora(CASES["dense"][0]), floats(5))
CASES["lora_einsum"] = (lora(CASES["einsum"][0]), floats(4, 6))
CASES["lora_einsum_contracted"] = (
    lora(CASES["einsum_transposed"][0]),
    floats(4, 6),
)
CASES["lora_embedding"] = (lora(CASES["embedding"][0]), tokens(4, 7))
CASES["lora_convolution"] = (
    lora(CASES["convolution_2d"][0]),
    floats(6, 5, 4),
)
