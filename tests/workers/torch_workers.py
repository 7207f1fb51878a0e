"""One worker of a torch.distributed process group; prints JSON.

Arguments: rank, number of workers, path of the rendezvous file, and names of
functions below. One worker alone trains on all rows, in no process group.
"""

import contextlib
import datetime
import json
import sys
import warnings

import keras
import numpy as np
import torch
import torch.distributed
import toy

import keras_stab

ROWS = 32
BATCHES = 20
RANK, WORKERS = int(sys.argv[1]), int(sys.argv[2])
# An optimizer that was built before the process group was made.
EARLY = []


def sgd():
    return keras.optimizers.SGD(0.1, momentum=0.9)


def most_likely(outputs, seed):
    return keras.ops.argmax(outputs, axis=-1)


# By what each of them asks of the model in `fit`.
IN_FIT = {
    "GRAIN": lambda: keras_stab.GRAIN(sgd(), groups=4),
    "GRAIN, microbatch": lambda: keras_stab.GRAIN(
        sgd(), groups=4, engine="microbatch"
    ),
    "GRAIN, replicas": lambda: replicas(1),
    "GRAIN, 2 per replica": lambda: replicas(2),
    "GRAIN, batches": lambda: keras_stab.GRAIN(
        sgd(), groups=4, across="batches"
    ),
    "SAM": lambda: keras_stab.SAM(sgd(), rho=0.1, interval=2),
    "IRE, fisher": lambda: keras_stab.IRE(
        sgd(), update_every=3, label_sampler=most_likely, seed=1
    ),
    "IRE, drawn labels": lambda: keras_stab.IRE(sgd(), update_every=3, seed=1),
    "IRE, gradient": lambda: keras_stab.IRE(
        sgd(), update_every=3, curvature="gradient", seed=1
    ),
    "IRE, second_moment": lambda: keras_stab.IRE(
        keras.optimizers.RMSprop(0.01),
        update_every=3,
        curvature="second_moment",
        seed=1,
    ),
    "ScheduleFree": lambda: keras_stab.ScheduleFree.sgd(0.1),
    "Lookahead(SAM(GRAIN))": lambda: keras_stab.Lookahead(
        keras_stab.SAM(keras_stab.GRAIN(sgd(), groups=4)), sync_period=3
    ),
    "WeightAveraging(SAM)": lambda: keras_stab.WeightAveraging(
        keras_stab.SAM(sgd())
    ),
}

# Those take the gradients that a loop around DistributedDataParallel gives.
IN_LOOP = {
    "GRAIN, batches": IN_FIT["GRAIN, batches"],
    "IRE, gradient": IN_FIT["IRE, gradient"],
    "LAMB": lambda: keras_stab.LAMB(0.01),
    "LARS": lambda: keras_stab.LARS(0.1, trust_coefficient=0.1),
    "TVLARS": lambda: keras_stab.TVLARS(
        1.0, trust_coefficient=0.1, decay_rate=0.1, delay=5
    ),
    "WeightAveraging": lambda: keras_stab.WeightAveraging(sgd()),
    "AveragedSGD": lambda: keras_stab.AveragedSGD(0.1),
    **toy.ITERATES,
}


def replicas(each):
    """GRAIN whose groups are the workers' rows, or the same on one device."""
    if WORKERS == 1:
        return keras_stab.GRAIN(sgd(), groups=2 * each, grouping="contiguous")
    return keras_stab.GRAIN(sgd(), groups=each, across="replicas")


