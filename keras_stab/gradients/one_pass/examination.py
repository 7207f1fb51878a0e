"""Does the one-pass engine answer right for a model? A trial run tells.

The model runs, with made-up weights and rows, on a batch and on the same
batch with the rows of group 1 replaced by those of group 0. What the layers
with weights and the model put out for the rows of group 0 must not change: a
layer that mixes rows (batch statistics, a time-major reshape) shows here.
"""

import collections

import keras
import numpy as np

from keras_stab.backend import devices
from keras_stab.backend import tracing
from keras_stab.gradients.one_pass.group_forward import find_batch_norms
from keras_stab.gradients.one_pass.group_forward import find_group_layers
from keras_stab.gradients.one_pass.trial_run import TrialRun
from keras_stab.gradients.one_pass.trial_run import fixed_rows
from keras_stab.gradients.one_pass.trial_run import made_up
from keras_stab.gradients.one_pass.trial_run import made_up_weights
from keras_stab.gradients.one_pass.units import Refusal
from keras_stab.gradients.one_pass.units import find_units
from keras_stab.gradients.rows import map_tensors

_ROWS = 4
_TOLERANCE = 1e-5


# The units of a model, and, by its position in the order of the calls, the
# shapes of the outputs of each call that is the same for all rows; the layers
# that run group by group, as `find_group_layers` has them; and all layers of
# batch-norm.
Examined = collections.namedtuple(
    "Examined", ["units", "without_rows", "by_group", "batch_norms"]
)


def examine(oracle):
    """The model as `Examined`.

    Raises:
        Refusal: If the one-pass engine would answer wrongly.
    """
    trial = _Trial(oracle, find_units(oracle.model, oracle.variables))
    try:
        without_rows = trial.compare_rows()
    except Refusal:
        raise
    except Exception as error:
        raise Refusal(f"a trial run on made-up rows failed: {_told(error)}")
    if without_rows:
        trial.check_copies(without_rows)
    return Examined(
        trial.units,
        without_rows,
        trial.ran_by_group,
        find_batch_norms(oracle.model),
    )


