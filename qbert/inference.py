"""Fast inference of packed encoders on a CPU: int8 matrix products, one input quantization for Q, K and V, no padding.

`optimize_for_inference` prepares every packed layer for the exact int8 products of `qbert.kernels.cpu`. Encoders of the
BERT kind (BERT, RoBERTa, XLM-R, ELECTRA, CamemBERT) get more: a whole layer runs as four products with as few passes
over memory as torch's operators allow, Q, K and V in one; sequences are sorted by length and run in chunks that stay
in the cache, each cut to its longest member, so that padding costs next to nothing.

    >>> fast = optimize_for_inference(packed)
    >>> fast(**tokenizer(texts, padding=True, return_tensors="pt"))

Every layer computes what the packed layer does up to float rounding. A whole model may differ by more: now and then a
value on the border between two int8 codes falls to the other side, and what follows rounds differently, so the two
outputs differ by about the error that quantized activations have anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert.inference_model import FusedModel
from qbert.kernels.cpu import CpuLinear
from qbert.packed_modules import PackedLinear, PackedTensor
from qbert.targets import base_model

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)

_BERT_LAYERS = ("BertLayer", "RobertaLayer", "XLMRobertaLayer", "ElectraLayer", "CamembertLayer")
# Tokens per thread that run together. Small chunks cut padding well; without any, larger ones reuse weights more often.
_CHUNK_TOKENS, _FULL_CHUNK_TOKENS = 256, 1024


def optimize_for_inference(packed: Model, *, inplace: bool = False) -> Model:
    """A packed model that runs fast on the device it is on: a CPU, or a GPU (`qbert.inference_gpu`).

    On a CPU the int8 operands are made here and kept beside the packed tensors (one byte a weight; small tables in
    float). The model can still be saved, moved to another dtype, and asked for hidden states or attentions, for which
    it takes the slow path. Hidden states of padding are zero. Where an encoder cannot be fused, the reason is logged
    and its layers run one by one.

    Args:
        packed: what `qbert.pack`, `qbert.load` or ``from_pretrained`` returned, on the CPU or a CUDA device.
        inplace: prepare `packed` itself instead of a copy.

    Raises:
        ValueError: if the model has no packed layer, or is on another device.
    """
    layers = [m for m in packed.modules() if isinstance(m, PackedTensor)]
    if not layers:
        raise ValueError(f"packed: {type(packed).__name__} has no packed layer; call qbert.pack first")
    devices = {layer.owner.codes.device for layer in layers}  # type: ignore[union-attr]
    if len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"packed: the model is on {names}; move it to the CPU or to one CUDA device with .to()")
    model = packed if inplace else deepcopy(packed)
    model.eval()
    if next(iter(devices)).type == "cuda":
        from qbert.inference_gpu import fuse_for_gpu

        fuse_for_gpu(model)
        return model
    _, base = base_model(model)
    encoder = getattr(base, "encoder", None)
    reason = _reason_not_to_fuse(encoder)
    fused: set[int] = set()
    if encoder is not None and not reason:
        fused_encoder = encoder.forward = FusedEncoder(encoder)
        if hasattr(base, "embeddings"):
            base.forward = FusedModel(base, fused_encoder.run)  # type: ignore[method-assign]
        fused = {id(m) for m in encoder.modules()}
    else:
        logger.info("%s is not fused: %s; its layers run one by one", type(base).__name__, reason)
    for module in model.modules():
        if isinstance(module, PackedTensor) and id(module) not in fused:
            module.prepare()
    return model


class FusedEncoder:
    """``forward`` of an encoder of the BERT kind, in int8 (not a module: it adds nothing to the state of the model).

    Args:
        encoder: module whose ``layer`` is a list of layers of one of the known kinds, with packed linear maps.
    """

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self.layers = [FusedLayer(layer) for layer in encoder.layer]

    def __call__(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """[B, T, H] to transformers' output with ``last_hidden_state`` [B, T, H]; zeros where a token is padding."""
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        if not self._can_run(hidden_states, attention_mask, kwargs):
            return type(self.encoder).forward(self.encoder, hidden_states, attention_mask, **kwargs)
        lengths = None if attention_mask is None else _lengths(attention_mask, hidden_states.shape[:2])
        if attention_mask is not None and lengths is None:
            mask = attention_mask if attention_mask.dtype == torch.bool else attention_mask.float()
            result = self._outside(hidden_states, lambda x: self._run(x, mask))
        else:
            result = self.run(hidden_states, lengths)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=result)

    def run(self, hidden_states: Tensor, lengths: Tensor | None) -> Tensor:
        """[B, T, H] and the number of tokens of each sequence, [B] int64 (None: all T), to [B, T, H] in its dtype."""
        return self._outside(hidden_states, lambda x: self._run_chunks(x, lengths))

    @staticmethod
    def _outside(hidden_states: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.inference_mode():
            result = run(hidden_states.float())
        # A copy made outside of inference mode, because tensors made inside cannot be used in training (of a head).
        return result.to(hidden_states.dtype) if hidden_states.dtype != torch.float32 else result.clone()

    def _can_run(self, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
        from transformers.utils.output_capturing import _active_collector

        wanted = ("encoder_hidden_states", "past_key_values", "output_hidden_states", "output_attentions")
        return (
            x.device.type == "cpu"
            and not (x.requires_grad and torch.is_grad_enabled())
            and not torch.compiler.is_compiling()
            and not any(kwargs.get(name) for name in wanted if not isinstance(kwargs.get(name), Tensor))
            and not isinstance(kwargs.get("encoder_hidden_states"), Tensor)
            and (mask is None or mask.dim() == 4)
            and not _active_collector.get()
            and not self.encoder.training
        )

    def _run_chunks(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        batch, longest, _ = x.shape
        if lengths is not None and not bool((lengths < longest).any()):
            lengths = None
        room = (_FULL_CHUNK_TOKENS if lengths is None else _CHUNK_TOKENS) * torch.get_num_threads()
        if lengths is None and (batch == 1 or batch * longest <= room):
            return self._run(x, None)
        order = torch.arange(batch) if lengths is None else lengths.argsort(descending=True)
        result = torch.zeros_like(x)
        start = 0
        while start < batch:
            length = longest if lengths is None else max(int(lengths[order[start]]), 1)
            rows = order[start : start + max(room // length, 1)]
            start += len(rows)
            mask = None
            if lengths is not None:
                keep = torch.arange(length) < lengths[rows, None]  # [b, t]
                # A sequence of nothing but padding attends to all of it, as in transformers; its output is cleared.
                mask = None if bool(keep.all()) else (keep | (lengths[rows, None] == 0))[:, None, None]
            y = self._run(x[rows, :length], mask)
            if mask is not None:
                y.mul_(keep.unsqueeze(-1))
            result[rows, :length] = y
        return result

    def _run(self, x: Tensor, mask: Tensor | None) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        for layer in self.layers:
            x = layer(x, shape[0], mask)
        return x.view(shape)


class FusedLayer:
    """One encoder layer, post-norm: int8 products and float attention, normalization and activation function."""

    def __init__(self, layer: Any) -> None:
        attention = layer.attention.self
        self.heads: int = attention.num_attention_heads
        self.qkv = _joined([attention.query, attention.key, attention.value])
        self.attention_output = layer.attention.output.dense.cpu_linear()
        self.ffn_in, self.ffn_out = layer.intermediate.dense.cpu_linear(), layer.output.dense.cpu_linear()
        self.activation = layer.intermediate.intermediate_act_fn
        self.exact_gelu = type(self.activation).__name__ == "GELUActivation"
        self.norms = [_norm(layer.attention.output.LayerNorm), _norm(layer.output.LayerNorm)]

    def __call__(self, x: Tensor, batch: int, mask: Tensor | None) -> Tensor:
        """[B T, H] to [B T, H]."""
        tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens // batch, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, T, D] each
        mixed = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).reshape(tokens, width)
        y = self.attention_output(mixed).add_(x)
        x = F.layer_norm(y, (width,), *self.norms[0])
        hidden = self.ffn_in(x)
        hidden = torch.ops.aten.gelu_(hidden) if self.exact_gelu else self.activation(hidden)
        return F.layer_norm(self.ffn_out(hidden).add_(x), (width,), *self.norms[1])


def _reason_not_to_fuse(encoder: Any) -> str:
    layers = getattr(encoder, "layer", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return "it has no encoder.layer list"
    return next(filter(None, map(reason_not_to_fuse_layer, layers)), "")


def reason_not_to_fuse_layer(layer: Any) -> str:
    """Why `layer` is not a packed encoder layer of the BERT kind with one input for Q, K and V; empty if it is."""
    if type(layer).__name__ not in _BERT_LAYERS or layer.is_decoder or layer.add_cross_attention:
        return f"a {type(layer).__name__} is not an encoder layer of the BERT kind"
    attention = layer.attention.self
    parts = [attention.query, attention.key, attention.value, layer.attention.output.dense]
    parts += [layer.intermediate.dense, layer.output.dense]
    if not all(isinstance(p, PackedLinear) for p in parts):
        return "some of its linear maps are in float"
    if not all(_same_input(parts[0], p) for p in parts[1:3]):
        return "query, key and value quantize their input differently"
    return ""


def _same_input(one: PackedLinear, other: PackedLinear) -> bool:
    for field in ("activation_bits", "activation_range"):
        if getattr(one.spec, field) != getattr(other.spec, field):
            return False
    if one.layout.input_groups > 1 or other.layout.input_groups > 1:
        return False
    if one.input_scale is None or one.input_zero is None or other.input_scale is None or other.input_zero is None:
        return True
    return torch.equal(one.input_scale, other.input_scale) and torch.equal(one.input_zero, other.input_zero)


def _joined(parts: list[PackedLinear]) -> CpuLinear:
    """One product for several layers with the same input: their rows under each other."""
    grids = [p.row_grids() for p in parts]
    biases = [torch.zeros(p.rows) if p.bias is None else p.bias.detach().float() for p in parts]
    codes = torch.cat([p.int_codes() for p in parts])
    return CpuLinear.prepare(
        codes,
        torch.cat([scale for scale, _ in grids]),
        torch.cat([zero for _, zero in grids]),
        torch.arange(len(codes)),
        torch.cat(biases),
        max(p.layout.bits for p in parts),
        **parts[0].activation_arguments(),
    )


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight.detach().float(), norm.bias.detach().float(), norm.eps


def _lengths(mask: Tensor, shape: torch.Size) -> Tensor | None:
    """Number of tokens [B] if `mask` [B, 1, T or 1, T] hides nothing but padding on the right; ``None`` if not."""
    batch, longest = shape
    if mask.shape[0] != batch or mask.shape[1] != 1 or mask.shape[3] != longest:
        return None
    seen = mask if mask.dtype == torch.bool else mask == 0
    if not bool((seen == seen[:, :, :1]).all()):
        return None
    keys = seen[:, 0, 0]  # [B, T]
    lengths = keys.sum(1)
    return lengths if torch.equal(keys, torch.arange(longest) < lengths[:, None]) else None
