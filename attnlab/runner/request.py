"""From flags to a `Request`: all that a run is asked to do, resolved and checked before it starts."""

import copy
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from etils import epath

from attnlab import config as configs
from attnlab.config.saved import CONFIG
from attnlab.config.text import split
from attnlab.config.tree import Override
from attnlab.errors import InputError
from attnlab.runner.flag_values import (
    make_default_workdir,
    make_writable_folder,
    parse_checkpoint,
    parse_profile,
    parse_rename_rule,
    parse_seconds,
    resolve_folder,
)
from attnlab.runner.opening import opening_line

Mode = Literal["train", "eval", "sample", "describe", "import", "export"]
MODES: tuple[Mode, ...] = ("train", "eval", "sample", "describe", "import", "export")
DEFAULT_EXPERIMENT = "experiments/lm_docs.py"
FINE_TUNING = "experiments/finetune.py"

# Which modes read which flag. A flag that the mode would ignore is refused.
FLAG_MODES: dict[str, tuple[Mode, ...]] = {
    **dict.fromkeys(("mode", "config", "workdir", "mesh"), MODES),
    "debug_nans": ("train", "eval", "sample"),
    "checkpoint": ("train", "eval", "sample", "import", "export"),
    "output_dir": ("export",),
    "seed": ("train", "sample"),
    **dict.fromkeys(("max_steps", "max_time", "fast_dev_run", "overfit_batches", "profile"), ("train",)),
    **dict.fromkeys(("sweep", "init_from", "init_rules", "tracker"), ("train",)),
    **dict.fromkeys(("prompt", "source", "num_samples", "max_new_tokens", "temperature"), ("sample",)),
    **dict.fromkeys(("top_k", "top_p", "min_p", "stop", "num_beams", "length_penalty"), ("sample",)),
    **dict.fromkeys(("draft_model", "prompt_lookup_ngram", "num_speculative_tokens"), ("sample",)),
}
# Fields (and all below them) in which a run may differ from the config that its workdir holds.
RESUME_MUTABLE_FIELDS = ("steps", "log_every", "eval_every", "eval_batches", "checkpoint_every", "keep")
MODE_MUTABLE_FIELDS: dict[Mode, tuple[str, ...]] = {
    "train": (*(f"train.{name}" for name in RESUME_MUTABLE_FIELDS), "data.prefetch"),
    "eval": ("data",),
    "sample": (),
    "export": (),
}
BOUNDS: dict[str, tuple[str, Callable[[float], bool]]] = {
    **dict.fromkeys(
        (
            *("max_steps", "overfit_batches", "num_samples", "max_new_tokens", "top_k", "num_beams"),
            *("prompt_lookup_ngram", "num_speculative_tokens"),
        ),
        ("1 or more", lambda x: x >= 1),
    ),
    "seed": ("from 0 to 4294967295", lambda x: 0 <= x < 2**32),
    "temperature": ("0 or more, and finite", lambda x: 0 <= x < math.inf),
    "length_penalty": ("finite", math.isfinite),
    "top_p": ("above 0, and at most 1", lambda x: 0 < x <= 1),
    "min_p": ("from 0 to 1", lambda x: 0 <= x <= 1),
}


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """How to sample; None leaves a filter out. With `num_beams` the likeliest texts are searched for.

    `sources` are files of the images or sounds to write of, one a prompt, or all with one prompt or none.
    `draft_model` (a workdir or a checkpoint) or `prompt_lookup_ngram` (a length) turns on speculative
    decoding, `num_speculative_tokens` at a time.
    """

    prompts: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    num_samples: int = 1
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop: tuple[str, ...] = ()
    num_beams: int | None = None
    length_penalty: float = 0.6
    draft_model: str | None = None
    prompt_lookup_ngram: int | None = None
    num_speculative_tokens: int = 4


