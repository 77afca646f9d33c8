"""The kernels compiled for absent GPUs: no spills, int8 tensor cores, free unpacking, memory that fits."""

import dataclasses
from collections import Counter
from importlib.metadata import version

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from scripts import load_bench

from qbert.kernels.gpu import attention, gelu
from qbert.kernels.gpu.products import matmul_a8, matmul_a8_mixed, matmul_a16
from qbert.kernels.gpu.rows import chunks, embedding, layernorm_quant, quantize_rows
from qbert.kernels.gpu.tiles import Tile, asm_for, candidates, rule, tail_of

machine_code = load_bench("compile_report")
Report, compile_report, early_writes = machine_code.Report, machine_code.compile_report, machine_code.early_writes

# What Triton 3.9 reaches, and before it 3.6, whose registers are assigned a little worse.
OLDER = tuple(int(part) for part in version("triton").split(".")[:2]) < (3, 9)
A8_TYPES = {
    "x_ptr": "*i8",
    "w_ptr": "*i8",
    "y_ptr": "*fp16",
    "x_scale_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "zero_ptr": "*i32",
    "row_sum_ptr": "*i32",
    "weight_sum_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "residual_ptr": "*fp16",
    "out_sum_ptr": "*i32",
    "parts_ptr": "*i32",
    "arrived_ptr": "*i32",
    "inv_out_scale": "fp32",
    "out_zero": "fp32",
    "M": "i32",
    "N": "i32",
    "K": "i32",
    "stride_x": "i32",
    "stride_w": "i32",
    "stride_y": "i32",
    "stride_r": "i32",
}


def options(tile: Tile, target: str) -> dict:
    capped = tile.registers is not None and target == "sm_90"
    return {"num_warps": tile.warps, "num_stages": tile.stages} | ({"maxnreg": tile.registers} if capped else {})


def compile_a8(bits: int, tile: Tile, target: str, columns: int = 768, **changes) -> Report:
    tail, tail_pad = tail_of(columns, bits)
    constants = {
        "BITS": bits,
        "BM": tile.bm,
        "BN": tile.bn,
        "BK": tile.bk,
        "SPLIT": tile.split,
        "TAIL": tail,
        "TAIL_PAD": tail_pad,
        "ASM": True,
        "X_SCALE": "token",
        "ZERO": "int32",
        "HAS_BIAS": True,
        "GELU": False,
        "HAS_RESIDUAL": False,
        "OUT": "float",
        "OUT_SUM": False,
        "PDL": False,
    } | changes
    types = dict(A8_TYPES)
    if constants["OUT"] == "int8":
        types["y_ptr"] = "*i8"
    aligned = ("N", "K") if columns % 16 == 0 else ()
    kernel = matmul_a8.matmul_a8_kernel
    return compile_report(kernel, types, constants, target=target, aligned=aligned, **options(tile, target))


def compile_a16(bits: int, tile: Tile, target: str, dtype: str = "fp16") -> Report:
    tail, tail_pad = tail_of(768, bits)
    types = {"x_ptr": f"*{dtype}", "w_ptr": "*i8", "y_ptr": f"*{dtype}", "arrived_ptr": "*i32"}
    types |= dict.fromkeys(["scale_ptr", "zero_ptr", "bias_ptr", "parts_ptr", "sums_ptr"], "*fp32")
    types |= dict.fromkeys(["M", "N", "K", "stride_x", "stride_w", "stride_y"], "i32")
    constants = {
        "BITS": bits,
        "BM": tile.bm,
        "BN": tile.bn,
        "BK": tile.bk,
        "SPLIT": tile.split,
        "TAIL": tail,
        "TAIL_PAD": tail_pad,
        "ASM": asm_for(dtype == "fp16", target == "sm_90"),
        "HAS_ZERO": True,
        "HAS_BIAS": True,
    }
    kernel = matmul_a16.matmul_a16_kernel
    return compile_report(kernel, types, constants, target=target, aligned=("N", "K"), **options(tile, target))


def check_a8(report: Report, bits: int, spilled: int = 0) -> None:
    assert report.spills <= spilled
    assert report.fits
    assert report.int8_products > 0
    assert report.warnings == () and report.hazards == ()
    if report.target == "sm_90" and bits < 8:
        assert report.register_operands == report.int8_products  # unpacked weights never return to shared memory


