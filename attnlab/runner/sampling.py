"""Mode `sample`: generate text from prompts, and from text, image or audio inputs."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from etils import epath

from attnlab import config, pretrained
from attnlab.data import preprocessor
from attnlab.data.batch import source_kind
from attnlab.errors import InputError
from attnlab.generation import (
    BeamSearchOptions,
    Completion,
    DraftModel,
    Generator,
    GNMTLengthPenalty,
    PromptLookup,
    SamplingParams,
    printable,
)
from attnlab.paths import CHECKPOINTS_FOLDER, absolute
from attnlab.runner.request import Request
from attnlab.runner.trained_model import PRETRAINED, TrainedModel

GeneratorInputs: TypeAlias = dict[str, Any]
OpenRun: TypeAlias = Callable[[Request], TrainedModel]


def run_sampling(request: Request, trained: TrainedModel, open_run: OpenRun) -> None:
    """Generate text with the options of a request and print it.

    Args:
      request: the prompts, source files and generation options.
      trained: the trained model.
      open_run: loads the run of the draft model.

    Raises:
      InputError: the model cannot generate, or it cannot read the given inputs.
    """
    kv_cache = request.sampling.kv_cache
    generator = trained.generator(kv_cache or "contiguous")
    inputs = _generator_inputs(request, trained)
    speculator = _speculator(request, trained, open_run)
    if request.sampling.num_beams is not None:
        completions = _beam_search(request, generator, inputs)
        _print_all(completions)
    elif len(inputs["prompts"] or inputs["sources"]) * request.sampling.num_samples == 1:
        completions = _stream_sample(request, generator, inputs, speculator)
    else:
        completions = _sample(request, generator, inputs, speculator)
        _print_all(completions)
    if kv_cache is not None:
        print(f"(KV cache, {kv_cache}: {generator.kv_cache_bytes:,} bytes)", file=sys.stderr)
    if any(completion.finish_reason == "context" for completion in completions):
        length = request.config.data.sequence_length
        print(f"(stopped at the context length of {length} tokens)", file=sys.stderr)


def _generator_inputs(request: Request, trained: TrainedModel) -> GeneratorInputs:
    """Return the inputs of a `Generator`: the prompts, and text, image or audio sources."""
    options, shape = request.sampling, request.config.model.source_shape
    prompts = options.prompts or ("",)
    if shape is None or source_kind(shape) == "text":
        if options.sources:
            raise InputError(
                "--source requires a model with image or audio input; this model takes text: use --prompt"
            )
        return {"sources": None} | trained.as_generator_inputs(prompts)
    if not options.sources:
        raise InputError("the model requires image or audio input: set --source to a file")
    num_prompts, num_sources = len(prompts), len(options.sources)
    if num_prompts != num_sources and min(num_prompts, num_sources) > 1:
        raise InputError(
            f"--prompt is given {num_prompts} times and --source {num_sources} times; use equal numbers"
        )
    from attnlab.data import media  # deferred: this import takes half a second

    settings = _preprocessor(request)
    sources = [media.read(file, settings, shape) for file in options.sources]
    inputs: dict[str, list] = {"prompts": list(prompts), "sources": sources}
    return {name: x * max(num_prompts, num_sources) if len(x) == 1 else x for name, x in inputs.items()}


def _preprocessor(request: Request) -> Mapping[str, Any]:
    """Return the settings that preprocess a file into model inputs."""
    if (folder := request.folder / PRETRAINED).exists():
        return preprocessor.read(folder)
    if (settings := request.config.data.preprocessor) is None:
        raise InputError("data.preprocessor is None: the run defines no preprocessing of files")
    return settings


def _beam_search(request: Request, generator: Generator, inputs: GeneratorInputs) -> list[Completion]:
    """Return the best hypotheses of beam search, with their scores."""
    options = request.sampling
    assert options.num_beams is not None
    return generator.beam_search(
        options=BeamSearchOptions(options.num_beams, GNMTLengthPenalty(options.length_penalty)),
        **inputs,
        num_samples=options.num_samples,
        max_new_tokens=options.max_new_tokens,
    )


def _sample(
    request: Request,
    generator: Generator,
    inputs: GeneratorInputs,
    speculator: PromptLookup | DraftModel | None,
    stream=None,
) -> list[Completion]:
    """Return samples for all inputs."""
    options = request.sampling
    return generator(
        **inputs,
        num_samples=options.num_samples,
        max_new_tokens=options.max_new_tokens,
        sampling=SamplingParams(options.temperature, options.top_k, options.top_p, options.min_p),
        stop=options.stop,
        seed=request.seed or 0,
        stream=stream,
        speculator=speculator,
    )


def _speculator(
    request: Request, trained: TrainedModel, open_run: OpenRun
) -> PromptLookup | DraftModel | None:
    """Return the source of draft tokens: prompt lookup, a draft model, or None."""
    options = request.sampling
    if options.prompt_lookup_ngram is not None:
        return PromptLookup(options.prompt_lookup_ngram, options.num_speculative_tokens)
    if options.draft_model is None:
        return None
    folder = epath.Path(options.draft_model)
    if (folder / CHECKPOINTS_FOLDER).exists():
        draft = config.load_workdir(folder, not request.no_experiment_code)
        other = {"workdir": epath.Path(absolute(str(folder))), "config": draft.config}
        run = open_run(dataclasses.replace(request, checkpoint="latest", **other))
        return DraftModel(run.generator(), options.num_speculative_tokens)
    loaded, mesh = pretrained.load(options.draft_model, trained.session.mesh), trained.session.mesh
    if loaded.tokenizer is None:
        raise InputError(
            f"--draft_model={options.draft_model} has no tokenizer; it must share the vocabulary of the model"
        )
    length = request.config.data.sequence_length
    return DraftModel(
        Generator(loaded.model, loaded.params, loaded.tokenizer, length, mesh), options.num_speculative_tokens
    )


def _stream_sample(
    request: Request,
    generator: Generator,
    inputs: GeneratorInputs,
    speculator: PromptLookup | DraftModel | None,
) -> list[Completion]:
    """Generate one sample and print its text while it is generated."""
    # Print the prompt with the first new text, since until then generation may raise an InputError.
    head = iter(inputs["prompts"] or [f"{source}\n" for source in inputs["sources"]])

    def stream(_: int, text: str) -> None:
        sys.stdout.write(printable(next(head, "") + text))
        sys.stdout.flush()

    completions = _sample(request, generator, inputs, speculator, stream)
    print(printable(next(head, "")))
    return completions


def _print_all(completions: Sequence[Completion]) -> None:
    for i, completion in enumerate(completions, 1):
        score = "" if completion.score is None else f", score {completion.score:.3f}"
        print(f"--- {i} of {len(completions)}{score}\n{printable(completion.head + completion.text)}")
