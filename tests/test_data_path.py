"""Models that make their inputs of raw data, as KerasHub's tasks do.

What `fit` takes, everything else that is handed data takes too.
"""

import keras
import numpy as np
import pytest
from keras import layers
from test_keras_hub import LABELS
from test_keras_hub import SENTENCES
from test_keras_hub import TEXTS as STORIES
from test_keras_hub import make_classifier
from test_keras_hub import make_language_model
from test_keras_hub import preprocessed
from test_keras_hub import slow_unless_torch

import keras_stab
from keras_stab.batches import own_batch

TEXTS = ["a", "bc", "bcd", "a b", "", "word", "of", "some text"]
Y = np.arange(8) % 2


class Lengths(keras.Model):
    """Counts characters and spaces; a model with its own data path."""

    renorm = False

    def __init__(self):
        super().__init__()
        self.norm = layers.BatchNormalization(renorm=self.renorm)
        self.head = layers.Dense(2)

    def call(self, x, training=False):
        return self.head(self.norm(x, training=training))

    def preprocess_samples(self, x, y=None, sample_weight=None):
        assert all(type(text) is str for text in x)
        x = np.array([[len(t), t.count(" ")] for t in x], "float32")
        return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)

    def fit(self, x, y, **arguments):
        return super().fit(*self.preprocess_samples(x, y), **arguments)


class Plain(Lengths):
    """The same without it."""

    preprocess_samples = None


COUNTS = np.array([[len(t), t.count(" ")] for t in TEXTS], "float32")


def make(kind=Lengths):
    keras.utils.set_random_seed(3)
    model = kind()
    model(COUNTS[:1])
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return model


class Pairs(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        rows = slice(4 * i, 4 * i + 4)
        return np.array(TEXTS)[rows], Y[rows]


DATA = {
    "lists": (TEXTS, Y.tolist()),
    "arrays": (np.array(TEXTS), Y),
    "bytes": (np.array([t.encode() for t in TEXTS]), Y),
    "objects": (np.array(TEXTS, dtype=object), Y),
    "batches": [(TEXTS[:4], Y[:4]), (TEXTS[4:], Y[4:].tolist())],
    "dataset": Pairs(),
}


@pytest.mark.parametrize("form", DATA)
def test_all_forms_of_raw_data(form):
    options = {"batch_size": 4, "measures": "sam", "verbose": 0}
    expected = keras_stab.sharpness(make(Plain), (COUNTS, Y), **options)
    found = keras_stab.sharpness(make(), DATA[form], **options)
    assert found.as_dict() == expected.as_dict()


def test_everything_that_takes_data():
    line = [
        keras_stab.loss_landscape(model, data, points=3, verbose=0).losses
        for model, data in ((make(Plain), (COUNTS, Y)), (make(), (TEXTS, Y)))
    ]
    np.testing.assert_array_equal(*line)
    for data in (TEXTS, (TEXTS, Y), [TEXTS[:4], TEXTS[4:]]):
        model = make()
        keras_stab.reestimate_batch_norm(model, data, verbose=0)
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(model.norm.moving_mean),
            COUNTS.mean(axis=0),
            rtol=1e-6,
        )
    histories = []
    for kind, data in ((Plain, COUNTS), (Lengths, TEXTS)):
        model = make(kind)
        monitor = keras_stab.StabilityMonitor(probe=(data, Y), groups=2)
        arguments = {"callbacks": [monitor], "verbose": 0, "shuffle": False}
        if kind is Plain:
            histories.append(keras.Model.fit(model, data, Y, **arguments))
        else:
            histories.append(model.fit(data, Y, **arguments))
    old, new = (history.history for history in histories)
    assert set(old) == set(new)
    for name, values in old.items():
        np.testing.assert_array_equal(values, new[name])


def test_plan(capsys, monkeypatch):
    monkeypatch.setattr(Lengths, "renorm", True)
    plans = []
    for model, x in ((make(), TEXTS), (make(Plain), COUNTS)):
        plan = keras_stab.GRAIN("sgd", groups=2).plan(model, x, Y)
        assert plan.engine == "microbatch"
        plans.append(plan.reason.replace(model.norm.name, "norm"))
    assert plans[0] == plans[1]
    assert "'norm' (BatchNormalization) normalises" in plans[0]
    capsys.readouterr()


class Table:
    """What `fit` uses of a table of pandas."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def __array__(self, *arguments, **named):
        return np.array(self.array, *arguments)

    def to_numpy(self):
        return self.array

    def __iter__(self):
        return iter("ab")  # the names of the columns


def test_tables():
    """A column is a feature or a target, as in `fit`."""
    expected = keras_stab.sharpness(make(Plain), (COUNTS, Y), verbose=0)
    for y in (Table(Y), Table(Y[:, None])):
        found = keras_stab.sharpness(make(Plain), (Table(COUNTS), y), verbose=0)
        assert found.as_dict() == expected.as_dict()
    model = make(Plain)
    keras_stab.reestimate_batch_norm(model, Table(COUNTS), verbose=0)
    mean = keras.ops.convert_to_numpy(model.norm.moving_mean)
    np.testing.assert_allclose(mean, COUNTS.mean(axis=0), rtol=1e-6)


def test_text_without_a_preprocessor():
    model = make(Plain)
    for data in ((np.array([TEXTS] * 2).T, Y), (TEXTS, Y)):
        with pytest.raises(ValueError) as error:
            keras_stab.sharpness(model, data, verbose=0)
        if keras.backend.backend() != "tensorflow":  # has tensors of text
            assert "Text needs a model that preprocesses" in str(error.value)
    with pytest.raises(ValueError, match="arrays with one row per sample"):
        keras_stab.sharpness(model, (COUNTS, 3), verbose=0)


@pytest.mark.parametrize(
    "task, data",
    [
        pytest.param(task, data, marks=slow_unless_torch)
        for task, data in (
            (make_classifier, (SENTENCES, LABELS)),
            (make_language_model, (STORIES,)),
        )
    ],
)
def test_tasks_of_keras_hub(task, data):
    task = task()
    task.compile(keras_stab.AveragedSGD(0.01), loss=task.loss, run_eagerly=True)
    monitor = keras_stab.StabilityMonitor(probe=data, groups=2)
    history = task.fit(*data, verbose=0, callbacks=[monitor]).history
    assert np.isfinite(history["probe/norm_ratio"][0])
    keras_stab.reestimate_batch_norm(task, data, verbose=0)
    raw = keras_stab.sharpness(task, data, measures="sam", verbose=0)
    plan = keras_stab.GRAIN("sgd", groups=2).plan(task, *data)
    assert plan.engine in ("one_pass", "microbatch")
    # The exported model takes what the task takes.
    plain = keras_stab.export_averaged(task)
    assert type(plain) is type(task) and not plain.compiled
    assert plain.optimizer is None
    with keras_stab.averaged_weights(task):
        wanted = task.predict(data[0], verbose=0)
    np.testing.assert_allclose(
        plain.predict(data[0], verbose=0), wanted, rtol=1e-5
    )
    batch = own_batch(task, *data)
    for own, ready in zip(batch, preprocessed(task, *data)):
        keras.tree.map_structure(np.testing.assert_array_equal, own, ready)
    ready = keras_stab.sharpness(task, batch, measures="sam", verbose=0)
    assert ready.loss == pytest.approx(raw.loss, rel=1e-6)
