"""What the command line says of an artifact, from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftc.terminal import Terminal


def say_proof(terminal: Terminal, proof: Mapping[str, Any]) -> None:
    """What an artifact's proof found."""
    if (site := proof.get("site")) and site["sites"]:
        terminal.say(
            f"[green]✓[/] {site['sites']} sites equal what they came from: largest relative "
            f"error {site['relative_error']:.1e} (bound {site['bound']:.0e})"
        )
    whole = proof.get("whole")
    if whole and "skipped" in whole:
        terminal.say(f"[dim]…[/] logits not compared: {whole['skipped']}")
    elif whole:
        terminal.say(
            f"[green]✓[/] logits on {whole['input']}: largest relative error "
            f"{whole['relative_error']:.1e} (bound {whole['bound']:.0e}), KL {whole['kl']:.1e}, "
            f"top-1 agreement {whole['top1_agreement']:.0%}"
        )
    if quantized := proof.get("weights"):
        terminal.say(
            f"[green]✓[/] every code is the nearest to its weight: relative error "
            f"{quantized['relative_error']:.1e} ({quantized['worst']:.1e} at {quantized['at']})"
        )
    _say_libraries(terminal, proof.get("pt2") or {}, "")
    for name, figures in (proof.get("pt2_adapters") or {}).items():
        _say_libraries(terminal, figures, f" with {name}")
    _say_graphs(terminal, proof.get("onnx") or {}, "")
    for name, figures in (proof.get("onnx_adapters") or {}).items():
        site = figures["site"]
        terminal.say(
            f"[green]✓[/] {name} in its file: {site['sites']} sites, largest relative error "
            f"{site['relative_error']:.1e} (bound {site['bound']:.0e})"
        )
        _say_graphs(terminal, figures, f" with {name}")


def _say_libraries(terminal: Terminal, figures: Mapping[str, Any], adapted: str) -> None:
    """How compiled graphs compare with eager torch, with an adapter or none."""
    if "skipped" in figures:
        terminal.say(f"[dim]…[/] libraries not compared with torch: {figures['skipped']}")
    for name, seen in figures.items():
        if isinstance(seen, dict):
            terminal.say(
                f"[green]✓[/] {name}{adapted}, compiled, equals eager torch: largest relative "
                f"error {seen['relative_error']:.1e} (bound {figures['bound']:.0e}) in {seen['at']}"
            )


def _say_graphs(terminal: Terminal, figures: Mapping[str, Any], adapted: str) -> None:
    """How graphs compare with torch, with an adapter or none."""
    if "skipped" in figures:
        terminal.say(f"[dim]…[/] graphs not compared with torch: {figures['skipped']}")
    for name, seen in figures.items():
        if not name.endswith(".onnx"):
            continue
        error = f"largest relative error {seen['relative_error']:.1e}"
        if figures["bound"] is None:
            terminal.say(
                f"[yellow]![/] {name}{adapted} is an approximation: {error}, top-1 agreement "
                f"{seen['top1_agreement']:.0%}, KL {seen['kl']:.1e} ({seen['at']})"
            )
        else:
            terminal.say(
                f"[green]✓[/] {name}{adapted} in onnxruntime equals eager torch: {error} "
                f"(bound {figures['bound']:.0e}) in {seen['at']}"
            )


def say_merge(terminal: Terminal, report: Mapping[str, Any] | None) -> None:
    """How a merge into a 4-bit base was done, and what is left of the update."""
    if report is None:
        return
    onto = {
        "dequantized": "the dequantized weights, on which it was trained",
        "original": "the original weights, from before they were quantized",
    }[report["base"]]
    terminal.say(f"[green]✓[/] merged into {onto}")
    if report["base"] == "dequantized" and report["original"]:
        terminal.say(
            f"  the original ones are there too: --merge-base original ({report['original']})"
        )
    if not report["sites"]:  # what was trained is in layers that are not in 4 bits
        return
    least, figures = min(report["sites"].items(), key=lambda item: item[1]["share"])
    mark = "[green]✓[/]" if report["share"] >= 0.9 else "[yellow]![/]"
    terminal.say(
        f"{mark} {report['share']:.1%} of the update is left (least: {figures['share']:.1%} at "
        f"{least}); output error against what was trained {report['output_error']:.1e}"
    )


def say_canonical(terminal: Terminal, report: Mapping[str, Any] | None) -> None:
    """What a canonical LoRA costs, and who reads it."""
    if report is None:
        return
    error = f"{report['relative_error']:.1e}"
    if report["exact"]:
        terminal.say(f"[green]✓[/] one LoRA of rank {report['rank']}, exact to {error}")
    else:
        terminal.say(
            f"[yellow]![/] one LoRA of rank {report['rank']}, an approximation: "
            f"{report['truncated_sites']} of {len(report['sites'])} sites were truncated, by up to "
            f"{error} of what the adapter adds (at {report['at']})"
        )
    if (most := report["vllm_max_lora_rank"]) is None:
        terminal.say("  vLLM takes no rank so high: give a lower one, --rank")
    elif most > 16:
        terminal.say(f"  vLLM needs --max-lora-rank {most}")
