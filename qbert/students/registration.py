"""Tells transformers' Auto classes of the students that are models of our own, so that ``from_pretrained`` finds them.

Alone because it runs when transformers is ready (`qbert.saving.registration`), not when a student is made.
"""

from __future__ import annotations

from types import ModuleType

import transformers

from qbert.encoders.own_classes import OWN_CLASSES
from qbert.students.adabert import AdaBertConfig, AdaBertForSequenceClassification
from qbert.students.bilstm import BiLSTMConfig, BiLSTMForSequenceClassification
from qbert.students.cnn import CnnConfig, CnnForSequenceClassification

_CLASSES: dict[str, type[transformers.PreTrainedModel]] = {
    "AdaBertForSequenceClassification": AdaBertForSequenceClassification,
    "BiLSTMForSequenceClassification": BiLSTMForSequenceClassification,
    "CnnForSequenceClassification": CnnForSequenceClassification,
}
_CONFIGS: tuple[type[transformers.PreTrainedConfig], ...] = (AdaBertConfig, BiLSTMConfig, CnnConfig)


def install(theirs: ModuleType) -> None:
    """Register configs and models; `theirs` is transformers' module of Auto classes."""
    OWN_CLASSES.update(_CLASSES)
    for config, model in zip(_CONFIGS, _CLASSES.values(), strict=True):
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto in (theirs.AutoModel, theirs.AutoModelForSequenceClassification):
            auto.register(config, model, exist_ok=True)
