"""Does the one-pass engine answer right for a model? A trial run tells.

The model runs, with made-up weights and rows, on a batch and on the same
batch with the rows of group 1 replaced by those of group 0. What the layers
with weights and the model put out for the rows of group 0 must not change: a
layer that mixes rows (batch statistics, a time-major reshape) is found so.
"""

import keras
import numpy as np

from keras_stab.backend import devices
from keras_stab.backend import tracing
from keras_stab.gradients.one_pass.units import RecordedCall
from keras_stab.gradients.one_pass.units import Recorder
from keras_stab.gradients.one_pass.units import Refusal
from keras_stab.gradients.one_pass.units import find_units
from keras_stab.gradients.one_pass.units import floating
from keras_stab.gradients.rows import as_tensors
from keras_stab.gradients.rows import map_tensors

_ROWS = 4
_TOLERANCE = 1e-5


def examine(oracle):
    """The units of a model.

    Raises:
        Refusal: If the one-pass engine would answer wrongly.
    """
    units = find_units(oracle.model, oracle.variables)
    x = oracle.batch[0]
    fixed = _fixed_rows(oracle.model)
    count = fixed or _ROWS
    try:
        rows = keras.tree.map_structure(lambda t: _made_up(t, count), x)
        first = map_tensors(lambda t: np.repeat(t[0::2], 2, 0)[:count], rows)
        shapes = _compare(oracle, units, rows, first, count)
        if not fixed:
            _compare_shapes(oracle, units, x, count, shapes)
    except Refusal:
        raise
    except Exception as error:
        raise Refusal(
            f"a trial run on made-up rows failed: {type(error).__name__}: "
            f"{error}"
        ) from error
    return units


def _compare(oracle, units, rows, first, count):
    """Compares the outputs for rows 0, 2, ...; returns all shapes."""
    shapes = []

    def differences():
        records = []
        for batch in (rows, first):
            random_state = devices.random_state()
            with devices.replayed(random_state):
                records.append(_run(oracle, units, batch))
        shapes[:] = _shapes(records[0])
        return [
            _difference(one, other, count)
            for call, again in zip(*records)
            for one, other in zip(call.outputs, again.outputs)
        ]

    found = iter(tracing.concretely(differences))
    for call in shapes:
        for _ in call.outputs:
            if not float(next(found)) <= _TOLERANCE:
                raise Refusal(
                    f"the output of {call.name} for a row depends on other rows"
                )
    return shapes


def _compare_shapes(oracle, units, x, count, shapes):
    """With one row more, every leading dimension must grow in proportion."""
    more = keras.tree.map_structure(lambda t: _made_up(t, count + 1), x)
    grown = []

    def run():
        records = _run(oracle, units, more)
        grown[:] = _shapes(records)
        return [t for call in records for t in call.outputs]

    tracing.shapes_of(run)
    for call, larger in zip(shapes, grown):
        for before, after in zip(call.outputs, larger.outputs):
            if before[0] * (count + 1) != after[0] * count:
                raise Refusal(
                    f"the output of {call.name} has no rows of the batch"
                )
        if not call.generic:
            continue
        for before, after in zip(call.inputs, larger.inputs):
            by_row = before[:1] != after[:1]
            if by_row != (before[:1] == call.outputs[0][:1]):
                raise Refusal(
                    f"the arguments of {call.name}, for which no rule is "
                    "registered, cannot be cut into groups"
                )


class _Shapes:
    def __init__(self, call):
        self.name = "the model"
        self.generic = False
        if call.unit is not None:
            self.name = f"layer {call.unit.layer.name!r}"
            self.generic = call.unit.is_generic
        self.outputs = [tuple(t.shape) for t in call.outputs]
        self.inputs = [tuple(t.shape) for t in call.tensors()]
        if any(len(shape) == 0 for shape in self.outputs):
            raise Refusal(f"{self.name} puts out a scalar")
        if call.draws and self.generic:
            raise Refusal(
                f"{self.name} draws random numbers, and no rule is registered "
                "for it: a second evaluation would draw others"
            )


def _shapes(records):
    return [_Shapes(call) for call in records]


def _run(oracle, units, batch):
    """The recorded calls of one forward pass with made-up weights.

    The last is that of the model itself, without a unit.
    """
    values = [_made_up_weight(v, i) for i, v in enumerate(oracle.variables)]
    state = [_made_up_state(v) for v in oracle.model.non_trainable_variables]
    carried = [_made_up_state(v) for v in oracle.carried_variables]
    scope = oracle.scope(values, state, carried)
    recorder = Recorder(units, scope, lambda tensor: tensor, examines=True)
    batch = as_tensors(batch)
    whole = RecordedCall(None, (), {})
    with scope, recorder.listening():
        whole.outputs = floating(oracle.predict(batch))
    return [*recorder.calls, whole]


def _difference(one, other, count):
    """How far the outputs for rows 0, 2, ... differ, relatively."""
    leading = one.shape[0]
    if leading % count:
        raise Refusal("an output has no rows of the batch")
    shape = (count, leading // count) + tuple(one.shape[1:])
    one, other = (
        keras.ops.cast(keras.ops.reshape(t, shape)[0::2], "float32")
        for t in (one, other)
    )
    # NaN in both (made-up weights may lead there) is no difference.
    same = keras.ops.logical_or(one == other, one != one)
    distance = keras.ops.where(same, 0.0, keras.ops.abs(one - other))
    size = keras.ops.where(one == one, keras.ops.abs(one), 0.0)
    return keras.ops.max(distance) / (keras.ops.max(size) + 1e-12)


def _made_up(tensor, count):
    """Rows whose neighbours differ; integers are 0 and 1, valid anywhere."""
    if tensor is None:
        return None
    shape = (count,) + tuple(n or 8 for n in tensor.shape[1:])
    kind = keras.backend.standardize_dtype(tensor.dtype)
    if kind == "string":
        raise Refusal("the model takes strings")
    if "float" in kind:
        return np.random.default_rng(1).standard_normal(shape).astype("float32")
    index = np.indices(shape).sum(axis=0)
    return (index % 2).astype(kind)


def _made_up_weight(variable, index):
    shape = tuple(variable.shape)
    noise = keras.random.normal(shape, dtype="float32", seed=index)
    if len(shape) > 1:
        value = noise / float(np.prod(shape[:-1])) ** 0.5
    else:
        value = 1.0 + 0.1 * noise
    return keras.ops.cast(value, variable.dtype)


def _made_up_state(variable):
    make = keras.ops.ones if "float" in str(variable.dtype) else keras.ops.zeros
    return make(variable.shape, variable.dtype)


def _fixed_rows(model):
    """The batch size that the model is made for, or `None`."""
    for tensor in getattr(model, "inputs", None) or []:
        if tensor.shape[0] is not None:
            return tensor.shape[0]
    return None
