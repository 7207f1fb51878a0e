"""Twenty steps of methods on several devices beside one; prints JSON.

python jax_equality.py [--processes RANK COUNT PORT | --limits] [METHOD ...]

The largest difference of a weight after 20 steps, `{"equality": {method:
{engine: difference}}}`, for all METHODS or those named, and the weights on one
device. The caller sets XLA_FLAGS=--xla_force_host_platform_device_count=4.
`--processes`: as one of several, with rows of its own, the weights alone.
`--limits`: also what becomes of bad input.
"""

import contextlib
import functools
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import keras
import numpy as np
import toy

import keras_stab

ROWS = 32
BATCHES = 20
DEVICES = 4


def sgd():
    return keras.optimizers.SGD(0.1, momentum=0.9)


def grain(**options):
    return functools.partial(keras_stab.GRAIN, groups=4, **options)


def replicas(each, **options):
    """GRAIN whose groups are the devices' rows, or the same on one device."""

    def make(inner):
        if keras.distribution.distribution() is None:
            groups = each * DEVICES
            options_of_one = {"groups": groups, "grouping": "contiguous"}
            return keras_stab.GRAIN(inner, **options_of_one, **options)
        return keras_stab.GRAIN(
            inner, groups=each, across="replicas", **options
        )

    return make


def layerwise(method, **options):
    return lambda _: method(**options)


GRAINS = {
    "GRAIN": grain(),
    "GRAIN, one pass": grain(engine="one_pass"),
    "GRAIN, small batches": grain(engine="microbatch"),
    "GRAIN, fewer groups": lambda inner: keras_stab.GRAIN(
        inner, groups=2, engine="microbatch"
    ),
    "GRAIN, uneven": lambda inner: keras_stab.GRAIN(inner, groups=5),
    "GRAIN, replicas": replicas(1),
    "GRAIN, replicas, small batches": replicas(1, engine="microbatch"),
    "GRAIN, 2 per replica": replicas(2, engine="one_pass"),
}

METHODS = {
    "SGD": lambda inner: inner,
    **GRAINS,
    "GRAIN, batches": grain(across="batches"),
    "SAM": lambda inner: keras_stab.SAM(inner, rho=0.1, interval=2),
    "SAM(GRAIN)": lambda inner: keras_stab.SAM(grain()(inner)),
    "IRE": lambda inner: keras_stab.IRE(inner, update_every=3, seed=1),
    "ScheduleFree": lambda _: keras_stab.ScheduleFree.sgd(0.1),
    "WeightAveraging": lambda inner: keras_stab.WeightAveraging(inner),
    "AveragedSGD": lambda _: keras_stab.AveragedSGD(0.1),
    "LARS": layerwise(
        keras_stab.LARS, learning_rate=0.1, trust_coefficient=0.1
    ),
    "TVLARS": layerwise(
        keras_stab.TVLARS,
        learning_rate=1.0,
        trust_coefficient=0.1,
        decay_rate=0.1,
        delay=5,
    ),
    "LAMB": layerwise(keras_stab.LAMB, learning_rate=0.01),
    "Lookahead": lambda inner: keras_stab.Lookahead(inner, sync_period=3),
    "RAPP": lambda _: keras_stab.RAPP(0.1, inner_steps=3),
    "CEGPlus": lambda _: keras_stab.CEGPlus(0.1),
    "ExtraGradient": lambda inner: keras_stab.ExtraGradient(inner),
    "OptimisticGradient": lambda inner: keras_stab.OptimisticGradient(inner),
    "PastExtraGradient": lambda inner: keras_stab.PastExtraGradient(inner),
}


def data_parallel():
    return keras.distribution.DataParallel(auto_shard_dataset=False).scope()


def model_parallel():
    """Rows and weights cut in two each."""
    mesh = keras.distribution.DeviceMesh(
        (2, DEVICES // 2),
        ("batch", "model"),
        keras.distribution.list_devices(),
    )
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*hidden/kernel"] = (None, "model")
    layouts[".*head/kernel"] = ("model", None)
    return keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch"
    ).scope()


