"""`quantize_model` on every encoder family: what changes, what does not, and what is refused untouched."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from encoders import FAMILIES, build, inputs_for
from torch import nn
from transformers import AutoModelForMaskedLM, BertConfig

import qbert
from qbert.layers.embedding import QuantEmbedding
from qbert.layers.linear import QuantLinear


def quantized_modules(model: nn.Module) -> dict[str, QuantLinear | QuantEmbedding]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (QuantLinear, QuantEmbedding))}


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_quantized_and_the_original_left_alone(family: str) -> None:
    model, batch = build(family).eval(), inputs_for(family)
    before, expected = copy.deepcopy(model.state_dict()), logits(model, batch)
    student = qbert.quantize_model(model, 8)
    assert type(student) is type(model) and not quantized_modules(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(model, batch), expected)
    modules = quantized_modules(student)
    assert modules and not any("classifier" in n or "pooler" in n for n in modules)
    error = (logits(student, batch) - expected).norm() / expected.norm()
    assert 0 < error < 0.03
    worse = (logits(qbert.quantize_model(model, 2), batch) - expected).norm() / expected.norm()
    assert worse > error or family == "modernbert"  # its random initialisation leaves the layers nearly inert


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantized_weights_take_few_values_per_group(family: str, bits: int) -> None:
    student = qbert.quantize_model(build(family), qbert.BitsConfig({"*": bits, "embeddings": bits}))
    for name, module in quantized_modules(student).items():
        weight, index = module.quantized_weight(), module.weight_quantizer.row_group
        assert weight.shape == module.weight.shape
        for group in index.unique()[:3]:
            assert len(weight[index == group].unique()) <= 2**bits, name
        assert int(module.weight_quantizer.codes(module.weight).abs().max()) <= 2 ** (bits - 1)


def test_forward_is_the_slow_and_obvious_formula() -> None:
    student = qbert.quantize_model(build("bert"), qbert.BitsConfig(3, input_group_size=12)).eval()
    layer = student.bert.encoder.layer[0].intermediate.dense
    q, x = layer.weight_quantizer, torch.randn(2, 5, 48)
    weight = torch.empty(96, 48)
    for row in range(96):
        for column in range(48):
            s, z = q.scale[q.row_group[row], column // 12], q.zero[q.row_group[row], column // 12]
            code = torch.clamp(torch.round(layer.weight[row, column] / s + z), -4, 3)
            weight[row, column] = s * (code - z)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    s = (high - low) / 255
    assert torch.allclose(layer(x), F.linear(((x - low) / s).round() * s + low, weight, layer.bias), atol=1e-6)
    assert torch.allclose(layer.quantized_weight(), weight, atol=1e-7)


def test_embedding_rows_are_quantized_after_the_lookup() -> None:
    student = qbert.quantize_model(build("bert"), {"embeddings": 4, "*": 8})
    table = student.bert.embeddings.word_embeddings
    ids = torch.randint(0, 100, (3, 7))
    assert torch.equal(table(ids), F.embedding(ids, table.quantized_weight()))


def test_mixed_bits_reach_their_layers() -> None:
    student = qbert.quantize_model(build("bert"), {"encoder.layer.0": 2, "encoder.layer.1": 8, "embeddings": 4})
    bits = {n: m.spec.bits for n, m in quantized_modules(student).items()}
    assert {b for n, b in bits.items() if "layer.0" in n} == {2}
    assert {b for n, b in bits.items() if "layer.1" in n} == {8}
    assert {b for n, b in bits.items() if "embeddings" in n} == {4}


def masked_lm(vocabulary: int = 100) -> nn.Module:
    """A model whose decoder [V, D] is its table of words; its default of 128 row groups is not a group a row."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    return AutoModelForMaskedLM.from_config(BertConfig(**sizes, vocab_size=vocabulary)).eval()


def test_tied_language_model_head_stays_tied() -> None:
    student = qbert.quantize_model(masked_lm(), {"embeddings": 4, "*": 4})
    table, decoder = student.bert.embeddings.word_embeddings, student.cls.predictions.decoder
    assert decoder.weight is table.weight
    assert torch.equal(decoder.quantized_weight(), table.quantized_weight())
    with torch.no_grad():
        table.weight[7] += 1.0
    assert torch.equal(decoder.quantized_weight(), table.quantized_weight())


