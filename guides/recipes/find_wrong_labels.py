"""Find the wrong labels by the gradients of single rows

Three of ten labels of 384 digits are wrong, as in guides/demo.py. A row of
which no other row's gradient has the direction (by the ten most similar ones)
is suspected; the control suspects the rows of the highest loss. Printed: how
many of the suspects are wrong, of as many as there are wrong labels, over
eight seeds. On PyTorch, after 10 epochs 92.1 % by the loss and 90.0 % by the
gradients, which cannot be told apart; after 80, when wrong labels are learned
by heart, 64.3 % and 82.3 %, which can (18 points, interval 14 to 22). The
measure was chosen on other seeds (below 10, 100 to 105). 30 s of CPU time.
"""

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_stab

FIRST_SEED, SEEDS, ROWS, WRONG = 10, 8, 384, 0.3
EPOCHS = 10, 80


def data_of(seed):
    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype("float32"), y.astype("int32")
    x, _, y, _ = train_test_split(x, y, train_size=ROWS, random_state=seed)
    random = np.random.default_rng(seed)
    wrong = np.arange(ROWS) < round(WRONG * ROWS)
    random.shuffle(wrong)
    return x, np.where(wrong, (y + random.integers(1, 10, ROWS)) % 10, y), wrong


def precision(scores, wrong):
    scores = keras.ops.convert_to_numpy(scores)
    return wrong[np.argsort(-scores)[: wrong.sum()]].mean()


found = {epochs: {"gradients": [], "loss": []} for epochs in EPOCHS}
for seed in range(FIRST_SEED, FIRST_SEED + SEEDS):
    x, y, wrong = data_of(seed)
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((64,))])
    for units, activation in ((128, "relu"), (128, "relu"), (10, None)):
        model.add(keras.layers.Dense(units, activation))
    loss = keras.losses.SparseCategoricalCrossentropy(True, reduction=None)
    model.compile(keras.optimizers.AdamW(2e-3), type(loss)(True))
    for start, epochs in zip((0, *EPOCHS), EPOCHS):
        model.fit(x, y, 64, epochs=epochs, initial_epoch=start, verbose=0)
        rows = keras_stab.group_gradients(model, x, y, "rows", verbose=0)
        nearest = np.sort(rows.cosines - 2 * np.eye(ROWS))[:, -10:]
        losses = loss(y, model.predict(x, verbose=0))
        found[epochs]["gradients"].append(precision(-nearest.mean(1), wrong))
        found[epochs]["loss"].append(precision(losses, wrong))
for epochs, ways in found.items():
    shares = [f"{way} {np.mean(s):.1%}" for way, s in ways.items()]
    print(f"{epochs} epochs, chance {WRONG:.0%}:", ", ".join(shares))
    if SEEDS > 1:
        print(keras_stab.compare_scores(*ways.values(), names=[*ways]).verdict)
