"""`pack` and `unpack`: the deployed form computes what the trained form does, in as many bytes as arithmetic says."""

import copy
from typing import Any

import pytest
import torch
from encoders import FAMILIES, build, inputs_for, outputs
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM, LayoutLMv3Config

import qbert
from qbert.kernels import formats
from qbert.layers.embedding import PackedEmbedding, QuantEmbedding
from qbert.layers.linear import PackedLinear, QuantLinear
from qbert.layers.packed import PackedTensor
from qbert.packing import pack, unpack
from qbert.quantizers.groups import row_group_of, row_groups
from qbert.sizes import model_size

CONFIGS = {
    "2 bits, midrise, input groups": qbert.BitsConfig(2, scheme="midrise", input_group_size=12),
    "3 bits, symmetric, per head": qbert.BitsConfig(3, scheme="symmetric", groups=4),
    "4 bits, float activations": qbert.BitsConfig(4, activation_bits=None, embedding_bits=4),
    "8 and 2 bits, one group": qbert.BitsConfig({"*": 2, "*query": 8}, groups=1, embedding_bits=2),
}


def packed_layers(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedTensor)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranges", ["dynamic", "asymmetric", "static"])
def test_every_family_computes_the_same_packed_and_unpacked(family: str, ranges: str) -> None:
    model, batch = build(family).eval(), inputs_for(family)
    config = qbert.BitsConfig(3, activation_range=ranges)
    student = qbert.quantize_model(model, config, calibration_data=[batch])
    before = copy.deepcopy(student.state_dict())
    packed = pack(student)
    assert type(packed) is type(model) and not packed.training
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert not any(isinstance(m, (QuantLinear, QuantEmbedding)) for m in packed.modules())
    expected = outputs(student.eval(), batch)
    assert torch.allclose(outputs(packed, batch), expected, rtol=1e-5, atol=1e-6)
    trainable = unpack(packed)
    assert torch.equal(outputs(trainable, batch), outputs(packed, batch))
    for name, layer in packed_layers(packed).items():
        assert torch.equal(layer.quantized_weight(), student.get_submodule(name).quantized_weight()), name
        assert torch.equal(layer.quantized_weight(), trainable.get_submodule(name).quantized_weight()), name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_scheme_is_exact(config: qbert.BitsConfig) -> None:
    student, batch = qbert.quantize_model(build("bert"), config).eval(), inputs_for("bert")
    packed = pack(student)
    assert torch.allclose(outputs(packed, batch), outputs(student, batch), rtol=1e-5, atol=1e-6)
    again = pack(unpack(packed))
    for name, layer in packed_layers(packed).items():
        trained = student.get_submodule(name)
        assert torch.equal(layer.int_codes(), trained.weight_quantizer.codes(trained.weight))
        for key, tensor in layer.state_dict().items():
            assert torch.equal(tensor, again.get_submodule(name).state_dict()[key]), (name, key)


def test_weights_are_scale_times_code_minus_zero() -> None:
    packed = pack(qbert.quantize_model(build("bert"), qbert.BitsConfig(4, groups=8, input_group_size=12)))
    layer = packed.bert.encoder.layer[1].attention.self.key
    assert layer.codes.dtype == torch.uint8 and layer.zero.dtype == torch.int8 and layer.scale.shape == (8, 4)
    codes, weight = formats.unpack(layer.codes, 4, 48), layer.quantized_weight()
    for row in range(48):
        for column in range(0, 48, 5):
            group = row // 6, column // 12
            want = layer.scale[group] * (float(codes[row, column]) - float(layer.zero[group]))
            assert weight[row, column] == want


@given(st.integers(1, 12), st.integers(1, 40), st.data())
def test_groups_in_closed_form_are_those_of_the_quantizer(heads: int, head_rows: int, data: st.DataObject) -> None:
    rows = heads * head_rows
    groups = data.draw(st.integers(1, rows))
    for blocks in (None, heads):
        if blocks is not None and groups < blocks and blocks % groups:
            continue
        expected = row_groups(rows, groups, blocks)
        assert torch.equal(row_group_of(torch.arange(rows), rows, groups, blocks), expected)


