"""Benchmark one training step of a GPT-2-shaped model against plain JAX and torch.

    python benchmarks/train_step.py           # all implementations, the default shape
    python benchmarks/train_step.py --peers attnlab,torch --rounds 3
    python benchmarks/train_step.py --check   # compare loss and gradients of JAX and torch

A step runs forward, backward, gradient clipping to global norm 1, and AdamW, in float32 without
dropout. The model has learned positions, biases, LayerNorm, an MLP of four times the width with
GELU (tanh), and tied embeddings. Each implementation is a function that builds
`step(tokens, targets) -> loss` for token ids (B, T).
"""

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import alternate, available, environment, table

OPTIMIZER = {"learning_rate": 3e-4, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
CLIP = 1.0
LAYER_NORM_EPSILON = 1e-5


@dataclass(frozen=True)
class Shape:
    """Shape of the model and its batch: B, T, E, L, H and V of the legend."""

    batch: int = 8
    length: int = 256
    width: int = 256
    layers: int = 6
    heads: int = 8
    vocab: int = 256


@dataclass(frozen=True)
class Peer:
    """A training step on NumPy token ids (B, T), and the number of parameters of its model."""

    step: Callable[[np.ndarray, np.ndarray], Any]
    parameters: int


# --- attnlab


def attnlab_session(shape: Shape, scan: bool = True):
    """Return a session of attnlab's decoder."""
    import types

    from attnlab import sharding
    from attnlab.data import Bytes, Text
    from attnlab.layers import AttentionConfig, LayerNormConfig, MLPConfig
    from attnlab.models import DecoderConfig, Learned
    from attnlab.train import AdamW, Constant, Experiment, Rule, Train
    from attnlab.train.session import Session

    experiment = Experiment(
        model=DecoderConfig(
            depth=shape.layers,
            width=shape.width,
            attention=AttentionConfig(heads=shape.heads, bias=True),
            feed_forward=MLPConfig(activation="gelu", bias=True),
            norm=LayerNormConfig(epsilon=LAYER_NORM_EPSILON),
            positions=Learned(shape.length),
            scan=scan,
        ),
        data=Text(tokenizer=Bytes(), sequence_length=shape.length, batch_size=shape.batch),
        optimizer=AdamW(
            learning_rate=OPTIMIZER["learning_rate"],
            b1=OPTIMIZER["b1"],
            b2=OPTIMIZER["b2"],
            epsilon=OPTIMIZER["eps"],
            weight_decay=OPTIMIZER["weight_decay"],
            schedule=Constant(),
            clip_norm=CLIP,
            rules=(Rule(""),),
        ),
        train=Train(),
    )
    vocabulary: Any = types.SimpleNamespace(vocab_size=shape.vocab)
    return Session(experiment, sharding.make_mesh(sharding.parse_mesh("single", 1)), vocabulary)


def attnlab_batch(tokens: np.ndarray, targets: np.ndarray):
    """Return a batch of token ids (B, T), each row one text."""
    from attnlab.data import Batch

    ones = np.ones(tokens.shape, np.int32)
    positions = ones * np.arange(tokens.shape[1], dtype=np.int32)
    tokens, targets = tokens.astype(np.int32), targets.astype(np.int32)
    return Batch(tokens, targets, ones.astype(np.float32), ones, positions, ones[:, 0].astype(np.float32))


def attnlab_step(shape: Shape, scan: bool = True) -> Peer:
    """Build the training step of attnlab's decoder."""
    session = attnlab_session(shape, scan)
    state = session.new_state()

    def step(tokens, targets):
        nonlocal state
        batch = session.to_devices(attnlab_batch(tokens, targets))
        state, metrics = session.train_step(state, batch)
        return metrics["loss"]

    return Peer(step, sum(leaf.size for leaf in jax.tree.leaves(state.params)))


# --- Plain JAX and Optax, without tuning


def bare_init(shape: Shape) -> dict:
    """Return nested dicts of parameters, with the names and (in, out) layout of GPT-2."""
    E = shape.width
    keys = iter(jax.random.split(jax.random.key(0), 2 + 4 * shape.layers))

    def normal(*size):
        return 0.02 * jax.random.normal(next(keys), size)

    def dense(inputs, outputs):
        return {"weight": normal(inputs, outputs), "bias": jnp.zeros(outputs)}

    def norm():
        return {"weight": jnp.ones(E), "bias": jnp.zeros(E)}

    def block():
        return {
            "ln_1": norm(),
            "attn": {"c_attn": dense(E, 3 * E), "c_proj": dense(E, E)},
            "ln_2": norm(),
            "mlp": {"c_fc": dense(E, 4 * E), "c_proj": dense(4 * E, E)},
        }

    return {
        "wte": {"weight": normal(shape.vocab, E)},
        "wpe": {"weight": normal(shape.length, E)},
        "h": [block() for _ in range(shape.layers)],
        "ln_f": norm(),
    }


def bare_loss(params: dict, tokens: jax.Array, targets: jax.Array, heads: int) -> jax.Array:
    """Return the mean cross-entropy in nats of token ids (B, T)."""

    def dense(p, x):
        return x @ p["weight"] + p["bias"]

    def norm(p, x):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON) * p["weight"] + p["bias"]

    def attention(p, x):
        q, k, v = (y.reshape(*y.shape[:2], heads, -1) for y in jnp.split(dense(p["c_attn"], x), 3, axis=-1))
        return dense(p["c_proj"], jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))

    def mlp(p, x):
        return dense(p["c_proj"], jax.nn.gelu(dense(p["c_fc"], x), approximate=True))

    x = params["wte"]["weight"][tokens] + params["wpe"]["weight"][: tokens.shape[1]]
    for block in params["h"]:
        x = x + attention(block["attn"], norm(block["ln_1"], x))
        x = x + mlp(block["mlp"], norm(block["ln_2"], x))
    logits = norm(params["ln_f"], x) @ params["wte"]["weight"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def bare_step(shape: Shape) -> Peer:
    """Build a step of `bare_loss` with `jax.jit`, donated state and Optax."""
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(**OPTIMIZER))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, moments, tokens, targets):
        loss, gradient = jax.value_and_grad(bare_loss)(params, tokens, targets, shape.heads)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    params = bare_init(shape)
    moments = optimizer.init(params)

    def step(tokens, targets):
        nonlocal params, moments
        params, moments, loss = update(params, moments, tokens, targets)
        return loss

    return Peer(step, sum(leaf.size for leaf in jax.tree.leaves(params)))


