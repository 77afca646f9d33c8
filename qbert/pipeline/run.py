"""A pipeline of compression steps as data, run with a checkpoint, a score, a size and a time after every step.

    >>> plan = Pipeline((Depth(3), Distill("minilm", steps=200), Quantize(2), Distill("qbert_kd", steps=100), Pack()))
    >>> packed = qbert.compress(model, tokenizer, task, plan, folder="out")
    >>> print(packed.record)

Interrupted, by Ctrl-C or kill -9, the same call goes on after the last whole step (inside of a distillation: after its
last checkpoint). Structure and distillation in float come first, compensated rounding is the start of what is trained
in few bits: the order that was found best by Kurtic et al. 2022 (oBERT) and Zafrir et al. 2021 (Prune OFA).
"""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qbert.bits import as_first_format
from qbert.files import content_sha256, read_json, write_json
from qbert.pipeline.steps import Context, Distill, Factorize, Pack, Prune, Quantize, Step, Structure, step_from_dict
from qbert.results import Record, text_table
from qbert.saving.records import is_quantized
from qbert.sizes import model_size
from qbert.tasks import evaluate, prepare
from qbert.tasks.evaluation import fidelity, wants_pairs
from qbert.tasks.heads import SentenceRegression
from qbert.tasks.task import Task

FORMAT = "qbert.pipeline/2"
_FIRST_FORMAT = "qbert.pipeline/1"  # whose configurations are of format 1, see `qbert.bits`


@dataclass(frozen=True)
class Pipeline:
    """Steps in the order in which they are made.

    Raises:
        ValueError: no step, a step after `Pack`, structure that is changed after it was quantized, or quantizing twice.
        TypeError: something that is no step.
    """

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        if not self.steps:
            raise ValueError("steps is empty; give at least one, such as Quantize(4)")
        quantized = packed = False
        for step in self.steps:
            if not isinstance(step, Step):
                raise TypeError(f"steps: {step!r} is no step; use those of qbert.pipeline")
            if packed:
                raise ValueError(f"{step!r} comes after Pack(), which is the last step there can be")
            if quantized and isinstance(step, (Structure, Quantize)):
                raise ValueError(f"{step!r} comes after Quantize; change the structure first, and quantize once")
            if isinstance(step, Pack) and not quantized:
                raise ValueError("Pack() comes without a Quantize before it; there is nothing to pack")
            quantized, packed = quantized or isinstance(step, Quantize), isinstance(step, Pack)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, read back by `from_dict`."""
        return {"format": FORMAT, "steps": [step.to_dict() for step in self.steps]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Pipeline:
        """The pipeline that `to_dict` described.

        Raises:
            ValueError: another format, an unknown step or field, or a step that lacks one.
        """
        content = values if isinstance(values, Mapping) else {}
        written, steps = content.get("format"), content.get("steps")
        listed = isinstance(steps, Sequence) and all(isinstance(step, Mapping) for step in steps)
        if written not in (FORMAT, _FIRST_FORMAT) or not listed:
            raise ValueError(f"the values are no pipeline ({FORMAT}); write one with Pipeline.to_dict or .save")
        told = [_as_first_format(step) if written == _FIRST_FORMAT else step for step in content["steps"]]
        return cls(tuple(step_from_dict(step) for step in told))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, aside first and then renamed."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Pipeline:
        """Read what `save` wrote. Raises ValueError for a damaged or other file."""
        return cls.from_dict(read_json(path))

    def __str__(self) -> str:
        return " -> ".join(short(step) for step in self.steps)


def _as_first_format(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step as format 1 meant it, in the words of this one."""
    if step.get("step") != Quantize.kind or isinstance(step.get("bits"), Mapping):
        return dict(step)
    given = {name: step[name] for name in ("embedding_bits",) if name in step}
    said = as_first_format({**given, **step.get("settings", {})})
    return {**step, "embedding_bits": said.pop("embedding_bits"), "settings": said}


@dataclass(frozen=True)
class StepResult:
    """What a step led to.

    Attributes:
        step: in words.
        score: the task's primary metric on held-out rows, 0 to 100.
        retention: in percent of the float model's.
        agreement: percent of held-out rows with the float model's answer.
        divergence: mean KL(float || model) in nats; of values the mean squared difference.
        megabytes: bytes of everything stored, 10^6.
        seconds: what the step took.
    """

    step: str
    score: float
    retention: float
    agreement: float
    divergence: float
    megabytes: float
    seconds: float


