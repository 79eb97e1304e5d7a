"""Forced, suppressed and end tokens of a model's generation."""

from dataclasses import dataclass, fields

from attnlab.errors import check_fields


@dataclass(frozen=True)
class GenerationDefaults:
    """Forced, suppressed and end tokens of generation, as in Hugging Face's `GenerationConfig`.

    Attributes:
      decoder_start_token_id: first input token of the decoder; None means the tokenizer's beginning
        token.
      forced_decoder_ids: first tokens of every generated text, such as a language token.
      suppress_tokens: tokens that are never generated.
      begin_suppress_tokens: tokens that are never generated first after the forced ones.
      forced_eos: whether a text of maximum length must end with the end token
        (`forced_eos_token_id`).
      eos_token_ids: further tokens that end a text; the tokenizer's end token always ends one.
    """

    decoder_start_token_id: int | None = None
    forced_decoder_ids: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_eos: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        check_fields(self, "decoder_start_token_id", least=0)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple) and min(value, default=0) < 0:
                raise ValueError(f"{field.name}={value} must be token ids of at least 0")
