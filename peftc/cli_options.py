"""Command-line options made from the passes' own fields."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import click

from peftc import registry
from peftc.errors import PassError, did_you_mean
from peftc.formats import misplaced

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from peftc.contract import Pass


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command."""
    quiet = click.option("-q", "--quiet", is_flag=True, help="No progress, no remarks.")
    as_json = click.option("--json", "as_json", is_flag=True, help="Data on stdout as JSON.")
    return quiet(as_json(command))


def output(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a command that writes an artifact."""
    out = click.option(
        "-o", "--output", "target", type=click.Path(path_type=Path), help="Directory to write."
    )
    overwrite = click.option(
        "--overwrite", is_flag=True, help="Replace an artifact that peftc wrote there."
    )
    return out(overwrite(command))


def of_formats(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that some formats of an export have."""
    floats = ["fp32", "fp16", "bf16"]
    options: list[tuple[str, Any, str]] = [
        ("--adapters", click.Choice(["swap", "rows"]),
         "Of onnx and pt2: given at run time; with pt2, for each row of a batch too (rows)."),
        ("--slots", "TARGETS",
         "Which layers take one (q_proj,v_proj or all-linear); default: those of the adapters."),
        ("--weights", click.Choice(["stored", *floats, "int8", "int4", "nf4-int8"]),
         "Of onnx and pt2: refer to the merged checkpoint's (stored), or write their own; pt2 has "
         "stored and fp32."),
        ("--compute", click.Choice(floats), "Of onnx: the float type of the graph and its cache."),
        ("--head-bits", click.Choice(["8", "4"]),
         "Of onnx: of the output head in int4; 8 is closer, 4 quicker."),
        ("--cache", click.Choice(["grown", "shared"]),
         "Of onnx: let onnxruntime-genai keep the cache (shared), quicker in long texts."),
        ("--provider", click.Choice(["cpu", "cuda"]),
         "Of onnx: whom onnxruntime-genai is to run the graph by."),
        ("--four-bit", click.Choice(["kernel", "aten"]),
         "Of pt2: multiply weights in 4 bits by peftc's kernel, or decode them by torch's own "
         "operators, slower."),
        ("--canonical", True, "Of peft: one plain LoRA that vLLM and llama.cpp read too."),
        ("--rank", click.IntRange(1),
         "Of the canonical LoRA; what does not fit is cut off, and the error printed."),
    ]  # fmt: skip
    for name, kind, text in reversed(options):
        if kind is True:
            option = click.option(name, is_flag=True, default=None, help=text)
        elif isinstance(kind, str):
            option = click.option(name, metavar=kind, help=text)
        else:
            option = click.option(name, type=kind, help=text)
        command = option(command)
    return command


def asked_of(form: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a format that were given, as `export` takes them.

    Raises:
        UsageError: One is that of another format.
    """
    options = {name: item for name, item in given.items() if item is not None}
    if "head_bits" in options:
        options["head_bits"] = int(options["head_bits"])
    if mode := options.pop("adapters", None):
        options["swap"] = True if mode == "swap" else mode
    if wrong := misplaced(form, options):
        flags = {"swap": "adapters swap"}
        name, needed = (flags.get(text, text) for text in wrong)
        option, other = (text.replace("_", "-").replace("=", " ") for text in (name, needed))
        raise click.UsageError(f"--{option} goes with --{other.replace(' or ', ' or --')}.")
    return options


def needed(target: Path | None) -> Path:
    """The target, which a group cannot ask for itself: `apply BASE PASS --help` has none."""
    if target is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    return target


def _options_first(ctx: click.Context, args: list[str]) -> list[str]:
    """The command's options moved before its one argument."""
    parameters = ctx.command.get_params(ctx)
    valued = {o for p in parameters if isinstance(p, click.Option) and not p.is_flag
              for o in p.opts}  # fmt: skip
    wanted = sum(isinstance(p, click.Argument) for p in parameters)
    options: list[str] = []
    positional: list[str] = []
    end = 0
    while end < len(args):
        if args[end].startswith("-"):
            step = 2 if args[end] in valued else 1
            options += args[end : end + step]
            end += step
        elif len(positional) < wanted:
            positional.append(args[end])
            end += 1
        else:
            break
    return [*options, *positional, *args[end:]]


class _PassCommand(click.Command):
    """A pass as a command, whose options may stand behind its argument."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _options_first(ctx, args))


class PassGroup(click.Group):
    """A group whose commands are the registered passes; each returns its name and options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Lets the group's options stand behind its argument: `apply BASE -o OUT PASS …`."""
        return super().parse_args(ctx, _options_first(ctx, args))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in registry.PASSES and not args[0].startswith("-"):
            near = did_you_mean(args[0], registry.PASSES)
            raise click.UsageError(f"There is no pass {args[0]!r}: {near}", ctx)
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(registry.PASSES)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in registry.PASSES:
            return None
        cls = registry.load(name)
        return _PassCommand(
            name,
            params=parameters(cls, cls.positional),
            callback=lambda **options: (name, given(options)),
            help=cls.__doc__,
        )


def describe(cls: type[Pass]) -> dict[str, Any]:
    """A pass and its fields as plain data."""
    fields = [
        {
            "name": name,
            "type": _type_name(info),
            "default": None if info.is_required() else info.default,
            "description": info.description or "",
        }
        for name, info in cls.model_fields.items()
    ]
    summary = (cls.__doc__ or "").strip().splitlines()[0]
    return {"summary": summary, "effect": cls.effect.value, "fields": fields}


def adapters(given: tuple[str, ...]) -> list[tuple[str, float]]:
    """`DIR` or `DIR=WEIGHT` as directory and weight."""
    chosen = []
    for text in given:
        path, equals, weight = text.rpartition("=")
        try:
            chosen.append((path, float(weight)) if equals else (text, 1.0))
        except ValueError as error:
            raise PassError(
                f"{weight!r} is no weight", where=f"--adapter {text}", fix="write DIR=0.5"
            ) from error
    return chosen


def parameters(cls: type[BaseModel], positional: str | None = None) -> list[click.Parameter]:
    """A command's parameters: one for each field."""
    return [
        click.Argument([name]) if name == positional else _option(name, info)
        for name, info in cls.model_fields.items()
    ]


def _option(name: str, info: FieldInfo) -> click.Option:
    kind = _plain(info)
    flag = f"--{name.replace('_', '-')}"
    default = None if info.is_required() else info.default
    untold = default is None or default is False or default == {}
    shown = "" if untold else f"  [default: {default}]"
    text = (info.description or "") + shown
    if kind is bool:
        return click.Option([f"{flag}/--no-{name.replace('_', '-')}"], default=None, help=text)
    if get_origin(kind) is Literal:
        return click.Option([flag], type=click.Choice([str(a) for a in get_args(kind)]), help=text)
    if get_origin(kind) is dict:
        return click.Option([flag], multiple=True, metavar="NAME=VALUE", help=text)
    types_known: Mapping[Any, Any] = {int: click.INT, float: click.FLOAT}
    return click.Option([flag], type=types_known.get(kind, click.STRING), help=text)


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given; `NAME=VALUE` pairs as mappings."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if value is None or value == ():
            continue
        if isinstance(value, tuple):
            pairs = [pair.rpartition("=") for text in value for pair in text.split(",")]
            if bad := [tail for head, _, tail in pairs if not head]:
                raise click.UsageError(f"--{name.replace('_', '-')}: {bad[0]!r} is not NAME=VALUE.")
            found[name] = {head: tail for head, _, tail in pairs}
        else:
            found[name] = value
    return found


def _plain(info: FieldInfo) -> Any:
    """A field's type without `| None`."""
    kind = info.annotation
    if get_origin(kind) in (Union, types.UnionType):
        options = [option for option in get_args(kind) if option is not type(None)]
        kind = options[0] if len(options) == 1 else str
    return str if get_origin(kind) is Annotated else kind


def _type_name(info: FieldInfo) -> str:
    kind = _plain(info)
    if get_origin(kind) is Literal:
        return " | ".join(str(option) for option in get_args(kind))
    if get_origin(kind) is dict:
        return "NAME=VALUE"
    return str(getattr(kind, "__name__", "text")).replace("str", "text")


class Bytes(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A size such as 24GB, 8GiB or 500MB, in bytes."""

    name = "size"
    _UNITS: Mapping[str, int] = {
        "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
        "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
    }  # fmt: skip

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        found = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", str(value))
        try:
            count = float(found[1]) * self._UNITS[found[2].lower() or "b"] if found else 0
        except (KeyError, ValueError):
            count = 0
        if count < 1:
            self.fail(f"{value!r} is no size: write 24GB, 8GiB or 500MB.", param, ctx)
        return int(count)
