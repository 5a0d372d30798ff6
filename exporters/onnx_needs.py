"""The optional libraries of ONNX; importing this module without them says how to get them."""

from __future__ import annotations

from peftc.errors import MissingDependency

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

__all__ = ["onnx", "onnx_ir", "onnxruntime"]
