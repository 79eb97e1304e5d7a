"""Random values of the right type for the fields of a config, which need not fit together."""

import typing
from collections.abc import Iterator
from random import Random
from typing import Any, Literal

SIZES = (1, 2, 3, 4, 5, 7, 8, 16, 17, 24, 32, 0, -1)
NUMBERS = (0, 0.1, 0.5, 0.9, 1, 1.5, 2, 10, 1e-6, -1, 1000)
MAX_DEPTH = 8  # layers; more take long to compile


def override(rng: Random, config: Any) -> str:
    """Return `PATH=VALUE` for a random field of model, loss, optimizer, adapters or training."""
    parts = ("model.", "loss", "optimizer", "lora", "train")
    places = [(path, annotation) for path, annotation in _places(config) if path.startswith(parts)]
    while True:
        path, annotation = rng.choice(places)
        text = _value(rng, annotation)
        if text and not (path.endswith("depth") and int(text) > MAX_DEPTH):
            return f"{path}={text}"


def _places(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and the annotation of every field, also of configs in tuples."""
    from attnlab.config.types import fields_of, is_config

    for name, annotation in fields_of(type(node)).items():
        path, value = f"{prefix}{name}", getattr(node, name)
        yield path, annotation
        for index, part in enumerate(value if isinstance(value, tuple) else ()):
            if is_config(part):
                yield from _places(part, f"{path}.{index}.")
        if is_config(value):
            yield from _places(value, f"{path}.")


def _value(rng: Random, annotation: Any, depth: int = 0) -> str | None:
    """Return the text of a value; None if values of this type cannot be written."""
    from attnlab.config.types import choices, fields_of, is_tuple, members

    member = rng.choice(members(annotation))
    if typing.get_origin(member) is Literal:
        return repr(rng.choice(typing.get_args(member)))
    if is_tuple(member):
        kinds = typing.get_args(member)
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            kinds = kinds[:1] * rng.choice((0, 1, 1, 2, 3))
        parts = [_value(rng, kind, depth + 1) for kind in kinds]
        return None if None in parts else f"({', '.join(map(str, parts))}{',' * (len(parts) == 1)})"
    texts = {
        type(None): ("none",),
        bool: ("true", "false"),
        int: SIZES,
        float: NUMBERS,
        str: ("x", "kernel", "norm", ".*"),
    }
    if member in texts:
        return str(rng.choice(texts[member]))
    if not (classes := choices(member)):
        return None
    name = rng.choice(sorted(classes))
    annotations = fields_of(classes[name]) if depth < 2 else {}
    chosen = rng.sample(sorted(annotations), min(len(annotations), rng.choice((0, 1, 1, 2))))
    values = {field: _value(rng, annotations[field], depth + 1) for field in chosen}
    arguments = ", ".join(f"{field}={text}" for field, text in values.items() if text is not None)
    return f"{name}({arguments})" if arguments else name
