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
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qbert.encoders.copied import CopiedParameters
from qbert.encoders.targets import base_model
from qbert.inference.cpu_model import Requests, is_plain_input, plain_output
from qbert.inference.forward import FastForward, reason_not_to_replace
from qbert.inference.gpu_layers import (
    FusedGpuEmbeddings,
    FusedGpuLayer,
    InputGrid,
    Tokens,
    reason_not_to_fuse_embeddings,
    reason_not_to_fuse_on_gpu,
)
from qbert.inference.graphs import Bucket, Capture, Graph, GraphCache, Inputs, bucket_of, layout_size, stream_of
from qbert.kernels.dispatch import implementation
from qbert.kernels.operands import UNIFORM_LENGTH, Spans
from qbert.layers.packed import PackedTensor

logger = logging.getLogger(__name__)
_NO_POOLER = object()
_INTEGERS = (torch.int64, torch.int32)
_SHORTCUTS = 1024


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


class Rows(NamedTuple):
    """What the fused layers take of a padded batch [B, L], before its tokens are gathered.

    data: rows of the word and type tables, [B, L] or to be expanded to it, the latter None for zeros; where embeddings
    are not fused embedded tokens [B, L, H] alone. places: rows of the position table, None for 0 to L - 1.
    """

    shape: tuple[int, int]
    data: tuple[Tensor | None, ...]
    places: Tensor | None

    @property
    def first(self) -> Tensor:
        """What is always there."""
        assert self.data[0] is not None
        return self.data[0]

    def likes(self) -> Inputs:
        """As `GraphCache.find` takes them: row numbers are held in int64, whatever they come in."""
        if self.first.dim() == 3:
            return (self.first[0],)
        return (self.first.new_empty(0, dtype=torch.int64),) * len(self.data)

    def select(self, given: Tensor, index: Tensor, out: Tensor) -> None:
        """The tokens `index` [T] of the flattened batch, to `out` [T, ...]."""
        if given.shape[:2] != self.shape:
            given = given.expand(self.shape)
        torch.index_select(given.flatten(0, 1).to(out.dtype), 0, index, out=out)


class Packing(NamedTuple):
    """Which tokens of a padded batch [B, L] there are, known on the host.

    kept: int64 [T], their places in the flattened batch; starts: int32 [B + 1], where each sequence begins among them;
    longest: the length of the longest.
    """

    kept: NDArray[np.int64]
    starts: NDArray[np.int32]
    longest: int

    @classmethod
    def of(cls, mask: Tensor) -> Packing | None:
        """From an attention mask [B, L], in which 0 hides a token, of any pattern; None where it hides none.

        Waits for the GPU once, unless the mask is on the CPU.
        """
        if mask.is_floating_point():
            mask = mask != 0  # numpy has no bfloat16
        keep = (mask.cpu() if mask.is_cuda else mask).numpy() != 0
        if np.count_nonzero(keep) == keep.size:
            return None
        kept, length = np.flatnonzero(keep), keep.shape[1]
        starts = np.searchsorted(kept, np.arange(0, keep.size + 1, length)).astype(np.int32)
        return cls(kept, starts, int(np.diff(starts).max()))

    def laid_out(self, bucket: Bucket, length: int, pinned: bool = False) -> Tensor:
        """`Buffers.layout` for a batch of this length, on the CPU: one copy brings all of it to the GPU."""
        count, tokens = len(self.kept), bucket.tokens
        host = torch.zeros(layout_size(bucket), dtype=torch.int64, device="cpu", pin_memory=pinned)
        flat = host.numpy()
        flat[:count] = self.kept
        np.remainder(self.kept, length, out=flat[tokens : tokens + count])
        starts = flat[2 * tokens :].view(np.int32)
        starts[: len(self.starts)] = self.starts
        starts[len(self.starts) :] = count  # the sequences beyond are empty
        return host


class Arriving:
    """A mask on its way from the GPU to the host; what is launched after it was asked for runs meanwhile."""

    def __init__(self, mask: Tensor) -> None:
        self._host = torch.empty(mask.shape, dtype=mask.dtype, device="cpu", pin_memory=True)
        self._host.copy_(mask, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(mask.device))

    @staticmethod
    def takes_time(mask: Tensor) -> bool:
        """Whether the host has to wait for it."""
        return mask.is_cuda

    def arrived(self) -> Tensor:
        """The mask, on the CPU, once it is there."""
        self._event.synchronize()
        return self._host


