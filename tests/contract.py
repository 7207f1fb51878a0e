"""The table of the contract suite: one row per optimizer or nesting.

Adding an optimizer means adding a row. `build(inner)` makes it around an
inner optimizer; `reference(problem, batches, learning_rate)` is the row's
mathematics with plain SGD inside, in NumPy, and yields the parameters after
every batch.
"""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
import pytest
import reference
from marks import ON_TORCH

import keras_stab
from keras_stab.optimizers.gradient_method import GradientMethod
from keras_stab.optimizers.wrapper import Wrapper


@keras.saving.register_keras_serializable(package="keras_stab_tests")
class Transparent(Wrapper):
    """A wrapper that does nothing."""


@keras.saving.register_keras_serializable(package="keras_stab_tests")
class AskingNothing(GradientMethod):
    """A gradient method that asks for the plain gradient."""

    def estimate(self, oracle):
        oracle.notes[self] = ()
        return oracle.gradient()


def plain_steps(problem, batches, learning_rate):
    for x, y in batches:
        _descend(problem, problem.gradient(x, y), learning_rate)
        yield problem.parameters


def grain_steps(groups, rule=reference.min_norm_by_enumeration):
    def steps(problem, batches, learning_rate):
        for x, y in batches:
            parts = [(x[k::groups], y[k::groups]) for k in range(groups)]
            parts = [part for part in parts if len(part[0])]
            direction = problem.combined_gradient(parts, rule)
            _descend(problem, direction, learning_rate)
            yield problem.parameters

    return steps


def window_steps(groups):
    def steps(problem, batches, learning_rate):
        window = []
        for batch in batches:
            window.append(batch)
            if len(window) == groups:
                direction = problem.combined_gradient(window)
                _descend(problem, direction, learning_rate)
                window = []
            yield problem.parameters

    return steps


def layerwise_steps(momentum=0.9, decay=0.01, trust=0.1, factor=None):
    """LARS: the matrix adapted and decayed, the bias neither."""

    def steps(problem, batches, learning_rate):
        buffers = [0.0, 0.0]
        for t, (x, y) in enumerate(batches):
            kernel, bias = problem.parameters
            by_kernel, by_bias = problem.gradient(x, y)
            by_kernel = by_kernel + decay * kernel
            ratio = trust * _norm(kernel) / _norm(by_kernel)
            phi = 1.0 if factor is None else factor(t)
            buffers = [
                momentum * buffers[0] + ratio * phi * by_kernel,
                momentum * buffers[1] + phi * by_bias,
            ]
            _descend(problem, buffers, learning_rate)
            yield problem.parameters

    return steps


def lamb_steps(problem, batches, learning_rate):
    first = second = [0.0, 0.0]
    for t, (x, y) in enumerate(batches, start=1):
        gradients = problem.gradient(x, y)
        first = [0.9 * m + 0.1 * g for m, g in zip(first, gradients)]
        second = [0.999 * v + 1e-3 * g * g for v, g in zip(second, gradients)]
        kernel, bias = (
            (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-6)
            for m, v in zip(first, second)
        )
        weights = problem.parameters[0]
        kernel = kernel + 0.01 * weights
        kernel = kernel * _norm(weights) / _norm(kernel)
        _descend(problem, [kernel, bias], learning_rate)
        yield problem.parameters


CLIPPING = 0.5


def unit_wise_steps(problem, batches, learning_rate):
    """Each column of the matrix by itself, the bias as a whole."""
    for x, y in batches:
        gradients = [
            reference.clipped_by_unit(g, p, CLIPPING, 1e-3)
            for g, p in zip(problem.gradient(x, y), problem.parameters)
        ]
        _descend(problem, gradients, learning_rate)
        yield problem.parameters


def norm_steps(make_limit):
    def steps(problem, batches, learning_rate):
        limit = make_limit()
        for x, y in batches:
            gradients = problem.gradient(x, y)
            gradients = reference.clipped_by_norm(gradients, limit)
            _descend(problem, gradients, learning_rate)
            yield problem.parameters

    return steps


RHO = 0.1
BOOST = 2.0


