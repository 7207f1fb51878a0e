"""Game: the joint field, turns, state, saving, and what is refused."""

import keras
import numpy as np
import pytest
from interpolation_cases import float64
from small_games import make_gan
from small_games import points
from small_games import values

import keras_stab
from keras_stab.games import Player
from keras_stab.games import PlayerOptimizers

SGD = keras.optimizers.SGD
Adam = keras.optimizers.Adam


def scalar(name, value):
    return keras.Variable(value, name=name, dtype="float32")


def step_data(steps=1):
    return np.zeros((steps, 1), "float32")


def run(game, steps):
    return game.fit(
        step_data(steps), batch_size=1, shuffle=False, verbose=0
    ).history


# ---- The joint field ------------------------------------------------------


def three_players(**options):
    x, y, z = (scalar(n, v) for n, v in zip("xyz", (1.0, 2.0, 3.0)))
    y.regularizer = keras.regularizers.L2(0.5)
    game = keras_stab.Game(
        [
            Player("x", x, lambda batch, training: x * y + z),
            Player("y", y, lambda b, t: y * z - x, sense="max", weight=2.0),
            Player("z", z, lambda b, t: z * z * x * y, weight=0.5),
        ],
        **options,
    )
    # By hand: the derivatives, the decay of y, the senses and the weights.
    field = np.array([2.0, -2.0 * 3.0 + 2.0 * 2.0, 0.5 * 2 * 3.0 * 2.0])
    return game, [x, y, z], field


@pytest.mark.parametrize("norm", [False, True])
def test_the_gradient_is_the_joint_field(norm):
    game, variables, field = three_players(operator_norm=norm)
    game.compile(SGD(0.1))
    before = np.array(values(variables))
    logs = run(game, 1)
    assert logs.pop("x_loss") == [pytest.approx(5.0)]
    assert logs.pop("y_loss") == [pytest.approx(5.0)]
    assert logs.pop("z_loss") == [pytest.approx(18.0)]
    after = np.array(values(variables))
    np.testing.assert_allclose(after, before - 0.1 * field, rtol=1e-6)
    if norm:
        size = np.linalg.norm(field)
        assert logs.pop("operator_norm") == [pytest.approx(size)]
        for variable, value in zip(variables, before):
            variable.assign(value)
        figures = game.evaluate(step_data(), verbose=0, return_dict=True)
        assert figures["operator_norm"] == pytest.approx(size)
        assert figures["z_loss"] == pytest.approx(18.0)
    assert not logs


def test_one_loss_for_both_sides_takes_one_evaluation():
    ends = []
    for shared in (True, False):
        x, y = scalar("x", 1.0), scalar("y", 0.5)
        y.regularizer = keras.regularizers.L2(0.1)
        calls = []

        def loss(batch, training):
            calls.append(training)
            return x * y + 0.3 * x * x - 0.2 * y * y

        other = loss if shared else (lambda b, t, loss=loss: loss(b, t))
        game = keras_stab.Game(
            [Player("x", x, loss, weight=2.0)]
            + [Player("y", y, other, sense="max", weight=2.0)]
        )
        game.compile(SGD(0.1), run_eagerly=True)
        calls.clear()
        logs = game.train_on_batch(step_data(), return_dict=True)
        assert logs["x_loss"] == pytest.approx(0.75)
        assert logs["x_loss"] == logs["y_loss"]
        ends.append((len(calls), values([x, y])))
    assert 2 * ends[0][0] == ends[1][0]
    np.testing.assert_allclose(ends[0][1], ends[1][1], rtol=1e-6)
    by_hand = [1.0 - 0.2 * (0.5 + 0.6), 0.5 + 0.2 * (1.0 - 0.2 - 0.1)]
    np.testing.assert_allclose(ends[0][1], by_hand, rtol=1e-6)