def test_an_operand_overwritten_too_early_is_found():
    """Made-up machine code: R24..R27 feed a product; LOP3 overwrites R25 before, then after the wait."""
    lines = [
        "/*0010*/ IGMMA.64x64x32.S8.S8 R40, R24, gdesc[UR4], R40, gsb0 ;",
        "/*0020*/ LOP3.LUT R30, R25, R26, RZ, 0x3c, !PT ;",
        "/*0030*/ @!P0 LDS.64 R24, [R2] ;",
        "/*0040*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;",
        "/*0050*/ LOP3.LUT R25, R25, R26, RZ, 0x3c, !PT ;",
    ]
    assert early_writes("\n".join(lines)) == ("LDS.64 R24, [R2] ",)


def test_an_operand_of_the_step_before_is_found_in_a_loop():
    """Made-up machine code: the wait leaves the newest group running, whose R24..R27 the loop's first line writes."""
    lines = [
        ".L_x_1:",
        "/*0010*/ LOP3.LUT R24, R30, R31, RZ, 0x3c, !PT ;",
        "/*0020*/ QGMMA.64x64x32.F32.E4M3.E4M3 R40, R20, gdesc[UR4], R40 ;",
        "/*0030*/ QGMMA.64x64x32.F32.E4M3.E4M3 R40, R24, gdesc[UR4], R40, gsb0 ;",
        "/*0040*/ WARPGROUP.DEPBAR.LE gsb0, {wait} ;",
        "/*0050*/ @P0 BRA `(.L_x_1) ;",
    ]
    code = "\n".join(lines)
    assert early_writes(code.format(wait="0x1")) == ("LOP3.LUT R24, R30, R31, RZ, 0x3c, !PT ",)
    assert early_writes(code.format(wait="0x0")) == ()


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [16, 512, 8192])
def test_integer_product_with_the_default_tiles(tokens, bits, target):
    report = compile_a8(bits, rule(tokens, 3072, 768, bits), target)
    check_a8(report, bits)
    # No byte is moved to unpack; the smallest tile moves a few to pair its halves before the store.
    moved = 288 if OLDER and (tokens, bits, target) == (512, 3, "sm_80") else 4 if tokens == 16 else 0
    assert report.sass["PRMT"] <= moved
    if tokens == 8192 and target == "sm_90":
        assert report.programs_per_processor >= 2


@pytest.mark.parametrize("bits", [3, 4])
def test_last_blocks_and_requantizing_epilogue_do_not_spill(bits):
    check_a8(compile_a8(bits, rule(512, 384, 384, bits), "sm_90", columns=384), bits)
    check_a8(compile_a8(bits, rule(16, 312, 312, bits), "sm_80", columns=312), bits)
    if bits == 4:
        check_a8(compile_a8(bits, rule(512, 3072, 768, bits), "sm_90", OUT="int8", GELU=True, OUT_SUM=True), bits)


FULL = [  # tokens, bits, x_scale, rest of the epilogue
    (16, 4, "asymmetric", {}),
    (512, 3, "asymmetric", {"OUT": "int8", "GELU": True, "OUT_SUM": True}),
    (8192, 2, "asymmetric", {"HAS_RESIDUAL": True}),
    (8192, 4, "asymmetric", {"GELU": True}),
    (8192, 8, "asymmetric", {"HAS_RESIDUAL": True, "ZERO": "none"}),
    (8192, 4, "token", {"OUT": "int8", "GELU": True, "OUT_SUM": True}),
    (8192, 3, "token", {"HAS_RESIDUAL": True}),
    (8192, 4, "token", {"HAS_RESIDUAL": True, "ZERO": "none"}),
    (8192, 8, "token", {"GELU": True, "ZERO": "float"}),
]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("tokens", "bits", "x_scale", "rest"), FULL)
def test_full_epilogues_cost_no_spills_and_no_second_program(tokens, bits, x_scale, rest, target):
    report = compile_a8(bits, rule(tokens, 3072, 768, bits), target, X_SCALE=x_scale, **rest)
    # 16 bytes to and fro in an epilogue, which runs once a tile.
    check_a8(report, bits, 32 if OLDER and target == "sm_90" and (bits, rest.get("OUT")) == (4, "int8") else 0)
    assert report.programs_per_processor >= (2 if tokens < 8192 or target == "sm_90" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_candidate_tile_compiles(bits, target):
    """A candidate may spill or exceed the chip (it is then never the fastest); it must compile to int8 products."""
    tiles = {t for tokens in (16, 64, 512, 8192) for t in candidates(tokens, 3072, 3072, bits)}
    # Into how many parts the columns are split, once they are, is no more than a number in the code.
    tiles = {dataclasses.replace(t, split=min(t.split, 2)) for t in tiles}
    usable = 0
    for tile in sorted(tiles, key=str):
        report = compile_a8(bits, tile, target)
        assert report.int8_products > 0
        usable += report.spills == 0 and report.fits
    assert usable >= 0.7 * len(tiles)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("bits", "dtype"), [(2, "fp16"), (3, "fp16"), (4, "fp16"), (8, "fp16"), (4, "bf16")])
