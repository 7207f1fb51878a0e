"""Resume after a crash, bit for bit

`BackupAndRestore` keeps all state of the last epoch: a run that is broken off
and started again ends with the same bits as one that was not. It takes an order
of rows that does not depend on the past, `optimizer.build` before `fit`, and no
dropout, whose seeds Keras does not save. Printed: whether the bits of the
average, with which `fit` ends, are the same, and of the weights. It takes 8 s
of CPU time (PyTorch).
"""

import tempfile

import keras
import numpy as np

import keras_stab

EPOCHS = 6
x = np.random.normal(size=(512, 8)).astype("float32")
y = np.argmax(x @ np.random.normal(size=(8, 3)), axis=1)
callbacks = keras.callbacks


class Crash(callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise RuntimeError("the machine went down")


def train(*callbacks):
    """A new process would run just this."""
    keras.utils.set_random_seed(0)
    hidden, scores = keras.layers.Dense(32, "relu"), keras.layers.Dense(3)
    model = keras.Sequential([keras.Input((8,)), hidden, scores])
    grain = keras_stab.GRAIN(keras.optimizers.AdamW(1e-2), groups=4)
    model.compile(
        keras_stab.WeightAveraging(grain, method="ema", decay=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.optimizer.build(model.trainable_variables)
    options = {"batch_size": 64, "epochs": EPOCHS, "shuffle": False}
    model.fit(x, y, **options, callbacks=list(callbacks), verbose=0)
    return model


with tempfile.TemporaryDirectory() as folder:
    straight = train()
    try:
        train(callbacks.BackupAndRestore(folder), Crash())
    except RuntimeError as error:
        print("crash:", error)
    resumed = train(callbacks.BackupAndRestore(folder))

for which in ("average:", "trained weights:"):
    pairs = zip(straight.weights, resumed.weights, strict=True)
    print(which, all((a.numpy() == b.numpy()).all() for a, b in pairs))
    keras_stab.return_trained_weights(straight)
    keras_stab.return_trained_weights(resumed)
