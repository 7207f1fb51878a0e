"""The state that groups leave behind, merged as if one batch had been seen.

Every group starts from the stored state, with dropout masks of its own, and
returns what it would have stored; here the K answers become one.
"""

import math

import keras

from keras_stab import keras_internals
from keras_stab.backend import processes
from keras_stab.backend import products
from keras_stab.numerics.norms import common_dtype

# Odd and large: seed words of different groups stay far apart, and 31 times
# it still fits the signed 32-bit seeds of PyTorch.
_SEED_STRIDE = 16777619


def shift_seeds(variables, values, k):
    """Group k draws its own random numbers; group 0 those of a plain step.

    A value may be `None`.
    """
    if isinstance(k, int) and k == 0:
        return values
    shifted = []
    for variable, value in zip(variables, values):
        if value is not None and keras_internals.is_seed_state(variable):
            word = keras.ops.convert_to_tensor(
                [_SEED_STRIDE, 0], dtype=value.dtype
            )
            value = value + word * keras.ops.cast(k, value.dtype)
        shifted.append(value)
    return shifted


def largest(replacements):
    """Merges those of all groups: scales and histories of float8 are maxima."""
    answer = replacements[0]
    for others in replacements[1:]:
        answer = [
            a if b is None else b if a is None else keras.ops.maximum(a, b)
            for a, b in zip(answer, others)
        ]
    return answer


class StatePool:
    """Merges the non-trainable state of K groups.

    Moving means are averaged with weights p_k = n_k / B. Moving variances get
    the variance between the groups on top, so that a batch-norm layer stores
    the statistics of the whole batch: with momentum b and the values m_k, v_k
    after group k alone,

        mean = sum p_k m_k
        variance = sum p_k v_k + sum p_k (m_k - mean)^2 / (1 - b)

    Any other float is averaged; integers and seeds are those of group 0. A
    value that is not finite counts as "not updated".
    """

    def __init__(self, model):
        self._variables = model.non_trainable_variables
        position = {id(v): i for i, v in enumerate(self._variables)}
        self._moving_mean_of = {}
        self.flat_batch_norm = None
        for layer in keras_internals.all_layers(model):
            if not isinstance(layer, keras.layers.BatchNormalization):
                continue
            if not layer.trainable or id(layer.moving_mean) not in position:
                continue
            self._moving_mean_of[position[id(layer.moving_variance)]] = (
                position[id(layer.moving_mean)],
                layer.momentum,
            )
            if layer.input_spec.ndim == 2:
                self.flat_batch_norm = layer.name

    def merge(self, before, states, shares):
        """Returns one list of values, `None` where nothing was assigned.

        Args:
            before: The stored values.
            states: One list per group; `None` where a variable was not
                assigned.
            shares: p_k, one scalar per group.
        """
        finite = [
            [
                self._or_stored(i, value, before[i])
                for i, value in enumerate(state)
            ]
            for state in states
        ]
        merged = []
        for i, variable in enumerate(self._variables):
            values = [state[i] for state in finite]
            if values[0] is None or not _is_float(variable):
                merged.append(values[0])
                continue
            mean = weighted_sum(shares, values)
            if i in self._moving_mean_of:
                index, momentum = self._moving_mean_of[i]
                means = [state[index] for state in finite]
                mean = mean + self._between(means, shares, momentum)
            merged.append(keras.ops.cast(mean, variable.dtype))
        return merged

    def merge_stacks(self, variables, before, stacks, shares):
        """As `merge`, for some variables whose values are known at once.

        Args:
            variables: List of variables.
            before: Their stored values.
            stacks: One tensor `(K, *shape)` for each.
            shares: p_k, a tensor or array `(K,)`.
        """
        # Side by side: a few operations, however many layers there are.
        dtype = common_dtype(stacks)
        flat = [
            keras.ops.cast(products.reshape(s, (s.shape[0], -1)), dtype)
            for s in stacks
        ]
        flat = keras.ops.concatenate(flat, axis=1)
        stored = [
            keras.ops.cast(products.reshape(v, (-1,)), dtype) for v in before
        ]
        stored = keras.ops.concatenate(stored, axis=0)
        flat = keras.ops.where(keras.ops.isfinite(flat), flat, stored)
        shares = products.beside(shares, flat)[:, None]
        values = products.sum_over(shares * flat, 0)
        deviations = flat - values
        between = products.sum_over(shares * deviations * deviations, 0)
        positions = {id(v): i for i, v in enumerate(self._variables)}
        places, start = {}, 0
        for variable, stack in zip(variables, stacks):
            size = math.prod(stack.shape[1:])
            places[positions.get(id(variable))] = slice(start, start + size)
            start += size
        merged = []
        for variable in variables:
            position = positions.get(id(variable))
            value = values[places[position]]
            if position in self._moving_mean_of:
                index, momentum = self._moving_mean_of[position]
                if momentum != 1:
                    spread = between[places[index]] / (1.0 - momentum)
                    value = value + spread
            value = products.reshape(value, tuple(variable.shape))
            merged.append(keras.ops.cast(value, variable.dtype))
        return merged

    def over_ranks(self, before, state, count):
        """Merges what all processes would store, weighted by their rows.

        Args:
            before: The stored values.
            state: Values of this process; `None` where not assigned.
            count: Int, the rows of this process.
        """
        places = [
            i
            for i, value in enumerate(state)
            if value is not None and _is_float(self._variables[i])
        ]
        if not places:
            return state
        own = {
            i: keras.ops.cast(
                self._or_stored(i, state[i], before[i]), "float64"
            )
            for i in places
        }
        # Means of v + m^2 / (1 - b): in float64 what cancels does no harm.
        total, *sums = processes.sum_each(
            [
                keras.ops.full((), count, "float64"),
                *(count * (own[i] + self._spread(i, own)) for i in places),
            ]
        )
        means = {i: s / total for i, s in zip(places, sums)}
        merged = list(state)
        for i in places:
            value = means[i] - self._spread(i, means)
            merged[i] = keras.ops.cast(value, self._variables[i].dtype)
        return merged

    def _spread(self, i, values):
        """m^2 / (1 - b) where variable i is a moving variance, else 0."""
        index, momentum = self._moving_mean_of.get(i, (None, 1))
        if index not in values or momentum == 1:
            return 0.0
        return keras.ops.square(values[index]) / (1.0 - momentum)

    def _or_stored(self, i, value, stored):
        if value is None or not _is_float(self._variables[i]):
            return value
        return keras.ops.where(keras.ops.isfinite(value), value, stored)

    def _between(self, means, shares, momentum):
        if momentum == 1:
            return 0.0
        centre = weighted_sum(shares, means)
        squares = [keras.ops.square(m - centre) for m in means]
        return weighted_sum(shares, squares) / (1.0 - momentum)


def rows_check(name, size, grouping):
    """A condition and its message: no group of batch-norm has only one row."""
    message = (
        f"Layer {name!r} (BatchNormalization) would normalise a group of one "
        "row, whose variance is zero. Use batches of at least twice as many "
        "rows as groups and drop a short last batch, or fewer groups. "
        f"Received: groups={grouping.groups}"
    )
    return grouping.no_single_rows(size), message


def _is_float(variable):
    return "float" in str(variable.dtype)


def weighted_sum(shares, values):
    """The sum of tensors times shares: floats, or float64 scalar tensors."""
    terms = [
        (s if isinstance(s, float) else keras.ops.cast(s, v.dtype)) * v
        for s, v in zip(shares, values)
    ]
    return sum(terms[1:], terms[0])
