"""CUDA graphs of an encoder, one a bucket of shapes: a forward pass of a hundred kernels becomes one launch.

A graph replays fixed shapes in fixed memory. Token counts, numbers of sequences and lengths are therefore rounded up
to buckets; a call writes its tokens into the graph's buffers and copies the result out of them. What follows from the
shape alone, such as positions (`Rows` with a key), is written once. Rows beyond the real tokens belong to no sequence:
they are computed and thrown away. A bucket runs eagerly when it is first seen and is captured at its second use, so
that a shape which never returns costs no capture; the graphs used longest ago are dropped.
It stands alone because it knows no model: whatever runs over rows of tokens can be captured.

    graphs = GraphCache(run)                      # run(inputs, starts, longest) -> [T, H]
    y = graphs((ids, positions, types), starts, longest=128)
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
Inputs = tuple[Tensor, ...]
Run = Callable[[Inputs, Tensor, int], Tensor]
Finish = Callable[[Tensor], Tensor]
MAX_GRAPH_TOKENS = 1 << 16  # beyond, launching takes no time worth saving, and the buffers much memory
_SEEN_PER_GRAPH = 8


class Bucket(NamedTuple):
    """Shapes that share a graph: tokens, sequences and longest sequence, each rounded up."""

    tokens: int
    sequences: int
    longest: int


def bucket_of(tokens: int, sequences: int, longest: int) -> Bucket:
    """The bucket of a batch: tokens to an eighth of their power of two (at most 1/8 is wasted), the others to powers.

    Sequences and length only decide how many programs of the attention find nothing to do, so their steps are coarse.
    """
    step = max(16, _power_of_two(tokens) // 16)
    return Bucket(-(-tokens // step) * step, _power_of_two(sequences), max(16, _power_of_two(longest)))


def _power_of_two(n: int) -> int:
    return 1 << (max(n, 1) - 1).bit_length()


class Rows(NamedTuple):
    """Rows of an input that are written where they are needed, be it into a graph's buffer.

    rows: how many; like: a tensor of their dtype, device and shape from the second dimension on; write: fills a tensor
    [rows, ...] with them; key: what they follow from, so that equal keys mean equal rows; None where from data.
    """

    rows: int
    like: Tensor
    write: Callable[[Tensor], Any]
    key: Hashable = None

    def tensor(self) -> Tensor:
        """They, [rows, ...]."""
        made = self.like.new_empty((self.rows, *self.like.shape[1:]))
        self.write(made)
        return made


Given = Tensor | Rows


def as_tensor(given: Given) -> Tensor:
    """The rows as a tensor [rows, ...]."""
    return given.tensor() if isinstance(given, Rows) else given


def _count(given: Given) -> int:
    return given.rows if isinstance(given, Rows) else given.shape[0]


def _like(given: Given) -> Tensor:
    return given.like if isinstance(given, Rows) else given


# A captured run: inputs of at most the bucket's size in; the result for all of the bucket's tokens in its own buffer.
Captured = Callable[[tuple[Given, ...], Given], Tensor]
Capture = Callable[[Run, Bucket, tuple[Given, ...], Given], Captured]


class GraphCache:
    """Runs `run` eagerly or through a captured graph, whichever the bucket of the inputs calls for.

    Args:
        run: takes tuples of tensors with T rows, starts int32 [S + 1] and the longest length; gives [T, ...]. It must
            not wait for the GPU nor depend on values.
        limit: number of graphs that are kept.
        capture: makes a graph; the default is `CudaGraphs().capture`.
    """

    def __init__(self, run: Run, *, limit: int = 32, capture: Capture | None = None) -> None:
        self.run, self.limit = run, limit
        self._capture = capture if capture is not None else CudaGraphs().capture
        self._graphs: OrderedDict[Hashable, Captured] = OrderedDict()
        self._seen: OrderedDict[Hashable, bool] = OrderedDict()  # False: cannot be captured
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(self, inputs: tuple[Given, ...], starts: Given, longest: int, finish: Finish = Tensor.clone) -> Tensor:
        """`finish(run(inputs, starts, longest))`; `finish` copies, because later calls write to what it is given."""
        tokens = _count(inputs[0])
        bucket = bucket_of(tokens, _count(starts) - 1, longest)
        if bucket.tokens <= MAX_GRAPH_TOKENS and tokens:
            like = [_like(t) for t in inputs]
            key = (bucket, _stream_of(like[0]), tuple((t.dtype, t.shape[1:]) for t in like))
            # Held until the result is copied: the buffers of a graph serve one caller at a time.
            with self._lock:
                graph = self._graphs.get(key) or self._captured_at_second_use(key, bucket, inputs, starts)
                if graph is not None:
                    self._graphs.move_to_end(key)
                    output = graph(inputs, starts)
                    return finish(output if tokens == bucket.tokens else output[:tokens])
        return finish(self.run(tuple(as_tensor(t) for t in inputs), as_tensor(starts), longest))

    def _captured_at_second_use(
        self, key: Hashable, bucket: Bucket, inputs: tuple[Given, ...], starts: Given
    ) -> Captured | None:
        usable = self._seen.get(key)
        if usable is None:
            self._seen[key] = True
            while len(self._seen) > _SEEN_PER_GRAPH * self.limit:
                self._seen.popitem(last=False)
        if not usable:
            return None
        # Before the capture, so that its memory is there for the new graph.
        while len(self._graphs) >= self.limit:
            self._graphs.popitem(last=False)
        try:
            self._graphs[key] = self._capture(self.run, bucket, inputs, starts)
        except RuntimeError as error:
            self._seen[key] = False
            logger.warning("%s runs without a CUDA graph: %s", bucket, str(error).splitlines()[0])
            return None
        return self._graphs[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphCache:
        raise TypeError("a GraphCache belongs to the model it was made for; make a new one for a copy")


class CudaGraphs:
    """Captures on a stream of its own; all graphs of one caller's stream share a memory pool."""

    def __init__(self) -> None:
        self._homes: dict[int, tuple[torch.cuda.Stream, Any]] = {}

    def capture(self, run: Run, bucket: Bucket, inputs: tuple[Given, ...], starts: Given) -> Captured:
        """A graph of `run` for the bucket; the inputs serve as example data."""
        device, home = _like(starts).device, _stream_of(_like(starts))
        if home not in self._homes:
            self._homes[home] = (torch.cuda.Stream(device), torch.cuda.graph_pool_handle())
        stream, pool = self._homes[home]
        return _CudaGraph(run, bucket, inputs, starts, stream, pool)


