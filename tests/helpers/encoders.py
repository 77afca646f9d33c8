"""Tiny, randomly initialised encoders of every supported family, and what they give and hold."""

from typing import Any

import torch
import transformers as tf
from torch import nn

_SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
    "pad_token_id": 0,
}

_CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (tf.BertConfig, {}),
    "roberta": (tf.RobertaConfig, {"pad_token_id": 1}),
    "distilbert": (
        tf.DistilBertConfig,
        {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "vocab_size": 100, "pad_token_id": 0},
    ),
    "albert": (tf.AlbertConfig, {"embedding_size": 24}),
    "mobilebert": (tf.MobileBertConfig, {"embedding_size": 24, "intra_bottleneck_size": 24}),
    "electra": (tf.ElectraConfig, {"embedding_size": 24}),
    "deberta-v2": (
        tf.DebertaV2Config,
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    ),
    "modernbert": (
        tf.ModernBertConfig,
        {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "mpnet": (tf.MPNetConfig, {"pad_token_id": 1}),
    "vit": (tf.ViTConfig, {"image_size": 32, "patch_size": 16}),
}

FAMILIES = tuple(_CONFIGS)


def build(family: str, **overrides: Any) -> Any:
    """A two-layer classifier of `family`, in training mode as transformers builds it."""
    config_class, settings = _CONFIGS[family]
    if family == "distilbert":
        values = {**settings, **overrides}
    elif family == "vit":
        values = {**{k: v for k, v in _SMALL.items() if k not in ("vocab_size", "pad_token_id")}, **settings}
    else:
        values = {**_SMALL, **settings, **overrides}
    auto = tf.AutoModelForImageClassification if family == "vit" else tf.AutoModelForSequenceClassification
    return auto.from_config(config_class(**values))


HEADS = ("classes", "one value", "values", "several labels", "tags", "spans")


def head(kind: str, depth: int = 2) -> Any:
    """A tiny BERT in evaluation mode, with a head of `HEADS` whose outputs differ by row, or "none"."""
    types = {"values": "regression", "several labels": "multi_label_classification"}
    config = tf.BertConfig(
        vocab_size=100,
        hidden_size=16,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        num_labels={"one value": 1, "spans": 2}.get(kind, 3),
        problem_type=types.get(kind),
    )
    classes: dict[str, Any] = {
        "tags": tf.BertForTokenClassification,
        "spans": tf.BertForQuestionAnswering,
        "none": tf.BertModel,
    }
    torch.manual_seed(0)
    model = classes.get(kind, tf.BertForSequenceClassification)(config).eval()
    for name, parameter in model.named_parameters():
        if name.startswith(("classifier", "qa_outputs")):
            nn.init.normal_(parameter)
    return model


def inputs_for(family: str, batch: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    """A batch that the model of `family` accepts; the last row is padded."""
    if family == "vit":
        return {"pixel_values": torch.randn(batch, 3, 32, 32)}
    ids = torch.randint(5, 100, (batch, length))
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def outputs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's logits, without gradients."""
    with torch.no_grad():
        return model(**batch).logits


def same_state(one: nn.Module, other: nn.Module) -> bool:
    """Whether both hold the same tensors, bit for bit, under the same names."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