def test_fp16_product(bits, dtype, target):
    report = compile_a16(bits, rule(16, 3072, 768, bits), target, dtype)
    assert report.spills <= (16 if OLDER and (bits, target) == (3, "sm_80") else 0)
    assert report.fits and report.hazards == ()
    assert report.count("wgmma.mma_async" if target == "sm_90" else "mma.sync") > 0


def types_of(kernel, pointers: dict[str, str], integers: list[str], floats: list[str]) -> dict[str, str]:
    types = pointers | dict.fromkeys(integers, "i32") | dict.fromkeys(floats, "fp32")
    return {name: types[name] for name in kernel.arg_names if name in types}


def compile_quantize(
    target: str, range_: str, codes: str = "*i8", columns: int = 768, tokens: int = 4096, **changes
) -> Report:
    kernel, tile = quantize_rows.quantize_rows_kernel, chunks.rule(tokens, columns)
    pointers = {"x_ptr": "*fp16", "q_ptr": codes, "scale_ptr": "*fp32", "row_sum_ptr": "*i32"}
    types = types_of(kernel, pointers, ["tokens", "stride_x"], ["static_scale", "inv_static_scale", "static_zero"])
    constants = {"RANGE": range_, "GELU": False, "PDL": False, "ROWS": tile.bm, "WIDTH": columns}
    constants |= {"CHUNK": chunks.chunk_of(columns, tile.warps)} | changes
    return compile_report(kernel, types, constants, target=target, num_warps=tile.warps)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("range_", "each"), [("static", 19), ("dynamic", 22), ("asymmetric", 30)])
def test_row_quantization(range_, each, target):
    """24 columns a thread; `each` instructions for one, those of the whole program counted."""
    report = compile_quantize(target, range_)
    assert report.spills == 0 and report.registers <= 64
    assert report.accesses == {"LDG.128": 3, "STG.64": 3, "STG": 3 if range_ == "asymmetric" else 2}
    assert sum(report.sass.values()) <= 24 * each


@pytest.mark.parametrize(("range_", "each"), [("static", 27), ("dynamic", 41)])
def test_rows_behind_gelu_in_eight_bit_floats(range_, each):
    """GELU is computed once also where the range of a row must be known first."""
    report = compile_quantize("sm_90", range_, "*fp8e4nv", columns=3072, GELU=True)
    assert report.spills == 0 and report.registers <= 64
    assert report.sass["MUFU"] <= 24 + 3 and sum(report.sass.values()) <= 24 * each


@triton.jit
def elementwise_kernel(x_ptr, y_ptr, GELU: tl.constexpr):
    y = tl.load(x_ptr + tl.arange(0, 1024))
    tl.store(y_ptr + tl.arange(0, 1024), gelu.gelu(y) if GELU else y)


def test_gelu_costs_fourteen_instructions_and_no_branch():
    """libdevice's erf would make it 32, in both versions of Triton."""
    reports = [
        compile_report(
            elementwise_kernel, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"GELU": with_gelu}, target="sm_90", num_warps=1
        )
        for with_gelu in (False, True)
    ]
    copied, computed = (r.sass - Counter({"NOP": r.sass["NOP"]}) for r in reports)
    assert (computed.total() - copied.total()) / 32 <= 14.2
    assert computed["MUFU"] == 32 and computed["BRA"] == copied["BRA"] and reports[1].spills == 0


