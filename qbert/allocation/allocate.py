r"""From sensitivities to bits: by rank, as Q-BERT does, or exactly under a budget.

Without a budget the blocks are ranked by their sensitivity, :math:`\Omega_i = |\mathrm{mean}(\lambda_i)| +
\mathrm{std}(\lambda_i)`, and the upper half gets the larger of two bit widths (Shen et al. 2020, section 3.1; 2/3MP is
``bits=(2, 3)``). With one, the total predicted damage

.. math:: \sum_i \Omega_i \, \|W_i - Q_{b_i}(W_i)\|^2

is minimised exactly over all allocations that keep it (Yao et al. 2021, HAWQ-V3, eq. 8, with the eigenvalue instead of
the trace; Dong et al. 2020, HAWQ-V2).

For a model instead of a spectrum, matrices and tables share the bytes of a whole file (`FilePlan`).

    >>> allocate_bits(spectrum, bits=(2, 3))
    >>> allocate_bits(spectrum, bits=(2, 3, 4, 8), size_mb=12, model=model)
    >>> allocate_bits(model, size_mb=6, calibration_data=batches)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from qbert.allocation.blocks import ConfigWriter, Fixed, Measured, check_widths, make_choices, measured_blocks
from qbert.allocation.budgets import Latency, check_bounds, explain_infeasible, make_budgets
from qbert.allocation.damage import Damage, Errors, Specs, damage_table, errors_under, target_specs
from qbert.allocation.knapsack import choose
from qbert.allocation.whole_file import FilePlan
from qbert.arguments import real_number, whole_number
from qbert.bits import BitsConfig
from qbert.encoders.targets import targets_found_once
from qbert.hessian.spectrum import HessianSpectrum

_RANKED_WIDTHS, _FILE_WIDTHS = (2, 3), (2, 3, 4, 8)


@targets_found_once()
def allocate_bits(
    spectrum: Measured | Mapping[str, float] | nn.Module,
    bits: Sequence[int] | None = None,
    *,
    size_mb: float | None = None,
    average_bits: float | None = None,
    bit_operations: float | None = None,
    max_latency: float | None = None,
    latency: Latency | None = None,
    model: nn.Module | None = None,
    calibration_data: Any = None,
    progress: bool = False,
    damage: Damage | None = None,
    share: float | None = None,
    fixed: Fixed | None = None,
    tied: Iterable[Iterable[str]] = (),
    embedding_bits: int | None = None,
    **settings: Any,
) -> BitsConfig:
    """Bits for every measured block; or, of a model, for every matrix and table in a file of `size_mb`.

    For a spectrum: matrices in no measured block (such as ALBERT's embedding projection) get the largest of `bits`;
    embedding tables get `embedding_bits`; pooler and heads stay in float unless `fixed` names them.

    For a float model and unlabelled `calibration_data`: the bits of every matrix, pooler included, and the form of
    every table (bits, different bits by rows, rank times bits), chosen together so that they do the least measured
    damage to the outputs in a safetensors file of at most `size_mb`, its header included
    (`qbert.allocation.whole_file`). Give the result to `quantize_model` with the same data.

    Args:
        spectrum: a `HessianSpectrum` of any granularity, the result of `qbert.sensitivity`, or a mapping from module
            name to sensitivity; or the float model itself.
        bits: the widths to choose from, out of 2, 3, 4, 8 and 16 or 32 (float). Default: 2 and 3 for a spectrum, 2, 3,
            4 and 8 for a model.
        size_mb: largest size in MB of 10^6 bytes: for a spectrum of everything that `model_size` counts, for a model
            of the file.
        average_bits: largest mean number of bits of the weights in the measured blocks.
        bit_operations: largest sum of O I (weight bits) (activation bits) over the matrices, for one token.
        max_latency: largest sum of the times in `latency`, in their unit.
        latency: block or matrix name -> bits -> measured time; for `max_latency`.
        model: the float model; needed for a budget, otherwise used to check the result early.
        calibration_data: batches as for `quantize_model`, some hundred rows, where the first argument is a model.
        progress: show bars, where the first argument is a model.
        damage: block name -> bits -> predicted damage, instead of sensitivity times squared weight error; where
            `spectrum` is a result of `qbert.sensitivity`, its own prediction is the default.
        share: without a budget and with two widths: share of the blocks, from the most sensitive down, that get the
            larger one. Default: one half (the middle one of an odd number included). More widths cut the ranking into
            equal parts.
        fixed: pattern -> bits, or a mapping of `TensorSpec` fields, for what is not to be decided.
        tied: sets of block names that shall get equal bits; blocks that share a weight in `model` always do.
        embedding_bits: bits of the embedding tables; ``None`` is 4 where no width is above 4, and 8 otherwise.
        **settings: further defaults of the `BitsConfig` (``groups``, ``scheme``, ``range_method``, ...).

    Returns:
        A `BitsConfig` with one pattern a block, or one a matrix where no name stands for the block.

    Raises:
        ValueError: a budget that cannot be kept (the sentence names the smallest that can), a budget without `model`,
            an impossible width or setting, a spectrum of another model; for a model: no data, no `size_mb`, or an
            argument that is for spectra.
        TypeError: a spectrum, model, `fixed` or `tied` of another type.
    """
    if isinstance(spectrum, nn.Module):
        foreign: dict[str, Any] = {"average_bits": average_bits, "bit_operations": bit_operations}
        foreign |= {"max_latency": max_latency}
        foreign |= {"latency": latency, "model": model, "damage": damage, "share": share, "tied": tuple(tied) or None}
        for name, value in foreign.items():
            if value is not None:
                raise ValueError(f"{name}: it is for a spectrum; for a model give size_mb, bits, fixed and settings")
        if embedding_bits is not None:
            raise ValueError(
                f"embedding_bits={embedding_bits!r}: tables are chosen too; to fix them give "
                f"fixed={{'embeddings': {embedding_bits!r}}}"
            )
        if size_mb is None or calibration_data is None:
            raise ValueError(
                "size_mb and calibration_data: a model is measured on batches for a file of a size; give both, or a "
                "spectrum"
            )
        check_bounds(size_mb=size_mb)
        plan = FilePlan(
            spectrum,
            calibration_data,
            _FILE_WIDTHS if bits is None else bits,
            fixed=fixed,
            size_mb=size_mb,
            progress=progress,
            **settings,
        )
        return plan.config(size_mb)
    if calibration_data is not None:
        raise ValueError("calibration_data: it is for a model as the first argument; a spectrum was measured already")
    problem = Problem(
        spectrum,
        _RANKED_WIDTHS if bits is None else bits,
        bounds={
            "size_mb": size_mb,
            "average_bits": average_bits,
            "bit_operations": bit_operations,
            "max_latency": max_latency,
        },
        latency=latency,
        model=model,
        damage=damage,
        share=share,
        fixed=fixed,
        tied=tied,
        embedding_bits=embedding_bits,
        settings=settings,
    )
    return problem.config(problem.solve(spectrum))


class Problem:
    """What `allocate_bits` solves, everything settled but the sensitivities: it can be solved again for others.

    Args:
        bounds: budget argument -> bound or None.
        settings: further defaults of the `BitsConfig`.
        spectrum, bits and the rest: as for `allocate_bits`, which see for what is raised.
    """

    def __init__(
        self,
        spectrum: Measured | Mapping[str, float],
        bits: Sequence[int] = (2, 3),
        *,
        bounds: Mapping[str, float | None],
        settings: Mapping[str, Any],
        latency: Latency | None = None,
        model: nn.Module | None = None,
        damage: Damage | None = None,
        share: float | None = None,
        fixed: Fixed | None = None,
        tied: Iterable[Iterable[str]] = (),
        embedding_bits: int | None = None,
    ):
        self.widths = check_widths(bits)
        bounds = check_bounds(**bounds)
        self.limited = any(value is not None for value in bounds.values())
        _check_arguments(self.widths, self.limited, model, share, bounds.get("max_latency"), latency)
        self.model, self.damage, self.share, self.fixed = model, damage, share, fixed
        self.tied = [names if isinstance(names, str) else list(names) for names in tied]  # strings are refused
        self.settings = settings
        self.blocks = measured_blocks(spectrum, model)
        self.choices = make_choices(self.blocks, fixed=fixed, tied=self.tied, model=model)
        names = [b.name for c in self.choices for b in c.blocks]
        self._writer = ConfigWriter(self.blocks, names, self.widths, fixed, model, embedding_bits, settings)
        self._errors: Errors | None = None
        self._specs: Specs = {}
        if not self.limited:
            return
        assert model is not None
        reference = self.config([0] * len(self.choices))
        self._specs = {b: target_specs(model, b, **settings) for b in self.widths}
        budgets = make_budgets(
            self.blocks,
            self.choices,
            self.widths,
            model,
            reference,
            settings,
            latency=latency,
            specs=self._specs,
            **bounds,
        )
        self._costs, self._room = [b.table for b in budgets], [b.room for b in budgets]
        if choose([[0.0] * len(self.widths) for _ in self.choices], self._costs, self._room) is None:
            raise ValueError(explain_infeasible(budgets, self.widths))

    def solve(self, spectrum: Measured | Mapping[str, float]) -> list[int]:
        """Index of the width of every choice, for sensitivities of the same blocks."""
        blocks = measured_blocks(spectrum, self.model)
        choices = make_choices(blocks, fixed=self.fixed, tied=self.tied, model=self.model)
        if not self.limited:
            return split_by_rank([c.sensitivity for c in choices], len(self.widths), self.share)
        assert self.model is not None
        if self._errors is None and self.damage is None and not callable(getattr(spectrum, "damage", None)):
            members = [m for c in choices for m in c.members]
            self._errors = errors_under(self._specs, self.model, members)
        table = damage_table(
            spectrum, choices, self.widths, self.model, self.damage, self.settings, errors=self._errors
        )
        picked = choose(table, self._costs, self._room)
        assert picked is not None
        return picked

    def chosen(self, picked: Sequence[int]) -> dict[str, int]:
        """Block name -> bits, of the blocks that are not fixed."""
        return {b.name: self.widths[p] for c, p in zip(self.choices, picked, strict=True) for b in c.blocks}

    def config(self, picked: Sequence[int]) -> BitsConfig:
        """The configuration of a solution; it fits the model, if there is one."""
        found = self._writer.write(self.chosen(picked))
        if self.model is not None and not self.limited:
            found.resolve(self.model)
        return found


def split_by_rank(sensitivities: Sequence[float], widths: int, share: float | None = None) -> list[int]:
    """Index of the width (ascending) of every block: monotone in the ranking, equal parts or `share` for two widths.

    Blocks of equal sensitivity count in their order; parts that cannot be equal are larger at the sensitive end.
    """
    count = len(sensitivities)
    order = sorted(range(count), key=lambda i: -sensitivities[i])
    if share is not None:
        high = math.ceil(share * count - 1e-9)
        parts = [high, count - high]
    else:
        equal, extra = divmod(count, widths)
        parts = [equal + (part < extra) for part in range(widths)]
    picked = [0] * count
    by_rank = [widths - 1 - part for part, size in enumerate(parts) for _ in range(size)]
    for i, index in zip(order, by_rank, strict=True):
        picked[i] = index
    return picked


def _check_arguments(
    widths: Sequence[int],
    limited: bool,
    model: nn.Module | None,
    share: float | None,
    max_latency: float | None,
    latency: Latency | None,
) -> None:
    if limited and model is None:
        raise ValueError("model: a budget needs the float model to count its bytes; pass model=...")
    if (max_latency is None) != (latency is None):
        raise ValueError("latency and max_latency go together: a table of measured times, and the bound of their sum")
    if share is None:
        return
    if limited or len(widths) != 2:
        raise ValueError("share: it cuts a ranking into two bit widths; give two numbers in bits and no budget")
    if not 0 <= real_number("share", share) <= 1:
        raise ValueError(f"share={share!r} is not a share of the blocks; use a number from 0 to 1")


_BOUNDS = ("size_mb", "average_bits", "bit_operations", "max_latency")
_PROBLEM = ("latency", "model", "damage", "share", "fixed", "tied", "embedding_bits")


@dataclass(frozen=True)
class BitShares:
    """How often every block gets every width.

    Attributes:
        names: [L] blocks that are not fixed, bottom first.
        widths: [W] bit widths, ascending.
        chosen: [L] what `allocate_bits` gives for the measured runs.
        shares: [L, W] share of the draws in which the block gets the width.
        same: share of the draws in which all blocks get their chosen width.
    """

    names: list[str]
    widths: tuple[int, ...]
    chosen: list[int]
    shares: NDArray[np.float64]
    same: float

    def __str__(self) -> str:
        width = max(map(len, [*self.names, "block"]))
        header = f"{'block':<{width}}  chosen  " + "  ".join(f"{w:>2} bits" for w in self.widths)
        rows = [
            f"{name:<{width}}  {bits:>6}  " + "  ".join(f"{100 * share:>5.0f} %" for share in shares)
            for name, bits, shares in zip(self.names, self.chosen, self.shares, strict=True)
        ]
        return "\n".join([header, *rows, f"All as chosen in {100 * self.same:.0f} % of the draws."])


@targets_found_once()
def bit_shares(
    spectrum: HessianSpectrum, bits: Sequence[int] = (2, 3), *, draws: int = 200, seed: int = 0, **arguments: Any
) -> BitShares:
    """Allocate bits for `draws` resampled spectra.

    Drawing again from few runs spreads less than new runs would (with three, by a factor of about 0.8): the shares are
    then nearer to 0 and 1 than they should be.

    Args:
        spectrum: at least two runs.
        bits, **arguments: as for `qbert.allocate_bits`, budgets and `BitsConfig` settings included; not `damage`, which
            takes the place of the sensitivities.
        draws: number of resampled spectra.
        seed: for the draws.

    Raises:
        ValueError, TypeError: as `allocate_bits`; fewer than two runs or one draw; `damage`; a spectrum without runs.
    """
    if not isinstance(spectrum, HessianSpectrum):
        raise TypeError(f"spectrum: expected a HessianSpectrum with its runs, got {type(spectrum).__name__}")
    draws = whole_number("draws", draws, least=1)
    if arguments.get("damage") is not None:
        raise ValueError("damage: it does not depend on the runs, so that there is nothing to resample; leave it out")
    bounds = {name: arguments.pop(name, None) for name in _BOUNDS}
    given = {name: arguments.pop(name) for name in _PROBLEM if name in arguments}
    problem = Problem(spectrum, bits, bounds=bounds, settings=arguments, **given)
    picked = problem.solve(spectrum)
    problem.config(picked)  # which refuses settings that there are not, or that do not fit
    chosen = problem.chosen(picked)
    found = np.zeros((len(chosen), len(problem.widths)))
    same = 0
    for sensitivity in spectrum.resampled(draws, seed=seed):
        drawn = problem.chosen(problem.solve(_Resampled(spectrum, sensitivity)))
        same += drawn == chosen
        for row, name in enumerate(chosen):
            found[row, problem.widths.index(drawn[name])] += 1
    order = [name for name in spectrum.names if name in chosen]
    rows = [list(chosen).index(name) for name in order]
    return BitShares(order, problem.widths, [chosen[n] for n in order], found[rows] / draws, same / draws)


class _Resampled:
    """The blocks of a spectrum with other sensitivities."""

    def __init__(self, spectrum: HessianSpectrum, sensitivity: NDArray[np.float64]):
        self.names, self.members, self.sensitivity = spectrum.names, spectrum.members, sensitivity
