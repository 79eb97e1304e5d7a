"""Jobs of two real processes, each with four simulated devices."""

import socket
import subprocess
from contextlib import contextmanager

from tests.programs import command, environment

EXPERIMENT = '''"""A small language model whose report uses every method that reads arrays of the job."""

from attnlab.data import Bytes, Text
from attnlab.inspect.figures import head_grid
from attnlab.layers import AttentionConfig, GatedMLPConfig
from attnlab.models import DecoderConfig
from attnlab.train import AdamW, Constant, Experiment, Train


def get_config():
    return Experiment(
        model=DecoderConfig(
            depth=2, width=16, attention=AttentionConfig(heads=8), feed_forward=GatedMLPConfig(width=32), tied=False
        ),
        data=Text(name="text:{text}", tokenizer=Bytes(), sequence_length=16, batch_size=8),
        optimizer=AdamW(learning_rate=1e-2, schedule=Constant(warmup=2)),
        train=Train(steps=6, log_every=1, eval_every=3, eval_batches=2, checkpoint_every=3, keep=3),
    )


def report(trained):
    batch = trained.batches("validation", 1)[0]
    predicted = trained.predict(batch)
    assert predicted.shape == batch.targets.shape
    hidden = trained.apply(batch, "hidden")
    weights = trained.attention_of_tokens(batch.tokens[0, :4])
    (sample,) = trained.generate(["the"], max_new_tokens=4)
    trained.save_figure(head_grid(weights, list("abcd"), "attention"), "attention")
    return {{"correct": float((predicted == batch.targets).mean()), "tokens": len(sample.tokens), "norm": float((hidden[0] ** 2).sum() if isinstance(hidden, tuple) else (hidden ** 2).sum())}}
'''
FLOAT64 = [f"--config.model.dtypes.{name}=float64" for name in ("param", "compute", "logits")]


def free_port():
    """Return a port such that it and the one below it are free."""
    while True:
        with socket.socket() as upper, socket.socket() as lower:
            upper.bind(("", 0))
            try:
                lower.bind(("", upper.getsockname()[1] - 1))
            except OSError:
                continue
            return upper.getsockname()[1]


@contextmanager
def started(*arguments, count=2, folder=None, **variables):
    """Start a job; at the end of the block, kill the processes that are left."""
    port = free_port()
    processes = [
        subprocess.Popen(
            command(
                *arguments, f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={index}"
            ),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**variables),
        )
        for index in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()


def job(*arguments, folder=None, timeout=300, **variables):
    """Run a job to its end; returns the exit codes, outputs and errors of both processes."""
    with started(*arguments, folder=folder, **variables) as processes:
        results = [process.communicate(timeout=timeout) for process in processes]
        codes = [process.returncode for process in processes]
    return codes, [out for out, _ in results], [err for _, err in results]
