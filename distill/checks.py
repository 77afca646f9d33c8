"""What is refused or warned of before a distillation begins: pairs that cannot learn from each other.

It stands alone because it only looks: nothing here is needed any more once the first step is taken.

>>> check_pair(teacher, student)
>>> check_teacher_is_trained(teacher, batches)
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from qbert.distill.recipe import Recipe
from qbert.encoders.inputs import accepted_inputs
from qbert.encoders.modes import evaluation_mode
from qbert.encoders.targets import base_model
from qbert.layers.packed import PackedTensor

_STANDARD_ERRORS = 3.0


def check_pair(teacher: nn.Module, student: nn.Module) -> None:
    """Refuse models whose outputs or inputs do not mean the same.

    Raises:
        ValueError: the same object twice, a student without trainable parameters, another number, order or kind of
            labels, another vocabulary.
    """
    if teacher is student:
        raise ValueError(
            "teacher and student are the same object; quantize a copy (quantize_model does unless inplace=True)"
        )
    if any(isinstance(module, PackedTensor) for module in student.modules()):
        raise ValueError("the student is packed, and packed weights cannot be trained; train qbert.unpack(student)")
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError("no parameter of the student can be trained; call student.requires_grad_(True)")
    _refuse_shared(teacher, student)
    ours, theirs = getattr(student, "config", None), getattr(teacher, "config", None)
    if ours is None or theirs is None:
        return
    if ours.num_labels != theirs.num_labels:
        raise ValueError(
            f"the student has {ours.num_labels} labels and the teacher {theirs.num_labels}; give both the task's labels"
        )
    kinds = [getattr(config, "problem_type", None) for config in (ours, theirs)]
    if None not in kinds and kinds[0] != kinds[1]:
        raise ValueError(
            f"the student's problem_type is {kinds[0]!r} and the teacher's {kinds[1]!r}, so their outputs mean other "
            "things; give both configs the same"
        )
    names = [_label_names(config) for config in (ours, theirs)]
    if None not in names and names[0] != names[1]:
        raise ValueError(
            f"the student's labels are {names[0]} and the teacher's {names[1]}; put the rows of one head into the "
            "order of the other (qbert.tasks.build_model does)"
        )
    sizes = [_vocabulary(model) for model in (student, teacher)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"the student reads a vocabulary of {sizes[0]} tokens and the teacher one of {sizes[1]}, so the same ids "
            "mean other words; use models that share a tokenizer"
        )


def _refuse_shared(teacher: nn.Module, student: nn.Module) -> None:
    """What is trained, or counts its batches, must not be the teacher's too: the teacher would change with it."""
    theirs = {p.data_ptr() for p in teacher.parameters()} | {id(m) for m in teacher.modules()}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and parameter.data_ptr() and parameter.data_ptr() in theirs:
            raise ValueError(
                f"teacher and student share the parameter {name}, so training the student would change the teacher; "
                "give the student a copy (copy.deepcopy), or freeze it (requires_grad_(False))"
            )
    for name, module in student.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and id(module) in theirs:
            raise ValueError(
                f"teacher and student share the module {name}, whose statistics would change with the student's "
                "training; give the student a copy (copy.deepcopy)"
            )


def check_tokenizers(teacher_tokenizer: Any, student_tokenizer: Any) -> None:
    """Refuse two tokenizers that give the same text different ids.

    Raises:
        ValueError: naming a token and its two ids.
    """
    theirs, ours = teacher_tokenizer.get_vocab(), student_tokenizer.get_vocab()
    for token in ours.keys() | theirs.keys():
        if ours.get(token) != theirs.get(token):
            raise ValueError(
                f"teacher and student have different vocabularies: token {token!r} is {theirs.get(token)} for the "
                f"teacher and {ours.get(token)} for the student; use models that share a tokenizer"
            )


def check_checkpointing(model: nn.Module, arguments: Any) -> None:
    """Refuse reentrant gradient checkpointing, which silently cuts recorded features off the graph.

    Raises:
        ValueError: if `arguments` (TrainingArguments) or the model itself ask for it.
    """
    asked = [
        kwargs
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
        if isinstance(kwargs := getattr(arguments, name, None), dict)
    ]
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]
    asked += [function.keywords for function in functions if isinstance(function, functools.partial)]
    if any(kwargs.get("use_reentrant", False) for kwargs in asked):
        raise ValueError(
            "reentrant gradient checkpointing gives recorded features no gradient, so their losses would train "
            "nothing; set activation_checkpointing_kwargs={'use_reentrant': False}"
        )


