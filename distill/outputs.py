"""A teacher's outputs on disk, so that many students cost one pass of the teacher.

    >>> outputs = TeacherOutputs.of(teacher, data, "outputs/sst2", collate=data.collate)
    >>> Distiller(teacher, student, recipes.bilstm(), train_dataset=data, teacher_outputs=outputs, ...).train()

A folder holds the logits of one teacher, in float16, each under a digest of what the teacher was given: the order of
the rows, and which of them are used, do not matter, and no row ever gets the output of another. It is written in files
of some thousand rows, each aside and renamed; a run that was cut off goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from qbert.encoders.inputs import accepted_inputs, forward_arguments, to_device
from qbert.encoders.modes import evaluation_mode
from qbert.files import check_tensors, read_json, write_json, write_tensors
from qbert.progress import progress_bar

TEACHER_LOGITS = "teacher_logits"  # column of a row, and keyword of a batch
_LABELS = frozenset({"label", "label_ids", "labels", "start_positions", "end_positions"})
_FORMAT = "qbert teacher outputs 1"
_ROWS_A_FILE = 2048


class TeacherOutputs:
    """Logits of one teacher by row.

    Attributes:
        folder: where they lie.
        teacher: digest of the teacher (`teacher_digest`).
        names: what of a row the teacher reads.
    """

    def __init__(self, folder: Path, teacher: str, names: Sequence[str], logits: Mapping[bytes, np.ndarray]) -> None:
        self.folder, self.teacher, self.names = folder, teacher, tuple(names)
        self._logits = dict(logits)

    def __len__(self) -> int:
        return len(self._logits)

    @classmethod
    def of(
        cls,
        teacher: nn.Module,
        rows: Any,
        folder: str | os.PathLike[str],
        *,
        collate: Callable[[list[Any]], Any],
        batch_size: int = 64,
        progress: bool = True,
    ) -> TeacherOutputs:
        """The outputs for `rows`, of which only those that `folder` lacks are computed, longest last.

        Where several processes have joined (``accelerate launch``), each computes its share.

        Args:
            teacher: gives one vector of logits a row, [B, C] or [B].
            rows: a data set with a length, of rows that `collate` understands.
            folder: made if it is not there; must be of this teacher.
            collate: makes a batch of rows, such as ``data.collate``.
            batch_size: rows that run together.
            progress: show a bar.

        Raises:
            ValueError: the folder is of another teacher or damaged, rows without a length, outputs that are not one
                vector a row, or that float16 cannot hold.
        """
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            raise ValueError("rows: a stream has no rows to find again; give a data set with a length")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not possible; use at least 1")
        path, digest = Path(folder), teacher_digest(teacher)
        names = [name for name in forward_arguments(teacher) if name not in _LABELS]
        outputs = cls(path, digest, names, _read(path, digest))
        rank, processes = _place()
        if processes > 1:
            torch.distributed.barrier()  # all have looked before one writes
        missing: dict[bytes, int] = {}
        for index in range(len(rows)):
            missing.setdefault(outputs.key(rows[index]), index)
        missing = {key: index for key, index in missing.items() if key not in outputs._logits}
        if missing:
            if rank == 0 and not (path / "teacher.json").is_file():
                write_json(path / "teacher.json", {"format": _FORMAT, "teacher": digest})
            ordered = sorted(missing.items(), key=lambda item: len(rows[item[1]].get("input_ids", ())))
            with progress_bar(total=len(ordered), desc="teacher's outputs", unit="row", disable=not progress) as bar:
                outputs._compute(teacher, rows, ordered[rank::processes], collate, batch_size, bar)
        if processes > 1:
            torch.distributed.barrier()
            outputs._logits = _read(path, digest)
        return outputs

    def _compute(
        self,
        teacher: nn.Module,
        rows: Any,
        missing: list[tuple[bytes, int]],
        collate: Callable[[list[Any]], Any],
        batch_size: int,
        bar: Any,
    ) -> None:
        for start in range(0, len(missing), _ROWS_A_FILE):
            part = missing[start : start + _ROWS_A_FILE]
            found: list[Tensor] = []
            for at in range(0, len(part), batch_size):
                chosen = [index for _, index in part[at : at + batch_size]]
                batch = to_device(collate([_only(rows[i], self.names) for i in chosen]), teacher)
                with torch.no_grad(), evaluation_mode(teacher):
                    logits = getattr(teacher(**accepted_inputs(teacher, batch)), "logits", None)
                found.append(_checked(logits, len(chosen)))
                bar.update(len(chosen))
            keys = [key for key, _ in part]
            values = torch.cat(found)
            digests = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), -1)
            name = hashlib.sha256(b"".join(keys)).hexdigest()[:16]
            write_tensors(
                self.folder / f"rows-{name}.safetensors", {"rows": digests, "logits": values}, {"teacher": self.teacher}
            )
            self._logits |= dict(zip(keys, values.numpy(), strict=True))

    def key(self, row: Mapping[str, Any]) -> bytes:
        """16 bytes for what the teacher reads of a row."""
        digest = hashlib.blake2b(digest_size=16)
        for name in self.names:
            if row.get(name) is None:
                continue
            values = np.asarray(row[name])
            values = values.astype(np.int64 if values.dtype.kind in "biu" else np.float32)
            digest.update(f"{name} {values.shape} ".encode() + np.ascontiguousarray(values).tobytes())
        return digest.digest()

    def check(self, teacher: nn.Module) -> None:
        """Raises ValueError if `teacher` is another one."""
        if teacher_digest(teacher) != self.teacher:
            raise ValueError(f"teacher_outputs: {self.folder} holds the outputs of another teacher; make them anew")

    def beside(self, rows: Any) -> RowsWithOutputs:
        """`rows` with their logits under ``teacher_logits``.

        Raises:
            ValueError: a row whose output is not there; a stream.
        """
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            raise ValueError("teacher_outputs: a stream has no rows to find again; leave the outputs out")
        found = []
        for index in range(len(rows)):
            logits = self._logits.get(self.key(rows[index]))
            if logits is None:
                raise ValueError(
                    f"teacher_outputs: {self.folder} has no output for row {index} of train_dataset, it was made of "
                    "other rows; call TeacherOutputs.of with these, and it computes what is missing"
                )
            found.append(logits)
        return RowsWithOutputs(rows, found)


class RowsWithOutputs(Dataset):  # type: ignore[type-arg]
    """Rows of a data set, each with its teacher's logits."""

    def __init__(self, rows: Any, logits: Sequence[np.ndarray]) -> None:
        self.rows, self.logits = rows, logits

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], TEACHER_LOGITS: self.logits[index]}


