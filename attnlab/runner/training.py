"""The modes that write a run: train and import."""

import dataclasses
import os
from typing import Any

import jax
from etils import epath

from attnlab import config, provenance, sharding
from attnlab.data import Tokenizer
from attnlab.distributed.job import is_main_process
from attnlab.distributed.monitor import ranges
from attnlab.errors import InputError
from attnlab.pretrained import import_export, repository
from attnlab.runner import xla_flags
from attnlab.runner.changed_data import TOKENIZER, DataRecord, compare, set_position
from attnlab.runner.command import resume_command
from attnlab.runner.devices import devices
from attnlab.runner.exit_codes import ClaimsFailed, Stopped
from attnlab.runner.reporting import failed_claims, run_report
from attnlab.runner.request import Request
from attnlab.runner.sessions import open_session, restore
from attnlab.runner.trained_model import PRETRAINED, TrainedModel
from attnlab.signals import Terminated
from attnlab.train.attention_backends import warn_of_slow_paths
from attnlab.train.checkpoints import Checkpoints, has_checkpoint
from attnlab.train.experiment import Experiment
from attnlab.train.goodput import Goodput
from attnlab.train.initialize import init_from_run
from attnlab.train.loop import Limits, TrainingLoop
from attnlab.train.metrics import MetricWriters
from attnlab.train.session import Session
from attnlab.train.stopping import stop_report


def run_train(request: Request) -> dict[str, float]:
    """Train a new run, or resume the run in the workdir."""
    goodput = Goodput()
    experiment, workdir = apply_flags(request), request.folder
    session = open_session(request, experiment)
    session.optimizer  # noqa: B018 - report rules that match nothing before writing files
    batches, validation = _open_input(request, session)
    last = _final_step(request, experiment)
    workdir.mkdir(parents=True, exist_ok=True)
    with Checkpoints(workdir, experiment.train.keep) as saved:
        data = DataRecord.of(experiment.data, session.tokenizer, workdir)
        steps = saved.steps()
        if steps:
            data = compare(workdir, data, steps[-1], request.allow_changed_data)
        state, step = _initial_state(request, session, saved, batches, data)
        if step <= experiment.train.steps:  # otherwise the saved config stays that of the steps done
            _save_origin(request, experiment, step)
        if not steps:
            _save_tokenizer(session.tokenizer, workdir / TOKENIZER)
        data.save(workdir)
        print(request.opening, flush=True)
        if step > experiment.train.steps:
            print(f"the run has reached step {step}, above config.train.steps={experiment.train.steps}")
        verb = f"resuming at step {step}" if step else "training"
        flags = ""
        if request.xla_flags == "recommended":
            flags = f"; {xla_flags.summary(xla_flags.local_kind())}"
        mesh = sharding.format_mesh(session.mesh)
        print(f"{verb} in {workdir} on mesh {mesh} ({_describe_devices(session)}{flags})")
        warn_of_slow_paths(session)
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
                goodput=goodput,
            )
            outcome = training.run(state)
    if outcome.reason == "signal":
        raise _stopped(outcome.signal, outcome.step, workdir, goodput)
    metrics = {f"eval_{name}": value for name, value in outcome.metrics.items()}
    failed: list[str] = []
    if outcome.reason == "done":
        params, fast = session.eval_params(outcome.state), request.fast_dev_run
        try:
            with stop_report() as poll, goodput.measure("report"):
                trained = TrainedModel(session, params, workdir, outcome.metrics, fast=fast, poll=poll)
                metrics |= run_report(request, trained)
        except Terminated as stopped:
            raise _stopped(stopped.name, outcome.step, workdir, goodput) from None
        failed = failed_claims(trained)
    print(goodput)
    print(f"{outcome.reason.replace('_', ' ')} at step {outcome.step} after {goodput.total():.0f} s")
    print(f"config, metrics, checkpoints and figures are in {workdir}")
    print(f"resume, evaluate or sample with: {resume_command(workdir)} [--mode=eval|sample]")
    if failed:
        raise ClaimsFailed(failed, metrics)
    return metrics


