"""Tokens a second, and memory, of generating from one checkpoint: attnlab and transformers.

    python benchmarks/generate.py                        # batches of 1 and 8, 512 tokens in, 128 out, greedy
    python benchmarks/generate.py --rounds 3 --layers 4
    python benchmarks/generate.py --check                # do they generate the same?

The checkpoint is GPT-2's smallest, 124 million parameters in float32, with random weights made by
transformers. Time is from texts in to texts out. Memory is the most that a process of its own ever held,
with and without what it held when everything was imported and nothing loaded.
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
    """A model of GPT-2's shape, and a tokenizer whose words are the numbers of its tokens."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise Unavailable(f"the checkpoint cannot be made: {error}") from error
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(seed)
    config = transformers.GPT2Config(n_layer=layers)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    words = {str(i): i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def texts(batch: int) -> list[str]:
    """Random words, PROMPT of them in each text."""
    return [" ".join(map(str, row)) for row in np.random.default_rng(0).integers(0, 50_000, (batch, PROMPT))]


def attnlab(folder: Path) -> Generate:
    """This project's."""
    from attnlab import sharding
    from attnlab.generation import Generator, SamplingParams
    from attnlab.pretrained import load

    mesh = sharding.make_mesh(sharding.parse_mesh("single", 1))
    found = load(str(folder), mesh, unrolled=True)
    generator = Generator(found.model, found.params, found.tokenizer, PROMPT + NEW, mesh)

    def generate(batch: int) -> list[list[int]]:
        made = generator(texts(batch), max_new_tokens=NEW, sampling=SamplingParams(temperature=0.0))
        return [completion.tokens for completion in made]

    return generate


def hugging_face(folder: Path) -> Generate:
    """transformers on torch, compiled by nobody."""
    import torch
    import transformers

    torch.set_num_threads(_cores())
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    model.generation_config.eos_token_id = None

    def generate(batch: int) -> list[list[int]]:
        given = tokenizer(texts(batch), return_tensors="pt")
        with torch.no_grad():
            made = model.generate(given.input_ids, attention_mask=given.attention_mask, **options)[:, PROMPT:]
        tokenizer.batch_decode(made)
        return made.tolist()

    return generate


PEERS = {"attnlab": attnlab, "transformers": hugging_face}


def resident(most: bool = False) -> float:
    """MiB of this process: now, or the most it ever had.

    Not from `getrusage`, whose maximum a process inherits from the one that started it.
    """
    field = "VmHWM:" if most else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(name: str, folder: Path, batch: int) -> None:
    """Prints the memory of one peer, imported and at its most."""
    if name == "attnlab":
        import jax

        jax.config.update("jax_platforms", "cpu")  # libtpu takes memory even where there is no TPU
        import attnlab.generation
        import attnlab.pretrained  # noqa: F401

        jax.devices()
    else:
        import torch  # noqa: F401
        from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast  # noqa: F401
    imported = resident()
    PEERS[name](folder)(batch)
    print(json.dumps([imported, resident(most=True)]))


def memory(folder: Path, batch: int) -> None:
    """A table of the memory of each peer."""
    found = {}
    for name in PEERS:
        command = [sys.executable, __file__, "--measure", name, "--folder", str(folder)]
        command += ["--batches", str(batch)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    theirs_imported, theirs = found["transformers"]
    print("\npeer          MiB at most  of transformers'  over imports  of transformers'")
    for name, (imported, most) in found.items():
        over, other = most - imported, theirs - theirs_imported
        print(f"{name:12s}  {most:11,.0f}  {most / theirs:16.2f}  {over:12,.0f}  {over / other:16.2f}")


def check(folder: Path, batch: int = 2) -> None:
    """Holds the tokens of the peers against each other."""
    ours, theirs = (build(folder)(batch) for build in PEERS.values())
    # Within float32's rounding a tie may fall either way, and then the rest differs.
    unlike = np.asarray(ours) != np.asarray(theirs)
    same = np.where(unlike.any(axis=1), unlike.argmax(axis=1), NEW).tolist()
    print(f"tokens that agree from the first on, of {NEW}: {same}")
    assert ours == theirs


def main() -> None:
    """Reads the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", default="1,8", help="numbers of prompts, separated by commas")
    parser.add_argument("--layers", type=int, default=12, help="of the model")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each peer")
    parser.add_argument("--check", action="store_true", help="compare tokens and time nothing")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="a checkpoint of GPT-2's kind in place of a new one")
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
            print("the peers agree")
            return
        peers = available({name: partial(build, folder) for name, build in PEERS.items()})
        for batch in batches:
            seconds = alternate({n: partial(g, batch) for n, g in peers.items()}, flags.rounds, 1, warmup=1)
            print(f"\nbatch {batch}, {PROMPT} tokens in, {NEW} out")
            print(table(seconds, batch * NEW, "tokens"))
        for batch in batches:
            print(f"\nmemory, batch {batch}", end="")
            memory(folder, batch)


if __name__ == "__main__":
    main()
