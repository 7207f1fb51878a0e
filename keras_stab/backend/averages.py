"""Running averages of many tensors; see `numerics.averaging`."""

import keras

from keras_stab.backend import devices
from keras_stab.backend import tracing
from keras_stab.backend import updates
from keras_stab.backend.devices import BACKEND
from keras_stab.numerics import averaging

if BACKEND == "torch":
    import torch


def average(due, often, first, coefficient, values, averages, errors):
    """Moves running averages by one value each.

    Args:
        due: Boolean tensor: otherwise nothing changes; or `True`.
        often: Whether `due` holds in most steps.
        first: Boolean tensor: whether no value was averaged before.
        coefficient: Function of a dtype, a scalar tensor of it.
        values, averages: Tensors, and variables.
        errors: Variables, what rounding cut off; or empty.
    """
    if BACKEND == "torch" and averages[0].value.device.type == "cpu":
        if bool(due):
            _average_at_once(
                bool(first),
                coefficient,
                [v.detach() for v in values],
                [a.value for a in averages],
                [e.value for e in errors],
            )
        return
    coefficients = [coefficient(a.dtype) for a in averages]
    # Chosen where it is computed, not in another pass.
    inside = BACKEND == "jax" and often and due is not True

    def moved():
        old = [[tracing.read(v) for v in part] for part in (averages, errors)]
        where = due if inside else None
        return _moved(first, coefficients, values, *old, where)

    slots = [*averages, *errors]
    if due is True or inside:
        for slot, value in zip(slots, moved()):
            slot.assign(value)
        return
    # Not as a kernel: of two results XLA makes two, with copies in between.
    updates.assign_if(due, often, slots, moved, in_kernel=not errors)


def _moved(first, coefficients, values, averages, errors, due):
    values = [keras.ops.cast(v, a.dtype) for v, a in zip(values, averages)]
    if errors and BACKEND == "jax" and not devices.has_accelerator():
        return _averages_first(
            first, coefficients, values, averages, errors, due
        )

    def at_first():
        # Tensors of their own, which the slots may keep.
        copies = list(map(keras.ops.copy, values))
        return copies + list(map(keras.ops.zeros_like, errors))

    def later():
        if not errors:
            return [
                averaging.moved(a, v, c)
                for a, v, c in zip(averages, values, coefficients)
            ]
        pairs = [
            averaging.moved_exactly(a, e, v, c)
            for a, e, v, c in zip(averages, errors, values, coefficients)
        ]
        return [a for a, _ in pairs] + [e for _, e in pairs]

    # Selected: a product with zero would keep an infinite average.
    if errors:
        new = updates.choose(first, at_first, later)
    else:  # in a kernel of TensorFlow, where a branch copies
        new = updates.select(first, at_first(), later())
    if due is None:
        return new
    return updates.select(due, new, [*averages, *errors])


def _averages_first(first, coefficients, values, averages, errors, due):
    """The same, where XLA makes a loop for each result.

    Each would read old averages and old errors, which XLA then copies. A
    branch keeps the loops apart: errors come from averages that are there. The
    steps are made in both, for to hand them over would be a copy too.
    """

    def chosen(new, old):
        return new if due is None else updates.select(due, new, old)

    def steps():
        parts = zip(averages, errors, values, coefficients)
        return [averaging.exact_step(*each) for each in parts]

    def later():
        return [a + step for a, step in zip(averages, steps())]

    new = updates.choose(
        first,
        lambda: chosen(list(map(keras.ops.copy, values)), averages),
        lambda: chosen(later(), averages),
        often=False,
    )
    rest = [s - (n - a) for s, n, a in zip(steps(), new, averages)]
    none = list(map(keras.ops.zeros_like, errors))
    return new + chosen(updates.select(first, none, rest), errors)


def _average_at_once(first, coefficient, values, averages, errors):
    """All tensors in a few launches, on PyTorch."""
    with torch.no_grad():
        if first:
            torch._foreach_copy_(averages, values)
            if errors:
                torch._foreach_zero_(errors)
            return
        weight = float(coefficient("float64"))
        if any(v.dtype != a.dtype for v, a in zip(values, averages)):
            values = [v.to(a.dtype) for v, a in zip(values, averages)]
        if not errors:
            torch._foreach_lerp_(averages, values, weight)
            return
        # As `moved_exactly`, in place: memory traffic is what this costs.
        old = torch._foreach_sub(values, averages)
        torch._foreach_add_(errors, old, alpha=weight)
        torch._foreach_copy_(old, averages)
        torch._foreach_add_(averages, errors)
        torch._foreach_sub_(old, averages)
        torch._foreach_add_(errors, old)
