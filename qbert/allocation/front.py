"""All bit allocations worth having: the exact front of model size against predicted damage.

>>> front = pareto(spectrum, model, bits=(2, 3, 4, 8))
>>> front.plot("pareto.png"); bits = front.config(size_mb=9)

No allocation is both smaller and less damaging than one on the front. It is found exactly, by dynamic programming over
the blocks (`qbert.allocation.knapsack.front`); its points are what `allocate_bits` finds for every size budget.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qbert.allocation.blocks import ConfigWriter, Fixed, Measured, check_widths, make_choices, measured_blocks
from qbert.allocation.budgets import make_budgets, rounded_up
from qbert.allocation.damage import Damage, damage_table, target_specs
from qbert.allocation.knapsack import front
from qbert.bits import BitsConfig
from qbert.encoders.targets import targets_found_once
from qbert.files import check_seal, read_saved, write_json, write_whole
from qbert.plots import new_figure

FORMAT = "qbert.pareto/1"


@dataclass(frozen=True)
class ParetoPoint:
    """One allocation: bytes of the whole model, predicted damage, and the configuration."""

    bytes: int
    damage: float
    config: BitsConfig

    @property
    def mb(self) -> float:
        """Size in MB of 10^6 bytes."""
        return self.bytes / 1e6


@dataclass(frozen=True)
class ParetoFront:
    """Allocations by size, smallest first; each is less damaging than all smaller ones."""

    points: tuple[ParetoPoint, ...]

    def config(self, size_mb: float) -> BitsConfig:
        """The least damaging allocation of at most `size_mb` MB (10^6 bytes).

        Raises:
            ValueError: if every allocation is larger.
        """
        fitting = [p for p in self.points if p.mb <= size_mb]
        if not fitting:
            smallest = rounded_up(self.points[0].mb)
            raise ValueError(f"size_mb={size_mb!r} is too small: the smallest allocation takes {smallest}")
        return fitting[-1].config

    def plot(self, path: str | os.PathLike[str], *, marks: Mapping[str, tuple[float, float]] | None = None) -> None:
        """Draw size against damage into an image file (type by its suffix).

        Args:
            path: where to write.
            marks: label -> (size in MB, damage) of further allocations to show.
        """
        figure = new_figure(6.4, 4.8)
        axes = figure.add_subplot()
        sizes, harms = [p.mb for p in self.points], [p.damage for p in self.points]
        axes.step(sizes, harms, where="post", color="tab:blue", linewidth=1)
        axes.plot(sizes, harms, "o", markersize=3, color="tab:blue", label=f"front ({len(sizes)} allocations)")
        for label, (size, harm) in (marks or {}).items():
            axes.plot([size], [harm], "X", markersize=8, label=label)
        if min(harms) > 0 and max(harms) > 30 * min(harms):
            axes.set_yscale("log")
        axes.set_xlabel("model size  [MB = 10⁶ bytes]")
        axes.set_ylabel("predicted damage (sum over blocks)")
        axes.set_title("Bit allocations: size against predicted damage")
        axes.grid(alpha=0.25)
        axes.legend(fontsize="small")
        write_whole(path, lambda aside: figure.savefig(aside, dpi=150))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON (aside first, then renamed)."""
        points = [{"bytes": p.bytes, "damage": p.damage, "config": p.config.to_dict()} for p in self.points]
        write_json(path, {"format": FORMAT, "points": points})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ParetoFront:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is not a whole front.
        """
        content = read_saved(path, FORMAT, "ParetoFront")
        try:
            points = tuple(
                ParetoPoint(int(p["bytes"]), float(p["damage"]), BitsConfig.from_dict(p["config"]))
                for p in content["points"]
            )
            rising = all(a.bytes < b.bytes and a.damage > b.damage for a, b in itertools.pairwise(points))
            if not (points and rising):
                raise ValueError("its points are not a front: none, or not each larger and less damaging")
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise ValueError(f"path: {path} is a damaged front ({error!r}); compute it again") from error
        check_seal(path, content)
        return cls(points)

    def __str__(self) -> str:
        lines = [f"{'MB (1e6)':>10}{'damage':>14}  bits of the blocks"]
        for p in self.points:
            bits = " ".join(str(rule.get("bits", "-")) for pattern, rule in p.config.rules.items() if pattern != "*")
            lines.append(f"{p.mb:>10.3f}{p.damage:>14.5g}  {bits}")
        return "\n".join(lines)


@targets_found_once()
def pareto(
    spectrum: Measured | Mapping[str, float],
    model: nn.Module,
    bits: Sequence[int] = (2, 3, 4, 8),
    *,
    damage: Damage | None = None,
    fixed: Fixed | None = None,
    tied: Iterable[Iterable[str]] = (),
    embedding_bits: int | None = None,
    **settings: Any,
) -> ParetoFront:
    """The exact front of model size and predicted damage over all allocations.

    Args:
        spectrum, bits, damage, fixed, tied, embedding_bits, settings: as for `allocate_bits`.
        model: the float model.

    Raises:
        ValueError: as `allocate_bits`.
    """
    widths = check_widths(bits)
    blocks = measured_blocks(spectrum, model)
    choices = make_choices(blocks, fixed=fixed, tied=tied, model=model)
    names = [b.name for c in choices for b in c.blocks]
    writer = ConfigWriter(blocks, names, widths, fixed, model, embedding_bits, settings)

    def write(picked: Sequence[int]) -> BitsConfig:
        return writer.write({b.name: widths[p] for c, p in zip(choices, picked, strict=True) for b in c.blocks})

    specs = {b: target_specs(model, b, **settings) for b in widths}
    reference = write([0] * len(choices))
    (size,) = make_budgets(blocks, choices, widths, model, reference, settings, specs=specs, size_mb=1.0)
    harm = damage_table(spectrum, choices, widths, model, damage, settings, specs=specs)
    found = front(harm, size.table)
    return ParetoFront(tuple(ParetoPoint(round(c + size.constant), d, write(picked)) for c, d, picked in found))