def test_what_the_batch_is():
    w = scalar("w", 1.0)
    seen = []

    def loss(batch, training):
        seen.append(len(batch) if isinstance(batch, tuple) else 0)
        return w * 1.0

    game = keras_stab.Game([Player("w", w, loss)])
    game.compile(run_eagerly=True)
    one = np.ones((2, 1), "float32")
    for given in ((one,), (one, one), (one, one, one[:, 0])):
        seen.clear()
        game.train_on_batch(*given)
        assert set(seen) == {0 if len(given) == 1 else len(given)}


def test_twenty_graph_runs_are_right():
    """TensorFlow's own step gets this wrong in most runs without XLA."""
    a, b = (keras.Variable(np.ones(10), name=name) for name in "ab")
    game = keras_stab.Game(
        [
            Player("a", a, lambda batch, t: keras.ops.sum(a * b)),
            Player("b", b, lambda batch, t: keras.ops.sum(b * a)),
        ]
    )
    game.compile(SGD(0.1), jit_compile=False)
    repeats = 20 if keras.backend.backend() == "tensorflow" else 2
    for _ in range(repeats):
        a.assign(np.ones(10))
        b.assign(np.ones(10))
        run(game, 20)
        ends = values([a, b])
        np.testing.assert_allclose(ends, 0.9**20, rtol=1e-5)
        assert all((end == ends[0]).all() for end in ends)


# ---- Batch norm, dropout, spectral norm -----------------------------------


def test_spectral_norm_is_a_reparametrisation():
    """On every backend what it is on JAX: training does not overwrite W."""
    layer = keras.layers.SpectralNormalization(
        keras.layers.Dense(2, use_bias=False)
    )
    layer.build((None, 2))
    kernel, u = layer.layer.kernel, layer.vector_u
    start = np.array([[2.0, 0.5], [0.3, 1.0]])
    kernel.assign(start)
    u.assign([[1.0, 0.2]])
    x = np.array([[1.0, 2.0]])

    def loss(batch, training):
        return keras.ops.sum(layer(batch, training=training))

    game = keras_stab.Game([Player("D", layer, loss)])
    game.compile(SGD(0.1))
    game.train_on_batch(x.astype("float32"))

    def unit(vector):
        return vector / np.linalg.norm(vector)

    v = unit(np.array([[1.0, 0.2]]) @ start.T)
    new_u = unit(v @ start)
    sigma = (v @ start @ new_u.T).item()
    ones = x.T @ np.ones((1, 2))
    by_sigma = -np.sum(ones * start) / sigma**2
    gradient = ones / sigma + by_sigma * (v.T @ new_u)
    np.testing.assert_allclose(
        values([kernel])[0], start - 0.1 * gradient, rtol=1e-5
    )
    np.testing.assert_allclose(values([u])[0], new_u, rtol=1e-5)


def test_state_goes_from_player_to_player():
    """Batch norm sees the batch once a player, seeds never come twice."""
    norm = keras.layers.BatchNormalization(momentum=0.5)
    norm.build((None, 1))
    w = scalar("w", 1.0)
    drawn = keras.Variable(np.zeros(2), trainable=False, name="drawn")

    def loss(place):
        def player_loss(batch, training, game):
            noise = keras.random.uniform((), seed=game.seed_generator)
            drawn.assign(
                keras.ops.where(
                    keras.ops.arange(2) == place, noise, drawn.value
                )
            )
            y = norm(batch, training=training)
            own = w if place else norm.gamma
            return keras.ops.mean(y * y) * keras.ops.sum(own)

        return player_loss

    game = keras_stab.Game(
        [Player("norm", norm, loss(0)), Player("w", w, loss(1))],
        parts={"drawn": drawn},
        seed=1,
    )
    game.compile(SGD(0.0))
    game.train_on_batch(np.full((4, 1), 8.0, "float32"))
    # 0 -> 4 -> 6: twice half of the way to 8.
    np.testing.assert_allclose(values([norm.moving_mean])[0], [6.0])
    first, second = values([drawn])[0]
    assert 0 < first != second > 0
    game.train_on_batch(np.full((4, 1), 8.0, "float32"))
    assert not np.isin(values([drawn])[0], [first, second]).any()


