"""Forward of ViT and ModernBERT on a CPU around their fused layers.

It stands beside `qbert.inference.cpu_model` because these models have no encoder module whose forward could be
replaced: the list of layers, the last norm and what the layers share (ModernBERT's rotation) are the base model's own.

    >>> base.forward = FusedWholeModel(base, FusedEncoder(base))
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor

from qbert.inference.cpu_model import asks_for_no_more, lengths_of
from qbert.inference.forward import FastForward

# Base models that hold their layers themselves, and the name of the norm behind the last one.
LAYERS_IN_BASE = {"ViTModel": "layernorm", "ModernBertModel": "final_norm"}
_TO_EMBEDDINGS = ("bool_masked_pos", "interpolate_pos_encoding")
_KNOWN_ROTATIONS = ("default", "linear", "yarn", "llama3", "proportional")  # that do not depend on the length


class Layers(Protocol):
    """The fused layers of an encoder, as `qbert.inference.cpu.FusedEncoder`."""

    skip_padding: bool

    def doubt(self) -> None:
        """Parameters may have other values from now on."""

    def run(self, hidden_states: Tensor, lengths: Tensor | None) -> Tensor:
        """[B, T, H] and the tokens of each sequence [B] (None: all) to [B, T, H]."""

    def run_masked(self, hidden_states: Tensor, keep: Tensor) -> Tensor:
        """[B, T, H] to [B, T, H], where bool `keep` [B, T] says which tokens are seen."""


class FusedWholeModel(FastForward):
    """``forward`` of a base model whose layers are its own (not a module: it adds nothing to the state).

    Args:
        base: model of a class in `LAYERS_IN_BASE`.
        layers: its fused layers.
    """

    own = ("base", "layers")

    def __init__(self, base: Any, layers: Layers) -> None:
        self.base, self.layers = base, layers
        self.names = list(inspect.signature(type(base).forward).parameters)[1:]
        self.window = max((window_of(layer) for layer in base.layers), default=0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Token ids and mask [B, T], or pixels [B, C, H, W], to transformers' output, [B, T, H] first."""
        base = self.base
        given = dict(zip(self.names, args, strict=False)) | kwargs
        values, mask = given.pop(base.main_input_name, None), given.pop("attention_mask", None)
        more = {name: given.pop(name) for name in _TO_EMBEDDINGS if name in given}
        padded_right, lengths = lengths_of(mask)
        if not self._can_run(values, mask, given) or not self._same_in_every_row(values, mask, padded_right):
            self.layers.doubt()
            return type(base).forward(base, *args, **kwargs)
        with torch.inference_mode():
            if base.main_input_name == "pixel_values":
                values = values.to(base.embeddings.patch_embeddings.projection.weight.dtype)
            x = base.embeddings(values, **more)
        y = self.layers.run(x, lengths) if padded_right else self.layers.run_masked(x, mask != 0)
        y = getattr(base, LAYERS_IN_BASE[type(base).__name__])(y)
        if lengths is not None and self.layers.skip_padding:
            y = y.masked_fill(mask.unsqueeze(-1) == 0, 0.0)
        return self._output(y)

    def _can_run(self, values: Tensor | None, mask: Tensor | None, more: dict[str, Any]) -> bool:
        base = self.base
        tokens = base.main_input_name == "input_ids"
        return (
            values is not None
            and values.device.type == "cpu"
            and values.numel() > 0
            and values.dim() == (2 if tokens else 4)
            and (mask is None or (tokens and mask.shape == values.shape and mask.device.type == "cpu"))
            and (not hasattr(base, "rotary_emb") or values.shape[1] <= base.config.max_position_embeddings)
            and not values.requires_grad
            and not (torch.is_grad_enabled() and any(p.requires_grad for p in base.parameters()))
            and asks_for_no_more(base, more)
        )

    def _same_in_every_row(self, values: Tensor, mask: Tensor | None, padded_right: bool) -> bool:
        """Whether no query is left without a key, or attention gives it what the fused layers do: sdpa, zeros."""
        if mask is None or self.base.config._attn_implementation == "sdpa":
            return True
        if padded_right and self.layers.skip_padding:
            return True
        windowed = 0 < self.window < values.shape[1] - 1
        return bool(mask.all()) or (not windowed and bool((mask != 0).any(1).all()))

    def _output(self, hidden: Tensor) -> Any:
        from transformers import modeling_outputs as outputs

        if not hasattr(self.base, "pooler"):
            return outputs.BaseModelOutput(last_hidden_state=hidden)
        pooled = None if self.base.pooler is None else self.base.pooler(hidden)
        return outputs.BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)


def reason_not_in_base(base: Any) -> str:
    """Why layers of `base`, of a class in `LAYERS_IN_BASE`, cannot be fused whatever they are; empty if they can."""
    kinds = getattr(getattr(base, "rotary_emb", None), "rope_type", {})
    others = sorted({kind for kind in kinds.values() if kind not in _KNOWN_ROTATIONS})
    return f"its rotation of the kind {others[0]} depends on the length" if others else ""


def window_of(layer: Any) -> int:
    """How many tokens on each side an encoder layer sees; 0 for all."""
    return (getattr(getattr(layer, "attn", None), "sliding_window", None) or 1) - 1


def rotation_of(base: Any, kind: str) -> Tensor:
    """Cosines and sines of all positions, float32 [positions, head width], by which layers of `kind` are rotated."""
    count = base.config.max_position_embeddings
    like = torch.zeros(1, dtype=torch.float32, device="cpu")
    places = torch.arange(count, device="cpu").unsqueeze(0)
    # Both hold the angles of half a head twice.
    halves = [t[0].chunk(2, 1)[0].clone() for t in base.rotary_emb(like, places, kind)]
    return torch.cat(halves, 1)


def run_alone_in_base(base: Any, index: int, x: Tensor, mask: Tensor | None) -> Tensor:
    """What layer `index` of `base` makes of x float32 [B, T, H], in its own way; `mask` as for `FusedLayers`."""
    layer, more = base.layers[index], {}
    dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point()), x.dtype)
    length, window = x.shape[1], window_of(layer)
    places = torch.arange(length, device=x.device)
    if window and length > window + 1:
        near = ((places[:, None] - places).abs() <= window)[None, None]
        mask = near if mask is None else mask & near
    if mask is not None:
        mask = mask.expand(len(x), -1, length, -1)
        if base.config._attn_implementation != "sdpa":
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    if hasattr(base, "rotary_emb"):
        more["position_embeddings"] = base.rotary_emb(x.to(dtype), places.unsqueeze(0), layer.attention_type)
    return layer(x.to(dtype), mask, **more).float()  # type: ignore[no-any-return]
