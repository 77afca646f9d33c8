"""The top Hessian eigenvalue of every encoder layer by this library, PyHessian, curvlinops, eigenthings and SciPy.

Each tool is called as its documentation shows, on one batch and for one layer after the other. None of the others
takes a transformers model as it is loaded, so they get what they need: eager attention (fused kernels have no second
derivative), gradients for the layer's parameters alone, and a module that maps a dict of inputs to logits where the
tool wants (inputs, targets) and a criterion.

    TOOLS["PyHessian"].measure(model, batch, tol=1e-3)
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

INSTALL = (
    "pip install --no-deps pyhessian hessian-eigenthings curvlinops-for-pytorch backpack-for-pytorch; "
    "pip install einops einconv linear_operator opt-einsum "
    "(--no-deps: PyHessian and backpack ask for torchvision, whose build may be for another torch than yours, and "
    "transformers then fails to import)"
)


@dataclass(frozen=True)
class Found:
    """What a tool says of one layer.

    Attributes:
        value: signed eigenvalue.
        products: Hessian products used.
        converged: the tool's own word; None where it gives none.
    """

    value: float
    products: int
    converged: bool | None


Measure = Callable[..., list[Found]]


@dataclass(frozen=True)
class Tool:
    """One way to measure: `measure(model, batch, tol)` gives a `Found` for every layer, bottom first.

    Attributes:
        package: module that must be installed, None for this library.
        note: how it is called.
        exact: whether it means the Hessian's eigenvalue at all.
    """

    measure: Measure
    note: str
    package: str | None = None
    exact: bool = True

    @property
    def missing(self) -> bool:
        """Whether its package is not installed."""
        return self.package is not None and importlib.util.find_spec(self.package) is None


def ours(**settings: Any) -> Measure:
    """`qbert.hessian_spectrum` on the batch as the only subset."""

    def measure(model: nn.Module, batch: Mapping[str, Tensor], tol: float) -> list[Found]:
        from qbert.hessian import hessian_spectrum

        asked = {"tol": tol, **settings}
        spectrum = hessian_spectrum(model, [batch], runs=1, fraction=1.0, progress=False, **asked)
        columns = zip(spectrum.eigenvalues[0], spectrum.products[0], spectrum.converged[0], strict=True)
        return [Found(float(value), int(products), bool(converged)) for value, products, converged in columns]

    return measure


def pyhessian(model: nn.Module, batch: Mapping[str, Tensor], tol: float) -> list[Found]:
    """PyHessian 0.1: ``hessian(model, criterion, data).eigenvalues(tol=tol)``, at most its 100 iterations."""
    from pyhessian import hessian

    count = 0
    space = hessian.__init__.__globals__  # the module, which the class of the same name hides
    plain = space["hessian_vector_product"]

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return plain(*arguments)

    found = []
    inputs, labels = split_labels(batch)
    space["hessian_vector_product"] = counted
    try:
        for parameters in layers_of(model):
            count = 0
            model.zero_grad()  # a second instance would add to .grad and double the eigenvalue
            with only(model, parameters):
                tool = hessian(Logits(model), nn.functional.cross_entropy, data=(inputs, labels), cuda=False)
                values, _ = tool.eigenvalues(tol=tol)
            found.append(Found(float(values[0]), count, None))
            model.zero_grad()
    finally:
        space["hessian_vector_product"] = plain
    return found


def curvlinops(model: nn.Module, batch: Mapping[str, Tensor], tol: float) -> list[Found]:
    """curvlinops: ``eigsh(HessianLinearOperator(...).to_scipy(), k=1, which="LM", tol=tol)``."""
    import numpy as np
    from curvlinops import HessianLinearOperator

    inputs, labels = split_labels(batch)
    found = []
    for parameters in layers_of(model):
        with only(model, parameters):
            operator = HessianLinearOperator(
                Logits(model),
                nn.CrossEntropyLoss(),
                parameters,
                [(inputs, labels)],
                check_deterministic=False,
                num_data=len(labels),
                batch_size_fn=lambda X: len(X["input_ids"]),
            )
            matrix = operator.to_scipy(dtype=np.float32)
            found.append(_eigsh(matrix.shape[0], matrix.__matmul__, tol))
    return found


def scipy_by_hand(model: nn.Module, batch: Mapping[str, Tensor], tol: float) -> list[Found]:
    """What a careful user writes in ten lines: a gradient whose graph is kept, ``eigsh(..., k=1, ncv=6)``."""
    import torch

    found = []
    for parameters in layers_of(model):
        with only(model, parameters):
            slopes = torch.autograd.grad(model(**batch).loss, parameters, create_graph=True)
            slope = torch.cat([s.reshape(-1) for s in slopes])

            def product(v: Any, slope: Tensor = slope, parameters: list[nn.Parameter] = parameters) -> Any:
                direction = torch.from_numpy(v.reshape(-1)).to(slope)
                rows = torch.autograd.grad(slope, parameters, direction, retain_graph=True)
                return torch.cat([r.reshape(-1) for r in rows]).cpu().numpy()

            found.append(_eigsh(len(slope), product, tol, ncv=6))
    return found


def _eigsh(size: int, product: Callable[[Any], Any], tol: float, ncv: int | None = None) -> Found:
    """SciPy's answer from a random start, its products counted; it raises where it does not converge."""
    import numpy as np
    from scipy.sparse.linalg import LinearOperator, eigsh

    count = 0

    def counted(v: Any) -> Any:
        nonlocal count
        count += 1
        return product(v)

    operator = LinearOperator((size, size), matvec=counted, dtype=np.float32)
    start = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    values = eigsh(operator, k=1, which="LM", tol=tol, v0=start, ncv=ncv, return_eigenvectors=False)
    return Found(float(values[0]), count, True)


