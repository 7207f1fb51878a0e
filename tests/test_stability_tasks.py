"""The tasks of the stability benchmark, tiny and on made-up data."""

import functools
import sys

import keras
import numpy as np
import pytest
import scripts

sys.path.insert(0, str(scripts.ROOT / "benchmarks"))

from stability import arms  # noqa: E402
from stability import generation  # noqa: E402
from stability import images  # noqa: E402
from stability import small_gan  # noqa: E402
from stability import study  # noqa: E402
from stability.cifar_large_batch import CifarLargeBatch  # noqa: E402
from stability.fashion_mnist import FashionMnist  # noqa: E402
from stability.text_regression import TextRegression  # noqa: E402
from stability.two_player_game import TwoPlayerGame  # noqa: E402

from keras_stab import games  # noqa: E402
from keras_stab.diagnostics.report.run_plan import RunSeeds  # noqa: E402

TINY = {
    "fashion_mnist": functools.partial(FashionMnist, 80, (200, 40, 40), 1),
    "cifar_large_batch": functools.partial(
        CifarLargeBatch, 32, (80, 40, 40), 2, 16
    ),
    "generation": functools.partial(
        generation.Generation, 32, 1, pretraining_steps=2, scored=4
    ),
    "game": functools.partial(
        TwoPlayerGame, "game", "A game", games.bilinear, (0.1,), steps=12
    ),
    "small_gan": functools.partial(
        small_gan.SmallGan, 6, (64, 32, 32), fakes=64, batch_size=4
    ),
}
# One arm of each task beside its base.
OTHERS = {
    "fashion_mnist": "tail",
    "cifar_large_batch": "lars",
    "generation": "lookahead",
    "game": "rapp",
    "small_gan": "extra_gradient",
}


def prepared(name):
    task = TINY[name]()
    task.prepare(None, None)
    return task


def trained(task, arm, seeds, rate=1e-2):
    """The score of a run, as the study makes it."""
    optimizer = study.maker(arm, rate, task)()
    keras.utils.set_random_seed(seeds.initialisation)
    model = task.models.rewound(optimizer)
    task.train(model, seeds, arms.ARMS[arm])
    score = task.score(model, "test")[task.metric]
    assert np.isfinite(score)
    assert np.isfinite(task.score(model, "held_out")[task.metric])
    return float(score), [np.array(w) for w in model.get_weights()]


@pytest.mark.parametrize("name", TINY)
def test_a_rewound_model_trains_as_a_new_one(name):
    arm = OTHERS[name]
    used, new = prepared(name), prepared(name)
    # What is made once and kept in the cache.
    for made in ("weights", "judge", "real"):
        if hasattr(used, made):
            setattr(new, made, getattr(used, made))
    trained(used, arm, RunSeeds(1, 2))
    first, weights = trained(used, arm, RunSeeds(3, 4))
    again, same = trained(new, arm, RunSeeds(3, 4))
    assert first == again
    for one, two in zip(weights, same, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", TINY)
def test_the_order_alone_makes_another_run(name):
    task = prepared(name)
    _, first = trained(task, "base", RunSeeds(3, 4))
    _, other = trained(task, "base", RunSeeds(3, 5))
    _, again = trained(task, "base", RunSeeds(3, 4))
    np.testing.assert_array_equal(first[0], again[0])
    assert not np.array_equal(first[0], other[0])


def test_every_large_batch_optimizer_trains_at_its_rate():
    task = prepared("cifar_large_batch")
    for arm in arms.LARGE_BATCH:
        before = task.make_model().get_weights()[0]
        _, weights = trained(task, arm, RunSeeds(0, 0), rate=0.1)
        assert not np.array_equal(weights[0], before)


def test_the_rate_of_a_schedule_is_scaled():
    schedule = keras.optimizers.schedules.PolynomialDecay(
        0.1, 10, end_learning_rate=0.0
    )
    half = arms.scaled(schedule, 0.5)
    assert float(half(0)) == pytest.approx(0.05)
    assert float(half(10)) == 0.0
    assert arms.scaled(0.1, 0.5) == pytest.approx(0.05)


def test_the_noise_of_a_game_is_that_of_its_order():
    """One step of descent: minus the rate times field and noise."""
    task = TwoPlayerGame(
        "game", "A game", games.bilinear, (0.1,), noise=0.5, steps=6
    )
    keras.utils.set_random_seed(1)
    model = task.models.rewound(study.maker("base", 0.1, task)())
    x, y = (float(v.numpy()) for v in model.trainable_variables)
    task.train(model, RunSeeds(1, 7), arms.ARMS["base"])
    noise = 0.5 * np.random.default_rng([7, 2]).normal(size=(6, 2))
    for of_x, of_y in noise:
        x, y = x - 0.1 * (y + of_x), y + 0.1 * (x + of_y)
    received = [float(v.numpy()) for v in model.trainable_variables]
    np.testing.assert_allclose(received, (x, y), rtol=1e-5)
    distance = task.score(model, "test")[task.metric]
    assert distance == pytest.approx(np.log10(np.hypot(x, y)), abs=1e-5)


def test_parts_of_a_data_set_do_not_overlap():
    rows = images.split(50, 20, (30, 15, 10))
    assert [len(rows[part]) for part in images.PARTS] == [30, 15, 10]
    assert not set(rows["pool"]) & set(rows["held_out"])
    with pytest.raises(ValueError, match="50 training rows"):
        images.split(50, 20, (40, 15, 10))


def test_frechet_distance_of_known_normal_distributions():
    one, other = np.diag([1.0, 4.0]), np.diag([9.0, 4.0])
    shift = np.array([3.0, 0.0])
    # (1 - 3)^2 of the deviations, and the square of the shift.
    received = small_gan.frechet(np.zeros(2), one, shift, other)
    assert received == pytest.approx(4.0 + 9.0)


def test_a_picture_shrinks_to_means_of_four_pixels():
    picture = np.zeros((1, 28, 28, 1), "uint8")
    picture[0, :2, :2] = 255
    row = small_gan.shrunk(picture)
    assert row.shape == (1, 196)
    assert row[0, 0] == 1.0
    assert row[0, 1] == -1.0


def test_nats_of_a_decoder_are_those_of_keras():
    task = prepared("generation")
    model = task.make_model()
    task.compile(model, task.make_base(1e-3))
    x, y = task.test
    expected = model.evaluate(x, y, verbose=0)
    assert task.score(model, "test")[task.metric] == pytest.approx(
        expected, rel=1e-5
    )


def test_correlation_of_a_regression():
    task = TextRegression()
    np.testing.assert_allclose(task.targets(["5.000", "2.5"]), [1.0, 0.5])

    class Model:
        def predict(self, x, **kwargs):
            return x

    x = np.array([[1.0], [2.0], [4.0]])
    assert task._right(Model(), x, -3 * x[:, 0]) == pytest.approx(-100.0)
