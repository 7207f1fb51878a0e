"""Models with a loss or a train step of their own: a VAE

A loss in `compute_loss` works with every method; so does a `train_step` that
ends in `super().train_step(...)`. One that hands over plain gradients is
refused by methods that ask for others (SAM, IRE, GRAIN within a batch).
Printed: losses and error. Needs scikit-learn; 11 s of CPU time (PyTorch).
"""

import keras
import numpy as np
from sklearn.datasets import load_digits

import keras_stab

EPOCHS, layers, ops = 20, keras.layers, keras.ops
x = np.asarray(load_digits().data / 16.0, "float32")


class VAE(keras.Model):
    def __init__(self):
        super().__init__()
        self.seed = keras.random.SeedGenerator(0)
        self.encoder = layers.Dense(16)  # means, logarithms of variances
        self.decoder = layers.Dense(64, "sigmoid")

    def call(self, x):
        mean, log_variance = ops.split(self.encoder(x), 2, axis=-1)
        noise = keras.random.normal(ops.shape(mean), seed=self.seed)
        point = mean + ops.exp(log_variance / 2) * noise
        return self.decoder(point), mean, log_variance

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        made, mean, log_variance = y_pred
        kl = 0.05 * (mean**2 + ops.exp(log_variance) - 1.0 - log_variance)
        return ops.mean(ops.sum(ops.square(x - made), -1) + ops.sum(kl, -1))


class Brighter(VAE):
    def train_step(self, *state_and_data):  # JAX passes the state too
        *state, data = state_and_data
        x = keras.utils.unpack_x_y_sample_weight(data)[0]
        return super().train_step(*state, (1.1 * x,))


class PlainGradients(VAE):
    def train_step(self, *state_and_data):
        weights = self.trainable_variables
        self.optimizer.apply([ops.zeros(w.shape) for w in weights], weights)


for kind in (VAE, Brighter, PlainGradients):
    model = kind()
    model(x[:1])  # makes the weights
    model.compile(keras_stab.SAM("adam"))
    try:
        history = model.fit(x, epochs=EPOCHS, verbose=0).history
        print(kind.__name__, "has the loss", history["loss"][-1])
    except RuntimeError as error:
        print(kind.__name__, "is refused:", error)
