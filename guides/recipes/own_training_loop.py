"""A training loop of your own, on each backend

A method that takes plain gradients is an optimizer like any other: here an
average around GRAIN, whose groups are four successive batches. SAM, IRE and
GRAIN within a batch ask for gradients themselves: loop `model.train_on_batch`.
Printed: the loss at trained weights and average. 8 s of CPU time (PyTorch).
"""

import keras
import numpy as np

import keras_stab

EPOCHS = 60
x = np.random.normal(size=(512, 8)).astype("float32")
y = (x @ np.arange(8) + np.random.normal(size=512)).astype("float32")[:, None]
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
grain = keras_stab.GRAIN(keras.optimizers.Adam(0.1), 4, across="batches")
optimizer = keras_stab.WeightAveraging(grain, method="ema", decay=0.9)
mse, weights = keras.losses.MeanSquaredError(), model.trainable_variables
model.compile(optimizer, mse)  # for `evaluate`: the loop needs none
optimizer.build(weights)
state = weights, optimizer.variables

if keras.backend.backend() == "jax":
    import jax

    @jax.jit
    def update(values, slots, x, y):
        gradients = jax.grad(
            lambda values: mse(y, model.stateless_call(values, [], x)[0])
        )(values)
        return optimizer.stateless_apply(slots, gradients, values)

    def step(x, y):
        new = update(*([v.value for v in part] for part in state), x, y)
        for variable, value in zip(sum(state, []), sum(new, [])):
            variable.assign(value)
elif keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = mse(y, model(x, training=True))
        optimizer.apply(tape.gradient(loss, weights), weights)
else:

    def step(x, y):
        model.zero_grad()
        mse(y, model(x, training=True)).backward()
        optimizer.apply([v.value.grad for v in weights], weights)


for start in EPOCHS * list(range(0, 512, 32)):
    step(x[start : start + 32], y[start : start + 32])
print("trained weights:", model.evaluate(x, y, verbose=0))
with keras_stab.averaged_weights(model):
    print("average:", model.evaluate(x, y, verbose=0))
