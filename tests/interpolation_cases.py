"""Optimizers for the rows of `vectors/rapp.json`, and its test problems."""

import contextlib
import json
from pathlib import Path

import keras
import numpy as np

import keras_stab
from keras_stab.constraints import L1
from keras_stab.constraints import Box
from keras_stab.constraints import L2Ball

BACKEND = keras.backend.backend()
VECTORS = json.loads(
    (Path(__file__).parent / "vectors" / "rapp.json").read_text()
)
SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam

DOMAINS = {
    "bilinear_shift_box": Box(-1.0, 1.0),
    "quadratic_box": Box(-1.1, 1.1),
    "polar_a1/3": Box(-1.1, 1.1),
    "polar_a3/4": Box(-1.1, 1.1),
    "polar_a1": Box(-1.1, 1.1),
    "global_forsaken_ball": L2Ball(4 / 3),
    "forsaken_box": Box(-1.5, 1.5),
}


def _quadratic(x, y):
    a, b = 8.0**0.5, -1.0
    return b * x + a * y, -a * x + b * y


def _polar(a):
    def field(x, y):
        square = x * x + y * y
        q = a * (square - 1.0) * (16.0 * square - 9.0) / 16.0
        return x * q - y, y * q + x

    return field


def _global_forsaken(x, y):
    def slope(t):
        return 4 * t**5 / 7 - 4 * t**3 / 3 + 2 * t / 3

    return y + slope(x), -x + slope(y)


def _forsaken(x, y):
    def slope(t):
        return t / 2 - 2 * t**3 + t**5

    return y - 0.45 + slope(x), -x + slope(y)


FIELDS = {
    "bilinear": lambda x, y: (y, -x),
    "bilinear_shift_box": lambda x, y: (y - 0.9, 0.9 - x),
    "quadratic": _quadratic,
    "quadratic_box": _quadratic,
    "polar_a1/3": _polar(1 / 3),
    "polar_a3/4": _polar(3 / 4),
    "polar_a1": _polar(1.0),
    "global_forsaken_ball": _global_forsaken,
    "forsaken_box": _forsaken,
    "forsaken_free": _forsaken,
}


@contextlib.contextmanager
def float64():
    """Double precision; JAX has none unless it is told."""
    with contextlib.ExitStack() as stack:
        if BACKEND == "jax":
            import jax

            stack.enter_context(jax.enable_x64())
        keras.config.set_floatx("float64")
        stack.callback(keras.config.set_floatx, "float32")
        yield


def method(name, params):
    """The optimizer of a row of trajectories."""
    rate = params["gamma"]
    if name.startswith("LA-"):
        inner = method(name[3:], {k: params[k] for k in params if k != "tau"})
        return keras_stab.Lookahead(inner, params["tau"], params["lambda"])
    if name in ("RAPP", "APP"):
        return keras_stab.RAPP(
            rate,
            inner_steps=params["tau"],
            relaxation=params.get("lambda", 1.0),
        )
    if name in ("EG", "CEG+"):
        return keras_stab.CEGPlus(rate, alpha=params.get("alpha", 1.0))
    if name in ("EG+", "P2-EG+"):
        return keras_stab.ExtraGradient(SGD(rate), params["alpha"])
    return SGD(rate)


