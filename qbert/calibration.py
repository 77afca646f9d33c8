r"""Calibration: what is read off a few batches of data, without labels.

Static activation ranges (`calibrate_activations`), and the second moments :math:`C = E[x x^T]` of the inputs of every
matrix (`input_moments`) that compensated rounding needs. Batches are run through the model in evaluation mode without
gradients, padding is left out, and modes and hooks are restored afterwards.

    >>> for modules, moment in input_moments(model, batches, modules):
    ...     round_them(modules, moment.value)

Source of the order of `input_moments`: Frantar et al. 2023, GPTQ, section 4 (layer by layer, on the inputs that the
partly quantized model gives).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbert.encoders.inputs import most_positions, to_device, unmasked
from qbert.encoders.modes import evaluation_mode
from qbert.encoders.prefix import LayerCache
from qbert.encoders.targets import encoder_layers
from qbert.encoders.weights import weight_matrix
from qbert.layers.kind import TrainableLayer, kind_of
from qbert.layers.recurrent import StepMasks
from qbert.progress import progress_bar
from qbert.quantizers.activations import ActivationObserver

Batch = Mapping[str, Tensor]
Run = Callable[[int], Any]  # number of a batch -> the model's output for it
_GRAM_BLOCK = 256
_LAST_OUTPUTS = 8  # of a forward pass, among which the logits are looked for


def check_batches(data: Any) -> list[Batch] | None:
    """`data` as a list of batches (a single batch is accepted), or ``None`` if it is None.

    Raises:
        TypeError: if it is not an iterable of mappings; ValueError if it is empty.
    """
    if data is None:
        return None
    if isinstance(data, Mapping):
        data = [data] if data else []
    if not isinstance(data, Iterable):
        raise TypeError(f"calibration_data: expected batches (dicts of tensors), got {type(data).__name__}")
    batches = list(data)
    if not batches:
        raise ValueError("calibration_data is empty; pass at least one batch")
    for batch in batches:
        if not isinstance(batch, Mapping) or not any(isinstance(value, Tensor) for value in batch.values()):
            raise TypeError(
                "calibration_data: every batch must be a dict of tensors, such as a tokenizer returns with "
                f"return_tensors='pt'; got a {type(batch).__name__}"
                + (f" of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else "")
            )
    return batches


@torch.no_grad()
def calibrate_activations(model: nn.Module, batches: list[Batch]) -> None:
    """Fix the static activation ranges of `model` in two passes over `batches` (extent, then histogram).

    Raises:
        ValueError: if the input of a layer is not finite, or none is seen: the layer is never called, or every token is
            masked; or if batches are longer than the model can read.
    """
    names = {
        m: name
        for name, m in model.named_modules()
        if isinstance(m, TrainableLayer) and m.activation_quantizer and m.activation_quantizer.mode == "static"
    }
    layers = list(names)
    if not layers:
        return
    check_readable(model, batches)
    observers = {layer: ActivationObserver() for layer in layers}
    quantizers = [layer.activation_quantizer for layer in layers if layer.activation_quantizer is not None]
    for quantizer in quantizers:
        quantizer.enabled = False
    try:
        _observe(model, batches, layers, lambda layer, x: observers[layer].see_extent(x))
        for layer, observer in observers.items():
            if not observer.is_finite:
                raise ValueError(
                    f"calibration_data: the input of {names[layer]} runs from {observer.low} to {observer.high}; pass "
                    "batches on which the layer sees unmasked tokens and the float model computes no NaN or infinity"
                )
        _observe(model, batches, layers, lambda layer, x: observers[layer].see_values(x))
    finally:
        for quantizer in quantizers:
            quantizer.enabled = True
    for layer, quantizer in zip(layers, quantizers, strict=True):
        quantizer.set_range(*observers[layer].best_range(quantizer.bits))


def _observe(model: nn.Module, batches: list[Batch], layers: Iterable[Any], see: Callable[[Any, Tensor], None]) -> None:
    """Run `batches` through the model; `see(layer, x)` gets what each layer quantizes, padding left out."""
    masks = StepMasks(model)

    def watch(layer: Any) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda quantizer, args: see(layer, _padding_left_out(layer, masks, args[0])(args[0]))

    handles = [layer.activation_quantizer.register_forward_pre_hook(watch(layer)) for layer in layers]
    try:
        with evaluation_mode(model):
            for batch in batches:
                inputs = to_device(batch, model)
                masks.mask = inputs.get("attention_mask")
                run_batch(model, inputs)
    finally:
        masks.close()
        for handle in handles:
            handle.remove()


def _padding_left_out(module: nn.Module, masks: StepMasks, rows: Tensor) -> Callable[[Tensor], Tensor]:
    """What leaves the padding out of the rows that a matrix reads in one call, and out of others of their shape."""
    if module in masks:
        steps = masks.of(module, rows)
        return lambda x: x if steps is None else x[steps]
    kind, mask = kind_of(module), masks.mask
    if mask is not None and mask.dim() > 1 and kind is not None:
        mask = kind.mask(module, mask.to(rows.device))
    return lambda x: unmasked(x, mask)


def run_batch(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """Call `model` on a dict batch: by keyword, or as one mapping where that is the model's own convention."""
    if type(model).__name__ == "SentenceTransformer":
        return model(dict(inputs))
    return model(**inputs)


