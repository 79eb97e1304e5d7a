"""Typed access to the fields of a checkpoint's `config.json`."""

from collections.abc import Mapping
from typing import Any

from attnlab.errors import InputError, shorten
from attnlab.layers import Causal, LayerSpec, Rotary, Sliding
from attnlab.models import GenerationDefaults
from attnlab.pretrained import rope
from attnlab.pretrained.field_types import EXPECTED
from attnlab.untrusted import Fields

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
# Fields that may be in either file; `generation_config.json` goes first.
SHARED_GENERATION_FIELDS = ("decoder_start_token_id", "eos_token_id")
HF_ACTIVATION_NAMES = {param: hf_name for hf_name, param in reversed(ACTIVATIONS.items())}


class HFConfig(Fields):
    """The fields of a `config.json`, with conversions that several families share.

    Args:
      fields: the parsed JSON object.
      where: the file name for error messages.
    """

    def __init__(self, fields: Mapping[str, Any], where: str):
        super().__init__(fields, where, EXPECTED)
        self.require("quantization_config", None)

    def changed(self, **fields: Any) -> "HFConfig":
        """Return a config with other values of these fields."""
        return HFConfig({**self._fields, **fields}, self._where)

    def with_defaults(self, **fields: Any) -> "HFConfig":
        """Return a config with these values of fields that are absent or null."""
        return self.changed(**{name: self.get(name, value) for name, value in fields.items()})

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
                f"{self._where}: {name}={shorten(repr(self._fields[name]))} is not supported; "
                f"it may be {supported}"
            )

    def generation_defaults(self, decoder_start_token_id: int | None = None) -> GenerationDefaults:
        """Return the token constraints of generation: forced, suppressed and end tokens.

        Raises:
          InputError: `bad_words_ids` with a sequence of several tokens, or a forced last token
            other than the end token.
        """
        ends, words = self.eos_token_ids, self.get("bad_words_ids", ())
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
            eos_token_ids=ends,
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end tokens, of the nested text model if this config has none."""
        nested = [Fields(self.get(name, {}), self._where, EXPECTED) for name in ("decoder", "text_config")]
        ends = (fields.get("eos_token_id") for fields in (self, *nested))
        end = next((end for end in ends if end is not None), ())
        return tuple(end) if isinstance(end, list | tuple) else (end,)

    def activation(self, name: str) -> Any:
        """Return the activation that this field names."""
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

        Reads `rope_parameters`, or the fields of older configs: see `rope.rotary`.

        Args:
          layer_type: selects the parameters in configs where layer types differ.
          theta: the base frequency if the config has none.
        """
        return rope.rotary(self, layer_type, theta, self._where)
