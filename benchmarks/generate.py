"""Benchmark speed and memory of greedy generation from one checkpoint: attnlab and transformers.

    python benchmarks/generate.py             # batches of 1 and 8, 512 prompt and 128 new tokens
    python benchmarks/generate.py --rounds 3 --layers 4
    python benchmarks/generate.py --check     # compare the generated tokens

The checkpoint has the shape of GPT-2 small, 124 million parameters in float32, with random weights
from transformers. Times include tokenization and detokenization. Memory is the peak resident size
of a separate process, in total and in excess of its size after all imports.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from timing import Unavailable, _cores, alternate, available, environment, table

PROMPT, NEW = 512, 128
Generate = Callable[[int], list[list[int]]]


def checkpoint(folder: Path, layers: int, seed: int = 0) -> None:
    """Write a random GPT-2 checkpoint, with a tokenizer whose words are the token ids."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise Unavailable(f"the checkpoint cannot be created: {error}") from error
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(seed)
    config = transformers.GPT2Config(n_layer=layers)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    words = {str(i): i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def texts(batch: int) -> list[str]:
    """Return texts of PROMPT random words."""
    return [" ".join(map(str, row)) for row in np.random.default_rng(0).integers(0, 50_000, (batch, PROMPT))]


def attnlab(folder: Path) -> Generate:
    """Return the generation function of attnlab."""
    from attnlab import sharding
    from attnlab.generation import Generator, SamplingParams
    from attnlab.pretrained import load

    mesh = sharding.make_mesh(sharding.parse_mesh("single", 1))
    loaded = load(str(folder), mesh, unrolled=True)
    generator = Generator(loaded.model, loaded.params, loaded.tokenizer, PROMPT + NEW, mesh)

    def generate(batch: int) -> list[list[int]]:
        completions = generator(texts(batch), max_new_tokens=NEW, sampling=SamplingParams(temperature=0.0))
        return [completion.tokens for completion in completions]

    return generate


def hugging_face(folder: Path) -> Generate:
    """Return the generation function of transformers, in eager torch."""
    import torch
    import transformers

    torch.set_num_threads(_cores())
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    model.generation_config.eos_token_id = None

    def generate(batch: int) -> list[list[int]]:
        inputs = tokenizer(texts(batch), return_tensors="pt")
        with torch.no_grad():
            output = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, **options)
        new_tokens = output[:, PROMPT:]
        tokenizer.batch_decode(new_tokens)
        return new_tokens.tolist()

    return generate


PEERS = {"attnlab": attnlab, "transformers": hugging_face}


def resident(peak: bool = False) -> float:
    """Return the current or peak resident size of this process, in MiB.

    `getrusage` is unsuitable: a process inherits the maximum of its parent.
    """
    field = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(name: str, folder: Path, batch: int) -> None:
    """Print the memory of one implementation, after imports and at its peak."""
    if name == "attnlab":
        import jax

        jax.config.update("jax_platforms", "cpu")  # libtpu takes memory even without a TPU
        import attnlab.generation
        import attnlab.pretrained  # noqa: F401

        jax.devices()
    else:
        import torch  # noqa: F401
        from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast  # noqa: F401
    imported = resident()
    PEERS[name](folder)(batch)
    print(json.dumps([imported, resident(peak=True)]))


def memory(folder: Path, batch: int) -> None:
    """Print a table of the memory of each implementation."""
    sizes = {}
    for name in PEERS:
        command = [sys.executable, __file__, "--measure", name, "--folder", str(folder)]
        command += ["--batches", str(batch)]
        completed = subprocess.run(command, capture_output=True, text=True, check=True)
        sizes[name] = json.loads(completed.stdout.splitlines()[-1])
    base_imported, base_peak = sizes["transformers"]
    print("\nlibrary       peak MiB  / transformers  excess over imports  / transformers")
    for name, (imported, peak) in sizes.items():
        excess, ratio = peak - imported, (peak - imported) / (base_peak - base_imported)
        print(f"{name:12s}  {peak:8,.0f}  {peak / base_peak:14.2f}  {excess:19,.0f}  {ratio:14.2f}")


def check(folder: Path, batch: int = 2) -> None:
    """Assert that the implementations generate the same tokens."""
    actual, expected = (build(folder)(batch) for build in PEERS.values())
    # float32 rounding may break a near-tie either way, after which all tokens may differ.
    differs = np.asarray(actual) != np.asarray(expected)
    prefix_lengths = np.where(differs.any(axis=1), differs.argmax(axis=1), NEW).tolist()
    print(f"equal tokens before the first difference, of {NEW}: {prefix_lengths}")
    assert actual == expected


def main() -> None:
    """Parse the flags and run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", default="1,8", help="batch sizes, separated by commas")
    parser.add_argument("--layers", type=int, default=12, help="number of layers of the model")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each implementation")
    parser.add_argument("--check", action="store_true", help="compare tokens instead of times")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="a GPT-2 checkpoint to use instead of a random one")
    flags = parser.parse_args()
    batches = [int(n) for n in flags.batches.split(",")]
    if flags.measure:
        measure(flags.measure, flags.folder, batches[0])
        return
    print(environment("jax", "torch", "transformers"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = flags.folder or Path(scratch)
        if flags.folder is None:
            checkpoint(folder, flags.layers)
        if flags.check:
            check(folder)
            print("the implementations agree")
            return
        peers = available({name: partial(build, folder) for name, build in PEERS.items()})
        for batch in batches:
            seconds = alternate({n: partial(g, batch) for n, g in peers.items()}, flags.rounds, 1, warmup=1)
            print(f"\nbatch {batch}, {PROMPT} prompt tokens, {NEW} new tokens")
            print(table(seconds, batch * NEW, "tokens"))
        for batch in batches:
            print(f"\nmemory, batch {batch}", end="")
            memory(folder, batch)


if __name__ == "__main__":
    main()
