"""Ways to the inner products of group gradients over many rows."""

import keras
import numpy as np

from keras_stab.diagnostics.gradients.measuring_oracle import batch_gradients
from keras_stab.diagnostics.gradients.measuring_oracle import values_of
from keras_stab.diagnostics.targets import build_loss
from keras_stab.gradients.one_pass.units import Refusal


class Rows:
    """The rows that are measured, and the model at its weights.

    Attributes:
        count: Rows, N.
        batch_size: Those that make a batch.
    """

    def __init__(self, model, data, batch_size, training, verbose):
        self._data, self.batch_size = data, batch_size
        self.count = len(
            next(leaf for leaf in keras.tree.flatten(data) if leaf is not None)
        )
        build_loss(model, self.take(range(min(self.count, batch_size))))
        self._model, self._verbose = model, verbose
        self.variables = model.trainable_variables
        if not self.variables:
            raise ValueError(
                "The model has no trainable weights, so its loss has no "
                f"gradient. Received: model {model.name!r}"
            )
        self.gradients = batch_gradients(model, training)

    def state(self):
        """The values that the model holds now."""
        return values_of(self._model)

    def take(self, places):
        """Some rows, as tensors."""
        places = np.asarray(places, "int64")
        return keras.tree.map_structure(
            lambda leaf: (
                None
                if leaf is None
                else keras.ops.convert_to_tensor(leaf[places])
            ),
            self._data,
        )

    def cut(self, places):
        """Places in batches of `batch_size`, the last one may be short."""
        size = self.batch_size
        return [places[i : i + size] for i in range(0, len(places), size)]

    def bytes_of(self, count):
        """What as many gradients take."""
        return 4 * count * self.weights

    @property
    def weights(self):
        """Trainable numbers."""
        return sum(int(np.prod(v.shape)) for v in self.variables)

    def bar(self, total):
        """A function to be called after each of so many batches."""
        if not self._verbose:
            return lambda: None
        bar = keras.utils.Progbar(total, unit_name="batch")
        return lambda: bar.add(1)


class OfRows:
    """By the gradients of single rows, none of which is formed.

    The gradient of a group is the mean of those of its rows, so that two
    batches at a time give their part of the Gram matrix.
    """

    def __init__(self, rows, numbers, sizes, memory_limit):
        self._rows, self._numbers, self._sizes = rows, numbers, sizes
        self._batches = rows.cut(np.arange(rows.count))

    def gram(self):
        """`(K, K)`, of float64."""
        rows, batches = self._rows, self._batches
        state = rows.state()
        total = np.zeros((len(self._sizes),) * 2)
        several = len(batches) > 1
        pairs = [
            (i, j)
            for i in range(len(batches))
            for j in range(i + several, len(batches))
        ]
        done, advance = set(), rows.bar(len(pairs))
        for pair in pairs:
            # The products within a batch, with the first pair that it is in.
            new = [i for i in sorted(set(pair)) if i not in done]
            done.update(new)
            self._add(
                total,
                state,
                [batches[i] for i in sorted(set(pair))],
                [i in new for i in sorted(set(pair))],
            )
            advance()
        return total

    def _add(self, total, state, batches, within):
        places = np.concatenate(batches)
        found = self._rows.gradients.gram(state, self._rows.take(places))
        if not self._alone and not self._rows.gradients.is_of_rows:
            raise Refusal("the loss is not a mean over rows of Keras's own")
        found = keras.ops.convert_to_numpy(found).astype("float64")
        numbers = self._numbers[places]
        share = 1.0 / self._sizes[numbers]
        found = share[:, None] * found * share[None, :]
        owner = np.repeat(np.arange(len(batches)), list(map(len, batches)))
        same = owner[:, None] == owner[None, :]
        counts = np.where(same, np.take(within, owner)[:, None], True)
        np.add.at(
            total,
            (numbers[:, None], numbers[None, :]),
            np.where(counts, found, 0.0),
        )

    @property
    def _alone(self):
        """Whether each row is a group."""
        return len(self._sizes) == self._rows.count

    def combine(self, weights):
        """`sum_k weights[k] g_k`, a list of arrays."""
        state, total = self._rows.state(), 0.0
        share = weights / np.maximum(self._sizes, 1)
        for places in self._batches:
            own = share[self._numbers[places]]
            if not np.any(own):
                continue
            found = self._rows.gradients.combined(
                state,
                self._rows.take(places),
                keras.ops.convert_to_tensor(own, "float32"),
            )
            total = _plus(total, found)
        return _filled(total, self._rows.variables)