class _Trial:
    """Runs of a model on made-up rows, compared with each other."""

    def __init__(self, oracle, units):
        self.oracle, self.units = oracle, units
        self.weights = made_up_weights(oracle.variables)
        # An oracle that measures may ask for what `predict` computes, where
        # batch-norm mixes no rows.
        trained = getattr(oracle, "training", True)
        self.group_layers = find_group_layers(oracle.model) if trained else []
        self.ran_by_group = []
        fixed = fixed_rows(oracle.model)
        self.grows = not fixed
        # Two rows normalised by their own statistics are 1 and -1, whatever
        # they were before.
        self.count = fixed or _ROWS * (2 if self.group_layers else 1)

    def compare_rows(self):
        """The outputs for some rows must not depend on the others.

        Returns:
            The calls whose outputs are the same for all rows, as `Examined`
            has them.
        """
        count, (rows, changed) = self.count, self._batches()
        shapes, differences = self._compare(
            [self._run(rows), self._run(changed)],
            [(0, 1, slice(0, None, 2))],
        )
        without_rows = self._compare_shapes(shapes) if self.grows else {}
        for index, call in enumerate(shapes):
            if index in without_rows:
                continue
            if any(shape[0] % count for shape in call.outputs):
                raise Refusal(
                    f"the output of {call.name} has no rows of the batch"
                )
            if call.generic and call.draws:
                raise Refusal(
                    f"{call.name} draws random numbers, and no rule is "
                    "registered for it: a second evaluation would draw others"
                )
            _check(call, differences[index])
        return without_rows

    def check_copies(self, without_rows):
        """The model must accept a copy for each row in place of one for all.

        The outputs stay what they are, and those for row 2 depend on no copy
        but the one for row 2.
        """
        rows, changed = self._batches()
        last = 2 % self.count
        others = [i for i in range(self.count) if i != last]
        if self.ran_by_group:  # those of its own group may matter
            others = [i for i in others if i % 2 != last % 2]
        runs = [
            self._run(rows),
            self._run(rows, without_rows),
            self._run(changed, without_rows, others[::2]),
            self._run(rows, without_rows, others),
        ]
        pairs = [
            (0, 1, slice(None)),
            (1, 2, slice(last, last + 1)),
            (1, 3, slice(last, last + 1)),
        ]
        try:
            shapes, differences = self._compare(runs, pairs)
            for index, call in enumerate(shapes):
                if index not in without_rows:
                    _check(call, differences[index])
        except Exception as error:
            name = self._names[min(without_rows)]
            raise Refusal(
                f"the output of {name} is the same for all rows, and the model "
                f"does not take a copy of it for each row: {_told(error)}"
            ) from error

    def _run(self, batch, without_rows=(), changed=()):
        return TrialRun(batch, without_rows, changed, self.group_layers)

    def _batches(self):
        """Made-up rows, and the same with rows 1, 3, ... replaced."""
        rows = self._made_up_rows(self.count)
        changed = map_tensors(
            lambda t: np.repeat(t[0::2], 2, 0)[: self.count], rows
        )
        return rows, changed

    def _made_up_rows(self, count):
        return keras.tree.map_structure(
            lambda t: made_up(t, count), self.oracle.batch[0]
        )

    def _compare(self, runs, pairs):
        """The shapes of the first run, and differences, for each call.

        Args:
            runs: List of `TrialRun`.
            pairs: Tuples of two positions in `runs`, and a slice of the rows
                that are to be compared.
        """
        shapes = []

        def differences(weights):
            records = []
            random_state = devices.random_state()
            for run in runs:
                with devices.replayed(random_state):
                    records.append(
                        run(self.oracle, self.units, self.count, weights)
                    )
            shapes[:] = _shapes(records[0])
            self.ran_by_group = runs[0].ran_by_group
            return [
                self._difference(records[one][i], records[other][i], kept)
                for i in range(len(shapes))
                for one, other, kept in pairs
            ]

        found = tracing.concretely(differences, self.weights)
        self._names = [call.name for call in shapes]
        found = [float(value) for value in found]
        each = len(pairs)
        found = [found[i * each : (i + 1) * each] for i in range(len(shapes))]
        return shapes, found

    def _difference(self, call, again, kept):
        """How far the outputs for some rows differ, relatively."""
        largest = keras.ops.zeros((), "float32")
        for one, other in zip(call.outputs, again.outputs):
            if tuple(one.shape) != tuple(other.shape):
                return keras.ops.full((), float("inf"), "float32")
            if one.shape[0] % self.count:
                continue  # `compare_rows` refuses it, or it is without rows
            shape = (self.count, one.shape[0] // self.count)
            shape += tuple(one.shape[1:])
            one, other = (
                keras.ops.cast(keras.ops.reshape(t, shape)[kept], "float32")
                for t in (one, other)
            )
            # NaN in both (made-up weights may lead there) is no difference.
            same = keras.ops.logical_or(one == other, one != one)
            distance = keras.ops.where(same, 0.0, keras.ops.abs(one - other))
            size = keras.ops.where(one == one, keras.ops.abs(one), 0.0)
            difference = keras.ops.max(distance) / (keras.ops.max(size) + 1e-12)
            # Not `maximum`, which need not keep a NaN.
            largest = keras.ops.where(
                difference <= largest, largest, difference
            )
        return largest

    def _compare_shapes(self, shapes):
        """With one row more, every leading dimension must grow in proportion.

        Returns:
            The calls whose inputs and outputs do not grow at all.
        """
        count, grown = self.count, []
        more = self._run(self._made_up_rows(count + 1))

        def run():
            records = more(self.oracle, self.units, count + 1, self.weights)
            grown[:] = _shapes(records)
            return [t for call in records for t in call.outputs]

        tracing.shapes_of(run)
        without_rows = {}
        for index, (call, larger) in enumerate(zip(shapes, grown)):
            same = call.outputs == larger.outputs
            if same and call.inputs == larger.inputs and call.is_unit:
                without_rows[index] = call.outputs
                continue
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
        return without_rows


def _check(call, differences):
    for difference in differences:
        if not difference <= _TOLERANCE:
            raise Refusal(
                f"the output of {call.name} for a row depends on other rows"
            )


def _told(error):
    if isinstance(error, Refusal):
        return str(error)
    return f"{type(error).__name__}: {error}"


class _Shapes:
    def __init__(self, call):
        self.name = "the model"
        self.is_unit = call.unit is not None
        self.generic, self.draws = False, call.draws
        if self.is_unit:
            self.name = f"layer {call.unit.layer.name!r}"
            self.generic = call.unit.is_generic
        self.outputs = [tuple(t.shape) for t in call.outputs]
        self.inputs = [tuple(t.shape) for t in call.tensors()]
        if any(len(shape) == 0 for shape in self.outputs):
            raise Refusal(f"{self.name} returns a scalar")


def _shapes(records):
    return [_Shapes(call) for call in records]
