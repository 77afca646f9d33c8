"""The kinds of layer that can be quantized: the trainable and the packed twin of each, and how it is laid out.

Importing the room registers every kind.
"""

from qbert.layers import conv, embedding, linear, recurrent, transposed

__all__ = ["conv", "embedding", "linear", "recurrent", "transposed"]
