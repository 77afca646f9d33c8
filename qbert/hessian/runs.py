"""The work of a spectrum measurement: run by run, block by block, each kept as soon as it is done.

>>> work = Measurement(blocks, None, settings, saved=None)
>>> work.run(0, subset, bar)
>>> spectrum = assemble(blocks, work, settings)
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qbert.arguments import whole_number
from qbert.hessian.batches import Batch, batch_size
from qbert.hessian.blocks import ParameterBlock, Part, vector_options
from qbert.hessian.checkpoint import Checkpoint, gathered
from qbert.hessian.eigen import PowerIteration
from qbert.hessian.eigenpair import Eigenpair, error_bound, relative
from qbert.hessian.gauss_newton.loss_factor import NoModelOutputError
from qbert.hessian.gauss_newton.top import start_vectors, top_pairs
from qbert.hessian.krylov import Lanczos
from qbert.hessian.losses import MeasuredLoss
from qbert.hessian.operator import HessianOperator, free_bytes
from qbert.hessian.spectrum import HessianSpectrum

_WARM_START_SAMPLES = 16


class Measurement:
    """Results so far, and what the next run starts from."""

    def __init__(
        self,
        blocks: Sequence[ParameterBlock],
        block_chunk: int | None,
        settings: Mapping[str, Any],
        saved: Checkpoint | None,
    ):
        self.blocks, self.settings, self.saved = blocks, settings, saved
        self.chunks = chunks(blocks, block_chunk)
        self.results: list[dict[str, tuple[Eigenpair, float]]] = []
        self.measured = 0
        self.warm: dict[str, Tensor] = saved.latest_vectors(block.name for block in blocks) if saved else {}

    def run(self, run: int, subset: Callable[[int], MeasuredLoss], bar: Any) -> None:
        """One subset: every block that the checkpoint does not hold already."""
        done = {block.name: self.saved.get(run, block.name) if self.saved else None for block in self.blocks}
        found = {name: record for name, record in done.items() if record is not None}
        self.results.append(found)
        if len(found) < len(self.blocks):
            measured = subset(run)
            for chunk in self.chunks:
                todo = [block for block in chunk if block.name not in found]
                if todo:
                    self._chunk(run, measured, todo, bar)

    def _chunk(self, run: int, measured: MeasuredLoss, todo: Sequence[ParameterBlock], bar: Any) -> None:
        parameters = {block.name: block.parameters for block in todo}
        coarse = self.settings["precision"] == "bf16"
        operator = HessianOperator.of(measured, parameters)
        if self.settings["method"] == "ggn":
            pairs = top_pairs(measured, parameters, tol=self.settings["tol"], count=bar.update)
            for name, pair in pairs.items():
                self._keep(run, name, pair, operator.loss)
            return
        guesses = self._gauss_newton_guesses(measured, parameters)
        solvers: dict[str, Solver] = {}
        for block in todo:
            guess = _combined(guesses.get(block.name), self.warm.get(block.name))
            if self.settings["method"] == "power":  # as in the paper: each run starts at random
                guess = None
            solvers[block.name] = new_solver(block, [] if guess is None else [guess], run, self.settings)
        for name, pair in self._refined(operator, solvers, bar) if coarse else solve(operator, solvers, bar.update):
            self._keep(run, name, pair, operator.loss)
            self.measured += 1
            left = self.settings["runs"] * len(self.blocks) - sum(len(found) for found in self.results)
            bar.total = bar.n + round(bar.n / self.measured * left)
        operator.release()

    def _refined(self, operator: HessianOperator, solvers: dict[str, Solver], bar: Any) -> list[tuple[str, Eigenpair]]:
        """Solve in bfloat16, then take one product of `operator` for each block."""
        rounded = HessianOperator.of(operator.measured, operator.blocks, autocast=torch.bfloat16)
        pairs = dict(solve(rounded, solvers, bar.update))
        rounded.release()
        bar.update(len(pairs))
        return list(refined(pairs, operator, tol=self.settings["tol"], bound=self.settings["bound"]).items())

    def _keep(self, run: int, name: str, pair: Eigenpair, loss: float) -> None:
        self.results[run][name] = pair, loss
        self.warm[name] = pair.vector.cpu()
        if self.saved is not None:
            self.saved.put(run, name, pair, loss)

    def _gauss_newton_guesses(
        self, measured: MeasuredLoss, parameters: Mapping[str, Sequence[Part]]
    ) -> dict[str, Tensor]:
        """Gauss-Newton directions of each block on a few samples; nothing where there are no logits."""
        if self.settings["method"] != "lanczos" or self.settings["confidence"] is not None:
            return {}
        try:
            few = _some_samples(measured.batches, _WARM_START_SAMPLES)
            return start_vectors(measured.over(few), parameters)
        except NoModelOutputError:
            return {}


def _combined(guess: Tensor | None, previous: Tensor | None) -> Tensor | None:
    """The Gauss-Newton `guess` [n], with the eigenvector of the run before added as far as the two agree.

    They do where subsets are large; small subsets have top directions of their own.
    """
    if guess is None or previous is None:
        return previous if guess is None else guess
    guess = guess / torch.linalg.vector_norm(guess).clamp(min=torch.finfo(guess.dtype).tiny)
    previous = previous.to(guess)
    return guess + torch.dot(guess, previous) * previous


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


def _some_samples(batches: Sequence[Batch], count: int) -> list[Batch]:
    """About `count` samples, spread evenly over `batches` (which are ordered by length)."""
    total = sum(batch_size(batch) for batch in batches)
    step = max(1, total // count)
    chosen: list[Batch] = []
    position = 0
    for batch in batches:
        size = batch_size(batch)
        rows = torch.arange(-position % step, size, step, device="cpu")
        position += size
        if len(rows):
            chosen.append(
                {
                    k: v[rows.to(v.device)] if isinstance(v, Tensor) and v.ndim > 0 and v.shape[0] == size else v
                    for k, v in batch.items()
                }
            )
    return chosen


METHODS = ("lanczos", "power", "ggn")
PRECISIONS = ("fp32", "bf16")
BASIS_VECTORS = 40
Solver = Lanczos | PowerIteration
_log = logging.getLogger(__name__)


def new_solver(block: ParameterBlock, warm: Sequence[Tensor], run: int, settings: Mapping[str, Any]) -> Solver:
    """The iteration for one block; its random vectors depend on seed, run and block name alone."""
    digest = hashlib.sha256(f"start/{settings['seed']}/{run}/{block.name}".encode()).digest()
    common: dict[str, Any] = {
        "tol": COARSE_TOL if settings["precision"] == "bf16" else settings["tol"],
        "max_products": settings["max_products"],
        "warm": warm,
        "generator": torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")),
        **vector_options(block.parameters),
    }
    if settings["method"] == "power":
        return PowerIteration(block.size, **common)
    certainty = {"bound": settings["bound"], "confidence": settings["confidence"]}
    return Lanczos(block.size, **certainty, **common)


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


COARSE_TOL = 1e-2  # residual that the rounding of bfloat16 lets an iteration reach


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
        value = float(torch.dot(pair.vector, products[name]))
        residual = float(torch.linalg.vector_norm(products[name] - value * pair.vector))
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
