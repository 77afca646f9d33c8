"""Group-wise quantizers: which weights share a range, the grid inside it, how the range is found, activations."""