def check_arguments(args: Any, recipe: Recipe, student: nn.Module, options: Mapping[str, Any]) -> None:
    """Refuse what a distillation cannot do, of `TrainingArguments` and of Trainer's own `options`.

    Raises:
        ValueError: naming the argument and what to do instead.
    """
    schedule, stages = schedule_of(args), len(recipe.stages)
    method = str(getattr(args.optim, "value", args.optim))
    optimizer = options.get("optimizers", (None, None))[0]
    own_rates = recipe.steps == "learned" or recipe.activations == "learned"
    own_rates = own_rates or any(match.projection for stage in recipe.stages for match in stage.matches)
    held = stages > 1 or (own_rates and recipe.freeze_at < 1)
    refused = [
        ("model", "model" in options, "the model to train is the student; give it as student="),
        ("model_init", options.get("model_init") is not None, "give the student itself"),
        (
            "compute_loss_func",
            options.get("compute_loss_func") is not None,
            "the loss is the recipe's; a loss of your own is a term of it: Match('logits', my_loss)",
        ),
        (
            "optimizers",
            optimizer is not None and own_rates,
            "the recipe trains step sizes or projections at rates of their own, which the optimizer does not have; "
            "name another one by optimizer_cls_and_kwargs= or args.optim, or use a recipe with steps='fixed'",
        ),
        (
            f"lr_scheduler_type={schedule!r}",
            stages > 1 and schedule != "linear",
            f"it does not fit a recipe of {stages} stages, which has a schedule of its own; leave it at 'linear'",
        ),
        (
            f"label_smoothing_factor={args.label_smoothing_factor}",
            args.label_smoothing_factor != 0,
            "a teacher's soft targets take the place of smoothed labels; set it to 0",
        ),
        (
            f"optim={method!r}",
            "lomo" in method or "layerwise" in method,
            "it steps during the backward pass, in which the terms are not summed yet; use 'adamw_torch'",
        ),
        (
            "fp16_full_eval or bf16_full_eval",
            args.fp16_full_eval or args.bf16_full_eval,
            "it would leave the student's weights and step sizes in half precision; use bf16=True or fp16=True",
        ),
        ("fp16=True", args.fp16 and args.device.type == "cpu", "a CPU has no half-precision training; leave it out"),
        (
            "torch_compile=True",
            args.torch_compile,
            "features are recorded by hooks, which compiled models leave out; leave it out",
        ),
        (
            "fsdp or deepspeed",
            bool(args.fsdp) or args.deepspeed is not None,
            "features are recorded from whole layers; use `torchrun` or `accelerate launch` without it",
        ),
        ("use_liger_kernel=True", args.use_liger_kernel, "its kernels take no quantized layers; leave it out"),
        (
            "push_to_hub=True",
            args.push_to_hub,
            "checkpoints hold the distillation, not a model; push the student once it is trained",
        ),
        (
            "ddp_find_unused_parameters=False",
            args.ddp_find_unused_parameters is False and args.world_size > 1 and held,
            "some parameters are trained in a part of the steps only; leave it out",
        ),
    ]
    for name, is_given, mend in refused:
        if is_given:
            raise ValueError(f"{name} cannot be used with a distillation: {mend}")


def schedule_of(args: Any) -> str:
    """``lr_scheduler_type`` of `TrainingArguments`, which may be a string or an enumeration's value."""
    return str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))


@torch.no_grad()
def check_teacher_is_trained(teacher: nn.Module, batches: Iterable[dict[str, Any]]) -> bool:
    """Warn if the teacher knows no more about the labels than chance does: it was probably never fine-tuned.

    A classifier's accuracy must exceed the share of its most frequent label by three standard errors, and a
    regression's correlation three standard errors of 0. Other heads, and rows without a label (-1 or -100, as
    unlabelled data have it), are not judged.

    Args:
        batches: labelled batches, a few hundred rows in all.

    Returns:
        False if it warned.
    """
    outputs: list[Tensor] = []
    labels: list[Tensor] = []
    device = next(teacher.parameters()).device
    for batch in batches:
        target = batch.get("labels")
        if not isinstance(target, Tensor) or target.dim() != 1:
            return True
        inputs = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor) and k != "labels"}
        with evaluation_mode(teacher):
            logits = getattr(teacher(**accepted_inputs(teacher, inputs)), "logits", None)
        several = logits is not None and logits.dim() == 2 and logits.shape[1] > 1
        if logits is None or logits.dim() > 2 or (several and target.is_floating_point()):
            return True
        labelled = target >= 0 if several else torch.ones_like(target, dtype=torch.bool)
        outputs.append(logits[labelled.to(device)].float().cpu())
        labels.append(target[labelled].cpu())
    if not sum(len(found) for found in labels):
        return True
    known, chance, what = _knowledge(torch.cat(outputs), torch.cat(labels))
    if known > chance:
        return True
    warnings.warn(
        f"the teacher is at chance on {len(torch.cat(labels))} rows ({what}); it looks as if it was never fine-tuned "
        "on this task, and a student cannot learn from it",
        stacklevel=2,
    )
    return False


