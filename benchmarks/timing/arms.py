"""What is timed: methods, the optimizers beside them, models and targets.

Keras is imported in the workers only: the functions that make optimizers are
handed `keras.optimizers` and `keras_stab`.
"""

import dataclasses
from collections.abc import Callable

STOCK = "adamw"
# The same optimizer a second time: what differs between the two is noise.
AGAIN = "adamw_again"
GRAIN = ("grain_4", "grain_8")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One optimizer.

    Attributes:
        label: In the table.
        make: From `keras.optimizers` and `keras_stab` to the optimizer.
        base: The arm that it is measured against; none for a stock optimizer.
        period: After how many steps it repeats itself. Steps of one place in
            this cycle are alike, those of others may not be.
        callbacks: From `keras_stab` to the callbacks of `fit`.
    """

    label: str
    make: Callable
    base: str | None = None
    period: int = 1
    callbacks: Callable = lambda s: ()


def _grain(groups):
    return Arm(
        f"GRAIN, K = {groups}",
        lambda k, s: s.GRAIN(k.AdamW(1e-3), groups=groups),
        STOCK,
    )


def _ire(label, **arguments):
    return Arm(label, lambda k, s: s.IRE(k.AdamW(1e-3), **arguments), STOCK, 10)


def _average(label, **arguments):
    return Arm(
        label, lambda k, s: s.WeightAveraging(k.AdamW(1e-3), **arguments), STOCK
    )


def _clipping(label, **arguments):
    return Arm(
        f"AdaptiveClipping, {label}",
        lambda k, s: s.AdaptiveClipping(k.Adam(1e-3), **arguments),
        "adam",
    )


ARMS = {
    STOCK: Arm("AdamW", lambda k, s: k.AdamW(1e-3)),
    AGAIN: Arm("AdamW again (noise)", lambda k, s: k.AdamW(1e-3), STOCK),
    "grain_4": _grain(4),
    "grain_8": _grain(8),
    "upgrad_8": Arm(
        "Aggregate, upgrad, K = 8",
        lambda k, s: s.Aggregate(k.AdamW(1e-3), "upgrad", groups=8),
        STOCK,
    ),
    "sam": Arm("SAM", lambda k, s: s.SAM(k.AdamW(1e-3)), STOCK),
    "sam_tenth": Arm(
        "SAM, every tenth update",
        lambda k, s: s.SAM(k.AdamW(1e-3), interval=10),
        STOCK,
        10,
    ),
    "ire": _ire("IRE, a quarter of the batch"),
    "ire_all": _ire("IRE, all of the batch", fisher_fraction=1.0),
    "ire_second_moment": _ire(
        "IRE, Adam's second moment", curvature="second_moment"
    ),
    "schedule_free_adamw": Arm(
        "ScheduleFree.adamw",
        lambda k, s: s.ScheduleFree.adamw(1e-3),
        STOCK,
    ),
    "mean": _average("WeightAveraging, mean"),
    "ema": _average("WeightAveraging, EMA", method="ema"),
    "adam": Arm("Adam", lambda k, s: k.Adam(1e-3)),
    "skip_spikes": Arm(
        "Adam, RecoverFromSpikes",
        lambda k, s: k.Adam(1e-3),
        "adam",
        callbacks=lambda s: (s.RecoverFromSpikes(),),
    ),
    "lamb": Arm("LAMB", lambda k, s: s.LAMB(1e-3), "adam"),
    "lookahead": Arm(
        "Lookahead", lambda k, s: s.Lookahead(k.Adam(1e-3)), "adam", 5
    ),
    "agc": _clipping("AGC"),
    "autoclip": _clipping("AutoClip", rule="percentile"),
    "zclip": _clipping("ZClip", rule="zclip"),
    "optimistic": Arm(
        "OptimisticGradient",
        lambda k, s: s.OptimisticGradient(k.Adam(1e-3)),
        "adam",
    ),
    "past": Arm(
        "PastExtraGradient",
        lambda k, s: s.PastExtraGradient(k.Adam(1e-3)),
        "adam",
    ),
    "extragradient": Arm(
        "ExtraGradient, each gradient",
        lambda k, s: s.ExtraGradient(k.Adam(1e-3)),
        "adam",
        2,
    ),
    "sgd": Arm("SGD", lambda k, s: k.SGD(0.01)),
    "schedule_free_sgd": Arm(
        "ScheduleFree.sgd", lambda k, s: s.ScheduleFree.sgd(0.01), "sgd"
    ),
    "rapp": Arm("RAPP, each gradient", lambda k, s: s.RAPP(0.01), "sgd", 3),
    "cegplus": Arm(
        "CEGPlus, each gradient", lambda k, s: s.CEGPlus(0.01), "sgd", 2
    ),
    "momentum": Arm(
        "SGD with momentum", lambda k, s: k.SGD(0.01, momentum=0.9)
    ),
    "lars": Arm(
        "LARS", lambda k, s: s.LARS(0.1, weight_decay=1e-4), "momentum"
    ),
    "tvlars": Arm(
        "TVLARS",
        lambda k, s: s.TVLARS(
            0.1, weight_decay=1e-4, decay_rate=0.1, delay=50.0
        ),
        "momentum",
    ),
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, the rows of a batch, and what trains it.

    Attributes:
        model: A name in `models.py`.
        batch: Rows.
        arms: Names in `ARMS`; with each goes its base.
        seconds: Of timed steps that all arms together may take.
        all_threads: Those of `arms` that are timed with all threads too.
        memory: Arms whose memory is measured.
        compiled: Arms that are tried with `torch.compile`.
    """

    model: str
    batch: int
    arms: tuple = ("grain_8",)
    seconds: float = 8.0
    all_threads: tuple = ()
    memory: tuple = ()
    compiled: tuple = ()

    @property
    def name(self):
        return f"{self.model} {self.batch}"

    def all_arms(self, threads=1):
        """The arms, each behind the one that it is measured against."""
        names = [STOCK, AGAIN]
        for arm in self.arms if threads == 1 else self.all_threads:
            names += [ARMS[arm].base or arm, arm]
        return list(dict.fromkeys(names))


