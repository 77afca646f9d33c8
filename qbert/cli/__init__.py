"""The `qbert` command, one file a command, and what it and the scripts of `experiments/` do alike."""
