"""Prompt tuning: trained vectors before the input (Lester et al. 2021, arXiv:2104.08691, §2).

The embedding of a vocabulary of V ids gets more of them: `where(ids ≥ V, prompt[ids − V], W[ids])`.
The live model puts ids V, V + 1, … before its inputs by itself (see `peftc.virtual`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr

from peftc.checkpoint import PEFT_PREFIX, intruders
from peftc.contract import Effect, Method, PassResult, Place
from peftc.errors import (
    SAVE_AGAIN,
    AdapterError,
    PassError,
    PeftcError,
    SelectionError,
    raise_all,
)
from peftc.targets import Names

if TYPE_CHECKING:
    from torch import fx, nn

    from peftc.constants import Constant
    from peftc.program import Program
    from peftc.sites import SiteEditor

EMBEDDING = "token-embedding"
_ENCODER = "prompt_encoder"  # the module in which PEFT keeps a prompt
TABLE = "embedding.weight"  # and what it looks up there
_FILE = "prompt_embeddings"  # what it calls the vectors in its files
_MULTITASK = "MULTITASK_PROMPT_TUNING"
_COLUMNS, _ROWS = "prefix_task_cols", "prefix_task_rows"


class Prompt(Method):
    """A method whose trained vectors stand before the input."""

    effect: ClassVar[Effect] = Effect.CHANGES
    kinds: ClassVar[frozenset[str]] = frozenset({"embedding"})
    prefixed: ClassVar[bool] = True
    apart: ClassVar[str | None] = "a prompt is an input of its own, and no change of a weight"
    # What PEFT reads off the model.
    peft_neutral: ClassVar[frozenset[str]] = frozenset(
        {"token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"}
    )
    peft_fields: ClassVar[Mapping[str, str]] = {
        "num_virtual_tokens": "virtual_tokens", "positions": "positions",
    }  # fmt: skip

    targets: Names = Field(
        EMBEDDING, description=f"the embedding's name; {EMBEDDING}: the one that the model names"
    )
    virtual_tokens: int = Field(20, gt=0, description="how many vectors stand before the input")
    positions: Literal["peft", "mask"] = Field(
        "peft", description="how tokens are numbered: pads too, as PEFT leaves it to the model; or "
        "by the attention mask, as transformers' generate does",
    )  # fmt: skip

    _vocabulary: int = PrivateAttr(0)
    _first: int = PrivateAttr(0)  # virtual id, behind the vocabulary and other prompts' ids
    _width: int = PrivateAttr(0)

    @abstractmethod
    def table(self, site: SiteEditor) -> fx.Node:
        """The vectors (tokens, features), fp32."""

    def inject(self, site: SiteEditor) -> None:
        from peftc.graphs import aten

        first, table = self._first, self.table(site)
        site.change_input(lambda x: site.op(aten.clamp.default, x, None, first - 1))
        virtual = site.op(aten.unsqueeze.default, site.op(aten.ge.Scalar, site.x, first), -1)
        index = site.op(aten.clamp.default, site.op(aten.sub.Scalar, site.x, first), 0)
        rows = site.type_as(site.op(aten.embedding.default, table, index), site.y)
        site.y = site.op(aten.where.self, virtual, rows, site.y)

    def pick(self, program: Program) -> tuple[list[str], list[PeftcError]]:
        if self.targets != EMBEDDING:
            return super().pick(program)
        if program.embedding in program.sites:
            return [str(program.embedding)], []
        return [], [
            SelectionError(
                "the model has no token embedding to put a prompt before",
                fix="name it if there is one (targets=…); a prompt needs a model that takes ids",
            )
        ]

    def unserved(self, program: Program, names: Sequence[str]) -> list[PeftcError]:
        errors = super().unserved(program, names)
        if program.context is not None and self.virtual_tokens >= program.context:
            errors.append(
                PassError(
                    f"{self.virtual_tokens} virtual tokens leave no room: the model has "
                    f"{program.context} positions",
                    where="max_position_embeddings",
                    fix="take fewer tokens",
                )
            )
        if len(names) > 1:
            errors.append(
                PassError(
                    f"a prompt belongs to one embedding, and {len(names)} are named",
                    where=names[1],
                    fix="name the one that the input ids go into",
                )
            )
        return errors

    def settled(self, program: Program) -> Self:
        chosen, errors = self.pick(program)
        raise_all(errors)
        settled = self.model_copy()
        site = program.sites[chosen[0]]
        settled._vocabulary, settled._width = site.in_features, site.out_features
        others = (adapter.method for adapter in program.adapters.values())
        taken = sum(other.virtual_tokens for other in others if isinstance(other, Prompt))
        settled._first = site.in_features + taken
        return settled

    def enliven(self, model: nn.Module, tensors: Mapping[str, Any]) -> None:
        from peftc.virtual import put_before

        put_before(model, self._first, self.virtual_tokens, self.positions)

    def withdraw(self, model: nn.Module) -> None:
        from peftc.virtual import take_back

        take_back(model)

    def run(self, program: Program) -> PassResult:
        # On the ids that there were before, no site differs.
        return replace(super().run(program), measured={"virtual_tokens": self.virtual_tokens})

    def peft_config(self) -> dict[str, Any]:
        config = super().peft_config()
        if self.positions == "peft":
            del config["positions"]  # which PEFT does not have
        return {**config, "token_dim": self._width, "num_transformer_submodules": 1}

    def from_file(
        self, program: Program, config: Mapping[str, Any], tensors: Mapping[str, Constant]
    ) -> Mapping[str, Constant]:
        chosen, errors = self.pick(program)
        if _FILE not in tensors:
            errors.append(AdapterError(f"lacks {_FILE}", fix=SAVE_AGAIN))
        raise_all(errors)
        table = f"{PEFT_PREFIX}{chosen[0]}.{_ENCODER}.{TABLE}"
        rest = {key: constant for key, constant in tensors.items() if key != _FILE}
        return {table: self._used(tensors[_FILE]), **rest}

    def _used(self, table: Constant) -> Constant:
        """The vectors that are looked up; for encoder-decoders PEFT keeps as many more."""
        from peftc.constants import derive
        from peftc.graphs import Builder, aten

        if len(table.spec.shape) != 2 or table.spec.shape[0] != 2 * self.virtual_tokens:
            return table
        build = Builder()
        build.graph.output(
            build.op(aten.slice.Tensor, build.const("all"), 0, 0, self.virtual_tokens)
        )
        return derive(build.graph, {"all": table}, table.spec.dtype)

    def written(self, tensors: Mapping[str, Constant]) -> Mapping[str, Constant]:
        mark = f".{_ENCODER}."
        own = {key.partition(mark)[2]: c for key, c in tensors.items() if mark in key}
        rest = {key: constant for key, constant in tensors.items() if mark not in key}
        return {_FILE: self.evaluated(own), **rest}

    def evaluated(self, parts: Mapping[str, Constant]) -> Constant:
        """The vectors as one constant, from the trained tensors by PEFT's names of them."""
        return parts[TABLE]


