"""Exact products of the loss Hessian with vectors, one diagonal block of parameters at a time.

For a block with parameters W and the mean loss L of a subset, ``H v = d/dW <dL/dW, v>`` (Pearlmutter 1994; Q-BERT,
section 3.1). The first-order graph of a micro-batch (forward and backward, ``create_graph=True``) is built once and
serves every block and every product: a product of block i of L equal layers then costs ``2 (L-1-i) + 5`` layer
forwards, which is the least that an exact product can cost.

    >>> operator = HessianOperator(model, micro_batches, {"layer 0": list(layer.parameters())})
    >>> operator.product("layer 0", vector)  # [n] -> [n]
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from qbert.hessian.batches import Batch
from qbert.hessian.blocks import Part, cut, distinct_parameters, whole
from qbert.hessian.eigen import all_finite
from qbert.hessian.losses import LossFunction, MeasuredLoss, requiring_gradients


class HessianOperator:
    """The Hessian of the mean loss over `batches`, restricted to blocks of parameters.

    The model is left exactly as it was: ``.grad``, training flags, ``requires_grad`` and random state are not
    touched beyond the call that needs them, also when that call is interrupted. Dropout is off. Attention runs
    through PyTorch's math kernels, since the fused ones have no second derivative.

    Args:
        model: any module; its parameters must not change while the operator is in use.
        batches: micro-batches, dicts of tensors with the model's argument names, labels included.
        blocks: name -> parameters (or `Rows` of a weight matrix); a parameter may be in several blocks.
        loss_fn: ``loss_fn(model, batch)`` -> mean loss of the batch (a scalar); default ``model(**batch).loss``.
        retain: keep the graphs of all micro-batches between products (True), rebuild them for each call (False),
            or decide by the free memory (None).
        autocast: compute the matrix products of the model in this dtype (`torch.autocast`), such as torch.bfloat16;
            vectors and results stay as they are. Its rounding makes the products a few parts in a hundred wrong and
            the operator not quite symmetric.

    Raises:
        ValueError: no batches, no loss, labels out of range, a loss that is not finite, an attention
            implementation without second derivative.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        blocks: Mapping[str, Sequence[Part]],
        *,
        loss_fn: LossFunction | None = None,
        retain: bool | None = None,
        autocast: torch.dtype | None = None,
    ):
        if not batches:
            raise ValueError("batches: no labelled samples; pass at least one batch with labels other than -100")
        self.measured = MeasuredLoss(model, batches, loss_fn)
        self.model, self.batches, self.loss_fn = model, batches, self.measured.loss_fn
        self.blocks = {name: list(parameters) for name, parameters in blocks.items()}
        self._shares = [self.measured.share(batch) for batch in batches]
        self._retain, self._autocast = retain, autocast
        self._graphs: dict[int, _Graph] = {}
        self._losses: dict[int, float] = {}

    @classmethod
    def of(
        cls, measured: MeasuredLoss, blocks: Mapping[str, Sequence[Part]], *, autocast: torch.dtype | None = None
    ) -> HessianOperator:
        """The Hessian of a loss that is put together already."""
        return cls(measured.model, measured.batches, blocks, loss_fn=measured.loss_fn, autocast=autocast)

    def size(self, name: str) -> int:
        """Number of parameters n in the block."""
        return sum(p.numel() for p in self.blocks[name])

    @property
    def loss(self) -> float:
        """Mean loss over all samples."""
        for index in range(len(self.batches)):
            if index not in self._losses:
                with self.measured.evaluating():
                    self._losses[index] = self._finite_loss(index, torch.no_grad()).item()
        return sum(share * self._losses[i] for i, share in enumerate(self._shares))

    @property
    def retained(self) -> bool:
        """Whether graphs are kept between products; decided by free memory after the first one was built."""
        if self._retain is None:
            with saved_tensor_bytes(self.model) as saved:
                self._graph(0, self.blocks)
            free = free_bytes(self.measured.device)
            self._retain = saved.total * len(self.batches) <= 0.5 * (free + saved.total)
            if not self._retain:
                self.release()
        return self._retain

    def product(self, name: str, vector: Tensor) -> Tensor:
        """H v of one block, [n] -> [n], in the dtype of `vector`."""
        return self.products({name: vector})[name]

    def products(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """H v of several blocks, name -> [n]; each micro-batch's graph is built at most once.

        Raises:
            ValueError: an unknown block, or a vector of another size; ArithmeticError if a product is not finite.
        """
        for name, vector in vectors.items():
            if name not in self.blocks:
                raise ValueError(f"vectors: {name!r} is no block of this operator; use one of {', '.join(self.blocks)}")
            if vector.shape != (self.size(name),):
                raise ValueError(
                    f"vectors: that of {name} has the shape {tuple(vector.shape)} instead of ({self.size(name)},)"
                )
        totals = {name: torch.empty_like(vector) for name, vector in vectors.items()}
        retained = self.retained
        for index in range(len(self.batches)):
            graph = self._graph(index, self.blocks if retained else vectors)
            for name, vector in vectors.items():
                graph.add_product(self.blocks[name], vector, totals[name], first=index == 0)
            if not retained:
                self.release()
        for name, total in totals.items():
            if not all_finite(total):
                raise ArithmeticError(
                    f"the Hessian product of block {name} is not finite; run the model in float32 and check its weights"
                )
        return totals

    def gradient(self, name: str) -> Tensor:
        """Gradient of the mean loss with respect to the block, [n]."""
        parts = []
        for index in range(len(self.batches)):
            gradients = self._graph(index, self.blocks).gradients
            parts.append(_flat([gradients.get(id(whole(p))) for p in self.blocks[name]], self.blocks[name]))
            if not self.retained:
                self.release()
        return torch.stack(parts).sum(0).detach()

    def release(self) -> None:
        """Free all graphs; the next product builds them again."""
        self._graphs.clear()

    def _graph(self, index: int, names: Mapping[str, object]) -> _Graph:
        if index not in self._graphs:
            parameters = distinct_parameters(part for name in names for part in self.blocks[name])
            with self.measured.evaluating(parameters):
                loss = self._finite_loss(index, torch.enable_grad())
                if not loss.requires_grad:  # every block unused: the Hessian is zero
                    self._refuse_detached(index)
                    self._graphs[index] = _Graph({})
                else:
                    share = torch.full_like(loss, self._shares[index])
                    gradients = torch.autograd.grad(loss, parameters, share, create_graph=True, allow_unused=True)
                    used = {id(p): g for p, g in zip(parameters, gradients, strict=True) if g is not None}
                    self._graphs[index] = _Graph(used)
            self._losses[index] = float(loss.detach())
        return self._graphs[index]

    def _finite_loss(self, index: int, grad_mode: contextlib.AbstractContextManager[None]) -> Tensor:
        device = self.measured.device.type
        casting = contextlib.nullcontext() if self._autocast is None else torch.autocast(device, self._autocast)
        with grad_mode, casting:
            loss = self.measured.of(self.batches[index])
        if not torch.isfinite(loss):
            raise ValueError(
                f"model: the loss of micro-batch {index} is {loss.item()}; check the weights and the labels for "
                "NaN and infinity"
            )
        return loss.reshape(())

    def _refuse_detached(self, index: int) -> None:
        with self.measured.evaluating(list(self.model.parameters())):
            if not self._finite_loss(index, torch.enable_grad()).requires_grad:
                raise ValueError(
                    "loss_fn: the loss that it returns depends on no parameter of the model; compute it from the "
                    "model's output, without detach(), item() or no_grad()"
                )


@dataclass
class _Graph:
    """What a micro-batch adds to the gradient of the mean loss, by parameter identity, with the graph it came from."""

    gradients: dict[int, Tensor]

    def add_product(self, parts: Sequence[Part], vector: Tensor, total: Tensor, *, first: bool) -> None:
        """Add this micro-batch's share of the product of a block with `vector` [n] to `total` [n]; `first`: set it."""
        outputs, directions = [], []
        for part, direction in zip(parts, _split(vector, parts), strict=True):
            gradient = self.gradients.get(id(whole(part)))
            # A gradient without a graph is constant in all parameters: its rows of the Hessian are zero.
            if gradient is not None and gradient.requires_grad:
                outputs.append(cut(part, gradient))
                directions.append(direction)
        parameters = distinct_parameters(parts)
        found: Sequence[Tensor | None] = [None] * len(parameters)
        if outputs:
            with requiring_gradients(parameters):
                found = torch.autograd.grad(outputs, parameters, directions, retain_graph=True, allow_unused=True)
        products = {id(p): product for p, product in zip(parameters, found, strict=True)}
        for part, piece in zip(parts, total.split([part.numel() for part in parts]), strict=True):
            product = products[id(whole(part))]
            if product is not None:
                new = cut(part, product).to(total)
                piece.view(part.shape).copy_(new) if first else piece.view(part.shape).add_(new)
            elif first:
                piece.zero_()


def _split(vector: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    pieces = vector.split([part.numel() for part in parts])
    return [piece.view(part.shape).to(part.device, part.dtype) for piece, part in zip(pieces, parts, strict=True)]


def _flat(tensors: Sequence[Tensor | None], parts: Sequence[Part]) -> Tensor:
    """The parts' entries [n] of tensors of their parameters' shapes; None stands for zeros."""
    found = [
        torch.zeros(part.shape, dtype=part.dtype, device=part.device) if tensor is None else cut(part, tensor)
        for tensor, part in zip(tensors, parts, strict=True)
    ]
    return torch.cat([piece.detach().reshape(-1).to(parts[0].device) for piece in found])


@dataclass
class SavedBytes:
    """Bytes of the distinct storages that graphs built inside of `saved_tensor_bytes` hold on to."""

    storages: dict[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Sum over distinct storages, in bytes."""
        return sum(self.storages.values())


@contextlib.contextmanager
def saved_tensor_bytes(model: nn.Module) -> Iterator[SavedBytes]:
    """Count what autograd saves for backward in this context, the parameters of `model` apart: they live anyway."""
    saved = SavedBytes()
    living = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in living:
            saved.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def free_bytes(device: torch.device) -> int:
    """Memory that can be had on `device` without pushing anything out, in bytes."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return 4 * 2**30  # no /proc (macOS, Windows): assume what a small machine has
