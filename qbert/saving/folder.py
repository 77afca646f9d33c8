"""The files of a packed model: written aside and renamed, with a digest that tells every altered bit.

The digest is SHA-256 over the record of the packed layouts (canonical JSON) and over name, dtype, shape and bytes of
every tensor in the files; it is kept in ``config.json`` and checked before a tensor is used.

    >>> Saver(model)("out")          # what `packed.save_pretrained("out")` calls
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qbert.saving.records import METHOD, describe

# What `qbert.saving.trainable` writes beside a float checkpoint; it means nothing once other weights lie there.
GRIDS, TRAINABLE_RECORD = "qbert_grids.safetensors", "qbert_grids.json"
_WEIGHTS = re.compile(r"model.*\.safetensors(\.index\.json)?")
_CARD = """---
library_name: transformers
tags:
- qbert
- quantized
---

# {name}

A `{architecture}` whose weights are stored in {bits} bits by the Python library `qbert`.

**`import qbert` before you load it.** Without that line transformers only warns that it does not know the quantization
method, and returns a model with random weights.

```python
import qbert
from transformers import {auto}

model = {auto}.from_pretrained("{name}")   # or qbert.load("{name}"), which cannot be forgotten
```

| bits of a weight | tensors | values |
|---|---|---|
{table}
"""


class Saver:
    """``save_pretrained`` of one packed model: as transformers' own, plus the digest and a model card.

    Args:
        model: a transformers model with packed layers.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write config.json, safetensors and README.md (unless there is one) into `save_directory`.

        Every argument of transformers' ``save_pretrained`` is accepted. What another model left there under names of
        weights is removed. Raises ValueError if `save_directory` is a file.
        """
        folder = output_folder("save_directory", save_directory)
        positional = list(inspect.signature(type(self.model).save_pretrained).parameters)[2:]
        kwargs |= dict(zip(positional, args, strict=False))
        push, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", folder.name)
        if not kwargs.get("is_main_process", True):
            type(self.model).save_pretrained(self.model, folder, **kwargs)
            return
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as aside:
            self._write(Path(aside), folder, **kwargs)
        if push:
            hub = {k: kwargs[k] for k in ("commit_message", "private", "token", "create_pr") if k in kwargs}
            self.model.push_to_hub(repo_id, **hub)

    def _write(self, aside: Path, folder: Path, **kwargs: Any) -> None:
        layouts = describe(self.model)
        type(self.model).save_pretrained(self.model, aside, **kwargs)
        files = sorted(aside.glob("*.safetensors"))
        config = json.loads((aside / "config.json").read_text(encoding="utf-8"))
        record = {**layouts, "quant_method": METHOD}
        record["sha256"] = digest(files, record)
        config["quantization_config"] = record
        (aside / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if not (folder / "README.md").exists():
            (aside / "README.md").write_text(model_card(self.model, folder.name), encoding="utf-8")
        written = {path.name for path in aside.iterdir()}
        for old in folder.iterdir():
            if (_WEIGHTS.fullmatch(old.name) or old.name in (GRIDS, TRAINABLE_RECORD)) and old.name not in written:
                old.unlink()
        # The configuration last: until it is there, the digest of the old one refuses the new tensors.
        for path in sorted(aside.iterdir(), key=lambda p: p.name == "config.json"):
            os.replace(path, folder / path.name)


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
    content = {k: v for k, v in record.items() if k != "sha256"}
    total = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
    parts: dict[str, bytes] = {}
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            raise ValueError(f"{file}: packed models are read from safetensors only; save the model again")
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    if name in parts:
                        raise ValueError(f"{file}: tensor {name!r} is also in another file of the same model")
                    parts[name] = _tensor_digest(name, tensors.get_tensor(name))
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated, damaged or not a safetensors file ({error})") from error
    for name in sorted(parts):
        total.update(parts[name])
    return total.hexdigest()


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


def model_card(model: Any, name: str) -> str:
    """The text of README.md: how to load the model, and what is in it."""
    counts: dict[int, tuple[int, int]] = {}
    record = describe(model)
    from qbert.layers.linear import PackedTensor

    for layer in model.modules():
        if isinstance(layer, PackedTensor) and layer.owner is layer:
            tensors, values = counts.get(layer.layout.bits, (0, 0))
            counts[layer.layout.bits] = tensors + 1, values + layer.rows * layer.columns
    assert record["tensors"]
    return _CARD.format(
        name=name,
        architecture=type(model).__name__,
        auto=_class_to_load(model),
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
