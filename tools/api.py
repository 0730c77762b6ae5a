"""Pages of every public class and function, from docstrings: `python tools/api.py build/docs`."""

import pkgutil
import sys
from pathlib import Path

import pdoc

import dicode


def main(folder: Path) -> None:
    """Write the pages; the package's own names, which are imported on first use, are imported before."""
    for name in dicode.__all__:
        setattr(dicode, name, getattr(dicode, name))
    pdoc.render.configure(show_source=False)
    modules = (found.name for found in pkgutil.iter_modules(dicode.__path__, "dicode."))
    public = [name for name in modules if name not in ("dicode.cli", "dicode.__main__")]
    pdoc.pdoc("dicode", *public, output_directory=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
