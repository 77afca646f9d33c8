"""Packed models as ONNX files: low-bit weights for ONNX Runtime, with the outputs of the packed model.

Matrices of up to 4 bits become ``MatMulNBits`` (2- or 4-bit codes in blocks of input columns that share the scale of
their row); 8-bit ones int8 initializers behind ``DequantizeLinear``; tables int8 initializers of which only the rows
that are looked up are dequantized. Activations are quantized by standard operators exactly as the packed model does,
or left in float. ONNX Runtime by itself turns an 8-bit matrix into a product with 8-bit activations of its own, which
adds about 0.03 of relative error on MiniLM; the session option ``session.qdq_matmulnbits_accuracy_level`` = "1" makes
it keep floats.

    >>> export_onnx(packed, "model.onnx")
    >>> onnxruntime.InferenceSession("model.onnx").run(None, {"input_ids": ids, "attention_mask": mask})

Reference: ONNX operator DequantizeLinear (opset 13 and later); ONNX Runtime contrib operator
com.microsoft.MatMulNBits.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qbert.encoders.replace import replace_everywhere
from qbert.encoders.targets import base_model
from qbert.files import write_whole
from qbert.inference.forward import remove_fast_forwards
from qbert.layers.embedding import PackedEmbedding
from qbert.layers.linear import PackedLinear
from qbert.layers.packed import PackedTensor, check_module
from qbert.layers.transposed import PackedTransposed
from qbert.quantizers.activations import token_range, token_scale
from qbert.quantizers.grid import code_range

_OPSET = 18


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
    check_module("packed", packed)
    layers = [m for m in packed.modules() if isinstance(m, PackedTensor)]
    if not layers:
        raise ValueError(f"packed: {type(packed).__name__} has no packed layer; call qbert.pack first")
    if any(layer.owner.codes.device.type != "cpu" for layer in layers):  # type: ignore[union-attr]
        raise ValueError("packed: the model is not on the CPU; move it with .to('cpu')")
    if importlib.util.find_spec("onnx") is None:
        raise ImportError("export_onnx needs the package onnx, which is not installed; run: pip install onnx")
    model = deepcopy(packed).eval().to(torch.float32)
    remove_fast_forwards(model)
    _check_inputs(model, inputs)
    for module in [m for m in model.modules() if isinstance(m, PackedTensor)]:
        if isinstance(module, PackedEmbedding):
            twin: nn.Module = OnnxTable(module)
        elif type(module) in (PackedLinear, PackedTransposed):
            twin = onnx_linear(module, quantize_activations)
        else:
            raise ValueError(
                f"packed: {type(module).__name__} has no ONNX form yet; export a model without convolutions, or "
                "quantize with {'*': ..., '<its name>': 32} to leave it in float"
            )
        replace_everywhere(model, module, twin)
    graph = _Graph(model, inputs)
    axes = graph.name_outputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer names every place where it takes a value for a constant
        _check_record(graph)
    write_whole(path, lambda aside: _write_checked(graph, axes, aside))


def _write_checked(graph: _Graph, axes: dict[str, dict[int, str]], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter announces its successor, which has no symbolic operators
        try:
            torch.onnx.export(
                graph.copy(),
                graph.example(*_RECORDED),
                str(path),
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                dynamic_axes=axes,
                opset_version=_OPSET,
                dynamo=False,
                custom_opsets={"com.microsoft": 1} if any(isinstance(m, _OnnxNBits) for m in graph.modules()) else {},
            )
        except (RuntimeError, TypeError, ValueError, IndexError) as error:  # an operator that ONNX lacks, for instance
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"packed: {graph.name} cannot be written as an ONNX file ({reason[:200]}); {_MEND}"
            ) from error
    _check_file(graph, path)


def _check_inputs(model: nn.Module, inputs: Sequence[str]) -> None:
    called = base_model(model)[1] if _is_sentence_model(model) else model
    taken = list(inspect.signature(called.forward).parameters)
    wrong = [inputs] if isinstance(inputs, str) else [name for name in inputs if name not in taken]
    if wrong or not inputs:
        raise ValueError(
            f"inputs: {wrong[0] if wrong else inputs!r} is not among the inputs of {type(called).__name__}; give a "
            f"list of some of {', '.join(taken)}"
        )


def _is_sentence_model(model: nn.Module) -> bool:
    """Whether it is one of sentence-transformers: a sequence of modules from a dict of features to another."""
    return isinstance(model, nn.Sequential) and type(model).__module__.startswith("sentence_transformers.")


# What modules of sentence-transformers call their results: its name in a file.
_FEATURES = {"sentence_embedding": "sentence_embedding", "scores": "logits", "token_embeddings": "token_embeddings"}


_RECORDED = 2, 9  # batch and length at which the model is recorded
_OTHERS = (3, 5), (1, 33), (2, 64), (1, 130), (1, 520)
_LONGEST = 2048  # of models that take more; those that cut texts into blocks do so from fewer tokens on
_SAME, _ALIKE = 1e-3, 0.25  # relative errors: of one computation; of one whose activations may round to other codes
_MEND = "run it in torch (qbert.optimize_for_inference), or export a model of another family"


class _Graph(nn.Module):
    """A model as a function of its named inputs: int64 [B, T] each, to a tuple of its named outputs."""

    def __init__(self, model: nn.Module, inputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.inputs, self.name = model, tuple(inputs), type(model).__name__
        self.sentences = _is_sentence_model(model)
        self.outputs: tuple[str, ...] = ()
        self.keys: tuple[str, ...] = ()  # of the outputs in what the model returns

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs, values, strict=True))
        result = self.model(given) if self.sentences else self.model(**given)
        if isinstance(result, Mapping):
            return tuple(result[key] for key in self.keys)
        return (result if isinstance(result, Tensor) else result[0],)

    def copy(self, quantize_activations: bool = True) -> _Graph:
        """A copy that shares all tensors, for one run: BigBird leaves its kind of attention changed by a short text."""
        tensors = {id(t): t for t in (*self.parameters(), *self.buffers())}
        twin = deepcopy(self, dict(tensors)).eval()
        for module in twin.modules():
            if isinstance(module, _OnnxInput) and not quantize_activations:
                module.mode = module.static = None
        return twin

    def example(self, batch: int, length: int) -> tuple[Tensor, ...]:
        """Inputs [batch, length]; the last sequence of several is padded to a third of its length."""
        ids = torch.arange(batch * length, device="cpu").view(batch, length) % 7
        mask = torch.ones_like(ids)
        if batch > 1:  # a mask of ones would be traced away
            mask[-1, length * 2 // 3 :] = 0
        return tuple(mask if "mask" in n else torch.zeros_like(ids) if "type" in n else ids for n in self.inputs)

    def name_outputs(self) -> dict[str, dict[int, str]]:
        """Find out the names of the outputs; returns the axes of varying size of inputs and outputs."""
        try:
            with torch.no_grad():
                self.keys = self._first_results()
                self.outputs = tuple(_FEATURES.get(key, key) for key in self.keys) or ("output",)
                long, short = (self.copy()(*self.example(*shape)) for shape in (_RECORDED, _OTHERS[0]))
        except Exception as error:  # whatever the forward of an unknown model may raise
            raise ValueError(
                f"packed: {self.name} cannot be called with {', '.join(self.inputs)} of shape [batch, length] "
                f"({type(error).__name__}: {error}); export a text encoder, such as the one inside "
                "of it, or name other inputs"
            ) from error
        axes = {name: {0: "batch", 1: "length"} for name in self.inputs}
        for name, one, other in zip(self.outputs, long, short, strict=True):
            axes[name] = {0: "batch"} | {d: "length" for d in range(1, one.dim()) if one.shape[d] != other.shape[d]}
        return axes

    def _first_results(self) -> tuple[str, ...]:
        """What the first output is called in the results of the model, and what belongs to it."""
        given = dict(zip(self.inputs, self.example(*_RECORDED), strict=True))
        result = self.copy().model(given) if self.sentences else self.copy().model(**given)
        if not isinstance(result, Mapping):
            return ()
        if self.sentences:
            return tuple(key for key in _FEATURES if key in result)[: 2 if self.name == "SentenceTransformer" else 1]
        return ("start_logits", "end_logits") if "start_logits" in result else tuple(result)[:1]

    def shapes(self) -> Iterator[tuple[int, int]]:
        """Batches and lengths to compare at, up to the longest text that the model says it takes."""
        config = getattr(base_model(self.model)[1], "config", None)
        longest = min(getattr(config, "max_position_embeddings", None) or _LONGEST, _LONGEST)
        longest -= 2  # RoBERTa's count from 2
        yield from (shape for shape in (_RECORDED, *_OTHERS) if shape[1] < longest)
        yield 1, longest

    def expected(self, shape: tuple[int, int], quantize_activations: bool) -> tuple[Tensor, ...] | None:
        """What the model computes in torch; ``None`` where it refuses so long a text."""
        try:
            with torch.no_grad():
                return self.copy(quantize_activations)(*self.example(*shape))
        except (RuntimeError, IndexError, ValueError):
            if shape[1] <= _RECORDED[1]:
                raise
            return None


def _check_record(graph: _Graph) -> None:
    """Refuse a model whose steps, recorded at one length, are not its steps at another."""
    with torch.no_grad():
        record = torch.jit.trace(graph.copy(False), graph.example(*_RECORDED), strict=False, check_trace=False)
    for shape in graph.shapes():
        wanted = graph.expected(shape, False)
        if wanted is None:
            continue
        try:
            with torch.no_grad(), torch.jit.optimized_execution(False):
                error = _error(record(*graph.example(*shape)), wanted)
            problem = "" if error <= _SAME else f"relative error {error:.2g}"
        except RuntimeError as failure:
            problem = str(failure).strip().splitlines()[-1]
        if problem:
            raise ValueError(
                f"packed: {graph.name} takes other steps for {shape[1]} tokens than for {_RECORDED[1]} ({problem}), "
                f"and an ONNX file takes the same for all lengths; {_MEND}"
            )


def _check_file(graph: _Graph, path: Path) -> None:
    """Refuse a file that ONNX Runtime cannot run, or from which it computes something else."""
    if importlib.util.find_spec("onnxruntime") is None:
        warnings.warn(
            "export_onnx: the file was written but not run, because onnxruntime is not installed; compare it with the "
            "packed model where it will run",
            stacklevel=5,
        )
        return
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = {put.name for put in session.get_inputs()}  # an input that the model never reads is none of the file's
        for shape in graph.shapes():
            wanted = graph.expected(shape, True)
            if wanted is None:
                continue
            given = dict(zip(graph.inputs, graph.example(*shape), strict=True))
            found = session.run(list(graph.outputs), {n: v.numpy() for n, v in given.items() if n in names})
            error = _error(tuple(map(torch.from_numpy, found)), wanted)
            if not error <= _ALIKE:
                raise ValueError(f"relative error {error:.2g} for {shape[1]} tokens")
    except Exception as error:  # ONNX Runtime's own classes, which derive from nothing narrower
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"packed: ONNX Runtime does not compute what {graph.name} does ({reason}); {_MEND}") from error


def _error(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """The largest relative error of the outputs; infinite for other shapes or values that are not finite."""
    pairs = list(zip(found, wanted, strict=True))
    if any(a.shape != b.shape or not bool(torch.isfinite(a).all()) for a, b in pairs):
        return math.inf
    return max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs)


_LARGEST_BLOCK, _SMALLEST_BLOCK = 256, 16  # what MatMulNBits takes


def onnx_linear(layer: nn.Module, quantize_activations: bool) -> nn.Module:
    """The twin of a `PackedLinear`: MatMulNBits where its codes fit, else DequantizeLinear, else floats.

    Both operators know integer zero points only. What a real one is off its nearest integer, times the scale, is an
    offset of all weights of a row, so it comes back as the sum of the inputs times that.
    """
    assert isinstance(layer, PackedLinear)
    scale, zero = layer.row_grids()
    codes = layer.int_codes().to(torch.int32)
    whole = zero.round().clamp(int(codes.min()), int(codes.max())) if layer.spec.scheme == "offset" else zero.round()
    offset = None if torch.equal(zero, whole) else scale * (whole - zero)
    block = _block(layer.columns // layer.layout.input_groups)
    for bits in (2, 4):
        half = 1 << (bits - 1)
        shift = 0 if bits == 4 and int(codes.min()) >= -half else _centre(codes, whole, bits)
        q, z = codes - shift, whole - shift
        fits = -half <= min(int(q.min()), int(z.min())) and max(int(q.max()), int(z.max())) < half
        if fits and block and layer.layout.bits < 8:
            grids = scale, z.to(torch.int32) + half
            return _OnnxNBits(layer, q + half, *grids, offset, bits, block, quantize_activations)
    return _OnnxLinear(layer, codes, scale, whole, offset, quantize_activations)


def _centre(codes: Tensor, zero: Tensor, bits: int) -> int:
    """The offset that puts the lowest code or zero at the lowest code of `bits` bits."""
    return min(int(codes.min()), int(zero.min())) + (1 << (bits - 1))


def _block(columns: int) -> int:
    """The largest block size of MatMulNBits that divides a run of columns with one scale; 0 if none does."""
    block = _LARGEST_BLOCK
    while block >= _SMALLEST_BLOCK and columns % block:
        block //= 2
    return block if block >= _SMALLEST_BLOCK else 0


class _OnnxInput(nn.Module):
    """Fake quantization of a layer's input in operators that ONNX has."""

    offset: Tensor | None

    def __init__(self, layer: PackedLinear, enabled: bool, offset: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("offset", None if offset is None else offset.T.contiguous())  # [K, O]
        activation = layer.activation_quantizer if enabled else None
        self.mode = None if activation is None else activation.mode
        self.low, self.high = code_range(layer.spec.activation_bits or 8)
        self.static: tuple[float, float] | None = None
        if enabled and layer.input_scale is not None and layer.input_zero is not None:
            self.static = float(layer.input_scale), float(layer.input_zero)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().float())

    def quantize(self, x: Tensor) -> Tensor:
        if self.mode == "asymmetric":
            low, scale = token_range(x, self.high - self.low)
            return torch.round((x - low) / scale) * scale + low
        if self.mode is not None:
            scale = token_scale(x, self.high)
            return torch.round(x / scale) * scale
        if self.static is not None:
            scale_, zero = self.static
            return (torch.clamp(torch.round(x / scale_ + zero), self.low, self.high) - zero) * scale_
        return x

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        """The product `y` [..., O] of the quantized input `x` [..., I] with offsets and bias added."""
        if self.offset is not None:
            y = y + x.unflatten(-1, (self.offset.shape[0], -1)).sum(-1) @ self.offset
        return y if self.bias is None else y + self.bias


