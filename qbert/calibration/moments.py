r"""The second moments :math:`C = E[x x^T]` of the inputs of every matrix, which compensated rounding needs.

Batches are run through the model in evaluation mode, padding is left out, and modes and hooks are restored afterwards.

    >>> for modules, moment in input_moments(model, batches, modules):
    ...     round_them(modules, moment.value)

Source of the order of `input_moments`: Frantar et al. 2023, GPTQ, section 4 (layer by layer, on the inputs that the
partly quantized model gives).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qbert.calibration.batches import Batch, check_readable, run_batch
from qbert.calibration.outputs import Run, model_outputs
from qbert.calibration.rows import flat_rows, matrix_rows, padding_left_out, reads_rows
from qbert.calibration.totals import Moment, Totals
from qbert.encoders.inputs import to_device
from qbert.encoders.modes import evaluation_mode
from qbert.encoders.prefix import LayerCache
from qbert.encoders.targets import encoder_layers
from qbert.encoders.weights import weight_matrix
from qbert.layers.kind import kind_of
from qbert.layers.recurrent import StepMasks
from qbert.progress import progress_bar


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
            rows = matrix_rows(module, args[0].detach())
            seen.append((module, flat_rows(module, padding_left_out(module, self.masks, rows)(rows))))
            if len(seen) == calls:
                raise _SeenError

        handles = [m.register_forward_pre_hook(hook) for m in modules]
        try:
            self.replayed(index)
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
            if together and reads_rows(module) and reads_rows(stages[-1][-1][0]):
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
            for twin, size, slope in _squared_sizes(run, list(asked), index, generator):
                for kept, squares in ((sizes, size), (self.weights, slope)):
                    kept.setdefault((asked[twin], index), []).append(squares)
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
        totals = [Totals() for _ in stages]
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


class _Seen(torch.autograd.Function):
    """A copy of y; `see` gets the gradient in it on the way back, which then nobody has to keep.

    `anchor` is a scalar that stands for all that was seen: asking for its gradient makes the backward pass come by.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, see: Callable[[Tensor], None]) -> Tensor:
        ctx.see = see
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.see(grads[0])
        return grads[0], grads[0].new_zeros(()), None


def _squared_sizes(
    run: _Run, modules: Sequence[nn.Module], index: int, generator: torch.Generator
) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """(module, |x|^2 of its rows, |g|^2 of what comes of them) of every call, both [N] without padding.

    g is the gradient of the model's outputs times random numbers. Only the squares are kept of either.
    """
    calls: list[nn.Module] = []
    sizes: list[Tensor] = []
    slopes: dict[int, Tensor] = {}
    anchor = torch.zeros((), requires_grad=True, device=next(run.model.parameters()).device)

    def hook(module: Any, x: tuple[Any, ...], y: Tensor) -> Tensor:
        rows = matrix_rows(module, x[0].detach())
        real, kind, call = padding_left_out(module, run.masks, rows), kind_of(module), len(calls)

        def see(slope: Tensor) -> None:
            slope = slope if kind is None else kind.outputs(module, slope)
            slopes[call] = _squares(real(slope).flatten(0, -2))

        calls.append(module)
        sizes.append(_squares(flat_rows(module, real(rows))))
        return _Seen.apply(y, anchor, see)  # type: ignore[no-any-return]

    handles = [m.register_forward_hook(hook) for m in modules]
    try:
        with torch.enable_grad():
            inputs = to_device(run.batches[index], run.model)
            run.masks.mask = inputs.get("attention_mask")
            found = model_outputs(run_batch(run.model, inputs))
            outputs, by_position = [y for y in found if y.requires_grad], len(found) > 1
            seeds = [_random_seeds(y, inputs.get("attention_mask"), generator, by_position) for y in outputs]
            if outputs and calls:
                torch.autograd.grad(outputs, [anchor], seeds, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return [
        (m, size, slopes.get(i, torch.zeros_like(size))) for i, (m, size) in enumerate(zip(calls, sizes, strict=True))
    ]


def _squares(rows: Tensor) -> Tensor:
    return rows.flatten(1).float().square().sum(-1)


def _twins(model: nn.Module, reference: nn.Module) -> dict[nn.Module, nn.Module]:
    """Module of `model` -> the one of the same name in `reference`."""
    there = dict(reference.named_modules(remove_duplicate=False))
    return {module: there[name] for name, module in model.named_modules() if name in there}


def _random_seeds(y: Tensor, mask: Tensor | None, generator: torch.Generator, by_position: bool = False) -> Tensor:
    """Standard normal numbers in the shape of `y`, zero where it belongs to padding.

    Args:
        by_position: `y` [B, T] are the scores of places (start or end of a span), and not [B, C] those of classes.
    """
    seeds = torch.randn(y.shape, generator=generator).to(y)
    if by_position and mask is not None and y.shape == mask.shape:
        return seeds * mask.to(y)
    if mask is not None and y.dim() == mask.dim() + 1 and y.shape[: mask.dim()] == mask.shape:
        seeds = seeds * mask.to(y).unsqueeze(-1)
    return seeds
