"""Every picture of the library; matplotlib is loaded when the first one is drawn.

>>> plot_spectrum(spectrum, "spectrum.png")
>>> plot_landscapes(surfaces, "landscape.png", spectrum=spectrum)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbert.extras import require
from qbert.files import write_whole

_DECADES_FOR_LOG = 30.0
_MOST_UPRIGHT = 14  # names below an axis
_POINTS = 100  # along an axis of a drawn surface


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib `Figure` of this size in inches, which draws into files only and needs no display.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    require("matplotlib", "a picture")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_spectrum(
    spectrum: Any, path: str | os.PathLike[str], *, title: str = "", notes: Mapping[str, str] | None = None
) -> None:
    """Every run's eigenvalue by block, boxes over the runs, and |mean| + std; the suffix of `path` chooses the type.

    `title` and `notes` as for `HessianSpectrum.plot`.

    Where magnitudes span more than thirtyfold, the axis is logarithmic and has no place for signs: negative values are
    then drawn at their magnitude, in a colour and a shape of their own, and boxes are those of the magnitudes.
    """
    values = spectrum.eigenvalues  # [R, L]
    runs, blocks = values.shape
    figure = new_figure(max(6.4, 0.42 * blocks + 2), 4.8)
    axes = figure.add_subplot()
    magnitudes = np.abs(values[values != 0])
    by_magnitude = bool(magnitudes.size and magnitudes.max() > _DECADES_FOR_LOG * magnitudes.min())
    shown = np.abs(values) if by_magnitude else values
    positions = np.arange(blocks)
    if runs > 2:
        axes.boxplot(
            shown,
            positions=positions,
            widths=0.55,
            showfliers=False,
            medianprops={"color": "black"},
            boxprops={"color": "0.45"},
            whiskerprops={"color": "0.45"},
            capprops={"color": "0.45"},
        )
    jitter = np.linspace(-0.16, 0.16, runs) if runs > 1 else np.zeros(1)
    x = positions[None, :] + jitter[:, None]
    below = "negative (not at a minimum)" + (", drawn at its magnitude" if by_magnitude else "")
    for sign, marker, color, label in ((1, "o", "tab:blue", "positive"), (-1, "v", "tab:red", below)):
        chosen = (np.sign(values) == sign) & spectrum.converged
        if chosen.any():
            axes.plot(x[chosen], shown[chosen], marker, markersize=4, color=color, alpha=0.75, label=label)
    if not spectrum.converged.all():
        missed = ~spectrum.converged
        axes.plot(x[missed], shown[missed], "x", markersize=5, color="tab:orange", label="not converged")
    axes.plot(positions, spectrum.sensitivity, "_", markersize=16, color="tab:green", label="|mean| + std")
    if by_magnitude:
        axes.set_yscale("log")
    elif (values < 0).any():
        axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    joint = " - " if blocks > _MOST_UPRIGHT else "\n"
    below_names = [joint + notes[name] if notes and notes.get(name) else "" for name in spectrum.names]
    ticks = [short + note for short, note in zip(_short(spectrum.names), below_names, strict=True)]
    axes.set_xticks(positions, ticks, rotation=90 if blocks > _MOST_UPRIGHT else 0)
    axes.set_xlabel(_axis_label(spectrum))
    axes.set_ylabel(f"{'magnitude of the top eigenvalue' if by_magnitude else 'top eigenvalue'}  [loss / weight²]")
    fraction = spectrum.settings.get("fraction")
    share = f", each on {100 * fraction:.3g} % of the data" if isinstance(fraction, int | float) else ""
    above = f"{title}\n" if title else ""
    axes.set_title(f"{above}Top Hessian eigenvalue over {runs} run{'s' if runs > 1 else ''}{share}", fontsize="medium")
    axes.grid(axis="y", alpha=0.25)
    boxes = "; boxes: quartiles and median" if runs > 2 else ""
    figure.legend(
        loc="outside lower center", ncols=2, fontsize="small", title=f"one mark per run{boxes}", frameon=False
    )
    write_whole(path, lambda aside: figure.savefig(aside, dpi=150))


def _short(names: list[str]) -> list[str]:
    """Names without the parts that all of them share at the front."""
    split = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(len(s) > shared + 1 for s in split) and len({s[shared] for s in split}) == 1:
        shared += 1
    return [".".join(s[shared:]) for s in split]


def _axis_label(spectrum: Any) -> str:
    kind = {"layer": "encoder layer", "block": "half layer", "matrix": "weight matrix", "group": "rows of a matrix"}
    return kind.get(str(spectrum.settings.get("granularity")), "block")


def plot_landscapes(
    landscapes: Sequence[Any],
    path: str | os.PathLike[str],
    *,
    kind: str = "contour",
    spectrum: Any = None,
    title: str = "",
) -> None:
    """Draw surfaces side by side with one colour scale; a star marks the trained weights.

    Between the points of the grid the surface is a monotone cubic through them, axis by axis (PCHIP, Fritsch and
    Butland 1984): unlike a spline, it has no dip or bump that was not measured.

    Args:
        landscapes: at least one.
        path: image file; its suffix chooses the type.
        kind: ``contour`` or ``surface`` (three-dimensional).
        spectrum: a `HessianSpectrum` of the same blocks; titles then say its mean and deviation over the runs beside
            the eigenvalues of the samples that the surface was measured on.
        title: what was measured, such as the model and the task.

    Raises:
        ValueError: nothing to draw, or an unknown kind.
    """
    if not landscapes:
        raise ValueError("landscapes: nothing to draw; pass at least one LossLandscape")
    if kind not in ("contour", "surface"):
        raise ValueError(f"kind: {kind!r} is unknown; use 'contour' or 'surface'")
    figure = new_figure(4.6 * len(landscapes) + 1.2, 5.8)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm

    finite = np.concatenate([s.losses[np.isfinite(s.losses)] for s in landscapes])
    low, high = float(finite.min()), float(finite.max())
    high = high if high > low else low + 1e-12
    # Square-root colours and quadratic levels: a parabola gets evenly spaced contours. The lowest one is no line: where
    # the surface touches it, noise would draw islands.
    norm = PowerNorm(0.5, low, high)
    levels = low + (high - low) * np.linspace(0, 1, 17) ** 2
    reach = min(float(s.offsets[-1]) for s in landscapes)  # the same window for all, so that slopes compare
    panels = []
    for index, surface in enumerate(landscapes, 1):
        offsets, losses = _refined(surface, low, high)
        x, y = np.meshgrid(offsets, offsets, indexing="ij")
        axes: Any = figure.add_subplot(1, len(landscapes), index, projection="3d" if kind == "surface" else None)
        panels.append(axes)
        if kind == "surface":
            axes.plot_surface(x, y, losses, cmap="viridis", norm=norm, rstride=2, cstride=2, alpha=0.9)
            axes.plot([0], [0], [surface.center], "*", color="red", markersize=11, zorder=9)
            axes.set_zlim(low, high)
            axes.set_zlabel("mean loss")
            axes.locator_params(nbins=5)
            axes.set_box_aspect(None, zoom=0.8)
        else:
            axes.contourf(x, y, losses, levels=levels, cmap="viridis", norm=norm)
            axes.contour(x, y, losses, levels=levels[1:], colors="white", linewidths=0.4, alpha=0.6)
            axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
            axes.plot([0], [0], "*", color="red", markeredgecolor="white", markersize=14)
            axes.set_aspect("equal")
        axes.set_title(_landscape_title(surface, spectrum), fontsize="small")
        axes.set_xlabel("distance along eigenvector 1 [weights, Euclidean]")
        axes.set_ylabel("distance along eigenvector 2 [the same]")
    bar = figure.colorbar(
        ScalarMappable(norm, "viridis"),
        ax=panels,
        shrink=0.85,
        pad=0.02 if kind == "contour" else 0.1,
        ticks=[low, *(tick for tick in _round_numbers(low, high) if tick > low + 0.01 * (high - low))],
        format="%.3g",
    )
    bar.set_label("mean loss (square-root scale)")
    about = f"{title}: mean" if title else "Mean"
    figure.suptitle(f"{about} loss around the trained weights (star)", fontsize="medium")
    write_whole(path, lambda aside: figure.savefig(aside, dpi=150))


def _landscape_title(surface: Any, spectrum: Any) -> str:
    eigenvalues = ", ".join(f"{value:.3g}" for value in surface.eigenvalues)
    note = "" if surface.converged else " (not converged)"
    least = float(np.nanmin(np.where(np.isfinite(surface.losses), surface.losses, np.nan)))
    below = f", least here {least:.3g}" if least < surface.center else ""
    lines = [surface.name, f"loss at the star {surface.center:.3g}{below}"]
    samples = f" of these {surface.samples} samples" if surface.samples else ""
    lines.append(f"top eigenvalues{samples}: {eigenvalues}{note}")
    if spectrum is not None:
        at = spectrum.names.index(surface.name)
        runs = len(spectrum.eigenvalues)
        lines.append(f"over {runs} runs: mean {spectrum.mean[at]:.3g}, deviation {spectrum.std[at]:.3g}")
    return "\n".join(lines)


def _refined(surface: Any, low: float, high: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(offsets [F], losses [F, F]): about a hundred points an axis on a monotone cubic through the measured ones."""
    from scipy.interpolate import PchipInterpolator

    losses = np.where(np.isfinite(surface.losses), surface.losses, high)
    parts = -(-_POINTS // (len(surface.offsets) - 1))
    offsets = np.linspace(surface.offsets[0], surface.offsets[-1], parts * (len(surface.offsets) - 1) + 1)
    for axis in (0, 1):
        losses = PchipInterpolator(surface.offsets, losses, axis=axis)(offsets)
    return offsets, losses


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten in (low, high], the last of them less than two decades below `high`."""
    decades = range(int(np.floor(np.log10(high))) - 1, int(np.floor(np.log10(high))) + 1) if high > 0 else range(0)
    return [step * 10.0**decade for decade in decades for step in (1, 2, 5) if low < step * 10.0**decade <= high]
