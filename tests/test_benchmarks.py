r"""Tests that each benchmark runs."""

import runpy
from pathlib import Path

import pytest

PROGRAMS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_smoke(program, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert runpy.run_path(str(program))["main"](["--smoke"]) == 0
    out = capsys.readouterr().out
    assert "NO" not in out.split()  # nothing that is not exact
    assert not list(tmp_path.iterdir())
