"""The reader of safetensors headers: of any bytes, a checked result or a CheckpointError."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from peftc.constants import DTYPES
from peftc.errors import CheckpointError
from peftc.safetensors_file import BITS, MAX_HEADER, SafetensorsFile, read_header

from .helpers import within

DATA = bytes(range(28))
A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "U8", "shape": [4], "data_offsets": [24, 28]}
many = settings(max_examples=200, deadline=None, derandomize=True)


def pack(header: Any, data: bytes = DATA, length: int | None = None) -> bytes:
    """A file's bytes: the header as JSON (or as it is), its length (or another), the data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("safetensors") / "model.safetensors"


def refused(file: Path) -> CheckpointError:
    """The error with which a file is refused, complete and about this file."""
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert caught.value.what and caught.value.fix
    assert caught.value.where == str(file)
    assert len(str(caught.value)) < 2000, "an error is no dump of the header"
    return caught.value


def check(found: SafetensorsFile) -> None:
    """Holds a result against the format, and against the reference implementation."""
    position = 8 + int.from_bytes(found.path.read_bytes()[:8], "little")
    for name, ref in found.tensors.items():
        assert (ref.name, ref.file, ref.start) == (name, found.path, position)
        assert ref.nbytes == torch.Size(ref.shape).numel() * BITS[ref.dtype] // 8
        position += ref.nbytes
    assert position == found.size == found.path.stat().st_size
    with safe_open(found.path, "pt") as reference:
        assert set(reference.keys()) == set(found.tensors)
        assert (reference.metadata() or {}) == found.metadata


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
naturals = st.integers(0, 30)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "F3", ""]) | json_values,
        "shape": st.lists(naturals, max_size=3) | json_values,
        "data_offsets": st.lists(naturals, min_size=2, max_size=2).map(sorted) | json_values,
    },
    optional={"more": st.none()},
)
near_headers = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__", "\ud800"]), entries | json_values
)


