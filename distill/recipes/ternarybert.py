"""TernaryBERT: ternary weights, 8-bit activations, layer by layer distillation from the float model.

Source: Zhang et al. 2020, "TernaryBERT: Distillation-aware Ultra-low Bit BERT", section 3.2 (all weights of the terms
are 1, sums over the layers, no hard labels) and table 7 of its appendix; huawei-noah/Pretrained-Language-Model,
TernaryBERT. Differences: the terms are means over real tokens, and the scale of the ternary grid is the least-squares
one instead of the mean magnitude above 0.7 of the mean.

    >>> student = quantize_model(model, ternarybert().bits_config(2))
"""

from __future__ import annotations

from qbert.distill.recipe import Match, Recipe, Stage


def ternarybert() -> Recipe:
    """Logits, hidden states with embeddings, and attention scores, in one stage."""
    terms = (Match("logits"), Match("hidden", reduction="sum"), Match("scores", reduction="sum"))
    return Recipe(
        name="ternarybert",
        source="Zhang et al. 2020",
        stages=(Stage("distillation", terms),),
        steps="refit",
        refit_every=1,
        freeze_at=1.0,
        quantization={"*": {"groups": 1}, "2": {"scheme": "symmetric"}},
        arguments={
            "learning_rate": 2e-5,
            "num_train_epochs": 3,
            "per_device_train_batch_size": 32,
            "warmup_steps": 0.1,
        },
    )
