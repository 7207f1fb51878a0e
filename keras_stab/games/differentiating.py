"""The gradient of a function by its input, for penalties in losses."""

from collections.abc import Callable
from typing import Any

import keras

from keras_stab.backend import differentiation
from keras_stab.backend import tracing


def input_gradient(function: Callable[[Any], Any], x: Any) -> Any:
    r"""The gradient of the sum of a function's outputs, by its input.

    Where the rows of a batch do not mix, row i is the gradient of output i by
    row i:

    $$
    \nabla_x \sum_i f(x)_i = (\nabla_{x_i} f(x_i))_i
    $$

    The result can be differentiated again, by the weights in the function and
    by what `x` was made of, as the penalty of WGAN-GP needs. It works in the
    losses of a `Game`, in `compute_loss` and in loops of your own, in `fit`,
    `evaluate` and validation, on each backend; on PyTorch also where Keras
    evaluates without gradients.

    Args:
        function: Called once, with a tensor like `x`; returns one float
            tensor of any shape. Layers in it must be built. Take what it
            shall depend on, besides `x`, from outside.
        x: Float tensor, array or `keras.Variable`.

    Returns:
        A tensor with shape and dtype of `x`; zeros where the function does
        not depend on it. Under mixed precision a float32 `x` has a float32
        gradient.

    Raises:
        TypeError: If `x` is not of floats, or `function` returns something
            else than one tensor of floats.

    Example, the penalty of WGAN-GP:

    >>> import keras, keras_stab
    >>> critic = keras.layers.Dense(1, kernel_initializer="ones")
    >>> critic.build((None, 9))
    >>> points = keras.ops.ones((8, 9))
    >>> slopes = keras_stab.games.input_gradient(critic, points)
    >>> norms = keras.ops.norm(slopes, axis=-1)
    >>> penalty = keras.ops.mean(keras.ops.square(norms - 1.0))
    >>> keras.ops.convert_to_numpy(penalty).item()
    4.0

    References:
        Gulrajani et al. (2017), arXiv:1704.00028.
    """
    if isinstance(x, keras.Variable):
        x = tracing.read(x)
    x = keras.ops.convert_to_tensor(x)
    if not _is_of_floats(x):
        raise TypeError(
            "`x` must be of floats, to be differentiated: cast it first. "
            f"Received: x of dtype {keras.backend.standardize_dtype(x.dtype)}"
        )

    def checked(x):
        outputs = function(x)
        if not keras.ops.is_tensor(outputs) or not _is_of_floats(outputs):
            raise TypeError(
                "`function` must return one tensor of floats. Received: "
                f"{outputs!r}"
            )
        return outputs

    return differentiation.gradient_of_sum(checked, x)


def _is_of_floats(tensor):
    return "float" in keras.backend.standardize_dtype(tensor.dtype)
