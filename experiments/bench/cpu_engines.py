"""The engines of `experiments/bench/inference.py`: how each is made of a float encoder, and what it needs.

It stands alone because `inference.py` measures whatever is here. An engine is a function of token ids and mask; `World`
keeps what several of them are made of, on disk and in memory, for all numbers of threads.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import qbert
from qbert.kernels.cpu.gemm import available_engine, saturates
from qbert.runtimes.onnx import OnnxSession
from qbert.runtimes.openvino import OpenVinoSession, openvino_model
from qbert.runtimes.recorded import record_model

Engine = Callable[[Tensor, Tensor], Tensor]
_NAMES = ("input_ids", "attention_mask")


class NotMeasured(Exception):  # noqa: N818 (nothing went wrong)
    """Why an engine is not among those measured."""


class Row(NamedTuple):
    """An engine of the table.

    name: in the table; make: for a number of threads; file: what stands for it on disk once it was made, if anything;
    probe: the kind of `cpu_memory.py` that loads this file.
    """

    name: str
    make: Callable[[int], Engine]
    file: Path | None = None
    probe: str = ""


class World:
    """A float encoder and what engines are made of.

    Args:
        model: float, in eval mode.
        tokenizer: saved beside the model, for those who convert a folder.
        folder: where files are written.
        bits, activations, forced: as on the command line of `inference.py`.
        torch_only, compiled: leave other runtimes out; add torch.compile.
        calibration: ids and mask of some texts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        folder: Path,
        bits: list[int],
        activations: list[str],
        forced: list[str],
        torch_only: bool,
        compiled: bool,
        calibration: tuple[Tensor, Tensor],
    ) -> None:
        self.model, self.tokenizer, self.folder = model, tokenizer, folder
        self.bits, self.activations, self.forced = bits, activations, forced
        self.torch_only, self.compiled, self.calibration = torch_only, compiled, calibration
        self._packed: dict[tuple[int, str], Any] = {}

    def rows(self) -> list[Row]:
        """The engines, the most telling first."""
        saved = self.folder / "float"
        rows = [
            Row("torch fp32", self._float, saved, "torch"),
            Row("model.bfloat16()", lambda threads: as_engine(copy.deepcopy(self.model).bfloat16()), saved, "bf16"),
        ]
        for bits in self.bits:
            for ranges in reversed(self.activations):
                rows += self._ours(bits, ranges)
        rows += [
            Row("OpenVINO bf16", functools.partial(self._openvino, "bf16"), self.folder / "ov.xml", "openvino"),
            Row("CTranslate2 int8", self._ctranslate2, self.folder / "ct2", "ctranslate2"),
            Row("ONNX Runtime dynamic int8", self._onnx_int8, self.folder / "int8.onnx", "onnx"),
        ]
        for bits in self.bits:
            path = self.folder / f"ours-{bits}.xml"
            make = functools.partial(self._our_openvino, bits, path)
            rows.append(Row(f"OpenVINO, qbert's {bits}-bit weights", make, path, "openvino"))
        path = self.folder / "ours-4.onnx"
        if 4 in self.bits:
            rows.append(
                Row("ONNX Runtime, qbert's 4-bit weights", functools.partial(self._our_onnx, path), path, "onnx")
            )
        rows += [
            Row("OpenVINO fp32", functools.partial(self._openvino, "f32"), self.folder / "ov.xml", ""),
            Row("OpenVINO, nncf int8", self._nncf, self.folder / "nncf.xml", "openvino"),
            Row("ONNX Runtime fp32", self._onnx_float, self.folder / "fp32.onnx", "onnx"),
            Row("torch dynamic int8", lambda threads: as_engine(self._dynamic())),
            Row("torchao int8", self._torchao),
            Row("torch.compile, bfloat16", self._compiled),
        ]
        return rows

    def packed(self, bits: int, ranges: str) -> Any:
        """The packed model, made once."""
        if (bits, ranges) not in self._packed:
            # Random weights are measured for time alone, and ranges by least squares take longer than all the rest.
            method = "minmax" if getattr(self.model, "weights_are_random", False) else "mse"
            config = qbert.BitsConfig(bits, activation_range=ranges, range_method=method)  # type: ignore[arg-type]
            self._packed[bits, ranges] = qbert.pack(qbert.quantize_model(self.model, config))
        return self._packed[bits, ranges]

    def _ours(self, bits: int, ranges: str) -> list[Row]:
        name = f"qbert {bits}-bit" + (", asymmetric" if ranges == "asymmetric" else "")
        path = self.folder / name

        def make(threads: int, **options: Any) -> Engine:
            packed = self.packed(bits, ranges)
            if not path.exists():
                packed.save_pretrained(path)
            return as_engine(qbert.optimize_for_inference(packed, skip_padding=True, **options))

        rows = [Row(name, make, path, "qbert")]
        for forced in self.forced if bits == max(self.bits) else ():
            rows.append(Row(f"{name}, engine={forced}", functools.partial(make, engine=forced)))
        if bits == 8 and saturates(available_engine()):
            rows.append(Row(f"{name}, exact=False", functools.partial(make, exact=False)))
        return rows

    def _need(self, *packages: str) -> None:
        if self.torch_only:
            raise NotMeasured("left out on request")
        for package in packages:
            if importlib.util.find_spec(package) is None:
                raise NotMeasured(f"not installed: pip install {package}")

    def _float(self, threads: int) -> Engine:
        self.model.save_pretrained(self.folder / "float")
        return as_engine(self.model)

    def _record(self, model: Any) -> Any:
        def no_twin(module: nn.Module) -> nn.Module:
            raise TypeError(type(module).__name__)

        return record_model(copy.deepcopy(model), no_twin, _NAMES)

    def _openvino(self, precision: str, threads: int) -> Engine:
        self._need("openvino")
        import openvino

        path = self.folder / "ov.xml"
        if not path.exists():
            openvino.save_model(openvino_model(self._record(self.model)), path, compress_to_fp16=False)
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
        return from_session(OpenVinoSession(1, path, settings))

    def _our_openvino(self, bits: int, path: Path, threads: int) -> Engine:
        self._need("openvino")
        if not path.exists():
            qbert.export_openvino(self.packed(bits, self.activations[-1]), path, quantize_activations=False)
        return from_session(OpenVinoSession(1, path, {"INFERENCE_NUM_THREADS": threads}))

    def _nncf(self, threads: int) -> Engine:
        self._need("openvino", "nncf")
        import nncf
        import openvino

        path = self.folder / "nncf.xml"
        if not path.exists():
            ids, mask = self.calibration
            batches = [(ids[i : i + 1].numpy(), mask[i : i + 1].numpy()) for i in range(len(ids))]
            model = openvino_model(self._record(self.model))
            kind = nncf.ModelType.TRANSFORMER
            quantized = nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches), model_type=kind)
            openvino.save_model(quantized, path, compress_to_fp16=False)
        return from_session(OpenVinoSession(1, path, {"INFERENCE_NUM_THREADS": threads}))

    def _onnx_path(self) -> Path:
        self._need("onnx", "onnxruntime")
        from qbert.runtimes.onnx import write_onnx

        path = self.folder / "fp32.onnx"
        if not path.exists():
            write_onnx(self._record(self.model), path)
        return path

    def _onnx_float(self, threads: int) -> Engine:
        return from_session(OnnxSession(_NAMES, ["last_hidden_state"], self._onnx_path(), threads))

    def _onnx_int8(self, threads: int) -> Engine:
        from_float, path = self._onnx_path(), self.folder / "int8.onnx"
        from onnxruntime.quantization import QuantType, quantize_dynamic

        if not path.exists():
            quantize_dynamic(str(from_float), str(path), weight_type=QuantType.QInt8, per_channel=True)
        return from_session(OnnxSession(_NAMES, ["last_hidden_state"], path, threads))

    def _our_onnx(self, path: Path, threads: int) -> Engine:
        self._need("onnx", "onnxruntime")
        if not path.exists():
            qbert.export_onnx(self.packed(4, self.activations[-1]), path, quantize_activations=False)
        return from_session(OnnxSession(_NAMES, ["last_hidden_state"], path, threads))

    def _ctranslate2(self, threads: int) -> Engine:
        self._need("ctranslate2")
        import ctranslate2
        import numpy as np
        from ctranslate2.converters import TransformersConverter

        path = self.folder / "ct2"
        if not path.exists():
            with tempfile.TemporaryDirectory() as source:
                self.model.save_pretrained(source)
                self.tokenizer.save_pretrained(source)
                config = Path(source, "config.json")
                # The converter reads a setting that transformers 5 no longer writes.
                content = {**json.loads(config.read_text()), "position_embedding_type": "absolute"}
                config.write_text(json.dumps(content))
                TransformersConverter(source).convert(str(path), quantization="int8")
        encoder = ctranslate2.Encoder(
            str(path), device="cpu", inter_threads=1, intra_threads=threads, compute_type="int8"
        )

        def run(ids: Tensor, mask: Tensor) -> Tensor:
            views = (ctranslate2.StorageView.from_array(v.to(torch.int32).numpy()) for v in (ids, mask.sum(1)))
            return torch.from_numpy(np.array(encoder.forward_batch(*views).last_hidden_state))

        return run

    def _dynamic(self) -> Any:
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(self.model), {nn.Linear}, dtype=torch.qint8)

    def _torchao(self, threads: int) -> Engine:
        self._need("torchao")
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = copy.deepcopy(self.model)
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        return as_engine(model)

    def _compiled(self, threads: int) -> Engine:
        if not self.compiled:
            raise NotMeasured("ask with --compile")
        return as_engine(torch.compile(copy.deepcopy(self.model).bfloat16(), dynamic=True))


def as_engine(model: Any) -> Engine:
    """A torch model as a function of ids and mask to float32."""

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(input_ids=ids, attention_mask=mask)[0].float()  # type: ignore[no-any-return]

    run.model = model  # type: ignore[attr-defined]
    return run


def from_session(session: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]) -> Engine:
    """A runtime's session as a function of ids and mask to its first output."""
    return lambda ids, mask: session((ids, mask))[0]


def megabytes(path: Path) -> float:
    """Size of a model on disk: a file with weights, a folder of them, or both files of an OpenVINO model."""
    if path.is_dir():
        kinds = (".safetensors", ".bin")
        return sum(file.stat().st_size for file in path.iterdir() if file.suffix in kinds) / 1e6
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
    return sum(file.stat().st_size for file in files) / 1e6
