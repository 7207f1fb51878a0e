"""The classifier with 43 parameters that the vectors were recorded with."""

import json
from pathlib import Path

import keras
import numpy as np

FOLDER = Path(__file__).parent / "vectors"
SAM = json.loads((FOLDER / "sam.json").read_text())
IRE = json.loads((FOLDER / "ire.json").read_text())
PROBLEM = SAM["problem"]
LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@keras.saving.register_keras_serializable(package="keras_stab_tests")
class CoupledSGD(keras.optimizers.SGD):
    """Adds the decay to the gradient, as PyTorch does."""

    def __init__(self, *args, l2=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.l2 = l2

    def update_step(self, gradient, variable, learning_rate):
        gradient = gradient + self.l2 * keras.ops.convert_to_tensor(variable)
        super().update_step(gradient, variable, learning_rate)


class Table(keras.optimizers.schedules.LearningRateSchedule):
    """The learning rate of each step."""

    def __init__(self, rates):
        self.rates = rates

    def __call__(self, step):
        rates = keras.ops.convert_to_tensor(self.rates, "float32")
        return keras.ops.take(rates, keras.ops.cast(step, "int32"))

    def get_config(self):
        return {"rates": self.rates}


def base(run):
    """The base optimizer of a recorded run."""
    settings = run["base"]
    if settings["name"] == "SGD":
        return CoupledSGD(
            settings["learning_rate"],
            momentum=settings["momentum"],
            l2=settings["l2_added_to_gradient"],
        )
    rate = settings["learning_rate"]
    if rate == "learning_rate_by_step":
        rate = Table(run["learning_rate_by_step"])
    return keras.optimizers.AdamW(
        rate,
        beta_1=settings["beta_1"],
        beta_2=settings["beta_2"],
        epsilon=settings["epsilon"],
        weight_decay=settings["decoupled_weight_decay"],
    )


def network():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, activation="tanh"),
            keras.layers.Dense(3),
        ]
    )
    set_parameters(model, PROBLEM["initial_parameters"])
    return model


def set_parameters(model, flat):
    weights, flat = [], list(flat)
    for shape in PROBLEM["shapes"]:
        size = int(np.prod(shape))
        weights.append(np.array(flat[:size], "float32").reshape(shape))
        flat = flat[size:]
    model.set_weights(weights)


def parameters(model):
    return flattened(model.get_weights())


def flattened(tensors):
    arrays = [keras.ops.convert_to_numpy(t).ravel() for t in tensors]
    return np.concatenate(arrays)


def batch(step):
    rows = PROBLEM["batch_rows"][step % 4]
    x = np.array(PROBLEM["inputs"], "float32")[rows]
    return x, np.array(PROBLEM["labels"], "int32")[rows]


def assert_follows(run, optimizer, tolerance=2e-5, loss=LOGITS, floor=0.0):
    """Trains like the recorded run; compares losses and parameters."""
    model = network()
    model.compile(optimizer, loss)
    for step, wanted in enumerate(run["loss_by_step"]):
        actual = model.train_on_batch(*batch(step)) - floor
        np.testing.assert_allclose(actual, wanted, atol=tolerance)
        if str(step) in run["params_after"]:
            np.testing.assert_allclose(
                parameters(model),
                run["params_after"][str(step)],
                atol=tolerance,
            )
    return model
