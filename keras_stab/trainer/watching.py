"""Train steps are watched for spikes while a callback asks for it."""

import contextlib

from keras_stab import keras_internals
from keras_stab.gradients.spike_watch import set_watched
from keras_stab.gradients.spike_watch import watched
from keras_stab.memory import remembered
from keras_stab.trainer.fitting import given_callbacks

_TOPIC = "watched steps"
_STEP = "train_step"


@contextlib.contextmanager
def watching_as_asked(model, args, kwargs):
    """Within `fit`, watches as one of its callbacks asks.

    From before Keras makes the train function, and before a callback loads
    what was saved; until it ends, by an error too.
    """
    stop_watching(model)
    _, callbacks = given_callbacks(args, kwargs)
    for callback in callbacks:
        if hasattr(callback, "watches_training"):
            callback.set_model(model)
            callback.begin_watching()
    try:
        yield
    finally:
        stop_watching(model)


def begin_watching(model, watch, rule):
    """Watches the train steps of a model from now on.

    Args:
        model: A compiled model.
        watch: The `SpikeWatch` of the model.
        rule: The `SpikeRule`.
    """
    if watched(model) == (watch, rule):
        return
    stop_watching(model)
    set_watched(model, (watch, rule))

    # A function of its own: JAX knows what it has traced by the function.
    def train_step(*state_and_data):
        return type(model).train_step(model, *state_and_data)

    known = remembered(model, _TOPIC)
    # `compile` makes another tracker, after which nothing made before fits.
    key = (keras_internals.loss_tracker(model), rule)
    made = known.get("made")
    known["plain"] = (key, model.train_function)
    step, function = train_step, None
    if made is not None and made[0] == key:
        _, step, function = made
    known["step"] = step
    # Past Keras, which would look through it for variables.
    vars(model)[_STEP] = step
    model.train_function = function


def stop_watching(model):
    """Makes the train steps again as if there had been no watch."""
    if watched(model) is None:
        return
    watch, rule = watched(model)
    set_watched(model, None)
    known = remembered(model, _TOPIC)
    key = (keras_internals.loss_tracker(model), rule)
    known["made"] = (key, known.pop("step"), model.train_function)
    before, function = known.pop("plain")
    del vars(model)[_STEP]
    model.train_function = function if before == key else None
