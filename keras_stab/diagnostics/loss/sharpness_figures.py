"""What `sharpness` returns."""

import dataclasses
from typing import Any

from keras_stab.text_table import as_text


@dataclasses.dataclass
class Sharpness:
    """What `sharpness` found; `None` for what was not asked for.

    `str()` of it is a table.

    Attributes:
        loss: Mean loss of the data.
        gradient_norm: Norm of its gradient.
        largest_eigenvalue: Of the Hessian.
        eigenvalue_error: There is an eigenvalue within this distance.
        trace: Of the Hessian, an estimate.
        trace_error: Its standard error.
        sam_first_order: $L(w + \\rho g / |g|) - L(w)$.
        sam: The largest rise that was found in the ball.
        parameters: Number of weights.
        layers: Dict from the name of a layer to the same figures of its
            weights alone, the others held fixed.
        passes: Passes over the data.
    """

    loss: float
    gradient_norm: float
    parameters: int
    largest_eigenvalue: float | None = None
    eigenvalue_error: float | None = None
    trace: float | None = None
    trace_error: float | None = None
    sam_first_order: float | None = None
    sam: float | None = None
    layers: dict[str, "Sharpness"] = dataclasses.field(default_factory=dict)
    passes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The figures by name; layers as dicts too."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        columns = (
            ("weights", ">parameters", ">gradient norm")
            + (">largest eigenvalue", ">trace")
            + (">SAM, first order", ">SAM")
        )
        rows = [("all", self), *self.layers.items()]
        table = as_text(columns, (_row(name, own) for name, own in rows))
        return f"loss {self.loss:.6g}\n{table}"


def _row(name, own):
    numbers = (
        own.gradient_norm,
        own.largest_eigenvalue,
        own.trace,
        own.sam_first_order,
        own.sam,
    )
    cells = ["" if n is None else f"{n:.4g}" for n in numbers]
    return (name, f"{own.parameters:,}", *cells)
