"""Convex sets and regularisers, with their exact proximal operators.

A set is a Keras constraint, `constraint(value)` projects, and a proximal
operator, `proximal(value, step_size)`, that ignores the step. A regulariser
has `proximal` only: it goes into `RAPP(proximal=...)` or `CEGPlus`.

Example:

>>> import keras, keras_stab
>>> ball = keras_stab.constraints.L2Ball(1.0)
>>> [round(float(v), 2) for v in ball(keras.ops.array([3.0, 4.0]))]
[0.6, 0.8]
>>> layer = keras.layers.Dense(
...     2, kernel_constraint=keras_stab.constraints.SpectralBall(1.0)
... )
"""

from collections.abc import Sequence
from typing import Any

import keras

from keras_stab.arguments import checked_axis
from keras_stab.arguments import checked_number
from keras_stab.arguments import refuse_numbers
from keras_stab.numerics import proximal
from keras_stab.registration import registered
from keras_stab.types import Tensor

__all__ = [
    "Box",
    "ConvexSet",
    "ElasticNet",
    "GroupL2",
    "L1",
    "L1Ball",
    "L2Ball",
    "NonNegative",
    "NuclearNorm",
    "ProximalOperator",
    "Simplex",
    "SpectralBall",
    "SquaredL2",
]


def __dir__():
    return __all__


class ProximalOperator:
    """Base of sets and regularisers.

    A subclass lists its arguments in `arguments` and defines
    `proximal(value, step_size)`.
    """

    arguments: tuple[str, ...] = ()

    def proximal(self, value: Tensor, step_size: float | Tensor) -> Tensor:
        r"""The minimiser of $f(z) + \|z - v\|^2 / (2 \gamma)$.

        Args:
            value: Tensor, $v$.
            step_size: Float or scalar tensor, $\gamma$.
        """
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        config = {name: getattr(self, name) for name in self.arguments}
        if isinstance(config.get("axis"), tuple):
            # Keras saves tuples in a form that `from_config` would not accept.
            config["axis"] = list(config["axis"])
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ProximalOperator":
        return cls(**config)


class ConvexSet(ProximalOperator, keras.constraints.Constraint):
    """Base of sets; a subclass defines `project(value)`."""

    def project(self, value: Tensor) -> Tensor:
        """The nearest point of the set."""
        raise NotImplementedError

    def __call__(self, value: Tensor) -> Tensor:
        return self.project(keras.ops.convert_to_tensor(value))

    def proximal(self, value: Tensor, step_size: float | Tensor) -> Tensor:
        return self.project(value)


@registered
class Box(ConvexSet):
    """Entries between two bounds.

    Args:
        lower, upper: Floats, or `None` for no bound.
    """

    arguments = ("lower", "upper")

    def __init__(self, lower: float | None, upper: float | None) -> None:
        self.lower = checked_number("lower", lower, optional=True)
        self.upper = checked_number("upper", upper, optional=True)
        if None not in (self.lower, self.upper) and self.lower > self.upper:
            refuse_numbers(
                "`lower` must not be above `upper`. Received: "
                f"lower={lower}, upper={upper}"
            )

    def project(self, value: Tensor) -> Tensor:
        return proximal.box(value, self.lower, self.upper)


@registered
class NonNegative(ConvexSet):
    """Entries of at least 0."""

    def project(self, value: Tensor) -> Tensor:
        return proximal.box(value, 0.0, None)


@registered
class L2Ball(ConvexSet):
    """Euclidean norm of at most `radius`.

    Unlike `keras.constraints.MaxNorm` it leaves alone what is inside.

    Args:
        radius: Float, at least 0.
        axis: Axes over which the norm is taken, as for `MaxNorm`: 0 for each
            column of a kernel. `None` for the whole variable. Defaults to
            `None`.
    """

    arguments = ("radius", "axis")

    def __init__(
        self, radius: float, axis: int | Sequence[int] | None = None
    ) -> None:
        self.radius = checked_number("radius", radius, 0.0)
        self.axis = _axes(axis)

    def project(self, value: Tensor) -> Tensor:
        _check_axes(self, value)
        return proximal.l2_ball(value, self.radius, self.axis)


@registered
class Simplex(ConvexSet):
    """Nonnegative entries whose sum is `total`.

    Args:
        total: Float above 0. Defaults to 1.0.
        axis: Int, the axis along which entries are summed; `None` for all
            entries. Defaults to -1.
    """

    arguments = ("total", "axis")

    def __init__(self, total: float = 1.0, axis: int | None = -1) -> None:
        self.total = checked_number("total", total, above=0.0)
        self.axis = checked_axis(axis)

    def project(self, value: Tensor) -> Tensor:
        _check_axes(self, value)
        return proximal.simplex(value, self.total, self.axis)


@registered
class L1Ball(ConvexSet):
    """Sum of absolute values of at most `radius`.

    Args:
        radius: Float above 0.
        axis: Int or `None`, as for `Simplex`. Defaults to `None`.
    """

    arguments = ("radius", "axis")

    def __init__(self, radius: float, axis: int | None = None) -> None:
        self.radius = checked_number("radius", radius, above=0.0)
        self.axis = checked_axis(axis)

    def project(self, value: Tensor) -> Tensor:
        _check_axes(self, value)
        return proximal.l1_ball(value, self.radius, self.axis)