@dataclasses.dataclass(frozen=True)
class Request:
    """One run, as asked for.

    Attributes:
        mode: what to do.
        loaded: the experiment.
        config: its config with the overrides applied.
        sources: where each value of `config` comes from; see `attnlab.config.sources`.
        workdir: the run's folder, absolute; None only in mode describe.
        mesh: the device mesh: as asked, else the one that the run was trained on, else a single device.
        max_steps: stop after this step, however many the config plans.
        max_time: stop after this many seconds.
        seed: in place of the config's in mode train (and in it already); of the draws in mode sample.
        fast_dev_run: go through every stage with a few steps only.
        overfit_batches: train on this many batches over and over.
        profile: the steps to trace, from the first up to but not the second.
        debug_nans: stop at the operation that makes the first NaN.
        checkpoint: "latest", "best" or a step; in mode train, of `init_from`.
        output_dir: the folder that mode export writes.
        init_from: the workdir of the run whose parameters to start from.
        init_rules: (regular expression, replacement) by which parameters of that run are renamed.
        trackers: the services that metrics go to besides the workdir.
        sampling: how to sample.
        swept: within a sweep, the swept fields and their values as text.
        opening: the first line that the run prints, once all is checked; empty for modes that print text.
    """

    mode: Mode
    loaded: configs.Loaded
    config: Any
    sources: Mapping[str, str]
    workdir: epath.Path | None = None
    mesh: str = "single"
    max_steps: int | None = None
    max_time: float | None = None
    seed: int | None = None
    fast_dev_run: bool = False
    overfit_batches: int | None = None
    profile: tuple[int, int] | None = None
    debug_nans: bool = False
    checkpoint: str | int = "latest"
    output_dir: epath.Path | None = None
    init_from: epath.Path | None = None
    init_rules: tuple[tuple[str, str], ...] = ()
    trackers: tuple[str, ...] = ()
    sampling: SamplingFlags = SamplingFlags()
    swept: Mapping[str, str] = dataclasses.field(default_factory=dict)
    opening: str = ""

    @property
    def folder(self) -> epath.Path:
        """The workdir, in a mode that has one."""
        assert self.workdir is not None
        return self.workdir


def build_requests(
    values: Mapping[str, Any], present: set[str], overrides: Sequence[Override]
) -> list[Request]:
    """The run that the flags ask for, or the runs of a sweep.

    Args:
        values: every flag's value.
        present: the flags that were on the command line.
        overrides: the `--config.path=text` arguments, in order.

    Raises InputError for a flag that the mode ignores, a value out of bounds, or a config that cannot be.
    """
    mode: Mode = values["mode"]
    _check_mode_flags(mode, values, present)
    for name, (bounds, within) in BOUNDS.items():
        if values[name] is not None and not within(values[name]):
            raise InputError(f"--{name}={values[name]} is out of bounds; it has to be {bounds}")
    _check_beam_flags(values, present)
    _check_speculative_flags(values, present)
    if "" in values["stop"]:
        raise InputError("--stop is empty; it has to be the text at which a sample ends")
    if mode == "import":
        if "checkpoint" not in present:
            raise InputError("--mode=import needs --checkpoint: a folder, or a hub id, org/model")
        overrides = [("init", values["checkpoint"]), *overrides]
        values = {**values, "checkpoint": "latest"}
    if mode == "export" and values["output_dir"] is None:
        raise InputError("--mode=export needs --output_dir: the folder to write")
    options = _request_fields(values)
    mesh = values["mesh"] if "mesh" in present else None
    if mode == "train" and values["seed"] is not None:
        overrides = [*overrides, ("seed", str(values["seed"]))]
    workdir = resolve_folder("workdir", values["workdir"])
    spec = values["config"] if "config" in present else None
    if values["sweep"]:
        requests = _sweep_requests(values["sweep"], mode, spec, workdir, overrides, mesh, options)
    else:
        requests = [_make_request(mode, spec, workdir, overrides, mesh, options)]
    if mode in ("train", "import") and workdir is None:
        root = make_default_workdir(requests[0].loaded.name)
        requests = [
            dataclasses.replace(request, workdir=root / str(request.workdir) if request.workdir else root)
            for request in requests
        ]
    elif mode in ("train", "import") and workdir is not None:
        make_writable_folder(workdir)
    return requests


