"""Inside a worker: times the steps of several optimizers in turns.

Keras is imported inside functions only: each worker has a backend of its own,
and the process that starts them has none.
"""

import gc
import time
import warnings

from models import build_model
from models import make_data

from timing.arms import ARMS
from timing.arms import STOCK
from timing.company import Company
from timing.ratios import first_quartile
from timing.ratios import summarise

# Divisible by the periods of most methods that do more at some steps, and long
# enough that what `fit` does once is not most of a turn.
TURN = 20
FEWEST_TURNS = 3


class Trained:
    """One compiled model and what its training showed."""

    def __init__(self, model_name, optimizer, jit_compile="auto", callbacks=()):
        import keras

        self.model = build_model(model_name)
        # A counter inside a metric shows when Keras traces a step again.
        self.traces = 0

        def accuracy(y, y_pred):
            self.traces += 1
            return keras.metrics.sparse_categorical_accuracy(y, y_pred)

        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(
            optimizer, loss, metrics=[accuracy], jit_compile=jit_compile
        )
        self.steps = 0
        self._callbacks = callbacks
        self._clock = _make_clock()

    def train(self, x, y, batch):
        """`(step, CPU seconds, wall seconds)` of every step but the first.

        Time is taken inside `fit`, which is what a user runs, from the end of
        one step to the end of the next: `fit` has a start of its own (tens of
        milliseconds), and on JAX `train_on_batch` copies the state in and out.
        """
        first = self.steps
        self._clock.ends = []
        self.model.fit(
            x,
            y,
            batch_size=batch,
            shuffle=False,
            verbose=0,
            callbacks=[*self._callbacks, self._clock],
        )
        ends = self._clock.ends
        self.steps += len(ends)
        return [
            (first + i, *(b - a for a, b in zip(ends[i - 1], ends[i])))
            for i in range(1, len(ends))
        ]


def make_optimizer(arm):
    import keras

    import keras_stab

    return ARMS[arm].make(keras.optimizers, keras_stab)


def make_callbacks(arm):
    import keras_stab

    return ARMS[arm].callbacks(keras_stab)


def _make_clock():
    import keras

    class Clock(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            # Reading the loss waits for the step: it is an output of the
            # compiled step, and on PyTorch the last operation of the stream.
            float(logs["loss"])
            self.ends.append((time.process_time(), time.perf_counter()))

    return Clock()


def measure_time(options):
    """The worker for one backend, workload and number of threads."""
    return _measure(options, {arm: (arm, "auto") for arm in options["arms"]})


def measure_compiled(options):
    """The worker for one method with `torch.compile`, and without."""
    arm = options["arm"]
    base = ARMS[arm].base
    made = {base: (base, True), arm: (arm, True), "eager": (arm, False)}
    return _measure(options, made)


def _measure(options, made):
    """Trains all arms in turns.

    Args:
        options: `model`, `batch`, `turns` and `seconds`.
        made: For each name of an arm the one in `ARMS` and `jit_compile`.
    """
    model, batch = options["model"], options["batch"]
    x, y = make_data(model, (TURN + 1) * batch)
    answer = {"arms": {}}
    trained = {}
    # What the first step of a process does once is no part of any arm.
    Trained(model, make_optimizer(STOCK)).train(x[:batch], y[:batch], batch)
    for name, (arm, jit_compile) in made.items():
        begun = time.perf_counter()
        figures = answer["arms"][name] = {}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                one = Trained(
                    model,
                    make_optimizer(arm),
                    jit_compile,
                    make_callbacks(arm),
                )
                one.train(x[:batch], y[:batch], batch)
            except Exception as error:
                if ARMS[arm].base is None:
                    raise
                figures["error"] = first_line(error)
                continue
        trained[name] = one
        figures["first_step_seconds"] = time.perf_counter() - begun
        # A method says so when `jit_compile=True` cannot be honoured.
        said = [str(w.message) for w in said if "uncompiled" in str(w.message)]
        if said:
            figures["uncompiled"] = said[0]
    for one in trained.values():
        # What is compiled only now, as for the last and smaller batch.
        one.train(x[: 3 * batch], y[: 3 * batch], batch)
    traced = sum(one.traces for one in trained.values())
    # Else each collection between turns looks through all of the backend, and
    # takes longer than a turn of small steps.
    gc.collect()
    gc.freeze()
    company = Company()
    arms = {name: ARMS[arm] for name, (arm, _) in made.items()}
    times = _take_turns(trained, arms, x, y, options)
    traced = sum(one.traces for one in trained.values()) - traced
    for name, figures in summarise(times, arms).items():
        answer["arms"][name].update(figures)
        plan = getattr(trained[name].model.optimizer, "plan", None)
        if plan is not None:
            answer["arms"][name]["engine"] = plan().engine
    answer["weights"] = next(iter(trained.values())).model.count_params()
    answer["company"] = company.share()
    answer["traced_again"] = traced > 0 and options["backend"] != "torch"
    return answer


def _take_turns(trained, arms, x, y, options):
    times = {name: {"cpu": [], "wall": []} for name in trained}
    deadline = time.monotonic() + options["seconds"]
    names, turns = list(trained), 0
    while turns < options["turns"] and (
        turns < FEWEST_TURNS or time.monotonic() < deadline
    ):
        shift = turns % len(names)
        for name in names[shift:] + names[:shift]:
            # Leftovers of one arm should not be collected at the expense of
            # the next.
            gc.collect()
            steps = trained[name].train(x, y, options["batch"])
            period = arms[name].period
            for column, kind in enumerate(("cpu", "wall"), start=1):
                times[name][kind].append(
                    [(step[0] % period, step[column]) for step in steps]
                )
        turns += 1
    return times


def first_line(error):
    """The kind of an error and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def measure_solver(options):
    """Milliseconds of the K x K problem on the host, and its certificate."""
    import numpy as np

    import keras_stab

    random = np.random.default_rng(1)
    answer = {}
    for groups in options["groups"]:
        common = random.standard_normal(4 * groups)
        seconds, gaps = [], []
        for _ in range(options["problems"]):
            noise = random.standard_normal((groups, 4 * groups))
            rows = (common + noise).astype("float32")
            gram = rows @ rows.T
            begun = time.process_time()
            solution = keras_stab.min_norm_weights(gram)
            seconds.append(time.process_time() - begun)
            gaps.append(float(solution.residual))
        answer[str(groups)] = {
            "milliseconds": 1e3 * first_quartile(seconds),
            "gap": max(gaps),
        }
    return {"solver": answer}
