"""Multi-head attention modules: projections, positions and KV cache around one call of `attend`."""

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Shaped

from attnlab.attention import attend, key_lengths, segments, shift_mask, softcap
from attnlab.attention.block_mask import BlockMask
from attnlab.attention.kv_cache import CachedKeys, DecoderCache
from attnlab.attention.masks.base import Mask
from attnlab.attention.masks.basic import conjunction
from attnlab.attention.normalizers import softmax
from attnlab.attention.pairwise import pytree, static
from attnlab.layers.linear import Dtypes, Linear, parameter
from attnlab.layers.position_wise import LayerNormConfig, RMSNormConfig
from attnlab.layers.specs import (  # noqa: F401 - saved configs name these classes here
    Bidirectional,
    Causal,
    FirstValue,
    LayerSpec,
    NoPositions,
    RelativeBias,
    Rotary,
    Sliding,
)
from attnlab.sharding import constrain, gather_length, has_sharded_length


@dataclass(frozen=True)
class AttentionConfig:
    """Config of every attention layer of a model.

    Attributes:
      heads: number of query heads H.
      kv_heads: number of key/value heads K; None means H, 1 is multi-query attention.
      head_dim: width D of a head; None means E / H.
      bias: projections that have a bias: all (true), none (false), or only those of the query, key
        and value ("qkv"), of the query, value and output ("qvo"), or of the output ("o").
      qk_norm: normalise queries and keys with the model's norm, per head (true; arXiv 2010.04245,
        2302.05442) or over all heads together ("whole"; OLMo 2, arXiv 2501.00656, section 3.2).
      softcap: softcap of the scores; None disables it.
      scale: factor of the scores; None means the initialisation's factor, or 1 / sqrt(D).
      sinks: add a learned logit without a value to each head's softmax (gpt-oss, arXiv 2508.10925).
      dropout: dropout rate of the attention weights in training.
    """

    heads: int = 8
    kv_heads: int | None = None
    head_dim: int | None = None
    bias: bool | Literal["qkv", "qvo", "o"] = False
    qk_norm: bool | Literal["whole"] = False
    softcap: float | None = None
    scale: float | None = None
    sinks: bool = False
    dropout: float = 0.0

    def has_bias(self, projection: str) -> bool:
        """Return whether the projection "query", "key", "value" or "out" has a bias."""
        return projection[0] in self.bias if isinstance(self.bias, str) else self.bias

    def __post_init__(self):
        if self.heads < 1:
            raise ValueError(f"heads={self.heads} must be at least 1")
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"head_dim={self.head_dim} must be at least 1, or none")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            divisors = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise ValueError(
                f"kv_heads must divide heads={self.heads}: one of {', '.join(map(str, divisors))}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and under 1, not {self.dropout}")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap must be over 0, or none, not {self.softcap}")
        if self.scale is not None and self.scale <= 0:
            raise ValueError(f"scale must be over 0, or none, not {self.scale}")


# Which tokens of a row belong together; see `Model`.
SegmentIds = Int[Array, "B T"] | Int[Array, " B"] | None


@pytree
class Documents:
    """The documents of each row of a batch.

    Attributes:
      ids: document id of each token, 0 at padding.
      lengths: number of tokens of each row, if it holds one document with its padding at the end;
        None otherwise.
      whole: whether each row is one document without padding.
    """

    ids: Int[Array, "B T"]
    lengths: Int[Array, " B"] | None = None
    whole: bool = static(default=False)

    @property
    def segment_ids(self) -> SegmentIds:
        """The documents as an argument of `Model`."""
        return None if self.whole else self.ids if self.lengths is None else self.lengths

    def mask(self, keys: "Documents") -> Mask | None:
        """Return the mask of the keys in a query's own document; None allows all.

        Backends support key lengths more often than document ids.
        """
        packed = any(x.lengths is None and not x.whole for x in (self, keys))
        if packed:
            return segments(self.ids, keys.ids)
        if keys.lengths is None:
            return None
        return key_lengths(keys.lengths, keys.lengths if self is keys else None)

    def every(self, stride: int) -> "Documents":
        """Return the documents of every `stride`-th token."""
        lengths = None if self.lengths is None else (self.lengths + stride - 1) // stride
        return self._with(self.ids[:, ::stride], lengths)

    def repeated(self, times: int) -> "Documents":
        """Return the documents of each token repeated."""
        lengths = None if self.lengths is None else self.lengths * times
        return self._with(jnp.repeat(self.ids, times, axis=1), lengths)

    def followed_by(self, other: "Documents") -> "Documents":
        """Return the documents of the rows of `self` and `other`, concatenated."""
        ids = jnp.concatenate([self.ids, other.ids], axis=1)
        if self.whole and (other.whole or other.lengths is not None):
            lengths = None if other.lengths is None else other.lengths + self.ids.shape[1]
            return other._with(ids, lengths)
        return Documents(constrain(ids, "batch", None))

    def after(self, number: int) -> "Documents":
        """Return the documents without the first tokens."""
        lengths = None if self.lengths is None else jnp.maximum(self.lengths - number, 0)
        return self._with(self.ids[:, number:], lengths)

    def _with(self, ids: Int[Array, "B T"], lengths: Int[Array, " B"] | None) -> "Documents":
        return Documents(constrain(ids, "batch", None), lengths, self.whole)


