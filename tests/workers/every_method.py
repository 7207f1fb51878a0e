"""Trains every method on one device and on several; prints JSON.

    python every_method.py FOLDER RANK [METHOD ...]

With the engines of the backend that runs. The result is a dict by engine and
method of `difference`, between the weights after 20 steps; or of what was said
instead: `refused`, an error, or `warned`. The caller starts a process for each
rank on PyTorch, and sets XLA_FLAGS=--xla_force_host_platform_device_count=4 on
JAX.
"""

import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401,I001  (imports torch before the backend)
import keras
import numpy as np

import contract
import keras_stab
import many_devices

ROWS = 16
STEPS = 20


def regression():
    """Rows, answers, kernel and bias; the same in every process."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(STEPS * ROWS, 4)).astype("float32")
    y = generator.normal(size=(STEPS * ROWS, 2)).astype("float32")
    return x, y, generator.normal(size=(4, 2)), generator.normal(size=2)


def linear_model(optimizer):
    *_, kernel, bias = regression()
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(2, name="head")]
    )
    model.set_weights([kernel, bias])
    model.compile(optimizer=optimizer, loss="mse")
    return model


def makers(devices, names):
    """By method, what makes it for one device and for several."""
    answer = {}
    for row in contract.ROWS:
        if row.name in many_devices.methods():

            def make(row=row):
                return row.build(keras.optimizers.SGD(0.1))

            answer[row.name] = make, make
    answer["GRAIN-replicas"] = (
        lambda: keras_stab.GRAIN(
            keras.optimizers.SGD(0.1), groups=devices, grouping="contiguous"
        ),
        lambda: keras_stab.GRAIN(keras.optimizers.SGD(0.1), across="replicas"),
    )
    return {n: make for n, make in answer.items() if not names or n in names}


def fitted(make, share=slice(None)):
    """The weights after `fit`, of a share of the rows of every batch."""
    x, y, *_ = regression()
    x, y = (
        a.reshape((STEPS, ROWS, -1))[:, share].reshape((-1, a.shape[1]))
        for a in (x, y)
    )
    model = linear_model(make())
    model.fit(x, y, batch_size=len(x) // STEPS, shuffle=False, verbose=0)
    return model.get_weights()


def outcome(train, wanted):
    """Of a training that may refuse or warn."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            weights = train()
        except (ValueError, RuntimeError, NotImplementedError) as error:
            return {"refused": str(error)}
    said = [str(w.message) for w in caught if "apart" in str(w.message)]
    if said:
        return {"warned": said[0]}
    largest = max(np.max(np.abs(w)) for w in wanted)
    differences = [np.max(np.abs(a - b)) for a, b in zip(weights, wanted)]
    return {"difference": float(max(differences) / max(1.0, largest))}


# ---- Engines ----------------------------------------------------------------


def on_jax(names):
    devices = len(keras.distribution.list_devices())
    mesh = keras.distribution.DeviceMesh((devices // 2, 2), ("batch", "model"))
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*head/kernel"] = (None, "model")
    engines = {
        "`DataParallel` (JAX)": (devices, keras.distribution.DataParallel()),
        "`ModelParallel` (JAX)": (
            devices // 2,
            keras.distribution.ModelParallel(
                layout_map=layouts, batch_dim_name="batch"
            ),
        ),
    }
    results = {}
    for title, (shares, distribution) in engines.items():
        cells = results[title] = {}
        for name, (alone, together) in makers(shares, names).items():
            wanted = fitted(alone)
            with distribution.scope():
                cells[name] = outcome(lambda: fitted(together), wanted)
    return results


def on_tensorflow(names):
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 2,
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    cells = {}
    for name, (alone, together) in makers(2, names).items():
        wanted = fitted(alone)
        with strategy.scope():
            cells[name] = outcome(lambda: fitted(together), wanted)
    return {"`MirroredStrategy` (TensorFlow)": cells}


def on_torch(names, folder, rank):
    import torch
    import torch.distributed

    wanted = {n: fitted(alone) for n, (alone, _) in makers(2, names).items()}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    share = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    ways = {
        "`fit` in each process (PyTorch)": lambda make: fitted(make, share),
        "loop with DDP (PyTorch)": lambda make: looped(make, share),
    }
    return {
        title: {
            name: outcome(lambda: train(together), wanted[name])
            for name, (_, together) in makers(2, names).items()
        }
        for title, train in ways.items()
    }


def looped(make, share):
    """A loop of one's own, whose gradients DDP averages."""
    import torch

    x, y, *_ = regression()
    model = linear_model(make())
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    # Groups of replicas are made of the gradients before they are averaged.
    own = getattr(optimizer, "across", None) == "replicas"
    module = torch.nn.parallel.DistributedDataParallel(model)
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        part_x, part_y = torch.from_numpy(x[rows][share]), y[rows][share]
        model.zero_grad()
        with module.no_sync() if own else torch.enable_grad():
            loss = keras.losses.MeanSquaredError()(part_y, module(part_x))
            loss.backward()
        gradients = [v.value.grad for v in model.trainable_variables]
        with torch.no_grad():
            optimizer.apply(gradients, model.trainable_variables)
    return model.get_weights()


def main(folder, rank, *names):
    backend = keras.backend.backend()
    if backend == "torch":
        results = on_torch(names, folder, int(rank))
    else:
        results = {"jax": on_jax, "tensorflow": on_tensorflow}[backend](names)
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