class Batch(NamedTuple):
    """A padded batch [B, L] whose tokens are gathered and scattered where no graph does it.

    kept: int64 [T], the places of its tokens in the flattened batch, None where it has no padding.
    """

    shape: tuple[int, int]
    kept: Tensor | None
    spans: Spans

    @classmethod
    def of(cls, shape: tuple[int, int], packing: Packing | None, device: torch.device) -> Batch:
        """The same on the device."""
        count, length = shape
        if packing is not None:
            kept, starts = (torch.from_numpy(a).to(device) for a in packing[:2])
            return cls(shape, kept, Spans(starts, packing.longest))
        starts = torch.arange(0, count * length + 1, length, dtype=torch.int32, device=device)
        # As in its graph, if there comes to be one: a shape has one attention.
        bucket = bucket_of(count * length, count, length, uniform=length >= UNIFORM_LENGTH)
        return cls(shape, None, Spans(starts, length, bucket.uniform))

    def gather(self, padded: Tensor) -> Tensor:
        """[B, L, ...] to [T, ...]."""
        flat = padded.flatten(0, 1)
        return flat if self.kept is None else flat[self.kept]

    def inputs(self, rows: Rows) -> Inputs:
        """Data and places of its tokens, [T, ...] each."""
        whole = [rows.first.new_zeros(self.shape) if t is None else t for t in rows.data]
        whole.append(torch.arange(self.shape[1], device=rows.first.device) if rows.places is None else rows.places)
        return tuple(self.gather(t if t.dim() == 3 else t.expand(self.shape)) for t in whole)

    def scatter(self, tokens: Tensor) -> Tensor:
        """[T, H] to [B, L, H], zero where there is no token; shares memory with `tokens` where there is no padding."""
        if self.kept is None:
            return tokens.view(*self.shape, -1)
        return _scattered(tokens, self.kept, self.shape)


def _scattered(tokens: Tensor, kept: Tensor, shape: tuple[int, int]) -> Tensor:
    padded = tokens.new_zeros((shape[0] * shape[1], tokens.shape[1]))
    return padded.index_copy_(0, kept, tokens).view(*shape, -1)


class Whole:
    """The buffers of a graph as batches [B, L] without padding see them, so that a call makes no view of its own.

    Attributes:
        output: [B, L, H].
    """

    def __init__(self, graph: Graph, shape: tuple[int, int]) -> None:
        self.graph, self.shape = graph, shape
        count, buffers = shape[0] * shape[1], graph.buffers
        with torch.inference_mode(False):
            self._data = [t[:count].unflatten(0, shape) for t in buffers.data]
            self._places = buffers.places[:count].unflatten(0, shape)
        self.output = graph.output[:count].unflatten(0, shape)

    def fill(self, rows: Rows) -> None:
        """Writes what is not there yet: places and starts follow from the shape."""
        graph = self.graph
        for index, (target, given) in enumerate(zip(self._data, rows.data, strict=True)):
            if given is None:
                graph.zero(index)
            else:
                target.copy_(given)
                graph.zeros.discard(index)
        if rows.places is not None:
            self._places.copy_(rows.places)
            graph.places_of = None
        elif graph.places_of != self.shape:
            self._places.copy_(torch.arange(self.shape[1], device=self._places.device))
            graph.places_of = self.shape
        if graph.starts_of != self.shape:
            starts, (count, length) = graph.buffers.starts, self.shape
            # The sequences beyond are empty.
            starts.copy_((torch.arange(len(starts), device=starts.device) * length).clamp_(max=count * length))
            graph.starts_of = self.shape


def _replay(graphs: GraphCache, rows: Rows) -> Tensor | None:
    """The last hidden state [B, L, H] of a batch without padding; None where there is no graph for it."""
    key = (rows.shape, stream_of(rows.first))
    whole: Whole | None = graphs.shortcuts.get(key)
    if whole is None:
        (count, length), stream = key
        bucket = bucket_of(count * length, count, length, uniform=length >= UNIFORM_LENGTH)
        graph = graphs.find(bucket, stream, rows.likes)
        if graph is None:
            return None
        if len(graphs.shortcuts) >= _SHORTCUTS:
            graphs.shortcuts.clear()
        whole = graphs.shortcuts[key] = Whole(graph, (count, length))
    whole.fill(rows)
    whole.graph.replay()
    hidden = whole.output.clone()
    graphs.used(whole.graph)
    return hidden


