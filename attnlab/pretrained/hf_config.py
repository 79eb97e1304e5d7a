"""Typed access to the fields of a checkpoint's `config.json`."""

from collections.abc import Mapping
from typing import Any

from attnlab.attention import positions
from attnlab.errors import InputError
from attnlab.layers import Causal, LayerSpec, Rotary, Sliding
from attnlab.models import GenerationDefaults

ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

# Fields of `generation_config.json` that constrain every generated text.
GENERATION_FIELDS = (
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
)
HF_ACTIVATION_NAMES = {param: hf_name for hf_name, param in reversed(ACTIVATIONS.items())}


class HFConfig(Mapping):
    """The fields of a `config.json`, with conversions that several families share.

    Args:
      fields: the parsed JSON object.
      where: the file name for error messages.
    """

    def __init__(self, fields: Mapping[str, Any], where: str):
        self._fields, self._where = fields, where
        self.require("quantization_config", None)

    def __getitem__(self, name: str) -> Any:
        if name not in self._fields:
            raise InputError(f"{self._where} lacks {name!r}")
        return self._fields[name]

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __iter__(self):
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field, or the default if it is absent or null."""
        value = self._fields.get(name)
        return default if value is None else value

    def part(self, name: str, defaults: Mapping[str, Any] | None = None, **changes: Any) -> "HFConfig":
        """Return the nested config of a submodel, such as `text_config`.

        Args:
          name: the field with the nested config.
          defaults: values of fields that the nested config omits.
          **changes: values that override those of the nested config.
        """
        return HFConfig({**(defaults or {}), **self[name], **changes}, f"{self._where}: {name}")

    def require(self, name: str, *allowed: Any) -> None:
        """Check that a field is absent or has one of the supported values.

        Raises:
          InputError: the value is not supported; the message lists the allowed values.
        """
        if name in self._fields and self._fields[name] not in allowed:
            supported = " or ".join(map(repr, allowed))
            raise InputError(
                f"{self._where}: {name}={self._fields[name]!r} is not supported; it may be {supported}"
            )

    def generation_defaults(self, decoder_start_token_id: int | None = None) -> GenerationDefaults:
        """Return the token constraints of generation: forced, suppressed and end tokens.

        Raises:
          InputError: `bad_words_ids` with a sequence of several tokens, or a forced last token
            other than the end token.
        """
        end, words = self.get("eos_token_id"), self.get("bad_words_ids", ())
        ends = end if isinstance(end, list) else [end]
        if any(len(word) != 1 for word in words):
            raise InputError(f"{self._where}: bad_words_ids of several tokens are not supported")
        self.require("forced_eos_token_id", None, *ends)
        begin = self.get("forced_bos_token_id")
        return GenerationDefaults(
            decoder_start_token_id=decoder_start_token_id,
            forced_decoder_ids=() if begin is None else (begin,),
            suppress_tokens=(*self.get("suppress_tokens", ()), *(t for (t,) in words if t not in ends)),
            begin_suppress_tokens=tuple(self.get("begin_suppress_tokens", ())),
            forced_eos=self.get("forced_eos_token_id") is not None,
        )

    def activation(self, *names: str) -> Any:
        """Return the activation named by the first of these fields that is present."""
        name = next((name for name in names if name in self._fields), names[0])
        if self[name] not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise InputError(f"{self._where}: {name}={self[name]!r} is not supported; supported: {known}")
        return ACTIVATIONS[self[name]]

    def pattern(self, *default: str) -> tuple[LayerSpec, ...]:
        """Return a decoder's layer specs from `layer_types`, or from the default types."""
        sliding: LayerSpec = Causal()
        if self.get("sliding_window") is not None:
            name = "sliding_attention"
            own = name in self.get("rope_parameters", {}) or "rope_local_base_freq" in self
            sliding = Sliding(self["sliding_window"], positions=self.rotary(name) if own else None)
        return self.layer_specs({"full_attention": Causal(), "sliding_attention": sliding}, *default)

    def layer_specs(self, spec_of_type: Mapping[str, LayerSpec], *default: str) -> tuple[LayerSpec, ...]:
        """Return the shortest repeating pattern of layer specs.

        Args:
          spec_of_type: the layer spec of each name that may occur in `layer_types`.
          *default: the types of all layers if the config has no `layer_types`.
        """
        types = tuple(self.get("layer_types") or default)
        for name in types:
            if name not in spec_of_type:
                raise InputError(f"{self._where}: layer_types has {name!r}, which is not supported")
        specs = tuple(spec_of_type[name] for name in types)
        lengths = range(1, len(specs) + 1)
        shortest = next(n for n in lengths if all(s == specs[i % n] for i, s in enumerate(specs)))
        return specs[:shortest]

    def rotary(self, layer_type: str = "full_attention", theta: float = 10_000.0) -> Rotary:
        """Return the rotary embedding of a layer type.

        Reads `rope_parameters`, or the fields of older configs (`rope_theta`, `rope_scaling`,
        `rope_local_base_freq`).

        Args:
          layer_type: selects the parameters in configs where layer types differ.
          theta: the base frequency if the config has none.
        """
        rope = self.get("rope_parameters") or self.get("rope_scaling") or {}
        rope = rope.get(layer_type) or rope
        if layer_type == "sliding_attention" and "rope_local_base_freq" in self:
            rope = {"rope_theta": self["rope_local_base_freq"]}
        theta = rope.get("rope_theta") or self.get("rope_theta", theta)
        fraction = rope.get("partial_rotary_factor") or self.get("partial_rotary_factor", 1.0)
        return Rotary(float(theta), float(fraction), self._scaling(rope))

    def _scaling(self, rope: Mapping[str, Any]) -> positions.Scaling | None:
        kind = rope.get("rope_type") or rope.get("type") or "default"
        length, name = self.get("max_position_embeddings"), "original_max_position_embeddings"
        original: Any = rope.get(name) or self.get(name)
        factor: Any = rope.get("factor")
        if kind == "default":
            return None
        if kind == "linear":
            return positions.LinearScaling(factor)
        if kind == "dynamic":
            return positions.DynamicNTK(factor, original or length)
        if kind == "llama3":
            return positions.Llama3(factor, original, rope["low_freq_factor"], rope["high_freq_factor"])
        if kind == "yarn":
            return self._yarn(rope, factor or length / original, original or length)
        if kind in ("longrope", "su"):
            short, long = (tuple(map(float, rope[name])) for name in ("short_factor", "long_factor"))
            return positions.LongRoPE(short, long, original, factor or length / original)
        raise InputError(
            f"{self._where}: rope_type={kind!r} is not supported; supported: default, linear, dynamic, "
            "llama3, yarn, longrope"
        )

    def _yarn(self, rope: Mapping[str, Any], factor: float, original: int) -> positions.YaRN:
        for name in ("mscale", "mscale_all_dim"):
            if rope.get(name):
                raise InputError(f"{self._where}: yarn with {name} is not supported")
        return positions.YaRN(
            factor,
            original,
            fast=rope.get("beta_fast") or 32.0,
            slow=rope.get("beta_slow") or 1.0,
            truncate=rope.get("truncate", True),
            temperature=rope.get("attention_factor"),
        )
