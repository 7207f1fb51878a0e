"""The loss along lines and in planes through the weights of a model."""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_stab.arguments import checked_count
from keras_stab.arguments import checked_number
from keras_stab.diagnostics.extras import extra
from keras_stab.diagnostics.loss.dataset_loss import DatasetLoss
from keras_stab.diagnostics.loss.directions import checked_direction
from keras_stab.diagnostics.loss.directions import filter_normalised
from keras_stab.diagnostics.loss.directions import weights_of
from keras_stab.diagnostics.loss.drawing import draw
from keras_stab.diagnostics.loss.drawing import picture_formats


@dataclasses.dataclass
class Landscape:
    """What `loss_landscape` found.

    Attributes:
        coordinates: Tuple with one array of coordinates per direction.
        losses: Array with one axis per direction.
        to_other: Whether the first direction leads to another solution, which
            is at 1.
        figure: The figure of matplotlib, from `plot_loss_landscape` only.
    """

    coordinates: tuple[np.ndarray, ...]
    losses: np.ndarray
    to_other: bool = False
    figure: Any = None


def loss_landscape(
    model: keras.Model,
    data: Any,
    loss: keras.losses.Loss | str | Callable | None = None,
    directions: int | Sequence = 1,
    to: keras.Model | Sequence[np.ndarray] | None = None,
    distance: float = 1.0,
    points: int | None = None,
    training: bool = False,
    steps: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    verbose: int = 1,
) -> Landscape:
    r"""The mean loss of data around the weights of a model.

    Along one or two directions $d$ through the weights $w$: $L(w + \alpha
    d_1 + \beta d_2)$ with $L$ as in `sharpness`. A random direction is
    normalised filter by filter: each of its filters has the norm of the same
    filter of $w$, so that pictures of models with large and with small
    weights can be compared. The weights of the model are never moved.

    Args:
        model, data, loss, training, steps, batch_size: As for `sharpness`.
        directions: 1 or 2, random; or a list of one or two directions, each
            a list of arrays, one per trainable variable, used as they are.
            Defaults to 1.
        to: Another solution, a model like this one or its `get_weights()`:
            the first direction then leads there, and batch-norm statistics
            and other float state are interpolated along with the weights.
            Defaults to `None`.
        distance: Float above 0: coordinates go from `-distance` to
            `distance`; towards another solution from `-distance / 2` to
            `1 + distance / 2`. Defaults to 1.0.
        points: Int of at least 2, points per direction. Defaults to 41 for a
            line, 21 for a plane.
        seed: Int, seed of the random directions. Defaults to 0.
        verbose: 1 for a progress bar, 0 for none. Defaults to 1.

    Returns:
        A `Landscape`: `coordinates` and `losses`.

    Raises:
        ValueError: As for `sharpness`, or if `to` or a direction does not
            fit, or the loss at the weights themselves is not finite.

    Example:

    >>> import keras, keras_stab, numpy as np
    >>> model = keras.Sequential([keras.layers.Dense(1, use_bias=False)])
    >>> model.build((None, 1))
    >>> model.set_weights([np.array([[3.0]])])
    >>> x, y = np.ones((4, 1)), np.zeros((4, 1))
    >>> other = [np.array([[1.0]])]
    >>> found = keras_stab.loss_landscape(
    ...     model, (x, y), "mse", to=other, points=5, verbose=0
    ... )
    >>> found.coordinates[0].tolist(), found.losses.tolist()
    ([-0.5, 0.0, 0.5, 1.0, 1.5], [16.0, 9.0, 4.0, 1.0, 0.0])

    Departures from the paper:
        Embeddings are normalised row by row. Two random directions are not
        made orthogonal; in many dimensions they nearly are.

    References:
        - Li, Xu, Taylor, Studer, Goldstein, 2017, "Visualizing the Loss
          Landscape of Neural Nets", arXiv:1712.09913
        - Goodfellow, Vinyals, Saxe, 2014, "Qualitatively characterizing
          neural network optimization problems", arXiv:1412.6544
    """
    distance = checked_number("distance", distance, above=0.0)
    seed = checked_count("seed", seed, 0)
    whole = DatasetLoss(model, data, loss, training, steps, batch_size)
    ways = _directions(whole, directions, to, seed)
    other = None if to is None else weights_of(model, to)
    if other is not None:
        own = [other[id(v)] - w for v, w in zip(whole.variables, whole.start())]
        ways[0] = [d.astype(w.dtype) for d, w in zip(own, whole.start())]
    if points is None:
        points = 41 if len(ways) == 1 else 21
    checked_count("points", points, 2)
    lines = [np.linspace(-distance, distance, points) for _ in ways]
    if to is not None:
        lines[0] = np.linspace(-distance / 2, 1 + distance / 2, points)
    here = whole.at(whole.zeros())
    if not np.isfinite(here):
        raise ValueError(
            "The loss at the weights of the model is not finite. Received: "
            f"{here}"
        )
    ways = [whole.packed(way) for way in ways]
    losses = np.zeros([points] * len(ways))
    bar = keras.utils.Progbar(losses.size) if verbose else None
    for i, place in enumerate(np.ndindex(losses.shape)):
        steps_along = [line[k] for line, k in zip(lines, place)]
        shift = whole.zeros()
        for step, way in zip(steps_along, ways):
            shift = whole.vectors.plus(shift, float(step), way)
        state = None
        if other is not None:
            state = whole.state_towards(other, float(steps_along[0]))
        losses[place] = whole.at(shift, state)
        if bar is not None:
            bar.update(i + 1)
    return Landscape(tuple(lines), losses, to is not None)


