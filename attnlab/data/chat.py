"""Chats as text, by the template that a checkpoint's tokenizer comes with."""

import datetime
import json
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from attnlab.errors import InputError


def render(template: str, **values: Any) -> str:
    """A chat template (Jinja, in the sandbox of that library) with its values put in.

    Raises:
      InputError: what the template says is wrong with its values.
    """

    def refuse(message: str):
        raise InputError(f"the chat template refuses this chat: {message}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    try:
        return environment.from_string(template).render(**values)
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template cannot be used: {error}") from error
