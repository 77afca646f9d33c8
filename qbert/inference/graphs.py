"""CUDA graphs of an encoder, one a bucket of shapes: a forward pass of a hundred kernels becomes one launch.

A graph replays fixed shapes in fixed memory. Token counts, numbers of sequences and lengths are therefore rounded up
to buckets; a call copies its tokens into the graph's buffers and the result out of them. Rows beyond the real tokens
belong to no sequence: they are computed and thrown away. A bucket runs eagerly when it is first seen and is captured at
its second use, so that a shape which never returns costs no capture; the graphs used longest ago are dropped.

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


# A captured run: inputs of at most the bucket's size in, the result for their tokens out.
Captured = Callable[[Inputs, Tensor], Tensor]
Capture = Callable[[Run, Bucket, Inputs, Tensor], Captured]


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

    def __call__(self, inputs: Inputs, starts: Tensor, longest: int) -> Tensor:
        """`run(inputs, starts, longest)`, as a tensor that later calls do not write to."""
        bucket = bucket_of(inputs[0].shape[0], starts.numel() - 1, longest)
        if bucket.tokens > MAX_GRAPH_TOKENS or not inputs[0].shape[0]:
            return self.run(inputs, starts, longest)
        key = (bucket, _stream_of(starts), tuple((t.dtype, tuple(t.shape[1:])) for t in inputs))
        # Held through the replay: the buffers of a graph serve one caller at a time.
        with self._lock:
            graph = self._graphs.get(key) or self._captured_at_second_use(key, bucket, inputs, starts)
            if graph is not None:
                self._graphs.move_to_end(key)
                return graph(inputs, starts)
        return self.run(inputs, starts, longest)

    def _captured_at_second_use(self, key: Hashable, bucket: Bucket, inputs: Inputs, starts: Tensor) -> Captured | None:
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

    def capture(self, run: Run, bucket: Bucket, inputs: Inputs, starts: Tensor) -> Captured:
        """A graph of `run` for the bucket; the inputs serve as example data."""
        stream, pool = self._homes.setdefault(
            _stream_of(starts), (torch.cuda.Stream(starts.device), torch.cuda.graph_pool_handle())
        )
        return _CudaGraph(run, bucket, inputs, starts, stream, pool)


class _CudaGraph:
    def __init__(
        self, run: Run, bucket: Bucket, inputs: Inputs, starts: Tensor, stream: torch.cuda.Stream, pool: Any
    ) -> None:
        self.inputs = tuple(t.new_zeros((bucket.tokens, *t.shape[1:])) for t in inputs)
        self.starts = starts.new_zeros(bucket.sequences + 1)
        self._fill(inputs, starts)
        caller = torch.cuda.current_stream(starts.device)
        stream.wait_stream(caller)
        # Once outside of the graph, on its stream: this compiles kernels and makes the workspaces that outlive a run.
        with torch.cuda.stream(stream):
            run(self.inputs, self.starts, bucket.longest)
        stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=stream):
            self.output = run(self.inputs, self.starts, bucket.longest)
        caller.wait_stream(stream)

    def _fill(self, inputs: Inputs, starts: Tensor) -> None:
        for buffer, tensor in zip(self.inputs, inputs, strict=True):
            buffer[: tensor.shape[0]].copy_(tensor)
        self.starts[: starts.numel()].copy_(starts)
        self.starts[starts.numel() :].fill_(inputs[0].shape[0])  # the sequences beyond are empty

    def __call__(self, inputs: Inputs, starts: Tensor) -> Tensor:
        self._fill(inputs, starts)
        self.graph.replay()
        return self.output[: inputs[0].shape[0]].clone()


def _stream_of(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