# --- torch


def torch_model(shape: Shape):
    """Return transformers' GPT-2 with the same shape, in training mode."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=shape.vocab,
        n_positions=shape.length,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        activation_function="gelu_pytorch_tanh",  # the default "gelu_new" is unfused
        layer_norm_epsilon=LAYER_NORM_EPSILON,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    return transformers.GPT2LMHeadModel(config).train()


def torch_loss(model, tokens, targets):
    """Return the loss of the model; with `shift_labels`, targets are already the next tokens."""
    return model(input_ids=tokens, labels=targets, shift_labels=targets).loss


def torch_step(shape: Shape, compiled: bool) -> Peer:
    """Build a step in eager torch or with `torch.compile`, with the fused AdamW."""
    import torch

    model = torch_model(shape)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(
        weights,
        lr=OPTIMIZER["learning_rate"],
        betas=(OPTIMIZER["b1"], OPTIMIZER["b2"]),
        eps=OPTIMIZER["eps"],
        weight_decay=OPTIMIZER["weight_decay"],
        fused=True,
    )
    forward = torch.compile(model) if compiled else model

    def step(tokens, targets):
        optimizer.zero_grad(set_to_none=True)
        loss = torch_loss(forward, torch.from_numpy(tokens), torch.from_numpy(targets))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        return loss.detach()

    return Peer(step, sum(weight.numel() for weight in weights))


# --- the comparison

PEERS: dict[str, Callable[[Shape], Peer]] = {
    "attnlab": attnlab_step,
    "attnlab without scan": functools.partial(attnlab_step, scan=False),
    "jax": bare_step,
    "torch": functools.partial(torch_step, compiled=False),
    "torch.compile": functools.partial(torch_step, compiled=True),
}


def random_batch(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Return random token ids and their next tokens, each (B, T)."""
    ids = np.random.default_rng(0).integers(shape.vocab, size=(shape.batch, shape.length + 1))
    return np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])


