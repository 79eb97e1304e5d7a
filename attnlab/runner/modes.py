"""The modes of the command line: train, eval, sample, describe, import and export."""

import contextlib
import dataclasses
import errno
import importlib.util
import json
import os
import re
import shlex
import time
from typing import Any

import jax
from absl import logging
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from attnlab import config, provenance, sharding
from attnlab.data import Tokenizer
from attnlab.data.batch import source_kind
from attnlab.errors import InputError
from attnlab.generation.source_inputs import training_prefix_ids
from attnlab.models import ViTConfig
from attnlab.paths import as_json, is_remote, write_atomically
from attnlab.pretrained import import_export, repository
from attnlab.runner.command import invocation
from attnlab.runner.request import Request
from attnlab.runner.sampling import run_sampling
from attnlab.runner.trained_model import PRETRAINED, TrainedModel
from attnlab.train.checkpoints import CHECKPOINTS_FOLDER, Checkpoints, RestoredCheckpoint, params_sha256
from attnlab.train.describe import describe
from attnlab.train.experiment import Experiment
from attnlab.train.initialize import init_from_run
from attnlab.train.loop import Limits, TrainingLoop
from attnlab.train.metrics import MetricWriters
from attnlab.train.partition import combine
from attnlab.train.session import Session

TOKENIZER, REPORT = "tokenizer.json", "report.json"
# Errors caused by the machine or by user input, reported in one line without a traceback.
ENVIRONMENT_ERRNOS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)
MAX_SIMULATED = 8  # CPU devices simulated for a mesh with explicit sizes


def run(request: Request) -> dict[str, float]:
    """Run a request and return its final metrics.

    Raises:
      InputError: the request cannot be fulfilled; the message is shown to the user.
    """
    modes = {
        "train": run_train,
        "eval": run_eval,
        "sample": run_sample,
        "describe": run_describe,
        "import": run_import,
        "export": run_export,
    }
    try:
        if not isinstance(request.config, Experiment):
            returned = f"{type(request.config).__module__}.{type(request.config).__name__}"
            raise InputError(f"get_config() must return an attnlab.train.Experiment, not a {returned}")
        configure_jax(request)
        return modes[request.mode](request)
    except OSError as error:
        missing = error.errno == errno.ENOENT and error.filename is not None  # such as a data file
        if error.errno not in ENVIRONMENT_ERRNOS and not missing:
            raise
        _remove_if_empty(request)
        raise InputError(f"{error.filename or request.workdir}: {error.strerror}") from error
    except InputError:
        _remove_if_empty(request)
        raise


def _remove_if_empty(request: Request) -> None:
    """Remove the empty folders of a run that did not start."""
    if request.workdir is None or is_remote(request.workdir):  # a bucket has no empty folders
        return
    if request.mode in ("train", "import"):
        for folder in (request.workdir / CHECKPOINTS_FOLDER, request.workdir):
            with contextlib.suppress(OSError, ValueError):  # epath: ValueError if not empty
                folder.rmdir()


def configure_jax(request: Request) -> None:
    """Configure JAX: simulated devices and NaN checks."""
    # Libraries raise their errors, which are reported once here, so their own logs are not needed.
    logging.set_verbosity(logging.FATAL)
    _use_cpu_without_tpu()
    sizes = [int(size) for size in re.findall(r":(\d+)", request.mesh)]
    count = 1
    for size in sizes:
        count *= size
    if 1 < count <= MAX_SIMULATED and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # already initialized by an earlier run of a sweep
            jax.config.update("jax_num_cpu_devices", count)  # no effect on other platforms
    jax.config.update("jax_debug_nans", request.debug_nans)


def _use_cpu_without_tpu() -> None:
    """Select the CPU where libtpu is installed only to compile for TPUs, to avoid its warnings."""
    no_chip = os.environ.get("TPU_SKIP_MDS_QUERY")  # set by JAX if there is no TPU
    plugins = importlib.util.find_spec("jax_plugins")
    if no_chip and plugins is None and importlib.util.find_spec("libtpu"):
        jax.config.update("jax_platforms", jax.config.values["jax_platforms"] or "cpu")


