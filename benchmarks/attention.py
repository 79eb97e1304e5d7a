"""Benchmark causal attention, forward and forward plus backward, against other libraries.

    python benchmarks/attention.py                  # all implementations, three shapes, float32
    python benchmarks/attention.py --lengths 4096 --rounds 3
    python benchmarks/attention.py --skipping       # time saved by masks with the blockwise backend
    python benchmarks/attention.py --check          # compare the results of the implementations

Arrays have 8 heads of width 32 and (batch, length) of (8, 256), (2, 1024) and (1, 4096). The loss
of the backward pass is the sum of squares of the output. Each implementation receives its arrays in
its preferred layout.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from timing import Unavailable, alternate, available, environment, table

SHAPES = {256: 8, 1024: 2, 4096: 1}
HEADS, WIDTH = 8, 32


def arrays(batch: int, length: int) -> list[np.ndarray]:
    """Return random query, key and value arrays, each (B, T, H, D)."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=(batch, length, HEADS, WIDTH)).astype(np.float32) for _ in range(3)]


def jit_step(function: Callable, inputs, backward: bool) -> Callable:
    """Return a compiled step of `function(query, key, value)`, or of its gradients."""
    if backward:
        run = jax.jit(jax.grad(lambda *x: jnp.sum(function(*x) ** 2), (0, 1, 2)))
    else:
        run = jax.jit(function)
    return partial(run, *map(jnp.asarray, inputs))


def attnlab(inputs, backward: bool, mask="causal") -> Callable:
    """Return a step of `attend` with its default backend."""
    from attnlab.attention import attend, causal

    mask = causal() if mask == "causal" else mask
    return jit_step(lambda q, k, v: attend(q, k, v, mask=mask), inputs, backward)


def jax_nn(inputs, backward: bool) -> Callable:
    """Return a step of `jax.nn.dot_product_attention`."""
    return jit_step(partial(jax.nn.dot_product_attention, is_causal=True), inputs, backward)


def torch_sdpa(inputs, backward: bool) -> Callable:
    """Return a step of torch's fused attention for CPUs."""
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
    """Print a table for each shape and direction."""
    for length in lengths:
        inputs = arrays(SHAPES.get(length, 1), length)
        for backward in (False, True):
            peers = available({name: partial(PEERS[name], inputs, backward) for name in names})
            steps = max(1, 1024 // length)
            seconds = alternate(peers, rounds, steps)
            passes = "forward and backward" if backward else "forward"
            print(f"\nbatch {len(inputs[0])}, length {length}, {passes}")
            print(table(seconds, inputs[0].shape[0] * length, "tokens"))


def packed_rows(rows: int, length: int, documents: int) -> jax.Array:
    """Return segment ids of rows that each hold documents of other lengths, (rows, length)."""
    rng = np.random.default_rng(0)
    starts = [np.sort(rng.choice(np.arange(1, length), documents - 1, replace=False)) for _ in range(rows)]
    ids = [np.searchsorted(x, np.arange(length), side="right") + 1 for x in starts]
    return jnp.asarray(np.array(ids), jnp.int32)


def compare_masks(rounds: int, length: int = 4096) -> None:
    """Print the time and the number of visited blocks of several masks, for 1 row and for 8."""
    from attnlab.attention import causal, segments, window

    documents = segments(jnp.arange(length)[None] // (length // 8) + 1)
    masks = {
        "full": None,
        "causal": causal(),
        "window of 512": causal() & window(511),
        "8 documents": causal() & documents,
    }
    _compare_masks(1, length, masks, rounds)
    packed = causal() & segments(packed_rows(8, length, 16))
    _compare_masks(8, length, {"causal": causal(), "16 documents in each row": packed}, rounds)


def _compare_masks(rows: int, length: int, masks: dict, rounds: int) -> None:
    from attnlab.attention.block_mask import default_block_sizes, make_block_mask
    from attnlab.attention.masks.base import BlockGrid

    inputs = arrays(rows, length)
    for backward in (False, True):
        steps = {name: attnlab(inputs, backward, mask) for name, mask in masks.items()}
        print(f"\nbatch {rows}, length {length}, {'forward and backward' if backward else 'forward'}")
        print(table(alternate(steps, rounds, 1), rows * length, "tokens"))
    for name, mask in masks.items():
        grid = BlockGrid(length, length, *default_block_sizes(length, length, mask), rows, HEADS)
        made = make_block_mask(mask, grid)
        lists = made.kv_num_blocks.shape[0]
        visited, full = made.num_visits, made.full_kv_num_blocks.sum()
        count = lists * math.prod(grid.num_blocks)
        print(f"{name}: {visited} of {count} blocks visited, {full} full; {lists} of {rows} rows are listed")


def check() -> None:
    """Assert that all implementations compute the same outputs and gradients."""
    inputs = arrays(2, 256)
    for backward in (False, True):
        results = {}
        for name, build in available({n: partial(p, inputs, backward) for n, p in PEERS.items()}).items():
            result = build()
            parts = result if backward else [result]
            parts = [np.asarray(x.detach() if hasattr(x, "detach") else x) for x in parts]
            results[name] = [x.transpose(0, 2, 1, 3) if name == "torch" else x for x in parts]
        for name, parts in results.items():
            for actual, expected in zip(parts, results["jax.nn"], strict=True):
                np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4, err_msg=name)
    print("the implementations agree")


def main() -> None:
    """Parse the flags and run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", default=",".join(PEERS), help="implementations, separated by commas")
    parser.add_argument(
        "--lengths", default=",".join(map(str, SHAPES)), help="sequence lengths, separated by commas"
    )
    parser.add_argument("--rounds", type=int, default=7, help="timings of each implementation")
    parser.add_argument("--skipping", action="store_true", help="compare masks instead of implementations")
    parser.add_argument("--check", action="store_true", help="compare results instead of times")
    flags = parser.parse_args()
    print(environment("jax", "torch"))
    if flags.check:
        check()
    elif flags.skipping:
        compare_masks(flags.rounds)
    else:
        compare([int(n) for n in flags.lengths.split(",")], flags.peers.split(","), flags.rounds)


if __name__ == "__main__":
    main()