# ---- One training of a GAN, looked at from all sides ----------------------


OPTIMIZERS = {
    "joint": lambda: Adam(0.02),
    "dict": lambda: {"D": Adam(0.02), "G": SGD(0.02, momentum=0.5)},
}


def fit(game, **options):
    return game.fit(
        points(), batch_size=8, shuffle=False, verbose=0, **options
    ).history


@pytest.mark.parametrize(
    "turns, kind",
    [("simultaneous", "joint"), (("D", "D", "G"), "dict")],
    ids=["joint", "turns"],
)
def test_a_gan(turns, kind, tmp_path):
    game = make_gan(turns)
    game.compile(OPTIMIZERS[kind]())
    rates = keras.callbacks.LearningRateScheduler(lambda e, rate: rate * 0.5)
    first = fit(game, epochs=2, callbacks=[rates])
    assert np.isfinite([first["D_loss"], first["G_loss"]]).all()
    for optimizer in game.player_optimizers.values():
        rate = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
        assert rate == pytest.approx(0.005)
    # Both in a file, and in two runs that go on.
    game.save(tmp_path / "game.keras")
    game.save_weights(tmp_path / "game.weights.h5")
    again = keras.models.load_model(tmp_path / "game.keras")
    other = make_gan(turns, seed=6)
    other.compile(OPTIMIZERS[kind]())
    for optimizer in other.player_optimizers.values():
        optimizer.learning_rate = 0.005
    other.load_weights(tmp_path / "game.weights.h5")
    seeds = game.get_layer("critic").layers[2].seed_generator.state.numpy()
    histories = []
    for each in (game, again, other):
        # Keras saves no seeds of dropout layers.
        state = each.get_layer("critic").layers[2].seed_generator.state
        state.assign(seeds)
        histories.append(fit(each, epochs=1))
    for each, history in zip((again, other), histories[1:]):
        assert history == histories[0]
        for a, b in zip(game.get_weights(), each.get_weights()):
            np.testing.assert_array_equal(a, b)
        for a, b in zip(game.optimizer.variables, each.optimizer.variables):
            np.testing.assert_array_equal(values([a]), values([b]))
    counts = [int(o.iterations) for o in game.player_optimizers.values()]
    assert counts == ([12, 12] if turns == "simultaneous" else [8, 4])
    figures = game.evaluate(points(), batch_size=8, verbose=0, return_dict=True)
    assert set(figures) == {"D_loss", "G_loss"}
    noise = np.random.default_rng(1).normal(size=(5, 3)).astype("float32")
    made = game.predict(noise, verbose=0)
    by_hand = values([game.get_layer("generator")(noise)])[0]
    np.testing.assert_allclose(made, by_hand, rtol=1e-5, atol=1e-6)


def test_compiled_in_other_ways():
    """Several steps at once and XLA end where the plain steps do."""
    ways = [{}]
    if keras.backend.backend() != "torch":
        ways.append({"steps_per_execution": 3, "jit_compile": True})
    ends = []
    for way in ways:
        game, variables, _ = three_players(turns=("x", "z", "y"))
        game.compile(Adam(0.1), **way)
        run(game, 6)
        ends.append(values(variables))
    np.testing.assert_allclose(ends[-1], ends[0], rtol=1e-5)


# ---- Turns ----------------------------------------------------------------


def test_players_off_turn_stay_as_they_are():
    game = make_gan(("D", "D", "G"))
    game.compile({"D": Adam(0.02), "G": Adam(0.02)})
    optimizers = game.player_optimizers
    seeds = game.seed_generator.state
    for turn in "DDGD":
        before = {
            name: values([*game.owned()[name], *optimizers[name].variables])
            for name in optimizers
        }
        drawn = int(values([seeds])[0][1])
        game.train_on_batch(points(8))
        # One loss is computed, which draws once.
        assert int(values([seeds])[0][1]) == drawn + 1
        for name, old in before.items():
            new = values([*game.owned()[name], *optimizers[name].variables])
            same = [(a == b).all() for a, b in zip(old, new)]
            assert all(same) == (name != turn)
    assert [int(o.iterations) for o in optimizers.values()] == [3, 1]


