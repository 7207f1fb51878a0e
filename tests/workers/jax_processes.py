"""One of several processes of JAX that train together; prints JSON.

Arguments: rank, number of processes, port. Each process has its own rows, as
`fit` takes them. A single process of rank -1 is passed the rows of all, batch
by batch.
"""

import json
import sys

import keras
import numpy as np
from keras import layers

import keras_stab

ROWS, BATCH = 16, 4  # of a process


def data(ranks):
    """The rows of these processes: batch by batch those of each."""
    parts = [np.random.default_rng(rank) for rank in ranks]
    x = [rng.normal(1.0, 2.0, size=(ROWS, 3)) for rng in parts]
    y = [own.sum(axis=1, keepdims=True) ** 2 for own in x]
    return tuple(
        np.stack([own.reshape(-1, BATCH, own.shape[1]) for own in each], 1)
        .reshape(-1, each[0].shape[1])
        .astype("float32")
        for each in (x, y)
    )


def network():
    keras.utils.set_random_seed(5)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4, "tanh"),
            layers.BatchNormalization(),
            layers.Dense(1),
        ]
    )
    model.compile(keras_stab.AveragedSGD(0.01), loss="mse")
    return model


def run(x, y, batch_size, rank):
    model = network()
    options = {"batch_size": batch_size, "verbose": 0}
    monitor = keras_stab.StabilityMonitor(
        probe=(x, y), groups=2, batch_size=batch_size
    )
    batches = np.split(x, len(x) // batch_size)
    averaged = keras_stab.AveragedWeights(batch_norm_data=batches)
    history = model.fit(
        x,
        y,
        epochs=2,
        shuffle=False,
        validation_data=(x, y),
        validation_batch_size=batch_size,
        callbacks=[monitor, averaged],
        **options,
    ).history
    found = keras_stab.sharpness(model, (x, y), layers="all", **options)
    line = keras_stab.loss_landscape(model, (x, y), points=3, **options)
    plain = keras_stab.export_averaged(model, batches)
    keras_stab.reestimate_batch_norm(model, x, **options)
    result = {
        "loss": history["loss"] + history["val_loss"],
        "probe": {k: v for k, v in history.items() if k.startswith("probe")},
        "sharpness": found.as_dict(),
        "landscape": line.losses.tolist(),
        "statistics": [w.tolist() for w in model.get_weights()[4:6]],
        "exported": [w.tolist() for w in plain.get_weights()],
    }
    if rank >= 0:
        # One row, or one batch, less on the first process.
        short = {
            "row": (x[rank == 0 :], y[rank == 0 :]),
            "batch": (x[: -batch_size * (rank == 0) or None],) * 2,
        }
        for name, own in short.items():
            try:
                keras_stab.sharpness(model, own, "mae", **options)
            except ValueError as error:
                result[name] = str(error)
    return result


def main():
    rank, count, port = map(int, sys.argv[1:])
    ranks = range(count)
    if rank >= 0:
        keras.distribution.initialize(f"localhost:{port}", count, rank)
        keras.distribution.set_distribution(
            keras.distribution.DataParallel(auto_shard_dataset=False)
        )
        ranks = [rank]
    print(json.dumps(run(*data(ranks), BATCH * len(ranks), rank)))


main()
