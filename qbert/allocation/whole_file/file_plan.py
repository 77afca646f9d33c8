r"""One exact choice for a whole file: the bits of every matrix and the form of every table, from unlabelled batches.

    >>> plan = FilePlan(model, batches)
    >>> plan.config(size_mb=6.0)

Every matrix and table has a list of options with their bytes in the file and the damage that they do to the model's
outputs (`qbert.outputs`); the sum of the damages is minimised exactly under the bytes (`qbert.allocation.knapsack`).
The options of a word table are numbers of bits, splits of its rows by how much they matter, and ranks times bits.

What is fitted to data (compensated codes, the order of rows, the subspace of a rank) is fitted to every other batch,
and its damage

.. math:: \tfrac{1}{2N} \sum_{n=1}^{N} \Bigl( \sum_t g_{nt}^T\, d_{nt} \Bigr)^2

is measured on the others: d is what an option changes in what a module returns for token t of sample n (dW x_t of a
matrix, and db where compensated rounding moves its bias; the error of the row that is looked up of a table), g the
gradient of the outputs. Options that were scored by what they were fitted to would look 2 to 5 times better than they
are.

References: Yao et al. 2021, HAWQ-V3, section 3.4 (the formulation); Martens 2020, sections 5 and 6 (the damage).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from qbert.allocation.blocks import Fixed, check_widths
from qbert.allocation.budgets import check_bounds, rounded_up
from qbert.allocation.knapsack import choose
from qbert.allocation.whole_file.damages import Damages
from qbert.allocation.whole_file.matrices import matrix_changes
from qbert.allocation.whole_file.options import (
    FILE_DEFAULTS,
    Alternative,
    Change,
    Item,
    Option,
    Rules,
    refuse_what_is_not_measured,
    sharing,
)
from qbert.allocation.whole_file.tables import table_rules
from qbert.bits import BitsConfig
from qbert.calibration import Batch, by_length, check_batches
from qbert.encoders.targets import find_targets, targets_found_once
from qbert.outputs import output_gradients
from qbert.sizes import FILE_FRAME_BYTES, header_bytes, model_size, quantized_header_bytes
from qbert.usage import UseCounter


class FilePlan:
    """What every way to store every matrix and table costs and does; `config` chooses for a size.

    For MiniLM-L6 and 400 sentences it takes about a minute on one CPU core, most of it compensated rounding at every
    number of bits. What the data never reach (the pooler of a model whose tokens are averaged) gets the fewest bits.

    Args:
        model: the float model; it is left as it was.
        batches: dicts of tensors without labels, of at least two rows: some hundred sentences like those to come.
        bits: the widths to choose from, out of 2, 3, 4, 8 and 16 or 32 (float).
        fixed: pattern -> bits, or a mapping of `TensorSpec` fields, for what is not to be decided; as in `BitsConfig`,
            ``*`` is every matrix but heads.
        size_mb: what a file of it has to keep, 10^6 bytes; refused before anything is measured where none can.
        further: name of a matrix -> what may stand in its place; whoever makes the model has to put it there
            (`forms`).
        progress: show bars.
        **settings: defaults of the `BitsConfig` (``groups``, ``scheme``, ``rounding``, ...); compensated rounding where
            they do not say.

    Attributes:
        items: every weight that has options.
        constant: bytes of everything else in the file.

    Raises:
        ValueError: data that cannot be used, an impossible width or setting, a pattern that fits no weight, a model
            that is quantized already, a size that no file keeps (the sentence names the smallest).
        TypeError: a model, data or `fixed` of another type.
    """

    @targets_found_once()
    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        bits: Sequence[int] = (2, 3, 4, 8),
        *,
        fixed: Fixed | None = None,
        size_mb: float | None = None,
        further: Mapping[str, Sequence[Alternative]] | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> None:
        self.widths = check_widths(bits)
        self.settings = {**FILE_DEFAULTS, **settings}
        checked = check_batches(batches)
        if checked is None:
            raise ValueError("calibration_data: a file is planned for data; pass batches of some hundred rows")
        if not (fixed is None or isinstance(fixed, Mapping)):
            raise TypeError(f"fixed: expected a mapping from name patterns to bits, got {type(fixed).__name__}")
        if fixed:
            BitsConfig(fixed).check_patterns(model)
        fit, score = fitted_and_scored(checked)
        free = _free_rules(model, self.widths, self.settings, fixed)
        for rule in free:
            if not rule.is_table and rule.fixed is None and len(rule.names) == 1:
                rule.further = tuple((further or {}).get(rule.names[0], ()))
        others = [[a.size for a in rule.further] for rule in free]
        self.constant, smallest = _constant_and_smallest(model, free, self.settings, others)
        if size_mb is not None and smallest > math.floor(size_mb * 1e6):
            raise ValueError(self._too_small(size_mb, smallest / 1e6))
        fit, score = (by_length(model, part) for part in (fit, score))
        tables = [r.first.module for r in free if r.is_table]
        uses = UseCounter(tables)
        if tables:
            for _, calls in output_gradients(model, fit, tables, progress=progress):
                uses.add(calls)
        changes = matrix_changes(model, fit, [r for r in free if not r.is_table], progress)
        for rule in free:
            if rule.further:
                changes[rule.first.module] += [Change(a.change.to(torch.bfloat16), a.bias) for a in rule.further]
        counted, known = Damages(free, changes), set(model.modules())
        for samples, calls in output_gradients(
            model, score, [m for r in free for m in r.modules if m in known], seed=1, progress=progress
        ):
            counted.add(samples, calls)
        self.items = [Item(r.names, tuple(counted.options(r, uses))) for r in free]

    def _too_small(self, size_mb: float, smallest: float) -> str:
        return (
            f"size_mb={size_mb:g} is too small with bits={self.widths!r}: {self.constant / 1e6:.4f} MB is not "
            f"chosen here (biases, norms, heads), and the smallest file has {rounded_up(smallest)} MB"
        )

    @property
    def smallest_mb(self) -> float:
        """The size of the smallest file, in MB of 10^6 bytes."""
        return (self.constant + sum(min(o.size for o in item.options) for item in self.items)) / 1e6

    def choose(self, size_mb: float, *, further: bool = True) -> list[int]:
        """Index of the chosen option of every item: the least total damage in a file of at most `size_mb` MB.

        Args:
            size_mb: MB of 10^6 bytes.
            further: whether something else may stand in the place of a matrix.

        Raises:
            ValueError: if there is no such file; the sentence names the smallest.
        """
        (bound,) = check_bounds(size_mb=size_mb).values()
        assert bound is not None
        free = [[i for i, o in enumerate(item.options) if further or o.parts is None] for item in self.items]
        damage = [[item.options[i].damage for i in kept] for item, kept in zip(self.items, free, strict=True)]
        sizes = [[float(item.options[i].size) for i in kept] for item, kept in zip(self.items, free, strict=True)]
        picked = choose(damage, [sizes], [math.floor(bound * 1e6) - self.constant])
        if picked is None:
            raise ValueError(self._too_small(size_mb, self.smallest_mb))
        return [kept[p] for kept, p in zip(free, picked, strict=True)]

    def config(self, size_mb: float) -> BitsConfig:
        """The configuration of the least predicted damage whose packed file has at most `size_mb` MB of 10^6 bytes.

        Raises:
            ValueError: as `choose`.
        """
        return self.configuration(self.choose(size_mb))

    def damage(self, picked: Sequence[int]) -> float:
        """Predicted damage of a choice."""
        return math.fsum(item.options[p].damage for item, p in zip(self.items, picked, strict=True))

    def size(self, picked: Sequence[int]) -> int:
        """Bytes of the file of a choice, at most."""
        return self.constant + sum(item.options[p].size for item, p in zip(self.items, picked, strict=True))

    def configuration(self, picked: Sequence[int]) -> BitsConfig:
        """The `BitsConfig` of a choice, an index for every item; of the model changed as `forms` says."""
        rules: dict[str, dict[str, Any]] = {}
        for item, p in zip(self.items, picked, strict=True):
            option = item.options[p]
            named = dict.fromkeys(item.names, option.rule) if option.parts is None else option.parts
            rules |= {name: dict(rule) for name, rule in named.items()}
        return BitsConfig(rules, embedding_bits=8, **self.settings)

    def forms(self, picked: Sequence[int]) -> dict[str, dict[str, Any]]:
        """Name -> form of the matrices in whose place a choice puts something else (`Alternative.form`)."""
        pairs = [(item.names[0], item.options[p]) for item, p in zip(self.items, picked, strict=True)]
        return {name: dict(option.form) for name, option in pairs if option.parts is not None}

    def to_dict(self) -> dict[str, Any]:
        """What was measured, as JSON values, for `from_dict`."""
        names = [f.name for f in fields(Option)]
        items = [
            {"names": list(item.names), "options": [{name: getattr(o, name) for name in names} for o in item.options]}
            for item in self.items
        ]
        return {"constant": self.constant, "items": items}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], bits: Sequence[int], settings: Mapping[str, Any]) -> FilePlan:
        """The plan that `to_dict` described, made with the same bits and settings, with nothing measured again."""
        plan = cls.__new__(cls)
        plan.widths, plan.settings = check_widths(bits), {**FILE_DEFAULTS, **settings}
        plan.constant = values["constant"]
        plan.items = [
            Item(tuple(item["names"]), tuple(Option(**_as_measured(option)) for option in item["options"]))
            for item in values["items"]
        ]
        return plan


def _as_measured(option: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an `Option` out of JSON, which knows no tuples."""

    def tuples(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: tuples(inner) for name, inner in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return {**tuples(option), "damage": float(option["damage"])}


@targets_found_once()
def smallest_file_mb(
    model: nn.Module,
    bits: Sequence[int] = (2, 3, 4, 8),
    *,
    further: Mapping[str, Sequence[int]] | None = None,
    **settings: Any,
) -> float:
    """`FilePlan.smallest_mb`, which shapes tell before anything is measured.

    Args:
        model, bits, **settings: as for `FilePlan`.
        further: name of a matrix -> bytes of what may stand in its place.
    """
    settings = {**FILE_DEFAULTS, **settings}
    free = _free_rules(model, check_widths(bits), settings, None)
    others = [(further or {}).get(r.names[0], ()) if not r.is_table and len(r.names) == 1 else () for r in free]
    return _constant_and_smallest(model, free, settings, others)[1] / 1e6


def _free_rules(
    model: nn.Module, widths: Sequence[int], settings: Mapping[str, Any], fixed: Fixed | None
) -> list[Rules]:
    rules = [Rules(model, group, widths, settings, fixed) for group in sharing(model)]
    free = [r for r in rules if r.matrix_rules or r.is_table]
    refuse_what_is_not_measured(model, free)
    return free


def _constant_and_smallest(
    model: nn.Module, free: Sequence[Rules], settings: Mapping[str, Any], others: Sequence[Sequence[int]]
) -> tuple[int, int]:
    """(bytes that are not chosen, bytes of the smallest file); `others`: of what may stand in each one's place."""
    rules = [list(table_rules(r)) if r.is_table else r.matrix_rules for r in free]
    sizes = [[r.size(r.spec(rule)) for rule in own] for r, own in zip(free, rules, strict=True)]
    config = {name: dict(own[0]) for r, own in zip(free, rules, strict=True) for name in r.names}
    reference = BitsConfig(config, embedding_bits=8, **settings)
    constant = whole_file_bytes(model, reference) - sum(own[0] for own in sizes)
    return constant, constant + sum(min([*own, *more]) for own, more in zip(sizes, others, strict=True))


def whole_file_bytes(model: nn.Module, config: BitsConfig) -> int:
    """Bytes of the safetensors file of `model` packed under a configuration; up to 20 a tensor too many."""
    specs = config.resolve(model)
    targets = {t.path: t for t in find_targets(model)}
    quantized = {id(targets[path].weight): path for path in reversed(list(specs))}
    header, seen = FILE_FRAME_BYTES, set()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        path = quantized.get(id(tensor))
        header += (
            header_bytes(name, tensor.shape) if path is None else quantized_header_bytes(targets[path], specs[path])
        )
    return model_size(model, config).total + header


def fitted_and_scored(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """What options are fitted to, and what they are scored on: every other batch, and the others; of one, its rows.

    Raises:
        ValueError: if there is a single row.
    """
    if len(batches) > 1:
        return list(batches[::2]), list(batches[1::2])
    rows = max(len(v) for v in batches[0].values() if isinstance(v, Tensor) and v.dim())
    if rows < 2:
        raise ValueError("calibration_data has one row; pass some hundred, half of which score what the others fit")
    parts = [
        {k: v[i::2] if isinstance(v, Tensor) and v.dim() and len(v) == rows else v for k, v in batches[0].items()}
        for i in (0, 1)
    ]
    return [parts[0]], [parts[1]]
