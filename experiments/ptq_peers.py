r"""Other post-training quantizers on the rows and the model of `ptq_table.py`: weights alone, the rest in float.

>>> model, megabytes = quantized_by("HQQ, groups of 64 inputs", model, 4, batches)

Peers that are packages are used where they are installed; `missing` says which are not. GPTQ as published is here in
plain float64 (Frantar et al. 2023, algorithm 1; columns by activity, damping 1 %, groups whose ranges are those of the
given weights), since the packages that carry it quantize language models on GPUs: auto-gptq 0.7 (archived) was not
tried, and gptqmodel 7 asks for another torch than the library is tested with. It stands alone because nothing but the
table asks for peers.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qbert.bits import BitsConfig
from qbert.calibration import Batch, input_moments
from qbert.encoders.weights import weight_matrix
from qbert.sizes import model_size

_GROUP = 64
_QUANTO_GROUP = 128
_DAMPING = 0.01
_FLOAT_BYTES = 4
_GRID_BYTES = 2 * 2  # scale and zero point of a group in 16 bits, as these packages store them by default


def missing() -> dict[str, str]:
    """Peer -> package that it needs and that is not installed."""
    return {n: p for n, (_, p, _) in PEERS.items() if p and not _is_installed(p)}


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it is part of
        return False


def quantized_by(name: str, model: nn.Module, bits: int, batches: Sequence[Batch]) -> tuple[nn.Module, float]:
    """A float copy of `model` whose encoder matrices have the values that a peer gives them, and the file in MB.

    Args:
        name: one of `PEERS`.
        bits: one of its widths.
        batches: unlabelled rows, for peers that look at data.
    """
    copied = copy.deepcopy(model).eval()
    paths = BitsConfig(bits, embedding_bits=32).resolve(copied)
    matrices: list[nn.Linear] = [copied.get_submodule(path) for path in paths]  # type: ignore[misc]
    stored = PEERS[name][2](copied, matrices, bits, batches)
    floats = _FLOAT_BYTES * sum(m.weight.numel() for m in matrices)
    return copied, model_size(model).mb + (stored - floats) / 1e6


def _hqq(model: nn.Module, matrices: Sequence[nn.Linear], bits: int, batches: Sequence[Batch]) -> float:
    from hqq.core.quantize import Quantizer

    for matrix in matrices:
        weight = matrix.weight.detach()
        found = Quantizer.quantize(
            weight, nbits=bits, group_size=_GROUP, axis=1, device="cpu", compute_dtype=weight.dtype
        )
        matrix.weight.data = Quantizer.dequantize(*found).to(weight)
    return _grouped_bytes(matrices, bits, _GROUP)


def _quanto(model: nn.Module, matrices: Sequence[nn.Linear], bits: int, batches: Sequence[Batch]) -> float:
    from optimum.quanto import freeze, qint2, qint4, qint8, quantize

    kind = {2: qint2, 4: qint4, 8: qint8}[bits]
    for matrix in matrices:
        alone: Any = nn.Sequential(copy.deepcopy(matrix))
        quantize(alone, weights=kind)
        freeze(alone)
        matrix.weight.data = alone[0].weight.dequantize().detach().to(matrix.weight)
    return _grouped_bytes(matrices, bits, _QUANTO_GROUP)


def _grouped_bytes(matrices: Sequence[nn.Linear], bits: int, group: int) -> float:
    values = sum(m.weight.numel() for m in matrices)
    return values * bits / 8 + values / group * _GRID_BYTES


@torch.no_grad()
def _gptq(
    model: nn.Module, matrices: Sequence[nn.Linear], bits: int, batches: Sequence[Batch], group: int | None = None
) -> float:
    for modules, moment in input_moments(model, batches, matrices):
        for module in modules:
            weight = weight_matrix(module).detach()
            weight.copy_(gptq(weight, moment.value, bits, group))
    return sum(_grouped_bytes([m], bits, math.gcd(group or 0, m.weight.shape[1])) for m in matrices)


def gptq(weight: Tensor, moment: Tensor, bits: int, group: int | None = None) -> Tensor:
    """The values [O, I] float64 that GPTQ rounds a matrix to, on one min-max range a row, or a row and group of inputs.

    Args:
        weight: [O, I].
        moment: [I, I], E[x x^T] of the inputs.
        group: inputs that share a range, which is that of the given weights; None for all. Where it does not divide
            their number, its largest part that does.

    Source: Frantar et al. 2023, algorithm 1, with columns in the order of activity.
    """
    order = torch.argsort(moment.diagonal(), descending=True)
    left = weight.double()[:, order].clone()
    blocks = weight.double().unflatten(1, (-1, math.gcd(group or 0, weight.shape[1])))
    hessian = moment.double()[order][:, order]
    hessian = hessian + _DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    low, high = blocks.amin(2).clamp_max(0.0), blocks.amax(2).clamp_min(0.0)
    scales = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    zeros = (-low / scales).round()
    for j, column in enumerate(order.tolist()):
        scale, zero = (x[:, column // blocks.shape[2]] for x in (scales, zeros))
        code = (left[:, j] / scale + zero).round().clamp(0, 2**bits - 1)
        value = (code - zero) * scale
        error = (left[:, j] - value) / factor[j, j]
        left[:, j:] -= error.unsqueeze(1) * factor[j, j:]
        left[:, j] = value
    rounded = torch.empty_like(left)
    rounded[:, order] = left
    return rounded


Peer = tuple[tuple[int, ...], str, Callable[[nn.Module, Sequence[nn.Linear], int, Sequence[Batch]], float]]
# Name -> widths, package, how.
PEERS: dict[str, Peer] = {
    "GPTQ, a range a row": ((8, 4, 3, 2), "", _gptq),
    "GPTQ, groups of 64 inputs": ((4, 3, 2), "", partial(_gptq, group=_GROUP)),
    "HQQ, groups of 64 inputs": ((8, 4, 3, 2), "hqq", _hqq),
    "quanto, groups of 128 inputs": ((8, 4, 2), "optimum.quanto", _quanto),
}


def asked_peers(bits: Sequence[int]) -> Iterator[tuple[str, int]]:
    """(peer, width) of all widths out of `bits` that each peer has, width after width."""
    return ((name, b) for b in bits for name, (widths, _, _) in PEERS.items() if b in widths)
