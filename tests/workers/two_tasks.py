"""Two losses as groups, on one device and on several; prints JSON.

    python two_tasks.py [RANK COUNT MEETING]

By name, what a run leaves: on JAX with `keras.distribution`, for which the
caller sets XLA_FLAGS=--xla_force_host_platform_device_count=4, on TensorFlow
under MirroredStrategy on two virtual CPUs. On PyTorch as one of COUNT processes
that meet in a file, each with its block of rows of every batch.
"""

import contextlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401,I001  (imports torch before the backend)
import keras
import numpy as np

import keras_stab

BATCH = 16
STEPS = 8
BACKEND = keras.backend.backend()
RANK, COUNT = (int(each) for each in (sys.argv[1:3] or ("0", "1")))


def rows(short):
    """This process's rows; the last batch is short where that can be."""
    draw = np.random.default_rng(8)
    x = draw.normal(size=(STEPS * BATCH, 6)).astype("float32")
    y = {"a": x[:, :1] + x[:, 1:2], "b": x[:, :1] * x[:, 2:3] - x[:, 1:2]}
    if short:
        return x[:-9], {name: part[:-9] for name, part in y.items()}

    def own(array):
        parts = array.reshape((STEPS, COUNT, -1, array.shape[1]))
        return parts[:, RANK].reshape((-1, array.shape[1]))

    return own(x), {name: own(part) for name, part in y.items()}


def run(scope, rule, short=False):
    with scope:
        keras.utils.set_random_seed(2)
        inputs = keras.Input((6,))
        trunk = keras.layers.Dense(
            8,
            "tanh",
            name="hidden",
            kernel_regularizer=keras.regularizers.L2(0.01),
        )
        hidden = trunk(inputs)
        model = keras.Model(
            inputs,
            {n: keras.layers.Dense(1, name=n)(hidden) for n in ("a", "b")},
        )
        optimizer = keras_stab.Aggregate(
            keras.optimizers.SGD(0.05, momentum=0.9), rule, groups="losses"
        )
        model.compile(
            optimizer,
            {"a": "mse", "b": "mae"},
            loss_weights={"a": 0.5, "b": 3.0},
        )
        x, y = rows(short)
        history = model.fit(
            x, y, batch_size=BATCH // COUNT, shuffle=False, verbose=0
        ).history
        measured = []
        if BACKEND == "jax":  # elsewhere a device has its own rows
            found = keras_stab.group_gradients(
                model, x, y, "losses", batch_size=3 * BATCH, verbose=0
            )
            measured = [found.gram, *found.combine([1.0, -2.0])]
    return {
        "measured": [part.tolist() for part in measured],
        "weights": [w.tolist() for w in model.get_weights()],
        "loss": history["loss"],
        "group_weights": optimizer.diagnostics()["weights"],
        "plan": str(optimizer.plan()),
    }


def scopes():
    """Of several devices, by name."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * 2,
        )
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        return {"mirrored": strategy.scope}
    if BACKEND == "torch":
        return {}
    distribution = keras.distribution
    mesh = distribution.DeviceMesh(
        (2, 2), ("batch", "model"), distribution.list_devices()
    )
    layouts = distribution.LayoutMap(mesh)
    layouts[".*hidden/kernel"] = (None, "model")
    return {
        "data": distribution.DataParallel(auto_shard_dataset=False).scope,
        "model": distribution.ModelParallel(
            layout_map=layouts, batch_dim_name="batch"
        ).scope,
    }


def main():
    if len(sys.argv) > 1 and COUNT > 1:
        import torch.distributed

        torch.distributed.init_process_group(
            "gloo", f"file://{sys.argv[3]}", rank=RANK, world_size=COUNT
        )
    several = scopes()
    short = BACKEND == "tensorflow"
    found = {
        rule: {
            "one": run(contextlib.nullcontext(), rule, short),
            **{
                name: run(make(), rule, short) for name, make in several.items()
            },
        }
        for rule in ("min_norm", "upgrad")
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