@dataclass(frozen=True)
class CompressionRecord:
    """The float model's row and that of each step; print it for a table."""

    metric: str
    results: tuple[StepResult, ...]

    def __str__(self) -> str:
        header = ["step", self.metric, "of float", "same answer", "divergence", "MB", "seconds"]
        rows = [
            [r.step, f"{r.score:.2f}", f"{r.retention:.1f} %", f"{r.agreement:.1f} %", f"{r.divergence:.4f}",
             f"{r.megabytes:.2f}", f"{r.seconds:.0f}"]
            for r in self.results
        ]  # fmt: skip
        return text_table(header, rows)


@dataclass(frozen=True)
class Compressed:
    """What `compress` returns.

    Attributes:
        model: after the last step, in evaluation mode.
        record: scores, sizes and times.
        folder: the last step's folder: the model as `save_pretrained` wrote it, and its tokenizer.
    """

    model: nn.Module
    record: CompressionRecord
    folder: Path


def compress(
    model: Any,
    tokenizer: Any,
    data: Task,
    plan: Pipeline | Iterable[Step],
    *,
    folder: str | os.PathLike[str],
    train_limit: int | None = None,
    eval_limit: int | None = None,
    seed: int = 0,
    bf16: bool = False,
    progress: bool = True,
) -> Compressed:
    """Run a pipeline: every step's model is kept in `folder` until the next one is whole, and scored on held-out rows.

    Called again with the same arguments it goes on where it was interrupted, and returns at once if it was finished.

    Args:
        model: a fine-tuned transformers model in float, or a `SentenceRegression` around one, whose encoder is what is
            saved then; it is left alone.
        tokenizer: its tokenizer.
        data: the task; steps read its training rows, scores its held-out rows.
        plan: the steps.
        folder: for checkpoints, the record and the result.
        train_limit: use at most this many training rows, drawn by `seed`.
        eval_limit: score on at most this many held-out rows, the same ones for every `seed`.
        seed: of data order, dropout and draws.
        bf16: train in bfloat16.
        progress: show bars, and each step's row when it is there.

    Returns:
        `Compressed`: the packed model (or what the last step leaves), its folder, and the record of every step.

    Raises:
        ValueError: a model that is quantized already, an impossible step (the sentence names it), or a `folder` with
            the run of another plan, model or data.
        TypeError: a model that transformers cannot save, or data of another type.
    """
    plan = plan if isinstance(plan, Pipeline) else Pipeline(tuple(plan))
    if not isinstance(_saved(model), PreTrainedModel):
        raise TypeError(
            f"model: expected a transformers model, which can be saved after each step, got {type(model).__name__}"
        )
    if is_quantized(model):
        raise ValueError("model is quantized already; give the float model, which is also the teacher")
    if not isinstance(data, Task):
        raise TypeError(
            f"data: expected a task such as load_task('sst2') or your own folder, got {type(data).__name__}"
        )
    foresee(plan, model)
    run = _Run(model, tokenizer, data, plan, Path(folder), train_limit, eval_limit, seed, bf16, progress)
    return run.result()


