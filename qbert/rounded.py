"""Finished layers of compensated rounding on disk, so that a large model need not be begun again.

One safetensors file an encoder layer, written aside and renamed once all of its matrices are rounded: what is kept was
rounded exactly as it would be without an interruption. Each file names the weights, the data and the settings that it
was made of. It stands alone because converting a model knows nothing of files otherwise.

    >>> kept = RoundedLayers("rounding", model, batches, specs)
    >>> if "encoder.layer.0.output.dense" in kept: ...
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qbert.bits import TensorSpec, spec_to_dict
from qbert.calibration import Batch
from qbert.files import check_tensors, remove_abandoned, write_tensors
from qbert.hessian.checkpoint import model_fingerprint

FORMAT = "qbert.rounded/1"


class RoundedLayers:
    """Rounded matrices by name, in the folder `path`.

    Args:
        path: folder, made if it is missing.
        model, batches, specs: what the rounding is made of.

    Raises:
        ValueError: the folder holds layers of another model, other data or other settings, or a damaged file; or it is
            a file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: nn.Module,
        batches: Sequence[Batch],
        specs: Mapping[str, TensorSpec],
    ) -> None:
        self.folder = Path(path)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"checkpoint: {path} is a file; give the path of a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.folder, ".part.*")
        asked = {name: spec_to_dict(spec) for name, spec in specs.items()}
        self._made_of = {
            "format": FORMAT,
            "weights": model_fingerprint(model),
            "data": _fingerprint(batches),
            "settings": hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest(),
        }
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._pending: dict[str, Tensor] = {}
        files = sorted(self.folder.glob("layer-*.safetensors"))
        self._written = len(files)
        for file in files:
            self._read(file)

    def _read(self, file: Path) -> None:
        found = check_tensors(file)
        different = [name for name, value in self._made_of.items() if found.get(name) != value]
        if different:
            raise ValueError(
                f"checkpoint: {file} was rounded from other {', '.join(different)}; give another folder, or the same "
                "model, calibration_data and bits_config"
            )
        for key, tensor in load_file(file).items():
            name, _, part = key.rpartition("/")
            self._tensors.setdefault(name, {})[part] = tensor

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        """The tensors that were added under a name."""
        return self._tensors[name]

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Take over the tensors of a matrix of the layer under way."""
        self._pending |= {f"{name}/{part}": tensor.detach().cpu().contiguous() for part, tensor in tensors.items()}

    def finish_layer(self) -> None:
        """Write what was added since the last layer."""
        if self._pending:
            write_tensors(self.folder / f"layer-{self._written:04d}.safetensors", self._pending, self._made_of)
            self._written, self._pending = self._written + 1, {}


def _fingerprint(batches: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            value = batch[name]
            if isinstance(value, Tensor):
                digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
