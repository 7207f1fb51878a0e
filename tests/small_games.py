"""Small games that several tests train."""

import keras
import numpy as np

import keras_stab

layers = keras.layers


def fakes(game, training):
    noise = keras.random.normal((8, 3), seed=game.seed_generator)
    return game.get_layer("generator")(noise, training=training)


@keras.saving.register_keras_serializable(package="keras_stab_tests")
def critic_loss(batch, training, game):
    critic = game.get_layer("critic")
    real = critic(batch, training=training)
    fake = critic(fakes(game, training), training=training)
    return keras.ops.mean(keras.ops.softplus(-real)) + keras.ops.mean(
        keras.ops.softplus(fake)
    )


@keras.saving.register_keras_serializable(package="keras_stab_tests")
def generator_loss(batch, training, game):
    fake = game.get_layer("critic")(fakes(game, training), training=training)
    return keras.ops.mean(keras.ops.softplus(-fake))


def make_gan(turns="simultaneous", seed=5, **options):
    """Batch norm, dropout and spectral normalisation in a GAN of points."""
    keras.utils.set_random_seed(seed)
    generator = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(6, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dense(2),
        ],
        name="generator",
    )
    critic = keras.Sequential(
        [
            keras.Input((2,)),
            layers.SpectralNormalization(layers.Dense(6)),
            layers.LeakyReLU(),
            layers.Dropout(0.2, seed=seed),
            layers.Dense(1),
        ],
        name="critic",
    )
    return keras_stab.Game(
        [
            keras_stab.Player("D", critic, critic_loss),
            keras_stab.Player("G", generator, generator_loss),
        ],
        predict_with="generator",
        turns=turns,
        seed=seed,
        **options,
    )


def points(rows=32):
    random = np.random.default_rng(0)
    return random.normal([2.0, -1.0], 0.5, (rows, 2)).astype("float32")


def values(variables):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]
