"""
Title: A small language model, with and without IRE
Date created: 2026/11/21
Last modified: 2026/11/21
Description: Does IRE around AdamW save steps? With the controls that it takes.
Accelerator: NONE
"""

"""
A decoder of the Llama kind (rotary positions, RMS normalisation, gated layers,
no biases) learns to predict the characters of a text. IRE makes the step of
AdamW larger along the weights in which the loss is flat. These arms have the
same seeds, batches and learning rate:

- AdamW for T steps, and for 2 T steps with a schedule of its own length;
- IRE around AdamW for T steps, from the end of the warm-up on;
- the same with a random mask, redrawn at every refresh;
- the same with the inverse mask: the sharpest weights are boosted;
- every weight boosted so that the sum of the factors is the same.

The last three say whether it is the curvature that helps, or larger steps.

    KERAS_BACKEND=jax python guides/faster_pretraining.py --data input.txt

Any text will do; what comes with this guide was made of the 1.1 million
characters of Shakespeare that are known as `tinyshakespeare/input.txt`. One
text, one small model, few steps: the result speaks of those alone.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import argparse
import json
import pathlib

import keras
import numpy as np
from keras import layers
from keras import ops
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import keras_stab

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise SystemExit(
        f"The guide needs {error.name}. Install it with\n"
        '  pip install "keras-stab[demo]"'
    ) from error

"""
## The text
"""

LENGTH = 64
BATCH = 16
VALIDATION_ROWS = 256
POINTS = 12


def load_text(path):
    """Characters as numbers: nine tenths to train on, the rest to validate."""
    if not path.is_file():
        raise SystemExit(f"There is no text at {path}")
    text = path.read_text(encoding="utf-8")
    alphabet = sorted(set(text))
    number = {character: i for i, character in enumerate(alphabet)}
    ids = np.array([number[c] for c in text], "int32")
    cut = int(0.9 * len(ids))
    if len(ids) - cut <= LENGTH + 1:
        raise SystemExit(f"The text at {path} is too short")
    return ids[:cut], ids[cut:], len(alphabet)


def windows(ids, count, seed):
    """Rows of consecutive characters, and the character after each."""
    starts = np.random.default_rng(seed).integers(
        0, len(ids) - LENGTH - 1, count
    )
    rows = ids[starts[:, None] + np.arange(LENGTH + 1)]
    return rows[:, :-1], rows[:, 1:]


"""
## The model
"""

WIDTH = 64
HEADS = 4
BLOCKS = 2


class Attention(layers.Layer):
    """Causal attention with rotary positions."""

    def build(self, shape):
        self.inward = layers.Dense(3 * WIDTH, use_bias=False)
        self.outward = layers.Dense(WIDTH, use_bias=False)
        self.inward.build(shape)
        self.outward.build(shape)

    def call(self, x):
        size = WIDTH // HEADS
        joined = ops.reshape(self.inward(x), (-1, LENGTH, 3, HEADS, size))
        q, k, v = (
            ops.transpose(joined[:, :, i], (0, 2, 1, 3)) for i in range(3)
        )
        frequencies = 1e4 ** (-np.arange(size // 2) / (size // 2))
        angles = np.outer(np.arange(LENGTH), frequencies)
        cosine = ops.convert_to_tensor(np.cos(angles), "float32")
        sine = ops.convert_to_tensor(np.sin(angles), "float32")
        q, k = (self.rotated(t, cosine, sine) for t in (q, k))
        scores = ops.matmul(q, ops.swapaxes(k, -1, -2)) / size**0.5
        future = ops.convert_to_tensor(
            np.triu(np.full((LENGTH, LENGTH), -1e9), 1), "float32"
        )
        mixed = ops.matmul(ops.softmax(scores + future), v)
        mixed = ops.transpose(mixed, (0, 2, 1, 3))
        return self.outward(ops.reshape(mixed, (-1, LENGTH, WIDTH)))

    def rotated(self, x, cosine, sine):
        a, b = ops.split(x, 2, axis=-1)
        return ops.concatenate(
            [a * cosine - b * sine, a * sine + b * cosine], axis=-1
        )


def make_model(characters):
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(characters, WIDTH)(inputs)
    for _ in range(BLOCKS):
        x = x + Attention()(layers.RMSNormalization()(x))
        y = layers.RMSNormalization()(x)
        gate = layers.Dense(2 * WIDTH, "silu", use_bias=False)(y)
        y = gate * layers.Dense(2 * WIDTH, use_bias=False)(y)
        x = x + layers.Dense(WIDTH, use_bias=False)(y)
    x = layers.RMSNormalization()(x)
    return keras.Model(inputs, layers.Dense(characters, use_bias=False)(x))


"""
## The arms

