"""Pictures of the loss around a solution, by matplotlib."""

import numpy as np


def draw(landscape, axes=None):
    """Draws a `Landscape` and returns the figure."""
    if axes is None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.0, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
    if landscape.losses.ndim == 1:
        _draw_line(landscape, axes)
    else:
        _draw_plane(landscape, axes)
    return axes.figure


def picture_formats():
    """The suffixes of files that can be written."""
    from matplotlib.backend_bases import FigureCanvasBase

    return set(FigureCanvasBase.get_supported_filetypes())


def _draw_line(landscape, axes):
    (along,) = landscape.coordinates
    axes.plot(along, landscape.losses, color="#4477aa")
    _mark(landscape, axes, [0.0, 1.0][: 1 + landscape.to_other])
    _label(landscape, axes)
    axes.set_ylabel("Loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    if _is_steep(landscape.losses):
        axes.set_yscale("log")


def _mark(landscape, axes, places):
    for place, name in zip(places, ("this model", "the other")):
        axes.axvline(place, color="0.6", linestyle=":", linewidth=1.0)
        if landscape.to_other:
            axes.text(
                place,
                1.0,
                name,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize="small",
                color="0.4",
            )


def _label(landscape, axes):
    axes.set_xlabel(
        "Position on the line to the other solution"
        if landscape.to_other
        else "Distance along the direction"
    )


def _draw_plane(landscape, axes):
    first, second = landscape.coordinates
    losses = np.ma.masked_invalid(landscape.losses).T
    norm = None
    if _is_steep(landscape.losses):
        from matplotlib.colors import LogNorm

        norm = LogNorm(losses.min(), losses.max())
        levels = np.geomspace(losses.min(), losses.max(), 16)
    else:
        levels = np.linspace(losses.min(), losses.max(), 16)
    if losses.min() == losses.max():  # a constant has no contours
        levels = [losses.min() - 0.5, losses.min() + 0.5]
    filled = axes.contourf(
        first, second, losses, levels=levels, norm=norm, cmap="viridis"
    )
    axes.contour(
        first, second, losses, levels=levels, colors="white", linewidths=0.4
    )
    places = [0.0, 1.0][: 1 + landscape.to_other]
    axes.plot(places, [0.0] * len(places), "o", color="#cc5511", markersize=4)
    _label(landscape, axes)
    axes.set_ylabel("Distance along the other direction")
    bar = axes.figure.colorbar(filled, ax=axes, label="Loss")
    ticks = levels[:: max(1, len(levels) // 5)]
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    bar.minorticks_off()


def _is_steep(losses):
    """Whether a logarithmic scale shows more."""
    finite = losses[np.isfinite(losses)]
    return finite.min() > 0.0 and finite.max() > 20.0 * finite.min()
