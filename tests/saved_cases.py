"""Files written by version 0.1 of every family, and what trained on from them.

`python tests/saved_cases.py` wrote the files in `tests/saved` on JAX, before
the modules of the package were moved: names in a saved file are promises.
Run it again only for a method that is added.
"""

import json
import sys
from pathlib import Path

import keras
import numpy as np

import keras_stab

FOLDER = Path(__file__).with_name("saved")
FEATURES, CLASSES, BATCH = 4, 3, 8
BEFORE, AFTER = 5, 4

METHODS = {
    "grain": lambda: keras_stab.GRAIN(adamw(), groups=4),
    "grain_batches": lambda: keras_stab.GRAIN(
        adamw(), groups=3, across="batches"
    ),
    "ire_sam": lambda: keras_stab.IRE(
        keras_stab.SAM(sgd(), rho=0.1),
        update_every=2,
        curvature="gradient",
    ),
    "tvlars": lambda: keras_stab.TVLARS(
        0.1, trust_coefficient=0.1, decay_rate=0.5, delay=2.0, floor=0.01
    ),
    "lamb": lambda: keras_stab.LAMB(
        keras_stab.WarmupCosine(0.01, warmup_steps=3, total_steps=20)
    ),
    "averaging": lambda: keras_stab.WeightAveraging(adamw(), start_step=2),
    "averaged_sgd": lambda: keras_stab.AveragedSGD(
        keras_stab.ConstantTail(0.1, 0.05, tail_step=4)
    ),
    "schedule_free": lambda: keras_stab.ScheduleFree(
        keras.optimizers.SGD(0.05)
    ),
    "lookahead": lambda: keras_stab.Lookahead(adamw(), sync_period=4),
    "rapp": lambda: keras_stab.RAPP(
        0.1, inner_steps=3, proximal=keras_stab.constraints.Box(-1.0, 1.0)
    ),
    "extragradient": lambda: keras_stab.ExtraGradient(sgd()),
    "loss_scale": lambda: keras.optimizers.LossScaleOptimizer(
        keras_stab.Lookahead(keras_stab.GRAIN(adamw(), groups=2))
    ),
}


def adamw():
    return keras.optimizers.AdamW(0.01, weight_decay=0.01, global_clipnorm=1.0)


def sgd():
    return keras.optimizers.SGD(0.05, momentum=0.9)


def data():
    draw = np.random.default_rng(5)
    x = draw.normal(size=((BEFORE + AFTER) * BATCH, FEATURES))
    labels = draw.integers(0, CLASSES, size=len(x))
    return x.astype("float32"), labels.astype("int32")


def classifier():
    draw = np.random.default_rng(6)
    model = keras.Sequential(
        [
            keras.Input((FEATURES,)),
            # No bias: before batch-norm its gradient is rounding alone.
            keras.layers.Dense(6, use_bias=False, name="hidden"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Activation("tanh"),
            keras.layers.Dense(CLASSES, name="head"),
        ]
    )
    for variable in model.trainable_variables:
        if variable.path.endswith("kernel"):
            variable.assign(0.5 * draw.normal(size=tuple(variable.shape)))
    return model


def compiled(method):
    model = classifier()
    model.compile(
        optimizer=METHODS[method](),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def fit(model, first, last):
    x, y = data()
    rows = slice(first * BATCH, last * BATCH)
    model.fit(x[rows], y[rows], batch_size=BATCH, shuffle=False, verbose=0)
    keras_stab.return_trained_weights(model)


def state(model):
    """Every number that training goes on from."""
    variables = [*model.variables, *model.optimizer.variables]
    return [np.asarray(keras.ops.convert_to_numpy(v)) for v in variables]


def as_lists(model):
    """The state for a JSON file, which knows no NaN."""
    return [
        np.where(np.isnan(v), None, v.astype(object)).tolist()
        for v in state(model)
    ]


def write(method):
    model = compiled(method)
    fit(model, 0, BEFORE)
    model.save(FOLDER / f"{method}.keras")
    model.save_weights(FOLDER / f"{method}.weights.h5")
    record = {"saved": as_lists(model)}
    fit(model, BEFORE, BEFORE + AFTER)
    record["continued"] = as_lists(model)
    text = json.dumps(record, allow_nan=False)
    (FOLDER / f"{method}.json").write_text(text + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:] or METHODS:
        write(name)
