"""The folder of a quantized model: written so that the older or the newer model always loads, with a digest of all.

The digest is SHA-256 over the record of the layouts (canonical JSON) and over name, dtype, shape and bytes of every
tensor in the files; a second one covers the rest of ``config.json``. Both are kept in its ``quantization_config`` and
checked before a tensor is used. ``config.json`` also names the file of the weights, twice: for qbert in
``quantization_config``, and as ``transformers_weights`` a file that does not exist. transformers looks for the latter
unless qbert has put the former in its place, so that without ``import qbert`` nothing is loaded.

    >>> Saver(model)("out")          # what `model.save_pretrained("out")` calls
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qbert.encoders.structure import changes
from qbert.files import content_sha256, flush, flush_folder, own_name, read_json, remove_abandoned, writing
from qbert.layers.packed import PackedTensor
from qbert.saving.records import METHOD, counts_by_bits, describe, file_state, is_quantized

# What earlier versions wrote beside a float checkpoint; it means nothing once other weights lie there.
GRIDS, TRAINABLE_RECORD = "qbert_grids.safetensors", "qbert_grids.json"
# Named in config.json for readers that do not know qbert, and never written.
NO_WEIGHTS = "import_qbert_before_loading_this_model.safetensors"
_INDEX = ".safetensors.index.json"
_ASIDE = re.compile(r"model-qbert-[0-9a-f]{8}[-.].*")
_CARD = """---
library_name: transformers
tags:
- qbert
- {tag}
---

# {name}

{notice}
"""
_NOTICE = """A `{architecture}` whose weights are {stored} {bits} bits by the Python library `qbert`.

**`import qbert` before you load it.** Without that line transformers finds no weights here and stops.

```python
import qbert
from {library} import {auto}

model = {load}   # or qbert.load("{name}"), which cannot be forgotten
```