@pytest.mark.parametrize(
    ("decoder", "table"),
    [(4, 8), (8, {"bits": 8, "scheme": "symmetric"}), (4, 32), ({"bits": 8, "groups": 100}, 8)],
    ids=["bits", "scheme", "float table", "groups"],
)
def test_different_grids_for_a_tied_weight_are_refused(decoder, table) -> None:
    config = {"embeddings.word_embeddings": table, "cls.predictions.decoder": decoder, "*": 4}
    for use in (qbert.quantize_model, qbert.model_size):
        with pytest.raises(ValueError, match="share one weight but are given"):
            use(masked_lm(200), config)


def test_a_named_head_has_the_grid_of_the_table_it_is_tied_to() -> None:
    model, config = masked_lm(200), {"embeddings": 8, "cls.predictions.decoder": 8, "*": 4}
    student = qbert.quantize_model(model, config)
    table, decoder = student.bert.embeddings.word_embeddings, student.cls.predictions.decoder
    assert torch.equal(decoder.quantized_weight(), table.quantized_weight())
    sizes = [qbert.model_size(*m).total for m in ((model, config), (student,), (qbert.pack(student),))]
    assert len(set(sizes)) == 1, sizes


def test_a_module_used_twice_is_still_one_module() -> None:
    model = build("bert")
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    student = qbert.quantize_model(model, 4)
    assert student.bert.encoder.layer[1] is student.bert.encoder.layer[0]


def test_albert_shares_its_one_quantized_layer() -> None:
    student = qbert.quantize_model(build("albert", num_hidden_layers=4), 4)
    assert len([n for n in quantized_modules(student) if n.endswith("attention.query")]) == 1


def test_inplace_converts_the_model_itself() -> None:
    model = build("bert")
    assert qbert.quantize_model(model, 4, inplace=True) is model and quantized_modules(model)


def test_quantizing_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not quantized yet|matches no tensor|left in float"):
        qbert.quantize_model(qbert.quantize_model(build("bert"), {"*": 4, "classifier": 8, "pooler": 8}), 4)


def test_gradients_reach_the_float_weights() -> None:
    student = qbert.quantize_model(build("bert"), 4).train()
    batch = {**inputs_for("bert"), "labels": torch.tensor([0, 1])}
    student(**batch).loss.backward()
    for name, module in quantized_modules(student).items():
        if "position" not in name and "token_type" not in name:
            assert module.weight.grad is not None and bool(module.weight.grad.abs().sum() > 0), name


def test_static_activations_from_calibration_data() -> None:
    model, batch = build("bert").eval(), inputs_for("bert", batch=8, length=16)
    student = qbert.quantize_model(model, 8, calibration_data=[batch])
    quantizers = [m.activation_quantizer for m in quantized_modules(student).values() if isinstance(m, QuantLinear)]
    assert all(q is not None and q.mode == "static" and bool(torch.isfinite(q.scale)) for q in quantizers)
    error = (logits(student, batch) - logits(model, batch)).norm() / logits(model, batch).norm()
    assert error < 0.05
    dynamic = qbert.quantize_model(model, qbert.BitsConfig(8, activation_range="dynamic"), calibration_data=[batch])
    linears = [m for m in quantized_modules(dynamic).values() if isinstance(m, QuantLinear)]
    assert all(m.activation_quantizer is not None and m.activation_quantizer.mode == "dynamic" for m in linears)


def test_calibration_ignores_padding_and_changes_no_mode() -> None:
    model = build("bert").train()
    model.bert.pooler.eval()
    batch = inputs_for("bert", batch=4, length=12)
    longer = {k: F.pad(v, (0, 20)) for k, v in batch.items()}
    students = [qbert.quantize_model(model, 8, calibration_data=[b]) for b in (batch, longer)]
    first, second = (quantized_modules(s)["bert.encoder.layer.0.attention.self.query"] for s in students)
    assert torch.allclose(first.activation_quantizer.scale, second.activation_quantizer.scale, rtol=1e-4)
    assert students[0].training and not students[0].bert.pooler.training


