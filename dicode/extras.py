"""Packages that are not always installed."""


def missing_extra(error: ModuleNotFoundError, extra: str) -> ImportError:
    """The same error, naming the extra of this package to install."""
    if error.name and error.name.split(".")[0] == "dicode":
        return error
    return ImportError(f"this needs the package {error.name!r}, not installed: pip install 'dicode[{extra}]'")