def check_same(shape: Shape, tolerance: float = 1e-4) -> None:
    """Assert that plain JAX with torch's weights has torch's loss and gradients.

    `tolerance` bounds the difference of the losses, and the difference of each gradient relative to
    its largest entry.
    """
    import torch

    model = torch_model(shape)
    tokens, targets = random_batch(shape)
    loss = torch_loss(model, torch.from_numpy(tokens), torch.from_numpy(targets))
    loss.backward()
    named = {name.removeprefix("transformer."): weight for name, weight in model.named_parameters()}

    def name_of(path):
        return ".".join(str(getattr(key, "key", getattr(key, "idx", None))) for key in path)

    params = jax.tree.map_with_path(
        lambda path, _: jnp.asarray(named[name_of(path)].detach().numpy()), bare_init(shape)
    )
    bare, gradients = jax.jit(jax.value_and_grad(bare_loss), static_argnums=3)(
        params, tokens, targets, shape.heads
    )
    print(f"loss: torch {loss.item():.6f}, jax {float(bare):.6f}")
    assert abs(float(bare) - loss.item()) < tolerance, "losses differ"

    worst = ("", 0.0)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        expected = named.pop(name_of(path)).grad.numpy()
        error = float(np.abs(np.asarray(gradient) - expected).max() / np.abs(expected).max())
        worst = max(worst, (name_of(path), error), key=lambda pair: pair[1])
    print(f"gradients: largest relative difference {worst[1]:.1e}, at {worst[0]}")
    assert worst[1] < tolerance, "gradients differ"
    assert not named, f"torch has weights that jax lacks: {sorted(named)}"


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="timings of each implementation")
    parser.add_argument("--steps", type=int, default=3, help="steps per timing")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"implementations, from {','.join(PEERS)}")
    parser.add_argument(
        "--check", action="store_true", help="compare loss and gradients of jax and torch instead of times"
    )
    for name, default in vars(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    options.peers = options.peers.split(",")
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"unknown implementations {', '.join(sorted(unknown))}; choose from {', '.join(PEERS)}")
    return options


def main() -> None:
    """Build the implementations, check that their sizes agree, time them and print a table."""
    options = arguments()
    shape = Shape(**{name: getattr(options, name) for name in vars(Shape())})
    print(shape)
    if options.check:
        return check_same(shape)

    peers = available({name: functools.partial(PEERS[name], shape) for name in options.peers})
    if not peers:
        raise SystemExit("no implementation can run here")
    sizes = {name: peer.parameters for name, peer in peers.items()}
    print("parameters:", ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
    assert max(sizes.values()) <= 1.01 * min(sizes.values()), "the implementations have different models"

    batch = random_batch(shape)
    steps = {name: functools.partial(peer.step, *batch) for name, peer in peers.items()}
    seconds = alternate(steps, options.rounds, options.steps)
    print(environment("jax", "jaxlib", "torch", "transformers") + torch_threads(peers))
    print(f"medians of {options.rounds} rounds of {options.steps} steps, {batch[0].size:,} tokens a step\n")
    print(table(seconds, batch[0].size, "tokens"))


def torch_threads(peers: dict[str, Peer]) -> str:
    """Return the number of threads of torch, if it is timed."""
    if not any(name.startswith("torch") for name in peers):
        return ""
    import torch

    return f", {torch.get_num_threads()} torch threads"


if __name__ == "__main__":
    main()