@pytest.mark.parametrize("data", [[], {}, iter(())])
def test_empty_calibration_data_is_refused(data) -> None:
    with pytest.raises((ValueError, TypeError, KeyError), match=r"calibration_data|empty"):
        qbert.quantize_model(build("bert"), 4, calibration_data=data)


def test_refusals_leave_the_model_untouched() -> None:
    model = build("bert")
    with pytest.raises(ValueError, match="needs calibration_data"):
        qbert.quantize_model(model, qbert.BitsConfig(4, activation_range="static"), inplace=True)
    with pytest.raises(TypeError, match="calibration_data"):
        qbert.quantize_model(model, 4, calibration_data=3, inplace=True)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense holds NaN"):
        qbert.quantize_model(model, 4, inplace=True)
    assert not quantized_modules(model)


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric", "midrise", "offset"])
def test_weights_are_as_large_as_grids_can_cover(scheme: str) -> None:
    model = build("bert")
    weight = model.bert.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        weight[0, 0], weight[0, 1] = -1e36, 1e36
    config = qbert.BitsConfig(2, scheme=scheme)
    rounded = qbert.quantize_model(model, config).bert.encoder.layer[0].output.dense.quantized_weight()
    assert bool(rounded.isfinite().all())
    with torch.no_grad():
        weight[0, 0] = -3e38
    with pytest.raises(ValueError, match=r"layer\.0\.output\.dense holds values up to 3\.0e\+38"):
        qbert.quantize_model(model, config)


def test_what_cannot_be_quantized_is_named() -> None:
    with pytest.raises(TypeError, match=r"model: expected an encoder .*, got str"):
        qbert.quantize_model("bert-base-uncased", 4)
    with pytest.raises(ValueError, match="model: a bare Linear"):
        qbert.quantize_model(nn.Linear(3, 4), 4)
    staged = qbert.quantize_model(build("bert"), qbert.BitsConfig(4, embedding_bits=32))
    with pytest.raises(ValueError, match="query is quantized already"):  # not: the tables alone, in silence
        qbert.quantize_model(staged, 2)
    with torch.device("meta"):
        empty = build("bert")
    with pytest.raises(ValueError, match="word_embeddings has no values"):
        qbert.quantize_model(empty, 4)
    renormalized = build("bert")
    renormalized.bert.embeddings.position_embeddings.max_norm = 1.0
    with pytest.raises(ValueError, match=r"position_embeddings .*max_norm"):
        qbert.quantize_model(renormalized, 4, inplace=True)
    assert not quantized_modules(renormalized)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"input_ids": [[1, 2, 3]]}, TypeError, r"dict of tensors, .*; got a dict of input_ids"),
        ({"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.zeros(1, 3).long()}, ValueError, "unmasked"),
        ({"input_ids": torch.full((1, 3), 1000)}, ValueError, "the id 1000 is none of the model's 100"),
    ],
    ids=["lists", "masked", "no such token"],
)
def test_calibration_that_fails_leaves_the_model_as_it_was(batch, error, message: str) -> None:
    model = masked_lm()
    before = dict(model.named_modules())
    with pytest.raises(error, match=message):
        qbert.quantize_model(model, 4, calibration_data=[batch], inplace=True)
    assert dict(model.named_modules()) == before


