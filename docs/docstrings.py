"""Docstrings of the package as Markdown: reStructuredText marks that it uses become links."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth):`~?([\w.]+)`")
TABLE = re.compile(r"^(=+ =+(?: =+)*\n.*\n=+ =+(?: =+)*)$", re.MULTILINE | re.DOTALL)
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
BOX = re.compile(r"::$", re.MULTILINE)


class HouseStyle(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        text = BOX.sub(":", obj.docstring.value)
        text = ROLE.sub(r"`\1`", text)
        text = TABLE.sub(r"```text\n\1\n```", text)
        text = EXAMPLE.sub("Examples:", text)  # the heading under which blocks of code are known
        obj.docstring.value = re.sub(r"``([^`]+)``", r"`\1`", text)