class _OfKept:
    """By gradients which are all kept."""

    def __init__(self, rows, count, memory_limit):
        needed = rows.bytes_of(count)
        if needed > memory_limit:
            raise Refusal(
                f"{count} gradients of {rows.weights} weights take "
                f"{needed / 2**20:.0f} MiB, and `memory_limit` is "
                f"{memory_limit / 2**20:.0f} MiB"
            )
        self._rows = rows
        self._gradients = None

    def _measured(self):
        """The gradients, K lists of arrays."""
        raise NotImplementedError

    def gram(self):
        """`(K, K)`, of float64."""
        self._gradients = self._measured()
        gram = np.zeros((len(self._gradients),) * 2)
        for pieces in zip(*self._gradients):
            matrix = np.stack([piece.ravel() for piece in pieces])
            gram += _products(matrix)
        return gram

    def combine(self, weights):
        """`sum_k weights[k] g_k`, a list of arrays."""
        total = 0.0
        for weight, gradient in zip(weights, self._gradients):
            if weight:
                total = _plus(total, gradient, weight)
        return _filled(total, self._rows.variables)


class OfGroups(_OfKept):
    """By the gradient of each group."""

    def __init__(self, rows, numbers, sizes, memory_limit):
        super().__init__(rows, len(sizes), memory_limit)
        self._numbers, self._sizes = numbers, sizes

    def _measured(self):
        rows = self._rows
        state = rows.state()
        parts = [
            rows.cut(np.flatnonzero(self._numbers == k))
            for k in range(len(self._sizes))
        ]
        advance = rows.bar(sum(map(len, parts)))
        gradients = []
        for size, batches in zip(self._sizes, parts):
            total = 0.0
            for places in batches:
                found = rows.gradients.plain(state, rows.take(places))
                total = _plus(total, found, len(places) / size)
                advance()
            gradients.append(_filled(total, rows.variables))
        return gradients


class OfLosses(_OfKept):
    """By the gradient of each loss of `compile`, on all rows."""

    def _measured(self):
        rows, total = self._rows, 0.0
        state, batches = rows.state(), rows.cut(np.arange(rows.count))
        advance = rows.bar(len(batches))
        for places in batches:
            found = rows.gradients.by_loss(state, rows.take(places))
            total = _plus(total, found, len(places) / rows.count)
            advance()
        return [
            _filled([part[k, ...] for part in total], rows.variables)
            for k in range(len(total[0]))
        ]


def _plus(total, tensors, factor=1.0):
    """The sum of lists of arrays, in float64; 0.0 is an empty one."""
    arrays = [
        factor * keras.ops.convert_to_numpy(t).astype("float64")
        for t in tensors
    ]
    if isinstance(total, float):
        return arrays
    return [a + b for a, b in zip(total, arrays)]


def _filled(total, variables):
    """Arrays of float32, or of float64 for weights of that; zeros for none."""
    return [
        np.zeros(v.shape, _dtype(v))
        if isinstance(total, float)
        else total[i].astype(_dtype(v))
        for i, v in enumerate(variables)
    ]


def _dtype(variable):
    return "float64" if variable.dtype == "float64" else "float32"


def _products(matrix, columns=2**16):
    """Inner products of rows in float64, some columns at a time."""
    total = 0.0
    for i in range(0, matrix.shape[1], columns):
        part = matrix[:, i : i + columns].astype("float64")
        total = total + part @ part.T
    return total
