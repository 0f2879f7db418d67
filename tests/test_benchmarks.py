r"""Tests that each benchmark runs."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from probnets.cli.formats import png_bytes

PROGRAMS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_smoke(program, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert runpy.run_path(str(program))["main"](["--smoke"]) == 0
    out = capsys.readouterr().out
    assert "NO" not in out.split()  # nothing that is not exact
    assert not list(tmp_path.iterdir())


# Photographs


@pytest.fixture
def folder(tmp_path):
    r"""Returns a folder with two images of one sub-pixel value, and their PNG files."""
    streams = [png_bytes(np.full((40, n, 3), 7, np.uint8)) for n in (40, 60)]
    for n, stream in enumerate(streams):
        (tmp_path / f"{n}.png").write_bytes(stream)
    return tmp_path


def cells(out, title):
    r"""Reads the table of a title, by row."""
    table = out.split(f"| {title} ")[1].split("\n\n")[0].splitlines()[2:]
    rows = ([cell.strip() for cell in line.split("|")] for line in table)
    return {row[1]: row[2:-1] for row in rows}


def photographs(name):
    return runpy.run_path(str(PROGRAMS[0].with_name("photographs.py")))[name]


def test_photographs_of_a_folder(folder, capsys):
    words = [str(folder), "--quick", "--skip-memory", "--codecs", "PNG"]
    assert photographs("main")(words) == 0

    out = capsys.readouterr().out
    sizes = [(folder / f"{n}.png").stat().st_size for n in (0, 1)]
    expected = {"0.png": sizes[0], "1.png": sizes[1], "total": sum(sizes)}
    assert cells(out, "folder: bytes") == {name: [str(n)] for name, n in expected.items()}
    rate = cells(out, "folder: bits per subpixel")["total"]
    assert rate == [f"{8 * sum(sizes) / (40 * 100 * 3):.4f}"]
    assert cells(out, "folder: encode, MB/s").keys() == expected.keys()
    assert "noise" not in out


def test_photographs_checks_each_stream(folder):
    main = photographs("main")
    encode, decode = main.__globals__["CODECS"]["PNG"]
    main.__globals__["CODECS"]["PNG"] = (encode, lambda stream: decode(stream) ^ 1)

    with pytest.raises(ValueError, match=r"expected the image \(40, 40, 3\) back from PNG"):
        main([str(folder), "--quick", "--codecs", "PNG"])


def test_photographs_verdicts(capsys):
    ours, webp, best = ([300, n, 1, 1] for n in (90, 80, 100))
    row = {"ours-fast": ours, "WebP": webp, "JXL9": best}
    told = [f"{title} yes (-10.0%)" for title in ("folder", "half")]
    photographs("_verdicts")({"folder": {"total": row}, "half": {"a": row, "total": row}})

    assert capsys.readouterr().out.strip().splitlines() == [
        "default <= 2.27: no (2.4000)",
        "default never worse than WebP: no, total of folder; a of half; total of half",
        f"default better than JPEG XL effort 9 on the average: {'; '.join(told)}",
    ]


def test_photographs_of_no_such_codec(capsys):
    with pytest.raises(SystemExit):
        photographs("main")(["--smoke", "--codecs", "PNG,GIF"])

    assert capsys.readouterr().err.endswith("got GIF\n")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's account of memory")
def test_photographs_memory(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
    (tmp_path / "noise.png").write_bytes(png_bytes(noise))
    program = str(PROGRAMS[0].with_name("photographs.py"))
    command = [sys.executable, program, str(tmp_path), "--quick", "--codecs", "PNG"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    # The stream and the decoded image, of 3 MB each, and a few copies.
    assert 5 < float(cells(out, "memory of the largest")["MB"][0]) < 40
