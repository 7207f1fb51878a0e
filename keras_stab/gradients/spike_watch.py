"""SpikeWatch: what a train step remembers to tell spikes from usual steps."""

import math

import keras
import numpy as np

from keras_stab import keras_internals
from keras_stab.backend import many_tensors
from keras_stab.backend import updates
from keras_stab.numerics.unusual import COUNTS
from keras_stab.numerics.unusual import Rule
from keras_stab.numerics.unusual import judge

MONITORS = ("loss", "gradient_norm")
_SMALLEST_NORM = 1e-30


class SpikeWatch(keras.metrics.Metric):
    """The last losses and gradient norms of a model, and its counts.

    A metric, because of all that a step of JAX hands on this is what neither
    weights nor optimizer state are counted with. It shows no result, and
    `reset_state` leaves it as it is.

    Attributes:
        window: Variable `[steps, 2]`: the last finite losses and logarithms of
            gradient norms, those of spikes too.
        counts: Variable, integers: steps seen; steps in the window, past its
            length too; spikes; steps of a cool-down that are left; recoveries.
    """

    def __init__(self, name="spike_watch"):
        super().__init__(name=name)
        self._own = []
        # An object with `save` and `load`, for what is saved beside these.
        self.companion = None

    def set_up(self, length):
        """Begins with an empty window, unless it has this length already."""
        if self._own and self.window.shape[0] == length:
            return
        # Past Keras, which would keep those of another length too.
        vars(self)["_own"] = [
            keras.Variable(
                initializer="zeros",
                shape=shape,
                dtype=dtype,
                trainable=False,
                name=name,
            )
            for shape, dtype, name in (
                ((length, 2), "float32", "window"),
                ((len(COUNTS),), "int32", "counts"),
            )
        ]

    @property
    def variables(self):
        return list(self._own)

    @property
    def window(self):
        return self._own[0]

    @property
    def counts(self):
        return self._own[1]

    def reset_state(self):
        pass

    def result(self):
        return {}

    def update_state(self, *args, **kwargs):
        pass

    def save_own_variables(self, store):
        for variable in self._own:
            store[variable.name] = keras.ops.convert_to_numpy(variable)
        if self.companion is not None:
            self.companion.save(store)

    def load_own_variables(self, store):
        saved = {name: store[name] for name in store.keys()}
        for variable in self._own:
            value = saved.get(variable.name)
            # A file from before there was a watch, or of another window.
            if value is not None and value.shape == tuple(variable.shape):
                variable.assign(np.array(value))
        if self.companion is not None:
            self.companion.load(saved)


class SpikeRule:
    """What counts as a spike, and what a step does about it.

    Args:
        monitor: Which of `MONITORS` are compared with their limits.
        threshold: Float, spreads above the median.
        skips: Whether the update of a spike is not made.
        rate_factor: Float, by which the learning rate is multiplied during a
            cool-down.
        cool_down: Int, steps.
    """

    def __init__(self, monitor, threshold, skips, rate_factor, cool_down):
        self._rule = Rule(
            threshold,
            tuple(name in monitor for name in MONITORS),
            rate_factor,
            # After a rollback the callback begins it.
            cool_down if skips else 0,
        )
        self.skips = skips
        # Whether a step has come by, or was traced.
        self.was_asked = False

    def look(self, watch, loss, gradients, scales_loss):
        """Looks at a step, notes it, and says whether it is a usual one.

        Args:
            watch: The `SpikeWatch` of the model.
            loss: Scalar tensor.
            gradients: List of tensors or `None`.
            scales_loss: Whether a loss scaler drops gradients that are not
                finite, and lowers its scale. They are no spike then; a loss
                that is not finite is.

        Returns:
            A boolean, or boolean scalar tensor, and the factor of the learning
            rate, `None` where that never changes.
        """
        self.was_asked = True
        norm = many_tensors.total_norm(
            many_tensors.each_value([g for g in gradients if g is not None])
        )
        window, counts = watch.variables
        views = updates.host_views([window, counts], [loss, norm])
        must_be_finite = (True, not scales_loss)
        if views is not None:
            window, counts = views
            norm = max(norm.item(), _SMALLEST_NORM)
            values = np.array([loss.item(), math.log(norm)], "float32")
            found = judge(
                np, window, counts, values, must_be_finite, self._rule
            )
            window[found.place] = found.row
            counts[:] = found.counts
            usual, factor = bool(found.usual), float(found.rate_factor)
        else:
            found = judge(
                keras.ops,
                keras.ops.convert_to_tensor(window),
                keras.ops.convert_to_tensor(counts),
                _values(loss, norm),
                must_be_finite,
                self._rule,
            )
            updates.write_slot(window, found.place, found.row)
            counts.assign(found.counts)
            usual, factor = found.usual, found.rate_factor
        return usual, None if self._rule.rate_factor == 1.0 else factor


def _values(loss, norm):
    loss, norm = (keras.ops.cast(t, "float32") for t in (loss, norm))
    norm = keras.ops.maximum(norm, _SMALLEST_NORM)
    return keras.ops.stack([loss, keras.ops.log(norm)])


# Under this name a model saves it, with its weights.
_ATTRIBUTE = "spike_watch"


def watch_of(model, length):
    """The `SpikeWatch` of a compiled model, made when there is none.

    Args:
        model: The model.
        length: Int, steps in the window. A watch of another length is empty.
    """
    # Past Keras: a model that is built takes no more metrics.
    watch = vars(model).setdefault(_ATTRIBUTE, SpikeWatch())
    watch.set_up(length)
    # Which `compile` makes anew.
    tracker = keras_internals.loss_tracker(model)
    if getattr(tracker, _ATTRIBUTE, None) is not watch:
        setattr(tracker, _ATTRIBUTE, watch)
    known = {id(v) for v in model.metrics_variables}
    if not all(id(v) in known for v in watch.variables):
        raise ValueError(
            "The `metrics` of the model must contain its loss tracker, whose "
            "state a train step hands on: let the property of your model "
            "return `[*super().metrics, ...]`. Received: "
            f"model {model.name!r} with metrics {model.metrics}"
        )
    return watch


# By the number of each model that is watched now. Empty as a rule, which is
# all that the compiler of PyTorch sees in the step of a stock optimizer.
_running: dict[int, tuple] = {}


def watched(model):
    """The `SpikeWatch` and `SpikeRule` of the training that runs, or `None`."""
    if not _running or id(model) not in _running:
        return None
    return _running[id(model)][1]


def set_watched(model, watch_and_rule):
    """Lets train steps be watched, or no longer, with `None`."""
    if watch_and_rule is None:
        _running.pop(id(model), None)
    else:
        # With the model, so that no other one has its number meanwhile.
        _running[id(model)] = model, watch_and_rule
