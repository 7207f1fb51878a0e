"""Tasks that are too large for a processor: whole encoder, ResNet-20."""

import keras
import models
import numpy as np

from stability import arms
from stability import images
from stability import pretrained_features
from stability.reuse import CompiledModels
from stability.text_classification import HELD_OUT
from stability.text_classification import POOL
from stability.text_classification import TextClassification


class PutBack(CompiledModels):
    """Puts the first values back, since to make a large model takes seconds.

    Args:
        task: With a method `restart(model)` that gives a model its first
            weights and random seeds.
    """

    def __init__(self, task):
        super().__init__(task)
        self._firsts = {}

    def rewound(self, optimizer):
        name = optimizer.name
        if name not in self._models:
            model = super().rewound(optimizer)
            self._firsts[name] = [
                np.array(keras.ops.convert_to_numpy(v))
                for v in model.optimizer.variables
            ]
        model = self._models[name]
        for variable, first in zip(
            model.optimizer.variables, self._firsts[name], strict=True
        ):
            variable.assign(first)
        model.optimizer.learning_rate = float(
            keras.ops.convert_to_numpy(optimizer.learning_rate)
        )
        self.task.restart(model)
        return model


class FineTuning(TextClassification):
    """64 rows of SST-2 and all layers of the encoder.

    Args:
        rows: Int, of a run.
        epochs: Int.
        rates: Learning rates to search.
    """

    arms = ("base", "grain_4", "grain_8")
    watches_grain = False

    def __init__(self, rows=64, epochs=8, rates=(3e-5, 1e-4, 3e-4, 1e-3)):
        super().__init__("sst2", 64)
        self.rows, self.epochs, self.rates = rows, epochs, rates
        self.name = "sst2_all_layers"
        self.title = f"SST-2, {rows} rows, all layers"
        self.models = PutBack(self)

    def prepare(self, data, cache):
        if data is None:
            self._make_up()
            return
        import keras_hub

        folder = pretrained_features.encoder_folder()
        self._keep(keras_hub.models.Backbone.from_preset(folder))
        preprocessor = (
            keras_hub.models.BertTextClassifierPreprocessor.from_preset(
                folder, sequence_length=self.tokens
            )
        )
        (train,), labels = self._read(data, "train.tsv")
        (test,), test_labels = self._read(data, "dev.tsv")
        order = np.random.default_rng(0).permutation(len(labels))
        for part, rows in (
            ("pool", order[:POOL]),
            ("held_out", order[POOL : POOL + HELD_OUT]),
            ("test", None),
        ):
            texts, own = test, test_labels
            if rows is not None:
                texts, own = [train[row] for row in rows], labels[rows]
            setattr(self, part, (_arrays(preprocessor(texts)), own))

    def _make_up(self):
        """A tiny encoder that knows nothing, and rows of made-up words."""
        import keras_hub

        self._keep(
            keras_hub.models.BertBackbone(
                vocabulary_size=50,
                num_layers=2,
                num_heads=2,
                hidden_dim=8,
                intermediate_dim=16,
                max_sequence_length=self.tokens,
            )
        )
        random = np.random.default_rng(0)
        for part, rows in (("pool", 200), ("held_out", 20), ("test", 20)):
            shape = rows, self.tokens
            x = {
                "token_ids": random.integers(50, size=shape, dtype="int32"),
                "segment_ids": np.zeros(shape, "int32"),
                "padding_mask": np.ones(shape, "bool"),
            }
            labels = (x["token_ids"][:, 0] % 2).astype("int32")
            setattr(self, part, (x, labels))

    def _keep(self, backbone):
        self.kind, self.config = type(backbone), backbone.get_config()
        self.pretrained = backbone.get_weights()

    def make_model(self):
        import keras_hub

        model = keras_hub.models.BertTextClassifier(
            self.kind.from_config(self.config),
            num_classes=self.classes,
            preprocessor=None,
        )
        self.restart(model)
        return model

    def restart(self, model):
        model.backbone.set_weights(self.pretrained)
        head = model.output_dense
        head.kernel.assign(
            keras.random.truncated_normal(head.kernel.shape, stddev=0.02)
        )
        head.bias.assign(keras.ops.zeros(head.bias.shape))
        for variable in model.variables:
            if variable.path.endswith("seed_generator_state"):
                variable.assign(keras.random.SeedGenerator().state)


class ResNetLargeBatch(images.FromScratch):
    """ResNet-20 learns CIFAR-10 (JPEG copy) in batches of 4,096.

    Args:
        rows: Int, of the run.
        sizes: Ints: rows to draw from, held out, and to test on.
        epochs: Int.
        batch_size: Int; divides `rows`.
    """

    name = "resnet_large_batch"
    title = "CIFAR-10, ResNet-20, batch 4,096"
    arms = ("base", *arms.LARGE_BATCH)
    # One run of each arm: what the small task has in the middle of its grid.
    rates = (0.3,)

    def __init__(
        self,
        rows=40960,
        sizes=(45000, 5000, 10000),
        epochs=8,
        batch_size=4096,
    ):
        super().__init__()
        self.rows, self.sizes, self.epochs = rows, sizes, epochs
        self.batch_size = batch_size

    def prepare(self, data, cache):
        images.prepare_cifar10(self, data, cache)

    def make_model(self):
        return keras.Sequential(
            [*images.byte_input((32, 32, 3)), models.build_model("resnet")]
        )

    def make_base(self, rate):
        return keras.optimizers.SGD(rate, momentum=0.9)


def _arrays(tokens):
    return {name: np.asarray(array) for name, array in tokens.items()}