def _replay_packed(graphs: GraphCache, rows: Rows, packing: Packing) -> Tensor | None:
    """The same of a batch with padding, whose hidden states are zeros."""
    (count, length), tokens = rows.shape, len(packing.kept)
    bucket = bucket_of(tokens, count, packing.longest)
    graph = graphs.find(bucket, stream_of(rows.first), rows.likes) if tokens else None
    if graph is None:
        return None
    buffers = graph.buffers
    graph.places_of = graph.starts_of = None
    # Nothing waits for it: torch keeps pinned memory until it has been read.
    layout = packing.laid_out(bucket, length, pinned=buffers.layout.is_cuda)
    buffers.layout.copy_(layout, non_blocking=True)
    for index, given in enumerate(rows.data):
        if given is None:
            graph.zero(index)
        else:
            rows.select(given, buffers.kept, buffers.data[index])
            graph.zeros.discard(index)
    if rows.places is not None:
        rows.select(rows.places, buffers.kept, buffers.places)
    graph.replay()
    return _scattered(graph.output[:tokens], buffers.kept[:tokens], rows.shape)


class GpuEncoder(FastForward):
    """``forward`` of the base model (not a module: it adds nothing to the state of the model).

    Args:
        base: model with ``embeddings`` and ``encoder.layer``, some layer of which can be fused.
        operands: "e4m3" gives e4m3 inputs to products with weights of 2 to 4 bits, "int8" gives int8 to all.
        capture: makes a graph of batches of one shape that come again and again; ``None`` captures CUDA graphs on a GPU
            where every layer is fused.
        skip_padding: as for `fuse_for_gpu`.
    """

    own = ("base", "operands", "skip_padding")
    shares_the_rest = False  # buffers and graphs serve one model; a copy makes its own at its first call

    def __init__(
        self, base: Any, capture: Capture | None = None, operands: str = "int8", skip_padding: bool = True
    ) -> None:
        self.skip_padding = skip_padding
        self.operands = operands
        self.base = base
        self._build(capture)

    def _build(self, capture: Capture | None = None) -> None:
        base = self.base
        self.layers: list[FusedGpuLayer | None] = []
        for index, layer in enumerate(base.encoder.layer):
            reason = reason_not_to_fuse_on_gpu(layer)
            self.layers.append(None if reason else FusedGpuLayer(layer, self.operands == "e4m3"))
            if reason:
                logger.info("layer %d of %s is not fused: %s", index, type(base).__name__, reason)
        self._norm = base.encoder.layer[0].output.LayerNorm
        self.device = self._norm.weight.device
        # Held, so that no other memory gets its address.
        self._home = self._norm.weight.detach()
        self._asks, self._kinds = Requests(), _outputs()
        reason = reason_not_to_fuse_embeddings(base.embeddings)
        self.embeddings = None if reason else FusedGpuEmbeddings(base.embeddings)
        if reason:
            logger.info("the embeddings of %s are not fused: %s", type(base).__name__, reason)
        copied: dict[str, nn.Module] = {} if reason else {"embeddings": base.embeddings}
        held = zip(base.encoder.layer, self.layers, strict=True)
        copied |= {f"encoder.layer.{i}": layer for i, (layer, fused) in enumerate(held) if fused is not None}
        self._copied = CopiedParameters(copied)
        following = [None if layer is None else layer.input_grid for layer in self.layers]
        self.grids = [grid or InputGrid() for grid in [*following, None]]
        self._capture = capture
        self._unpadded: set[tuple[int, ...]] = set()  # shapes of masks on the GPU that hid nothing the last time
        graphed = capture is not None or (self.device.type == "cuda" and all(self.layers))
        self.graphs = GraphCache(self._run, capture=capture) if graphed else None

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Token ids and mask [B, L] to transformers' output; hidden states [B, L, H] are 0 for skipped padding.

        A mask that is left on the CPU spares the wait for the GPU to say how long the sequences are.
        """
        if "graphs" not in self.__dict__:
            self._build()
        if (
            input_ids is not None
            and all(t is None or t.dtype in _INTEGERS for t in (input_ids, token_type_ids, position_ids))
            and self._can_run(input_ids, attention_mask, inputs_embeds, kwargs)
        ):
            packing = hidden = None
            if attention_mask is not None:
                rows = partial(self._rows, input_ids, token_type_ids, position_ids)
                packing, hidden = self._look_at(attention_mask, rows)
            if packing is None or self.skip_padding:
                if hidden is None:
                    hidden = self._hidden(packing, self._rows(input_ids, token_type_ids, position_ids))
                # While the GPU works. All parameters together take as long as a small graph, so one call in 32 looks.
                self._copied.check(tokens=0)
                return self._output(hidden)  # whose pooler may have gradients
        self._copied.doubt()
        return type(self.base).forward(
            self.base, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs
        )

    def _look_at(self, mask: Tensor, rows: Callable[[], Rows]) -> tuple[Packing | None, Tensor | None]:
        """What a mask hides; and the last hidden state, where it hides nothing and that was guessed.

        The guess is that it hides as much as the last mask of its shape on the GPU. So the GPU works while the host
        waits for the mask, and a wrong guess costs a graph in vain.
        """
        if not Arriving.takes_time(mask):
            return Packing.of(mask), None
        hidden = None
        if mask.shape in self._unpadded and self.graphs is not None:
            arriving = Arriving(mask)
            hidden = self._replayed(None, rows())
            packing = Packing.of(arriving.arrived())
        else:
            packing = Packing.of(mask)
        if packing is not None:
            self._unpadded.discard(mask.shape)
            return packing, None
        if len(self._unpadded) >= _SHORTCUTS:
            self._unpadded.clear()
        self._unpadded.add(mask.shape)
        return None, hidden

    def _rows(self, ids: Tensor, types: Tensor | None, positions: Tensor | None) -> Rows:
        if self.embeddings is None:
            with torch.inference_mode():
                embedded = self.base.embeddings(input_ids=ids, token_type_ids=types, position_ids=positions)
            return Rows(embedded.shape[:2], (embedded,), None)
        return Rows(ids.shape, (ids, types), self.embeddings.own_positions(ids, positions))  # type: ignore[arg-type]

    def _hidden(self, packing: Packing | None, rows: Rows) -> Tensor:
        """The last hidden state [B, L, H], in memory of its own.

        That is the only copy of the result, made outside of inference mode: tensors made inside cannot be used in the
        training of a head.
        """
        hidden = self._replayed(packing, rows)
        if hidden is not None:
            return hidden
        with torch.no_grad():
            batch = Batch.of(rows.shape, packing, self.device)
            return batch.scatter(self._run(batch.inputs(rows), batch.spans, batch).clone())

    def _replayed(self, packing: Packing | None, rows: Rows) -> Tensor | None:
        """`_hidden` through a graph; None where there is none."""
        graphs = self.graphs
        if graphs is None:
            return None
        # Held until the result is copied: the buffers of a graph serve one caller at a time.
        with graphs.lock:
            return _replay(graphs, rows) if packing is None else _replay_packed(graphs, rows, packing)

    def _can_run(self, ids: Tensor, mask: Tensor | None, embeds: Tensor | None, kwargs: dict[str, Any]) -> bool:
        weight = self._norm._parameters["weight"]
        assert weight is not None
        plain = ids.device == self.device == weight.device and is_plain_input(ids, mask, embeds)
        if not plain or not self._asks.for_no_more(self.base, kwargs):
            return False
        if weight.data_ptr() != self._home.data_ptr():
            self._build(self._capture)  # the model was moved, and graphs read where it was
        return True

    @torch.inference_mode()
    def _run(self, inputs: Inputs, spans: Spans, batch: Batch | None = None) -> Tensor:
        """Data and places of T tokens to the last hidden state [T, H]; `batch` for layers that pad."""
        # Before the first kernel, so that none of the chain follows a fill of memory, which would end its overlap.
        # Every row of them begins at a multiple of 16 bytes, which kernels are compiled for.
        tokens_held = -(-len(inputs[0]) // 16) * 16
        sums = torch.zeros((len(self.layers), 2, tokens_held), dtype=torch.int32, device=spans.starts.device)
        sums = sums[..., : len(inputs[0])]
        project = getattr(self.base, "embeddings_project", None)
        grid = self.grids[0] if project is None else InputGrid()
        if self.embeddings is None:
            tokens = Tokens.quantized(inputs[0], grid)
        else:
            ids, types, places = inputs
            tokens = self.embeddings((ids, places, types), grid)
        if project is not None:
            tokens = Tokens.quantized(project(tokens.x), self.grids[0])
        for index, layer in enumerate(self.layers):
            following = self.grids[index + 1]
            if layer is not None:
                tokens = layer(tokens, spans, sums[index], following)
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
        pooler: Any = getattr(self.base, "pooler", _NO_POOLER)
        output = plain_output(self._kinds[pooler is not _NO_POOLER], hidden)
        if pooler is not _NO_POOLER and pooler is not None:
            output["pooler_output"] = pooler(hidden)
        return output


def _outputs() -> tuple[Any, Any]:
    """The classes of outputs without and with a pooled one."""
    from transformers import modeling_outputs

    return (
        modeling_outputs.BaseModelOutputWithPastAndCrossAttentions,
        modeling_outputs.BaseModelOutputWithPoolingAndCrossAttentions,
    )


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