def _stopped(signal: str, step: int, workdir: epath.Path, goodput: Goodput) -> Stopped:
    """Print how to resume a run that a signal stopped, and return the exception that ends it."""
    print(goodput)
    print(f"stopped by a signal at step {step}, saved; resume with: {resume_command(workdir)}")
    return Stopped(signal)


def _open_input(request: Request, session: Session) -> tuple[Any, Any]:
    """Return this process's training batches and its share of the validation batches.

    Both splits are opened here, so that an unreadable validation split fails before the first step.
    """
    experiment = session.experiment
    shard = session.batch_shard
    batches = experiment.data.train_iterator(
        session.tokenizer, seed=experiment.seed, num_batches=request.overfit_batches, **shard
    )
    limit = experiment.train.eval_batches
    return batches, experiment.data.eval_batches("validation", session.tokenizer, limit=limit, **shard)


def _final_step(request: Request, experiment: Experiment) -> int:
    """Return the last step of this command."""
    last = min(experiment.train.steps, request.max_steps or experiment.train.steps)
    if request.profile and request.profile[0] > last:
        raise InputError(f"--profile={request.profile[0]}:{request.profile[1]}: the last step is {last}")
    return last


def _save_origin(request: Request, experiment: Experiment, step: int) -> None:
    """Write the config, the experiment's source, and the versions and git commits of the run."""
    if is_main_process():
        config.save(request.folder, request.loaded, experiment, request.sources, request.mesh)
        provenance.save_versions(request.folder, step, request.loaded.path)


def _save_tokenizer(tokenizer: Tokenizer, file: epath.Path) -> None:
    """Write the tokenizer of a new run, atomically."""
    if is_main_process():
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        tokenizer.save(temporary)
        temporary.replace(file)


def run_import(request: Request) -> dict[str, float]:
    """Create a run at step 0 from a Hugging Face checkpoint."""
    experiment, workdir = request.config, request.folder
    if has_checkpoint(workdir):
        raise InputError(f"{workdir} already holds a run; import into another --workdir")
    session = open_session(request, experiment)
    batches, _ = _open_input(request, session)
    with Checkpoints(workdir, experiment.train.keep) as saved:
        state = _new_state(session, workdir)
        _save_origin(request, experiment, step=0)
        _save_tokenizer(session.tokenizer, workdir / TOKENIZER)
        DataRecord.of(experiment.data, session.tokenizer, workdir).save(workdir)
        saved.save(0, state, batches.get_state())
    print(request.opening)
    count = sum(x.size for x in jax.tree.leaves(session.abstract_params))
    print(f"imported {count:,} parameters of {experiment.init} into {workdir}")
    print(
        f"sample, evaluate, train or export with: {resume_command(workdir)} --mode=sample|eval|train|export"
    )
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


def _initial_state(
    request: Request, session: Session, saved: Checkpoints, batches, data: DataRecord
) -> tuple[Any, int]:
    """Return the initial state and step.

    The state is that of the latest checkpoint, the parameters of `init_from`, or a new state.
    """
    if saved.steps():
        restored = saved.restore(session.abstract_state)
        set_position(batches, restored.data, restored.step, data, request.allow_changed_data)
        return restored.state, restored.step
    if request.init_from is None:
        return _new_state(session, request.folder), 0
    source = dataclasses.replace(request, workdir=request.init_from)
    loaded = config.load_workdir(request.init_from, not request.no_experiment_code)
    other = open_session(source, loaded.config)
    other_state = restore(source, other).state
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
    if is_main_process():
        import_export.copy_non_tensor_files(folder, workdir / PRETRAINED)
    return state


def _describe_devices(session: Session) -> str:
    """Return the number of devices that the run uses, and the names of those that it does not."""
    device, used = sharding.mesh_device(session.mesh), set(session.mesh.devices.flat)
    idle = ranges(sorted(other.id for other in devices() if other not in used))
    text = f"{session.mesh.size} {device.platform} device{'s' if session.mesh.size > 1 else ''}"
    return f"{text}; idle: {device.platform} {idle}" if idle else text
