"""What a layer rule is given: one call of one layer, for all rows."""

import keras

from keras_stab.backend import products
from keras_stab.gradients.one_pass.units import floating
from keras_stab.gradients.one_pass.units import without_activation
from keras_stab.gradients.scope import RecordingScope

# What the choice of formulas assumes when TensorFlow leaves the batch open.
NOMINAL_ROWS = 64


class LayerCall:
    """What a layer rule is given: one call of one layer, for all rows.

    Attributes:
        args, kwargs: What the layer was called with.
        outputs: Its floating outputs, a list.
        gradient: Of the sum of the group losses, with respect to the output,
            up to a factor for each group (`GroupLosses.factors`).
        gradients: The same, one for each of `outputs`.
        groups: K.
    """

    is_same_for_all = False

    def __init__(self, oracle, layout, call, gradients):
        self.unit = call.unit
        self.args, self.kwargs = call.args, call.kwargs
        self.outputs = call.outputs
        self.gradients = gradients
        self.gradient = gradients[0]
        self.groups = layout.groups
        self._oracle, self._layout = oracle, layout
        self._mapping = None

    def grouped(self, tensor):
        """From `(B, ...)` to `(K, n, ...)`, short groups padded with zeros."""
        return self._layout.stack(tensor)

    def tokens(self, positions):
        """Rows times positions in a row, as far as known while tracing."""
        size = self._layout.size
        if not self._layout.is_static:
            return NOMINAL_ROWS * positions
        leading = self.outputs[0].shape[0] or size
        return max(leading, size) * positions

    def value(self, variable):
        """The value of a trainable variable at which gradients are taken."""
        index = self._index(variable)
        return self._oracle.values[index]

    def rerun(self, replaced, args, kwargs):
        """The floating outputs of the layer with other values of variables.

        Before the activation, if the rule wants that.

        Args:
            replaced: Pairs of a variable and its value.
        """
        oracle = self._oracle
        if self._mapping is None:
            scope = oracle.scope(
                oracle.values, oracle.non_trainable, oracle.carried
            )
            self._mapping = dict(scope.state_mapping)
        else:  # the same values again, which other groups did not change
            scope = RecordingScope.of(self._mapping)
        with scope, without_activation(self.unit):
            for variable, value in replaced:
                scope.add_update((variable, value))
            outputs = self.unit.layer(*args, **kwargs)
        return floating(outputs)

    def group(self, k):
        """Arguments and gradients of the rows of group k."""
        leading = self.outputs[0].shape[0]

        def cut(leaf):
            if keras.ops.is_tensor(leaf) and (
                len(leaf.shape) > 0 and leaf.shape[0] == leading
            ):
                return self._layout.group(leaf, k)
            return leaf

        args, kwargs = keras.tree.map_structure(cut, (self.args, self.kwargs))
        return (
            args,
            kwargs,
            [
                None if g is None else self._layout.group(g, k)
                for g in self.gradients
            ],
        )

    def stacked(self):
        """What `group` gives, for all groups at once.

        Returns:
            `tensors, arguments_of, cotangents`: a list of tensors `(K, n, ...)`
            and a function from their slices to arguments of the layer;
            gradients `(K, n, ...)`. `None` where groups differ in size.
        """
        if not self._layout.is_even:
            return None
        leading = self.outputs[0].shape[0]
        leaves = keras.tree.flatten((self.args, self.kwargs))
        places = [
            i
            for i, leaf in enumerate(leaves)
            if keras.ops.is_tensor(leaf) and tuple(leaf.shape[:1]) == (leading,)
        ]

        def arguments_of(tensors):
            given = list(leaves)
            for place, tensor in zip(places, tensors):
                given[place] = tensor
            return keras.tree.pack_sequence_as((self.args, self.kwargs), given)

        return (
            [self.grouped(leaves[i]) for i in places],
            arguments_of,
            [None if g is None else self.grouped(g) for g in self.gradients],
        )

    def _index(self, variable):
        for index, own in enumerate(self._oracle.variables):
            if own is variable:
                return index
        raise ValueError(f"Not a trained variable: {variable.path}")


class CallWithoutRows(LayerCall):
    """A call whose output is the same for all rows: positions, say.

    The model went on with a copy for every row. So the gradient for the
    output is, for each group, the sum over the copies of its rows.
    """

    is_same_for_all = True

    def __init__(self, oracle, layout, call, gradients):
        super().__init__(oracle, layout, call, gradients)
        self._sums = [
            None if g is None else products.sum_over(layout.stack(g), 1)
            for g in gradients
        ]
        self._shapes = call.shapes

    def group(self, k):
        """All arguments, and the gradients of group k."""
        cotangents = [
            None if total is None else products.reshape(total[k], shape)
            for total, shape in zip(self._sums, self._shapes)
        ]
        return self.args, self.kwargs, cotangents

    def stacked(self):
        """All arguments as they are, and the gradients of all groups."""
        cotangents = [
            None if total is None else products.reshape(total, (-1, *shape))
            for total, shape in zip(self._sums, self._shapes)
        ]
        # `vmap` wants something to run over.
        index = keras.ops.arange(self.groups, dtype="int32")
        return [index], lambda _: (self.args, self.kwargs), cotangents
