"""The options of a table, and what each does to the outputs: bits, bits by rows, and ranks times bits."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qbert.allocation.whole_file.matrices import rounded_matrix
from qbert.allocation.whole_file.options import Rules
from qbert.bits import DEFAULT_GROUPS, FLOAT_BITS, TensorSpec, largest_rank
from qbert.layers.quantizer import WeightQuantizer
from qbert.layers.tables import Directions, TableUse, part_specs, rounded_rows, row_errors, row_widths
from qbert.outputs import Call
from qbert.quantizers.groups import row_groups

_RANKS = (0.25, 0.375, 0.5, 0.625, 0.75)  # of the length of a row
_MEAN_BITS = (2.05, 2.1, 2.2, 2.35, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0, 5.0)
_SCHEMES = ("asymmetric", "midrise")  # that tables choose from


def table_options(
    rules: Rules, use: TableUse, calls: Sequence[Call]
) -> Iterator[tuple[dict[str, Any], TensorSpec | None, float]]:
    """(rule, specification, sum over the samples of the squared change of z^T y) of every way to store a table."""
    weight = rules.first.matrix.detach().float()
    read = _Read(calls, weight.device)
    errors: dict[tuple[int, str], Tensor] = {}

    def error(spec: TensorSpec) -> Tensor:
        """Error of the rows that were read, at one number of bits."""
        key = spec.bits, spec.scheme
        if key not in errors:
            errors[key] = rounded_rows(weight[read.rows], spec) - weight[read.rows]
        return errors[key]

    fewest: dict[tuple[int, str], Tensor] = {}
    directions: Directions | None = None
    for rule in table_rules(rules, use):
        spec = rules.spec(rule)
        if spec is None:
            yield rule, None, 0.0
            continue
        if spec.rank is not None:
            directions = directions or Directions(weight, use)
            yield rule, spec, read.harm(_rank_error(weight[read.rows], directions, spec))
        elif spec.row_bits:
            least = replace(spec, bits=min(spec.bits, *(bits for bits, _ in spec.row_bits)), row_bits=())
            key = least.bits, least.scheme
            if key not in fewest:
                fewest[key] = row_errors(weight, least)
            widths = row_widths(weight, spec, use, fewest[key])[read.rows]
            whole = torch.zeros(len(read.rows), weight.shape[1], device=weight.device)
            for bits in widths.unique().tolist():
                inside = widths == bits
                whole[inside] = error(replace(spec, bits=bits, row_bits=()))[inside]
            yield rule, spec, read.harm(whole)
        else:
            by_row = spec.groups is None and spec.input_group_size is None
            yield (
                rule,
                spec,
                read.harm(error(spec) if by_row else (rounded_matrix(rules.first, spec) - weight)[read.rows]),
            )


def _rank_error(rows: Tensor, directions: Directions, spec: TensorSpec) -> Tensor:
    assert spec.rank is not None
    down, up = (f.float() for f in directions.factors(spec.rank))
    of_up = WeightQuantizer(row_groups(len(up), DEFAULT_GROUPS), 1, part_specs(spec, 0)["up"])
    of_up.find(up)
    return rounded_rows(rows @ down, spec) @ of_up(up).T - rows  # type: ignore[no-any-return]


class _Read:
    """The rows of a table that calls read, and what an error of each does.

    Attributes:
        rows: ids of the rows, each once.
    """

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self._calls = [(call.input, call.gradient.float()) for call in calls]
        ids = torch.cat([ids.flatten() for ids, _ in self._calls]) if calls else torch.zeros(0, dtype=torch.int64)
        self.rows = ids.unique().to(device)

    def harm(self, error: Tensor) -> float:
        """Sum over the samples of (sum over tokens of g^T d)^2, for errors d [N, D] of the rows."""
        total = 0.0
        for ids, gradient in self._calls:
            place = torch.searchsorted(self.rows, ids.contiguous())
            total += float((error[place] * gradient).flatten(1).sum(1).square().sum())
        return total


def table_rules(rules: Rules, use: TableUse | None = None) -> Iterator[dict[str, Any]]:
    """The ways to store a table; where its use is not known those that it does not decide, the smallest among them."""
    if rules.fixed is not None:
        yield rules.fixed
        return
    widths = [b for b in rules.widths if b not in FLOAT_BITS]
    schemes = _SCHEMES if "scheme" not in rules.settings else (rules.settings["scheme"],)
    for bits, scheme in itertools.product(widths, schemes):
        yield {"bits": bits, "scheme": scheme}
    yield from ({"bits": b} for b in rules.widths if b in FLOAT_BITS)
    rows, columns = rules.first.shape
    if rules.tied or rules.first.role != "word_embedding" or not widths:
        return
    if use is not None:
        weight = rules.first.matrix.detach().float()
        ranges = {n: rules.settings[n] for n in ("range_method", "percentile") if n in rules.settings}
        for scheme in schemes:
            for split in row_splits(weight, use, widths, scheme, _MEAN_BITS, **ranges):
                yield {**split, "scheme": scheme}
    ranks = {max(1, round(columns * share / 8) * 8) for share in _RANKS}
    for rank, bits in itertools.product(sorted(ranks), [b for b in widths if b > 2]):
        if rank <= largest_rank(rows, columns):
            yield {"bits": bits, "rank": rank, "scheme": "asymmetric"}


def row_splits(
    weight: Tensor, use: TableUse, widths: Sequence[int], scheme: str, means: Iterable[float], **settings: Any
) -> Iterator[dict[str, Any]]:
    """How many rows of a table [V, D] get which bits, for several mean numbers of bits: ``bits`` and ``row_bits``.

    Of all ways with that mean the one of the least squared error of the rows that are expected to be read.

    Args:
        use: what the table is used for.
        widths: to choose from.
        scheme, **settings: of `TensorSpec`.
        means: bits a row; those that `widths` cannot make, or that come to the same numbers, are left out.
    """
    widths = sorted(widths)
    share = use.share.to(weight.device)
    specs = [TensorSpec(bits=b, scheme=scheme, **settings) for b in widths]  # type: ignore[arg-type]
    harm = torch.stack([share * row_errors(weight, spec).double() for spec in specs])  # [B, V]
    cost = torch.tensor(widths, dtype=torch.float64, device=weight.device)
    seen: set[tuple[int, ...]] = set()
    for mean in (m for m in means if widths[0] < m < widths[-1]):
        low, high = -100.0, 40.0  # log2 of the price of a bit
        for _ in range(60):
            price = (low + high) / 2
            picked = (harm + 2.0**price * cost.unsqueeze(1)).argmin(0)
            low, high = (price, high) if float(cost[picked].mean()) > mean else (low, price)
        counts = torch.bincount(picked, minlength=len(widths)).tolist()
        used = [(b, n) for b, n in zip(widths, counts, strict=True) if n]
        if len(used) > 1 and tuple(counts) not in seen:
            seen.add(tuple(counts))
            yield {"bits": used[0][0], "row_bits": tuple(sorted(used[1:], reverse=True))}
