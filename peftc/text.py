"""Text and tokens of a model's directory, without torch, which takes seconds to import.

What transformers reads is read: tokenizer.json by its own library, the chat template by
transformers' sandbox for it, and from the configs which tokens end a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from peftc.checkpoint import MAX_JSON, contained, read_json
from peftc.errors import RunError
from peftc.files import content

Message = Mapping[str, str]  # role and content


class Text:
    """A tokenizer, and what the configs beside it say of a text.

    Args:
        folder: Where tokenizer.json and config.json lie.

    Raises:
        RunError: There is no tokenizer.json, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.folder, file = folder, folder / "tokenizer.json"
        if file.exists():
            contained(folder, file.name)
        try:
            self.tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library's exceptions have no class in common
            raise RunError(
                f"cannot be read: {str(error).splitlines()[0]}",
                where=str(file),
                fix="let transformers write it: AutoTokenizer.from_pretrained(DIR)"
                ".save_pretrained(DIR), and export again",
            ) from error

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text."""
        given = self._known("eos_token_id")
        return frozenset(
            token
            for token in (given if isinstance(given, list) else [given])
            if isinstance(token, int)
        )

    @cached_property
    def context(self) -> int | None:
        """How many tokens the model takes, where a config says so."""
        genai = _read(self.folder / "genai_config.json").get("model")
        names = ("max_position_embeddings", "n_positions")
        said = genai.get("context_length") if isinstance(genai, dict) else None
        known = (said, *map(self._known, names))
        return next((length for length in known if isinstance(length, int)), None)

    def encode(self, prompt: str) -> list[int]:
        """A prompt's tokens, with those that the tokenizer puts before every text."""
        return list(self.tokenizer.encode(prompt).ids)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation by the chat template, where the answer begins.

        Raises:
            RunError: There is no template, or it refuses the messages.
        """
        from transformers.utils.chat_template_utils import render_jinja_template  # without torch

        if (source := self._template) is None:
            raise RunError(
                "has no chat template",
                where=str(self.folder),
                fix="leave out --chat and --system, or put chat_template.jinja there before the "
                "export",
            )
        special = _read(self.folder / "tokenizer_config.json")
        tokens = {
            name: token.get("content") if isinstance(token, dict) else token
            for name, token in special.items()
            if name.endswith("_token") and token is not None
        }
        try:
            (written,), _ = render_jinja_template(
                [list(messages)], chat_template=source, add_generation_prompt=True, **tokens
            )
            return list(self.tokenizer.encode(written, add_special_tokens=False).ids)
        except Exception as error:  # a template may raise anything
            raise RunError(
                f"the chat template refuses the messages: {error}",
                where=str(self.folder),
                fix="ask without --system, or without --chat",
            ) from error

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of tokens, as soon as characters are whole; special tokens are left out."""
        from tokenizers.decoders import DecodeStream

        stream, made, shown = DecodeStream(skip_special_tokens=True), list[int](), ""
        for token in tokens:
            made.append(token)
            if piece := stream.step(self.tokenizer, token):
                shown += piece
                yield piece
        whole = self.tokenizer.decode(made, skip_special_tokens=True)
        if whole.startswith(shown) and len(whole) > len(shown):  # a character that was cut off
            yield whole[len(shown) :]

    @property
    def _template(self) -> str | None:
        file = self.folder / "chat_template.jinja"
        if file.exists():
            try:
                return content(contained(self.folder, file.name), MAX_JSON).decode()
            except (OSError, UnicodeDecodeError) as error:
                raise RunError(
                    f"cannot be read: {error}", where=str(file), fix="save the tokenizer again"
                ) from error
        given = _read(self.folder / "tokenizer_config.json").get("chat_template")
        if isinstance(given, list):  # several by name
            named = [one for one in given if isinstance(one, dict) and one.get("name") == "default"]
            given = named[-1].get("template") if named else None
        return given if isinstance(given, str) else None

    def _known(self, name: str) -> Any:
        """What the first config says that says anything."""
        config = _read(self.folder / "config.json")
        inner = config.get("text_config")
        places = (_read(self.folder / "generation_config.json"), config, inner)
        found = (place.get(name) for place in places if isinstance(place, dict))
        return next((value for value in found if value is not None), None)


def _read(file: Path) -> dict[str, Any]:
    return read_json(file, "a checkpoint") if file.exists() else {}
