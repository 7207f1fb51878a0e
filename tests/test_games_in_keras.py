"""What Keras does around a Game: callbacks, logs, freezing; bad input."""

import keras
import numpy as np
import pytest
from marks import slow_but_on_torch
from small_games import make_gan
from small_games import points
from small_games import values

import keras_stab
from keras_stab import constraints
from keras_stab.games import Player
from keras_stab.games import PlayerOptimizers

SGD = keras.optimizers.SGD
RAPP = keras_stab.RAPP
Lookahead = keras_stab.Lookahead
ExtraGradient = keras_stab.ExtraGradient


def product(**options):
    """`min max x y mean(batch)`, and its two variables."""
    x, y = (keras.Variable(1.0, name=name) for name in "xy")

    def loss(batch, training):
        return x * y * keras.ops.mean(batch)

    players = [Player("x", x, loss), Player("y", y, loss, sense="max")]
    return keras_stab.Game(players, **options), [x, y]


def fit(game, batches, **options):
    return game.fit(
        np.array(batches, "float32").reshape(-1, 1),
        batch_size=1,
        shuffle=False,
        verbose=0,
        **options,
    ).history


# ---- Callbacks ------------------------------------------------------------


@slow_but_on_torch
@pytest.mark.parametrize("wrapped", [False, True])
def test_callbacks_reach_the_rates_behind_a_loss_scaler(wrapped):
    game, _ = product(dtype="mixed_float16")
    optimizer = {"x": RAPP(0.5), "y": RAPP(0.25)}
    if wrapped:
        optimizer = Lookahead(PlayerOptimizers(optimizer), 2)
    game.compile(optimizer)
    callbacks = keras.callbacks
    history = fit(
        game,
        [1.0],
        callbacks=[
            callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2),
            callbacks.ReduceLROnPlateau("x_loss", mode="min"),
        ],
    )
    rates = [
        float(o.learning_rate.numpy()) for o in game.player_optimizers.values()
    ]
    assert rates == [0.25, 0.125]
    # Both are in the log, under names of their own.
    logged = [v for name, v in history.items() if "learning_rate" in name]
    assert sorted(logged) == [[0.125], [0.25]]


@slow_but_on_torch
def test_training_ends_at_a_loss_that_is_not_a_number():
    """Keras looks for `loss`, which a game does not log."""
    game, variables = product()
    game.compile(SGD(0.0))
    callback = keras.callbacks.TerminateOnNaN()
    history = fit(game, [1.0, np.nan, 1.0], epochs=3, callbacks=[callback])
    assert len(history["x_loss"]) == 1
    strict = keras.callbacks.TerminateOnNaN(raise_error=True)
    for variable in variables:
        variable.assign(1.0)
    with pytest.raises(RuntimeError, match="at batch 1"):
        fit(game, [1.0, np.inf, 1.0], callbacks=strict)


# ---- Logs -----------------------------------------------------------------


@pytest.mark.parametrize("turns", ["simultaneous", ("x", "y")])
def test_logs_are_means_over_examples(turns):
    """As Keras's own: the rows of a short last batch count alike."""
    game, _ = product(turns=turns)
    game.compile(SGD(0.0))
    data = np.array([[0.0], [0.0], [3.0]], "float32")
    figures = game.evaluate(data, batch_size=2, verbose=0)
    assert figures == pytest.approx([1.0, 1.0])
    # The names are those of the figures.
    assert game.metrics_names == ["x_loss", "y_loss"]
    history = game.fit(data, batch_size=2, shuffle=False, verbose=0).history
    if turns == "simultaneous":
        assert history["x_loss"] == pytest.approx([1.0])
    else:
        assert history == {"x_loss": [0.0], "y_loss": [3.0]}


# ---- Freezing, and optimizers of other games ------------------------------


@slow_but_on_torch
def test_a_frozen_player_uses_up_its_turn():
    """PyTorch differentiates no loss that depends on no weight."""
    game = make_gan(("D", "G"))
    critic, generator = (game.get_layer(n) for n in ("critic", "generator"))
    critic.trainable = False
    game.compile(SGD(0.1))
    # Spectral vectors go on, the kernel that they belong to does not.
    weights = [w for w in critic.weights if "vector_u" not in w.path]
    frozen = values(weights)
    before = values(generator.trainable_variables)
    for moves in (False, True):
        game.train_on_batch(points(8))
        after = values(generator.trainable_variables)
        assert moves == any((a != b).any() for a, b in zip(after, before))
    for old, new in zip(frozen, values(weights)):
        np.testing.assert_array_equal(old, new)


@slow_but_on_torch
def test_layers_frozen_since_compile():
    """With an optimizer for each player as with a joint one."""
    game, (x, y) = product()
    game.compile({"x": SGD(0.5), "y": SGD(0.5)})
    y.trainable = False
    if keras.backend.backend() == "torch":
        fit(game, [1.0])
        np.testing.assert_allclose(values([x, y]), [0.5, 1.0])
    y.trainable = True
    x.trainable = False
    game.compile({"x": SGD(0.5), "y": SGD(0.5)})
    optimizer = game.optimizer
    x.trainable = True
    with pytest.raises(ValueError, match="compile again"):
        optimizer.apply([x + 0.0, y + 0.0], [x, y])