def test_a_joint_optimizer_is_copied_for_turns():
    x, y = scalar("x", 1.0), scalar("y", 0.5)
    game = keras_stab.Game(
        [
            Player("x", x, lambda b, t: x * y),
            Player("y", y, lambda b, t: y * x, sense="max"),
        ],
        turns=("x", "y"),
    )
    game.compile(SGD(0.1))
    run(game, 4)
    a, b = 1.0, 0.5
    for _ in range(2):  # alternating gradient descent ascent
        a = a - 0.1 * b
        b = b + 0.1 * a
    np.testing.assert_allclose(values([x, y]), [a, b], rtol=1e-6)


def test_a_skipped_step_does_not_use_up_the_turn():
    x, y = scalar("x", 1.0), scalar("y", 1.0)
    game = keras_stab.Game(
        [
            Player("x", x, lambda batch, t: x * keras.ops.sum(batch)),
            Player("y", y, lambda batch, t: y * keras.ops.sum(batch)),
        ],
        turns=("x", "y"),
        dtype="mixed_float16",
    )
    game.compile({"x": SGD(0.5), "y": SGD(0.5)})
    scaler = keras.optimizers.LossScaleOptimizer
    assert isinstance(game.optimizer, scaler)
    for factor in (np.inf, 1.0, np.inf, 1.0):
        game.train_on_batch(np.full((1, 1), factor, "float32"))
    np.testing.assert_allclose(values([x, y]), [0.5, 0.5])
    counts = [int(o.iterations) for o in game.player_optimizers.values()]
    assert counts == [1, 1]


def test_lookahead_around_players_counts_rounds():
    x, y = scalar("x", 1.0), scalar("y", 0.0)
    game = keras_stab.Game(
        [
            Player("x", x, lambda b, t: 1.0 * x),
            Player("y", y, lambda b, t: 1.0 * y),
        ],
        turns=("x", "x", "y"),
    )
    inner = PlayerOptimizers({"x": SGD(0.25), "y": SGD(0.5)})
    lookahead = keras_stab.Lookahead(inner, sync_period=2, slow_step_size=0.5)
    game.compile(lookahead)
    run(game, 5)
    np.testing.assert_allclose(values([x, y]), [0.0, -0.5])
    run(game, 1)  # the second round is complete: half of the way back
    np.testing.assert_allclose(values([x, y]), [0.5, -0.5])
    assert game.player_optimizers["x"] is inner.optimizers[0]


# ---- Variables that come and go, that are no weights, of other precision --


def layers_of_two():
    """Two layers, each the player of one side of a zero-sum game."""
    keras.utils.set_random_seed(2)
    layers = [keras.layers.Dense(3, name=name) for name in ("low", "high")]
    for layer in layers:
        layer.build((None, 4))
    return layers


def product(layers):
    def loss(batch, training):
        low, high = (layer(batch) for layer in layers)
        return keras.ops.mean(low * high) + keras.ops.mean(keras.ops.sin(high))

    return loss


def zero_sum(layers, apart=False, **options):
    """One evaluation serves both players, or one for each of them."""
    first = product(layers)
    second = product(layers) if apart else first
    return keras_stab.Game(
        [
            Player("low", layers[0], first),
            Player("high", layers[1], second, sense="max"),
        ],
        **options,
    )


def some_rows(rows=8):
    generator = np.random.default_rng(5)
    return generator.normal(size=(rows, 4)).astype(keras.config.floatx())