ENGINES = {"DataParallel": data_parallel, "ModelParallel": model_parallel}


def weights(make, scope, rank=0, processes=1):
    """After 20 steps; a process has its block of rows of each batch."""
    x, y = toy.data(4 * ROWS)
    own = ROWS // processes
    x, y = (
        a[: BATCHES * ROWS]
        .reshape((BATCHES, processes, own, *a.shape[1:]))[:, rank]
        .reshape((-1, *a.shape[1:]))
        for a in (x, y)
    )
    with scope:
        network = toy.model(dropout=0.25 if make is METHODS["GRAIN"] else 0.0)
        toy.compile_for(network, make(sgd()))
        network.fit(x, y, batch_size=own, shuffle=False, verbose=0)
        return [w.tolist() for w in network.get_weights()]


def largest_difference(run, other):
    return max(np.max(np.abs(np.subtract(a, b))) for a, b in zip(run, other))


def equality(names):
    answer, on_one = {}, {}
    for name in names:
        make = METHODS[name]
        engines = dict(ENGINES)
        if "replica" in name:  # groups of 4 devices are not those of 2
            engines.pop("ModelParallel")
        on_one[name] = alone = weights(make, contextlib.nullcontext())
        answer[name] = {
            engine: float(largest_difference(alone, weights(make, scope())))
            for engine, scope in engines.items()
        }
    return {"equality": answer, "weights": on_one}


def limits():
    """Errors and figures of groups that do not fit, or are not finite."""
    x, y = toy.data(ROWS)
    path = str(Path(tempfile.mkdtemp()) / "saved.weights.h5")

    def trained(make, rows=ROWS, batch=ROWS, x=x, network=None):
        network = network or toy.model(batch_norm=False)
        toy.compile_for(network, make(sgd()))
        network.fit(x[:rows], y[:rows], batch_size=batch, verbose=0)
        return network

    def error(function, *arguments):
        try:
            function(*arguments)
        except Exception as raised:
            return str(raised)
        return None

    early = toy.model(batch_norm=False)
    toy.compile_for(early, keras_stab.GRAIN(sgd(), across="replicas"))
    early.optimizer.build(early.trainable_variables)
    trained(grain()).save_weights(path)
    broken = x[:ROWS].copy()
    broken[0] = np.nan
    with data_parallel():
        trained(
            functools.partial(keras_stab.GRAIN, groups=2, engine="microbatch"),
            network=toy.with_empty_weights(),
        )
        one_each = trained(replicas(1))
        one_each.load_weights(path)
        plan = one_each.optimizer.plan()
        return {
            "plan": [plan.groups, plan.grouping, plan.traffic.devices],
            "saved": error(trained(replicas(2)).load_weights, path),
            "many": error(trained, replicas(17)),
            "built before": error(early.fit, x[:ROWS], y[:ROWS]),
            "uneven": error(trained, replicas(1), ROWS + 2),
            "uneven, stock": error(trained, lambda inner: inner, ROWS + 2),
            "few rows": error(trained, replicas(1), 2),
            "fewer rows than groups": error(trained, replicas(16)),
            "not finite": trained(
                replicas(1), x=broken
            ).optimizer.diagnostics(),
        }


def of_processes(rank, count, port, names):
    keras.distribution.initialize(f"localhost:{port}", count, rank)
    assert len(keras.distribution.list_devices()) == DEVICES
    return {
        "weights": {
            name: weights(METHODS[name], data_parallel(), rank, count)
            for name in names
        }
    }


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--processes"]:
        rank, count, port = map(int, arguments[1:4])
        result = of_processes(rank, count, port, arguments[4:])
    elif arguments[:1] == ["--limits"]:
        result = {**equality(arguments[1:]), "limits": limits()}
    else:
        result = equality(arguments or METHODS)
    print(json.dumps(result))
