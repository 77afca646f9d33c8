"""Teacher, data and budget that all students of one table share; each training gives one row of it.

    bench = Bench(arguments, folder)
    row, student = bench.train("distilbert", plan, seed=0)

It stands alone so that `compress_plans` can say how a student is made from it, and `compress` when.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from other_domains import OtherDomain, other_domain
from torch import nn

from qbert import BitsConfig, model_size, optimize_for_inference, pack, quantize_model
from qbert.encoders.targets import base_model, main_layers
from qbert.files import read_json, write_json
from qbert.results import Record, first_difference
from qbert.students.depth import DepthTable, compare_depths
from qbert.students.vocabulary import word_table

if TYPE_CHECKING:
    from compress_plans import Phase, Plan
    from transformers import TrainingArguments

# (encoder, tables) in which every student is stored and scored, from the largest
FORMS = ((8, 8), (4, 4), (2, 4))
SHAPES = ((1, 16), (32, 64))  # (sequences, tokens)
_MARK = "asked.json"  # beside checkpoints: what they were asked for
_SEARCH_ROWS = 256
_CALIBRATION_ROWS = 384
_COPIES, _MOST_COPIES = 4, 12_000  # of each row, altered; of all rows together, since the teacher labels every copy
_HEAD_STEPS = 300
_PROBE_ROWS = 2000
_SEARCH_STEPS = 300  # of weights and choices together
# (encoder, tables) of models that are made smaller by bits alone, from the smallest
BITS_ALONE = ((2, 2), (2, 3), (2, 4), (3, 3), (3, 4), (4, 4), (4, 8), (8, 8))


class Rows(NamedTuple):
    """What a phase learns on: examples, and what makes a batch of them."""

    examples: Sequence[Any]
    collate: Callable[[list[Any]], Any]


class Bench:
    """What every student of one table shares.

    Args:
        arguments: the command line of ``compress.py``.
        folder: where checkpoints go.

    Attributes:
        task, teacher, tokenizer, rows: the task, the teacher tuned on it, and the training rows.
        reference: held-out result of the teacher.
        depth: layers of a shallow student.
        depths: choices of layers that were compared, by their number.
        student: what is trained now.
        record: where the table is kept; set once the teacher is known, on whom what is asked depends.
    """

    record: Record

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        from qbert.tasks import prepare
        from qbert.tasks.task import subset

        self.arguments, self.folder = arguments, folder
        task, teacher, tokenizer = load_teacher(arguments)
        self.task: Any = task
        self.teacher: Any = teacher
        self.tokenizer: Any = tokenizer
        self.depths: dict[int, DepthTable] = {}
        self.student: Any = None
        self.depth = arguments.layers or max(self._teacher_depth() // 2, 1)
        data = prepare(self.task, self.tokenizer, "train")
        self.rows = Rows(list(subset(data.examples, arguments.train_limit, arguments.seed)), data.collate)
        self.reference = self.evaluate(self.teacher)
        print(f"teacher's {self.task.primary_metric}: {self.reference.primary:.2f}")

    # ---- what plans are made of ----

    @functools.cached_property
    def pretrained(self) -> nn.Module:
        """The encoder that the teacher was tuned from, with a head that knows nothing."""
        from qbert.tasks import build_model

        if self.arguments.no_fine_tune:
            raise ValueError("a general stage needs the encoder before it was fine-tuned; leave --no-fine-tune out")
        return build_model(self.task, self.arguments.model)[0].to(self.arguments.device)  # type: ignore[no-any-return]

    def layers(self, count: int | None = None) -> list[int]:
        """The layers that a shallow student keeps: `count`, or those asked for; chosen once by measurement."""
        if count is None and self.arguments.keep:
            return list(self.arguments.keep)
        count = count or self.depth
        if count == self._teacher_depth():
            return list(range(count))
        return list(self.choices(count).best.layers)

    def choices(self, count: int) -> DepthTable:
        """Every way of keeping `count` layers; with sandwiches for the depth of shallow students."""
        if count not in self.depths:
            few = self.unlabelled(_SEARCH_ROWS)
            table = compare_depths(self.teacher, few, count, sandwiches=count == self.depth, progress=True)
            self.depths[count] = table
            self.record.content["depths"][str(count)] = table.to_list()
            if table.ways is not None:
                self.record.content.setdefault("depths searched", {})[str(count)] = table.ways
            self.record.save()
            print(f"\n{count} of {self._teacher_depth()} layers, before any training\n{table}\n", flush=True)
        return self.depths[count]

    @property
    def most_layers(self) -> int:
        """Layers of a student that is narrower too: TinyBERT's four of six, or as many as were asked for."""
        return self.arguments.layers or max(round(self._teacher_depth() * 2 / 3), 1)

    @property
    def width(self) -> int:
        """Width of a narrower student: TinyBERT's 312 for 384, the like for others."""
        config = self.teacher.config
        heads = config.num_attention_heads
        return max(round(config.hidden_size * 312 / 384 / heads), 1) * heads

    @property
    def table_width(self) -> int:
        """Width of a narrower word table: a quarter of the model's, as 96 for 384."""
        return max(round(self.teacher.config.hidden_size / 16), 1) * 4

    @property
    def has_pairs(self) -> bool:
        """Whether rows are pairs of texts."""
        return len(self.task.text_fields) > 1

    @property
    def word_size(self) -> int:
        """Dimensions of the word vectors of networks that are no transformers."""
        return min(300, word_table(self.teacher).embedding_dim)

    def unlabelled(self, count: int = _CALIBRATION_ROWS) -> list[dict[str, Any]]:
        """Batches of training rows spread over all of them, without labels."""
        examples = self.rows.examples
        chosen = [examples[i] for i in range(0, len(examples), max(len(examples) // count, 1))][:count]
        batches = [self.rows.collate(chosen[at : at + 32]) for at in range(0, len(chosen), 32)]
        return [{k: v for k, v in b.items() if "label" not in k and "positions" not in k} for b in batches]

    @functools.cached_property
    def texts(self) -> list[str]:
        """Unlabelled text: the files that were given, or the task's own training texts."""
        from qbert.tasks.task import subset

        if self.arguments.text:
            return [line for file in self.arguments.text for line in lines_of(Path(file))]
        rows = subset(self.task.rows("train"), self.arguments.train_limit, self.arguments.seed)
        found = [row[name] for row in rows for name in self.task.text_fields]
        return [" ".join(text) if isinstance(text, list) else text for text in found]

    @functools.cached_property
    def text_rows(self) -> Rows:
        """Unlabelled text for a general stage."""
        from transformers import DataCollatorWithPadding

        from qbert.tasks.masking import text_rows

        return Rows(text_rows(self.texts, self.tokenizer), DataCollatorWithPadding(self.tokenizer))

    @functools.cached_property
    def masked_rows(self) -> Rows:
        """The same with words masked, others every time."""
        from qbert.tasks.masking import MaskWords

        examples = self.text_rows.examples
        return Rows(examples, MaskWords(self.tokenizer, examples))

    @functools.cached_property
    def language_model(self) -> nn.Module:
        """The pre-trained encoder with a head over the vocabulary, which is trained here."""
        from qbert.tasks.masking import language_model

        return language_model(base_model(self.pretrained)[1], self._word_head())  # type: ignore[no-any-return]

    def _word_head(self) -> Any:
        from qbert.tasks.candidates import train_masked_words

        encoder = base_model(self.pretrained)[1]
        cache = self.folder / "masked-words"
        return train_masked_words(encoder, self.tokenizer, self.texts, steps=_HEAD_STEPS, cache=cache)

    @functools.cache  # noqa: B019
    def altered(self, likely: bool) -> Rows:
        """The task's rows and altered copies of them; of words and spans, the rows alone."""
        from qbert.tasks import prepare
        from qbert.tasks.augment import Lexical, augmented
        from qbert.tasks.candidates import LikelyWords

        if self.task.kind not in ("classification", "regression"):
            return self.rows
        method: Any = Lexical(self.tokenizer.mask_token)
        if likely:
            method = LikelyWords(self._word_head(), self.tokenizer)
        task = self.task.subset(train=self.arguments.train_limit, seed=self.arguments.seed)
        longer = augmented(task, method, copies=_COPIES, limit=_MOST_COPIES, cache=self.folder / "altered")
        print(longer)
        data = prepare(longer.task, self.tokenizer, "train")
        return Rows(data.examples, data.collate)

    @functools.cached_property
    def probed(self) -> Any:
        """The teacher with a probe on every layer, trained on some of the rows."""
        from qbert.distill.probes import probe_layers

        examples = self.rows.examples
        chosen = [examples[i] for i in range(0, len(examples), max(len(examples) // _PROBE_ROWS, 1))]
        probed = probe_layers(self.teacher, chosen, collate=self.rows.collate)
        print("probes of the teacher's layers, loss: " + ", ".join(f"{loss:.3f}" for loss in probed.losses), flush=True)
        return probed

    @functools.cache  # noqa: B019
    def searched(self, seed: int) -> tuple[Any, int]:
        """(cell, layers) that a search for this task comes to, taken up again where it was interrupted."""
        from qbert import students
        from qbert.distill import recipes
        from qbert.distill.checkpoint import last_good_checkpoint
        from qbert.distill.search import Search
        from qbert.students.cells import Cell

        arguments, folder = self.arguments, self.folder / f"search-{seed}"
        done = folder / "cell.json"
        self._take_over(folder)
        if arguments.resume and done.is_file():
            found = read_json(done)
            return Cell.parse(found["cell"]), int(found["depth"])
        most = max(self._teacher_depth() * 2 // 3, 1)
        space = students.adabert_space(self.teacher, depth=most, width=self.table_width, seed=seed, **self.word_table)
        search = Search(
            self.probed,
            space.to(arguments.device),
            recipes.adabert_search(self.probed.losses, depth=most),
            self._training(folder, _SEARCH_STEPS, 2e-3, seed, save_steps=100),
            self.rows.examples,
            data_collator=self.rows.collate,
            processing_class=self.tokenizer,
            check_teacher=False,
        )
        checkpoint = last_good_checkpoint(folder) if arguments.resume else None
        print(f"  search: {_SEARCH_STEPS} steps{f', from {checkpoint}' if checkpoint else ''}", flush=True)
        search.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        cell, depth = space.derive()
        shutil.rmtree(folder)
        self._mark(folder)
        write_json(done, {"cell": cell.to_list(), "depth": depth})
        print(f"  searched: {depth} layers of {cell}", flush=True)
        return cell, depth

    @property
    def word_table(self) -> dict[str, Any]:
        """What networks that are no transformers are told of words and rows."""
        return {"pairs": self.has_pairs, "tokenizer": self.tokenizer, "dimensions": self.word_size}

    @property
    def steps(self) -> int:
        """Steps of every student, all phases together."""
        return max(round(self.arguments.epochs * len(self.rows.examples) / self.arguments.batch_size), 1)

    # ---- training ----

    def train(self, name: str, plan: Plan, seed: int) -> tuple[dict[str, Any], nn.Module]:
        """(row, student) of one plan, taken up again where it was interrupted if --resume was given."""
        print(f"\n{plan.title}, seed {seed}", flush=True)
        start = time.monotonic()
        self._take_over(self.trained_in(name, seed))
        student = plan.build(self, seed).to(self.arguments.device)
        self.student = student
        whole = sum(phase.share for phase in plan.phases)
        for phase in plan.phases:
            steps = max(round(self.steps * plan.patience * phase.share / whole), 1)
            self._run_phase(self.trained_in(name, seed) / phase.name, plan, phase, student, steps, seed)
        row = self.row(student, time.monotonic() - start)
        return row, student

    def _run_phase(self, folder: Path, plan: Plan, phase: Phase, student: nn.Module, steps: int, seed: int) -> None:
        from qbert.distill import Distiller, TeacherOutputs
        from qbert.distill.checkpoint import last_good_checkpoint, load_weights, save_weights

        arguments = self.arguments
        done = folder / "student.safetensors"
        if arguments.resume and done.is_file():
            load_weights(student, done)
            return
        recipe = phase.recipe(self)
        rows = phase.rows(self)
        rate = (arguments.learning_rate or plan.rate) * phase.rate
        settings = self._training(
            folder,
            steps,
            rate,
            seed,
            weight_decay=0.01,
            train_sampling_strategy="group_by_length",
            save_steps=200,
            optim=recipe.arguments.get("optim", "adamw_torch"),
        )
        outputs = None
        if phase.keep_outputs and recipe.stages[0].takes_kept_outputs:
            kept = self.folder / "teacher-outputs"
            outputs = TeacherOutputs.of(self.teacher, rows.examples, kept, collate=rows.collate)
        distiller = Distiller(
            teacher_outputs=outputs,
            teacher=phase.teacher(self),
            student=phase.inside(self, student),
            recipe=recipe,
            args=settings,
            train_dataset=rows.examples,
            data_collator=rows.collate,
            processing_class=self.tokenizer,
            check_teacher=False,
        )
        checkpoint = last_good_checkpoint(folder) if arguments.resume else None
        print(f"  {phase.name}: {steps} steps{f', from {checkpoint}' if checkpoint else ''}", flush=True)
        distiller.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        save_weights(student, done)

    def _training(self, folder: Path, steps: int, rate: float, seed: int, **more: Any) -> TrainingArguments:
        from transformers import TrainingArguments

        arguments = self.arguments
        return TrainingArguments(
            str(folder),
            per_device_train_batch_size=arguments.batch_size,
            max_steps=steps,
            learning_rate=rate,
            warmup_steps=0.1,
            logging_steps=20,
            save_total_limit=1,
            seed=seed,
            use_cpu=arguments.device == "cpu",
            bf16=arguments.bf16,
            report_to="none",
            **more,
        )

    def trained_in(self, name: str, seed: int) -> Path:
        """Folder of the curves and checkpoints of one student."""
        return self.folder / f"{name.replace('/', '-').replace(' ', '-')}-{seed}"

    def _take_over(self, folder: Path) -> None:
        """Empty the folder of a training; under --resume keep what is in it, if it was made as this run is asked to.

        Raises:
            ValueError: --resume, and what is there was made with other settings, or does not say with which.
        """
        if not self.arguments.resume:
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.is_dir() and any(folder.iterdir()):
            mark, asked = folder / _MARK, self.record.content["asked"]
            if not mark.is_file():
                raise ValueError(f"--resume: {folder} does not say its settings; remove it, or leave --resume out")
            other = first_difference(read_json(mark), asked)
            if other is not None:
                raise ValueError(f"--resume: {folder} was made with another {other}; remove it, or leave --resume out")
        self._mark(folder)

    def _mark(self, folder: Path) -> None:
        """Write beside checkpoints what they were asked for."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _MARK, self.record.content["asked"])

    def drop_checkpoints(self, name: str, seed: int) -> None:
        """Delete the weights of a training whose row is kept."""
        shutil.rmtree(self.trained_in(name, seed), ignore_errors=True)

    # ---- measuring ----

    def row(self, student: nn.Module, seconds: float) -> dict[str, Any]:
        """Score, likeness to the teacher, score in another domain, and time of one student."""
        return {**self.quality(student), "other domain": self.evaluate_elsewhere(student), "minutes": seconds / 60}

    def quality(self, model: nn.Module) -> dict[str, Any]:
        """Held-out score, percent of the teacher's, and likeness to the teacher's outputs."""
        from qbert.tasks.evaluation import fidelity

        result = self.evaluate(model)
        kind = getattr(getattr(self.teacher, "config", None), "problem_type", None)
        likeness = fidelity(self.reference.logits, result.logits, kind)
        return {
            "score": result.primary,
            "retention": 100 * result.primary / self.reference.primary if self.reference.primary else 0.0,
            "agreement": likeness.agreement,
            "divergence": likeness.divergence,
        }

    def stored(self, student: nn.Module) -> dict[str, dict[str, Any]]:
        """Quality and bytes of a student in each of `FORMS`, rounded after training, by `form_name`."""
        found = {}
        for bits, tables in FORMS:
            packed = pack(self.quantized(student, bits, tables))
            found[form_name(bits, tables)] = {**self.quality(packed), "bytes": model_size(packed).total}
        return found

    def evaluate(self, model: nn.Module) -> Any:
        """Held-out score of a model."""
        from qbert.tasks import evaluate

        split, limit = self.task.evaluation_splits[0], self.arguments.eval_limit
        return evaluate(model, self.task, self.tokenizer, split=split, limit=limit)

    @functools.cached_property
    def elsewhere(self) -> OtherDomain | None:
        """Another task with the same labels, whose texts are of another kind; None where there is none at hand."""
        arguments = self.arguments
        return other_domain(self.task, self.tokenizer, data_dir=arguments.data_dir, limit=arguments.eval_limit)

    def evaluate_elsewhere(self, model: nn.Module) -> float | None:
        """Score on the other domain's held-out rows; None where there is none."""
        return None if self.elsewhere is None else self.elsewhere.evaluate(model).primary

    def quantized(self, model: nn.Module, bits: int, embedding_bits: int) -> nn.Module:
        """`model` at these bits, below 8 rounded for its own inputs on training rows; no training follows."""
        if bits == 8:
            return quantize_model(model, BitsConfig(8, embedding_bits=embedding_bits))
        matrices = {"bits": bits, "rounding": "compensated", "scheme": "midrise" if bits == 2 else "asymmetric"}
        config = BitsConfig({"*": matrices}, embedding_bits=embedding_bits)
        return quantize_model(model, config, calibration_data=self.unlabelled(), progress=True)

    def shape(self, student: nn.Module) -> dict[str, Any]:
        """What depends on the shape alone: parameters, bytes, milliseconds."""
        return {
            "parameters": sum(p.numel() for p in student.parameters()),
            "float bytes": model_size(student).total,
            **self.speed(student, pack(self.quantized(student, 8, 8))),
        }

    def speed(self, student: nn.Module, packed: nn.Module) -> dict[str, Any]:
        """CPU milliseconds of a forward pass on one core by shape: in float, and fused where a layer can be."""
        fast = optimize_for_inference(packed)
        models = {"ms": student, "fused ms": fast} if is_fused(fast) else {"ms": student}
        with one_thread():
            words = len(self.tokenizer)
            times = {shape: milliseconds(list(models.values()), *shape, words) for shape in SHAPES}
        return {
            f"{kind} {batch}x{length}": found[i]
            for i, kind in enumerate(models)
            for (batch, length), found in times.items()
        }

    def bits_alone(self, limit: float) -> tuple[int, int]:
        """(encoder bits, table bits) of the largest version of the teacher within `limit` bytes, or the smallest."""
        sizes = {b: model_size(self.teacher, BitsConfig(b[0], embedding_bits=b[1])).total for b in BITS_ALONE}
        within = [b for b in BITS_ALONE if sizes[b] <= limit]
        return max(within, key=lambda b: sizes[b]) if within else min(BITS_ALONE, key=lambda b: sizes[b])

    # ---- helpers ----

    def _teacher_depth(self) -> int:
        return len(main_layers(self.teacher)[1])


def load_teacher(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(task, model, tokenizer) of the command line: fine-tuned here, from the cache, or the given one as it is."""
    from qbert.tasks import build_model, fine_tune, load_task

    task = load_task(arguments.task, data_dir=arguments.data_dir)
    print(f"task: {task.describe()}")
    if arguments.no_fine_tune:
        print(f"teacher: {arguments.model}, as it is")
        model, tokenizer = build_model(task, arguments.model, tuned=True)
        return task, model.to(arguments.device), tokenizer
    tuned = fine_tune(
        task,
        arguments.model,
        device=arguments.device,
        epochs=arguments.teacher_epochs,
        train_limit=arguments.train_limit,
        seed=arguments.seed,
    )
    print(f"teacher: {'from the cache' if tuned.from_cache else f'tuned in {tuned.seconds:.0f} s'}")
    return task, tuned.model, tuned.tokenizer


def form_name(bits: int, tables: int) -> str:
    """What a table calls an encoder of `bits` with tables of `tables`."""
    return f"W{bits} E{tables}"


def lines_of(file: Path) -> list[str]:
    """The lines of a text file, plain or gzipped."""
    raw = file.read_bytes()
    return (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8").splitlines()


def is_fused(model: nn.Module) -> bool:
    """Whether `optimize_for_inference` found an encoder to run in its own way."""
    from qbert.inference.cpu import FusedEncoder

    return any(isinstance(vars(module).get("forward"), FusedEncoder) for module in model.modules())


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def milliseconds(models: Sequence[nn.Module], batch: int, length: int, words: int) -> list[float]:
    """CPU time of a forward pass of each model on [batch, length] of `words` tokens, the models taking turns.

    CPU time and the least of several passes, since a busy machine makes wall time longer and neither shorter.
    """
    ids = torch.randint(words, (batch, length), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    repeats = 30 if batch * length < 256 else 4
    best = [float("inf")] * len(models)
    for attempt in range(repeats + 2):
        for i, model in enumerate(models):
            begin = time.process_time()
            model(**inputs)
            if attempt > 1:  # the first calls compile
                best[i] = min(best[i], 1000 * (time.process_time() - begin))
    return best
