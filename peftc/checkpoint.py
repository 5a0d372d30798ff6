"""A read-only view of a Hugging Face checkpoint directory, from its headers alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peftc.errors import CheckpointError, PeftcError, raise_all
from peftc.files import clashes, content, is_plain, opened
from peftc.safetensors_file import SafetensorsFile, TensorRef, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PEFT_PREFIX = "base_model.model."  # of every tensor's name in a PEFT adapter
MAX_JSON = 64 << 20
PAGES = 64  # of each weight file, sampled to tell whether it is still the same
# What a directory that transformers loads may hold beside its weights, and an export carries over.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "spiece.model", "sentencepiece*.model",
    "chat_template.*", "additional_chat_templates/*", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "image_processor_config.json",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A directory with config.json and safetensors weights, of which no tensor is read yet."""

    path: Path
    config: Mapping[str, Any]
    files: tuple[SafetensorsFile, ...]
    indexed: bool

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Opens a local directory; `resolve` turns a hub id into one.

        Raises:
            CheckpointError: There is no config.json or no safetensors weights, the index names a
                shard that is missing or outside the directory, or a header is damaged.
        """
        root = Path(path)
        if not root.is_dir():
            raise CheckpointError(
                "there is no such directory", where=str(root), fix="check the path"
            )
        config = read_json(root / "config.json", "a Hugging Face checkpoint")
        shards, weight_map = _shards(root, config)
        files, errors = [], list[PeftcError]()
        for shard in shards:
            try:
                files.append(read_header(contained(root, shard), root / "config.json"))
            except CheckpointError as error:
                errors.append(error)
        raise_all([*errors, *intruders(root, besides=shards)])
        found = {name: file.path.name for file in files for name in file.tensors}
        if sum(len(file.tensors) for file in files) != len(found):
            raise CheckpointError(
                "two shards hold the same tensor",
                where=str(root / INDEX),
                fix="download the index and its shards again, from one revision",
            )
        strays = [n for n, shard in (weight_map or {}).items() if found.get(n) != shard]
        if strays:
            raise CheckpointError(
                f"the index places {len(strays)} tensors where they are not: "
                f"{', '.join(strays[:3])}",
                where=str(root / INDEX),
                fix="download the index and its shards again, from one revision",
            )
        return cls(root, config, tuple(files), weight_map is not None)

    @cached_property
    def tensors(self) -> Mapping[str, TensorRef]:
        """Every tensor by its name, in the order of the files."""
        return {name: ref for file in self.files for name, ref in file.tensors.items()}

    @cached_property
    def nbytes(self) -> int:
        """The size of all weights in bytes."""
        return sum(file.size for file in self.files)

    @property
    def companions(self) -> dict[str, Path]:
        """The files beside the weights that the loaded model needs, by their relative names.

        Raises:
            CheckpointError: One of them is a link out of the directory.
        """
        found = {}
        for pattern in (*COMPANIONS, INDEX) if self.indexed else COMPANIONS:
            for file in self.path.glob(pattern):
                if file.is_file():
                    found[str(file.relative_to(self.path))] = contained(file.parent, file.name)
        return dict(sorted(found.items()))

    def pin(self) -> dict[str, Any]:
        """What identifies these weights without reading them whole: sizes, headers, some pages."""
        return {
            "path": str(self.path.resolve()),
            "config": digest_file(self.path / "config.json"),
            "files": {
                file.path.name: {"size": file.size, "sample": _sampled_digest(file)}
                for file in self.files
            },
        }


def resolve(source: str | Path) -> Path:
    """Turns a local directory or a hub id such as `org/name` into a local directory.

    Raises:
        CheckpointError: Neither exists, or the hub cannot be reached and its cache lacks the model.
    """
    path = Path(source)
    try:
        there = path.exists()
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror}", where=str(source), fix="check the path"
        ) from error
    if there or not HUB_ID.fullmatch(str(source)):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = ["*.safetensors", INDEX, "adapter_config.json", *COMPANIONS]
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"is neither a directory here nor to be had from the hub ({reason})",
            where=str(source),
            fix="check the name; offline, download it first: `hf download " + str(source) + "`",
        ) from error


def contained(root: Path, name: str) -> Path:
    """The path of `name` in `root`, refused where it is no plain name or leads out of the folder.

    A link is followed inside `root` and, in the hub's cache, from a snapshot to its own blobs.
    """
    if not is_plain(name):
        raise CheckpointError(
            f"names the file {name!r}, which is not a plain file name",
            where=str(root),
            fix="do not use it: a name in a file must not lead out of the file's folder",
        )
    path = root / name
    if not os.path.exists(path):  # noqa: PTH110  (Path.exists raises on names that are too long)
        raise CheckpointError("is missing", where=str(path), fix="download the missing file")
    real, home = path.resolve(), root.resolve()
    snapshot = next((p for p in (home, *home.parents) if p.parent.name == "snapshots"), None)
    blobs = snapshot.parent.parent / "blobs" if snapshot else home
    if real.parent not in (home, blobs):
        raise CheckpointError(
            f"is a link out of its folder, to {real}",
            where=str(path),
            fix="copy the file into the folder if you trust it",
        )
    if not real.is_file():
        raise CheckpointError(
            "is not a regular file", where=str(path), fix="put a file there, or remove it"
        )
    return path


def subfolder(root: Path, name: str) -> Path:
    """The path of a folder in `root`, its name as a file has it: with slashes, and no way out.

    Raises:
        CheckpointError: It leads out of `root`, or by a link.
    """
    path = root
    for part in name.split("/"):
        path /= part
        if not is_plain(part) or path.is_symlink():
            raise CheckpointError(
                f"names the folder {name!r}, which leads out of it",
                where=str(root),
                fix="do not use it: a name in a file must not lead out of the file's folder",
            )
    return path


def within(root: Path, name: str) -> Path:
    """The path of a file in `root` or in its folders; see `contained` and `subfolder`."""
    folder, slash, leaf = name.rpartition("/")
    return contained(subfolder(root, folder) if slash else root, leaf)


def intruders(root: Path, besides: Collection[str] = ()) -> list[PeftcError]:
    """What a library must not come across that opens a folder's files by itself.

    Args:
        root: The folder, of which those with chat templates are a part.
        besides: Files that are looked at elsewhere.

    Returns:
        An error for each pipe or device, and for each link out of the folder.
    """
    errors: list[PeftcError] = []
    for folder in (root, root / "additional_chat_templates"):
        if folder.is_symlink() and folder != root:
            errors.append(
                CheckpointError("is a link", where=str(folder), fix="copy what it leads to")
            )
        elif folder.is_dir():
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                # What a link that leads nowhere names is not there, and a regular file is at home.
                sound = entry.is_file(follow_symlinks=False) or not os.path.exists(entry)  # noqa: PTH110
                if sound or entry.is_dir() or entry.name in besides:
                    continue
                try:
                    contained(folder, entry.name)
                except CheckpointError as error:
                    errors.append(error)
    return errors


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """Reads a JSON object of bounded size; `kind` says what the folder then is."""
    try:
        if path.is_symlink():
            contained(path.parent, path.name)
        value = json.loads(content(path, MAX_JSON))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"is missing, so the folder is not {kind}",
            where=str(path),
            fix="name a folder that holds it",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"cannot be read: {why}", where=str(path), fix="download or write it again"
        ) from error
    return value


def cache_folder() -> Path:
    """Where peftc keeps what it can make again: `$PEFTC_CACHE`, or `~/.cache/peftc`."""
    return Path(os.environ.get("PEFTC_CACHE") or "~/.cache/peftc").expanduser()


def digest_bytes(data: bytes) -> str:
    """The SHA-256 of `data` in hex."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """The SHA-256 of a regular file in hex."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sampled_digest(file: SafetensorsFile) -> str:
    """A hash of the header and of pages spread over the tensors: quick, and seldom deceived."""
    with opened(file.path) as handle:
        length = int.from_bytes(handle.read(8), "little")
        sample = [handle.read(length)]
        for i in range(PAGES):
            handle.seek(8 + length + (file.size - 8 - length) * i // PAGES)
            sample.append(handle.read(4096))
        return digest_bytes(b"".join(sample))


def _shards(root: Path, config: Mapping[str, Any]) -> tuple[list[str], dict[str, str] | None]:
    index = root / INDEX
    if index.exists():
        weight_map = read_json(index, "a sharded checkpoint").get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(shard, str) for shard in weight_map.values()
        ):
            raise CheckpointError(
                "has no weight_map of names", where=str(index), fix="download it again"
            )
        shards = sorted(set(weight_map.values()))
        if twins := clashes(shards):
            raise CheckpointError(
                f"names files that differ by their letters' case alone: {', '.join(twins)}",
                where=str(index),
                fix="rename one of them, in the index too: some disks take them for one file",
            )
        return shards, weight_map
    if (root / SINGLE).exists():
        return [SINGLE], None
    pickles = sorted(file.name for file in root.glob("*.bin")) + sorted(
        file.name for file in root.glob("*.pt*")
    )
    if pickles:
        names = config.get("architectures")
        cls = names[0] if isinstance(names, list) and names else "AutoModel"
        cls = cls if isinstance(cls, str) and cls.isidentifier() else "AutoModel"
        code = (
            f"from transformers import {cls}; {cls}.from_pretrained({str(root)!r})"
            f".save_pretrained({str(root) + '-safetensors'!r})"
        )
        raise CheckpointError(
            f"holds only pickled weights ({pickles[0]}), which run code when opened",
            where=str(root),
            fix=f"convert it once, if you trust it: python -c {shlex.quote(code)}",
        )
    raise CheckpointError(
        f"holds no weights: neither {SINGLE} nor {INDEX}",
        where=str(root),
        fix="name a folder that holds them",
    )
