"""Chat templates of checkpoints."""

import datetime
import json
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from attnlab.errors import InputError


class _Generation(Extension):
    """The tag {% generation %} around assistant turns, which only training on chats would use."""

    tags = {"generation"}

    def parse(self, parser):
        """Parse the statements inside the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(template: str, **values: Any) -> str:
    """Render a chat template in Jinja's sandbox, without tools and documents.

    Raises:
      InputError: the template refuses its values or cannot be rendered.
    """

    def refuse(message: str):
        raise InputError(f"the chat template refuses this chat: {message}")

    def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    environment.filters["tojson"] = to_json
    try:
        return environment.from_string(template).render(tools=None, documents=None, **values)
    except InputError:
        raise
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise InputError(f"the chat template cannot be used: {error}") from error