class PromptTuning(Prompt):
    """Train vectors that stand before the input, and nothing of the model."""

    peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    # A context-aware prompt is saved as it is used; one of many tasks is a product (`_of_task`).
    peft_kin: ClassVar[frozenset[str]] = frozenset({"CPT", _MULTITASK})
    peft_neutral: ClassVar[frozenset[str]] = Prompt.peft_neutral | {
        "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path",
        "tokenizer_kwargs", "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task",
        "num_ranks", "num_tasks", "cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask",
        "opt_weighted_loss_type", "opt_loss_decay_factor", "opt_projection_epsilon",
        "opt_projection_format_epsilon",
    }  # fmt: skip

    init: Literal["random", "text", "vocabulary"] = Field(
        "random",
        description="the start: normal noise; the embeddings of a text, repeated or cut to length; "
        "or those of tokens drawn from the vocabulary",
    )
    text: str | None = Field(None, min_length=1, description="the text to start from")
    tokenizer: Place | None = Field(
        None, description="whose tokens the text has: a directory or hub id; default: the base's"
    )

    _ids: tuple[int, ...] = PrivateAttr(())

    def table(self, site: SiteEditor) -> fx.Node:
        shape = self.virtual_tokens, site.out_features
        start = self._embedded(site) if self._ids and site.given is None else None
        return site.parameter(f"{_ENCODER}.{TABLE}", shape, "gaussian", start=start)

    def _embedded(self, site: SiteEditor) -> Constant:
        """What the site makes of the start's ids."""
        import torch

        from peftc.constants import Initial, derive
        from peftc.graphs import Builder, Spec

        spec = Spec((self.virtual_tokens,), torch.int64)
        ids = Initial("start", spec, "values", values=self._ids)
        build = Builder()
        matrix = site.kind.matrix(build, build.const("weight"))
        build.graph.output(site.kind.apply(build, build.const("ids"), matrix))
        return derive(build.graph, {"weight": site.bound["weight"], "ids": ids}, torch.float32)

    def check(self, program: Program) -> list[PeftcError]:
        errors = super().check(program)
        if (self.init == "text") != (self.text is not None):
            errors.append(
                PassError(
                    "a start from a text needs init=text, and the text",
                    where="init",
                    fix="give both init and text, or neither",
                )
            )
        elif not errors and self.text is not None:
            try:
                self._of_text(program)
            except PeftcError as error:
                errors.append(error)
        return errors

    def settled(self, program: Program) -> Self:
        settled = super().settled(program)
        if self.text is not None:
            ids = self._of_text(program)
            settled._ids = tuple(ids[i % len(ids)] for i in range(self.virtual_tokens))
        elif self.init == "vocabulary":
            import torch

            generator = torch.Generator().manual_seed(self.seed)
            drawn = torch.randint(settled._vocabulary, (self.virtual_tokens,), generator=generator)
            settled._ids = tuple(drawn.tolist())
        return settled

    def from_file(
        self, program: Program, config: Mapping[str, Any], tensors: Mapping[str, Constant]
    ) -> Mapping[str, Constant]:
        if config["peft_type"] == _MULTITASK and _FILE in tensors:
            if config.get("num_transformer_submodules") == 2:
                raise AdapterError(
                    "puts a second prompt before the decoder, as PEFT's multitask prompts alone do",
                    where=_MULTITASK,
                    fix="train a PROMPT_TUNING of it, whose prompt goes before the encoder",
                )
            tensors = _of_task(tensors)
        return super().from_file(program, config, tensors)

    def _of_text(self, program: Program) -> list[int]:
        """The ids of the text.

        Raises:
            PassError: There is no tokenizer, or it makes none, or ids that the model lacks.
        """
        from transformers import AutoTokenizer

        place = self.tokenizer or program.source.name or ""
        if Path(place).is_dir():
            raise_all(intruders(Path(place)))
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            ids = list(tokenizer(self.text)["input_ids"])
        except Exception as error:  # any library code may fail on files from outside
            raise PassError(
                f"there is no tokenizer to read the text with: {str(error).splitlines()[0]}",
                where=str(place),
                fix="name one: tokenizer=…",
            ) from error
        vocabulary = program.sites[self.pick(program)[0][0]].in_features
        if not ids or max(ids) >= vocabulary:
            raise PassError(
                f"the tokenizer makes {len(ids)} tokens of the text, up to {max(ids, default=0)}, "
                f"and the model's vocabulary is of {vocabulary}",
                where=str(place),
                fix="name the tokenizer that the model was trained with: tokenizer=…",
            )
        return ids

    def peft_config(self) -> dict[str, Any]:
        named = {"random": "RANDOM", "text": "TEXT", "vocabulary": "SAMPLE_VOCAB"}[self.init]
        if named != "TEXT" or not self.tokenizer:  # which PEFT asks for
            return {**super().peft_config(), "prompt_tuning_init": named.replace("TEXT", "RANDOM")}
        return {
            **super().peft_config(),
            "prompt_tuning_init": named,
            "prompt_tuning_init_text": self.text,
            "tokenizer_name_or_path": self.tokenizer,
        }


