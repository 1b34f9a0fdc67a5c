"""Docstrings of the package as Markdown: reStructuredText marks that it uses become links."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth):`~?([\w.]+)`")
TABLE = re.compile(r"^(=+(?: +=+)+\n.*\n=+(?: +=+)+)$", re.MULTILINE | re.DOTALL)
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
BOX = re.compile(r"::$", re.MULTILINE)


class HouseStyle(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"``([^`]+)``", r"`\1`", obj.docstring.value)
        text = ROLE.sub(r"`\1`", BOX.sub(":", text))
        text = EXAMPLE.sub("Examples:", text)  # the heading under which blocks of code are known
        obj.docstring.value = TABLE.sub(r"\n```text\n\1\n```\n", text)
