"""Made-up spectra of real block structures, and what a configuration gives each block."""

import dataclasses
from typing import Any

import numpy as np

from qbert.bits import BitsConfig
from qbert.encoders.targets import find_targets
from qbert.hessian import parameter_blocks


@dataclasses.dataclass
class Spectrum:
    """What an allocation reads of a `HessianSpectrum`."""

    names: list[str]
    members: dict[str, list[str]]
    sensitivity: np.ndarray


def spectrum_of(model: Any, granularity: str = "layer", seed: int = 0) -> Spectrum:
    """Random sensitivities for the blocks of `model`."""
    blocks = parameter_blocks(model, granularity)
    values = np.random.default_rng(seed).lognormal(size=len(blocks))
    return Spectrum([b.name for b in blocks], {b.name: b.members for b in blocks}, values)


def bits_by_block(config: BitsConfig, model: Any, spectrum: Spectrum) -> list[int]:
    """The one width of each block; fails if its matrices differ."""
    paths = {t.name: t.path for t in find_targets(model)}
    specs = config.resolve(model)
    widths = [{specs[paths[m]].bits if paths[m] in specs else 32 for m in spectrum.members[n]} for n in spectrum.names]
    assert all(len(w) == 1 for w in widths)
    return [w.pop() for w in widths]