The learning rate was chosen for AdamW at T steps, among 1, 3, 6, 10 and 20
times 1e-3, on seed 100, and is reused for all.
"""

FLAT = 0.6
BOOST = 3.0
LEARNING_RATE = 1e-2


class RandomMask(keras_stab.IRE):
    """Ranks by random numbers."""

    def fisher_roots(self, oracle, step):
        with self.drawing(step) as seed:
            return [
                keras.random.uniform(v.shape, seed=seed)
                for v in oracle.variables
            ], 1.0


class InverseMask(keras_stab.IRE):
    """Takes the sharpest weights for the flattest."""

    def fisher_roots(self, oracle, step):
        roots, size = super().fisher_roots(oracle, step)
        return [1.0 / (ops.abs(root) + 1e-15) for root in roots], size


def boosted(kind, fraction=FLAT, boost=BOOST):
    return lambda base: kind(
        base, flat_fraction=fraction, boost=boost, start_step="warmup_end"
    )


ARMS = {
    "AdamW, T": lambda base: base,
    "AdamW, 2 T": lambda base: base,
    "IRE, T": boosted(keras_stab.IRE),
    "random mask, T": boosted(RandomMask),
    "inverse mask, T": boosted(InverseMask),
    "every weight, T": boosted(keras_stab.IRE, 1.0, FLAT * BOOST),
}


def train(arm, steps, seed, text, advance):
    """Validation losses along one run, and where they were taken."""
    train_ids, valid_ids, characters = text
    steps = 2 * steps if arm.endswith("2 T") else steps
    warmup = max(1, steps // 20)
    keras.utils.set_random_seed(seed)
    model = make_model(characters)
    base = keras.optimizers.AdamW(
        keras_stab.WarmupCosine(LEARNING_RATE, warmup, steps, 0.05),
        beta_2=0.95,
        weight_decay=0.1,
        global_clipnorm=1.0,
    )
    model.compile(
        ARMS[arm](base),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    x, y = windows(train_ids, steps * BATCH, seed)
    validation = windows(valid_ids, VALIDATION_ROWS, 0)
    ends = np.linspace(0, steps, POINTS + 1).astype(int)[1:]
    curve, done = [], 0
    for end in ends:
        if end > done:
            rows = slice(done * BATCH, end * BATCH)
            model.fit(
                x[rows], y[rows], batch_size=BATCH, shuffle=False, verbose=0
            )
            advance(end - done)
            done = end
        loss = model.evaluate(*validation, batch_size=64, verbose=0)
        curve.append(float(loss))
    return {"steps": ends.tolist(), "loss": curve}


def run_all(text, steps, seeds, console):
    runs = {arm: [] for arm in ARMS}
    with Progress(console=console) as progress:
        task = progress.add_task("", total=(len(ARMS) + 1) * steps * seeds)
        for seed in range(seeds):
            for arm in ARMS:
                progress.update(task, description=f"seed {seed}, {arm}")
                runs[arm].append(
                    train(
                        arm,
                        steps,
                        seed,
                        text,
                        lambda n: progress.advance(task, n),
                    )
                )
    return runs


"""
## What comes out
"""


def make_table(runs, seeds):
    table = Table(
        title=f"Validation loss at the end, nats a character, {seeds} seed(s)"
    )
    table.add_column("Arm")
    table.add_column("Mean", justify="right")
    table.add_column("Against AdamW, T, by seed", justify="right")
    base = np.array([run["loss"][-1] for run in runs["AdamW, T"]])
    for arm, own in runs.items():
        ends = np.array([run["loss"][-1] for run in own])
        table.add_row(
            arm,
            f"{ends.mean():.3f}",
            " ".join(f"{d:+.3f}" for d in ends - base),
        )
    return table


STYLES = {
    "AdamW, T": ("#4477aa", "-"),
    "AdamW, 2 T": ("#4477aa", "--"),
    "IRE, T": ("#cc5511", "-"),
    "random mask, T": ("#888888", "-"),
    "inverse mask, T": ("#aa3377", ":"),
    "every weight, T": ("#228833", "-."),
}


def draw(runs, steps, path):
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    for arm, own in runs.items():
        color, line = STYLES[arm]
        mean = np.mean([run["loss"] for run in own], axis=0)
        left.plot(own[0]["steps"], mean, line, color=color, label=arm)
    ends = [r["loss"][-1] for own in runs.values() for r in own]
    left.set_ylim(min(ends) - 0.02, min(ends) + 0.6)
    left.set_xlabel("Step")
    left.set_ylabel("Validation loss, nats a character")
    left.set_title("During training, mean over seeds")
    left.legend(frameon=False)
    for place, (arm, own) in enumerate(runs.items()):
        values = [run["loss"][-1] for run in own]
        right.scatter([place] * len(values), values, color=STYLES[arm][0])
    right.set_xticks(range(len(runs)), runs, rotation=35, ha="right")
    right.set_title(f"At the end (T = {steps}), a dot a seed")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description="AdamW with and without IRE.")
    add = parser.add_argument
    add(
        "--data",
        type=pathlib.Path,
        required=True,
        help="a text file, in UTF-8",
    )
    add("--steps", type=int, default=500, help="T (default: 500)")
    add("--seeds", type=int, default=2, help="default: 2")
    add(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("faster_pretraining.png"),
    )
    add("--json", type=pathlib.Path, help="also write all numbers there")
    options = parser.parse_args(argv)
    if options.steps < 2 or options.seeds < 1:
        parser.error("--steps must be at least 2, --seeds at least 1")
    console = Console()
    text = load_text(options.data)
    runs = run_all(text, options.steps, options.seeds, console)
    console.print(make_table(runs, options.seeds))
    draw(runs, options.steps, options.output)
    console.print(f"Picture: {options.output}", soft_wrap=True)
    if options.json:
        options.json.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
