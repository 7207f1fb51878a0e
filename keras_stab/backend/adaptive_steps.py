"""Moments of gradients, and steps divided by their roots, in place.

For PyTorch, where each operation is launched by itself and each result that is
not in place takes new memory; elsewhere the step is compiled.
"""

import math

from keras_stab.backend.devices import BACKEND

if BACKEND == "torch":
    import torch


def update_moments(slots, gradients, beta, power):
    """`slot <- beta slot + (1 - beta) gradient ** power`; the power: 1 or 2."""
    values = [s.value for s in slots]
    torch._foreach_mul_(values, beta)
    if power == 1:
        torch._foreach_add_(values, gradients, alpha=1.0 - beta)
    else:
        torch._foreach_addcmul_(values, gradients, gradients, value=1.0 - beta)


def bias_correction(beta, step):
    """`1 - beta ** step`, which zeros at the start make necessary."""
    return 1.0 - beta ** int(step)


def subtract_quotients(variables, tensors, moments, rate, correction, epsilon):
    """`variable -= rate * tensor / (sqrt(moment / correction) + epsilon)`."""
    root = math.sqrt(correction)
    torch._foreach_addcdiv_(
        [v.value for v in variables],
        tensors,
        _roots(moments, epsilon * root),
        value=-rate * root,
    )


def quotients(numerators, moments, corrections, epsilon):
    """`numerator / c / (sqrt(moment / d) + epsilon)`, for corrections c, d."""
    root = math.sqrt(corrections[1])
    roots = _roots(moments, epsilon * root)
    results = [torch.div(n.value, r, out=r) for n, r in zip(numerators, roots)]
    factor = root / corrections[0]
    if factor != 1.0:
        torch._foreach_mul_(results, factor)
    return results


def _roots(moments, epsilon):
    roots = torch._foreach_sqrt([m.value for m in moments])
    torch._foreach_add_(roots, epsilon)
    return roots
