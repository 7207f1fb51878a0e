"""A fresh process that saves, resumes, or goes through without a stop.

python resume.py save FOLDER SPEED     7 batches, save; 5 more, store the state
python resume.py resume FOLDER SPEED   load both kinds of file, 5 more, store

SPEED is that of the rows, "quick" or "slow".
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401,I001  (imports torch before the backend)
import keras
import numpy as np

import contract

FIRST = 7 * contract.BATCH


def main(phase, folder, speed):
    x, y = contract.data()
    for row, inner in contract.RESUMED:
        if contract.speed_of_resume(row) != speed:
            continue
        path = str(Path(folder) / f"{row.name}-{inner}")
        run(phase, path, row, contract.INNER[inner], x, y)


def run(phase, path, row, inner, x, y):
    if phase == "save":
        model = contract.compiled(
            row.build(inner()), contract.classifier(dropout=False)
        )
        contract.fit(model, x[:FIRST], y[:FIRST])
        model.save(path + ".keras")
        model.save_weights(path + ".weights.h5")
        finish(model, path + "-through.npz", x, y)
        return
    model = keras.models.load_model(path + ".keras")
    finish(model, path + "-keras.npz", x, y)
    model = contract.compiled(
        row.build(inner()), contract.classifier(dropout=False)
    )
    model.optimizer.build(model.trainable_variables)
    model.load_weights(path + ".weights.h5")
    finish(model, path + "-weights.npz", x, y)


def finish(model, path, x, y):
    contract.fit(model, x[FIRST:], y[FIRST:])
    np.savez(path, *contract.state(model))


if __name__ == "__main__":
    main(*sys.argv[1:])