@many
@given(
    st.binary(max_size=60)
    | st.builds(pack, st.binary(max_size=40), st.binary(max_size=8))
    | st.builds(pack, json_values, st.binary(max_size=8))
    | st.builds(pack, near_headers, st.binary(max_size=40))
)
def test_any_bytes_give_a_valid_result_or_a_checkpoint_error(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    try:
        found = read_header(file)
    except CheckpointError as error:
        assert error.what and error.fix and error.where == str(file)
    else:
        check(found)


@many
@given(st.integers(0, len(pack({"a": A, "b": B})) - 1), st.integers(1, 255))
def test_one_changed_byte_gives_a_valid_result_or_a_checkpoint_error(
    file: Path, place: int, change: int
) -> None:
    content = bytearray(pack({"a": A, "b": B}))
    content[place] ^= change
    file.write_bytes(content)
    try:
        check(read_header(file))
    except CheckpointError as error:
        assert error.what and error.fix and error.where == str(file)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    raw = draw(
        st.binary(min_size=(size := torch.Size(shape).numel() * dtype.itemsize), max_size=size)
    )
    flat = (
        torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        if size
        else torch.empty(0, dtype=torch.uint8)
    )
    return flat.view(dtype).reshape(shape)


names = st.text(st.characters(exclude_categories=["Cs"])).filter(
    lambda name: name != "__metadata__"
)


@many
@given(
    st.dictionaries(names, tensors(), max_size=5), st.dictionaries(names, st.text("aé", max_size=4))
)
def test_written_file_is_read_exactly(
    file: Path, written: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    save_file(written, file, metadata or None)  # it writes {} wrongly where no tensor follows
    found = read_header(file)
    check(found)
    assert found.metadata == metadata
    assert set(found.tensors) == set(written)
    content = file.read_bytes()
    for name, tensor in written.items():
        ref = found.tensors[name]
        assert (DTYPES[ref.dtype], ref.shape) == (tensor.dtype, tuple(tensor.shape))
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[ref.start : ref.start + ref.nbytes] == raw


@pytest.mark.parametrize("missing", range(1, 29))
def test_file_is_refused_when_bytes_are_cut_off(file: Path, missing: int) -> None:
    file.write_bytes(pack({"a": A, "b": B})[:-missing])
    assert "truncated" in refused(file).what


AB = b'{"a": %s, "b": %s}' % (json.dumps(A).encode(), json.dumps(B).encode())
MUTATIONS: dict[str, tuple[bytes, str]] = {
    "empty_file": (b"", "truncated"),
    "half_a_length_field": (AB[:7], "truncated"),
    "length_above_the_file": (pack(AB, length=len(AB) + len(DATA) + 1), "claims"),
    "length_of_2_to_the_64": (pack(AB, length=2**64 - 1), "claims"),
    "length_one_short": (pack(AB, length=len(AB) - 1), "JSON"),
    "length_one_long": (pack(AB, b"\xff" * 28, length=len(AB) + 1), "JSON"),
    "length_zero": (pack(AB, length=0), "JSON"),
    "no_json": (pack(b"{nonsense"), "JSON"),
    "no_utf8": (pack(AB.replace(b'"a"', b'"\xff"')), "JSON"),
    "utf16": (pack(AB.decode().encode("utf-16")), "JSON"),
    "lone_surrogate": (pack(AB.replace(b'"a"', rb'"\ud800"')), "name"),
    "no_object": (pack([A, B]), "object"),
    "null": (pack(None), "object"),
    "duplicate_name": (pack(AB.replace(b'"b"', b'"a"')), "twice"),
    "duplicate_key": (pack(AB.replace(b'"dtype"', b'"dtype": "F32", "dtype"', 1)), "twice"),
    "deep_nesting": (pack(b'{"a": %s}' % nested(100_000)), "JSON"),
    "deep_nesting_as_dtype": (pack({"a": {**A, "dtype": json.loads(nested(300))}}), "'a'"),
    "trailing_bytes": (pack(AB, DATA + b"\0"), "too long"),
    "overlap": (pack({"a": A, "b": {**B, "data_offsets": [20, 24]}}, DATA[:24]), "overlaps"),
    "same_bytes_twice": (pack({"a": A, "b": A}, DATA[:24]), "overlaps"),
    "gap": (pack({"a": A, "b": {**B, "data_offsets": [25, 29]}}, DATA + b"\0"), "gap"),
    "gap_before_the_first": (pack({"b": B}), "gap"),
    "offsets_out_of_the_file": (pack({"a": A, "b": B}, DATA[:27]), "truncated"),
    "offset_of_2_to_the_63": (pack({"a": A, "b": {**B, "data_offsets": [24, 2**63]}}), "natural"),
    "negative_offset": (pack({"a": A, "b": {**B, "data_offsets": [-4, 0]}}), "natural"),
    "offsets_in_reverse": (pack({"a": A, "b": {**B, "data_offsets": [28, 24]}}), "'b'"),
    "offsets_of_another_size": (pack({"a": A, "b": {**B, "data_offsets": [24, 27]}}), "4 bytes"),
    "three_offsets": (pack({"a": A, "b": {**B, "data_offsets": [24, 28, 28]}}), "natural"),
    "no_offsets": (pack({"a": A, "b": {"dtype": "U8", "shape": [4]}}), "not described"),
    "float_offset": (pack({"a": A, "b": {**B, "data_offsets": [24.0, 28]}}), "natural"),
    "nan_offset": (pack({"a": A, "b": {**B, "data_offsets": [24, float("nan")]}}), "natural"),
    "bool_offset": (pack({"a": {**A, "data_offsets": [False, 24]}, "b": B}), "natural"),
    "string_offset": (pack({"a": A, "b": {**B, "data_offsets": ["24", "28"]}}), "natural"),
    "negative_shape": (pack({"a": {**A, "shape": [-2, -3]}, "b": B}), "natural"),
    "float_shape": (pack({"a": {**A, "shape": [2.0, 3]}, "b": B}), "natural"),
    "bool_shape": (pack({"a": {**A, "shape": [True, 6]}, "b": B}), "natural"),
    "number_as_shape": (pack({"a": {**A, "shape": 6}, "b": B}), "natural"),
    "shape_of_2_to_the_63": (pack({"a": {**A, "shape": [2**63]}, "b": B}), "natural"),
    "shape_that_overflows": (pack({"a": {**A, "shape": [2**62] * 300}, "b": B}), "'a'"),
    "shape_of_5000_digits": (pack(AB.replace(b"[4]", b"[%s]" % (b"9" * 5000))), "JSON"),
    "shape_of_another_size": (pack({"a": {**A, "shape": [3, 3]}, "b": B}), "36 bytes"),
    "unknown_dtype": (pack({"a": {**A, "dtype": "F33"}, "b": B}), "F33"),
    "dtype_of_torch": (pack({"a": {**A, "dtype": "float32"}, "b": B}), "float32"),
    "dtype_null": (pack({"a": {**A, "dtype": None}, "b": B}), "dtype"),
    "dtype_very_long": (pack({"a": {**A, "dtype": "F" * 100_000}, "b": B}), "dtype"),
    "name_very_long": (pack({"a" * 100_000: {**A, "dtype": "F33"}, "b": B}), "dtype"),
    "unknown_key": (pack({"a": {**A, "stride": 1}, "b": B}), "not described"),
    "entry_no_object": (pack({"a": A, "b": None}), "not described"),
    "metadata_no_object": (pack({"__metadata__": [], "a": A, "b": B}), "__metadata__"),
    "metadata_no_string": (pack({"__metadata__": {"format": 1}, "a": A, "b": B}), "__metadata__"),
}  # fmt: skip


def test_unmutated_file_is_read(file: Path) -> None:
    file.write_bytes(pack(AB))
    found = read_header(file)
    check(found)
    assert [(r.name, r.dtype, r.shape) for r in found.tensors.values()] == [
        ("a", "F32", (2, 3)),
        ("b", "U8", (4,)),
    ]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutated_file_is_refused(file: Path, mutation: str) -> None:
    content, words = MUTATIONS[mutation]
    file.write_bytes(content)
    assert words in refused(file).what


def test_header_is_refused_unread_when_above_the_limit(file: Path) -> None:
    with file.open("wb") as handle:  # a hole, which takes no room on the disk
        handle.write(struct.pack("<Q", MAX_HEADER + 1))
        handle.truncate(8 + MAX_HEADER + 1)
    began = time.perf_counter()
    assert str(MAX_HEADER + 1) in refused(file).what
    assert time.perf_counter() - began < 0.1


def test_header_is_refused_quickly_when_its_shape_has_many_dimensions(file: Path) -> None:
    file.write_bytes(pack({"a": {**A, "shape": [2**62] * 30_000}, "b": B}))
    began = time.perf_counter()
    refused(file)
    assert time.perf_counter() - began < 0.5


def test_directory_is_refused(tmp_path: Path) -> None:
    refused(tmp_path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "model.safetensors").what


def test_device_is_refused() -> None:
    assert "not a regular file" in refused(Path("/dev/zero")).what


def test_pipe_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with within(1):
        assert "not a regular file" in refused(tmp_path / "model.safetensors").what
