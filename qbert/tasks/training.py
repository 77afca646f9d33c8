"""Fine-tuning of an encoder on a task: the float model that is then measured, quantized and distilled.

    >>> tuned = fine_tune(load_task())          # the embedded MiniLM on the embedded corpus; cached
    >>> tuned.scores["accuracy"], tuned.from_cache

AdamW with linear warm-up and decay over batches of like length. Every run is cached under a key over weights, data,
settings and versions, so the same call a second time only loads.

Why not ``transformers.Trainer``: an interrupted run here continues at any step and ends in the very numbers of an
uninterrupted one, since data order and dropout are functions of (seed, epoch, step) and not of a random state that
has to be saved; the checkpoint is one safetensors file, written aside and renamed (the Trainer writes a folder in
place, with pickles); and any single device can be named. For several GPUs use the Trainer, then pass its folder on as
the model. Nor is it the `Distiller` without a teacher: that one is a Trainer, and it trains quantizers, of which tasks
know nothing, so they stand below it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from qbert.encoders.precision import HALF, single_precision
from qbert.files import (
    cache_folder,
    damaged_file,
    file_sha256,
    files_sha256,
    flush,
    flush_folder,
    own_name,
    read_json,
    remove_abandoned,
    write_json,
    writing,
)
from qbert.progress import progress_bar, write
from qbert.tasks.checkpoint import load_checkpoint, save_checkpoint
from qbert.tasks.embedded import embedded_encoder
from qbert.tasks.encoding import Prepared, prepare, resolve_max_length, training_order
from qbert.tasks.evaluation import evaluate
from qbert.tasks.heads import build_model, load_quietly, quiet_libraries
from qbert.tasks.task import Task
from qbert.version import __version__


@dataclass(frozen=True)
class TrainingSettings:
    """All that decides a fine-tuning run, apart from model and data.

    Attributes:
        epochs: passes over the training rows.
        learning_rate: peak rate of AdamW, reached after the warm-up, then down to 0 linearly.
        batch_size: examples a step.
        warmup: share of the steps with a rising rate.
        weight_decay: of matrices; biases and normalization weights are not decayed.
        clip: largest norm of the gradient.
        max_length: longest input in tokens; by task where None.
        train_limit: rows to train on, drawn by `seed`; all where None.
        seed: of new head, data order and dropout.
        bf16: matrix products in bfloat16 (autocast) on a CPU that computes it natively; CUDA devices that have it
            always use it.
    """

    epochs: int = 3
    learning_rate: float = 1e-4
    batch_size: int = 32
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    max_length: int | None = None
    train_limit: int | None = None
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        for name, lowest in (("epochs", 1), ("batch_size", 1), ("train_limit", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < lowest):
                raise ValueError(f"{name}={value!r} is not an integer of at least {lowest}")
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name}={value!r} is not a positive number")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup!r} is not a share of the steps from 0 to below 1")
        if not math.isfinite(self.weight_decay) or self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay!r} is not a number of at least 0")


# (epochs, batch size) for MiniLM; those of reviews were compared on its held-out rows, the others follow their sizes
_BY_TASK = {
    "reviews": (3, 16),
    "sst2": (3, 32),
    "mrpc": (5, 16),
    "cola": (5, 32),
    "stsb": (4, 16),
    "rte": (8, 16),
    "qnli": (3, 32),
    "mnli": (3, 32),
    "qqp": (3, 32),
    "ag_news": (2, 32),
    "wnut17": (6, 16),
    "wnut17_fine": (6, 16),
    "conll2003": (3, 16),
    "squad": (2, 16),
}
_NARROW = 512


def default_settings(task: Task, hidden_size: int, **changes: int | float | None) -> TrainingSettings:
    """The settings for a task and a width; `changes` that are None leave the default.

    Raises:
        TypeError: a change that is no setting.
        ValueError: an impossible value.
    """
    known = {item.name for item in fields(TrainingSettings)}
    for name in changes:
        if name not in known:
            raise TypeError(f"{name!r} is no training setting; the settings are {', '.join(sorted(known))}")
    epochs, batch_size = _BY_TASK.get(task.name, (3, 32))
    values: dict[str, int | float | None] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": 1e-4 if hidden_size <= _NARROW else 3e-5,
    }
    values.update({name: value for name, value in changes.items() if value is not None})
    return TrainingSettings(**values)  # type: ignore[arg-type]


# Of the cache, by kind of task; raised when the training below, or what it reads, changes.
_FORMAT = {"classification": 2, "regression": 2, "token": 3, "span": 3}
_SECONDS_BETWEEN_CHECKPOINTS = 60.0
_EPOCH_EVALUATION_ROWS = 1000


@dataclass
class FineTuned:
    """A model tuned on a task.

    Attributes:
        model: in eval mode, on the device it was trained on.
        tokenizer: its tokenizer.
        scores: official metrics on the held-out rows (0 to 100), loss and number of examples.
        path: folder that ``from_pretrained`` reads.
        settings: what it was trained with.
        seconds: training time, the original one for a model from the cache.
        from_cache: whether it was only loaded.
    """

    model: Any
    tokenizer: Any
    scores: dict[str, float]
    path: Path
    settings: TrainingSettings
    seconds: float
    from_cache: bool


def fine_tune(
    task: Task,
    model_name_or_path: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
    **settings: Any,
) -> FineTuned:
    """Tune an encoder on the training rows of `task`, or load the result of the same run from the cache.

    Args:
        task: from `load_task`.
        model_name_or_path: hub name or folder; the embedded MiniLM where None. What is trained, and comes back, has
            float32 weights whatever the checkpoint has: half precision loses most steps.
        device: where to train; on CUDA devices that have bfloat16 the forward pass uses it.
        cache_dir: instead of ``$QBERT_CACHE`` or the platform's cache folder.
        resume: continue an interrupted run of the same key at its last checkpoint (at most a minute old); False
            starts it anew.
        progress: bars on standard error with loss, remaining time and the held-out score after each epoch.
        settings: fields of `TrainingSettings`; what is not given (or None) comes by task and model width.

    Returns:
        `FineTuned`: the model in evaluation mode, its tokenizer, and its held-out scores.

    Raises:
        ValueError: impossible setting, damaged model or cache entry, a loss that is not finite (names the step).
        PermissionError: the cache folder cannot be written.
        FileNotFoundError: no such model.
        MissingPackageError: the task's metric needs a package that is not installed.
    """
    task.check_scorer()
    source = str(model_name_or_path or embedded_encoder())
    config = load_quietly(transformers.AutoConfig, source)
    chosen = default_settings(task, int(getattr(config, "hidden_size", 768)), **settings)
    device = torch.device(device)
    check_bf16(chosen.bf16, device)
    entry = cache_folder(cache_dir) / f"{task.name}-{_key(task, source, chosen, device)}"
    if (entry / "training.json").is_file():
        return _load_entry(entry, task, chosen, device)
    model, tokenizer = build_model(task, source, seed=chosen.seed)
    checkpoint = entry.with_name(entry.name + ".part.safetensors")
    if not resume:
        checkpoint.unlink(missing_ok=True)
    seconds = _train(single_precision(model).to(device), task, tokenizer, chosen, checkpoint, progress)
    result = evaluate(model, task, tokenizer, max_length=chosen.max_length, progress=progress)
    record = {
        "task": task.describe(),
        "model": source,
        "settings": asdict(chosen),
        "scores": dict(result),
        "seconds": round(seconds, 1),
        "versions": _versions(),
    }
    _save_entry(entry, model, tokenizer, record)
    checkpoint.unlink(missing_ok=True)
    return FineTuned(model, tokenizer, dict(result), entry, chosen, seconds, from_cache=False)


def check_bf16(wanted: bool, device: torch.device) -> None:
    """Refuse bfloat16 on a CPU that only emulates it: training there is four to sixteen times slower than in float32.

    Raises:
        ValueError: `wanted` on such a CPU.
    """
    if wanted and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ValueError("bf16=True is slower than float32 on this CPU, which only emulates it; leave it out")


def _versions() -> dict[str, str]:
    return {"qbert": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _key(task: Task, source: str, settings: TrainingSettings, device: torch.device) -> str:
    held_out = {split: task.fingerprint(split) for split in task.splits}
    half = getattr(load_quietly(transformers.AutoConfig, source), "dtype", None) in HALF
    return run_key(
        {
            "format": _FORMAT[task.kind],
            "model": weights_id(source),
            "data": held_out,
            "settings": asdict(settings),
            "device": device.type,
            "versions": _versions(),
            **({"weights": "float32"} if half else {}),  # earlier versions trained such checkpoints as they were
        }
    )


def _train(
    model: Any, task: Task, tokenizer: Any, settings: TrainingSettings, checkpoint: Path, progress: bool
) -> float:
    """Train in place; returns the seconds spent, those before an interruption included."""
    data = prepare(
        task,
        tokenizer,
        "train",
        max_length=resolve_max_length(task, tokenizer, settings.max_length),
        limit=settings.train_limit,
        seed=settings.seed,
    ).with_labels()
    if not len(data):
        raise ValueError(f"no word of the training rows of {task.name!r} has a tag; there is nothing to learn")
    steps_per_epoch = -(-len(data) // settings.batch_size)
    total = steps_per_epoch * settings.epochs
    optimizer = _optimizer(model, settings)
    done, before = load_checkpoint(checkpoint, model, optimizer)
    started = saved = time.monotonic()
    device = next(model.parameters()).device
    half = settings.bf16 or (device.type == "cuda" and torch.cuda.is_bf16_supported())
    bar = progress_bar(total=total, initial=done, desc=f"fine-tuning {task.name}", unit="step", disable=not progress)
    smooth: float | None = None
    whole = True  # False only while the optimizer is changing the weights
    model.train()
    try:
        with bar, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for step, epoch, batch in _steps(data, settings, done):
                torch.manual_seed((settings.seed << 32) + step)  # dropout of this step, whatever ran before it
                with torch.autocast(device.type, torch.bfloat16, enabled=half):
                    loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
                value = loss.item()
                if not math.isfinite(value):
                    raise ValueError(
                        f"the loss became {value} at step {step} of {total} on {task.name!r}; lower learning_rate "
                        f"({settings.learning_rate:g}) or check the model's weights"
                    )
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
                whole = False
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * _rate(step, total, settings.warmup)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                done, whole = step + 1, True
                smooth = value if smooth is None else 0.95 * smooth + 0.05 * value
                bar.set_postfix(epoch=f"{epoch + 1}/{settings.epochs}", loss=f"{smooth:.3f}", refresh=False)
                bar.update()
                now = time.monotonic()
                if done == total or now - saved > _SECONDS_BETWEEN_CHECKPOINTS:  # the final evaluation may be long
                    save_checkpoint(checkpoint, model, optimizer, done, before + now - started)
                    saved = now
                if progress and done % steps_per_epoch == 0 and done < total:
                    _report_epoch(model, task, tokenizer, settings, epoch)
    except KeyboardInterrupt:
        if whole and done:
            save_checkpoint(checkpoint, model, optimizer, done, before + time.monotonic() - started)
        raise
    model.eval()
    return before + time.monotonic() - started


def _steps(data: Prepared, settings: TrainingSettings, done: int) -> Iterator[tuple[int, int, dict[str, torch.Tensor]]]:
    """(step, epoch, batch) from step `done` on."""
    step = 0
    for epoch in range(settings.epochs):
        for chosen in training_order(data.lengths, settings.batch_size, settings.seed, epoch):
            if step >= done:
                yield step, epoch, data.collate([data[i] for i in chosen])
            step += 1


def _rate(step: int, total: int, warmup: float) -> float:
    """Share of the peak learning rate at a step: up to 1 over the warm-up, then down to 0 at `total`, linearly."""
    rising = int(warmup * total)
    return (step + 1) / rising if step < rising else (total - step) / max(total - rising, 1)


def _optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    # The plain loop over tensors takes five times as long on a CPU, a fifth of a whole step of a small encoder.
    fused = all(p.device.type in ("cpu", "cuda") for p in trained)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=fused)


def _report_epoch(model: nn.Module, task: Task, tokenizer: Any, settings: TrainingSettings, epoch: int) -> None:
    """Print the held-out score between epochs; at most 1,000 rows, so that it stays a small part of the time."""
    scores = evaluate(
        model,
        task,
        tokenizer,
        split="validation",
        max_length=settings.max_length,
        limit=_EPOCH_EVALUATION_ROWS,
        progress=False,
    )
    text = ", ".join(f"{name} {scores[name]:.1f}" for name in task.metric_names)
    write(f"epoch {epoch + 1}/{settings.epochs}: {text} on {int(scores['examples'])} held-out rows")


def _save_entry(entry: Path, model: Any, tokenizer: Any, record: dict[str, Any]) -> None:
    """Write the cache entry, unless another process has finished the same one meanwhile: theirs may be in use."""
    remove_abandoned(entry.parent, "", before=f"{entry.name}.")
    aside = entry.with_name(own_name(f"{entry.name}.", ""))
    damaged = entry.with_name(own_name(f"{entry.name}.", ""))
    try:
        with writing(entry):
            aside.mkdir()
            with quiet_libraries():
                model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            write_json(aside / "training.json", record | {"files": files_sha256(aside)})
            for file in aside.iterdir():
                flush(file)
            if entry.exists() and _damage(entry):
                os.replace(entry, damaged)
            if not entry.exists():
                os.replace(aside, entry)
                flush_folder(entry.parent)
    except OSError:
        if not entry.exists() or _damage(entry):  # else another process was faster
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(damaged, ignore_errors=True)


def _damage(entry: Path) -> str:
    """What is wrong with a cache entry, in words; empty if nothing is."""
    try:
        record = read_json(entry / "training.json")
        # Entries of earlier versions know the digest of their weights only.
        files = record["files"] if "files" in record else {"model.safetensors": record["sha256"]}
        broken = damaged_file(entry, files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"the cached model cannot be read ({error})"
    if broken is None:
        return ""
    what = "weights were" if broken.name == "model.safetensors" else f"{broken.name} was"
    return f"the cached {what} changed or damaged"


def _load_entry(entry: Path, task: Task, settings: TrainingSettings, device: torch.device) -> FineTuned:
    wrong = _damage(entry)
    if wrong:
        raise ValueError(f"{wrong}; delete the folder {entry} to train again")
    record = read_json(entry / "training.json")
    model, tokenizer = build_model(task, entry)
    return FineTuned(model.to(device), tokenizer, record["scores"], entry, settings, record["seconds"], from_cache=True)


_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer_config.json")


def weights_id(model_name_or_path: str | Path) -> str:
    """What identifies a model's weights and tokenizer: hashes of a folder's files, or a hub name with its commit."""
    folder = Path(model_name_or_path)
    if not folder.is_dir():
        from transformers import AutoConfig

        from qbert.tasks.heads import load_quietly

        commit = getattr(load_quietly(AutoConfig, str(model_name_or_path)), "_commit_hash", None)
        return f"{model_name_or_path}@{commit}"
    files = [file for pattern in (*_WEIGHTS, *_TOKENIZERS, "config.json") for file in sorted(folder.glob(pattern))]
    return run_key({file.name: file_sha256(file) for file in files})


def run_key(parts: Mapping[str, Any]) -> str:
    """24 hex digits over JSON-able parts, whatever their order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
