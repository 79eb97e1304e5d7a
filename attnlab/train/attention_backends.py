"""The attention backend of each layer of an experiment, with the reasons against faster ones."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from attnlab.attention.backends.registry import (
    BACKENDS,
    PLAIN_JAX,
    Selection,
    exclude_backends,
    only_shapes,
    record_selections,
)
from attnlab.config import render
from attnlab.sharding import mesh_device
from attnlab.train.session import Session
from attnlab.train.step import make_train_step

# Beginnings of refusals that say nothing about the layer.
OBVIOUS = ("the length is not sharded", "the length is sharded over ", "it requires a ")


@dataclass(frozen=True)
class LayerBackend:
    """The backend of the layers that share an attention module class, a spec and shapes.

    Attributes:
      layer: path of the first of these modules in the model, such as "decoder/attention".
      spec: the layer spec as text; empty for a module without one.
      selection: the backend, and why it is not another one.
    """

    layer: str
    spec: str
    selection: Selection

    @property
    def is_slow(self) -> bool:
        """Whether an accelerator runs plain JAX here, not a kernel."""
        name = self.selection.kernel or self.selection.backend
        return self.selection.platform != "cpu" and name in PLAIN_JAX

    @property
    def refusals(self) -> list[str]:
        """Why "auto" did not select each backend before this one, one line each.

        If it runs another backend on parts of the arrays, also why it does not run those before.
        """
        names, selection = [backend.name for backend in BACKENDS], self.selection
        index = names.index(selection.backend)
        before = names[:index]
        if selection.kernel:
            others = BACKENDS[index + 1 : names.index(selection.kernel)]
            before += [other.name for other in others if not hasattr(other, "local_kernel")]
        reasons = [(name, selection.refusals[name]) for name in before if name in selection.refusals]
        return [
            f"not {name}: {reason}"
            for name, reason in reasons
            if name not in PLAIN_JAX and not reason.startswith(OBVIOUS)
        ]


def layer_backends(session: Session) -> list[LayerBackend]:
    """Return the backend of each attention layer in a training step of the session.

    The step is only traced, so the devices of the mesh need not be available.
    """
    modules: list[nn.Module] = []
    layers: dict[Any, LayerBackend] = {}

    def intercept(call, args, kwargs, context):
        modules.append(context.module)
        try:
            return call(*args, **kwargs)
        finally:
            modules.pop()

    def record(selection: Selection):
        module = modules[-1] if modules else None
        spec = getattr(module, "spec", None)
        layer = LayerBackend("/".join(module.path if module else ()), render(spec) if spec else "", selection)
        key = type(module), layer.layer.split("/")[0], layer.spec, selection.query, selection.keys
        layers.setdefault(key, layer)

    step = make_train_step(session.model, session.experiment, session.optimizer)
    state, batch = session.abstract_state, session.abstract_batch
    contexts = (
        session.use_mesh(),
        only_shapes(),
        exclude_backends(**session.fallback.refused),
        record_selections(record),
        nn.intercept_methods(intercept),
    )
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        jax.eval_shape(step, state, batch)
    return list(layers.values())


def warn_of_slow_paths(session: Session, log: Callable[[str], None] = print) -> None:
    """Log a line for each layer spec that runs plain JAX on an accelerator, with the reasons."""
    if mesh_device(session.mesh).platform == "cpu":
        return
    for layer in filter(lambda layer: layer.is_slow, layer_backends(session)):
        platform, backend = layer.selection.platform.upper(), layer.selection.backend
        name = " ".join(filter(None, (layer.layer, layer.spec)))
        log(f"warning: {name}: {backend}, a slow path on a {platform}; {'; '.join(layer.refusals)}")
