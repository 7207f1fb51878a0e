"""RecoverFromSpikes(action="rollback"): snapshots, and the way back to them."""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from marks import ON_TORCH
from test_spikes import BATCH
from test_spikes import BATCHES
from test_spikes import X
from test_spikes import Y
from test_spikes import counts
from test_spikes import fit
from test_spikes import network
from test_spikes import plain_network
from test_spikes import state

import keras_stab
from keras_stab.numerics import unusual

EVERY = 4


def rollback(**arguments):
    return keras_stab.RecoverFromSpikes(
        **{
            "action": "rollback",
            "window": 8,
            "snapshot_every": EVERY,
            "check_every": 1,
            **arguments,
        }
    )


def broken(*batches):
    x = X.copy()
    for batch in batches:
        x[batch * BATCH, 1] = np.nan
    return x


class States(keras.callbacks.Callback):
    """Notes all that is trained, before each batch, and the metrics."""

    def __init__(self):
        super().__init__()
        self.notes = []

    def on_train_batch_begin(self, batch, logs=None):
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        own = {id(v) for v in self.model.spike_watch.variables}
        metrics = [v for v in self.model.metrics_variables if id(v) not in own]
        metrics = [np.array(keras.ops.convert_to_numpy(v)) for v in metrics]
        self.notes.append([*state(self.model), *metrics])


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


OPTIMIZERS = {
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "accumulation": lambda: keras.optimizers.SGD(
        0.1, momentum=0.9, gradient_accumulation_steps=3
    ),
    "nest": lambda: keras_stab.WeightAveraging(
        keras_stab.SAM(keras_stab.GRAIN("adam", 2)), start_step=0
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("keep_on", ["host", "device"])
def test_the_last_good_snapshot_comes_back(name, keep_on):
    """Taken before batches 0, 4, 8 and 12; good when the next is taken."""
    states = States()
    model = network(OPTIMIZERS[name]())
    history = fit(
        model, rollback(keep_on=keep_on), states, x=broken(13, 19), epochs=1
    )
    # Before batch 14 it is as it was before batch 8.
    assert_same(states.notes[14], states.notes[8])
    # Snapshots follow before 16 and 20: the one of 8 is good meanwhile.
    assert_same(states.notes[20], states.notes[8])
    assert history["spikes/count"] == history["spikes/rollbacks"] == [2]
    assert np.isfinite(history["loss"][0])
    assert all(np.all(np.isfinite(v)) for v in state(model))
    assert counts(model)[unusual.STEPS] == BATCHES


def test_the_number_is_read_when_it_is_time():
    states = States()
    model = network("adam")
    fit(model, rollback(check_every=3), states, x=broken(13))
    assert not np.all(np.isfinite(states.notes[14][0]))
    assert_same(states.notes[15], states.notes[8])


def test_the_last_batch_of_an_epoch():
    """Validation, logs and the next epoch see nothing of its spike."""
    model = network(OPTIMIZERS["nest"]())
    history = fit(
        model,
        rollback(check_every=1000),
        x=broken(BATCHES - 1),
        epochs=2,
        validation_data=(X, Y),
    )
    assert history["spikes/rollbacks"] == [1, 1]
    for name in ("loss", "val_loss", "accuracy"):
        assert np.all(np.isfinite(history[name])), name
    assert all(np.all(np.isfinite(v)) for v in state(model))


def test_a_calm_run_is_the_same_with_it():
    ends = []
    for callbacks in ([], [rollback()]):
        model = network(keras.optimizers.SGD(0.1, momentum=0.9))
        fit(model, *callbacks, epochs=2)
        ends.append(state(model))
    for old, new in zip(*ends, strict=True):
        # XLA rounds batch-norm statistics otherwise in another program.
        within = 0.0 if ON_TORCH else 1e-6
        np.testing.assert_allclose(old, new, rtol=within, atol=within)


def test_the_best_snapshot_is_the_end():
    states = States()
    model = network("adam")
    with pytest.warns(UserWarning, match="max_recoveries=2"):
        history = fit(
            model,
            rollback(max_recoveries=2),
            states,
            x=broken(*range(13, BATCHES)),
            epochs=3,
        )
    assert len(history["loss"]) == 1
    assert len(states.notes) == 17  # the third spike is seen before the 17th
    seen = [states.notes[i] for i in (0, 4, 8)]
    trained = len(state(model))
    assert any(
        all(map(np.array_equal, state(model), note[:trained])) for note in seen
    )


def test_a_cool_down_follows():
    model = network("adam")
    fit(model, rollback(rate_factor=0.5, cool_down=100), x=broken(13))
    assert counts(model)[unusual.COOLING] == 100 - (BATCHES - 14)


# Only what is not finite is a spike: IRE draws other numbers on each backend,
# and of eight steps one is unusual now and then.
ACTIONS = {
    "skip": lambda: keras_stab.RecoverFromSpikes(
        window=8, threshold=1e3, rate_factor=0.5, cool_down=30
    ),
    "rollback": lambda: rollback(threshold=1e3),
}
# What a run that goes on meets: a spike before another snapshot is good.
SECOND = broken(1)


def all_state(model):
    watch = model.spike_watch.variables
    return [*state(model), *map(keras.ops.convert_to_numpy, watch)]


WORKER = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np
import test_rollback as test

for action, make in test.ACTIONS.items():
    model, callback = test.plain_network(), make()
    model.optimizer.build(model.trainable_variables)
    callback.set_model(model)
    model.load_weights({folder!r} + "/" + action + ".weights.h5")
    test.fit(model, callback, x=test.SECOND)
    np.savez({folder!r} + "/" + action, *test.all_state(model))
"""


def test_a_fresh_process_goes_on(tmp_path):
    ends = {}
    for action, make in ACTIONS.items():
        model, callback = plain_network(), make()
        # The last batch but one begins a cool-down.
        fit(model, callback, x=broken(BATCHES - 2))
        model.save_weights(tmp_path / f"{action}.weights.h5")
        fit(model, callback, x=SECOND)
        ends[action] = all_state(model)
        assert counts(model)[unusual.SPIKES] == 2
    worker = WORKER.format(
        tests=str(Path(__file__).parent), folder=str(tmp_path)
    )
    done = subprocess.run(
        [sys.executable, "-c", worker], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for action, end in ends.items():
        with np.load(tmp_path / f"{action}.npz") as arrays:
            assert_same(end, [arrays[name] for name in arrays.files])


def test_backup_and_restore(tmp_path):
    """A run that was lost ends as the one that was not."""
    x = broken(13, BATCHES - 2)
    whole = plain_network()
    fit(whole, rollback(), x=x, epochs=2)

    def fail(epoch, logs):
        raise KeyError("on purpose")

    lost = keras.callbacks.LambdaCallback(on_epoch_end=fail)
    backup = keras.callbacks.BackupAndRestore(tmp_path)
    with pytest.raises(KeyError):
        fit(plain_network(), rollback(), backup, lost, x=x, epochs=2)
    again = plain_network()
    backup = keras.callbacks.BackupAndRestore(tmp_path)
    fit(again, rollback(), backup, x=x, epochs=2)
    assert_same(all_state(whole), all_state(again))
