"""Compile training steps of Llama models for TPU slices, and compare them with MaxText's programs.

    python benchmarks/compiled.py              # all works; writes docs/compiled.md
    python benchmarks/compiled.py --works A    # prints one work

Needs libtpu (extra `preflight`), but no TPU: the numbers are the compiler's. Cycles are its
estimates for each operation, times the trips of the loops around it. They contain neither Pallas
kernels nor waits for collectives, so they are not step times. A work takes minutes on two cores.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compiled.md"


class Work(NamedTuple):
    """A model on a slice of chips; `wrap` is whether the torus wraps around."""

    model: str
    topology: str
    chip: str
    wrap: bool
    mesh: str
    rows: int
    length: int


# A torus wraps around as in MaxText's table of slices.
WORKS = {
    "A": Work("8B", "v5:4x4x4", "megacore", True, "fsdp:64", 64, 8192),
    "B": Work("8B", "v5e:16x16", "default", True, "fsdp:256", 256, 8192),
    "C": Work("1B", "v5e:4x4", "default", False, "fsdp:16", 16, 4096),
    "tensor": Work("8B", "v5:4x4x4", "megacore", True, "fsdp:8,tensor:8", 8, 8192),
}
# Layers, width, heads, key heads, width of the feed-forward layers, vocabulary.
MODELS = {"8B": (32, 4096, 32, 8, 14_336, 128_256), "1B": (16, 2048, 16, 8, 8192, 32_768)}
# Of MaxText 0.2.5 with libtpu 0.0.52 for the same model, slice and rows.
MAXTEXT = {
    "A": {"cycles": 2_468_544_591, "peak": 9_197_812_480, "collective": 44_114_124_920},
    "B": {"cycles": 5_264_728_052, "peak": 6_883_676_672, "collective": 44_120_416_376},
    "C": {"cycles": 592_749_609, "peak": 2_038_025_728, "collective": 6_635_786_360},
    "tensor": {"cycles": 427_993_692, "peak": 3_182_419_200, "collective": 35_287_180_444},
}
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
TEXT = """# Compiled programs

A training step in bfloat16 with full remat, compiled for absent TPU slices: Llama 3.1 8B with rows
of 8,192 tokens and, in C, a model of 1.1B parameters with rows of 4,096.
`python benchmarks/compiled.py` writes this page. Cycles are the compiler's estimates without Pallas
kernels and without waits for collectives, so they are not step times. Collective bytes are the
sizes of the results on one device, times the trips of the loops.

{table}

MaxText is version 0.2.5, compiled with the same libtpu for the same slices and rows, in float32
with products in bfloat16, `remat_policy=full` and `attention=flash`; for `tensor` also with
`ici_tensor_parallelism=8` and `allow_split_physical_axes=True`.

In C and `tensor`, the compiler splits many of MaxText's products into windows and sends a part of
an operand while it multiplies another (collective-permutes). The estimated cycles contain the split
but not the wait that it saves. Without these windows (XLA's flag
`xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000`), `tensor` has 339 M cycles and 30,630 MB of
collectives in attnlab, and 343 M and 29,612 MB in MaxText.
"""


def step(work: str) -> None:
    """Compile a work; print its numbers as JSON."""
    from jax.experimental import topologies

    from attnlab import sharding
    from attnlab.data import Bytes, Text
    from attnlab.layers import AttentionConfig, GatedMLPConfig
    from attnlab.layers.linear import Dtypes
    from attnlab.models import DecoderConfig
    from attnlab.train import AdamW, Experiment
    from attnlab.train.session import Session

    name, topology, chip, wrap, mesh, rows, length = WORKS[work]
    devices = topologies.get_topology_desc(
        topology_name=topology,
        platform="tpu",
        chip_config_name=chip,
        chips_per_host_bounds=(2, 2, 1),
        num_slices=1,
        wrap=(wrap,) * 3,
    ).devices
    depth, width, heads, kv_heads, hidden, vocab_size = MODELS[name]
    model = DecoderConfig(
        depth=depth,
        width=width,
        vocab_size=vocab_size,
        tied=False,
        attention=AttentionConfig(heads=heads, kv_heads=kv_heads),
        feed_forward=GatedMLPConfig(width=hidden, activation="silu"),
        dtypes=Dtypes(compute="bfloat16"),
        remat="full",
    )
    data = Text(tokenizer=Bytes(), sequence_length=length, batch_size=rows)
    experiment = Experiment(model=model, data=data, optimizer=AdamW())
    sizes = sharding.parse_mesh(mesh, len(devices))
    session = Session(experiment, sharding.make_mesh(sizes, devices), Bytes().train([]))
    start = time.perf_counter()
    compiled = session.compile_train_step()
    memory = compiled.memory_analysis()
    seconds, peak = time.perf_counter() - start, memory.peak_memory_in_bytes
    result = {"seconds": seconds, "peak": peak, **executed(compiled.as_text())}
    print(json.dumps(result | {"temporary": memory.temp_size_in_bytes}))


def executed(text: str) -> dict[str, int]:
    """Return estimated cycles, and bytes of each collective, that a program executes."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    totals: Counter = Counter()

    def visit(name: str, times: int) -> None:
        channels = set()  # an asynchronous collective is in several fusions: its start, parts and end
        for line in computations.get(name, ()):
            if loop := re.search(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)", line):
                visit(loop[2], times * trips(computations[loop[1]], computations[loop[2]]))
                continue
            if branches := re.search(r" conditional\(.*branch_computations=\{([^}]*)\}", line):
                for branch in branches[1].split(","):
                    visit(branch.strip().lstrip("%"), times)
            elif call := re.search(r" call\(.*to_apply=%?([\w.-]+)", line):
                visit(call[1], times)
            if cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
                totals["cycles"] += times * int(cycles[1]) * (int(cycles[1]) < 2**62)  # else unknown
            fused = re.search(r" fusion\(.*calls=%?([\w.-]+)", line)
            for inner in (line, *(computations.get(fused[1], ()) if fused else ())):
                found = re.search(rf"= (.*?) ({COLLECTIVES})(?:-done)?\(", inner)
                channel = re.search(r"channel_id=\d+|-done\(.*?\)", inner)
                if found and channel and channel[0] not in channels:
                    channels.add(channel[0])
                    totals[found[2]] += times * result_bytes(found[1])

    visit(entry, 1)
    return dict(totals) | {"collective": sum(totals[name] for name in COLLECTIVES.split("|"))}


