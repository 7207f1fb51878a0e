"""The layers that own weights, and what passes through them in one run."""

import contextlib
import inspect

import keras

from keras_stab import keras_internals
from keras_stab.backend import devices
from keras_stab.gradients.one_pass import layer_rules
from keras_stab.gradients.one_pass import rules  # noqa: F401  registers them
from keras_stab.numerics.norms import is_float_dtype

# They call the layers inside them in a loop, or on reshaped rows.
OPAQUE = (keras.layers.RNN, keras.layers.Wrapper)


class Refusal(ValueError):
    """Why the one-pass engine cannot answer for a model."""


class Unit:
    """A layer that owns trainable variables, and the rule that serves it.

    Attributes:
        layer: The layer.
        variables: Those of its trainable variables that are trained.
        rule: A function as in `register_layer_rule`.
        before_activation: Whether the rule wants the gradient there.
        runs_at_once: Whether the generic rule runs all groups in one call;
            `None` where it has yet to be tried.
    """

    def __init__(self, layer, variables, opaque):
        self.layer = layer
        self.variables = variables
        self.runs_at_once = None if devices.EAGER else False
        self.rule, self.before_activation = layer_rules.generic_rule, False
        if not opaque:
            self.rule, self.before_activation = layer_rules.find_rule(layer)

    @property
    def is_generic(self):
        return self.rule is layer_rules.generic_rule


def find_units(model, variables):
    """The units of a model.

    Raises:
        Refusal: If the model holds a layer whose answer would be wrong.
    """
    wanted = {id(v): v for v in variables}
    units, covered, hidden = [], set(), set()
    for layer in keras_internals.all_layers(model):
        _refuse_layer(layer, wanted)
        if id(layer) in hidden:
            continue
        own = {id(v) for v in layer.trainable_variables} & set(wanted)
        inner = keras_internals.all_layers(layer)
        below = {id(v) for x in inner for v in x.trainable_variables}
        opaque = isinstance(layer, OPAQUE) or bool(
            (own - below) and (own & below)
        )
        mine = own if opaque else own - below
        if opaque:
            hidden.update(id(x) for x in inner)
        if mine:
            variables = [v for i, v in wanted.items() if i in mine]
            units.append(Unit(layer, variables, opaque))
            covered |= mine
    for key, variable in wanted.items():
        if key not in covered:
            raise Refusal(
                f"variable {variable.path!r} belongs to the model itself and "
                "to no layer"
            )
    return units


def _refuse_layer(layer, wanted):
    reason = None
    if isinstance(layer, keras.layers.SpectralNormalization):
        reason = "rewrites the weights of another layer"
    elif getattr(layer, "stateful", False):
        reason = "keeps a state for each row of the batch"
    elif any(v.overwrite_with_gradient for v in layer.trainable_variables):
        reason = "has variables that are overwritten by their gradient"
    elif getattr(layer, "quantization_mode", None) is not None:
        reason = "is quantised"
    elif keras_internals.is_rematerialised(layer):
        reason = "is computed twice (RematScope)"
    elif layer.activity_regularizer is not None:
        reason = "has an activity regulariser, averaged over the whole batch"
    elif isinstance(layer, keras.layers.TorchModuleWrapper) and any(
        id(v) in wanted for v in layer.trainable_variables
    ):
        reason = "runs a PyTorch module, whose weights cannot be replaced"
    if reason is not None:
        raise Refusal(f"layer {layer.name!r} ({type(layer).__name__}) {reason}")