@dataclass(frozen=True)
class Moment:
    """The second moment of a matrix's inputs.

    Attributes:
        value: [I, I] float64, C = E[w x x^T] over the inputs that are no padding, the weights w of mean 1; [g, I, I]
            where each of g runs of rows has inputs of its own (convolutions of several channel groups).
        inputs: how many those were.
        mean: [I] or [g, I] float64, E[w x].
        covariance: as `value`, of w x about its mean: the moment in which the error of a matrix counts whose bias is
            free to move. Summed about a point near the mean, since inputs may vary by far less than they are long.
        depth: number of the encoder layer; the moments of one layer are collected before any of its matrices changes.
    """

    value: Tensor
    inputs: int
    mean: Tensor
    covariance: Tensor
    depth: int = 0


class _SeenError(Exception):
    """All that a pass was made for has been seen."""


def input_moments(
    model: nn.Module,
    batches: Sequence[Batch],
    modules: Sequence[nn.Module],
    *,
    weigh: float = 0.0,
    reference: nn.Module | None = None,
    at_end: Callable[[Run], None] | None = None,
    progress: bool = False,
) -> Iterator[tuple[list[nn.Module], Moment]]:
    """Matrix after matrix, in the order in which the model calls them, the second moment of its inputs.

    What the caller does to a matrix (in place, or by another module under the same name) takes effect before the
    moments of the next encoder layer are collected; those of one layer are in memory at a time. Matrices that read one
    and the same tensor share a moment.

    Args:
        model: left in the modes and with the hooks that it had.
        batches: at least one.
        modules: float modules of `model` with a matrix, of any kind in `qbert.layers`, each once. Those that are tied
            to one weight have one moment, over the inputs of all.
        weigh: share, from 0 to 1, by which an input counts as much as the model's outputs depend on what the matrix
            makes of it: w = weigh |g|^2 / mean |g|^2 + (1 - weigh) |x|^-2 / mean |x|^-2, where g is the gradient in the
            matrix's output of the model's outputs (logits, or last hidden states) times random numbers. The second
            part counts all directions of inputs alike, since a few tokens are larger than others by orders of
            magnitude and normalized after the matrix. With 0, w = 1.
        reference: the model through which the gradients are computed, with modules of the same names; where some
            matrices of `model` are rounded already, it is the float model that they came from.
        at_end: called after the last matrix with what puts batch i through the model and gives its output, computing
            only the layers that are not known already.
        progress: show a bar over the matrices.

    Yields:
        (modules with one weight, `Moment`); matrices that the first batch does not reach come last, with no inputs
        and a moment of zeros.

    Raises:
        ValueError: if the input of a matrix holds NaN or infinity, or batches are longer than the model can read.
    """
    check_readable(model, batches)
    names = {module: name for name, module in model.named_modules()}
    bar = progress_bar(total=len(modules), desc="rounding", disable=not progress)
    with _Passes(model, batches, reference) as passes, bar:
        stages, missed = passes.stages(modules)
        if weigh:
            passes.weigh(modules, weigh)
        for _, level in itertools.groupby(stages, lambda stage: passes.depth_of[stage[0][0]]):
            for stage, moment in passes.moments(list(level)):
                if not bool(torch.isfinite(moment.value).all()):
                    raise ValueError(
                        f"calibration_data: the input of {names[stage[0][0]]} holds NaN or infinity; pass batches on "
                        "which the model computes finite numbers"
                    )
                for shared in stage:
                    yield shared, moment
                    bar.update(len(shared))
        for shared in missed:
            width = weight_matrix(shared[0]).shape[1]
            zeros = torch.zeros(width, width, dtype=torch.float64)
            yield shared, Moment(zeros, 0, zeros[0], zeros)
            bar.update(len(shared))
        if at_end is not None:
            at_end(passes.own.replayed)


