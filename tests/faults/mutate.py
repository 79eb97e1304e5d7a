"""Random changes of values, JSON files and bytes."""

import json
import os
from pathlib import Path
from random import Random
from typing import Any

DIGITS, DEEP = "@digits@", "@deep@"  # replaced in the text, because json cannot write these values
ODD_TEXTS = (
    *(
        "",
        " ",
        "x",
        "5",
        "-1",
        "nan",
        "inf",
        "1e100",
        "None",
        "true",
        "[]",
        "{}",
        "()",
        "2.5",
        "a\nb",
        "../..",
    ),
    *("/", "/dev/null", "\u0663", "\u00b2", "\u2028", "\U0001f600", "\udcff", "'", '"', "%s", "{x}", "$HOME"),
    *("1e-400", "0x10", "1_0", "1" * 5000, "x" * 5000, "(" * 3000, "-" * 300, "a=b", ",", ":", "=", "*", "."),
)
ODD_NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    2.5,
    -0.0,
    1e-30,
    1e15,
    1e100,
    2**31,
    2**32,
    2**53,
    2**62,
    2**63,
    2**64,
    10**12,
)
ODD_VALUES = (
    *ODD_NUMBERS,
    *(None, True, False, float("nan"), float("inf"), [], {}, [1], [[1]], ["x"], {"a": 1}, {"a": {"b": []}}),
    *("", "x", "5", "2", "silu", "\udcff", "a\nb", "../x", "/etc/passwd", "x" * 5000, DIGITS, DEEP),
)


def odd_json(rng: Random, value: Any) -> str:
    """Return the JSON text of `value` with one to three places changed."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _change(rng, value)
    text = json.dumps(value)
    deep = rng.choice(("[", '{"a":')) * 100_000
    text = text.replace(json.dumps(DIGITS), "9" * 5000).replace(json.dumps(DEEP), deep)
    return text[: rng.randrange(len(text))] if rng.random() < 0.03 else text


def _change(rng: Random, value: Any) -> Any:
    """Return `value` with one place inside replaced, removed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        name = rng.choice(list(value))
        action = rng.random()
        if action < 0.12:
            return {k: v for k, v in value.items() if k != name}
        if action < 0.18:
            return value | {rng.choice(ODD_TEXTS): value[name]}
        return value | {name: _change(rng, value[name])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            return [*value[:at], *value[at + rng.choice((0, 1)) :], value[at]]
        return [*value[:at], _change(rng, value[at]), *value[at + 1 :]]
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.4:
        return rng.choice((str(value), -value, value * 2, value * 10**6, float(value), [value]))
    return rng.choice(ODD_VALUES)


def odd_bytes(rng: Random, data: bytes) -> bytes:
    """Return `data` with a flipped bit, a cut, a hole or something put in."""
    at = rng.randrange(len(data)) if data else 0
    action = rng.randrange(8)
    if action <= 2:
        return flip(data, at, rng.randrange(8)) if data else b"\0"
    if action == 3:
        return data[:at]
    if action == 4:
        return data[:at] + rng.randbytes(rng.choice((1, 8, 1000))) + data[at:]
    if action == 5:
        return data[:at] + bytes(min(len(data) - at, 64)) + data[at + 64 :]
    if action == 6:
        return data[:at] + rng.randbytes(4) + data[at + 4 :]
    return rng.choice(
        (b"", b"\0" * 100, b"\xff" * 100, b"{}", b"[]", b"null", b"[" * 100_000, rng.randbytes(5000))
    )


def flip(data: bytes, byte: int, bit: int) -> bytes:
    """Return `data` with one bit flipped."""
    return data[:byte] + bytes([data[byte] ^ (1 << bit)]) + data[byte + 1 :]


def replace_file(rng: Random, file: Path) -> str:
    """Replace a file by something else, and return its name."""
    file.unlink(missing_ok=True)
    kind = rng.choice(("nothing", "a folder", "a FIFO", "/dev/zero", "/dev/full", "a loop", "no permission"))
    if kind == "a folder":
        file.mkdir(parents=True)
    elif kind == "a FIFO":
        os.mkfifo(file)
    elif kind.startswith("/dev"):
        file.symlink_to(kind)
    elif kind == "a loop":
        file.symlink_to(file.name)
    elif kind == "no permission":
        file.write_bytes(b"{}")
        file.chmod(0)
    return kind
