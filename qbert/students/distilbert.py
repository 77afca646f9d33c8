"""A DistilBERT made from a BERT: the class that has no token types and no pooler, with the teacher's weights.

    >>> student = distilbert(students.depth(teacher, [0, 4, 5]), batches)
    >>> type(student).__name__
    'DistilBertForSequenceClassification'

The encoder's outputs are the teacher's to the last rounding where a text has one segment: row 0 of the token types is
added to the positions, and all else has its place under another name. Of pairs, the second segment loses its mark.

Only the head of a sequence classifier differs: a dense layer with a ReLU, where BERT has the pooler with its tanh. With
batches to look at it starts as the linear map that is nearest to the teacher's outputs, since relu(u) - relu(-u) = u:
two of its rows are u and -u for each output, the others are the pooler's, with no say until they are trained. Without
batches it starts as the pooler.

Source: Sanh et al. 2019, "DistilBERT, a distilled version of BERT", section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qbert.encoders.inputs import accepted_inputs, to_device
from qbert.encoders.modes import evaluation_mode
from qbert.encoders.structure import refuse_changed
from qbert.encoders.targets import base_model

Batch = Mapping[str, Any]
_RIDGE = 1e-3  # share of the mean square of the inputs
_LAYER = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}


def distilbert(teacher: nn.Module, batches: Iterable[Batch] | None = None) -> Any:
    """The DistilBERT of `teacher`'s kind with its weights and depth (make it shallower first: `students.depth`).

    Args:
        teacher: a float BERT: ``BertModel``, or one for sequence or token classification, questions or masked words.
        batches: unlabelled rows for the head of a sequence classifier; a few hundred.

    Returns:
        The student in evaluation mode, with the teacher's labels in its config.

    Raises:
        ValueError: another class, or a setting that DistilBERT does not have.
    """
    import transformers

    classes = {
        "BertModel": transformers.DistilBertModel,
        "BertForSequenceClassification": transformers.DistilBertForSequenceClassification,
        "BertForTokenClassification": transformers.DistilBertForTokenClassification,
        "BertForQuestionAnswering": transformers.DistilBertForQuestionAnswering,
        "BertForMaskedLM": transformers.DistilBertForMaskedLM,
    }
    name = type(teacher).__name__
    if name not in classes:
        raise ValueError(f"teacher: a {name} cannot become a DistilBERT; use one of {', '.join(classes)}")
    refuse_changed(teacher, "distilbert")
    _, base = base_model(teacher)
    student: Any = classes[name](_config(base.config)).eval()
    student.to(next(teacher.parameters()).device)
    with torch.no_grad():
        _fill(base, base_model(student)[1])
        _fill_head(teacher, student, batches)
    return student


def _config(old: Any) -> Any:
    """The DistilBERT configuration with BERT's sizes and labels."""
    from transformers import DistilBertConfig

    absolute = getattr(old, "position_embedding_type", None) in (None, "absolute")
    if not absolute or old.layer_norm_eps != 1e-12 or old.is_decoder:
        raise ValueError(
            f"teacher: DistilBERT has absolute positions and norms with an epsilon of 1e-12, this teacher has "
            f"{getattr(old, 'position_embedding_type', None) or 'absolute'} ones and {old.layer_norm_eps:g}; keep its "
            "class (students.depth)"
        )
    new = DistilBertConfig(
        vocab_size=old.vocab_size,
        max_position_embeddings=old.max_position_embeddings,
        n_layers=old.num_hidden_layers,
        n_heads=old.num_attention_heads,
        dim=old.hidden_size,
        hidden_dim=old.intermediate_size,
        dropout=old.hidden_dropout_prob,
        attention_dropout=old.attention_probs_dropout_prob,
        activation=old.hidden_act,
        initializer_range=old.initializer_range,
        pad_token_id=old.pad_token_id,
        seq_classif_dropout=old.hidden_dropout_prob,
        qa_dropout=old.hidden_dropout_prob,
    )
    new.id2label, new.label2id, new.problem_type = dict(old.id2label), dict(old.label2id), old.problem_type
    return new


def _fill(old: Any, new: Any) -> None:
    """Tables and layers."""
    new.embeddings.word_embeddings.weight.copy_(old.embeddings.word_embeddings.weight)
    segment = old.embeddings.token_type_embeddings.weight[0]
    new.embeddings.position_embeddings.weight.copy_(old.embeddings.position_embeddings.weight + segment)
    new.embeddings.LayerNorm.load_state_dict(old.embeddings.LayerNorm.state_dict())
    for ours, theirs in zip(new.transformer.layer, old.encoder.layer, strict=True):
        for their_name, our_name in _LAYER.items():
            ours.get_submodule(our_name).load_state_dict(theirs.get_submodule(their_name).state_dict())


def _fill_head(teacher: Any, student: Any, batches: Iterable[Batch] | None) -> None:
    name = type(teacher).__name__
    if name == "BertForTokenClassification":
        student.classifier.load_state_dict(teacher.classifier.state_dict())
    elif name == "BertForQuestionAnswering":
        student.qa_outputs.load_state_dict(teacher.qa_outputs.state_dict())
    elif name == "BertForMaskedLM":
        transform = teacher.cls.predictions.transform
        student.vocab_transform.load_state_dict(transform.dense.state_dict())
        student.vocab_layer_norm.load_state_dict(transform.LayerNorm.state_dict())
        student.vocab_projector.bias.copy_(teacher.cls.predictions.bias)
    elif name == "BertForSequenceClassification":
        student.pre_classifier.load_state_dict(teacher.bert.pooler.dense.state_dict())
        student.classifier.load_state_dict(teacher.classifier.state_dict())
        if batches is not None and 2 * teacher.config.num_labels <= teacher.config.hidden_size:
            _fit_head(student, *_first_states_and_outputs(teacher, batches))


def _first_states_and_outputs(teacher: Any, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """float64 [N, D] states of the first token, and [N, C] logits."""
    states, outputs = [], []
    with evaluation_mode(teacher):
        for batch in batches:
            inputs = {key: value for key, value in to_device(batch, teacher).items() if key != "labels"}
            output = teacher(**accepted_inputs(teacher, inputs), output_hidden_states=True)
            states.append(output.hidden_states[-1][:, 0].double())
            outputs.append(output.logits.double())
    if not states:
        raise ValueError("batches is empty; give a few hundred unlabelled rows, or None")
    return torch.cat(states), torch.cat(outputs)


def _fit_head(student: Any, states: Tensor, outputs: Tensor) -> None:
    """The head as the ridge regression of `outputs` on `states`, in the form of a dense layer with a ReLU."""
    centre, aim = states.mean(0), outputs.mean(0)
    x, y = states - centre, outputs - aim
    damping = _RIDGE * x.square().sum() / x.shape[1]
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    maps = torch.linalg.solve(x.T @ x + damping * identity, x.T @ y).T  # [C, D]
    classes = len(maps)
    dense, classifier = student.pre_classifier, student.classifier
    dense.weight[: 2 * classes] = torch.cat([maps, -maps]).to(dense.weight.dtype)
    offsets = -maps @ centre
    dense.bias[: 2 * classes] = torch.cat([offsets, -offsets]).to(dense.bias.dtype)
    classifier.weight.zero_()
    for output in range(classes):
        classifier.weight[output, output], classifier.weight[output, classes + output] = 1.0, -1.0
    classifier.bias.copy_(aim)
