"""keras.applications with SAM, mixed precision, cosine and an average

A MobileNet learns small pictures in bfloat16. SAM is around SGD, whose rate
falls along a cosine; the moving average is outside of both. Batch-norm
statistics belong to weights, so the callback computes those of the average
from training data, for each validation and at the end. Printed: the accuracy
of the trained weights and of the average (84.5 and 85.5 % in one run on
PyTorch, in 40 s of CPU time). The data need scikit-learn.
"""

import keras
import numpy as np
from sklearn.datasets import load_digits

import keras_stab

ROWS, EPOCHS = 1500, 5
keras.config.set_dtype_policy("mixed_bfloat16")  # on older GPUs mixed_float16
x, y = load_digits(return_X_y=True)
x = np.repeat(x.reshape(-1, 8, 8, 1) / 8.0 - 1.0, 3, axis=-1)
x = x.repeat(4, axis=1).repeat(4, axis=2).astype("float32")  # 32 x 32
train, test = (x[:ROWS], y[:ROWS]), (x[ROWS:], y[ROWS:])

network = keras.applications.MobileNet(
    (32, 32, 3), alpha=0.25, include_top=False, pooling="avg", weights=None
)
scores = keras.layers.Dense(10, dtype="float32")(network.output)
model = keras.Model(network.inputs, scores)
for layer in model.layers:
    if isinstance(layer, keras.layers.BatchNormalization):
        layer.momentum = 0.9  # a short run: the statistics have to follow

steps = EPOCHS * -(-len(train[0]) // 50)
rate = keras_stab.WarmupCosine(0.1, steps // 10, steps)
sam = keras_stab.SAM(keras.optimizers.SGD(rate, momentum=0.9), rho=0.05)
model.compile(
    keras_stab.WeightAveraging(sam, method="ema", decay=0.95),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
average = keras_stab.AveragedWeights(batch_norm_data=train[0])
model.fit(
    *train,
    batch_size=50,
    epochs=EPOCHS,
    validation_data=test,
    callbacks=[average],
    verbose=2,
)
print("trained weights:", model.evaluate(*test, verbose=0)[1])
with keras_stab.averaged_weights(model, train[0]):
    print("average:", model.evaluate(*test, verbose=0)[1])