def compile_layernorm(tile: Tile, target: str, range_: str, columns: int, dtype: str = "fp16", **changes) -> Report:
    kernel = layernorm_quant.layernorm_quantize_kernel
    pointers = dict.fromkeys(["x_ptr", "y_ptr", "residual_ptr", "weight_ptr", "bias_ptr"], f"*{dtype}")
    pointers |= {"q_ptr": changes.pop("codes", "*i8"), "scale_ptr": "*fp32", "row_sum_ptr": "*i32"}
    types = types_of(kernel, pointers, ["tokens", "stride_x", "stride_r"], ["eps", "static_scale", "static_zero"])
    constants = {"HAS_RESIDUAL": False, "RANGE": range_, "ROWS": tile.bm, "WIDTH": columns, "PDL": False}
    constants |= {"CHUNK": chunks.chunk_of(columns, tile.warps)} | changes
    return compile_report(kernel, types, constants, target=target, num_warps=tile.warps)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("range_", "codes"), [("static", "*i8"), ("dynamic", "*i8"), ("asymmetric", "*i8"), ("static", "*fp8e4nv")]
)
def test_layernorm_of_many_tokens_is_bound_by_memory(range_, codes, target):
    """One warp, 24 columns a thread: accesses of 16 bytes, 8 of codes, no other one, and nothing between lanes.

    Beside the instructions of a row the whole program has those of the weight and bias, and of division and root.
    """
    if codes == "*fp8e4nv" and target == "sm_80":
        pytest.skip("sm_80 has no e4m3")
    report = compile_layernorm(chunks.rule(4096, 768), target, range_, 768, codes=codes)
    assert report.spills == 0 and report.shared == 0
    assert report.registers <= 104 and report.programs_per_processor >= 18
    assert report.accesses == {"LDG.128": 9, "STG.128": 3, "STG.64": 3, "STG": 3 if range_ == "asymmetric" else 2}
    assert report.sass["SHFL"] == 5 * {"static": 2, "dynamic": 3, "asymmetric": 4}[range_]  # the sum of codes is REDUX
    # Neither is a division or a conversion made one by one: slow paths of division and root are shared.
    assert report.sass["F2I"] <= 1 and report.sass["FCHK"] <= 5
    assert sum(report.sass.values()) / 24 <= (43 if range_ == "asymmetric" else 35)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("tokens", "columns", "dtype"), [(128, 768, "fp16"), (4096, 384, "bf16"), (8192, 1024, "fp32")]
)
def test_layernorm_of_other_shapes(tokens, columns, dtype, target):
    tile = chunks.rule(tokens, columns)
    report = compile_layernorm(tile, target, "dynamic", columns, dtype, HAS_RESIDUAL=True)
    assert report.spills == 0 and report.registers <= (48 if tile.warps == 4 else 72 if columns == 384 else 168)
    assert report.sass["FCHK"] <= 5


def compile_embedding(target: str, range_: str, tokens: int = 128, **changes) -> Report:
    pointers = {"ids": "*i64", "packed": "*u8", "scale": "*fp32", "zero": "*fp32", "group": "*i32"}
    types, constants = {}, {"RANGE": range_, "WIDTH": 768, "PDL": False}
    constants |= {"CHUNK": chunks.chunk_of(768, chunks.rule(tokens, 768).warps)}
    for table, (bits, groups) in enumerate([(4, "table"), (3, "row"), (8, "one")]):
        types |= {f"{name}{table}": type_ for name, type_ in pointers.items()}
        types |= {f"{name}{table}": "i32" for name in ("input_group", "stride", "rows")}
        constants |= {f"TAIL{table}": 0, f"BITS{table}": bits, f"GROUPS{table}": groups, f"INPUT_GROUPS{table}": 1}
    types |= {"weight_ptr": "*fp32", "bias_ptr": "*fp32", "y_ptr": "*fp16", "q_ptr": "*i8"}
    types |= {"scale_ptr": "*fp32", "row_sum_ptr": "*i32"}
    types |= dict.fromkeys(["eps", "static_scale", "static_zero"], "fp32")
    kernel = embedding.embed_layernorm_kernel
    ordered = {name: types[name] for name in kernel.arg_names if name in types}
    warps = chunks.rule(tokens, 768).warps
    return compile_report(kernel, ordered, constants | changes, target=target, num_warps=warps)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("range_", ["static", "asymmetric"])
