"""EinsumDense as products of matrices: which axis plays which part."""

import functools
import math
import string

import keras

from keras_stab.backend import products
from keras_stab.gradients.one_pass.contributions import Product


def einsum_product(equation, shape, inputs, gradient, count_tokens):
    """The `Product` of a kernel in `input,kernel->output`.

    An axis of the kernel that the input alone shares is contracted (d), one
    that the output alone shares is an output (p); one that all three share
    separates matrices (H). Axes of input and output that the kernel does not
    have are tokens.

    Args:
        equation: String without ellipsis, of a batch without groups.
        shape: Of the kernel.
        inputs: Tensor `(K, n, ...)`, the other axes those of the equation.
        gradient: Tensor `(K, n, ...)`, by the output.
        count_tokens: Function from positions in a row to tokens in all.

    Returns:
        A `Product`, or `None` when the equation does not fit.
    """
    source, kernel, target = split_equation(equation)
    batch = source[0]
    if target[0] != batch or batch in kernel:
        return None
    if any(len(set(part)) < len(part) for part in (source, kernel, target)):
        return None
    heads = [x for x in kernel if x in source and x in target]
    contracted = [x for x in kernel if x in source and x not in target]
    outputs = [x for x in kernel if x in target and x not in source]
    if len(heads) + len(contracted) + len(outputs) != len(kernel):
        return None
    tokens = [x for x in source[1:] if x in target and x not in kernel]
    summed = [x for x in source[1:] if x not in target and x not in kernel]
    if summed:
        axes = tuple(source.index(x) + 1 for x in summed)
        inputs = products.sum_over(inputs, axes)
        source = "".join(x for x in source if x not in summed)
    sizes = dict(zip(kernel, shape))
    heads_size, d, p = (
        math.prod(sizes[x] for x in group)
        for group in (heads, contracted, outputs)
    )
    positions = math.prod(gradient.shape[target.index(x) + 1] for x in tokens)

    def matrices(tensor, letters, width, last):
        # The group axis comes before the batch axis of the equation.
        place = {x: i + 1 for i, x in enumerate(letters)}
        order = [place[x] for x in heads] + [0, 1]
        order += [place[x] for x in tokens] + [place[x] for x in last]
        tensor = keras.ops.transpose(tensor, order)
        groups = tensor.shape[len(heads)]
        return products.reshape(tensor, (heads_size, groups, -1, width))

    return Product(
        matrices(inputs, source, d, contracted),
        matrices(gradient, target, p, outputs),
        _fold(
            kernel,
            "".join(heads + contracted + outputs),
            tuple(int(size) for size in shape),
        ),
        count_tokens(positions),
    )


def einsum_lora(equation, a, b, inputs, gradient, count_tokens):
    """The products of both factors of a kernel `a b`.

    Args:
        equation: Of the whole kernel, without ellipsis.
        a, b: Their values; the last axis of `a` is the rank.

    Returns:
        A pair of `Product`, or `None` when the equation does not fit.
    """
    source, kernel, target = split_equation(equation)
    last = kernel[-1]
    rank, group = unused_letters(equation, 2)
    if last not in target or last in source:
        return None
    narrow = target.replace(last, rank)
    first = f"{source},{kernel[:-1]}{rank}->{narrow}"
    second = f"{narrow},{rank}{last}->{target}"
    middle = keras.ops.einsum(
        f"{group}{source},{kernel[:-1]}{rank}->{group}{narrow}", inputs, a
    )
    # Under a loss scale gradients are float32 and what enters is not; on
    # PyTorch an einsum does not bring two types together by itself.
    back = keras.ops.einsum(
        f"{group}{target},{rank}{last}->{group}{narrow}",
        gradient,
        keras.ops.cast(b, gradient.dtype),
    )
    factors = (
        einsum_product(first, a.shape, inputs, back, count_tokens),
        einsum_product(second, b.shape, middle, gradient, count_tokens),
    )
    return None if None in factors else factors


def expand_ellipsis(equation, rank):
    """The equation with letters for `...`, for an input of this rank."""
    equation = equation.replace(" ", "")
    if "..." not in equation:
        return equation
    source = equation.split(",")[0]
    missing = rank - len(source.replace("...", ""))
    letters = "".join(unused_letters(equation, missing))
    return equation.replace("...", letters)


def split_equation(equation):
    """Input, kernel and output letters."""
    factors, target = equation.split("->")
    source, kernel = factors.split(",")
    return source, kernel, target


def unused_letters(equation, count):
    free = (x for x in string.ascii_letters if x not in equation)
    return [next(free) for _ in range(count)]


# Cached: contributions of several calls of a layer share the function.
@functools.cache
def _fold(kernel, letters, shape):
    """From `(M, H, d, p)` to `(M, *shape)`, the kernel's axes in order."""
    sizes = dict(zip(kernel, shape))
    order = [0] + [letters.index(x) + 1 for x in kernel]

    def fold(heads):
        split = (heads.shape[0],) + tuple(sizes[x] for x in letters)
        return keras.ops.transpose(products.reshape(heads, split), order)

    return fold
