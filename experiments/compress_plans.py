"""Which students there are: how each is made from the teacher, and what it learns from, as one entry each.

A new student is one entry of `PLANS`:

    "mine": Plan(
        "my student",
        "where it is from",
        build=lambda bench, seed: my_student(bench.teacher, seed=seed),
        phases=(Phase("distillation", lambda bench: recipes.mine()),),
        shape="mine",
    )

``python experiments/compress.py --student mine`` then trains it beside its controls and ends in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from qbert.distill import Recipe, recipes
from qbert.encoders.targets import attention_heads, base_model
from qbert.students.depth import student_with_layers

if TYPE_CHECKING:
    from compress_bench import Bench, Rows


def task_rows(bench: Bench) -> Rows:
    """The task's training rows."""
    return bench.rows


def fine_tuned(bench: Bench) -> nn.Module:
    """The teacher that the table is about."""
    return bench.teacher


def itself(bench: Bench, student: nn.Module) -> nn.Module:
    """The student as it is."""
    return student


@dataclass(frozen=True)
class Phase:
    """One training on the way to a student.

    Attributes:
        name: for the folder of its checkpoints.
        recipe: what it learns from.
        rows: what it learns on.
        teacher: whom it learns from.
        inside: (bench, student) -> the model to train, which holds the student's own encoder: the student with
            another head, say. The student itself by default.
        share: part of all steps, relative to the other phases.
        rate: factor of the plan's learning rate.
    """

    name: str
    recipe: Callable[[Bench], Recipe]
    rows: Callable[[Bench], Rows] = task_rows
    teacher: Callable[[Bench], nn.Module] = fine_tuned
    inside: Callable[[Bench, Any], nn.Module] = itself
    share: float = 1.0
    rate: float = 1.0


@dataclass(frozen=True)
class Plan:
    """One student.

    Attributes:
        title: what the table calls it.
        source: where it is from.
        build: (bench, seed) -> a fresh student; what is drawn at random is drawn by the seed.
        phases: what it goes through, in order. All together have the budget's steps.
        shape: what it looks like; plans of one shape also start alike, and share their hard-label control.
        rate: peak learning rate; that of the command line takes its place.
        ablations: plans that leave something out, by name; trained with ``--ablations``.
    """

    title: str
    source: str
    build: Callable[[Bench, int], nn.Module]
    phases: tuple[Phase, ...]
    shape: str
    rate: float = 2e-4
    ablations: Mapping[str, Plan] = field(default_factory=dict)


def hard_labels(plan: Plan) -> Plan:
    """The control: the same student, steps and rate, taught by the labels alone."""
    phase = Phase("labels", lambda bench: recipes.qat(learned_steps=False))
    return Plan(f"{plan.shape}, hard labels", "control", plan.build, (phase,), plan.shape, plan.rate)


def shallow(bench: Bench, seed: int) -> nn.Module:
    """The teacher with some of its layers, which are chosen by measurement."""
    return student_with_layers(bench.teacher, bench.layers())


def from_scratch(bench: Bench, seed: int) -> nn.Module:
    """The same shape with random weights."""
    import copy

    import torch

    config = copy.deepcopy(bench.teacher.config)
    config.num_hidden_layers = bench.depth
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(bench.teacher)(config).eval()


def relations(bench: Bench) -> Recipe:
    """MiniLMv2 with as many relation heads as the teacher has heads, then the outputs."""
    heads = attention_heads(base_model(bench.teacher)[1])
    return recipes.minilm(relation_heads=heads or 1, prediction=0.4)


SHALLOW = "fewer layers"
PLANS: dict[str, Plan] = {
    "distilbert": Plan(
        "DistilBERT", "Sanh et al. 2019", shallow, (Phase("task", lambda bench: recipes.distilbert()),), SHALLOW
    ),
    "tinybert": Plan(
        "TinyBERT",
        "Jiao et al. 2020",
        shallow,
        (Phase("task", lambda bench: recipes.tinybert(projection=False)),),
        SHALLOW,
    ),
    "minilm": Plan("MiniLM", "Wang et al. 2021", shallow, (Phase("distillation", relations),), SHALLOW),
    "pkd": Plan("PKD", "Sun et al. 2019", shallow, (Phase("distillation", lambda bench: recipes.pkd()),), SHALLOW),
    "layers": Plan("layers dropped, no training", "this project", shallow, (), SHALLOW),
    "small": Plan(
        "from scratch",
        "Turc et al. 2019",
        from_scratch,
        (Phase("distillation", lambda bench: recipes.logits()),),
        "from scratch",
    ),
}