class CollateWithOutputs:
    """A collator that stacks the teacher's logits [B, C] float32 beside what another makes of the rows."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """The other collator's batch, with ``teacher_logits`` where every row has them."""
        plain = [{key: value for key, value in row.items() if key != TEACHER_LOGITS} for row in rows]
        batch = dict(self.collate(plain))
        if rows and all(TEACHER_LOGITS in row for row in rows):
            batch[TEACHER_LOGITS] = torch.from_numpy(np.stack([row[TEACHER_LOGITS] for row in rows])).float()
        return batch


def teacher_digest(teacher: nn.Module, without: str | None = None) -> str:
    """SHA-256 (hex) of a model's class, configuration and weights, less those whose names begin with `without`."""
    config = getattr(teacher, "config", None)
    values = json.loads(config.to_json_string(use_diff=False)) if config is not None else {}
    for name in ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "_attn_implementation"):
        values.pop(name, None)
    total = hashlib.sha256(json.dumps([type(teacher).__name__, values], sort_keys=True).encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        if isinstance(tensor, Tensor) and (without is None or not name.startswith(without)):
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _only(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: row[name] for name in names if row.get(name) is not None}


def _checked(logits: Any, rows: int) -> Tensor:
    """float16 [B, C] on the CPU. Raises ValueError for outputs that cannot be kept by row."""
    if not isinstance(logits, Tensor) or logits.dim() > 2 or len(logits) != rows:
        shape = list(logits.shape) if isinstance(logits, Tensor) else None
        raise ValueError(f"teacher: its logits have shape {shape}, but only one vector a row, [B, C], can be kept")
    kept = logits.detach().reshape(rows, -1).to("cpu", torch.float16)
    if not bool(torch.isfinite(kept).all()):
        raise ValueError("teacher: a logit is not finite, or beyond 65,504, which float16 cannot hold")
    return kept


def _read(folder: Path, teacher: str) -> dict[bytes, np.ndarray]:
    """Digest of a row -> logits [C] float16, of all files in `folder`."""
    if not (folder / "teacher.json").is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"folder: {folder} holds other files; name a folder for the teacher's outputs alone")
        return {}
    head = read_json(folder / "teacher.json")
    if not isinstance(head, dict) or head.get("format") != _FORMAT:
        raise ValueError(f"folder: {folder} holds no teacher's outputs of this version; name another folder")
    if head.get("teacher") != teacher:
        raise ValueError(f"folder: {folder} holds the outputs of another teacher; name another folder")
    found: dict[bytes, np.ndarray] = {}
    for file in sorted(folder.glob("rows-*.safetensors")):
        if check_tensors(file).get("teacher") != teacher:
            raise ValueError(f"folder: {file} holds the outputs of another teacher; remove it")
        tensors = load_file(file)
        keys = tensors["rows"].numpy()
        found |= {keys[i].tobytes(): row for i, row in enumerate(tensors["logits"].numpy())}
    return found


def _place() -> tuple[int, int]:
    """(rank, number) of the processes that have joined."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
