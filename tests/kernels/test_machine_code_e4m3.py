"""The e4m3 products compiled for absent GPUs: overlapped with loads, exact operands from registers, no spills."""

import pytest

pytest.importorskip("triton")

from scripts import load_bench

from qbert.kernels.gpu.products import matmul_a8, matmul_a8_mixed
from qbert.kernels.gpu.tiles import Tile, asm_for, candidates, rule, tail_of

machine_code = load_bench("compile_report")
Report, compile_report = machine_code.Report, machine_code.compile_report

BITS = [2, 3, 4]
TYPES = {
    "x_ptr": "*fp8e4nv",
    "w_ptr": "*i8",
    "y_ptr": "*fp16",
    "x_scale_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "zero_ptr": "*fp32",
    "row_sum_ptr": "*i32",
    "weight_sum_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "residual_ptr": "*fp16",
    "out_sum_ptr": "*i32",
    "parts_ptr": "*fp32",
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


def compiled(kernel, types: dict, constants: dict, tile: Tile, target: str, columns: int = 768) -> Report:
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if tile.registers is not None and target == "sm_90":
        options["maxnreg"] = tile.registers
    aligned = ("N", "K") if columns % 16 == 0 else ()
    return compile_report(kernel, types, constants, target=target, aligned=aligned, **options)


def compile_product(bits: int, tile: Tile, target: str = "sm_90", columns: int = 768, **changes) -> Report:
    tail, tail_pad = tail_of(columns, bits)
    constants = {"BITS": bits, "BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "SPLIT": tile.split}
    constants |= {
        "TAIL": tail,
        "TAIL_PAD": tail_pad,
        "ASM": asm_for(True, target == "sm_90"),
        "X_SCALE": "token",
        "ZERO": "none",
    }
    constants |= {"HAS_BIAS": True, "GELU": False, "HAS_RESIDUAL": False, "OUT": "float", "OUT_SUM": False}
    constants |= {"PDL": False} | changes
    types = TYPES | ({"y_ptr": "*fp8e4nv"} if constants["OUT"] == "e4m3" else {})
    return compiled(matmul_a8.matmul_a8_kernel, types, constants, tile, target, columns)


def check(report: Report, spills: int = 0) -> None:
    assert report.spills <= spills and report.fits and report.e4m3_products > 0
    # ptxas's words where it runs products one by one (C75xx).
    assert report.warnings == () and report.hazards == ()
    if report.target == "sm_90":
        assert report.register_operands == report.e4m3_products <= report.sass["QGMMA"]
        assert max(report.waits) > 0 and report.waits[-1] == 0  # products run on while the next are prepared


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("tokens", "target"), [(16, "sm_90"), (512, "sm_90"), (8192, "sm_90"), (512, "sm_89"), (512, "sm_100")]
)
def test_default_tiles(tokens, target, bits):
    report = compile_product(bits, rule(tokens, 3072, 768, bits, e4m3=True), target)
    check(report)
    if tokens == 8192 and target == "sm_90":
        assert report.programs_per_processor >= 2


@pytest.mark.parametrize("tokens", [16, 512])
def test_launched_early_it_touches_nothing_before_it_has_waited(tokens):
    report = compile_product(4, rule(tokens, 768, 3072, 4, e4m3=True), columns=3072, HAS_RESIDUAL=True, PDL=True)
    check(report)
    assert report.sass["ACQBULK"] == 1 and report.before_wait == {"CCTL.PF2"}


@pytest.mark.parametrize(("bits", "logic"), [(4, 2), (2, 2.2), (3, 3)])
def test_unpacking_costs_few_instructions(bits, logic):
    """Of the logic unit, `logic` for four weights in a step of the loop, and one to spread signs, none for 2 bits."""
    tile = rule(8192, 3072, 768, bits, e4m3=True)
    fours = tile.bn * tile.bk // (32 * tile.warps) // 4
    counts = compile_product(bits, tile).loop
    assert counts["QGMMA"] == 4  # 128 columns, 32 at a time
    addresses = 8
    assert counts["LOP3"] <= logic * fours + addresses
    assert counts["PRMT"] <= (0 if bits == 2 else fours)


EPILOGUES = {
    "attention output, static": {"X_SCALE": "one", "HAS_RESIDUAL": True},
    "attention output, static, with zeros": {"X_SCALE": "one", "HAS_RESIDUAL": True, "ZERO": "e4m3"},
    "attention output, per token, with zeros": {"HAS_RESIDUAL": True, "ZERO": "e4m3"},
    "ffn in, static": {"GELU": True, "OUT": "e4m3"},
    "ffn in, static, with zeros": {"GELU": True, "OUT": "e4m3", "OUT_SUM": True, "ZERO": "e4m3"},
    "ffn in, per token": {"GELU": True},
}


@pytest.mark.parametrize(("tokens", "bits"), [(512, 3), (8192, 2), (8192, 4)])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues_of_an_encoder(epilogue, bits, tokens):
    report = compile_product(bits, rule(tokens, 3072, 768, bits, e4m3=True), **EPILOGUES[epilogue])
    check(report, spills=40 if epilogue == "ffn in, static, with zeros" and tokens == 8192 else 0)  # once a tile
    assert report.programs_per_processor >= 2


@pytest.mark.parametrize("bits", [3, 4])
def test_last_blocks_and_split_columns(bits):
    check(compile_product(bits, rule(512, 384, 384, bits, e4m3=True), columns=384, HAS_RESIDUAL=True))
    check(compile_product(bits, rule(16, 312, 312, bits, e4m3=True), columns=312))
    check(compile_product(bits, rule(64, 768, 3072, bits, e4m3=True), columns=3072, HAS_RESIDUAL=True))


@pytest.mark.parametrize(
    ("bits", "tokens"), [((2, 3, 4), 16), ((2, 3, 4), 512), ((2, 3, 4), 8192), ((4, 4, 4), 8192), ((4, 2, 4), 8192)]
)
def test_query_key_and_value(bits, tokens):
    tile = rule(tokens, 768, 768, max(bits), e4m3=True)
    types = dict.fromkeys(("query_ptr", "key_ptr", "value_ptr"), "*i8")
    kernel = matmul_a8_mixed.matmul_a8_mixed_kernel
    types |= {n: t for n, t in TYPES.items() if n in kernel.arg_names}
    types |= {n: "i32" for n in kernel.arg_names if n.startswith("stride")}
    constants = {"BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "ASM": asm_for(True, True), "X_SCALE": "token"}
    constants |= {"ZERO": "e4m3", "PDL": False}
    loops, (key, value) = matmul_a8_mixed.loops_of(bits, 768)
    names = [f"{name}{loop}" for loop in range(3) for name in ("BITS", "TAIL", "PAD")]
    constants |= dict(zip(names, loops, strict=True)) | {"LOOP_KEY": key, "LOOP_VALUE": value, "HAS_BIAS": True}
    report = compiled(kernel, {n: types[n] for n in kernel.arg_names if n in types}, constants, tile, "sm_90")
    check(report, spills=8)  # of Triton 3.6, once a program, for two loops in 128 registers
    assert report.programs_per_processor >= 2


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_every_candidate_tile_fits_and_most_do_not_spill(bits):
    tiles = {t for tokens in (16, 64, 512, 2048, 8192) for t in candidates(tokens, 3072, 3072, bits, True)}
    usable = 0
    for tile in sorted(tiles, key=str):
        report = compile_product(bits, tile)
        # With fewer than 64 outputs there is no warpgroup product: Triton multiplies the same values in fp16.
        assert report.fits and (report.e4m3_products > 0) == (tile.bn >= 64)
        usable += report.spills == 0 and report.warnings == ()
    assert usable >= 0.8 * len(tiles)
