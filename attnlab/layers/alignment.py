"""Attention as recurrent models had it first: where the memory is that a token of the decoder comes from."""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnlab.attention import attend, segments
from attnlab.attention.normalizers import softmax
from attnlab.layers.attention import EncoderOutput
from attnlab.layers.blocks import REMAT_POLICIES
from attnlab.layers.dropout import Dropout
from attnlab.layers.linear import Linear
from attnlab.layers.parameters import parameter
from attnlab.layers.recurrent import (
    RecurrentKernel,
    RecurrentLayerConfig,
    RecurrentStack,
    State,
    scan_tokens,
    select_state,
)


@dataclass(frozen=True)
class NoAttention:
    """All that is known of the memory is the state that the decoder starts from (Sutskever et al. 2014,
    arXiv 1409.3215, section 2).
    """


@dataclass(frozen=True)
class AdditiveConfig:
    """v . tanh(W s + U h) of the state s before a token and each place h of the memory; what is attended to
    is read with the token (Bahdanau et al. 2015, arXiv 1409.0473, equations 5 and 6, and section A.1.2).

    `width` of the sum None is E.
    """

    width: int | None = None

    def __post_init__(self):
        if self.width is not None and self.width < 1:
            raise ValueError("width must be at least 1, or none")


@dataclass(frozen=True)
class GeneralConfig:
    """s . W h of the state s after a token and each place h of the memory (Luong et al. 2015,
    arXiv 1508.04025, equation 8).
    """


@dataclass(frozen=True)
class DotConfig:
    """s . h of the state s after a token and each place h of the memory (Luong et al. 2015, equation 8)."""


class MultiplicativeAttention(nn.Module):
    """Attention of all tokens at once, for no state depends on it."""

    config: RecurrentLayerConfig
    general: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], segment_ids: Int[Array, "B T"], memory: EncoderOutput
    ) -> Float[Array, "B T E"]:
        """What each token looks at."""
        c, query, captures = self.config, x, self.is_mutable_collection("intermediates")
        if self.general:
            query = Linear((c.width,), (c.width,), ("embed", "state"), c.std, False, c.dtypes, name="query")(
                x
            )
        context = attend(
            query[:, :, None],
            memory.hidden[:, :, None],
            memory.hidden[:, :, None],
            mask=segments(segment_ids, memory.segments),
            scale=1.0,
            return_weights=captures,
        )
        if captures:
            context, weights = context
            self.sow("intermediates", "attention_weights", weights)
        return context[:, :, 0]


class AdditiveAttention(nn.Module):
    """A recurrent layer that before each token asks the memory by its state, and reads the answer too."""

    config: RecurrentLayerConfig
    attention: AdditiveConfig
    remat: Literal["none", "full", "dots"]

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], valid: Bool[Array, "B T 1"], state: State, memory: EncoderOutput
    ) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"], State]:
        """The state's first array after each token, what the token looked at, and the last state."""
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
            attention_weights, _ = softmax(scores)
            context = jnp.einsum("bs,bse->be", attention_weights.astype(x.dtype), memory.hidden)
            state = select_state(valid, c.cell(x + context @ context_kernel, state, weights), state)
            return state, (state[0], context, attention_weights)

        if self.remat != "none":
            step = jax.checkpoint(step, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        state, (outputs, contexts, attention_weights) = scan_tokens(step, state, (gates_of_x, valid))
        self.sow("intermediates", "attention_weights", attention_weights[:, None])
        return outputs, contexts, state


class AlignedStack(nn.Module):
    """Recurrent layers of which the last attends to a memory.

    With attention what they give out is tanh(W [s; c]) of the last state s and what was attended to, c
    (Luong et al. 2015, equation 5); Bahdanau et al. had a layer of maxima in this place.
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
        """Activations before the logits, and the last states of all layers, (B, L, E) each."""
        c, additive = self.config, isinstance(self.attention, AdditiveConfig)
        valid, plain = (segment_ids > 0)[..., None], self.depth - additive
        new_states = tuple(s[:, :plain] for s in states)
        if plain:
            stack = RecurrentStack(c, plain, False, self.scan, self.remat, name="layers")
            x, new_states = stack(x, valid, jnp.zeros_like(valid), new_states, deterministic)
        if isinstance(self.attention, AdditiveConfig):
            x = Dropout(c.dropout)(x, deterministic=deterministic)
            layer = AdditiveAttention(c, self.attention, self.remat, name="attention")
            x, context, last = layer(x, valid, tuple(s[:, -1] for s in states), memory)
            new_states = tuple(
                jnp.concatenate([a, b[:, None]], axis=1) for a, b in zip(new_states, last, strict=True)
            )
        elif isinstance(self.attention, GeneralConfig | DotConfig):
            general = isinstance(self.attention, GeneralConfig)
            context = MultiplicativeAttention(c, general, name="attention")(x, segment_ids, memory)
        else:
            return x, new_states
        both = jnp.concatenate([x, context], axis=-1)
        out = Linear((2 * c.width,), (c.width,), ("embed", "state"), c.std, False, c.dtypes, name="out")
        return jnp.tanh(out(both)), new_states
