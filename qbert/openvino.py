"""`export_openvino`: a packed model as a model of OpenVINO with low-bit weights, checked by running it.

>>> export_openvino(packed, "model.xml")               # and model.bin beside it
OpenVinoReport(...)
>>> openvino.compile_model("model.xml", "CPU")({"input_ids": ids, "attention_mask": mask})
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from qbert.extras import require
from qbert.files import flush, remove_abandoned, write_whole
from qbert.inference.forward import remove_fast_forwards
from qbert.runtimes.openvino import EXACT, OpenVinoSession, openvino_model, openvino_twin, stored_bits
from qbert.runtimes.recorded import ALIKE, MEND, Recorded, check_packed, record_model


class OpenVinoReport(NamedTuple):
    """What `export_openvino` wrote.

    error: largest relative error of the outputs beside the packed model, over several lengths, with and without
        padding, in float32; error_by_default: the same with the settings that OpenVINO takes on this machine by itself;
    stored_bits: bits of codes -> how many weights are stored in them; nbytes: of both files.
    """

    error: float
    error_by_default: float
    stored_bits: dict[int, int]
    nbytes: int


def export_openvino(
    packed: nn.Module,
    path: str | os.PathLike[str],
    *,
    inputs: Sequence[str] = ("input_ids", "attention_mask"),
    quantize_activations: bool = True,
) -> OpenVinoReport:
    """Write a packed text encoder as a model of OpenVINO with dynamic batch and length: ``NAME.xml`` and ``NAME.bin``.

    Weights of 2, 4 and 8 bits are stored and multiplied as such, those of 3 bits in 4; tables in 4 or 8. All else is
    float32. Inputs and outputs are called as in `qbert.export_onnx`.

    The steps of the model are recorded at one length and replayed at others before a file is written; then OpenVINO's
    CPU runtime runs the files, at several lengths, with padding and with a sequence without a token (which OpenVINO's
    own attention would give NaN, and the file gives what torch does), in float32 and with the settings it takes by
    itself. What does not agree with the packed model is refused: by more than a relative error of 0.001 in float32 if
    no activations are quantized, else by more than 0.25, since a value on the border between two codes may fall to the
    other side. The largest error found is returned. A row without a token, its mask all 0, is not among what is
    compared: OpenVINO gives NaN for it, or other numbers than the packed model, so leave such rows out.

    Args:
        packed: what `qbert.pack`, `qbert.load` or ``from_pretrained`` returned, on the CPU, in any dtype. It is left
            alone; if it was optimized for inference, the export is that of the packed model.
        path: file to write, ``NAME.xml``.
        inputs: names of the int64 [B, T] inputs, out of those of the model's forward.
        quantize_activations: quantize them as the packed model does; if not, OpenVINO rounds them in its own way, in
            groups of 32 columns, which is faster (2-bit weights excepted), and nearer to the float model.

    Raises:
        ValueError: if `path` does not end in .xml, the model has no packed layer, is not on the CPU, cannot be called
            with these inputs, cannot be written as one graph for all lengths, or computes something else in OpenVINO.
        TypeError: if it is not a torch module.
        MissingPackageError: if the package ``openvino`` is not installed.
    """
    target = Path(path)
    if target.suffix != ".xml":
        raise ValueError(f"path: {target} is no name of a model of OpenVINO; let it end in .xml")
    check_packed(packed)
    require("openvino", "export_openvino")
    import openvino

    model = deepcopy(packed).eval().to(torch.float32)
    remove_fast_forwards(model)
    twin_of = partial(openvino_twin, quantize_activations=quantize_activations)
    record = record_model(model, twin_of, inputs)
    graph = openvino_model(record)
    errors: list[float] = []
    weights = target.with_suffix(".bin")

    def write_checked(aside: Path) -> None:
        beside = aside.with_suffix(".bin")
        try:
            openvino.save_model(graph, str(aside), compress_to_fp16=False)
            errors.extend(_check_file(record, aside))
            flush(beside)
            target.unlink(missing_ok=True)  # no graph ever stands beside weights of another
            os.replace(beside, weights)
        finally:
            beside.unlink(missing_ok=True)

    if target.parent.is_dir():
        remove_abandoned(target.parent, f".part.{glob.escape(weights.name)}")
    write_whole(target, write_checked)
    nbytes = target.stat().st_size + weights.stat().st_size
    return OpenVinoReport(errors[0], errors[1], stored_bits(graph), nbytes)


def _check_file(record: Recorded, path: Path) -> tuple[float, float]:
    """Errors in float32 and with default settings; ValueError for a file from which something else is computed."""
    try:
        exact = record.check_replay(OpenVinoSession(len(record.outputs), path, EXACT), record.limit, with_empty=True)
        return exact, record.check_replay(OpenVinoSession(len(record.outputs), path), ALIKE, with_empty=True)
    except Exception as error:  # OpenVINO's own classes, which derive from nothing narrower
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ValueError(
            f"packed: OpenVINO does not compute what {record.name} does ({lines[0][:200]}); {MEND}"
        ) from error
