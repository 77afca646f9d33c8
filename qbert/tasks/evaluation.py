"""Official scores of a model on a task, and the raw outputs behind them.

    >>> result = evaluate(model, task, tokenizer)
    >>> result["accuracy"], result.primary, result.logits.shape
    (92.1, 92.1, torch.Size([872, 2]))

The outputs are kept so that fidelity to another model (agreement, KL divergence) needs no second pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert.encoders.inputs import most_positions
from qbert.encoders.targets import base_model
from qbert.progress import progress_bar
from qbert.tasks.encoding import Prepared, decode_spans, prepare
from qbert.tasks.task import Task

_NEVER = -1e9  # logit of a padded position: its probability is exactly 0 in float32, and no infinity enters a KL


class Evaluation(dict[str, float]):
    """Official metrics by name (0 to 100), "loss" and "examples"; a plain dict, ready for JSON.

    Attributes:
        primary: value of the task's primary metric.
        logits: float32 on the CPU, in the order of the rows. Classification [N, C]; regression [N]; token [M, C] over
            all labelled words; span [2 F, T]: start rows of the F windows, then end rows, -1e9 where padded.
        predictions: what was scored: classes [N], values [N], tag lists, or answer texts.
    """

    primary: float
    logits: torch.Tensor
    predictions: Any


def evaluate(
    model: nn.Module,
    task: Task,
    tokenizer: Any,
    *,
    split: str | None = None,
    batch_size: int = 64,
    max_length: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Evaluation:
    """Score `model` on the held-out rows of `task`.

    Args:
        model: any model whose forward takes the batch as keywords and returns `.logits` (`start_logits` and
            `end_logits` for spans); a `SentenceRegression` gets its pairs encoded apart.
        task, tokenizer: what is scored, and the tokenizer of the model.
        batch_size: rows that are computed together; their order is by length.
        max_length: tokens that a row is cut to; by task and tokenizer where None.
        progress: show a bar.
        split: one split; every held-out split where None, the further ones with their name appended
            ("accuracy_mismatched").
        limit: score at most this many rows a split, drawn by `seed`.
        device: where to compute; where the model is when None. The model is put back into the mode it was in.

    Returns:
        `Evaluation`: metric -> value, and the outputs that were scored.

    Raises:
        ValueError: unknown split, a row without its label, ids or lengths that the model has no place for, or outputs
            that are not finite (names the split).
        MissingPackageError: the task's metric needs a package that is not installed.
    """
    splits = [split] if split is not None else list(task.evaluation_splits)
    result = Evaluation()
    for i, name in enumerate(splits):
        data = prepare(
            task, tokenizer, name, max_length=max_length, limit=limit, seed=seed, as_pairs=wants_pairs(model)
        )
        scores = evaluate_prepared(model, data, batch_size=batch_size, device=device, progress=progress, label=name)
        suffix = "" if i == 0 else "_" + name.removeprefix("validation_")
        result.update({key + suffix: value for key, value in scores.items()})
        if i == 0:
            result.primary, result.logits, result.predictions = scores.primary, scores.logits, scores.predictions
    return result


def wants_pairs(model: nn.Module) -> bool:
    """Whether the model encodes the two sentences of a pair apart."""
    return bool(getattr(model, "encodes_pairs_apart", False))


def evaluate_prepared(
    model: nn.Module,
    data: Prepared,
    *,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    progress: bool = True,
    label: str = "validation",
) -> Evaluation:
    """`evaluate` on rows that are tokenized already."""
    data.task.check_scorer()
    _check_readable(model, data)
    if device is not None:
        model.to(device)
    place = next(model.parameters()).device
    outputs: list[Any] = [None] * len(data)
    total = counted = 0.0
    was_training = model.training
    model.eval()
    bar = progress_bar(
        total=len(data), desc=f"evaluating {data.task.name} {label}", unit="ex", disable=not progress, leave=False
    )
    try:
        with torch.no_grad(), bar:
            for chosen, batch in data.by_length(batch_size):
                output = model(**{key: value.to(place) for key, value in batch.items()})
                weight = _terms(batch, data)
                if weight:  # the mean over no words at all would be NaN
                    total, counted = total + float(output.loss) * weight, counted + weight
                for i, values in zip(chosen, _outputs(output, data), strict=True):
                    outputs[i] = data.own_positions(i, values) if data.task.kind in ("token", "span") else values
                bar.update(len(chosen))
    finally:
        model.train(was_training)
    if not counted:
        raise ValueError(f"no word of {label} of {data.task.name!r} has a tag; there is nothing to score")
    logits, predictions, references = _decode(outputs, data)
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(
            f"the model's outputs on {label} of {data.task.name!r} are not finite; its weights are damaged"
        )
    result = Evaluation(data.task.score(predictions, references))
    result.primary = result[data.task.primary_metric]
    result["loss"] = _span_loss(logits, data) if data.task.kind == "span" else total / counted
    result["examples"] = float(len(data.rows))
    result.logits, result.predictions = logits, predictions
    return result


def _check_readable(model: nn.Module, data: Prepared) -> None:
    """Raises ValueError for ids that the model's vocabulary has not, or rows longer than its table of positions."""
    words = getattr(getattr(base_model(model)[1], "config", None), "vocab_size", None)
    given = (np.hstack(example["input_ids"]) for example in data.examples)
    largest = max((int(ids.max()) for ids in given if ids.size), default=-1)
    if isinstance(words, int) and largest >= words:
        raise ValueError(
            f"tokenizer: it gives the id {largest}, and the model's vocabulary has {words} words; use the model's own "
            "tokenizer"
        )
    most, longest = most_positions(model), int(data.lengths.max(initial=0))
    if most is not None and longest > most:
        raise ValueError(
            f"max_length: a row of {data.task.name!r} has {longest} tokens, and the model reads at most {most}; give "
            f"max_length={most}"
        )