def _check_mode_flags(mode: Mode, values: Mapping[str, Any], present: Iterable[str]) -> None:
    for name in sorted(present):
        if mode not in FLAG_MODES.get(name, MODES):
            modes = " or ".join(f"--mode={used}" for used in FLAG_MODES[name])
            raise InputError(f"--{name} means nothing with --mode={mode}; it goes with {modes}")
    if values["init_from"] is None:
        if "init_rules" in present:
            raise InputError("--init_rules renames parameters of another run; say which with --init_from")
        if "checkpoint" in present and mode == "train":
            raise InputError("--checkpoint with --mode=train picks one of --init_from, which is not given")


def _check_beam_flags(values: Mapping[str, Any], present: set[str]) -> None:
    if values["num_beams"] is None:
        if "length_penalty" in present:
            raise InputError("--length_penalty means nothing without --num_beams")
        return
    for name in (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "stop",
        "seed",
        "draft_model",
        "prompt_lookup_ngram",
    ):
        if name in present:
            raise InputError(f"--{name} means nothing with --num_beams, which draws nothing")
    if values["num_samples"] > values["num_beams"]:
        raise InputError(
            f"--num_samples={values['num_samples']}: a search of {values['num_beams']} beams has no more"
        )


def _check_speculative_flags(values: Mapping[str, Any], present: set[str]) -> None:
    flags = ("draft_model", "prompt_lookup_ngram")
    set_flags = [name for name in flags if values[name] is not None]
    if len(set_flags) > 1:
        raise InputError("--draft_model and --prompt_lookup_ngram both propose draft tokens: give one")
    if "num_speculative_tokens" in present and not set_flags:
        raise InputError(
            "--num_speculative_tokens means nothing without --draft_model or --prompt_lookup_ngram"
        )


