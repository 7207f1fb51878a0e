"""Trains under MirroredStrategy on two virtual CPUs; prints JSON.

Argument: the name of one of the functions below.
"""

import contextlib
import json
import sys

import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 2,
)

import keras  # noqa: E402
import numpy as np  # noqa: E402
import toy  # noqa: E402

import keras_stab  # noqa: E402
from keras_stab.optimizers.wrapper import GradientMethod  # noqa: E402

ROWS = 32
GROUPS = 4
STRATEGY = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

one = contextlib.nullcontext
two = STRATEGY.scope


class WholeBatch(GradientMethod):
    """Asks the oracle for what the stock step would have used."""

    def estimate(self, oracle):
        oracle.notes[self] = True
        return oracle.gradient()


def adam():
    return keras.optimizers.Adam(0.01)


def grain(groups=GROUPS):
    return keras_stab.GRAIN(adam(), groups=groups)


def run(scope, make_optimizer, rows=2 * ROWS, x=None, **model_options):
    """Trains on the first `rows` rows."""
    all_x, y = toy.data(ROWS)
    x = all_x if x is None else x
    with scope():
        network = toy.model(**model_options)
        optimizer = make_optimizer()
        result = toy.train(network, optimizer, x[:rows], y[:rows], ROWS)
    if isinstance(network.optimizer, keras.optimizers.LossScaleOptimizer):
        result["scale"] = float(network.optimizer.dynamic_scale.numpy())
    return result


def message(scope, make_optimizer, make_model, rows):
    """The error that training raises."""
    x, y = toy.data(ROWS)
    with scope():
        network = make_model()
        optimizer = make_optimizer()
        try:
            toy.train(network, optimizer, x[:rows], y[:rows], ROWS)
        except ValueError as error:
            return str(error)
    return None


def stock_steps():
    """The stock step, and ours asked for the same gradient.

    Three full batches and one of 3 rows, two on one replica, one on the
    other; each model has batch-norm.
    """
    results = {}
    for policy in ("float32", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        results[policy] = {
            "stock": run(two, adam, 99),
            "one group": run(two, lambda: grain(groups=1), 99),
            "oracle": run(two, lambda: WholeBatch(adam()), 99),
        }
    return results


def global_groups():
    results = {}
    for policy in ("float32", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        results[policy] = {
            "one": run(one, grain, batch_norm=False),
            "two": run(two, grain, batch_norm=False),
        }
    return results


def short_batches():
    """Batches that do not give every replica as many rows."""
    return {
        # Replica 1 has no row of group 1; on one device two groups of the
        # same rows.
        "3 rows": {
            "one": run(one, lambda: grain(groups=2), 3, batch_norm=False),
            "two": run(two, grain, 3, batch_norm=False),
        },
        # Replica 1 has no rows at all.
        "1 row": {
            "one": run(one, grain, 1, batch_norm=False),
            "two": run(two, grain, 1, batch_norm=False),
        },
    }


def batch_norm():
    """One step, and the gradients of which it should have been made.

    A replica normalises its own rows, as in the stock step: part (r, k) is
    what group k has on replica r.
    """
    results = {
        "stock": run(two, lambda: keras.optimizers.SGD(0.1), ROWS),
        "grain": run(
            two,
            lambda: keras_stab.GRAIN(keras.optimizers.SGD(0.1), GROUPS),
            ROWS,
        ),
    }
    x, y = toy.data(ROWS)
    network = toy.model()
    toy.compile_for(network, adam())
    before = [v.numpy().tolist() for v in network.trainable_variables]
    parts = []
    for replica in range(2):
        rows = slice(replica * ROWS // 2, (replica + 1) * ROWS // 2)
        for k in range(GROUPS):
            part_x, part_y = x[rows][k::GROUPS], y[rows][k::GROUPS]
            with tf.GradientTape() as tape:
                y_pred = network(part_x, training=True)
                loss = network.compute_loss(part_x, part_y, y_pred)
            gradients = tape.gradient(
                loss, [v.value for v in network.trainable_variables]
            )
            parts.append([g.numpy() for g in gradients])
    groups = [
        [(a + b) / 2 for a, b in zip(parts[k], parts[GROUPS + k])]
        for k in range(GROUPS)
    ]
    results["before"] = before
    results["group_gradients"] = [[g.tolist() for g in group] for group in groups]
    return results


def overflow():
    """A row of the second replica that is not finite, under mixed_float16."""
    keras.config.set_dtype_policy("mixed_float16")
    x, _ = toy.data(ROWS)
    x = np.array(x)
    x[ROWS // 2 + 3] = np.inf
    after_one = run(two, grain, ROWS, x, batch_norm=False)
    untouched = toy.model(batch_norm=False).get_weights()
    after_one["untouched"] = [w.tolist() for w in untouched]
    return {
        "bad": after_one,
        "good": run(two, grain, ROWS, batch_norm=False),
    }


def refusals():
    synchronised = lambda: keras.Sequential(  # noqa: E731
        [
            keras.Input((toy.FEATURES,)),
            keras.layers.BatchNormalization(synchronized=True),
            keras.layers.Dense(toy.CLASSES),
        ]
    )
    return {
        "across batches": message(
            two,
            lambda: keras_stab.GRAIN(adam(), groups=2, across="batches"),
            toy.model,
            2 * ROWS,
        ),
        "synchronised": message(two, grain, synchronised, ROWS + 16),
        "synchronised, stock": message(two, adam, synchronised, ROWS + 16),
    }


if __name__ == "__main__":
    json.dump(globals()[sys.argv[1]](), sys.stdout)