def _terms(batch: dict[str, Tensor], data: Prepared) -> int:
    """How many terms the loss of a batch is the mean of: its examples, or the words with a tag."""
    if data.task.kind == "token":
        return int((batch["labels"] != -100).sum())
    return len(batch["input_ids"])


def _span_loss(logits: Tensor, data: Prepared) -> float:
    """Mean cross-entropy of start and end over the tokens of each window, from logits [2 F, T].

    A model's own loss is normalized over padding too, and so depends on what else is in the batch.
    """
    wanted = [example[name] for name in ("start_positions", "end_positions") for example in data.examples]
    return float(F.cross_entropy(logits, torch.tensor(wanted)))


def _outputs(output: Any, data: Prepared) -> list[torch.Tensor]:
    """Outputs of each example of a batch: [T, C], [C], [], or [T, 2] for start and end."""
    if data.task.kind == "span":
        return list(torch.stack([output.start_logits, output.end_logits], dim=2).float().cpu())
    return list(output.logits.float().cpu())


def _decode(outputs: list[Any], data: Prepared) -> tuple[torch.Tensor, Any, list[Any]]:
    """(logits as `Evaluation.logits`, predictions, references) from the outputs of every example."""
    task = data.task
    if task.kind == "span":
        longest = max(len(output) for output in outputs)
        padded = torch.full((2, len(outputs), longest), _NEVER)
        for i, output in enumerate(outputs):
            padded[:, i, : len(output)] = output.T
        answers = decode_spans(padded[0].numpy(), padded[1].numpy(), data.spans, data.rows)
        return padded.flatten(0, 1), [best[0][0] for best in answers], [row["answers"]["text"] for row in data.rows]
    if task.kind == "token":
        kept, tags = [], []
        for i, output in enumerate(outputs):
            labelled = np.flatnonzero(np.array(data.examples[i]["labels"]) != -100)
            chosen = output[torch.from_numpy(labelled)]  # [words, C]
            kept.append(chosen)
            guess = ["O"] * len(data.rows[i]["tokens"])  # words beyond the cut, or without a piece, hold no entity
            for word, label in zip(data.words[i], chosen.argmax(-1).tolist(), strict=True):
                guess[word] = task.label_names[label]
            tags.append(guess)
        return torch.cat(kept), tags, [row["tags"] for row in data.rows]
    logits = torch.stack(outputs)
    references = [row["label"] for row in data.rows]
    if task.kind == "regression":
        logits = logits.reshape(len(outputs))
        return logits, logits.numpy(), references
    return logits, logits.argmax(-1).numpy(), references


class Fidelity(NamedTuple):
    """Likeness of two models' outputs.

    Attributes:
        agreement: percent of rows with the same most likely class (or position, or set of labels); for values, 100 x
            their Pearson correlation (of several outputs, the mean over them), 0 where one side is constant, as the
            outputs of a collapsed model are.
        divergence: mean KL(teacher || student) in nats (of labels that are decided on their own, the sum over them);
            for values, the mean squared difference.
    """

    agreement: float
    divergence: float


def fidelity(teacher: Tensor, student: Tensor, problem_type: str | None = None) -> Fidelity:
    """Compare outputs row by row.

    Args:
        teacher, student: logits [N, C] of classes, tokens or positions, or values [N] or [N, C]; in the same order.
        problem_type: ``config.problem_type`` of the models: ``regression``, ``multi_label_classification`` or
            ``single_label_classification``; where None, one column is values and several are classes.

    Raises:
        ValueError: if the shapes differ or are of another kind, or for another `problem_type`.
    """
    if teacher.shape != student.shape or teacher.dim() not in (1, 2) or len(teacher) == 0:
        raise ValueError(
            "fidelity compares outputs of one shape, [N, C] or [N], "
            f"got {list(teacher.shape)} and {list(student.shape)}"
        )
    if problem_type not in (None, "regression", "multi_label_classification", "single_label_classification"):
        raise ValueError(
            f"problem_type={problem_type!r} is not known; use 'regression', 'multi_label_classification', "
            "'single_label_classification' or None"
        )
    teacher, student = (x.double().reshape(len(x), -1) for x in (teacher, student))  # [N, C]
    if problem_type == "multi_label_classification":
        agreement = 100 * float(((teacher > 0) == (student > 0)).all(1).double().mean())
        logs = [F.logsigmoid(torch.stack([x, -x], -1)) for x in (teacher, student)]  # [N, C, 2]
    elif problem_type == "regression" or teacher.shape[1] == 1:
        found = [_correlation(one, other) for one, other in zip(teacher.T, student.T, strict=True)]
        return Fidelity(100 * sum(found) / len(found), float((teacher - student).square().mean()))
    else:
        agreement = 100 * float((teacher.argmax(1) == student.argmax(1)).double().mean())
        logs = [F.log_softmax(x, 1) for x in (teacher, student)]
    return Fidelity(agreement, float(F.kl_div(logs[1], logs[0], log_target=True, reduction="batchmean")))


def _correlation(one: Tensor, other: Tensor) -> float:
    """Pearson of two vectors [N] float64, 0 where one of them is constant."""
    if any(bool((values == values[0]).all()) for values in (one, other)):
        return 0.0
    return float(torch.corrcoef(torch.stack([one, other]))[0, 1])
