"""Compression as data: steps, pipelines of them, and plans that keep a budget."""

from __future__ import annotations

from qbert.pipeline.run import Compressed, CompressionRecord, Pipeline, StepResult, compress
from qbert.pipeline.steps import Depth, Distill, Factorize, Pack, Prune, Quantize, Share

__all__ = [
    "Compressed",
    "CompressionRecord",
    "Depth",
    "Distill",
    "Factorize",
    "Pack",
    "Pipeline",
    "Prune",
    "Quantize",
    "Share",
    "StepResult",
    "compress",
]