METHODS = tuple(n for n, arm in ARMS.items() if arm.base and n != AGAIN)
_KEEPING_WEIGHTS = ("lookahead", "optimistic", "past", "extragradient")
WORKLOADS = (
    # Small enough that what a method does beside the gradient shows.
    Workload(
        "mlp",
        64,
        METHODS,
        seconds=30.0,
        all_threads=("grain_8", "sam", "ire", "schedule_free_adamw"),
        compiled=("grain_8", "sam", "schedule_free_adamw"),
    ),
    Workload("mlp", 256, memory=(STOCK, "grain_8")),
    Workload("bn_mlp", 64),
    Workload(
        "cnn",
        64,
        ("grain_8", "lars"),
        memory=(STOCK, "grain_8"),
    ),
    Workload(
        "transformer",
        64,
        (*GRAIN, "sam"),
        seconds=10.0,
        all_threads=("grain_8",),
        memory=(STOCK, "grain_8"),
    ),
)
# Measured when they are asked for by name.
MORE_WORKLOADS = (
    Workload("encoder", 32, GRAIN, seconds=40.0, memory=(STOCK, *GRAIN)),
    Workload("lora", 32, GRAIN, seconds=40.0, memory=(STOCK, *GRAIN)),
    Workload("resnet", 64, ("lars", "tvlars", "lamb"), seconds=60.0),
    # Ten million weights: what passes over them costs.
    Workload("wide", 256, (*_KEEPING_WEIGHTS, "rapp", "cegplus"), seconds=60.0),
)
ALL_WORKLOADS = (*WORKLOADS, *MORE_WORKLOADS)
MODELS = tuple(dict.fromkeys(w.model for w in ALL_WORKLOADS))

# Ratio of CPU time that is hoped for: a number, or one for a backend.
_ON_THE_PERCEPTRON = {
    **dict.fromkeys(GRAIN, {"torch": 1.15, "tensorflow": 1.15, "jax": 1.10}),
    # That of GRAIN and 2 %.
    "upgrad_8": {"torch": 1.17, "tensorflow": 1.17, "jax": 1.12},
    **dict.fromkeys(("ire", "ire_all", "ire_second_moment"), 1.08),
    "sam": {"torch": 1.95},
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_sgd", "lamb"), 1.08),
    **dict.fromkeys(("mean", "ema"), {"jax": 1.05, "tensorflow": 1.05}),
    **dict.fromkeys(("optimistic", "past"), 1.08),
    "lookahead": 1.03,
    "agc": 1.05,
    "skip_spikes": 1.02,
}
TARGETS = {
    "mlp 64": _ON_THE_PERCEPTRON,
    "mlp 256": {"grain_8": 1.20},
    "bn_mlp 64": {"grain_8": 1.25},
    "cnn 64": {"grain_8": 1.05},
    "transformer 64": {
        "grain_4": {"torch": 1.08},
        "grain_8": {"torch": 1.10},
    },
}
# Seconds of the first step over those of the stock optimizer.
FIRST_STEP_TARGETS = {("mlp 64", "grain_8", "jax"): 2.0}
# Milliseconds on the host, by the number of groups.
SOLVER_TARGETS = {8: 0.1, 64: 1.0}


def target(backend, workload, arm):
    """The ratio that is hoped for, or `None`."""
    found = TARGETS.get(workload, {}).get(arm)
    return found.get(backend) if isinstance(found, dict) else found
