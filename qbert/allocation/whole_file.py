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
matrix, the error of the row that is looked up of a table), g the gradient of the outputs. Options that were scored by
what they were fitted to would look 2 to 5 times better than they are.

References: Yao et al. 2021, HAWQ-V3, section 3.4 (the formulation); Martens 2020, sections 5 and 6 (the damage).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qbert.allocation.blocks import Fixed, check_widths, fixed_value
from qbert.allocation.budgets import check_bounds, rounded_up
from qbert.allocation.knapsack import choose
from qbert.bits import DEFAULT_GROUPS, FLOAT_BITS, BitsConfig, TensorSpec, largest_rank
from qbert.calibration import Batch, by_length, check_batches, input_moments
from qbert.encoders.targets import HEAD_ROLE, Target, base_models, find_targets, targets_found_once
from qbert.encoders.weights import is_table, stored
from qbert.layers.quantizer import WeightQuantizer
from qbert.layers.tables import Directions, TableUse, part_specs, rounded_rows, row_errors, row_widths
from qbert.outputs import Call, output_gradients
from qbert.quantizers.groups import group_layout, row_groups
from qbert.sizes import FILE_FRAME_BYTES, header_bytes, model_size, quantized_header_bytes, tensor_bytes
from qbert.usage import UseCounter

_GRADIENT_SHARE = 0.9  # as quantize_model weighs the inputs of compensated rounding
_RANKS = (0.25, 0.375, 0.5, 0.625, 0.75)  # of the length of a row
_MEAN_BITS = (2.05, 2.1, 2.2, 2.35, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0, 5.0)
_SAMPLES = 8  # whose gradients of a whole matrix are held at once
_LARGE_HEAD = 2**14  # values of a head that is worth a choice of its own
FILE_DEFAULTS: dict[str, Any] = {"rounding": "compensated", "activation_range": "asymmetric"}
_SCHEMES = ("asymmetric", "midrise")  # that tables choose from


@dataclass(frozen=True)
class Option:
    """One way to store a weight.

    Attributes:
        rule: what a `BitsConfig` says of it: fields of `TensorSpec`.
        size: bytes in the file, its share of the header included.
        damage: predicted, in units of the outputs' metric (for classes: nats).
        parts: where something else stands in the place of a matrix, the rules of its parts; None for the weight itself.
        form: what stands there (`Alternative.form`); empty for the weight itself.
    """

    rule: Mapping[str, Any]
    size: int
    damage: float
    parts: Mapping[str, Mapping[str, Any]] | None = None
    form: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Alternative:
    """One way to store a matrix in the place of which something else stands, such as two factors or other values.

    Attributes:
        rules: name of each part -> what a `BitsConfig` says of it.
        change: [O, I], what is computed with minus the matrix.
        size: bytes in the file, its share of the header included.
        form: what stands there, in words of whoever puts it there: ``{"rank": 96}``.
    """

    rules: Mapping[str, Mapping[str, Any]]
    change: Tensor
    size: int
    form: Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """A weight with its options.

    Attributes:
        names: of the targets that share it.
        options: at least one.
    """

    names: tuple[str, ...]
    options: tuple[Option, ...]


