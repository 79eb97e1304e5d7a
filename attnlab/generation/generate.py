"""Generation: a compiled prefill, and a compiled decode loop with a chunk of tokens per call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from attnlab import sharding
from attnlab.attention.kv_cache import DecoderCache
from attnlab.data import Tokenizer
from attnlab.data.batch import source_kind
from attnlab.distributed.collectives import to_host
from attnlab.errors import InputError
from attnlab.generation import source_inputs
from attnlab.generation.beam import BeamSearchOptions, beam_search
from attnlab.generation.completion import Completion, GenerationInput, IncrementalDetokenizer
from attnlab.generation.decode_state import DecodeState, is_eos, prefill
from attnlab.generation.kv_caches import KVCacheOptions, cache_bytes, check_paged, count_pages
from attnlab.generation.sampling import SamplingParams, row_keys, sample
from attnlab.generation.speculative import (
    DraftSpeculator,
    PromptLookup,
    check_num_speculative_tokens,
    init_speculation,
    speculate,
)

DECODE_CHUNK = 16  # tokens decoded between checks of stop strings and outputs


@dataclass(frozen=True)
class DraftModel:
    """Speculative decoding with draft tokens of another model with the same vocabulary.

    Attributes:
      generator: the generator of the draft model.
      num_speculative_tokens: draft tokens per pass.
    """

    generator: "Generator"
    num_speculative_tokens: int = 4

    def __post_init__(self):
        check_num_speculative_tokens(self)


class Generator:
    """Text generation with one model. Programs are compiled per number of rows and cache slots.

    Args:
      model: a causal model, with or without sources.
      params: its parameters.
      tokenizer: its tokenizer.
      context: maximum number of tokens per row, including the prompt.
      mesh: the mesh of the parameters.
      kv_cache: the kind of KV cache; see `KVCacheOptions`.

    Attributes:
      kv_cache_bytes: bytes of the KV cache of the last call, over all devices.

    Raises:
      InputError: the model is not causal, or the KV cache does not support the model or the mesh.
    """

    def __init__(
        self,
        model: nn.Module,
        params,
        tokenizer: Tokenizer,
        context: int,
        mesh: Mesh,
        kv_cache: str = "contiguous",
    ):
        if not model.config.causal:
            raise InputError("a model with Bidirectional layers is not causal: it cannot generate text")
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.context, self.mesh = context, mesh
        self.kv_cache, self.kv_cache_bytes = KVCacheOptions(kv_cache), 0
        if kv_cache == "paged":
            check_paged(model.config, self._batch_shards)
        # The first is the padding of texts that have ended.
        self._eos_ids = tuple(dict.fromkeys((tokenizer.eos_id, *model.config.generation.eos_token_ids)))

    def __call__(
        self,
        prompts: Sequence[str] | None = None,
        *,
        sources: Sequence[Any] | None = None,
        forced_decoder_ids: Sequence[int | str] | None = None,
        max_new_tokens: int = 128,
        num_samples: int = 1,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
        stream: Callable[[int, str], None] | None = None,
        speculator: PromptLookup | DraftModel | None = None,
    ) -> list[Completion]:
        """Return `num_samples` completions of the first prompt, then of the second, and so on.

        Args:
          prompts: texts of any lengths; optional with sources.
          sources: the encoder input of each prompt: texts, or arrays of `ModelConfig.source_shape`.
          forced_decoder_ids: the first tokens of each completion, by id or name; None uses those of
            the model.
          max_new_tokens: maximum number of new tokens.
          num_samples: completions per prompt.
          sampling: temperature and filters.
          stop: strings that end a completion.
          seed: random seed; the draws of a row do not depend on the other rows.
          stream: called with (row, new text) when text becomes final.
          speculator: proposes draft tokens for speculative decoding; None decodes one token at a
            time.

        Raises:
          InputError: a prompt fills the context, a stop string is empty, sources do not fit the
            model, or the draft model has another vocabulary.
        """
        if isinstance(stop, str) or not all(stop):
            raise InputError(f"stop must be a list of strings of at least one character, not {stop!r}")
        forced_ids = self._forced_ids(forced_decoder_ids, max_new_tokens)
        inputs = [each for each in self._inputs(prompts, sources, forced_ids) for _ in range(num_samples)]
        steps = self._steps(inputs, forced_ids, max_new_tokens)
        limit = "length" if steps == max_new_tokens else "context"
        steps -= len(forced_ids) + self.model.config.generation.forced_eos  # sampled tokens
        rows = [IncrementalDetokenizer(each, self.tokenizer, stop, self._eos_ids) for each in inputs]
        for i, row in enumerate(rows):
            new_text = row.add(list(forced_ids))
            if stream is not None and new_text:
                stream(i, new_text)
        with sharding.set_mesh_of_rows(self.mesh):
            decode = self._sample if speculator is None else partial(self._speculate, speculator)
            num_decoded = 0
            for tokens in decode(inputs, steps, sampling or SamplingParams(), seed):
                for i, (row, new) in enumerate(zip(rows, tokens, strict=False)):
                    new_text = row.add(new[: steps - num_decoded].tolist())
                    if stream is not None and new_text:
                        stream(i, new_text)
                num_decoded += tokens.shape[1]
                if num_decoded >= steps or all(row.finish_reason for row in rows):
                    break
        for i, row in enumerate(rows):
            rest = row.end(limit)
            if stream is not None and rest:
                stream(i, rest)
        return [row.completion() for row in rows]

    def beam_search(
        self,
        prompts: Sequence[str] | None,
        options: BeamSearchOptions,
        *,
        sources: Sequence[Any] | None = None,
        forced_decoder_ids: Sequence[int | str] | None = None,
        max_new_tokens: int = 128,
        num_samples: int = 1,
    ) -> list[Completion]:
        """Return the best completions of each prompt by beam search, at most `num_samples`.

        Args:
          prompts: texts of any lengths; optional with sources.
          options: options of the search.
          sources: the encoder input of each prompt; see `__call__`.
          forced_decoder_ids: see `__call__`.
          max_new_tokens: maximum number of new tokens, at least 1.
          num_samples: completions per prompt, best first.

        Raises:
          InputError: a prompt fills the context, there are more samples than beams, or sources do
            not fit the model.
        """
        if not 1 <= num_samples <= options.num_beams:
            raise InputError(f"num_samples={num_samples} must be between 1 and num_beams={options.num_beams}")
        forced_ids = self._forced_ids(forced_decoder_ids, max_new_tokens)
        inputs = self._inputs(prompts, sources, forced_ids)
        steps = self._steps(inputs, forced_ids, max_new_tokens)
        slots = round_up_to_chunk(steps)
        with sharding.set_mesh_of_rows(self.mesh):
            hypotheses = beam_search(
                self.model,
                self.params,
                self._prefill(inputs, slots),
                num_beams=options.num_beams,
                length_penalty=options.length_penalty,
                eos_ids=self._eos_ids,
                slots=slots,
                steps=steps,
                forced_decoder_ids=forced_ids,
            )
        limit = "length" if steps == max_new_tokens else "context"
        completions = []
        for each, texts, scores in zip(
            inputs, to_host(hypotheses.tokens), to_host(hypotheses.scores), strict=False
        ):
            for tokens, score in zip(texts[:num_samples], scores, strict=False):
                row = IncrementalDetokenizer(each, self.tokenizer, (), self._eos_ids)
                row.add(tokens[: steps - self.model.config.generation.forced_eos].tolist())
                row.end(limit)
                if np.isfinite(score):
                    completions.append(replace(row.completion(), score=float(score)))
        return completions

    def _sample(self, inputs: Sequence[GenerationInput], steps: int, sampling: SamplingParams, seed: int):
        """Yield chunks of tokens of every row, (B, DECODE_CHUNK)."""
        state = _start(self._prefill(inputs, round_up_to_chunk(steps)), seed)
        for _ in range(0, steps, DECODE_CHUNK):
            state, tokens = _decode_chunk(self.model, self._eos_ids, sampling, self.params, state)
            yield to_host(tokens)

    def _speculate(
        self,
        speculator: PromptLookup | DraftModel,
        inputs: Sequence[GenerationInput],
        steps: int,
        sampling: SamplingParams,
        seed: int,
    ):
        """Yield the accepted tokens of every row."""
        if steps < 1:
            return
        num_drafts = speculator.num_speculative_tokens
        room, capacity = round_up_to_chunk(steps) + num_drafts + 1, DECODE_CHUNK + num_drafts + 1
        decode_state = self._prefill(inputs, room, num_drafts)
        drafter: PromptLookup | DraftSpeculator
        if isinstance(speculator, DraftModel):
            draft = speculator.generator
            draft_state = draft._prefill(inputs, room, num_drafts + 1)
            same_size = decode_state.logits.shape == draft_state.logits.shape
            if not same_size or not self.tokenizer.same_vocabulary(draft.tokenizer):
                raise InputError("the draft model must have the same vocabulary as the model")
            drafter, draft_params = DraftSpeculator(draft.model, num_drafts), draft.params
            speculator_state = draft_state.cache
        else:
            tokens, segments = self._padded(inputs, room)
            texts = np.pad(np.where(segments > 0, tokens, -1), ((0, 0), (0, room)), constant_values=-1)
            drafter, draft_params, speculator_state = speculator, None, self._put(texts)
        if not isinstance(decode_state.cache, DecoderCache) or not isinstance(
            speculator_state, DecoderCache | jax.Array
        ):
            raise InputError("a recurrent model cannot rewind its state: speculative decoding is impossible")
        options = {"sampling": sampling, "eos_ids": self._eos_ids}
        start = _start(decode_state, seed)
        state = init_speculation(
            start.decode_state, speculator_state, start.keys, looks_up=draft_params is None, **options
        )
        yield to_host(state.last)[:, None]
        num_decoded = 1
        while num_decoded < steps:
            limit = min(DECODE_CHUNK, steps - num_decoded)
            state, tokens, count = speculate(
                self.model,
                self.params,
                drafter,
                draft_params,
                state,
                capacity=capacity,
                limit=limit,
                **options,
            )
            num_decoded += int(count)
            yield to_host(tokens)[:, : int(count)]

    def _forced_ids(
        self, forced_decoder_ids: Sequence[int | str] | None, max_new_tokens: int
    ) -> tuple[int, ...]:
        defaults = self.model.config.generation.forced_decoder_ids
        tokens = defaults if forced_decoder_ids is None else forced_decoder_ids
        ids = tuple(self.tokenizer.token_id(token) if isinstance(token, str) else token for token in tokens)
        if ids and max_new_tokens <= len(ids):
            raise InputError(f"max_new_tokens must be over the {len(ids)} forced tokens")
        return ids

    def _steps(
        self, inputs: Sequence[GenerationInput], forced_ids: tuple[int, ...], max_new_tokens: int
    ) -> int:
        """Return the maximum number of tokens of a completion, including forced ones."""
        return min(max_new_tokens, self.context - max(len(each.ids) for each in inputs) + len(forced_ids))

    def _inputs(self, prompts, sources, forced_ids: tuple[int, ...]) -> list[GenerationInput]:
        """Return the inputs of each row; raises if the model lacks a token of the tokenizer."""
        inputs = self._encoded(prompts, sources, forced_ids)
        config = self.model.config.with_vocab_size(self.model.vocab_size)
        for each in inputs:
            source_inputs.check_token_ids(config, self.tokenizer, each.ids, source=False)
            if each.source is not None and source_kind(config.source_shape) == "text":
                source_inputs.check_token_ids(config, self.tokenizer, each.source.tolist(), source=True)
        return inputs

    def _encoded(self, prompts, sources, forced_ids: tuple[int, ...]) -> list[GenerationInput]:
        config = self.model.config
        if sources is None:
            if config.source_shape is not None or prompts is None:
                raise InputError(f"the model needs {'prompts' if config.source_shape is None else 'sources'}")
            return [GenerationInput(prompt, [*self._encode(prompt), *forced_ids]) for prompt in prompts]
        prompts = [""] * len(sources) if prompts is None else prompts
        if len(prompts) != len(sources):
            raise InputError(f"there are {len(prompts)} prompts but {len(sources)} sources")
        return [
            GenerationInput(
                prompt,
                [*self._encode(prompt), *forced_ids],
                array,
                source if isinstance(source, str) else None,
            )
            for prompt, source, array in zip(
                prompts, sources, source_inputs.source_arrays(config, self.tokenizer, sources), strict=True
            )
        ]

    def _encode(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt."""
        ids = source_inputs.prompt_ids(self.model.config, self.tokenizer, prompt)
        if len(ids) >= self.context:
            raise InputError(
                f"the prompt has {len(ids)} tokens, but the context of the model has {self.context}: "
                f"use at most {self.context - 1}"
            )
        return ids

    def _padded(self, inputs: Sequence[GenerationInput], room: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and segments of the prompts, left-padded."""
        ids = [each.ids for each in inputs]
        # Lengths and numbers of rows are powers of two, so that few programs are compiled.
        length = max(max(map(len, ids)), min(_power_of_two(max(map(len, ids))), self.context - room))
        tokens, segments = np.zeros((2, self._count(inputs), length), np.int32)
        for i, row in enumerate([*ids, *[ids[0]] * (len(tokens) - len(ids))]):
            tokens[i, length - len(row) :] = row
            segments[i, length - len(row) :] = 1
        return tokens, segments

    def _count(self, inputs: Sequence[GenerationInput]) -> int:
        return -(-_power_of_two(len(inputs)) // self._batch_shards) * self._batch_shards

    @property
    def _batch_shards(self) -> int:
        return sharding.num_batch_shards(self.mesh)

    def _put(self, x):
        """Shard the rows of arrays over the mesh."""
        return jax.device_put(x, sharding.named_sharding(self.mesh, P(sharding.BATCH_AXES)))

    def _prefill(self, inputs: Sequence[GenerationInput], room: int, spare: int = 0) -> DecodeState:
        """Return the state after the prompts, with `room` free cache slots.

        `spare` is the number of tokens that decoding may take back.
        """
        tokens, segments = self._padded(inputs, room)
        inputs = [*inputs, *[inputs[0]] * (len(tokens) - len(inputs))]
        arrays = [each.source for each in inputs if each.source is not None]
        source = source_inputs.pad_sources(arrays, self.model.config.source_shape) if arrays else {}
        slots = tokens.shape[1] + room
        options = replace(self.kv_cache, spare=spare)
        if options.kind == "paged":
            options = replace(options, pages=count_pages(np.argmax(segments > 0, axis=1), slots))
        rows = map(self._put, (tokens, segments))
        state = prefill(self.model, slots, self.params, *rows, kv_cache=options, **self._put(source))
        self.kv_cache_bytes = cache_bytes(state.cache)
        return state


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _LoopState:
    """The state between two tokens: the decode state, and key and end of each row."""

    decode_state: DecodeState
    keys: jax.Array
    done: jax.Array


@partial(jax.jit, donate_argnums=0)
def _start(decode_state: DecodeState, seed) -> _LoopState:
    positions = decode_state.positions
    keys = row_keys(jax.random.key(seed), jnp.arange(len(positions)))
    return _LoopState(decode_state, sharding.constrain(keys, "batch"), jnp.zeros_like(positions, bool))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _decode_chunk(
    model: nn.Module, eos_ids: tuple[int, ...], sampling: SamplingParams, params, state: _LoopState
):
    """Return the new state and the next tokens (B, DECODE_CHUNK); finished rows repeat the end."""

    def one(state: _LoopState, _):
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.decode_state.positions)
        token = jnp.where(state.done, eos_ids[0], sample(keys, state.decode_state.logits, sampling))
        decode_state = state.decode_state.decode(model, params, token)
        return _LoopState(decode_state, state.keys, state.done | is_eos(token, eos_ids)), token

    state, tokens = jax.lax.scan(one, state, length=DECODE_CHUNK)
    return state, tokens.T


def round_up_to_chunk(steps: int) -> int:
    """Return `steps` rounded up to a multiple of `DECODE_CHUNK`."""
    return -(-steps // DECODE_CHUNK) * DECODE_CHUNK


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
