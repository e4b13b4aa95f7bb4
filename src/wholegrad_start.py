"""Where the command ``wholegrad`` starts: a package that does not load is told in one line, not by a traceback.

It lies outside of the package, since importing anything of that imports PyTorch and what reads slides; and it uses
nothing but Python's own library.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version

MODULES = {  # of packages whose module has another name
    "openslide-python": "openslide", "openslide-bin": "openslide_bin", "pillow": "PIL", "mlflow-skinny": "mlflow",
}  # fmt: skip


def main() -> int:
    """Run the command; returns its exit code."""
    try:
        from wholegrad.cli import main as run
    except Exception as error:  # a shared library that does not load raises what it likes
        return _tell(sys.argv[1:], error)
    return run()


def module(package: str) -> str:
    """What is imported of a package."""
    return MODULES.get(package, package.replace("-", "_"))


def trouble(package: str) -> str | None:
    """Why a package does not load, in one line; None if it does."""
    try:
        importlib.import_module(module(package))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _tell(words: list[str], error: Exception) -> int:
    """One line for each package that everything needs and that does not load; the error itself if all do."""
    try:
        needed = [
            re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requires("wholegrad") or [] if "extra" not in line
        ]
    except PackageNotFoundError:
        needed = []
    found = {package: said for package in needed if (said := trouble(package)) is not None}
    if not found:
        raise error
    lines = [f"{_named(package)}: does not load ({said}); {_mend(package)}" for package, said in found.items()]
    if words[:1] == ["doctor"] and "--json" in words:
        mend = [{"state": "broken", "what": line} for line in lines]
        print(json.dumps({"ok": False, "mend": mend, "sections": {}}, indent=1))
    else:
        for line in lines:
            print(f"wholegrad: error: {line}", file=sys.stderr)
    return 1 if words[:1] == ["doctor"] else 2


def _named(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package


def _mend(package: str) -> str:
    return f"pip install --force-reinstall {package}"


if __name__ == "__main__":
    sys.exit(main())
