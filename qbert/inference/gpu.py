"""Fast inference of packed encoders on a GPU: fused int8 layers over tokens without padding, replayed as CUDA graphs.

It stands alone because it needs a CUDA device at each of its ends; what runs in between is `gpu_layers` and `graphs`.

`optimize_for_inference` calls `fuse_for_gpu` for a model on a CUDA device. The base model of an encoder of the BERT
kind (BERT, RoBERTa, XLM-R, ELECTRA, CamemBERT) gets a forward of its own: the tokens that the attention mask keeps are
gathered, run through the chains of `qbert.inference.gpu_layers`, and scattered back; padding comes out as zeros.
Layers that do not fit run one by one, on padded tensors, between fused ones; the reason is logged.

    >>> fast = optimize_for_inference(packed.to("cuda", torch.float16))
    >>> fast(**tokenizer(texts, padding=True, return_tensors="pt").to("cuda"))
"""

from __future__ import annotations

import logging
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qbert.encoders.targets import base_model
from qbert.inference.cpu_model import is_plain_request
from qbert.inference.forward import FastForward, reason_not_to_replace
from qbert.inference.gpu_layers import (
    FusedGpuEmbeddings,
    FusedGpuLayer,
    InputGrid,
    Tokens,
    reason_not_to_fuse_embeddings,
    reason_not_to_fuse_on_gpu,
)
from qbert.inference.graphs import Given, GraphCache, Inputs, Rows, as_tensor
from qbert.kernels.dispatch import implementation
from qbert.layers.packed import PackedTensor

logger = logging.getLogger(__name__)


def fuse_for_gpu(model: nn.Module, operands: str = "int8", skip_padding: bool = True) -> None:
    """Give `model`, packed and on a GPU, its fast forward, in place; what does not fit keeps its own, as is logged.

    Args:
        operands: "int8" or "e4m3", as for `qbert.optimize_for_inference`.
        skip_padding: whether hidden states of padding are zeros; without it, batches with padding take the model's own
            forward, whose layers run one by one.

    Raises:
        ValueError: for other operands, or e4m3 on a GPU before compute capability 8.9.
    """
    check_operands(operands, next(model.parameters()).device)
    for module in model.modules():
        if isinstance(module, PackedTensor):
            module.prepare()
    _, base = base_model(model)
    reason = _reason_not_to_fuse(base)
    if reason:
        logger.info("%s is not fused: %s; its layers run one by one", type(base).__name__, reason)
    else:
        base.forward = GpuEncoder(base, operands=operands, skip_padding=skip_padding)


def check_operands(operands: str, device: torch.device) -> None:
    """Raises ValueError unless `device` multiplies `operands`."""
    if operands not in ("int8", "e4m3"):
        raise ValueError(f"operands must be 'int8' or 'e4m3', got {operands!r}.")
    if operands == "e4m3" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ValueError(
            f"operands='e4m3' needs a GPU of compute capability 8.9 or later, this one has {capability}; use 'int8'."
        )


class Batch(NamedTuple):
    """Which tokens of a padded batch [B, L] there are.

    kept: int64 [T], their positions in the flattened batch, None where it has no padding; starts: int32 [B + 1], where
    each sequence begins among them; longest: the length of the longest.
    """

    shape: tuple[int, int]
    kept: Tensor | None
    starts: Given
    longest: int

    @classmethod
    def of(cls, shape: tuple[int, int], mask: Tensor | None, device: torch.device) -> Batch:
        """From an attention mask [B, L], in which 0 hides a token, of any pattern. Waits for the GPU once."""
        count, length = shape
        if mask is not None:
            keep = mask != 0
            lengths = keep.sum(1).tolist()
            if sum(lengths) < count * length:
                starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
                return cls(shape, _positions(keep.flatten(), sum(lengths)), starts.to(device), max(lengths))
        multiples = Rows(count + 1, _no_starts(device), partial(_write_multiples, length), ("starts", length))
        return cls(shape, None, multiples, length)

    def gather(self, padded: Tensor) -> Tensor:
        """[B, L, ...] to [T, ...]."""
        flat = padded.flatten(0, 1)
        return flat if self.kept is None else flat[self.kept]

    def rows(self, padded: Tensor) -> Given:
        """What `gather` gives, gathered straight to where it is needed."""
        flat = padded.flatten(0, 1)
        if self.kept is None:
            return flat
        return Rows(self.kept.shape[0], flat, partial(_write_selected, flat, self.kept))

    def zeros(self, like: Tensor) -> Rows:
        """A zero for every token, in the dtype of `like`."""
        return Rows(self._count, like.flatten(), Tensor.zero_, "zeros")

    def places(self, like: Tensor) -> Rows:
        """The place of every token in its padded sequence, from 0 on, in the dtype of `like`."""
        length = self.shape[1]
        if self.kept is None:
            return Rows(self._count, like.flatten(), partial(_write_places, length), ("places", length))
        return Rows(self._count, like.flatten(), partial(_write_remainders, self.kept, length))

    @property
    def _count(self) -> int:
        return self.shape[0] * self.shape[1] if self.kept is None else self.kept.shape[0]

    def scatter(self, tokens: Tensor) -> Tensor:
        """[T, H] to [B, L, H], zero where there is no token; shares memory with `tokens` where there is no padding."""
        if self.kept is None:
            return tokens.view(*self.shape, -1)
        padded = tokens.new_zeros((self.shape[0] * self.shape[1], tokens.shape[1]))
        return padded.index_copy_(0, self.kept, tokens).view(*self.shape, -1)

    def scatter_copy(self, tokens: Tensor) -> Tensor:
        """`scatter` to memory of its own."""
        return self.scatter(tokens.clone() if self.kept is None else tokens)


