"""Shared by all cases: folders, processes, and a run and a checkpoint made without faults."""

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.faults import process
from tests.faults.process import Outcome
from tests.programs import TINY, write_text

VISION = {
    **{"image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 8}},
    **{"resample": 3, "do_center_crop": True, "crop_size": {"height": 8, "width": 8}, "do_rescale": True},
    **{"rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.5, 0.5]},
    **{"image_std": [0.5, 0.5, 0.5], "do_convert_rgb": True},
}
SOUND = {
    **{"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 8, "sampling_rate": 16000},
    **{"hop_length": 160, "chunk_length": 1, "n_fft": 400, "padding_value": 0.0, "dither": 0.0},
    **{"padding_side": "right", "do_normalize": False},
}
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
STEPS_AGAIN = 6  # the tiny experiment has four


class Harness:
    """Folders and processes of the cases.

    Args:
        root: an empty folder.
        kills: how often a run of the kinds `kills` is killed.
    """

    def __init__(self, root: Path, kills: int = 20):
        self.root, self.kills = root, kills
        self._numbers = itertools.count()

    def folder(self, name: str = "case") -> Path:
        """Return a new folder."""
        folder = self.root / f"{name}-{next(self._numbers)}"
        folder.mkdir()
        return folder

    def run(
        self,
        cwd: Path,
        *commands: Sequence[str],
        environ: Mapping[str, str] | None = None,
        limit: int | None = None,
    ) -> Outcome:
        """Run command lines in one forked process, which may use the CPU time of `limit` commands.

        The default is their number.
        """
        child = process.fork(process.command_line(*commands), cwd, environ)
        return child.wait(limit or len(commands))

    def call(self, cwd: Path, function: Callable[[], Any]) -> Outcome:
        """Call a function of the library in a forked process."""
        return process.fork(process.as_user(function), cwd).wait()

    def _make(self, cwd: Path, *commands: Sequence[str]) -> str:
        """Run command lines that must succeed, and return their output."""
        outcome = self.run(cwd, *commands)
        assert outcome.code == 0, f"without any fault, {commands} ended with {outcome}"
        return outcome.out

    @cached_property
    def trained(self) -> Path:
        """A folder with `tiny.py`, `words.txt` and `run` with checkpoints at steps 2 and 4."""
        folder = self.folder("trained")
        text = write_text(folder / "words.txt")
        (folder / "tiny.py").write_text(TINY.replace("{text}", str(text)))
        self._make(folder, ["--config=tiny.py", "--workdir=run"])
        return folder

    @cached_property
    def digests(self) -> dict[int, str]:
        """The digest of the parameters at each step of the run, and of the run resumed."""
        folder = self.folder("digests")
        shutil.copytree(self.trained / "run", folder / "run")
        describe = ["--mode=describe", "--workdir=run"]
        resume = ["--workdir=run", f"--config.train.steps={STEPS_AGAIN}"]
        last = dict(digests_in(self._make(folder, describe, resume, describe)))
        shutil.rmtree(folder / "run" / "checkpoints" / str(STEPS_AGAIN))
        shutil.rmtree(folder / "run" / "checkpoints" / "4")
        return last | dict(digests_in(self._make(folder, describe)))

    @cached_property
    def checkpoint(self) -> Path:
        """A folder `hf` with a small Llama in two files with an index, and a chat template."""
        folder = self.folder("checkpoint")
        process_outcome = self.call(folder, lambda: _write_checkpoint(folder / "hf"))
        assert process_outcome.code == 0, process_outcome
        return folder / "hf"

    @cached_property
    def imported(self) -> str:
        """The digest of the parameters of the imported checkpoint."""
        describe = ["--mode=describe", "--workdir=imported"]
        out = self._make(self.folder("imported"), self.import_command(self.checkpoint), describe)
        return dict(digests_in(out))[0]

    def import_command(self, folder: Path, workdir: str = "imported") -> list[str]:
        """Return the arguments that import a checkpoint."""
        config = f"--config={self.trained / 'tiny.py'}"
        return ["--mode=import", f"--checkpoint={folder}", f"--workdir={workdir}", config]


def digests_in(out: str) -> list[tuple[int, str]]:
    """Return (step, digest) of every checkpoint that mode describe printed."""
    return [
        (int(step), digest)
        for step, digest in re.findall(r"^  step (\d+)\nparams_sha256: (\w+)$", out, re.MULTILINE)
    ]


def _write_checkpoint(folder: Path) -> None:
    import numpy as np
    from etils import epath
    from safetensors.numpy import load_file, save_file

    from tests.pretrained import small_llama

    small_llama.write(epath.Path(folder))
    settings = {"eos_token": {"content": "<eos>"}, "chat_template": TEMPLATE, "bos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<eos>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "suppress_tokens": [3]}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tensors = load_file(folder / "model.safetensors")
    names, index = sorted(tensors), {}
    for number in (0, 1):
        file = f"model-{number}.safetensors"
        save_file({name: np.asarray(tensors[name]) for name in names[number::2]}, folder / file)
        index |= dict.fromkeys(names[number::2], file)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    (folder / "model.safetensors").unlink()


def make_environment(root: Path) -> dict[str, str]:
    """Return the variables of all processes: their caches lie below `root`."""
    hidden = Path(__file__).parents[1] / "without_torch"
    paths = [str(hidden), str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONWARNINGS": "ignore",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XDG_CACHE_HOME": str(root / "cache"),
        "ATTNLAB_DATA_DIR": str(root / "data"),
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(root),
    }
