"""The optional libraries of ONNX; importing this module without them says how to get them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from peftc.errors import MissingDependency

RUNTIMES = "onnxruntime", "onnxruntime-gpu"
OLDEST = 1, 23  # that has kernels for opset 23
OPSET = 23

try:
    import onnx
    import onnx_ir
    import onnxruntime
except ImportError as error:
    raise MissingDependency(
        f"ONNX needs {error.name}, which is not installed",
        where="--format onnx",
        fix="pip install 'peftc[onnx]', or for a GPU 'peftc[onnx-gpu]', but not both: the two "
        "runtimes overwrite each other's files",
    ) from error


def installed(name: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check() -> None:
    """Refuses libraries that are too old, or in each other's way.

    Raises:
        MissingDependency: It says which, and what to install.
    """
    both = {name: found for name in RUNTIMES if (found := installed(name))}
    if len(both) > 1:
        raise MissingDependency(
            f"{' and '.join(f'{name} {found}' for name, found in both.items())} are both "
            "installed, and overwrite each other's files",
            where="--format onnx",
            fix=f"pip uninstall -y {' '.join(both)}, then pip install 'peftc[onnx]' or, for a GPU, "
            "'peftc[onnx-gpu]'",
        )
    runtime = onnxruntime.__version__
    if tuple(int(part) for part in runtime.split(".")[:2]) < OLDEST:
        raise MissingDependency(
            f"onnxruntime {runtime} has no kernels for opset {OPSET}",
            where="--format onnx",
            fix=f"pip install -U '{next(iter(both), RUNTIMES[0])}>={OLDEST[0]}.{OLDEST[1]}'",
        )
    if (newest := onnx.defs.onnx_opset_version()) < OPSET:
        raise MissingDependency(
            f"onnx {onnx.__version__} knows opset {newest} at most, and graphs are of {OPSET}",
            where="--format onnx",
            fix="pip install -U 'onnx>=1.18'",
        )


__all__ = ["check", "onnx", "onnx_ir", "onnxruntime"]
