"""WGAN-GP: a gradient penalty on three backends

`keras_stab.games.input_gradient` gives the gradient of the critic by its input,
to be differentiated again, in `fit` and in validation. The critic moves five
times for each step of the generator. Printed: the losses, and the mean norm of
the critic's gradients, which the penalty keeps near 1 (1.02 in one run on
PyTorch, in 12 s of CPU time). The run is too short for the generator to rest.
"""

import keras
import numpy as np

import keras_stab
from keras_stab.games import input_gradient

EPOCHS = 10
layers, ops = keras.layers, keras.ops


def network(inputs, outputs, name):
    hidden = layers.Dense(64, "relu"), layers.Dense(64, "relu")
    all_layers = [keras.Input((inputs,)), *hidden, layers.Dense(outputs)]
    return keras.Sequential(all_layers, name=name)


critic, maker = network(2, 1, "critic"), network(8, 2, "maker")


def fakes(game):
    return maker(keras.random.normal((64, 8), seed=game.seed_generator))


def critic_loss(real, training, game):
    fake = fakes(game)
    share = keras.random.uniform((64, 1), seed=game.seed_generator)
    slopes = input_gradient(critic, share * real + (1 - share) * fake)
    penalty = ops.mean(ops.square(ops.norm(slopes, axis=-1) - 1.0))
    return ops.mean(critic(fake)) - ops.mean(critic(real)) + 10.0 * penalty


def maker_loss(real, training, game):
    return -ops.mean(critic(fakes(game)))


D = keras_stab.Player("D", critic, critic_loss)
G = keras_stab.Player("G", maker, maker_loss)
game = keras_stab.Game([D, G], turns=5 * ("D",) + ("G",), predict_with="maker")
adam = keras.optimizers.Adam
game.compile({p: adam(1e-3, beta_1=0.0, beta_2=0.9) for p in ("D", "G")})
real = np.random.normal([3.0, 0.0], size=(6400, 2)).astype("float32")
options = {"batch_size": 64, "epochs": EPOCHS, "verbose": 2}
test = {"validation_data": (real[:640],), "validation_batch_size": 64}
game.fit(real, **options, **test)
made = game.predict(np.random.normal(size=(1000, 8)), verbose=0)
norms = ops.norm(input_gradient(critic, made), axis=-1)
print("mean norm:", ops.convert_to_numpy(norms).mean())