def documents(segment_ids: SegmentIds, x: Shaped[Array, "B T"]) -> Documents:
    """Return the documents of rows like `x`; see `segment_ids` of `Model`."""
    if segment_ids is None:
        ids = constrain(jnp.ones_like(x, jnp.int32), "batch", None)
        return Documents(ids, whole=True)
    if segment_ids.ndim == 2:
        return Documents(constrain(segment_ids, "batch", None))
    lengths = jnp.minimum(segment_ids, x.shape[1])
    index = jnp.zeros_like(x, jnp.int32) + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    ids = (index < lengths[:, None]).astype(jnp.int32)
    return Documents(constrain(ids, "batch", None), lengths)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EncoderOutput:
    """Encoder output that cross-attention attends to.

    Attributes:
      hidden: activations; their width M may differ from the model's.
      documents: its documents. Queries attend to their own document.
      mask: further restriction of those pairs, such as `media`; None allows all.
    """

    hidden: Float[Array, "B S M"]
    documents: Documents
    mask: Mask | None = None

    @property
    def segments(self) -> Int[Array, "B S"]:
        """Document id of each position, 0 at padding."""
        return self.documents.ids


@pytree
class SharedBlockMasks:
    """The block masks of the attention of a stack, which its layers share.

    Attributes:
      specs: the distinct specs of the layers.
      masks: the block mask of the layers of each spec; None if the backend uses none.
      cross: the block mask of the cross-attention branches; None if there is none.
    """

    specs: tuple[LayerSpec, ...] = static(default=())
    masks: tuple[BlockMask | None, ...] = ()
    cross: BlockMask | None = None

    def get(self, spec: LayerSpec) -> BlockMask | None:
        """Return the block mask of the layers of a spec; None if there is none."""
        return dict(zip(self.specs, self.masks, strict=True)).get(spec)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SequenceInputs:
    """Inputs that all layers of a stack share, besides the activations.

    Attributes:
      documents: the documents of each row.
      positions: position of each token in its document.
      cache: state of the KV cache without the layers' keys and values; None without a cache.
      memory: encoder output for cross-attention; None if the layers do not cross-attend, or if
        their caches hold its keys and values.
      relative_bias_table: the table of `RelativeBias`.
      bidirectional_ids: tokens with the same id over 0 attend to each other in both directions in
        every layer (prefix LM); None disables this.
      block_masks: block masks that the layers share, from `share_block_masks`.
      first_value: the first layer's values, if a layer's mixer uses them.
    """

    documents: Documents
    positions: Int[Array, "B T"]
    cache: DecoderCache | None = None
    memory: EncoderOutput | None = None
    relative_bias_table: Float[Array, "buckets H"] | None = None
    bidirectional_ids: Int[Array, "B T"] | None = None
    block_masks: SharedBlockMasks = SharedBlockMasks()  # noqa: RUF009 - frozen, so safe to share
    first_value: FirstValue | None = None

    @property
    def segments(self) -> Int[Array, "B T"]:
        """Document id of each token, 0 at padding."""
        return self.documents.ids