| bits of a weight | tensors | values |
|---|---|---|
{table}"""


class Saver:
    """``save_pretrained`` of one quantized model: as transformers' own, plus record, digests and a model card.

    Args:
        model: a transformers model with packed or with fake-quantized layers.
        plain: transformers' own ``save_pretrained``, to be called with the model.
    """

    def __init__(self, model: Any, plain: Callable[..., None]) -> None:
        self.model, self.plain = model, plain

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write config.json, safetensors and README.md (unless there is one) into `save_directory`.

        Every argument of transformers' ``save_pretrained`` is accepted. Files of a quantized model that was saved there
        before are replaced or removed; others are left alone. Killed at any moment, the folder holds the older or the
        newer model.

        Raises:
            ValueError: `save_directory` is a file; OSError: it cannot be written, or the disk is full.
        """
        folder = output_folder("save_directory", save_directory)
        positional = list(inspect.signature(self.plain).parameters)[2:]
        kwargs |= dict(zip(positional, args, strict=False))
        push, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", folder.name)
        if not kwargs.get("is_main_process", True):
            # Processes may have to meet in there, but transformers 5.10 lets every one of them write the weights.
            with tempfile.TemporaryDirectory() as nowhere:
                self.plain(self.model, nowhere, **kwargs)
            return
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder, "", before="saving-")
        for left in folder.glob(".saving-????????"):  # so named by earlier versions
            shutil.rmtree(left, ignore_errors=True)
        remove_abandoned(folder, ".part.*")
        aside = folder / own_name("saving-", "")
        try:
            with writing(folder):
                aside.mkdir()
                self._write(aside, folder, **kwargs)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        if push:
            hub = {k: kwargs[k] for k in ("commit_message", "private", "token", "create_pr") if k in kwargs}
            self.model.push_to_hub(repo_id, **hub)

    def _write(self, aside: Path, folder: Path, **kwargs: Any) -> None:
        layouts = describe(self.model)
        if layouts.get("form", "packed") != "packed":
            kwargs["state_dict"] = file_state(self.model, kwargs.get("state_dict"))
            kwargs.setdefault("save_original_format", False)  # the names that resuming a training looks for
        self.plain(self.model, aside, **kwargs)
        for path in aside.glob("*.safetensors"):  # safetensors keeps its files from all but their owner
            path.chmod((aside / "config.json").stat().st_mode & 0o777)
        if not (folder / "README.md").exists():
            (aside / "README.md").write_text(model_card(self.model, folder.name), encoding="utf-8")
        for index in list(aside.glob("*.safetensors.index*.json")):
            content = json.loads(index.read_text(encoding="utf-8"))
            content["metadata"]["written_by"] = METHOD
            # transformers finds no variant of an index by its usual name
            name = index.name if index.name.endswith(_INDEX) else f"model.{kwargs['variant']}{_INDEX}"
            index.unlink()
            (aside / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        config = json.loads((aside / "config.json").read_text(encoding="utf-8")) | {"transformers_weights": NO_WEIGHTS}
        config.pop("quantization_config", None)
        tensors = tensor_digests(aside.glob("*.safetensors"))
        record = {**layouts, "quant_method": METHOD, "config_sha256": content_sha256(config)}

        def write_config(weights: str, replaced: set[str]) -> None:
            named = {**record, "weights": weights, **({"replaces": sorted(replaced)} if replaced else {})}
            named["sha256"] = _digest(tensors, named)
            content = json.dumps({**config, "quantization_config": named}, indent=2, sort_keys=True) + "\n"
            (aside / "config.json").write_text(content, encoding="utf-8")
            _replace(aside / "config.json", folder / "config.json")

        _Placing(aside, folder, write_config).run()


class _Placing:
    """Moves the files of a new model over those of an older one: weights beside the old, the configuration last.

    Where names are taken, the new weights first lie under other ones, which the new configuration names. Once it is
    there they get a second, usual name, which a second configuration names.
    """

    def __init__(self, aside: Path, folder: Path, write_config: Callable[[str, set[str]], None]) -> None:
        self.aside, self.folder, self.write_config = aside, folder, write_config
        self.usual = sorted(path.name for path in aside.iterdir() if ".safetensors" in path.name)
        self.older = quantized_files(folder)
        self.token = secrets.token_hex(4)

    def run(self) -> None:
        entry = min(self.usual, key=lambda name: not name.endswith(_INDEX))
        for path in self.aside.iterdir():
            if path.name != "config.json" and path.name not in self.usual:
                _replace(path, self.folder / path.name)
        taken = any((self.folder / name).exists() for name in self.usual)
        names = {name: self._other(name) if taken else name for name in self.usual}
        index = (self.aside / entry).read_bytes() if entry.endswith(_INDEX) else b""
        if taken and index:
            content = json.loads(index)
            content["weight_map"] = {tensor: names[file] for tensor, file in content["weight_map"].items()}
            (self.aside / entry).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name, other in names.items():
            _replace(self.aside / name, self.folder / other)
        replaced = self.older - {*names, *names.values()}
        self.write_config(names[entry], replaced)
        final = names
        if taken and self._name_as_usual(names, entry, index):
            final = {name: name for name in names}
        # An index last: it tells the next save what a killed one left.
        for name in sorted(replaced, key=lambda name: name.endswith(_INDEX)):
            (self.folder / name).unlink(missing_ok=True)
        if replaced or final is not names:
            self.write_config(final[entry], set())
        flush_folder(self.folder)
        for path in list(self.folder.iterdir()):
            if _ASIDE.fullmatch(path.name) and path.name not in final.values():
                path.unlink(missing_ok=True)

    def _other(self, name: str) -> str:
        return f"model-qbert-{self.token}{name.removeprefix('model')}"

    def _name_as_usual(self, names: Mapping[str, str], entry: str, index: bytes) -> bool:
        """Give the weights their usual names too; False where the file system has no second names."""
        for name, other in names.items():
            second = self.folder / own_name("", f".part.{name}")
            try:
                if name == entry and index:
                    second.write_bytes(index)
                    flush(second)
                else:
                    os.link(self.folder / other, second)
                os.replace(second, self.folder / name)
            except OSError:
                second.unlink(missing_ok=True)
                return False
        return True


def _replace(path: Path, target: Path) -> None:
    if path.is_file():
        flush(path)
    os.replace(path, target)


def quantized_files(folder: Path) -> set[str]:
    """Names of the files in `folder` that hold a quantized model, its configuration and card left out."""
    found = {GRIDS, TRAINABLE_RECORD} if (folder / TRAINABLE_RECORD).is_file() else set()
    record: Any = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = read_json(folder / "config.json")["quantization_config"]
    if isinstance(record, dict) and record.get("quant_method") == METHOD:
        whole = (folder / "model.safetensors").is_file()
        found.add(str(record.get("weights") or ("model.safetensors" if whole else f"model{_INDEX}")))
        found |= set(record.get("replaces") or ())
    # The index of a model that was replaced before, by a process that was killed while it cleared up, is ours too.
    for index in folder.glob(f"model*{_INDEX}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            content = read_json(index)
            if index.name in found or content["metadata"]["written_by"] == METHOD:
                found |= {index.name, *content["weight_map"].values()}
    return {name for name in found if Path(name).name == name}


def output_folder(name: str, folder: str | os.PathLike[str]) -> Path:
    """`folder` as a path. Raises ValueError, naming the argument `name`, if it is a file."""
    path = Path(folder)
    if path.is_file():
        raise ValueError(f"{name}: {path} is a file; give the name of a folder")
    return path


def digest(files: Iterable[str | os.PathLike[str]], record: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a record, without its own ``sha256``, and of all tensors in safetensors `files`.

    Raises:
        ValueError: if a file is not safetensors, is truncated, or two files hold a tensor of the same name.
    """
    return _digest(tensor_digests(files), record)


def _digest(tensors: Mapping[str, bytes], record: Mapping[str, Any]) -> str:
    total = hashlib.sha256(
        json.dumps({k: v for k, v in record.items() if k != "sha256"}, sort_keys=True, separators=(",", ":")).encode()
    )
    for name in sorted(tensors):
        total.update(tensors[name])
    return total.hexdigest()


def tensor_digests(files: Iterable[str | os.PathLike[str]]) -> dict[str, bytes]:
    """Tensor name -> SHA-256 of its name, dtype, shape and bytes; raises as `digest`."""
    parts: dict[str, bytes] = {}
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            raise ValueError(f"{file}: quantized models are read from safetensors only; save the model again")
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    if name in parts:
                        raise ValueError(f"{file}: tensor {name!r} is also in another file of the same model")
                    parts[name] = _tensor_digest(name, tensors.get_tensor(name))
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated, damaged or not a safetensors file ({error})") from error
    return parts


def check_digest(files: Iterable[str | os.PathLike[str]], record: Mapping[str, Any]) -> None:
    """Compare `files` with the digest in `record`. Raises ValueError if they differ."""
    files = list(files)
    expected = record.get("sha256")
    if digest(files, record) != expected:
        where = Path(files[0]).parent if files else "the model"
        raise ValueError(
            f"{where}: the tensors or the quantization_config are not those that were saved "
            f"(sha256 is not {expected}); copy or download the folder again"
        )


def check_configuration(folder: Path) -> None:
    """Compare ``config.json`` in `folder` with its own digest; one of an earlier version has none.

    Raises:
        ValueError: if it was altered.
    """
    content = read_json(folder / "config.json")
    record = content.pop("quantization_config", None) if isinstance(content, dict) else None
    expected = record.get("config_sha256") if isinstance(record, dict) else None
    if expected is not None and expected != content_sha256(content):
        raise ValueError(
            f"{folder / 'config.json'} is damaged or was altered after it was saved (config_sha256 does not fit); copy "
            "or download it again, or change the loaded model's config and save the model"
        )


def check_folder(files: Iterable[str | os.PathLike[str]], record: Mapping[str, Any]) -> None:
    """Refuse weights that lie in several folders, an altered configuration, and tensors that were not saved.

    Raises:
        ValueError: naming what is wrong.
    """
    paths = [Path(os.path.abspath(file)) for file in files]
    for path in paths:
        if path.parent != paths[0].parent:
            raise ValueError(f"{paths[0].parent}: the index names {path}, outside of the folder; save the model again")
    if paths and (paths[0].parent / "config.json").is_file():
        check_configuration(paths[0].parent)
    check_digest(paths, record)


_CHANGED = """A `{architecture}` whose layers the Python library `qbert` changed: {changes}.

**`import qbert` before you load it.** Without that line transformers finds no weights here and stops.

```python
import qbert
from {library} import {auto}

model = {load}   # or qbert.load("{name}"), which cannot be forgotten
```
"""


def model_card(model: Any, name: str) -> str:
    """The text of README.md: how to load the model, and what is in it."""
    return _CARD.format(name=name, notice=notice(model, name), tag="quantized" if is_quantized(model) else "compressed")


def notice(model: Any, name: str, library: str = "transformers", call: str = "") -> str:
    """What a model card says about the quantization; `call` loads the model, by ``from_pretrained`` unless given."""
    auto = call or _class_to_load(model)
    packed = any(isinstance(m, PackedTensor) for m in model.modules())
    counts = counts_by_bits(model)
    load = f'{auto}("{name}")' if call else f'{auto}.from_pretrained("{name}")'
    common = {"name": name, "architecture": type(model).__name__, "library": library, "auto": auto, "load": load}
    if not counts:
        return _CHANGED.format(**common, changes=", ".join(entry["change"] for entry in changes(model)))
    return _NOTICE.format(
        **common,
        stored="stored in" if packed else "trained for (and kept in float, with their grids)",
        bits=", ".join(str(b) for b in sorted(counts)),
        table="\n".join(f"| {b} | {counts[b][0]} | {counts[b][1]:,} |" for b in sorted(counts)),
    )


def _class_to_load(model: Any) -> str:
    """An Auto class, where it gives the very class of `model` back; else the name of that class."""
    import transformers

    name = type(model).__name__
    head = re.search(r"For\w+$", name)
    auto = f"AutoModel{head.group() if head else ''}"
    mapping = getattr(getattr(transformers, auto, None), "_model_mapping", {})
    found = mapping.get(type(model.config), ())
    return auto if type(model) in (found if isinstance(found, tuple) else (found,)) else name


def _tensor_digest(name: str, tensor: torch.Tensor) -> bytes:
    head = hashlib.sha256(f"{name}:{tensor.dtype}:{list(tensor.shape)}\n".encode())
    head.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return head.digest()
