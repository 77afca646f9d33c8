"""Linear maps as products of two thinner ones, alone or beside a whole one.

`FactoredLinear` computes ``up(down(x))``, `CorrectedLinear` ``whole(x) + up(down(x))``. Their parts are ordinary linear
maps, so that each is trained, quantized (with bits of its own), packed and saved as every other linear map is.

    >>> FactoredLinear(384, 1536, rank=96)(x)             # [..., 384] -> [..., 1536]

Sources: Chen et al. 2021, DRONE (a map as two factors); Hu et al. 2022, LoRA, and Yao et al. 2023, ZeroQuant-V2,
section 5 (a low-rank correction beside a quantized map).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qbert.encoders.replace import replace_everywhere


class FactoredLinear(nn.Module):
    """``up(down(x))``: a linear map [O, I] of rank r as two, [r, I] and [O, r].

    Args:
        in_features, out_features: I and O.
        rank: r.
        bias: whether the second map has one.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    @property
    def bias(self) -> Tensor | None:
        """That of the second map."""
        return self.up.bias

    @property
    def weight(self) -> Tensor:
        """The map as one matrix [O, I]: computed, for who reads it."""
        return _matrix(self.up) @ _matrix(self.down)

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return self.up(self.down(input))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Shown in the module tree."""
        return f"rank={self.rank}"


class CorrectedLinear(nn.Module):
    """``whole(x) + up(down(x))``: a linear map, usually of few bits, and a correction of rank r, usually of more.

    Args:
        whole: the map [O, I]; its bias is the layer's.
        rank: r; the correction starts at zero.
    """

    def __init__(self, whole: nn.Module, rank: int) -> None:
        super().__init__()
        rows, columns = int(whole.out_features), int(whole.in_features)  # type: ignore[arg-type]
        self.in_features, self.out_features, self.rank = columns, rows, rank
        self.whole = whole
        self.down = nn.Linear(columns, rank, bias=False)
        self.up = nn.Linear(rank, rows, bias=False)
        with torch.no_grad():
            self.up.weight.zero_()

    @property
    def bias(self) -> Tensor | None:
        """That of the whole map."""
        return self.whole.bias  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """The map as one matrix [O, I]: computed, for who reads it."""
        return _matrix(self.whole) + _matrix(self.up) @ _matrix(self.down)

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return self.whole(input) + self.up(self.down(input))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Shown in the module tree."""
        return f"rank={self.rank}"


def _matrix(linear: nn.Module) -> Tensor:
    """The weight that a float, trainable or packed linear map computes with, [O, I]."""
    read = getattr(linear, "quantized_weight", None)
    return read() if callable(read) else linear.weight  # type: ignore[return-value]


def factored(linear: nn.Linear, rank: int, down: Tensor | None = None, up: Tensor | None = None) -> FactoredLinear:
    """A `FactoredLinear` in the shape, dtype, device and mode of `linear`, with its bias.

    Args:
        linear: the map [O, I].
        rank: r.
        down, up: values [r, I] and [O, r]; where None they are left as torch draws them.
    """
    made = FactoredLinear(linear.in_features, linear.out_features, rank, linear.bias is not None)
    made.to(linear.weight.device, linear.weight.dtype)
    made.up.bias = linear.bias
    _fill(made, down, up)
    return made.train(linear.training)


def corrected(linear: nn.Module, rank: int, down: Tensor | None = None, up: Tensor | None = None) -> CorrectedLinear:
    """A `CorrectedLinear` around `linear`, which it keeps; `down` and `up` as for `factored`."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    made = CorrectedLinear(linear, rank)
    for part in (made.down, made.up):
        part.to(dtype=weight.dtype, device=weight.device)
    _fill(made, down, up)
    return made.train(linear.training)


@torch.no_grad()
def _fill(made: FactoredLinear | CorrectedLinear, down: Tensor | None, up: Tensor | None) -> None:
    for part, values in ((made.down, down), (made.up, up)):
        if values is not None:
            part.weight.copy_(values)


def is_factored(module: nn.Module) -> bool:
    """Whether `module` is made of factors."""
    return isinstance(module, (FactoredLinear, CorrectedLinear))


def build(base: nn.Module, ranks: Mapping[str, int], corrections: Mapping[str, int] | None = None) -> None:
    """Put factors of given ranks in the place of linear maps of `base`, without values.

    Args:
        base: a model whose maps are still whole.
        ranks: dotted name -> rank of a `FactoredLinear`.
        corrections: dotted name -> rank of a `CorrectedLinear`.

    Raises:
        ValueError: a name of another kind of module, or an impossible rank.
    """
    wanted = [(name, rank, factored) for name, rank in ranks.items()]
    wanted += [(name, rank, corrected) for name, rank in (corrections or {}).items()]  # type: ignore[misc]
    for name, rank, make in wanted:
        module = base.get_submodule(name)
        if type(module) is not nn.Linear:
            raise ValueError(f"config.json: {name} is a {type(module).__name__}, no linear map that has factors")
        if not 1 <= rank <= min(module.in_features, module.out_features):
            raise ValueError(f"config.json: rank {rank} of {name} does not fit {list(module.weight.shape)}")
        replace_everywhere(base, module, make(module, rank))
