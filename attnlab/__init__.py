"""attnlab: a research library for the attention mechanism, in JAX and Flax.

Shapes in signatures and docstrings use one legend throughout:

    B  batch                 E  model width (embed)
    T  target length         F  feed-forward width (mlp)
    S  source length         V  vocabulary
    H  query heads           L  layers
    K  key/value heads       N  rows of tokens (B * T)
    G  query heads per key/value head (H / K)
    D  head width (head_dim)  X  experts

Arrays have the layout (batch, length, heads, head_dim).
"""

__version__ = "0.2.0"
