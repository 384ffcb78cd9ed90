"""The folder of a publication: names of any kind, cards that people edit, and earlier results in it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from wanquant.quant.__main__ import main
from wanquant.quant.publish.job import Options
from wanquant.quant.publish.plan import make_plan
from wanquant.quant.publish.request import Request
from wanquant.quant.publish.run import publish
from wanquant.quant.qtype import QTYPES

FAST = Options("fast")
pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs sha256sum")
def test_names_that_mean_something_elsewhere(sources, tmp_path):
    names = ["-dash", "with space", "a|b`c", "back\\slash", "two\nlines", "漢字"]
    renamed = [Path(shutil.copy2(sources[0], tmp_path / f"{name}.safetensors")) for name in names]
    out = tmp_path / "out"
    assert publish(Request(renamed, out, ["Q8_0"], options=FAST), workers=1).ok
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=out, capture_output=True, check=True)
    for path in renamed:
        text = (out / path.stem / "README.md").read_text(encoding="utf-8")
        (row,) = re.findall(r"^\| `.*Q8_0\.gguf`+ \|.*\|$", text, re.MULTILINE)
        assert len(re.findall(r"(?<!\\)\|", row)) == 8
        (command,) = re.findall(r"```\n(.*)\n```", text, re.DOTALL)
        source = shlex.split(command)[4]
        assert (tmp_path / source).samefile(path) and not source.startswith("-")


def test_no_file_is_written_beside_the_folder(sources, tmp_path, capsys):
    (tmp_path / "model" / "below").mkdir(parents=True)
    shutil.copy2(sources[0], tmp_path / "model" / "wan.safetensors")
    dots = Path(shutil.copy2(sources[0], tmp_path / "...safetensors"))
    out = tmp_path / "results" / "out"
    arguments = [str(dots), str(tmp_path / "model" / "below" / ".."), str(sources[0]), str(out), "--recipe", "Q8_0"]
    assert main(["publish", *arguments, "--effort", "fast"]) == 1
    said = capsys.readouterr().out
    assert "1 file made" in said and said.count("would be named '..', expected a name for a folder; give it") == 2
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["out"]


def test_a_file_in_place_of_a_folder(sources, tmp_path):
    (tmp_path / "wan-0").touch()
    made = publish(Request(sources, tmp_path, ["Q8_0"], options=FAST), workers=1)
    assert [bool(result.entry) for result in made.results] == [False, True]
    assert "wan-0: cannot be made as a folder (File exists); choose another one" in made.text()


def test_results_are_not_sources(sources, tmp_path):
    shutil.copy2(sources[0], tmp_path / "wan.safetensors")
    request = Request([tmp_path / "**" / "*.safetensors"], tmp_path / "out", ["INT8"], options=FAST)
    assert len(publish(request, workers=1).results) == 1
    assert [model.stem for model in make_plan(request).models] == ["wan"]
    named = replace(request, sources=[tmp_path / "out" / "wan" / "wan-INT8.safetensors"])
    assert [model.stem for model in make_plan(named).models] == ["wan-INT8"]


def test_edited_front_matter_stays(sources, tmp_path):
    card = tmp_path / "wan-0" / "README.md"

    def front_after(recipe):
        assert publish(Request(sources[:1], tmp_path, [recipe], options=FAST), workers=1).ok
        text = card.read_text(encoding="utf-8")
        assert f"wan-0-{recipe}." in text
        return text.split("---")[1]

    assert "- gguf" not in front_after("INT8")
    assert "- gguf" in front_after("Q8_0"), "it was not edited"
    edited = card.read_text(encoding="utf-8").replace("# license: of the source", "license: apache-2.0")
    card.write_text(edited, encoding="utf-8")
    assert front_after("Q4_0") == edited.split("---")[1]


def test_files_of_an_older_encoder_are_named(sources, tmp_path, monkeypatch, capsys):
    request = Request(sources[:1], tmp_path, ["Q8_0"], options=FAST)
    publish(request, workers=1)
    monkeypatch.setitem(QTYPES, "Q8_0", replace(QTYPES["Q8_0"], revision=QTYPES["Q8_0"].revision + 1))
    assert main(["publish", str(sources[0]), str(tmp_path), "--recipe", "Q8_0", "--effort", "fast", "--json"]) == 0
    said = capsys.readouterr()
    (warning,) = json.loads(said.out)["warnings"]
    assert "was made by an older encoder of Q8_0; turn overwrite on" in warning and warning in said.err
    anew = publish(replace(request, options=replace(FAST, overwrite=True)), workers=1)
    assert not anew.results[0].reused and not anew.results[0].warnings


def test_sizes_that_are_given_twice(sources, tmp_path):
    plan = make_plan(Request(sources[:1], tmp_path, ["Q4_0", "INT8"], [0.004, 0.004], options=FAST))
    assert len(list(plan.files)) == 2
