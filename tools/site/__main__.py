"""The documentation as a site, in two steps around Zensical (`make docs`).

python tools/site                  # build/pages: docs/, cards, studies and generated references as Markdown
zensical build --clean --strict    # build/docs; stops at links and anchors of Markdown that lead nowhere
python tools/site --check          # adds llms.txt; fails for links of the HTML that lead nowhere or load from elsewhere

Pages are written for a reader of the repository: links to files outside docs/ become links to their pages here.
"""

import os
import re
import shutil
import sys
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import reference
from check import faults
from zoo import zoo_page

ROOT = Path(__file__).parents[2]
PAGES, SITE = ROOT / "build/pages", ROOT / "build/docs"
NAV = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
LINK = re.compile(r"(!?\[[^\]]*\])\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".toml": "toml", ".Dockerfile": "docker", ".yml": "yaml"}
NOT_IN_FULL = ("log.md", "source/", "reference/python/")  # of llms-full.txt: long, or in the package itself


def place_of(path: Path) -> str:
    """Where a file of the repository is in the folder of pages; other files than Markdown and pictures are quoted."""
    name = path.relative_to(ROOT).as_posix()
    fixed = {"README.md": "index.md", "studies/README.md": "studies/index.md", "dicode/checkpoints": "models.md"}
    fixed["integrations"] = "integrations.md"
    if name in fixed:
        return fixed[name]
    if path.is_dir():
        return place_of(path / "README.md") if (path / "README.md").is_file() else f"source/{name}.md"
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    name = name.replace("dicode/checkpoints/", "models/")
    if path.name == "README.md":  # of a folder, which it is named after
        return f"{name.removesuffix('/README.md')}.md"
    if name.startswith("studies/") and path.suffix == ".svg":
        return f"studies/{path.name}"
    return f"{path.stem.lower()}.md" if path.suffix == ".md" else f"source/{name}.md"


def written() -> list[Path]:
    """The files of the repository that are pages by themselves."""
    return [
        *(path for path in sorted((ROOT / "docs").iterdir()) if path.is_file()),
        *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
        *sorted(ROOT.glob("dicode/checkpoints/*/README.md")),
        *sorted(ROOT.glob("studies/*/README.md")),
        *sorted(ROOT.glob("integrations/*/README.md")),
        *sorted(ROOT.glob("studies/*/*.svg")),
        ROOT / "studies/README.md",
    ]


def assemble() -> None:
    """Write the folder of pages anew."""
    shutil.rmtree(PAGES, ignore_errors=True)
    quoted: set[Path] = set()
    for path in written():
        target = PAGES / place_of(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".md":
            shutil.copy(path, target)
            continue
        text = path.read_text(encoding="utf-8")
        if text.startswith("---\n"):  # of a card: for the Hub
            text = text.split("---\n", 2)[2].lstrip()
        parts = FENCE.split(text)
        parts[::2] = [LINK.sub(partial(linked, path, quoted), part) for part in parts[::2]]
        target.write_text("".join(parts), encoding="utf-8")
    for path in sorted(quoted):
        write(place_of(path), source_page(path))
    write("models.md", zoo_page())
    write("reference/cli.md", reference.command_page())
    write("reference/http.md", reference.http_page())
    for name, text in reference.python_pages().items():
        write(f"reference/python/{name}.md", text)


def write(name: str, text: str) -> None:
    """One generated page."""
    (PAGES / name).parent.mkdir(parents=True, exist_ok=True)
    (PAGES / name).write_text(text, encoding="utf-8")


def linked(page: Path, quoted: set[Path], found: re.Match[str]) -> str:
    """A link of a file of the repository, as it is between pages; `quoted` collects what has no page yet."""
    target = (page.parent / found[2]).resolve()
    if not target.is_relative_to(ROOT) or not target.exists():
        raise SystemExit(f"{page.relative_to(ROOT)}: links to {found[2]}, which does not exist")
    if place_of(target).startswith("source/"):
        quoted.add(target)
    relative = os.path.relpath(PAGES / place_of(target), (PAGES / place_of(page)).parent)
    named = {found[2], target.name, target.relative_to(ROOT).as_posix()}
    text = f"[{title_of(target)}]" if found[1][1:-1] in named else found[1]
    return f"{text}({relative}{found[3] or ''})"


def title_of(path: Path) -> str:
    """What a link that names a file says on the site: the title of a page, the name of another file."""
    if path.suffix != ".md":
        return path.name
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(line.removeprefix("# ") for line in lines if line.startswith("# "))


def source_page(path: Path) -> str:
    """A file, or the files of a folder, quoted."""
    parts = [f"# {path.relative_to(ROOT)}"]
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        heading = [f"## {file.name}"] if path.is_dir() else []
        quote = f"```{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text(encoding='utf-8')}\n```"
        parts += [*heading, quote]
    return "\n\n".join(parts) + "\n"


def titled(nav: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """The sections of the navigation, each with its pages in order."""
    sections = []
    for entry in nav:
        for title, pages in entry.items():
            flat = [pages] if isinstance(pages, str) else [page for _, own in titled(pages) for page in own]
            sections.append((title, flat))
    return sections


def add_llms() -> None:
    """`llms.txt` lists the pages as Markdown, copied beside the HTML; `llms-full.txt` is most of them in one."""
    lines, full = [f"# {NAV['site_name']}", "", f"> {NAV['site_description']}"], []
    for section, pages in titled(NAV["nav"]):
        lines += ["", f"## {section}", ""]
        for name in pages:
            text = (PAGES / name).read_text(encoding="utf-8")
            lines.append(f"- [{title_of(PAGES / name).replace('`', '')}]({name})")
            if not name.startswith(NOT_IN_FULL):
                full.append(text)
    for path in PAGES.rglob("*.md"):
        shutil.copy(path, SITE / path.relative_to(PAGES))
    (SITE / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (SITE / "llms-full.txt").write_text("\n\n".join(full), encoding="utf-8")


def main() -> int:
    """The step that the arguments name; returns 1 where the site has faults."""
    if "--check" not in sys.argv:
        assemble()
        return 0
    add_llms()
    named = {page for _, pages in titled(NAV["nav"]) for page in pages}
    found = [f"zensical.toml: {page} is in no section" for page in pages_left_out(named)] + faults(SITE)
    for fault in found:
        print(fault, file=sys.stderr)
    print(f"{SITE}: {len(list(SITE.rglob('*.html')))} pages, {len(found)} faults")
    print(f"to read it, with its search: python -m http.server -d {SITE.relative_to(ROOT)}")
    return int(bool(found))


def pages_left_out(named: set[str]) -> list[str]:
    """Pages that the navigation does not lead to, apart from quoted files."""
    pages = {path.relative_to(PAGES).as_posix() for path in PAGES.rglob("*.md")}
    return sorted(page for page in pages - named if not page.startswith("source/"))


if __name__ == "__main__":
    sys.exit(main())
