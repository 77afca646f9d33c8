"""MobileBERT: progressive knowledge transfer, one layer at a time, then the outputs.

Source: Sun et al. 2020, section 3.4 and 3.5; google-research/mobilebert, distill_util.py: while layer i is transferred,
those above stand still and those below go on at a tenth of the rate; per layer the mean squared error of the hidden
states and the divergence of the attention of each head. Differences: terms are means over real tokens, each divided by
its own mean over the first steps instead of by fixed factors, which were made for sums over 512 channels; a statistics
term is left out, since the squared error contains it.

    >>> mobilebert(6)                       # of a teacher and a student with six layers each
"""

from __future__ import annotations

from qbert.distill.recipe import Match, Recipe, Stage


def mobilebert(layers: int = 6, *, transfer: float = 0.75, background: float = 0.1, at_once: bool = False) -> Recipe:
    """Progressive transfer of `layers` layers, then distillation of all.

    Args:
        layers: of the student, and of the teacher, whose widths and heads agree.
        transfer: share of the steps that the transfer takes, all layers together.
        background: rate of layers whose turn is over.
        at_once: transfer all layers together instead: the control of equal steps.
    """
    if layers < 1 or not 0 < transfer < 1 or not 0 <= background <= 1:
        raise ValueError(f"layers={layers}, transfer={transfer}, background={background}: no such transfer")
    logits = (Match("logits"),)
    final = Stage("distillation", logits, share=1 - transfer)
    if at_once:
        everything = (Match("hidden", weight="auto"), Match("scores", "attention_kl", weight="auto"))
        return _recipe("mobilebert_at_once", (Stage("transfer", everything, share=transfer), final))
    stages = []
    for layer in range(layers):
        terms = (
            Match("hidden", weight="auto", layers=((layer + 1, layer + 1),)),
            Match("scores", "attention_kl", weight="auto", layers=((layer, layer),)),
        )
        rates = {f"encoder.layer.{below}": background for below in range(layer)}
        rates |= {"embeddings": 1.0 if layer == 0 else background, f"encoder.layer.{layer}": 1.0, "*": 0.0}
        stages.append(Stage(f"layer {layer}", terms, share=transfer / layers, rates=rates))
    return _recipe("mobilebert", (*stages, final))


def _recipe(name: str, stages: tuple[Stage, ...]) -> Recipe:
    return Recipe(
        name=name,
        source="Sun et al. 2020",
        stages=stages,
        steps="fixed",
        dropout=False,
        arguments={"learning_rate": 1e-3, "num_train_epochs": 3, "warmup_steps": 0.02},
    )
