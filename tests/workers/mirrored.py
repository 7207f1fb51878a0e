"""Trains under MirroredStrategy on two virtual CPUs; prints JSON.

Arguments: names of functions below.
"""

import contextlib
import io
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
from toy import sgd  # noqa: E402

import keras_stab  # noqa: E402
from keras_stab.optimizers.gradient_method import GradientMethod  # noqa: E402

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


def grain(groups=GROUPS):
    return keras_stab.GRAIN(sgd(), groups=groups)


def run(scope, make_optimizer, epochs, x=None, **model_options):
    data_x, y = toy.data(ROWS)
    x = data_x if x is None else x
    with scope():
        network = toy.model(**model_options)
        optimizer = make_optimizer()
        result = toy.train(network, optimizer, x, y, ROWS, epochs)
        if isinstance(optimizer, keras_stab.WeightAveraging):
            with keras_stab.averaged_weights(network):
                average = [w.tolist() for w in network.get_weights()]
            result["average"] = [average]
    if isinstance(network.optimizer, keras.optimizers.LossScaleOptimizer):
        result["scale"] = float(network.optimizer.dynamic_scale.numpy())
    return result


def stock_steps():
    """The stock step, and ours asked for the same gradient.

    With batch-norm; the last batch has 2 rows on one replica, 1 on the other.
    """
    results = {}
    epochs = [ROWS, ROWS + 3]
    for policy in ("float32", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        results[policy] = {
            "stock": run(two, sgd, epochs),
            "oracle": run(two, lambda: WholeBatch(sgd()), epochs),
        }
    keras.config.set_dtype_policy("float32")
    results["float32"]["one group"] = run(two, lambda: grain(1), epochs)
    return results


def global_groups():
    """Batches of 32 rows, of 7 (4 on one replica, 3 on the other), of 1."""
    epochs = [2 * ROWS, ROWS + 7, ROWS + 1]
    return {
        "one": run(one, grain, epochs, batch_norm=False),
        "two": run(two, grain, epochs, batch_norm=False),
    }


def mixed_precision(make=grain):
    """As `global_groups`, under mixed_float16.

    The second epoch has a row that is not finite, on the second replica.
    """
    keras.config.set_dtype_policy("mixed_float16")
    x, _ = toy.data(ROWS)
    x[-2] = np.inf
    x = np.concatenate([x[: 2 * ROWS], x[-ROWS:]])
    result = run(two, make, [2 * ROWS, ROWS], x, batch_norm=False)
    keras.config.set_dtype_policy("float32")
    return result


def batch_norm():
    """One step, and the gradients of which it should have been made.

    A replica normalises its own rows, as in the stock step: part 4 r + k is
    the gradient of group k's rows on replica r.
    """
    x, y = toy.data(ROWS)
    network = toy.model()
    toy.compile_for(network, sgd())
    before = [v.numpy().tolist() for v in network.trainable_variables]
    hidden = network.layers[0](x[:ROWS]).numpy()
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
            parts.append([g.numpy().tolist() for g in gradients])
    return {
        **run(two, grain, [ROWS]),
        "before": before,
        "hidden": hidden.tolist(),
        "parts": parts,
    }


def sharpness():
    """One perturbation and one mask for all replicas."""
    epochs = [ROWS, 2 * ROWS]

    def boosted():
        return keras_stab.IRE(
            keras_stab.SAM(keras.optimizers.Adam(0.01), rho=0.2),
            update_every=2,
            curvature="second_moment",
        )

    return {
        "one": run(one, boosted, epochs, batch_norm=False),
        "two": run(two, boosted, epochs, batch_norm=False),
    }


def curvature_of_gradients():
    """The rows of the two replicas use different features.

    Each replica alone would call the weights of the other one's flat.
    """
    x, _ = toy.data(ROWS)
    half = toy.FEATURES // 2
    second = np.arange(len(x)) % ROWS >= ROWS // 2
    x[second, :half] = 0.0
    x[~second, half:] = 0.0

    def boosted(inner):
        return lambda: keras_stab.IRE(
            inner(), update_every=2, curvature="gradient"
        )

    epochs = [ROWS, 2 * ROWS]
    inners = {
        "plain": sgd,
        "sam": lambda: keras_stab.SAM(sgd(), rho=0.2),
        "grain": grain,
    }
    return {
        name: {
            "one": run(one, boosted(inner), epochs, x, batch_norm=False),
            "two": run(two, boosted(inner), epochs, x, batch_norm=False),
        }
        for name, inner in inners.items()
    }


def averaging():
    """Every replica holds the one average of the weights they share."""

    def averaged():
        return keras_stab.WeightAveraging(sgd(), start_step=1)

    epochs = [ROWS, 2 * ROWS]
    return {
        "one": run(one, averaged, epochs, batch_norm=False),
        "two": run(two, averaged, epochs, batch_norm=False),
    }


def iterates():
    """Every replica holds the same anchors or slow weights.

    The last epoch ends inside a step; `evaluated` is what is lent there.
    """
    epochs = [2 * ROWS, 3 * ROWS]

    def ended(scope, make):
        with scope():
            network = toy.model(batch_norm=False)
            optimizer = make()
            x, y = toy.data(ROWS)
            result = toy.train(network, optimizer, x, y, ROWS, epochs)
            with optimizer.swap_weights(network):
                lent = [w.tolist() for w in network.get_weights()]
        return {**result, "evaluated": [lent]}

    return {
        name: {"one": ended(one, make), "two": ended(two, make)}
        for name, make in toy.ITERATES.items()
    }


def own_groups():
    """A group, or two, on each replica; on one device contiguous ones.

    A batch of 5 rows is 3 and 2 of them, one of 1 leaves a replica without.
    """
    epochs = [ROWS, 2 * ROWS]
    x, _ = toy.data(ROWS)
    broken = x.copy()
    broken[ROWS] = np.nan  # the first row of the second epoch

    def on_replicas(inner, groups):
        return lambda: keras_stab.GRAIN(
            inner(), groups=groups, across="replicas"
        )

    def alone(inner, groups):
        return lambda: keras_stab.GRAIN(
            inner(), groups=2 * groups, grouping="contiguous"
        )

    def pair(inner, groups, x=x, over=lambda make: make, epochs=epochs):
        return {
            "one": run(
                one, over(alone(inner, groups)), epochs, x, batch_norm=False
            ),
            "two": run(
                two,
                over(on_replicas(inner, groups)),
                epochs,
                x,
                batch_norm=False,
            ),
        }

    def boosted(make):
        return lambda: keras_stab.IRE(
            make(), update_every=2, curvature="gradient"
        )

    def clipped(norm):
        return lambda: keras.optimizers.SGD(0.1, global_clipnorm=norm)

    return {
        "one each": pair(sgd, 1),
        "two each": pair(sgd, 2),
        "uneven": pair(sgd, 1, epochs=[ROWS, ROWS + 5, ROWS + 1]),
        "not finite": pair(sgd, 2, broken),
        "inside IRE": pair(sgd, 1, over=boosted),
        # Keras clips what a replica hands over, its half of the gradient.
        "clipped": {
            "one": pair(clipped(0.1), 1)["one"],
            "two": pair(clipped(0.05), 1)["two"],
        },
        "dropped": _dropped(on_replicas(sgd, 1), broken),
        "mixed": {
            "one": run(one, alone(sgd, 1), [2 * ROWS], batch_norm=False),
            "two": mixed_precision(on_replicas(sgd, 1)),
        },
        "error": error(toy.model, on_replicas(sgd, 33)),
    }


def _dropped(make, x):
    """Figures after a step to which one replica brought no number."""
    with two():
        network, optimizer = toy.model(batch_norm=False), make()
        toy.train(network, optimizer, x, toy.data(ROWS)[1], ROWS, [2 * ROWS])
        figures = optimizer.diagnostics()
    with contextlib.redirect_stdout(io.StringIO()):
        return {**figures, "plan": str(optimizer.plan())}


def refusals():
    def synchronised():
        return keras.Sequential(
            [
                keras.Input((toy.FEATURES,)),
                keras.layers.BatchNormalization(synchronized=True),
                keras.layers.Dense(toy.CLASSES),
            ]
        )

    def across_batches():
        return keras_stab.GRAIN(sgd(), groups=2, across="batches")

    return {
        "across batches": error(toy.model, across_batches),
        "fisher": error(toy.model, lambda: keras_stab.IRE(sgd())),
        "interval": error(toy.model, lambda: keras_stab.SAM(sgd(), interval=2)),
        "joint step": error(
            toy.model, lambda: keras_stab.CEGPlus(0.1, "adaptive")
        ),
        "diagnostics": error(
            toy.model, lambda: keras_stab.RAPP(0.1, track_diagnostics=True)
        ),
        "synchronised": error(synchronised, grain),
        "synchronised, stock": error(synchronised, sgd),
    }


def error(make_model, make_optimizer):
    """What training on two replicas raises; the batches differ in size."""
    with two():
        network = make_model()
        optimizer = make_optimizer()
        try:
            toy.train(network, optimizer, *toy.data(ROWS), ROWS, [ROWS + 16])
        except ValueError as raised:
            return str(raised)
    return None


if __name__ == "__main__":
    print(json.dumps({name: globals()[name]() for name in sys.argv[1:]}))
