"""`input_gradient`: values, second derivatives, state, precision, bad input."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_stab
from keras_stab.games import input_gradient

KERNEL = np.array([[3.0], [4.0]], "float32")
POINTS = np.array([[1.0, 2.0], [0.5, -1.0], [0.0, 3.0]], "float32")


def make_critic():
    critic = keras.layers.Dense(1, use_bias=False)
    critic.build((None, 2))
    critic.kernel.assign(KERNEL)
    return critic


def squared(critic):
    return lambda x: ops.square(critic(x))


def norms_of_square(x):
    """Squared norms of the gradients of `(x w)^2`."""
    return np.sum(np.square(2.0 * (x @ KERNEL) @ KERNEL.T), axis=1)


class WithPenalty(keras.Model):
    """Its loss is the mean squared norm of the critic's input gradients."""

    def __init__(self, critic):
        super().__init__()
        self.critic = critic
        self.built = True

    def call(self, x):
        return squared(self.critic)(x)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        slopes = input_gradient(squared(self.critic), x)
        return ops.mean(ops.sum(ops.square(slopes), axis=1))


def test_values_outside_of_any_step():
    slopes = input_gradient(squared(make_critic()), POINTS)
    expected = 2.0 * (POINTS @ KERNEL) @ KERNEL.T
    np.testing.assert_allclose(ops.convert_to_numpy(slopes), expected, 1e-5)


@pytest.mark.parametrize("wrap", [None, keras_stab.SAM, keras_stab.Lookahead])
def test_in_training_and_evaluation_of_a_model(wrap):
    """One step on one row: the second derivative is known."""
    model = WithPenalty(make_critic())
    rate = 1e-5
    optimizer = keras.optimizers.SGD(rate)
    model.compile(wrap(optimizer) if wrap else optimizer)
    expected = norms_of_square(POINTS[:1])[0]
    before = model.evaluate(POINTS[:1], POINTS[:1], verbose=0)
    assert before == pytest.approx(expected, rel=1e-5)
    history = model.fit(
        POINTS[:1],
        POINTS[:1],
        validation_data=(POINTS[:1], POINTS[:1]),
        verbose=0,
    ).history
    assert history["loss"][0] == pytest.approx(expected, rel=1e-5)
    assert history["val_loss"][0] < expected
    if wrap is not None:
        return
    # The loss is 4 (x w)^2 |w|^2.
    x, w = POINTS[0], KERNEL[:, 0]
    gradient = 8.0 * (x @ w) * (w @ w) * x + 8.0 * (x @ w) ** 2 * w
    np.testing.assert_allclose(
        model.critic.kernel.numpy()[:, 0], w - rate * gradient, rtol=1e-5
    )


@pytest.mark.parametrize("turns", ["simultaneous", ("critic", "maker")])
def test_in_a_game_by_both_players(turns):
    """The gradient goes on through what `x` was made of."""
    critic, maker = make_critic(), keras.layers.Dense(2, use_bias=False)
    maker.build((None, 2))
    maker.kernel.assign(np.eye(2))

    def loss(batch, training):
        slopes = input_gradient(squared(critic), maker(batch))
        return ops.mean(ops.sum(ops.square(slopes), axis=1))

    players = [
        keras_stab.Player("critic", critic, loss),
        keras_stab.Player("maker", maker, loss),
    ]
    game = keras_stab.Game(players, turns=turns)
    game.compile(keras.optimizers.SGD(1e-5))
    expected = norms_of_square(POINTS[:1])[0]
    logs = game.evaluate(POINTS[:1], verbose=0, return_dict=True)
    assert logs["maker_loss"] == pytest.approx(expected, rel=1e-5)
    x = np.repeat(POINTS[:1], 2, axis=0)
    game.fit(x, batch_size=1, validation_data=(x,), verbose=0)
    # Of |2 (x m w) w|^2 by m, at m = 1: 8 (x w) |w|^2 x w^T.
    x, w = POINTS[:1].T, KERNEL
    moved = maker.kernel.numpy() - np.eye(2)
    if turns != "simultaneous":
        w = critic.kernel.numpy()  # had its turn
        expected = -1e-5 * 8.0 * (x.T @ w) * (w.T @ w) * (x @ w.T)
        np.testing.assert_allclose(moved, expected, rtol=1e-3)
    assert (moved < 0).all()


