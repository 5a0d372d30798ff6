"""Mutations of files: of bytes, of numbers, and of JSON and YAML as the values that they are."""

from __future__ import annotations

import json
import random
import re
from typing import Any

ODD: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**400, -0.0, 1e308,
    float("nan"), "", ".", "..", "../x", "/etc/passwd", "x\x00y", "a\nb", "\ud800", "x" * 300,
    "NUL", [], {}, [[]], [-1], [2**62, 2**62], {"": ""}, {"a": {"b": []}}, "F32", "BF16",
    "/dev/zero", "\uff26\uff35", "C:\\x",
]  # fmt: skip
SNIPPETS = [
    b"\x00", b"\xff", b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\n", b"NaN", b"Infinity",
    b"1e999", b"-", b"&a [*a]", b"*a", b"<<: ", b"!!python/object:os.system ", b"- ", b"? ", b"|\n",
    b"\xef\xbb\xbf", b"\xff\xfe", b"[" * 200, b'{"a":' * 200,
]  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A neighbour of `data`, or something far from it."""
    chosen = rng.random()
    if chosen < 0.45 and (made := _as_json(data, rng)) is not None:
        return made
    if chosen < 0.6:
        return _numbers(data, rng)
    return _bytes(data, rng)


def _as_json(data: bytes, rng: random.Random) -> bytes | None:
    """The JSON in `data` with some of its values changed, a length before it kept right or not."""
    start = data.find(b"{")
    try:
        text = data[start:].decode("latin-1")
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    for _ in range(rng.randint(1, 3)):
        value = _changed(value, rng)
    fresh = json.dumps(value, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:  # a name that stands twice
        fresh = fresh.replace(b"{", b'{"a.weight":0,', 1)
    head, tail = data[:start], data[start + end :]
    if len(head) == 8 and rng.random() < 0.9:
        head = len(fresh).to_bytes(8, "little")
    return head + fresh + tail


def _changed(value: Any, rng: random.Random) -> Any:
    """A JSON value, one of its parts replaced, removed, doubled or renamed."""
    if rng.random() < 0.15 or not isinstance(value, (dict, list)) or not value:
        return rng.choice(ODD)
    if isinstance(value, list):
        place = rng.randrange(len(value))
        fresh = list(value)
        match rng.randrange(4):
            case 0:
                del fresh[place]
            case 1:
                fresh.insert(place, rng.choice(ODD))
            case _:
                fresh[place] = _changed(fresh[place], rng)
        return fresh
    key = rng.choice(list(value))
    fresh_map = dict(value)
    match rng.randrange(5):
        case 0:
            del fresh_map[key]
        case 1:
            fresh_map[str(rng.choice(ODD))] = rng.choice(ODD)
        case 2:
            fresh_map[str(rng.choice(ODD))] = fresh_map.pop(key)
        case _:
            fresh_map[key] = _changed(value[key], rng)
    return fresh_map


def _numbers(data: bytes, rng: random.Random) -> bytes:
    """One number in the text is another."""
    found = list(re.finditer(rb"\d+", data))
    if not found:
        return _bytes(data, rng)
    place = rng.choice(found)
    near = int(place[0][:30]) + rng.choice([-1, 1, 8, -8])
    fresh = rng.choice([str(near), *(str(n) for n in ODD if type(n) is int)])
    return data[: place.start()] + fresh.encode() + data[place.end() :]


def _bytes(data: bytes, rng: random.Random) -> bytes:
    """Some bytes flipped, cut, doubled or put in."""
    fresh = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        low = rng.randint(0, len(fresh))
        high = min(len(fresh), low + rng.choice([1, 1, 2, 8, 64]))
        match rng.randrange(5):
            case 0:
                fresh[low:high] = b""
            case 1:
                fresh[low:low] = fresh[low:high] * rng.randint(1, 3)
            case 2:
                fresh[low:low] = rng.choice(SNIPPETS)
            case 3:
                fresh[low:high] = rng.randbytes(high - low)
            case _:
                del fresh[low:]
                fresh += rng.choice(SNIPPETS)
    return bytes(fresh)
