"""Mixture of experts: each token is routed to a few of several gated MLPs."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from attnlab.layers.linear import Dtypes, Linear, parameter
from attnlab.layers.position_wise import ACTIVATIONS, GatedMLPConfig, check_width
from attnlab.sharding import constrain, spec

# One linear map per expert: kernels (X, inputs, outputs), and biases (X, outputs) or None.
Maps = tuple[Array, Array | None]


@dataclass(frozen=True)
class ExpertsConfig:
    """Weighted sum of the `top_k` gated MLPs with the highest router logits.

    Mixtral, arXiv 2401.04088, section 2.1. Experts have no capacity limit, so no token is dropped.
    A mesh shards the experts over its expert axis, and their width over tensor.

    Attributes:
      experts: number of experts X.
      top_k: number of experts per token k.
      width: inner width F of an expert; None means the default of `GatedMLPConfig`.
      activation: activation of the gate; for "clamped_swiglu" (gpt-oss) see `clamped_swiglu`.
      bias: whether the router and the experts have biases.
      renormalize: whether the weights are a softmax over the selected logits only (Mixtral,
        gpt-oss), or the probabilities of a softmax over all experts (Switch, arXiv 2101.03961,
        equation 2).
      balance_loss_weight: weight of each layer's `balance_loss` in the training loss.
    """

    experts: int = 8
    top_k: int = 2
    width: int | None = None
    activation: Literal["gelu", "gelu_exact", "relu", "silu", "clamped_swiglu"] = "silu"
    bias: bool = False
    renormalize: bool = True
    balance_loss_weight: float = 0.01

    def __post_init__(self):
        check_width(self.width)
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k} must be at least 1 and at most experts={self.experts}")
        if self.renormalize and self.top_k == 1 < self.experts:
            raise ValueError(
                "renormalize with top_k=1 makes every weight 1, so the router gets no gradient: "
                "set renormalize=false"
            )
        if self.balance_loss_weight < 0:
            raise ValueError(f"balance_loss_weight={self.balance_loss_weight} must be at least 0")

    def hidden(self, embed: int) -> int:
        """Return the inner width F of an expert."""
        return GatedMLPConfig(self.width).hidden(embed)


def clamped_swiglu(
    gate: Float[Array, "*n"], up: Float[Array, "*n"], alpha: float = 1.702, limit: float = 7.0
) -> Float[Array, "*n"]:
    """Return g sigmoid(alpha g) (u + 1), the clamped SwiGLU of gpt-oss (arXiv 2508.10925).

    g = min(gate, limit) and u = clip(up, -limit, limit).
    """
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


def route(
    logits: Float[Array, "B T X"], top_k: int, renormalize: bool
) -> tuple[Float[Array, "B T k"], Int[Array, "B T k"]]:
    """Return the weights and the indices of each token's experts."""
    find = partial(jax.lax.top_k, k=top_k)
    if not jax.sharding.get_abstract_mesh().empty:  # XLA for CPUs would gather the logits
        tokens = spec("batch", "sequence", None, shape=logits.shape)
        find = jax.shard_map(find, in_specs=tokens, out_specs=tokens)
    top_logits, choices = find(logits)
    normalized_over = top_logits if renormalize else logits
    return jnp.exp(top_logits - jax.nn.logsumexp(normalized_over, axis=-1, keepdims=True)), choices


