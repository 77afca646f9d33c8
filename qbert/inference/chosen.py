"""Fused layers and single linear maps by the engines that `qbert.inference.engines` chooses for them.

>>> layers = ChosenLayers.of([LayerParts.of(layer) for layer in encoder.layer], exact=True, engine="auto")
>>> y = layers(x, None)                          # [B, T, H], by the engine for B T tokens
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qbert.encoders.factors import is_factored
from qbert.encoders.parts import LayerParts
from qbert.inference.cpu_layers import FusedLayers, native_layers, reason_not_native_layers, reason_not_to_choose
from qbert.inference.engines import ENGINES, Choice, Run, choose, forced, reason_not
from qbert.inference.fits import maps_of
from qbert.kernels.cpu import CpuLinear
from qbert.kernels.cpu.chains import compiled
from qbert.kernels.cpu.native import NativeLayers
from qbert.layers.linear import PackedLinear

logger = logging.getLogger(__name__)
Program = Callable[[Tensor, Tensor | None], Tensor]
_SEQUENCE = 32  # tokens of each sequence that is measured


class ChosenLayers:
    """A stack of fused layers, each number of tokens by its own engine. Immutable.

    Attributes:
        choice: the engines, and why they were chosen.
    """

    def __init__(self, choice: Choice, programs: dict[str, Program]) -> None:
        self.choice, self._programs = choice, programs

    @classmethod
    def of(cls, parts: Sequence[LayerParts], exact: bool, engine: str) -> ChosenLayers:
        """The layers that consist of `parts`; ValueError where `engine` cannot run them.

        Args:
            parts: those of layers that can be fused.
            exact: as for `CpuLinear.prepare`.
            engine: "auto", or one of `qbert.inference.engines.ENGINES`.
        """
        settled = reason_not_to_choose(parts)
        if settled:
            if engine not in ("auto", "fp32"):
                raise ValueError(f"engine={engine!r} cannot run these layers: {settled}; use engine='auto'")
            only = "fp32" if engine == "fp32" else None
            return cls(forced("torch", settled), {"torch": compiled(FusedLayers(parts, exact, only))})
        not_native = reason_not_native_layers(parts)
        if engine == "native" and not_native:
            raise ValueError(f"engine='native' cannot run these layers: {not_native}; use engine='auto'")
        if engine == "auto":
            if not_native:
                logger.info("the native engine does not run these layers: %s", not_native)
            names = [n for n in ENGINES if not reason_not(n) and not (n == "native" and not_native)]
            widest = max(parts, key=lambda p: p.ffn_in.out_features + p.attention_output.in_features)  # type: ignore[operator,return-value]
            maps: list[Any] = [m for linear in widest.linears for m in maps_of(linear)]
            bits = max(m.layout.bits for m in maps)
            ranges = maps[0].spec.activation_range
            shape = f"layer {widest.width} x {widest.ffn_in.out_features}, {widest.heads} heads, "  # type: ignore[union-attr]
            shape += f"{type(widest.activation).__name__}, {ranges} ranges, {bits} bits" + _other_pieces(widest)
            shape += "" if exact else ", not exact"
            choice = choose(shape, {n: _layer_candidate(widest, exact, n) for n in names})
        else:
            choice = forced(engine)
        programs = {name: program(parts, exact, name) for name in dict.fromkeys(choice.engines)}
        return cls(choice, programs)

    def __call__(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """float32 [B, T, H] to [B, T, H]; `mask` broadcasts to [B, heads, T, T], true or 0 where a key is seen."""
        return self._programs[self.choice.at(x.shape[0] * x.shape[1])](x, mask)

    def native_at(self, tokens: int) -> NativeLayers | None:
        """The native layers, if so many tokens are theirs."""
        program = self._programs[self.choice.at(tokens)]
        return program if isinstance(program, NativeLayers) else None


class ChosenLinear:
    """A packed linear map, each number of tokens by its own engine. Immutable."""

    def __init__(self, linear: PackedLinear, exact: bool, engine: str) -> None:
        """ValueError where `engine` cannot run it; `linear` quantizes its input to 8 bits, with one range a token."""
        if engine == "auto":
            shape = f"linear {linear.columns} x {linear.rows}, {linear.spec.activation_range} ranges, "
            shape += f"{linear.layout.bits} bits" + ("" if exact else ", not exact")
            names = [n for n in ENGINES if not reason_not(n)]
            self.choice = choose(shape, {n: _linear_candidate(linear, exact, n) for n in names})
        else:
            self.choice = forced(engine)
        self.columns = linear.columns
        self._maps = {name: linear.cpu_linear(exact, name) for name in dict.fromkeys(self.choice.engines)}

    def __deepcopy__(self, memo: dict[int, Any]) -> ChosenLinear:
        return self

    def __call__(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O] in the dtype of x."""
        return self.at(x.numel() // self.columns)(x)

    def at(self, tokens: int) -> CpuLinear:
        """The map that multiplies so many tokens."""
        return self._maps[self.choice.at(tokens)]


def can_choose(linear: Any) -> bool:
    """Whether several engines could compute a packed linear map."""
    return (
        isinstance(linear, PackedLinear)
        and linear.spec.activation_bits == 8
        and linear.layout.input_groups == 1
        and linear.rows * linear.columns > 0
    )


def program(parts: Sequence[LayerParts], exact: bool, engine: str) -> Program:
    """The layers by one engine, as what is called."""
    return native_layers(parts, exact) if engine == "native" else compiled(FusedLayers(parts, exact, engine))


def _layer_candidate(part: LayerParts, exact: bool, engine: str) -> Callable[[int], tuple[Run, Callable[[], Run]]]:
    made: list[Program] = []

    def candidate(tokens: int) -> tuple[Run, Callable[[], Run]]:
        if not made:
            made.append(native_layers([part], exact) if engine == "native" else FusedLayers([part], exact, engine))
        x = torch.randn(
            max(tokens // _SEQUENCE, 1),
            min(tokens, _SEQUENCE),
            part.width,
            generator=_seeded(),
            dtype=torch.float32,
            device="cpu",
        )

        def compile_it() -> Run:
            if isinstance(made[0], nn.Module):
                made[0] = compiled(made[0])
            run = made[0]
            return lambda: run(x, None)

        run = made[0]
        return lambda: run(x, None), compile_it

    return candidate


def _other_pieces(part: LayerParts) -> str:
    """What else decides about the time of a layer than its sizes; empty for the BERT kind."""
    pieces = {
        "pre-norm": part.pre_norm,
        "gated": part.gated,
        "rotated": part.rotation is not None,
        "relative positions": part.relative is not None,
        f"{1 + len(part.more_ffns)} feed-forward nets": part.more_ffns,
        f"{part.attention_output.out_features} inside": part.bottleneck,
        f"attention {part.attention_output.in_features} wide": part.attention_output.in_features
        != part.attention_output.out_features,
        f"ranks {' '.join(str(getattr(linear, 'rank', 0)) for linear in part.linears)}": any(
            map(is_factored, part.linears)
        ),
    }
    return "".join(f", {name}" for name, there in pieces.items() if there)


def _linear_candidate(linear: PackedLinear, exact: bool, engine: str) -> Callable[[int], tuple[Run, Callable[[], Run]]]:
    made: list[Any] = []

    def candidate(tokens: int) -> tuple[Run, Callable[[], Run]]:
        if not made:
            made.append(linear.cpu_linear(exact, engine))
        x = torch.randn(tokens, linear.columns, generator=_seeded(), dtype=torch.float32, device="cpu")
        return lambda: made[0](x), lambda: lambda: made[0](x)

    return candidate


def _seeded() -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(0)