def plot_loss_landscape(
    model: keras.Model,
    data: Any,
    loss: keras.losses.Loss | str | Callable | None = None,
    path: str | os.PathLike | None = None,
    axes: Any = None,
    **options: Any,
) -> Landscape:
    """Draws the mean loss of data around the weights of a model.

    Args:
        model, data, loss: As for `loss_landscape`.
        path: File to write the picture to, in the format of its suffix;
            `None` for no file. Defaults to `None`.
        axes: Axes of matplotlib to draw into; `None` for a figure of its own.
            Defaults to `None`.
        **options: Further arguments of `loss_landscape`.

    Returns:
        The `Landscape`: `coordinates`, `losses` and `figure`.

    Raises:
        ImportError: If matplotlib is missing; before anything is computed.
        ValueError: As for `loss_landscape`, or if nothing can be written to
            `path`.

    Example:

    >>> import keras, keras_stab, numpy as np
    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> model.compile("sgd", loss="mse")
    >>> x, y = np.ones((4, 3)), np.zeros((4, 1))
    >>> found = keras_stab.plot_loss_landscape(
    ...     model, (x, y), directions=2, points=5, verbose=0
    ... )
    >>> found.losses.shape
    (5, 5)
    """
    extra("matplotlib", "`plot_loss_landscape`", "diagnostics")
    path = None if path is None else _checked_path(path)
    found = loss_landscape(model, data, loss, **options)
    found.figure = draw(found, axes)
    if path is not None:
        found.figure.savefig(path, dpi=150)
    return found


def _checked_path(path):
    """The path, if a picture can be written there once it is computed."""
    path = pathlib.Path(path)
    suffix = path.suffix.removeprefix(".").lower()
    known = picture_formats()
    if suffix and suffix not in known:
        raise ValueError(
            f"`path` must end with one of {sorted(known)}. Received: {path}"
        )
    if not path.parent.is_dir():
        raise ValueError(
            f"There is no folder {path.parent}. Received: path={str(path)!r}"
        )
    return path


def _directions(whole, directions, to, seed):
    """One or two directions, the first of which may be replaced."""
    if isinstance(directions, (list, tuple)):
        if to is not None:
            raise ValueError(
                "`to` already gives the first direction: pass `directions` as "
                "a number. Received: a list of directions"
            )
        if len(directions) not in (1, 2):
            raise ValueError(
                "There can be one or two directions. Received: "
                f"{len(directions)}"
            )
        return [checked_direction(whole.variables, d) for d in directions]
    if directions not in (1, 2) or isinstance(directions, bool):
        raise ValueError(
            "`directions` must be 1, 2 or a list of directions. Received: "
            f"directions={directions!r}"
        )
    random = np.random.default_rng(seed)
    return [
        filter_normalised(whole.variables, whole.start(), random)
        for _ in range(directions)
    ]
