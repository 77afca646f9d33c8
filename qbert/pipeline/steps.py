"""The steps of a pipeline as data: each is a small frozen record that makes the next model out of the one before.

    >>> Depth((0, 4, 5)), Prune(ffn=0.25), Distill("minilm", steps=200), Quantize(2, size_mb=6), Pack()

A step holds plain JSON values only; what it works on (teacher, rows, folder) comes from the `Context` of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from qbert.arguments import is_whole, whole_number
from qbert.bits import BitsConfig
from qbert.encoders.inputs import without_labels
from qbert.quantizers.sparsity import Pattern


@dataclass(frozen=True)
class Context:
    """What the steps of one run share.

    Attributes:
        teacher: the float model that the run began with.
        tokenizer: of teacher and students.
        rows: training rows, anything with ``__len__`` and ``__getitem__``; recipes that ask for labels read theirs.
        collate: makes a batch of a list of rows.
        folder: where this step may keep what it needs to be resumed.
        seed: of data order, dropout and whatever else is random.
        bf16: train in bfloat16.
        progress: show bars.
    """

    teacher: nn.Module
    tokenizer: Any
    rows: Any
    collate: Callable[[list[Any]], Mapping[str, Any]]
    folder: Path
    seed: int = 0
    bf16: bool = False
    progress: bool = True

    def batches(self, rows: int, size: int = 32) -> list[dict[str, Any]]:
        """Batches of `rows` rows, without labels, spread over all of them, since data may be sorted by source."""
        count = min(rows, len(self.rows))
        chosen = [self.rows[i * len(self.rows) // count] for i in range(count)]
        return [without_labels(self.collate(chosen[i : i + size])) for i in range(0, len(chosen), size)]


class Step:
    """One step; subclasses are frozen dataclasses of JSON values."""

    kind: ClassVar[str]

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """The next model; `model` may be used up."""
        raise NotImplementedError

    def foresee(self, model: nn.Module) -> nn.Module | None:
        """What comes of a model on device meta, where its structure alone tells; None where only `apply` does.

        Raises:
            ValueError: what `apply` would refuse in a model of this structure, which is asked before any step is made.
        """
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `step_from_dict` makes the step of them again."""
        return {"step": self.kind, **_plain(asdict(self))}  # type: ignore[call-overload]


class Structure(Step):
    """A step that changes the float model's structure by what some unlabelled rows say; a plan chooses among these."""

    rows: int

    def __post_init__(self) -> None:
        whole_number("rows", self.rows, least=1)

    def change(self, model: nn.Module, batches: Sequence[Mapping[str, Any]] | None) -> nn.Module:
        """The changed copy of a float model, by batches of tensors without labels, or by its weights alone."""
        raise NotImplementedError

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """`change` by the first `rows` training rows."""
        return self.change(model, context.batches(self.rows))


@dataclass(frozen=True)
class Depth(Structure):
    """Keep some layers.

    Attributes:
        layers: which, from 0, or how many: the choice that is nearest to the teacher's outputs before any training.
        rows: training rows that a number of layers is chosen on.
    """

    layers: int | tuple[int, ...]
    rows: int = 256
    kind: ClassVar[str] = "depth"

    def __post_init__(self) -> None:
        super().__post_init__()
        if is_whole(self.layers):
            whole_number("layers", self.layers, least=1)
            return
        object.__setattr__(self, "layers", tuple(self.layers))  # type: ignore[arg-type]
        if not self.layers:
            raise ValueError("layers is empty; keep at least one")

    def foresee(self, model: nn.Module) -> nn.Module:
        """With a number of layers, the first ones, since all have one structure."""
        from qbert.students.depth import check_kept, student_with_layers

        if not isinstance(self.layers, tuple):
            check_kept(model, self.layers)
        return student_with_layers(model, self.layers if isinstance(self.layers, tuple) else range(self.layers))

    def change(self, model: nn.Module, batches: Sequence[Mapping[str, Any]] | None) -> nn.Module:
        """See `qbert.students.depth`."""
        from qbert.students import depth

        return depth(model, self.layers, batches)


