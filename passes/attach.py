"""Attaching a trained PEFT adapter: every tensor, pattern and target binds, or it is an error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, ValidationError

from peftc.checkpoint import PEFT_PREFIX, resolve
from peftc.contract import AdapterName, Effect, Method, Pass, PassResult, Place, safe_name
from peftc.errors import (
    SAVE_AGAIN,
    AdapterError,
    PassError,
    PeftcError,
    Violations,
    did_you_mean,
    located,
    raise_all,
)
from peftc.registry import method_for
from peftc.targets import LINEARS, unbound_patterns

if TYPE_CHECKING:
    from peftc.adapter import AdapterDirectory
    from peftc.constants import Constant
    from peftc.program import Program

_COMMON = PEFT_PREFIX.removesuffix("model.")  # before the name of what all sites share
_SHOWN = 5  # how many of many alike errors are spelled out


class Attach(Pass):
    """Attach a trained adapter, from the directory that PEFT, AdapterHub or peftc wrote."""

    effect: ClassVar[Effect] = Effect.CHANGES
    positional: ClassVar[str | None] = "path"

    path: Place = Field(description="the adapter's directory, or its id on the hub")
    adapter: AdapterName | None = Field(
        None, description="its name; default: `default` for the first, the folder's for others"
    )
    weight: float = Field(
        1.0, allow_inf_nan=False, description="multiplies what the adapter adds; may be negative"
    )

    def needs(self, program: Program) -> list[Pass]:
        """What the adapter's config says to do before: PEFT's layer replication."""
        from peftc.adapter import AdapterDirectory
        from peftc.passes.replicate_layers import needed

        try:
            return [*needed(program, AdapterDirectory.open(resolve(self.path)).config)]
        except PeftcError:
            return []  # which `check` reports

    def check(self, program: Program) -> list[PeftcError]:
        try:
            bound = bind(program, self.path, self.name_in(program), self.weight)
            errors = bound.directory.not_finite()
        except Violations as found:
            errors = list(found.errors)
        except PeftcError as error:
            errors = [error]
        if self.name_in(program) in program.adapters:
            errors.append(
                PassError(
                    f"there is an adapter named {self.name_in(program)!r} already",
                    where=self.path,
                    fix="give this one another name: adapter=…",
                )
            )
        return located(errors, self.path)

    def run(self, program: Program) -> PassResult:
        return PassResult(
            bind(program, self.path, self.name_in(program), self.weight).program, True
        )

    def name_in(self, program: Program) -> str:
        """The adapter's name in this program."""
        if self.adapter:
            return self.adapter
        name = safe_name(Path(self.path).name) if program.adapters else "default"
        taken, number = name, 2
        while name in program.adapters:
            name, number = f"{taken}-{number}", number + 1
        return name


@dataclass(frozen=True)
class Bound:
    """A program with an adapter attached, and where the adapter's tensors lie."""

    program: Program
    directory: AdapterDirectory


def bind(program: Program, path: str, name: str, weight: float) -> Bound:
    """Attaches an adapter.

    Raises:
        PeftcError: Something in the directory is damaged, unknown, or binds to nothing.
    """
    from peftc.adapter import AdapterDirectory

    directory = AdapterDirectory.open(resolve(path))
    method = _method(directory).weighted(weight).model_copy(update={"adapter": name})
    program = method.opened(program)
    given, common, loose, errors = _sort(program, directory, method)
    raise_all(errors)
    given |= {fqn: {} for fqn in _tied(program, method, given)}
    raise_all(_unserved(program, method, directory.config, list(given)))
    sites = [fqn for fqn in program.sites if fqn in given]
    raise_all(_misfits(method.common(program, sites), common, directory))
    try:
        attached = program.inject(method, sites, given, common)
    except Violations as found:
        raise _brief(found) from None
    for key in attached.adapters[name].tensors:
        if not key.startswith(PEFT_PREFIX) and key.removeprefix(_COMMON) not in common:
            raise AdapterError(f"lacks {key}", where=str(directory.file.path), fix=SAVE_AGAIN)
    own = _own(attached, name, loose, directory, weight)
    return Bound(attached.rewrite(constants=own), directory)


def _method(directory: AdapterDirectory) -> Method:
    config = directory.config
    try:
        return method_for(config).from_peft(config)
    except ValidationError as error:
        first = error.errors()[0]
        raise AdapterError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            where=str(directory.path / "adapter_config.json"),
            fix="correct the config, or save the adapter again",
        ) from error
    except AdapterError as error:
        raise AdapterError(error.what, where=str(directory.path), fix=error.fix) from error