class FilePlan:
    """What every way to store every matrix and table costs and does; `config` chooses for a size.

    For MiniLM-L6 and 400 sentences it takes about a minute on one CPU core, most of it compensated rounding at every
    number of bits. What the data never reach (the pooler of a model whose tokens are averaged) gets the fewest bits.

    Args:
        model: the float model; it is left as it was.
        batches: dicts of tensors without labels, of at least two rows: some hundred sentences like those to come.
        bits: the widths to choose from, out of 2, 3, 4, 8 and 16 or 32 (float).
        fixed: pattern -> bits, or a mapping of `TensorSpec` fields, for what is not to be decided.
        further: name of a matrix -> what may stand in its place; whoever makes the model has to put it there
            (`forms`).
        progress: show bars.
        **settings: defaults of the `BitsConfig` (``groups``, ``scheme``, ``rounding``, ...); compensated rounding where
            they do not say.

    Attributes:
        items: every weight that has options.
        constant: bytes of everything else in the file.

    Raises:
        ValueError: data that cannot be used, an impossible width or setting, a model that is quantized already.
        TypeError: a model or data of another type.
    """

    @targets_found_once()
    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        bits: Sequence[int] = (2, 3, 4, 8),
        *,
        fixed: Fixed | None = None,
        further: Mapping[str, Sequence[Alternative]] | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> None:
        self.widths = check_widths(bits)
        self.settings = {**FILE_DEFAULTS, **settings}
        checked = check_batches(batches)
        if checked is None:
            raise ValueError("calibration_data: a file is planned for data; pass batches of some hundred rows")
        fit, score = (by_length(model, part) for part in fitted_and_scored(checked))
        groups = _sharing(model)
        rules = [_Rules(model, group, self.widths, self.settings, fixed) for group in groups]
        free = [r for r in rules if r.matrix_rules or r.is_table]
        _refuse_what_is_not_measured(model, free)
        tables = [r.first.module for r in free if r.is_table]
        uses = UseCounter(tables)
        for _, calls in output_gradients(model, fit, tables, progress=progress):
            uses.add(calls)
        changes = _matrix_changes(model, fit, [r for r in free if not r.is_table], progress)
        for rule in free:
            if rule.first.module in changes and rule.fixed is None and len(rule.names) == 1:
                rule.further = tuple((further or {}).get(rule.names[0], ()))
                changes[rule.first.module] += [a.change.to(torch.bfloat16) for a in rule.further]
        counted, known = _Damages(free, changes), set(model.modules())
        for samples, calls in output_gradients(
            model, score, [m for r in free for m in r.modules if m in known], seed=1, progress=progress
        ):
            counted.add(samples, calls)
        self.items = [Item(r.names, tuple(counted.options(r, uses))) for r in free]
        reference = self.configuration([0] * len(self.items))
        self.constant = whole_file_bytes(model, reference) - sum(item.options[0].size for item in self.items)
        self.model = model

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
            raise ValueError(
                f"size_mb={size_mb:g} is too small with bits={self.widths!r}: {self.constant / 1e6:.4f} MB is not "
                f"chosen here (biases, norms, heads), and the smallest file has {rounded_up(self.smallest_mb)} MB"
            )
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


