"""Sessions of saved and new runs: the mesh, the tokenizer and the restored checkpoint."""

from typing import cast

from jax.sharding import Mesh

from attnlab.data import Tokenizer
from attnlab.errors import InputError
from attnlab.generation.source_inputs import training_prefix_ids
from attnlab.models import ViTConfig
from attnlab.pretrained import import_export, repository
from attnlab.runner.changed_data import TOKENIZER
from attnlab.runner.devices import enable_compilation_cache, make_mesh
from attnlab.runner.request import Request
from attnlab.train.checkpoints import Checkpoints, RestoredCheckpoint, has_checkpoint
from attnlab.train.experiment import Experiment
from attnlab.train.session import Session
from attnlab.train.targets import target_mesh


def open_session(request: Request, experiment: Experiment) -> Session:
    """Return the session of an experiment on the requested mesh, with the run's tokenizer."""
    if request.target is not None:
        mesh = cast(Mesh, target_mesh(request.target, request.mesh))  # traces, as describe does
    else:
        mesh = make_mesh(request.mesh)
        enable_compilation_cache(mesh)
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


def _saved_tokenizer(request: Request) -> Tokenizer | None:
    """Return the saved tokenizer of a run; None for a new run."""
    if request.workdir is None:
        return None
    file = request.workdir / TOKENIZER
    has_parameters = has_checkpoint(request.workdir)
    if request.mode == "train" and not has_parameters:
        return None  # the data may have changed since the run died before its first checkpoint
    if file.exists():
        try:
            return Tokenizer.load(file)
        except Exception as error:  # tokenizers raises plain Exceptions
            raise InputError(f"{file} cannot be read as a tokenizer: {error}") from error
    if has_parameters:
        # A new tokenizer, built from text that may have changed, would not match the parameters.
        raise InputError(f"{file} is missing; the checkpoints of this run cannot be used without it")
    return None


def restore(request: Request, session: Session) -> RestoredCheckpoint:
    """Restore the checkpoint that a request names."""
    with Checkpoints(request.folder) as saved:
        return saved.restore(session.abstract_state, str(request.checkpoint))