def _sort(
    program: Program, directory: AdapterDirectory, method: Method
) -> tuple[
    dict[str, dict[str, Constant]], dict[str, Constant], dict[str, Constant], list[PeftcError]
]:
    """Each site's tensors by local names, what all share, the base's own; and what is none."""
    from peftc.sites import local_name

    given: dict[str, dict[str, Constant]] = {}
    common: dict[str, Constant] = {}
    loose: dict[str, Constant] = {}
    strays: list[str] = []
    experts = _experts(program, directory.config)
    tensors = method.from_file(program, directory.config, directory.leaves())
    for key, leaf in tensors.items():
        path = key.removeprefix(PEFT_PREFIX)
        if method.prefixed and key.removeprefix(_COMMON) in program.constants:
            key = PEFT_PREFIX + (path := key.removeprefix(_COMMON))
        site, suffix = _place(program, experts, path)
        if path == key and key.startswith(_COMMON):
            common[key.removeprefix(_COMMON)] = leaf
        elif path == key and method.prefixed:
            common[key] = leaf
        elif path == key:
            strays.append(key)
        elif ".base_layer." in path and _same(program, _plain(path), leaf):
            continue  # PEFT saves the base's own weight of an adapted head or embedding
        elif _plain(path) in program.constants:
            loose[key] = leaf
        elif site is None:
            strays.append(key)
        else:
            given.setdefault(site, {})[local_name(suffix, method.adapter)] = leaf
    errors: list[PeftcError] = []
    if not directory.file.tensors:
        errors.append(
            AdapterError("holds no tensors", where=str(directory.file.path), fix=SAVE_AGAIN)
        )
    if strays and not given:
        errors.append(
            AdapterError(
                f"belongs to another architecture: none of its {len(strays)} tensors match, such "
                f"as {strays[0]}",
                where=str(directory.path),
                fix=f"this model's layers are named like {_typical(program)}; "
                f"adapter keys like {PEFT_PREFIX}<layer>.lora_A.weight",
            )
        )
        return given, common, loose, errors
    for key in strays[:_SHOWN]:
        module = key.removeprefix(PEFT_PREFIX).rsplit(".lora_", 1)[0]
        errors.append(
            AdapterError(
                f"tensor {key} binds to no site",
                where=str(directory.file.path),
                fix=did_you_mean(module, program.sites),
            )
        )
    if len(strays) > _SHOWN:
        errors.append(
            AdapterError(
                f"{len(strays) - _SHOWN} tensors more bind to no site",
                where=str(directory.file.path),
                fix="mend those named above first",
            )
        )
    return given, common, loose, errors


def _plain(path: str) -> str:
    """A tensor of the base by its own name: PEFT keeps some in modules of its own."""
    return re.sub(r"\.(base_layer|ln_tuning_layers)\.", ".", path)


def _misfits(
    wanted: Mapping[str, Constant], common: Mapping[str, Constant], directory: AdapterDirectory
) -> list[PeftcError]:
    """Tensors for all sites that the method does not have, or has in another shape."""
    errors: list[PeftcError] = []
    for name, leaf in common.items():
        key = f"{_COMMON}{name}" if f"{_COMMON}{name}" in directory.file.tensors else name
        want = wanted[name].spec.shape if name in wanted else None
        if leaf.spec.shape != want:
            fits = f"the model asks for {list(want)}" if want else "is not part of this method"
            errors.append(
                AdapterError(
                    f"{key}, of shape {list(leaf.spec.shape)}: {fits}",
                    where=str(directory.file.path),
                    fix=SAVE_AGAIN,
                )
            )
    return errors


def _experts(program: Program, config: Mapping[str, Any]) -> dict[str, str]:
    """The site of each module under which PEFT keeps what belongs to a parameter of experts."""
    from peftc.program import peft_path

    patterns = [str(p) for p in config.get("target_parameters") or ()]
    names = [
        fqn
        for fqn, site in program.sites.items()
        if site.kind.name == "experts" and any(fqn == p or fqn.endswith(f".{p}") for p in patterns)
    ]
    return {peft_path(program, names, fqn): fqn for fqn in names}


def _place(program: Program, experts: Mapping[str, str], path: str) -> tuple[str | None, str]:
    """The site of a tensor's path, and its name there."""
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        if (head := ".".join(parts[:cut])) in experts:
            return experts[head], ".".join(parts[cut:])
    return program.site_of(path)