class AttentionLayer(nn.Module):
    """Base of the attention layers of models: projections, and the options of `attend`.

    Attributes:
      config: heads and options.
      spec: attention pattern of the layer.
      positions: position embedding of queries and keys.
      norm: norm of queries and keys, used if `config.qk_norm`.
      scale: factor of the scores if `config.scale` is None; None means 1 / sqrt(D).
      std: standard deviation of the initial query, key and value weights.
      out_std: standard deviation of the initial output weights.
      dtypes: dtypes of parameters and computation.
    """

    config: AttentionConfig
    spec: LayerSpec
    positions: Rotary | RelativeBias | NoPositions
    norm: RMSNormConfig | LayerNormConfig
    scale: float | None
    std: float
    out_std: float
    dtypes: Dtypes

    def project(
        self, x: Float[Array, "B T inputs"], name: str, embed: int | None = None
    ) -> Float[Array, "B T H D"]:
        """Return queries, keys or values, normalised if `config.qk_norm`.

        Args:
          x: tokens, or an encoder output.
          name: "query", "key" or "value".
          embed: model width E; None means the width of `x`.
        """
        config, inputs = self.config, x.shape[-1]
        heads, axis = config.heads, "heads"
        if name != "query":
            heads, axis = config.kv_heads or config.heads, "kv_heads"
        shape, axes = (heads, self.head_dim(embed or inputs)), (axis, "head_dim")
        bias = config.has_bias(name)
        y = Linear((inputs,), shape, ("embed", *axes), self.std, bias, self.dtypes, name=name)(x)
        y = checkpoint_name(y, name)
        if not config.qk_norm or name == "value":
            return y
        norm_axes = axes if config.qk_norm == "whole" else ("norm",)
        return self.norm.build(self.dtypes, norm_axes, name=f"{name}_norm")(y)

    def head_dim(self, embed: int) -> int:
        """Return the width of a head in a model of width `embed`."""
        return self.config.head_dim or embed // self.config.heads

    @property
    def _scale(self) -> float | None:
        return self.spec.scale or self.config.scale or self.scale

    def _options(self, mask: Mask, block_mask: BlockMask | None, deterministic: bool) -> dict[str, Any]:
        """Return arguments of `attend` besides its arrays; declare the sinks."""
        config, normalizer = self.config, self.spec.normalizer
        sinks = None
        if config.sinks:
            sinks = parameter(self, "sinks", (config.heads,), ("heads",), self.dtypes, wide=True)
        sink = None if normalizer is None else normalizer.softmax_sink
        if sink is not None:
            fixed = jnp.full(config.heads, sink, jnp.float32)
            sinks = fixed if sinks is None else jnp.logaddexp(sinks, fixed)
        use_dropout = config.dropout > 0 and not deterministic
        return {
            "mask": mask,
            "block_mask": block_mask,
            "scale": self._scale,
            "sinks": sinks,
            "normalizer": softmax if normalizer is None or sink is not None else normalizer,
            "dropout_rate": config.dropout,
            "dropout_key": self.make_rng("dropout") if use_dropout else None,
            "deterministic": not use_dropout,
            "return_weights": self.is_mutable_collection("intermediates"),
        }

    def _sow_weights(self, result: Any) -> Float[Array, "B T H D"]:
        """Return the output of `attend`; sow its weights if there are any."""
        if not isinstance(result, tuple):
            return result
        out, weights = result
        self.sow("intermediates", "attention_weights", weights)
        return out

    def _attend(
        self,
        query: Float[Array, "B T H D"],
        key: Float[Array, "B S K D"],
        value: Float[Array, "B S K D"],
        mask: Mask,
        block_mask: BlockMask | None,
        embed: int,
        deterministic: bool,
    ) -> Float[Array, "B T E"]:
        """Return plain attention without scores, projected to the model width `embed`."""
        if has_sharded_length(query) != has_sharded_length(key):  # the mesh divides one of the lengths
            query, key, value = map(gather_length, (query, key, value))
        score = softcap(self.config.softcap) if self.config.softcap else None
        options = self._options(mask, block_mask, deterministic)
        result = attend(query, key, value, score=score, **options)
        return constrain(self._project_out(self._sow_weights(result), embed), "batch", "residual", None)

    def _project_out(self, out: Float[Array, "B T H D"], embed: int) -> Float[Array, "B T E"]:
        axes, bias = ("heads", "head_dim", "embed"), self.config.has_bias("out")
        linear = Linear(out.shape[2:], (embed,), axes, self.out_std, bias, self.dtypes, name="out")
        return checkpoint_name(linear(out), "branch_out")


def self_attention_mask(spec: LayerSpec, inputs: SequenceInputs, keys: CachedKeys) -> Mask:
    """Return the mask of self-attention: the mask of the layer's spec, within documents.

    Args:
      spec: the spec of the layer.
      inputs: the inputs of the stack.
      keys: the keys of the layer, from its cache if there is one.
    """
    cache, ids = inputs.cache, inputs.bidirectional_ids
    if cache is None:
        mask, documents_mask = spec.mask(), inputs.documents.mask(inputs.documents)
        key_ids = ids
    else:
        new, slots = inputs.segments.shape[1], cache.segments.shape[1]
        mask = keys.mask(shift_mask(spec.mask(cache.index - new), cache.row_starts))
        documents_mask = segments(inputs.segments, keys.gather(cache.segments))
        # `ids` need an empty cache: the remaining slots are empty.
        key_ids = None if ids is None else keys.gather(jnp.pad(ids, [(0, 0), (0, slots - new)]))
    if ids is not None:
        mask = mask | segments(ids, key_ids)
    return conjunction(mask, documents_mask)