def sam_gradient(problem, x, y):
    gradient = problem.gradient(x, y)
    start = problem.parameters
    length = np.sqrt(sum(np.sum(np.square(g)) for g in gradient))
    problem.parameters = [p + RHO * g / length for p, g in zip(start, gradient)]
    gradient = problem.gradient(x, y)
    problem.parameters = start
    return gradient


def sam_steps(problem, batches, learning_rate):
    for x, y in batches:
        _descend(problem, sam_gradient(problem, x, y), learning_rate)
        yield problem.parameters


def adaptive_sam_steps(problem, batches, learning_rate, rho=0.125):
    """At every second update only; the kernel by its size, the bias not."""
    for t, (x, y) in enumerate(batches):
        gradient = problem.gradient(x, y)
        if t % 2 == 0:
            start = problem.parameters
            scales = [np.abs(start[0]) + 0.01, 1.0]
            scaled = [s * g for s, g in zip(scales, gradient)]
            length = np.sqrt(sum(np.sum(np.square(g)) for g in scaled))
            problem.parameters = [
                p + rho * s * g / length
                for p, s, g in zip(start, scales, scaled)
            ]
            gradient = problem.gradient(x, y)
            problem.parameters = start
        _descend(problem, gradient, learning_rate)
        yield problem.parameters


