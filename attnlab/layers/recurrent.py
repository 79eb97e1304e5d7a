"""Recurrent layers: what was read is a state of one size, which each token changes."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnlab.layers.blocks import REMAT_POLICIES
from attnlab.layers.dropout import Dropout
from attnlab.layers.linear import Linear
from attnlab.layers.parameters import Dtypes, parameter
from attnlab.sharding import batch_zeros

# Of one layer (B, E), or of all (B, L, E); the first is what the layer gives out.
State = tuple[Array, ...]


@dataclass(frozen=True)
class LSTMConfig:
    """c' = sigma(f + forget_bias) c + sigma(i) tanh(g) and h' = sigma(o) tanh(c'), where i, f, g, o are
    W x + U h + b (Hochreiter and Schmidhuber 1997; forget gates: Gers et al. 2000, equations 3 to 9).

    A bias of 1 keeps the state in the first steps of training (Jozefowicz et al. 2015, section 2.2).
    """

    forget_bias: float = 1.0
    gates: ClassVar[int] = 4
    arrays: ClassVar[int] = 2

    def __call__(self, x: Float[Array, "B _"], state: State, weights: dict[str, Array]) -> State:
        """The state after a token whose W x + b is given."""
        hidden, cell = state
        i, f, g, o = jnp.split(x + hidden @ weights["kernel"], self.gates, axis=-1)
        cell = jax.nn.sigmoid(f + self.forget_bias) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(cell), cell


@dataclass(frozen=True)
class GRUConfig:
    """h' = (1 - z) tanh(W x + b + r (U h + u)) + z h, where r and z are sigma(W x + U h + b) (Cho et al.
    2014, arXiv 1406.1078, equations 5 to 8).

    The reset r comes after the product with U, as in cuDNN and torch, and not before it as in the paper:
    one product does for all three.
    """

    gates: ClassVar[int] = 3
    arrays: ClassVar[int] = 1

    def __call__(self, x: Float[Array, "B _"], state: State, weights: dict[str, Array]) -> State:
        """The state after a token whose W x + b is given."""
        (hidden,) = state
        of_x = jnp.split(x, self.gates, axis=-1)
        of_hidden = jnp.split(hidden @ weights["kernel"], self.gates, axis=-1)
        r, z = (jax.nn.sigmoid(a + b) for a, b in zip(of_x[:2], of_hidden[:2], strict=True))
        new = jnp.tanh(of_x[2] + r * (of_hidden[2] + weights["bias"][None]))
        return ((1 - z) * new + z * hidden,)


@dataclass(frozen=True)
class RecurrentLayerConfig:
    """What all layers of a stack share; a model's config makes one of itself.

    Attributes:
      cell: `LSTMConfig` or `GRUConfig`.
      width: E, of what is read and given out.
      dropout: share of what a layer reads that is dropped in training; never of the state (Zaremba et al.
        2014, arXiv 1409.2329, section 3.1).
      std: deviation of the initial weights.
    """

    cell: LSTMConfig | GRUConfig
    width: int
    dropout: float
    std: float
    dtypes: Dtypes

    def empty(self, batch: int, depth: int) -> State:
        """The states of so many layers that have read nothing, (B, L, E) each."""
        shape = (batch, depth, self.width)
        return tuple(batch_zeros(shape, self.dtypes.compute) for _ in range(self.cell.arrays))


class RecurrentKernel(nn.Module):
    """What a state is multiplied with, whole on each device: a step that waits for others is a slow one."""

    cell: LSTMConfig | GRUConfig
    width: int
    std: float
    dtypes: Dtypes

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        """The kernel (E, gates E); of a `GRUConfig` also the bias (E,) of the new state."""
        shape = (self.width, self.cell.gates * self.width)
        weights = {"kernel": parameter(self, "kernel", shape, ("embed", "state"), self.dtypes, std=self.std)}
        if isinstance(self.cell, GRUConfig):
            weights["bias"] = parameter(self, "bias", (self.width,), ("state",), self.dtypes)
        return weights


def scan_tokens(step, state: State, inputs, reverse: bool = False):
    """Reads arrays (B, T, ...) a token at a time by `step(state, token) -> state, output (B, ...)`."""
    inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs)
    state, outputs = jax.lax.scan(step, state, inputs, reverse=reverse)
    return state, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), outputs)


def select_state(which: Bool[Array, "B 1"], one: State, other: State) -> State:
    """One state in the rows that are true, another in the others."""
    return tuple(jnp.where(which, a, b) for a, b in zip(one, other, strict=True))


class RNN(nn.Module):
    """A cell that reads the length forwards or backwards, with a state of `width`."""

    config: RecurrentLayerConfig
    width: int
    reverse: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        valid: Bool[Array, "B T 1"],
        is_first: Bool[Array, "B T 1"],
        state: State,
    ) -> tuple[Float[Array, "B T _"], State]:
        """The state's first array after each token, and the last state.

        Args:
          x: activations.
          valid: which tokens are no padding; at padding the state stays as it is.
          is_first: which tokens are the first of their document, before which the state is 0.
          state: to start from.
        """
        c = self.config
        sizes = ((x.shape[-1],), (c.cell.gates * self.width,))
        gates = Linear(*sizes, ("embed", "state"), c.std, True, c.dtypes, name="input")(x)
        weights = RecurrentKernel(c.cell, self.width, c.std, c.dtypes, name="state")()

        def step(state: State, token):
            gates, valid, is_first = token
            zero = tuple(map(jnp.zeros_like, state))
            state = select_state(valid, c.cell(gates, select_state(is_first, zero, state), weights), state)
            return state, state[0]

        state, outputs = scan_tokens(step, state, (gates, valid, is_first), self.reverse)
        return outputs, state


class RecurrentLayer(nn.Module):
    """A layer that reads forwards, or one that reads both ways with half the width each (Schuster and Paliwal
    1997, section II.C).
    """

    config: RecurrentLayerConfig
    bidirectional: bool
    deterministic: bool

    @nn.compact
    def __call__(self, x, valid, is_first, state: State):
        """What it gives out (B, T, E), and its last state; see `RNN`."""
        c = self.config
        x = Dropout(c.dropout)(x, deterministic=self.deterministic)
        if not self.bidirectional:
            return RNN(c, c.width, name="forward")(x, valid, is_first, state)
        halves = [*zip(*(jnp.split(s, 2, axis=-1) for s in state), strict=True)]
        forward, first = RNN(c, c.width // 2, name="forward")(x, valid, is_first, halves[0])
        backward, second = RNN(c, c.width // 2, True, name="backward")(x, valid, is_first, halves[1])
        states = (jnp.concatenate(pair, axis=-1) for pair in zip(first, second, strict=True))
        return jnp.concatenate([forward, backward], axis=-1), tuple(states)


class RecurrentStack(nn.Module):
    """`depth` layers, each reading what the one before gives out; scanned over, or unrolled."""

    config: RecurrentLayerConfig
    depth: int
    bidirectional: bool
    scan: bool
    remat: Literal["none", "full", "dots"]

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], valid, is_first, states: State, deterministic: bool
    ) -> tuple[Float[Array, "B T E"], State]:
        """Activations after the last layer, and the last states of all (B, L, E); see `RNN`."""
        layer = RecurrentLayer
        if self.remat != "none":
            layer = nn.remat(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan)
        loop = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, 1),
            out_axes=1,
            length=self.depth,
            unroll=1 if self.scan else self.depth,
        )
        return loop(self.config, self.bidirectional, deterministic, name="periods")(
            x, valid, is_first, states
        )
