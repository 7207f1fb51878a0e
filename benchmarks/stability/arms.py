"""The arms by name: what is made of a task's base optimizer."""

import dataclasses
from collections.abc import Callable

import keras

import keras_stab

# Against a division by 0.
TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class Arm:
    """How one arm trains.

    Attributes:
        title: String for tables; `{base}` stands for the base optimizer.
        make: Function `(task, rate) -> optimizer`.
        rates: `"search"`: the arm has a search of its own, among the rates of
            the task. A number: the tuned rate of the base times this.
        stops_early: Whether held-out rows stop it.
        sorted_by: What the rows of each batch are sorted by, so that
            contiguous groups are alike in it: `"labels"`, `"losses"` at the
            start of the epoch, or `None`.
        compiles_rate: Whether the rate is a schedule, which is compiled into
            the step.
    """

    title: str
    make: Callable
    rates: str | float = "search"
    stops_early: bool = False
    sorted_by: str | None = None
    compiles_rate: bool = False

    def optimizer(self, key, task, rate):
        """A new optimizer that carries the arm's key as its name."""
        optimizer = self.make(task, rate)
        optimizer.name = key
        return optimizer


class RandomMask(keras_stab.IRE):
    """The control of IRE: it ranks weights by random numbers."""

    def fisher_roots(self, oracle, step):
        with self.drawing(step) as seed:
            return [
                keras.random.uniform(v.shape, seed=seed)
                for v in oracle.variables
            ], 1.0


def base(task, rate):
    return task.make_base(rate)


def decayed(task, rate):
    """The rate falls to 0 in a straight line."""
    schedule = keras.optimizers.schedules.PolynomialDecay(
        rate, task.steps, end_learning_rate=0.0
    )
    return task.make_base(schedule)


def scaled(rate, factor):
    """A learning rate or a schedule, times a factor."""
    if not isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        return factor * rate
    settings = rate.get_config()
    settings["initial_learning_rate"] *= factor
    return type(rate).from_config(settings)


def around(wrap, **arguments):
    """The base inside of a method."""
    return lambda task, rate: wrap(task.make_base(rate), **arguments)


@keras.saving.register_keras_serializable("stability")
def direction_of_grain(gram):
    """The weights of GRAIN, rescaled: as long a combination as the mean."""
    ops = keras.ops
    weights = keras_stab.min_norm_weights(gram).weights
    shortest = ops.sum(weights * ops.matmul(gram, weights))
    return weights * ops.sqrt(ops.mean(gram) / (shortest + TINY))


@keras.saving.register_keras_serializable("stability")
def length_of_grain(gram):
    """Equal weights, rescaled: the combination is as long as GRAIN's."""
    ops = keras.ops
    weights = keras_stab.min_norm_weights(gram).weights
    shortest = ops.sum(weights * ops.matmul(gram, weights))
    factor = ops.sqrt(shortest / (ops.mean(gram) + TINY))
    return ops.ones_like(weights) * factor / len(gram)


