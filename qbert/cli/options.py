"""Options that several commands of ``qbert`` share, and what they mean: models, tasks, texts, printing."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "spm.model"),
    *("sentencepiece.model", "sentencepiece.bpe.model", "tokenizer.model", "bpe.codes", "bpe.vocab", "dict.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
)
_PICTURES = (".png", ".pdf", ".svg")
_NO_SETTINGS = ("as_json", "force")
_SENTENCE_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")


@dataclass
class Shared:
    """What a command and the one place that runs all of them tell each other.

    Attributes:
        line: the whole command line.
        hint: how to go on after an interrupt.
    """

    line: str = ""
    hint: str = "nothing is kept; run the same command again, from the beginning"


def on_interrupt(hint: str) -> None:
    """What Ctrl-C is answered with from now on, instead of that nothing is kept."""
    context = click.get_current_context().find_root()
    if isinstance(context.obj, Shared):
        context.obj.hint = hint


@contextlib.contextmanager
def resumable(work: Path, asked: Mapping[str, Any], result: str = "OUT") -> Iterator[None]:
    """Inside, long work keeps in the folder `work` what the same command goes on from; done, the folder is removed.

    Args:
        work: made if need be; what was asked is noted in it.
        asked: all that the work depends on, as JSON values.
        result: what the work is for, beside which the folder lies.

    Raises:
        ValueError: the folder is of a run that was asked something else, or of no run at all.
    """
    from qbert.files import read_json, write_json
    from qbert.results import first_difference

    note = work / "asked.json"
    if note.is_file():
        found = read_json(note)
        if not isinstance(found, dict):
            raise ValueError(f"{note} is of no interrupted run; remove {work}, or name another OUT")
        before = {"command": "distill", **found}  # which alone kept something in earlier versions
        name = first_difference(before, json.loads(json.dumps(asked)))
        if name is not None:
            said = {"config_file": "--config", "plan_file": "--plan"}.get(name, name)
            raise ValueError(
                f"{work} is of an interrupted run with another {said}; remove it, or name another {result}"
            )
    elif work.exists() and (not work.is_dir() or any(work.iterdir())):
        raise ValueError(f"{work}, where the work is kept, is there and of no interrupted run; name another {result}")
    work.mkdir(parents=True, exist_ok=True)
    write_json(note, asked)
    goes_on_from(work)
    try:
        yield
    except (ValueError, TypeError):
        if [path.name for path in work.iterdir()] == [note.name]:  # refused before any work
            shutil.rmtree(work)
        raise
    shutil.rmtree(work)


def made_by() -> str:
    """The command line that is run, the machine and the versions, for a page of results."""
    from qbert.results import provenance

    context = click.get_current_context()
    shared = context.find_root().obj
    return provenance(shared.line if isinstance(shared, Shared) else context.command_path)


def keep_record(path: str | os.PathLike[str], settings: Mapping[str, Any], rows: list[Any], **more: Any) -> None:
    """Write what this command was asked and found for ``qbert report`` (`qbert.results.write_command`).

    Args:
        path: a JSON file, or the folder of a model.
        settings: what was asked, names of options; what was left open is left out.
        rows, **more: as `qbert.results.write_command`.
    """
    from qbert.results import COMMAND_FILE, write_command

    rows = [{key: None if _is_endless(value) else value for key, value in row.items()} for row in rows]
    file = Path(path) / COMMAND_FILE if Path(path).is_dir() else path
    said = {name: v for name, v in settings.items() if v is not None and v is not False and name not in _NO_SETTINGS}
    write_command(file, click.get_current_context().command.name or "", made_by(), said, rows, **more)


def _is_endless(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def goes_on_from(kept: Path) -> None:
    """Tell `on_interrupt` that the same command goes on from what lies in a folder."""
    on_interrupt(f"run the same command again; it goes on from what {kept} holds")


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")


def task_options(required: bool) -> Callable[[Command], Command]:
    """``--task --data-dir``."""

    def add(command: Command) -> Command:
        command = click.option(
            "--data-dir",
            type=click.Path(file_okay=False),
            help="Folder with a sub-folder of jsonl(.gz) files a task.",
        )(command)
        return click.option(
            "--task",
            required=required,
            help="reviews (embedded), sst2, mrpc, stsb, mnli, wnut17, squad, ..., or a folder in --data-dir.",
        )(command)

    return add


def machine_options(command: Command) -> Command:
    """``--device --threads --seed``."""
    command = click.option("--seed", default=0, show_default=True, help="Seed of everything random.")(command)
    command = click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: torch's own choice.")(
        command
    )
    return click.option("--device", default="cpu", show_default=True, help="Torch device, such as cpu or cuda.")(
        command
    )


def set_machine(device: str, threads: int | None) -> None:
    """Set the threads and refuse a device that is not there.

    Raises:
        ValueError: no such device.
    """
    import torch

    from qbert.cli.arguments import check_device

    if threads:
        torch.set_num_threads(threads)
    check_device(device)


def beside(path: str, ending: str) -> Path:
    """The name of `path` with an ending, in the same folder, whether it was given as ``out``, ``out/`` or ``.``.

    Raises:
        ValueError: `path` is the root of a file system, beside which nothing can lie.
    """
    named = Path(path)
    if named.name in ("", ".."):
        named = Path(os.path.abspath(named))
    if not named.name:
        raise ValueError(f"{path} is no place to write a result to; name a folder in it")
    return named.with_name(named.name + ending)


def check_picture(path: str | None) -> None:
    """Refuse a ``--plot`` that could not be drawn or written, before the work whose picture it is.

    Raises:
        ValueError: no kind of picture that can be drawn, or no folder; MissingPackageError: matplotlib is missing.
    """
    from qbert.extras import require

    if not path:
        return
    if Path(path).suffix not in _PICTURES:
        raise ValueError(f"--plot {path} is no kind of picture that can be drawn; end it in {', '.join(_PICTURES)}")
    check_file("--plot", path)
    require("matplotlib", "--plot")


def check_file(option: str, path: str | None, inputs: Mapping[str, str | None] | None = None) -> None:
    """Refuse a file that an option names to be written, before the work whose result it is.

    Args:
        option: how the command line calls it.
        path: the file; nothing is checked where None.
        inputs: what is read, by its name on the command line: files, and folders of models.

    Raises:
        ValueError: the file lies in no folder, or in one of others; or it is read itself, or part of a model that is.
    """
    if not path:
        return
    parent = Path(path).absolute().parent
    if not parent.is_dir():
        raise ValueError(f"{option} {path} is in no folder that is there; make it first")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{option} {path} cannot be written; name a file in a folder of yours")
    check_kept(option, path, inputs or {})


def check_writable(name: str, path: str) -> None:
    """Raises an OSError, naming the argument, where neither a file nor a folder can be made at `path`."""
    given = Path(path)
    above = (given, *given.absolute().parents) if given.is_dir() else given.absolute().parents
    there = next(place for place in above if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{name} {path} cannot be there, since {there} is a file; name another place")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{name} {path} cannot be written; name another place")


def check_kept(name: str, path: str, inputs: Mapping[str, str | None]) -> None:
    """Raises ValueError where the file `path` would replace one of `inputs`, or part of a model among them."""
    file = Path(path)
    for read, source in inputs.items():
        there = Path(source) if source else None
        if there is None or not there.exists() or not file.exists():
            continue
        model_file = file.name in ("config.json", *_TOKENIZER_FILES, *_SENTENCE_FILES) or file.suffix == ".safetensors"
        if file.samefile(there) or (model_file and there.is_dir() and file.resolve().parent.samefile(there)):
            raise ValueError(f"{name} {path} would replace what {read} {source} is read from; name another file")


def configuration_of(file: str, rounding: str | None) -> Any:
    """The `BitsConfig` in a JSON file, with the rounding of the command line where the file names none.

    Raises:
        ValueError: the file names a rounding too; and as `BitsConfig.parse`.
    """
    from qbert.bits import BitsConfig

    config = BitsConfig.parse(file)
    if rounding is None:
        return config
    if roundings(config):
        raise ValueError(f"--config {file} names a rounding itself; leave out --rounding, or take it out of the file")
    return BitsConfig.from_dict({**config.to_dict(), "rounding": rounding})


def roundings(config: Any) -> set[str]:
    """The roundings that a `BitsConfig` names."""
    named = (settings.get("rounding") for settings in (config.defaults, *config.rules.values()))
    return {rounding for rounding in named if rounding is not None}


def check_out(out: str, force: bool, inputs: Mapping[str, str | None]) -> None:
    """Refuse a folder OUT that holds something, unless told to write into it, or that cannot be written.

    Args:
        out: the folder, there or not.
        force: write into it whatever it holds, but for `inputs`.
        inputs: the models that are read, by their names on the command line.

    Raises:
        ValueError: it holds something, or it is the folder of an input, or one above it; OSError: it, or the first
            folder above that is there, is not writable, or no folder.
    """
    folder = Path(out)
    for name, source in inputs.items():
        if source and folder.is_dir() and Path(source).exists():
            place = Path(source).resolve()
            if folder.samefile(place):
                raise ValueError(f"OUT {out} is the folder of {name}, which would be lost; name another folder")
            if any(folder.samefile(above) for above in place.parents):
                raise ValueError(f"OUT {out} holds {name} {source}, which could be lost; name another folder")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise ValueError(f"OUT {out} is not empty; name another folder, or add --force")
    check_writable("OUT", out)


def save_result(model: Any, tokenizer: Any, out: str) -> None:
    """Write a model and its tokenizer, if it has one, into the folder OUT, without a trace of an earlier model there.

    Saving a model replaces the weights of an earlier one. What else tells of that one goes first: its tokenizer, the
    parts of a sentence model, its record, and the card that qbert wrote. Other files are left alone.
    """
    from qbert.tasks.heads import quiet_libraries

    folder = Path(out)
    if folder.is_dir():
        _remove_earlier(folder)
    with quiet_libraries():
        model.save_pretrained(out)
        if tokenizer is not None and not (folder / "tokenizer_config.json").is_file():  # a sentence model's own
            tokenizer.save_pretrained(out)


def _remove_earlier(folder: Path) -> None:
    from qbert.results import COMMAND_FILE

    parts: list[Any] = []
    with contextlib.suppress(OSError, ValueError):
        parts = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    for part in parts if isinstance(parts, list) else []:
        name = part.get("path") if isinstance(part, dict) else None
        if isinstance(name, str) and re.fullmatch(r"\d+_\w+", name):
            shutil.rmtree(folder / name, ignore_errors=True)
    for name in (*_TOKENIZER_FILES, *_SENTENCE_FILES, COMMAND_FILE):
        (folder / name).unlink(missing_ok=True)
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        headings = [line for line in text.splitlines() if line.startswith("#")]
        if text.startswith("---\nlibrary_name: transformers\ntags:\n- qbert\n") and len(headings) == 1:
            card.unlink()  # with a heading more it was written on by hand


def load_any(source: str) -> Any:
    """The model in a folder or on the hub, in evaluation mode, of the class that was saved; quantized ones too.

    Raises:
        ValueError: damaged files, or a class that transformers does not have; FileNotFoundError: no such model.
    """
    import transformers

    import qbert
    from qbert.saving.records import configuration
    from qbert.saving.sentences import is_sentence_model, load_sentence_model
    from qbert.tasks.heads import load_quietly, quiet_libraries

    here = Path(source).is_dir()
    if here and not (Path(source) / "config.json").is_file() and not (Path(source) / "modules.json").is_file():
        raise ValueError(f"MODEL {source} is a folder without config.json; name the folder that holds the model")
    values = configuration(source) if here and (Path(source) / "config.json").is_file() else {}
    if here and "quantization_config" in values:
        return qbert.load(source).eval()
    if here and is_sentence_model(source):
        with quiet_libraries():
            return load_sentence_model(source)
    config = load_quietly(transformers.AutoConfig, source)
    name = (getattr(config, "architectures", None) or [""])[0]
    kind = getattr(transformers, name, None) if name else transformers.AutoModel
    if kind is None:
        raise ValueError(f"MODEL {source} is of class {name!r}, which transformers does not have; load it in Python")
    return load_quietly(kind, source).eval()


def float_model(source: str) -> Any:
    """As `load_any`, of a model that is not quantized yet.

    Raises:
        ValueError: it is; else as `load_any`.
    """
    from qbert.saving.records import is_quantized

    model = load_any(source)
    if is_quantized(model):
        raise ValueError(f"MODEL {source} is quantized already; name the float model")
    return model


def check_packed(name: str, source: str, model: Any) -> None:
    """Raises ValueError, for the argument `name`, where the model of `source` is not packed."""
    from qbert.layers.packed import PackedTensor

    if not any(isinstance(module, PackedTensor) for module in model.modules()):
        raise ValueError(f"{name} {source} is no packed model; make one: qbert quantize {source} OUT --bits 4")


def load_tokenizer(source: str) -> Any:
    """The tokenizer beside a model.

    Raises:
        ValueError: a folder without one; else, and FileNotFoundError, as `qbert.tasks.heads.load_quietly`.
    """
    import transformers

    from qbert.tasks.heads import load_quietly

    here = Path(source)
    if here.is_dir() and not any((here / name).is_file() for name in _TOKENIZER_FILES):
        # transformers would make up one that knows no word
        raise ValueError(f"MODEL {source} has no tokenizer beside it; save the model's own there")
    return load_quietly(transformers.AutoTokenizer, source)


def check_padding(tokenizer: Any) -> None:
    """Raises ValueError for a tokenizer that cannot make rows of one length, with the line that mends it."""
    if getattr(tokenizer, "pad_token", None) is None:
        known = tokenizer.get_vocab()
        named = (getattr(tokenizer, name, None) for name in ("eos_token", "sep_token", "unk_token"))
        token = "[PAD]" if "[PAD]" in known else next((name for name in named if name), "[PAD]")
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no padding token; name one of its tokens in its "
            f'tokenizer_config.json: "pad_token": {json.dumps(token)}'
        )


def build_for(task: Any, source: str) -> tuple[Any, Any]:
    """(model with a tuned head for `task`, tokenizer); a sentence encoder without a head for pairs with a number.

    Raises:
        ValueError: the model has no head tuned for the task, or one for other labels; or its tokenizer cannot pad.
    """
    from qbert.tasks import build_model, build_sentence_model

    if task.kind == "regression" and not _has_head(source):
        label_max = task.label_range[1] if task.label_range else 1.0
        model, tokenizer = build_sentence_model(source, label_max=label_max)
    else:
        model, tokenizer = build_model(task, source, tuned=True)
    check_padding(tokenizer)
    return model, tokenizer


def _has_head(source: str) -> bool:
    import transformers

    from qbert.saving.records import configuration
    from qbert.tasks.heads import load_quietly

    here = Path(source)
    if (here / "modules.json").is_file() and not (here / "config.json").is_file():
        return False  # a SentenceTransformer with its encoder in a folder of its own
    if here.is_dir():
        named = configuration(source).get("architectures")
    else:
        named = getattr(load_quietly(transformers.AutoConfig, source), "architectures", None)
    return (named or [""])[0].endswith("ForSequenceClassification")


def unlabelled_batches(asked: Mapping[str, Any], tokenizer: Any, model: Any) -> list[dict[str, Any]] | None:
    """Batches of 32 of the ``rows`` that ``--texts`` or ``--task`` name; None where neither does.

    The two sentences of a pair come apart where `model` reads them so: as [B, 2, T] for a `SentenceRegression`, as
    [2 B, T] for a SentenceTransformer, and for an encoder without a head where the label is a number.

    Raises:
        ValueError: both are given, or the text file has no text.
    """
    if asked["texts"] and asked["task"]:
        raise ValueError("--texts and --task both name calibration data; give one of them")
    if asked["texts"]:
        return text_batches(asked["texts"], tokenizer, asked["rows"])
    if asked["task"]:
        from qbert.encoders.inputs import without_labels
        from qbert.tasks import load_task, prepare
        from qbert.tasks.evaluation import wants_pairs

        check_padding(tokenizer)
        task = load_task(asked["task"], data_dir=asked["data_dir"])
        pairs, apart = wants_pairs(model), _reads_apart(model, task)
        data = prepare(task, tokenizer, "train", limit=asked["rows"], seed=asked["seed"], as_pairs=pairs or apart)
        batches = [without_labels(batch) for batch in data.batches(32, seed=asked["seed"])]
        return [{k: v.flatten(0, 1) for k, v in b.items()} for b in batches] if apart and not pairs else batches
    return None


def _reads_apart(model: Any, task: Any) -> bool:
    """Whether a model that takes sentences [N, T] meets the two of a pair of `task` one by one."""
    if len(task.text_fields) != 2 or task.kind not in ("regression", "classification"):
        return False
    kinds = [kind for kind in type(model).__mro__ if kind.__module__.startswith("sentence_transformers.")]
    if kinds:
        return all(kind.__name__ != "CrossEncoder" for kind in kinds)
    return task.kind == "regression" and getattr(model, "base_model", None) is model


def in_fours(batches: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Few rows in four batches at least, as plans want them.

    Raises:
        ValueError: there are fewer than four rows.
    """
    batches = batches or []
    rows = sum(len(batch["input_ids"]) for batch in batches)
    if rows < 4:
        raise ValueError(f"there are {rows} rows to plan on; give at least 4, better some hundred (--texts, --rows)")
    if len(batches) >= 4:
        return batches
    most = max(1, rows // 4)
    return [
        {name: value[at : at + most] for name, value in batch.items()}
        for batch in batches
        for at in range(0, len(batch["input_ids"]), most)
    ]


def text_batches(path: str, tokenizer: Any, rows: int) -> list[dict[str, Any]]:
    """Batches of 32 of the first `rows` lines of a text file that are not empty.

    Raises:
        ValueError: the file has no text, or is not UTF-8, or the tokenizer cannot pad; OSError: it cannot be read.
    """
    check_padding(tokenizer)
    texts: list[str] = []
    try:
        with open(path, encoding="utf-8-sig") as lines:  # some editors put a mark first
            for line in lines:
                if line.strip():
                    texts.append(line.strip())
                if len(texts) == rows:
                    break
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--texts {path} is not UTF-8 ({error.reason}); convert it, such as: iconv -f latin1 -t utf-8 {path}"
        ) from error
    if not texts:
        raise ValueError(f"--texts {path} has no line of text; give one sentence or paragraph a line")
    length = min(tokenizer.model_max_length, 512)
    cut = [texts[i : i + 32] for i in range(0, len(texts), 32)]
    return [dict(tokenizer(t, padding=True, truncation=True, max_length=length, return_tensors="pt")) for t in cut]


def show(content: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print the result of a command, for a program or for a reader."""
    click.echo(json.dumps(content, indent=2) if as_json else text)


def file_megabytes(folder: str | os.PathLike[str]) -> float:
    """Size of all safetensors files in a folder, 10^6 bytes."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors")) / 1e6
