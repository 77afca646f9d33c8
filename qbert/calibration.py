r"""Calibration: what is read off a few batches of data, without labels.

Static activation ranges (`calibrate_activations`), and the second moments :math:`C = E[x x^T]` of the inputs of every
matrix (`input_moments`) that compensated rounding needs. Batches are run through the model in evaluation mode without
gradients, padding is left out, and modes and hooks are restored afterwards.

    >>> for linears, moment in input_moments(model, batches, linears):
    ...     round_them(linears, moment.value)

Source of the order of `input_moments`: Frantar et al. 2023, GPTQ, section 4 (layer by layer, on the inputs that the
partly quantized model gives).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbert.encoders.inputs import to_device
from qbert.encoders.modes import evaluation_mode
from qbert.encoders.prefix import LayerCache
from qbert.encoders.targets import encoder_layers
from qbert.layers.kind import TrainableLayer
from qbert.progress import progress_bar
from qbert.quantizers.activations import ActivationObserver

Batch = Mapping[str, Tensor]


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
    check_lengths(model, batches)
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
    mask: Tensor | None = None

    def watch(layer: Any) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda quantizer, args: see(layer, unmasked(args[0], mask))

    handles = [layer.activation_quantizer.register_forward_pre_hook(watch(layer)) for layer in layers]
    try:
        with evaluation_mode(model):
            for batch in batches:
                inputs = to_device(batch, model)
                mask = inputs.get("attention_mask")
                run_batch(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


def unmasked(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of `x` that are no padding.

    Args:
        x: [B, T, ...], or [B T, ...] in that order; anything else is given back whole.
        mask: attention mask [..., T] whose leading dimensions have B entries (pairs may be encoded apart), or None.
    """
    if mask is None or mask.dim() < 2:
        return x
    flat = mask.reshape(-1, mask.shape[-1]).bool()
    if x.shape[:2] == flat.shape:
        return x[flat]
    return x[flat.flatten()] if x.dim() == 2 and len(x) == flat.numel() else x


