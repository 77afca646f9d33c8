"""A search for an architecture by gradients: weights and choices of a network that holds all of them, in turns.

`Search` is a `Distiller` whose student is such a network (`qbert.students.adabert.adabert_space`): it has its choices
under ``architecture``, draws from them, and says what they cost and what they come to (`derive`). Steps take turns: one
trains the weights, on rows of one half, under a drawn architecture; the next trains the choices alone, on rows of the
other half, where an operation that only learned its rows by heart is no help. At first all steps train weights: choices
between operations that know nothing yet would follow their price alone. Draws cool down on the way.

    >>> search = Search(probed, space, recipes.adabert_search(probed.losses, depth=4), arguments, rows)
    >>> search.train()
    >>> cell, depth = space.derive()

Sources: Liu et al. 2019, DARTS, section 2.3 (first order, two halves); Chen et al. 2020, AdaBERT, section 3.4 (draws).
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qbert.distill.distiller import Distiller
from qbert.distill.recipe import Recipe
from qbert.tasks.encoding import training_order

CHOICES = "architecture"
_COLDEST = 0.2


class Search(Distiller):
    """A `Distiller` that trains the weights and the choices of a student under search in turns.

    Args:
        teacher, student, recipe, args, train_dataset, **kwargs: as of `Distiller`; ``max_steps`` counts both kinds of
            step. The rows need a length, and their order is the search's own.
        weights_first: share of the steps in which the weights alone are trained.

    Raises:
        ValueError: a student without an architecture, a recipe without a price (a term ``cost``), several processes,
            accumulated batches, too few rows for a batch of each half, a share of 1; and what `Distiller` raises.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        recipe: Recipe,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        *,
        weights_first: float = 0.3,
        **kwargs: Any,
    ) -> None:
        if not 0 <= weights_first < 1:
            raise ValueError(f"weights_first={weights_first} leaves no step for the choices; use a share below 1")
        if not hasattr(student, CHOICES) or not hasattr(student, "derive"):
            raise ValueError(
                f"student: {type(student).__name__} has no architecture to search for; give what "
                "students.adabert_space makes"
            )
        priced = all(any(match.feature == "cost" for match in stage.matches) for stage in recipe.stages)
        if not priced:
            raise ValueError(
                f"recipe {recipe.name!r} searches without an efficiency weight, so that nothing speaks for a small "
                "architecture; use recipes.adabert_search(efficiency=...) or add Match('cost', weight=...)"
            )
        given = args if args is not None else TrainingArguments("searched", **recipe.arguments)
        if given.world_size > 1 or given.gradient_accumulation_steps > 1:
            raise ValueError(
                f"args: a search takes turns batch by batch in one process, got {given.world_size} processes and "
                f"gradient_accumulation_steps={given.gradient_accumulation_steps}; use one of each"
            )
        args = copy.copy(given)
        size = args.train_batch_size
        steps = args.max_steps if args.max_steps > 0 else int(args.num_train_epochs * len(train_dataset) / size)
        first = round(weights_first * steps)
        rows = Subset(train_dataset, in_turns(train_dataset, size, steps, args.seed, first))
        args.max_steps, args.train_sampling_strategy = steps, "sequential"
        super().__init__(teacher, student, recipe, args, rows, **kwargs)
        self.add_callback(Turns(student, first))


class Turns(TrainerCallback):
    """After the `first` steps every second one belongs to the choices; draws cool down from 1 to 0.2."""

    def __init__(self, student: Any, first: int) -> None:
        self.student, self.first = student, first

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Whose turn it is."""
        self.student.choosing = chooses(state.global_step, self.first)
        self.student.temperature = _COLDEST ** (state.global_step / max(state.max_steps, 1))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What has no turn stands still."""
        for name, parameter in self.student.named_parameters():
            if name.startswith(f"{CHOICES}.") != self.student.choosing:
                parameter.grad = None


def chooses(step: int, first: int) -> bool:
    """Whether a step (from 0) belongs to the choices, where the first `first` steps do not."""
    return step >= first and (step - first) % 2 == 1


def in_turns(rows: Any, batch_size: int, steps: int, seed: int, first: int = 0) -> list[int]:
    """Indices of the rows of `steps` batches, one half for weights and one for choices, shuffled anew in every pass.

    Raises:
        ValueError: rows without a length, or less than a batch in each half.
    """
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise ValueError("train_dataset: a stream has no halves; give a data set with a length")
    if len(rows) < 2 * batch_size:
        raise ValueError(
            f"train_dataset: {len(rows)} rows make no batch of {batch_size} in each half; give at least "
            f"{2 * batch_size}, or smaller batches"
        )
    lengths = np.array([len(rows[i].get("input_ids", ())) for i in range(len(rows))])
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    halves = np.array_split(shuffled, 2)
    queues: list[list[list[int]]] = [[], []]
    turns = [int(chooses(step, first)) for step in range(steps)]
    passes = 0
    while any(len(queue) < turns.count(turn) for turn, queue in enumerate(queues)):
        for half, queue in zip(halves, queues, strict=True):
            batches = training_order(lengths[half], batch_size, seed, passes)
            queue += [half[batch].tolist() for batch in batches if len(batch) == batch_size]
        passes += 1
    batches_of = [iter(queue) for queue in queues]
    return [index for turn in turns for index in next(batches_of[turn])]