def open_session(request: Request, experiment: Experiment) -> Session:
    """Return the session of an experiment on the requested mesh, with the run's tokenizer."""
    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise InputError(f"JAX found no devices: {error}") from error
    mesh = sharding.make_mesh(sharding.parse_mesh(request.mesh, len(devices)))
    _enable_compilation_cache(mesh)
    tokenizer = _saved_tokenizer(request) or _new_tokenizer(experiment)
    return Session(
        experiment, mesh, tokenizer.with_prefix_tokens(*training_prefix_ids(experiment.model, tokenizer))
    )


def _new_tokenizer(experiment: Experiment) -> Tokenizer:
    """Return the tokenizer of the initial checkpoint, else one built from the data."""
    if experiment.init is None:
        return experiment.data.build_tokenizer()
    folder = repository.resolve(experiment.init)
    tokenizer = import_export.read_tokenizer(folder)
    if tokenizer is None and isinstance(experiment.model, ViTConfig):
        return experiment.data.build_tokenizer()  # its vocabulary is the class names
    if tokenizer is None:
        raise InputError(f"{folder} has no tokenizer; transformers' save_pretrained writes a tokenizer.json")
    return tokenizer


def _enable_compilation_cache(mesh: jax.sharding.Mesh) -> None:
    """Enable the persistent compilation cache, except for simulated devices.

    A cached program for simulated devices hangs in its collectives until XLA aborts (jax 0.10.2).
    """
    simulated = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    jax.config.update("jax_enable_compilation_cache", not simulated)
    if not jax.config.values["jax_compilation_cache_dir"]:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "attnlab", "xla"))
    compilation_cache.reset_cache()  # JAX reads these options only once per process


def _saved_tokenizer(request: Request) -> Tokenizer | None:
    """Return the saved tokenizer of a run; None for a new run."""
    if request.workdir is None:
        return None
    file = request.workdir / TOKENIZER
    if file.exists():
        try:
            return Tokenizer.load(file)
        except Exception as error:  # tokenizers raises plain Exceptions
            raise InputError(f"{file} cannot be read as a tokenizer: {error}") from error
    if (request.workdir / CHECKPOINTS_FOLDER).exists():
        # A new tokenizer, built from text that may have changed, would not match the parameters.
        raise InputError(f"{file} is missing; the checkpoints of this run cannot be used without it")
    return None


def run_train(request: Request) -> dict[str, float]:
    """Train a new run, or resume the run in the workdir."""
    start_time = time.perf_counter()
    experiment, workdir = apply_flags(request), request.folder
    session = open_session(request, experiment)
    session.optimizer  # noqa: B018 - report rules that match nothing before writing files
    batches, validation = _open_input(request, session)
    last = _final_step(request, experiment)
    workdir.mkdir(parents=True, exist_ok=True)
    with Checkpoints(workdir, experiment.train.keep) as saved:
        state, step = _initial_state(request, session, saved, batches)
        _save_origin(request, experiment, step)
        _save_tokenizer(session.tokenizer, workdir / TOKENIZER)
        print(request.opening, flush=True)
        verb = f"resuming at step {step}" if step else "training"
        print(
            f"{verb} in {workdir} on mesh {sharding.format_mesh(session.mesh)} ({_describe_devices(session)})"
        )
        flat = config.flatten(experiment)
        with MetricWriters(
            workdir, steps=last, resume=step, trackers=request.trackers, config=flat
        ) as writers:
            training = TrainingLoop(
                session=session,
                batches=batches,
                validation=validation,
                checkpoints=saved,
                writer=writers,
                limits=Limits(request.max_steps, request.max_time, request.profile),
                profile_dir=str(workdir / "profile"),
            )
            outcome = training.run(state)
    if outcome.reason == "signal":
        print(f"stopped by a signal at step {outcome.step}, saved; resume with: {resume_command(workdir)}")
        return {}
    metrics = {f"eval_{name}": value for name, value in outcome.metrics.items()}
    if outcome.reason == "done":
        metrics |= _report(
            request,
            TrainedModel(
                session,
                session.eval_params(outcome.state),
                workdir,
                outcome.metrics,
                fast=request.fast_dev_run,
            ),
        )
    seconds = time.perf_counter() - start_time
    print(f"{outcome.reason.replace('_', ' ')} at step {outcome.step} after {seconds:.0f} s")
    print(f"config, metrics, checkpoints and figures are in {workdir}")
    print(f"resume, evaluate or sample with: {resume_command(workdir)} [--mode=eval|sample]")
    return metrics


