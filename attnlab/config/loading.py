"""Load an experiment by its name, its file, or the config that a run saved."""

from attnlab.config.experiments import Loaded, load_file
from attnlab.config.saved import load_saved


def load(spec: str) -> Loaded:
    """Load the experiment that `path.py`, `path.py:argument`, a bare name, or a saved `config.json` names.

    `attnlab.config.experiments.find` documents where a file is searched for.

    Raises:
        InputError: there is no such file, or it does not give a config.
    """
    return load_saved(spec) if spec.endswith(".json") else load_file(spec)
