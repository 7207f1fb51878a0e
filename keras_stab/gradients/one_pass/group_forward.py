"""Layers that mix the rows of a group, run on all groups in one pass.

Batch-norm is one: what it makes of a row depends on the other rows of its
group, and on no row of another. Such a layer runs on `(K, n, ...)`, with a
copy of its weights for each group: the gradients for the copies are the
group gradients. What it stores is merged as the microbatch engine merges it.
"""

import keras

from keras_stab import keras_internals
from keras_stab.backend import tracing
from keras_stab.gradients.one_pass.contributions import Stored
from keras_stab.gradients.one_pass.layer_rules import find_group_forward
from keras_stab.gradients.one_pass.units import OPAQUE
from keras_stab.gradients.one_pass.units import Refusal
from keras_stab.gradients.pooling import rows_check


def find_group_layers(model):
    """Pairs of a layer that runs group by group and its forward function."""
    layers = keras_internals.all_layers(model)
    inside = {
        id(inner)
        for layer in layers
        if isinstance(layer, OPAQUE)
        for inner in keras_internals.all_layers(layer)
    }
    found = [(layer, find_group_forward(layer)) for layer in layers]
    return [
        (layer, forward)
        for layer, forward in found
        if forward is not None and id(layer) not in inside
    ]


def find_batch_norms(model):
    """Every layer of batch-norm, Keras's own or not."""
    return [
        layer
        for layer in keras_internals.all_layers(model)
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


def refuse_batch_norm(layers, scope):
    """Refuses what has just run on the rows of all groups together.

    Args:
        layers: As `find_batch_norms` returns them.
        scope: The `RecordingScope`, before `GroupForward.finish`.
    """
    for layer in layers:
        if id(layer.moving_mean) in scope.assigned:
            raise Refusal(
                f"layer {layer.name!r} (BatchNormalization) normalises by the "
                "statistics of the whole batch"
            )


def with_enough_rows(layout, layers):
    """Refuses groups of one row where a layer needs more, as microbatch does.

    TensorFlow checks while it runs if the number of rows is not known before.
    """
    flat = [layer for layer, _ in layers if layer.input_spec.ndim == 2]
    if not flat or layout.groups == 1:
        return
    enough, message = rows_check(flat[-1].name, layout.size, layout.grouping)
    if not layout.is_static:
        layout.batch = tracing.checked(layout.batch, [(enough, message)])
    elif not enough:
        raise ValueError(f"{message}, a batch of {layout.size} rows")


def of_copies(variables, gradients, tokens):
    """The contributions of a layer that ran group by group."""
    return {
        id(variable): Stored(gradient, tokens)
        for variable, gradient in zip(variables, gradients)
        if gradient is not None
    }


class GroupForward:
    """Those layers in one forward pass.

    Args:
        layers: As `find_group_layers` returns them.
        layout: The `Layout` of the rows.
        scope: The `RecordingScope` of the pass.
        tap: As in `Recorder`; called with each copy of a weight.

    Attributes:
        ran: Identities of the layers that did run group by group.
        last: The `GroupCall` of the last call of one of the layers; `None`
            if the layer ran as usual.
    """

    def __init__(self, layers, layout, scope, tap):
        self.layers, self.layout = layers, layout
        self.ran = set()
        self.last = None
        self._scope, self._tap = scope, tap
        self._stored = {}

    def call_of(self, layer, forward, unit):
        """What runs in place of the layer's `call`."""
        usual = layer.call
        own = unit.variables if unit is not None else []
        state = layer.non_trainable_variables

        def call(*args, **kwargs):
            self.last = None
            group_call = GroupCall(self.layout, self._tap, self._stored, own)
            with self._scope.allowing(state):
                outputs = forward(layer, group_call, *args, **kwargs)
                if outputs is NotImplemented:
                    return usual(*args, **kwargs)
            self.last = group_call
            self.ran.add(id(layer))
            return outputs

        return call

    def guarded(self):
        """Variables that nothing but calls of the layers may read."""
        return [v for x, _ in self.layers for v in x.non_trainable_variables]

    def finish(self, pool):
        """Assigns what the layers stored, merged over the groups."""
        if not self._stored:
            return
        variables = [variable for variable, _ in self._stored.values()]
        stacks = [stack for _, stack in self._stored.values()]
        with self._scope.allowing(variables):
            before = [v.value for v in variables]
        shares = self.layout.shares()
        for variable, value in zip(
            variables, pool.merge_stacks(variables, before, stacks, shares)
        ):
            variable.assign(value)


class GroupCall:
    """What a group-wise forward function is given: one call of one layer.

    Attributes:
        groups: K.
        weights: Pairs of a variable and its copies, those that were used.
    """

    def __init__(self, layout, tap, stored, variables):
        self.groups = layout.groups
        self.weights = []
        self._layout, self._tap, self._stored = layout, tap, stored
        self._trained = {id(v) for v in variables}

    def grouped(self, tensor):
        """From `(B, ...)` to `(K, n, ...)`, short groups padded with zeros."""
        shape = tuple(tensor.shape)
        if None in shape[1:] or 0 in shape[1:]:
            raise Refusal(
                "the shape of a row (the length of a sequence, say) is not "
                "known while the step is traced, or a row is empty"
            )
        size = self._layout.size
        if self._layout.is_static and (shape[0] or size) % size:
            raise Refusal(
                "a layer that normalises by statistics of the batch is given "
                "a tensor that has no rows of the batch"
            )
        return self._layout.stack(tensor)

    def ungrouped(self, tensor):
        """From `(K, n, ...)` back to `(B, ...)`."""
        return self._layout.unstack(tensor)

    def members(self, tensor):
        """Which rows of a tensor `(K, n, ...)` are none of padding.

        Boolean `(K, n, 1, ...)`; `None` if all groups have equally many rows.
        """
        return self._layout.members(tensor)

    def weight(self, variable, dtype):
        """A copy of a variable for each group, `(K, *shape)`."""
        value = keras.ops.cast(variable, dtype)
        shape = (self.groups, *value.shape)
        if id(variable) not in self._trained:
            return keras.ops.broadcast_to(value, shape)
        copies = self._tap(keras.ops.broadcast_to(value, shape))
        self.weights.append((variable, copies))
        return copies

    def stored(self, variable, dtype):
        """What each group has stored so far, `(K, *shape)`; or `None`."""
        if id(variable) not in self._stored:
            return None
        return keras.ops.cast(self._stored[id(variable)][1], dtype)

    def store(self, variable, stack):
        """Stores a value for each group, `(K, *shape)`."""
        self._stored[id(variable)] = variable, stack
