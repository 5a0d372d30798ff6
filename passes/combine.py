"""Combining adapters into one, by what they add to the weights: ΔW of each, never A and B apart.

PEFT's `linear` and `ties` work on A and on B apart, and ΣB·ΣA is not ΣB·A: on two independent
adapters the relative error is 1. Here a method works on ΔW, so that it holds for every adapter that
can be merged, and its distance from the exact weighted sum is measured at every site.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from peftc.contract import AdapterName, Effect, Pass, PassResult, absent
from peftc.errors import PassError, PeftcError, did_you_mean, raise_all
from peftc.passes.joint import Joint, in_place_of, truncated
from peftc.targets import Names, listed

if TYPE_CHECKING:
    from torch import fx

    from peftc.constants import Constant
    from peftc.factors import Delta
    from peftc.program import Program

_SPARSE = {"ties", "dare_linear", "dare_ties", "magnitude_prune"}
Weight = Annotated[float, Field(allow_inf_nan=False)]


class Combine(Pass):
    """Combine several attached adapters into one, by what they add to the weights."""

    effect: ClassVar[Effect] = Effect.CHANGES

    adapters: Names | None = Field(None, description="which, by name: a,b; default: all")
    weights: dict[AdapterName, Weight] = Field(
        {}, description="what each is multiplied by: a=0.7,b=0.3; default: 1; may be negative"
    )
    method: Literal[
        "sum", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"
    ] = Field(
        "sum",
        description="sum: exact; cat: exact, as one LoRA of all ranks; svd: one LoRA of a rank; "
        "ties (arXiv:2306.01708), dare_linear, dare_ties (arXiv:2311.03099), magnitude_prune: "
        "most values dropped",
    )  # fmt: skip
    rank: int | None = Field(
        None, gt=0, description="truncate to a LoRA of this rank; else a full matrix stays one"
    )
    density: float | None = Field(
        None, gt=0, le=1, description="the share of values that ties, dare and prune keep"
    )
    majority_sign_method: Literal["total", "frequency"] = Field(
        "total", description="ties: elect the sign of the sum, or that of most adapters"
    )
    disjoint: Literal["mean", "sum"] = Field(
        "mean", description="ties: what is taken of the values that have the elected sign"
    )
    seed: int = Field(0, ge=0, description="of what dare drops, with the site's and adapter's name")
    name: AdapterName = Field("combined", description="the new adapter's name")

    def check(self, program: Program) -> list[PeftcError]:
        from peftc.deltas import alone, deltas, unstackable, untold

        names = self.names(program)
        errors = self._named(program, names) + self._options()
        if errors:
            return errors
        errors = untold(program, names) + unstackable(program)
        if errors:
            return errors
        for name in names:
            found, refused = deltas(alone(program, [name]))
            for error in refused:
                error.what = f"the adapter {name!r}: {error.what}"
            errors += refused
            if self.method == "cat":
                errors += [
                    PassError(
                        f"what the adapter {name!r} adds is no product of two small matrices",
                        where=fqn,
                        fix="use the method sum, which is exact too, or svd with a rank",
                    )
                    for fqn, delta in found.items()
                    if delta.factors is None
                ]
        return errors

    def run(self, program: Program) -> PassResult:
        from peftc.deltas import alone, deltas

        names = self.names(program)
        added: dict[str, dict[str, Delta]] = {}
        for name in names:
            found, errors = deltas(alone(program, [name]))
            raise_all(errors)
            for fqn, delta in found.items():
                added.setdefault(fqn, {})[name] = delta
        made = {fqn: self._site(fqn, added[fqn]) for fqn in program.sites if fqn in added}
        measured = {"deviation_from_weighted_sum": {f: site.deviation for f, site in made.items()}}
        if cut := {f: site.truncation for f, site in made.items() if site.truncation is not None}:
            measured["truncation_error"] = cut
        return PassResult(in_place_of(program, names, self.name, made), True, measured)

    def names(self, program: Program) -> list[str]:
        """The adapters that are combined."""
        return list(program.adapters) if self.adapters is None else listed(self.adapters)

    def _named(self, program: Program, names: list[str]) -> list[PeftcError]:
        there = program.adapters
        errors = absent(names, program)
        errors += [
            PassError(f"the adapter {name!r} is named twice", fix="name it once, with its weight")
            for name in dict.fromkeys(names)
            if names.count(name) > 1
        ]
        if len(names) < 2 and not errors:
            merged = bool(program.unfolded)
            errors.append(
                PassError(
                    f"{len(names)} adapter{'s' * (len(names) != 1)}, and combining takes two"
                    + (": what was merged is in the weights, and no adapter any more" * merged),
                    fix="attach the adapters, combine them, and then merge",
                )
            )
        if self.weights and not errors:
            errors += [
                PassError(f"there is no adapter {name!r} to weigh", fix=did_you_mean(name, names))
                for name in self.weights
                if name not in names
            ]
            errors += [
                PassError(f"the adapter {name!r} has no weight", fix=f"add it: {name}=1")
                for name in names
                if name not in self.weights
            ]
        if self.name in set(there) - set(names):
            errors.append(
                PassError(
                    f"there is an adapter named {self.name!r} already",
                    fix="give the new one another name: name=…",
                )
            )
        return errors

    def _options(self) -> list[PeftcError]:
        sparse, method = self.method in _SPARSE, self.method
        exact = method in ("sum", "cat")
        wrong = [
            (sparse and self.density is None, "needs a density", "density=0.2 keeps a fifth"),
            (not sparse and self.density, "drops nothing: it has no density", "leave it out"),
            (method == "svd" and self.rank is None, "needs a rank", "rank=16"),
            (exact and self.rank, "is exact: it truncates to no rank", "use svd"),
        ]
        return [PassError(f"{method} {what}", fix=fix) for found, what, fix in wrong if found]

    def _site(self, fqn: str, deltas: Mapping[str, Delta]) -> Joint:
        """What the new adapter adds to one site."""
        from peftc.deltas import deviation
        from peftc.factors import joined, product

        pairs = [(d.factors, self._weight(name)) for name, d in deltas.items() if d.factors]
        factors: tuple[Constant, Constant] | None = None
        if len(pairs) == len(deltas) and self.method not in _SPARSE:
            factors = joined(pairs)
        matrix, exact = self._joined(fqn, {name: d.matrix for name, d in deltas.items()})
        truncation = None
        if self.rank is not None:
            factors, truncation = truncated(matrix, factors, self.rank)
        got = matrix if factors is None else product(*factors)
        off = 0.0 if got is exact else deviation(got, exact)
        biases = {name: d.bias for name, d in deltas.items() if d.bias is not None}
        bias = None
        if biases:  # a vector has no rank, and is never truncated
            bias, exact = self._joined(f"{fqn}.bias", biases)
            off = max(off, deviation(bias, exact))
        return Joint(matrix, factors, bias, off, truncation)

    def _weight(self, name: str) -> float:
        return self.weights.get(name, 1.0)

    def _joined(self, where: str, parts: Mapping[str, Constant]) -> tuple[Constant, Constant]:
        """What the method makes of tensors, and their exact weighted sum."""
        from peftc.factors import weighted_sum

        exact = weighted_sum([(part, self._weight(name)) for name, part in parts.items()])
        return self._sparse(where, parts) if self.method in _SPARSE else exact, exact

    def _sparse(self, where: str, parts: Mapping[str, Constant]) -> Constant:
        """Ties, dare or pruning; the adapters by name, so that their order is nothing."""
        import torch

        from peftc.constants import derive
        from peftc.graphs import Builder
        from peftc.kernels import voting  # noqa: F401  # registers the operators

        ops, build = torch.ops.peftc, Builder()
        terms: list[fx.Node] = []
        for name in sorted(parts):
            node = build.const(f"c{len(terms)}")
            if self.method.startswith("dare"):
                digest = hashlib.sha256(f"{self.seed}:{where}:{name}".encode()).digest()
                seed = int.from_bytes(digest[:7], "little")
                node = build.op(ops.drop.default, node, self.density, seed)
            else:
                node = build.op(ops.trim.default, node, self.density)
            terms.append(build.mul(node, self._weight(name)))
        total = terms[0]
        if self.method in ("ties", "dare_ties"):
            total = build.op(ops.elect.default, terms, self.majority_sign_method, self.disjoint)
        else:
            for term in terms[1:]:
                total = build.add(total, term)
        build.graph.output(total)
        bound = {f"c{i}": parts[name] for i, name in enumerate(sorted(parts))}
        return derive(build.graph, bound, torch.float32)