@registered
class SpectralBall(ConvexSet):
    """Largest singular value of at most `radius`: small singular values stay.

    A kernel of more than two dimensions counts as the matrix with the last
    axis for columns, `reshape(kernel, (-1, kernel.shape[-1]))`: its outputs.
    One singular value decomposition per projection; float32 or float64.

    Args:
        radius: Float, at least 0.
    """

    arguments = ("radius",)

    def __init__(self, radius: float) -> None:
        self.radius = checked_number("radius", radius, 0.0)

    def project(self, value: Tensor) -> Tensor:
        return _as_matrix(
            self, value, lambda m: proximal.spectral_ball(m, self.radius)
        )


@registered
class L1(ProximalOperator):
    r"""$w \|z\|_1$: entries shrink by $\gamma w$, small ones to exactly 0.

    Args:
        weight: Float, $w$, at least 0.
    """

    arguments = ("weight",)

    def __init__(self, weight: float) -> None:
        self.weight = checked_number("weight", weight, 0.0)

    def proximal(self, value: Tensor, step_size: float | Tensor) -> Tensor:
        return proximal.soft_threshold(value, step_size * self.weight)


@registered
class GroupL2(ProximalOperator):
    r"""$w \sum_g \|z_g\|_2$: small groups become exactly 0.

    Args:
        weight: Float, $w$, at least 0.
        axis: Axes that make one group, 0 for each column of a kernel; `None`
            for the whole variable. Defaults to `None`.
    """

    arguments = ("weight", "axis")

    def __init__(
        self, weight: float, axis: int | Sequence[int] | None = None
    ) -> None:
        self.weight = checked_number("weight", weight, 0.0)
        self.axis = _axes(axis)

    def proximal(self, value: Tensor, step_size: float | Tensor) -> Tensor:
        _check_axes(self, value)
        return proximal.group_threshold(
            value, step_size * self.weight, self.axis
        )


@registered
class SquaredL2(ProximalOperator):
    r"""$\frac{w}{2} \|z\|_2^2$: weight decay, taken implicitly.

    Args:
        weight: Float, $w$, at least 0.
    """

    arguments = ("weight",)

    def __init__(self, weight: float) -> None:
        self.weight = checked_number("weight", weight, 0.0)

    def proximal(self, value: Tensor, step_size: float | Tensor) -> Tensor:
        return value / (1.0 + step_size * self.weight)


@registered
class ElasticNet(ProximalOperator):
    r"""$w_1 \|z\|_1 + \frac{w_2}{2} \|z\|_2^2$.

    Args:
        l1, l2: Floats, $w_1$ and $w_2$, at least 0.
    """

    arguments = ("l1", "l2")

    def __init__(self, l1: float, l2: float) -> None:
        self.l1 = checked_number("l1", l1, 0.0)
        self.l2 = checked_number("l2", l2, 0.0)

    def proximal(self, value: Tensor, step_size: float | Tensor) -> Tensor:
        shrunk = proximal.soft_threshold(value, step_size * self.l1)
        return shrunk / (1.0 + step_size * self.l2)


@registered
class NuclearNorm(ProximalOperator):
    r"""$w$ times the sum of singular values: a matrix of low rank.

    Kernels become matrices as for `SpectralBall`.

    Args:
        weight: Float, $w$, at least 0.
    """

    arguments = ("weight",)

    def __init__(self, weight: float) -> None:
        self.weight = checked_number("weight", weight, 0.0)

    def proximal(self, value: Tensor, step_size: float | Tensor) -> Tensor:
        threshold = step_size * self.weight
        return _as_matrix(
            self,
            value,
            lambda m: proximal.singular_value_threshold(m, threshold),
        )


# Sets of Keras in which points between feasible ones may be infeasible.
_NOT_CONVEX = (keras.constraints.UnitNorm, keras.constraints.MinMaxNorm)


def is_convex(constraint: Any) -> bool:
    """Whether a constraint, or `None`, is not known to be nonconvex."""
    return not isinstance(constraint, _NOT_CONVEX)


def _axes(axis):
    if isinstance(axis, (list, tuple)):
        return tuple(checked_axis(each) for each in axis)
    return checked_axis(axis)


def _check_axes(operator, value):
    """Raises when the variable has no such axis."""
    axes = operator.axis
    axes = axes if isinstance(axes, tuple) else (axes,)
    rank = len(value.shape)
    for axis in axes:
        if axis is not None and not -rank <= axis < rank:
            raise ValueError(
                f"{type(operator).__name__} sums over axis {axis}, which a "
                f"variable of shape {tuple(value.shape)} does not have: take "
                f"another axis, or axis=None for all entries. Received: {axis=}"
            )


def _as_matrix(operator, value, function):
    dtype = keras.backend.standardize_dtype(value.dtype)
    if dtype not in ("float32", "float64"):
        raise ValueError(
            f"{type(operator).__name__} needs a singular value decomposition, "
            "which exists for float32 and float64 only: leave it off "
            f"variables of half precision. Received: dtype {dtype}"
        )
    if len(value.shape) < 2:
        raise ValueError(
            f"{type(operator).__name__} is for kernels of two dimensions or "
            f"more. Received: a variable of shape {tuple(value.shape)}"
        )
    shape = value.shape
    matrix = keras.ops.reshape(value, (-1, shape[-1]))
    return keras.ops.reshape(function(matrix), shape)
