"""Build a `Request` from flags: everything a run needs, resolved and validated before it starts."""

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
from attnlab.distributed.job import JobFlags
from attnlab.errors import InputError, shorten
from attnlab.runner.flag_values import (
    make_default_workdir,
    make_writable_folder,
    parse_checkpoint,
    parse_mesh,
    parse_profile,
    parse_rename_rule,
    parse_seconds,
    resolve_dump_folder,
    resolve_folder,
)
from attnlab.runner.opening import opening_line

Mode = Literal["train", "eval", "sample", "describe", "import", "export"]
KV_CACHES = ("contiguous", "rolling", "paged", "int8", "fp8")
MODES: tuple[Mode, ...] = ("train", "eval", "sample", "describe", "import", "export")
DEFAULT_EXPERIMENT = "experiments/lm_docs.py"
FINE_TUNING = "experiments/finetune.py"

# The modes that read each flag. A flag that the mode would ignore is an error.
FLAG_MODES: dict[str, tuple[Mode, ...]] = {
    **dict.fromkeys(("mode", "config", "workdir", "mesh"), MODES),
    **dict.fromkeys(("distributed", "coordinator", "num_processes", "process_id"), MODES),
    **dict.fromkeys(("startup_timeout", "watchdog"), MODES),
    "debug_nans": ("train", "eval", "sample"),
    **dict.fromkeys(("dump_hlo", "xla_flags"), ("train", "eval", "sample", "describe")),
    "no_experiment_code": ("train", "eval", "sample", "describe", "export"),
    "checkpoint": ("train", "eval", "sample", "import", "export"),
    "output_dir": ("export",),
    "target": ("describe",),
    "seed": ("train", "sample"),
    **dict.fromkeys(("max_steps", "max_time", "fast_dev_run", "overfit_batches", "profile"), ("train",)),
    "allow_changed_data": ("train",),
    **dict.fromkeys(("sweep", "init_from", "init_rules", "tracker"), ("train",)),
    **dict.fromkeys(("prompt", "source", "num_samples", "max_new_tokens", "temperature"), ("sample",)),
    **dict.fromkeys(("top_k", "top_p", "min_p", "stop", "num_beams", "length_penalty"), ("sample",)),
    **dict.fromkeys(("draft_model", "prompt_lookup_ngram", "num_speculative_tokens"), ("sample",)),
    "kv_cache": ("sample",),
}
# Fields (and all nested fields) in which a run may differ from the config saved in its workdir.
RESUME_MUTABLE_FIELDS = (
    *("steps", "log_every", "eval_every", "eval_batches"),
    *("checkpoint_every", "checkpoint_minutes", "keep"),
)
MODE_MUTABLE_FIELDS: dict[Mode, tuple[str, ...]] = {
    "train": (*(f"train.{name}" for name in RESUME_MUTABLE_FIELDS), "data.prefetch"),
    "eval": ("data",),
    "sample": (),
    "export": (),
}
BOUNDS: dict[str, tuple[str, Callable[[float], bool]]] = {
    **dict.fromkeys(
        (
            *("max_steps", "num_samples", "max_new_tokens", "top_k", "num_beams"),
            *("prompt_lookup_ngram", "num_speculative_tokens"),
        ),
        ("1 or more", lambda x: x >= 1),
    ),
    "num_processes": ("1 or more", lambda x: x >= 1),
    "process_id": ("0 or more", lambda x: x >= 0),
    "overfit_batches": ("from 1 to 10,000", lambda x: 1 <= x <= 10_000),  # it reads all of them
    "seed": ("from 0 to 4294967295", lambda x: 0 <= x < 2**32),
    "temperature": ("0 or more, and finite", lambda x: 0 <= x < math.inf),
    "length_penalty": ("finite", math.isfinite),
    "top_p": ("above 0, and at most 1", lambda x: 0 < x <= 1),
    "min_p": ("from 0 to 1", lambda x: 0 <= x <= 1),
}


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """Options of generation; None disables an option. `num_beams` selects beam search.

    Attributes:
        prompts: the texts to continue, or the input texts of a sequence-to-sequence model.
        sources: image or audio files: one per prompt, or any number with at most one prompt.
        num_samples: the number of samples per prompt.
        max_new_tokens: the maximum length of a sample.
        temperature: the sampling temperature; 0 is greedy decoding.
        top_k: keep the k most probable tokens.
        top_p: keep the most probable tokens up to this total probability.
        min_p: exclude tokens below this fraction of the highest probability.
        stop: texts at which generation stops.
        num_beams: the number of beams of beam search.
        length_penalty: the exponent of beam search's length penalty.
        draft_model: speculative decoding with the model in this workdir or checkpoint.
        prompt_lookup_ngram: speculative decoding with prompt lookup of n-grams of this length.
        num_speculative_tokens: the number of draft tokens verified in each forward pass.
        kv_cache: the kind of KV cache, one of `KV_CACHES`; None is the contiguous one.
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
    kv_cache: str | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """A validated request for one run.

    Attributes:
        mode: what to do.
        loaded: the experiment.
        config: its config with the overrides applied.
        sources: the origin of each value of `config`; see `attnlab.config.sources`.
        workdir: the run's folder, absolute; None only in mode describe.
        resumes: whether `workdir` holds a run.
        mesh: the device mesh: `--mesh` if set, else the mesh of the saved run, else "auto".
        max_steps: stop after this step, if `config.train.steps` is larger.
        max_time: stop after this many seconds.
        seed: in mode train, already applied to `config`; in mode sample, the sampling seed.
        fast_dev_run: run every stage with only two steps.
        overfit_batches: train repeatedly on this many first batches.
        allow_changed_data: resume although the data or the tokenizer has changed.
        profile: the half-open range (start, stop) of steps to trace.
        no_experiment_code: do not run the experiment files of saved runs.
        dump_hlo: the folder for the programs that XLA compiles.
        xla_flags: "recommended" sets XLA's flags for the accelerator, "none" sets none.
        debug_nans: stop at the operation that produces the first NaN.
        checkpoint: "latest", "best" or a step; in mode train, the checkpoint of `init_from`.
        output_dir: the folder that mode export writes to.
        target: the accelerator that mode describe assumes, such as "v5e:4x4".
        init_from: the workdir of the run whose parameters initialize this run.
        init_rules: (regular expression, replacement) pairs that rename the parameters of that run.
        trackers: services that receive metrics in addition to the workdir.
        sampling: the options of generation.
        job: the flags of a job of several processes.
        swept: in a sweep, the swept fields and their values as text.
        opening: the first line that the run prints after validation; empty in some modes.
    """

    mode: Mode
    loaded: configs.Loaded
    config: Any
    sources: Mapping[str, str]
    workdir: epath.Path | None = None
    resumes: bool = False
    mesh: str = "auto"
    max_steps: int | None = None
    max_time: float | None = None
    seed: int | None = None
    fast_dev_run: bool = False
    overfit_batches: int | None = None
    allow_changed_data: bool = False
    profile: tuple[int, int] | None = None
    dump_hlo: epath.Path | None = None
    xla_flags: str = "none"
    debug_nans: bool = False
    no_experiment_code: bool = False
    checkpoint: str | int = "latest"
    output_dir: epath.Path | None = None
    target: str | None = None
    init_from: epath.Path | None = None
    init_rules: tuple[tuple[str, str], ...] = ()
    trackers: tuple[str, ...] = ()
    sampling: SamplingFlags = SamplingFlags()
    job: JobFlags = dataclasses.field(default_factory=JobFlags)
    swept: Mapping[str, str] = dataclasses.field(default_factory=dict)
    opening: str = ""

    @property
    def folder(self) -> epath.Path:
        """The workdir, in a mode that requires one."""
        assert self.workdir is not None
        return self.workdir


def build_requests(
    values: Mapping[str, Any], present: set[str], overrides: Sequence[Override]
) -> list[Request]:
    """Return the request that the flags describe, or one request per run of a sweep.

    Args:
        values: the value of every flag.
        present: the flags that are set on the command line.
        overrides: the `--config.path=text` arguments, in order.

    Raises:
        InputError: a flag does not apply to the mode, or a value or the config is invalid.
    """
    mode: Mode = values["mode"]
    _check_mode_flags(mode, values, present)
    for name, (bounds, within) in BOUNDS.items():
        if values[name] is not None and not within(values[name]):
            raise InputError(f"--{name}={shorten(repr(values[name]))} is out of bounds; it must be {bounds}")
    _check_beam_flags(values, present)
    _check_speculative_flags(values, present)
    if "" in values["stop"]:
        raise InputError("--stop is empty; it must be the text at which generation stops")
    if mode == "import":
        if "checkpoint" not in present:
            raise InputError("--mode=import needs --checkpoint: a folder or a hub id, org/model")
        overrides = [("init", values["checkpoint"]), *overrides]
        values = {**values, "checkpoint": "latest"}
    if mode == "export" and values["output_dir"] is None:
        raise InputError("--mode=export needs --output_dir: the folder to write")
    options = _request_fields(values)
    mesh = parse_mesh(values["mesh"]) if "mesh" in present else None
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
            raise InputError(f"--{name} does not apply to --mode={mode}, only to {modes}")
    if values["init_from"] is None:
        if "init_rules" in present:
            raise InputError("--init_rules requires --init_from, the run whose parameters it renames")
        if "checkpoint" in present and mode == "train":
            raise InputError("--checkpoint with --mode=train requires --init_from, the run it belongs to")


def _check_beam_flags(values: Mapping[str, Any], present: set[str]) -> None:
    if values["num_beams"] is None:
        if "length_penalty" in present:
            raise InputError("--length_penalty requires --num_beams")
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
            raise InputError(f"--{name} cannot be combined with --num_beams")
    if values["kv_cache"] == "paged":
        raise InputError("--kv_cache=paged cannot be combined with --num_beams")
    if values["num_samples"] > values["num_beams"]:
        raise InputError(f"--num_samples={values['num_samples']} exceeds --num_beams={values['num_beams']}")


def _check_speculative_flags(values: Mapping[str, Any], present: set[str]) -> None:
    flags = ("draft_model", "prompt_lookup_ngram")
    set_flags = [name for name in flags if values[name] is not None]
    if len(set_flags) > 1:
        raise InputError("--draft_model and --prompt_lookup_ngram both propose draft tokens: set only one")
    if "num_speculative_tokens" in present and not set_flags:
        raise InputError("--num_speculative_tokens requires --draft_model or --prompt_lookup_ngram")


def _request_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a Request that depend on flags alone."""
    booleans = ("fast_dev_run", "debug_nans", "no_experiment_code", "allow_changed_data")
    plain = ("max_steps", "seed", "overfit_batches", "target", "xla_flags", *booleans)
    lengths = ("num_samples", "max_new_tokens", "num_beams", "length_penalty")
    speculative = ("draft_model", "prompt_lookup_ngram", "num_speculative_tokens")
    sampling = (*lengths, *speculative, "temperature", "top_k", "top_p", "min_p", "kv_cache")
    return {name: values[name] for name in plain} | {
        "max_time": parse_seconds("max_time", values["max_time"]),
        "profile": parse_profile(values["profile"]),
        "dump_hlo": resolve_dump_folder(values["dump_hlo"]),
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
        "job": JobFlags(
            *(values[name] for name in ("distributed", "coordinator", "num_processes", "process_id")),
            *(parse_seconds(name, values[name]) or 0.0 for name in ("startup_timeout", "watchdog")),
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
    """Return the request for the experiment `spec`, or for the run saved in `workdir`."""
    # An import starts anew where an earlier one was killed before it saved its checkpoint.
    holds_run = mode != "import" and workdir and (workdir / CONFIG).exists()
    code = not options["no_experiment_code"]
    run = configs.load_workdir(workdir, code) if workdir and holds_run else None
    if run is None and mode in ("eval", "sample", "export"):
        reason = f"{workdir} holds no run (it has no {CONFIG})" if workdir else "set --workdir"
        raise InputError(f"--mode={mode} needs a trained run; {reason}")
    default = FINE_TUNING if mode == "import" else DEFAULT_EXPERIMENT
    loaded = run if run and spec is None else configs.load(default if spec is None else spec, code)
    config = loaded.config if loaded is run else _with_checkpoint_model(loaded.config, overrides)
    config = configs.override_all(config, overrides)
    if run and mode != "describe":
        _check_config_matches(mode, workdir, run.config, config)
    field_sources = configs.sources(config, loaded.config, [path for path, _ in overrides], loaded.sources)
    mesh = mesh or parse_mesh((run.mesh if run else None) or "auto")
    return Request(
        mode=mode,
        loaded=loaded,
        config=config,
        sources=field_sources,
        workdir=workdir,
        resumes=run is not None,
        mesh=mesh,
        opening=opening_line(mode, loaded, workdir, resumes=run is not None, default=spec is None),
        **options,
    )


def _with_checkpoint_model(config: Any, overrides: Sequence[Override]) -> Any:
    """Return the config with the model of the checkpoint in `init`, if `init` is set."""
    init = dict(overrides).get("init", getattr(config, "init", None))
    if init is None:
        return config
    if not init:
        raise InputError("config.init is empty; set --config.init to a folder or a hub id, org/model")
    from attnlab.pretrained import import_export, repository

    changed = copy.copy(config)
    # Bypass the validation of `Experiment`: it runs once the overrides are applied, and these may
    # include the shorter data.sequence_length that the model requires.
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
        raise InputError(f"{workdir} holds a run with a different config: {'; '.join(changes[:6])}{rest}")


def _sweep_requests(
    specs: Sequence[str],
    mode: Mode,
    spec: str | None,
    workdir: epath.Path | None,
    overrides: Sequence[Override],
    mesh: str | None,
    options: Mapping[str, Any],
) -> list[Request]:
    """Return one request per combination of swept values, each in a subfolder of `workdir`."""
    if workdir and (workdir / CONFIG).exists():
        raise InputError(f"{workdir} holds a single run; use another --workdir for the sweep")
    axes = [_parse_sweep_axis(text, overrides) for text in specs]
    paths = [path for path, _ in axes]
    if len(set(paths)) < len(paths):
        raise InputError(f"--sweep names {max(paths, key=paths.count)} twice")
    requests: dict[str, Request] = {}
    for texts in itertools.product(*(values for _, values in axes)):
        chosen = list(zip(paths, texts, strict=True))
        # The folder name depends on the config, so the first request has no workdir.
        without_workdir = _make_request(mode, spec, None, [*overrides, *chosen], mesh, options)
        swept = {path: _format_swept_value(without_workdir.config, path, text) for path, text in chosen}
        folder = ",".join(f"{_short_field_name(path, paths)}={text}" for path, text in swept.items())
        folder = re.sub(r"[^\w.=,+()-]", "_", folder)
        if folder in requests:
            raise InputError(f"--sweep lists {folder} twice")
        if len(folder.encode()) > 200:  # file systems allow 255
            raise InputError(
                f"--sweep={texts[0]}...: too long for a folder name; define it in an experiment file"
            )
        request, subfolder = without_workdir, epath.Path(folder)
        if workdir:
            subfolder = workdir / folder
            request = _make_request(mode, spec, subfolder, [*overrides, *chosen], mesh, options)
        requests[folder] = dataclasses.replace(request, swept=swept, workdir=subfolder)
    return list(requests.values())


def _parse_sweep_axis(text: str, overrides: Sequence[Override]) -> tuple[str, list[str]]:
    path, equals, values = text.partition("=")
    path = path.strip().removeprefix("config.")
    pieces = [piece.strip() for piece in split(values)]
    if not equals or not path or not pieces:
        raise InputError(f"--sweep={text}: expected a field and its values, such as config.model.depth=2,4,8")
    if path in (overridden for overridden, _ in overrides):
        raise InputError(f"config.{path} is both set by a flag and swept")
    return path, pieces


def _short_field_name(path: str, paths: Sequence[str]) -> str:
    names = [other.rpartition(".")[2] for other in paths]
    name = path.rpartition(".")[2]
    return name if names.count(name) == 1 else path


def _format_swept_value(config: Any, path: str, text: str) -> str:
    """Return the text of a swept value: a number in canonical form, a component as written."""
    value = configs.flatten(config).get(path, text)
    return text if isinstance(value, type | str) else configs.render(value)
