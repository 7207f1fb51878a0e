"""A small GAN on Fashion-MNIST, judged by the features of a classifier."""

import keras
import numpy as np
from keras import layers

import keras_stab
from stability import arms
from stability import images
from stability.pretrained_features import cached
from stability.task import Task

NOISE, WIDTH, FEATURES = 32, 64, 16
SIDE = 14
# A step of RAPP or CEG+ has no moments: its rate is another unit.
PLAIN = 30.0


class SmallGan(Task):
    """Two perceptrons on pictures of 14 x 14 pixels, without normalisation.

    Args:
        steps: Int, gradients of a run; divided by 6, for the methods that
            take two or three for a step.
        sizes: Ints: pictures to train on, held out, and to test on.
        fakes: Int, pictures that are judged.
        batch_size: Int.
    """

    name = "small_gan"
    title = "GAN of two perceptrons, Fashion-MNIST"
    metric = "Frechet distance"
    higher_is_better = False
    arms = arms.GAMES
    rates = (1e-3, 3e-3, 1e-2, 3e-2)

    def __init__(
        self,
        steps=600,
        sizes=(8000, 4000, 4000),
        fakes=2000,
        batch_size=32,
    ):
        super().__init__()
        if steps % 6:
            raise ValueError(f"6 must divide `steps`. Received: steps={steps}")
        self.steps, self.sizes = steps, sizes
        self.fakes, self.batch_size = fakes, batch_size

    def settings(self):
        return {**super().settings(), "batch_size": self.batch_size}

    def prepare(self, data, cache):
        if data is None:
            parts = images.made_up((2 * SIDE, 2 * SIDE, 1), self.sizes)
        else:
            parts = images.read_fashion_mnist(data, self.sizes)
        parts = {part: (shrunk(x), y) for part, (x, y) in parts.items()}
        self.pictures, classes = parts["pool"]
        self.judge = make_classifier()
        if data is None:
            weights = trained_weights(self.judge, self.pictures, classes)
        else:
            weights = cached(
                cache / "gan_judge.npz",
                lambda: trained_weights(self.judge, self.pictures, classes),
            )
        self.judge.set_weights([weights[name] for name in sorted(weights)])
        self.judge = keras.Model(
            self.judge.inputs, self.judge.get_layer("features").output
        )
        self.real = {
            part: self._moments(parts[part][0]) for part in ("held_out", "test")
        }
        noise = np.random.default_rng(0).normal(size=(self.fakes, NOISE))
        self.noise = noise.astype("float32")

    def _moments(self, pictures):
        features = self.judge.predict(pictures, batch_size=500, verbose=0)
        features = features.astype("float64")
        return features.mean(axis=0), np.cov(features, rowvar=False)

    def make_model(self):
        generator = make_generator()
        discriminator = make_discriminator()
        batch, ops = self.batch_size, keras.ops

        def on_fakes(training, game):
            noise = keras.random.normal(
                (batch, NOISE), seed=game.seed_generator
            )
            fakes = generator(noise, training=training)
            return discriminator(fakes, training=training)

        def discriminator_loss(pictures, training, game):
            on_real = discriminator(pictures, training=training)
            return ops.mean(ops.softplus(-on_real)) + ops.mean(
                ops.softplus(on_fakes(training, game))
            )

        def generator_loss(pictures, training, game):
            return ops.mean(ops.softplus(-on_fakes(training, game)))

        return keras_stab.Game(
            [
                keras_stab.Player("D", discriminator, discriminator_loss),
                keras_stab.Player("G", generator, generator_loss),
            ],
            predict_with="generator",
        )

    def make_base(self, rate):
        return keras.optimizers.Adam(rate, beta_1=0.5)

    def plain_steps(self, make, rate):
        return make(arms.scaled(rate, PLAIN))

    def compile(self, model, optimizer):
        model.compile(optimizer)

    def train(self, model, seeds, arm, callbacks=None):
        random = np.random.default_rng([seeds.order, 2])
        rows = random.integers(
            len(self.pictures), size=self.steps * self.batch_size
        )
        model.fit(
            self.pictures[rows],
            batch_size=self.batch_size,
            shuffle=False,
            callbacks=callbacks,
            verbose=0,
        )

    def score(self, model, part):
        fakes = model.predict(self.noise, batch_size=500, verbose=0)
        if not np.isfinite(fakes).all():
            return {self.metric: np.nan}
        return {self.metric: frechet(*self.real[part], *self._moments(fakes))}


def shrunk(pictures):
    """Bytes [rows, 28, 28, 1] as rows of 14 x 14 numbers from -1 to 1."""
    blocks = pictures.reshape(len(pictures), SIDE, 2, SIDE, 2)
    means = blocks.mean(axis=(2, 4), dtype="float32")
    return means.reshape(len(pictures), -1) / 127.5 - 1.0


def make_generator():
    return keras.Sequential(
        [
            keras.Input((NOISE,)),
            layers.Dense(2 * WIDTH, activation="relu"),
            layers.Dense(2 * WIDTH, activation="relu"),
            layers.Dense(SIDE * SIDE, activation="tanh"),
        ],
        name="generator",
    )


def make_discriminator():
    return keras.Sequential(
        [
            keras.Input((SIDE * SIDE,)),
            layers.Dense(WIDTH),
            layers.LeakyReLU(0.2),
            layers.Dense(WIDTH),
            layers.LeakyReLU(0.2),
            layers.Dense(1),
        ],
        name="discriminator",
    )


def make_classifier():
    return keras.Sequential(
        [
            keras.Input((SIDE * SIDE,)),
            layers.Dense(64, activation="relu"),
            layers.Dense(FEATURES, activation="relu", name="features"),
            layers.Dense(images.CLASSES),
        ]
    )


def trained_weights(classifier, pictures, classes):
    """Weights of the classifier by place, trained on real pictures."""
    classifier.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    classifier.fit(pictures, classes, epochs=6, shuffle=False, verbose=0)
    return {f"{i:02}": w for i, w in enumerate(classifier.get_weights())}


def frechet(mean, covariance, other_mean, other_covariance):
    """Squared Frechet distance of two normal distributions."""
    root = square_root(covariance)
    cross = square_root(root @ other_covariance @ root)
    shift = mean - other_mean
    trace = np.trace(covariance + other_covariance - 2.0 * cross)
    return float(shift @ shift + trace)


def square_root(matrix):
    """Square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