class _OnnxNBits(_OnnxInput):
    """A matrix as MatMulNBits: unsigned codes [O, I] of 2 or 4 bits, lowest first in a byte."""

    def __init__(
        self,
        layer: PackedLinear,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor,
        offset: Tensor | None,
        bits: int,
        block: int,
        quantize: bool,
    ) -> None:
        super().__init__(layer, quantize, offset)
        self.bits, self.block = bits, block
        rows, columns = codes.shape
        self.shape = rows, columns
        blocks = columns // block
        spread = blocks // scale.shape[1]
        self.register_buffer("codes", _bytes(codes, bits).view(rows, blocks, -1))
        self.register_buffer("scale", scale.repeat_interleave(spread, 1).reshape(-1).contiguous())
        self.register_buffer("zero", _bytes(zero.repeat_interleave(spread, 1), bits).reshape(-1))
        self.register_buffer("weight", layer.quantized_weight().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantize(x)
        y = _MatMulNBits.apply(x, self.codes, self.scale, self.zero, self.weight, *self.shape, self.bits, self.block)
        return self.finish(y, x)


class _MatMulNBits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor, *sizes: int) -> Tensor:
        return x @ weight.T

    @staticmethod
    def symbolic(
        g: Any, x: Any, codes: Any, scale: Any, zero: Any, weight: Any, rows: int, columns: int, bits: int, block: int
    ) -> Any:
        y = g.op(
            "com.microsoft::MatMulNBits",
            x,
            codes,
            scale,
            zero,
            K_i=columns,
            N_i=rows,
            bits_i=bits,
            block_size_i=block,
        )
        rank = x.type().dim()
        # Without a type the exporter warns, once a matrix; lengths stay open.
        return y if rank is None else y.setType(x.type().with_sizes([*[None] * (rank - 1), rows]))