@cache
def _no_starts(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.int32, device=device)


def _write_multiples(step: int, out: Tensor) -> None:
    torch.arange(0, step * len(out), step, out=out)


def _write_places(length: int, out: Tensor) -> None:
    out.view(-1, length).copy_(torch.arange(length, device=out.device))


def _write_remainders(kept: Tensor, length: int, out: Tensor) -> None:
    torch.remainder(kept, length, out=out)


def _write_selected(flat: Tensor, index: Tensor, out: Tensor) -> None:
    torch.index_select(flat, 0, index, out=out)


def _positions(keep: Tensor, count: int) -> Tensor:
    """Indices [count] of the true values, like nonzero, but without waiting for the GPU to count them."""
    place = torch.where(keep, keep.cumsum(0) - 1, count)
    index = torch.empty(count + 1, dtype=torch.int64, device=keep.device)
    return index.scatter_(0, place, torch.arange(len(keep), device=keep.device))[:count]


class GpuEncoder(FastForward):
    """``forward`` of the base model (not a module: it adds nothing to the state of the model).

    Args:
        base: model with ``embeddings`` and ``encoder.layer``, some layer of which can be fused.
        operands: "e4m3" gives e4m3 inputs to products with weights of 2 to 4 bits, "int8" gives int8 to all.
        graphs: how to run batches of one shape again and again; ``None`` captures CUDA graphs on a GPU where every
            layer is fused.
        skip_padding: as for `fuse_for_gpu`.
    """

    own = ("base", "operands", "skip_padding")
    shares_the_rest = False  # buffers and graphs serve one model; a copy makes its own at its first call

    def __init__(
        self, base: Any, graphs: GraphCache | None = None, operands: str = "int8", skip_padding: bool = True
    ) -> None:
        self.skip_padding = skip_padding
        self.operands = operands
        self.base = base
        self._build(graphs)

    def _build(self, graphs: GraphCache | None = None) -> None:
        base = self.base
        self.layers: list[FusedGpuLayer | None] = []
        for index, layer in enumerate(base.encoder.layer):
            reason = reason_not_to_fuse_on_gpu(layer)
            self.layers.append(None if reason else FusedGpuLayer(layer, self.operands == "e4m3"))
            if reason:
                logger.info("layer %d of %s is not fused: %s", index, type(base).__name__, reason)
        self._norm = base.encoder.layer[0].output.LayerNorm
        self.device = self._norm.weight.device
        reason = reason_not_to_fuse_embeddings(base.embeddings)
        self.embeddings = None if reason else FusedGpuEmbeddings(base.embeddings)
        if reason:
            logger.info("the embeddings of %s are not fused: %s", type(base).__name__, reason)
        following = [None if layer is None else layer.input_grid for layer in self.layers]
        self.grids = [grid or InputGrid() for grid in [*following, None]]
        if graphs is None and self.device.type == "cuda" and all(self.layers):
            graphs = GraphCache(self._run)
        self.graphs = graphs

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Token ids and mask [B, L] to transformers' output; hidden states [B, L, H] are 0 for skipped padding."""
        if not hasattr(self, "layers"):
            self._build()
        hidden = None
        if input_ids is not None and self._can_run(input_ids, attention_mask, inputs_embeds, kwargs):
            with torch.no_grad():
                batch = Batch.of(tuple(input_ids.shape), attention_mask, self.device)  # type: ignore[arg-type]
                if batch.kept is None or self.skip_padding:
                    hidden = self._hidden(batch, self._inputs(batch, input_ids, token_type_ids, position_ids))
        if hidden is not None:
            return self._output(hidden)  # whose pooler may have gradients
        return type(self.base).forward(
            self.base, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs
        )

    def _hidden(self, batch: Batch, inputs: tuple[Given, ...]) -> Tensor:
        """The last hidden state [B, L, H], in memory of its own.

        That is the only copy of the result, made outside of inference mode: tensors made inside cannot be used in the
        training of a head.
        """
        if self.graphs is not None:
            return self.graphs(inputs, batch.starts, batch.longest, batch.scatter_copy)
        given = tuple(as_tensor(t) for t in inputs)
        return batch.scatter_copy(self._run(given, as_tensor(batch.starts), batch.longest, batch))

    def _inputs(
        self, batch: Batch, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None
    ) -> tuple[Given, ...]:
        """Row numbers of the three embedding tables, [T] each; where those are not fused, embedded tokens [T, H]."""
        if self.embeddings is None:
            with torch.inference_mode():
                embedded = self.base.embeddings(
                    input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids
                )
            return (batch.rows(embedded),)
        position_ids = self.embeddings.own_positions(input_ids, position_ids)
        places = batch.places(input_ids) if position_ids is None else batch.rows(position_ids.expand_as(input_ids))
        types = batch.zeros(input_ids) if token_type_ids is None else batch.rows(token_type_ids.expand_as(input_ids))
        return batch.rows(input_ids), places, types

    def _can_run(self, ids: Tensor, mask: Tensor | None, embeds: Tensor | None, kwargs: dict[str, Any]) -> bool:
        return ids.device == self.device == self._norm.weight.device and (
            is_plain_request(self.base, ids, mask, embeds, kwargs)
        )

    @torch.inference_mode()
    def _run(self, inputs: Inputs, starts: Tensor, longest: int, batch: Batch | None = None) -> Tensor:
        """Row numbers (or embedded tokens) [T] to the last hidden state [T, H]; `batch` for layers that pad."""
        project = getattr(self.base, "embeddings_project", None)
        grid = self.grids[0] if project is None else InputGrid()
        tokens = Tokens.quantized(inputs[0], grid) if self.embeddings is None else self.embeddings(inputs, grid)
        if project is not None:
            tokens = Tokens.quantized(project(tokens.x), self.grids[0])
        sums = torch.zeros((len(self.layers), 2, len(tokens.x)), dtype=torch.int32, device=starts.device)
        for index, layer in enumerate(self.layers):
            following = self.grids[index + 1]
            if layer is not None:
                tokens = layer(tokens, starts, longest, sums[index], following)
            else:
                assert batch is not None
                tokens = Tokens.quantized(self._unfused(index, tokens.x, batch), following)
        return tokens.x

    def _unfused(self, index: int, x: Tensor, batch: Batch) -> Tensor:
        mask = None
        if batch.kept is not None:
            hidden = torch.ones(batch.shape[0] * batch.shape[1], dtype=x.dtype, device=x.device)
            hidden[batch.kept] = 0
            mask = (hidden * torch.finfo(x.dtype).min).view(batch.shape[0], 1, 1, batch.shape[1])
        y = self.base.encoder.layer[index](batch.scatter(x), attention_mask=mask)
        return batch.gather(y[0] if isinstance(y, tuple) else y)

    def _output(self, hidden: Tensor) -> Any:
        from transformers.modeling_outputs import (
            BaseModelOutputWithPastAndCrossAttentions,
            BaseModelOutputWithPoolingAndCrossAttentions,
        )

        if not hasattr(self.base, "pooler"):
            return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)
        pooled = None if self.base.pooler is None else self.base.pooler(hidden)
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=pooled)


def _reason_not_to_fuse(base: Any) -> str:
    layers = getattr(getattr(base, "encoder", None), "layer", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or not hasattr(base, "embeddings"):
        return "it has no embeddings and encoder.layer list"
    altered = reason_not_to_replace([base, base.encoder])
    if altered:
        return altered
    device = next(base.parameters()).device
    if implementation(device) != "triton":
        return f"the Triton kernels do not run on {device}, but on NVIDIA GPUs of compute capability 8.0 and later"
    reasons = [reason_not_to_fuse_on_gpu(layer) for layer in layers]
    if any(reasons) and base.config._attn_implementation not in ("sdpa", "eager"):
        return f"{reasons[-1] or reasons[0]}, and {base.config._attn_implementation} attention takes no mask of its own"
    return reasons[0] if all(reasons) else ""
