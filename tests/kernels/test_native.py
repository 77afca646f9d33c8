"""The native engine against the reference, for every instruction set that this processor has."""

import functools
import os
import shutil
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from qbert.kernels import formats, reference
from qbert.kernels.cpu import native
from qbert.kernels.cpu.native import NativeLayers, NativeProduct, NativeTerm

sys.path.insert(0, str(Path(__file__).parent))
import test_cpu as cases

_NEEDS = {"avx512_vnni": {"avx512_vnni", "avx512bw"}, "avx_vnni": {"avx_vnni"}, "avx2": {"avx2", "fma"}}
SETS = [name for name, needs in _NEEDS.items() if needs <= native.processor()[1]]
pytestmark = pytest.mark.skipif(bool(native.reason_not_native()), reason=native.reason_not_native())
SHAPES = ((70, 101, 37), (384, 256, 33), (65, 5, 1), (64, 64, 100))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> int:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def prepared(parts: tuple, instructions: str, **options: object) -> NativeProduct:
    codes, scale, zero, row_group, bias = parts
    spread = (reference.expand_groups(t, row_group, len(codes))[:, 0].float() for t in (scale, zero))
    return NativeProduct.prepare(codes, *spread, bias, instructions=instructions, **options)


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("zero", ["symmetric", "integer", "half", "real"])
@pytest.mark.parametrize("bits", formats.BITS)
def test_products_equal_the_reference(bits: int, zero: str, instructions: str) -> None:
    for rows, columns, tokens in SHAPES:
        parts = cases.layer(rows, columns, bits, zero, groups=min(4, rows))
        parts[0][0], parts[0][1] = formats.code_range(bits)
        x = cases.grid_input(tokens, columns)
        x[tokens // 2], x[tokens // 3], x[-1] = 127, -127, 0
        cases.assert_same(prepared(parts, instructions)(x), x, cases.reference_linear(x, *parts), parts)
        x = cases.asymmetric_input(tokens, columns)
        x[tokens // 2], x[-1] = 7.5, 0
        cases.assert_asymmetric(prepared(parts, instructions, asymmetric=True)(x), x, parts)


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("zero", ["integer", "real"])
@pytest.mark.parametrize("activation_zero", [0, -37, 100])
def test_static_ranges_equal_the_reference(activation_zero: int, zero: str, instructions: str) -> None:
    parts = cases.layer(70, 101, 8, zero, groups=4)
    step = 0.03125
    x = torch.randint(-300, 300, (9, 101)) * step
    rounded = (reference.requantize(x, step, activation_zero).double() - activation_zero) * step
    spread = (reference.expand_groups(t, parts[3], 70) for t in parts[1:3])
    expected = reference.matmul_a16(rounded, parts[0], *spread, parts[4])
    product = prepared(parts, instructions, activation_scale=step, activation_zero=activation_zero)
    cases.assert_same(product(x), x, expected, parts)
    x[2, 100], x[4, 0] = float("nan"), float("inf")
    y = product(x)
    assert y[2].isnan().all() and torch.isfinite(y[[0, 1, 3, 4, 5]]).all()


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_token_is_broken_alone(value: float, asymmetric: bool, instructions: str) -> None:
    product = prepared(cases.layer(48, 101, 4), instructions, asymmetric=asymmetric)
    for place in (5, 100):
        x = torch.randn(4, 101)
        clean = product(x)
        x[2, place] = value
        y = product(x)
        assert not torch.isfinite(y[2]).any()
        assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("power", [-100, -30, 30, 100])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_huge_and_small_activations_keep_their_precision(asymmetric: bool, power: int, instructions: str) -> None:
    parts = cases.layer(48, 128, 8)
    product = prepared((*parts[:4], parts[4] * 0), instructions, asymmetric=asymmetric)
    x = cases.asymmetric_input(9, 128)
    torch.testing.assert_close(product(x * 2.0**power) / 2.0**power, product(x), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("instructions", SETS)
def test_eight_bit_weights_are_wide_only_where_pairs_could_saturate(instructions: str) -> None:
    parts = cases.layer(48, 128, 8)
    assert prepared(parts, instructions).wide == (instructions == "avx2")
    assert not prepared(parts, instructions, exact=False).wide
    assert not prepared(cases.layer(48, 128, 4), instructions).wide


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("zero", ["symmetric", "integer", "real"])
@pytest.mark.parametrize("kind", [{}, {"asymmetric": True}, {"activation_scale": 0.03, "activation_zero": -9}])
def test_weights_rounded_once_more_cost_little(kind: dict, zero: str, instructions: str) -> None:
    parts = cases.layer(48, 128, 8, zero, groups=4)
    x = torch.randn(20, 128)
    exact, fast = (prepared(parts, instructions, exact=e, **kind)(x) - parts[4] for e in (True, False))
    error = float((fast - exact).norm() / exact.norm())
    assert error < 0.02 if instructions == "avx2" else error == 0


def twin(
    x: torch.Tensor, products: Sequence[Callable], norms: list, heads: int, mask: torch.Tensor | None
) -> torch.Tensor:
    """One layer, [B, T, H], of torch's operators and single products."""
    batch, tokens, width = x.shape
    query, key, value = products[0](x).view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)
    y = F.layer_norm(products[1](mixed) + x, [width], *norms[0])
    return F.layer_norm(products[3](F.gelu(products[2](y))) + y, [width], *norms[1])


def one_term_each(products: list[NativeProduct]) -> list[list[NativeTerm]]:
    """Each product as a map of one term."""
    return [[NativeTerm(product)] for product in products]


def some_layer(
    width: int, heads: int, inner: int, instructions: str, attended: int | None = None
) -> tuple[list[NativeProduct], list, int]:
    """A layer of `width` with `inner` columns, whose heads together are `attended` wide, as wide as it without."""
    attended = attended or width
    shapes = ((3 * attended, width), (width, attended), (inner, width), (width, inner))
    products = [
        prepared(cases.layer(o, i, 4, "symmetric", seed=n), instructions, asymmetric=n % 2 == 0)
        for n, (o, i) in enumerate(shapes)
    ]
    norms = [(torch.rand(width) + 0.5, torch.randn(width), 1e-12) for _ in range(2)]
    return products, norms, heads


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize(("width", "heads", "inner"), [(48, 4, 96), (64, 2, 64), (130, 13, 70), (128, 2, 256)])
def test_a_layer_is_its_pieces(width: int, heads: int, inner: int, instructions: str) -> None:
    torch.manual_seed(0)
    products, norms, _ = some_layer(width, heads, inner, instructions)
    fast = NativeLayers([(one_term_each(products), norms, heads, 0)])
    for batch, tokens in ((1, 1), (2, 7), (5, 33), (1, 150)):
        x = torch.randn(batch, tokens, width)
        seen = torch.rand(batch, 1, 1, tokens) > 0.3
        seen[..., 0] = True
        bias = torch.randn(1, heads, tokens, tokens)
        for mask in (None, seen, bias, bias.masked_fill(~seen, -torch.inf)):
            got, expected = fast(x, mask), twin(x, products, norms, heads, mask)
            error = (got - expected).abs().amax(-1)  # a value between two codes may fall to either
            assert float((error < 1e-3).float().mean()) > 0.95 and float(error.max()) < 0.3


@pytest.mark.parametrize("instructions", SETS)
def test_layers_of_different_heads_and_columns_share_a_stack(instructions: str) -> None:
    torch.manual_seed(0)
    sizes = ((3, 96, 36), (1, 200, 12), (6, 30, 72), (4, 70, 48))  # heads, columns, width of all heads
    layers = [some_layer(48, heads, inner, instructions, attended) for heads, inner, attended in sizes]
    fast = NativeLayers([(one_term_each(layer[0]), *layer[1:], 0) for layer in layers])
    for batch, tokens in ((2, 7), (5, 33)):
        expected = x = torch.randn(batch, tokens, 48)
        for layer in layers:
            expected = twin(expected, *layer, None)
        error = (fast(x) - expected).abs().amax(-1)  # a value between two codes may fall to either
        assert float((error < 1e-3).float().mean()) > 0.8 and float(error.max()) < 0.5


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize(("width", "heads", "inner"), [(48, 4, 96), (130, 13, 70), (20, 2, 90)])
def test_maps_in_factors_are_their_terms(width: int, heads: int, inner: int, instructions: str) -> None:
    torch.manual_seed(0)

    def product(rows: int, columns: int, asymmetric: bool = True) -> NativeProduct:
        return prepared(cases.layer(rows, columns, 8, "integer", seed=rows), instructions, asymmetric=asymmetric)

    def factors(rows: int, columns: int, rank: int, place: int = 0, adds: bool = False) -> NativeTerm:
        return NativeTerm(product(rows, rank, place > 0), product(rank, columns), place, adds)

    whole = NativeTerm(product(width, width, asymmetric=False), None, 2 * width)
    maps = [
        [factors(width, width, 7), factors(width, width, 18, width), whole, factors(width, width, 3, 2 * width, True)],
        [factors(width, width, 11)],
        [NativeTerm(product(inner, width)), factors(inner, width, 5, 0, True)],
        [factors(width, inner, 13)],
    ]

    def computed(terms: list[NativeTerm], x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros(*x.shape[:-1], 3 * width if len(terms) > 2 else terms[0].product.matrix.rows)
        for term in terms:
            part = y[..., term.place : term.place + term.product.matrix.rows]
            part += term.product(x if term.down is None else term.down(x))
        return y

    norms = some_layer(width, heads, inner, instructions)[1]
    fast = NativeLayers([(maps, norms, heads, 0)])
    for batch, tokens in ((1, 1), (2, 7), (5, 33)):
        x = torch.randn(batch, tokens, width)
        expected = twin(x, [functools.partial(computed, terms) for terms in maps], norms, heads, None)
        error = (fast(x) - expected).abs().amax(-1)  # a value between two codes may fall to either
        assert float((error < 1e-3).float().mean()) > 0.8 and float(error.max()) < 0.5


@pytest.mark.parametrize("instructions", SETS)
def test_sequences_do_not_depend_on_each_other_nor_on_padding_or_threads(instructions: str, threads: int) -> None:
    torch.manual_seed(0)
    products, norms, heads = some_layer(48, 4, 96, instructions)
    fast = NativeLayers([(one_term_each(products), norms, heads, 0)] * 2)
    lengths = torch.tensor([5, 1, 40, 17, 130, 3])
    x = torch.randn(int(lengths.sum()), 48)
    whole = fast.run(x, lengths, lengths)
    torch.set_num_threads(1)
    for got, part in zip(whole.split(lengths.tolist()), x.split(lengths.tolist()), strict=True):
        padded = F.pad(part, (0, 0, 0, 4), value=9.0)
        alone = fast.run(padded, torch.tensor([len(padded)]), torch.tensor([len(part)]))[: len(part)]
        torch.testing.assert_close(fast(part[None])[0], got, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone, got, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("terms", ["both", "keys", "queries", "neither"])
def test_scores_by_position_are_added_for_every_distance(terms: str, instructions: str) -> None:
    torch.manual_seed(0)
    products, norms, heads = some_layer(48, 4, 96, instructions)
    places = torch.tensor([0, 1, 1, 2, 3, 6, 7, 7, 8], dtype=torch.int32)  # of distances -4 to 4; nothing is at 4 or 5
    keys, queries = torch.randn(2, heads, 9, 12)
    scale = 0.2
    used = [keys if terms in ("both", "keys") else None, queries if terms in ("both", "queries") else None]
    positions = native.NativePositions(scale, places, *used)
    fast = NativeLayers([(one_term_each(products), norms, heads, 0, False, False, 0, None, positions)])
    for batch, tokens in ((1, 1), (3, 2), (2, 9), (1, 70)):
        x = torch.randn(batch, tokens, 48)
        q, k, _ = products[0](x).view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        order = torch.arange(tokens)
        rows = places.long()[(order[:, None] - order).clamp(-4, 4) + 4]
        added = (q @ k.transpose(2, 3)) * (scale - 12**-0.5)
        if used[0] is not None:
            added += torch.einsum("bhqd,hqkd->bhqk", q, keys[:, rows]) * scale
        if used[1] is not None:
            added += torch.einsum("bhkd,hqkd->bhqk", k, queries[:, rows]) * scale
        for mask in (None, torch.randn(batch, 1, tokens, tokens)):
            expected = twin(x, products, norms, heads, added if mask is None else added + mask)
            error = (fast(x, mask) - expected).abs().amax(-1)  # a value between two codes may fall to either
            assert float((error < 1e-3).float().mean()) > 0.95 and float(error.max()) < 0.3


def test_a_query_that_sees_nothing_gets_zeros_from_attention() -> None:
    products, norms, heads = some_layer(48, 4, 96, native.instruction_set())
    x, mask = torch.randn(2, 5, 48), torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1] = False
    got = NativeLayers([(one_term_each(products), norms, heads, 0)])(x, mask)
    torch.testing.assert_close(got, twin(x, products, norms, heads, mask), rtol=1e-3, atol=2e-3)


def test_what_does_not_fit_is_refused_before_the_library_reads_it() -> None:
    products, norms, heads = some_layer(48, 4, 96, native.instruction_set())
    fast = NativeLayers([(one_term_each(products), norms, heads, 0)])
    x, two = torch.randn(6, 48), torch.tensor([3, 3])
    for wrong in (x[:, :47], x.double(), x[0, 0]):
        with pytest.raises(RuntimeError, match="takes float32"):
            products[0](wrong)
    for given in ((x[:, :47], two, two), (x.double(), two, two)):
        with pytest.raises(RuntimeError, match="takes float32"):
            fast.run(*given)
    for lengths, keys in ((two + 1, two), (two, two + 1), (two, two[:1]), (two.int(), two), (two, two.int())):
        with pytest.raises(RuntimeError, match="do not fit"):
            fast.run(x, lengths, keys)
    for shape in ((2, 1, 3, 4), (3, 1, 3, 3), (2, 3, 3, 3), (2, 1, 2, 3), (1, 2, 1, 3, 3)):
        with pytest.raises(RuntimeError, match="does not broadcast"):
            fast(x.view(2, 3, 48), torch.zeros(shape))


def test_where_it_cannot_be_had_the_reason_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isa = native.instruction_set()
    monkeypatch.setenv("QBERT_CACHE", str(tmp_path))
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        native._built(isa)
    broken = tmp_path / "compiler"
    broken.write_text("#!/bin/sh\necho 'error: no sun today' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(native.shutil, "which", lambda name: str(broken))
    with pytest.raises(RuntimeError, match="no sun today"):
        native._built(isa)
    assert not list((tmp_path / "native").glob("*.so"))
    broken.write_text('#!/bin/sh\nfor a; do test "$b" = -o && echo > "$a"; b=$a; done\n')
    made = native._built(isa)
    os.chmod(made, 0o777)
    with pytest.raises(RuntimeError, match="can be written by others"):
        native._built(isa)
    monkeypatch.setattr(native.platform, "machine", lambda: "riscv64")
    with pytest.raises(RuntimeError, match="riscv64"):
        native.instruction_set.__wrapped__()


def test_a_library_that_is_there_needs_neither_a_compiler_nor_a_folder_to_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    isa = native.instruction_set()
    built = native._built(isa)
    monkeypatch.setenv("QBERT_CACHE", str(tmp_path))
    target = native._target(isa)
    target.parent.mkdir()
    shutil.copy(built, target)
    target.chmod(0o755)

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(native, "cache_folder", refuse)
    monkeypatch.setattr(native, "write_whole", refuse)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert native._built(isa) == target
    assert native._library.__wrapped__(isa).qbert_columns_of_a_tile() > 0
    with monkeypatch.context() as other_user:
        other_user.setattr(native.os, "getuid", lambda: target.stat().st_uid + 1 if target.stat().st_uid else 65534)
        if target.stat().st_uid == 0:
            assert native._built(isa) == target
        else:
            with pytest.raises(RuntimeError, match="can be written by others"):
                native._built(isa)


def fake_compiler(folder: Path) -> Path:
    compiler = folder / "compiler"
    compiler.write_text('#!/bin/sh\nfor a; do test "$b" = -o && echo > "$a"; b=$a; done\n')
    compiler.chmod(0o755)
    return compiler


def test_all_libraries_of_an_image_are_built_for_every_user_and_old_ones_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QBERT_CACHE", str(tmp_path))
    compiler = fake_compiler(tmp_path)
    monkeypatch.setattr(native.shutil, "which", lambda name: str(compiler))
    (tmp_path / "native").mkdir()
    for i in range(9):
        old = tmp_path / "native" / f"avx2-{i:016x}.so"
        old.touch()
        os.utime(old, (i, i))
    made = native.build_libraries()
    assert set(made) == set(native.INSTRUCTIONS)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o755 for path in made.values())
    left = sorted(path.name for path in (tmp_path / "native").glob("avx2-*.so"))
    assert left == sorted([*(f"avx2-{i:016x}.so" for i in range(5, 9)), made["avx2"].name])
    before = {path: path.stat().st_mtime_ns for path in made.values()}
    os.utime(compiler, (1, 1))  # as after an update of the compiler
    assert {path: path.stat().st_mtime_ns for path in native.build_libraries().values()} == before


def test_a_library_of_another_system_is_built_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isa = native.instruction_set()
    built = native._built(isa).read_bytes()
    monkeypatch.setenv("QBERT_CACHE", str(tmp_path))
    target = native._target(isa)
    target.parent.mkdir()
    target.write_bytes(b"no library")
    target.chmod(0o755)
    monkeypatch.setattr(native, "_compile", lambda _, path: path.write_bytes(built))
    assert native._library.__wrapped__(isa).qbert_columns_of_a_tile() > 0
