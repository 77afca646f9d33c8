"""int8 matrix product on a CPU through torch's own operators: fbgemm first, oneDNN where fbgemm is not built in.

Both multiply unsigned 8-bit activations by signed 8-bit weights. Without the VNNI instructions they do it with
``vpmaddubsw``, which adds two neighbouring products a0 * w0 + a1 * w1 in 16 bits **and saturates at 32767**: with
a = 255 and w = 127 a sum that should be 4,129,024 comes out as 32,640. torch's own remedy is `reduce_range`, one bit
less for every activation. Here nothing is given away: a pair of weights of one sign cannot saturate while
|w0 + w1| <= 128 (255 * 128 = 32,640), which holds for all weights of 7 bits and fewer; `Int8Gemm` finds the pairs of
wider weights for which it does not, takes the excess out of the larger one, and adds the product with these few
excess values back, from a sparse matrix. The result is the exact integer sum on every CPU. Whether the CPU at hand
saturates is not looked up but tried, once (`saturates`).

The sparse product takes a quarter of the time of such a layer. Who would rather have that time may round the rows with
such pairs once more, on a grid just coarse enough that none can saturate (`fit_pairs`): then nothing is in excess.

    gemm = Int8Gemm(codes, scale, zero)           # int8 [O, I], float32 [O], int32 [O]
    y = gemm(x_unit, step)                        # sum_i round(x_unit[t, i] / step) (codes - zero) * step * scale
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor, nn

_PAIR_LIMIT = 128  # largest |w0 + w1| whose product with activations up to 255 stays below 2^15
_EXCESS_CHUNK = 128  # tokens whose sparse product is added at once where MKL is missing
ACTIVATION_ZERO = 128  # signed activation codes -127..127 travel as unsigned 1..255


class _FbgemmProduct(nn.Module):
    """x float32 [..., I] with int8 weights [O, I], each row with its scale and zero point: float32 [..., O]."""

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor) -> None:
        super().__init__()
        with warnings.catch_warnings():
            # Quantized tensors are announced as deprecated; without them `available_engine` finds another.
            warnings.simplefilter("ignore")
            weight = torch._make_per_channel_quantized_tensor(codes, scale.double(), zero.long(), 0)
        previous = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        try:
            self.weight = torch.ops.quantized.linear_prepack(weight, None)
        finally:
            torch.backends.quantized.engine = previous

    def forward(self, x: Tensor, step: float, zero: int) -> Tensor:
        if torch.jit.is_scripting():
            return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, step, zero, self.weight)
        # Otherwise the packed weight is asked for a __torch_function__ at every call, and says no by a C++ exception:
        # nine microseconds, more than a small product takes. The overload by name saves two more.
        with torch._C.DisableTorchFunctionSubclass():
            return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default(  # type: ignore[no-any-return]
                x, step, zero, self.weight
            )


class _OnednnProduct(nn.Module):
    """The same by oneDNN, with zero points of 0 only."""

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.weight = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)
        self.scale = scale
        self.no_zero = codes.new_zeros(codes.shape[0], dtype=torch.int32)

    def forward(self, x: Tensor, step: float, zero: int) -> Tensor:
        rows = x.flatten(0, -2)
        unsigned = (rows * (1.0 / step)).round_().add_(zero).clamp_(0, 255).to(torch.uint8)
        y = torch.ops.onednn.qlinear_pointwise.default(
            unsigned, step, zero, self.weight, self.scale, self.no_zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y.unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]


@functools.cache
def runs(engine: str) -> bool:
    """Whether this build of torch has the int8 operators of `engine`, and this CPU runs them; tried once."""
    # Nothing that is tried may depend on torch's default dtype and device, since the answer is remembered.
    codes = torch.ones(16, 16, dtype=torch.int8, device="cpu")
    ones = codes[0].float()
    try:
        got = Int8Gemm(codes, ones, codes.new_zeros(16, dtype=torch.int32), engine=engine)(codes[:2].float(), 1.0)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return bool((got == 16).all())


@functools.cache
def available_engine() -> str:
    """Which int8 operators this build of torch has and this CPU runs: "fbgemm", "onednn" or "none"; tried once."""
    return next(filter(runs, ("fbgemm", "onednn")), "none")


@functools.cache
def saturates(engine: str) -> bool:
    """True where `engine` adds products of neighbours in 16 bits on this CPU and so can saturate; tried once."""
    codes = torch.full((64, 256), 127, dtype=torch.int8, device="cpu")
    ones, none = torch.ones_like(codes[:, 0]).float(), codes.new_zeros(64, dtype=torch.int32)
    gemm = Int8Gemm(codes, ones, none, engine=engine, split_excess=False)
    return bool((gemm(codes[:32].float(), 1.0) != 127 * 127 * 256).any())


def split_excess(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Integer codes [O, I] as safe + excess (int8, int16): in `safe` no pair of neighbours can saturate a 16-bit sum.

    Pairs are columns (0, 1), (2, 3), ... A pair of opposite signs cannot saturate: its products never add up.
    Codes may exceed int8; what does not fit is excess too.
    """
    wide = codes.to(torch.int16)
    safe = torch.nn.functional.pad(wide.clamp(-128, 127), (0, wide.shape[1] % 2))
    pairs = safe.reshape(codes.shape[0], -1, 2)
    same_sign = (pairs[..., 0] >= 0) == (pairs[..., 1] >= 0)
    total = pairs.sum(dim=2, dtype=torch.int16)
    over = torch.where(same_sign, total - total.clamp(-_PAIR_LIMIT, _PAIR_LIMIT), torch.zeros_like(total))
    larger = pairs.abs().argmax(dim=2, keepdim=True)
    safe = pairs.scatter_add(2, larger, -over[..., None]).reshape(safe.shape)[:, : codes.shape[1]]
    return safe.to(torch.int8), wide - safe