def boosted_sam_steps(problem, batches, learning_rate):
    """Half of the weights boosted: those of small gradients, at even steps."""
    for t, (x, y) in enumerate(batches):
        if t % 2 == 0:
            sizes = [np.abs(g) for g in problem.gradient(x, y)]
            ranked = [
                s.ravel()
                for i, s in enumerate(sizes)
                if i not in problem.frozen
            ]
            limit = np.sort(np.concatenate(ranked))
            limit = limit[limit.size // 2 - 1]
            factors = [1.0 + BOOST * (s <= limit) for s in sizes]
        gradient = sam_gradient(problem, x, y)
        gradient = [f * g for f, g in zip(factors, gradient)]
        _descend(problem, gradient, learning_rate)
        yield problem.parameters


def schedule_free_steps(problem, batches, learning_rate, beta=0.9):
    """The model holds x; the gradient is taken at y."""
    average = iterate = problem.parameters
    for t, (x, y) in enumerate(batches):
        problem.parameters = [
            beta * a + (1 - beta) * z for a, z in zip(average, iterate)
        ]
        gradients = problem.gradient(x, y)
        iterate = [z - learning_rate * g for z, g in zip(iterate, gradients)]
        average = [a + (z - a) / (t + 1) for a, z in zip(average, iterate)]
        problem.parameters = average
        yield average


def lookahead_steps(period, size, inner=plain_steps):
    """Back to a point between the start of the cycle and where it led."""

    def steps(problem, batches, learning_rate):
        slow = start = problem.parameters
        for t, _ in enumerate(inner(problem, batches, learning_rate)):
            if t % period == 0:
                slow = start
            if t % period == period - 1:
                problem.parameters = [
                    z + size * (w - z) for z, w in zip(slow, problem.parameters)
                ]
            start = problem.parameters
            yield start

    return steps


def rapp_steps(inner_steps, relaxation):
    """Every step from the anchor; EG+ where there are two of them."""

    def steps(problem, batches, learning_rate):
        for t, (x, y) in enumerate(batches):
            if t % inner_steps == 0:
                anchor = problem.parameters
            gradients = problem.gradient(x, y)
            problem.parameters = anchor
            _descend(problem, gradients, learning_rate)
            if t % inner_steps == inner_steps - 1:
                problem.parameters = [
                    z + relaxation * (w - z)
                    for z, w in zip(anchor, problem.parameters)
                ]
            yield problem.parameters

    return steps


def adaptive_steps(problem, batches, learning_rate, theta=1.5):
    """The second step as long as inner products over all parameters say."""

    def vector(parts):
        return np.concatenate([np.ravel(p) for p in parts])

    def forward(gradients):
        points = zip(problem.parameters, gradients)
        return [p - learning_rate * g for p, g in points]

    for t, (x, y) in enumerate(batches):
        ahead = forward(problem.gradient(x, y))
        if t % 2 == 0:
            iterate, before = problem.parameters, ahead
            problem.parameters = ahead
        else:
            change = [b - a for a, b in zip(before, ahead)]
            moved = [w - z for z, w in zip(iterate, problem.parameters)]
            a, b = vector(moved), vector(change)
            step = theta * (a @ b) / (b @ b)
            problem.parameters = [z + step * c for z, c in zip(iterate, change)]
        yield problem.parameters


def optimistic_steps(problem, batches, learning_rate):
    last = None
    for x, y in batches:
        gradients = problem.gradient(x, y)
        last = gradients if last is None else last
        ahead = [2.0 * g - h for g, h in zip(gradients, last)]
        _descend(problem, ahead, learning_rate)
        last = gradients
        yield problem.parameters


def past_steps(problem, batches, learning_rate):
    """The parameters are the extrapolated point."""
    iterate = problem.parameters
    for x, y in batches:
        gradients = problem.gradient(x, y)
        problem.parameters = iterate
        _descend(problem, gradients, learning_rate)
        iterate = problem.parameters
        _descend(problem, gradients, learning_rate)
        yield problem.parameters


def _norm(matrix):
    return np.sqrt(np.sum(np.square(matrix)))


def _descend(problem, gradient, learning_rate):
    problem.parameters = [
        p - learning_rate * g for p, g in zip(problem.parameters, gradient)
    ]


@dataclasses.dataclass
class Row:
    """One optimizer or nesting."""

    name: str
    build: Callable
    # None where random numbers decide; vectors stand in for it.
    reference: Callable | None
    # Whether it is the inner optimizer, bit for bit.
    is_inner: bool = False
    # Batches until the weights move.
    period: int = 1
    # Updates until the inner optimizer itself makes one.
    inner_every: int = 1
    accumulates: bool = True
    # Whether it is a wrapper, not an optimizer in its own right: that one
    # takes learning rate, accumulation and EMA from `inner`, no more.
    wraps: bool = True
    # Whether its parts have rows of their own: then its mathematics and its
    # state are tested, and no more.
    nested: bool = False
    # Whether a batch of NaN does not reach the weights.
    drops_nan: bool = True
    # Whether the inner optimizer may average weights by itself (`use_ema`).
    averages: bool = True
    # The weights that it keeps beside the trained ones, for evaluation:
    # "average", "slow", "own" where they are the trained ones, or none.
    second_weights: str = ""
    # Whether its tests run with the slow ones; or only those that a nested
    # row does not have.
    slow: bool = False
    slow_whole: bool = False
    # Weights w, all equal, after a step of rate 0.1 for the loss `sum(a b)`,
    # of twice ten weights; None for a row that refuses a loss of that kind,
    # or whose steps are not alike.
    bilinear: Callable | None = lambda w: 0.9 * w


def _grain(**arguments):
    return lambda inner: keras_stab.GRAIN(inner, **arguments)


def _aggregate(rule, **arguments):
    return lambda inner: keras_stab.Aggregate(inner, rule, **arguments)


@keras.saving.register_keras_serializable(package="keras_stab_tests")
def by_size(gram, sizes):
    """More weight for long gradients, and for groups of many rows."""
    weights = sizes * keras.ops.sqrt(keras.ops.diagonal(gram))
    return weights / keras.ops.sum(weights)


def by_size_in_numpy(gram, sizes):
    weights = np.array(sizes) * np.sqrt(np.diagonal(gram))
    return weights / weights.sum()


def _boosted_sam(inner):
    return keras_stab.IRE(
        keras_stab.SAM(inner, rho=RHO),
        flat_fraction=0.5,
        boost=BOOST,
        update_every=2,
        curvature="gradient",
    )


def _sam_on_bilinear(factor):
    length = RHO / np.sqrt(20)
    return lambda w: w - factor * 0.1 * (w + np.sign(w) * length)


def _alone(kind, **arguments):
    def build(inner):
        inner = keras.optimizers.get(inner)
        rate = float(keras.ops.convert_to_numpy(inner.learning_rate))
        taken = {
            "gradient_accumulation_steps": inner.gradient_accumulation_steps,
            "use_ema": inner.use_ema,
            "ema_momentum": inner.ema_momentum,
        }
        return kind(rate, **taken, **arguments)

    return build


def _schedule_free(learning_rate, **arguments):
    return keras_stab.ScheduleFree(
        keras.optimizers.SGD(learning_rate, **arguments)
    )


ROWS = [
    Row("Transparent", Transparent, plain_steps, is_inner=True),
    Row("AskingNothing", AskingNothing, plain_steps, is_inner=True),
    Row("GRAIN-1", _grain(groups=1), plain_steps, is_inner=True),
    Row("GRAIN-2", _grain(groups=2), grain_steps(2)),
    Row("GRAIN-4", _grain(groups=4), grain_steps(4)),
    Row(
        "GRAIN-batches",
        _grain(groups=3, across="batches"),
        window_steps(3),
        period=3,
        accumulates=False,
    ),
    Row(
        "Aggregate-upgrad",
        _aggregate("upgrad", groups=4),
        grain_steps(4, reference.upgrad_by_enumeration),
        # All but the rule is GRAIN's, whose rows test the rest.
        slow_whole=True,
    ),
    Row(
        "Aggregate-pcgrad",
        _aggregate("pcgrad", groups=4, seed=1),
        None,
        nested=True,
    ),
    Row(
        "Aggregate-cagrad",
        _aggregate("cagrad", groups=2),
        grain_steps(2, reference.cagrad_of_two),
        nested=True,
        # Groups that agree: the ball of radius c = 0.5 is left at its end.
        bilinear=lambda w: (1.0 - 0.1 * 1.5) * w,
    ),
    Row(
        "Aggregate-function",
        _aggregate(by_size, groups=2),
        grain_steps(2, by_size_in_numpy),
        nested=True,
    ),
    Row(
        "Transparent(GRAIN)",
        lambda inner: Transparent(_grain(groups=4)(inner)),
        grain_steps(4),
        nested=True,
    ),
    Row(
        "GRAIN(Transparent)",
        lambda inner: _grain(groups=4)(Transparent(inner)),
        grain_steps(4),
        nested=True,
    ),
    Row(
        "AskingNothing(GRAIN-1)",
        lambda inner: AskingNothing(_grain(groups=1)(inner)),
        plain_steps,
        is_inner=True,
        nested=True,
    ),
    Row(
        "SAM",
        lambda inner: keras_stab.SAM(inner, rho=RHO),
        sam_steps,
        drops_nan=False,
        bilinear=_sam_on_bilinear(1.0),
    ),
    Row(
        "IRE",
        lambda inner: keras_stab.IRE(inner, update_every=2, seed=1),
        None,
        drops_nan=False,
        averages=False,
        bilinear=None,
    ),
    Row(
        "IRE(SAM)",
        _boosted_sam,
        boosted_sam_steps,
        accumulates=False,
        nested=True,
        drops_nan=False,
        averages=False,
        # Equal scores are ties: every weight is flat.
        bilinear=_sam_on_bilinear(1.0 + BOOST),
    ),
    Row(
        "AdaptiveClipping",
        lambda inner: keras_stab.AdaptiveClipping(inner, clipping=CLIPPING),
        unit_wise_steps,
        drops_nan=False,
        bilinear=lambda w: (1.0 - 0.1 * CLIPPING) * w,
    ),
    Row(
        "AdaptiveClipping-percentile",
        lambda inner: keras_stab.AdaptiveClipping(
            inner, "percentile", percentile=30, history_length=3
        ),
        norm_steps(lambda: reference.PercentileLimit(30, 3)),
        accumulates=False,
        nested=True,
        drops_nan=False,
        bilinear=None,
    ),
    Row(
        "AdaptiveClipping-zclip",
        lambda inner: keras_stab.AdaptiveClipping(
            inner, "zclip", z_threshold=0.25, decay=0.5, warmup_steps=2
        ),
        norm_steps(lambda: reference.ScoreLimit(0.25, 0.5, 2)),
        accumulates=False,
        nested=True,
        drops_nan=False,
        bilinear=None,
    ),
    Row(
        "LARS",
        _alone(keras_stab.LARS, trust_coefficient=0.1, weight_decay=0.01),
        layerwise_steps(),
        accumulates=False,
        wraps=False,
    ),
    Row(
        "TVLARS",
        _alone(
            keras_stab.TVLARS,
            trust_coefficient=0.1,
            weight_decay=0.01,
            decay_rate=0.5,
            delay=2.0,
            floor=0.01,
        ),
        layerwise_steps(
            factor=lambda t: 0.01 + 1 / (1 + np.exp(0.5 * (t - 2)))
        ),
        accumulates=False,
        wraps=False,
    ),
    Row(
        "LAMB",
        _alone(keras_stab.LAMB),
        lamb_steps,
        accumulates=False,
        wraps=False,
    ),
    Row(
        "WeightAveraging",
        lambda inner: keras_stab.WeightAveraging(inner, start_step=2),
        plain_steps,
        is_inner=True,
        averages=False,
        second_weights="average",
    ),
    Row(
        "AveragedSGD",
        _alone(keras_stab.AveragedSGD, method="power"),
        plain_steps,
        accumulates=False,
        wraps=False,
        averages=False,
        second_weights="average",
    ),
    Row(
        "Lookahead",
        lambda inner: keras_stab.Lookahead(inner, sync_period=4),
        lookahead_steps(4, 0.5),
        accumulates=False,
        drops_nan=False,
        averages=False,
        bilinear=None,
        second_weights="slow",
    ),
    Row(
        "Lookahead(IRE(GRAIN))",
        lambda inner: keras_stab.Lookahead(
            keras_stab.IRE(_grain(groups=4)(inner), update_every=2, seed=1)
        ),
        None,
        accumulates=False,
        nested=True,
        drops_nan=False,
        averages=False,
        # The nesting that `guides/how_to_choose.md` promises.
        slow=not ON_TORCH,
        bilinear=None,
    ),
    Row(
        "RAPP",
        _alone(keras_stab.RAPP, inner_steps=3),
        rapp_steps(3, 0.5),
        accumulates=False,
        wraps=False,
        slow_whole=True,
        averages=False,
        second_weights="slow",
    ),
    Row(
        "CEGPlus",
        _alone(keras_stab.CEGPlus, alpha=0.25),
        rapp_steps(2, 0.25),
        accumulates=False,
        wraps=False,
        slow=True,
        averages=False,
        second_weights="slow",
    ),
    Row(
        "CEGPlus-adaptive",
        _alone(keras_stab.CEGPlus, alpha="adaptive", relaxation=1.5),
        adaptive_steps,
        accumulates=False,
        wraps=False,
        slow=True,
        averages=False,
        second_weights="slow",
    ),
    Row(
        "ExtraGradient",
        lambda inner: keras_stab.ExtraGradient(inner, update_scale=0.5),
        rapp_steps(2, 0.5),
        accumulates=False,
        drops_nan=False,
        averages=False,
        slow=True,
        bilinear=None,
        second_weights="slow",
    ),
    Row(
        "ExtraGradient-separate",
        lambda inner: keras_stab.ExtraGradient(inner, moments="separate"),
        rapp_steps(2, 1.0),
        inner_every=2,
        accumulates=False,
        nested=True,
        drops_nan=False,
        averages=False,
        slow=True,
        bilinear=None,
    ),
    Row(
        "OptimisticGradient",
        keras_stab.OptimisticGradient,
        optimistic_steps,
        accumulates=False,
        drops_nan=False,
        averages=False,
        slow=True,
        bilinear=None,
        second_weights="own",
    ),
    Row(
        "PastExtraGradient",
        keras_stab.PastExtraGradient,
        past_steps,
        accumulates=False,
        drops_nan=False,
        averages=False,
        slow=True,
        bilinear=None,
        second_weights="slow",
    ),
    Row(
        "ScheduleFree",
        _alone(_schedule_free),
        schedule_free_steps,
        accumulates=False,
        wraps=False,
        averages=False,
    ),
]

INNER = {
    "sgd": lambda: keras.optimizers.SGD(0.05),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "adamw": lambda: keras.optimizers.AdamW(
        0.01, weight_decay=0.01, global_clipnorm=1.0
    ),
    "lamb": lambda: keras.optimizers.Lamb(0.01),
}

# What is resumed in a fresh process: what a row saves does not depend on what
# is inside it, so one inner optimizer will do for most, and one of the rows
# that do the same.
DO_AS_OTHERS = (
    "AskingNothing",
    "GRAIN-1",
    "GRAIN-2",
    "Transparent(GRAIN)",
    "GRAIN(Transparent)",
    "AskingNothing(GRAIN-1)",
)
RESUMED = [(row, "adamw") for row in ROWS if row.name not in DO_AS_OTHERS] + [
    (row, "momentum") for row in ROWS if row.name == "GRAIN-batches"
]

# For what does not depend on the backend's arithmetic: on PyTorch, the
# quickest, every row; elsewhere one of each family, and the others with the
# slow tests.
OF_EACH_FAMILY = (
    "GRAIN-4",
    "SAM",
    "IRE",
    "LARS",
    "WeightAveraging",
    "ScheduleFree",
    "Lookahead",
)
# The same for saved files, with those that hold a state of another kind.
OF_EACH_STATE = (
    *OF_EACH_FAMILY,
    "GRAIN-batches",
    "RAPP",
    "Aggregate-pcgrad",
    "AdaptiveClipping-zclip",
)
# Where a compiled step of every row would take longest.
OF_EACH_PLACE = ("GRAIN-4", "SAM", "WeightAveraging", "Lookahead")


def is_slow(row, names=OF_EACH_FAMILY):
    """Whether what is tested of one of each family is slow for a row."""
    return row.slow or not (ON_TORCH or row.name in names)


def speed_of_resume(row):
    """With which rows a row is resumed in a fresh process."""
    return "slow" if is_slow(row, OF_EACH_STATE) else "quick"


def parameters(rows, whole=False):
    """The rows, or tuples of a row and strings, for `parametrize`.

    Args:
        whole: Whether the test is one that nested rows do not have.
    """
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    return [
        pytest.param(
            row,
            *rest,
            id="-".join([row.name, *rest]),
            marks=pytest.mark.slow
            if row.slow or (whole and row.slow_whole)
            else (),
        )
        for row, *rest in rows
    ]


BATCH = 16
FEATURES = 6
CLASSES = 3


def data(batches=12):
    generator = np.random.default_rng(7)
    x = generator.normal(size=(batches * BATCH, FEATURES)).astype("float32")
    y = generator.integers(0, CLASSES, size=len(x))
    return x, y


def classifier(dropout=True):
    """A small network with state of every kind: dropout, batch-norm.

    Keras 3.15 saves no dropout seeds (a resumed run draws other masks, with
    any optimizer), so the tests of saving leave dropout out.
    """
    keras.utils.set_random_seed(3)
    inputs = keras.Input((FEATURES,))
    x = keras.layers.Dense(8, activation="tanh", name="first")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    if dropout:
        x = keras.layers.Dropout(0.25, seed=5)(x)
    outputs = keras.layers.Dense(CLASSES, name="last")(x)
    return keras.Model(inputs, outputs)


def float8_classifier():
    """A network with variables that are no weights: scales, histories."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((FEATURES,))
    first = keras.layers.Dense(8, activation="tanh", name="first")
    outputs = keras.layers.Dense(CLASSES, name="last")(first(inputs))
    first.quantize("float8")
    return keras.Model(inputs, outputs)


def overwritten(model):
    """Those variables of a model: their gradient is their new value."""
    return [v for v in model.trainable_variables if v.overwrite_with_gradient]


def compiled(optimizer, model=None, **arguments):
    model = classifier() if model is None else model
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **arguments,
    )
    return model


def fit(model, x, y, lent=False, **arguments):
    """Calls `fit`; afterwards the model holds the trained weights.

    With `lent` it holds what `fit` leaves there: evaluation weights, if the
    optimizer has any.
    """
    arguments = {"batch_size": BATCH, "shuffle": False, "verbose": 0} | (
        arguments
    )
    history = model.fit(x, y, **arguments)
    if not lent:
        keras_stab.return_trained_weights(model)
    return history


def state(model):
    """Every number that a resumed run needs."""
    variables = [*model.variables, *model.optimizer.variables]
    return [np.asarray(keras.ops.convert_to_numpy(v)) for v in variables]


def assert_same_bits(left, right):
    assert len(left) == len(right)
    for i, (a, b) in enumerate(zip(left, right)):
        np.testing.assert_array_equal(a, b, err_msg=f"variable {i}")


def row(name):
    return next(r for r in ROWS if r.name == name)