def boosted(kind):
    """IRE, from a quarter of the run on."""

    def make(task, rate):
        return kind(task.make_base(rate), start_step=task.steps // 4)

    return make


def tail_average(task, rate):
    """The mean of the weights of the second half of the run."""
    return keras_stab.WeightAveraging(
        task.make_base(rate), start_step=task.steps // 2
    )


def moving_average(task, rate):
    """A moving average over about a fifth of the run."""
    return keras_stab.WeightAveraging(
        task.make_base(rate), method="ema", decay=1 - 5 / task.steps
    )


def schedule_free(task, rate):
    """As published: larger rates than those of the base."""
    if isinstance(task.make_base(rate), keras.optimizers.SGD):
        return keras_stab.ScheduleFree.sgd(10 * rate)
    return keras_stab.ScheduleFree.adamw(3 * rate)


ARMS = {
    "base": Arm("{base}", base),
    "half_rate": Arm("{base}, half the rate", base, rates=0.5),
    "stops_early": Arm(
        "{base}, stops early by held-out rows", base, stops_early=True
    ),
    "decay": Arm("{base}, rate falls to 0", decayed, compiles_rate=True),
    "grain_4": Arm("GRAIN, K = 4", around(keras_stab.GRAIN, groups=4)),
    "grain_8": Arm("GRAIN, K = 8", around(keras_stab.GRAIN, groups=8)),
    "grain_16": Arm("GRAIN, K = 16", around(keras_stab.GRAIN, groups=16)),
    "grain_batches": Arm(
        "GRAIN across 4 batches",
        around(keras_stab.GRAIN, groups=4, across="batches"),
    ),
    "grain_labels": Arm(
        "GRAIN, K = 4, groups by label",
        around(keras_stab.GRAIN, groups=4, grouping="contiguous"),
        sorted_by="labels",
    ),
    "grain_losses": Arm(
        "GRAIN, K = 4, groups by loss",
        around(keras_stab.GRAIN, groups=4, grouping="contiguous"),
        sorted_by="losses",
    ),
    "grain_direction": Arm(
        "GRAIN, K = 4, as long as the mean (control)",
        around(keras_stab.Aggregate, rule=direction_of_grain, groups=4),
    ),
    "grain_length": Arm(
        "mean, as long as GRAIN, K = 4 (control)",
        around(keras_stab.Aggregate, rule=length_of_grain, groups=4),
    ),
    "sam": Arm("SAM", around(keras_stab.SAM)),
    "sam_10": Arm("SAM, every 10th step", around(keras_stab.SAM, interval=10)),
    "ire": Arm("IRE", boosted(keras_stab.IRE)),
    "ire_random": Arm("IRE, random mask (control)", boosted(RandomMask)),
    "tail": Arm("WeightAveraging, second half", tail_average),
    "ema": Arm("WeightAveraging, EMA", moving_average),
    "schedule_free": Arm("ScheduleFree, larger rates", schedule_free),
    "lookahead": Arm("Lookahead", around(keras_stab.Lookahead)),
}
# Of every task that trains one model on few rows.
COMMON = tuple(ARMS)

# Of the tasks with a large batch. The grid is that of SGD with momentum; the
# factors are the units of the others, after the guide on large batches.
TRUST = 100.0
MOMENTS = 0.1
WARMUP = 0.2


def warmed_up(rate, task):
    """Up in a straight line for a fifth of the run, then down a cosine."""
    return keras_stab.WarmupCosine(rate, WARMUP * task.steps, task.steps)


def warmed_up_base(task, rate):
    return task.make_base(warmed_up(rate, task))


def lars(task, rate):
    schedule = warmed_up(TRUST * rate, task)
    return keras_stab.LARS(schedule, excluded_lr_scale=0.01)


def tvlars(task, rate):
    """With its own schedule: high at first, no warm-up."""
    return keras_stab.TVLARS.from_steps(
        hold_steps=0.1 * task.steps,
        decay_steps=0.6 * task.steps,
        learning_rate=TRUST * rate,
        excluded_lr_scale=0.01,
    )


def lamb(task, rate):
    return keras_stab.LAMB(warmed_up(MOMENTS * rate, task), weight_decay=0.0)


ARMS |= {
    "warmup": Arm(
        "{base}, warm-up and cosine", warmed_up_base, compiles_rate=True
    ),
    "lars": Arm("LARS, warm-up and cosine", lars, compiles_rate=True),
    "tvlars": Arm("TVLARS", tvlars),
    "lamb": Arm("LAMB, warm-up and cosine", lamb, compiles_rate=True),
}
LARGE_BATCH = ("warmup", "lars", "tvlars", "lamb")


def rapp(task, rate):
    return task.plain_steps(
        lambda own: keras_stab.RAPP(own, inner_steps=3, relaxation=0.9), rate
    )


def ceg_plus(task, rate):
    return task.plain_steps(
        lambda own: keras_stab.CEGPlus(own, alpha=0.25), rate
    )


# Of the games, which know the rates of methods without moments.
ARMS |= {
    "extra_gradient": Arm(
        "ExtraGradient({base})", around(keras_stab.ExtraGradient)
    ),
    "past_extra": Arm(
        "PastExtraGradient({base})", around(keras_stab.PastExtraGradient)
    ),
    "optimistic": Arm(
        "OptimisticGradient({base})", around(keras_stab.OptimisticGradient)
    ),
    "ceg_plus": Arm("CEG+", ceg_plus),
    "rapp": Arm("RAPP", rapp),
}
GAMES = (
    *("base", "half_rate", "decay", "tail", "ema", "lookahead"),
    *("extra_gradient", "past_extra", "optimistic", "ceg_plus", "rapp"),
)