@dataclass(frozen=True)
class Prune(Structure):
    """Take out heads, feed-forward columns or single weights; what stays makes good for them.

    Attributes:
        heads, ffn: shares of every layer's heads and feed-forward columns, in [0, 1).
        pattern: zeros in the matrices that are left: "2:4", or a share.
        rows: training rows for second-order scores.
        names: patterns of the matrices that get zeros, as in `BitsConfig`.
    """

    heads: float = 0.0
    ffn: float = 0.0
    pattern: str | float | None = None
    rows: int = 384
    names: str | tuple[str, ...] = "*"
    kind: ClassVar[str] = "prune"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.names, str):
            object.__setattr__(self, "names", tuple(self.names))
        for name, share in (("heads", self.heads), ("ffn", self.ffn)):
            if not isinstance(share, (int, float)) or not 0 <= share < 1:
                raise ValueError(f"{name}={share!r} is not a share to take out; use a number from 0 to below 1")
        if self.pattern is not None:
            Pattern.parse(self.pattern)

    def foresee(self, model: nn.Module) -> nn.Module:
        """With the first heads and columns of every layer."""
        from qbert.students.pruned import pruned_structure

        return pruned_structure(model, heads=self.heads, ffn=self.ffn, pattern=self.pattern, names=self.names)

    def change(self, model: nn.Module, batches: Sequence[Mapping[str, Any]] | None) -> nn.Module:
        """See `qbert.students.pruned.prune`."""
        from qbert.students.pruned import prune

        return prune(model, heads=self.heads, ffn=self.ffn, pattern=self.pattern, data=batches, names=self.names)


@dataclass(frozen=True)
class Factorize(Structure):
    """Matrices in two factors.

    Attributes:
        rank: one for all, or the share of the matrices' values to keep (below 1), or that of each matrix by name.
        rows: training rows that the factors are fitted on.
        weighting: what an error costs (`qbert.students.lowrank`); where None, as there.
    """

    rank: int | float | Mapping[str, int]
    rows: int = 384
    weighting: Literal["none", "activations", "both"] | None = None
    kind: ClassVar[str] = "factorize"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.rank.values() if isinstance(self.rank, Mapping) else [self.rank]
        if isinstance(self.rank, float) and 0 < self.rank < 1:
            whole = []
        for rank in whole:
            if not is_whole(rank) or rank < 1:
                raise ValueError(f"rank={rank!r} is not possible; use whole numbers from 1 on, or a share below 1")
        if self.weighting not in (None, "none", "activations", "both"):
            raise ValueError(f"weighting={self.weighting!r} is not known; use 'none', 'activations' or 'both'")

    def __hash__(self) -> int:
        return hash(str(self.to_dict()))

    def foresee(self, model: nn.Module) -> None:
        """Nothing: which matrices become factors is found from their values."""
        from qbert.students.lowrank import check_rank

        check_rank(model, self.rank)

    def change(self, model: nn.Module, batches: Sequence[Mapping[str, Any]] | None) -> nn.Module:
        """See `qbert.students.lowrank.factorize`."""
        from qbert.students.lowrank import factorize

        return factorize(model, self.rank, weighting=self.weighting, data=batches)


