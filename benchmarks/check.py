"""Holds the compiler's count of a GRAIN step against fixed limits.

    KERAS_BACKEND=jax python benchmarks/check.py

XLA tells how many FLOPs a compiled step has and how much temporary memory it
takes. Both are the same on a busy machine, so that a limit that is passed is
a fault. The limits are in `thresholds.toml`; the exit status is 1 when one is
passed.
"""

import os
import sys
import tomllib
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np
from rich.console import Console
from rich.table import Table

import keras_stab

ROWS = 32
BLOCKS = 2
HEADS = 4
CLASSES = 10


def encoder(positions, width):
    """Encoder blocks on real-valued tokens, without dropout."""
    layers = keras.layers
    inputs = keras.Input((positions, width))
    x = inputs
    for _ in range(BLOCKS):
        y = layers.LayerNormalization()(x)
        y = layers.MultiHeadAttention(HEADS, width // HEADS)(y, y)
        x = x + y
        y = layers.LayerNormalization()(x)
        y = layers.Dense(4 * width, activation="gelu")(y)
        x = x + layers.Dense(width)(y)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


def count(tokens, width, optimizer):
    """FLOPs and bytes of temporary memory of the compiled train step."""
    rows = min(ROWS, tokens)
    keras.utils.set_random_seed(1)
    model = encoder(tokens // rows, width)
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    x = np.zeros((rows, tokens // rows, width), "float32")
    y = np.zeros((rows,), "int32")
    model.train_on_batch(x, y)
    state = tuple(
        [v.value for v in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
    )
    step = jax.jit(model.train_step, donate_argnums=0)
    compiled = step.lower(state, (x, y)).compile()
    memory = compiled.memory_analysis()
    return (
        compiled.cost_analysis()["flops"],
        # What is returned is written over what came in.
        memory.temp_size_in_bytes,
    )


def check(gate, stock):
    """The ratios of a gate, and whether they are within its limits."""
    optimizer = keras_stab.GRAIN(
        keras.optimizers.AdamW(1e-3),
        groups=gate["groups"],
        engine=gate["engine"],
    )
    own = count(gate["tokens"], gate["width"], optimizer)
    ratios = dict(zip(("flops", "memory"), (a / b for a, b in zip(own, stock))))
    return ratios, all(
        ratios[kind] <= gate[kind] for kind in ratios if kind in gate
    )


def main():
    path = Path(__file__).with_name("thresholds.toml")
    gates = tomllib.loads(path.read_text())["gate"]
    table = Table("gate", "N", "d", "K", "FLOPs", "memory", "")
    stock = {}
    failed = False
    for gate in gates:
        size = gate["tokens"], gate["width"]
        if size not in stock:
            stock[size] = count(*size, keras.optimizers.AdamW(1e-3))
        ratios, passed = check(gate, stock[size])
        failed = failed or not passed
        table.add_row(
            gate["name"],
            *(str(gate[key]) for key in ("tokens", "width", "groups")),
            *(
                f"{ratios[kind]:.2f}"
                + (f" (limit {gate[kind]:.2f})" if kind in gate else "")
                for kind in ("flops", "memory")
            ),
            "within" if passed else "over",
        )
    Console(width=110).print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
