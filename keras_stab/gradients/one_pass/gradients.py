"""The group gradients of one pass: their Gram matrix and combinations."""

import keras

from keras_stab.backend import devices
from keras_stab.backend import exchange
from keras_stab.backend import group_weights
from keras_stab.backend import products
from keras_stab.backend import tracing
from keras_stab.gradients import rows
from keras_stab.gradients.groups import GroupGradients
from keras_stab.gradients.one_pass.shared_rows import OnDevices
from keras_stab.gradients.one_pass.together import gathered
from keras_stab.numerics.norms import common_dtype
from keras_stab.numerics.norms import in_full_precision


class OnePassGradients(GroupGradients):
    """`GroupGradients` whose gradients need not exist one by one.

    Those of group k are `factors[k]` times what `by_variable` says, without
    the terms of regularisers.

    Attributes:
        draws: How often the model drew random numbers.
    """

    draws = 0

    def __init__(self, oracle, layout, by_variable, factors, regularised):
        self.sizes = layout.sizes
        self.rows = layout.size
        self.present = rows.present(layout.sizes)
        self._oracle = oracle
        self._by_variable = by_variable
        self._parts = gathered(by_variable, layout.groups, layout.is_aligned)
        self._factors = factors
        self._regularised = regularised

    def gram(self):
        """Inner products of the group gradients, `(K, K)`."""
        groups = len(self.sizes)
        dtype = common_dtype(self._oracle.values)
        grams = [gram for part in self._parts for gram in part.grams()]
        if not grams or common_dtype(grams) != dtype:
            grams.append(keras.ops.zeros((groups, groups), dtype))
        total = exchange.alike(products.total(grams))
        total = self._times_factors(total, (1, -1), (-1, 1))
        for key, gradient in self._regularised.items():
            present = products.beside(self.present, total)
            own = keras.ops.sum(keras.ops.square(gradient))
            own = keras.ops.cast(own, total.dtype)
            total = total + own * present[:, None] * present[None, :]
            if key in self._by_variable:
                cross = self._by_variable[key].inner(gradient)
                cross = keras.ops.cast(cross, total.dtype)
                cross = self._times_factors(cross, (-1,))
                total = total + cross[:, None] + cross[None, :]
        return total

    def combine(self, weights, whole=True):
        """The combination `sum_k weights[k] g_k`, one tensor per variable.

        Args:
            weights, whole: As in `GroupGradients`; here it is always whole.
        """
        given = weights = exchange.alike(weights)
        weights = self._times_factors(weights, (-1,))
        if self._oracle.values:
            like = self._oracle.values[0]
            weights = group_weights.group_weights(weights, like)
        combined = {}
        for part in self._parts:
            combined.update(part.combine(weights))
        answer = []
        for variable, value in zip(self._oracle.variables, self._oracle.values):
            gradient = combined.get(id(variable))
            if id(variable) in self._regularised:
                term = self._regularised[id(variable)][None]
                total = keras.ops.sum(given)[None]
                term = group_weights.weighted_rows(total, term)[0]
                gradient = term if gradient is None else gradient + term
            if gradient is None and devices.FUNCTIONAL:
                gradient = keras.ops.zeros_like(value)
            if gradient is not None:
                gradient = products.reshape(gradient, variable.shape)
                if gradient.dtype != value.dtype:
                    gradient = keras.ops.cast(gradient, variable.dtype)
            answer.append(gradient)
        return answer

    def inner(self, vector):
        if exchange.batch_shares() > 1:
            return super().inner(vector)
        dtype = common_dtype(self._oracle.values)
        total = keras.ops.zeros((len(self.sizes),), dtype)
        for variable, part in zip(self._oracle.variables, vector):
            key = id(variable)
            if part is None:
                continue
            part = in_full_precision(tracing.densify(part))
            if key in self._by_variable:
                own = self._by_variable[key].inner(part)
                own = self._times_factors(own, (-1,))
                total = total + keras.ops.cast(own, dtype)
            if key in self._regularised:
                own = keras.ops.sum(self._regularised[key] * part)
                own = own * products.beside(self.present, own)
                total = total + keras.ops.cast(own, dtype)
        return total

    def stacks(self):
        """The gradients themselves, `(K, *shape)` for each variable.

        `None` where there is none.
        """
        answer = []
        for variable in self._oracle.variables:
            key, shape, stack = id(variable), tuple(variable.shape), None
            if key in self._by_variable:
                stack = self._by_variable[key].stack()
                stack = products.reshape(stack, (len(self.sizes), *shape))
                stack = self._times_factors(stack, (-1, *(1 for _ in shape)))
            if key in self._regularised:
                term = self._regularised[key]
                present = products.beside(self.present, term)
                present = products.reshape(present, (-1, *(1 for _ in shape)))
                term = present * term
                stack = term if stack is None else stack + term
            answer.append(stack)
        return answer

    def _times_factors(self, tensor, *shapes):
        """The tensor times the factors, in each of the shapes."""
        if self._factors is None:
            return tensor
        if isinstance(self._factors, float):
            return tensor * self._factors ** len(shapes)
        factors = products.beside(self._factors, tensor)
        for shape in shapes:
            tensor = tensor * products.reshape(factors, shape)
        return tensor

    def traffic(self, weights, groups, aligned):
        """As `exchange.traffic`, of what is known of each variable."""
        sent = [p.sent() for p in self._parts if isinstance(p, OnDevices)]
        return exchange.traffic(weights, groups, aligned, *sent)

    @property
    def is_of_rows(self):
        """Whether the loss is a mean of what single rows give."""
        return self._factors is not None

    def works(self):
        """The predicted `Work` of every variable, in order."""
        return [
            (variable, self._by_variable[id(variable)].work)
            for variable in self._oracle.variables
            if id(variable) in self._by_variable
        ]