def eigenthings(**settings: Any) -> Measure:
    """hessian-eigenthings: ``lanczos(HessianOperator(...), k=1)``, which takes a fixed number of steps."""

    def measure(model: nn.Module, batch: Mapping[str, Tensor], tol: float) -> list[Found]:
        from hessian_eigenthings import HessianOperator, lanczos

        found = []
        for parameters in layers_of(model):
            wanted = {id(p) for p in parameters}
            by_name = {name: p for name, p in model.named_parameters() if id(p) in wanted}
            operator = HessianOperator(
                model,
                [dict(batch)],
                lambda model, batch: model(**batch).loss,
                param_filter=lambda name, parameter, by_name=by_name: name in by_name,
            )
            with only(model, parameters):
                result = lanczos(operator, k=1, tol=tol, seed=0, **settings)
            found.append(Found(float(result.eigenvalues[0]), int(result.iterations), bool(result.converged[0])))
        return found

    return measure


class Logits(nn.Module):
    """A transformers classifier as a module from a dict of inputs to logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, C]."""
        logits: Tensor = self.model(**inputs).logits
        return logits


def split_labels(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """(inputs, labels) of a batch."""
    return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]


def layers_of(model: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters of every encoder layer, bottom first."""
    from qbert.hessian import parameter_blocks
    from qbert.hessian.blocks import distinct_parameters

    return [distinct_parameters(block.parameters) for block in parameter_blocks(model, "layer")]


@contextlib.contextmanager
def only(model: Any, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Eager attention, and gradients for `parameters` alone; both undone on the way out."""
    wanted = {id(p) for p in parameters}
    before = {p: p.requires_grad for p in model.parameters()}
    attention = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        for parameter in before:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        model.set_attn_implementation(attention)
        for parameter, required in before.items():
            parameter.requires_grad_(required)


TOOLS = {
    "qbert": Tool(
        ours(),
        "Lanczos to a residual within the tolerance, from one product of all layers together (in F, not in products)",
    ),
    "qbert, gap": Tool(ours(bound="gap"), "the same with the gap bound"),
    "qbert, gap 1e-4": Tool(ours(bound="gap", tol=1e-4), "the gap bound with a tolerance of 1e-4"),
    "qbert, Gauss-Newton": Tool(ours(method="ggn"), "another quantity: no Hessian product at all", exact=False),
    "Q-BERT's rule": Tool(
        ours(method="power", tol=1e-2),
        "power iteration until the value changes by less than 1e-2, on this library's products",
    ),
    "PyHessian": Tool(pyhessian, "power iteration until the value changes by less than the tolerance", "pyhessian"),
    "curvlinops": Tool(curvlinops, "SciPy's eigsh, k=1", "curvlinops"),
    "SciPy by hand": Tool(scipy_by_hand, "eigsh, k=1, ncv=6, on products of a gradient whose graph is kept"),
    "eigenthings": Tool(eigenthings(max_iter=20), "Lanczos, 20 steps", "hessian_eigenthings"),
    "eigenthings, default": Tool(eigenthings(), "Lanczos with its default of 2 steps", "hessian_eigenthings"),
}