class _Rules:
    """The ways to store one weight, before they are measured.

    Attributes:
        first: the target that is asked about the weight.
        names, modules: of all targets that share it.
        fixed: its only rule, if it has one.
        tied: whether it is a table that a head computes with.
        matrix_rules: rules of a matrix; empty for a table, and for what stays as it is.
        further: what may stand in the place of a matrix.
        is_table: whether the weight is a table with options.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        widths: Sequence[int],
        settings: Mapping[str, Any],
        fixed: Fixed | None,
    ) -> None:
        self.first = targets[0]
        table = next((t for t in targets if t.is_embedding), None)
        self.is_table = table is not None
        if table is not None:
            self.first = table
            targets = [table]  # a head that is tied to it follows
        self.names = tuple(t.name for t in targets)
        self.modules = [t.module for t in targets]
        self.widths, self.settings, self.model = widths, settings, model
        self.fixed = _fixed_rule(self.first, fixed)
        self.tied = self.is_table and sum(t.weight is self.first.weight for t in find_targets(model)) > 1
        self.matrix_rules: list[dict[str, Any]] = []
        self.further: tuple[Alternative, ...] = ()
        if not self.is_table:
            chosen = [{"bits": b} for b in widths] if self.fixed is None else [self.fixed]
            head = self.first.role == HEAD_ROLE
            chosen_too = not is_table(self.first.module) and _is_worth_a_choice(model, self.first)
            if not head or self.fixed is not None or chosen_too:
                self.matrix_rules = chosen
            if head and self.matrix_rules and self.fixed is None:
                self.matrix_rules = [*chosen, {"bits": 32}]

    def spec(self, rule: Mapping[str, Any]) -> TensorSpec | None:
        """The specification under a rule; None for float."""
        if rule["bits"] in FLOAT_BITS:
            return None
        config = BitsConfig({name: dict(rule) for name in self.names}, embedding_bits=32, **self.settings)
        return config.resolve(self.model)[self.first.path]

    def size(self, spec: TensorSpec | None) -> int:
        """Bytes in the file."""
        target = self.first
        if spec is None:
            weight = target.weight
            return weight.numel() * weight.element_size() + header_bytes(f"{target.path}.weight", weight.shape)
        static = 8 if spec.activation_range == "static" and not self.is_table else 0
        return sum(tensor_bytes(target, spec)) + static + quantized_header_bytes(target, spec)


def _refuse_what_is_not_measured(model: nn.Module, rules: Sequence[_Rules]) -> None:
    """Raises ValueError for a model that is quantized, or has nothing to choose, or weights that no module computes
    with alone (gates of an LSTM) whose bits are not fixed."""
    done = next((path for path, m in model.named_modules() if hasattr(m, "quantized_weight")), None)
    if done is not None or not rules:
        raise ValueError(
            f"model: {done} is quantized already; give the float model"
            if done is not None
            else f"model: {type(model).__name__} has no matrix or table that could be quantized; pass an encoder"
        )
    modules = set(model.modules())
    for rule in rules:
        if rule.fixed is None and rule.first.module not in modules:
            raise ValueError(
                f"fixed: what {rule.first.name} does to the outputs is not measured, because it is part of a recurrent "
                f"layer; give its bits, such as fixed={{{rule.first.name!r}: 4}}"
            )


def _is_worth_a_choice(model: nn.Module, target: Target) -> bool:
    """Whether a matrix outside of the layers is large, or part of an encoder as a pooler is."""
    inside = any(not prefix or target.path.startswith(prefix + ".") for prefix, _ in base_models(model))
    has_prefix = any(prefix for prefix, _ in base_models(model))
    return target.weight.numel() >= _LARGE_HEAD or (inside and has_prefix)


def _fixed_rule(target: Target, fixed: Fixed | None) -> dict[str, Any] | None:
    value = fixed_value(target.name, fixed) if fixed else None
    if value is None and target.is_embedding and fixed and "embeddings" in fixed:
        value = fixed["embeddings"]
    if value is None:
        return None
    return dict(value) if isinstance(value, Mapping) else {"bits": value}


def _sharing(model: nn.Module) -> list[list[Target]]:
    """The targets of `model`, those with one weight together."""
    together: dict[int, list[Target]] = {}
    for target in find_targets(model):
        together.setdefault(id(target.weight), []).append(target)
    return list(together.values())


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


@torch.no_grad()
def _matrix_changes(
    model: nn.Module, batches: Sequence[Batch], rules: Sequence[_Rules], progress: bool
) -> dict[nn.Module, list[Tensor | None]]:
    """First module of every matrix -> dW [O, I] of each of its rules, bfloat16; None where it stays as it is."""
    found: dict[nn.Module, list[Tensor | None]] = {}
    known = set(model.modules())
    linear: dict[nn.Module, _Rules] = {m: r for r in rules for m in r.modules if type(m) is nn.Linear and m in known}
    pending = {r.first.module: r for r in rules}
    if linear and any(
        s is not None and s.rounding == "compensated" for r in rules for s in map(r.spec, r.matrix_rules)
    ):
        for modules, moment in input_moments(model, batches, list(linear), weigh=_GRADIENT_SHARE, progress=progress):
            rule = linear[modules[0]]
            pending.pop(rule.first.module)
            found[rule.first.module] = _changes(rule, moment.value if moment.inputs else None)
    return found | {module: _changes(rule, None) for module, rule in pending.items()}


def _changes(rules: _Rules, moment: Tensor | None) -> list[Tensor | None]:
    weight = rules.first.matrix.detach()
    changes: list[Tensor | None] = []
    for spec in map(rules.spec, rules.matrix_rules):
        if spec is None:
            changes.append(None)
            continue
        rounded = rounded_matrix(rules.first, spec, moment)
        changes.append(stored(rules.first.module, rounded - weight).to(torch.bfloat16))
    return changes


@torch.no_grad()
def rounded_matrix(target: Target, spec: TensorSpec, moment: Tensor | None = None) -> Tensor:
    """A weight [O, I] on the grids of a specification; compensated, if it says so, for a second moment [I, I]."""
    weight = target.matrix.detach()
    quantizer = WeightQuantizer(*group_layout(target, spec), spec).to(weight.device)
    if moment is not None and spec.rounding == "compensated":
        return quantizer.compensate(weight, moment.to(weight.device))
    quantizer.find(weight)
    return quantizer(weight)  # type: ignore[no-any-return]


class _Damages:
    """Adds up the damage of the options of matrices, and keeps what those of tables need."""

    def __init__(self, rules: Sequence[_Rules], changes: Mapping[nn.Module, list[Tensor | None]]) -> None:
        self.rule_of = {m: r for r in rules for m in r.modules}
        self.changes = changes
        self.sums = {m: [0.0] * len(c) for m, c in changes.items()}
        self.table_calls: dict[nn.Module, list[Call]] = {r.first.module: [] for r in rules if r.is_table}
        self.samples = 0

    @torch.no_grad()
    def add(self, samples: int, calls: Sequence[Call]) -> None:
        """Count one batch."""
        self.samples += samples
        linear: dict[nn.Module, list[Call]] = {}
        for call in calls:
            if call.module in self.table_calls:
                self.table_calls[call.module].append(call)
            else:
                linear.setdefault(self.rule_of[call.module].first.module, []).append(call)
        for module, own in linear.items():
            made = [(i, change) for i, change in enumerate(self.changes[module]) if change is not None]
            if not made:
                continue
            slopes = _slopes(module, own, [change for _, change in made])
            if len({len(s) for s in slopes}) == 1:  # calls for the same samples, whose changes add up
                slopes = [torch.stack(slopes).sum(0)]
            for s in slopes:
                for (index, _), total in zip(made, s.square().sum(0).tolist(), strict=True):
                    self.sums[module][index] += total

    @torch.no_grad()
    def options(self, rules: _Rules, uses: UseCounter) -> Iterator[Option]:
        """The measured options of a weight."""
        scale = 0.5 / max(self.samples, 1)
        if rules.is_table:
            use = uses.use(rules.first.module)
            calls = self.table_calls[rules.first.module]
            for rule, spec, harm in _table_options(rules, use, calls):
                yield Option(rule, rules.size(spec), scale * harm)
            return
        harms = iter(self.sums[rules.first.module])
        for rule in rules.matrix_rules:
            yield Option(rule, rules.size(rules.spec(rule)), scale * next(harms))
        for other in rules.further:
            bits = next(iter(other.rules.values()))["bits"]
            yield Option({"bits": bits, **other.form}, other.size, scale * next(harms), other.rules, other.form)


def _slopes(module: nn.Module, calls: Sequence[Call], changes: Sequence[Tensor]) -> list[Tensor]:
    """Change of z^T y of every sample of each call, [B, changes], when the weight of a matrix changes.

    A sample's is the inner product of a change with its own gradient sum_t g_t x_t^T, made once for all changes.
    """
    if isinstance(module, nn.Conv1d):
        moved = [[module._conv_forward(call.input.float(), c.float(), None) for c in changes] for call in calls]
        return [
            torch.stack([(y * call.gradient.float()).flatten(1).sum(1) for y in of_call], 1)
            for call, of_call in zip(calls, moved, strict=True)
        ]
    outputs_first = isinstance(module, nn.Linear)
    flat = torch.stack([c.flatten() for c in changes], 1).float()  # [O I, changes]
    found = []
    for call in calls:
        x, gradient = (
            v.float().flatten(1, -2) if v.dim() > 2 else v.float().unsqueeze(1) for v in (call.input, call.gradient)
        )
        left, right = (gradient, x) if outputs_first else (x, gradient)
        found.append(
            torch.cat(
                [
                    torch.bmm(a.transpose(1, 2), b).flatten(1) @ flat
                    for a, b in zip(left.split(_SAMPLES), right.split(_SAMPLES), strict=True)
                ]
            )
        )
    return found


def _table_options(
    rules: _Rules, use: TableUse, calls: Sequence[Call]
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
    for rule in _table_rules(rules, weight, use):
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


def _table_rules(rules: _Rules, weight: Tensor, use: TableUse) -> Iterator[dict[str, Any]]:
    """The ways to store a table."""
    if rules.fixed is not None:
        yield rules.fixed
        return
    widths = [b for b in rules.widths if b not in FLOAT_BITS]
    schemes = _SCHEMES if "scheme" not in rules.settings else (rules.settings["scheme"],)
    for bits, scheme in itertools.product(widths, schemes):
        yield {"bits": bits, "scheme": scheme}
    yield from ({"bits": b} for b in rules.widths if b in FLOAT_BITS)
    rows, columns = rules.first.shape
    if rules.tied or rules.first.role != "word_embedding":
        return
    for scheme in schemes:
        ranges = {n: rules.settings[n] for n in ("range_method", "percentile") if n in rules.settings}
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
