"""Trains on one device, DataParallel and ModelParallel; prints JSON.

The caller sets XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import contextlib
import json
import sys

import keras
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
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        keras_stab.GRAIN(adam(), groups=GROUPS)
    ),
}


def one():
    return contextlib.nullcontext()


def data_parallel():
    return keras.distribution.DataParallel().scope()


def model_parallel():
    mesh = keras.distribution.DeviceMesh(
        (2, 4), ("batch", "model"), keras.distribution.list_devices()
    )
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*hidden/kernel"] = (None, "model")
    layouts[".*/gamma"] = ("model",)
    layouts[".*head/kernel"] = ("model", None)
    # Fits the windows of `across="batches"` by name, not by rank.
    layouts[".*head_kernel_window"] = ("batch", None)
    return keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch"
    ).scope()


def axes(variable):
    """The mesh axis along which each axis of the value is cut, or None."""
    value = variable.value
    spec = list(value.sharding.spec)
    return spec + [None] * (value.ndim - len(spec))


def run(name, scope, x, y):
    with scope():
        network = toy.model(dropout=0.25)
        optimizer = OPTIMIZERS[name]()
        result = toy.train(network, optimizer, x, y, ROWS)
        if scope is not one:
            state = network.trainable_variables + optimizer.variables
            result["axes"] = {v.path: axes(v) for v in state}
    return result


def blocks(rows):
    """The rows in such an order that group k gets the k-th block of them."""
    parts = rows.reshape((-1, GROUPS, ROWS // GROUPS, *rows.shape[1:]))
    return parts.swapaxes(1, 2).reshape(rows.shape)


def main():
    x, y = toy.data(ROWS)
    wanted = [
        ("adam", one),
        ("adam", data_parallel),
        ("adam", model_parallel),
        ("grain", one),
        ("grain", data_parallel),
        ("grain", model_parallel),
        ("uneven", one),
        ("uneven", data_parallel),
        ("batches", one),
        ("batches", data_parallel),
        ("batches", model_parallel),
        ("scaled", data_parallel),
    ]
    results = {
        f"{name} {scope.__name__}": run(name, scope, x, y)
        for name, scope in wanted
    }
    results["grain of blocks"] = run("grain", one, blocks(x), blocks(y))
    results["devices"] = len(keras.distribution.list_devices())
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
