"""Reference pages in Markdown: Python from docstrings, the command line from its parsers, HTTP from OpenAPI."""

import ast
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields
from inspect import cleandoc
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any, cast

from tyro.conf import AvoidSubcommands, FlagCreatePairsOff

import dicode
from dicode.tokenizer.config import SamplingConfig

PACKAGE = Path(dicode.__file__).parent
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def python_pages() -> dict[str, str]:
    """A page for each folder of the package, and one for the modules beside them, from the source alone."""
    folders = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py") if path.parent.name != "cli")
    pages = {"dicode": module_page("dicode", sorted(PACKAGE.glob("*.py")))}
    for folder in folders:
        pages[folder] = module_page(f"dicode.{folder}", sorted((PACKAGE / folder).rglob("*.py")))
    rows = "\n".join(f"| [`{_title(name)}`]({name}.md) | {_sentence(name)} |" for name in pages)
    names = ", ".join(f"`{name}`" for name in dicode.__all__ if not name.startswith("_"))
    pages["index"] = (
        f"# Python\n\nPublic names, imported on first use: `from dicode import …` of {names}. The other modules are "
        f'imported by their full names.\n\n<div class="flags" markdown>\n\n| module | |\n|---|---|\n{rows}\n\n</div>\n'
    )
    return pages


def _title(name: str) -> str:
    return name if name == "dicode" else f"dicode.{name}"


