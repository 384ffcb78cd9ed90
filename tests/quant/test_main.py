"""The command line: a few tests start it in another process as users do, the others call `main`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.quant.__main__ import main
from wanquant.quant.statistics.calibration import CalibrationCollector
from wanquant.quant.statistics.calibration_file import write_calibration
from wanquant.quant.statistics.importance import Importance
from wanquant.quant.statistics.importance_file import write_importance
from wanquant.testing.tiny_wan import write_tiny_wan
from wanquant.tests.conftest import ROOT

LAUNCHER = ROOT / "wanquant.py"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_wan(tmp_path_factory.mktemp("main") / "wan.safetensors", layers=1)


@pytest.fixture(scope="module")
def converted(source):
    destination = source.with_suffix(".gguf")
    assert main(["convert", str(source), str(destination), "--recipe", "q8_0", "--effort", "fast"]) == 0
    return destination


def run(*command, cwd):
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True)


def test_module_runs_from_the_repository_root(tmp_path, source):
    destination = tmp_path / "wan.gguf"
    process = run("-m", "quant", "convert", source, destination, "--recipe", "Q8_0", "--json", cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["bytes"] == destination.stat().st_size


@pytest.mark.parametrize("isolation", [[], ["-I"]], ids=["plain", "isolated as an embedded Python"])
def test_launcher_runs_from_another_folder(tmp_path, converted, isolation):
    (tmp_path / "quant.py").write_text("raise ImportError('the wrong quant')")
    process = run(*isolation, LAUNCHER, "inspect", converted, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "wanquant.recipe: Q8_0" in process.stdout


def test_error_is_one_line_without_traceback(tmp_path):
    process = run("-m", "quant", "inspect", tmp_path / "none.gguf", cwd=ROOT)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.count("\n") == 1 and "none.gguf" in process.stderr


def test_a_reader_that_has_read_enough_is_no_error(converted):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as closed:
        process = subprocess.run(
            [sys.executable, LAUNCHER, "inspect", converted], stdout=closed, stderr=subprocess.PIPE, text=True
        )
    assert (process.returncode, process.stderr) == (0, "")


def test_result_of_the_same_conversion_is_reused(source, converted, capsys):
    arguments = ["convert", str(source), str(converted), "--recipe", "Q8_0", "--effort", "fast", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["reused"] is True


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_report_is_text_or_json(source, converted, capsys, command):
    arguments = [command, str(converted), *([str(source)] if command == "verify" else [])]
    assert main(arguments) == 0
    assert "blocks.0." in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tensors"]) == 42


def test_several_recipes_make_several_files_in_a_folder(source, tmp_path, capsys):
    options = ["--recipe", "q8_0,Q4_0", "--effort", "fast"]
    assert main(["convert", str(source), str(tmp_path), *options, "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert [file["metadata"]["wanquant.recipe"] for file in files] == ["Q8_0", "Q4_0"]
    assert {path.name for path in tmp_path.iterdir()} == {"wan-Q8_0.gguf", "wan-Q4_0.gguf"}
    assert main(["convert", str(source), str(tmp_path), *options]) == 0
    assert capsys.readouterr().out.count("is up to date already") == 2
    assert main(["convert", str(source), str(tmp_path / "a.gguf"), *options]) == 1
    assert "2 files are to be made; give a folder" in capsys.readouterr().err


def test_pattern_converts_every_source(source, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").symlink_to(source)
    pattern, options = str(tmp_path / "*.safetensors"), ["--recipe", "Q8_0", "--effort", "fast"]
    (tmp_path / "out").mkdir()
    assert main(["convert", pattern, str(tmp_path / "out"), *options]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a-Q8_0.gguf", "b-Q8_0.gguf"}
    assert main(["convert", pattern, str(tmp_path / "a.gguf"), *options]) == 1
    assert main(["convert", str(tmp_path / "no*"), str(tmp_path / "out"), *options]) == 1
    errors = capsys.readouterr().err
    assert "2 files are to be made; give a folder" in errors and "no file matches" in errors


def test_target_size_limits_the_file(source, tmp_path, capsys):
    assert main(["convert", str(source), str(tmp_path), "--target-size", "0.004", "--effort", "fast", "--json"]) == 0
    file = json.loads(capsys.readouterr().out)
    assert 0.9 * 0.004 * 2**30 <= file["bytes"] <= 0.004 * 2**30  # one block only, so large steps
    assert [path.name for path in tmp_path.iterdir()] == ["wan-0.004GiB.gguf"]


def test_importance_matrix_is_used_and_checked(source, tmp_path, capsys):
    importance = Importance({"blocks.0.ffn.0.weight": torch.rand(256)}, {"blocks.0.ffn.0.weight": 1.0}, 1)
    path = write_importance(tmp_path / "i.gguf", importance)
    options = ["--recipe", "Q4_0", "--effort", "fast", "--imatrix", str(path), "--json"]
    assert main(["convert", str(source), str(tmp_path / "a.gguf"), *options]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["quantize.imatrix.file"] == "i.gguf"
    write_importance(path, replace(importance, sums={"blocks.0.ffn.0.weight": torch.rand(64)}), overwrite=True)
    assert main(["convert", str(source), str(tmp_path / "b.gguf"), *options]) == 1
    assert "i.gguf: tensor blocks.0.ffn.0.weight: has shape (64,)" in capsys.readouterr().err


def test_calibration_is_used_and_excludes_an_importance_matrix(source, tmp_path, capsys):
    collector = CalibrationCollector()
    collector.add("blocks.0.ffn.0.weight", torch.randn(300, 256))
    path = write_calibration(tmp_path / "c.safetensors", collector.result())
    arguments = ["convert", str(source), str(tmp_path / "a.gguf"), "--effort", "fast", "--json"]
    assert main([*arguments, "--calibrate", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["wanquant.calibrated"] is True
    assert main([*arguments, "--calibrate", str(source)]) == 1
    assert "not a calibration" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        main([*arguments, "--calibrate", str(path), "--imatrix", str(path)])
    assert refused.value.code == 2


def test_values_that_are_not_finite_are_refused_or_become_0(source, tmp_path, capsys):
    state = load_file(source)
    state["head.head.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "a.safetensors")
    arguments = ["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "a.gguf"), "--recipe", "Q4_0"]
    assert main(arguments) == 1
    assert "--allow-non-finite" in capsys.readouterr().err
    assert main([*arguments, "--allow-non-finite"]) == 0
    assert "NaN or infinity became 0 in 1 tensor" in capsys.readouterr().out


def test_refused_conversion_has_exit_code_1(source, tmp_path, capsys):
    assert main(["convert", str(source), str(tmp_path / "a.bin")]) == 1
    assert capsys.readouterr().err.endswith("choose a destination that ends in .gguf\n")


@pytest.mark.parametrize(
    "arguments", [[], ["paint"], ["convert", "a", "b", "--recipe", "Q8_0,Q9"], ["inspect"]], ids=str
)
def test_wrong_usage_has_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert capsys.readouterr().err.startswith("usage: quant")
