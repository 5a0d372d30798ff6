"""Running decoders in ONNX, by onnxruntime-genai or by onnxruntime alone; neither needs torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np

from peftc.artifact import MANIFEST, Artifact
from peftc.checkpoint import intruders, read_json, within
from peftc.errors import PeftcError, RunError, raise_all
from peftc.extras import lacking
from peftc.files import is_plain
from peftc.running import Array, Sampling

GRAPH, CONFIG = "model.onnx", "genai_config.json"
ALONE = "adapter.onnx_adapter"  # the file of an adapter that was exported by itself
# Of genai_config.json what says no more than how a decoder is called, and in how many threads.
DECODER = (
    "session_options", "filename", "head_size", "hidden_size", "inputs", "outputs",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
)  # fmt: skip
OPTIONS = ("log_id", "provider_options", "intra_op_num_threads", "inter_op_num_threads")
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class GenAI:
    """onnxruntime-genai, where a directory says how it is to be run."""

    def __init__(self, path: Path, adapter: Path | None) -> None:
        import onnxruntime_genai

        self.genai, self.folder = onnxruntime_genai, path
        self.engine = f"onnxruntime-genai {version('onnxruntime-genai')}"
        raise_all(intruders(path) or dangers(path))
        try:
            self.model = onnxruntime_genai.Model(str(path))
            self.adapters = onnxruntime_genai.Adapters(self.model) if adapter else None
            if self.adapters is not None:
                self.adapters.load(str(adapter), "adapter")
        except Exception as error:  # its exceptions have no class in common
            raise _failed(self.engine, path, error) from error

    @classmethod
    def unfit(cls, path: Path) -> PeftcError | None:
        """See `peftc.running.Runner`."""
        if not (path / CONFIG).is_file():
            return RunError(
                f"has no {CONFIG}: onnxruntime-genai runs no such model",
                where=str(path),
                fix="run it in plain onnxruntime: --engine onnxruntime",
            )
        return next(iter(lacking("--engine genai", "onnx", "onnxruntime_genai")), None)

    @classmethod
    def open(cls, path: Path, adapter: str | None) -> Self:
        """Loads a directory."""
        return cls(path, adapter_file(path, adapter))

    def generate(self, ids: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Sequence[int]]:
        """See `peftc.running.Runner`. Chosen by temperature is for one text at a time."""
        parameters, length = self.genai.GeneratorParams(self.model), len(ids[0])
        longest = length + sampling.max_new_tokens
        parameters.set_search_options(
            batch_size=len(ids), do_sample=False, max_length=longest,
            min_length=0 if sampling.ends else longest,
        )  # fmt: skip
        generator = self.genai.Generator(self.model, parameters)
        if self.adapters is not None:
            generator.set_active_adapter(self.adapters, "adapter")
        generator.append_tokens(np.asarray(ids, np.int32))
        random = np.random.default_rng(sampling.seed)
        for _ in range(sampling.max_new_tokens):
            if sampling.temperature:
                chosen = sampling.choose(generator.get_logits()[:, -1], random)
                yield chosen.tolist()
                generator.append_tokens(chosen.astype(np.int32)[:, None])
            else:
                generator.generate_next_token()
                yield generator.get_next_tokens().tolist()


class PlainRuntime:
    """onnxruntime alone: whatever decoder peftc lowers."""

    def __init__(self, path: Path, adapter: Path | None) -> None:
        import onnxruntime

        self.folder, self.engine = path, f"onnxruntime {onnxruntime.__version__}"
        raise_all(intruders(path))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.options = onnxruntime.RunOptions()
        try:
            self.session = onnxruntime.InferenceSession(
                str(path / GRAPH), options, providers=["CPUExecutionProvider"]
            )
            if adapter is not None:
                self.adapter = onnxruntime.LoraAdapter()
                self.adapter.Load(str(adapter))
                self.options.add_active_adapter(self.adapter)
        except Exception as error:  # as above
            raise _failed(self.engine, path, error) from error
        inputs = {given.name: given for given in self.session.get_inputs()}
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.numbered = "position_ids" in inputs
        self.cache = {name: i for name, i in inputs.items() if name.startswith("past_key_values.")}
        if not self.cache:
            raise RunError(
                "is no decoder: it keeps no keys and values to go on from",
                where=str(path / GRAPH),
                fix="call its session with your own input",
            )
        if unknown := {given.type for given in self.cache.values()} - TYPES.keys():
            raise RunError(
                f"keeps its cache as {', '.join(unknown)}, which NumPy does not have",
                where=str(path / GRAPH),
                fix="run it by onnxruntime-genai: --engine genai",
            )

    @classmethod
    def unfit(cls, path: Path) -> PeftcError | None:
        """See `peftc.running.Runner`."""
        if not (path / GRAPH).is_file():
            return RunError(
                f"holds no {GRAPH}, the graph of a decoder",
                where=str(path),
                fix="of an encoder and a decoder call the two sessions yourself",
            )
        return next(iter(lacking("--engine onnxruntime", "onnx", "onnxruntime")), None)

    @classmethod
    def open(cls, path: Path, adapter: str | None) -> Self:
        """Loads a directory."""
        return cls(path, adapter_file(path, adapter))

    def generate(self, ids: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Sequence[int]]:
        """See `peftc.running.Runner`."""
        new, random = np.asarray(ids, np.int64), np.random.default_rng(sampling.seed)
        batch, length = len(new), 0
        past: dict[str, Array] = {
            name: np.zeros((batch, given.shape[1], 0, given.shape[3]), TYPES[given.type])
            for name, given in self.cache.items()
        }
        for _ in range(sampling.max_new_tokens):
            start, length = length, length + new.shape[1]
            given = {"input_ids": new, "attention_mask": np.ones((batch, length), np.int64), **past}
            if self.numbered:
                given["position_ids"] = np.arange(start, length)[None].repeat(batch, 0)
            logits, *present = self.session.run(self.outputs, given, self.options)
            past = dict(zip(self.cache, present, strict=True))
            chosen = sampling.choose(logits[:, -1], random)
            yield chosen.tolist()
            new = chosen[:, None]


def dangers(path: Path) -> list[PeftcError]:
    """What of a directory's genai_config.json could have onnxruntime-genai load foreign code.

    It knows settings that name libraries, and files elsewhere; peftc writes none of them.
    """
    model = read_json(path / CONFIG, "a model of onnxruntime-genai").get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if not (isinstance(model, dict) and isinstance(decoder, dict)):
        return [_unsafe(path, "describes no decoder")]
    options = decoder.get("session_options", {})
    providers = options.get("provider_options", []) if isinstance(options, dict) else None
    found = [
        f"model.{name}"
        for name, value in model.items()
        if name != "decoder" and isinstance(value, (dict, str)) and name != "type"
    ]
    found += [f"model.decoder.{name}" for name in decoder if name not in DECODER]
    found += [f"session_options.{name}" for name in options or () if name not in OPTIONS]
    if providers not in ([], [{"cpu": {}}], [{"cuda": {}}]):
        found.append("provider_options")
    if not is_plain(str(decoder.get("filename", GRAPH))):
        found.append("model.decoder.filename")
    return [_unsafe(path, f"has settings that peftc does not write: {', '.join(found)}")] * bool(
        found
    )


def _unsafe(path: Path, what: str) -> RunError:
    return RunError(
        f"{what}; some of onnxruntime-genai's settings load code, so it is not run",
        where=str(path / CONFIG),
        fix="take them out, or run it in plain onnxruntime: --engine onnxruntime",
    )


def adapter_file(path: Path, adapter: str | None) -> Path | None:
    """The file of an adapter: of a name that the base has, of a directory, or the file itself.

    Args:
        path: The base, whose files are what was published.
        adapter: What was asked for.

    Raises:
        RunError: There is none, or it was made for another base.
        ArtifactError: It is not what was published.
    """
    if adapter is None:
        return None
    base = Artifact.open(path)
    with base.described():
        said: Mapping[str, Any] = base.manifest.get("onnx") or {}
        own = {
            name: within(path, one["files"][GRAPH])
            for name, one in (said.get("adapters") or {}).items()
        }
    if adapter in own:
        return own[adapter]
    given = Path(adapter)
    folder = given if given.is_dir() else given.parent
    file = folder / ALONE if given.is_dir() else given
    if not file.is_file():
        names = f" or one of {', '.join(own)}" if own else ""
        raise RunError(
            "there is no such adapter",
            where=f"--adapter {adapter}",
            fix=f"name what peftc export --format onnx-adapter wrote{names}",
        )
    if (folder / MANIFEST).is_file():
        artifact = Artifact.open(folder)
        raise_all(artifact.damage())
        with artifact.described():
            fits = (artifact.manifest.get("onnx") or {}).get("base") == said.get("base")
        if not fits:
            raise RunError(
                f"was made for another base than {path}",
                where=f"--adapter {adapter}",
                fix="export it for this one: --format onnx-adapter",
            )
    return file


def _failed(engine: str, path: Path, error: Exception) -> RunError:
    first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
    return RunError(
        f"{engine} cannot load it: {first}",
        where=str(path),
        fix="compare it with what was published: --verify, and export it again",
    )
