"""Profiler traces of chosen steps."""

import signal

import jax
import jax.numpy as jnp
import pytest

from attnlab.train.profiler import Profiler


def run_steps(profiler, last, signalled=None):
    """Run a few additions as steps; SIGUSR2 arrives in the step `signalled`."""
    with profiler.running():
        for step in range(1, last + 1):
            with profiler.step(step):
                metrics = jnp.ones(4) + step
                if step == signalled:
                    signal.raise_signal(signal.SIGUSR2)
            profiler.finish(step, metrics)


@pytest.mark.parametrize(("steps", "stop", "traced"), [((2, 4), None, "2 to 3"), ((6, 20), 7, "6 to 7")])
def test_profile_is_written_even_if_the_run_ends_within_it(tmp_path, steps, stop, traced):
    messages = []
    run_steps(Profiler(steps, str(tmp_path), messages.append), stop or 12)
    assert messages == [f"wrote a profiler trace of steps {traced} to {tmp_path}"]
    (trace,) = tmp_path.rglob("*.xplane.pb")
    assert b"step_num" in trace.read_bytes()


@pytest.mark.parametrize("index", [None, 3])
def test_sigusr2_traces_the_next_steps_of_its_process(tmp_path, monkeypatch, capsys, index):
    if index is not None:
        monkeypatch.setattr(jax, "process_count", lambda: 4)
        monkeypatch.setattr(jax, "process_index", lambda: index)
    messages, before = [], signal.getsignal(signal.SIGUSR2)
    run_steps(Profiler(None, str(tmp_path / "profile"), messages.append), 9, signalled=2)
    folder = tmp_path / "profile" if index is None else tmp_path / "profile" / "process_3"
    lines = messages if index is None else capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].endswith(f"wrote a profiler trace of steps 3 to 7 to {folder}")
    assert list((folder / "plugins").rglob("*.xplane.pb"))
    assert signal.getsignal(signal.SIGUSR2) is before
