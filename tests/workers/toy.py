"""The small model and the batches that every worker of this folder trains."""

import keras
import numpy as np

import keras_stab

FEATURES = 12
CLASSES = 4
STEPS = 6


def data(rows):
    """`STEPS` batches of `rows` rows, with labels that can be learned."""
    draw = np.random.default_rng(11)
    x = draw.normal(size=(STEPS * rows, FEATURES)).astype("float32")
    rule = draw.normal(size=(FEATURES, CLASSES))
    noise = draw.normal(size=(len(x), CLASSES))
    return x, np.argmax(x @ rule + noise, axis=1).astype("int32")


def model(batch_norm=True, dropout=0.0):
    """The same weights on every device and in every process."""
    layers = [
        keras.Input((FEATURES,)),
        # No bias: before batch-norm its gradient is rounding alone, which
        # Adam blows up to full steps.
        keras.layers.Dense(
            16,
            name="hidden",
            use_bias=False,
            kernel_regularizer=keras.regularizers.L2(1e-3),
        ),
        keras.layers.ReLU(),
        keras.layers.Dropout(dropout, seed=5),
        keras.layers.Dense(CLASSES, dtype="float32", name="head"),
    ]
    if batch_norm:
        layers.insert(2, keras.layers.BatchNormalization())
    network = keras.Sequential(layers)
    draw = np.random.default_rng(12)
    for variable in network.trainable_variables:
        if variable.path.endswith("kernel"):
            variable.assign(0.3 * draw.normal(size=tuple(variable.shape)))
    return network


class Empty(keras.layers.Layer):
    """Has a weight without elements."""

    def build(self, shape):
        self.empty = self.add_weight(shape=(0, 3))

    def call(self, x):
        return x + keras.ops.sum(self.empty)


def with_empty_weights(dtype=None):
    first = [keras.Input((FEATURES,)), Empty(dtype=dtype)]
    return keras.Sequential([*first, *model(batch_norm=False).layers])


def compile_for(network, optimizer):
    network.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


# One step of each is two gradients or three: in six batches all come to rest.
ITERATES = {
    "rapp": lambda: keras_stab.RAPP(0.1, inner_steps=3),
    "cegplus": lambda: keras_stab.CEGPlus(0.1),
    "lookahead": lambda: keras_stab.Lookahead(sgd(), sync_period=3),
    "extragradient": lambda: keras_stab.ExtraGradient(sgd()),
    "optimistic": lambda: keras_stab.OptimisticGradient(sgd()),
    "past": lambda: keras_stab.PastExtraGradient(sgd()),
}


def sgd():
    # Not Adam, which hides gradients of half the size.
    return keras.optimizers.SGD(0.1, momentum=0.9)


class GroupWeights(keras.callbacks.Callback):
    """Reads the group weights of GRAIN after every step."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        optimizer = self.model.optimizer
        while optimizer is not None:
            if isinstance(optimizer, keras_stab.GRAIN):
                self.seen.append(optimizer.diagnostics()["weights"])
            optimizer = getattr(optimizer, "inner_optimizer", None)


def train(network, optimizer, x, y, rows, epochs):
    """Trains on successive rows; what the run leaves behind, as plain lists.

    Args:
        rows: Rows in a batch.
        epochs: How many of the rows each call of `fit` gets.

    Returns:
        Dict of lists with one entry an epoch: `weights` after it, `loss` and
        `accuracy`; and `group_weights`, with one entry a step.
    """
    compile_for(network, optimizer)
    group_weights = GroupWeights()
    result = {"weights": [], "loss": [], "accuracy": []}
    start = 0
    for size in epochs:
        part = slice(start, start + size)
        start += size
        history = network.fit(
            x[part],
            y[part],
            batch_size=rows,
            shuffle=False,
            verbose=0,
            callbacks=[group_weights],
        ).history
        keras_stab.return_trained_weights(network)
        result["weights"].append([w.tolist() for w in network.get_weights()])
        result["loss"].extend(history["loss"])
        result["accuracy"].extend(history["accuracy"])
    return {**result, "group_weights": group_weights.seen}