def _of_task(tensors: Mapping[str, Constant]) -> dict[str, Constant]:
    """The prompt P ∘ (C·R) of the one task of a multitask prompt (arXiv:2303.02861, equation 1).

    Raises:
        AdapterError: It has several, or parts that do not belong together.
    """
    from peftc.constants import derive
    from peftc.graphs import Builder, aten

    rest = {key: c for key, c in tensors.items() if key not in (_COLUMNS, _ROWS)}
    parts = {key: c for key, c in tensors.items() if key in (_FILE, _COLUMNS, _ROWS)}
    shapes = {key: c.spec.shape for key, c in parts.items()}
    tasks, rank = (*shapes.get(_ROWS, ()), 0, 0)[:2]
    n, features = (*shapes[_FILE], 0, 0)[:2]
    if (shapes.get(_COLUMNS), shapes.get(_ROWS)) != ((tasks, n, rank), (tasks, rank, features)):
        raise AdapterError(
            f"is no multitask prompt: {', '.join(f'{k} {list(s)}' for k, s in shapes.items())}",
            fix=SAVE_AGAIN,
        )
    if tasks != 1:
        raise AdapterError(
            f"holds the prompts of {tasks} tasks, and a model has one",
            fix="take one task's out of it with PEFT: MultitaskPromptTuningConfig(num_tasks=1, "
            'prompt_tuning_init="EXACT_SOURCE_TASK", prompt_tuning_init_task=…)',
        )
    build = Builder()
    columns, rows = (build.op(aten.select.int, build.const(key), 0, 0) for key in (_COLUMNS, _ROWS))
    build.graph.output(build.mul(build.const(_FILE), build.mm(columns, rows)))
    return {**rest, _FILE: derive(build.graph, parts, rest[_FILE].spec.dtype)}
