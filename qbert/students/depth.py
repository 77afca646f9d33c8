"""Students with fewer layers, started from the teacher's own.

    >>> student = depth(teacher, 3, batches)          # the best three, by measurement
    >>> student = depth(teacher, [0, 4, 5])           # these
    >>> print(compare_depths(teacher, batches, 3))    # all choices

For a fine-tuned teacher the choice decides where the training starts: without its last layer a classifier is at chance.
So every choice is scored by one forward pass over a few hundred unlabelled rows, without any training.

Sources: Sanh et al. 2019, DistilBERT, section 3 (every other layer); Sun et al. 2019 (the first k layers); Reid et al.
2021, Subformer (sandwich: the first and the last layer of their own, one in the middle applied several times).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from qbert.calibration import model_outputs, reads_mappings, run_batch
from qbert.encoders.inputs import accepted_inputs, to_device, without_labels
from qbert.encoders.modes import evaluation_mode
from qbert.encoders.structure import changes, of_layers, replace_record
from qbert.encoders.targets import base_model, main_layers
from qbert.encoders.zeros import note_zeros, noted_zeros
from qbert.progress import progress_bar

Model = TypeVar("Model", bound=nn.Module)
Batch = Mapping[str, Any]
_DEPTH_NAMES = ("num_hidden_layers", "n_layers")
# Families whose classes build their first layer without a norm that all others have, so that no other takes its place.
_FIRST_DIFFERS = ("modernbert",)
# Above so many ways to keep layers a beam goes down from the whole teacher: 12 layers have 924 ways to keep 6, 24 have
# 2.7 million to keep 12.
_MOST_CHOICES, _BEAM = 500, 3
_AT_ONCE = 2**22  # values that are compared in float64 together


def depth(teacher: Model, layers: int | Sequence[int], batches: Iterable[Batch] | None = None) -> Model:
    """A copy of `teacher` that keeps only some of its encoder layers (and everything outside of them).

    Args:
        teacher: any encoder with a list of layers, with or without a head.
        layers: which to keep, from 0, in the order they will be applied (negative numbers count from the end); or how
            many, which are then those that `compare_depths` finds best.
        batches: unlabelled batches to compare choices on; needed for a number of layers.

    Returns:
        A model of the same class, in evaluation mode, whose config says its new depth, so that it can be saved.

    Raises:
        ValueError: a layer that does not exist, a number without batches, or what else `student_with_layers` and
            `compare_depths` refuse.
    """
    if not isinstance(layers, int):
        return student_with_layers(teacher, layers)
    if batches is None:
        raise ValueError(f"layers={layers} is a number, and which layers is chosen on batches; pass batches, or a list")
    return student_with_layers(teacher, compare_depths(teacher, batches, layers, sandwiches=False).best.layers)


def student_with_layers(teacher: Model, layers: Sequence[int]) -> Model:
    """A copy of `teacher` that keeps only some of its encoder layers (and everything outside of them).

    Args:
        teacher: any encoder with a list of layers, with or without a head.
        layers: which to keep, from 0, in the order they will be applied; negative numbers count from the end. A layer
            named twice is copied twice.

    Returns:
        A model of the same class, in evaluation mode, whose config says its new depth, so that it can be saved.

    Raises:
        ValueError: no layers, a layer that does not exist, or layers that share their weights (ALBERT), of which
            there is only one to keep: lower ``config.num_hidden_layers`` instead; a ModernBERT without its first layer
            in the first place, and only there.
    """
    found = _own_layers(teacher)
    if not layers:
        raise ValueError("layers is empty; keep at least one")
    wrong = next((i for i in layers if not -len(found) <= i < len(found)), None)
    if wrong is not None:
        raise ValueError(f"the teacher has no layer {wrong}; it has {len(found)}, numbered 0 to {len(found) - 1}")
    kinds = [i % len(found) for i in layers]
    if _first_differs(teacher) and (kinds[0] != 0 or 0 in kinds[1:]):
        raise ValueError(
            f"layers={list(layers)} is not possible; the first layer of a {type(teacher).__name__} has one norm less "
            "than the others, so keep layer 0 first, once"
        )
    student = copy.deepcopy(teacher)
    _, base = base_model(student)
    parent, name = _list_of(student)
    kept = cast(nn.ModuleList, getattr(parent, name))
    setattr(parent, name, nn.ModuleList(copy.deepcopy(kept[i]) for i in layers))
    stem, _ = main_layers(teacher)
    replace_record(student, of_layers(changes(teacher), stem, found, layers))
    (zeros,) = of_layers([{"change": "zeros", "names": noted_zeros(teacher)}], stem, found, layers)
    note_zeros(student, zeros["names"])
    configs: list[Any] = [m.config for m in (base, student) if hasattr(m, "config")]
    for config in {id(c): c for c in configs}.values():
        for key in _DEPTH_NAMES:
            if hasattr(config, key):
                setattr(config, key, len(layers))
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in kinds]
    return student.eval()


@dataclass(frozen=True)
class Choice:
    """Layers of a teacher, in the order they are applied, and how near they are to it without any training.

    Attributes:
        layers: from 0; one that occurs several times is applied several times.
        divergence: mean KL(teacher || student) of the outputs in nats; of values, of labels that are decided on their
            own, and of hidden states where there are no logits (an encoder alone, spans), the mean squared difference.
        agreement: percent of the outputs with the teacher's class; ``None`` for values.
    """

    layers: tuple[int, ...]
    divergence: float
    agreement: float | None

    @property
    def sets(self) -> int:
        """How many different layers have to be stored."""
        return len(set(self.layers))


@dataclass(frozen=True)
class DepthTable:
    """Every choice that was compared, the nearest to the teacher first; print it.

    Attributes:
        choices: in that order.
        ways: how many ways there are to keep as many layers, where not all were compared; ``None`` where all were.
    """

    choices: tuple[Choice, ...]
    ways: int | None = None

    @property
    def best(self) -> Choice:
        """The nearest one that applies no layer twice."""
        return next(choice for choice in self.choices if choice.sets == len(choice.layers))

    @property
    def best_sandwich(self) -> Choice:
        """The nearest one that applies a layer several times (`qbert.students.shared.share_layers` makes it)."""
        return next(choice for choice in self.choices if choice.sets < len(choice.layers))

    def to_list(self) -> list[tuple[list[int], float, float | None]]:
        """Plain JSON values: (layers, divergence, agreement) of every choice."""
        return [(list(choice.layers), choice.divergence, choice.agreement) for choice in self.choices]

    @classmethod
    def from_list(cls, rows: Iterable[Sequence[Any]], ways: int | None = None) -> DepthTable:
        """What `to_list` gave, and `ways`."""
        choices = (Choice(tuple(layers), divergence, agreement) for layers, divergence, agreement in rows)
        return cls(tuple(choices), ways)

    def __str__(self) -> str:
        width = max(len("layers applied"), *(2 * len(choice.layers) for choice in self.choices))
        lines = [f"{'layers applied':<{width}}  stored  divergence  agreement"]
        for choice in self.choices:
            agreement = "" if choice.agreement is None else f"{choice.agreement:.1f} %"
            names = " ".join(map(str, choice.layers))
            lines.append(f"{names:<{width}}  {choice.sets:>6}  {choice.divergence:>10.4f}  {agreement:>9}")
        if self.ways is not None:
            lines.append(f"found by a search that leaves out a layer at a time, not all of {self.ways:,} ways compared")
        return "\n".join(lines)


def compare_depths(
    teacher: nn.Module, batches: Iterable[Batch], keep: int, *, sandwiches: bool = True, progress: bool = False
) -> DepthTable:
    """Score every way of keeping `keep` layers in their order, and sandwiches of as many, by a forward pass each.

    Where there are more than 500 ways, not all are tried: from the whole teacher one layer after another is left out,
    and at every depth the 3 choices nearest to the teacher go on. The choices of the last depth, and the sandwiches of
    the same layers, are the table, which says so. It need not hold the best of all ways.

    Of a ModernBERT only choices with its first layer are there, without which it cannot be saved.

    A sandwich has the teacher's depth: the first and the last of the kept layers once, those between them, in their
    order, as often as it takes, the middle ones as evenly as possible. It stores what the kept layers do and takes the
    teacher's time.

    Args:
        teacher: an encoder with a list of layers, with or without a head; left as it is.
        batches: a few hundred unlabelled rows; labels are not looked at.
        keep: number of layers to keep.
        sandwiches: also compare those; they take twice as long as all others.
        progress: show a bar.

    Raises:
        ValueError: no batches, or fewer than one or not fewer than the teacher's layers to keep.
    """
    count = check_kept(teacher, keep)
    kept = list(batches)
    if not kept:
        raise ValueError("batches is empty; give a few hundred unlabelled rows")
    fixed = int(_first_differs(teacher))  # layers that every choice begins with
    ways = math.comb(count - fixed, keep - fixed)
    target, values = head_outputs(teacher, kept), compares_values(teacher)
    with progress_bar(total=0, desc="comparing layers", unit="choice", disable=not progress) as bar:

        def scored(several: Iterable[tuple[int, ...]]) -> list[Choice]:
            found, different = [], list(dict.fromkeys(several))
            bar.total += len(different)
            for layers in different:
                with applied(teacher, layers):
                    found.append(Choice(layers, *likeness(target, head_outputs(teacher, kept), values)))
                bar.update()
            return sorted(found, key=lambda choice: choice.divergence)

        if ways <= _MOST_CHOICES:
            rest = itertools.combinations(range(fixed, count), keep - fixed)
            choices = scored((*range(fixed), *layers) for layers in rest)
        else:
            choices, beam = [], [tuple(range(count))]
            for size in range(count - 1, keep - 1, -1):
                choices = scored((*b[:i], *b[i + 1 :]) for b in beam for i in range(fixed, size + 1))
                beam = [choice.layers for choice in choices[:_BEAM]]
        if sandwiches and keep > 1:
            choices += scored(_sandwich(choice.layers, count) for choice in choices)
    choices.sort(key=lambda choice: choice.divergence)
    return DepthTable(tuple(choices), ways if ways > _MOST_CHOICES else None)


def check_kept(teacher: nn.Module, keep: int) -> int:
    """The teacher's number of layers. Raises ValueError for fewer than one, or not fewer than those, to keep."""
    count = len(_own_layers(teacher))
    if not 1 <= keep < count:
        raise ValueError(f"keep={keep} is not possible; the teacher has {count} layers, so keep 1 to {count - 1}")
    return count