@torch.no_grad()
def mean_logits(model: nn.Module, batches: Sequence[Batch], run: Run | None = None) -> tuple[str, Tensor] | None:
    """Name of the layer whose output is the model's logits, and their mean over rows that are no padding.

    Args:
        batches: at least one.
        run: what puts batch i through the model, where that is less work than `run_batch`.

    Returns:
        (dotted name, [C] float64), or ``None`` where the logits are no layer's own output or that has no bias.
    """
    made: deque[tuple[Any, nn.Module]] = deque(maxlen=_LAST_OUTPUTS)
    total: Tensor | None = None
    head: nn.Module | None = None
    count = 0
    candidates = [m for m in model.modules() if isinstance(getattr(m, "bias", None), nn.Parameter)]
    handles = [m.register_forward_hook(lambda m, x, y: made.append((y, m))) for m in candidates]
    try:
        with evaluation_mode(model):
            for index, batch in enumerate(batches):
                made.clear()
                inputs = to_device(batch, model)
                output = run_batch(model, inputs) if run is None else run(index)
                logits = model_outputs(output)[0] if gives_logits(output) else None
                head = next((m for y, m in made if y is logits), None)
                if logits is None or head is None or head.bias.shape != logits.shape[-1:]:
                    return None
                rows = unmasked(logits, inputs.get("attention_mask")) if logits.dim() > 2 else logits
                rows = rows.reshape(-1, rows.shape[-1]).double()
                total = rows.sum(0) + (0.0 if total is None else total)
                count += len(rows)
    finally:
        for handle in handles:
            handle.remove()
    if total is None:
        return None
    return next(name for name, module in model.named_modules() if module is head), total / count


def check_readable(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Refuse batches that are longer than the model's positions, empty, or of ids that it has no rows for.

    Raises:
        ValueError: naming both lengths, or the id.
    """
    for batch in batches:
        ids = batch.get("input_ids")
        if isinstance(ids, Tensor) and not ids.numel():
            raise ValueError(f"calibration_data: a batch has input_ids {list(ids.shape)}; leave empty batches out")
    _check_ids(model, batches)
    most = most_positions(model)
    longest = max((b["input_ids"].shape[-1] for b in batches if isinstance(b.get("input_ids"), Tensor)), default=0)
    if most is not None and longest > most:
        raise ValueError(
            f"calibration_data: a batch has {longest} tokens a row, but the model reads at most {most}; tokenize with "
            f"truncation=True, max_length={most}"
        )


def _check_ids(model: nn.Module, batches: Sequence[Batch]) -> None:
    whole = ("word_embeddings", "word_embeddings.table")  # and no part of a composed one
    tables = [m for n, m in model.named_modules() if isinstance(m, nn.Embedding) and n.endswith(whole)]
    rows = max((table.num_embeddings for table in tables), default=0)
    for ids in (b["input_ids"] for b in batches if isinstance(b.get("input_ids"), Tensor)):
        least, most = int(ids.min()), int(ids.max())
        if rows and not 0 <= least <= most < rows:
            raise ValueError(
                f"calibration_data: the id {most if most >= rows else least} is none of the model's {rows}; tokenize "
                "with the model's own tokenizer"
            )


class _Run:
    """A model that is run over batches, from a depth on whose inputs are kept."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.model, self.batches = model, batches
        self.masks = StepMasks(model)
        self._mode = evaluation_mode(model)
        self._checked: set[int] = set()

    def __enter__(self) -> _Run:
        self._mode.__enter__()
        try:
            self.layers = [layer for _, layer in encoder_layers(self.model)]
        except ValueError:
            self.layers = []
        self.cache = LayerCache(self.layers, len(self.batches), self.run)
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)
        self.masks.close()

    @torch.no_grad()
    def run(self, index: int) -> Any:
        """The model's output for batch `index`."""
        inputs = to_device(self.batches[index], self.model)
        self.masks.mask = inputs.get("attention_mask")
        return run_batch(self.model, inputs)

    def replayed(self, index: int) -> Any:
        """The same from the layers on whose inputs are kept."""
        with self.cache.replay(index):
            return self.run(index)

    def advance(self, depth: int, modules: Sequence[nn.Module]) -> None:
        """Keep what the layers below `depth` give, unless `modules` then read something else."""
        self.cache.advance(depth)
        if self.cache.depth and self.cache.depth not in self._checked:
            self._checked.add(self.cache.depth)
            kept = self.inputs(modules, 0)
            depth, self.cache.depth = self.cache.depth, 0
            whole = self.inputs(modules, 0)
            self.cache.depth = depth
            if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for (_, a), (_, b) in zip(kept, whole, strict=True)):
                self.cache.forget()

    def inputs(self, modules: Sequence[nn.Module], index: int, calls: int = 0) -> list[tuple[nn.Module, Tensor]]:
        """(module, what its matrix reads of batch `index` but for padding) of every call.

        Args:
            calls: how many there are, after which the pass ends; 0 where nobody knows.
        """
        seen: list[tuple[nn.Module, Tensor]] = []

        def hook(module: Any, args: tuple[Any, ...]) -> None:
            rows = _rows(module, args[0].detach())
            seen.append((module, _flat(module, _padding_left_out(module, self.masks, rows)(rows))))
            if len(seen) == calls:
                raise _SeenError

        handles = [m.register_forward_pre_hook(hook) for m in modules]
        try:
            with self.cache.replay(index):
                self.run(index)
        except _SeenError:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen


