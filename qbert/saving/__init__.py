"""Models on disk: packed and trainable ones, through transformers' own ``save_pretrained`` and ``from_pretrained``."""
