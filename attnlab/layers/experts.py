"""A mixture of experts: feed-forward layers of which each token goes through a few."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnlab.layers.feed_forward import ACTIVATIONS, GatedMLPConfig
from attnlab.layers.linear import Linear
from attnlab.layers.parameters import Dtypes, parameter
from attnlab.sharding import spec

# A linear map for each expert: kernels (X, inputs, outputs) and biases (X, outputs), or None.
Maps = tuple[Array, Array | None]


@dataclass(frozen=True)
class ExpertsConfig:
    """The weighted sum of the `top_k` gated MLPs of the highest logits (arXiv 2401.04088, section 2.1).

    No token is dropped: experts have no capacity. A mesh's tensor axis cuts the experts, not their width.

    Attributes:
      experts: how many there are, X.
      top_k: how many each token goes through.
      width: inner width F of each; None is as of `GatedMLPConfig`.
      activation: of the gate; "clamped_swiglu" is gpt-oss's, see `clamped_swiglu`.
      bias: whether the router and the experts have biases.
      renormalize: whether the weights are a softmax over the chosen logits only (Mixtral, gpt-oss), or shares
        of the softmax over all experts (Switch, arXiv 2101.03961, equation 2).
      balance_loss_weight: weight in training of `balance_loss`, added once for each layer.
    """

    experts: int = 8
    top_k: int = 2
    width: int | None = None
    activation: Literal["gelu", "gelu_exact", "relu", "silu", "clamped_swiglu"] = "silu"
    bias: bool = False
    renormalize: bool = True
    balance_loss_weight: float = 0.01

    def __post_init__(self):
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k} must be at least 1 and at most experts={self.experts}")
        if self.renormalize and self.top_k == 1 < self.experts:
            raise ValueError(
                "renormalize with top_k=1 makes every weight 1, by which no router learns: "
                "set renormalize=false"
            )
        if self.balance_loss_weight < 0:
            raise ValueError("balance_loss_weight must be at least 0")

    def hidden(self, embed: int) -> int:
        """The inner width F of an expert."""
        return GatedMLPConfig(self.width).hidden(embed)


def clamped_swiglu(
    gate: Float[Array, "*n"], up: Float[Array, "*n"], alpha: float = 1.702, limit: float = 7.0
) -> Float[Array, "*n"]:
    """g sigmoid(alpha g) (u + 1), g = min(gate, limit), u = clip(up, -limit, limit) (arXiv 2508.10925)."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


def route(
    logits: Float[Array, "B T X"], top_k: int, renormalize: bool
) -> tuple[Float[Array, "B T k"], Int[Array, "B T k"]]:
    """The weights of the experts that each token goes to, and which these are."""
    chosen, choices = jax.lax.top_k(logits, top_k)
    over = chosen if renormalize else logits
    return jnp.exp(chosen - jax.nn.logsumexp(over, axis=-1, keepdims=True)), choices


