"""`export_onnx`: a packed model as an ONNX file with low-bit weights, checked by running it.

ONNX Runtime by itself turns an 8-bit matrix into a product with 8-bit activations of its own, which adds about 0.03 of
relative error on MiniLM; the session option ``session.qdq_matmulnbits_accuracy_level`` = "1" makes it keep floats.

    >>> export_onnx(packed, "model.onnx")
    >>> onnxruntime.InferenceSession("model.onnx").run(None, {"input_ids": ids, "attention_mask": mask})
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from torch import nn

from qbert.extras import is_installed, require
from qbert.files import write_whole
from qbert.inference.forward import remove_fast_forwards
from qbert.runtimes.onnx import OnnxSession, onnx_twin, write_onnx
from qbert.runtimes.recorded import ALIKE, MEND, Recorded, check_packed, record_model


def export_onnx(
    packed: nn.Module,
    path: str | os.PathLike[str],
    *,
    inputs: Sequence[str] = ("input_ids", "attention_mask"),
    quantize_activations: bool = True,
) -> None:
    """Write a packed text encoder as an ONNX file with dynamic batch and length, in float32 but for the packed tensors.

    The first output of the model keeps its name, by which Optimum looks for it: ``logits``, ``last_hidden_state``
    (float32 [B, ...]), ``start_logits`` and ``end_logits`` [B, T]; ``output`` if it has none. A ``SentenceTransformer``
    has ``sentence_embedding`` [B, D], after pooling and all further modules, and ``token_embeddings`` [B, T, H]; for
    its ``backend="onnx"``, which pools outside of the file, export the transformers model inside of it. A
    ``CrossEncoder`` has ``logits``, before its activation function; other models of that library the first they have of
    ``sentence_embedding`` and ``token_embeddings``.

    The steps of the model are recorded at one length and replayed at others before a file is written; then ONNX Runtime
    runs the file, where it is installed. A model that computes something else at another length, as models do that cut
    long texts into blocks, is refused.

    Args:
        packed: what `qbert.pack`, `qbert.load` or ``from_pretrained`` returned, on the CPU, in any dtype. It is left
            alone; if it was optimized for inference, the export is that of the packed model.
        path: file to write.
        inputs: names of the int64 [B, T] inputs, out of those of the model's forward.
        quantize_activations: quantize them as the packed model does; if not, ONNX Runtime multiplies floats, which
            is faster and differs from the packed model by the rounding that it leaves out.

    Raises:
        ValueError: if the model has no packed layer, is not on the CPU, cannot be called with these inputs, or cannot
            be written as one graph for all lengths.
        TypeError: if it is not a torch module.
        ImportError: if the package ``onnx`` is not installed.
    """
    check_packed(packed)
    require("onnx", "export_onnx")
    model = deepcopy(packed).eval().to(torch.float32)
    remove_fast_forwards(model)
    record = record_model(model, partial(onnx_twin, quantize_activations=quantize_activations), inputs)

    def write_checked(aside: Path) -> None:
        write_onnx(record, aside)
        _check_file(record, aside)

    write_whole(path, write_checked)


def _check_file(record: Recorded, path: Path) -> None:
    """Refuse a file that ONNX Runtime cannot run, or from which it computes something else."""
    if not is_installed("onnxruntime"):
        warnings.warn(
            "export_onnx: the file was written but not run, because onnxruntime is not installed; compare it with the "
            "packed model where it will run",
            stacklevel=5,
        )
        return
    try:
        record.check_replay(OnnxSession(record.inputs, record.outputs, path), ALIKE)
    except Exception as error:  # ONNX Runtime's own classes, which derive from nothing narrower
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"packed: ONNX Runtime does not compute what {record.name} does ({reason}); {MEND}") from error
