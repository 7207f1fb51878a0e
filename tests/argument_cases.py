"""Everything public that takes arguments, with arguments that are right.

`CASES` maps a name to a `Case`: how the thing is made, and what it is put to
use for. The tests change one argument at a time.
"""

import dataclasses
import inspect
from collections.abc import Callable

import keras
import numpy as np

import keras_stab
from keras_stab import constraints
from keras_stab import schedules
from keras_stab.games import bilinear
from keras_stab.games import forsaken
from keras_stab.games import polar
from keras_stab.games import quadratic

X = np.linspace(-1.0, 1.0, 24, dtype="float32").reshape(8, 3)
Y = np.arange(8) % 2


def compiled(optimizer, **arguments):
    keras.utils.set_random_seed(0)
    net = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, activation="tanh", name="first"),
            keras.layers.LayerNormalization(name="norm"),
            keras.layers.Dense(2, name="last", **arguments),
        ]
    )
    net.compile(
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        run_eagerly=True,
        jit_compile=False,
    )
    return net


def train(optimizer):
    compiled(optimizer).fit(X, Y, batch_size=4, verbose=0)


def train_at(schedule):
    train(keras.optimizers.SGD(schedule))


def train_within(constraint):
    if isinstance(constraint, keras.constraints.Constraint):
        compiled("sgd", kernel_constraint=constraint).train_on_batch(X, Y)
    train(keras_stab.RAPP(0.1, 2, proximal={"last/kernel": constraint}))


def train_with(callback, optimizer=None, **arguments):
    net = compiled(optimizer or keras.optimizers.SGD(0.1), **arguments)
    net.fit(X, Y, batch_size=4, verbose=0, callbacks=[callback])


def train_game(problem):
    problem.game.compile(keras.optimizers.SGD(0.1), jit_compile=False)
    problem.game.fit(problem.steps(2), batch_size=1, verbose=0)


@dataclasses.dataclass
class Case:
    make: Callable
    use: Callable
    right: dict = dataclasses.field(default_factory=dict)
    more: tuple = ()  # arguments that its signature hides
    less: tuple = ()  # arguments that are left alone

    @property
    def arguments(self):
        named = [
            parameter.name
            for parameter in inspect.signature(self.make).parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
            and parameter.name not in self.less
        ]
        return [*named, *self.more]


