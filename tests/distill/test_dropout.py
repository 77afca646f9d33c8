"""A recipe without dropout trains without any, whatever form a family's dropout takes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from distilling import distiller
from encoders import FAMILIES, build, inputs_for
from torch import nn

import qbert
from qbert.distill import Match, Recipe, Stage
from qbert.distill.aside import restore, train_without_dropout

LOGITS = (Stage("logits", (Match("logits"),)),)
RATES = {
    "albert": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2},
    "mobilebert": {"hidden_dropout_prob": 0.2},
    "modernbert": {"attention_dropout": 0.2, "embedding_dropout": 0.2, "mlp_dropout": 0.2},
}


def functional(family: str) -> Any:
    """Families that drop hidden states, or whole layers, by functions that read a number or the config."""
    if family == "bart":
        config: Any = tf.BartConfig(
            vocab_size=100, d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, dropout=0.2, attention_dropout=0.2,
            activation_dropout=0.2, encoder_layerdrop=0.5,
        )  # fmt: skip
    else:
        config = tf.XLMConfig(vocab_size=100, emb_dim=16, n_layers=2, n_heads=2, dropout=0.2, attention_dropout=0.2)
    return tf.AutoModel.from_config(config)


def passes_differ(model: Any, inputs: dict[str, torch.Tensor]) -> bool:
    with torch.no_grad():
        one, two = (model(**inputs)[0] for _ in range(2))
    return not torch.equal(one, two)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "bart", "xlm"])
def test_two_training_passes_agree_in_every_family(family: str, checkpointing: bool) -> None:
    model = functional(family) if family in ("bart", "xlm") else build(family, **RATES.get(family, {}))
    if checkpointing and not model.supports_gradient_checkpointing:
        pytest.skip(f"{family} does not recompute activations")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = inputs_for("bert" if family in ("bart", "xlm") else family)
    if family != "vit":  # whose dropout is 0 unless asked for
        assert passes_differ(model.train(), inputs)
    train_without_dropout(model)
    assert not passes_differ(model, inputs)


class Recurrent(nn.Module):
    """Dropout in an LSTM, in a module and in a function, and a layer that trains otherwise than it is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 8)
        self.lstm = nn.LSTM(8, 8, num_layers=2, dropout=0.5, batch_first=True)
        self.module, self.dropout, self.head = nn.Dropout(0.5), 0.5, nn.Linear(8, 2)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        states = self.norm(self.module(self.lstm(self.table(input_ids))[0]).mean(1))
        states = nn.functional.dropout(states, self.dropout, self.training)
        return tf.utils.ModelOutput(logits=self.head(states))


def test_a_students_own_dropout_is_off_too_and_comes_back() -> None:
    model = Recurrent()
    rates = train_without_dropout(model)
    assert not passes_differ(model, inputs_for("bert"))
    assert model.training and model.lstm.training and model.norm.training
    restore(rates)
    assert (model.lstm.dropout, model.module.p, model.dropout) == (0.5, 0.5, 0.5)
    assert passes_differ(model.train(), inputs_for("bert"))


def test_dropout_is_as_it_was_after_the_training(tmp_path: Path) -> None:
    student = Recurrent()
    recipe = Recipe("r", "test", LOGITS, steps="fixed", dropout=False)
    distiller(tmp_path, student=student, recipe=recipe, max_steps=1).train()
    assert (student.lstm.dropout, student.module.p, student.dropout) == (0.5, 0.5, 0.5)


def test_a_recipe_without_dropout_trains_a_quantized_student_without(tmp_path: Path) -> None:
    trainer = distiller(tmp_path)
    trainer.distillation.train()
    assert not passes_differ(trainer.student, inputs_for("bert"))
    recipe = Recipe("r", "test", LOGITS, steps="fixed")
    trainer = distiller(tmp_path, recipe=recipe)
    trainer.distillation.train()
    assert passes_differ(trainer.student, inputs_for("bert"))


def test_static_ranges_still_follow_their_batches_without_dropout(tmp_path: Path) -> None:
    recipe = Recipe("a", "test", LOGITS, activations="average", dropout=False)
    config = qbert.BitsConfig(4, groups=16)
    student = qbert.quantize_model(build("bert"), config, calibration_data=[inputs_for("bert")])
    scale = student.bert.encoder.layer[0].output.dense.activation_quantizer.scale.clone()
    distiller(tmp_path, student=student, recipe=recipe, max_steps=2).train()
    assert not torch.equal(student.bert.encoder.layer[0].output.dense.activation_quantizer.scale, scale)
