"""Prompts and sources of generation as input arrays of a model."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from attnlab.data import Tokenizer
from attnlab.data.batch import source_kind
from attnlab.errors import InputError
from attnlab.models import ModelConfig, Seq2SeqConfig, VisionLanguageConfig


def prompt_ids(config: ModelConfig, tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of a prompt, with the positions of an image if the model has one.

    Args:
      config: the config of the model.
      tokenizer: its tokenizer.
      text: the prompt. It has the image token (`<image>` of LLaVA) at the position of the image,
        unless the image comes first.

    Raises:
      InputError: the prompt does not have exactly one image token.
    """
    if not isinstance(config, VisionLanguageConfig) or config.image_token_id is None:
        return _text_ids(config, tokenizer, text)
    image = [config.image_token_id] * config.num_image_tokens
    name = tokenizer.token_text(config.image_token_id)
    if config.prompt_suffix is not None:
        return [*image, *_text_ids(config, tokenizer, text.removeprefix(name) + config.prompt_suffix)]
    ids = tokenizer.encode_prompt(text, config.image_token_id)
    if (count := ids.count(config.image_token_id)) != 1:
        raise InputError(f"a prompt must have {name} once, at its image; this one has it {count} times")
    at = ids.index(config.image_token_id)
    return [*ids[:at], *image, *ids[at + 1 :]]


def training_prefix_ids(config: ModelConfig, tokenizer: Tokenizer) -> list[int]:
    """Return the first token ids of a training text: those of generation without a prompt."""
    if isinstance(config, VisionLanguageConfig) and config.image_token_id is not None:
        image = [config.image_token_id] * config.num_image_tokens
        if config.prompt_suffix is None:
            return [*tokenizer.bos_tokens, *image]
        return [*image, *_text_ids(config, tokenizer, config.prompt_suffix)]
    start = config.generation.decoder_start_token_id
    return tokenizer.prefix_tokens if start is None else [start, *config.generation.forced_decoder_ids]


def _text_ids(config: ModelConfig, tokenizer: Tokenizer, text: str) -> list[int]:
    start = config.generation.decoder_start_token_id
    return tokenizer.encode_prompt(text) if start is None else [start, *tokenizer.encode(text).tolist()]


def check_token_ids(config: ModelConfig, tokenizer: Tokenizer, ids: Iterable[int], source: bool) -> None:
    """Check that the model has embeddings of all token ids of a prompt, or of a text source.

    Args:
      config: the config of the model, with `vocab_size` set.
      tokenizer: the tokenizer of the ids.
      ids: token ids.
      source: whether they are those of a source.

    Raises:
      InputError: the tokenizer has a token that the model does not have.
    """
    part: Any = (
        (config.encoder if source else config.decoder) if isinstance(config, Seq2SeqConfig) else config
    )
    image = getattr(config, "image_token_id", None)  # replaced by patches
    for token in ids:
        if not 0 <= token < part.vocab_size and token != image:
            raise InputError(
                f"the token {tokenizer.token_text(token)!r} has the id {token}, but the model has only "
                f"{part.vocab_size} tokens"
            )


def source_arrays(config: ModelConfig, tokenizer: Tokenizer, sources: Sequence[Any]) -> list[np.ndarray]:
    """Return each source as an array that fits `ModelConfig.source_shape`.

    Args:
      config: the config of the model.
      tokenizer: the tokenizer of text sources.
      sources: texts; or arrays, whose first dimension may be shorter than that of the shape.

    Raises:
      InputError: a source has another type, or is too long for the model.
    """
    shape = config.source_shape
    if shape is None:
        raise InputError("the model takes only prompts, not sources")
    if source_kind(shape) == "text":
        if not all(isinstance(source, str) for source in sources):
            raise InputError("the sources of this model must be texts")
        arrays = [np.asarray(tokenizer.encode_source(source), np.int32) for source in sources]
        config.check_source_length(max(map(len, arrays)))
        return arrays
    arrays = [np.asarray(source, np.float32) for source in sources]
    for array in arrays:
        if array.shape[1:] != shape[1:] or not 1 <= len(array) <= shape[0]:
            raise InputError(f"a source must be an array of at most {shape}, not {array.shape}")
    return arrays


def pad_sources(arrays: Sequence[np.ndarray], shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Pad sources at their ends to one array, texts to a power of two, with their segments.

    Args:
      arrays: the result of `source_arrays`.
      shape: `ModelConfig.source_shape`.
    """
    longest = max(map(len, arrays))
    length = shape[0] if source_kind(shape) != "text" else 1 << (longest - 1).bit_length()
    padded = np.zeros((len(arrays), length, *shape[1:]), arrays[0].dtype)
    segments = np.zeros((len(arrays), length), np.int32)
    for i, array in enumerate(arrays):
        padded[i, : len(array)], segments[i, : len(array)] = array, 1
    return {"source": padded, "source_segments": segments}