def _request_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Request that flags alone decide."""
    plain = ("max_steps", "seed", "fast_dev_run", "overfit_batches", "debug_nans")
    lengths = ("num_samples", "max_new_tokens", "num_beams", "length_penalty")
    speculative = ("draft_model", "prompt_lookup_ngram", "num_speculative_tokens")
    sampling = (*lengths, *speculative, "temperature", "top_k", "top_p", "min_p")
    return {name: values[name] for name in plain} | {
        "max_time": parse_seconds(values["max_time"]),
        "profile": parse_profile(values["profile"]),
        "checkpoint": parse_checkpoint(values["checkpoint"]),
        "output_dir": resolve_folder("output_dir", values["output_dir"]),
        "init_from": resolve_folder("init_from", values["init_from"]),
        "init_rules": tuple(parse_rename_rule(rule) for rule in values["init_rules"]),
        "trackers": tuple(dict.fromkeys(values["tracker"])),
        "sampling": SamplingFlags(
            prompts=tuple(values["prompt"]),
            sources=tuple(values["source"]),
            stop=tuple(values["stop"]),
            **{name: values[name] for name in sampling},
        ),
    }


def _make_request(
    mode: Mode,
    spec: str | None,
    workdir: epath.Path | None,
    overrides: Sequence[Override],
    mesh: str | None,
    options: Mapping[str, Any],
) -> Request:
    """One run: of the experiment named, or of the one that its workdir holds."""
    run = configs.load_workdir(workdir) if workdir and (workdir / CONFIG).exists() else None
    if run is None and mode in ("eval", "sample", "export"):
        where = f"{workdir} holds none (it has no {CONFIG})" if workdir else "say which with --workdir"
        raise InputError(f"--mode={mode} needs a run that was trained; {where}")
    if run and mode == "import":
        raise InputError(f"{workdir} holds a run already; import into another --workdir")
    usual = FINE_TUNING if mode == "import" else DEFAULT_EXPERIMENT
    loaded = run if run and spec is None else configs.load(usual if spec is None else spec)
    config = loaded.config if loaded is run else _with_checkpoint_model(loaded.config, overrides)
    config = configs.override_all(config, overrides)
    if run and mode != "describe":
        _check_config_matches(mode, workdir, run.config, config)
    field_sources = configs.sources(config, loaded.config, [path for path, _ in overrides], loaded.sources)
    mesh = mesh or (run.mesh if run else None) or "single"
    return Request(
        mode=mode,
        loaded=loaded,
        config=config,
        sources=field_sources,
        workdir=workdir,
        mesh=mesh,
        opening=opening_line(mode, loaded, workdir, resumes=run is not None, default=spec is None),
        **options,
    )


def _with_checkpoint_model(config: Any, overrides: Sequence[Override]) -> Any:
    """The config with the model of the checkpoint that it starts from, if it starts from one."""
    init = dict(overrides).get("init", getattr(config, "init", None))
    if init is None:
        return config
    if not init:
        raise InputError("which checkpoint? Say with --config.init: a folder, or a hub id, org/model")
    from attnlab.pretrained import import_export, repository

    changed = copy.copy(config)
    # Its own checks run when the overrides are applied: a shorter data.sequence_length may be among them.
    object.__setattr__(changed, "model", import_export.read_config(repository.resolve(init))[1])
    return changed


def _check_config_matches(mode: Mode, workdir: epath.Path | None, saved: Any, config: Any) -> None:
    mutable = MODE_MUTABLE_FIELDS[mode]
    changes = [
        line
        for line in configs.differences(saved, config)
        if not any(f"{line.partition(':')[0]}.".startswith(f"{path}.") for path in mutable)
    ]
    if changes:
        rest = f"; and {len(changes) - 6} more" if len(changes) > 6 else ""
        raise InputError(f"{workdir} holds a run of another config: {'; '.join(changes[:6])}{rest}")


def _sweep_requests(
    specs: Sequence[str],
    mode: Mode,
    spec: str | None,
    workdir: epath.Path | None,
    overrides: Sequence[Override],
    mesh: str | None,
    options: Mapping[str, Any],
) -> list[Request]:
    """One run for each combination of the swept values, each in a folder of its own within `workdir`."""
    if workdir and (workdir / CONFIG).exists():
        raise InputError(f"{workdir} holds a single run; give the sweep another --workdir")
    axes = [_parse_sweep_axis(text, overrides) for text in specs]
    paths = [path for path, _ in axes]
    if len(set(paths)) < len(paths):
        raise InputError(f"--sweep names {max(paths, key=paths.count)} twice")
    requests: dict[str, Request] = {}
    for texts in itertools.product(*(values for _, values in axes)):
        chosen = list(zip(paths, texts, strict=True))
        # The config is needed for the name of the folder, so the first resolution is without one.
        unplaced = _make_request(mode, spec, None, [*overrides, *chosen], mesh, options)
        swept = {path: _format_swept_value(unplaced.config, path, text) for path, text in chosen}
        folder = ",".join(f"{_short_field_name(path, paths)}={text}" for path, text in swept.items())
        folder = re.sub(r"[^\w.=,+()-]", "_", folder)
        if folder in requests:
            raise InputError(f"--sweep asks for {folder} twice")
        if len(folder.encode()) > 200:  # file systems take 255
            raise InputError(
                f"--sweep={texts[0]}...: too long for the name of a folder; make it an experiment"
            )
        request, place = unplaced, epath.Path(folder)
        if workdir:
            place = workdir / folder
            request = _make_request(mode, spec, place, [*overrides, *chosen], mesh, options)
        requests[folder] = dataclasses.replace(request, swept=swept, workdir=place)
    return list(requests.values())


def _parse_sweep_axis(text: str, overrides: Sequence[Override]) -> tuple[str, list[str]]:
    path, equals, values = text.partition("=")
    path = path.strip().removeprefix("config.")
    pieces = [piece.strip() for piece in split(values)]
    if not equals or not path or not pieces:
        raise InputError(f"--sweep={text}: expected a field and its values, config.model.depth=2,4,8")
    if path in (overridden for overridden, _ in overrides):
        raise InputError(f"config.{path} is set by a flag and swept as well")
    return path, pieces


def _short_field_name(path: str, paths: Sequence[str]) -> str:
    last = [other.rpartition(".")[2] for other in paths]
    name = path.rpartition(".")[2]
    return name if last.count(name) == 1 else path


def _format_swept_value(config: Any, path: str, text: str) -> str:
    """A swept value as it is shown: 0.001 however it was written, a component as it was asked for."""
    value = configs.flatten(config).get(path, text)
    return text if isinstance(value, type | str) else configs.render(value)
