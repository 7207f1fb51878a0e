"""Steps that look ahead by the change that an inner optimizer just made.

For weights without constraints, when the inner optimizer surely moved them.
There a pass over the weights is what these steps cost: on PyTorch and
TensorFlow they are made in place, on JAX each change is computed once.
"""

import keras

from keras_stab.backend import devices
from keras_stab.backend import tracing
from keras_stab.backend import updates
from keras_stab.backend.devices import BACKEND

if BACKEND == "torch":
    import torch
elif BACKEND == "jax":
    import jax


def is_possible():
    """Whether this step may be made so."""
    if BACKEND == "torch":
        # Memory that is used again is none of a compiler's business.
        return not torch.compiler.is_compiling()
    return devices.replicas() == 1


def remember(variables, room):
    """The values of variables before they move.

    Args:
        variables: List of variables.
        room: What this returned for them before, or an empty list. Its memory
            is used again on a processor with PyTorch, where new memory for
            all weights takes longer than to copy them.
    """
    if BACKEND != "torch":
        return list(map(tracing.snapshot, variables))
    values = [v.value for v in variables]
    fits = 0 < len(room) == len(values) and all(
        old.device.type == "cpu"
        and old.shape == value.shape
        and old.dtype == value.dtype
        for old, value in zip(room, values)
    )
    if not fits:
        return [value.detach().clone() for value in values]
    with torch.no_grad():
        torch._foreach_copy_(room, values)
    return room


def step_optimistically(variables, before, last, first):
    r"""$w \leftarrow w + (u - u')$, $u' \leftarrow u$.

    Args:
        variables: Weights after the update u.
        before: Tensors, the weights before; they may be written over.
        last: Variables, the updates u' before.
        first: Boolean tensor: whether u' is u itself; or `None`.
    """
    if BACKEND == "torch":
        values, old = _values(variables), _values(last)
        with torch.no_grad():
            for value, tensor in zip(values, before):
                torch.sub(value, tensor, out=tensor)  # u
            if first is None or not bool(first):
                torch._foreach_sub_(old, before)  # u' - u
                torch._foreach_sub_(values, old)
        # The memory of u becomes that of the slot, and the other way round.
        before[:] = [updates.exchange(slot, u) for slot, u in zip(last, before)]
        return
    changes = _changes(variables, before)
    old = list(map(tracing.read, last))
    if first is not None:
        old = updates.choose(first, lambda: changes, lambda: old)
    ahead = [u - previous for u, previous in zip(changes, old)]
    if BACKEND == "tensorflow":
        for variable, addend in zip(variables, ahead):
            variable.value.assign_add(addend)
    else:
        _assign(
            variables,
            [w + (u + d) for w, u, d in zip(before, changes, ahead)],
        )
    _assign(last, changes)


def step_past(variables, before, iterates, first):
    r"""$z \leftarrow z + u$, $w \leftarrow z + u$ with the new z.

    Args:
        variables: Weights after the update u.
        before: Tensors, the weights before; they may be written over.
        iterates: Variables, z.
        first: Boolean tensor: whether z is where the weights were before.
    """
    if BACKEND == "torch":
        values, iterates = _values(variables), _values(iterates)
        with torch.no_grad():
            if bool(first):
                torch._foreach_copy_(iterates, before)
            torch._foreach_sub_(before, values)  # -u
            torch._foreach_sub_(iterates, before)
            for value, z, change in zip(values, iterates, before):
                torch.sub(z, change, out=value)
        return
    changes = _changes(variables, before)
    old = updates.choose(
        first,
        lambda: list(before),
        lambda: list(map(tracing.read, iterates)),
    )
    new = [z + u for z, u in zip(old, changes)]
    _assign(iterates, new)
    _assign(variables, [z + u for z, u in zip(new, changes)])


def _values(variables):
    return [v.value for v in variables]


def _changes(variables, before):
    changes = [
        tracing.read(variable) - old for variable, old in zip(variables, before)
    ]
    if BACKEND == "jax":
        # Two results are made of them. Without this the compiler computes
        # them for either anew, from all the state of the inner optimizer.
        changes = list(jax.lax.optimization_barrier(changes))
    return changes


def _assign(variables, values):
    for variable, value in zip(variables, values):
        variable.assign(keras.ops.cast(value, variable.dtype))
