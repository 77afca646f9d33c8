"""Operators that may add to a tensor of the caller, as pairs of torch operators; alone here because two rooms use it.

An optional argument that is written to cannot be an argument of one operator: the dispatcher drops trailing arguments
that equal their defaults, and torch 2.6 to 2.11 then look for it in vain (IndexError; pytorch issue 176078). So
`qbert::name` does not have it, and `qbert::name_summed` has it as its first.

    matmul_a8 = summing("matmul_a8", _matmul_a8, _matmul_a8_fake)
    y = matmul_a8(xq, x_scale, None, packed, scale, bits=4, out_row_sum=None)     # either operator, as called for
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Tensor]


def summing(name: str, function: Function, fake: Function) -> Function:
    """Registers `qbert::name` and `qbert::name_summed`; returns a function that calls one of them.

    `function` and its shape function `fake` take `out_row_sum: Tensor | None = None`, int32 [T], by keyword.
    """
    schema = torch.library.infer_schema(function, mutates_args=())
    # Where it is the only one, the asterisk before it goes too.
    plain_schema = re.sub(r", \*, Tensor\? out_row_sum=None(?=\))|Tensor\? out_row_sum=None, ", "", schema)
    summed_schema = plain_schema.replace("(", "(Tensor(a0!) out_row_sum, ", 1)

    def adding(of: Function) -> Function:
        return lambda out_row_sum, *inputs, **options: of(*inputs, out_row_sum=out_row_sum, **options)

    define = torch.library.custom_op
    plain = define(f"qbert::{name}", function, mutates_args=(), schema=plain_schema)
    plain.register_fake(fake)
    summed = define(f"qbert::{name}_summed", adding(function), mutates_args=("out_row_sum",), schema=summed_schema)
    summed.register_fake(adding(fake))

    def call(*inputs: Any, out_row_sum: Tensor | None = None, **options: Any) -> Tensor:
        return plain(*inputs, **options) if out_row_sum is None else summed(out_row_sum, *inputs, **options)

    return call
