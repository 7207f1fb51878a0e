"""Slices of the loss: their numbers, their pictures, what they leave alone."""

import sys

import keras
import numpy as np
import pytest
from keras import layers

import keras_stab
from keras_stab.diagnostics.loss.directions import filter_normalised

RANDOM = np.random.default_rng(6)
X = RANDOM.normal(size=(10, 4, 4, 2)).astype("float32")
Y = RANDOM.integers(0, 3, 10)


def network(seed):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((4, 4, 2)),
            layers.Conv2D(3, 2, activation="relu", name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.Flatten(),
            layers.Dense(3, name="dense", activation="softmax"),
        ]
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    norm = model.get_layer("norm")
    norm.moving_mean.assign(RANDOM.normal(size=3))
    norm.moving_variance.assign(RANDOM.uniform(0.5, 2.0, size=3))
    return model


@pytest.fixture(scope="module")
def models():
    return network(1), network(2)


def landscape(model, **options):
    options = {"batch_size": 4, "verbose": 0, **options}
    return keras_stab.loss_landscape(model, (X, Y), **options)


def evaluated(model, weights):
    before = model.get_weights()
    model.set_weights(weights)
    loss = model.evaluate(X, Y, batch_size=4, verbose=0)
    model.set_weights(before)
    return loss


def test_a_line_and_a_plane(models):
    """As moving the weights by hand and evaluating."""
    model, _ = models
    before = model.get_weights()
    found = landscape(model, directions=2, points=3, distance=0.5, seed=7)
    assert found.losses.shape == (3, 3)
    for axis in found.coordinates:
        np.testing.assert_allclose(axis, [-0.5, 0.0, 0.5])
    random = np.random.default_rng(7)
    own = [v.numpy() for v in model.trainable_variables]
    first, second = (
        filter_normalised(model.trainable_variables, own, random)
        for _ in range(2)
    )
    trainable = {id(v): i for i, v in enumerate(model.trainable_variables)}
    for i, j in ((0, 0), (1, 1), (2, 0)):
        weights = [
            w
            if id(v) not in trainable
            else w
            + (i - 1) * 0.5 * first[trainable[id(v)]]
            + (j - 1) * 0.5 * second[trainable[id(v)]]
            for v, w in zip(model.weights, before)
        ]
        wanted = pytest.approx(evaluated(model, weights), rel=1e-5)
        assert found.losses[i, j] == wanted
    line = landscape(model, directions=[first], points=3, distance=0.5)
    np.testing.assert_allclose(line.losses, found.losses[:, 1], rtol=1e-6)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_filters_have_the_norm_of_their_weights(models):
    model, _ = models
    table = layers.Embedding(5, 3)
    table.build()
    variables = [*model.trainable_variables, *table.trainable_variables]
    own = [v.numpy() for v in variables]
    random = np.random.default_rng(0)
    direction = filter_normalised(variables, own, random)
    by_name = dict(zip([v.path for v in variables], zip(own, direction)))
    for path, axes in {
        "conv/kernel": (0, 1, 2),
        "dense/kernel": 0,
        "embeddings": 1,
    }.items():
        (pair,) = (p for name, p in by_name.items() if name.endswith(path))
        norms = [np.sqrt(np.square(a).sum(axis=axes)) for a in pair]
        np.testing.assert_allclose(*norms, rtol=1e-5)
        assert np.abs(pair[0] - pair[1]).max() > 0.01
    for old, way in zip(own, direction):
        if old.ndim == 1:
            assert not way.any()


def test_the_line_between_two_solutions(models, tmp_path):
    """With the statistics of batch-norm, which the ends differ in."""
    model, other = models
    path = tmp_path / "line.png"
    found = keras_stab.plot_loss_landscape(
        model, (X, Y), path=path, to=other, points=5, batch_size=4, verbose=0
    )
    (along,) = found.coordinates
    np.testing.assert_allclose(along, [-0.5, 0.0, 0.5, 1.0, 1.5])
    wanted = [
        evaluated(model, model.get_weights()),
        evaluated(other, other.get_weights()),
    ]
    np.testing.assert_allclose(found.losses[[1, 3]], wanted, rtol=1e-5)
    halves = [
        (a + b) / 2 for a, b in zip(model.get_weights(), other.get_weights())
    ]
    middle = evaluated(model, halves)
    assert found.losses[2] == pytest.approx(middle, rel=1e-5)
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = found.figure.axes
    drawn = axes.lines[0].get_ydata()
    np.testing.assert_array_equal(drawn, found.losses)
    again = landscape(model, to=other.get_weights(), points=5)
    np.testing.assert_array_equal(again.losses, found.losses)


def test_a_picture_of_a_plane_into_axes_of_ones_own(models, capsys):
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    found = keras_stab.plot_loss_landscape(
        models[0], (X, Y), axes=axes, directions=2, points=4, batch_size=5
    )
    assert found.figure is figure and len(figure.axes) == 2
    figure.canvas.draw()
    assert "16/16" in capsys.readouterr().out


def test_bad_input_changes_nothing(models):
    model, other = models
    before = model.get_weights()
    wrong = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    for arguments, message in (
        ({"directions": 3}, "`directions` must be 1, 2 or a list"),
        ({"directions": []}, "one or two directions"),
        ({"directions": [before]}, "one array per trainable variable"),
        ({"to": wrong}, "`to` must be a model like this one"),
        ({"to": other, "directions": [before]}, "gives the first direction"),
        ({"distance": 0.0}, "`distance` must be above 0"),
        ({"points": 1}, "`points` must be an integer of at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            landscape(model, **arguments)

    def undefined(y, y_pred):
        return np.nan * keras.ops.sum(y_pred, axis=-1)

    with pytest.raises(ValueError, match="not finite"):
        landscape(model, loss=undefined)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    "path, message",
    [("missing/a.png", "There is no folder missing"), ("a.txt", "must end")],
)
def test_a_path_is_checked_before_anything_is_computed(models, path, message):
    with pytest.raises(ValueError, match=message):
        keras_stab.plot_loss_landscape(models[0], None, path=path)


def test_without_matplotlib(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*\[diagnostics"):
        keras_stab.plot_loss_landscape(models[0], (X, Y))