def _tied(program: Program, method: Method, given: Mapping[str, Any]) -> list[str]:
    """Targeted sites without tensors of their own that are tied to one that has some."""
    if "targets" not in method.model_fields_set:
        return []
    return [
        fqn
        for fqn in method.pick(program)[0]
        if fqn not in given
        and any(name.rpartition(".")[0] in given for name in program.names_of(f"{fqn}.weight"))
    ]


def _typical(program: Program) -> str:
    """The name of a linear layer."""
    linears = (fqn for fqn, site in program.sites.items() if site.kind.name in LINEARS)
    return next(linears, "(none)")


def _same(program: Program, fqn: str, leaf: Constant) -> bool:
    from peftc.evaluate import value

    own = program.constants.get(fqn)
    if own is not None and getattr(getattr(own, "tensor", None), "is_meta", False):
        raise AdapterError(
            "is the base's own weight, which the base has in another form, not to be compared",
            where=fqn,
            fix="save the adapter without it (PEFT's save_embedding_layers=False)",
        )
    return own is not None and own.spec == leaf.spec and bool(value(own).equal(value(leaf)))


def _unserved(
    program: Program, method: Method, config: Mapping[str, Any], bound: list[str]
) -> list[PeftcError]:
    """Targets and patterns of the config that no tensor of the file serves."""
    errors: list[PeftcError] = []
    where = "adapter_config.json"
    if "targets" in method.model_fields_set:
        wanted, errors = method.pick(program)
        # A target is a module to PEFT; parameters of experts that are named so too are none.
        stacks = {fqn for fqn in wanted if program.sites[fqn].kind.name == "experts"}
        spared = stacks - set(_experts(program, config).values())
        if missing := [fqn for fqn in wanted if fqn not in {*bound, *spared}]:
            errors.append(
                AdapterError(
                    f"the file lacks the tensors of {len(missing)} targeted layers, such as "
                    f"{missing[0]}",
                    where=where,
                    fix="save the adapter again: a part of it is lost",
                )
            )
    errors += method.saved(program)[1] + method.unserved(program, bound)
    for option in ("rank_pattern", "alpha_pattern"):
        errors += unbound_patterns(option, getattr(method, option, {}), bound)
    return errors


def _own(
    program: Program,
    name: str,
    loose: dict[str, Constant],
    directory: AdapterDirectory,
    weight: float,
) -> dict[str, Constant]:
    """The trained tensors of the base, which stand in for its own."""
    from peftc.constants import cast
    from peftc.evaluate import value

    stored = {*program.stored.values(), *program.aliases} & program.captured.keys()
    mine = [fqn for fqn in program.adapters[name].tensors.values() if fqn in stored]
    wanted = {f"{PEFT_PREFIX}{alias}": fqn for fqn in mine for alias in program.names_of(fqn)}
    where = str(directory.file.path)
    found = {_plain(key): leaf for key, leaf in loose.items()}
    errors: list[PeftcError] = []
    errors += [
        AdapterError(
            f"tensor {key} replaces a weight that its config does not train",
            where=where,
            fix=SAVE_AGAIN,
        )
        for key in sorted(set(found) - set(wanted))
    ]
    served = {wanted[key] for key in found if key in wanted}
    errors += [
        AdapterError(f"lacks the trained tensor {fqn}", where=where, fix=SAVE_AGAIN)
        for fqn in sorted(set(mine) - served)
    ]
    for key, leaf in found.items():
        fqn = wanted.get(key)
        if fqn and leaf.spec.shape != program.constants[fqn].spec.shape:
            want = list(program.constants[fqn].spec.shape)
            errors.append(
                AdapterError(
                    f"{key} has shape {list(leaf.spec.shape)}, the model's has {want}",
                    where=where,
                    fix="use the adapter with the model it was trained on",
                )
            )
    if found and weight != 1:
        errors.append(
            AdapterError(
                f"has trained tensors of the base, which cannot be weighed by {weight}",
                where=where,
                fix="attach it with weight 1",
            )
        )
    raise_all(errors[:_SHOWN])
    trained: dict[str, Constant] = {}
    for key, leaf in found.items():
        tensor = cast(leaf, program.constants[wanted[key]].spec.dtype)
        trained[key.removeprefix(PEFT_PREFIX)] = tensor
    for tied, owner in program.aliases.items():
        both = trained.get(tied), trained.get(owner)
        if both[0] and both[1] and value(both[0]).equal(value(both[1])):
            trained[tied] = trained[owner]
    return trained


def _brief(found: Violations) -> PeftcError:
    shown = list(found.errors[:_SHOWN])
    if (more := len(found.errors) - len(shown)) > 0:
        shown.append(
            AdapterError(f"{more} errors more of this kind", fix="mend those named above first")
        )
    return Violations(shown)
