"""The process that renders chat templates: started by `chat.py` as a script, without JAX.

Each line of stdin is a JSON object with the template and its values. Each line of stdout is an
object with the text, or with the reason why there is none.
"""

import contextlib
import datetime
import functools
import json
import sys

MIB = 1 << 20
MEMORY_BYTES = 512 * MIB  # address space of this process
CPU_SECONDS = 2  # of one rendering
TEXT_CHARACTERS = 16 * MIB


class Refusal(Exception):
    """The template called `raise_exception`."""


@functools.lru_cache(maxsize=8)
def compile_template(source):
    """Return the compiled template, in Jinja's sandbox with the functions of Hugging Face."""
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag {% generation %} around assistant turns, which training on chats uses."""

        tags = {"generation"}

        def parse(self, parser):
            """Parse the statements inside the tag."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message):
        raise Refusal(str(message))

    def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    environment.filters["tojson"] = to_json
    return environment.from_string(source)


def render(line):
    """Return the answer to the request in one line of stdin."""
    try:
        request = json.loads(line)
        text = compile_template(request["template"]).render(tools=None, documents=None, **request["values"])
        text.encode()
    except UnicodeEncodeError:
        return {"error": "its text has characters that are not Unicode"}
    except Refusal as refusal:
        return {"refused": " ".join(str(refusal).split())[:500]}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY_BYTES // MIB} MiB of memory", "restart": True}
    except RecursionError:
        return {"error": "it calls itself too often"}
    except Exception as error:
        return {"error": " ".join(f"{error}".split())[:500] or type(error).__name__}
    if len(text) > TEXT_CHARACTERS:
        return {"error": f"its text has more than {TEXT_CHARACTERS:,} characters", "restart": True}
    return {"text": text}


def limit(resource_type, value):
    """Lower the soft limit of a resource; it may be raised again."""
    import resource

    _, hard = resource.getrlimit(resource_type)
    soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS has no limit on the address space
        resource.setrlimit(resource_type, (soft, hard))


def main(folders):
    """Answer the requests of stdin until it is closed."""
    sys.path += folders
    import resource

    import jinja2.ext
    import jinja2.sandbox  # noqa: F401 - before the limits, and before the first request

    limit(resource.RLIMIT_AS, MEMORY_BYTES)
    limit(resource.RLIMIT_CORE, 0)
    print("{}", flush=True)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        # At the limit, the system ends this process.
        limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + CPU_SECONDS + 1)
        print(json.dumps(render(line)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