class Recorder:
    """Listens to the units of a model while it runs.

    Args:
        units: List of `Unit`.
        scope: The `RecordingScope` in which the model runs.
        tap: Called with each floating output of a unit; its result is what
            the model goes on with.
        spread: Function that repeats a tensor which is the same for all rows,
            once for every row.
        without_rows: The calls whose outputs are to be spread, as `Examined`
            has them.
        examines: Whether to notice draws of random numbers that Keras does
            not know of.
        by_group: `GroupForward` of the layers that run group by group.
    """

    def __init__(
        self,
        units,
        scope,
        tap,
        spread=None,
        without_rows=(),
        examines=False,
        by_group=None,
    ):
        self.calls = []
        self._by_group = by_group
        self._examines = examines
        self._spread, self._without_rows = spread, without_rows
        self._units, self._scope, self._tap = units, scope, tap

    @contextlib.contextmanager
    def listening(self):
        """Shadows `call` of each unit's layer, on the instance."""
        guarded = [v for unit in self._units for v in unit.variables]
        layers = [] if self._by_group is None else self._by_group.layers
        if layers:
            guarded += self._by_group.guarded()
        self._scope.guard(guarded)
        units = {id(unit.layer): unit for unit in self._units}
        shadowed = [unit.layer for unit in self._units]
        shadowed += [layer for layer, _ in layers]
        own = [vars(layer).get("call") for layer in shadowed]
        try:
            for layer, forward in layers:
                vars(layer)["call"] = self._by_group.call_of(
                    layer, forward, units.get(id(layer))
                )
            for unit in self._units:
                vars(unit.layer)["call"] = self._around(unit, unit.layer.call)
            yield self
        finally:
            for layer, call in zip(shadowed, own):
                if call is None:
                    vars(layer).pop("call", None)
                else:  # set by the user
                    vars(layer)["call"] = call

    def _around(self, unit, original):
        runs_by_group = self._by_group is not None and any(
            layer is unit.layer for layer, _ in self._by_group.layers
        )

        def call(*args, **kwargs):
            draws = self._scope.draws
            random_state = devices.random_state() if self._examines else None
            with self._scope.allowing(unit.variables):
                with without_activation(unit) as activation:
                    outputs = original(*args, **kwargs)
            if runs_by_group and self._by_group.last is not None:
                self._record_weights(unit, outputs, self._by_group.last)
                return outputs
            if len(args) != 1:
                args, kwargs = _bound(original, args, kwargs)
            record = RecordedCall(unit, args, kwargs)
            record.draws = self._scope.draws > draws or (
                devices.drew_since(random_state)
            )
            if len(self.calls) in self._without_rows:
                outputs = self._with_rows(record, outputs)
            if is_float(outputs):  # the usual case, without tree operations
                tapped = self._through(outputs)
                record.outputs = [tapped]
            else:
                tapped = keras.tree.map_structure(self._through, outputs)
                record.outputs = floating(tapped)
            self.calls.append(record)
            return activation(tapped) if unit.before_activation else tapped

        return call

    def _record_weights(self, unit, outputs, group_call):
        """Of a layer that ran group by group: copies of its weights.

        A trial run compares what it put out instead.
        """
        record = RecordedCall(unit, (), {})
        record.weights = [variable for variable, _ in group_call.weights]
        record.outputs = [copies for _, copies in group_call.weights]
        if self._examines:
            record.outputs = floating(outputs)
        self.calls.append(record)

    def _with_rows(self, record, outputs):
        """The outputs spread over the rows, unless the inputs were already."""
        shapes = [tuple(t.shape) for t in floating(outputs)]
        if shapes != self._without_rows[len(self.calls)]:
            return outputs
        record.shapes = shapes
        return keras.tree.map_structure(
            lambda t: self._spread(t) if is_float(t) else t, outputs
        )

    def _through(self, tensor):
        if not is_float(tensor):
            return tensor
        mask = keras_internals.get_mask(tensor)
        tensor = self._tap(tensor)
        keras_internals.set_mask(tensor, mask)
        return tensor


class RecordedCall:
    """What one call of a unit was given and what it returned.

    Attributes:
        outputs: The floating outputs, before the activation if the rule
            wants that.
        shapes: Those of the outputs before they were spread over the rows;
            `None` where they were not.
        draws: Whether random numbers were drawn in it.
        weights: Of a layer that ran group by group, the variables whose
            copies, one for each group, stand in for the outputs; else `None`.
    """

    def __init__(self, unit, args, kwargs):
        self.unit, self.args, self.kwargs = unit, args, kwargs
        self.outputs = self.shapes = self.weights = None
        self.draws = False

    def tensors(self):
        """Every tensor that came in."""
        leaves = [*self.args, *self.kwargs.values()]
        nested = any(isinstance(leaf, (tuple, list, dict)) for leaf in leaves)
        if nested or not devices.EAGER:  # in the order of `with_tensors`
            leaves = keras.tree.flatten((self.args, self.kwargs))
        return [leaf for leaf in leaves if keras.ops.is_tensor(leaf)]

    def with_tensors(self, tensors):
        """The same arguments with other tensors."""
        remaining = iter(tensors)
        return keras.tree.map_structure(
            lambda leaf: next(remaining) if keras.ops.is_tensor(leaf) else leaf,
            (self.args, self.kwargs),
        )


def _bound(function, args, kwargs):
    """The first argument by position, others by name, as rules expect it."""
    parameters = list(inspect.signature(function).parameters.values())
    if any(p.kind == p.VAR_POSITIONAL for p in parameters):
        return args, kwargs
    named = {p.name: arg for p, arg in zip(parameters, args)} | kwargs
    first = parameters[0].name if parameters else None
    if first not in named:
        return args, kwargs
    return (named.pop(first),), named


@contextlib.contextmanager
def without_activation(unit):
    """Removes the activation while the layer runs; yields it."""
    if not unit.before_activation:
        yield None
        return
    # Not through the layer's own `__setattr__`, which tracks and may refuse.
    attributes = vars(unit.layer)
    activation = attributes["activation"]
    attributes["activation"] = None
    try:
        yield activation
    finally:
        attributes["activation"] = activation


def floating(structure):
    """The floating tensors in a nested structure."""
    if is_float(structure):  # without tree operations
        return [structure]
    return [leaf for leaf in keras.tree.flatten(structure) if is_float(leaf)]


def is_float(leaf):
    return keras.ops.is_tensor(leaf) and is_float_dtype(leaf.dtype)
