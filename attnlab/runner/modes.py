"""Runs a request: its lock, its job, and the modes that read a run."""

import contextlib
import errno
import signal

from attnlab import config
from attnlab.config.saved import CONFIG
from attnlab.data.batch import source_kind
from attnlab.distributed.collectives import barrier, to_host
from attnlab.distributed.job import find_job, is_main_process
from attnlab.errors import InputError
from attnlab.paths import CHECKPOINTS_FOLDER, is_remote
from attnlab.pretrained import import_export
from attnlab.runner import xla_flags
from attnlab.runner.devices import configure_jax, devices
from attnlab.runner.exit_codes import ClaimsFailed
from attnlab.runner.joining import join
from attnlab.runner.lock import exclusive
from attnlab.runner.reporting import failed_claims, run_report
from attnlab.runner.request import Request
from attnlab.runner.sampling import run_sampling
from attnlab.runner.sessions import open_session, restore
from attnlab.runner.trained_model import PRETRAINED, TrainedModel
from attnlab.runner.training import run_import, run_train
from attnlab.signals import handlers
from attnlab.train.attention_backends import warn_of_slow_paths
from attnlab.train.checkpoints import has_checkpoint, params_sha256
from attnlab.train.describe import describe
from attnlab.train.experiment import Experiment
from attnlab.train.partition import combine

# Errors caused by the machine or by user input, reported in one line without a traceback.
ENVIRONMENT_ERRNOS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)


def run(request: Request) -> dict[str, float]:
    """Run a request and return its final metrics.

    Raises:
      InputError: the request cannot be fulfilled; the message is shown to the user.
      Stopped: a signal stopped the run, which can be resumed.
      ClaimsFailed: the run is done, and claims of its experiment failed.
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
        job = find_job(request.job)
        configure_jax(request, job)
        if job is not None:
            request = join(request, job)
        # SIGUSR2 requests a profile of training steps; by default it would end the process.
        with _workdir_lock(request), handlers(lambda *_: None, signal.SIGUSR2):
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


@contextlib.contextmanager
def _workdir_lock(request: Request):
    """Hold the lock of the workdir in the modes that write checkpoints, in process 0 of a job.

    The other modes read checkpoints and write their reports atomically.
    """
    if request.mode not in ("train", "import"):
        yield
        return
    devices()  # reports in one line that there are none
    if not is_main_process():
        barrier()
        yield
        return
    with exclusive(request.folder):
        # An import checks for a checkpoint: an unfinished one has a config, and is repeated.
        started = request.mode == "train" and (request.folder / CONFIG).exists()
        if started and not request.resumes:
            raise InputError(f"another process has started a run in {request.folder}: run the command again")
        barrier()
        yield


def _remove_if_empty(request: Request) -> None:
    """Remove the empty folders of a run that did not start."""
    if request.workdir is None or is_remote(request.workdir):  # a bucket has no empty folders
        return
    if request.mode in ("train", "import"):
        for folder in (request.workdir / CHECKPOINTS_FOLDER, request.workdir):
            with contextlib.suppress(OSError, ValueError):  # epath: ValueError if not empty
                folder.rmdir()


def run_export(request: Request) -> dict[str, float]:
    """Write the parameters of a run as a Hugging Face checkpoint."""
    assert request.output_dir is not None
    session = open_session(request, request.config)
    restored = restore(request, session)
    params = to_host(session.eval_params(restored.state))
    origin: import_export.Origin = request.folder / PRETRAINED
    if not (request.folder / PRETRAINED).exists():
        data = request.config.data
        length = data.sequence_length
        if data.source_shape is not None and source_kind(data.source_shape) == "text":
            length = max(length, *data.source_shape)
        origin = import_export.FromScratch(session.tokenizer, length, data.preprocessor)
    model = request.config.model.with_vocab_size(session.tokenizer.vocab_size)
    if is_main_process():
        import_export.write_checkpoint(request.output_dir, model, params, origin)
    print(f"exported step {restored.step} to {request.output_dir}")
    return {}


def run_eval(request: Request) -> dict[str, float]:
    """Evaluate a checkpoint on the whole validation split, and run the experiment's report."""
    session = open_session(request, request.config)
    restored = restore(request, session)
    data = request.config.data
    params = session.eval_params(restored.state)
    metrics = session.evaluate(
        params, data.eval_batches("validation", session.tokenizer, **session.batch_shard)
    )
    print(request.opening)
    warn_of_slow_paths(session)
    print(f"step {restored.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    trained = TrainedModel(session, params, request.folder, metrics)
    metrics = metrics | run_report(request, trained)
    if failed := failed_claims(trained):
        raise ClaimsFailed(failed, metrics)
    return metrics


def run_sample(request: Request) -> dict[str, float]:
    """Generate text from each prompt, or from each text, image or audio input."""
    run_sampling(request, _load_trained_model(request), _load_trained_model)
    return {}


def _load_trained_model(request: Request) -> TrainedModel:
    """Return the trained model of a run with the parameters of its checkpoint."""
    session = open_session(request, request.config)
    return TrainedModel(session, session.eval_params(restore(request, session).state), request.folder, {})


def run_describe(request: Request) -> dict[str, float]:
    """Print the config and model of an experiment, and the latest checkpoint of a run."""
    session = open_session(request, request.config)
    print("config\n" + config.show(request.config, request.sources) + "\n")
    print(describe(session))
    if request.xla_flags == "recommended":
        target = request.target
        print(f"\n{xla_flags.table(xla_flags.target_kind(target) if target else xla_flags.local_kind())}")
    if request.workdir is not None and has_checkpoint(request.workdir) and request.target is None:
        restored = restore(request, session)
        print(f"\ncheckpoint\n  step {restored.step}")
        print(f"params_sha256: {params_sha256(combine(restored.state.params, restored.state.frozen))}")
    return {}
