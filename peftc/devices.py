"""Arithmetic on a GPU: pieces of weights go there, are computed in fp32, and come back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from peftc.errors import PeftcError

Piece = tuple[int, int, torch.Tensor]  # rows low to high of a tensor
CPU = torch.device("cpu")


def device_of(name: str) -> torch.device:
    """The device of a name, such as `cuda` or `cuda:1`.

    Raises:
        PeftcError: There is none here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's, of what it lacks or cannot reach
        raise PeftcError(
            f"there is no such device here: {str(error).splitlines()[0]}",
            where=f"device {name}",
            fix="leave it out (the CPU computes the same), or run where "
            "`python -c 'import torch; print(torch.cuda.is_available())'` prints True",
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise PeftcError(
            "is not a device that weights are computed on", where=f"device {name}",
            fix="use cpu or cuda",
        )  # fmt: skip
    return device


@contextmanager
def true_fp32() -> Iterator[None]:
    """Has products of fp32 matrices computed in fp32, and not in TF32, whatever the caller set."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def start_worker(device: torch.device) -> None:
    """Makes ready a thread that computes; with a GPU it has a stream of its own.

    So the copying of one thread overlaps the computing of another.
    """
    torch.set_num_threads(1)  # on pieces so small, more cost more than they gain
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def fetched(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Pieces of a GPU on the CPU; the next is computed while one is copied and used."""
    waiting: tuple[Piece, torch.cuda.Event] | None = None
    for low, high, rows in pieces:
        here = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        here.copy_(rows, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        if waiting is not None:
            waiting[1].synchronize()
            yield waiting[0]
        waiting = (low, high, here), copied
    if waiting is not None:
        waiting[1].synchronize()
        yield waiting[0]
