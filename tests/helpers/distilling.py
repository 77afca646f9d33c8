"""A tiny distillation: random teacher, quantized student, random rows."""

from pathlib import Path
from typing import Any

import torch
from encoders import build
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast, TrainingArguments

import qbert
from qbert.distill import Distiller, Recipe, recipes


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 100 whole words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"w{i}": i for i in range(100)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), pad_token="w0")


def rows(count: int = 64, length: int = 9) -> list[dict[str, Any]]:
    """Random rows whose label is in the first token."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(5, 100, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "attention_mask": [1] * length, "labels": int(ids[0] > 52)})
    return found


def distiller(
    folder: Path,
    *,
    teacher: Any = None,
    student: Any = None,
    recipe: Recipe | None = None,
    dropout: float | None = None,
    data: Any = None,
    bits: int = 3,
    check_teacher: bool = False,
    callbacks: Any = None,
    data_collator: Any = None,
    options: dict[str, Any] | None = None,
    **arguments: Any,
) -> Distiller:
    """A `Distiller` on tiny models that logs every step and saves only if told to; `options` are further ones of its."""
    torch.manual_seed(1)
    if student is None:
        rates = {} if dropout is None else {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        student = qbert.quantize_model(build("bert", **rates), qbert.BitsConfig(bits, groups=16))
    torch.manual_seed(2)
    teacher = build("bert").eval() if teacher is None else teacher
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "steps" if "save_steps" in arguments else "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **arguments,
    }
    return Distiller(
        teacher=teacher,
        student=student,
        recipe=recipes.qbert_kd() if recipe is None else recipe,
        args=TrainingArguments(str(folder), **settings),
        train_dataset=rows() if data is None else data,
        data_collator=DataCollatorWithPadding(tokenizer()) if data_collator is None else data_collator,
        check_teacher=check_teacher,
        callbacks=callbacks,
        **(options or {}),
    )
