"""Take the training step of `train_step.py` apart: attnlab's parts beside torch's.

    python benchmarks/step_parts.py
    python benchmarks/step_parts.py --rounds 3

Each part is timed alone, with its backward pass where the name says so. The matrix products are
those of the whole step, by XLA and by torch, so their ratio is not attnlab's. The parts of a step
do not add up to it: a compiler merges operations across them.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from timing import alternate, environment, table
from train_step import (
    Shape,
    attnlab_batch,
    attnlab_session,
    attnlab_step,
    random_batch,
    torch_loss,
    torch_model,
    torch_step,
)

Part = Callable[[], object]


def product_shapes(shape: Shape) -> list[tuple[int, int, int, int]]:
    """Return (rows, inputs, outputs, count) of the products of a forward pass."""
    rows, E = shape.batch * shape.length, shape.width
    of_layer = [(E, 3 * E), (E, E), (E, 4 * E), (4 * E, E)]
    return [*((rows, *sizes, shape.layers) for sizes in of_layer), (rows, E, shape.vocab, 1)]


def attnlab_parts(shape: Shape) -> dict[str, Part]:
    """Return the parts of attnlab's step, by name."""
    from attnlab.attention import attend, causal

    session = attnlab_session(shape)
    state = session.new_state()
    tokens, targets = random_batch(shape)
    batch = session.to_devices(attnlab_batch(tokens, targets))

    def loss(params):
        terms = session.model.apply(
            {"params": params},
            targets=batch.targets,
            **batch.inputs,
            deterministic=True,
            method="loss_terms",
        )
        return session.experiment.loss(terms, batch.weights)

    def on_mesh(function):
        def call():
            with session.use_mesh():
                return function(state.params)

        return call

    def products(*arrays):
        return [(x @ w, dy @ w.T, x.T @ dy) for x, w, dy in arrays]

    def attention(q, k, v):
        return attend(q, k, v, mask=causal()).sum()

    heads = shape.batch, shape.length, shape.heads, shape.width // shape.heads
    qkv = [jax.random.normal(key, heads) for key in jax.random.split(jax.random.key(0), 3)]
    arrays = [(jnp.ones((n, i)), jnp.ones((i, o)), jnp.ones((n, o))) for n, i, o, _ in product_shapes(shape)]
    one_layer, logits = jax.jit(products), jax.jit(products)
    gradient = jax.jit(jax.grad(attention, (0, 1, 2)))
    whole = attnlab_step(shape)
    return {
        "products": lambda: [one_layer(*arrays[:-1]) for _ in range(shape.layers)] + logits(arrays[-1]),
        "attention": lambda: [gradient(*qkv) for _ in range(shape.layers)],
        "forward": on_mesh(jax.jit(loss)),
        "forward and backward": on_mesh(jax.jit(jax.grad(loss))),
        "step": lambda: whole.step(tokens, targets),
    }


def torch_parts(shape: Shape) -> dict[str, Part]:
    """Return the same parts of torch's step."""
    import torch

    model = torch_model(shape)
    tokens, targets = random_batch(shape)
    ids, labels = torch.from_numpy(tokens), torch.from_numpy(targets)
    arrays = [(torch.ones(n, i), torch.ones(i, o), torch.ones(n, o)) for n, i, o, _ in product_shapes(shape)]
    heads = shape.batch, shape.heads, shape.length, shape.width // shape.heads
    qkv = [torch.randn(heads, requires_grad=True) for _ in range(3)]

    def products():
        with torch.no_grad():
            for (x, w, dy), (*_, count) in zip(arrays, product_shapes(shape), strict=True):
                for _ in range(count):
                    result = x @ w, dy @ w.T, x.T @ dy
        return result[0].numpy()

    def attention():
        for _ in range(shape.layers):
            out = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
            torch.autograd.grad(out.sum(), qkv)

    def forward():
        with torch.no_grad():
            return torch_loss(model, ids, labels).numpy()

    def gradient():
        model.zero_grad(set_to_none=True)
        torch_loss(model, ids, labels).backward()

    whole = torch_step(shape, compiled=False)
    return {
        "products": products,
        "attention": attention,
        "forward": forward,
        "forward and backward": gradient,
        "step": lambda: whole.step(tokens, targets).numpy(),
    }


def main() -> None:
    """Time the parts in alternation, and print a table for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="timings of each part")
    parser.add_argument("--steps", type=int, default=3, help="repetitions per timing")
    options = parser.parse_args()
    shape = Shape()
    parts = {"attnlab": attnlab_parts(shape), "torch": torch_parts(shape)}
    print(shape, environment("jax", "jaxlib", "torch"), sep="\n")
    rows = ["| part | attnlab, ms | torch, ms | torch / attnlab |", "| --- | --- | --- | --- |"]
    for name in parts["attnlab"]:
        pair = {peer: parts[peer][name] for peer in parts}
        seconds = alternate(pair, options.rounds, options.steps)
        print(f"\n{name}\n{table(seconds, shape.batch * shape.length, 'tokens')}")
        ours, theirs = (np.median(seconds[peer]) * 1e3 for peer in ("attnlab", "torch"))
        ratio = np.median(np.divide(seconds["torch"], seconds["attnlab"]))
        rows.append(f"| {name} | {ours:.0f} | {theirs:.0f} | {ratio:.2f} |")
    print("\n" + "\n".join(rows))


if __name__ == "__main__":
    main()
