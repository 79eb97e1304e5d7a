"""The command line: parse flags, call the runner, and report each user error in one line."""

import importlib
import os
import re
import sys
from collections.abc import Sequence

from absl import app, flags

import attnlab.runner.flags  # noqa: F401 - defines the flags
from attnlab import config as configs
from attnlab.config.tree import Override
from attnlab.config.types import did_you_mean
from attnlab.errors import InputError
from attnlab.provenance import version_line
from attnlab.runner import sweep
from attnlab.runner.command import invocation
from attnlab.runner.request import FLAG_MODES, MODES, build_requests

EXIT_DIVERGED, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 2, 130, 141
HELP = ("--help", "-help", "-h", "--helpshort", "-helpshort")
VERSION = ("--version", "-version")
MODE_HELP = {
    "train": "train a new run, or resume the run in --workdir",
    "eval": "evaluate a trained run on its validation data",
    "sample": "generate from a trained run",
    "import": "create a run from a Hugging Face checkpoint: --checkpoint=DIR or org/model",
    "export": "write a run as a Hugging Face checkpoint to --output_dir",
    "describe": "show the config, the model and its sharding without running it",
}
EXAMPLES = (
    ("train", "--config=experiments/lm_docs.py --config.model.depth=12 --workdir=runs/deep"),
    ("resume it with more steps", "--workdir=runs/deep --config.train.steps=20000"),
    ("sample from it", "--mode=sample --workdir=runs/deep --prompt='Once' --temperature=0.8"),
    ("compare two learning rates", "--sweep=config.optimizer.learning_rate=1e-3,3e-4"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Any user error prints one line on stderr and returns 2. A loss that is not finite prints one
    line and returns 1. All other exceptions propagate with their traceback.
    """
    try:
        try:
            app.run(_main, argv=list(sys.argv if argv is None else argv), flags_parser=_parse)
        finally:
            sys.stdout.flush()
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except flags.Error as error:
        return _fail(_flag_error(error), EXIT_BAD_INPUT)
    except InputError as error:
        return _fail(f"error: {error}", EXIT_BAD_INPUT)
    except FloatingPointError as error:
        return _fail(f"error: {error}", EXIT_DIVERGED)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader closed the pipe, as in `| head`. Python would report an error when it flushes
        # stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    raise AssertionError("app.run returned")


def _fail(message: str, code: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return code


def _flag_error(error: flags.Error) -> str:
    if isinstance(error, flags.UnrecognizedFlagError):
        return f"error: unknown flag --{error.flagname}{did_you_mean(error.flagname, FLAG_MODES)}"
    message = re.sub(r"invalid literal for int\(\).*", "expected an integer", str(error))
    return "error: " + re.sub(r"could not convert string to float.*", "expected a number", message)


def _parse(argv: Sequence[str]) -> list[Override]:
    """Parse the flags into absl's FLAGS and return the config overrides."""
    arguments = flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)
    before_dashes = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for argument in before_dashes[1:]:
        if argument in HELP:
            print(help_text(invocation(argv[0])))
            sys.exit(0)
        if argument in VERSION:
            print(version_line())
            sys.exit(0)
    overrides, rest = take_overrides(arguments)
    flags.FLAGS.unparse_flags()
    positional = flags.FLAGS(rest)[1:]
    if positional:
        raise InputError(f"unexpected argument {positional[0]!r}; arguments are flags, --name=value")
    return overrides


def take_overrides(argv: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Split `--config.path=text` and `--config.path text` from the other arguments, in order.

    Returns:
      The overrides as (path, text), and the remaining arguments.

    Raises:
      InputError: an override has no value.
    """
    overrides, rest = [], []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--":
            rest += [argument, *arguments]
            break
        match = re.fullmatch(r"--?config\.([^=]*)(?:=(.*))?", argument, re.DOTALL)
        if not match:
            rest.append(argument)
            continue
        path, text = match.groups()
        if text is None:
            text = next(arguments, None)
            if text is None or text.startswith("--"):
                raise InputError(f"--config.{path} needs a value: --config.{path}=...")
        overrides.append((path, text))
    return overrides, rest


def _main(overrides: list[Override]) -> int:
    values = {name: flags.FLAGS[name].value for name in FLAG_MODES}
    present = {name for name in FLAG_MODES if flags.FLAGS[name].present}
    values |= {
        name: values[name] or [] for name in values if flags.FLAGS[name].flag_type().startswith("multi")
    }
    requests = build_requests(values, present, overrides)
    runner = importlib.import_module("attnlab.runner.modes")  # imports JAX, so only after validation
    if requests[0].swept:
        return sweep.run_all(requests, runner.run)
    runner.run(requests[0])
    return 0


def help_text(program: str = "attnlab") -> str:
    """Return the text of `--help`: modes, flags, experiments and example commands.

    Args:
        program: the command that starts attnlab in the examples, such as `python run.py`.
    """
    experiments = configs.available() or {"(none found)": ""}
    groups: dict[str, dict[str, str]] = {}
    for name, modes in FLAG_MODES.items():
        labels = modes if modes != MODES else ("every mode",)
        title = f"Flags of {labels[0] if len(labels) == 1 else 'several modes'}"
        suffix = f" [{', '.join(labels)}]" if len(labels) > 1 else ""
        groups.setdefault(title, {})[f"--{name}"] = _flag_help(name) + suffix
    every_mode = groups["Flags of every mode"]
    every_mode["--config.PATH"] = "a field of the config, such as --config.model.depth=12"
    every_mode["--help, --version"] = "print this help, or the versions of attnlab, JAX, Flax and Python"
    sections = {
        "Modes (--mode)": MODE_HELP,
        **groups,
        "Experiments (--config)": experiments,
        "Examples": {f"{purpose}:": f"{program} {command}" for purpose, command in EXAMPLES},
    }
    width = max(len(name) for rows in sections.values() for name in rows)
    lines = ["attnlab: a research library for the attention mechanism, in JAX and Flax."]
    for title, rows in sections.items():
        lines += ["", title, *(f"  {name:<{width}}  {text}".rstrip() for name, text in rows.items())]
    return "\n".join(lines)


def _flag_help(name: str) -> str:
    flag = flags.FLAGS[name]
    text = flag.help.partition(";\n")[0]  # absl adds a line to the help of multi-flags
    repeats = "; may repeat" if flag.flag_type().startswith("multi") else ""
    return text + repeats + (f" (default: {flag.default})" if flag.default not in (None, False, []) else "")
