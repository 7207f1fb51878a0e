"""Trains on one device, DataParallel and ModelParallel; prints JSON.

Arguments: runs, each as `optimizer:distribution`. The caller sets
XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import contextlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import keras
import numpy as np
import small_games
import toy

import keras_stab

ROWS = 32
GROUPS = 4


def adam():
    return keras.optimizers.Adam(0.01)


OPTIMIZERS = {
    "adam": adam,
    "grain": lambda: keras_stab.GRAIN(adam(), groups=GROUPS),
    "uneven": lambda: keras_stab.GRAIN(adam(), groups=5),
    "batches": lambda: keras_stab.GRAIN(adam(), groups=3, across="batches"),
    "ire": lambda: keras_stab.IRE(
        keras_stab.SAM(adam()), update_every=2, seed=3
    ),
    **toy.ITERATES,
    "adaptive": lambda: keras_stab.CEGPlus(0.1, "adaptive"),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        keras_stab.GRAIN(adam(), groups=GROUPS)
    ),
}


def data_parallel():
    return keras.distribution.DataParallel()


def model_parallel():
    mesh = keras.distribution.DeviceMesh(
        (2, 4), ("batch", "model"), keras.distribution.list_devices()
    )
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*hidden/kernel"] = (None, "model")
    layouts[".*/gamma"] = ("model",)
    layouts[".*head/kernel"] = ("model", None)
    # Fits a window of `across="batches"` by its name, though not by rank.
    layouts[".*head_kernel_window"] = ("batch", None)
    return keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch"
    )


DISTRIBUTIONS = {"data": data_parallel, "model": model_parallel}


def axes(variable):
    """The mesh axis along which each axis of the value is cut, or None."""
    value = variable.value
    assert hasattr(value.sharding, "spec"), (variable.path, value.sharding)
    spec = list(value.sharding.spec)
    return spec + [None] * (value.ndim - len(spec))


def blocks(rows):
    """The rows in such an order that group k gets the k-th block of them."""
    parts = rows.reshape((-1, GROUPS, ROWS // GROUPS, *rows.shape[1:]))
    return parts.swapaxes(1, 2).reshape(rows.shape)


def train(name, order=np.asarray):
    x, y = map(order, toy.data(ROWS))
    network = toy.model(dropout=0.25)
    optimizer = OPTIMIZERS[name]()
    result = toy.train(network, optimizer, x, y, ROWS, [2 * ROWS] * 3)
    return result, network.trainable_variables + optimizer.variables


def game():
    """A GAN with an optimizer of its own for each player, or one for both."""
    results = {}
    for kind in ("players", "joint"):
        network = small_games.make_gan()
        network.compile(
            {
                "D": keras_stab.Lookahead(adam(), sync_period=2),
                "G": keras.optimizers.SGD(0.05),
            }
            if kind == "players"
            else keras_stab.RAPP(0.05)
        )
        network.fit(
            small_games.points(4 * ROWS),
            batch_size=ROWS,
            shuffle=False,
            verbose=0,
        )
        results[kind] = [w.tolist() for w in network.get_weights()]
    return results


def run(name, distribution):
    if name == "game":
        scope = DISTRIBUTIONS.get(distribution, contextlib.nullcontext)()
        with scope if distribution == "one" else scope.scope():
            return game()
    if distribution == "one":
        return train(name)[0]
    if distribution == "blocks":
        return train(name, blocks)[0]
    with DISTRIBUTIONS[distribution]().scope():
        result, variables = train(name)
        result["axes"] = {v.path: axes(v) for v in variables}
        return result


def main(runs):
    results = {"devices": len(keras.distribution.list_devices())}
    for label in runs:
        results[label] = run(*label.split(":"))
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
