"""Rematerialisation: which activations of a layer are stored for the backward pass, by name."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax

from attnlab.errors import InputError

# Where an activation is until the backward pass reads it.
Storage = Literal["recompute", "device", "host"]
HOST_MEMORY = "pinned_host"  # JAX's memory kind


@dataclass(frozen=True, kw_only=True)
class Save:
    """Recompute the activations of a layer in the backward pass, except the named ones.

    Each name is "recompute", "device" (stored) or "host" (moved to host memory, and back when the
    backward pass needs it). All "recompute" is the same as "full". Layers give the names with
    `jax.ad_checkpoint.checkpoint_name`.

    Attributes:
      query: queries of self- and cross-attention before positions, (B, T, H, D).
      key: keys, (B, S, K, D); in `LatentAttention`, the vector and the rotated key.
      value: values, (B, S, K, D).
      attention_out: outputs of `attend`, (B, T, H, D), with the log-sum-exp of the scores. With the
        queries, keys and values stored too, the backends with a backward pass of their own
        (blockwise, splash, flash, the ring) do not repeat the attention.
      mlp_hidden: products of the first maps of a feed-forward layer, before the activation
        function, (B, T, F); two arrays in a gated one.
      branch_out: outputs of attention and feed-forward, before the residual sum, (B, T, E).
    """

    query: Storage = "recompute"
    key: Storage = "recompute"
    value: Storage = "recompute"
    attention_out: Storage = "recompute"
    mlp_hidden: Storage = "recompute"
    branch_out: Storage = "recompute"

    def names(self, storage: Storage) -> list[str]:
        """Return the names with this storage."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) == storage]


Remat: TypeAlias = Literal["none", "full", "dots"] | Save
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def remat_policy(remat: Remat) -> Callable[..., Any]:
    """Return the policy of `jax.checkpoint` for a setting other than "none"."""
    if not isinstance(remat, Save):
        return REMAT_POLICIES[remat]
    device, host = remat.names("device"), remat.names("host")
    if not host:
        return jax.checkpoint_policies.save_only_these_names(*device)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=device,
        names_which_can_be_offloaded=host,
        offload_src="device",
        offload_dst=HOST_MEMORY,
    )


def check_host_memory(config: Any, device: Any, path: str = "model") -> None:
    """Check that a device can move activations to host memory, if a part of a config asks for it.

    Raises:
      InputError: the platform has no host memory that programs can address.
    """
    if isinstance(config, Save):
        names = config.names("host")
        kinds = [memory.kind for memory in device.addressable_memories()] if names else []
        if names and HOST_MEMORY not in kinds:
            raise InputError(
                f"{path}.{names[0]}=host requires a platform with the memory kind {HOST_MEMORY}; "
                f"{device.device_kind} has {', '.join(kinds)}: use device or recompute"
            )
    elif dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            check_host_memory(getattr(config, field.name), device, f"{path}.{field.name}")