def balance_loss(
    logits: Float[Array, "B T X"], choices: Int[Array, "B T k"], valid: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """X sum_i f_i P_i: f_i tokens of each that go to expert i, P_i its mean share of the softmax over all.

    It is `top_k` where all experts get the same. Only `valid` tokens count, not padding. Switch Transformers
    (arXiv 2101.03961, equations 4 to 6), for any `top_k`.
    """
    experts = logits.shape[-1]
    sent = jax.nn.one_hot(choices, experts).sum(axis=-2)
    of_token = valid[..., None] / jnp.maximum(valid.sum(), 1)
    f, p = (jnp.sum(x * of_token, axis=(0, 1)) for x in (sent, jax.nn.softmax(logits)))
    return experts * jnp.sum(f * p)


def mixture(
    x: Float[Array, "B T E"],
    weights: Float[Array, "B T k"],
    choices: Int[Array, "B T k"],
    maps: dict[str, Maps],
    activation: str,
    first: int | Int[Array, ""] = 0,
) -> Float[Array, "B T E"]:
    """The weighted sum of each token's experts that are here: `first` and on, as many as `maps` has.

    Pairs of a token and its choice are sorted by expert, so that each map is one product of ragged groups
    (MegaBlocks, arXiv 2211.15841). Pairs of experts that are elsewhere come last and give 0.
    """
    num_local, top_k = maps["up"][0].shape[0], choices.shape[-1]
    expert = choices.ravel() - first
    expert = jnp.where((expert >= 0) & (expert < num_local), expert, num_local)
    order = jnp.argsort(expert)
    expert = expert[order]
    sizes = jnp.sum(expert[:, None] == jnp.arange(num_local)[None], axis=0)
    # What a ragged product makes of rows after its last group is up to the backend.
    is_local = (expert < num_local)[:, None]

    def apply(name: str, rows: Array) -> Array:
        kernels, biases = maps[name]
        y = jax.lax.ragged_dot(rows, kernels, sizes)
        return y if biases is None else y + biases.at[expert].get(mode="fill", fill_value=0)

    rows = jnp.where(is_local, x.reshape(-1, x.shape[-1])[order // top_k], 0)
    gate, up = apply("gate", rows), apply("up", rows)
    clamped = activation == "clamped_swiglu"
    y = apply("down", clamped_swiglu(gate, up) if clamped else ACTIVATIONS[activation](gate) * up)
    y = jnp.where(is_local, y, 0)[jnp.argsort(order)]
    return jnp.einsum("btke,btk->bte", y.reshape(*choices.shape, -1), weights).astype(x.dtype)


def sharded_mixture(
    x: Float[Array, "B T E"],
    weights: Float[Array, "B T k"],
    choices: Int[Array, "B T k"],
    maps: dict[str, Maps],
    activation: str,
) -> Float[Array, "B T E"]:
    """`mixture` where each device computes the part of its own experts, and the parts are added up."""
    if jax.sharding.get_abstract_mesh().empty:
        return mixture(x, weights, choices, maps, activation)
    tokens, experts = spec("batch", "sequence", None), spec("experts")
    token_axes, expert_axis = tuple(jax.tree.leaves(tuple(tokens))), experts[0]

    def local(of_tokens, maps):
        # JAX (0.10 to 0.12) does not add up the parts of a gradient over an axis that indices vary over and
        # what they are taken from does not, so all is said to vary.
        x, weights, choices = jax.lax.pcast(of_tokens, expert_axis, to="varying")
        maps = jax.lax.pcast(maps, token_axes, to="varying")
        first = jax.lax.axis_index(expert_axis) * maps["up"][0].shape[0]
        return jax.lax.psum(mixture(x, weights, choices, maps, activation, first), expert_axis)

    sharded = jax.shard_map(local, in_specs=(tokens, experts), out_specs=tokens)
    return sharded((x, weights, choices), maps)


class ExpertLinear(nn.Module):
    """Declares a linear map for each of `experts`; attributes as of `Linear`."""

    experts: int
    inputs: int
    outputs: int
    axes: tuple[str, str]
    std: float
    bias: bool
    dtypes: Dtypes

    @nn.compact
    def __call__(self) -> Maps:
        """The kernels and biases."""
        shape, axes = (self.experts, self.inputs, self.outputs), ("experts", *self.axes)
        kernels = parameter(self, "kernel", shape, axes, self.dtypes, std=self.std)
        if not self.bias:
            return kernels, None
        return kernels, parameter(self, "bias", (shape[0], shape[2]), ("experts", "norm"), self.dtypes)


class Experts(nn.Module):
    """Applies the mixture that `config` describes; its balance loss goes to the collection "losses"."""

    config: ExpertsConfig
    std: float
    out_std: float
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"], valid: Bool[Array, "B T"]) -> Float[Array, "B T E"]:
        """The transformed activations; `valid` tokens are those that are no padding."""
        c, embed = self.config, x.shape[-1]
        hidden = c.hidden(embed)
        # A choice must not hang on rounding: float32 also where a device would multiply in bfloat16.
        exact = dataclasses.replace(self.dtypes, compute="float32")
        with jax.default_matmul_precision("float32"):
            router = Linear((embed,), (c.experts,), ("embed", "norm"), self.std, c.bias, exact, name="router")
            logits = router(x.astype(jnp.float32))
        weights, choices = route(logits, c.top_k, c.renormalize)
        if c.balance_loss_weight and not self.is_initializing():
            self.sow("losses", "balance", c.balance_loss_weight * balance_loss(logits, choices, valid))

        def maps(name: str, inputs: int, outputs: int, axes: tuple[str, str], std: float) -> Maps:
            return ExpertLinear(c.experts, inputs, outputs, axes, std, c.bias, self.dtypes, name=name)()

        into, back = ("embed", "expert_mlp"), ("expert_mlp", "embed")
        params = {
            "gate": maps("gate", embed, hidden, into, self.std),
            "up": maps("up", embed, hidden, into, self.std),
            "down": maps("down", hidden, embed, back, self.out_std),
        }
        return sharded_mixture(x, weights, choices, params, c.activation)
