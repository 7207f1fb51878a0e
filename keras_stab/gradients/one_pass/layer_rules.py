"""Per-layer formulas of the one-pass engine: one rule per layer type."""

import contextlib
import warnings
from collections.abc import Callable
from typing import TypeVar

import keras

from keras_stab.backend import jacobians
from keras_stab.gradients.one_pass.contributions import Product
from keras_stab.gradients.one_pass.contributions import Stored

_RULES: dict[type | str, tuple[Callable, bool]] = {}

# From a layer and a `LayerCall` to pairs of a variable and its gradients.
Rule = TypeVar("Rule", bound=Callable[..., list])


def register_layer_rule(
    layer_type: type[keras.layers.Layer] | str, before_activation: bool = False
) -> Callable[[Rule], Rule]:
    r"""Tells the one-pass engine how a layer's weights get their gradient.

    A layer without a rule is differentiated by itself, once per group; a rule
    makes that cheaper. It serves layers of this type, and of subclasses that
    do not override `call`.

    With $A$ the input of the layer and $S$ the gradient of the sum of the
    group losses with respect to its output, the gradient of group k depends
    on the rows of group k of both. The decorated function
    `rule(layer, call)` returns a list of pairs: a trainable variable of the
    layer, and one of

    - a tensor `(K, *variable.shape)`, the K group gradients;
    - a pair of tensors `(K, n, d)` and `(K, n, p)`, $A_k$ and $S_k$, when the
      gradient of group k is the matrix $A_k^\top S_k$. The engine chooses how
      to use them.

    It is given a `call` with `call.args` and `call.kwargs` (what the layer
    was called with, for all rows), `call.gradient` ($S$),
    `call.value(variable)` and `call.grouped(tensor)`, which turns `(B, ...)`
    into `(K, n, ...)`, short groups padded with zeros.

    Args:
        layer_type: A subclass of `keras.layers.Layer`, or its name as
            registered with Keras (`"package>Name"`) if it may not be there.
        before_activation: Whether $S$ is wanted before `layer.activation`
            instead of at the output. Defaults to `False`.

    Returns:
        A decorator, which returns the rule unchanged.

    Raises:
        TypeError: If `layer_type` is not a layer class.

    Example:

    >>> import keras, keras_stab
    >>> class Scale(keras.layers.Layer):
    ...     def build(self, shape):
    ...         self.scale = self.add_weight(shape=shape[-1:])
    ...     def call(self, x):
    ...         return x * self.scale
    >>> @keras_stab.register_layer_rule(Scale)
    ... def scale_rule(layer, call):
    ...     product = call.grouped(call.gradient * call.args[0])
    ...     return [(layer.scale, keras.ops.sum(product, axis=1))]
    """
    is_class = isinstance(layer_type, type) and issubclass(
        layer_type, keras.layers.Layer
    )
    if not is_class and not isinstance(layer_type, str):
        raise TypeError(
            "A layer rule is registered for a subclass of keras.layers.Layer "
            f"or for its registered name. Received: {layer_type!r}"
        )

    def register(rule: Rule) -> Rule:
        _RULES[layer_type] = (rule, before_activation)
        return rule

    return register


def register_group_forward(layer_type):
    """Tells the one-pass engine how to run a layer group by group.

    For a layer that mixes the rows of a batch. It serves layers of this type,
    and of subclasses that override nothing but their constructor and config.

    The decorated function `forward(layer, call, *args, **kwargs)` gets what
    the layer was called with, for all rows, and a `GroupCall`. It returns the
    outputs for all rows, or `NotImplemented` where the layer runs as usual.
    """

    def register(forward):
        _GROUP_FORWARDS[layer_type] = forward
        return forward

    return register


_GROUP_FORWARDS: dict[type, Callable] = {}


def find_group_forward(layer):
    """The function of `register_group_forward` for a layer, or `None`."""
    overridden = set(vars(layer)) & {"call"}
    for parent in type(layer).__mro__:
        if parent in _GROUP_FORWARDS:
            functions = {n for n, f in vars(parent).items() if callable(f)}
            if overridden & functions - {"__init__", "get_config"}:
                return None
            return _GROUP_FORWARDS[parent]
        overridden.update(vars(parent))
    return None


def find_rule(layer):
    """`(rule, whether it wants S before the activation)` of a layer."""
    for parent in type(layer).__mro__:
        name = keras.saving.get_registered_name(parent)
        found = _RULES.get(parent) or _RULES.get(name)
        if found is not None:
            rule, before = found
            if type(layer).call is not parent.call or "call" in vars(layer):
                break
            activation = getattr(layer, "activation", None)
            if before and isinstance(activation, keras.layers.Layer):
                break  # it is tracked and cannot be taken off
            return rule, before and activation is not None
    return generic_rule, False


def contributions(call):
    """What a call adds to each variable of its unit, by its position.

    A variable that the loss does not depend on through this call is left out.
    """
    unit = call.unit
    rule = generic_rule if call.is_same_for_all else unit.rule
    answer = {id(v): given for v, given in rule(unit.layer, call)}
    # A rule need not know every way in which a layer can be set up.
    if not all(id(v) in answer for v in unit.variables):
        given = generic_rule(unit.layer, call)
        answer = {id(v): given for v, given in given}
    return {
        id(v): _contribution(answer[id(v)], call)
        for v in unit.variables
        if answer[id(v)] is not None
    }


def _contribution(given, call):
    if isinstance(given, tuple):
        left, right = given
        rows = left.shape[1]
        tokens = call.tokens(1) if rows is None else left.shape[0] * rows
        return Product(left[None], right[None], tokens=tokens)
    return given if hasattr(given, "gram") else Stored(given, call.tokens(1))


def generic_rule(layer, call):
    """Differentiates the layer alone, on the rows of one group at a time."""
    variables = call.unit.variables
    values = [call.value(v) for v in variables]
    if call.unit.runs_at_once is not False:
        stacks = _all_at_once(call, variables, values)
        if stacks is not None:
            return list(zip(variables, stacks))
    columns = []
    for k in range(call.groups):
        args, kwargs, cotangents = call.group(k)
        if all(c is None for c in cotangents):
            return [(v, None) for v in variables]

        def outputs(values, args=args, kwargs=kwargs):
            return call.rerun(zip(variables, values), args, kwargs)

        columns.append(jacobians.vector_jacobian(outputs, values, cotangents))
    answer = []
    for variable, column in zip(variables, zip(*columns)):
        known = [g for g in column if g is not None]
        if not known:
            answer.append((variable, None))
            continue
        zero = keras.ops.zeros_like(known[0])
        stack = keras.ops.stack([zero if g is None else g for g in column])
        answer.append((variable, stack))
    return answer


def _all_at_once(call, variables, values):
    """The gradients of all groups from one call; `None` where that fails."""
    stacked = call.stacked()
    if stacked is None:
        return None
    tensors, arguments_of, cotangents = stacked

    def outputs(values, tensors):
        args, kwargs = arguments_of(tensors)
        return call.rerun(zip(variables, values), args, kwargs)

    unit = call.unit
    try:
        with (
            warnings.catch_warnings()
            if unit.runs_at_once is None
            else (contextlib.nullcontext())
        ):
            if unit.runs_at_once is None:
                # A loop over the groups inside, of which PyTorch warns.
                warnings.simplefilter("error")
            answer = jacobians.vector_jacobians(
                outputs, values, call.groups, tensors, cotangents
            )
    except Exception:  # of any kind, from wherever the layer is stuck
        answer = None
    unit.runs_at_once = answer is not None
    return answer
