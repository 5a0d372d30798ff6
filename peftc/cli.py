"""The command line. Nothing here imports torch until a command runs."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import click

from peftc import __version__, registry
from peftc.cli_options import PassGroup, adapters, asked_of, describe
from peftc.cli_options import common as _common
from peftc.cli_options import needed as _needed
from peftc.cli_options import of_formats as _of_formats
from peftc.cli_options import output as _output
from peftc.cli_parts import finish, run_part
from peftc.cli_plan import plan
from peftc.cli_run import bench, run
from peftc.cli_tune import evaluate, tune
from peftc.errors import PeftcError, RecipeError, located, raise_all
from peftc.formats import FORMATS
from peftc.reports import say_canonical, say_merge, say_proof
from peftc.terminal import Terminal, hush

PROOFS = click.Choice(["auto", "sites", "whole"])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="peftc")
def cli() -> None:
    """Compile parameter-efficient fine-tuning: apply, merge, export, prove.

    Exit codes: 0 done, 1 something given is wrong, 2 usage, 3 the proof failed, 70 a bug of peftc.
    """


cli.add_command(finish)
cli.add_command(plan)
cli.add_command(tune)
cli.add_command(evaluate)
cli.add_command(run)
cli.add_command(bench)


@cli.group(cls=PassGroup, chain=True, invoke_without_command=True, subcommand_metavar="PASS...")
@click.argument("base")
@_output
@click.option(
    "--recipe", type=click.Path(path_type=Path, dir_okay=False), help="Take the passes from a file."
)
@_common
def apply(**_: Any) -> None:
    """Rewrite the checkpoint BASE by one or more passes.

    Passes are chained as they run, each with its own options:

      peftc apply BASE -o OUT lora --rank 16 --targets q_proj,v_proj

    OUT gets adapter/, which PEFT loads, base/ if a pass changed the weights (else a pinned
    reference to BASE), and peftc.json. `peftc apply BASE PASS --help` shows a pass's options.
    """


@apply.result_callback()
def _apply(
    steps: list[tuple[str, Mapping[str, Any]]],
    base: str,
    target: Path | None,
    overwrite: bool,
    recipe: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    from peftc.recipe import Recipe, build

    target = _needed(target)
    if recipe is not None:
        if steps:
            raise click.UsageError("Give passes or --recipe, not both.")
        loaded = Recipe.load(recipe)
        if loaded.tune is not None:
            raise RecipeError(
                "says how to train, which apply does not", where=str(recipe),
                fix=f"peftc tune {base} -o {target} --recipe {recipe}",
            )  # fmt: skip
        passes = loaded.build(str(recipe))
    elif steps:
        passes = build(steps, "peftc apply")
    else:
        raise click.UsageError("Name a pass, or give --recipe. `peftc passes` lists them.")
    terminal = Terminal(as_json, quiet)
    from peftc.api import apply as run

    with terminal.progress() as progress:
        artifact = run(base, passes, target, overwrite=overwrite, progress=progress)
    terminal.wrote(target)
    terminal.data({"path": str(target), **artifact.manifest})


@cli.command()
@click.argument("src")
@_output
@click.option("--merge", is_flag=True, help="Merge every attached adapter into the weights.")
@click.option(
    "--adapter", "given", multiple=True, metavar="DIR[=WEIGHT]", help="Attach a PEFT adapter too."
)
@click.option(
    "--merge-base",
    type=click.Choice(["dequantized", "original"]),
    help="Of a 4-bit base: merge into the values trained on, or into those before quantizing.",
)
@click.option(
    "--then",
    type=click.Choice(["none", "nf4"]),
    help="Of a 4-bit base: write the merged weights plain, or in 4 bits again.",
)
@click.option(
    "--original", type=click.Path(path_type=Path), help="Where a 4-bit base's original weights are."
)
@click.option("--force", is_flag=True, help="Write 4 bits though most of the update is lost.")
@click.option(
    "--format", "form",
    type=click.Choice(FORMATS),
    default="safetensors", show_default=True, help="What to write.",
)  # fmt: skip
@_of_formats
@click.option(
    "--proof", type=PROOFS, default="auto", show_default=True,
    help="Compare each rewritten layer (sites), the logits too (whole), or that if small (auto).",
)  # fmt: skip
@click.option("--workers", type=click.IntRange(1), help="Threads; default: one per core.")
@click.option(
    "--shards", metavar="I/N", help="Write only this part of the files; `peftc finish` publishes."
)
@_common
def export(
    src: str,
    target: Path | None,
    overwrite: bool,
    merge: bool,
    given: tuple[str, ...],
    merge_base: Any,
    then: Any,
    original: Path | None,
    force: bool,
    form: Any,
    proof: Any,
    workers: int | None,
    shards: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Make an artifact of SRC, with a measured proof.

    \b
      peftc export BASE -o OUT --merge --adapter DIR     merge, in the memory of a few rows
      peftc export SRC -o OUT --merge --format onnx      the same, and graphs for onnxruntime
      peftc export SRC -o OUT --merge --format pt2       the same, and libraries for torch alone
      peftc export SRC -o OUT --format peft              the adapter, as PEFT loads it
      peftc export SRC -o ONNX --format onnx --adapters swap          adapters at run time
      peftc export ONNX -o OUT --format onnx-adapter --adapter DIR    one more for that base

    SRC is a checkpoint's directory or hub id, a PEFT adapter's, or what `apply` wrote.
    """  # noqa: D301
    if (merge_base or then or original) and not merge:
        raise click.UsageError("--merge-base, --then and --original need --merge.")
    asked = asked_of(form, options)
    if shards is not None and form != "safetensors":
        raise click.UsageError("--shards is for --format safetensors.")
    target, chosen, terminal = _needed(target), adapters(given), Terminal(as_json, quiet)
    job = {
        "merge": merge, "adapters": chosen, "merge_base": merge_base, "then": then,
        "original": original, "force": force, "proof": proof, "overwrite": overwrite,
        "workers": workers,
    }  # fmt: skip
    if shards is not None:
        run_part(src, target, shards, terminal, job)
        return
    from peftc.early import HeadStart

    early: AbstractContextManager[HeadStart | None] = nullcontext()
    if merge and form == "safetensors" and not (merge_base or then or original):
        early = HeadStart(src, [folder for folder, _ in chosen], target, overwrite)
    with early as head:  # while torch is imported
        from peftc.api import export as run

        with terminal.progress() as progress:
            artifact = run(src, target, format=form, progress=progress, head=head, **asked, **job)
    say_merge(terminal, artifact.manifest.get("merge"))
    say_proof(terminal, artifact.manifest.get("proof", {}))
    say_canonical(terminal, artifact.manifest.get("canonical"))
    terminal.wrote(target)
    terminal.data({"path": str(target), **artifact.manifest})


