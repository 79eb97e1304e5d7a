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


def __getattr__(name: str):
    """Import `flax_attention_fn` at its first use, since `import attnlab` must not import JAX."""
    if name == "flax_attention_fn":
        from attnlab.layers.flax_attention import flax_attention_fn

        return flax_attention_fn
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