def test_calibration_names_the_layer_that_sees_infinity() -> None:
    model = build("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.bias[0] = float("inf")
    data = [inputs_for("bert"), inputs_for("bert")]
    with pytest.raises(
        ValueError, match=r"the input of bert\.encoder\.layer\.1\.attention\.self\.query runs from -inf"
    ):
        qbert.quantize_model(model, 4, calibration_data=data)


def test_hooks_go_with_the_place() -> None:
    model, batch, seen = build("bert").eval(), inputs_for("bert"), []
    dense = model.bert.encoder.layer[0].output.dense
    handle = dense.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    dense.register_forward_pre_hook(lambda module, args, kwargs: seen.append("before"), with_kwargs=True)
    logits(qbert.quantize_model(model, 4), batch)
    assert seen == ["before", QuantLinear]
    qbert.quantize_model(model, 4, inplace=True)
    handle.remove()
    logits(model, batch)
    assert seen == ["before", QuantLinear, "before"]


def test_students_made_in_inference_mode_can_be_trained() -> None:
    model = build("bert")
    with torch.inference_mode():
        student = qbert.quantize_model(model, 4)
    student(**inputs_for("bert")).logits.sum().backward()
    assert student.bert.encoder.layer[0].output.dense.weight.grad is not None


def test_a_bits_file_is_accepted(tmp_path) -> None:
    (tmp_path / "bits.json").write_text(json.dumps({"encoder.layer.0": 8, "*": 4}))
    student = qbert.quantize_model(build("bert"), tmp_path / "bits.json")
    assert quantized_modules(student)["bert.encoder.layer.0.output.dense"].spec.bits == 8


def test_state_dict_keeps_the_float_names() -> None:
    model = build("bert")
    student = qbert.quantize_model(model, 4)
    assert set(model.state_dict()) <= set(student.state_dict())
    copy_of_it = qbert.quantize_model(build("bert"), 4)
    copy_of_it.load_state_dict(student.state_dict())
    batch = inputs_for("bert")
    assert torch.equal(logits(copy_of_it.eval(), batch), logits(student.eval(), batch))


def test_half_precision_models() -> None:
    model = build("bert").to(torch.bfloat16).eval()
    student = qbert.quantize_model(model, 4)
    assert logits(student, inputs_for("bert")).dtype == torch.bfloat16


@pytest.mark.parametrize("default", ["bfloat16", "float64", "meta"])
def test_what_torch_creates_by_default_makes_no_difference(default: str) -> None:
    model, batch = build("bert").eval(), inputs_for("bert")
    configs = [(qbert.BitsConfig(8, groups=12), None), (qbert.BitsConfig(2, groups=12), [batch])]
    expected = [logits(qbert.quantize_model(model, c, calibration_data=d), batch) for c, d in configs]
    try:
        if default == "meta":
            torch.set_default_device("meta")  # as set_default_device("cuda") beside a model on the CPU
        else:
            torch.set_default_dtype(getattr(torch, default))
        students = [qbert.quantize_model(model, c, calibration_data=d) for c, d in configs]
        found = [logits(student, batch) for student in students]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert {m.weight_quantizer.scale.dtype for s in students for m in quantized_modules(s).values()} == {torch.float32}


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric", "midrise"])
@pytest.mark.parametrize("late", [False, True], ids=["half before", "half after"])
def test_rows_of_zeros_in_half_precision(scheme: str, late: bool) -> None:
    model, batch = build("bert").eval(), inputs_for("bert")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[:50] = 0
        model.bert.encoder.layer[0].output.dense.weight.zero_()
        model.bert.encoder.layer[1].intermediate.dense.weight.mul_(1e-6)  # hardly more than float16's smallest number
    config = qbert.BitsConfig(8, groups=16, scheme=scheme)
    student = qbert.quantize_model(model, config).half() if late else qbert.quantize_model(model.half(), config)
    assert float(student.bert.embeddings.word_embeddings.quantized_weight()[:50].abs().max()) < 1e-7
    assert float(student.bert.encoder.layer[0].output.dense.quantized_weight().abs().max()) < 1e-7
    outputs = logits(student, batch)
    assert bool(torch.isfinite(outputs).all())
    assert torch.equal(outputs, logits(qbert.pack(student), batch))


def test_sentence_transformer() -> None:
    st = pytest.importorskip("sentence_transformers")
    from qbert.tasks.embedded import embedded_encoder

    model = st.SentenceTransformer(str(embedded_encoder()), device="cpu")
    sentences = ["The train was late again.", "Our train did not arrive on time.", "Soup of the day: leek."]
    for bits, least_cosine in ((8, 0.995), (4, 0.9)):
        student = qbert.quantize_model(model, bits)
        assert len(quantized_modules(student)) == 6 * 6 + 3
        assert (model.encode(sentences) * student.encode(sentences)).sum(1).min() > least_cosine
