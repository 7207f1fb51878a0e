"""A model run on made-up rows, with made-up weights."""

import keras
import numpy as np

from keras_stab.gradients.one_pass.group_forward import GroupForward
from keras_stab.gradients.one_pass.group_forward import find_batch_norms
from keras_stab.gradients.one_pass.group_forward import refuse_batch_norm
from keras_stab.gradients.one_pass.layout import Layout
from keras_stab.gradients.one_pass.layout import spread_over
from keras_stab.gradients.one_pass.units import RecordedCall
from keras_stab.gradients.one_pass.units import Recorder
from keras_stab.gradients.one_pass.units import Refusal
from keras_stab.gradients.one_pass.units import floating
from keras_stab.gradients.rows import as_tensors


class TrialRun:
    """One forward pass with made-up weights.

    Args:
        batch: Inputs of the model.
        without_rows: The calls whose outputs are spread over the rows.
        changed: Rows whose copies of these are changed.
        group_layers: As `find_group_layers` returns them; they run on two
            groups, the even and the odd rows.

    Attributes:
        ran_by_group: Those that did so.
    """

    def __init__(self, batch, without_rows=(), changed=(), group_layers=()):
        self.batch, self.without_rows = batch, without_rows
        self.changed, self.group_layers = changed, group_layers
        self.ran_by_group = []

    def __call__(self, oracle, units, count, weights):
        """The recorded calls; the last is that of the model itself.

        Args:
            weights: As `made_up_weights` returns them.
        """
        values = [
            keras.ops.cast(w, v.dtype)
            for w, v in zip(weights, oracle.variables)
        ]
        model = oracle.model
        state = [_made_up_state(v) for v in model.non_trainable_variables]
        carried = [_made_up_state(v) for v in oracle.carried_variables]
        scope = oracle.scope(values, state, carried)

        def spread(tensor):
            copies = spread_over(tensor, count)
            noise = np.random.default_rng(2).standard_normal(copies.shape)
            noise[[i for i in range(count) if i not in self.changed]] = 0.0
            return copies + keras.ops.cast(noise, copies.dtype)

        def tap(tensor):
            return tensor

        batch = as_tensors(self.batch)
        layout = Layout((batch, None, None), 2, sorts=False)
        by_group = GroupForward(self.group_layers, layout, scope, tap)
        recorder = Recorder(
            units,
            scope,
            tap,
            spread,
            self.without_rows,
            examines=True,
            by_group=by_group,
        )
        whole = RecordedCall(None, (), {})
        with scope, recorder.listening():
            whole.outputs = floating(oracle.predict(batch))
        refuse_batch_norm(find_batch_norms(model), scope)
        self.ran_by_group = [
            (layer, forward)
            for layer, forward in self.group_layers
            if id(layer) in by_group.ran
        ]
        return [*recorder.calls, whole]


def made_up(tensor, count):
    """Rows whose neighbours differ; integers are 0 and 1, valid anywhere."""
    if tensor is None:
        return None
    shape = (count,) + tuple(8 if n is None else n for n in tensor.shape[1:])
    kind = keras.backend.standardize_dtype(tensor.dtype)
    if kind == "string":
        raise Refusal("the model takes strings")
    if "float" in kind:
        kind = kind if kind == "float64" else "float32"
        return np.random.default_rng(1).standard_normal(shape).astype(kind)
    index = np.indices(shape).sum(axis=0)
    return (index % 2).astype(kind)


def made_up_weights(variables):
    """Arrays of the shapes of variables, noise of the usual size."""
    # Drawn once and repeated, since large models have many weights. The
    # number is a prime, which divides no length of a row but its own.
    noise = np.random.default_rng(0).standard_normal(65537, "float32")
    weights = []
    for index, variable in enumerate(variables):
        shape = tuple(variable.shape)
        value = np.resize(np.roll(noise, 7919 * index), shape)
        if len(shape) > 1:
            value /= float(np.prod(shape[:-1])) ** 0.5
        else:
            value = 1.0 + 0.1 * value
        weights.append(value)
    return weights


def _made_up_state(variable):
    make = keras.ops.ones if "float" in str(variable.dtype) else keras.ops.zeros
    return make(variable.shape, variable.dtype)


def fixed_rows(model):
    """The batch size that the model is made for, or `None`."""
    for tensor in getattr(model, "inputs", None) or []:
        if tensor.shape[0] is not None:
            return tensor.shape[0]
    return None
