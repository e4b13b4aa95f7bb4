"""Docstrings as the site shows them: ``:func:`name``` becomes code, with a link where the name has an entry."""

from __future__ import annotations

import re
from typing import Any

import griffe

SHADOWED = {
    f"wholegrad.{name}": f"wholegrad.{module}.{name}"
    for name, module in {
        "export": "export.network",
        "plan": "api",
        "predict": "predict",
        "segment": "segment",
        "verify": "verify",
    }.items()
}  # also modules
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites Sphinx's roles in every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda match: _link(match[1], obj), obj.docstring.value)


def _link(name: str, obj: griffe.Object) -> str:
    whole = name if name.startswith("wholegrad") else f"{obj.module.path}.{name}"
    return f'<autoref identifier="{SHADOWED.get(whole, whole)}" optional><code>{name}</code></autoref>'
