"""Every kernel on the chip against its slow twin: cases that print their worst error, and what exceeds its bound.

python experiments/bench/gpu_checks.py [CASE ...]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from gpu_machine import DEVICE, MODE, brief, in_processes, left, say, stand_in, variable
from torch import Tensor

from qbert.kernels import dispatch, formats, operators, reference
from qbert.kernels.gpu import tiles as tile_table
from qbert.kernels.gpu.products.matmul_a8 import matmul_a8
from qbert.kernels.gpu.tiles import Tile, rule
from qbert.kernels.operands import FLOAT, E4m3Weight, Heads, InputGrid, PackedWeight, ProductWeight

SMALL = MODE == "dry"
FLOAT_BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
E4M3 = torch.float8_e4m3fn
# Tensor cores of sm_90 add products of eight-bit floats, 32 columns a step, to sums of which they keep 13 bits behind
# the first (arXiv 2412.19437, section 3.3.2): a result is off by up to that much of the sum of its terms' magnitudes at
# every step. Where terms cancel, or GELU makes them small, that is many steps between e4m3 codes.
E4M3_STEP, E4M3_COLUMNS = 2.0**-13, 32
SOFTMAX = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # the rounding of a weight to the dtype of the values
DEPENDENT = [("static", "int8"), ("dynamic", "int8"), ("static", "e4m3")]
ROUNDED = 2e-3  # codes that may be off by one: float32 sums beside float64 ones, at the middle between two codes


class Tally:
    """Counts comparisons and failures of one case, and keeps the worst error."""

    def __init__(self, name: str) -> None:
        self.name, self.count, self.failures, self.worst, self.at = name, 0, 0, 0.0, ""

    def note(self, what: str, error: float, bound: float) -> None:
        """One comparison."""
        self.count += 1
        if not error <= bound:
            self.failures += 1
            if self.failures <= 5:
                say(f"  FAIL {self.name}: {what}: error {error:.3g}, bound {bound:.3g}")
        if not error <= self.worst:
            self.worst, self.at = error, what

    def broke(self, what: str, error: Exception) -> None:
        """A comparison that could not be made."""
        self.count += 1
        self.failures += 1
        if self.failures <= 5:
            say(f"  FAIL {self.name}: {what}: {brief(error)}")

    def end(self) -> int:
        """Prints the case's line; the number of failures."""
        verdict = "ok  " if not self.failures else f"{self.failures} FAILED of"
        worst = f"worst error {self.worst:.3g} at {self.at}" if self.worst else "all equal"
        say(f"{verdict} {self.name}: {self.count} comparisons, {worst}")
        return min(self.failures, 98)


@contextmanager
def twins() -> Iterator[None]:
    """Inside, operators run their slow twins, on whatever device."""
    kept = dispatch.implementation
    dispatch.implementation = lambda device: "dense"
    try:
        yield
    finally:
        dispatch.implementation = kept


def compare(
    tally: Tally,
    what: str,
    operator: Callable[..., Any],
    *inputs: Any,
    codes_off: float = ROUNDED,
    off_by: Tensor | None = None,
    **options: Any,
) -> None:
    """An operator's results beside its twin's: floats relative to the largest, codes by how many differ.

    One code and the share `codes_off` of all may be off by one step. `off_by` says how far every result may be from
    the exact one before it is rounded, in the units of the result; what exceeds the rounding is then judged as a share
    of that. An `out_row_sum` among the options must equal the sums of the very codes that were returned.
    """
    try:
        given = dict(options)
        if "out_row_sum" in options:
            given["out_row_sum"] = torch.zeros_like(options["out_row_sum"])
        got = operator(*inputs, **given)
        got = got if isinstance(got, tuple) else (got,)
        if MODE == "compile":
            return
        with twins():
            expected = operator(*inputs, **options)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for index, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
            name = f"{what}, result {index}" if len(got) > 1 else what
            if off_by is not None and ours.dtype != torch.int32:
                tally.note(f"{name}, share of the allowed", beyond_rounding(ours, theirs, off_by), 1)
            elif ours.dtype in (torch.int8, E4M3):
                steps, share = difference(ours, theirs)
                tally.note(f"{name}, steps between codes", steps, 1)
                tally.note(f"{name}, share of codes off", share, codes_off + 1.5 / max(1, ours.numel()))
            elif ours.dtype == torch.int32:
                # Row sums follow from codes that may be off by one here and there.
                codes = next((t for t in got if t.dtype in (torch.int8, E4M3)), None)
                wanted = theirs if codes is None else sums_of(codes)
                tally.note(f"{name}, sums", float((ours - wanted).abs().max()) if len(ours) else 0.0, 0)
            else:
                a, b = ours.double(), theirs.double()
                error = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) if b.numel() else 0.0
                tally.note(name, error, FLOAT_BOUND[ours.dtype])
        if "out_row_sum" in options:
            wanted = sums_of(got[0])
            tally.note(f"{what}, out_row_sum", float((given["out_row_sum"] - wanted).abs().max()), 0)
    except Exception as error:
        if "illegal" in str(error) or "CUDA error" in str(error):
            raise  # nothing runs in this process any more
        tally.broke(what, error)