def applied(row):
    """The optimizer of a row of apply sequences, `None` for other rows."""
    name, p = row["name"], row["params"]
    if "WRONG" in name or "alternating" in name:
        return None

    def inner():
        if "beta_1" not in p:
            return SGD(p.get("lr", p.get("gamma")), p.get("momentum", 0.0))
        return Adam(p["lr"], p["beta_1"], p["beta_2"], p["epsilon"])

    if "per-player" in name:
        players = [
            keras_stab.RAPP(p[g], p["tau"], p["lambda"], name=g)
            for g in ("gamma_x", "gamma_y")
        ]
        return keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(players[0], {"(.*/)?y": players[1]})
        )
    if name.startswith("RAPP"):
        penalty = L1(p["l1_weight"]) if "l1_weight" in p else None
        return keras_stab.RAPP(p["gamma"], p["tau"], p["lambda"], penalty)
    if name == "CEG+":
        return keras_stab.CEGPlus(p["gamma"], p["alpha"])
    if name.startswith(("EG+", "P2-EG+", "ExtraAdam")):
        kind = "separate" if "separate" in name else "shared"
        scale = p.get("alpha", 1.0)
        return keras_stab.ExtraGradient(inner(), scale, moments=kind)
    if name.startswith("LA-CEG+"):
        base = keras_stab.CEGPlus(p["gamma"], p["alpha"])
        return keras_stab.Lookahead(base, p["k"], p["lambda"])
    if name.startswith("nested"):
        base = keras_stab.Lookahead(inner(), p["k_inner"], p["lambda_inner"])
        return keras_stab.Lookahead(base, p["k_outer"], p["lambda_outer"])
    if name.startswith("LA-"):
        state = name.split()[-1]
        state = state if state in ("reset", "pullback") else "keep"
        return keras_stab.Lookahead(inner(), p["k"], p["lambda"], state)
    if name.startswith("OGDA"):
        first = "zero" if "-2*lr" in name else "repeat"
        return keras_stab.OptimisticGradient(inner(), first)
    if name.startswith("optimistic"):
        return keras_stab.OptimisticGradient(inner())
    if name.startswith("past"):
        return keras_stab.PastExtraGradient(inner())
    return inner()


class Fed(keras.Model):
    """Two scalar weights whose gradients are what the batch says."""

    def __init__(self, start, domain=None):
        super().__init__()
        self.pair = [
            self.add_weight(
                shape=(),
                name=name,
                constraint=domain,
                initializer=keras.initializers.Constant(value),
                dtype=keras.config.floatx(),
            )
            for name, value in zip("xy", start)
        ]
        self.built = True

    def call(self, inputs):
        return inputs

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        field = keras.ops.cast(x[0], self.pair[0].dtype)
        return field[0] * self.pair[0] + field[1] * self.pair[1]

    def point(self):
        return [float(v) for v in self.get_weights()]


class Walk:
    """Where an optimizer leads in the field of a problem, compiled."""

    def __init__(self, optimizer, field, start, domain=None):
        self.optimizer = optimizer
        # The two players are the first axis; further ones are other games.
        self.field = lambda z: keras.ops.stack(field(z[0], z[1]))
        self.z = keras.Variable(np.array(start), dtype=keras.config.floatx())
        self.z.constraint = domain
        optimizer.build([self.z])
        self.step = getattr(self, f"_{BACKEND}")()

    def _jax(self):
        import jax

        def body(_, state):
            weights, slots = state
            gradient = self.field(weights[0])
            return list(
                map(
                    list,
                    self.optimizer.stateless_apply(slots, [gradient], weights),
                )
            )

        many = jax.jit(
            lambda n, state: jax.lax.fori_loop(0, n, body, state),
        )

        def step(applies):
            state = [
                [self.z.value],
                [v.value for v in self.optimizer.variables],
            ]
            weights, slots = many(applies, state)
            self.z.assign(weights[0])
            for variable, value in zip(self.optimizer.variables, slots):
                variable.assign(value)

        return step

    def _tensorflow(self):
        import tensorflow as tf

        @tf.function(autograph=False)
        def once():
            gradient = self.field(tf.convert_to_tensor(self.z.value))
            self.optimizer.apply([gradient], [self.z])

        return lambda applies: [once() for _ in range(applies)]

    def _torch(self):
        import torch

        def step(applies):
            with torch.no_grad():
                for _ in range(applies):
                    gradient = self.field(self.z.value)
                    self.optimizer.apply([gradient], [self.z])

        return step

    def point(self):
        return np.array(keras.ops.convert_to_numpy(self.z.value))


def walk(problem, name, params, start):
    """The path of a method through one of the problems."""
    optimizer = method(name, params)
    return Walk(optimizer, FIELDS[problem], start, DOMAINS.get(problem))


def applies_per_step(name, params):
    """Gradients from one outer point to the next."""
    if name.startswith("LA-"):
        return params["tau"] * applies_per_step(name[3:], params)
    if name in ("RAPP", "APP"):
        return params["tau"]
    return 1 if name == "GDA" else 2
