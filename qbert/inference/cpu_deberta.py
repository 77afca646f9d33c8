"""Forward of DeBERTa-v2 and DeBERTa-v3 on a CPU around their fused layers.

It stands beside `qbert.inference.cpu_model` because this encoder is like no other: its layers add to their scores what
depends on the distance of two tokens, a mask hides tokens as queries too, and a query that sees nothing sees all alike.
The base model asks its encoder for all hidden states, so that the fused forward has to be the base model's.

    >>> base.forward = FusedDeberta(base, FusedEncoder(base.encoder))
"""

from __future__ import annotations

import inspect
import math
from copy import copy
from typing import Any

import torch
from torch import Tensor

from qbert.encoders.parts import RelativePositions
from qbert.inference.cpu_base import Layers
from qbert.inference.cpu_model import is_plain_request, lengths_of
from qbert.inference.forward import FastForward

_TO_EMBEDDINGS = ("token_type_ids", "position_ids")
# Added to scores, leaves nothing of them: the smallest bfloat16, since float32's own is none of its numbers.
_HIDDEN = torch.finfo(torch.bfloat16).min
_FARTHEST = 2**16  # tokens apart; no table of positions needs more


class FusedDeberta(FastForward):
    """``forward`` of a DebertaV2Model (not a module: it adds nothing to the state).

    Args:
        base: a model for which `reason_not_deberta` has none.
        layers: its fused layers.
    """

    own = ("base", "layers")

    def __init__(self, base: Any, layers: Layers) -> None:
        self.base, self.layers = base, layers
        self.names = list(inspect.signature(type(base).forward).parameters)[1:]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Token ids and mask [B, T] to transformers' output, with ``last_hidden_state`` [B, T, H]."""
        from transformers.modeling_outputs import BaseModelOutput

        base = self.base
        given = dict(zip(self.names, args, strict=False)) | kwargs
        ids, mask = given.pop("input_ids", None), given.pop("attention_mask", None)
        more = {name: given.pop(name) for name in _TO_EMBEDDINGS if name in given}
        padded_right, lengths = lengths_of(mask)
        if ids is None or not self._can_run(ids, mask, given):
            self.layers.doubt()
            return type(base).forward(base, *args, **kwargs)
        with torch.inference_mode():
            x = base.embeddings(input_ids=ids, mask=mask, **more)
        if lengths is None and padded_right:
            return BaseModelOutput(last_hidden_state=self.layers.run(x, None))
        if padded_right and self.layers.skip_padding:
            return BaseModelOutput(last_hidden_state=self.layers.run(x, lengths))
        return BaseModelOutput(last_hidden_state=self.layers.run_masked(x, mask != 0))

    def _can_run(self, ids: Tensor, mask: Tensor | None, more: dict[str, Any]) -> bool:
        return (
            ids.device.type == "cpu"
            and (mask is None or mask.device.type == "cpu")
            and is_plain_request(self.base, ids, mask, more.pop("inputs_embeds", None), more)
            and not (torch.is_grad_enabled() and any(p.requires_grad for p in self.base.parameters()))
        )


def is_deberta(encoder: Any) -> bool:
    """Whether a module is the encoder of DeBERTa-v2 or v3."""
    return type(encoder).__name__ == "DebertaV2Encoder"


def reason_not_deberta(base: Any) -> str:
    """Why layers of a DebertaV2Model cannot be fused whatever they are; empty if they can."""
    if type(base).__name__ != "DebertaV2Model":
        return f"{type(base).__name__} is not the model that its encoder belongs to"
    if base.z_steps > 1:
        return "it runs its last layer several times"
    if base.encoder.relative_attention and not len(_places(base.encoder)):
        return "the places of its distances do not rise to the end of their table"
    return ""


def reason_not_layer(encoder: Any, index: int) -> str:
    """Why the layer at `index` cannot be fused where it stands; empty if it can."""
    return "a convolution stands behind it" if index == 0 and encoder.conv is not None else ""


def positions_of(encoder: Any, layer: Any) -> RelativePositions:
    """What `layer` of `encoder` adds to its scores."""
    attention = layer.attention.self
    kinds = attention.pos_att_type
    scale = 1 / math.sqrt(attention.attention_head_size * (1 + ("c2p" in kinds) + ("p2c" in kinds)))
    if not attention.relative_attention:
        return RelativePositions(scale, torch.zeros(1), torch.zeros(0, 1), None, None)
    table = encoder.get_rel_embedding().detach()[: 2 * attention.pos_ebd_size]
    shared = attention.share_att_key
    to_key = to_query = None
    if "c2p" in kinds:
        to_key = attention.key_proj if shared else attention.pos_key_proj
    if "p2c" in kinds:
        to_query = attention.query_proj if shared else attention.pos_query_proj
    return RelativePositions(scale, _places(encoder), table, to_key, to_query)


def _places(encoder: Any) -> Tensor:
    """Rows of the table for distances -n to n, int32 [2 n + 1], beyond which they stay; empty where they do not."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    buckets, longest = encoder.position_buckets, encoder.max_relative_positions
    span = buckets if buckets > 0 else longest
    farthest = span
    while farthest <= _FARTHEST:
        distances: Tensor = torch.arange(-farthest, farthest + 1, device="cpu")
        if buckets > 0:
            distances = make_log_bucket_position(distances, buckets, longest)
        places = (distances.long() + span).clamp_(0, 2 * span - 1)
        if bool((places.diff() < 0).any()):
            break
        if places[0] == 0 and places[-1] == 2 * span - 1:
            return places.int()
        farthest *= 2
    return torch.zeros(0, dtype=torch.int32, device="cpu")


def seen_in_pairs(keep: Tensor) -> Tensor:
    """What is added to scores, float32 [B, 1, T, T], where bool `keep` [B, 1, 1, T] says which tokens are seen.

    A query that is hidden itself sees all keys alike.
    """
    pairs = keep & keep.transpose(2, 3)
    return torch.zeros(pairs.shape, dtype=torch.float32, device=keep.device).masked_fill_(~pairs, _HIDDEN)


def run_alone_in_deberta(encoder: Any, index: int, x: Tensor, mask: Tensor | None) -> Tensor:
    """What layer `index` of `encoder` makes of x float32 [B, T, H], the convolution behind the first one included.

    `mask` is bool [B, 1, 1, T], true where a token is seen.
    """
    only = copy(encoder)
    conv = encoder.conv if index == 0 else None
    only._modules = {**encoder._modules, "layer": encoder.layer[index : index + 1], "conv": conv}
    dtype = next((p.dtype for p in only.layer.parameters() if p.is_floating_point()), x.dtype)
    keep = torch.ones(x.shape[:2], device=x.device) if mask is None else mask[:, 0, 0].to(dtype)
    return type(encoder).forward(only, x.to(dtype), keep, output_hidden_states=False)[0].float()  # type: ignore[no-any-return]
