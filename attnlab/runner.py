"""The modes of `run.py`: train, eval, sample and describe."""

import dataclasses
import errno
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from attnlab import config, sharding
from attnlab.data import Tokenizer
from attnlab.errors import InputError
from attnlab.files import as_json, write_atomically
from attnlab.generation import Sampling
from attnlab.request import Request
from attnlab.train import loop
from attnlab.train.checkpoints import FOLDER, Checkpoints, Restored, params_sha256
from attnlab.train.describe import describe
from attnlab.train.experiment import Experiment
from attnlab.train.initialize import start_from
from attnlab.train.metrics import Writers
from attnlab.train.session import Session
from attnlab.trained import Trained

TOKENIZER, REPORT = "tokenizer.json", "report.json"
MAX_SIMULATED = 8  # CPU devices simulated for a mesh that names its sizes


def run(request: Request) -> dict[str, float]:
    """Does what a request asks; returns the numbers it ended with.

    Raises:
      InputError: what was asked cannot be done; the message is for the person.
    """
    prepare(request)
    modes = {"train": run_train, "eval": run_eval, "sample": run_sample, "describe": run_describe}
    try:
        return modes[request.mode](request)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT, errno.ENOTDIR):
            raise InputError(f"{error.filename or request.workdir}: {error.strerror}") from error
        raise


def prepare(request: Request) -> None:
    """Sets JAX up: simulated devices, the compile cache, NaN checks; libraries speak up only to warn."""
    logging.set_verbosity(logging.WARNING)
    sizes = [int(size) for size in re.findall(r":(\d+)", request.mesh)]
    count = 1
    for size in sizes:
        count *= size
    if 1 < count <= MAX_SIMULATED and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        try:
            jax.config.update("jax_num_cpu_devices", count)  # counts only where the CPU is all there is
        except RuntimeError:
            pass  # JAX is running already: an earlier run of a sweep
    if not jax.config.jax_compilation_cache_dir:
        cache = os.path.join(
            os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "attnlab", "xla"
        )
        jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_debug_nans", request.debug_nans)


def open_session(request: Request, experiment: Experiment) -> Session:
    """The experiment on the mesh that was asked for, with the run's tokenizer."""
    mesh = sharding.make_mesh(sharding.parse_mesh(request.mesh, len(jax.devices())))
    tokenizer = None
    if request.workdir is not None and (request.workdir / TOKENIZER).exists():
        tokenizer = Tokenizer.load(request.workdir / TOKENIZER)
    return Session(experiment, mesh, tokenizer or experiment.data.build_tokenizer())


def run_train(request: Request) -> dict[str, float]:
    """Trains, or goes on with, the run of a workdir."""
    began = time.perf_counter()
    experiment = _as_asked(request)
    workdir = request.workdir
    session = open_session(request, experiment)
    session.optimizer  # noqa: B018 - rules that match nothing are told before anything is written
    workdir.mkdir(parents=True, exist_ok=True)
    config.save(workdir, request.loaded, experiment, request.sources)
    if jax.process_index() == 0:
        session.tokenizer.save(workdir / TOKENIZER)

    data, processes = experiment.data, (jax.process_index(), jax.process_count())
    batches = data.train_iterator(
        session.tokenizer,
        seed=experiment.seed,
        process_index=processes[0],
        process_count=processes[1],
        num_batches=request.overfit_batches,
    )

    def validation():
        return data.eval_batches(
            "validation",
            session.tokenizer,
            limit=experiment.train.eval_batches,
            process_index=processes[0],
            process_count=processes[1],
        )

    checkpoints = Checkpoints(workdir, experiment.train.keep)
    state, step = _start(request, session, checkpoints, batches)
    limits = loop.Limits(request.max_steps, request.max_time, request.profile)
    verb = f"going on at step {step}" if step else "training"
    print(f"{verb} in {workdir} on mesh {sharding.describe(session.mesh)} ({_devices(session)})")
    with Writers(
        workdir,
        steps=min(experiment.train.steps, request.max_steps or experiment.train.steps),
        resume=step,
        trackers=request.trackers,
        config=config.flatten(experiment),
    ) as writers:
        outcome = loop.train(
            session, batches, validation, checkpoints, writers, state, limits, str(workdir / "profile"), print
        )
    checkpoints.close()
    if outcome.reason == "signal":
        print(f"stopped by a signal at step {outcome.step}, saved; go on with: {_again(workdir)}")
        return {}
    metrics = {f"eval_{name}": value for name, value in outcome.metrics.items()}
    if outcome.reason == "done":
        metrics |= _report(request, Trained(session, session.eval_params(outcome.state), workdir))
    seconds = time.perf_counter() - began
    print(f"{outcome.reason.replace('_', ' ')} at step {outcome.step} after {seconds:.0f} s")
    print(f"config, metrics, checkpoints and pictures are in {workdir}")
    print(f"go on, evaluate or sample with: {_again(workdir)} [--mode=eval|sample]")
    return metrics


