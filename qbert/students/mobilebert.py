"""MobileBERT: thin layers between wide ones, so that every hidden state has the teacher's width.

A layer of a MobileBERT takes the teacher's width down to a bottleneck, attends and runs several small feed-forward
networks there, and goes up again. Its hidden states can be compared with the teacher's without any projection, layer by
layer, which is what `recipes.mobilebert` does. Instead of LayerNorm it has NoNorm, g * h + b.

    >>> student = mobilebert(teacher, inner=96, stacks=2)
    >>> Distiller(teacher=teacher, student=student, recipe=recipes.mobilebert(len(layers)), ...).train()
    >>> qbert.quantize_model(fold_no_norms(student), 4)

Source: Sun et al. 2020, "MobileBERT: a Compact Task-Agnostic BERT for Resource-Limited Devices", section 3;
google-research/mobilebert. Differences: the word table is the teacher's, at its width, instead of a small one read
three tokens at a time, and so is the head; the attention has as many heads as the teacher's, whose scores it meets.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from qbert.encoders.targets import base_model

Model = TypeVar("Model", bound=nn.Module)
_HEADS = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def mobilebert(
    teacher: nn.Module, *, inner: int = 96, stacks: int = 2, layers: int | None = None, seed: int = 0
) -> Any:
    """A MobileBERT of the teacher's outer width, with its tables and head; its layers are random.

    Args:
        teacher: a float BERT, bare or with a head for sequences, tokens or questions.
        inner: width of the bottleneck, a multiple of the teacher's number of heads (96 of 384).
        stacks: feed-forward networks of a layer, each `inner` to 4 times that and back (2; the published model has 4).
        layers: how many; as many as the teacher has where None.
        seed: of the random layers.

    Returns:
        The student in evaluation mode. Its last step before the residual sum starts near zero, so that a layer begins
        as the identity.

    Raises:
        ValueError: another class of teacher, or a width that cannot work.
    """
    import transformers

    name = type(teacher).__name__
    if not name.startswith("Bert") or name.removeprefix("Bert") not in _HEADS:
        known = ", ".join(f"Bert{head}" for head in _HEADS)
        raise ValueError(f"teacher: a {name} cannot become a MobileBERT; use one of {known}")
    theirs: Any = base_model(teacher)[1]
    old = theirs.config
    if inner % old.num_attention_heads or not 0 < inner < old.hidden_size:
        raise ValueError(
            f"inner={inner} is not possible; use a multiple of the teacher's {old.num_attention_heads} heads below its "
            f"width of {old.hidden_size}"
        )
    if stacks < 1 or (layers is not None and layers < 1):
        raise ValueError(f"stacks={stacks} and layers={layers} must be at least 1")
    config = transformers.MobileBertConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        embedding_size=old.hidden_size,
        trigram_input=False,
        intra_bottleneck_size=inner,
        intermediate_size=4 * inner,
        num_hidden_layers=layers or old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_feedforward_networks=stacks,
        max_position_embeddings=old.max_position_embeddings,
        type_vocab_size=old.type_vocab_size,
        pad_token_id=old.pad_token_id,
        hidden_dropout_prob=0.0,
        classifier_dropout=0.0,
    )
    config.id2label, config.label2id, config.problem_type = dict(old.id2label), dict(old.label2id), old.problem_type
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student: Any = getattr(transformers, f"MobileBert{name.removeprefix('Bert')}")(config).eval()
    student.to(next(teacher.parameters()).device)
    ours: Any = base_model(student)[1]
    with torch.no_grad():
        _take_tables(theirs.embeddings, ours.embeddings)
        for layer in ours.encoder.layer:
            layer.output.bottleneck.dense.weight.mul_(0.1)
        for part in ("classifier", "qa_outputs"):
            if hasattr(teacher, part):
                getattr(student, part).load_state_dict(getattr(teacher, part).state_dict())
        if getattr(theirs, "pooler", None) is not None and getattr(ours, "pooler", None) is not None:
            ours.pooler.dense.load_state_dict(theirs.pooler.dense.state_dict())
    return student


def _take_tables(old: Any, new: Any) -> None:
    """Copy the tables; NoNorm stands for the LayerNorm of an average word."""
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        getattr(new, name).weight.copy_(getattr(old, name).weight)
    words = old.word_embeddings.weight + old.position_embeddings.weight[1] + old.token_type_embeddings.weight[0]
    mean, spread = words.mean(1).mean(), words.std(1, unbiased=False).mean()
    new.LayerNorm.weight.copy_(old.LayerNorm.weight / spread)
    new.LayerNorm.bias.copy_(old.LayerNorm.bias - old.LayerNorm.weight * mean / spread)


@torch.no_grad()
def fold_no_norms(model: Model) -> Model:
    """A copy of a MobileBERT whose NoNorms that follow a linear map alone are part of it: g (W x + c) + b.

    Outputs stay the same. Ranges for few bits then are those of the map that is really applied; those after a sum with
    a residual, which the scale concerns too, stay where they are.

    Raises:
        ValueError: if `model` has none to fold.
    """
    folded = copy.deepcopy(model)
    found = [m for m in folded.modules() if type(m).__name__ == "BottleneckLayer" and _is_no_norm(m.LayerNorm)]
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no NoNorm after a linear map; leave it as it is")
    for layer in found:
        dense: Any = layer.dense
        norm: Any = layer.LayerNorm
        if type(dense) is not nn.Linear:
            raise ValueError(f"model: its maps are {type(dense).__name__} already; fold before quantize_model")
        dense.weight.mul_(norm.weight.unsqueeze(1))
        dense.bias.mul_(norm.weight).add_(norm.bias)
        norm.weight.fill_(1.0)
        norm.bias.zero_()
    return folded


def _is_no_norm(module: Any) -> bool:
    return type(module).__name__ == "NoNorm"
