"""The command line: parse flags, call the runner, and report each user error in one line."""

import contextlib
import importlib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from absl import app, flags

import attnlab.runner.flags  # noqa: F401 - defines the flags
from attnlab import config as configs
from attnlab.config.tree import Override
from attnlab.config.types import did_you_mean
from attnlab.errors import InputError, StorageError
from attnlab.provenance import version_line
from attnlab.runner import sweep
from attnlab.runner.bug_report import report_bug
from attnlab.runner.command import invocation
from attnlab.runner.exit_codes import ClaimsFailed, ExitCode, Stopped, memory_exhausted
from attnlab.runner.request import FLAG_MODES, MODES, build_requests
from attnlab.signals import Terminated, raise_on_signal

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
    """Run the command line, as one process of a job if there is one, and return its exit code."""
    code = _run(argv)
    if code in (ExitCode.DONE, ExitCode.CLAIM_FAILED, ExitCode.PREEMPTED, ExitCode.INTERRUPTED):
        if job := _job():
            job.finish()
    else:
        _leave_job(code)
    return code


def _job() -> Any:
    """Return the module that connects this process to its job; None in a process alone."""
    job = sys.modules.get("attnlab.distributed.start")  # imports JAX
    return job if job is not None and job.in_job() else None


def _leave_job(code: int) -> None:
    """End this process if it is in a job whose other processes do not end together with it."""
    if job := _job():
        job.finish(f"it ended with exit code {code}")
        sys.stdout.flush()
        os._exit(code)  # a regular exit would wait for the other processes


def _run(argv: Sequence[str] | None) -> int:
    """Run the command line and return its exit code, an `ExitCode`.

    Any user error, failing storage and a loss that is not finite print one line on stderr. Any
    other exception is a bug: its traceback is written to a file, which one line names; with
    ATTNLAB_DEBUG=1 it propagates.
    """
    _print_any_text()
    if not os.environ.get("ATTNLAB_DEBUG"):
        threading.excepthook = _report_thread
    output = sys.stdout  # an experiment file may replace it, with None for example, or close it
    try:
        try:
            app.run(_main, argv=list(sys.argv if argv is None else argv), flags_parser=_parse)
        finally:
            output.flush()
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except flags.Error as error:
        return _fail(_flag_error(error), ExitCode.BAD_INPUT)
    except InputError as error:
        return _fail(f"error: {error}", ExitCode.BAD_INPUT)
    except (FloatingPointError, StorageError) as error:
        return _fail(f"error: {error}", ExitCode.FAILED)
    except ClaimsFailed as error:
        return _fail(str(error), ExitCode.CLAIM_FAILED)
    except Stopped as stopped:  # the run has printed how to resume it
        return stopped.code
    except KeyboardInterrupt:  # in this process alone
        code = _fail("interrupted", ExitCode.INTERRUPTED)
        _leave_job(code)
        return code
    except BrokenPipeError:
        # The reader closed the pipe, as in `| head`. Python would report an error when it flushes
        # stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.BROKEN_PIPE
    except BaseException as error:  # an experiment file may raise anything
        if os.environ.get("ATTNLAB_DEBUG"):
            raise
        if output.closed:
            return _fail("error: the experiment file closed the standard output", ExitCode.BAD_INPUT)
        if memory_exhausted(error):
            return _fail(f"error: does not fit into memory: {str(error)[:300]}", ExitCode.DOES_NOT_FIT)
        return _fail(report_bug(error), ExitCode.FAILED)
    raise AssertionError("app.run returned")


def _print_any_text() -> None:
    """Let stdout escape characters that it cannot encode, as in file names that are not UTF-8."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _fail(message: str, code: int) -> int:
    sys.stderr.write(" ".join(message.split()) + "\n")  # an experiment file may delete print
    return code


def _report_thread(failure: threading.ExceptHookArgs) -> None:
    """Report an exception that ended a thread in one line; the run goes on."""
    if failure.exc_value is not None and failure.exc_type is not SystemExit:
        _fail(report_bug(failure.exc_value), 0)


def _flag_error(error: flags.Error) -> str:
    if isinstance(error, flags.UnrecognizedFlagError):
        return f"error: unknown flag --{error.flagname}{did_you_mean(error.flagname, FLAG_MODES)}"
    integer = r"(invalid literal for int\(\)|Exceeds the limit).*"
    message = re.sub(integer, "expected an integer", str(error), flags=re.DOTALL)
    message = re.sub(r"could not convert string to float.*", "expected a number", message, flags=re.DOTALL)
    return "error: " + re.sub(r"=([^=]{60})[^=]+: expected", r"=\1...: expected", message)


def _parse(argv: Sequence[str]) -> list[Override]:
    """Parse the flags into absl's FLAGS and return the config overrides."""
    arguments = _with_flag_files(argv)
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


def _with_flag_files(argv: Sequence[str]) -> list[str]:
    """Return the arguments, each `--flagfile=FILE` replaced by the lines of its file."""
    warnings = io.StringIO()  # absl only warns of a file that includes itself
    try:
        with contextlib.redirect_stderr(warnings):
            arguments = flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)
    except (ValueError, RecursionError, flags.CantOpenFlagFileError) as error:
        reason = str(error).removeprefix("ERROR:: Unable to open flagfile: ")
        raise InputError(f"the --flagfile cannot be read: {reason}") from None
    if warnings.getvalue():
        raise InputError(f"the --flagfile includes itself: {warnings.getvalue().rpartition(': ')[2]}")
    return arguments


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
    try:
        # A run handles these signals while it trains and reports, where it has something to save.
        with raise_on_signal(signal.SIGTERM, signal.SIGUSR1):
            return _run_command(overrides)
    except Terminated as stopped:
        _leave_job(ExitCode.PREEMPTED)
        print(f"stopped by {stopped.name}; start again with the same command", flush=True)
        raise Stopped(stopped.name) from None


def _run_command(overrides: list[Override]) -> int:
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
    return ExitCode.DONE


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
