"""Fast inference of packed encoders on a CPU: int8 matrix products, one input quantization for Q, K and V, no padding.

`optimize_for_inference` prepares every packed layer for the products of `qbert.kernels.cpu`, by the engine that is
fastest on this machine (`qbert.inference.engines`). Encoders of the BERT kind (BERT, RoBERTa, XLM-R, ELECTRA,
CamemBERT, DistilBERT, MPNet, ALBERT), MobileBERT, DeBERTa-v2, ModernBERT and ViT get more: Q, K and V are one product,
and all layers run as one program, the native library (`qbert.kernels.cpu.native`) or torch's operators
(`qbert.inference.cpu_layers`). The first takes sequences of any lengths without padding between them. For the second,
sequences run in chunks that stay in the cache; where nobody reads the outputs of padding they are sorted by length and
each chunk is cut to its longest member, so that padding costs next to nothing. A layer that does not fit runs between
the others in its own way (`qbert.inference.cpu`).

    >>> fast = optimize_for_inference(packed)
    >>> fast(**tokenizer(texts, padding=True, return_tensors="pt"))

Every layer computes what the packed layer does up to float rounding. A whole model may differ by more: now and then a
value on the border between two int8 codes falls to the other side, and what follows rounds differently, so the two
outputs differ by about the error that quantized activations have anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from copy import copy, deepcopy
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qbert.arguments import is_whole
from qbert.encoders.copied import CopiedParameters
from qbert.encoders.inputs import most_tokens
from qbert.encoders.parts import LayerParts
from qbert.encoders.targets import base_model
from qbert.inference.chosen import ChosenLayers, ChosenLinear, can_choose
from qbert.inference.cpu_base import (
    LAYERS_IN_BASE,
    FusedWholeModel,
    reason_not_in_base,
    rotation_of,
    run_alone_in_base,
)
from qbert.inference.cpu_deberta import (
    FusedDeberta,
    is_deberta,
    positions_of,
    reason_not_deberta,
    reason_not_layer,
    run_alone_in_deberta,
    seen_in_pairs,
)
from qbert.inference.cpu_model import FusedModel, tokens_before_padding
from qbert.inference.engines import RUNTIMES, check_engine
from qbert.inference.fits import reason_not_four_products, reason_not_to_fuse_layer
from qbert.inference.forward import (
    FastForward,
    freeze,
    is_recording,
    reason_not_to_replace,
    refuse_to_load,
    remove_fast_forwards,
    unchanged_by_failure,
)
from qbert.inference.runtime import run_elsewhere
from qbert.kernels.cpu.native import NativeLayers
from qbert.layers.packed import PackedTensor, check_module

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)
# Tokens per thread that run together. Small chunks cut padding well; without any, larger ones reuse weights more often.
_CHUNK_TOKENS, _FULL_CHUNK_TOKENS = 256, 512
_NOTHING_LEFT = -1e4  # added to a score, hides its key


@torch.inference_mode(False)  # tensors made in inference mode could be used nowhere else
def optimize_for_inference(
    packed: Model,
    *,
    inplace: bool = False,
    exact: bool = True,
    operands: str = "int8",
    skip_padding: bool | None = None,
    engine: str = "auto",
    warm_up: Sequence[tuple[int, int]] = (),
) -> Model:
    """A packed model that runs fast on the device it is on: a CPU, or a GPU (`qbert.inference.gpu`).

    On a CPU the operands are made here and kept beside the packed tensors: one byte a weight and int8 engine, two for
    "bf16" and four for "fp32" and for matrices that run in float, as is logged (float weights, activations that are not
    quantized, grouped input columns), and for small tables. The engine that multiplies is chosen by measurement, for
    each shape of layer and number of tokens (`qbert.inference.engines`); ``print`` of the result says which, and why.
    The model can still be saved, moved to another dtype, copied, and asked for hidden states or attentions, for which
    it takes the slow path. Hidden states are those of the packed model wherever a mask is 0 too (ColBERT's queries read
    them), unless padding is skipped. Where torch's operators do the work, TorchScript compiles the layers during the
    first two calls, a few tenths of a second. A layer that cannot be fused, such as one that was left in float, runs in
    its own way between those that can; where none can, all do. The log says which, and why.

    The parameters of the encoder are frozen (``requires_grad`` off), since a wanted gradient leads to the slow path;
    those of a head are not. Hooks on modules inside of a fused layer are not called. Weights can no longer be loaded
    into the model, since the operands would stay the old ones; for the same reason calls raise RuntimeError after a
    bias, a norm or another parameter that was copied has got other values (in place, by ``parameter.data = ...`` or as
    a new parameter), until this function is called again. The next call notices if it has 128 tokens or more, or
    gradients are enabled, or the call before wanted some, as in a training; shorter ones, for which a look at every
    parameter would cost 5 % of their time, notice one time in 32. What is written in place through ``parameter.data``
    (``p.data.mul_(2)``) is never noticed: torch does not count it.

    Args:
        packed: what `qbert.pack`, `qbert.load` or ``from_pretrained`` returned, on the CPU or a CUDA device.
        inplace: prepare `packed` itself instead of a copy; where that is refused, it stays as it was.
        exact: compute what the packed layers do, whatever it takes. ``False`` lets 8-bit weights be rounded once more
            (`qbert.kernels.cpu.gemm.fit_pairs`) on CPUs that add int8 products in 16 bits, x86 without VNNI, where
            they run 1.2 to 1.4 times as fast then; the relative error of MiniLM's last hidden state goes from 0.050 to
            0.060 with asymmetric activation ranges. On other CPUs, on GPUs and for fewer bits it changes nothing.
        operands: what GPUs multiply. "int8" is what the packed layers do. "e4m3", on a GPU of compute capability 8.9
            or later, quantizes the inputs of products with weights of 2 to 4 bits to eight-bit floats instead, of the
            same range (weights stay exact; 8-bit weights keep int8 inputs). Triton overlaps loads with e4m3 products
            on sm_90, not with int8 ones; of sums of e4m3 products the chip keeps about 14 bits. From 4,096 tokens on
            weights of 2 to 4 bits are multiplied as they are unpacked, by the 8-bit product or, e4m3 on sm_90 and
            later, by cuBLASLt, for which they are held a second time, a byte each (the environment variable
            QBERT_WEIGHTS=packed saves that, =unpacked takes them for fewer tokens too). Outputs of e4m3 differ
            from the packed model's by about the error that quantized inputs have anyway, which is smaller: the relative
            error of MiniLM's last hidden state, weights in float, is 0.050 (e4m3) against 0.067 (int8) with one range
            a token, 0.052 against 0.197 with static ranges, but 0.038 with asymmetric int8 ranges a token, which e4m3
            does not have (64 sentences of STS-B).
        skip_padding: whether hidden states of padding on the right are zeros instead, which saves their whole cost on a
            CPU. ``None`` skips it where the model itself does not read it, so that its results stay the same: inside of
            transformers' models for sequence classification, and of a ``SentenceTransformer`` that pools its tokens.
            ``True`` is for those who take the hidden states of an encoder and read those of tokens only, as pooling
            by mask does. A batch with a row of nothing but padding is computed in full. On a GPU padding of any mask is
            skipped, or the batch is computed layer by layer.
        engine: on a CPU, "auto", or one of "native", "fbgemm", "onednn" (8-bit products, as the packed layers compute
            them), "bf16" and "fp32" (inputs are not rounded to 8 bits: nearer to the float model, farther from the
            packed one). "auto" takes the fastest, and one of the last two only if it is more than a twentieth faster.
            "openvino" and "onnxruntime" run the whole base model in that runtime, from low-bit weights (2 and 3 bits in
            4 in OpenVINO), which rounds inputs of products in its own way or not at all; heads stay in torch. They are
            taken where they are asked for only, compute no gradients, and do not skip padding.
        warm_up: shapes (batch, length) that are run three times each, so that no later call of them compiles anything
            or captures a CUDA graph: on a GPU the first run compiles kernels, the second captures the graph of batches
            of this shape without padding, on the stream that is current. Batches with padding share the graphs of
            about as many tokens as they have without it.

    Returns:
        A model of the same class with the same calls, in evaluation mode; a copy unless `inplace`.

    Raises:
        ValueError: for an engine that is unknown or cannot run on this machine, a flag that is none, or a shape that is
            not two positive numbers; if the model has no packed layer, is on another device, or on one that cannot
            multiply `operands` (a CPU takes "int8"), or computes something else in the runtime that was asked for;
            TypeError if it is not a torch module; MissingPackageError if the runtime is not installed.
    """
    check_module("packed", packed)
    for name, flag, known in (("exact", exact, (True, False)), ("skip_padding", skip_padding, (True, False, None))):
        if not any(flag is value for value in known):
            raise ValueError(f"{name}={flag!r} is not one of {', '.join(map(str, known))}; give one of these.")
    layers = [m for m in packed.modules() if isinstance(m, PackedTensor)]
    if not layers:
        raise ValueError(f"packed: {type(packed).__name__} has no packed layer; call qbert.pack first")
    devices = {layer.owner.codes.device for layer in layers}  # type: ignore[union-attr]
    if len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"packed: the model is on {names}; move it to the CPU or to one CUDA device with .to()")
    if operands != "int8" and next(iter(devices)).type == "cpu":
        raise ValueError(f"operands={operands!r} is for GPUs, and the model is on the CPU; use 'int8'.")
    on_gpu = next(iter(devices)).type == "cuda"
    if on_gpu and engine != "auto":
        raise ValueError(f"engine={engine!r} is for CPUs, and the model is on {next(iter(devices))}; use 'auto'.")
    if not on_gpu:
        check_engine(engine)
    shapes = _checked_shapes(warm_up, packed)
    model = packed if inplace else deepcopy(packed)
    with unchanged_by_failure(model):
        _optimize(model, exact, operands, skip_padding, engine, on_gpu)
        for batch, length in shapes:
            _run_three_times(base_model(model)[1], batch, length)
    return model


def _checked_shapes(warm_up: Any, packed: nn.Module) -> list[tuple[int, int]]:
    """`warm_up` as a list; ValueError for what is no list of shapes that `packed` can be run on."""
    base: Any = base_model(packed)[1]
    shapes = list(warm_up) if isinstance(warm_up, Iterable) and not isinstance(warm_up, str) else None
    if shapes is None or any(map(is_whole, shapes)):
        raise ValueError(f"warm_up: {warm_up!r} is not a list of shapes; give one or more, such as [(1, 16)].")
    if shapes and getattr(base, "main_input_name", "input_ids") != "input_ids":
        raise ValueError(
            f"warm_up: {type(base).__name__} reads {base.main_input_name}, not token ids; call it three times instead."
        )
    longest = most_tokens(packed, base)
    for shape in shapes:
        pair = isinstance(shape, Sequence) and len(shape) == 2
        if not pair or not all(is_whole(n) and n > 0 for n in shape):
            raise ValueError(f"warm_up: {shape!r} is not a batch and a length, such as (1, 16).")
        if longest and shape[1] > longest:
            raise ValueError(f"warm_up: {shape!r} has more tokens than the model reads, {longest}; use fewer.")
    return shapes


def _optimize(
    model: nn.Module, exact: bool, operands: str, skip_padding: bool | None, engine: str, on_gpu: bool
) -> None:
    """Prepare `model` itself; the arguments are those of `optimize_for_inference`, checked."""
    remove_fast_forwards(model)
    model.eval()
    base: Any = base_model(model)[1]
    freeze(base)
    for module in model.modules():
        if isinstance(module, PackedTensor):
            refuse_to_load(module)
    if engine in RUNTIMES:
        run_elsewhere(base, engine, bool(skip_padding))
        return
    skip = _never_reads_padding(model, base) if skip_padding is None else skip_padding
    if on_gpu:
        from qbert.inference.gpu import fuse_for_gpu

        fuse_for_gpu(model, operands, skip)
        return
    encoder = getattr(base, "encoder", None) or getattr(base, "transformer", None)  # so called by DistilBERT
    in_base = type(base).__name__ in LAYERS_IN_BASE
    if in_base:
        encoder = base
    reason = _reason_not_to_fuse(base, encoder)
    fused: set[int] = set()
    if encoder is not None and not reason:
        fused_encoder = FusedEncoder(encoder, exact, skip, engine)
        holder: Any = encoder
        forward: FastForward = fused_encoder
        if in_base or is_deberta(encoder):
            holder, forward = base, (FusedWholeModel if in_base else FusedDeberta)(base, fused_encoder)
        holder.forward, holder.extra_repr = forward, EngineReport(fused_encoder)
        altered = reason_not_to_replace([base])
        if altered:
            logger.info("%s keeps its own forward: %s", type(base).__name__, altered)
        elif holder is encoder and hasattr(base, "embeddings") and hasattr(encoder, "layer"):
            base.forward = FusedModel(base, fused_encoder.run, fused_encoder.cross_attention)  # type: ignore[method-assign]
        own_layers = _log_layers(type(base).__name__, encoder)
        fused = {id(m) for layer in layers_of(encoder) for m in layer.modules()}
        fused -= {id(m) for layer in own_layers for m in layer.modules()}
    else:
        logger.info("%s is not fused: %s; its layers run one by one", type(base).__name__, reason)
    for module in model.modules():
        if isinstance(module, PackedTensor) and id(module) not in fused:
            module.prepare(exact)
            if can_choose(module):
                module._fast = ChosenLinear(module, exact, engine)  # type: ignore[arg-type,assignment]


def _run_three_times(base: Any, batch: int, length: int) -> None:
    token = (1 + (getattr(base.config, "pad_token_id", 0) or 0)) % base.config.vocab_size
    ids = torch.full((batch, length), token, device=next(base.parameters()).device)
    for _ in range(3):
        base(input_ids=ids, attention_mask=torch.ones_like(ids))


class EngineReport:
    """What ``print`` shows of a fused encoder: the engine of each run of layers, and why."""

    def __init__(self, encoder: FusedEncoder) -> None:
        self._choices = [f"layer {s} in its own way" if isinstance(s, int) else str(s.choice) for s in encoder._stages]

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineReport:
        return self

    def __call__(self) -> str:
        """One line for each run of layers."""
        return "\n".join(f"fused layers: {text}" for text in self._choices)


class FusedEncoder(FastForward):
    """``forward`` of an encoder of the BERT kind, in int8 (not a module: it adds nothing to the state of the model).

    Args:
        encoder: module whose ``layer`` is a list of layers, some of which can be fused.
        exact, skip_padding, engine: as for `optimize_for_inference`.
    """

    own = ("encoder", "_copied")

    def __init__(self, encoder: Any, exact: bool = True, skip_padding: bool = False, engine: str = "auto") -> None:
        self.encoder, self.skip_padding = encoder, skip_padding
        self._stages = stages_of(encoder, exact, engine)
        self._copied = CopiedParameters(_copied_from(encoder))
        self._position_bias: Tensor | None = None
        self.cross_attention = any(hasattr(layer, "add_cross_attention") for layer in layers_of(encoder))

    def __call__(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """[B, T, H] to transformers' output with ``last_hidden_state`` [B, T, H]."""
        from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

        if not self._can_run(hidden_states, attention_mask, kwargs):
            self.doubt()
            return type(self.encoder).forward(self.encoder, hidden_states, attention_mask, **kwargs)
        if hasattr(self.encoder, _MAPPING):
            hidden_states = getattr(self.encoder, _MAPPING)(hidden_states)
        lengths = None
        if attention_mask is not None and self.skip_padding:
            lengths = _lengths(attention_mask, hidden_states.shape[:2])
        if attention_mask is not None and lengths is None:
            mask = attention_mask if attention_mask.dtype == torch.bool else attention_mask.float()
            self._copied.check(hidden_states.shape[0] * hidden_states.shape[1])
            result = self._outside(hidden_states, lambda x: self._run_chunks(x, mask))
        else:
            result = self.run(hidden_states, lengths)
        kind = BaseModelOutputWithPastAndCrossAttentions if self.cross_attention else BaseModelOutput
        return kind(last_hidden_state=result)

    def doubt(self) -> None:
        """Parameters may have other values from now on: gradients were wanted, or more than the fused layers give."""
        self._copied.doubt()

    def run(self, hidden_states: Tensor, lengths: Tensor | None) -> Tensor:
        """[B, T, H] and the tokens of each sequence, [B] int64 from 1 (None: all T), to [B, T, H] in its dtype.

        What stands behind the tokens of a sequence is padding, which nothing attends to.
        """
        self._copied.check(hidden_states.shape[0] * hidden_states.shape[1])
        longest = hidden_states.shape[1]
        native = self._native_layers(hidden_states)
        if native is not None:
            return self._outside(hidden_states, lambda x: self._run_ragged(native, x, lengths))
        if lengths is None or not bool((lengths < longest).any()):
            return self._outside(hidden_states, lambda x: self._run_chunks(x, None))
        if self.skip_padding:
            return self._outside(hidden_states, lambda x: self._run_sorted(x, lengths))
        keep = torch.arange(longest, device=lengths.device) < lengths[:, None]
        return self._outside(hidden_states, lambda x: self._run_chunks(x, keep[:, None, None]))

    def run_masked(self, hidden_states: Tensor, keep: Tensor) -> Tensor:
        """[B, T, H] to [B, T, H] in its dtype, where bool `keep` [B, T] says which tokens are seen."""
        self._copied.check(hidden_states.shape[0] * hidden_states.shape[1])
        return self._outside(hidden_states, lambda x: self._run_chunks(x, keep[:, None, None]))

    @staticmethod
    def _outside(hidden_states: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            # The layers are in int8 and float32 already, and their programs take nothing else.
            with torch.autocast("cpu", enabled=False):
                return FusedEncoder._outside(hidden_states, run)
        with torch.inference_mode():
            result = run(hidden_states.float())
        if torch.is_inference_mode_enabled() and hidden_states.dtype == torch.float32:
            return result
        # A copy made outside of inference mode, because tensors made inside cannot be used in training (of a head).
        return result.to(hidden_states.dtype) if hidden_states.dtype != torch.float32 else result.clone()

    def _can_run(self, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
        from transformers.utils.output_capturing import _active_collector

        wanted = ("encoder_hidden_states", "past_key_values", "output_hidden_states", "output_attentions")
        return (
            x.device.type == "cpu"
            and not (torch.is_grad_enabled() and self._wants_gradient(x))
            and not is_recording()
            and not any(kwargs.get(name) for name in wanted if not isinstance(kwargs.get(name), Tensor))
            and kwargs.get("return_dict") in (None, True)
            and not isinstance(kwargs.get("encoder_hidden_states"), Tensor)
            and (mask is None or _is_added_or_chosen(mask, x))
            and not _active_collector.get()
            and not self.encoder.training
        )

    def _wants_gradient(self, x: Tensor) -> bool:
        return x.requires_grad or any(p.requires_grad for p in self.encoder.parameters())

    def _native_layers(self, x: Tensor) -> NativeLayers | None:
        """The whole stack of layers, if the native engine runs it and no bias is added to its scores."""
        if len(self._stages) != 1 or isinstance(self._stages[0], int) or not x.numel():
            return None
        if hasattr(self.encoder, "relative_attention_bias"):
            return None
        return self._stages[0].native_at(x.shape[0] * x.shape[1])

    def _run_ragged(self, native: NativeLayers, x: Tensor, lengths: Tensor | None) -> Tensor:
        """x [B, T, H] in one call: only the tokens, if padding is skipped, else all, of which the first are seen."""
        batch, longest, width = x.shape
        whole = torch.full((batch,), longest, dtype=torch.int64, device=x.device)
        if lengths is None or not self.skip_padding:
            seen = whole if lengths is None else lengths
            return native.run(x.reshape(-1, width), whole, seen).view(x.shape)
        keep = torch.arange(longest, device=x.device) < lengths[:, None]
        result = torch.zeros_like(x)
        result[keep] = native.run(x[keep], lengths, lengths)
        return result

    def _run_chunks(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """All positions of x [B, T, H], a few sequences at a time; `mask` as for `_run`."""
        batch, length, _ = x.shape
        rows = max(_FULL_CHUNK_TOKENS * torch.get_num_threads() // max(length, 1), 1)
        if batch <= rows or not x.numel():
            return self._run(x, mask) if x.numel() else x
        result = torch.empty_like(x)
        for start in range(0, batch, rows):
            part = slice(start, start + rows)
            result[part] = self._run(x[part], mask if mask is None or mask.shape[0] == 1 else mask[part])
        return result

    def _run_sorted(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The first `lengths` [B] positions of x [B, T, H], at least one of each sequence; zeros for the others."""
        room = _CHUNK_TOKENS * torch.get_num_threads()
        order = lengths.argsort(descending=True)
        result = torch.zeros_like(x)
        start = 0
        while start < len(order):
            length = int(lengths[order[start]])
            rows = order[start : start + max(room // length, 1)]
            start += len(rows)
            keep = torch.arange(length, device=x.device) < lengths[rows, None]  # [b, t]
            if bool(keep.all()):
                result[rows, :length] = self._run(x[rows, :length], None)
            else:
                y = self._run(x[rows, :length], keep[:, None, None])
                result[rows, :length] = y.masked_fill_(~keep.unsqueeze(-1), 0.0)
        return result

    def _run(self, x: Tensor, mask: Tensor | None) -> Tensor:
        added = self._biased_mask(x, mask) if hasattr(self.encoder, "relative_attention_bias") else mask
        if mask is not None and is_deberta(self.encoder):
            added = seen_in_pairs(mask)
        for stage in self._stages:
            x = run_alone(self.encoder, stage, x, mask) if isinstance(stage, int) else stage(x, added)
        return x

    def _biased_mask(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """MPNet adds to all scores a bias that depends on the distance of two tokens: [1 or B, heads, T, T]."""
        length = x.shape[1]
        bias = self._position_bias  # read once: another thread may put a shorter one there at any time
        if bias is None or bias.shape[-1] < length:
            bias = self._position_bias = self.encoder.compute_position_bias(x[:1]).float()
        bias = bias[..., :length, :length]
        if mask is None:
            return bias
        return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask


def _reason_not_to_fuse(base: Any, encoder: Any) -> str:
    layers = layers_of(encoder)
    if not layers:
        return "it has no list of encoder layers"
    altered = reason_not_to_replace([base, encoder] if is_deberta(encoder) else [encoder])
    if altered:
        return altered
    if encoder is base and reason_not_in_base(base):
        return reason_not_in_base(base)
    if is_deberta(encoder) and reason_not_deberta(base):
        return reason_not_deberta(base)
    reasons = list(filter(None, _reasons_not_to_fuse(encoder)))
    attention = getattr(getattr(base, "config", None), "_attn_implementation", "eager")
    if reasons and attention not in ("sdpa", "eager"):
        return f"{reasons[0]}, and {attention} attention takes no mask of its own"
    if not hasattr(encoder, "layer") and encoder is not base:  # whose layers cannot be run by one of them alone
        return next(iter(reasons), "")
    return reasons[0] if len(reasons) == len(layers) else ""


def _reasons_not_to_fuse(encoder: Any) -> list[str]:
    """For each layer of `encoder` why it cannot be fused; empty where it can."""
    reasons = [reason_not_to_fuse_layer(layer) for layer in layers_of(encoder)]
    if is_deberta(encoder):
        return [reason or reason_not_layer(encoder, index) for index, reason in enumerate(reasons)]
    return reasons


def _copied_from(encoder: Any) -> dict[str, nn.Module]:
    """The modules of an encoder whose parameters its fused layers hold copies of, by name."""
    names = {module: name for name, module in encoder.named_modules()}
    fused = zip(layers_of(encoder), _reasons_not_to_fuse(encoder), strict=True)
    found = {names[layer]: layer for layer, reason in fused if not reason}
    tables = ("rel_embeddings", "LayerNorm") if is_deberta(encoder) else ("relative_attention_bias",)
    return found | {name: getattr(encoder, name) for name in tables if hasattr(encoder, name)}


_MAPPING = "embedding_hidden_mapping_in"  # ALBERT's encoder begins with it


def layers_of(encoder: Any) -> list[Any]:
    """The layers of an encoder in the order in which they run, ALBERT's as often as they do; empty if unknown."""
    layers = getattr(encoder, "layers" if type(encoder).__name__ in LAYERS_IN_BASE else "layer", None)
    if isinstance(layers, nn.ModuleList):
        return list(layers)
    if type(encoder).__name__ != "AlbertTransformer":
        return []
    groups, count = encoder.albert_layer_groups, encoder.config.num_hidden_layers
    return [layer for i in range(count) for layer in groups[int(i / (count / len(groups)))].albert_layers]


def _log_layers(model: str, encoder: Any) -> list[nn.Module]:
    """Say which layers of a fused `encoder` are less than they could be; returns those that run in their own way."""
    own_layers = []
    for index, (layer, reason) in enumerate(zip(layers_of(encoder), _reasons_not_to_fuse(encoder), strict=True)):
        if reason:
            logger.info("layer %d of %s is not fused: %s; it runs in its own way", index, model, reason)
            own_layers.append(layer)
        elif other := reason_not_four_products(layer):
            logger.info("layer %d of %s is fused, but not in four int8 products: %s", index, model, other)
    return own_layers


def _is_added_or_chosen(mask: Tensor, x: Tensor) -> bool:
    """Whether `mask` fits the scores of x [B, T, H], and is of a kind that attention takes: booleans or what is added.

    All others are for the model's own forward to refuse.
    """
    batch, length = x.shape[:2]
    return (
        mask.dim() == 4
        and (mask.dtype == torch.bool or mask.is_floating_point())
        and mask.device == x.device
        and mask.shape[0] in (1, batch)
        and all(n in (1, length) for n in mask.shape[2:])
    )


def _lengths(mask: Tensor, shape: torch.Size) -> Tensor | None:
    """Tokens in each row [B], at least 1, if `mask` [B, 1, T or 1, T] hides nothing but padding on the right."""
    batch, longest = shape
    if mask.shape[0] != batch or mask.shape[1] != 1 or mask.shape[3] != longest:
        return None
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((seen | (mask <= _NOTHING_LEFT)).all()):
        return None
    if not bool((seen == seen[:, :, :1]).all()):
        return None
    return tokens_before_padding(seen[:, 0, 0])


_FIRST_TOKEN_HEADS = ("ForSequenceClassification", "ForNextSentencePrediction")


def _never_reads_padding(model: nn.Module, base: nn.Module) -> bool:
    """Whether what `model` makes of the hidden states of `base` does not depend on those of padding on the right."""
    for module in model.modules():
        if module is base or not any(part is base for part in module.modules()):
            continue
        package, kind = type(module).__module__.partition(".")[0], type(module).__name__
        if package == "transformers" and kind.endswith(_FIRST_TOKEN_HEADS):
            return not reason_not_to_replace([module])
        if package == "sentence_transformers" and kind == "SentenceTransformer":
            return [type(part).__name__ for part in module.children()][1:2] == ["Pooling"]
    return False


Stage = int | ChosenLayers


def stages_of(encoder: Any, exact: bool = True, engine: str = "auto") -> list[Stage]:
    """The layers of `encoder` in their order: neighbours that fit as one program, others as their index.

    Args:
        encoder: module whose ``layer`` is a list of encoder layers.
        exact, engine: as for `optimize_for_inference`.
    """
    stages: list[Stage] = []
    layers, reasons = layers_of(encoder), _reasons_not_to_fuse(encoder)
    for fits, indices in groupby(range(len(layers)), lambda i: not reasons[i]):
        if fits:
            parts = [parts for i in indices if (parts := _parts_of(encoder, layers[i]))]
            stages.append(ChosenLayers.of(parts, exact, engine))
        else:
            stages.extend(indices)
    return stages


def _parts_of(encoder: Any, layer: Any) -> LayerParts | None:
    parts = LayerParts.of_any_kind(layer)
    if parts is not None and is_deberta(encoder):
        return parts._replace(relative=positions_of(encoder, layer))
    if parts is None or not hasattr(encoder, "rotary_emb"):
        return parts
    return parts._replace(rotation=rotation_of(encoder, layer.attention_type))


def _attention_of(encoder: Any) -> str:
    """The kind of attention of an encoder; DistilBERT's has its configuration in the layers."""
    return next((m.config._attn_implementation for m in encoder.modules() if hasattr(m, "config")), "eager")


def run_alone(encoder: Any, index: int, x: Tensor, mask: Tensor | None) -> Tensor:
    """What `encoder` makes of x float32 [B, T, H] if the layer at `index` is its only one: float32 [B, T, H].

    `mask` broadcasts to [B, heads, T, T], and is true or 0 where a key is seen. It comes without MPNet's bias by
    position, which the encoder adds.
    """
    if type(encoder).__name__ in LAYERS_IN_BASE:
        return run_alone_in_base(encoder, index, x, mask)
    if is_deberta(encoder):
        return run_alone_in_deberta(encoder, index, x, mask)
    only = copy(encoder)  # so that the encoder itself decides how its layers are called
    only._modules = {**encoder._modules, "layer": encoder.layer[index : index + 1]}
    # In the layer's dtype, which is another where the model was moved after it was optimized.
    dtype = next((p.dtype for p in only.layer.parameters() if p.is_floating_point()), x.dtype)
    if mask is not None:
        lowest = torch.finfo(dtype).min
        # Booleans are what sdpa gets from the model, and all that tells rows without a key from others; eager adds.
        if mask.dtype == torch.bool and _attention_of(encoder) != "sdpa":
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest)
        mask = mask if mask.dtype == torch.bool else mask.clamp(min=lowest).to(dtype)
        mask = mask.expand(-1, -1, x.shape[1], -1)
    return type(encoder).forward(only, x.to(dtype), mask)[0].float()  # type: ignore[no-any-return]
