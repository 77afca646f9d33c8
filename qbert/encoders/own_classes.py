"""Model classes that are not transformers' but this library's, by name: filled by the rooms that have some.

Alone because loading looks classes up here, and stands below the rooms that define them.
"""

from __future__ import annotations

from transformers import PreTrainedModel

OWN_CLASSES: dict[str, type[PreTrainedModel]] = {}
