"""The canonical form of a model config, in which equal models have equal configs."""

from dataclasses import replace
from typing import Any, TypeVar

from attnlab.layers.linear import Dtypes
from attnlab.models.config import ModelConfig, TextConfig, TransformerConfig
from attnlab.models.encoder import EncoderConfig
from attnlab.models.heads import ClassifierConfig

Config = TypeVar("Config", bound=ModelConfig)


def canonical(config: Config) -> Config:
    """Return the config with defaults made explicit and training-only options reset.

    Two configs compute the same function if their canonical configs are equal.
    """
    config = config.map_submodels(canonical).with_dtypes(Dtypes())
    return _canonical_transformer(config) if isinstance(config, TransformerConfig) else config


def _canonical_transformer(config: Any) -> Any:
    shared = isinstance(config, EncoderConfig) and config.num_param_groups
    pattern = config.pattern if shared else config.layer_specs
    if isinstance(config, TextConfig):
        own = config.positions
        pattern = tuple(replace(k, positions=None) if k.positions == own else k for k in pattern)
    if isinstance(config, EncoderConfig) and isinstance(config.head, ClassifierConfig):
        config = replace(config, head=replace(config.head, dropout=0.0))
    return replace(
        config,
        attention=replace(config.attention, kv_heads=config.kv_heads, head_dim=config.head_dim, dropout=0.0),
        feed_forward=replace(config.feed_forward, width=config.feed_forward.hidden(config.width)),
        pattern=pattern,
        layer_scale=None if config.layer_scale is None else 1.0,
        dropout=0.0,
        init=replace(config.init, std=1.0),
        remat="none",
        scan=True,
        unrolled=False,
    )
