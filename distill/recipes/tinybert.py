"""TinyBERT: a small student learns the teacher's embeddings, hidden states and attention, then its predictions.

Source: Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", eq. 5-11 and section 4.2;
huawei-noah/Pretrained-Language-Model, TinyBERT: one projection for all layers, uniform map, sums over the layers (eq.
11: M + 1 states, M matrices of scores), temperature 1, the intermediate stage at a constant rate for 10 epochs, the
prediction stage for 3. Difference: means over real tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from qbert.distill.mapping import LayerMap, Pairs
from qbert.distill.recipe import Match, Recipe, Stage

_TERMS = ("embeddings", "hidden", "scores", "prediction")


def tinybert(
    *,
    general: bool = False,
    projection: bool = True,
    layers: LayerMap = "uniform",
    without: Collection[str] = (),
) -> Recipe:
    """Task distillation, or general distillation (the intermediate stage alone, on unlabelled text).

    Args:
        general: first phase of TinyBERT, with a pre-trained teacher that was not fine-tuned.
        projection: map the student's hidden states to the teacher's width; not needed where the widths agree.
        layers: which teacher layer each student layer learns from; table 5 compares uniform, top and bottom. Pairs
            count layers from 0 (or from the end), and their outputs are the hidden states that are matched, beside
            the embeddings.
        without: terms to leave out, as in the paper's table 4: "embeddings", "hidden", "scores", "prediction".

    Raises:
        ValueError: another term to leave out, or nothing left to learn.
    """
    for name in without:
        if name not in _TERMS:
            raise ValueError(f"without={name!r} is no term of TinyBERT's; use some of {', '.join(_TERMS)}")
    mapped: Literal["shared"] | None = "shared" if projection else None
    matches = []
    if "hidden" not in without:
        embedding = "embeddings" not in without
        outputs = layers if isinstance(layers, str) else _outputs(layers, embedding)
        states = Match("hidden", layers=outputs, embedding=embedding, projection=mapped, reduction="sum")
        matches.append(states)
    elif "embeddings" not in without:
        matches.append(Match("embeddings", projection=mapped))
    if "scores" not in without:
        scores = Match("scores", layers=layers, reduction="sum")
        # Pairs are checked in the order of the terms, and those of the scores are in the caller's own numbers.
        matches.insert(len(matches) if isinstance(layers, str) else 0, scores)
    stages = []
    if matches:
        stages.append(Stage("intermediate", tuple(matches), share=10, schedule="constant"))
    if not general and "prediction" not in without:
        stages.append(Stage("prediction", (Match("logits"),), share=3, rate=0.6))
    if not stages:
        raise ValueError(f"without={', '.join(without)} leaves nothing to learn; leave out less")
    return Recipe(
        name="tinybert",
        source="Jiao et al. 2020",
        stages=tuple(stages),
        steps="fixed",
        arguments={
            "learning_rate": 5e-5,
            "num_train_epochs": 3 if general else 13,
            "per_device_train_batch_size": 32,
            "warmup_steps": 0.1,
        },
    )


def _outputs(layers: Sequence[tuple[int, int]], embedding: bool) -> Pairs:
    """Pairs of layers as pairs of hidden states, of which number 0 is the embedding output."""
    outputs = [(s + (s >= 0), t + (t >= 0)) for s, t in layers]
    return [(0, 0), *outputs] if embedding else outputs