class _Passes:
    """Passes of a model over batches, each of which computes no more than what stands between two depths."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], reference: nn.Module | None) -> None:
        self.model, self.batches = model, batches
        self.depth_of: dict[nn.Module, int] = {}
        self.calls: dict[nn.Module, int] = {}
        self.weights: dict[tuple[nn.Module, int], list[Tensor]] = {}  # (module, batch) -> weights of each call
        self.own = _Run(model, batches)
        self.reference = None if reference is None else _Run(reference, batches)
        self._twin = _twins(model, reference) if reference is not None else {}

    def __enter__(self) -> _Passes:
        self.own.__enter__()
        if self.reference is not None:
            self.reference.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.own.__exit__(*error)
        if self.reference is not None:
            self.reference.__exit__(*error)

    def stages(self, modules: Sequence[nn.Module]) -> tuple[list[list[list[nn.Module]]], list[list[nn.Module]]]:
        """(stages of modules that read one tensor, modules that are never called); modules with one weight together."""
        order: list[tuple[nn.Module, int]] = []
        kept: list[Tensor] = []  # so that no two inputs have the same address

        def hook(module: Any, args: tuple[Any, ...]) -> None:
            kept.append(args[0])
            order.append((module, id(args[0])))

        inside = {m: i for i, layer in enumerate(self.own.layers) for m in layer.modules()}
        handles = [m.register_forward_pre_hook(hook) for m in modules]
        try:
            self.own.run(0)
        finally:
            for handle in handles:
                handle.remove()
        by_weight: dict[int, list[nn.Module]] = {}
        for module in modules:
            by_weight.setdefault(id(module.weight), []).append(module)
        stages: list[list[list[nn.Module]]] = []
        seen: set[int] = set()
        depth, last = 0, None
        for module, source in order:
            self.calls[module] = self.calls.get(module, 0) + 1
            depth = max(depth, inside.get(module, 0))
            if id(module.weight) in seen:
                continue
            seen.add(id(module.weight))
            shared = by_weight[id(module.weight)]
            self.depth_of |= dict.fromkeys(shared, depth)
            together = source == last and len(shared) == 1 and len(stages[-1][-1]) == 1
            if together and _reads_rows(module) and _reads_rows(stages[-1][-1][0]):
                stages[-1].append(shared)
            else:
                stages.append([shared])
            last = source
        return stages, [shared for key, shared in by_weight.items() if key not in seen]

    def weigh(self, modules: Sequence[nn.Module], share: float) -> None:
        """Find the weight of every input of `modules` from one backward pass a batch, through the reference if any."""
        generator = torch.Generator().manual_seed(0)
        sizes: dict[tuple[nn.Module, int], list[Tensor]] = {}
        run = self.reference or self.own
        asked = {self._twin.get(m, m): m for m in modules}
        for index in range(len(self.batches)):
            for twin, x, gradient in _output_gradients(run, list(asked), index, generator):
                module = asked[twin]
                for kept, values in ((sizes, x), (self.weights, gradient)):
                    squares = values.flatten(1).float().square().sum(-1)
                    kept.setdefault((module, index), []).append(squares)
        for module in modules:
            keys = [(module, index) for index in range(len(self.batches)) if (module, index) in self.weights]
            if not keys:
                continue
            depends, size = (torch.cat([w for key in keys for w in of[key]]) for of in (self.weights, sizes))
            small = size.clamp_min(1e-12 * float(size.mean())).reciprocal()
            weights = (1 - share) * small / small.mean()
            weights += share * (depends / depends.mean() if bool(depends.any()) else 1.0)
            weights = torch.where(weights.isfinite(), weights, 1.0)  # the input that is to blame is told later
            pieces = iter(weights.split([len(w) for key in keys for w in self.weights[key]]))
            self.weights |= {key: [next(pieces) for _ in self.weights[key]] for key in keys}

    def moments(self, stages: list[list[list[nn.Module]]]) -> list[tuple[list[list[nn.Module]], Moment]]:
        """(stage, moment of what its matrices read) for stages of one depth, from one pass over the batches."""
        depth = self.depth_of[stages[0][0][0]]
        stage_of = {module: number for number, stage in enumerate(stages) for module in stage[0]}
        calls = 0 if any(m in self.own.masks for m in stage_of) else sum(self.calls.get(m, 0) for m in stage_of)
        self.own.advance(depth, [shared[0] for shared in stages[0]])
        totals = [_Totals() for _ in stages]
        for index in range(len(self.batches)):
            turn = dict.fromkeys(stage_of, 0)
            for module, x in self.own.inputs(list(stage_of), index, calls):
                number = stage_of[module]
                totals[number].add(x, self._weights_of(module, stages[number], index, turn[module]))
                turn[module] += 1
        return [(stage, total.moment(depth)) for stage, total in zip(stages, totals, strict=True)]

    def _weights_of(self, module: nn.Module, stage: list[list[nn.Module]], index: int, turn: int) -> Tensor | None:
        """Weights of the inputs of a call; where several matrices read one tensor, the means of theirs."""
        readers = [shared[0] for shared in stage] if len(stage) > 1 else [module]
        found = [self.weights[m, index][turn] for m in readers if (m, index) in self.weights]
        return torch.stack(found).mean(0) if found else None


def _output_gradients(
    run: _Run, modules: Sequence[nn.Module], index: int, generator: torch.Generator
) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """(module, its rows, gradient of the model's outputs times random numbers in what comes of them) of every call.

    Rows [N, ...] and gradients [N, O] without padding.
    """
    calls: list[tuple[nn.Module, Tensor, Tensor, Callable[[Tensor], Tensor]]] = []
    frozen: list[Any] = [m.weight for m in modules if not m.weight.requires_grad]

    def hook(module: Any, x: tuple[Any, ...], y: Tensor) -> None:
        rows = _rows(module, x[0].detach())
        real = _padding_left_out(module, run.masks, rows)
        calls.append((module, _flat(module, real(rows)), y, real))

    handles = [m.register_forward_hook(hook) for m in modules]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with torch.enable_grad():
            inputs = to_device(run.batches[index], run.model)
            run.masks.mask = inputs.get("attention_mask")
            outputs = [y for y in model_outputs(run_batch(run.model, inputs)) if y.requires_grad]
            seeds = [_random_seeds(y, inputs.get("attention_mask"), generator) for y in outputs]
            found: Sequence[Tensor | None] = [None] * len(calls)
            if outputs and calls:
                found = torch.autograd.grad(outputs, [y for _, _, y, _ in calls], seeds, allow_unused=True)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
        for handle in handles:
            handle.remove()
    result = []
    for (module, rows, y, real), gradient in zip(calls, found, strict=True):
        kind = kind_of(module)
        slope = torch.zeros_like(y) if gradient is None else gradient
        result.append((module, rows, real(slope if kind is None else kind.outputs(module, slope)).flatten(0, -2)))
    return result


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """What the matrix of a float module is multiplied with: [..., I], or [..., g, I] for several groups of rows."""
    kind = kind_of(module)
    rows = x if kind is None else kind.rows(module, x)
    return rows if _reads_rows(module) or _several(module) else rows.squeeze(-2)


def _flat(module: nn.Module, rows: Tensor) -> Tensor:
    """Rows [N, I], or [N, g, I] for several groups of rows."""
    return rows.flatten(0, -3 if _several(module) else -2)


def _several(module: nn.Module) -> bool:
    """Whether groups of the matrix's rows have inputs of their own."""
    groups: Any = getattr(module, "groups", 1)
    return not _reads_rows(module) and groups > 1


def _reads_rows(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind is None or kind.reads_rows


class _Totals:
    """Weighted sums over inputs, in float64."""

    def __init__(self) -> None:
        self.count, self.weight = 0, 0.0
        self.pivot: Tensor | None = None
        self.products: Tensor | None = None  # on and above the diagonal
        self.sums: Tensor | float = 0.0

    def add(self, x: Tensor, weights: Tensor | None) -> None:
        """Add inputs [N, I] or [N, g, I] of these weights [N]."""
        root: Any = 1.0 if weights is None else weights.sqrt().view(-1, *[1] * (x.dim() - 1))
        x = x.float()
        if self.pivot is None:
            self.pivot = x.mean(0) if len(x) else torch.zeros_like(x.sum(0))
        rows = (x - self.pivot) * root
        if self.products is None:
            width = rows.shape[-1]
            self.products = torch.zeros(*rows.shape[1:], width, dtype=torch.float64, device=rows.device)
        # On and above the diagonal alone, in blocks of columns, since the rest is the same.
        for start in range(0, rows.shape[-1], _GRAM_BLOCK):
            block = rows[..., start : start + _GRAM_BLOCK]
            products = block.T @ rows[:, start:] if rows.dim() == 2 else _by_group(block, rows[..., start:])
            self.products[..., start : start + _GRAM_BLOCK, start:] += products
        self.sums = self.sums + (rows * root).double().sum(0)
        self.weight += len(x) if weights is None else float(weights.double().sum())
        self.count += len(x)

    def moment(self, depth: int) -> Moment:
        """The means, of matrices of one encoder layer; nothing can be added after it."""
        count = max(self.count, 1)
        assert self.pivot is not None and self.products is not None
        products = self.products.triu_().div_(count)
        products += products.triu(1).transpose(-1, -2)
        pivot, weight, sums = self.pivot.double(), self.weight / count, torch.as_tensor(self.sums) / count
        value = _plus_outer(products.clone(), pivot, sums)
        _plus_outer(value, sums, pivot)
        _plus_outer(value, pivot, pivot, weight)
        covariance = _plus_outer(products, sums, sums, -1 / weight) if weight else products
        return Moment(value, self.count, sums + weight * pivot, covariance, depth)


def _by_group(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ngi,ngj->gij", a, b)


def _plus_outer(matrix: Tensor, a: Tensor, b: Tensor, times: float = 1.0) -> Tensor:
    """Add `times` a b^T to [I, I], or to each of [g, I, I], in place."""
    a, b = a.view(-1, a.shape[-1], 1), b.view(-1, 1, b.shape[-1])
    matrix.view(-1, *matrix.shape[-2:]).baddbmm_(a, b, alpha=times)
    return matrix


def _twins(model: nn.Module, reference: nn.Module) -> dict[nn.Module, nn.Module]:
    """Module of `model` -> the one of the same name in `reference`."""
    there = dict(reference.named_modules(remove_duplicate=False))
    return {module: there[name] for name, module in model.named_modules() if name in there}


_LOGITS = (("logits",), ("start_logits", "end_logits"))


def model_outputs(output: Any) -> list[Tensor]:
    """What a model is used for: its logits, else its last hidden states, else its first tensor."""
    names = _named(output)
    for wanted in (*_LOGITS, ("sentence_embedding",), ("last_hidden_state",)):
        if all(isinstance(names.get(n), Tensor) for n in wanted):
            return [names[n] for n in wanted]
    values = names.values() if names else output if isinstance(output, (tuple, list)) else [output]
    return [y for y in values if isinstance(y, Tensor)][:1]


def gives_logits(output: Any) -> bool:
    """Whether `model_outputs` are logits."""
    return any(all(isinstance(_named(output).get(n), Tensor) for n in wanted) for wanted in _LOGITS)


def _named(output: Any) -> Mapping[str, Any]:
    return output if isinstance(output, Mapping) else vars(output) if hasattr(output, "__dict__") else {}


def _random_seeds(y: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    """Standard normal numbers in the shape of `y`, zero where it belongs to padding."""
    seeds = torch.randn(y.shape, generator=generator).to(y)
    if mask is not None and y.dim() == mask.dim() + 1 and y.shape[: mask.dim()] == mask.shape:
        seeds = seeds * mask.to(y).unsqueeze(-1)
    return seeds
