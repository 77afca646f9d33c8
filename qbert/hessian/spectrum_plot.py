"""Draw a `HessianSpectrum`: one box of eigenvalues per block, every run as a point.

>>> plot_spectrum(spectrum, "spectrum.png")
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from qbert.files import write_whole

if TYPE_CHECKING:
    from qbert.hessian.spectrum import HessianSpectrum

_DECADES_FOR_LOG = 30.0


def plot_spectrum(spectrum: HessianSpectrum, path: str | os.PathLike[str]) -> None:
    """Write the picture to `path`; the suffix chooses the type (png, pdf, svg)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values = spectrum.eigenvalues  # [R, L]
    runs, blocks = values.shape
    figure = Figure(figsize=(max(6.4, 0.42 * blocks + 2), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    positions = np.arange(blocks)
    if runs > 2:
        axes.boxplot(
            values,
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
    for sign, color, label in ((1, "tab:blue", "positive"), (-1, "tab:red", "negative: not at a minimum")):
        chosen = (np.sign(values) == sign) & spectrum.converged
        if chosen.any():
            axes.plot(x[chosen], values[chosen], "o", markersize=4, color=color, alpha=0.75, label=label)
    if not spectrum.converged.all():
        missed = ~spectrum.converged
        axes.plot(x[missed], values[missed], "x", markersize=5, color="tab:orange", label="not converged")
    axes.plot(positions, spectrum.sensitivity, "_", markersize=16, color="tab:green", label="|mean| + std")
    magnitudes = np.abs(values[values != 0])
    if magnitudes.size and magnitudes.max() > _DECADES_FOR_LOG * magnitudes.min():
        if (values < 0).any():
            axes.set_yscale("symlog", linthresh=float(magnitudes.min()))
        else:
            axes.set_yscale("log")
    if (values < 0).any():
        axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    axes.set_xticks(positions, _short(spectrum.names), rotation=90 if blocks > 14 else 0)
    axes.set_xlabel(_axis_label(spectrum))
    axes.set_ylabel("eigenvalue of largest magnitude  [loss / weight²]")
    fraction = spectrum.settings.get("fraction")
    share = f", each on {100 * fraction:.3g} % of the data" if isinstance(fraction, int | float) else ""
    axes.set_title(f"Top Hessian eigenvalue over {runs} run{'s' if runs > 1 else ''}{share}")
    axes.grid(axis="y", alpha=0.25)
    axes.legend(fontsize="small")
    write_whole(path, lambda aside: figure.savefig(aside, dpi=150))


def _short(names: list[str]) -> list[str]:
    """Names without the parts that all of them share at the front."""
    split = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(len(s) > shared + 1 for s in split) and len({s[shared] for s in split}) == 1:
        shared += 1
    return [".".join(s[shared:]) for s in split]


def _axis_label(spectrum: HessianSpectrum) -> str:
    kind = {"layer": "encoder layer", "block": "half layer", "matrix": "weight matrix", "group": "rows of a matrix"}
    return kind.get(str(spectrum.settings.get("granularity")), "block")