def _open_input(request: Request, session: Session) -> tuple[Any, Any]:
    """Return this process's training batches and its share of the validation batches.

    Both splits are opened here, so that an unreadable validation split fails before the first step.
    """
    experiment = session.experiment
    processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batches = experiment.data.train_iterator(
        session.tokenizer, seed=experiment.seed, num_batches=request.overfit_batches, **processes
    )
    limit = experiment.train.eval_batches
    return batches, experiment.data.eval_batches("validation", session.tokenizer, limit=limit, **processes)


def _final_step(request: Request, experiment: Experiment) -> int:
    """Return the last step of this command."""
    last = min(experiment.train.steps, request.max_steps or experiment.train.steps)
    if request.profile and request.profile[0] > last:
        raise InputError(f"--profile={request.profile[0]}:{request.profile[1]}: the last step is {last}")
    return last


def _save_origin(request: Request, experiment: Experiment, step: int) -> None:
    """Write the config, the experiment's source, and the versions and git commits of the run."""
    config.save(request.folder, request.loaded, experiment, request.sources, request.mesh)
    if jax.process_index() == 0:
        provenance.save_versions(request.folder, step, request.loaded.path)


def _save_tokenizer(tokenizer: Tokenizer, file: epath.Path) -> None:
    """Write the tokenizer once, atomically."""
    if jax.process_index() == 0 and not file.exists():
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        tokenizer.save(temporary)
        temporary.replace(file)


def run_import(request: Request) -> dict[str, float]:
    """Create a run at step 0 from a Hugging Face checkpoint."""
    experiment, workdir = request.config, request.folder
    session = open_session(request, experiment)
    batches, _ = _open_input(request, session)
    with Checkpoints(workdir, experiment.train.keep) as saved:
        state = _new_state(session, workdir)
        _save_origin(request, experiment, step=0)
        _save_tokenizer(session.tokenizer, workdir / TOKENIZER)
        saved.save(0, state, batches.get_state())
    print(request.opening)
    count = sum(x.size for x in jax.tree.leaves(session.abstract_params))
    print(f"imported {count:,} parameters of {experiment.init} into {workdir}")
    print(
        f"sample, evaluate, train or export with: {resume_command(workdir)} --mode=sample|eval|train|export"
    )
    return {}


def run_export(request: Request) -> dict[str, float]:
    """Write the parameters of a run as a Hugging Face checkpoint."""
    assert request.output_dir is not None
    session = open_session(request, request.config)
    restored = _restore(request, session)
    params = session.eval_params(restored.state)
    origin: import_export.Origin = request.folder / PRETRAINED
    if not (request.folder / PRETRAINED).exists():
        data = request.config.data
        length = data.sequence_length
        if data.source_shape is not None and source_kind(data.source_shape) == "text":
            length = max(length, *data.source_shape)
        origin = import_export.FromScratch(session.tokenizer, length, data.preprocessor)
    model = request.config.model.with_vocab_size(session.tokenizer.vocab_size)
    import_export.write_checkpoint(request.output_dir, model, params, origin)
    print(f"exported step {restored.step} to {request.output_dir}")
    return {}