@contextmanager
def applied(model: nn.Module, layers: Sequence[int]) -> Iterator[None]:
    """Inside, the forward pass of `model` applies these of its layers, one of them several times perhaps."""
    parent, name = _list_of(model)
    own = cast(nn.ModuleList, getattr(parent, name))
    # BERT's forward walks over the list; DistilBERT's and others' likewise.
    setattr(parent, name, nn.ModuleList(own[i] for i in layers))
    try:
        yield
    finally:
        setattr(parent, name, own)


def _sandwich(layers: tuple[int, ...], count: int) -> tuple[int, ...]:
    """(0, 2, 5) of six: (0, 2, 2, 2, 2, 5); two layers (0, 5): (0, 0, 0, 0, 0, 5)."""
    repeated = layers[1:-1] or layers[:1]
    once = len(layers) - len(repeated)
    share, more = divmod(count - once, len(repeated))
    times = {layer: share + (i < more) for i, layer in enumerate(repeated)}
    return tuple(layer for layer in layers for _ in range(times.get(layer, 1)))


@torch.no_grad()
def head_outputs(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """[N, C] on the CPU: logits of all rows (of all real tokens), or vectors of a sentence model, or the last hidden
    states where there are none."""
    found = []
    with evaluation_mode(model):
        for batch in batches:
            inputs = {k: v for k, v in without_labels(to_device(batch, model)).items() if isinstance(v, Tensor)}
            if reads_mappings(model):
                values = model_outputs(run_batch(model, inputs))[0]
            else:
                output = model(**accepted_inputs(model, inputs), output_hidden_states=True)
                logits = getattr(output, "logits", None)
                values = output.hidden_states[-1] if logits is None else logits
            mask = inputs.get("attention_mask")
            if values.dim() == 3 and mask is not None:
                values = values[mask.to(torch.bool)]
            found.append(values.cpu().reshape(-1, values.shape[-1] if values.dim() > 1 else 1))
    return torch.cat(found)


def compares_values(model: nn.Module) -> bool:
    """Whether the outputs are numbers, or none at all, rather than classes that exclude each other."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "problem_type", None)
    has_classes = type(model).__name__.endswith(("Classification", "ForMaskedLM", "ForMultipleChoice"))
    return not has_classes or kind in ("regression", "multi_label_classification") or config.num_labels == 1


def likeness(teacher: Tensor, student: Tensor, values: bool) -> tuple[float, float | None]:
    """(divergence, agreement) of outputs [N, C]; see `Choice`.

    Some rows at a time, since over a vocabulary they take more in float64 than all else.
    """
    most = max(1, _AT_ONCE // teacher.shape[1])
    divergence, same = 0.0, 0
    for wanted, found in zip(*(outputs.split(most) for outputs in (teacher, student)), strict=True):
        wanted, found = wanted.double(), found.double()
        if values:
            divergence += float((wanted - found).square().mean()) * len(wanted)
            continue
        logs = [outputs.log_softmax(1) for outputs in (wanted, found)]
        divergence += float((logs[0].exp() * (logs[0] - logs[1])).sum(1).mean()) * len(wanted)
        same += int((wanted.argmax(1) == found.argmax(1)).sum())
    return divergence / len(teacher), None if values else 100 * same / len(teacher)


def _list_of(model: nn.Module) -> tuple[nn.Module, str]:
    """(module that holds the list of layers, name of the list in it)."""
    stem, _ = main_layers(model)
    parent_name, _, name = stem.rpartition(".")
    return base_model(model)[1].get_submodule(parent_name), name


def _first_differs(teacher: nn.Module) -> bool:
    """Whether no other layer can take the place of the first."""
    return getattr(getattr(base_model(teacher)[1], "config", None), "model_type", None) in _FIRST_DIFFERS


def _own_layers(teacher: nn.Module) -> nn.ModuleList:
    """The teacher's list of layers. Raises ValueError where one is applied several times."""
    _, found = main_layers(teacher)
    config: Any = base_model(teacher)[1].config
    count = next((getattr(config, name) for name in _DEPTH_NAMES if hasattr(config, name)), len(found))
    if count != len(found):
        raise ValueError(
            f"{type(teacher).__name__} applies {len(found)} shared layer(s) {count} times; to make it shallower, set "
            "config.num_hidden_layers"
        )
    return found
