"""Recurrent layers: LSTM and GRU cells, bidirectional layers and stacks."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnlab.layers.linear import Dropout, Dtypes, Linear, parameter
from attnlab.layers.remat import REMAT_POLICIES
from attnlab.sharding import batch_zeros

# Arrays of one layer (B, E), or of all layers (B, L, E); the first array is the layer's output.
State = tuple[Array, ...]


@dataclass(frozen=True)
class LSTMConfig:
    """LSTM cell: c' = sigma(f + forget_bias) c + sigma(i) tanh(g) and h' = sigma(o) tanh(c').

    i, f, g, o are W x + U h + b (Hochreiter and Schmidhuber 1997; forget gates: Gers et al. 2000,
    equations 3 to 9).

    Attributes:
      forget_bias: constant added to the forget gate; 1 preserves the state in the first steps of
        training (Jozefowicz et al. 2015, section 2.2).
    """

    forget_bias: float = 1.0
    gates: ClassVar[int] = 4
    arrays: ClassVar[int] = 2

    def __call__(self, x: Float[Array, "B _"], state: State, weights: dict[str, Array]) -> State:
        """Return the state after a token, given `x` = W x + b of the token."""
        hidden, cell = state
        i, f, g, o = jnp.split(x + hidden @ weights["kernel"], self.gates, axis=-1)
        cell = jax.nn.sigmoid(f + self.forget_bias) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(cell), cell


@dataclass(frozen=True)
class GRUConfig:
    """GRU cell: h' = (1 - z) tanh(W x + b + r (U h + u)) + z h.

    r and z are sigma(W x + U h + b) (Cho et al. 2014, arXiv 1406.1078, equations 5 to 8). The reset
    gate r is applied after the product with U, as in cuDNN and PyTorch, not before it as in the
    paper: one matrix product then computes all three gates.
    """

    gates: ClassVar[int] = 3
    arrays: ClassVar[int] = 1

    def __call__(self, x: Float[Array, "B _"], state: State, weights: dict[str, Array]) -> State:
        """Return the state after a token, given `x` = W x + b of the token."""
        (hidden,) = state
        of_x = jnp.split(x, self.gates, axis=-1)
        of_hidden = jnp.split(hidden @ weights["kernel"], self.gates, axis=-1)
        r, z = (jax.nn.sigmoid(a + b) for a, b in zip(of_x[:2], of_hidden[:2], strict=True))
        new = jnp.tanh(of_x[2] + r * (of_hidden[2] + weights["bias"][None]))
        return ((1 - z) * new + z * hidden,)


@dataclass(frozen=True)
class RecurrentLayerConfig:
    """Settings that all layers of a recurrent stack share; `RecurrentConfig.layers` builds one.

    Attributes:
      cell: `LSTMConfig` or `GRUConfig`.
      width: width E of inputs, outputs and states.
      dropout: dropout rate of each layer's input in training; states are never dropped (Zaremba et
        al. 2014, arXiv 1409.2329, section 3.1).
      std: standard deviation of the initial weights.
      dtypes: dtypes of parameters and computation.
    """

    cell: LSTMConfig | GRUConfig
    width: int
    dropout: float
    std: float
    dtypes: Dtypes

    def empty(self, batch: int, depth: int) -> State:
        """Return the zero initial states of `depth` layers, (B, L, E) each."""
        shape = (batch, depth, self.width)
        return tuple(batch_zeros(shape, self.dtypes.compute) for _ in range(self.cell.arrays))


class RecurrentKernel(nn.Module):
    """Recurrent weights of a cell.

    They are not sharded: communication between devices in every time step would be slow.
    """

    cell: LSTMConfig | GRUConfig
    width: int
    std: float
    dtypes: Dtypes

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        """Return the kernel (E, gates E), and for `GRUConfig` the bias (E,) of the new state."""
        shape = (self.width, self.cell.gates * self.width)
        weights = {"kernel": parameter(self, "kernel", shape, ("embed", "state"), self.dtypes, std=self.std)}
        if isinstance(self.cell, GRUConfig):
            weights["bias"] = parameter(self, "bias", (self.width,), ("state",), self.dtypes)
        return weights


def scan_tokens(step, state: State, inputs, reverse: bool = False):
    """Scan `step(state, token) -> state, output` over dimension T of inputs (B, T, ...)."""
    inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs)
    state, outputs = jax.lax.scan(step, state, inputs, reverse=reverse)
    return state, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), outputs)


def select_state(condition: Bool[Array, "B 1"], if_true: State, if_false: State) -> State:
    """Return `if_true` in the rows where `condition` is true, and `if_false` in the others."""
    return tuple(jnp.where(condition, a, b) for a, b in zip(if_true, if_false, strict=True))


class RNN(nn.Module):
    """A cell scanned over the length, forward or in reverse, with a state of `width`."""

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
        """Return the output after each token, and the last state.

        Args:
          x: activations.
          valid: false at padding, where the state does not change.
          is_first: true at the first token of a document, where the state is reset to 0.
          state: initial state.
        """
        c = self.config
        sizes = ((x.shape[-1],), (c.cell.gates * self.width,))
        gates = Linear(*sizes, ("embed", "state"), c.std, True, c.dtypes, name="input")(x)
        weights = RecurrentKernel(c.cell, self.width, c.std, c.dtypes, name="state")()

        def step(state: State, token):
            gates, valid, is_first = token
            zero = tuple(map(jnp.zeros_like, state))
            new_state = c.cell(gates, select_state(is_first, zero, state), weights)
            state = select_state(valid, new_state, state)
            return state, state[0]

        state, outputs = scan_tokens(step, state, (gates, valid, is_first), self.reverse)
        return outputs, state


class RecurrentLayer(nn.Module):
    """A recurrent layer; a bidirectional one has half the width in each direction.

    Schuster and Paliwal 1997, section II.C.
    """

    config: RecurrentLayerConfig
    bidirectional: bool
    deterministic: bool

    @nn.compact
    def __call__(self, x, valid, is_first, state: State):
        """Return the outputs (B, T, E) and the last state; see `RNN`."""
        c = self.config
        x = Dropout(c.dropout)(x, deterministic=self.deterministic)
        if not self.bidirectional:
            return RNN(c, c.width, name="forward")(x, valid, is_first, state)
        halves = [*zip(*(jnp.split(s, 2, axis=-1) for s in state), strict=True)]
        forward = RNN(c, c.width // 2, name="forward")
        backward = RNN(c, c.width // 2, True, name="backward")
        (y, y_state), (z, z_state) = (
            layer(x, valid, is_first, half) for layer, half in zip((forward, backward), halves, strict=True)
        )
        states = (jnp.concatenate(pair, axis=-1) for pair in zip(y_state, z_state, strict=True))
        return jnp.concatenate([y, z], axis=-1), tuple(states)


class RecurrentStack(nn.Module):
    """A stack of `depth` recurrent layers, compiled as a loop over layers or unrolled."""

    config: RecurrentLayerConfig
    depth: int
    bidirectional: bool
    scan: bool
    remat: Literal["none", "full", "dots"]

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], valid, is_first, states: State, deterministic: bool
    ) -> tuple[Float[Array, "B T E"], State]:
        """Return the last layer's outputs, and the last states (B, L, E); see `RNN`."""
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
            check_constancy_invariants=False,  # it would trace the body twice
        )
        return loop(self.config, self.bidirectional, deterministic, name="periods")(
            x, valid, is_first, states
        )
