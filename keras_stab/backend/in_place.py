"""Updates of many variables in place, with numbers as factors.

For PyTorch, where each operation is launched by itself and each result that is
not in place takes new memory; elsewhere the step is compiled.
"""

import math

from keras_stab.backend import many_tensors
from keras_stab.backend import tracing
from keras_stab.backend.devices import BACKEND

if BACKEND == "torch":
    import torch


def is_quicker(variables, tensors):
    """Whether to update in place what has these values and gradients.

    On the CPU, where no number has to be waited for, if nothing has to be
    cast. Not in a step that is compiled: each number read is another program
    to compile.
    """
    if BACKEND != "torch" or torch.compiler.is_compiling():
        return False
    tensors = [*(v.value for v in variables), *tensors]
    kinds = {(t.dtype, t.device.type) for t in tensors}
    return len(kinds) == 1 and tensors[0].device.type == "cpu"


def between(tensors, others, weight, room):
    """As `many_tensors.each_between`, on any backend.

    Args:
        room: What this returned before, or an empty list. Its memory is used
            again on a processor with PyTorch, where new memory for all
            weights takes longer than the arithmetic.
    """
    fits = len(room) == len(tensors) and all(
        old.device.type == "cpu"
        and old.dtype == tensor.dtype == other.dtype
        and old.shape == tensor.shape
        for old, tensor, other in zip(room, tensors, others)
    )
    if BACKEND != "torch" or not fits or torch.compiler.is_compiling():
        return many_tensors.each_between(tensors, others, weight)
    with torch.no_grad():
        return [
            torch.lerp(tensor, other, weight, out=old)
            for tensor, other, old in zip(tensors, others, room)
        ]


def move(variables, targets, weight):
    """`variable += weight * (target - variable)` for variables as targets."""
    with torch.no_grad():
        torch._foreach_lerp_(
            [v.value for v in variables], [t.value for t in targets], weight
        )


def add(variables, tensors, factors):
    """`variable += factor * tensor`.

    Args:
        factors: A float for all of them, or a list with one for each.
    """
    values = [v.value for v in variables]
    with torch.no_grad():
        if isinstance(factors, float):
            torch._foreach_add_(values, tensors, alpha=factors)
            return
        for value, tensor, factor in zip(values, tensors, factors):
            value.add_(tensor, alpha=factor)


def scale(variables, factor):
    """`variable *= factor`."""
    with torch.no_grad():
        torch._foreach_mul_([v.value for v in variables], factor)


def subtract_each(optimizer, variables, values, tensors, rates):
    """`variable -= rate * tensor`, in place or not, on any backend.

    Args:
        values: The values of the variables, in full precision.
        rates: Scalar tensor for all of them, or vector with one for each.
    """
    if is_quicker(variables, [*tensors, rates]):
        add(variables, tensors, (-rates).tolist())
        return
    steps = many_tensors.each_product(tensors, rates)
    many_tensors.assign_each(
        optimizer, variables, many_tensors.each_sum(values, steps, -1.0)
    )


def update_moments(slots, gradients, beta, power):
    """`slot <- beta slot + (1 - beta) gradient ** power`; the power: 1 or 2."""
    values = [s.value for s in slots]
    torch._foreach_mul_(values, beta)
    if power == 1:
        torch._foreach_add_(values, gradients, alpha=1.0 - beta)
    else:
        torch._foreach_addcmul_(values, gradients, gradients, value=1.0 - beta)


def has_kernel(variables, gradients):
    """Whether PyTorch can move such variables in one pass, and that pays.

    Small ones round as those of Keras do.
    """
    return (
        sum(math.prod(v.shape) for v in variables) >= tracing.WORTH_A_KERNEL
        and is_quicker(variables, gradients)
        and gradients[0].dtype in (torch.float32, torch.float64)
        and all(
            type(v.value) in (torch.Tensor, torch.nn.Parameter)
            and v.value.is_contiguous()
            for v in variables
        )
    )


# What makes the bias corrections of PyTorch's kernel 1: Adam's are in the rate.
_NO_CORRECTION = float("inf")


def step_of_adam(variables, moments, gradients, rate, betas, epsilon):
    r"""$m \leftarrow \beta_1 m + (1 - \beta_1) g$, $v \leftarrow \beta_2 v +
    (1 - \beta_2) g^2$, $w \leftarrow w - \alpha m / (\sqrt v + \epsilon)$.

    In one pass over the weights, where the operations of a list are ten, with
    new memory for half of them.

    Args:
        moments: Pair of lists of variables, m and v.
        rate: Float, the rate with the corrections for zeros at the start.
        betas: Pair of floats.
    """
    step = torch.full((), _NO_CORRECTION)
    torch._fused_adam_(
        [v.value.detach() for v in variables],
        [g.contiguous() for g in gradients],
        *([m.value for m in each] for each in moments),
        [],
        [step] * len(variables),
        lr=rate,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=0.0,
        eps=epsilon,
        amsgrad=False,
        maximize=False,
    )


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
