"""The kernels as torch operators `torch.ops.qbert.*`: one call, the right implementation for the tensor's device.

    CPU               int8 products of torch's own (`cpu`)
    CUDA, sm_80 on    Triton kernels (`gpu/`)
    anything else     plain torch on dequantized weights

Each operator has a fake implementation, so torch.compile(fullgraph=True) and torch.export pass through it, and checks
its arguments before any work. `linear` and `embedding` take weights as they are stored, and prepare what their kernel
wants at the first call (`prepared`); single kernels, for fused encoder layers, are in `operators`.

    y = linear(x, packed, scale, zero, row_group, bias, bits=4)          # x [..., I] -> [..., O]
    h = embedding(ids, packed, scale, zero, row_group, bits=8, features=384)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.kernels import cpu, formats, reference
from qbert.kernels.checks import check_embedding, check_linear, check_range
from qbert.kernels.prepared import PreparedCache

_cache = PreparedCache()


def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    row_group: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    activation_bits: int | None = 8,
    activation_scale: float | None = None,
    activation_zero: int = 0,
    asymmetric: bool = False,
) -> Tensor:
    """y [..., O] = x W^T + bias in the dtype of x, W [O, I] packed in `bits` bits, x [..., I] quantized to int8 or not.

    packed uint8 [O, row bytes] (`formats.pack`); scale, zero [G, K]; row_group [O] (None: G = O or 1); bias [O].
    `activation_bits` 8: per token, symmetrically, with `asymmetric` from its smallest to its largest value, or with
    the static `activation_scale` and `activation_zero` (-128..127); None: x as it is. Raises TypeError or ValueError,
    before any work, for dtypes, shapes, devices and settings that do not fit.
    """
    static = 0.0 if activation_scale is None else activation_scale
    return torch.ops.qbert.linear(
        x,
        packed,
        scale,
        zero,
        row_group,
        bias,
        bits,
        0 if activation_bits is None else activation_bits,
        static,
        activation_zero,
        asymmetric,
    )


def embedding(
    ids: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    row_group: Tensor | None = None,
    *,
    bits: int,
    features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dequantized rows `ids` [...] of a packed table, [..., features] in `dtype`; only these rows are unpacked.

    packed uint8 [V, row bytes]; scale, zero [G, K]; row_group [V]. On a CPU an id outside the table raises IndexError;
    on a GPU it must not occur, as for torch's own embedding.
    """
    return torch.ops.qbert.embedding(ids, packed, scale, zero, row_group, bits, features, dtype)


def implementation(device: torch.device) -> str:
    """Which implementation `linear` and `embedding` use on `device`: "cpu", "triton" or "dense"."""
    if device.type == "cpu":
        return "cpu"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0):
        try:
            import triton  # noqa: F401
        except ImportError:
            return "dense"
        return "triton"
    return "dense"


@torch.library.custom_op("qbert::linear", mutates_args=())
def _linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    row_group: Tensor | None,
    bias: Tensor | None,
    bits: int,
    activation_bits: int,
    activation_scale: float,
    activation_zero: int,
    asymmetric: bool = False,
) -> Tensor:
    check_linear(x, packed, scale, zero, row_group, bias, bits, activation_bits)
    check_range(activation_bits, activation_scale, activation_zero, asymmetric)
    tensors = (packed, scale, zero, row_group, bias)
    how = implementation(x.device)
    activation = (activation_bits, activation_scale, activation_zero, asymmetric)
    settings = (how, bits, x.shape[-1], *activation)
    if how == "cpu":
        prepared = _cache.get(
            tensors,
            settings,
            lambda: cpu.CpuLinear.from_packed(
                packed,
                x.shape[-1],
                scale,
                zero,
                row_group,
                bias,
                bits,
                activation_bits=activation_bits or None,
                activation_scale=activation_scale or None,
                activation_zero=activation_zero,
                asymmetric=asymmetric,
            ),
        )
        return prepared.forward(x)
    if how == "triton":
        from qbert.kernels.gpu.linear import GpuLinear

        gpu = _cache.get(
            tensors, settings, lambda: GpuLinear(packed, x.shape[-1], scale, zero, row_group, bias, bits, *activation)
        )
        return gpu.forward(x, packed)
    return _dense_linear(x, packed, scale, zero, row_group, bias, bits, activation)


def _dense_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    row_group: Tensor | None,
    bias: Tensor | None,
    bits: int,
    activation: tuple[int, float, int, bool],
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    spread = (reference.expand_groups(t.float(), row_group, packed.shape[0]) for t in (scale, zero))
    weight = reference.dequantize(formats.unpack(packed, bits, x.shape[-1]), *spread).to(x.dtype)
    if activation[0]:
        rows = reference.fake_quantize(rows, *activation[1:])
    y = torch.nn.functional.linear(rows, weight, None if bias is None else bias.to(x.dtype))
    return y.reshape(*x.shape[:-1], packed.shape[0])


@_linear.register_fake
def _(  # type: ignore[no-untyped-def]
    x, packed, scale, zero, row_group, bias, bits, activation_bits, activation_scale, activation_zero, asymmetric=False
):
    check_linear(x, packed, scale, zero, row_group, bias, bits, activation_bits)
    check_range(activation_bits, activation_scale, activation_zero, asymmetric)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@torch.library.custom_op("qbert::embedding", mutates_args=())
def _embedding(
    ids: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    row_group: Tensor | None,
    bits: int,
    features: int,
    dtype: torch.dtype,
) -> Tensor:
    check_embedding(ids, packed, scale, zero, row_group, bits, features)
    if implementation(packed.device) == "triton":
        from qbert.kernels.gpu.embedding import Table, embedding

        table = Table.of(packed, scale, zero, row_group, bits, features)
        return embedding(ids.reshape(-1).contiguous(), table, dtype).reshape(*ids.shape, features)
    rows = cpu.embedding(ids, packed, scale.float(), zero.float(), row_group, bits=bits, features=features)
    return rows.to(dtype)


@_embedding.register_fake
def _(ids, packed, scale, zero, row_group, bits, features, dtype):  # type: ignore[no-untyped-def]
    check_embedding(ids, packed, scale, zero, row_group, bits, features)
    return packed.new_empty((*ids.shape, features), dtype=dtype)