FROZEN_WITH = {
    "LARS": lambda: keras_stab.LARS(0.1, weight_decay=0.1, exclude_1d=False),
    "TVLARS": lambda: keras_stab.TVLARS(0.1, decay_rate=0.1, delay=1.0),
    "LAMB": lambda: keras_stab.LAMB(0.1),
    "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "players": lambda: {
        "low": keras.optimizers.Adam(0.1),
        "high": keras_stab.LARS(0.1),
    },
}


@pytest.mark.parametrize("kind", FROZEN_WITH)
def test_a_layer_frozen_without_a_new_compile(kind):
    """It stands still, and the other is trained as if alone all along."""
    ends = []
    for apart in (False, True):
        layers = layers_of_two()
        game = zero_sum(layers, apart)
        game.compile(FROZEN_WITH[kind](), jit_compile=False)
        x = some_rows()
        game.fit(x, batch_size=4, shuffle=False, verbose=0)
        layers[0].trainable = False
        game.make_train_function(force=True)
        before = [layer.get_weights() for layer in layers]
        if keras.backend.backend() == "jax":
            with pytest.raises(ValueError, match="1:1 to the trainable"):
                game.fit(x, batch_size=4, verbose=0)
            continue
        game.fit(x, batch_size=4, shuffle=False, verbose=0)
        for old, new in zip(before[0], layers[0].get_weights()):
            np.testing.assert_array_equal(old, new)
        assert not np.array_equal(before[1][0], layers[1].get_weights()[0])
        ends.append(layers[1].get_weights())
    for one, other in zip(*ends):  # none on JAX
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("norm", [False, True])
def test_scales_of_float8_layers(norm):
    """The side of a player does not turn the sign of what is assigned."""
    x = some_rows()
    found = []
    for sense in ("min", "max"):
        for apart in (False, True):
            layers = layers_of_two()
            for layer in layers:
                layer.quantize("float8")
            game = zero_sum(layers, apart, operator_norm=norm)
            if sense == "min":
                players = [
                    Player(layer.name, layer, product(layers))
                    for layer in layers
                ]
                game = keras_stab.Game(players, operator_norm=norm)
            game.compile(keras_stab.LARS(1e-7, exclude_1d=False))
            history = game.fit(x, batch_size=4, shuffle=False, verbose=0)
            scales = [
                keras.ops.convert_to_numpy(v)
                for layer in layers
                for v in layer.trainable_variables
                if v.overwrite_with_gradient
            ]
            assert len(scales) == 12 and all(np.all(s >= 0) for s in scales)
            norms = history.history.get("operator_norm", [0.0])
            found.append([*scales, np.array(norms)])
    for other in found[1:]:
        for a, b in zip(found[0][:-1], other[:-1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4)
        # That of gradients in float8; those of the scales would double it.
        np.testing.assert_allclose(found[0][-1], other[-1], rtol=1e-2)


def test_double_precision():
    policy = keras.config.dtype_policy()
    with float64():
        keras.config.set_dtype_policy("float64")
        x, y = (keras.Variable(v, dtype="float64") for v in (1.0, 0.5))
        loss = lambda batch, training: x * y + x * x * x / 3.0  # noqa: E731
        players = [Player("x", x, loss), Player("y", y, loss, sense="max")]
        game = keras_stab.Game(players)
        game.compile(keras.optimizers.SGD(0.1))
        run(game, 5)
        ends = [float(keras.ops.convert_to_numpy(v)) for v in (x, y)]
    keras.config.set_dtype_policy(policy)
    a, b = 1.0, 0.5
    for _ in range(5):
        a, b = a - 0.1 * (b + a * a), b + 0.1 * a
    np.testing.assert_allclose(ends, [a, b], rtol=1e-12)


# ---- Bad input ------------------------------------------------------------


def two(first=None, second=None, **options):
    x, y = scalar("x", 1.0), scalar("y", 1.0)
    first = first or (lambda b, t: x * y)
    second = second or (lambda b, t: -x * y)
    return keras_stab.Game(
        [Player("x", x, first), Player("y", y, second)], **options
    )


def test_bad_players():
    x, y = scalar("x", 1.0), scalar("y", 1.0)
    loss = lambda batch, training: x * y  # noqa: E731
    for arguments, message in (
        (("", x, loss), "`name` of a player"),
        (("x", "x", loss), "layers, models or keras.Variables"),
        (("x", x, 3.0), "must be a function"),
        (("x", x, loss, "up"), "`sense` must be one of"),
        (("x", x, loss, "min", 0.0), "`weight` must be above 0"),
        (("x", keras.layers.Dense(2), loss), "not built"),
        (("x", keras.Sequential([keras.layers.Dense(2)]), loss), "not built"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            Player(*arguments)
    both = [Player("x", x, loss), Player("y", [x, y], loss)]
    with pytest.raises(ValueError, match="belongs to player 'x' and"):
        keras_stab.Game(both)
    same = [Player("x", x, loss), Player("x", y, loss)]
    with pytest.raises(ValueError, match="different names"):
        keras_stab.Game(same)
    with pytest.raises(ValueError, match="list of keras_stab.Player"):
        keras_stab.Game([])
    for turns in ("D", ("x",), ("x", "z")):
        with pytest.raises(ValueError, match="every player has a turn"):
            two(turns=turns)
    with pytest.raises(ValueError, match="with turns only one player"):
        two(turns=("x", "y"), operator_norm=True)
    with pytest.raises(ValueError, match="name of a layer of a player"):
        two(predict_with="generator")


def test_a_variable_that_nobody_owns():
    layer = keras.layers.Dense(1)
    layer.build((None, 1))
    game = two(parts={"layer": layer})
    with pytest.raises(ValueError, match="'dense.*kernel' belongs to no"):
        game.compile("sgd")
    layer.trainable = False
    game.compile("sgd")
    run(game, 1)
    with pytest.raises(ValueError, match="say which one `predict`"):
        game.predict(step_data(), verbose=0)


def test_optimizers_that_do_not_suit():
    for optimizer, message in (
        (keras_stab.GRAIN("sgd"), "GRAIN does not work in a Game"),
        (keras_stab.SAM("sgd"), "SAM does not work"),
        (keras_stab.IRE("adamw"), "IRE does not work"),
        ({"x": keras_stab.SAM("sgd"), "y": "sgd"}, "SAM does not work"),
        (SGD(0.1, global_clipnorm=1.0), "`global_clipnorm` of a joint"),
        (
            keras_stab.Lookahead(SGD(0.1, global_clipnorm=1.0)),
            "`global_clipnorm` of a joint",
        ),
        ({"x": "sgd"}, "One optimizer is needed for each player"),
        ({}, "must name the players"),
        (
            {"x": keras.optimizers.LossScaleOptimizer(SGD()), "y": "sgd"},
            "belongs outside",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            two().compile(optimizer)
    shared = SGD()
    with pytest.raises(ValueError, match="same optimizer object"):
        two().compile({"x": shared, "y": shared})
    # Per player it is fine.
    two().compile({"x": SGD(0.1, global_clipnorm=1.0), "y": "adam"})
    for optimizer, message in (
        (keras_stab.Lookahead("sgd"), r"Lookahead\(PlayerOptimizers\("),
        (
            {"x": SGD(gradient_accumulation_steps=2), "y": "sgd"},
            "gradient_accumulation_steps",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            two(turns=("x", "y")).compile(optimizer)


def test_losses_that_cannot_be():
    x = scalar("x", 1.0)
    seeds = keras.random.SeedGenerator(1)
    dense = keras.layers.Dense(1, activity_regularizer="l2")
    dense.build((None, 1))
    stop = keras.ops.stop_gradient

    def noisy(batch, training):
        return x * keras.random.normal((), seed=seeds)

    for own, loss, message in (
        (x, lambda batch, t: keras.ops.sum(batch), "does not depend on"),
        (x, lambda batch, t: stop(x.value), "does not depend on"),
        (x, lambda batch, t: x * batch, "must be a scalar"),
        (x, noisy, "which the game does not track"),
        (dense, lambda b, t: keras.ops.sum(dense(b)), "adds a loss of its own"),
    ):
        y = scalar("y", 1.0)
        right = Player("other", y, lambda batch, t: y * y)
        game = keras_stab.Game([right, Player("wrong", own, loss)])
        game.compile("sgd")
        with pytest.raises(ValueError, match=message):
            game.train_on_batch(step_data())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"loss": "mse"}, r"no `loss` .* Player\('x', .*Received: loss='mse'"),
        ({"loss_weights": [1.0]}, "no `loss_weights` .* has a weight"),
        ({"metrics": ["mae"]}, "takes no `metrics`.*parts=.*Received"),
        ({"lossy": 1}, "no argument `lossy`.*`optimizer`.*Received: lossy=1"),
    ],
)
def test_what_a_model_is_compiled_with_and_a_game_not(arguments, message):
    with pytest.raises(ValueError, match=message):
        two().compile("sgd", **arguments)


def test_a_loss_as_second_argument():
    with pytest.raises(ValueError, match="no `loss` .*Received: loss='mse'"):
        two().compile("sgd", "mse")


@pytest.mark.parametrize(
    "loss, message",
    [
        (lambda batch: 0.0, r"loss\(batch, training\).*parameters \(batch\)"),
        (lambda: 0.0, r"loss\(batch, training\).*parameters \(\)"),
        (lambda batch, game: 0.0, "`training` is True in `fit`.*batch, game"),
        (lambda a, b, c: 0.0, r"'c'.*parameters \(a, b, c\)"),
        ("mse", "not a loss of Keras.*Received: loss='mse'"),
        (keras.losses.MeanSquaredError(), "call that one inside"),
        (keras.losses.MeanSquaredError, "must be a function"),
    ],
)
def test_a_loss_that_cannot_be_called(loss, message):
    with pytest.raises(TypeError, match=message):
        Player("x", scalar("x", 1.0), loss)


def slope(function, x):
    """The gradient, as a user of each backend takes it within a loss."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.grad(lambda x: keras.ops.sum(function(x)))(x)
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            total = keras.ops.sum(function(x))
        return tape.gradient(total, x)
    import torch

    x = x.detach().requires_grad_()
    total = keras.ops.sum(function(x))
    return torch.autograd.grad(total, x, create_graph=True)[0]


def test_evaluation_with_a_gradient_penalty():
    """Keras evaluates without gradients on PyTorch; a loss may need them."""
    critic = keras.layers.Dense(1)
    critic.build((None, 2))
    kernel = np.array([[3.0], [4.0]], "float32")
    critic.kernel.assign(kernel)

    def penalty(batch, training):
        slopes = slope(lambda x: keras.ops.square(critic(x)), batch)
        return keras.ops.mean(keras.ops.sum(keras.ops.square(slopes), axis=1))

    game = keras_stab.Game([Player("critic", critic, penalty)])
    game.compile(keras.optimizers.SGD(1e-4))
    x = np.array([[1.0, 2.0], [0.5, -1.0]], "float32")
    slopes = 2.0 * (x @ kernel) @ kernel.T
    expected = np.mean(np.sum(np.square(slopes), axis=1))
    logs = game.evaluate(x, verbose=0, return_dict=True)
    assert logs["critic_loss"] == pytest.approx(expected, rel=1e-5)
    history = game.fit(x, validation_data=(x,), verbose=0).history
    assert history["critic_loss"] == [pytest.approx(expected, rel=1e-5)]
    assert history["val_critic_loss"][0] < expected


def test_what_cannot_be_saved(tmp_path):
    game = make_gan()
    game.players[0].loss = lambda batch, training: 0.0
    with pytest.raises(NotImplementedError, match="made inside another one"):
        game.save(tmp_path / "game.keras")
    with pytest.raises(NotImplementedError, match="outside of any layer"):
        x = scalar("x", 1.0)
        keras_stab.Game([Player("x", x, make_gan)]).get_config()
