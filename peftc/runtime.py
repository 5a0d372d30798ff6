"""Running what `peftc export --format pt2` wrote: torch and safetensors, no model's own code.

A directory has libraries, compiled for one kind of machine, and weights, which are mapped and not
copied. Each layer is a call of a library with the layer's tensors, so adapters are swapped by
handing over other tensors: nothing is compiled again, copied or loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftc.artifact import Artifact, digest
from peftc.calling import MASK, POSITIONS, Tensors
from peftc.checkpoint import contained, read_json
from peftc.errors import ArtifactError, InputError, PeftcError, raise_all
from peftc.extras import lacking
from peftc.libraries import Graph, Plan, mapped, misshapen
from peftc.machine import differences, here
from peftc.resident import Adapter, Slots

KIND = "pt2"
Which = str | Path | Adapter | None


def load(path: str | Path, *, verify: bool = False) -> Runtime:
    """Makes an artifact ready to run.

    Args:
        path: What `peftc export --format pt2` wrote.
        verify: Compare the hashes of all files, of the weights too. That of the libraries is always
            compared, before any is loaded.

    Raises:
        ArtifactError: It is none, was built for another machine or torch, or is not what was
            published (all that is wrong, before anything is loaded).
    """
    artifact = Artifact.open(Path(path))
    if artifact.manifest["kind"] != KIND:
        raise ArtifactError(
            f"is of kind {artifact.manifest['kind']!r}, and holds no compiled model",
            where=str(path),
            fix="export it with --format pt2",
        )
    with artifact.described():
        told = artifact.manifest["pt2"]
        errors = differences(told["built"], here(told["built"]["device"]), str(path))
        errors += artifact.damage() if verify else _foreign(artifact, told["library"])
        raise_all(errors)
        return Runtime(artifact.path, told)


def _foreign(artifact: Artifact, name: str) -> list[PeftcError]:
    """An error where the libraries are not those of the manifest."""
    with suppress(PeftcError, OSError, KeyError, TypeError):
        file = contained(artifact.path, name)
        if digest(file) == artifact.manifest["files"][name]["blake3"]:
            return []
    return [
        ArtifactError(
            "is not the library that was published, and is not loaded",
            where=str(artifact.path / name),
            fix="export it again",
        )
    ]


class Runtime:
    """A compiled model in memory; `load` makes it.

    Attributes:
        graphs: Its graphs by name.
        slots: Where it takes adapters.
    """

    def __init__(self, path: Path, told: Mapping[str, Any]) -> None:
        self.path, self.told = path, told
        self.graphs = {n: Graph.read(n, graph) for n, graph in told["graphs"].items()}
        self.slots = Slots(path, told.get("adapters"))
        constants = mapped(path, told)
        if any("peftc::" in operator for operator in told["operators"]):
            import peftc.kernels.nf4_ops  # noqa: F401  # which registers what the libraries call
        self._plans = {
            name: Plan(path / told["library"], graph, constants, self.slots.tensor_names)
            for name, graph in self.graphs.items()
        }
        self.swap(None)

    def run(self, given: Tensors, graph: str | None = None) -> Tensors:
        """Runs a graph once.

        Args:
            given: Its inputs by name, of shapes that agree.
            graph: Its name; default: the only or the last one.

        Raises:
            InputError: An input is missing, too much, or of another dtype or shape than it takes.
        """
        name = graph or list(self.graphs)[-1]
        raise_all(self._wrong(self.graphs[name], given))
        if self.slots.rows:
            self._bind(len(next(iter(given.values()))))
        return self._plans[name].run(given)

    @property
    def adapters(self) -> list[str]:
        """The adapters that were published with it, which `swap` knows by name."""
        return list(self.slots.published)

    def load_adapter(self, which: str | Path) -> Adapter:
        """Reads an adapter, to swap it in later: one of `adapters`, or a directory of PEFT's LoRA.

        Raises:
            AdapterError: There is none, it is no LoRA, or does not fit the slots.
        """
        return self.slots.read(which)

    def swap(self, which: Which | Sequence[Which]) -> None:
        """Puts an adapter in the place of the one that is on.

        Args:
            which: What `load_adapter` gave, or takes; None for the base. Of an artifact that was
                exported with `--adapters rows` also a list of such, one for each row of the
                batches to come.

        Raises:
            AdapterError: It does not fit.
        """
        self.slots.choose(which)
        self._bound = 0
        self._bind(1)

    def _bind(self, batch: int) -> None:
        """Has the libraries given what is on; of each row its own where it is for so many."""
        if batch != self._bound:
            chosen, self._bound = self.slots.tensors(batch), batch
            for plan in self._plans.values():
                plan.bind(chosen)

    def generate(
        self,
        given: Tensor | Tensors,
        max_new_tokens: int = 64,
        *,
        mask: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: Sequence[int] | None = None,
    ) -> Tensor:
        """Goes on with texts.

        Args:
            given: Token ids (batch, sequence); of an encoder-decoder, the encoder's input.
            max_new_tokens: At most so many.
            mask: (batch, sequence): 0 is padding, on the left.
            temperature: 0 takes the likeliest token; else sampled, by transformers' own processors.
            top_k: Sample from so many of the likeliest.
            top_p: Sample from the likeliest that together have this probability.
            seed: Of the sampling.
            stop: Tokens that end a text; default: the model's own.

        Returns:
            (batch, new tokens); what follows a text's end is that last token again.

        Raises:
            InputError: It does not fit the model, or the text would be longer than it can be.
        """
        choose = _chooser(temperature, top_k, top_p, seed)
        tokens = list(self.stream(given, max_new_tokens, mask=mask, choose=choose, stop=stop))
        return torch.stack(tokens, 1)

    def stream(
        self,
        given: Tensor | Tensors,
        max_new_tokens: int = 64,
        *,
        mask: Tensor | None = None,
        choose: Callable[[Tensor, Tensor], Tensor] | None = None,
        stop: Sequence[int] | None = None,
    ) -> Iterator[Tensor]:
        """`generate`, token by token.

        Args:
            given: As for `generate`.
            max_new_tokens: Likewise.
            mask: Likewise.
            choose: Of the ids so far (batch, length) and the logits (batch, vocabulary), the next
                tokens (batch,); default: the likeliest.
            stop: As for `generate`.

        Yields:
            (batch,): the tokens of a step.
        """
        graph, ids, fixed = self._start(given)
        ends = torch.tensor(self.ends if stop is None else [*stop], dtype=torch.int64)
        sizes = {"batch": len(ids), "past": 0}
        past = {
            port.name: torch.zeros(
                [sizes[d] if isinstance(d, str) else d for d in port.dims], dtype=port.dtype
            )
            for port in graph.inputs
            if "past" in port.dims
        }
        takes = {port.name for port in graph.inputs}
        seen = torch.ones_like(ids) if mask is None else mask.to(torch.int64)
        now, ended = ids, torch.zeros(len(ids), dtype=torch.bool)
        for _ in range(max_new_tokens):
            step = {"input_ids": now, **fixed, **past}
            if MASK in takes:
                step[MASK] = seen
            if POSITIONS in takes:
                step[POSITIONS] = (seen.cumsum(1) - 1).clamp(min=0)[:, -now.shape[1] :].contiguous()
            out = self.run(step, graph.name)
            past = {name: out[name.replace("past_key_values.", "present.")] for name in past}
            scores = out["logits"][:, -1]
            token = scores.argmax(-1) if choose is None else choose(ids, scores)
            token = torch.where(ended, ids[:, -1], token)
            yield token
            ended |= torch.isin(token, ends)
            if bool(ended.all()):
                return
            now = token[:, None]
            ids = torch.cat([ids, now], 1)
            seen = torch.cat([seen, torch.ones_like(now)], 1)

    @cached_property
    def ends(self) -> list[int]:
        """The tokens that end a text."""
        found = self._config.get("eos_token_id")
        return [] if found is None else [*found] if isinstance(found, list) else [found]

    @cached_property
    def tokenizer(self) -> Any:
        """The directory's tokenizer, by the library `tokenizers`.

        Raises:
            MissingDependency: It is not installed.
            ArtifactError: The directory has none that it can read.
        """
        raise_all(lacking("a tokenizer", "pt2", "tokenizers"))
        from tokenizers import Tokenizer

        file = self.path / "tokenizer.json"
        if not (file.is_file() and contained(self.path, file.name)):
            raise ArtifactError(
                "is missing, and text cannot be made tokens of",
                where=str(file),
                fix="give token ids, or save a fast tokenizer beside the checkpoint",
            )
        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:  # the library's exceptions have no class in common
            raise ArtifactError(
                f"cannot be read: {str(error).splitlines()[0]}",
                where=str(file),
                fix="save a fast tokenizer there again",
            ) from error

    @cached_property
    def _config(self) -> dict[str, Any]:
        """What the model's files say of generating; the second file knows better."""
        found: dict[str, Any] = {}
        for name in ("config.json", "generation_config.json"):
            if (self.path / name).is_file():
                told = read_json(self.path / name, "a model's configuration")
                inner = told.get("text_config")
                found |= {**(inner if isinstance(inner, dict) else {}), **told}
        return found

    def _start(self, given: Tensor | Tensors) -> tuple[Graph, Tensor, Tensors]:
        """The graph that generates, its first tokens, and what it is given at each step."""
        graph = list(self.graphs.values())[-1]
        if not graph.takes_past:
            raise InputError(
                "generates no text", where=str(self.path), fix="call run, which gives its outputs"
            )
        first = next(iter(self.graphs.values()))
        tensors = given if isinstance(given, dict) else {first.inputs[0].name: given}
        if first is graph:
            return graph, tensors["input_ids"], {}
        batch = len(next(iter(tensors.values())))
        if any(port.name == MASK for port in first.inputs) and MASK not in tensors:
            tensors = {**tensors, MASK: torch.ones_like(next(iter(tensors.values())))}
        fixed = {"encoder_hidden_states": self.run(tensors, first.name)["last_hidden_state"]}
        if any(port.name == "encoder_attention_mask" for port in graph.inputs):
            fixed["encoder_attention_mask"] = tensors[MASK]
        start = self._config.get("decoder_start_token_id", 0)
        return graph, torch.full((batch, 1), start, dtype=torch.int64), fixed

    def _wrong(self, graph: Graph, given: Tensors) -> list[PeftcError]:
        """What keeps a graph from taking these inputs."""
        takes = {port.name: port for port in graph.inputs}
        errors: list[PeftcError] = [
            InputError(
                "is missing" if name in takes else "is no input",
                where=f"input {name}",
                fix=f"it takes {', '.join(n for n in takes if 'past_key' not in n)} and its past",
            )
            for name in takes.keys() ^ given.keys()
        ]
        sizes: dict[str, int] = {}
        for name in takes.keys() & given.keys():
            errors += misshapen(takes[name], given[name], sizes)
        past, now = sizes.get("past", 0), sizes.get("sequence", 0)
        total = sizes.get("past + sequence", past + now)
        limit = self.told["limits"].get("past + sequence")
        if not errors and "past" in sizes and total != past + now:
            errors.append(
                InputError(
                    f"is for {total} tokens, and there are {past} before and {now} now",
                    where=f"input {MASK}",
                    fix="it covers both",
                )
            )
        if limit is not None and total > limit:
            errors.append(
                InputError(
                    f"has {total} tokens, and the model was exported for at most {limit}",
                    where="input input_ids",
                    fix="give a shorter text, or ask for fewer new tokens",
                )
            )
        return errors[:5] + self.slots.misfits(sizes.get("batch"))


def _chooser(
    temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What samples the next tokens; None takes the likeliest."""
    if not temperature:
        return None
    from transformers import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    processors = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    generator = torch.Generator().manual_seed(seed)

    def choose(ids: Tensor, scores: Tensor) -> Tensor:
        odds = processors(ids, scores.float()).softmax(-1)
        return torch.multinomial(odds, 1, generator=generator)[:, 0]

    return choose


__all__ = ["Adapter", "Graph", "Runtime", "load"]
