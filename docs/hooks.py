"""What pages of the site take from elsewhere, so that nothing is said in two places.

A line of a page that is one of these comments is replaced:

    <!-- facts: Muon -->               the row of the README's table of methods
    <!-- box: Muon -->                 the algorithm of the class docstring
    <!-- section: PATH | HEADING -->   a section of another page, without its heading
    <!-- script: PATH -->              what a script's docstring says, and the script
    <!-- script: PATH | FROM | TO -->  the same with its lines between two texts above it
"""

from __future__ import annotations

import ast
import posixpath
import re
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"^<!-- (facts|box|section|script): (.+?) -->$", re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
HERE = {"#results": "docs/tested.md#loss"}
"""Where the site has what the README links to."""
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


@cache
def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def facts(name: str, at: str) -> str:
    """Idea, state, cost, paper and caveat of a class, as a table."""
    row = re.search(rf"^\| `{name}` \|(.*)\|$", read("README.md"), re.MULTILINE)
    if row is None:
        raise ValueError(f"the README has no row for {name}")
    idea, state, step, paper, caveat = (cell.strip() for cell in row[1].split(" | "))
    step = f"{step} times that of AdamW ([measured](../choose.md#all-methods) on a CPU)"
    cells = {"Idea": idea, "State": state, "Mean step": step, "Paper": paper, "Caveat": caveat}
    rows = (f"| **{k}** | {relink(v, 'README.md', at)} |" for k, v in cells.items())
    return "\n".join(["| | |", "|---|---|", *rows])


def box(name: str) -> str:
    """The first indented block of a class docstring, and the line above it."""
    for path in sorted((ROOT / "optimizers").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                text = ast.get_docstring(node) or ""
                head = re.search(r"([^\n]+(?:\n[^\n]+)*)::\n\n((?:(?:    .*)?\n)+)", text)
                if head is None:
                    raise ValueError(f"{name} has no algorithm in its docstring")
                says = re.sub(r"``([^`]+)``", r"`\1`", head[1].replace("\n", " "))
                says = re.sub(r":\w+:`(\w+)`", r"`\1`", says)
                return f"{says}:\n\n```text\n{textwrap.dedent(head[2]).strip()}\n```"
    raise ValueError(f"there is no class {name}")


def section(path: str, heading: str, at: str) -> str:
    """What stands below a heading, up to the next one of its level or above."""
    text = read(path)
    hidden = FENCE.sub(lambda m: " " * len(m[0]), text)  # comments of code are no headings
    start = re.search(rf"^(#+) {re.escape(heading)}$", hidden, re.MULTILINE)
    if start is None:
        raise ValueError(f"{path} has no heading {heading!r}")
    end = re.compile(rf"^#{{1,{len(start[1])}}} ", re.MULTILINE).search(hidden, start.end())
    body = text[start.end() : end.start() if end else len(text)].strip()
    return relink(body, path, at)


def relink(body: str, path: str, at: str) -> str:
    """Links of a page of the repository as links of the site, or as plain names of files."""

    def link(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        if "://" in target or mark:
            return match[0]
        target = HERE.get(target, target) if path == "README.md" else target
        name, _, anchor = target.partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(path), name)) if name else path
        if file.startswith("docs/"):
            to = posixpath.relpath(file.removeprefix("docs/"), posixpath.dirname(at) or ".")
            return f"[{text}]({to}{'#' + anchor if anchor else ''})"
        return f"`{file}`" if "/" in text or text.endswith(".md") else f"{text} (`{file}`)"

    return LINK.sub(link, body)


def excerpt(path: str, first: str, last: str) -> str:
    """The lines of a script from one that has a text up to another one, which is left out."""
    lines = read(path).splitlines()
    start = next((i for i, line in enumerate(lines) if first in line), None)
    ends = (i for i, line in enumerate(lines) if start is not None and i > start and last in line)
    end = next(ends, None)
    if start is None or end is None:
        raise ValueError(f"{path} has no lines from {first!r} to {last!r}")
    code = textwrap.dedent("\n".join(lines[start:end])).strip()
    return f"```py\n{code}\n```"  # py: a part of a script does not run by itself


def script(path: str, *part: str) -> str:
    """A script's docstring as text, a part of it if one is asked for, and all of it, folded."""
    text = read(path)
    says = ast.get_docstring(ast.parse(text)) or ""
    title, *rest = says.split("\n\n")
    *words, command = rest
    parts = [title, *words, *([excerpt(path, *part)] if part else [])]
    parts.append(f"```\n{command}\n```")
    code = text.split('"""', 2)[2].strip()
    parts.append(f'??? example "{path}"\n\n' + textwrap.indent(f"```python\n{code}\n```", "    "))
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Replace the comments of a page."""
    at = page.file.src_uri

    def replacement(match: re.Match[str]) -> str:
        kind, what = match.groups()
        parts = what.split(" | ")
        if kind == "section":
            return section(*parts, at)
        return facts(what, at) if kind == "facts" else {"box": box, "script": script}[kind](*parts)

    return MARK.sub(replacement, markdown)
