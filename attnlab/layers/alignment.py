"""Attention of recurrent encoder-decoders: additive (Bahdanau) and multiplicative (Luong)."""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnlab.attention import attend, segments
from attnlab.attention.normalizers import softmax
from attnlab.layers.attention import EncoderOutput
from attnlab.layers.linear import Dropout, Linear, parameter
from attnlab.layers.recurrent import (
    RecurrentKernel,
    RecurrentLayerConfig,
    RecurrentStack,
    State,
    scan_tokens,
    select_state,
)
from attnlab.layers.remat import REMAT_POLICIES


@dataclass(frozen=True)
class NoAttention:
    """No attention: the decoder only gets the encoder's last state as its initial state.

    Sutskever et al. 2014, arXiv 1409.3215, section 2.
    """


@dataclass(frozen=True)
class AdditiveConfig:
    """Additive attention with the score v . tanh(W s + U h).

    s is the state before a token and h an encoder output. The context vector is an input of the
    cell together with the token (Bahdanau et al. 2015, arXiv 1409.0473, equations 5 and 6, and
    section A.1.2).

    Attributes:
      width: width of W s + U h; None means E.
    """

    width: int | None = None

    def __post_init__(self):
        if self.width is not None and self.width < 1:
            raise ValueError(f"width={self.width} must be at least 1, or none")


@dataclass(frozen=True)
class GeneralConfig:
    """Multiplicative attention with the score s . W h.

    s is the state after a token and h an encoder output (Luong et al. 2015, arXiv 1508.04025,
    equation 8).
    """


@dataclass(frozen=True)
class DotConfig:
    """Multiplicative attention with the score s . h (Luong et al. 2015, equation 8).

    s is the state after a token and h an encoder output.
    """


class MultiplicativeAttention(nn.Module):
    """Dot-product attention over the encoder output, with or without a query projection.

    All tokens are computed at once, since the recurrent states do not depend on the result.
    """

    config: RecurrentLayerConfig
    general: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], segment_ids: Int[Array, "B T"], memory: EncoderOutput
    ) -> Float[Array, "B T E"]:
        """Return the context vector of each token."""
        c, query, sow_weights = self.config, x, self.is_mutable_collection("intermediates")
        if self.general:
            axes = ("embed", "state")
            query = Linear((c.width,), (c.width,), axes, c.std, False, c.dtypes, name="query")(x)
        context = attend(
            query[:, :, None],
            memory.hidden[:, :, None],
            memory.hidden[:, :, None],
            mask=segments(segment_ids, memory.segments),
            scale=1.0,
            return_weights=sow_weights,
        )
        if sow_weights:
            context, weights = context
            self.sow("intermediates", "attention_weights", weights)
        return context[:, :, 0]


class AdditiveAttention(nn.Module):
    """A recurrent layer that attends to the encoder output with its state before each token."""

    config: RecurrentLayerConfig
    attention: AdditiveConfig
    remat: Literal["none", "full", "dots"]

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], valid: Bool[Array, "B T 1"], state: State, memory: EncoderOutput
    ) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"], State]:
        """Return the outputs and the context vectors of all tokens, and the last state."""
        c, width = self.config, self.attention.width or self.config.width
        gates, axes = c.cell.gates * c.width, ("embed", "state")
        gates_of_x = Linear((c.width,), (gates,), axes, c.std, True, c.dtypes, name="input")(x)
        keys = Linear((c.width,), (width,), axes, c.std, False, c.dtypes, name="key")(memory.hidden)
        query_kernel = parameter(self, "query_kernel", (c.width, width), axes, c.dtypes, std=c.std)
        score = parameter(self, "score", (width,), ("state",), c.dtypes, std=width**-0.5)
        context_kernel = parameter(self, "context_kernel", (c.width, gates), axes, c.dtypes, std=c.std)
        weights = RecurrentKernel(c.cell, c.width, c.std, c.dtypes, name="state")()

        def step(state: State, token):
            x, valid = token
            scores = jnp.tanh((state[0] @ query_kernel)[:, None] + keys) @ score
            scores = jnp.where(memory.segments > 0, scores.astype(jnp.float32), -jnp.inf)
            attention, _ = softmax(scores)
            context = jnp.einsum("bs,bse->be", attention.astype(x.dtype), memory.hidden)
            state = select_state(valid, c.cell(x + context @ context_kernel, state, weights), state)
            return state, (state[0], context, attention)

        if self.remat != "none":
            step = jax.checkpoint(step, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        state, (outputs, contexts, attention) = scan_tokens(step, state, (gates_of_x, valid))
        self.sow("intermediates", "attention_weights", attention[:, None])
        return outputs, contexts, state


class AlignedStack(nn.Module):
    """Recurrent layers whose last layer attends to the encoder output.

    With attention, the output is tanh(W [s; c]) for the last layer's output s and the context
    vector c (Luong et al. 2015, equation 5). Bahdanau et al. used a maxout layer instead.
    """

    config: RecurrentLayerConfig
    depth: int
    attention: NoAttention | AdditiveConfig | GeneralConfig | DotConfig
    scan: bool
    remat: Literal["none", "full", "dots"]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        segment_ids: Int[Array, "B T"],
        states: State,
        memory: EncoderOutput,
        deterministic: bool,
    ) -> tuple[Float[Array, "B T E"], State]:
        """Return activations before the logits, and all layers' last states, (B, L, E) each."""
        c, additive = self.config, isinstance(self.attention, AdditiveConfig)
        valid, num_plain = (segment_ids > 0)[..., None], self.depth - additive
        last_states = tuple(s[:, :num_plain] for s in states)
        if num_plain:
            stack = RecurrentStack(c, num_plain, False, self.scan, self.remat, name="layers")
            x, last_states = stack(x, valid, jnp.zeros_like(valid), last_states, deterministic)
        if isinstance(self.attention, AdditiveConfig):
            x = Dropout(c.dropout)(x, deterministic=deterministic)
            layer = AdditiveAttention(c, self.attention, self.remat, name="attention")
            x, context, last = layer(x, valid, tuple(s[:, -1] for s in states), memory)
            pairs = zip(last_states, last, strict=True)
            last_states = tuple(jnp.concatenate([a, b[:, None]], axis=1) for a, b in pairs)
        elif isinstance(self.attention, GeneralConfig | DotConfig):
            general = isinstance(self.attention, GeneralConfig)
            context = MultiplicativeAttention(c, general, name="attention")(x, segment_ids, memory)
        else:
            return x, last_states
        x_and_context = jnp.concatenate([x, context], axis=-1)
        out = Linear((2 * c.width,), (c.width,), ("embed", "state"), c.std, False, c.dtypes, name="out")
        return jnp.tanh(out(x_and_context)), last_states