def run_eval(request: Request) -> dict[str, float]:
    """Evaluate a checkpoint on the whole validation split, and run the experiment's report."""
    session = open_session(request, request.config)
    restored = _restore(request, session)
    data = request.config.data
    params = session.eval_params(restored.state)
    metrics = session.evaluate(params, data.eval_batches("validation", session.tokenizer))
    print(request.opening)
    print(f"step {restored.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    return metrics | _report(request, TrainedModel(session, params, request.folder, metrics))


def run_sample(request: Request) -> dict[str, float]:
    """Generate text from each prompt, or from each text, image or audio input."""
    run_sampling(request, _load_trained_model(request), _load_trained_model)
    return {}


def _load_trained_model(request: Request) -> TrainedModel:
    """Return the trained model of a run with the parameters of its checkpoint."""
    session = open_session(request, request.config)
    return TrainedModel(session, session.eval_params(_restore(request, session).state), request.folder, {})


def run_describe(request: Request) -> dict[str, float]:
    """Print the config and model of an experiment, and the latest checkpoint of a run."""
    session = open_session(request, request.config)
    print("config\n" + config.show(request.config, request.sources) + "\n")
    print(describe(session))
    if request.workdir is not None and (request.workdir / CHECKPOINTS_FOLDER).exists():
        restored = _restore(request, session)
        print(f"\ncheckpoint\n  step {restored.step}")
        print(f"params_sha256: {params_sha256(combine(restored.state.params, restored.state.frozen))}")
    return {}


def apply_flags(request: Request) -> Experiment:
    """Return the config with the changes of `--fast_dev_run`."""
    experiment = request.config
    if request.fast_dev_run:
        quick = dataclasses.replace(
            experiment.train, steps=2, log_every=1, eval_every=1, eval_batches=2, checkpoint_every=1
        )
        experiment = dataclasses.replace(experiment, train=quick)
    return experiment


def _initial_state(request: Request, session: Session, saved: Checkpoints, batches) -> tuple[Any, int]:
    """Return the initial state and step.

    The state is that of the latest checkpoint, the parameters of `init_from`, or a new state.
    """
    if saved.steps():
        restored = saved.restore(session.abstract_state)
        if restored.data is None:
            processes = f"a number of processes other than {jax.process_count()}"
            raise InputError(f"checkpoint {restored.step} was saved by {processes}; resume with that number")
        batches.set_state(restored.data)
        return restored.state, restored.step
    if request.init_from is None:
        return _new_state(session, request.folder), 0
    source = dataclasses.replace(request, workdir=request.init_from)
    other = open_session(source, config.load_workdir(request.init_from).config)
    other_state = _restore(source, other).state
    return init_from_run(session, other.eval_params(other_state), request.init_rules, print), 0


def _new_state(session: Session, workdir: epath.Path) -> Any:
    """Return the state of a new run, initialized from the seed or from a checkpoint.

    The config and tokenizer files of the checkpoint are copied into the workdir.
    """
    if session.experiment.init is None:
        return session.new_state()
    folder = repository.resolve(session.experiment.init)
    family, _ = import_export.read_config(folder)
    state = session.new_state(import_export.read_params(folder, family, session.abstract_params))
    if jax.process_index() == 0:
        import_export.copy_non_tensor_files(folder, workdir / PRETRAINED)
    return state


def _restore(request: Request, session: Session) -> RestoredCheckpoint:
    with Checkpoints(request.folder) as saved:
        return saved.restore(session.abstract_state, str(request.checkpoint))


def _report(request: Request, trained: TrainedModel) -> dict[str, float]:
    """Run the experiment's `report(trained)`, if any, and write its numbers and claims."""
    report = getattr(request.loaded.module, "report", None)
    if report is None:
        return {}
    numbers = dict(report(trained) or {})
    claims = [claim.as_json() for claim in trained.claims]
    content: dict[str, Any] = {name: as_json(x) for name, x in numbers.items()} | {"claims": claims}
    if trained.fast:
        print("claims are not checked in a fast_dev_run")
        content["fast_dev_run"] = True
    write_atomically(request.folder / REPORT, json.dumps(content, indent=2) + "\n")
    return numbers


def _describe_devices(session: Session) -> str:
    device = session.mesh.devices.flat[0]
    return f"{session.mesh.size} {device.platform} device{'s' if session.mesh.size > 1 else ''}"


def resume_command(workdir: epath.Path) -> str:
    """Return the command that resumes a run."""
    return f"{invocation()} --workdir={shlex.quote(str(workdir))}"