@pytest.mark.parametrize(("tokens", "registers", "instructions"), [(128, 56, 820), (4096, 120, 1700)])
def test_embeddings(tokens, registers, instructions, range_, target):
    """Three tables; one warp, 24 columns a thread, or four, 6 columns, where scale and zero are loaded once a row."""
    report = compile_embedding(target, range_, tokens)
    assert report.spills == 0 and report.registers <= registers
    assert sum(report.sass.values()) <= instructions


def compile_attention(target: str, quantize: bool, head_dim: int, **changes) -> Report:
    kernel = attention.attention_kernel
    pointers = dict.fromkeys(["q_ptr", "k_ptr", "v_ptr"], "*fp16")
    pointers |= {"out_ptr": "*i8" if quantize else "*fp16", "starts_ptr": "*i32", "out_sum_ptr": "*i32"}
    strides = [n for n in kernel.arg_names if n.startswith(("stride", "head"))]
    types = types_of(kernel, pointers, [*strides, "D"], ["scale", "inv_out_scale", "out_zero"])
    constants = {"BLOCK_Q": 64, "BLOCK_K": 64 if head_dim <= 64 else 32, "BLOCK_D": head_dim}
    constants |= {"QUANTIZE": quantize, "OUT_SUM": quantize, "PDL": False} | changes
    aligned = ("head_q", "head_k", "head_v", "D")
    return compile_report(kernel, types, constants, target=target, aligned=aligned, num_warps=4, num_stages=2)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize(("head_dim", "programs"), [(32, 4), (64, 2), (128, 2)])
def test_attention(head_dim, programs, quantize, target):
    report = compile_attention(target, quantize, head_dim)
    assert report.spills == 0 and report.fits and report.warnings == ()
    assert report.programs_per_processor >= (3 if target == "sm_90" and head_dim == 64 else programs)
    assert report.count("wgmma.mma_async" if target == "sm_90" else "mma.sync") >= 2


def test_attention_computes_no_score_twice():
    """64 queries x 64 keys x 64 values: four warpgroup products of 16 columns for the scores, four for the values."""
    report = compile_attention("sm_90", True, 64)
    assert report.sass["HGMMA"] == 8
    # 64 x 64 exponentials over 128 threads, one fade for each of a thread's two rows, one quotient each at the end.
    assert report.sass["MUFU"] <= 64 * 64 // 128 + 2 + 2


def compile_mixed(bits: tuple[int, int, int], tile: Tile, target: str, x_scale: str = "token", **changes) -> Report:
    kernel = matmul_a8_mixed.matmul_a8_mixed_kernel
    types = dict.fromkeys(("x_ptr", "query_ptr", "key_ptr", "value_ptr"), "*i8") | {"y_ptr": "*fp16"}
    types |= {"x_scale_ptr": "*fp32", "scale_ptr": "*fp32", "zero_ptr": "*i32", "row_sum_ptr": "*i32"}
    types |= {"weight_sum_ptr": "*fp32", "bias_ptr": "*fp32"} | dict.fromkeys(["M", "N", "K"], "i32")
    types |= {n: "i32" for n in kernel.arg_names if n.startswith("stride")}
    constants = {"BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "ASM": True}
    constants |= {"X_SCALE": x_scale, "ZERO": "int32", "HAS_BIAS": True, "PDL": False}
    loops, (key, value) = matmul_a8_mixed.loops_of(bits, 768)
    names = [f"{name}{loop}" for loop in range(3) for name in ("BITS", "TAIL", "PAD")]
    constants |= dict(zip(names, loops, strict=True)) | {"LOOP_KEY": key, "LOOP_VALUE": value} | changes
    return compile_report(kernel, types, constants, target=target, aligned=("N", "K"), **options(tile, target))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("tokens", "x_scale"), [(16, "token"), (512, "asymmetric"), (8192, "token")])
def test_query_key_and_value_of_different_bits(tokens, x_scale, target):
    report = compile_mixed((2, 3, 4), rule(tokens, 768, 768, 3), target, x_scale)
    check_a8(report, 3)
    if tokens == 8192 and target == "sm_90":
        assert report.programs_per_processor >= 2


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("bits", "tokens"), [((8, 8, 8), 8192), ((8, 8, 4), 8192), ((8, 4, 8), 512), ((4, 8, 8), 16)])
def test_query_key_and_value_take_the_memory_of_one(bits, tokens, target):
    tile = rule(tokens, 768, 768, 8)
    report = compile_mixed(bits, tile, target)
    assert report.spills == 0 and report.fits and report.int8_products > 0
    one = compile_a8(8, tile, target)
    assert report.shared == one.shared
    fewer = OLDER and (bits, tokens, target) == ((8, 4, 8), 512, "sm_80")
    assert report.programs_per_processor >= one.programs_per_processor - fewer