@pytest.mark.parametrize("stateful", ["batch norm", "spectral", "dropout"])
def test_layers_that_write_state(stateful):
    """Moving statistics, vectors and seeds are written as by one call."""
    keras.utils.set_random_seed(0)
    layers = {
        "batch norm": lambda: keras.layers.BatchNormalization(momentum=0.5),
        "spectral": lambda: keras.layers.SpectralNormalization(
            keras.layers.Dense(2)
        ),
        "dropout": lambda: keras.layers.Dropout(0.5, seed=1),
    }
    body = keras.Sequential(
        [keras.Input((2,)), layers[stateful](), keras.layers.Dense(1)]
    )

    states = [v for each in body.layers for v in each.non_trainable_variables]
    states += [
        each.seed_generator.state
        for each in body.layers
        if hasattr(each, "seed_generator")
    ]

    def written():
        return [np.array(ops.convert_to_numpy(v)) for v in states]

    def rewind():
        for variable, value in zip(states, start):
            variable.assign(value)

    start = written()
    body(POINTS, training=True)
    expected = written()
    assert any((a != b).any() for a, b in zip(start, expected))
    rewind()
    slopes = input_gradient(lambda x: body(x, training=True), POINTS)
    assert slopes.shape == POINTS.shape
    for own, other in zip(written(), expected, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-6)
    rewind()

    def loss(batch, training):
        slopes = input_gradient(lambda x: body(x, training=training), batch)
        return ops.mean(ops.square(slopes))

    game = keras_stab.Game([keras_stab.Player("body", body, loss)])
    game.compile(keras.optimizers.SGD(0.0))
    game.fit(POINTS, batch_size=3, verbose=0)
    if stateful != "spectral":  # a frozen weight, which a game keeps
        for own, other in zip(written(), expected, strict=True):
            np.testing.assert_allclose(own, other, rtol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    model = WithPenalty(make_critic())
    model.compile(keras.optimizers.SGD(1e-5))
    expected = norms_of_square(POINTS).mean()
    slopes = input_gradient(squared(model.critic), POINTS)
    assert keras.backend.standardize_dtype(slopes.dtype) == "float32"
    logs = model.evaluate(POINTS, POINTS, verbose=0)
    assert logs == pytest.approx(expected, rel=0.02)
    before = model.critic.kernel.numpy()
    model.fit(POINTS, POINTS, verbose=0)
    assert np.isfinite(model.critic.kernel.numpy()).all()
    if policy == "mixed_bfloat16":  # float16 may skip the first steps
        assert (model.critic.kernel.numpy() != before).any()


def test_what_it_does_not_depend_on():
    slopes = input_gradient(lambda x: ops.ones((3, 1)), POINTS)
    np.testing.assert_array_equal(ops.convert_to_numpy(slopes), 0.0)
    critic = make_critic()
    slopes = input_gradient(lambda x: critic(ops.zeros((3, 2))), POINTS)
    np.testing.assert_array_equal(ops.convert_to_numpy(slopes), 0.0)


def test_a_variable_is_taken_and_outside_the_argument_it_is_a_constant():
    variable = keras.Variable(POINTS)
    slopes = input_gradient(lambda x: x * variable.value, variable)
    np.testing.assert_array_equal(ops.convert_to_numpy(slopes), POINTS)


def test_what_is_refused():
    for function in (lambda x: ops.argmax(x, axis=-1), lambda x: (x, x)):
        with pytest.raises(TypeError, match="must return one tensor of floats"):
            input_gradient(function, POINTS)
    with pytest.raises(TypeError, match="must be of floats.*dtype int32"):
        input_gradient(lambda x: x, np.arange(3, dtype="int32"))