def _sentence(name: str) -> str:
    """The first sentence of a module, up to its colon or full stop."""
    path = PACKAGE / "__init__.py" if name == "dicode" else PACKAGE / name / "__init__.py"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def module_page(title: str, files: Sequence[Path]) -> str:
    """The public classes and functions of some modules."""
    parts = [f"# {title}"]
    for path in files:
        name = ".".join(("dicode", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        found = [part for node in _public(tree) for part in described(node, source.splitlines(), f"{name}.", 3)]
        if path.name != "__main__.py" and (found or name == title):
            heading = [] if name == title else [f"## {name}"]
            parts += [*heading, ast.get_docstring(tree) or "", *found]
    return "\n\n".join(parts) + "\n"


def _public(node: ast.Module | ast.ClassDef) -> Iterator[Definition]:
    for child in node.body:
        if isinstance(child, Definition) and not child.name.startswith("_") and ast.get_docstring(child):
            yield child


def described(node: Definition, lines: list[str], prefix: str, level: int) -> Iterator[str]:
    """Heading, signature or fields, docstring; then the methods of a class."""
    yield f"{'#' * level} {node.name} {{ #{prefix}{node.name} }}"
    if isinstance(node, ast.ClassDef):
        first = [child for child in node.body if isinstance(child, ast.FunctionDef) and child.name == "__init__"]
        fields = [child for child in node.body if isinstance(child, ast.AnnAssign)]
        text = _header(node, lines)
        if fields:
            text += "\n" + "\n".join(lines[fields[0].lineno - 1 : (fields[-1].end_lineno or fields[-1].lineno)])
        elif first:
            text += "\n" + _header(first[0], lines)
    else:
        text = _header(node, lines)
    yield f"```python\n{dedent(text)}\n```"
    yield cleandoc(ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef):
        for child in _public(node):
            yield from described(child, lines, f"{prefix}{node.name}.", level + 1)


def _header(node: Definition, lines: list[str]) -> str:
    """The lines of a definition down to its docstring, or its first statement."""
    return "\n".join(lines[node.lineno - 1 : max(node.body[0].lineno - 1, node.lineno)])


# the command line


def command_page() -> str:
    """Every command with its flags, and the flags that recipes add to `dicode train`."""
    from dicode.cli.app import COMMANDS, GROUPED
    from dicode.train.runs import load_run

    parts = [
        "# Commands",
        "`dicode COMMAND --help` prints the same. `--threads N`, after any command, limits the processor's threads; "
        "`dicode --version` prints the version; `DICODE_DEBUG=1` shows tracebacks.",
    ]
    for command in COMMANDS:
        parts += [f"## dicode {command.__name__.lower()}", *flags_of(command)]
    for group, (text, commands) in GROUPED.items():
        parts += [f"## dicode {group}", text]
        for part in commands:
            parts += [f"### dicode {group} {part.__name__.lower()}", *flags_of(part)]
    parts += [
        "## Flags of runs",
        "`dicode train FILE.py:RUN` takes every field of the run as a flag. Defaults here: `recipes/small.py`.",
    ]
    for name in ("first_stage", "linear_code", "denoiser", "lm"):
        run = load_run(str(PACKAGE.parent / f"recipes/small.py:{name}"))
        kind, whole = type(run), cast(Any, AvoidSubcommands)
        parts += [f"### {kind.__name__}", *flags_of(whole[kind], kind.__doc__, run)]
    return "\n\n".join(parts) + "\n"


def flags_of(command: Any, text: str | None = None, default: Any = None) -> Iterator[str]:
    """The description of a command, and a table of its arguments."""
    from tyro.extras import get_parser

    given = {} if default is None else {"default": default}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # nothing else of tyro lists flags; the version is pinned
        parser = get_parser(command, config=(FlagCreatePairsOff,), **given)
    yield cleandoc(text or command.__doc__ or "")
    rows = ["| flag | | default |", "|---|---|---|"]
    rows += [_row(action) for action in parser._actions if action.dest != "help"]
    yield "\n".join(['<div class="flags" markdown>', "", *rows, "", "</div>"])


def _row(action: Any) -> str:
    """A flag, what it is, and its default: none, what is off, and what is required need no cell."""
    metavar = str(action.metavar or "").replace("{None}|", "")
    flags = (
        action.option_strings[:1] if action.nargs == 0 else action.option_strings
    )  # of a switch --no-… is the second
    name = " ".join([", ".join(f"`{flag}`" for flag in flags), f"`{metavar}`" if metavar else ""]).strip()
    text, _, default = str(action.help).rpartition("(")
    default = default.removesuffix(")").removeprefix("default: ")
    cells = {"": "", "None": "", "False": "", "True": "on; this turns it off", "required": "required"}
    text = text.strip().replace("{", "&#123;")  # or {…} would be read as attributes of the cell
    return _line(name, text, cells.get(default, f"`{default}`"))


def _line(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


# HTTP


def http_page() -> str:
    """Every endpoint of `dicode serve`, from its OpenAPI description."""
    from dicode.serve.app import make_app
    from dicode.serve.server import Server

    store: Any = SimpleNamespace(passing=())  # no job is queued
    described = make_app(Server(Path(), {}, store)).openapi()
    parts = [
        "# HTTP",
        "The endpoints of `dicode serve`; how they are used, what errors look like and what limits hold: "
        "[Serve](../serve.md). A running server describes itself at `/openapi.json`. Fields of sampling are the flags "
        "of [`dicode generate`](cli.md#dicode-generate), with underscores.",
    ]
    for path, methods in described["paths"].items():
        for method, call in methods.items():
            parts += [f"## {method.upper()} {path}", f"{call['summary']}."]
            rows = {one["name"]: (one["schema"], one["in"]) for one in call.get("parameters", ())}
            for kind, body in call.get("requestBody", {}).get("content", {}).items():
                place = {"application/json": "JSON", "multipart/form-data": "form"}[kind]
                for name, schema in sorted(body["schema"]["properties"].items(), key=_rank):
                    where = f"{place}, required" if name in body["schema"].get("required", ()) else place
                    rows.setdefault(name, (schema, where))
            if path != QUEUE and rows.keys() >= SAMPLING:  # its fields once more
                parts.append(f"Fields of [`POST {QUEUE}`](#post-v1videos) as well.")
                rows = {name: row for name, row in rows.items() if name in ("video", "video_id", "prompt")}
            lines = [_field(name, *row) for name, row in rows.items() if name not in OF_SERVER]
            if lines:
                parts.append("\n".join(["| field | type | | in |", "|---|---|---|---|", *lines]))
    return "\n\n".join(parts) + "\n"


QUEUE = "/v1/videos"
SAMPLING = {field.name for field in fields(SamplingConfig)} - {"motion_tokens"}
OF_SERVER = {"reconstructs", "remixed_from_video_id", "extends"}  # in a job's request, written by other endpoints
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "maxLength": "length ≤"}


def _rank(field: tuple[str, Any]) -> str:
    """As declared, then what sampling has, by name."""
    return field[0] if field[0] in SAMPLING else ""


def _field(name: str, schema: dict[str, Any], where: str) -> str:
    shown = []
    for part in (part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"):
        limits = [f"{sign} {part[key]:.0f}" for key, sign in LIMITS.items() if key in part and part[key] < 2**63 - 1]
        values = ", ".join(f"`{value}`" for value in part.get("enum", ()))
        shown.append(" ".join([values or part.get("format", part.get("type", "any")), *limits]))
    default = schema.get("default")
    text = schema.get("description", "") + (f" (default: `{default}`)" if default not in (None, "", False) else "")
    return _line(f"`{name}`", " or ".join(shown), text, where)
