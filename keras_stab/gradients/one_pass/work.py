"""Predicted work of a contribution, which decides the form that it takes."""

import dataclasses
import functools

from keras_stab.backend import devices
from keras_stab.gradients.one_pass.token_products import token_pairs

# Multiply-adds that take as long as an operation that Python dispatches, and
# how many of these token products need beyond those of stored gradients.
_OPERATION = 2**18
_MORE_OPERATIONS = 3


@dataclasses.dataclass(frozen=True)
class Work:
    """Predicted multiply-adds of one contribution, on top of a stock step.

    Attributes:
        tokens: N, rows times positions.
        inputs, outputs: d and p, the sides of the weight matrix.
        ghost: Of the Gram from token products; `None` where there are none.
        store: Of the K gradients, with the memory traffic that they cause.
        again: Of reading the weights once more for each further group,
            forward and back, as small batches do.
        ordinary: Of the layer in a stock step, 3 N d p.
        choice: `"ghost"` or `"store"`.
        bytes: Kept until the combination, in the chosen form.
    """

    tokens: int
    inputs: int
    outputs: int
    ghost: int | None
    store: int
    again: int
    ordinary: int
    choice: str
    bytes: int

    @property
    def extra(self):
        return self.ghost if self.choice == "ghost" else self.store


def matrix_work(tokens, inputs, outputs, heads, groups):
    """The `Work` of K gradients of H matrices, in the cheaper form."""
    pairs = token_pairs(tokens)
    ghost = pairs * heads * (inputs + outputs)
    return work_of(tokens, inputs, outputs, heads, groups, ghost)


def cheaper_form(ghost, store):
    """The name of the form with less predicted work.

    By constants: what was measured would differ from run to run, and with the
    form the last bits of a step.
    """
    if devices.EAGER:
        ghost += _MORE_OPERATIONS * _OPERATION
    return "ghost" if ghost < store else "store"


def work_of(tokens, inputs, outputs, heads, groups, ghost=None):
    """The `Work` of a contribution; with `ghost`, in the cheaper form."""
    traffic = 100 if devices.has_accelerator() else 10
    weights = heads * inputs * outputs
    store = int(groups * weights * ((groups + 1) / 2 + 1 + 3 * traffic))
    cheaper = "store" if ghost is None else cheaper_form(ghost, store)
    held = groups * weights
    if cheaper == "ghost":
        held = tokens * heads * (inputs + outputs)
    again = 2 * (groups - 1) * weights * traffic
    ordinary = 3 * tokens * weights
    return _work(
        tokens,
        inputs,
        outputs,
        ghost,
        store,
        again,
        ordinary,
        cheaper,
        4 * held,
    )


# Cached: on an eager backend every step asks again.
_work = functools.cache(Work)
