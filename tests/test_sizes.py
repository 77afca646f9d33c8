"""Bytes of a model under a configuration: arithmetic by hand, ties, agreement with the quantized model."""

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from encoders import FAMILIES, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qbert.bits import BitsConfig
from qbert.kernels import formats
from qbert.layers.embedding import QuantEmbedding
from qbert.layers.linear import QuantLinear
from qbert.packing import pack
from qbert.quantize import quantize_model
from qbert.sizes import model_size


def bert_base() -> Any:
    with torch.device("meta"):
        return tf.BertForSequenceClassification(tf.BertConfig())


def test_paper_sizes_of_bert_base() -> None:
    model = bert_base()
    half = {f"encoder.layer.{i}": 3 if i < 6 else 2 for i in range(12)}
    mixed = model_size(model, half)
    assert mixed.encoder_ratio == pytest.approx(12.8)
    assert mixed.float_total == sum(p.numel() for p in model.parameters()) * 4
    # Q-BERT table 1 (a), MiB, matrices and tables without metadata; biases and heads add 0.6 + 2.3 MiB here.
    for config, paper in ((half, 25.4), (3, 30.4), (2, 20.3), (4, 40.6), (8, 81.1)):
        assert model_size(model, config).encoder / 2**20 == pytest.approx(paper, rel=5e-3)
    assert model_size(model).float_total / 2**20 == pytest.approx(415.4 + 2.3, rel=2e-3)
    assert model_size(model).ratio == 1.0
    # 72 matrices x 128 groups x (float32 scale + int8 zero point), and one group a row in the tables
    assert mixed.metadata == 72 * 128 * 5 + (30522 + 512 + 2) * 5


@pytest.mark.parametrize("scheme,per_group", [("asymmetric", 5), ("symmetric", 4), ("midrise", 4)])
def test_metadata_by_scheme_and_groups(scheme: str, per_group: int) -> None:
    model = build("bert")
    config = BitsConfig({"*": 4}, embedding_bits=32, scheme=scheme, groups=12, input_group_size=16)
    size = model_size(model, config)
    assert size.metadata == 2 * per_group * 12 * (5 * 48 // 16 + 96 // 16)
    assert size.embeddings == 4 * 48 * (100 + 512 + 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [3, {"*": 8}])
def test_config_and_quantized_model_agree(family: str, bits: Any) -> None:
    model = build(family)
    by_config = model_size(model, BitsConfig(bits, groups=4, activation_range="dynamic"))
    quantized = quantize_model(model, BitsConfig(bits, groups=4, range_method="minmax"))
    by_model = model_size(quantized)
    assert by_config.total == by_model.total
    assert {(t.name, t.part, t.bits) for t in by_config.tensors} == {(t.name, t.part, t.bits) for t in by_model.tensors}
    assert by_config.float_total == model_size(model).total
    packed = model_size(pack(quantized))
    assert sorted(packed.tensors, key=str) == sorted(by_model.tensors, key=str)


def test_codes_take_the_bytes_that_packing_gives() -> None:
    model = quantize_model(build("bert", hidden_size=44, intermediate_size=92), BitsConfig({"*": 3}, groups=4))
    expected = {
        f"{path}.weight": formats.pack(m.weight_quantizer.codes(m.weight), m.weight_quantizer.bits).numel()
        for path, m in model.named_modules()
        if isinstance(m, (QuantLinear, QuantEmbedding))
    }
    found = {t.name: t.weight_bytes for t in model_size(model).tensors if t.name in expected}
    assert found == expected


def test_static_ranges_are_counted() -> None:
    model = build("bert")
    dynamic = model_size(model, BitsConfig(4, groups=4, activation_range="dynamic"))
    static = model_size(model, BitsConfig(4, groups=4, activation_range="static"))
    assert static.total - dynamic.total == 8 * 12
    batches = [{"input_ids": torch.randint(5, 100, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}]
    calibrated = quantize_model(model, BitsConfig(4, groups=4), calibration_data=batches)
    assert model_size(calibrated).total == static.total == model_size(pack(calibrated)).total


def test_tied_weights_are_counted_once() -> None:
    config = tf.BertConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, vocab_size=100
    )
    model = tf.BertForMaskedLM(config)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model_size(model).total == 4 * sum(p.numel() for p in model.parameters())
    size = model_size(model, BitsConfig(4, groups=4))
    table = [t for t in size.tensors if t.elements == 100 * 48]
    assert [(t.bits, t.weight_bytes) for t in table] == [(4, 2400)]
    quantized = quantize_model(model, BitsConfig(4, groups=4))
    assert model_size(quantized).total == size.total == model_size(pack(quantized)).total


def test_learned_zero_points_take_four_bytes() -> None:
    quantized = quantize_model(build("bert"), BitsConfig({"encoder.layer.0": 4}, groups=4, embedding_bits=32))
    before = model_size(quantized).metadata
    module = quantized.bert.encoder.layer[0].output.dense
    with torch.no_grad():
        module.weight_quantizer.zero += 0.25
    assert model_size(quantized).metadata == before + 3 * 4 == model_size(pack(quantized)).metadata


def test_shared_layers_are_counted_once() -> None:
    one, many = build("albert", num_hidden_layers=1), build("albert", num_hidden_layers=6)
    assert model_size(one, BitsConfig(2, groups=4)).total == model_size(many, BitsConfig(2, groups=4)).total


def test_float_tensors_keep_their_own_dtype() -> None:
    model = build("bert")
    half = copy.deepcopy(model).half()
    assert model_size(half).total * 2 == model_size(model).total
    mixed = model_size(half, BitsConfig({"encoder.layer.0": 4}, groups=4, embedding_bits=32))
    assert mixed.embeddings == 2 * 48 * (100 + 512 + 2)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([2, 3, 4, 8]), min_size=2, max_size=2), st.sampled_from([4, 8, 32]))
def test_ratio_is_the_mean_of_the_bits(layers: list[int], tables: int) -> None:
    config = BitsConfig({f"encoder.layer.{i}": b for i, b in enumerate(layers)}, embedding_bits=tables, groups=4)
    size = model_size(MODEL, config)
    assert size.encoder_ratio == pytest.approx(32 / (sum(layers) / 2))
    assert size.embeddings == 48 * (100 + 512 + 2) * tables // 8
    assert size.total == size.encoder + size.embeddings + size.other + size.metadata
    assert size.ratio == pytest.approx(size.float_total / size.total)


MODEL = build("bert")


def test_table_and_units() -> None:
    size = model_size(MODEL, BitsConfig(4, groups=4))
    assert size.mb == size.total / 1e6 and size.mib == size.total / 2**20
    text = str(size)
    assert "encoder matrices" in text and "8.0x" in text and "scales and zero points" in text


def test_plain_stack_of_linears() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    size = model_size(model, BitsConfig(4, groups=4))
    assert size.encoder == (16 * 8 + 8 * 4) // 2 and size.other == 4 * 12


def test_a_quantized_model_takes_no_config() -> None:
    with pytest.raises(ValueError, match="quantized already"):
        model_size(quantize_model(MODEL, BitsConfig(4, groups=4)), 4)