class Buffers:
    """The fixed memory that a graph reads: inputs [tokens, ...] and starts [sequences + 1] of a bucket."""

    def __init__(self, bucket: Bucket, inputs: tuple[Given, ...], starts: Given) -> None:
        # Not tensors of inference mode, which could not be written to outside of it.
        with torch.inference_mode(False):
            likes = [_like(t) for t in inputs]
            self.inputs = tuple(t.new_zeros((bucket.tokens, *t.shape[1:])) for t in likes)
            self.starts = _like(starts).new_zeros(bucket.sequences + 1)
        self._held: list[Hashable] = [None] * (len(inputs) + 1)

    def fill(self, inputs: tuple[Given, ...], starts: Given) -> None:
        """Writes what is not there yet."""
        for place, (buffer, given) in enumerate(zip((*self.inputs, self.starts), (*inputs, starts), strict=True)):
            count = _count(given)
            key = (given.key, count) if isinstance(given, Rows) and given.key is not None else None
            if key is not None and key == self._held[place]:
                continue
            self._held[place] = key
            rows = buffer if count == buffer.shape[0] else buffer[:count]
            if isinstance(given, Rows):
                given.write(rows)
            else:
                rows.copy_(given)
            if buffer is self.starts and rows is not buffer:
                buffer[count:].fill_(_count(inputs[0]))  # the sequences beyond are empty


class _CudaGraph:
    def __init__(
        self,
        run: Run,
        bucket: Bucket,
        inputs: tuple[Given, ...],
        starts: Given,
        stream: torch.cuda.Stream,
        pool: Any,
    ) -> None:
        self.buffers = Buffers(bucket, inputs, starts)
        self.buffers.fill(inputs, starts)
        caller = torch.cuda.current_stream(stream.device)
        stream.wait_stream(caller)
        # Once outside of the graph, on its stream: this compiles kernels and makes the workspaces that outlive a run.
        with torch.cuda.stream(stream):
            run(self.buffers.inputs, self.buffers.starts, bucket.longest)
        stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=stream):
            self.output = run(self.buffers.inputs, self.buffers.starts, bucket.longest)
        caller.wait_stream(stream)

    def __call__(self, inputs: tuple[Given, ...], starts: Given) -> Tensor:
        self.buffers.fill(inputs, starts)
        self.graph.replay()
        return self.output


def _stream_of(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