def balance_loss(
    logits: Float[Array, "B T X"], choices: Int[Array, "B T k"], valid: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Return the load-balancing loss X sum_i f_i P_i of Switch Transformers.

    f_i is the fraction of tokens routed to expert i and P_i its mean router probability (arXiv
    2101.03961, equations 4 to 6, extended to any k). The loss is k under uniform routing. Tokens
    that are not `valid` (padding) are ignored.
    """
    experts = logits.shape[-1]
    routed = jax.nn.one_hot(choices, experts).sum(axis=-2)
    token_weight = valid[..., None] / jnp.maximum(valid.sum(), 1)
    f, p = (jnp.sum(x * token_weight, axis=(0, 1)) for x in (routed, jax.nn.softmax(logits)))
    return experts * jnp.sum(f * p)


def mixture(
    x: Float[Array, "B T E"],
    weights: Float[Array, "B T k"],
    choices: Int[Array, "B T k"],
    maps: dict[str, Maps],
    activation: str,
    first_expert: int | Int[Array, ""] = 0,
) -> Float[Array, "B T E"]:
    """Return the weighted sum over each token's experts that are in `maps`, from `first_expert`.

    Pairs (token, choice) are sorted by expert, so that each map is one ragged matrix product
    (MegaBlocks, arXiv 2211.15841). Pairs whose expert is not in `maps` come last and contribute 0.
    """
    num_local, top_k = maps["up"][0].shape[0], choices.shape[-1]
    expert = choices.ravel() - first_expert
    expert = jnp.where((expert >= 0) & (expert < num_local), expert, num_local)
    order = jnp.argsort(expert)
    expert = expert[order]
    sizes = jnp.sum(expert[:, None] == jnp.arange(num_local)[None], axis=0)
    # `ragged_dot` leaves rows after the last group undefined: mask them on both sides.
    is_local = (expert < num_local)[:, None]

    def apply(name: str, rows: Array) -> Array:
        kernels, biases = maps[name]
        y = jax.lax.ragged_dot(rows, kernels, sizes)
        return y if biases is None else y + biases.at[expert].get(mode="fill", fill_value=0)

    rows = jnp.where(is_local, x.reshape(-1, x.shape[-1])[order // top_k], 0)
    gate, up = (checkpoint_name(apply(name, rows), "mlp_hidden") for name in ("gate", "up"))
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
    """Return `mixture`: each device computes its own experts, and its part of their width.

    Devices of one expert axis gather their tokens, so that each has all tokens for its experts,
    and the sums over experts are scattered back to the devices of the tokens. No token is dropped
    however uneven the routing is.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return mixture(x, weights, choices, maps, activation)
    tokens = spec("batch", "sequence", None, shape=x.shape)
    expert_axis, width_axis = spec("experts", "expert_mlp")
    other_axes = tuple(axis for axis in jax.tree.leaves(tuple(tokens)) if axis != expert_axis)

    def local(token_inputs, maps):
        # JAX 0.10 to 0.12 omits the gradient's sum over an axis along which the indices of a gather
        # vary but its operand does not. Casting every input to varying avoids such gathers.
        token_inputs = jax.lax.pcast(token_inputs, width_axis, to="varying")
        maps = jax.lax.pcast(maps, other_axes, to="varying")
        kernels, biases = maps["down"]
        if biases is not None:  # of a sum over the width, which one device adds
            biases = jax.lax.pcast(biases, width_axis, to="varying")
            maps |= {"down": (kernels, jnp.where(jax.lax.axis_index(width_axis) == 0, biases, 0))}
        x, weights, choices = jax.lax.all_gather(token_inputs, expert_axis, tiled=True)
        first_expert = jax.lax.axis_index(expert_axis) * kernels.shape[0]
        y = mixture(x, weights, choices, maps, activation, first_expert)
        return jax.lax.psum(jax.lax.psum_scatter(y, expert_axis, tiled=True), width_axis)

    specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, maps)
    return jax.shard_map(local, in_specs=(tokens, specs), out_specs=tokens)((x, weights, choices), maps)


class ExpertLinear(nn.Module):
    """The parameters of one linear map per expert; the other attributes are those of `Linear`."""

    experts: int
    inputs: int
    outputs: int
    axes: tuple[str, str]
    std: float
    bias: bool
    dtypes: Dtypes

    @nn.compact
    def __call__(self) -> Maps:
        """Return the kernels and the biases."""
        shape, axes = (self.experts, self.inputs, self.outputs), ("experts", *self.axes)
        kernels = parameter(self, "kernel", shape, axes, self.dtypes, std=self.std)
        if not self.bias:
            return kernels, None
        outputs = "norm" if self.axes[1] == "embed" else self.axes[1]
        return kernels, parameter(self, "bias", (shape[0], shape[2]), ("experts", outputs), self.dtypes)


class Experts(nn.Module):
    """A mixture-of-experts layer; it sows its balance loss in the collection "losses".

    Attributes:
      config: see `ExpertsConfig`.
      std: standard deviation of the initial weights of the router and of the experts' first maps.
      out_std: standard deviation of the initial weights of the experts' last maps.
      dtypes: dtypes of parameters and computation; the router computes in at least float32.
    """

    config: ExpertsConfig
    std: float
    out_std: float
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"], valid: Bool[Array, "B T"]) -> Float[Array, "B T E"]:
        """Return the layer's output; `valid` is false at padding."""
        c, embed = self.config, x.shape[-1]
        hidden = c.hidden(embed)
        x = constrain(x, "batch", "sequence", None)
        # Routing must not depend on rounding: use float32 even where a device would multiply in
        # bfloat16.
        dtype = jnp.promote_types(self.dtypes.compute, jnp.float32)
        exact = dataclasses.replace(self.dtypes, compute=str(dtype), products="compute")
        with jax.default_matmul_precision("float32"):
            router = Linear((embed,), (c.experts,), ("embed", "norm"), self.std, c.bias, exact, name="router")
            logits = router(x.astype(dtype))
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
        y = sharded_mixture(x, weights, choices, params, c.activation)
        return checkpoint_name(constrain(y, "batch", "residual", None), "branch_out")