LAYERWISE = (
    "exclude_1d",
    "decay_exclude",
    "adaptation_exclude",
    "trust_clip",
    "track_trust_ratios",
)
AGC = ("clipping", "epsilon", "unit_axes")
ZCLIP = ("z_threshold", "decay", "warmup_steps")
CASES = {
    "GRAIN": Case(keras_stab.GRAIN, train, {"groups": 2}),
    "SAM": Case(keras_stab.SAM, train),
    "IRE": Case(keras_stab.IRE, train, {"update_every": 1}),
    "WeightAveraging": Case(keras_stab.WeightAveraging, train),
    "WeightAveraging-ema": Case(
        keras_stab.WeightAveraging, train, {"method": "ema"}
    ),
    "WeightAveraging-power": Case(
        keras_stab.WeightAveraging, train, {"method": "power"}
    ),
    "WeightAveraging.from_run": Case(
        keras_stab.WeightAveraging.from_run,
        train,
        {"steps_per_epoch": 2, "epochs": 2},
    ),
    "AveragedSGD": Case(keras_stab.AveragedSGD, train),
    "AveragedSGD-momentum": Case(
        keras_stab.AveragedSGD, train, {"momentum": 0.9}
    ),
    "ScheduleFree": Case(keras_stab.ScheduleFree, train),
    "ScheduleFree.sgd": Case(keras_stab.ScheduleFree.sgd, train),
    "ScheduleFree.adamw": Case(keras_stab.ScheduleFree.adamw, train),
    "AdaptiveClipping": Case(
        keras_stab.AdaptiveClipping,
        train,
        less=("percentile", "history_length", *ZCLIP),
    ),
    "AdaptiveClipping-percentile": Case(
        keras_stab.AdaptiveClipping,
        train,
        {"rule": "percentile"},
        less=("rule", "exclude", *AGC, *ZCLIP),
    ),
    "AdaptiveClipping-zclip": Case(
        keras_stab.AdaptiveClipping,
        train,
        {"rule": "zclip", "warmup_steps": 1},
        less=("rule", "exclude", *AGC, "percentile", "history_length"),
    ),
    "Lookahead": Case(keras_stab.Lookahead, train, {"sync_period": 2}),
    "RAPP": Case(keras_stab.RAPP, train, {"inner_steps": 2}),
    "CEGPlus": Case(keras_stab.CEGPlus, train),
    "CEGPlus-adaptive": Case(keras_stab.CEGPlus, train, {"alpha": "adaptive"}),
    "ExtraGradient": Case(keras_stab.ExtraGradient, train),
    "OptimisticGradient": Case(keras_stab.OptimisticGradient, train),
    "PastExtraGradient": Case(keras_stab.PastExtraGradient, train),
    "LARS": Case(keras_stab.LARS, train, more=LAYERWISE),
    "LAMB": Case(keras_stab.LAMB, train, more=LAYERWISE),
    "TVLARS": Case(
        keras_stab.TVLARS,
        train,
        {"decay_rate": 0.1, "delay": 1.0},
        (*LAYERWISE, "epsilon", "nesterov", "momentum_style", "norm"),
    ),
    "TVLARS.from_steps": Case(
        keras_stab.TVLARS.from_steps,
        train,
        {"hold_steps": 1, "decay_steps": 2},
    ),
    "WarmupPolynomial": Case(
        schedules.WarmupPolynomial,
        train_at,
        {"learning_rate": 0.1, "warmup_steps": 1, "total_steps": 3},
    ),
    "WarmupCosine": Case(
        schedules.WarmupCosine,
        train_at,
        {"learning_rate": 0.1, "warmup_steps": 1, "total_steps": 3},
    ),
    "TimeVaryingSigmoid": Case(
        schedules.TimeVaryingSigmoid,
        train_at,
        {"learning_rate": 0.1, "decay_rate": 0.1, "delay": 1.0},
    ),
    "ConstantTail": Case(
        schedules.ConstantTail,
        train_at,
        {"learning_rate": 0.1, "tail_learning_rate": 0.01, "tail_step": 3},
    ),
    "ConstantTail-steps": Case(
        schedules.ConstantTail,
        train_at,
        {
            "learning_rate": 0.1,
            "tail_learning_rate": 0.01,
            "shape": "steps",
            "milestones": [1, 2],
        },
    ),
    "LinearWarmup": Case(
        schedules.LinearWarmup,
        train_at,
        {"learning_rate": 0.1, "warmup_steps": 3},
    ),
    "Box": Case(constraints.Box, train_within, {"lower": -1.0, "upper": 1.0}),
    "L2Ball": Case(constraints.L2Ball, train_within, {"radius": 1.0}),
    "L1Ball": Case(constraints.L1Ball, train_within, {"radius": 1.0}),
    "Simplex": Case(constraints.Simplex, train_within),
    "SpectralBall": Case(
        constraints.SpectralBall, train_within, {"radius": 1.0}
    ),
    "L1": Case(constraints.L1, train_within, {"weight": 0.1}),
    "GroupL2": Case(constraints.GroupL2, train_within, {"weight": 0.1}),
    "SquaredL2": Case(constraints.SquaredL2, train_within, {"weight": 0.1}),
    "NuclearNorm": Case(constraints.NuclearNorm, train_within, {"weight": 0.1}),
    "ElasticNet": Case(
        constraints.ElasticNet, train_within, {"l1": 0.1, "l2": 0.1}
    ),
    "StartBoostAtLoss": Case(
        keras_stab.StartBoostAtLoss,
        lambda callback: train_with(
            callback, keras_stab.IRE("sgd", start_step="manual")
        ),
        {"level": 0.5},
    ),
    "StabilityMonitor": Case(
        keras_stab.StabilityMonitor,
        train_with,
        {"probe": (X, Y), "groups": 2},
        # Data are looked at when they are used: see test_data_path.
        less=("probe",),
    ),
    "AveragedWeights": Case(
        keras_stab.AveragedWeights,
        lambda callback: train_with(
            callback, keras_stab.WeightAveraging("sgd")
        ),
        {"batch_norm_data": X},
    ),
    "SwapSlowWeights": Case(
        keras_stab.SwapSlowWeights,
        lambda callback: train_with(
            callback, keras_stab.Lookahead("sgd", sync_period=2)
        ),
        {"batch_norm_data": X},
    ),
    "bilinear": Case(bilinear, train_game),
    "quadratic": Case(quadratic, train_game),
    "polar": Case(polar, train_game),
    "forsaken": Case(forsaken, train_game),
}


class Nonsense:
    """What no argument takes."""

    def __repr__(self):
        return "Nonsense()"


# Some of them are right for some arguments: then what is made must work.
VALUES = {
    "None": None,
    "text": "nonsense",
    "no text": "",
    "no pattern": "(",
    "-1": -1,
    "-0.5": -0.5,
    "0": 0,
    "1": 1,
    "1.5": 1.5,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "1e39": 1e39,
    "1e-50": 1e-50,
    "10**400": 10**400,
    "2**31": 2**31,
    "2**64": 2**64,
    "True": True,
    "float32": np.float32(0.5),
    "float16": np.float16(0.5),
    "int64": np.int64(2),
    "bool_": np.bool_(True),
    "str_": np.str_("nonsense"),
    "0-d float": np.array(0.5),
    "0-d int": np.array(2, "int32"),
    "0-d bool": np.array(False),
    "array": np.array([0.5, 0.25]),
    "tensor": keras.ops.convert_to_tensor([0.5, 0.25]),
    "list": [],
    "list of text": ["("],
    "list of numbers": [1.0, 2.0],
    "list of rubbish": [Nonsense()],
    "dict": {},
    "dict of text": {"(": "nonsense"},
    "class": keras.optimizers.SGD,
    "function": lambda: 0.1,
    "object": Nonsense(),
    "complex": 1j,
    "bytes": b"nonsense",
}
