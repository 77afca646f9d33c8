"""Sentence similarity: a real score of a real sentence encoder, without any fine-tuning.

Each sentence is encoded apart, its token vectors are averaged and normalized, and a pair's score is the cosine
(Reimers and Gurevych 2019, section 3):

    u = mean over tokens of h(a),  v likewise for b,      score = u.v / (|u| |v|),
    loss = mean (score - label / label_max)^2,

so the Hessian of a real task loss can be taken at the published weights.

    >>> model, tokenizer = build_sentence_model()
    >>> sentence_similarity_score(model, tokenizer, load_task("stsb", data_dir="data"))["spearman"]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from qbert.tasks.embedded import embedded_encoder
from qbert.tasks.evaluation import Evaluation, evaluate
from qbert.tasks.heads import load_quietly
from qbert.tasks.task import Task


class SentenceRegression(nn.Module):
    """Cosine of two sentence vectors, with the squared error to the label as its loss.

    Args:
        backbone: any transformers encoder that gives `last_hidden_state`.
        label_max: the label that stands for the same meaning (5 in STS-B); labels are divided by it.
    """

    encodes_pairs_apart = True  # tells `evaluate` and `prepare` which batch this model reads

    def __init__(self, backbone: transformers.PreTrainedModel, label_max: float = 5.0) -> None:
        super().__init__()
        self.backbone = backbone
        self.label_max = label_max

    @property
    def config(self) -> Any:
        """The backbone's configuration."""
        return self.backbone.config

    def embed(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Unit vectors [N, D] of N sentences given as tokens [N, T] with their attention mask [N, T]."""
        hidden = self.backbone(**inputs).last_hidden_state  # [N, T, D]
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)  # [N, T, 1]
        return F.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0), dim=-1)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> ModelOutput:
        """``loss`` (where labels [B] are given) and ``logits``, the cosines [B], of pairs: every input [B, 2, T]."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        flat = {key: value.flatten(0, 1) for key, value in inputs.items() if value is not None}
        vectors = self.embed(**flat)  # [2 B, D]
        first, second = vectors.view(-1, 2, vectors.shape[-1]).unbind(1)
        cosine = (first * second).sum(-1)  # [B]
        loss = None if labels is None else F.mse_loss(cosine, labels.to(cosine.dtype) / self.label_max)
        return ModelOutput(loss=loss, logits=cosine)


def build_sentence_model(model_name_or_path: str | Path | None = None, *, label_max: float = 5.0) -> tuple[Any, Any]:
    """(SentenceRegression in eval mode, tokenizer); the embedded MiniLM where no model is named.

    Raises:
        ValueError, FileNotFoundError: as `load_quietly`.
    """
    source = str(model_name_or_path or embedded_encoder())
    backbone = load_quietly(transformers.AutoModel, source)
    tokenizer = load_quietly(transformers.AutoTokenizer, source)
    return SentenceRegression(backbone, label_max).eval(), tokenizer


def sentence_similarity_score(model: nn.Module, tokenizer: Any, task: Task, **options: Any) -> Evaluation:
    """Pearson and Spearman (-100 to 100) between the cosines of a task's sentence pairs and its labels.

    Args:
        model: a `SentenceRegression`, or an encoder (or a model with a head, whose encoder is taken).
        task: pairs with a numeric label, for instance stsb.
        options: as `evaluate` (split, batch_size, limit, device, progress, ...).

    Raises:
        ValueError: the task has no pairs of sentences with a numeric label.
    """
    if task.kind != "regression":
        raise ValueError(f"sentence similarity needs pairs with a number as label, task {task.name!r} is {task.kind}")
    if not getattr(model, "encodes_pairs_apart", False):
        label_max = task.label_range[1] if task.label_range else 1.0
        encoder: Any = getattr(model, "base_model", model)
        model = SentenceRegression(encoder, label_max).train(model.training)
    return evaluate(model, task, tokenizer, **options)
