"""Optional libraries: asked for before the work, by the extra that brings them."""

from __future__ import annotations

from importlib.util import find_spec

from peftc.errors import MissingDependency, PeftcError


def lacking(where: str, extra: str, *packages: str) -> list[PeftcError]:
    """An error for each of these packages that is not installed.

    Args:
        where: What needs them.
        extra: The extra of peftc that brings them.
        packages: The names by which they are imported.
    """
    return [
        MissingDependency(
            f"needs {name}, which is not installed",
            where=where,
            fix=f"pip install 'peftc[{extra}]'",
        )
        for name in packages
        if not _there(name)
    ]


def _there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # a module that was set to None
        return False
