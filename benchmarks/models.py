"""The models whose train steps are timed, and made-up data for them.

Keras is imported inside functions only: see `timing/measure.py`.
"""

CLASSES = 10
TOKENS = 64
VOCABULARY = 1000


def build_model(name):
    import keras

    keras.utils.set_random_seed(1)
    makers = {
        "mlp": _mlp,
        "bn_mlp": lambda: _mlp(batch_norm=True),
        "wide": _wide,
        "cnn": lambda: _residual(1),
        "resnet": lambda: _residual(3),
        "transformer": _transformer,
        "encoder": _encoder,
        "lora": _lora,
    }
    return makers[name]()


def _mlp(batch_norm=False):
    from keras import layers

    x = inputs = layers.Input((784,))
    for _ in range(2):
        if batch_norm:
            x = layers.BatchNormalization()(layers.Dense(512)(x))
            x = layers.ReLU()(x)
        else:
            x = layers.Dense(512, activation="relu")(x)
    return _classifier(inputs, x)


def _wide():
    """Ten million weights in three matrices."""
    from keras import layers

    inputs = layers.Input((784,))
    x = layers.Dense(2048, activation="relu")(inputs)
    x = layers.Dense(4096, activation="relu")(x)
    return _classifier(inputs, x)


def _residual(blocks):
    """A residual network with batch normalisation and three widths.

    Of eight layers with one block a width, 20 with three (the latter has 65
    trainable variables).
    """
    from keras import layers

    def convolve(x, width, size, stride):
        x = layers.Conv2D(
            width, size, strides=stride, padding="same", use_bias=False
        )(x)
        return layers.BatchNormalization()(x)

    inputs = layers.Input((32, 32, 3))
    x = layers.ReLU()(convolve(inputs, 16, 3, 1))
    for width, first in ((16, 1), (32, 2), (64, 2)):
        for stride in (first, *[1] * (blocks - 1)):
            shortcut = x if stride == 1 else convolve(x, width, 1, stride)
            x = layers.ReLU()(convolve(x, width, 3, stride))
            x = convolve(x, width, 3, 1)
            x = layers.ReLU()(layers.Add()([x, shortcut]))
    return _classifier(inputs, layers.GlobalAveragePooling2D()(x))


def _transformer():
    """Two encoder blocks of width 128 with dropout, over 64 tokens."""
    return _blocks(2, 128, dropout=0.1)


def _encoder():
    """Four encoder blocks of width 256, over 64 tokens."""
    return _blocks(4, 256, dropout=0.0)


def _blocks(count, width, dropout):
    import keras
    from keras import layers

    class AddPositions(layers.Layer):
        def build(self, shape):
            self.positions = self.add_weight(shape=shape[1:])

        def call(self, x):
            return x + self.positions

    inputs = keras.Input((TOKENS,), dtype="int32")
    x = AddPositions()(layers.Embedding(VOCABULARY, width)(inputs))
    for _ in range(count):
        y = layers.LayerNormalization()(x)
        y = layers.MultiHeadAttention(4, width // 4, dropout=dropout)(y, y)
        x = layers.Add()([x, layers.Dropout(dropout)(y)])
        y = layers.LayerNormalization()(x)
        y = layers.Dense(4 * width, activation="gelu")(y)
        y = layers.Dense(width)(y)
        x = layers.Add()([x, layers.Dropout(dropout)(y)])
    return _classifier(inputs, layers.GlobalAveragePooling1D()(x))


def _lora():
    """A language model of KerasHub with adapters of rank 8."""
    import keras
    import keras_hub

    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=VOCABULARY,
        num_layers=4,
        num_heads=4,
        hidden_dim=256,
        intermediate_dim=1024,
        dropout=0.0,
        max_sequence_length=TOKENS,
    )
    backbone.enable_lora(8)
    inputs = keras.Input((TOKENS,), dtype="int32")
    ones = keras.ops.ones_like(inputs)
    x = backbone({"token_ids": inputs, "padding_mask": ones})
    return _classifier(inputs, keras.layers.GlobalAveragePooling1D()(x))


def _classifier(inputs, x):
    import keras

    return keras.Model(inputs, keras.layers.Dense(CLASSES)(x))


def make_data(name, rows):
    import numpy as np

    random = np.random.default_rng(1)
    labels = random.integers(0, CLASSES, rows).astype("int32")
    if name in ("transformer", "encoder", "lora"):
        shape = (rows, TOKENS)
        return random.integers(0, VOCABULARY, shape).astype("int32"), labels
    flat = name in ("mlp", "bn_mlp", "wide")
    shape = (784,) if flat else (32, 32, 3)
    return random.standard_normal((rows, *shape), dtype="float32"), labels