def beyond_rounding(ours: Tensor, theirs: Tensor, off_by: Tensor) -> float:
    """How far results are apart beyond the rounding of both, the most as a share of `off_by`, of their shape."""
    if not ours.numel():
        return 0.0
    a, b = ours.double(), theirs.double()
    if ours.dtype == torch.int8:
        step: float | Tensor = 1.0
    else:
        smallest, digits = {E4M3: (-6, 3), torch.float16: (-14, 10), torch.bfloat16: (-126, 7)}.get(
            ours.dtype, (-126, 23)
        )
        exponent = torch.frexp(torch.maximum(a.abs(), b.abs())).exponent - 1
        step = torch.ldexp(torch.ones_like(a), exponent.clamp(min=smallest) - digits)
    return float((((a - b).abs() - step).clamp(min=0) / off_by.double().clamp(min=1e-30)).max())


def difference(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """(the most steps between two codes of one place, share of the places that differ), int8 or e4m3."""
    if not ours.numel():
        return 0.0, 0.0
    if ours.dtype == E4M3:  # in order of their values: the sign bit, then a number that grows with the magnitude
        ours, theirs = (_ordered(t.view(torch.int8)) for t in (ours, theirs))
    steps = (ours.int() - theirs.int()).abs()
    return float(steps.max()), float((steps > 0).double().mean())


def _ordered(bits: Tensor) -> Tensor:
    magnitude = bits.int() & 127
    return torch.where(bits < 0, -magnitude, magnitude)


def sums_of(codes: Tensor) -> Tensor:
    """Sums int32 [T] of the codes of every token, as the kernels count them."""
    return reference.code_sum(codes)


def weight(rows: int, columns: int, bits: int) -> tuple[Tensor, Tensor]:
    """(codes int8 [rows, columns], packed), random."""
    low, high = formats.code_range(bits)
    codes = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8)
    return codes.to(DEVICE), formats.pack(codes, bits).to(DEVICE)


def normal(*shape: int) -> Tensor:
    """Standard normal, with rows of different size, as activations have."""
    return torch.randn(*shape, device=DEVICE) * torch.rand(shape[0], *[1] * (len(shape) - 1), device=DEVICE).add(0.1)


def integers(bits: int, rows: int, columns: int) -> int:
    """Integer products, exact, with the tiles of the rule and those that were measured."""
    tally = Tally(f"int8 product W{bits} {rows}x{columns}")
    codes, packed = weight(rows, columns, bits)
    one = torch.ones(1, device=DEVICE)
    for tokens in (1, 17) if SMALL else (1, 17, 128, 200, 512, 4096):
        xq = torch.randint(-128, 128, (tokens, columns), dtype=torch.int8, device=DEVICE)
        chosen = [rule(tokens, rows, columns, bits)]
        name = torch.cuda.get_device_name()
        chosen.append(tile_table.choose_tile("matmul_a8", tokens, rows, columns, bits, name))
        expected = None if MODE == "compile" else xq.double() @ codes.double().T
        for tile in dict.fromkeys(chosen):
            try:
                y = matmul_a8(xq, one, ProductWeight([packed], [bits], one), out_dtype=torch.int32, tile=tile)
                if expected is not None and MODE == "gpu":
                    tally.note(f"{tokens} tokens {short(tile)}", float((y.double() - expected).abs().max()), 0)
            except Exception as error:
                if "illegal" in str(error):
                    raise
                if "out of resource" not in str(error):
                    tally.broke(f"{tokens} tokens {short(tile)}", error)
    return tally.end()


def short(tile: Tile) -> str:
    """A tile in a few characters."""
    return f"{tile.bm}x{tile.bn}x{tile.bk}/{tile.split} w{tile.warps} s{tile.stages}"