@dataclass(frozen=True)
class Share(Structure):
    """Fewer layers of their own at the same depth.

    Attributes:
        layers: ``all``, ``sandwich``, a number of runs, or the layer of each depth (`qbert.students.share_layers`).
        rows: training rows that each run's layer is chosen on.
    """

    layers: str | int | tuple[int, ...] = "sandwich"
    rows: int = 256
    kind: ClassVar[str] = "share"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.layers, str) and not is_whole(self.layers):
            object.__setattr__(self, "layers", tuple(self.layers))  # type: ignore[arg-type]
        if isinstance(self.layers, str) and self.layers not in ("all", "sandwich"):
            raise ValueError(f"layers={self.layers!r} is not known; use 'all', 'sandwich', a number, or a list")

    def foresee(self, model: nn.Module) -> nn.Module:
        """With the layer in the middle of every run."""
        return self.change(model, None)

    def change(self, model: nn.Module, batches: Sequence[Mapping[str, Any]] | None) -> nn.Module:
        """See `qbert.students.shared.share_layers`."""
        from qbert.students.shared import share_layers

        return share_layers(model, self.layers, data=batches)


@dataclass(frozen=True)
class Distill(Step):
    """Train the model on the teacher's outputs.

    Attributes:
        recipe: a name of `qbert.distill.recipes`.
        steps: optimizer steps.
        learning_rate: peak rate; the recipe's own where None.
        batch_size: rows a step.
        options: arguments of the recipe, such as ``{"relation_heads": 24}``.
    """

    recipe: str = "qbert_kd"
    steps: int = 100
    learning_rate: float | None = None
    batch_size: int = 16
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: ClassVar[str] = "distill"

    def __post_init__(self) -> None:
        from qbert.distill.recipes import RECIPES

        if self.recipe not in RECIPES:
            raise ValueError(f"recipe={self.recipe!r} is not known; use one of {', '.join(sorted(RECIPES))}")
        if not is_whole(self.steps) or self.steps < 1:
            raise ValueError(f"steps={self.steps!r} is not possible; use a whole number of at least 1")
        whole_number("batch_size", self.batch_size, least=1)
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate!r} is not possible; use a number above 0")
        try:
            RECIPES[self.recipe](**self.options)
        except TypeError as error:
            raise ValueError(f"options={dict(self.options)} do not fit recipe {self.recipe!r}: {error}") from error

    def foresee(self, model: nn.Module) -> nn.Module:
        """The same structure."""
        return model

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """A `Distiller` run that goes on from its last whole checkpoint."""
        from transformers import PrinterCallback, TrainingArguments

        from qbert.distill import Distiller
        from qbert.distill.checkpoint import last_good_checkpoint
        from qbert.distill.recipes import RECIPES

        recipe = RECIPES[self.recipe](**self.options)
        device = next(model.parameters()).device
        arguments = TrainingArguments(
            str(context.folder),
            per_device_train_batch_size=self.batch_size,
            max_steps=self.steps,
            learning_rate=self.learning_rate or recipe.arguments["learning_rate"],
            warmup_steps=0.1,
            weight_decay=0.01,
            train_sampling_strategy="group_by_length",
            logging_steps=max(self.steps // 20, 1),
            save_steps=max(self.steps // 4, 25),
            save_total_limit=1,
            seed=context.seed,
            use_cpu=device.type == "cpu",
            bf16=context.bf16,
            disable_tqdm=not context.progress,
            report_to="none",
        )
        distiller = Distiller(
            context.teacher,
            model,
            recipe,
            arguments,
            context.rows,
            data_collator=context.collate,
            processing_class=context.tokenizer,
            check_teacher=False,
        )
        distiller.remove_callback(PrinterCallback)  # which the Trainer takes for a bar that is switched off
        checkpoint = last_good_checkpoint(context.folder)
        distiller.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return distiller.student.eval()


@dataclass(frozen=True)
class Quantize(Step):
    """Round matrices, tables and activations.

    Attributes:
        bits: of all encoder matrices, or a whole configuration as plain values (`BitsConfig.to_dict`), which says all
            of what follows itself.
        rounding: ``compensated`` on training rows without labels (also ``None``), or ``nearest``, where `bits` is a
            number.
        embedding_bits: of the tables, where `bits` is a number; ``None`` as in `BitsConfig`.
        settings: further fields of the `BitsConfig`, where `bits` is a number.
        rows: training rows for compensated rounding, static ranges and composed tables.

    Raises:
        ValueError: a configuration that cannot be, or rounding, tables or settings beside a whole one.
    """

    bits: int | Mapping[str, Any]
    rounding: str | None = None
    embedding_bits: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: int = 384
    kind: ClassVar[str] = "quantize"

    def __post_init__(self) -> None:
        if isinstance(self.bits, BitsConfig):
            object.__setattr__(self, "bits", self.bits.to_dict())
        whole_number("rows", self.rows, least=1)
        if isinstance(self.bits, Mapping):
            beside: dict[str, Any] = {"rounding": self.rounding, "embedding_bits": self.embedding_bits}
            beside["settings"] = self.settings or None
            for name, value in beside.items():
                if value is not None:
                    raise ValueError(
                        f"{name}={value!r} beside a whole configuration would be left out; write it into that, "
                        "as an argument of its BitsConfig"
                    )
        elif self.rounding is None:
            object.__setattr__(self, "rounding", "compensated")
        self.config()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `step_from_dict` makes the step of them again."""
        # Beside a whole configuration the word means nothing, but files have always had it, and know a run by it.
        return {**super().to_dict(), "rounding": self.rounding or "compensated"}

    def config(self) -> BitsConfig:
        """The configuration.

        Raises:
            ValueError: one that cannot be.
        """
        if isinstance(self.bits, Mapping):
            return BitsConfig.from_dict(dict(self.bits))
        settings = {"rounding": self.rounding, "embedding_bits": self.embedding_bits, **self.settings}
        return BitsConfig(self.bits, **settings)

    def foresee(self, model: nn.Module) -> nn.Module:
        """The same structure, as far as later steps ask."""
        self.config().resolve(model)
        return model

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """See `qbert.quantize_model`."""
        from qbert.quantize import quantize_model

        config = self.config()
        needs_data = any(spec.needs_data for spec in config.resolve(model).values())
        data = context.batches(self.rows) if needs_data else None
        kept = context.folder / "rounding"
        return quantize_model(model, config, calibration_data=data, checkpoint=kept, progress=context.progress)


@dataclass(frozen=True)
class Pack(Step):
    """Store the codes; the last step of a pipeline that ends in a file."""

    kind: ClassVar[str] = "pack"

    def foresee(self, model: nn.Module) -> nn.Module:
        """The same structure, as far as later steps ask."""
        return model

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """See `qbert.pack`."""
        from qbert.packing import pack

        return pack(model)


STEPS: dict[str, type[Step]] = {kind.kind: kind for kind in (Depth, Share, Prune, Factorize, Distill, Quantize, Pack)}


def step_from_dict(values: Mapping[str, Any]) -> Step:
    """The step that `Step.to_dict` described.

    Raises:
        ValueError: an unknown step or field, or one that the step cannot be without.
    """
    given = dict(values)
    kind = given.pop("step", None)
    if kind not in STEPS:
        raise ValueError(f"step={kind!r} is not known; use one of {', '.join(STEPS)}")
    known = fields(STEPS[kind])  # type: ignore[arg-type]
    names = {f.name for f in known}
    unknown = sorted(set(given) - names)
    if unknown:
        raise ValueError(f"step {kind!r} has no {unknown[0]!r}; it has {', '.join(sorted(names))}")
    needed = [f.name for f in known if f.default is MISSING and f.default_factory is MISSING and f.name not in given]
    if needed:
        raise ValueError(f"step {kind!r} lacks {needed[0]!r}; write the steps with Pipeline.save")
    if kind == Quantize.kind and isinstance(given.get("bits"), Mapping):
        given.pop("rounding", None)  # see `Quantize.to_dict`
    return STEPS[kind](**given)


def _plain(value: Any) -> Any:
    """Tuples as lists and mappings as dicts, as JSON gives them back."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return value
