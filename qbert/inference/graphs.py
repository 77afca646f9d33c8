"""CUDA graphs of an encoder, one a bucket of shapes: a forward pass of a hundred kernels becomes one launch.

A graph replays fixed shapes in fixed memory. Token counts, numbers of sequences and lengths are therefore rounded up
to buckets; a caller writes its tokens into the graph's buffers, replays it, and copies the result out of them. Rows
beyond the real tokens belong to no sequence: they are computed and thrown away. A bucket is captured at its second use,
so that a shape which never returns costs no capture; the graphs used longest ago are dropped.
It stands alone because it knows no model: whatever runs over rows of tokens can be captured.

    graphs = GraphCache(run)                      # run((*data, places), spans) -> [T, H]
    with graphs.lock:
        graph = graphs.find(bucket_of(tokens, sequences, longest), stream=0, likes=lambda: (ids,))
        if graph is not None:                     # else: run it without
            ...                                   # write graph.buffers
            graph.replay()
            y = graph.output[:tokens].clone()
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qbert.kernels.operands import Spans

logger = logging.getLogger(__name__)
Inputs = tuple[Tensor, ...]
Run = Callable[[Inputs, Spans], Tensor]
MAX_GRAPH_TOKENS = 1 << 16  # beyond, launching takes no time worth saving, and the buffers much memory
_SEEN_PER_GRAPH = 8
_capturing = threading.Lock()  # torch allows one capture at a time in a process


class Bucket(NamedTuple):
    """Shapes that share a graph: tokens, sequences and longest sequence, each rounded up; or, if `uniform`, one shape.

    The sequences of a uniform bucket are all `longest` long and fill its tokens.
    """

    tokens: int
    sequences: int
    longest: int
    uniform: bool = False


def bucket_of(tokens: int, sequences: int, longest: int, uniform: bool = False) -> Bucket:
    """The bucket of a batch: tokens to an eighth of their power of two (at most 1/8 is wasted), the others to powers.

    Sequences and length only decide how many programs of the attention find nothing to do, so their steps are coarse.
    `uniform` asks for a bucket of this very shape, which is given where the tokens need no rounding: each length would
    have a graph of its own otherwise.
    """
    step = max(16, _power_of_two(tokens) // 16)
    rounded = -(-tokens // step) * step
    if uniform and rounded == tokens:
        return Bucket(tokens, sequences, longest, uniform=True)
    # At most 65,535 sequences are the third axis of a grid.
    most = max(sequences, min(_power_of_two(sequences), 65535))
    return Bucket(rounded, most, max(16, _power_of_two(longest)))


def _power_of_two(n: int) -> int:
    return 1 << (max(n, 1) - 1).bit_length()


class Buffers:
    """The fixed memory that a graph reads.

    Attributes:
        data: what the caller gathers, each [tokens, ...], in the dtypes and widths of `likes`.
        layout: int64, all that says where tokens lie, for one copy from the host: `kept` [tokens], the places of the
            tokens in the flattened padded batch; `places` [tokens], those in their padded sequences; `starts` int32
            [sequences + 1], as `Spans` has them. They are views of it, in this order.
    """

    def __init__(self, bucket: Bucket, likes: Inputs) -> None:
        tokens = bucket.tokens
        # Not tensors of inference mode, which could not be written to outside of it.
        with torch.inference_mode(False):
            self.data = tuple(like.new_zeros((tokens, *like.shape[1:])) for like in likes)
            self.layout = torch.zeros(layout_size(bucket), dtype=torch.int64, device=likes[0].device)
            self.kept, self.places = self.layout[:tokens], self.layout[tokens : 2 * tokens]
            self.starts = self.layout[2 * tokens :].view(torch.int32)[: bucket.sequences + 1]

    @property
    def inputs(self) -> Inputs:
        """What the captured function takes."""
        return (*self.data, self.places)


def layout_size(bucket: Bucket) -> int:
    """Elements of `Buffers.layout`."""
    return 2 * bucket.tokens + (bucket.sequences + 2) // 2


# Captures a run over the buffers of a bucket: what replays it, and the memory [tokens, ...] that holds its result then.
Capture = Callable[[Run, Bucket, Buffers], tuple[Callable[[], Any], Tensor]]


class Graph:
    """A captured run.

    Attributes:
        replay: computes `output` [tokens, ...] from `buffers`, on the stream that it was captured for.
        zeros: which of the data are zeros, for whoever writes others to note.
        places_of, starts_of: whose places and starts the buffers hold; the writer's own objects, None where unknown.
    """

    def __init__(self, key: Hashable, buffers: Buffers, replay: Callable[[], Any], output: Tensor) -> None:
        self.key, self.buffers, self.replay, self.output = key, buffers, replay, output
        self.zeros = set(range(len(buffers.data)))
        self.places_of: object = None
        self.starts_of: object = None

    def zero(self, index: int) -> None:
        """Makes data[index] zeros, where it is not."""
        if index not in self.zeros:
            self.buffers.data[index].zero_()
            self.zeros.add(index)


class GraphCache:
    """Finds the graph of a bucket, or captures it at the second time it is looked for.

    Args:
        run: takes data and places of T tokens, and their `Spans`; gives [T, ...]. It must not wait for the GPU nor
            depend on values.
        limit: number of graphs that are kept.
        capture: makes a graph; the default is `CudaGraphs().capture`.

    Attributes:
        lock: to be held from `find` until the result is copied: buffers serve one caller at a time.
        shortcuts: what callers found for graphs that are kept, by their own keys; emptied when one is dropped.
    """

    def __init__(self, run: Run, *, limit: int = 32, capture: Capture | None = None) -> None:
        self.run, self.limit = run, limit
        self.lock = threading.Lock()
        self.shortcuts: dict[Hashable, Any] = {}
        self._capture = capture if capture is not None else CudaGraphs().capture
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._seen: OrderedDict[Hashable, bool] = OrderedDict()  # False: cannot be captured

    def __len__(self) -> int:
        return len(self._graphs)

    def find(self, bucket: Bucket, stream: int, likes: Callable[[], Inputs]) -> Graph | None:
        """The graph of a bucket, for the stream that is current; None where it runs without one.

        Args:
            stream: the number of the stream.
            likes: gives of each kind of data a tensor of its dtype, device and shape from the second dimension on.
        """
        if not 0 < bucket.tokens <= MAX_GRAPH_TOKENS:
            return None
        key = (bucket, stream)
        graph = self._graphs.get(key) or self._captured_at_second_use(key, bucket, likes)
        if graph is not None:
            self.used(graph)
        return graph

    def used(self, graph: Graph) -> None:
        """Notes that a graph was used without being looked for."""
        self._graphs.move_to_end(graph.key)

    def _captured_at_second_use(self, key: Hashable, bucket: Bucket, likes: Callable[[], Inputs]) -> Graph | None:
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
            self.shortcuts.clear()
        try:
            buffers = Buffers(bucket, likes())
            self._graphs[key] = Graph(key, buffers, *self._capture(self.run, bucket, buffers))
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

    def capture(self, run: Run, bucket: Bucket, buffers: Buffers) -> tuple[Callable[[], Any], Tensor]:
        """A graph of `run` over the buffers, which need hold nothing but zeros yet."""
        device = buffers.layout.device
        caller = torch.cuda.current_stream(device)
        if caller.cuda_stream not in self._homes:
            self._homes[caller.cuda_stream] = (torch.cuda.Stream(device), torch.cuda.graph_pool_handle())
        stream, pool = self._homes[caller.cuda_stream]
        spans = Spans(buffers.starts, bucket.longest, bucket.uniform)
        stream.wait_stream(caller)
        # Once outside of the graph, on its stream: this compiles kernels and makes the workspaces that outlive a run.
        with torch.cuda.stream(stream):
            run(buffers.inputs, spans)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            # What other threads do meanwhile, such as to allocate memory, does not end a capture of this thread's own.
            with _capturing, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                output = run(buffers.inputs, spans)
        except BaseException:
            torch.cuda.set_stream(caller)  # a capture that ends in an error leaves its own stream current
            raise
        caller.wait_stream(stream)
        return graph.replay, output


def stream_of(tensor: Tensor) -> int:
    """The number of the stream that is current on the tensor's GPU; 0 on a CPU."""
    # Not torch.cuda.current_stream, which makes an object of it in two microseconds.
    return torch._C._cuda_getCurrentRawStream(tensor.get_device()) if tensor.is_cuda else 0  # type: ignore[no-any-return]
