"""Drive the eigenvalue iterations of several blocks through one Hessian operator.

>>> solvers = {block.name: new_solver(block, [], run, settings) for block in blocks}
>>> pairs = dict(solve(operator, solvers))
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qbert.arguments import whole_number
from qbert.hessian.blocks import ParameterBlock
from qbert.hessian.eigen import Eigenpair, PowerIteration
from qbert.hessian.krylov import Lanczos
from qbert.hessian.memory import free_bytes
from qbert.hessian.operator import HessianOperator
from qbert.hessian.parts import vector_options
from qbert.hessian.refine import COARSE_TOL

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
