"""Progress of a spectrum measurement on disk, so that it can be interrupted after every (run, block).

It stands alone because what makes files survive a crash has nothing to do with what is measured.

A folder with two files per block: a JSON file with the block's results so far and the signature of the measurement,
and its latest eigenvector in safetensors, from which the next run starts. Everything is written aside and then
renamed; the JSON names its vector file, so a crash between the two leaves the older, consistent pair. The signature
(weights, data, settings, some losses) keeps a checkpoint from being continued by another measurement. Losses tell what
no name does: another lambda, another constant in it, another number of heads in the model's configuration. Processes
that share a measurement write the files of different blocks and never the same one.

    >>> checkpoint = Checkpoint("spectrum.checkpoint", signature, resume=True)
    >>> checkpoint.put(run=0, name="encoder.layer.0", pair=pair, loss=0.3)
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qbert.files import AlteredFileError, check_tensors, read_json, remove_abandoned, write_json, write_tensors
from qbert.hessian.eigen import Eigenpair

FORMAT = "qbert.hessian_checkpoint/3"
_SCALARS = [field.name for field in fields(Eigenpair) if field.name != "vector"]
_NO_VECTOR = torch.empty(0, device="cpu")


class Checkpoint:
    """Results of finished (run, block) pairs in the folder `path`.

    Args:
        path: folder, made if it is missing.
        signature: what the measurement is made of; a checkpoint with another one is refused.
            Its ``losses``, [runs], may differ by rounding.
        resume: continue what is there. Without it nothing is read; `clear` removes what is there.
        loss_tolerance: relative difference of losses that another machine's rounding may bring.

    Raises:
        ValueError: a foreign or damaged checkpoint, or a path that is a file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        signature: Mapping[str, Any],
        *,
        resume: bool,
        loss_tolerance: float = 1e-3,
    ):
        self.folder = Path(path)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"checkpoint: {path} is a file; give the path of a folder")
        if self.folder.is_dir():
            remove_abandoned(self.folder, ".part.*")
        self.signature, self.loss_tolerance = dict(signature), loss_tolerance
        self._blocks: dict[str, dict[str, Any]] = {}
        for file in self._files() if resume else ():
            try:
                state = read_json(file)
            except AlteredFileError as error:
                raise ValueError(_damaged(file)) from error
            self._check(file, state)
            self._blocks[state["block"]] = state

    def _files(self) -> list[Path]:
        # Not what a killed process was writing, whose names are hidden.
        return sorted(file for file in self.folder.glob("*.json") if not file.name.startswith("."))

    def _file(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"

    def _check(self, file: Path, state: Any) -> None:
        if not isinstance(state, dict) or state.get("format") != FORMAT or not {"block", "results"} <= state.keys():
            raise ValueError(f"checkpoint: {file} is not part of a checkpoint ({FORMAT}); give another folder")
        found = state.get("signature")
        if not isinstance(found, dict) or not isinstance(state["results"], dict):
            raise ValueError(_damaged(file))
        different = sorted(k for k in self.signature.keys() | found.keys() if not self._same(k, found))
        if {"data", "runs"} <= set(different) <= {"data", "runs", "losses"}:  # the data are those of all runs
            raise ValueError(
                f"checkpoint: {self.folder} belongs to another measurement of {found['runs']} runs, not "
                f"{self.signature['runs']}; ask for as many, leave out resume, or give another folder"
            )
        if different:
            raise ValueError(
                f"checkpoint: {self.folder} belongs to another measurement (different: {', '.join(different)}); give "
                "another folder, or the same model, data and settings"
            )

    def _same(self, key: str, found: Mapping[str, Any]) -> bool:
        ours, theirs = self.signature.get(key), found.get(key)
        if key != "losses" or not isinstance(ours, list) or not isinstance(theirs, list):
            return ours == theirs or (key == "losses" and key not in found)  # checkpoints of older versions have none
        near = (
            math.isclose(a, b, rel_tol=self.loss_tolerance, abs_tol=1e-3 * self.loss_tolerance)
            for a, b in zip(ours, theirs, strict=False)
        )
        return len(ours) == len(theirs) and all(near)

    def clear(self) -> None:
        """Remove an earlier checkpoint.

        Raises:
            ValueError: if the folder holds JSON files of something else; nothing is removed then.
        """
        files = self._files()
        for file in files:
            try:
                state = read_json(file)
            except ValueError:
                if re.fullmatch(r"[0-9a-f]{16}\.json", file.name):
                    continue  # a damaged one of ours
                raise
            if not isinstance(state, dict) or not str(state.get("format")).startswith(FORMAT.split("/")[0]):
                raise ValueError(f"checkpoint: {file} is not part of a checkpoint; give another folder")
        for file in files:
            file.unlink()
            for vector in self.folder.glob(f"{file.stem}-*.safetensors"):
                vector.unlink()

    def get(self, run: int, name: str) -> tuple[Eigenpair, float] | None:
        """Eigenpair (without its vector) and subset loss of a finished (run, block), None if it is still to be done.

        Raises:
            ValueError: if the record is damaged.
        """
        record = self._blocks.get(name, {}).get("results", {}).get(str(run))
        if record is None:
            return None
        try:
            numbers: dict[str, Any] = {
                key: float(value) if isinstance(value, str) else value for key, value in record.items()
            }
            loss = numbers.pop("loss")
            return Eigenpair(vector=_NO_VECTOR, **numbers), loss
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(_damaged(self._file(name))) from error

    def put(self, run: int, name: str, pair: Eigenpair, loss: float) -> None:
        """Record a finished (run, block); its vector becomes the block's latest one."""
        file = self._file(name)
        vector = pair.vector.detach().cpu().contiguous()
        vector_file = f"{file.stem}-{run}.safetensors"
        write_tensors(self.folder / vector_file, {"vector": vector})
        state = self._blocks.setdefault(
            name, {"format": FORMAT, "signature": self.signature, "block": name, "results": {}, "vector": None}
        )
        older, state["vector"] = state["vector"], vector_file
        record = {key: getattr(pair, key) for key in _SCALARS} | {"loss": loss}
        state["results"][str(run)] = {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        write_json(file, state)
        if older and older != vector_file:
            (self.folder / older).unlink(missing_ok=True)

    def latest_vectors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Block name -> latest eigenvector [n], for those of `names` that have one.

        Raises:
            ValueError: if a vector file is missing or damaged.
        """
        vectors = {}
        for name in names:
            file = self._blocks.get(name, {}).get("vector")
            if file is None:
                continue
            try:
                # A fresh copy: sums over the file's own, unaligned memory round differently in the last bit.
                check_tensors(self.folder / file)
                vectors[name] = load_file(self.folder / file)["vector"].clone()
            except (OSError, KeyError, ValueError, SafetensorError) as error:
                raise ValueError(
                    f"checkpoint: {self.folder / file} is missing or damaged ({error}); remove {self.folder} and "
                    "start again"
                ) from error
        return vectors

    def finish(self, names: Iterable[str]) -> None:
        """Drop the vectors of the blocks `names`, which only a further run would need; the results stay.

        Each process names its own blocks: of those of others it knows what it read at the start, not what they wrote.
        """
        for name in names:
            state = self._blocks.get(name, {"vector": None})
            file, state["vector"] = state["vector"], None
            if file is not None:
                write_json(self._file(name), state)
                (self.folder / file).unlink(missing_ok=True)


def _damaged(file: Path) -> str:
    return f"checkpoint: {file} is damaged; remove {file.parent} and start again"


def model_fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes, dtypes and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{tuple(values.shape)}{values.dtype}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """Index of this process and number of processes; (0, 1) unless a process group was set up."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def own_share(items: Sequence[T]) -> list[T]:
    """Every N-th of `items`, beginning with this process's index: neighbours, alike in cost, go to different ones."""
    rank, world = rank_and_world()
    return list(items[rank::world])


def wait_for_all() -> None:
    """Return when every process has come here."""
    if rank_and_world()[1] > 1:
        dist.barrier()


def check_same(description: str, what: str, mend: str = "load the same one in each") -> None:
    """Refuse to share work between processes whose descriptions differ.

    Args:
        description: of this process.
        what, mend: beginning and end of the sentence that is raised.

    Raises:
        ValueError: in every process.
    """
    world = rank_and_world()[1]
    if world == 1:
        return
    found: list[str | None] = [None] * world
    dist.all_gather_object(found, description)
    if len(set(found)) > 1:
        raise ValueError(f"{what} between the {world} processes; {mend}")


def gathered(table: Tensor, device: torch.device) -> Tensor:
    """Sum of the float64 `table` over all processes; entries that are not this process's own must be 0."""
    if rank_and_world()[1] == 1:
        return table
    moved = table.to(device if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(moved)
    return moved.cpu()
