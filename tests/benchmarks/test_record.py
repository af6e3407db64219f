"""The record above a benchmark's results, as the committed files have it."""

from __future__ import annotations

import json
import sys

import pytest

from obc_deploy.benchmarks.record import RESULTS, say_stages, take_record

HEADER = ["command", "created", "machine", "versions"]


@pytest.mark.parametrize("arguments", [[], ["--repeats", "3"]])
def test_a_record_is_written_as_the_committed_ones_are(arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["solver.py", *arguments])
    record = take_record("solver")
    record.write(tmp_path, "solver", {"instruction_set": "avx2"}, f"# Title\n\n{record.head}, 2\n")
    committed, written = (
        json.loads((folder / "solver.json").read_text()) for folder in (RESULTS, tmp_path)
    )
    assert list(written)[:5] == list(committed)[:5] == [*HEADER, "instruction_set"]
    assert list(written["machine"]) == list(committed["machine"])
    assert [type(written[k]) for k in HEADER] == [type(committed[k]) for k in HEADER]
    command = " ".join(["python -m obc_deploy.benchmarks.solver", *arguments])
    assert written["command"] == command
    text = (tmp_path / "solver.md").read_text()
    assert text == f"# Title\n\n`{command}`\n\n{record.machine.cpu}, 2\n"
    assert capsys.readouterr().out == text + "\n"


def test_each_stage_is_named_once(capsys):
    say = say_stages()
    for what, share in (("solving", 0.0), ("solving", 0.5), ("timing", 0.0), ("solving", 1.0)):
        say(what, share)
    assert capsys.readouterr() == ("", "solving\ntiming\nsolving\n")