def run_eval(request: Request) -> dict[str, float]:
    """Evaluates a run's checkpoint on the whole validation split, and reports as at the end of training."""
    session = open_session(request, request.config)
    restored = _restore(request, session)
    data = request.config.data
    params = session.eval_params(restored.state)
    metrics = session.evaluate(params, data.eval_batches("validation", session.tokenizer))
    print(f"step {restored.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    return metrics | _report(request, Trained(session, params, request.workdir))


def run_sample(request: Request) -> dict[str, float]:
    """Generates text after each prompt."""
    session = open_session(request, request.config)
    wanted = request.sampling
    sampling = Sampling(wanted.temperature, wanted.top_k, wanted.top_p, wanted.min_p)
    restored = _restore(request, session)
    trained = Trained(session, session.eval_params(restored.state), request.workdir)
    prompts = wanted.prompts or ("",)
    alone = len(prompts) * wanted.num_samples == 1

    def stream(_: int, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    if alone:
        stream(0, prompts[0])
    completions = trained.generate(
        prompts,
        num_samples=wanted.num_samples,
        max_new_tokens=wanted.max_new_tokens,
        sampling=sampling,
        stop=wanted.stop,
        seed=request.seed or 0,
        stream=stream if alone else None,
    )
    for i, completion in enumerate(completions):
        if alone:
            print()
        else:
            print(f"--- {i + 1} of {len(completions)}\n{completion.prompt}{completion.text}")
        if completion.ended == "context":
            print(
                f"(ended at the model's context of {request.config.data.sequence_length} tokens)",
                file=sys.stderr,
            )
    return {}


def run_describe(request: Request) -> dict[str, float]:
    """Prints what an experiment is, and of a run also where it stands."""
    session = open_session(request, request.config)
    print("config\n" + config.show(request.config, request.sources) + "\n")
    print(describe(session))
    if request.workdir is not None and (request.workdir / FOLDER).exists():
        restored = _restore(request, session)
        print(f"\ncheckpoint\n  step {restored.step}")
        print(f"params_sha256: {params_sha256(restored.state.params)}")
    return {}


def _as_asked(request: Request) -> Experiment:
    """The config with what `--seed` and `--fast_dev_run` change."""
    experiment = request.config
    if request.fast_dev_run:
        quick = dataclasses.replace(
            experiment.train, steps=2, log_every=1, eval_every=1, eval_batches=2, checkpoint_every=1
        )
        experiment = dataclasses.replace(experiment, train=quick)
    return experiment


def _start(request: Request, session: Session, checkpoints: Checkpoints, batches) -> tuple[Any, int]:
    """The state to train from: the latest checkpoint, another run's parameters, or the seed's."""
    if checkpoints.steps():
        restored = checkpoints.restore(session.abstract_state)
        if restored.data is None:
            raise InputError(
                f"checkpoint {restored.step} was saved by another number of processes than {jax.process_count()}"
            )
        batches.set_state(restored.data)
        return restored.state, restored.step
    state = session.new_state()
    if request.init_from is not None:
        source = config.load_workdir(request.init_from)
        other = open_session(dataclasses.replace(request, workdir=request.init_from), source.config)
        theirs = _restore(dataclasses.replace(request, workdir=request.init_from), other)
        state = start_from(state, other.eval_params(theirs.state), request.init_rules, print)
    return state, 0


def _restore(request: Request, session: Session) -> Restored:
    checkpoints = Checkpoints(request.workdir)
    try:
        return checkpoints.restore(session.abstract_state, str(request.checkpoint))
    finally:
        checkpoints.close()


def _report(request: Request, trained: Trained) -> Mapping[str, float]:
    """What the experiment file's own `report(trained)` finds; nothing if it has none."""
    report = getattr(request.loaded.module, "report", None)
    if report is None:
        return {}
    found = report(trained) or {}
    write_atomically(
        request.workdir / REPORT, json.dumps({n: as_json(x) for n, x in found.items()}, indent=2) + "\n"
    )
    return found


def _devices(session: Session) -> str:
    device = session.mesh.devices.flat[0]
    return f"{session.mesh.size} {device.platform} device{'s' if session.mesh.size > 1 else ''}"


def _again(workdir: epath.Path) -> str:
    return f"python {os.path.relpath(sys.argv[0])} --workdir={workdir}"
