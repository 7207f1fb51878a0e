"""Batches of 4096: LARS and TVLARS, and coming from other packages

With 4096 rows in a batch an epoch has 15 steps. TVLARS needs no warm-up; LARS
(the lines that are commented out) needs one. Printed: the test accuracy (82.7 %
in one run of TVLARS on PyTorch, in 78 s of CPU time).

Coming from elsewhere: the trust coefficient is 0.001 here, as in optax and
timm (apex LARC: `trust_coefficient=0.02, clip_mode="larc"`), and learning rates
are those of these packages. Biases and scales are neither adapted nor decayed
here; optax, apex and tf-models do both unless told otherwise
(`exclude_1d=False`). timm and apex add the norms of
gradient and decay: `norm="separate"`. optax has the rate inside the momentum:
`momentum_style="inside"`.
"""

import keras

import keras_stab

BATCH, EPOCHS = 4096, 10
layers = keras.layers
(x, y), (x_test, y_test) = keras.datasets.fashion_mnist.load_data()
x, x_test = (a[..., None].astype("float32") / 255 for a in (x, x_test))
steps = EPOCHS * -(-len(x) // BATCH)
optimizer = keras_stab.TVLARS.from_steps(
    hold_steps=0.1 * steps,
    decay_steps=0.6 * steps,
    learning_rate=54.0,  # as large as that: a layer's step is 0.001 of it
    excluded_lr_scale=0.01,  # for biases and scales, which take the raw rate
)
# rate = keras_stab.WarmupCosine(54.0, round(0.2 * steps), steps)
# optimizer = keras_stab.LARS(rate, excluded_lr_scale=0.01)


def convolution(filters):
    return [
        layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False),
        layers.BatchNormalization(momentum=0.9),  # few steps: quick averages
        layers.ReLU(),
    ]


model = keras.Sequential(
    [
        keras.Input((28, 28, 1)),
        *convolution(16),
        *convolution(32),
        layers.GlobalAveragePooling2D(),
        layers.Dense(10),
    ]
)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(optimizer, loss, metrics=["accuracy"])
model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=2)
print("test accuracy:", model.evaluate(x_test, y_test, verbose=0)[1])