def _knowledge(outputs: Tensor, labels: Tensor) -> tuple[float, float, str]:
    """(score, the score that chance may reach, both in words)."""
    rows = len(labels)
    if labels.is_floating_point() or outputs.dim() == 1 or outputs.shape[-1] == 1:
        stacked = torch.stack([outputs.reshape(rows), labels.float()])
        correlation = float(torch.corrcoef(stacked)[0, 1]) if rows > 1 else math.nan
        correlation = 0.0 if math.isnan(correlation) else correlation
        return correlation, _STANDARD_ERRORS / math.sqrt(rows), f"correlation {correlation:.2f}"
    accuracy = float((outputs.argmax(-1) == labels).float().mean())
    share = float(torch.bincount(labels).max()) / rows
    margin = _STANDARD_ERRORS * math.sqrt(max(share * (1 - share), 1e-4) / rows)
    return accuracy, min(share + margin, 0.999), f"accuracy {accuracy:.2f}, most frequent label {share:.2f}"


def _label_names(config: Any) -> list[str] | None:
    names = [config.id2label[i] for i in sorted(config.id2label)]
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names


def _vocabulary(model: nn.Module) -> int | None:
    _, base = base_model(model)
    return getattr(getattr(base, "config", None), "vocab_size", None)


def check_labels(student: nn.Module, batches: Iterable[dict[str, Any]], *, some: bool = True) -> None:
    """Refuse a recipe that learns from labels where the rows have none (-1 in the hub's test splits), or others.

    Args:
        batches: labelled batches, a few hundred rows in all.
        some: at least one row must have a label.

    Raises:
        ValueError: naming the label, or saying that no row has one.
    """
    config = getattr(student, "config", None)
    classes = getattr(config, "num_labels", None)
    if classes == 1 or getattr(config, "problem_type", None) == "regression":
        return
    found = []
    for batch in batches:
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return
        found.append(labels.flatten().cpu())
    labels = torch.cat(found) if found else torch.zeros(0, dtype=torch.long)
    if labels.numel() == 0:
        return
    labelled = labels[labels != -100]
    mend = "use a recipe without labels (qbert_kd, ternarybert, tinybert), or leave those rows out"
    if labelled.numel() == 0:
        if not some:
            return
        raise ValueError(f"the recipe learns from labels, but those of all rows are -100, which means none; {mend}")
    if int(labelled.min()) < 0:
        raise ValueError(f"the recipe learns from labels, but a row has label {int(labelled.min())}; {mend}")
    classifier = type(student).__name__.endswith(("ForSequenceClassification", "ForTokenClassification"))
    if classifier and classes is not None and int(labelled.max()) >= classes:
        raise ValueError(f"a row has label {int(labelled.max())}, but the student tells {classes} labels apart, from 0")


_SAMPLE = 256
_BATCH_SIZE = 64


def first_rows(dataset: Any, count: int, columns: Collection[str] | None) -> list[Any]:
    """The first `count` rows, or as many as there are, cut down to `columns` if given; of an iterable data set too.

    Raises:
        ValueError: the data set is empty.
    """
    indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    rows = [dataset[i] for i in range(min(count, len(dataset)))] if indexed else itertools.islice(dataset, count)
    found = [row if columns is None else {k: v for k, v in row.items() if k in columns} for row in rows]
    if not found:
        raise ValueError("train_dataset is empty; give at least one row to distill on")
    return found


def sample_batches(dataset: Any, collate: Callable[[list[Any]], Any]) -> list[Any]:
    """Batches of up to 256 rows from all over the data set; none of one that has no length."""
    if not hasattr(dataset, "__len__"):
        return []
    indices = range(0, len(dataset), max(len(dataset) // _SAMPLE, 1))
    subset: Any = Subset(dataset, list(indices)[:_SAMPLE])
    return list(DataLoader(subset, _BATCH_SIZE, collate_fn=collate))
