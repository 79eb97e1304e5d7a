"""Load an experiment by name, from its file, or from a saved config."""

from attnlab.config.experiments import Loaded, load_file
from attnlab.config.saved import load_saved


def load(spec: str, experiment_code: bool = True) -> Loaded:
    """Load an experiment given as `path.py`, `path.py:argument`, a bare name or a `config.json`.

    `attnlab.config.experiments.find` documents where a file is searched for. Without
    `experiment_code`, the experiment file beside a `config.json` is not run; see `load_workdir`.

    Raises:
        InputError: the file does not exist or does not define a config.
    """
    return load_saved(spec, experiment_code) if spec.endswith(".json") else load_file(spec)
