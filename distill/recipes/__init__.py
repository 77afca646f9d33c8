"""Published ways of distilling, one short file each; every name is a function that returns a `Recipe`.

>>> from qbert.distill import recipes
>>> recipes.ternarybert()
"""

from __future__ import annotations

from collections.abc import Callable

from qbert.distill.recipe import Recipe
from qbert.distill.recipes.adabert import adabert, adabert_search
from qbert.distill.recipes.bilstm import bilstm
from qbert.distill.recipes.distilbert import distilbert
from qbert.distill.recipes.logits import logits
from qbert.distill.recipes.low_resource import low_resource
from qbert.distill.recipes.minilm import minilm
from qbert.distill.recipes.mobilebert import mobilebert
from qbert.distill.recipes.movement import movement
from qbert.distill.recipes.pkd import pkd
from qbert.distill.recipes.qat import qat
from qbert.distill.recipes.qbert_kd import qbert_kd
from qbert.distill.recipes.ternarybert import ternarybert
from qbert.distill.recipes.tinybert import tinybert

RECIPES: dict[str, Callable[[], Recipe]] = {
    "adabert": adabert,
    "adabert_search": adabert_search,
    "bilstm": bilstm,
    "distilbert": distilbert,
    "logits": logits,
    "low_resource": low_resource,
    "minilm": minilm,
    "mobilebert": mobilebert,
    "movement": movement,
    "pkd": pkd,
    "qat": qat,
    "qbert_kd": qbert_kd,
    "ternarybert": ternarybert,
    "tinybert": tinybert,
}

__all__ = [
    "RECIPES",
    "adabert",
    "adabert_search",
    "bilstm",
    "distilbert",
    "logits",
    "low_resource",
    "minilm",
    "mobilebert",
    "movement",
    "pkd",
    "qat",
    "qbert_kd",
    "ternarybert",
    "tinybert",
]
