"""Measure the Hessian spectrum of an encoder: run by run, block by block, each kept as soon as it is done.

>>> spectrum = hessian_spectrum(model, loader, runs=10, fraction=0.1)
>>> print(spectrum)
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qbert.arguments import real_number, whole_number
from qbert.hessian.batches import (
    BATCH_COST,
    as_samples,
    draw,
    fingerprint,
    loss_weight,
    micro_batch,
    micro_batches,
)
from qbert.hessian.blocks import ParameterBlock, Part, parameter_blocks, vector_options
from qbert.hessian.checkpoint import (
    Checkpoint,
    check_same,
    gathered,
    model_fingerprint,
    own_share,
    rank_and_world,
    wait_for_all,
)
from qbert.hessian.eigen import (
    BOUNDS,
    Eigenpair,
    Lanczos,
    PowerIteration,
    Start,
    check_confidence,
    check_limits,
    error_bound,
    relative,
)
from qbert.hessian.gauss_newton.top import top_pairs
from qbert.hessian.losses import LossFunction, MeasuredLoss, in_full_precision
from qbert.hessian.operator import HessianOperator, free_bytes
from qbert.hessian.spectrum import HessianSpectrum
from qbert.hessian.starts import TOGETHER, coupled_starts, guesses, together, with_previous
from qbert.hessian.vectors import dot, norm
from qbert.progress import progress_bar

METHODS = ("lanczos", "power", "ggn")
PRECISIONS = ("fp32", "bf16")
BASIS_VECTORS = 40
COARSE_TOL = 1e-2  # residual that the rounding of bfloat16 lets an iteration reach
_MOST_DRAWS = 50  # of the samples of one run, until there is a label among them
Solver = Lanczos | PowerIteration
_log = logging.getLogger(__name__)


@in_full_precision
def hessian_spectrum(
    model: nn.Module,
    batches: Any,
    *,
    runs: int = 10,
    fraction: float = 0.1,
    granularity: str = "layer",
    method: str = "lanczos",
    tol: float = 1e-3,
    bound: str = "residual",
    confidence: float | None = None,
    precision: str = "fp32",
    max_products: int = 200,
    seed: int = 0,
    loss_fn: LossFunction | None = None,
    collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    micro_batch_size: int | None = None,
    block_chunk: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> HessianSpectrum:
    """Top Hessian eigenvalue of every block of `model` over several random data subsets (Q-BERT, section 3.1).

    The model is left as it was; dropout is off, attention of any kind that is twice differentiable will do. The
    same seed gives the same numbers, interrupted or not, in one process or (with `torch.distributed` set up, as under
    torchrun) in several that share the blocks.

    Args:
        model: a transformers encoder with a task head, or any module together with `loss_fn`.
        batches: labelled data: a DataLoader, a data set, or a list of dicts of tensors.
        runs: number of random subsets.
        fraction: share of the samples in each subset, in (0, 1]. A subset without any label is drawn again.
        granularity: ``layer``, ``block`` (attention / feed-forward), ``matrix``, or ``group`` (the rows of each head).
        method: ``lanczos``; ``power`` (the paper's rule, for comparison); or ``ggn``: the top eigenvalue of the
            Gauss-Newton matrix instead of the Hessian, for the price of one backward pass.
        tol: bound on the relative error of an eigenvalue.
        bound: ``residual``: an eigenvalue certainly lies within `tol`; ``gap``: the same if the top eigenvalue is
            not one of an unresolved cluster, for fewer products where `tol` is tight.
        confidence: such as 0.99: go on until it is proven, with that probability, that no eigenvalue is larger by
            more than `tol`; about twice the products. None: no other Ritz value can be larger, and with 99 %
            probability no eigenvalue is larger by more than half.
        precision: ``fp32``; or ``bf16``: iterate on bfloat16 products to a residual of 1e-2, then take one product in
            the model's own precision for value, residual and error. For accelerators: a CPU without bfloat16 units
            computes it about ten times more slowly than float32. Expect errors of a few 1e-3, and ``converged`` only
            where `tol` and `bound` allow for them.
        max_products: Hessian products after which an eigenvalue is given up as not converged.
        seed: draws the subsets and the start vectors.
        loss_fn: ``loss_fn(model, batch)`` -> mean loss of the batch; default ``model(**batch).loss``.
        collate_fn: for a data set: makes a batch of a list of samples.
        micro_batch_size: samples per forward pass at most; bounds memory, does not change the result: a loss that is
            not a mean over samples or labels is measured on the whole subset at once (a warning in the log says so).
            Default: as `batches`. On CPUs, batches of short and long texts are cut further, for less padding.
        block_chunk: blocks that are solved together; bounds memory, beside about three vectors and a graph of all
            blocks for the product that they start from. Default: by free memory.
        checkpoint: folder that finished (run, block) pairs are kept in.
        resume: go on from `checkpoint`, if there is one; without it, an earlier one is overwritten.
        progress: show a progress bar, counted in Hessian products (in samples for ``ggn``).

    Returns:
        `HessianSpectrum`: eigenvalues, residuals and convergence [runs, blocks] in float64, and what was asked for.

    Raises:
        ValueError, TypeError: an argument that cannot be used, named with its value; a foreign checkpoint.
        ArithmeticError: a Hessian that is not finite.
    """
    settings: dict[str, Any] = {"runs": runs, "fraction": fraction, "granularity": granularity, "method": method}
    settings |= {"tol": tol, "bound": bound, "confidence": confidence, "precision": precision}
    settings |= {"max_products": max_products, "seed": seed}
    settings = checked_settings(settings)
    runs, fraction, seed = settings["runs"], settings["fraction"], settings["seed"]
    if resume and checkpoint is None:
        raise ValueError("resume: there is nothing to go on from without a checkpoint; give checkpoint=FOLDER")
    blocks = parameter_blocks(model, granularity)
    check_finite(model)
    if precision == "bf16" and any(p.dtype == torch.float64 for p in model.parameters()):
        raise ValueError("precision: 'bf16' is for float32 models, and this one is float64; use model.float()")
    loss = MeasuredLoss(model, loss_fn=loss_fn)
    samples = as_samples(batches, collate_fn=collate_fn, pad_token_id=loss.pad_token_id, trim=loss.masks_padding)
    size = micro_batch(micro_batch_size, samples)
    settings["samples"] = len(samples)

    def drawn(run: int) -> MeasuredLoss:
        cost = BATCH_COST.get(loss.device.type)
        for attempt in range(_MOST_DRAWS):
            chosen = draw(len(samples), fraction=fraction, seed=seed, run=run, attempt=attempt)
            parts = micro_batches(samples, chosen, size, seed=seed + run, batch_cost=cost, unlabelled=True)
            if (measured := loss.over(parts)).weight > 0:
                return measured
            if len(chosen) == len(samples):
                raise ValueError("batches: no labelled samples; pass at least one label other than -100")
        raise ValueError(
            f"batches: run {run + 1} of {runs} drew no labelled sample in {_MOST_DRAWS} draws of {len(chosen)} from "
            f"{len(samples)} (fraction={fraction}); use a larger fraction, or leave out samples with no label but -100"
        )

    saved = None
    if checkpoint is not None or rank_and_world()[1] > 1:
        signature = {**settings, "micro_batch_size": size, "loss_fn": getattr(loss_fn, "__qualname__", None)}
        check_same(repr(signature), "runs, seed or another argument differs", "pass the same ones in each")
        signature["weights"] = model_fingerprint(model)
        check_same(signature["weights"], "model: the weights differ")
        signature["data"] = fingerprint(b for run in range(runs) for b in drawn(run).batches if loss_weight(b) > 0)
        check_same(signature["data"], "batches: the data differ")
    if checkpoint is not None:
        signature["losses"] = [_first_loss(drawn(run)) for run in range(runs)]
        rounding = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()) ** 0.5
        saved = Checkpoint(checkpoint, signature, resume=resume, loss_tolerance=max(1e-3, rounding))
        if not resume and rank_and_world()[0] == 0:
            saved.clear()
        wait_for_all()
    work = Measurement(blocks, block_chunk, settings, saved)
    mine = work.blocks
    unit, total = (
        ("sample", runs * round(fraction * len(samples))) if method == "ggn" else ("product", 7 * runs * len(mine))
    )
    # Products of lower blocks cost several times those of upper ones: only their mean over all so far tells the rest.
    hidden = not progress or rank_and_world()[0] > 0
    with progress_bar(total=total, desc="Hessian", unit=unit, disable=hidden, smoothing=0) as bar:
        for run in range(runs):
            bar.set_postfix(run=f"{run + 1}/{runs}")
            work.run(run, lambda run: drawn(run).additive(), bar)
    spectrum = assemble(blocks, work, settings)
    if saved is not None:
        saved.finish(block.name for block in mine)
    return spectrum


def _first_loss(measured: MeasuredLoss) -> float:
    """Mean loss of the first micro-batch that has labels."""
    return measured.value(next(batch for batch in measured.batches if loss_weight(batch) > 0))


def check_finite(model: nn.Module) -> None:
    """Refuse weights that hold NaN or infinity, or can have no gradients, as packed ones.

    Raises:
        ValueError: naming the first such parameter or module.
    """
    for name, module in model.named_modules():
        if hasattr(module, "quantized_weight") and not isinstance(getattr(module, "weight", None), nn.Parameter):
            raise ValueError(
                f"model: {name} is packed, and has no gradients; measure the float model, or the one that was packed"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(f"model: {name} was made in torch.inference_mode(); load the model outside of it")
        if not torch.isfinite(parameter).all():
            raise ValueError(f"model: the parameter {name} holds NaN or infinity; load or train the model again")


def checked_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with Python's numbers, which JSON holds, in the place of numpy's.

    Args:
        settings: the arguments ``runs``, ``fraction``, ``method``, ``tol``, ``bound``, ``confidence``, ``precision``,
            ``max_products`` and ``seed`` of `hessian_spectrum`; others are left as they are.

    Raises:
        ValueError, TypeError: naming the one that cannot be used.
    """
    method, confidence = settings["method"], settings["confidence"]
    numbers: dict[str, Any] = {name: whole_number(name, settings[name], least=1) for name in ("runs", "max_products")}
    numbers |= {name: real_number(name, settings[name]) for name in ("fraction", "tol")}
    numbers["seed"] = whole_number("seed", settings["seed"])
    numbers["confidence"] = None if confidence is None else real_number("confidence", confidence)
    if not 0 < numbers["fraction"] <= 1:
        raise ValueError(f"fraction: {settings['fraction']} is not a share of the samples; use a number in (0, 1]")
    if method not in METHODS:
        raise ValueError(f"method: {method!r} is unknown; use one of {', '.join(METHODS)}")
    if settings["bound"] not in BOUNDS:
        raise ValueError(f"bound: {settings['bound']!r} is unknown; use one of {', '.join(BOUNDS)}")
    if settings["precision"] not in PRECISIONS:
        raise ValueError(f"precision: {settings['precision']!r} is unknown; use one of {', '.join(PRECISIONS)}")
    if settings["precision"] == "bf16" and (method == "ggn" or confidence is not None):
        raise ValueError(
            "precision: 'bf16' goes with method='lanczos' or 'power' and without confidence, since rounded products "
            "prove nothing; use 'fp32'"
        )
    check_confidence(numbers["confidence"])
    check_limits(numbers["tol"], numbers["max_products"])
    return {**settings, **numbers}


class Measurement:
    """Results so far, and what the next run starts from."""

    def __init__(
        self,
        everything: Sequence[ParameterBlock],
        block_chunk: int | None,
        settings: Mapping[str, Any],
        saved: Checkpoint | None,
    ):
        self.everything, self.blocks, self.settings, self.saved = everything, own_share(everything), settings, saved
        blocks = self.blocks
        self.chunks = chunks(blocks, block_chunk)
        self.results: list[dict[str, tuple[Eigenpair, float]]] = []
        self.measured = 0
        self.warm: dict[str, Tensor] = saved.latest_vectors(block.name for block in blocks) if saved else {}

    def run(self, run: int, subset: Callable[[int], MeasuredLoss], bar: Any) -> None:
        """One subset: every block that the checkpoint does not hold already."""
        done = {block.name: self.saved.get(run, block.name) if self.saved else None for block in self.blocks}
        found = {name: record for name, record in done.items() if record is not None}
        self.results.append(found)
        if len(found) == len(self.blocks):
            return
        measured = subset(run)
        operator, starts = self._starts(run, measured) if self.settings["method"] == "lanczos" else (None, {})
        if operator is not None and len(self.chunks) > 1:
            operator.release()
            operator = None
        for chunk in self.chunks:
            todo = [block for block in chunk if block.name not in found]
            if todo and self.settings["method"] == "ggn":
                self._gauss_newton(run, measured, todo, bar)
            elif todo:
                self._chunk(run, measured, todo, operator, starts, bar)

    def _operator(self, measured: MeasuredLoss, parameters: Mapping[str, Sequence[Part]]) -> HessianOperator:
        """That of the iterations."""
        coarse = self.settings["precision"] == "bf16"
        return HessianOperator.of(measured, parameters, autocast=torch.bfloat16 if coarse else None)

    def _starts(self, run: int, measured: MeasuredLoss) -> tuple[HessianOperator, dict[str, Start]]:
        """Operator of all blocks, and what the iteration of each starts from: the same in whichever process it runs."""
        parameters = {block.name: block.parameters for block in self.everything}
        operator = self._operator(measured, {**parameters, TOGETHER: together(parameters.values())})
        proof = self.settings["confidence"] is not None
        generators = {name: generator(run, name, self.settings["seed"]) for name in parameters}
        starts = coupled_starts(operator, generators, None if proof else guesses(measured, parameters))
        return operator, {block.name: starts[block.name] for block in self.blocks}

    def _gauss_newton(self, run: int, measured: MeasuredLoss, todo: Sequence[ParameterBlock], bar: Any) -> None:
        parameters = {block.name: block.parameters for block in todo}
        operator = HessianOperator.of(measured, parameters)
        pairs = top_pairs(measured, parameters, tol=self.settings["tol"], count=bar.update)
        for name, pair in pairs.items():
            self._keep(run, name, pair, operator.loss)

    def _chunk(
        self,
        run: int,
        measured: MeasuredLoss,
        todo: Sequence[ParameterBlock],
        operator: HessianOperator | None,
        starts: dict[str, Start],
        bar: Any,
    ) -> None:
        parameters = {block.name: block.parameters for block in todo}
        operator = operator or self._operator(measured, parameters)
        solvers: dict[str, Solver] = {}
        for block in todo:
            start = starts.pop(block.name, None)
            if start is not None and self.settings["confidence"] is None:
                start = with_previous(start, self.warm.get(block.name))
            solvers[block.name] = new_solver(block, start, run, self.settings)
        solved: Iterable[tuple[str, Eigenpair]] = solve(operator, solvers, bar.update)
        exact = operator
        if self.settings["precision"] == "bf16":  # one product for each block in the model's own precision
            pairs = dict(solved)
            operator.release()
            bar.update(len(pairs))
            exact = HessianOperator.of(measured, parameters)
            solved = refined(pairs, exact, tol=self.settings["tol"], bound=self.settings["bound"]).items()
        for name, pair in solved:
            self._keep(run, name, pair, exact.loss)
            self.measured += 1
            left = self.settings["runs"] * len(self.blocks) - sum(len(found) for found in self.results)
            bar.total = bar.n + round(bar.n / self.measured * left)
        exact.release()

    def _keep(self, run: int, name: str, pair: Eigenpair, loss: float) -> None:
        self.results[run][name] = pair, loss
        self.warm[name] = pair.vector.cpu()
        if self.saved is not None:
            self.saved.put(run, name, pair, loss)


def assemble(blocks: Sequence[ParameterBlock], work: Measurement, settings: dict[str, Any]) -> HessianSpectrum:
    """The spectrum of all `blocks`, from this process's results and those of the others."""
    columns = ("value", "other_end", "residual", "error", "upper_bound", "products", "converged")
    table = torch.zeros(len(work.results), len(blocks), len(columns) + 1, dtype=torch.float64, device="cpu")
    for run, found in enumerate(work.results):
        for index, block in enumerate(blocks):
            if block.name in found:
                pair, loss = found[block.name]
                row = [*(float(getattr(pair, c)) for c in columns), loss]
                table[run, index] = torch.tensor(row, dtype=torch.float64, device="cpu")
    whole = gathered(table, blocks[0].parameters[0].device).numpy()
    values = dict(zip((*columns, "loss"), np.moveaxis(whole, 2, 0).copy(), strict=True))
    return HessianSpectrum(
        names=[b.name for b in blocks],
        members={b.name: list(b.members) for b in blocks},
        parameters={b.name: b.size for b in blocks},
        eigenvalues=values["value"],
        other_end=values["other_end"],
        residuals=values["residual"],
        errors=values["error"],
        upper_bounds=values["upper_bound"],
        products=values["products"].astype(np.int64),
        converged=values["converged"].astype(np.bool_),
        losses=values["loss"][:, 0].copy(),
        settings=settings,
    )


def generator(run: int, name: str, seed: int) -> torch.Generator:
    """Of the random vectors of one block's iteration."""
    digest = hashlib.sha256(f"start/{seed}/{run}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def new_solver(block: ParameterBlock, start: Start | None, run: int, settings: Mapping[str, Any]) -> Solver:
    """The iteration for one block, from `start` or (None) at random."""
    common: dict[str, Any] = {
        "tol": COARSE_TOL if settings["precision"] == "bf16" else settings["tol"],
        "max_products": settings["max_products"],
        "generator": generator(run, block.name, settings["seed"]),
        **vector_options(block.parameters),
    }
    if settings["method"] == "power":
        return PowerIteration(block.size, **common)
    certainty = {"bound": settings["bound"], "confidence": settings["confidence"]}
    return Lanczos(block.size, start=start, **certainty, **common)


def solve(
    operator: HessianOperator,
    solvers: Mapping[str, Solver],
    count: Callable[[int], object] = lambda products: None,
) -> Iterator[tuple[str, Eigenpair]]:
    """Drive the solvers of several blocks to their end; yields (name, eigenpair) as each finishes.

    With retained graphs one block after the other (one Krylov basis in memory at a time), otherwise all in step, so
    that each micro-batch's graph is built once per step for all of them.
    """
    groups = [[name] for name in solvers] if operator.retained else [list(solvers)]
    for group in groups:
        active = {name: solvers[name] for name in group}
        while active:
            queries = {name: s.query for name, s in active.items() if s.query is not None}
            for name, product in operator.products(queries).items():
                active[name].receive(product)
            count(len(queries))
            for name in [n for n, s in active.items() if s.query is None]:
                result = active.pop(name).result
                assert result is not None
                yield name, result


def chunks(blocks: Sequence[ParameterBlock], block_chunk: int | None) -> list[Sequence[ParameterBlock]]:
    """`blocks` in groups that are solved together, `block_chunk` or as many as half of the free memory allows.

    Raises:
        TypeError, ValueError: if `block_chunk` is no whole number of at least 1.
    """
    if not blocks:
        return []
    if block_chunk is None:
        # A typical iteration ends after a quarter of the basis; gradients and rows of the Gauss-Newton factor on top.
        bytes_each = BASIS_VECTORS * max(b.size * b.parameters[0].element_size() for b in blocks)
        block_chunk = max(1, min(len(blocks), int(0.5 * free_bytes(blocks[0].parameters[0].device) / bytes_each)))
        if block_chunk < len(blocks):
            _log.warning("free memory allows %d of %d blocks at a time (block_chunk)", block_chunk, len(blocks))
    block_chunk = whole_number("block_chunk", block_chunk, least=1)
    return [blocks[first : first + block_chunk] for first in range(0, len(blocks), block_chunk)]


def refined(
    pairs: Mapping[str, Eigenpair], operator: HessianOperator, *, tol: float, bound: str
) -> dict[str, Eigenpair]:
    """`pairs` (block name -> pair) with value, residual and error from one product of `operator` each.

    ``upper_bound`` is infinite: what the rounded operator proves does not hold for the exact one. ``converged`` asks
    that the coarse iteration had converged (so that no other eigenvalue was in sight) and that the error measured in
    full precision is within `tol`; with ``bound="gap"`` it is the square of the residual over the coarse gap, where
    the gap is wide enough to tell the eigenvalue from the next.
    """
    products = operator.products({name: pair.vector for name, pair in pairs.items()})
    found = {}
    for name, pair in pairs.items():
        value = float(dot(pair.vector, products[name]))
        residual = float(norm(products[name] - value * pair.vector))
        gap = pair.gap - abs(value - pair.value)
        if gap > 2 * residual:
            error = error_bound(value, residual, gap if bound == "gap" else math.nan)
        else:  # the next eigenvalue is not told apart, and may lie as far above again
            error = relative(2 * residual, value)
        found[name] = dataclasses.replace(
            pair,
            value=value,
            residual=relative(residual, value),
            error=error,
            upper_bound=math.inf,
            gap=gap,
            products=pair.products + 1,
            converged=pair.converged and error <= tol,
        )
    return found
