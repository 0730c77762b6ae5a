"""What the documents say can be done: their commands and flags exist, their Python compiles and imports."""

import ast
import re
import shlex
import subprocess
import textwrap
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from dicode.cli.app import parse

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
FOLDERS = ("dicode/checkpoints", "integrations", "studies")
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", *(f"{name}/**/README.md" for name in FOLDERS), "recipes/*.py")
    for path in ROOT.glob(pattern)
)
FENCED = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    (?:dicode|python|from|import|torchrun) .*\n(?:^    .*\n|^\n(?=    ))*)", re.MULTILINE)
ELSEWHERE = {"cd", "curl", "docker", "export", "git", "grep", "head", "hf", "ln", "mkdir", "pipx", "sed", "source"}
names = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]


def blocks(path: Path) -> Iterator[tuple[str, str]]:
    """Language and text of every block: fenced, or indented and beginning with a command or an import."""
    text = path.read_text(encoding="utf-8")
    yield from FENCED.findall(text)
    for block in INDENTED.findall(FENCED.sub("", text)):
        code = textwrap.dedent(block)
        yield "python" if code.startswith(("from ", "import ")) else "sh", code


def commands(script: str) -> Iterator[list[str]]:
    """The words of every command of a shell script, without its comments and variables."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set(";&|()"):
                words.append(word)
                continue
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words and words[0] != ">":
                yield words
            words = []


def check_command(words: list[str], folder: Path = ROOT) -> None:
    """Raise `ValueError`, or `SystemExit` of the parser, for what cannot be run in the repository or its `folder`."""
    program, *rest = [words[0].rpartition("/.venv/bin/")[2], *words[1:]]
    if program == "torchrun":
        at = next(i for i, word in enumerate(rest) if word == "-m" or "/" in word)
        program, *rest = rest[at + 1 :] if rest[at] == "-m" else ["python", *rest[at:]]
    if program in ("uv", "pip", "uvx"):
        check_install(words)
        if "dicode" not in rest:
            return
        program, *rest = rest[rest.index("dicode") :]
    if program == "dicode":
        parse(rest)
    elif program == "python":
        if rest[0] not in ("-m", "-c") and not any((home / rest[0]).exists() for home in (ROOT, folder)):
            raise ValueError(f"no file {rest[0]}")
    elif program == "make":
        missing = [word for word in rest if "=" not in word and word not in TARGETS]
        if missing:
            raise ValueError(f"no target {missing}")
    elif program == "pytest":
        missing = [word for word in rest if word.startswith("tests/") and not (ROOT / word).exists()]
        if missing:
            raise ValueError(f"no file {missing}")
    elif program not in ELSEWHERE and not (ROOT / program).is_file():
        raise ValueError(f"a command that this test does not know: {program}")


def check_install(words: list[str]) -> None:
    """Extras that are asked for exist."""
    for extras in re.findall(r"(?:dicode|\.)\[([^\]]+)\]", " ".join(words)):
        unknown = set(extras.split(",")) - EXTRAS
        if unknown:
            raise ValueError(f"no extra {unknown}")


@pytest.mark.parametrize("name", names)
def test_commands_of_a_document_exist_with_their_flags(monkeypatch, capsys, name):
    monkeypatch.chdir(ROOT)
    faults = []
    for language, code in blocks(ROOT / name):
        if language in ("sh", "bash"):
            subprocess.run(["bash", "-n"], input=code, text=True, check=True)
            for words in commands(code):
                try:
                    check_command(words, (ROOT / name).parent)
                except (SystemExit, ValueError) as error:
                    if isinstance(error, SystemExit) and not error.code:  # --help
                        continue
                    faults.append(f"{shlex.join(words)}\n{error}\n{capsys.readouterr().err}")
    assert not faults, "\n\n".join(faults)


@pytest.mark.parametrize("name", [name for name in names if not name.startswith("recipes/")])
def test_python_of_a_document_compiles_and_its_imports_exist(name):
    missing = set()
    for language, code in blocks(ROOT / name):
        if language == "python":
            tree = ast.parse(code)
            imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
            for line in imports:
                try:
                    exec(compile(ast.Module([line], []), name, "exec"), {})
                except ModuleNotFoundError as error:
                    if str(error.name).startswith("dicode"):
                        raise
                    missing.add(error.name)
    if missing:
        pytest.skip(f"not installed: {', '.join(map(str, missing))}")


def test_the_documents_are_found() -> None:
    counts = {name: sum(1 for _ in blocks(ROOT / name)) for name in names}
    assert counts["README.md"] > 5 and counts["docs/serve.md"] > 4 and counts["dicode/checkpoints/world/README.md"] == 1
    assert [list(commands('A=1 dicode x "a # b" \\\n  --y  # c\nmake z && pip q'))] == [
        [["dicode", "x", "a # b", "--y"], ["make", "z"], ["pip", "q"]]
    ]


@pytest.mark.parametrize(
    "line", ["dicode generate --secs 3", "python tools/nothing.py", "make nothing", "pip install '.[x]'"]
)
def test_what_does_not_exist_is_found(capsys, line):
    with pytest.raises((SystemExit, ValueError)):
        check_command(next(commands(line)))


# the site


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools/site")
    return import_module("check")


@pytest.mark.parametrize(
    ("html", "fault"),
    [
        (
            '<a href="b.html#there">b</a> <a href="https://example.org/x">x</a> <img src="data:image/png;base64,AA">',
            None,
        ),
        ('<a href="c.html">c</a>', "a.html: c.html leads nowhere"),
        ('<a href="b.html#here">b</a>', "a.html: b.html#here names no anchor of b.html"),
        ('<a href="#here">a</a>', "a.html: #here names no anchor of a.html"),
        ('<img src="c.png">', "a.html: c.png leads nowhere"),
        ('<script src="https://example.org/x.js"></script>', "a.html: loads https://example.org/x.js"),
        ('<link rel="stylesheet" href="//example.org/x.css">', "a.html: loads //example.org/x.css"),
        ("<style>p { background: url(https://example.org/x.png) }</style>", "a.html: loads a style from elsewhere"),
    ],
)
def test_faults_of_a_site_are_found(check, tmp_path, html, fault):
    (tmp_path / "a.html").write_text(html)
    (tmp_path / "b.html").write_text('<h1 id="there">b</h1> <a href="a.html">a</a>')
    assert check.faults(tmp_path) == ([] if fault is None else [fault])