def own_rows(array, rows=ROWS):
    """The block that this worker has of each batch."""
    parts = array.reshape((-1, WORKERS, rows // WORKERS, *array.shape[1:]))
    return parts[:, RANK].reshape((-1, *array.shape[1:]))


def data():
    x, y = toy.data(4 * ROWS)
    return own_rows(x[: BATCHES * ROWS]), own_rows(y[: BATCHES * ROWS])


def fitted(optimizer, network=None, x=None, y=None, rows=ROWS):
    network = toy.model(batch_norm=False) if network is None else network
    if x is None:
        x, y = data()
    toy.compile_for(network, optimizer)
    history = network.fit(
        x, y, batch_size=rows // WORKERS, shuffle=False, verbose=0
    ).history
    return finished(network, optimizer, history["loss"])


def finished(network, optimizer, loss=()):
    figures = {}
    if isinstance(optimizer, keras_stab.GRAIN):
        figures = optimizer.diagnostics()
    state = [v.numpy() for v in optimizer.variables]
    return {
        "weights": [w.tolist() for w in network.get_weights()],
        "state": [v.tolist() for v in state],
        "loss": list(loss),
        "group_weights": figures.get("weights"),
        "nonfinite": figures.get("nonfinite"),
    }


def loop(optimizer, local=False):
    """A loop of one's own; `local`: the gradients stay those of a worker."""
    network = toy.model(batch_norm=False)
    optimizer.build(network.trainable_variables)
    module, alone = network, contextlib.nullcontext
    if WORKERS > 1:
        module = torch.nn.parallel.DistributedDataParallel(network)
        alone = module.no_sync if local else alone
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    x, y = data()
    rows = ROWS // WORKERS
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        network.zero_grad()
        with alone():
            total = loss(y[part], module(torch.from_numpy(x[part])))
            total = total + sum(network.losses)
            total.backward()
        gradients = [v.value.grad for v in network.trainable_variables]
        with torch.no_grad():
            optimizer.apply(gradients, network.trainable_variables)
    return finished(network, optimizer)


# ---- What a test asks for -------------------------------------------------


def equality():
    """Twenty steps of every method."""
    return {
        "in fit": {name: fitted(make()) for name, make in IN_FIT.items()},
        "in a loop": {name: loop(make()) for name, make in IN_LOOP.items()},
        "local": fitted(replicas(1))
        if WORKERS == 1
        else loop(replicas(1), local=True),
        "batch norm": fitted(replicas(1), toy.model()),
        "empty weights": fitted(replicas(1), toy.with_empty_weights("float64")),
        "wrapped": fitted(IN_FIT["GRAIN"](), wrapped()),
        # Keras's own step, which logs the loss of a worker's own rows.
        "wrapped, plain": {
            **fitted(keras_stab.Lookahead(sgd()), wrapped()),
            "loss": [],
        },
    }


def wrapped():
    """A model with a part that synchronises its gradients by itself."""
    torch.manual_seed(0)
    part = torch.nn.Sequential(
        torch.nn.Linear(toy.FEATURES, 8),
        torch.nn.Tanh(),
        torch.nn.Linear(8, toy.CLASSES),
    )
    if WORKERS > 1:
        part = torch.nn.parallel.DistributedDataParallel(part)
    layer = keras.layers.TorchModuleWrapper(part)
    return keras.Sequential([keras.Input((toy.FEATURES,)), layer])


def error(function, *arguments):
    try:
        return {"answer": function(*arguments), "error": None}
    except (ValueError, RuntimeError) as raised:
        return {"error": f"{type(raised).__name__}: {raised}"}


def refusal(optimizer, *arguments, network=None, **options):
    """The error of a `fit` and whether it left the weights as they were."""
    network = toy.model(batch_norm=False) if network is None else network
    before = [w.copy() for w in network.get_weights()]

    def run():
        fitted(optimizer, network, *arguments, **options)

    now = zip(before, network.get_weights())
    return {
        **error(run),
        "untouched": all(np.array_equal(a, b) for a, b in now),
    }


def bad_input():
    """Nobody waits for a worker that has raised, and all come to one end."""
    x, y = toy.data(ROWS)
    other = toy.model(batch_norm=False)
    other.set_weights([w + RANK for w in other.get_weights()])
    no_number = toy.model(batch_norm=False)
    if RANK == 1:
        no_number.set_weights([w * np.nan for w in no_number.get_weights()])
    other_size = keras.Sequential([keras.layers.Dense(4 + RANK)])
    grain, few = IN_FIT["GRAIN"], 12 - 8 * RANK
    broken = own_rows(x)[: ROWS // 2].copy()
    if RANK == 1:
        broken[0] = np.nan
    return {
        "other weights": refusal(IN_FIT["SAM"](), network=other),
        "no number": error(fitted, IN_FIT["SAM"](), no_number),
        "other sizes": refusal(grain(), network=other_size),
        "other groups": refusal(keras_stab.GRAIN(sgd(), groups=4 + RANK)),
        "other method": refusal(
            IN_FIT["SAM"]() if RANK else keras_stab.GRAIN(sgd(), groups=4)
        ),
        "few rows": refusal(grain(), x[:few], y[:few], network=toy.model()),
        "already summed": error(loop, replicas(1)),
        "groups of a gradient": error(loop, replicas(2), True),
        "built before": error(EARLY[0].apply, [1.0]),
        "not finite": fitted(grain(), x=broken, y=own_rows(y)[: ROWS // 2]),
    }


def uneven():
    """Other numbers of rows: worker 0 has more, worker 1 none of group 3."""
    x, y = toy.data(ROWS)
    parts = [slice(0, 12), slice(12, 15)] if WORKERS > 1 else [slice(0, 15)]
    x, y = x[parts[RANK]], y[parts[RANK]]
    return {
        "SAM": fitted(IN_FIT["SAM"](), x=x, y=y, rows=ROWS * WORKERS),
        "GRAIN": fitted(IN_FIT["GRAIN"](), x=x, y=y, rows=ROWS * WORKERS),
    }


def half_precision():
    """An overflow that one worker alone has seen skips the step on both."""
    keras.config.set_dtype_policy("mixed_float16")
    x, y = toy.data(ROWS)
    x, y = own_rows(x[:ROWS]), own_rows(y[:ROWS])
    x = x * (1e6 if RANK == WORKERS - 1 else 1.0)
    network = toy.model(batch_norm=False)
    before = network.get_weights()
    fitted(IN_FIT["GRAIN"](), network, x, y)
    now = zip(before, network.get_weights())
    keras.config.set_dtype_policy("float32")
    return {
        "untouched": all(np.array_equal(a, b) for a, b in now),
        "scale": float(network.optimizer.dynamic_scale),
    }


def resumed():
    """A saved state goes on bit for bit, in each worker."""
    x, y = data()
    half = len(x) // 2
    answers = {}
    for name in ("GRAIN", "GRAIN, replicas", "SAM", "ScheduleFree"):
        make = IN_FIT[name]
        through, first, second = (toy.model(batch_norm=False) for _ in "123")
        optimizer = make()
        fitted(optimizer, through, x[:half], y[:half])
        expected = fitted(optimizer, through, x[half:], y[half:])
        fitted(make(), first, x[:half], y[:half])
        path = f"{sys.argv[3]}-{RANK}.weights.h5"
        first.save_weights(path)
        again = make()
        toy.compile_for(second, again)
        again.build(second.trainable_variables)
        second.load_weights(path)
        found = fitted(again, second, x[half:], y[half:])
        answers[name] = {"expected": expected, "found": found}
    return answers


def apart():
    """Warnings of a `fit` in which each worker trains by itself."""

    def seen(optimizer, network=None):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitted(optimizer, network)
        texts = [str(warning.message) for warning in caught]
        return [text for text in texts if "a model of its own" in text]

    return {
        "Lookahead": seen(keras_stab.Lookahead(sgd())),
        "LARS": seen(keras_stab.LARS(0.1)),
        "SAM": seen(IN_FIT["SAM"]()),
        "Lookahead, wrapped": seen(keras_stab.Lookahead(sgd()), wrapped()),
        "plain": seen(sgd()),
    }


def group_of_one():
    """A process trains alike without a group and as the only one of it."""

    def run():
        return fitted(IN_FIT["GRAIN"]()), fitted(IN_FIT["SAM"]())

    alone = run()
    with in_group(sys.argv[3] + "_of_one"):
        return {"alone": alone, "grouped": run()}


@contextlib.contextmanager
def in_group(meeting):
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=RANK,
        world_size=WORKERS,
        timeout=datetime.timedelta(seconds=60),
    )
    yield
    torch.distributed.destroy_process_group()


def main(meeting, names):
    torch.set_num_threads(1)
    if WORKERS > 1:
        EARLY.append(replicas(1))
        EARLY[0].build(toy.model().trainable_variables)
    alone = contextlib.nullcontext()
    with in_group(meeting) if WORKERS > 1 else alone:
        results = {name: globals()[name]() for name in names}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[3], sys.argv[4:])
