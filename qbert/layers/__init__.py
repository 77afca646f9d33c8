"""The kinds of layer that can be quantized: the trainable and the packed twin of each, and how it is laid out."""
