"""The rotary embedding of a checkpoint: `rope_parameters`, and the fields of older configs."""

import math
from collections.abc import Mapping
from typing import Any

from attnlab.attention import positions
from attnlab.errors import InputError, shorten
from attnlab.layers import Rotary
from attnlab.pretrained.field_types import EXPECTED_ROPE
from attnlab.untrusted import Fields

LOCAL_THETA = "rope_local_base_freq"  # of Gemma 3's sliding layers
LENGTH, ORIGINAL = "max_position_embeddings", "original_max_position_embeddings"
COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
# The keys that transformers reads for each type. It ignores `short_mscale` and `long_mscale`.
KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "truncate",
        "mscale", "mscale_all_dim",
    ),
    "longrope": ("factor", ORIGINAL, "attention_factor", "short_factor", "long_factor"),
}  # fmt: skip
OTHER_NAMES = {"su": "longrope"}  # of Phi-3's first versions


class RopeFields:
    """The rotary fields of one layer type.

    Args:
      config: the fields of `config.json`.
      layer_type: selects the parameters in configs where layer types differ.
      where: the file name for error messages.

    Raises:
      InputError: an unknown type, or a field that the type does not have.
    """

    def __init__(self, config: Mapping[str, Any], layer_type: str, where: str):
        # As in transformers, the older field goes first, except for Gemma 3's sliding layers.
        local = layer_type == "sliding_attention" and config.get(LOCAL_THETA) is not None
        name = "rope_scaling" if config.get("rope_scaling") and not local else "rope_parameters"
        self._config, self.where = config, f"{where}: {name}"
        outer = Fields(config.get(name) or {}, self.where, EXPECTED_ROPE)
        own = outer.get(layer_type)
        self._nested, flat = bool(own), {} if local else outer
        self._fields = Fields(own or flat, self.where, EXPECTED_ROPE)
        kind = self.get("rope_type") or self.get("type") or "default"
        self.kind = OTHER_NAMES.get(kind, kind)
        if self.kind not in KEYS:
            raise InputError(
                f"{where}: rope_type={shorten(repr(kind))} is not supported; supported: {', '.join(KEYS)}"
            )
        known = (*COMMON, *KEYS[self.kind])
        for key in self._fields:
            if key not in known and (value := self.get(key)) is not None:
                raise InputError(
                    f"{self.where}: {key}={shorten(repr(value))} is not supported with rope_type={kind!r}; "
                    f"supported: {', '.join(known)}"
                )

    def get(self, name: str) -> Any:
        """Return a field, or None if it is absent or null."""
        return self._fields.get(name)

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def __getitem__(self, name: str) -> Any:
        if self.get(name) is None:
            raise InputError(f"{self.where} lacks {name!r}, which rope_type={self.kind!r} needs")
        return self._fields[name]

    @property
    def length(self) -> int:
        """The context length of the model."""
        if self._config.get(LENGTH) is None:
            raise InputError(f"{self.where} needs {LENGTH!r}, which the config lacks")
        return self._config[LENGTH]

    @property
    def original(self) -> int:
        """The length trained on: transformers reads it outside the parameters first."""
        outside = None if self._nested else self._config.get(ORIGINAL)
        return outside or self.get(ORIGINAL) or self.length


def rotary(config: Mapping[str, Any], layer_type: str, theta: float, where: str) -> Rotary:
    """Return the rotary embedding of a layer type.

    Args:
      config: the fields of `config.json`.
      layer_type: selects the parameters in configs where layer types differ.
      theta: the base frequency if the config has none.
      where: the file name for error messages.

    Raises:
      InputError: a field that is missing, unknown, or not supported.
    """
    rope = RopeFields(config, layer_type, where)
    outside = LOCAL_THETA if layer_type == "sliding_attention" and LOCAL_THETA in config else "rope_theta"
    theta = rope.get("rope_theta") or config.get(outside) or theta
    fraction = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return Rotary(float(theta), float(fraction), _scaling(rope))


def _scaling(rope: RopeFields) -> positions.Scaling | None:
    if rope.kind == "default":
        return None
    if rope.kind == "linear":
        return positions.LinearScaling(float(rope["factor"]))
    if rope.kind == "dynamic":
        return positions.DynamicNTK(float(rope["factor"]), rope.length)
    if rope.kind == "llama3":
        factor, slow, fast = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        return positions.Llama3(factor, rope.original, slow, fast)
    if rope.kind == "yarn" and "factor" not in rope:
        raise InputError(f"{rope.where} lacks 'factor', which rope_type='yarn' needs")
    factor = float(rope.get("factor") or rope.length / rope.original)
    if rope.kind == "longrope":
        short, long = (tuple(map(float, rope[name])) for name in ("short_factor", "long_factor"))
        return positions.LongRoPE(short, long, rope.original, factor, _temperature(rope, factor))
    return positions.YaRN(
        factor,
        rope.original,
        fast=float(rope.get("beta_fast") or 32),
        slow=float(rope.get("beta_slow") or 1),
        truncate=rope.get("truncate") is not False,
        temperature=_temperature(rope, factor),
    )


def _temperature(rope: RopeFields, factor: float) -> float | None:
    """Return the attention factor of YaRN or LongRoPE; None means the usual one.

    DeepSeek's YaRN has (0.1 a log(factor) + 1) / (0.1 b log(factor) + 1) with a = `mscale` and
    b = `mscale_all_dim`.
    """
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    scales = [rope.get(name) for name in ("mscale", "mscale_all_dim")]
    if not all(scales):
        return None
    log = math.log(max(factor, 1.0))
    above, below = (0.1 * scale * log + 1 for scale in scales)
    return above / below