class _OnnxLinear(_OnnxInput):
    """A matrix as int8 codes behind DequantizeLinear, or in float where input groups do not allow that."""

    def __init__(
        self, layer: PackedLinear, codes: Tensor, scale: Tensor, zero: Tensor, offset: Tensor | None, quantize: bool
    ) -> None:
        self.plain = scale.shape[1] > 1
        super().__init__(layer, quantize, None if self.plain else offset)
        self.register_buffer("weight", layer.quantized_weight().float())
        if not self.plain:
            self.register_buffer("codes", codes.to(torch.int8))
            self.register_buffer("scale", scale[:, 0].contiguous())
            self.register_buffer("zero", zero[:, 0].to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.plain else _Dequantize.apply(self.codes, self.scale, self.zero, self.weight)
        x = self.quantize(x)
        return self.finish(nn.functional.linear(x, weight), x)  # type: ignore[arg-type]


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor) -> Tensor:
        return weight.clone()

    @staticmethod
    def symbolic(g: Any, codes: Any, scale: Any, zero: Any, weight: Any) -> Any:
        return g.op("DequantizeLinear", codes, scale, zero, axis_i=0).setType(weight.type())


class OnnxTable(nn.Module):
    """A lookup table as int8 codes; the rows that are looked up are dequantized."""

    def __init__(self, table: PackedEmbedding) -> None:
        super().__init__()
        scale, zero = table.row_grids()
        self.groups = scale.shape[1]
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.padding_idx = table.padding_idx
        self.register_buffer("codes", table.int_codes())
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero.to(torch.int8) if bool((zero == zero.round()).all()) else zero)

    @property
    def weight(self) -> Tensor:
        """The whole table in float32 [V, D], for forwards that look at its shape (CLIP) or read it."""
        return self.forward(torch.arange(self.num_embeddings, device="cpu"))

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [...] to float32 rows [..., D]."""
        rows = self.codes[ids].float().unflatten(-1, (self.groups, -1))  # type: ignore[index]
        zero = self.zero[ids].float().unsqueeze(-1)  # type: ignore[index]
        return (self.scale[ids].unsqueeze(-1) * (rows - zero)).flatten(-2)  # type: ignore[index]


def _bytes(values: Tensor, bits: int) -> Tensor:
    """Unsigned values [O, N] of `bits` bits, packed along N with the first in the lowest bits: uint8 [O, bytes]."""
    per_byte = 8 // bits
    padded = nn.functional.pad(values, (0, -values.shape[1] % per_byte)).view(values.shape[0], -1, per_byte)
    return (padded << (torch.arange(per_byte, device=values.device) * bits)).sum(2).to(torch.uint8)
