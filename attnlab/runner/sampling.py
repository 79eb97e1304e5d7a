"""What `--mode=sample` does: texts after prompts, and of the texts, images and sounds that a model reads."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from etils import epath

from attnlab import config, pretrained
from attnlab.data import preprocessor
from attnlab.errors import InputError
from attnlab.generation import (
    Beams,
    Completion,
    Draft,
    Generator,
    Lookup,
    Sampling,
    Wu,
    printable,
)
from attnlab.runner.request import Request
from attnlab.runner.trained_model import PRETRAINED, Trained
from attnlab.train.checkpoints import FOLDER

Given: TypeAlias = dict[str, Any]
OpenRun: TypeAlias = Callable[[Request], Trained]


def write(request: Request, trained: Trained, open_run: OpenRun) -> None:
    """Generates as is asked, and prints it.

    Args:
      request: what is asked.
      trained: the run.
      open_run: how another run is opened that is to guess tokens.

    Raises:
      InputError: a model that does not generate, or what it cannot read.
    """
    generator = trained.generator()
    given = _given(request, trained)
    guesses = _guesses(request, trained, open_run)
    if request.sampling.num_beams is not None:
        completions = _searched(request, generator, given)
        _print_all(completions)
    elif len(given["prompts"] or given["sources"]) * request.sampling.num_samples == 1:
        completions = _streamed(request, generator, given, guesses)
    else:
        completions = _drawn(request, generator, given, guesses)
        _print_all(completions)
    if any(completion.ended == "context" for completion in completions):
        length = request.config.data.sequence_length
        print(f"(ended at the model's context of {length} tokens)", file=sys.stderr)


def _given(request: Request, trained: Trained) -> Given:
    """What a `Generator` is to go on from: prompts, and what the model reads beside them."""
    wanted, shape = request.sampling, request.config.model.source_shape
    prompts = wanted.prompts or ("",)
    if shape is None or len(shape) == 1:
        if wanted.sources:
            raise InputError(
                "--source is of models that read an image or a sound; this one reads texts: --prompt"
            )
        return {"sources": None} | trained.given(prompts)
    if not wanted.sources:
        raise InputError("the model reads an image or a sound: give its file with --source")
    count, there = len(prompts), len(wanted.sources)
    if count != there and min(count, there) > 1:
        raise InputError(f"--prompt is given {count} times and --source {there} times")
    from attnlab.data import media  # takes half a second, which only a file needs

    settings = _preprocessor(request)
    sources = [media.read(file, settings, shape) for file in wanted.sources]
    given: dict[str, list] = {"prompts": list(prompts), "sources": sources}
    return {name: x * max(count, there) if len(x) == 1 else x for name, x in given.items()}


def _preprocessor(request: Request) -> Mapping[str, Any]:
    """How a file becomes what the model of a run reads."""
    if (folder := request.folder / PRETRAINED).exists():
        return preprocessor.read(folder)
    if (settings := request.config.data.preprocessor) is None:
        raise InputError("the run's data do not say how a file is read: its `preprocessor` is None")
    return settings


def _searched(request: Request, generator: Generator, given: Given) -> list[Completion]:
    """The likeliest texts, with their scores."""
    wanted = request.sampling
    assert wanted.num_beams is not None
    return generator.search(
        beams=Beams(wanted.num_beams, Wu(wanted.length_penalty)),
        **given,
        num_samples=wanted.num_samples,
        max_new_tokens=wanted.max_new_tokens,
    )


def _drawn(
    request: Request, generator: Generator, given: Given, guesses: Lookup | Draft | None, stream=None
) -> list[Completion]:
    """Samples of all that is given."""
    wanted = request.sampling
    return generator(
        **given,
        num_samples=wanted.num_samples,
        max_new_tokens=wanted.max_new_tokens,
        sampling=Sampling(wanted.temperature, wanted.top_k, wanted.top_p, wanted.min_p),
        stop=wanted.stop,
        seed=request.seed or 0,
        stream=stream,
        guesses=guesses,
    )


def _guesses(request: Request, trained: Trained, open_run: OpenRun) -> Lookup | Draft | None:
    """How next tokens are guessed, if they are: by what came before, another run, or a checkpoint."""
    wanted = request.sampling
    if wanted.lookup is not None:
        return Lookup(wanted.lookup, wanted.guess_tokens)
    if wanted.draft is None:
        return None
    folder = epath.Path(wanted.draft)
    if (folder / FOLDER).exists():
        other = {"workdir": folder.absolute(), "config": config.load_workdir(folder).config}
        run = open_run(dataclasses.replace(request, checkpoint="latest", **other))
        return Draft(run.generator(), wanted.guess_tokens)
    found, mesh = pretrained.load(wanted.draft, trained.session.mesh), trained.session.mesh
    if found.tokenizer is None:
        raise InputError(f"--draft={wanted.draft} has no tokenizer: its tokens cannot be compared")
    length = request.config.data.sequence_length
    return Draft(Generator(found.model, found.params, found.tokenizer, length, mesh), wanted.guess_tokens)


def _streamed(
    request: Request, generator: Generator, given: Given, guesses: Lookup | Draft | None
) -> list[Completion]:
    """One sample, printed as it grows."""
    # Shown with the first new text, when nothing is left that could be refused.
    head = iter(given["prompts"] or [f"{source}\n" for source in given["sources"]])

    def stream(_: int, text: str) -> None:
        sys.stdout.write(printable(next(head, "") + text))
        sys.stdout.flush()

    completions = _drawn(request, generator, given, guesses, stream)
    print(printable(next(head, "")))
    return completions


def _print_all(completions: Sequence[Completion]) -> None:
    for i, completion in enumerate(completions, 1):
        score = "" if completion.score is None else f", score {completion.score:.3f}"
        print(f"--- {i} of {len(completions)}{score}\n{printable(completion.head + completion.text)}")