@pytest.mark.parametrize("config", [3, CONFIGS["3 bits, symmetric, per head"], CONFIGS["4 bits, float activations"]])
@pytest.mark.parametrize("family", ["bert", "albert", "mobilebert"])
def test_bytes_in_memory_are_the_arithmetic(family: str, config: int | qbert.BitsConfig) -> None:
    model = build(family)
    packed = pack(qbert.quantize_model(model, config))
    stored = sum(t.numel() * t.element_size() for t in packed.state_dict().values())
    buffers = {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    assert stored == model_size(model, config).total + sum(b.numel() * b.element_size() for b in buffers.values())


def test_tied_weights_stay_tied() -> None:
    model = AutoModelForMaskedLM.from_config(build("bert").config).eval()
    packed = pack(qbert.quantize_model(model, 4))
    head, table = packed.cls.predictions.decoder, packed.bert.embeddings.word_embeddings
    assert isinstance(head, PackedLinear) and head.owner is table and "codes" not in head.state_dict()
    assert head.bias is packed.cls.predictions.bias
    assert torch.equal(head.quantized_weight(), table.quantized_weight())
    moved = copy.deepcopy(packed).to(torch.bfloat16)
    assert moved.cls.predictions.decoder.owner is moved.bert.embeddings.word_embeddings
    trainable = unpack(packed)
    decoder = trainable.cls.predictions.decoder
    assert decoder.weight is trainable.bert.embeddings.word_embeddings.weight
    assert decoder.weight_quantizer is trainable.bert.embeddings.word_embeddings.weight_quantizer
    assert decoder.bias is trainable.cls.predictions.bias


def test_a_head_that_reads_a_weight_past_its_quantizer_is_refused() -> None:
    model = AutoModelForMaskedLM.from_config(build("mobilebert").config).eval()
    with pytest.raises(ValueError, match=r"cls\.predictions\.decoder without calling"):
        pack(qbert.quantize_model(model, 4))
    student = qbert.quantize_model(model, {"embeddings": 32, "*": 4})
    packed, batch = pack(student), inputs_for("mobilebert")
    with torch.no_grad():
        assert torch.allclose(packed(**batch).logits, student(**batch).logits, rtol=1e-4, atol=1e-5)


def test_matrices_that_are_only_read_stay_in_float() -> None:
    sizes: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    boxes = {"input_size": 32, "patch_size": 16, "coordinate_size": 8, "shape_size": 8}
    model = AutoModel.from_config(LayoutLMv3Config(**sizes, **boxes, intermediate_size=96)).eval()
    batch = inputs_for("bert")
    batch["bbox"] = torch.randint(0, 500, (*batch["input_ids"].shape, 4)).sort(dim=-1)[0]
    student = qbert.quantize_model(model, 2)
    packed = pack(student)
    assert type(packed.encoder.rel_pos_x_bias) is nn.Linear
    with torch.no_grad():
        assert torch.allclose(packed(**batch)[0], student(**batch)[0], rtol=1e-5, atol=1e-6)


def test_shared_layers_stay_shared() -> None:
    packed = pack(qbert.quantize_model(build("albert", num_hidden_layers=3), 4))
    names = [n for n in packed.state_dict() if n.endswith("ffn.codes")]
    assert len(names) == 1
    twice = nn.Sequential(layer := nn.Linear(8, 8), nn.ReLU(), layer)
    deployed = pack(qbert.quantize_model(twice, 4))
    assert deployed[0] is deployed[2] and isinstance(deployed[0], PackedLinear)


def test_only_looked_up_rows_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(qbert.quantize_model(build("bert"), {"embeddings": 3, "*": 8}))
    table = packed.bert.embeddings.word_embeddings
    ids = torch.tensor([[7, 7, 99], [0, 3, 5]])
    expected = table.quantized_weight()[ids]
    rows: list[int] = []
    original = formats.unpack

    def counting(packed_rows: torch.Tensor, *args: int) -> torch.Tensor:
        rows.append(len(packed_rows))
        return original(packed_rows, *args)

    monkeypatch.setattr(formats, "unpack", counting)
    assert torch.equal(table(ids), expected)
    assert rows == [6]
    assert table(ids[:0]).shape == (0, 3, 48) and table(torch.tensor(4)).shape == (48,)
    for bad in (-1, 100):
        with pytest.raises(IndexError):
            table(torch.tensor([bad]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_moves_keep_codes_and_scales(dtype: torch.dtype) -> None:
    packed, batch = pack(qbert.quantize_model(build("bert"), 4)), inputs_for("bert")
    before, expected = copy.deepcopy(packed.state_dict()), outputs(packed, batch)
    weights = {n: m.quantized_weight() for n, m in packed_layers(packed).items()}
    packed.to(dtype)
    for name, layer in packed_layers(packed).items():
        assert layer.codes is not None and layer.codes.dtype == torch.uint8
        assert torch.equal(layer.scale, before[f"{name}.scale"]) and layer.dtype == dtype
        assert torch.equal(layer.quantized_weight(), weights[name].to(dtype)) or dtype == torch.float64
    got = outputs(packed, batch)
    assert got.dtype == dtype and (got.float() - expected).abs().max() < 0.02 * expected.abs().max() + 0.01
    packed.to(torch.float32)
    assert all(torch.equal(layer.quantized_weight(), weights[n]) for n, layer in packed_layers(packed).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric", "midrise", "offset"])
def test_a_half_precision_model_is_packed_as_it_computes(scheme: str, dtype: torch.dtype) -> None:
    model = build("bert", num_hidden_layers=1).to(dtype)
    for bits in (2, 3, 4, 8):
        config = qbert.BitsConfig(bits, scheme=scheme, embedding_bits=bits, range_method="minmax")
        student = qbert.quantize_model(model, config)
        for name, layer in packed_layers(pack(student)).items():
            trained = student.get_submodule(name)
            weight = trained.quantized_weight()
            assert weight.dtype == dtype and torch.equal(layer.quantized_weight(), weight), (name, bits)
            assert torch.equal(layer.int_codes(), trained.weight_quantizer.codes(trained.weight.float())), (name, bits)


@pytest.mark.parametrize("late", [False, True], ids=["half before", "half after"])
def test_a_constant_row_in_float16_with_an_offset_stays_finite(late: bool) -> None:
    model, config = build("bert").eval(), qbert.BitsConfig(4, scheme="offset", groups=96)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[3] = 0.1
    student = qbert.quantize_model(model, config).half() if late else qbert.quantize_model(model.half(), config)
    for form in (student, pack(student)):
        row = form.bert.encoder.layer[0].output.dense.quantized_weight()[3]
        assert torch.allclose(row.float(), torch.full((96,), 0.1), atol=1e-4)
        assert bool(torch.isfinite(outputs(form, inputs_for("bert"))).all())


def test_learned_zero_points_are_kept_as_floats() -> None:
    student, batch = qbert.quantize_model(build("bert"), 4).eval(), inputs_for("bert")
    layer = student.bert.encoder.layer[0].output.dense
    layer.weight_quantizer.zero.data += 0.3
    packed = pack(student)
    twin = packed.bert.encoder.layer[0].output.dense
    assert twin.zero.dtype == torch.float32 and torch.equal(twin.quantized_weight(), layer.quantized_weight())
    assert torch.allclose(outputs(packed, batch), outputs(student, batch), rtol=1e-5, atol=1e-6)


def test_row_groups_of_no_known_kind_are_refused() -> None:
    student = qbert.quantize_model(build("bert"), 4)
    group = student.bert.encoder.layer[0].output.dense.weight_quantizer.row_group
    group.copy_(group.flip(0))
    with pytest.raises(ValueError, match="row groups"):
        pack(student)


@pytest.mark.parametrize("where", ["weight", "scale", "zero point"])
@pytest.mark.parametrize("layer", ["bert.encoder.layer.1.output.dense", "bert.embeddings.word_embeddings"])
def test_what_is_not_finite_is_not_packed(where: str, layer: str) -> None:
    student = qbert.quantize_model(build("bert"), 4)
    module = student.get_submodule(layer)
    quantizer = module.weight_quantizer
    tensor = {"weight": module.weight, "scale": quantizer.scale, "zero point": quantizer.zero}[where]
    tensor.data[3, 0] = float("nan") if where == "weight" else float("inf")
    with pytest.raises(ValueError, match=f"the {where} of {layer} holds NaN or infinity"):
        pack(student)


def test_static_ranges_that_were_never_calibrated_are_not_packed() -> None:
    batch = inputs_for("bert")
    student = qbert.quantize_model(build("bert"), 4, calibration_data=[batch])
    student.bert.encoder.layer[0].attention.self.key.activation_quantizer.scale.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"static activation range of .*layer\.0\.attention\.self\.key is nan"):
        pack(student)


@pytest.mark.parametrize("call", [pack, unpack, qbert.optimize_for_inference, lambda m: qbert.export_onnx(m, "x")])
def test_what_is_no_model_is_refused(call: Any) -> None:
    with pytest.raises(TypeError, match=r"a str is not a model.*qbert\.load"):
        call("out")


def test_training_and_wrong_models_are_refused_in_one_sentence() -> None:
    model, batch = build("bert"), inputs_for("bert")
    with pytest.raises(ValueError, match="quantize_model first"):
        pack(model)
    packed = pack(qbert.quantize_model(model, 4))
    with pytest.raises(ValueError, match="packed already"):
        pack(packed)
    with pytest.raises(ValueError, match="no packed layer"):
        unpack(model)
    packed.train()
    with pytest.raises(RuntimeError, match=r"cannot be trained.*unpack"):
        packed(**batch)
    assert outputs(packed.eval(), batch).isfinite().all()


def test_gradients_reach_the_input_as_in_the_trained_form() -> None:
    student = qbert.quantize_model(nn.Sequential(nn.Linear(16, 8)), 4).eval()
    packed = pack(student)
    x = torch.randn(3, 16, requires_grad=True)
    student(x).square().sum().backward()
    twin = x.detach().clone().requires_grad_()
    packed(twin).square().sum().backward()
    assert x.grad is not None and twin.grad is not None
    assert torch.allclose(x.grad, twin.grad) and x.grad.abs().max() > 0


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_compiles_in_one_graph_and_exports(family: str) -> None:
    packed, batch = pack(qbert.quantize_model(build(family), 3)), inputs_for(family)
    expected = outputs(packed, batch)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert torch.allclose(outputs(compiled, batch), expected, rtol=1e-5, atol=1e-6)
    exported = torch.export.export(packed, (), batch).module()
    assert torch.allclose(exported(**batch).logits, expected, rtol=1e-5, atol=1e-6)
    stored = [b for b in exported.buffers() if b.dtype == torch.uint8]
    assert len(stored) == len(packed_layers(packed))


def test_ragged_widths_and_repr() -> None:
    model = nn.Sequential(nn.Embedding(11, 13), nn.Linear(13, 7), nn.Linear(7, 5, bias=False))
    for bits in (2, 3, 4, 8):
        student = qbert.quantize_model(model, qbert.BitsConfig({"*": bits, "embeddings": bits}))
        packed, ids = pack(student), torch.randint(0, 11, (4,))
        assert torch.allclose(packed(ids), student.eval()(ids), rtol=1e-5, atol=1e-6)
    assert isinstance(packed[0], PackedEmbedding) and "bits=8" in repr(packed)