class _Run:
    """One pipeline on one model: what is done, what is next."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: Task,
        plan: Pipeline,
        folder: Path,
        train_limit: int | None,
        eval_limit: int | None,
        seed: int,
        bf16: bool,
        progress: bool,
    ) -> None:
        self.teacher, self.tokenizer, self.task, self.plan, self.folder = model.eval(), tokenizer, task, plan, folder
        self.eval_limit, self.seed, self.bf16, self.progress = eval_limit, seed, bf16, progress
        self.rows = prepare(task, tokenizer, "train", limit=train_limit, seed=seed, as_pairs=wants_pairs(model))
        asked = {
            "plan": plan.to_dict(),
            "model": _digest(model),
            "data": task.fingerprint("train"),
            "training rows": train_limit,
            "held-out rows": eval_limit,
            "seed": seed,
            "bfloat16": bf16,
        }
        self.record = Record(folder / "pipeline.json", asked, resume=True)
        self.reference = self._evaluate(model)

    def result(self) -> Compressed:
        """Make the steps that are left."""
        if "0" not in self.record:
            self._keep(0, "float", self.teacher, self.reference, 0.0)
        done = max(int(key) for key in self.record)
        model = self._load(done) if done else self.teacher
        for index, step in enumerate(self.plan.steps[done:], done + 1):
            model = self._make(index, step, model)
        rows = tuple(StepResult(**self.record[str(index)][0]) for index in range(len(self.plan.steps) + 1))
        return Compressed(model, CompressionRecord(self.task.primary_metric, rows), self._place(len(self.plan.steps)))

    def _make(self, index: int, step: Step, model: nn.Module) -> nn.Module:
        start = time.monotonic()
        work = self.folder / f"working-{index}"
        work.mkdir(parents=True, exist_ok=True)
        context = Context(
            self.teacher, self.tokenizer, self.rows, self.rows.collate, work, self.seed, self.bf16, self.progress
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            made = step.apply(model, context).eval()
        seconds = time.monotonic() - start
        aside = self.folder / f"aside-{index}"
        shutil.rmtree(aside, ignore_errors=True)
        made.save_pretrained(aside)  # type: ignore[operator]
        self.tokenizer.save_pretrained(aside)
        shutil.rmtree(self._place(index), ignore_errors=True)
        aside.rename(self._place(index))
        self._keep(index, short(step), made, self._evaluate(made), seconds)
        shutil.rmtree(work, ignore_errors=True)
        if index > 1:
            shutil.rmtree(self._place(index - 1), ignore_errors=True)
        return made

    def _keep(self, index: int, name: str, model: nn.Module, scores: Any, seconds: float) -> None:
        reference = self.reference
        likeness = fidelity(reference.logits, scores.logits, getattr(self.teacher.config, "problem_type", None))
        retention = 100 * scores.primary / reference.primary if reference.primary else 0.0
        row = {
            "step": name,
            "score": scores.primary,
            "retention": retention,
            "agreement": likeness.agreement,
            "divergence": likeness.divergence,
            "megabytes": model_size(model).mb,
            "seconds": seconds,
        }
        self.record.add(str(index), row)
        if self.progress:
            print(f"{name}: {scores.primary:.2f}, {retention:.1f} % of float, {row['megabytes']:.2f} MB", flush=True)

    def _load(self, index: int) -> nn.Module:
        place = self._place(index)
        if not place.is_dir():
            raise ValueError(
                f"folder: {place}, where the last finished step lay, is gone; remove {self.folder}, or name another"
            )
        loaded = type(_saved(self.teacher)).from_pretrained(place).eval()
        loaded = loaded.to(next(self.teacher.parameters()).device)
        return self.teacher.around(loaded) if wants_pairs(self.teacher) else loaded  # type: ignore[no-any-return]

    def _place(self, index: int) -> Path:
        return self.folder / f"step-{index}"

    def _evaluate(self, model: nn.Module) -> Any:
        split = self.task.evaluation_splits[0]
        return evaluate(model, self.task, self.tokenizer, split=split, limit=self.eval_limit, progress=self.progress)


def foresee(plan: Pipeline, model: nn.Module) -> None:
    """Refuse steps that do not suit `model`, or what the steps before make of it, as far as structure tells.

    Raises:
        ValueError: naming the step.
    """
    # Nothing is copied but what stands around the values.
    memo: dict[int, Any] = {
        id(t): nn.Parameter(t.to("meta"), t.requires_grad) if isinstance(t, nn.Parameter) else t.to("meta")
        for t in (*model.parameters(), *model.buffers())
    }
    shell: nn.Module | None = copy.deepcopy(model, memo)
    for number, step in enumerate(plan.steps, 1):
        assert shell is not None
        try:
            shell = step.foresee(shell)
        except ValueError as error:
            raise ValueError(f"step {number}, {short(step)}: {error}") from error
        if shell is None:
            return


def _saved(model: Any) -> Any:
    """What is written of a model: of one that compares sentences, its encoder."""
    return model.backbone if isinstance(model, SentenceRegression) else model


def _digest(model: nn.Module) -> str:
    """SHA-256 of all parameters' names, shapes and sums: another training gives another one."""
    sums = {name: [list(p.shape), float(p.detach().double().sum())] for name, p in model.named_parameters()}
    return content_sha256({name: [shape, f"{total:.6g}"] for name, (shape, total) in sums.items()})


def short(step: Step) -> str:
    """A step in few words."""
    if isinstance(step, Distill):
        return f"distill ({step.recipe}, {step.steps} steps)"
    if isinstance(step, Quantize):
        widths = step.bits if not isinstance(step.bits, Mapping) else "mixed"
        return f"quantize ({widths} bits, tables {step.config().embedding_bits})"
    if isinstance(step, Prune):
        where = "" if isinstance(step.names, str) else f" in {len(step.names)} matrices"
        named = {"heads": step.heads, "ffn": step.ffn, "zeros": step.pattern and f"{step.pattern}{where}"}
        return "prune (" + ", ".join(f"{name} {value}" for name, value in named.items() if value) + ")"
    if isinstance(step, Factorize):
        which = f"{len(step.rank)} matrices" if isinstance(step.rank, Mapping) else f"rank {step.rank}"
        return f"factorize ({which})"
    content = {k: v for k, v in step.to_dict().items() if k not in ("step", "rows") and v is not None}
    return step.kind + (f" ({', '.join(str(v) for v in content.values())})" if content else "")