def fit_pairs(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Integer codes [O, I] rounded again where a pair could saturate: codes int8 [O, I] and a factor float32 [O].

    New codes are about factor * codes. The factor is 1 for rows that are left alone, and otherwise what brings the
    largest pair of the row (columns 0 and 1, 2 and 3, ...) to the limit, 0.5 at worst for codes of 8 bits.
    """
    wide = codes.float()
    pairs = torch.nn.functional.pad(wide, (0, wide.shape[1] % 2)).unflatten(1, (-1, 2))
    total = torch.where(pairs[..., 0] * pairs[..., 1] > 0, pairs.sum(dim=2).abs(), 0.0).amax(dim=1)
    # One less than the limit, because both codes of a pair may be rounded up.
    factor = torch.minimum((_PAIR_LIMIT - 1) / total, 127 / wide.abs().amax(dim=1))
    factor = torch.where((total <= _PAIR_LIMIT) & (wide.abs().amax(dim=1) < 128), 1.0, factor)
    return (wide * factor[:, None]).round().to(torch.int8), factor


class Int8Gemm(nn.Module):
    """y[t, o] = step * scale[o] * sum_i round(x[t, i] / step) * (codes[o, i] - zero[o]), the sum in exact integers.

    codes int8 [O, I] (int16 where excess is split off), scale float32 [O], zero int32 [O] (all zero unless the engine
    is fbgemm, see `takes_zero`). x is float32 [T, I] with |x / step| <= 127, or 0 to 255 after adding `offset`.
    A module so that TorchScript can compile what calls it (with fbgemm); it holds no parameters.
    """

    def __init__(
        self, codes: Tensor, scale: Tensor, zero: Tensor, *, engine: str | None = None, split_excess: bool | None = None
    ) -> None:
        super().__init__()
        self.engine = available_engine() if engine is None else engine
        if self.engine not in ("fbgemm", "onednn"):
            raise RuntimeError("this build of torch has no int8 matrix product for this CPU.")
        if not takes_zero(self.engine) and bool((zero != 0).any()):
            raise ValueError("oneDNN takes symmetric weights only: fold the zero points into the codes.")
        excess = None
        if split_excess is None:
            split_excess = int(codes.to(torch.int16).abs().max()) > _PAIR_LIMIT // 2 and saturates(self.engine)
        if split_excess:
            codes, rest = _split(codes)
            if bool((rest != 0).any()):
                excess = _sparse(rest.float() * scale[:, None])
        self.excess = excess
        # MKL adds to the product where it lies, other libraries make a transposed one.
        self.adds_in_place = excess is not None and excess.layout == torch.sparse_csc
        self.product = _FbgemmProduct(codes, scale, zero) if self.engine == "fbgemm" else _OnednnProduct(codes, scale)

    @property
    def has_excess(self) -> bool:
        """Whether a sparse product is added; x must then be finite."""
        return self.excess is not None

    def forward(self, x: Tensor, step: float, offset: int = ACTIVATION_ZERO, rounded: bool = False) -> Tensor:
        """x float32 [..., I] to float32 [..., O]; `offset` is the unsigned code of 0, 128 for symmetric activations.

        `rounded` says that x holds whole multiples of `step` within range already.
        """
        y = self.product(x, step, offset)
        if self.excess is not None:
            codes = x if rounded and step == 1.0 else (x * (1.0 / step)).round_().clamp_(-offset, 255 - offset)
            _add_excess(self.excess, y.flatten(0, -2), codes.flatten(0, -2), step, self.adds_in_place)
        return y  # type: ignore[no-any-return]


def takes_zero(engine: str) -> bool:
    """Whether `engine` subtracts a zero point per weight row by itself, at no cost."""
    return engine == "fbgemm"


def _add_excess(
    excess: Tensor, y: Tensor, codes: Tensor, step: float, in_place: bool, chunk: int = _EXCESS_CHUNK
) -> None:
    """y += step * codes excess, in place; y [T, O], codes [T, I], excess sparse as `_sparse` lays it out."""
    if in_place:
        torch.addmm(y, codes, excess, alpha=step, out=y)
        return
    # A few tokens at a time, so that the transposed copies stay in the cache.
    for start in range(0, len(codes), chunk):
        product = torch.mm(excess, codes[start : start + chunk].T.contiguous())
        y[start : start + chunk].add_(product.T, alpha=step)


_split = split_excess


def _sparse(matrix: Tensor) -> Tensor:
    """[O, I] as what is fast to multiply from the right: MKL adds to y [T, O] where it lies, others want y^T."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR tensors a beta feature
        return matrix.T.to_sparse_csc() if torch.backends.mkl.is_available() else matrix.to_sparse_csr()
