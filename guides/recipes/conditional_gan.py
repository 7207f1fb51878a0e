"""A conditional GAN, with two critic steps for each of the generator

Both networks are told which digit is meant; `turns` lets the critic D move
twice for each step of the generator G. A batch of `fit` has images and labels.
Printed: the share of fakes that a classifier of the real digits reads as the
digit that was asked for (66 % in one run on PyTorch). Needs scikit-learn and
takes 21 s of CPU time there.
"""

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

import keras_stab

EPOCHS = 60
layers, ops = keras.layers, keras.ops
bce = keras.losses.BinaryCrossentropy(from_logits=True)


def network(name, inputs, outputs):
    x, digit = keras.Input((inputs,)), keras.Input((), dtype="int32")
    hidden = layers.Concatenate()([x, layers.Embedding(10, 10)(digit)])
    hidden = layers.Dense(128, "relu")(hidden)
    return keras.Model([x, digit], layers.Dense(outputs)(hidden), name=name)


D, G = network("D", 64, 1), network("G", 16, 64)


def on_fakes(digits, game):
    noise = keras.random.normal((64, 16), seed=game.seed_generator)
    return D([G([noise, digits]), digits])


def d_loss(batch, training, game):
    on_real, on_fake = D(list(batch)), on_fakes(batch[1], game)
    return bce(ops.ones((64, 1)), on_real) + bce(ops.zeros((64, 1)), on_fake)


def g_loss(batch, training, game):
    return bce(ops.ones((64, 1)), on_fakes(batch[1], game))


images, digits = load_digits(return_X_y=True)
images, digits = images[:1792] / 8.0 - 1.0, digits[:1792].astype("int32")
game = keras_stab.Game(
    [keras_stab.Player("D", D, d_loss), keras_stab.Player("G", G, g_loss)],
    turns=("D", "D", "G"),
    predict_with="G",
)
adam = keras.optimizers.Adam
game.compile({"D": adam(1e-3, beta_1=0.5), "G": adam(1e-3, beta_1=0.5)})
game.fit(images, digits, batch_size=64, epochs=EPOCHS, verbose=2)
asked = np.arange(500, dtype="int32") % 10
made = game.predict([np.random.normal(size=(500, 16)), asked], verbose=0)
read = KNeighborsClassifier(3).fit(images, digits).predict(made)
print(f"{100 * np.mean(read == asked):.0f} % are read as the digit asked for")