@cli.command()
@click.argument("src")
@click.option(
    "--adapter", "given", multiple=True, metavar="DIR", help="Analyse what a PEFT adapter adds."
)
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the analysis."
)
@click.option("--limit", type=click.IntRange(1), help="Show only so many sites that change most.")
@click.option(
    "--prune", "budget", type=click.IntRange(1), metavar="RANKS",
    help="What each site would lose if the pass prune_ranks left so many ranks.",
)  # fmt: skip
@_common
def inspect(
    src: str,
    given: tuple[str, ...],
    plot: Path | None,
    limit: int | None,
    budget: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show what SRC holds, or what adapters add to it.

    SRC is a checkpoint's directory or hub id, a PEFT adapter's, or what peftc wrote. No weight is
    read, unless an adapter is analysed:

    \b
      peftc inspect BASE --adapter DIR               rank, size and spectrum of each change
      peftc inspect BASE --adapter A --adapter B     the same, and the two compared
      peftc inspect ADAPTER --prune 256              the error of leaving 256 ranks in all
    """  # noqa: D301  # click wants the character, which a raw string would not hold
    terminal = Terminal(as_json, quiet)
    if budget is not None:
        if limit:
            raise click.UsageError("--limit goes with an analysis, and --prune is none.")
        _show_pruning(src, given, budget, plot, terminal)
        return
    if not given:
        if plot or limit:
            raise click.UsageError("--plot and --limit need an --adapter.")
        from peftc.inspection import inspect as look

        look(src, terminal)
        return
    from peftc import analysis_view

    if plot:
        analysis_view.ready_to_plot(plot)
    from peftc.analysis import analyse
    from peftc.api import load

    with terminal.progress() as progress:
        found = analyse(load(src), given, progress)
    if plot:
        analysis_view.plot(found, plot)
        terminal.wrote(plot)
    analysis_view.show(found, terminal, limit)


def _show_pruning(
    src: str, given: tuple[str, ...], budget: int, plot: Path | None, terminal: Terminal
) -> None:
    """What `prune_ranks` would do, before it is done."""
    from peftc import ranks_view
    from peftc.analysis_view import ready_to_plot

    if plot:
        ready_to_plot(plot)
    from peftc.api import load
    from peftc.passes.prune_ranks import PruneRanks, total_error
    from peftc.pipeline import Pipeline
    from peftc.recipe import build

    with terminal.progress() as progress:
        attach = build([("attach", {"path": path}) for path in given], "--adapter")
        program = Pipeline(attach).run(load(src), progress)
    pruning = PruneRanks(budget=budget)
    raise_all(located(pruning.check(program), src))
    found = pruning.outlook(program)
    if plot:
        ranks_view.plot_ranks({one.site: one.left for one in found}, plot)
        terminal.wrote(plot)
    ranks_view.show(found, total_error(found), terminal)


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--proof", type=PROOFS, default="auto", show_default=True, help="As for export.")
@click.option("--rebuild", is_flag=True, help="Make it again, and compare the bytes.")
@_common
def verify(path: Path, proof: Any, rebuild: bool, as_json: bool, quiet: bool) -> None:
    """Repeat the proof of an artifact: hashes, then numbers."""
    terminal = Terminal(as_json, quiet)
    from peftc.api import verify as run

    with terminal.progress() as progress:
        report = run(path, proof, progress)
        if rebuild:
            from peftc.reproducing import reproduce

            report["rebuilt"] = reproduce(path, progress)
    terminal.say(f"[green]✓[/] {report['files']} files are what was published")
    say_proof(terminal, report)
    if rebuild:
        terminal.say("[green]✓[/] made again from its manifest: the same bytes")
    terminal.data(report)


@cli.command()
@click.argument("name", required=False)
@_common
def passes(name: str | None, as_json: bool, quiet: bool) -> None:
    """List the passes, or the fields of the pass NAME."""
    chosen = [name] if name else list(registry.PASSES)
    found = {entry: describe(registry.load(entry)) for entry in chosen}
    terminal = Terminal(as_json, quiet)
    if as_json:
        terminal.data(found)
    elif name:
        rows = [(f["name"], f["type"], f["default"], f["description"])
                for f in found[name]["fields"]]  # fmt: skip
        terminal.table(found[name]["summary"], ("field", "type", "default", "meaning"), rows)
    else:
        rows = [(n, d["effect"], d["summary"], ", ".join(f["name"] for f in d["fields"]))
                for n, d in found.items()]  # fmt: skip
        terminal.table("passes", ("pass", "effect", "what it does", "fields"), rows)


@cli.command()
@_output
@click.option("--steps", type=click.IntRange(1), default=40, show_default=True, help="Of training.")
@_common
def demo(target: Path | None, overwrite: bool, steps: int, as_json: bool, quiet: bool) -> None:
    """Run the main job on a real model: apply, train, merge, export, prove, ask."""
    terminal = Terminal(as_json, quiet)
    from peftc.demo import run

    hush()
    terminal.data(run(target or Path("demo-out"), terminal, steps, overwrite))


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a shell's completion script: eval "$(peftc completion bash)"."""
    from click.shell_completion import get_completion_class

    cls = get_completion_class(shell)
    assert cls is not None
    click.echo(cls(cli, {}, "peftc", "_PEFTC_COMPLETE").source())


def main() -> None:
    """The entry point: runs the command line and turns errors into exit codes."""
    gc.set_threshold(100_000, 50, 100)  # imports make a million objects, and all of them stay
    try:
        code = cli.main(prog_name="peftc", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except PeftcError as error:
        Terminal(as_json="--json" in sys.argv).error(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(141)
    except Exception:
        import traceback

        traceback.print_exc()
        click.echo(f"peftc {__version__}: this is a bug of peftc; please report it.", err=True)
        sys.exit(70)
