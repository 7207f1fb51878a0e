"""A GAN with two optimizers, before and after

`Before` is what GAN tutorials show: a `train_step` for one backend, with two
optimizers and two tapes. Below it, the same GAN with the same losses as a
`Game`, on every backend: a loss reaches the weights of its own player only,
and `compile` takes both optimizers. Printed: the losses, at the end near 2 ln 2
and ln 2 (the critic cannot tell). It takes 10 s of CPU time (PyTorch).
"""

import keras
import numpy as np

from keras_stab import Game
from keras_stab import Player

EPOCHS = 10
adam, dense = keras.optimizers.Adam, keras.layers.Dense
bce = keras.losses.BinaryCrossentropy(from_logits=True)
real, fake = np.ones((64, 1)), np.zeros((64, 1))
seed = keras.random.SeedGenerator(0)
critic = keras.Sequential([keras.Input((2,)), dense(64, "relu"), dense(1)])
maker = keras.Sequential([keras.Input((8,)), dense(64, "relu"), dense(2)])


def d_loss(points, training):
    made = maker(keras.random.normal((64, 8), seed=seed))
    return bce(real, critic(points)) + bce(fake, critic(made))


def g_loss(points, training):
    return bce(real, critic(maker(keras.random.normal((64, 8), seed=seed))))


class Before(keras.Model):
    def compile(self, d_optimizer, g_optimizer):
        super().compile()
        self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer

    def train_step(self, points):
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = d_loss(points, training=True)
        weights = critic.trainable_weights
        self.d_optimizer.apply(tape.gradient(loss, weights), weights)
        with tf.GradientTape() as tape:
            loss = g_loss(points, training=True)
        weights = maker.trainable_weights
        self.g_optimizer.apply(tape.gradient(loss, weights), weights)
        return {"G_loss": loss}


after = Game(
    [Player("D", critic, d_loss), Player("G", maker, g_loss)],
    parts={"seed": seed},
)
after.compile({"D": adam(1e-3, beta_1=0.5), "G": adam(1e-3, beta_1=0.5)})
points = np.random.normal(loc=[3.0, 0.0], size=(6400, 2)).astype("float32")
after.fit(points, batch_size=64, epochs=EPOCHS, verbose=2)