def test_the_optimizer_of_another_game():
    """JAX would go on with the anchors of the first game."""
    for optimizer in (RAPP(0.1), {"x": RAPP(0.1), "y": SGD(0.1)}):
        first, _ = product()
        first.compile(optimizer)
        first.compile(optimizer)  # the same weights: fine
        second, _ = product()
        with pytest.raises(ValueError, match="already built with other"):
            second.compile(optimizer)


@slow_but_on_torch
def test_accumulation_inside_of_wrappers_counts_too():
    window = SGD(0.1, gradient_accumulation_steps=2)
    for turns, other in (("simultaneous", "sgd"), (("x", "y"), window)):
        game, _ = product(turns=turns)
        other = other if other == "sgd" else Lookahead(other)
        inner = SGD(0.1, gradient_accumulation_steps=2)
        with pytest.raises(ValueError, match="the same for all players"):
            game.compile({"x": Lookahead(inner), "y": other})


# ---- Configurations -------------------------------------------------------


@slow_but_on_torch
def test_configs_go_round():
    game = make_gan(("D", "D", "G"))
    again = keras_stab.Game.from_config(game.get_config())
    assert again.turns == ("D", "D", "G")
    assert [player.name for player in again.players] == ["D", "G"]
    optimizer = PlayerOptimizers({"D": RAPP(0.1, 4), "G": "adam"})
    again = PlayerOptimizers.from_config(optimizer.get_config())
    assert again.by_player["D"].inner_steps == 4


# ---- Bad input ------------------------------------------------------------


def variable():
    return keras.Variable(1.0, name="x")


def zero(batch, training):
    return 0.0


BAD = {
    "no list": (lambda: keras_stab.Game(None), "list of keras_stab.Player"),
    "one player": (
        lambda: keras_stab.Game(Player("x", variable(), zero)),
        "list of keras_stab.Player",
    ),
    "strings": (lambda: keras_stab.Game(["x"]), "list of keras_stab.Player"),
    "owns nothing": (lambda: Player("x", [], zero), "must not be empty"),
    "parts in a list": (
        lambda: product(parts=[keras.random.SeedGenerator(1)]),
        "a dict from names",
    ),
    "a number among parts": (
        lambda: product(parts={"a": 3}),
        "a dict from names",
    ),
    "two to predict with": (
        lambda: product(predict_with=["a"]),
        "name of a layer",
    ),
    "turns in an array": (
        lambda: product(turns=np.array(["x", "y"])),
        "every player has a turn",
    ),
    "seed": (lambda: product(seed=1.5), "`seed` must be an integer"),
    "no optimizer": (
        lambda: product()[0].compile(None),
        "`optimizer` must be an optimizer",
    ),
    "no optimizer of one": (
        lambda: product()[0].compile({"x": None, "y": "sgd"}),
        r"`optimizers\['x'\]` must be",
    ),
    "a list of them": (
        lambda: PlayerOptimizers(["sgd"]),
        "as a dict with one optimizer",
    ),
    "nothing inside": (lambda: Lookahead(None), "must be an optimizer"),
    "a dict inside": (
        lambda: Lookahead({"x": "sgd", "y": "sgd"}),
        r"PlayerOptimizers\(\{",
    ),
    "separate moments of players": (
        lambda: ExtraGradient(
            PlayerOptimizers({"x": "sgd"}), moments="separate"
        ),
        "each player its own ExtraGradient",
    ),
    "a class": (
        lambda: RAPP(proximal=constraints.NonNegative),
        "`proximal` must be",
    ),
    "a regularizer of Keras": (
        lambda: RAPP(proximal=keras.regularizers.L2(0.1)),
        "`proximal` must be",
    ),
    "no regular expression": (
        lambda: RAPP(proximal={"(": constraints.NonNegative()}),
        "regular expression",
    ),
    "axis": (lambda: constraints.L2Ball(1.0, axis="0"), "`axis` must be"),
    "axes": (lambda: constraints.GroupL2(1.0, axis=[0.5]), "`axis` must be"),
    "no such axis": (
        lambda: constraints.Simplex()(keras.ops.ones(())),
        r"shape \(\) does not have",
    ),
}


@slow_but_on_torch
@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make()


@slow_but_on_torch
def test_several_axes_are_saved():
    ball = constraints.L2Ball(1.0, axis=(0, 1))
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(ball)
    )
    assert again.axis == ball.axis
    assert constraints.L2Ball.from_config(ball.get_config()).axis == ball.axis


@slow_but_on_torch
def test_pullback_refuses_slots_that_start_as_the_weights():
    """It would pull them half of the way to zero."""
    inner = keras.optimizers.ScheduleFreeAdamW(0.1)
    optimizer = Lookahead(inner, inner_state="pullback")
    with pytest.raises(ValueError, match="starts as a copy"):
        optimizer.build([keras.Variable([1.0, 2.0], name="w")])
