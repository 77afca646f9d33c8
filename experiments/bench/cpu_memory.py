"""Seconds to load one model and peak memory of a process that does nothing but run it; `inference.py` starts it.

    python experiments/bench/cpu_memory.py openvino model.xml
    {"load_s": 0.08, "peak_mb": 131.2}

It stands alone because a process that is measured must import no more than its runtime.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    """Load, run eight texts of 32 tokens, print one line of JSON."""
    import numpy as np

    kind, path = sys.argv[1:]
    open_model = LOADERS[kind]()
    ids = np.full((8, 32), 5, dtype=np.int64)
    start = time.perf_counter()
    run = open_model(path)
    loaded = time.perf_counter() - start
    run(ids, np.ones_like(ids))
    # Not getrusage, which counts the process that this one was started from too.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) / 1e3
    print(json.dumps({"load_s": round(loaded, 3), "peak_mb": round(peak, 1)}))


def _torch(bfloat16: bool = False, ours: bool = False) -> Callable[[str], Any]:
    import torch
    from transformers import AutoModel

    torch.set_num_threads(1)
    if ours:
        import qbert

    def open_model(path: str) -> Any:
        if ours:
            model = qbert.optimize_for_inference(qbert.load(path), inplace=True, skip_padding=True)
        else:
            model = AutoModel.from_pretrained(path, dtype=torch.bfloat16 if bfloat16 else torch.float32).eval()

        def run(ids: Any, mask: Any) -> None:
            with torch.inference_mode():
                model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))

        return run

    return open_model


def _onnx() -> Callable[[str], Any]:
    import onnxruntime

    def open_model(path: str) -> Any:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})

    return open_model


def _openvino() -> Callable[[str], Any]:
    import openvino

    def open_model(path: str) -> Any:
        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1})
        return lambda ids, mask: compiled([ids, mask])

    return open_model


def _ctranslate2() -> Callable[[str], Any]:
    import ctranslate2
    import numpy as np

    def open_model(path: str) -> Any:
        encoder = ctranslate2.Encoder(path, device="cpu", intra_threads=1, compute_type="int8")

        def run(ids: Any, mask: Any) -> None:
            views = (ctranslate2.StorageView.from_array(v.astype(np.int32)) for v in (ids, mask.sum(1)))
            encoder.forward_batch(*views)

        return run

    return open_model


LOADERS: dict[str, Callable[[], Callable[[str], Any]]] = {
    "torch": _torch,
    "bf16": lambda: _torch(bfloat16=True),
    "qbert": lambda: _torch(ours=True),
    "onnx": _onnx,
    "openvino": _openvino,
    "ctranslate2": _ctranslate2,
}

if __name__ == "__main__":
    main()