# Every kernel of an encoder's chain, with few tokens.
CHAIN = {
    "row quantization": lambda target, **pdl: compile_quantize(target, "dynamic", tokens=128, **pdl),
    "LayerNorm": lambda target, **pdl: compile_layernorm(chunks.rule(128, 768), target, "static", 768, **pdl),
    "embeddings": lambda target, **pdl: compile_embedding(target, "static", **pdl),
    "attention": lambda target, **pdl: compile_attention(target, True, 64, **pdl),
    "product": lambda target, **pdl: compile_a8(8, rule(512, 3072, 768, 8), target, GELU=True, OUT="int8", **pdl),
    "split product": lambda target, **pdl: compile_a8(4, rule(16, 768, 3072, 4), target, columns=3072, **pdl),
    "query, key and value": lambda target, **pdl: compile_mixed((4, 3, 4), rule(128, 768, 768, 4), target, **pdl),
}


@pytest.mark.parametrize("kernel", CHAIN)
def test_kernels_of_the_chain_touch_nothing_before_they_have_waited(kernel):
    """Products ask the L2 cache for their weights, which is no access."""
    report = CHAIN[kernel]("sm_90", PDL=True)
    assert report.sass["ACQBULK"] == report.count("griddepcontrol.wait") == 1
    assert report.sass["PREEXIT"] == report.count("griddepcontrol.launch_dependents") == 1
    assert report.ptx.index("griddepcontrol.wait") < report.ptx.index("griddepcontrol.launch_dependents")
    product = "product" in kernel or "query" in kernel
    assert report.before_wait == ({"CCTL.PF2"} if product else set())
    assert report.spills == 0 and report.hazards == () and report.warnings == ()


@pytest.mark.parametrize("kernel", ["LayerNorm", "attention", "split product"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_kernels_know_nothing_of_their_neighbours_where_they_are_not_launched_early(kernel, target):
    report = CHAIN[kernel](target, PDL=False)
    assert "griddepcontrol" not in report.ptx and "prefetch" not in report.ptx
    assert {"LDG", "STG"} <= report.before_wait  # there is none


def needs_amd_backend() -> None:
    if "amd" not in triton.backends.backends:
        pytest.skip(f"Triton {triton.__version__} has no AMD backend")
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        pytest.skip(f"the AMD backend of Triton {triton.__version__} needs a linker that its wheel lacks; 3.6 has it")


@pytest.mark.parametrize("bits", [3, 4])
def test_integer_product_for_amd(bits):
    needs_amd_backend()
    report = compile_a8(bits, Tile(32, 64, 256, stages=2), "gfx942", ASM=False)
    assert report.spills == 0 and report.fits and report.int8_products > 0


def test_attention_and_layernorm_for_amd():
    needs_amd_backend()
    kernel = attention.attention_kernel
    pointers = dict.fromkeys(["q_ptr", "k_ptr", "v_ptr"], "*fp16")
    pointers |= {"out_ptr": "*i8", "starts_ptr": "*i32", "out_sum_ptr": "*i32"}
    strides = [n for n in kernel.arg_names if n.startswith(("stride", "head"))]
    types = types_of(kernel, pointers, [*strides, "D"], ["scale", "inv_out_scale", "out_zero"])
    # The tile of short sequences; that of long ones, 64 x 64, spills 21 registers here.
    constants = {"BLOCK_Q": 16, "BLOCK_K": 32, "BLOCK_D": 64, "QUANTIZE": True, "OUT_SUM": True, "PDL": False}
    report = compile_report(kernel, types, constants, target="gfx942", num_warps=4, num_stages=2)
    assert report.spills == 0 and report.fits and report.count("v_mfma_f32") > 0
    assert compile_layernorm(Tile(2, 768, 0, warps=1), "gfx942", "dynamic", 768, HAS_RESIDUAL=True).spills == 0
