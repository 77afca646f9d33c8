"""Every encoder family is understood from its module tree, and every target is really called in a forward pass."""

import pytest
import torch
from encoders import FAMILIES, build, inputs_for
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM, BertConfig

from qbert.encoders.targets import base_model, encoder_layers, find_targets

EXPECTED_ROLES = {
    "bert": {"query", "key", "value", "attention_output", "ffn_in", "ffn_out"},
    "modernbert": {"qkv", "attention_output", "ffn_in", "ffn_out"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_roles_of_every_family(family: str) -> None:
    model = build(family)
    expected_layers = 1 if family == "albert" else 2
    assert len(encoder_layers(model)) == expected_layers
    targets = find_targets(model)
    for layer in range(expected_layers):
        roles = {t.role for t in targets if t.layer == layer}
        assert roles >= EXPECTED_ROLES.get(family, EXPECTED_ROLES["bert"])
    assert len({t.path for t in targets}) == len(targets)
    assert any(t.role == "head" and "classifier" in t.path for t in targets)
    assert all(model.get_submodule(t.path) is t.module for t in targets)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_target_is_called_in_a_forward_pass(family: str) -> None:
    # A module whose weight is read directly would be swapped without any effect: a silent miss.
    model = build(family).eval()
    called: set[nn.Module] = set()
    for target in find_targets(model):
        target.module.register_forward_hook(lambda module, args, output: called.add(module))
    with torch.no_grad():
        model(**inputs_for(family))
    assert [t.name for t in find_targets(model) if t.module not in called] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_no_encoder_matrix_is_overlooked(family: str) -> None:
    model = build(family)
    _prefix, _base = base_model(model)
    found = {t.path for t in find_targets(model)}
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert linears <= found
    tables = {n for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    assert tables - found == ({"deberta.encoder.rel_embeddings"} if family == "deberta-v2" else set())


def test_names_are_relative_to_the_base_model() -> None:
    headed, bare = build("bert"), AutoModel.from_config(build("bert").config)
    of_encoder = {t.name for t in find_targets(headed) if t.role != "head"}
    assert of_encoder == {t.name for t in find_targets(bare) if t.role != "head"}
    assert "encoder.layer.0.attention.self.query" in of_encoder


def test_language_model_head_and_pooler_are_heads() -> None:
    config = BertConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, vocab_size=100
    )
    roles = {t.path: t.role for t in find_targets(AutoModelForMaskedLM.from_config(config))}
    assert roles["cls.predictions.decoder"] == "head"
    assert {t.role for t in find_targets(build("bert")) if t.name.startswith("pooler")} == {"head"}


def test_subclass_with_its_own_forward_is_left_alone() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    model = build("bert")
    model.bert.embeddings.word_embeddings = Scaled(100, 48)
    assert "embeddings.word_embeddings" not in {t.name for t in find_targets(model)}


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="ModuleList"):
        encoder_layers(nn.Sequential(nn.Linear(3, 3)))
