"""Milliseconds of causal attention, forward, and forward and backward, against its peers.

    python benchmarks/attention.py                       # all peers, three shapes, float32
    python benchmarks/attention.py --lengths 4096 --rounds 3
    python benchmarks/attention.py --skipping            # what masks save: blockwise against itself
    python benchmarks/attention.py --check               # do the peers compute the same thing?

8 heads of 32; batch and length (8, 256), (2, 1024), (1, 4096). The backward pass is that of the sum of
squares of the output. Every peer gets its arrays laid out as it likes them best.
"""

import argparse
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from timing import Unavailable, alternate, available, environment, table

SHAPES = {256: 8, 1024: 2, 4096: 1}
HEADS, WIDTH = 8, 32


def arrays(batch: int, length: int) -> list[np.ndarray]:
    """Query, key and value, (B, T, H, D)."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=(batch, length, HEADS, WIDTH)).astype(np.float32) for _ in range(3)]


def of_jax(function: Callable, inputs, backward: bool) -> Callable:
    """A step that runs `function(query, key, value)`, or its gradients, compiled."""
    if backward:
        run = jax.jit(jax.grad(lambda *x: jnp.sum(function(*x) ** 2), (0, 1, 2)))
    else:
        run = jax.jit(function)
    return partial(run, *map(jnp.asarray, inputs))


def attnlab(inputs, backward: bool, mask="causal") -> Callable:
    """`attend` as it chooses for itself."""
    from attnlab.attention import attend, causal

    mask = causal() if mask == "causal" else mask
    return of_jax(lambda q, k, v: attend(q, k, v, mask=mask), inputs, backward)


def jax_nn(inputs, backward: bool) -> Callable:
    """The attention that JAX has."""
    return of_jax(partial(jax.nn.dot_product_attention, is_causal=True), inputs, backward)


def torch_sdpa(inputs, backward: bool) -> Callable:
    """torch's fused attention for CPUs."""
    try:
        import torch
    except ImportError as error:
        raise Unavailable("torch is not installed") from error

    from timing import _cores

    torch.set_num_threads(_cores())
    attention = torch.nn.functional.scaled_dot_product_attention
    tensors = [torch.from_numpy(x).transpose(1, 2).contiguous().requires_grad_(backward) for x in inputs]

    def step():
        if not backward:
            with torch.no_grad():
                return attention(*tensors, is_causal=True)
        loss = (attention(*tensors, is_causal=True) ** 2).sum()
        return torch.autograd.grad(loss, tensors)

    return step


PEERS = {"attnlab": attnlab, "jax.nn": jax_nn, "torch": torch_sdpa}


def compare(lengths: list[int], names: list[str], rounds: int) -> None:
    """A table for each shape and direction."""
    for length in lengths:
        inputs = arrays(SHAPES.get(length, 1), length)
        for backward in (False, True):
            peers = available({name: partial(PEERS[name], inputs, backward) for name in names})
            steps = max(1, 1024 // length)
            seconds = alternate(peers, rounds, steps)
            what = "forward and backward" if backward else "forward"
            print(f"\nbatch {len(inputs[0])}, length {length}, {what}")
            print(table(seconds, inputs[0].shape[0] * length, "tokens"))


def skipping(rounds: int, length: int = 4096) -> None:
    """What a mask saves, in time and in blocks visited."""
    from attnlab.attention import causal, segments, window
    from attnlab.attention.backends.blockwise import default_block_sizes
    from attnlab.attention.block_mask import make_block_mask
    from attnlab.attention.masks.base import BlockGrid

    documents = segments(jnp.arange(length)[None] // (length // 8) + 1)
    masks = {
        "full": None,
        "causal": causal(),
        "window of 512": causal() & window(511),
        "8 documents": causal() & documents,
    }
    inputs = arrays(1, length)
    for backward in (False, True):
        steps = {name: attnlab(inputs, backward, mask) for name, mask in masks.items()}
        print(f"\nlength {length}, {'forward and backward' if backward else 'forward'}")
        print(table(alternate(steps, rounds, 1), length, "tokens"))
    grid = BlockGrid(length, length, *default_block_sizes(length, length))
    for name, mask in masks.items():
        block_mask, _ = make_block_mask(mask, grid)
        visited, full = block_mask.kv_num_blocks.sum(), block_mask.full_kv_num_blocks.sum()
        print(f"{name}: {visited} of {block_mask.kv_indices.size} blocks visited, {full} full")


def check() -> None:
    """Holds every peer against the others."""
    inputs = arrays(2, 256)
    for backward in (False, True):
        results = {}
        for name, build in available({n: partial(p, inputs, backward) for n, p in PEERS.items()}).items():
            result = build()
            parts = result if backward else [result]
            parts = [np.asarray(x.detach() if hasattr(x, "detach") else x) for x in parts]
            results[name] = [x.transpose(0, 2, 1, 3) if name == "torch" else x for x in parts]
        for name, parts in results.items():
            for ours, theirs in zip(parts, results["jax.nn"], strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4, err_msg=name)
    print("the peers agree")


def main() -> None:
    """Reads the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", default=",".join(PEERS), help="which, separated by commas")
    parser.add_argument("--lengths", default=",".join(map(str, SHAPES)), help="which, separated by commas")
    parser.add_argument("--rounds", type=int, default=7, help="timings of each peer")
    parser.add_argument("--skipping", action="store_true", help="compare masks instead of peers")
    parser.add_argument("--check", action="store_true", help="compare results and time nothing")
    flags = parser.parse_args()
    print(environment("jax", "torch"))
    if flags.check:
        check()
    elif flags.skipping:
        skipping(flags.rounds)
    else:
        compare([int(n) for n in flags.lengths.split(",")], flags.peers.split(","), flags.rounds)


if __name__ == "__main__":
    main()