def trips(condition: list[str], body: list[str]) -> int:
    """Return how often a loop runs that counts from 0 to a constant in constant steps."""
    head, text = "\n".join(condition), "\n".join(body)
    constants = re.findall(r"%([\w.-]+) = .* constant\((\d+)\)", f"{head}\n{text}")
    values = {name: int(value) for name, value in constants}
    counter, limit = re.search(r"ROOT .* compare\(%([\w.-]+), %([\w.-]+)\)", head).groups()
    index = int(re.search(rf"%{re.escape(counter)} = .*index=(\d+)", head)[1])
    carry = re.findall(r"%([\w.-]+)", re.search(r"ROOT .* tuple\((.*?)\)", text)[1])
    terms = re.search(rf"%{re.escape(carry[index])} = .* add\(%([\w.-]+), %([\w.-]+)\)", text).groups()
    (step,) = (values[name] for name in terms if name in values)
    return math.ceil(values[limit] / step)


def result_bytes(shapes: str) -> int:
    """Return the bytes of the arrays of a collective's result."""
    total = 0
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
        total += SIZES.get(dtype, 0) * math.prod(map(int, filter(None, dims.split(","))))
    return total


def compile_work(work: str) -> dict[str, float]:
    """Compile a work in a process of its own, since libtpu takes a lock."""
    variables = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--step", work],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def table(results: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table of the works, with MaxText's numbers and the ratios."""
    rows = ["| work | number | attnlab | MaxText | ratio |", "| --- | --- | --- | --- | --- |"]
    for work, result in results.items():
        topology, mesh = WORKS[work].topology, WORKS[work].mesh
        numbers = {"cycles": "estimated cycles", "peak": "peak bytes", "collective": "collective bytes"}
        for key, label in numbers.items():
            peer = MAXTEXT.get(work, {}).get(key)
            ratio = f"{result[key] / peer:.3f}" if peer else "–"
            peer_text = f"{peer:,}" if peer else "–"
            rows.append(
                f"| {work}: {topology}, {mesh} | {label} | {result[key]:,.0f} | {peer_text} | {ratio} |"
            )
        for name in COLLECTIVES.split("|"):
            if result.get(name):
                rows.append(f"| {work} | {name} bytes | {result[name]:,.0f} | | |")
        rows.append(f"| {work} | temporary bytes | {result['temporary']:,.0f} | | |")
    return "\n".join(rows)


def main() -> None:
    """Compile the works; write the page if all were compiled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--works", default=",".join(WORKS), help="works, separated by commas")
    parser.add_argument("--step", choices=WORKS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        step(args.step)
        return
    works = args.works.split(",")
    if unknown := set(works) - set(WORKS):
        parser.error(f"unknown works: {', '.join(sorted(unknown))}; there are {', '.join(WORKS)}")
    results = {work: compile_work(work) for work in works}
    print(table(results))
    if set(works) == set(WORKS):
        PAGE.write_text(TEXT.format(table=table(results)))


if __name__ == "__main__":
    main()
