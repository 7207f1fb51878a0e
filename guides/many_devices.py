"""One model on several devices: the same numbers as on one.

    KERAS_BACKEND=jax python guides/many_devices.py
    KERAS_BACKEND=tensorflow python guides/many_devices.py
    KERAS_BACKEND=torch torchrun --nproc-per-node 4 guides/many_devices.py

On JAX and TensorFlow with four virtual devices of one processor, on PyTorch in
as many processes as `torchrun` starts. It belongs to `many_devices.md`.
"""

import argparse
import os
import sys

DEVICES = 4
if __name__ == "__main__":  # before a backend starts
    flags = os.environ.get("XLA_FLAGS", "")
    count = f"--xla_force_host_platform_device_count={DEVICES}"
    os.environ["XLA_FLAGS"] = f"{flags} {count}".strip()

import keras
import numpy as np

import keras_stab

ROWS = 32


def make_data(steps):
    """Batches of 32 rows, with labels that can be learned."""
    random = np.random.default_rng(1)
    x = random.normal(size=(steps * ROWS, 20)).astype("float32")
    return x, np.argmax(x[:, :4], axis=1).astype("int32")


def make_model(optimizer):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((20,)),
            keras.layers.Dense(32, "tanh"),
            keras.layers.Dense(4),
        ]
    )
    model.compile(
        optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return model


def fit(model, x, y, rows=ROWS):
    model.fit(x, y, batch_size=rows, shuffle=False, verbose=0)
    return model.get_weights()


def on_one(devices, x, y):
    """What several devices have to agree with."""
    optimizer = keras_stab.GRAIN(
        keras.optimizers.Adam(0.01), groups=devices, grouping="contiguous"
    )
    return fit(make_model(optimizer), x, y)


def replicas():
    return keras_stab.GRAIN(keras.optimizers.Adam(0.01), across="replicas")


def on_jax(x, y):
    distribution = keras.distribution.DataParallel()
    wanted = on_one(len(keras.distribution.list_devices()), x, y)
    with distribution.scope():
        model = make_model(replicas())
        return model, fit(model, x, y), wanted


def on_tensorflow(x, y):
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * DEVICES,
    )
    wanted = on_one(DEVICES, x, y)
    names = [f"CPU:{i}" for i in range(DEVICES)]
    with tf.distribute.MirroredStrategy(names).scope():
        model = make_model(replicas())
    return model, fit(model, x, y), wanted


def on_torch(x, y):
    import torch.distributed

    if "RANK" not in os.environ:
        raise SystemExit(
            "On PyTorch every device has a process. Start it with: torchrun "
            f"--nproc-per-node {DEVICES} guides/many_devices.py"
        )
    devices = int(os.environ["WORLD_SIZE"])
    wanted = on_one(devices, x, y)
    torch.distributed.init_process_group("gloo")
    # Each process passes rows of its own; in every batch, its share of them.
    own = torch.distributed.get_rank()
    share = ROWS // devices
    x, y = (
        a.reshape((-1, devices, share, *a.shape[1:]))[:, own].reshape(
            (-1, *a.shape[1:])
        )
        for a in (x, y)
    )
    model = make_model(replicas())
    return model, fit(model, x, y, share), wanted


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    x, y = make_data(parser.parse_args(argv).steps)
    engines = {"jax": on_jax, "tensorflow": on_tensorflow, "torch": on_torch}
    model, weights, wanted = engines[keras.backend.backend()](x, y)
    difference = max(np.max(np.abs(a - b)) for a, b in zip(weights, wanted))
    if int(os.environ.get("RANK", 0)) == 0:
        print(model.optimizer.plan())
        print(f"Largest difference to one device: {difference:.1e}")
    return int(difference > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