def run_batch(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """Call `model` on a dict batch: by keyword, or as one mapping where that is the model's own convention."""
    if type(model).__name__ == "SentenceTransformer":
        return model(dict(inputs))
    return model(**inputs)


@dataclass(frozen=True)
class Moment:
    """The second moment of a matrix's inputs.

    Attributes:
        value: [I, I] float64, C = E[w x x^T] over the inputs that are no padding, the weights w of mean 1.
        inputs: how many those were.
    """

    value: Tensor
    inputs: int


class _SeenError(Exception):
    """All that a pass was made for has been seen."""


def input_moments(
    model: nn.Module,
    batches: Sequence[Batch],
    linears: Sequence[nn.Linear],
    *,
    weigh: float = 0.0,
    progress: bool = False,
) -> Iterator[tuple[list[nn.Linear], Moment]]:
    """Matrix after matrix, in the order in which the model calls them, the second moment of its inputs.

    What the caller does to a matrix (in place, or by another module under the same name) takes effect before the
    moments of the next encoder layer are collected; those of one layer are in memory at a time. Matrices that read one
    and the same tensor share a moment.

    Args:
        model: left in the modes and with the hooks that it had.
        batches: at least one.
        linears: ``nn.Linear`` modules of `model`, each once. Modules that are tied to one weight have one moment, over
            the inputs of all.
        weigh: share, from 0 to 1, by which an input counts as much as the model's outputs depend on what the matrix
            makes of it: w = weigh |g|^2 / mean |g|^2 + (1 - weigh) |x|^-2 / mean |x|^-2, where g is the gradient in the
            matrix's output of the model's outputs (logits, or last hidden states) times random numbers. The second
            part counts all directions of inputs alike, since a few tokens are larger than others by orders of
            magnitude and normalized after the matrix. With 0, w = 1.
        progress: show a bar over the matrices.

    Yields:
        (modules with one weight, `Moment`); matrices that the first batch does not reach come last, with no inputs
        and a moment of zeros.

    Raises:
        ValueError: if the input of a matrix holds NaN or infinity, or batches are longer than the model can read.
    """
    check_lengths(model, batches)
    names = {module: name for name, module in model.named_modules()}
    with (
        _Passes(model, batches) as passes,
        progress_bar(total=len(linears), desc="rounding", disable=not progress) as bar,
    ):
        stages, missed = passes.stages(linears)
        if weigh:
            passes.weigh(linears, weigh)
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
            width = shared[0].in_features
            yield shared, Moment(torch.zeros(width, width, dtype=torch.float64), 0)
            bar.update(len(shared))


def check_lengths(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Refuse batches that are longer than the model's positions.

    Raises:
        ValueError: naming both lengths.
    """
    tables = [m for n, m in model.named_modules() if isinstance(m, nn.Embedding) and n.endswith("position_embeddings")]
    most = max((table.num_embeddings for table in tables), default=0)
    longest = max((b["input_ids"].shape[-1] for b in batches if isinstance(b.get("input_ids"), Tensor)), default=0)
    if longest > most > 0:
        raise ValueError(
            f"calibration_data: a batch has {longest} tokens a row, but the model reads at most {most}; tokenize with "
            f"truncation=True, max_length={most}"
        )


class _Passes:
    """Passes of a model over batches, each of which computes no more than what stands between two depths."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.model, self.batches = model, batches
        self.depth_of: dict[nn.Module, int] = {}
        self.calls: dict[nn.Module, int] = {}
        self.checked: set[int] = set()
        self.weights: dict[tuple[nn.Module, int], list[Tensor]] = {}  # (module, batch) -> weights of each call
        self._mode = evaluation_mode(model)

    def __enter__(self) -> _Passes:
        self._mode.__enter__()
        try:
            layers = [layer for _, layer in encoder_layers(self.model)]
        except ValueError:
            layers = []
        self.layers = layers
        self.cache = LayerCache(layers, len(self.batches), self._run)
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)

    @torch.no_grad()
    def _run(self, index: int) -> None:
        run_batch(self.model, to_device(self.batches[index], self.model))

    def stages(self, linears: Sequence[nn.Linear]) -> tuple[list[list[list[nn.Linear]]], list[list[nn.Linear]]]:
        """(stages of modules that read one tensor, modules that are never called); modules with one weight together."""
        order: list[tuple[nn.Linear, int]] = []
        kept: list[Tensor] = []  # so that no two inputs have the same address

        def hook(module: Any, args: tuple[Any, ...]) -> None:
            kept.append(args[0])
            order.append((module, id(args[0])))

        inside = {m: i for i, layer in enumerate(self.layers) for m in layer.modules()}
        handles = [m.register_forward_pre_hook(hook) for m in linears]
        try:
            self._run(0)
        finally:
            for handle in handles:
                handle.remove()
        by_weight: dict[int, list[nn.Linear]] = {}
        for module in linears:
            by_weight.setdefault(id(module.weight), []).append(module)
        stages: list[list[list[nn.Linear]]] = []
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
            if source == last and len(shared) == 1 and len(stages[-1][-1]) == 1:
                stages[-1].append(shared)
            else:
                stages.append([shared])
            last = source
        return stages, [shared for key, shared in by_weight.items() if key not in seen]

    def weigh(self, linears: Sequence[nn.Linear], share: float) -> None:
        """Find the weight of every input of `linears` from one backward pass a batch."""
        generator = torch.Generator().manual_seed(0)
        sizes: dict[tuple[nn.Module, int], list[Tensor]] = {}
        for index, batch in enumerate(self.batches):
            mask = batch.get("attention_mask")
            for module, x, gradient in self._output_gradients(linears, index, generator):
                for kept, values in ((sizes, x), (self.weights, gradient)):
                    on_device = None if mask is None else mask.to(values.device)
                    squares = unmasked(values, on_device).flatten(0, -2).float().square().sum(-1)
                    kept.setdefault((module, index), []).append(squares)
        for module in linears:
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

    def _output_gradients(
        self, linears: Sequence[nn.Linear], index: int, generator: torch.Generator
    ) -> list[tuple[nn.Linear, Tensor, Tensor]]:
        """(module, input, gradient of the model's outputs times random numbers in its output) of every call."""
        calls: list[tuple[nn.Linear, Tensor, Tensor]] = []
        frozen = [m.weight for m in linears if not m.weight.requires_grad]
        handles = [m.register_forward_hook(lambda m, x, y: calls.append((m, x[0].detach(), y))) for m in linears]
        try:
            for weight in frozen:
                weight.requires_grad_(True)
            with torch.enable_grad():
                inputs = to_device(self.batches[index], self.model)
                outputs = [y for y in _outputs(run_batch(self.model, inputs)) if y.requires_grad]
                seeds = [_random_seeds(y, inputs.get("attention_mask"), generator) for y in outputs]
                found: Sequence[Tensor | None] = [None] * len(calls)
                if outputs and calls:
                    found = torch.autograd.grad(outputs, [y for _, _, y in calls], seeds, allow_unused=True)
        finally:
            for weight in frozen:
                weight.requires_grad_(False)
            for handle in handles:
                handle.remove()
        return [
            (module, x, torch.zeros_like(y) if gradient is None else gradient)
            for (module, x, y), gradient in zip(calls, found, strict=True)
        ]

    def moments(self, stages: list[list[list[nn.Linear]]]) -> list[tuple[list[list[nn.Linear]], Moment]]:
        """(stage, moment of what its matrices read) for stages of one depth, from one pass over the batches."""
        self.cache.advance(self.depth_of[stages[0][0][0]])
        if self.cache.depth and self.cache.depth not in self.checked:
            self.checked.add(self.cache.depth)
            if not self._replays(stages[0][0]):
                self.cache.forget()
        stage_of = {module: number for number, stage in enumerate(stages) for module in stage[0]}
        totals = [
            torch.zeros(m.in_features, m.in_features, dtype=torch.float64, device=m.weight.device)
            for m in (stage[0][0] for stage in stages)
        ]
        counts = [0] * len(stages)
        for index in range(len(self.batches)):
            turn = dict.fromkeys(stage_of, 0)
            for module, x in self._inputs(list(stage_of), index):
                number = stage_of[module]
                rows = x.detach().flatten(0, -2).float()
                counts[number] += len(rows)
                weights = self._weights_of(module, stages[number], index, turn[module])
                if weights is not None:
                    rows = rows * weights.sqrt().unsqueeze(1)
                totals[number].add_(rows.T @ rows)
                turn[module] += 1
        found = [Moment(total / max(count, 1), count) for total, count in zip(totals, counts, strict=True)]
        return list(zip(stages, found, strict=True))

    def _weights_of(self, module: nn.Linear, stage: list[list[nn.Linear]], index: int, turn: int) -> Tensor | None:
        """Weights of the inputs of a call; where several matrices read one tensor, the means of theirs."""
        readers = [shared[0] for shared in stage] if len(stage) > 1 else [module]
        found = [self.weights[m, index][turn] for m in readers if (m, index) in self.weights]
        return torch.stack(found).mean(0) if found else None

    def _inputs(self, modules: Sequence[nn.Linear], index: int) -> list[tuple[nn.Linear, Tensor]]:
        """(module, what it reads of batch `index` but for padding) of every call; the pass ends with the last one."""
        mask = self.batches[index].get("attention_mask")
        calls = sum(self.calls.get(m, 0) for m in modules)
        seen: list[tuple[nn.Linear, Tensor]] = []

        def hook(module: Any, args: tuple[Any, ...]) -> None:
            seen.append((module, unmasked(args[0], None if mask is None else mask.to(args[0].device))))
            if len(seen) == calls:
                raise _SeenError

        handles = [m.register_forward_pre_hook(hook) for m in modules]
        try:
            with self.cache.replay(index):
                self._run(index)
        except _SeenError:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def _replays(self, modules: Sequence[nn.Linear]) -> bool:
        """Whether the kept layers stand in for themselves: the same input as without them."""
        kept = self._inputs(modules, 0)
        depth, self.cache.depth = self.cache.depth, 0
        whole = self._inputs(modules, 0)
        self.cache.depth = depth
        return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for (_, a), (_, b) in zip(kept, whole, strict=True))


def _outputs(output: Any) -> list[Tensor]:
    """What a model is used for: its logits, else its last hidden states, else its first tensor."""
    names = output if isinstance(output, Mapping) else vars(output) if hasattr(output, "__dict__") else {}
    for wanted in (("logits",), ("start_logits", "end_logits"), ("sentence_embedding",), ("last_hidden_state",)):
        if all(isinstance(names.get(n), Tensor) for n in wanted):
            return [names[n] for n in wanted]
    values = names.values() if names else output if isinstance(output, (tuple, list)) else [output]
    return [y for y in values if isinstance(y, Tensor)][:1]


def _random_seeds(y: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    """Standard normal numbers in the shape of `y`, zero where it belongs to padding."""
    seeds = torch.randn(y.shape, generator=generator).to(y)
    if mask is not None and y.dim() == mask.dim() + 1 and y.shape[: mask.dim()] == mask.shape:
        seeds = seeds * mask.to(y).unsqueeze(-1)
    return seeds
