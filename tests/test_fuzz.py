"""A minute of hostile input: see tests/fuzz, which runs for longer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from peftc.errors import CaptureError, PeftcError, SelectionError
from peftc.patterns import whole_match

from .fuzz.__main__ import corpus, tried
from .fuzz.readers import readers

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", readers())
def test_reader_gives_typed_errors_on_what_failed_once_and_reads_what_is_sound(name: str) -> None:
    reader = readers()[name]
    with reader.folder() as root:
        for data in corpus(reader):
            tried(reader, root, data)
        reader.feed(root, reader.seeds[0])


def test_readers_give_typed_errors_on_hostile_input() -> None:
    """In a process of its own, whose memory is bounded."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--seconds", "60", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    counts = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert {row[1].strip() for row in counts} == set(readers())
    assert all(int(row[2].replace(",", "")) >= 5 for row in counts), done.stdout


def test_alias_bomb_in_a_recipe_is_refused_at_once(tmp_path: Path) -> None:
    from peftc.recipe import Recipe

    bomb = tmp_path / "bomb.yaml"
    bomb.write_bytes(readers()["recipe"].seeds[1])
    with pytest.raises(PeftcError, match="an alias, \\*a, which recipes do not have"):
        Recipe.load(bomb)


def test_layers_without_end_are_refused_at_once() -> None:
    from peftc import Lora

    for text in ("0-9007199254740992", f"0-{'9' * 5000}", "100000"):
        with pytest.raises(ValueError, match="beyond layer 99999"):
            Lora(layers=text)


@pytest.mark.parametrize(
    ("layers", "said"),
    [(2, "holds nothing of 1 layers: model.layers.1"), (10**9, "asks for 1000000000 layers")],
)
def test_checkpoint_without_all_of_its_layers_is_refused_at_once(layers: int, said: str) -> None:
    """Such a model took minutes to build, and its layers were random."""
    reader = readers()["capture"]
    config = {**json.loads(reader.seeds[0]), "num_hidden_layers": layers}
    with reader.folder() as root, pytest.raises(CaptureError, match=re.escape(said)):
        reader.feed(root, json.dumps(config).encode())


def test_regular_expression_that_would_take_for_ever_is_refused() -> None:
    """As a stranger's adapter_config.json may have it."""
    name = "model.layers.10.self_attn.q_proj"
    with pytest.raises(SelectionError, match="takes too long"):
        whole_match(r"(?:.|..|...)+(?:.|..)+\dproj", 2 * name)
    assert whole_match(r"(.+\.)*q_proj", name)
