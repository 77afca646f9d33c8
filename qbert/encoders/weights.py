"""Which float modules hold weights that can be quantized, and each weight as a matrix [rows, columns].

Rows are output neurons (of a table: entries), columns what one of them is computed from. `nn.Conv1d` [O, I/g, K] is a
matrix over windows [O, I/g * K]; transformers' `Conv1D`, which stores [I, O], is transposed; the gate matrices of
`nn.LSTM` and `nn.GRU` are linear maps of their own, under the names of their parameters.

    >>> weight_matrix(nn.Conv1d(8, 6, kernel_size=3)).shape
    torch.Size([6, 24])
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import Tensor, nn

MATRIX_CLASSES: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d)
RECURRENT_CLASSES: tuple[type[nn.Module], ...] = (nn.LSTM, nn.GRU)


def is_table(module: nn.Module) -> bool:
    """Whether `module` is a plain lookup table [V, D] (subclasses may compute anything)."""
    return type(module) is nn.Embedding


def is_matrix(module: nn.Module) -> bool:
    """Whether `module` is a plain linear map over its last axis, or over windows of a sequence."""
    if type(module) is nn.Conv1d:
        return module.padding_mode == "zeros"
    return type(module) in MATRIX_CLASSES or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D`, a linear map whose weight is stored as [I, O]."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and type(module) is pytorch_utils.Conv1D


def is_recurrent(module: nn.Module) -> bool:
    """Whether `module` is a plain `nn.LSTM` or `nn.GRU` without a projection of its output."""
    return isinstance(module, nn.RNNBase) and type(module) in RECURRENT_CLASSES and module.proj_size == 0


def weight_matrix(module: nn.Module) -> Tensor:
    """The weight of a matrix or table as [rows, columns]: a view, whatever layout `module` stores it in."""
    return as_matrix(module, module.weight)  # type: ignore[arg-type]


def matrix_size(module: nn.Module) -> int:
    """Number of weights of the matrices of one module, trainable and packed twins included; 0 for any other."""
    if isinstance(module, (*MATRIX_CLASSES, *RECURRENT_CLASSES)) or is_transposed(module):
        return sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
    if getattr(module, "is_trainable_matrix", False):
        return module.weight.numel()  # type: ignore[operator, return-value, union-attr]
    if getattr(module, "is_packed_matrix", False):
        return module.rows * module.columns  # type: ignore[operator, return-value]
    return 0


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """`weight`, laid out as that of `module`, as a matrix [rows, columns] (a view)."""
    if is_transposed(module):
        return weight.t()
    return weight.flatten(1)


def stored(module: nn.Module, matrix: Tensor) -> Tensor:
    """A matrix [rows, columns] in the layout in which `module` stores its weight: the inverse of `as_matrix`."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return matrix.t() if is_transposed(module) else matrix.reshape(weight.shape)


def gate_matrices(recurrent: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(name of the parameter, linear map that shares it and its bias) of every gate matrix of an LSTM or GRU.

    ``weight_ih_l0`` maps inputs [I] and ``weight_hh_l0`` the last state [H] to all gates [4H] or [3H].
    """
    for name, weight in list(recurrent.named_parameters(recurse=False)):
        if not name.startswith("weight_"):
            continue
        rows, columns = weight.shape
        linear = nn.Linear(columns, rows, bias=recurrent.bias is True, device="meta")
        linear.weight = weight
        if linear.bias is not None:
            linear.bias = getattr(recurrent, name.replace("weight_", "bias_", 1))
        yield name, linear.train(recurrent.training)