def activations(tokens: int, columns: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and row sums; `kind` is "token", "one" or "asymmetric"."""
    x = normal(tokens, columns)
    with twins():
        if kind == "one":
            codes, _, sums = operators.quantize_rows(x, InputGrid(0.02, 3))
            return codes, torch.full((1,), 0.02, device=DEVICE), sums
        return operators.quantize_rows(x, InputGrid(asymmetric=kind == "asymmetric"))


def epilogues(bits: int, rows: int, columns: int) -> int:
    """Everything that follows a product: scales, zeros, bias, GELU, residual, every output."""
    tally = Tally(f"epilogues W{bits} {rows}x{columns}")
    _, packed = weight(rows, columns, bits)
    scale, bias = torch.rand(rows, device=DEVICE) * 0.01 + 0.005, torch.randn(rows, device=DEVICE)
    zeros = {
        "none": None,
        "int": torch.randint(-3, 3, (rows,), device=DEVICE, dtype=torch.int32) << (8 - bits),
        "float": torch.randn(rows, device=DEVICE),
    }
    weight_sum = torch.randn(rows, device=DEVICE)
    given: Any
    for tokens in (5,) if SMALL else (33, 512, 4096):
        residual = normal(tokens, rows).half()
        for kind, zero, options in (
            ("one", "none", {"residual": residual}),
            ("one", "int", {"residual": residual}),
            ("token", "int", {"bias": bias, "residual": residual}),
            ("token", "float", {"bias": bias, "gelu": True}),
            ("token", "none", {"bias": bias, "out_dtype": torch.bfloat16}),
            ("asymmetric", "int", {"bias": bias, "gelu": True, "out_dtype": torch.float32}),
            ("token", "int", {"bias": bias, "gelu": True, "out": InputGrid(0.05, -60)}),
            ("one", "none", {"bias": bias, "gelu": True, "out": InputGrid(0.05)}),
        ):
            given = dict(options)
            if "out" in given:
                given["out_row_sum"] = torch.zeros(tokens, dtype=torch.int32, device=DEVICE)
            sums = weight_sum if kind == "asymmetric" else None
            whole = ProductWeight([packed], [bits], scale, zeros[zero], given.pop("bias", None), sums)
            what = f"{tokens} tokens, x {kind}, zero {zero}, {', '.join(options)}"
            inputs = activations(tokens, columns, kind)
            compare(tally, what, operators.matmul_a8, *inputs, whole, **given)
    return tally.end()


def eight_bit_floats(bits: int, rows: int, columns: int) -> int:
    """e4m3 activations: products, epilogues, and query, key and value."""
    tally = Tally(f"e4m3 product W{bits} {rows}x{columns}")
    weights, packed = weight(rows, columns, bits)
    scale, bias = torch.rand(rows, device=DEVICE) * 0.01 + 0.005, torch.randn(rows, device=DEVICE)
    zero = torch.randint(-3, 3, (rows,), device=DEVICE).float()
    x: Any
    options: Any
    for tokens in (5,) if SMALL else (33, 512, 4096) if columns % 256 == 0 else (33,):
        residual = normal(tokens, rows).half()
        with twins():
            per_token = operators.quantize_rows(normal(tokens, columns), InputGrid(codes_dtype=E4M3))
            codes, _, sums = operators.quantize_rows(normal(tokens, columns), InputGrid(0.01, codes_dtype=E4M3))
        static = (codes, torch.full((1,), 0.01, device=DEVICE), sums)
        for x, zeros, options in (
            (per_token, None, {}),
            (per_token, zero, {"bias": bias, "residual": residual}),
            (static, None, {"residual": residual, "out_dtype": torch.float32}),
            (static, zero, {"bias": bias, "gelu": True}),
            (static, zero, {"bias": bias, "gelu": True, "out": InputGrid(0.02, codes_dtype=E4M3)}),
            (static, None, {"bias": bias, "gelu": True, "out": InputGrid(0.02, codes_dtype=E4M3)}),
            (per_token, zero, {"bias": bias, "out": InputGrid(0.2)}),
        ):
            given = dict(options)
            if "out" in given:
                given["out_row_sum"] = torch.zeros(tokens, dtype=torch.int32, device=DEVICE)
            kind = "one" if x is static else "token"
            what = f"{tokens} tokens, x {kind}, zero {zeros is not None}, {', '.join(options)}"
            # GELU is nowhere steeper than 1.13.
            off_by = e4m3_error(x, weights, scale, zeros) * 1.13 / (given["out"].scale if "out" in given else 1.0)
            whole = ProductWeight([packed], [bits], scale, zeros, given.pop("bias", None))
            compare(tally, what, operators.matmul_a8, *x, whole, off_by=off_by, **given)
        three = ProductWeight([packed] * 3, [bits] * 3, scale.repeat(3), None, bias.repeat(3))
        for kind, x in (("one", static), ("token", per_token)):
            off_by = e4m3_error(x, weights, scale, None).repeat(1, 3)
            what = f"{tokens} tokens, x {kind}, query, key and value"
            compare(tally, what, operators.matmul_a8_mixed, *x, three, off_by=off_by)
    return tally.end()


def by_cublas() -> int:
    """e4m3 weights and activations multiplied by cuBLASLt."""
    tally = Tally("e4m3 product by cuBLASLt")
    for rows, columns in ((32, 64),) if SMALL else ((2304, 768), (768, 3072), (3072, 768), (1152, 384), (320, 1200)):
        weights = (torch.randint(-15, 16, (rows, columns), device=DEVICE) / 2).to(E4M3)
        scale, bias = torch.rand(rows, device=DEVICE) * 0.01 + 0.005, torch.randn(rows, device=DEVICE)
        for tokens in (5,) if SMALL else (1, 33, 1024, 4096):
            with twins():
                x = operators.quantize_rows(normal(tokens, columns), InputGrid(codes_dtype=E4M3))
            off_by = e4m3_error(x, weights, scale, None)
            for dtype in (torch.float16, torch.bfloat16):
                for x_scale, added in ((x[1], bias.to(dtype)), (None, None)):
                    what = (
                        f"{rows}x{columns}, {tokens} tokens, {dtype}, {'static' if x_scale is None else 'token, bias'}"
                    )
                    allowed = off_by / x[1][:, None].clamp(min=1e-30) if x_scale is None else off_by
                    whole = E4m3Weight(weights, scale, added)
                    compare(tally, what, operators.matmul_e4m3, x[0], x_scale, whole, dtype, off_by=allowed)
                    if MODE != "compile":  # all results together, since the bound of each one is wide
                        inputs = (x[0], x_scale, whole, dtype)
                        ours = operators.matmul_e4m3(*inputs).double()
                        with twins():
                            theirs = operators.matmul_e4m3(*inputs).double()
                        bound = FLOAT_BOUND[dtype] + 2e-3
                        tally.note(f"{what}, norm", float((ours - theirs).norm() / theirs.norm()), bound)
    return tally.end()


def e4m3_error(x: tuple[Tensor, ...], weights: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """How far a product on sm_90 may be off, float64 [T, O]; x: e4m3 codes [T, I], scales, sums; weights [O, I]."""
    if MODE == "compile":
        return scale  # nothing is compared
    codes, x_scale, row_sum = x
    terms = codes.double().abs() @ weights.double().abs().T
    if zero is not None:
        terms += row_sum.double().abs()[:, None] / reference.E4M3_UNITS * zero.double().abs()
    steps = -(-weights.shape[1] // E4M3_COLUMNS)
    return terms * scale.double() * x_scale.double()[:, None] * steps * E4M3_STEP


def mixed() -> int:
    """Query, key and value in one launch."""
    tally = Tally("query, key and value in one launch")
    rows = columns = 256 if SMALL else 768
    for bits in ([8, 8, 8], [4, 4, 4], [2, 2, 2], [2, 3, 4], [8, 4, 8]):
        packed = [weight(rows, columns, b)[1] for b in bits]
        scale, bias = torch.rand(3 * rows, device=DEVICE) * 0.01, torch.randn(3 * rows, device=DEVICE)
        unit = torch.tensor([1 << (8 - b) for b in bits], device=DEVICE).repeat_interleave(rows)
        zero = (torch.randint(-3, 3, (3 * rows,), device=DEVICE) * unit).int()
        for tokens in (5,) if SMALL else (33, 4096):
            for kind, given in (("token", None), ("one", zero), ("token", zero)):
                what = f"bits {bits}, {tokens} tokens, x {kind}, zero {'none' if given is None else 'int'}"
                inputs = activations(tokens, columns, kind)
                three = ProductWeight(packed, bits, scale, given, bias)
                compare(tally, what, operators.matmul_a8_mixed, *inputs, three)
    return tally.end()


def floats(bits: int) -> int:
    """fp16 activations, few tokens."""
    tally = Tally(f"fp16 product W{bits}")
    for rows, columns in ((24, 256),) if SMALL else ((768, 768), (312, 1200)):
        _, packed = weight(rows, columns, bits)
        scale, bias = torch.rand(rows, device=DEVICE) * 0.01, torch.randn(rows, device=DEVICE)
        zero = torch.randn(rows, device=DEVICE)
        for tokens in (1, 16) if SMALL else (1, 33, 64):
            for dtype in (torch.float16, torch.bfloat16):
                x = normal(tokens, columns).to(dtype)
                what = f"{rows}x{columns}, {tokens} tokens, {dtype}"
                compare(tally, what, operators.matmul_a16, x, ProductWeight([packed], [bits], scale, zero, bias))
    return tally.end()


def rows(dtypes: Sequence[torch.dtype], shapes: Sequence[tuple[int, int]]) -> int:
    """Row quantization, and LayerNorm with it."""
    tally = Tally(f"row kernels, {', '.join(str(d)[6:] for d in dtypes)}")
    for tokens, width in [(3, 96)] if SMALL else shapes:
        weight_, bias = torch.randn(width, device=DEVICE), torch.randn(width, device=DEVICE)
        for dtype in dtypes:
            x, residual = normal(tokens, width).to(dtype), normal(tokens, width).to(dtype)
            norm = (weight_.to(dtype), bias.to(dtype), 1e-12)
            grids = (InputGrid(), InputGrid(asymmetric=True), InputGrid(0.03, -11))
            for grid in (*grids, InputGrid(codes_dtype=E4M3), InputGrid(0.01, codes_dtype=E4M3)):
                what = f"{tokens}x{width} {dtype} {grid}"
                for gelu in (False, True):
                    name = f"quantize {'GELU of ' * gelu}{what}"
                    compare(tally, name, operators.quantize_rows, x, grid, gelu=gelu)
                # Codes are compared on the very rows that the kernel normalized, since one rounding moves a code.
                compare(tally, f"LayerNorm {what}", _normed, x, residual, *norm, grid)
    return tally.end()


def _normed(x: Tensor, residual: Tensor, *rest: Any) -> Tensor:
    y, codes, *_ = operators.layernorm_quantize(x, residual, *rest)
    if dispatch.implementation(x.device) == "triton" and MODE == "gpu":
        with twins():
            wanted = operators.quantize_rows(y, rest[3])[0]
        steps, share = difference(codes, wanted)
        if steps > 1 or share > ROUNDED + 1.5 / codes.numel():
            raise ValueError(f"codes differ from those of its own y: by up to {steps:.0f} steps, {share:.2g} of them")
    return y


def attend() -> int:
    """Attention over sequences of different lengths."""
    tally = Tally("attention")
    for heads, width in ((2, 16),) if SMALL else ((12, 64), (12, 32), (16, 64), (4, 96), (2, 128)):
        for lengths in ([3, 4], [4, 4]) if SMALL else ([128] * 4, [5, 128, 0, 7, 512], [1], [16, 17, 31], [384] * 3):
            starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(DEVICE)
            tokens, longest = sum(lengths), max(lengths)
            for dtype in (torch.float16, torch.bfloat16):
                q, k, v = torch.randn(tokens, 3, heads, width, device=DEVICE).to(dtype).unbind(1)
                what = f"{heads} heads of {width}, lengths {lengths}, {dtype}"
                inputs = Heads(q, k, v, starts, longest, width**-0.5)
                compare(tally, what, operators.attention, inputs)
                sums = torch.zeros(tokens, dtype=torch.int32, device=DEVICE)
                # Softmax weights are rounded to the dtype of the values, which moves a few codes, and where values
                # cancel by many steps between e4m3 codes.
                off = 0.05 if dtype == torch.float16 else 0.4
                compare(
                    tally,
                    f"{what}, int8",
                    operators.attention,
                    inputs,
                    InputGrid(0.02, 5),
                    out_row_sum=sums,
                    codes_off=off,
                )
                with twins():
                    sizes = v if MODE == "compile" else operators.attention(inputs._replace(value=v.abs()))
                off_by = sizes.double() * SOFTMAX[dtype] / 0.01
                out = InputGrid(0.01, codes_dtype=E4M3)
                compare(tally, f"{what}, e4m3", operators.attention, inputs, out, out_row_sum=sums, off_by=off_by)
                if len(set(lengths)) > 1:
                    continue
                whole = inputs._replace(uniform=True)
                with forced_attention("sdpa"):
                    compare(tally, f"{what}, torch's", operators.attention, whole)
                    name, grid = f"{what}, torch's, int8", InputGrid(0.02, 5)
                    compare(tally, name, operators.attention, whole, grid, out_row_sum=sums, codes_off=off)
                    name = f"{what}, torch's, e4m3"
                    compare(tally, name, operators.attention, whole, out, out_row_sum=sums, off_by=off_by)
    return tally.end()


@contextmanager
def forced_attention(way: str) -> Iterator[None]:
    """Inside, QBERT_ATTENTION is `way`."""
    kept = os.environ.get("QBERT_ATTENTION")
    os.environ["QBERT_ATTENTION"] = way
    try:
        yield
    finally:
        del os.environ["QBERT_ATTENTION"]
        if kept is not None:
            os.environ["QBERT_ATTENTION"] = kept


def tables() -> int:
    """Packed embedding tables, alone and summed with LayerNorm."""
    tally = Tally("embeddings")
    width = 96 if SMALL else 768
    for bits in ((8, 8, 8), (4, 8, 8), (4, 3, 2)):
        sizes = (50, 20, 2) if SMALL else (3001, 512, 2)
        packed = [weight(n, width, b)[1] for n, b in zip(sizes, bits, strict=True)]
        scale = [torch.rand(g, 1, device=DEVICE) * 0.05 for g in (10, sizes[1], 1)]
        zero = [torch.randn_like(s) for s in scale]
        group = [(torch.arange(sizes[0], device=DEVICE) * 10 // sizes[0]).int(), None, None]
        parts = zip(packed, scale, zero, group, bits, strict=True)
        tables_ = [PackedWeight(*part, width) for part in parts]
        norm = (torch.randn(width, device=DEVICE), torch.randn(width, device=DEVICE), 1e-12)
        for tokens in (3,) if SMALL else (1, 33, 4096):
            ids = [torch.randint(0, n, (tokens,), device=DEVICE) for n in sizes]
            for dtype in (torch.float16, torch.float32):
                for grid in (
                    InputGrid(),
                    InputGrid(asymmetric=True),
                    InputGrid(0.02, 4),
                    InputGrid(0.01, codes_dtype=E4M3),
                ):
                    what = f"bits {bits}, {tokens} tokens, {dtype}, {grid}"
                    compare(tally, what, _embedded, ids, tables_, *norm, grid, out_dtype=dtype)
            compare(tally, f"one table, bits {bits[0]}", dispatch.embedding, ids[0], tables_[0], torch.float16)
    return tally.end()


def _embedded(*inputs: Any, **options: Any) -> Tensor:
    return operators.embed_layernorm(*inputs, **options)[0]


def repeats() -> int:
    """Fixed inputs again and again: a result that moves is a race."""
    tally = Tally("repeats")
    for bits in (8, 4, 3, 2):
        for tokens in (5,) if SMALL else (16, 200, 4096):
            _, packed = weight(768, 1024, bits)
            inputs = activations(tokens, 1024, "token")
            scale = torch.rand(768, device=DEVICE)
            zero = torch.randint(-8, 8, (768,), device=DEVICE, dtype=torch.int32)
            run = partial(operators.matmul_a8, *inputs, ProductWeight([packed], [bits], scale, zero))
            first, moved = run(), 0
            for _ in range(2 if MODE != "gpu" else 300):
                moved += int(not torch.equal(run(), first)) if MODE == "gpu" else 0
            tally.note(f"W{bits}, {tokens} tokens", moved, 0)
    return tally.end()


def encoder(ranges: str, operands: str = "int8") -> int:
    """A whole encoder of mixed bits, eagerly and through graphs, beside its twins on the CPU."""
    import transformers as tf

    import qbert
    from qbert.inference.gpu import GpuEncoder

    tally = Tally(f"encoder, {ranges} ranges, {operands}")
    torch.manual_seed(0)
    config = tf.BertConfig(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, num_hidden_layers=3, vocab_size=500
    )
    model = tf.BertModel(config, add_pooling_layer=False).eval()

    def batch(size: int, length: int) -> dict[str, Tensor]:
        mask = torch.arange(length) < torch.randint(1, length + 1, (size, 1))
        return {"input_ids": torch.randint(5, 500, mask.shape), "attention_mask": mask.long()}

    bits = {"encoder.layer.0.attention.self.query": 2, "encoder.layer.1": 3, "embeddings": 4, "*": 8}
    settings: Any = {"activation_range": ranges, "range_method": "minmax"}
    data = [batch(4, 32)] if ranges == "static" else None
    packed = qbert.pack(qbert.quantize_model(model, qbert.BitsConfig(bits, **settings), calibration_data=data))
    with twins():
        slow = GpuEncoder(packed, operands=operands)
        given = [batch(*shape) for shape in ([(2, 9)] if SMALL else [(3, 40), (2, 37), (1, 1), (17, 300)])]
        # No padding: attention over sequences of one length is another from 2,048 tokens on.
        for shape in [(2, 8)] if SMALL else [(8, 256), (8, 64)]:
            given.append({name: torch.ones_like(t) if "mask" in name else t for name, t in batch(*shape).items()})
        given.append(batch(*shape))  # padding where the mask before had none
        wanted: list[Tensor] = [] if MODE == "compile" else [slow(**one)[0] for one in given]
    if MODE != "gpu":
        for one in given:
            GpuEncoder(packed.half(), operands=operands)(**one)
        return tally.end()
    fast = qbert.optimize_for_inference(packed.to(DEVICE, torch.float16), operands=operands)
    if fast.forward.graphs is None:
        raise ValueError("the encoder makes no CUDA graphs")
    for one, expected in zip(given, wanted, strict=True):
        keep = one["attention_mask"].bool()
        for use in ("eagerly", "captured", "replayed", "on another stream"):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side if "stream" in use else torch.cuda.current_stream()):
                got = fast(**{key: value.to(DEVICE) for key, value in one.items()})[0].cpu()
            error = float((got[keep].double() - expected[keep]).norm() / expected[keep].norm())
            tally.note(f"{tuple(keep.shape)} {use}", error, 0.02)
            tally.note(f"{tuple(keep.shape)} {use}, padding", float(got[~keep].abs().sum()), 0)
    tally.note("no graph was captured", float(not len(fast.forward.graphs)), 0)
    refused = [key for key, usable in fast.forward.graphs._seen.items() if not usable]
    tally.note(f"graphs that could not be captured {refused}", float(len(refused)), 0)
    kept = fast(**{key: value.to(DEVICE) for key, value in given[0].items()})[0]
    copy = kept.clone()
    fast(**{key: value.to(DEVICE) for key, value in batch(3, 40).items()})
    tally.note("a later call writes to a result", float((kept - copy).abs().max()), 0)
    return tally.end()


def dependent(ranges: str, operands: str = "int8") -> int:
    """Encoders whose kernels start while the one before still runs: bit for bit those of kernels that do not."""
    import copy

    import transformers as tf

    import qbert
    from qbert.inference.gpu import GpuEncoder

    tally = Tally(f"dependent launches, {ranges} ranges, {operands}")
    torch.manual_seed(0)
    width = 64 if SMALL else 768
    config = tf.BertConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=width // 64 if width > 64 else 2,
        num_hidden_layers=2,
        vocab_size=500,
    )
    model = tf.BertModel(config, add_pooling_layer=False).eval()
    # From few tokens with split columns to several waves of programs.
    shapes = [(2, 9)] if SMALL else [(1, 16), (1, 128), (4, 100), (16, 128)]
    given = [{"input_ids": torch.randint(5, 500, shape)} for shape in shapes]
    settings: Any = {"activation_range": ranges, "range_method": "minmax"}
    bits = {"encoder.layer.0.attention.self.query": 2, "*": 4}
    data = [given[-1]] if ranges == "static" else None
    packed = qbert.pack(qbert.quantize_model(model, qbert.BitsConfig(bits, **settings), calibration_data=data))
    if MODE != "gpu":
        for one in given:
            for switch in ("0", "1"):
                with variable("QBERT_PDL", switch):
                    GpuEncoder(packed.half() if MODE == "compile" else packed, operands=operands)(**one)
        return tally.end()
    packed = packed.to(DEVICE, torch.float16)
    wanted: list[Tensor] = []
    for switch in ("0", "1"):
        fast = qbert.optimize_for_inference(copy.deepcopy(packed), operands=operands)
        with variable("QBERT_PDL", switch):
            for index, one in enumerate(given):
                ids = one["input_ids"].to(DEVICE)
                # Once eagerly, once captured, then replayed: back to back, since results are compared afterwards.
                outputs = [fast(input_ids=ids)[0] for _ in range(200)]
                if switch == "0":
                    wanted.append(outputs[0])
                off = sum(int(not torch.equal(y, wanted[index])) for y in outputs)
                tally.note(f"{tuple(ids.shape)}, QBERT_PDL={switch}, results that differ", off, 0)
        tally.note(f"QBERT_PDL={switch}, shapes without a graph", float(len(given) - len(fast.forward.graphs)), 0)
    return tally.end()


def cases() -> dict[str, Callable[[], int]]:
    """All cases by name, the longest first."""
    shapes = [(24, 256)] if SMALL else [(768, 768), (768, 3072), (3072, 768), (312, 1200)]
    high = [] if SMALL else [(3072, 768)]
    wide, odd = ((24, 256), (24, 96)) if SMALL else ((768, 768), (312, 1200))
    found: dict[str, Callable[[], int]] = {
        f"encoder-{r}": partial(encoder, r) for r in ("static", "dynamic", "asymmetric")
    }
    found |= {f"encoder-e4m3-{r}": partial(encoder, r, "e4m3") for r in ("static", "dynamic")}
    found |= {f"dependent-{r}-{o}": partial(dependent, r, o) for r, o in DEPENDENT}
    found |= {
        f"e4m3-{bits}-{r}x{c}": partial(eight_bit_floats, bits, r, c)
        for bits in (4, 3, 2)
        for r, c in [wide, odd, *high]
    }
    found |= {f"epilogues-{bits}": partial(epilogues, bits, *wide) for bits in (8, 4, 3, 2)}
    found |= {"attention": attend, "e4m3-cublas": by_cublas, "mixed": mixed, "tables": tables}
    shapes_of_rows = [(1, 384), (77, 768), (4097, 768), (8200, 768), (1033, 1024), (1050, 312)]
    found["rows"] = partial(rows, [torch.float16], shapes_of_rows)
    found["rows-others"] = partial(rows, [torch.bfloat16, torch.float32], [(77, 768), (1033, 1024)])
    found |= {f"floats-{bits}": partial(floats, bits) for bits in (8, 4, 3, 2)}
    for bits in (8, 4, 3, 2):
        found |= {f"integers-{bits}-{r}x{c}": partial(integers, bits, r, c) for r, c in shapes}
    return found | {"repeats": repeats, "linear": linear}


def linear() -> int:
    """A packed layer as a model calls it."""
    tally = Tally("packed linear layers")
    rows_, columns = (24, 96) if SMALL else (384, 384)
    groups = rows_ // 3
    for bits in (8, 4, 3, 2):
        codes, packed = weight(rows_, columns, bits)
        scale = torch.rand(groups, 1, device=DEVICE) * 0.01 + 0.01
        zero = torch.randint(-3, 3, (groups, 1), device=DEVICE).float()
        group, bias = torch.arange(rows_, device=DEVICE) // 3, torch.randn(rows_, device=DEVICE)
        spread: Any = [reference.expand_groups(t, group, rows_) for t in (scale, zero)]
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for grid in (InputGrid(), InputGrid(asymmetric=True), FLOAT):
                for tokens in (2,) if SMALL else (33, 500):
                    x = normal(tokens, columns).to(dtype)
                    what = f"W{bits}, {tokens} tokens, {dtype}, {grid}"
                    try:
                        stored = PackedWeight(packed, scale, zero, group, bits, columns)
                        y = dispatch.linear(x, stored, bias, grid)
                        prepared = dispatch.PreparedLinear(stored, bias, grid)(x)
                        if MODE == "compile":
                            continue
                        tally.note(f"{what}, prepared", float((prepared - y).abs().max()), 0)
                        real = reference.fake_quantize(x.float(), grid)
                        expected = reference.matmul_a16(real, codes, spread[0], spread[1], bias)
                        error = float((y.double() - expected).abs().max() / expected.abs().max())
                        bound = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
                        tally.note(what, error, 1.0 if MODE == "dry" else bound)
                    except Exception as error:
                        if "illegal" in str(error):
                            raise
                        tally.broke(what, error)
    return tally.end()


def check_all(
    names: list[str] | None = None,
    at_once: int = 12,
    seconds: float = 90,
    beside: dict[str, Callable[[], int]] | None = None,
) -> int:
    """All cases, or the named ones, side by side, after those of `beside`; the number of cases that failed."""
    import transformers.models.bert.modeling_bert  # noqa: F401  once, before the processes fork

    found = cases()
    chosen = (beside or {}) | {name: found[name] for name in (names or found)}
    codes = in_processes(chosen, at_once, min(seconds, left()))
    fates = {99: "exception", 98: "98 and more"}
    broken = {name: "did not end" if code < 0 else fates.get(code, code) for name, code in codes.items() if code}
    words = ", ".join(f"{name} ({fate})" for name, fate in broken.items())
    say(f"EXACTNESS: {len(codes) - len(broken)} of {len(codes)} cases hold" + (f"; not: {words}" if broken else ""))
    return len(broken)


if __name__ == "__main__":
    stand_in()
    if len(sys.argv) == 2 and sys.argv[1] in cases():
        sys.exit(cases()[sys.argv[1]]())  # in this very process, for compute-sanitizer
    sys.exit(check_all(sys.argv[1:]))
