"""Corrected biases: what they make up for, in which file, and what knows of them."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanquant.quant import QuantError, open_gguf, write_calibration
from wanquant.quant.__main__ import main
from wanquant.quant.conversion import bias_correction, stream
from wanquant.quant.conversion import convert as convert_module
from wanquant.quant.conversion.convert import convert
from wanquant.quant.inspection.verify import verify
from wanquant.quant.recovery.recovery_lora import recover
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.quant.statistics.calibration import CalibrationCollector
from wanquant.quant.statistics.importance import Collector
from wanquant.testing.tiny_wan import write_tiny_wan
from wanquant.tests.quant.samples import correlated

NAME, BIAS = "blocks.0.ffn.0.weight", "blocks.0.ffn.0.bias"
KNOWN = ("blocks.0.self_attn.v.weight", NAME, "blocks.0.ffn.2.weight")
COLLECTORS = {"importance": Collector, "calibration": CalibrationCollector}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_wan(tmp_path_factory.mktemp("source") / "wan.safetensors", layers=1, ffn_dim=512)


@pytest.fixture(scope="module")
def statistics(source):
    """An importance matrix and a calibration of some layers, of inputs whose means are not 0."""
    with open_checkpoint(source) as checkpoint:
        widths = {name: checkpoint.tensors[name].shape[-1] for name in KNOWN}
    collected = {}
    for kind, collector in ((kind, make()) for kind, make in COLLECTORS.items()):
        for name, width in widths.items():
            collector.add(name, inputs(width))
        collector.samples = 1
        collected[kind] = collector.result()
    return collected


def inputs(width, seed=0):
    return correlated(width, seed=seed) + torch.linspace(-1, 2, width)


@pytest.mark.parametrize("kind", COLLECTORS)
def test_outputs_have_the_right_mean(kind, tmp_path, source, statistics):
    known, state = statistics[kind], load_file(source)
    report = convert(source, tmp_path / "a.gguf", "Q2_K", importance=known)
    tensors = open_gguf(report.path).tensors
    assert f"{len(known)} biases make up for the mean error of their layers" in report.text()
    for name in known:
        bias = f"{name.removesuffix('.weight')}.bias"
        error = tensors[name].dequantize() - state[name].float()
        shift = tensors[bias].dequantize() - state[bias].float()
        torch.testing.assert_close(shift, -(error @ known.mean(name)), rtol=1e-4, atol=1e-5)
    assert list(tensors).index(BIAS) == list(tensors).index(NAME) + 1
    assert report.metadata["wanquant.corrected_biases"]


def test_error_of_outputs_is_less_with_the_bias(tmp_path, source, statistics):
    state, x = load_file(source), inputs(256, seed=1)
    wanted = x @ state[NAME].float().t() + state[BIAS].float()
    errors = []
    for known in (statistics["importance"], dict(statistics["importance"])):
        tensors = open_gguf(convert(source, tmp_path / "a.gguf", "Q2_K", importance=known, overwrite=True).path).tensors
        errors.append((x @ tensors[NAME].dequantize().t() + tensors[BIAS].dequantize() - wanted).norm())
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_biases_stay_where_no_mean_was_measured_and_at_effort_fast(effort, tmp_path, source, statistics):
    known = statistics["importance"] if effort == "fast" else dict(statistics["importance"])
    report = convert(source, tmp_path / "a.gguf", "Q4_0", effort=effort, importance=known)
    assert torch.equal(open_gguf(report.path).tensors[BIAS].dequantize(), load_file(source)[BIAS].float())
    assert "wanquant.corrected_biases" not in report.metadata
    assert "make up" not in report.text()


def test_bytes_do_not_depend_on_slices(tmp_path, source, statistics, monkeypatch):
    known = statistics["calibration"]
    whole = convert(source, tmp_path / "a.gguf", "Q4_0", importance=known).path
    monkeypatch.setattr(stream, "_CPU_SLICE", 256 * 96)
    monkeypatch.setattr(stream, "ROUNDED_ELEMENTS", 256 * 96)
    sliced = convert(source, tmp_path / "b.gguf", "Q4_0", importance=known).path
    assert open_gguf(whole).metadata["wanquant.data_sha256"] == open_gguf(sliced).metadata["wanquant.data_sha256"]


@pytest.mark.parametrize("kind", COLLECTORS)
def test_a_device_without_float64_leaves_it_to_the_cpu(kind, tmp_path, source, statistics, monkeypatch, caplog):
    """A CPU stands in for such a device, which is not here: it is refused the type that the device lacks."""
    wanted = convert(source, tmp_path / "a.gguf", "Q4_0", importance=statistics[kind]).path.read_bytes()
    monkeypatch.setattr(bias_correction, "has_float64", lambda device: False)
    monkeypatch.setattr(convert_module, "has_float64", lambda device: False)
    found = convert(source, tmp_path / "b.gguf", "Q4_0", importance=statistics[kind]).path.read_bytes()
    assert found == wanted
    assert ("needs float64" in caplog.text) == (kind == "calibration")


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("after", [NAME, BIAS])
def test_a_killed_conversion_resumes_with_the_weight_of_an_uncorrected_bias(
    after, tmp_path, source, statistics, monkeypatch, caplog
):
    """The writer of a killed process cleans nothing up."""
    known = statistics["importance"]
    wanted = convert(source, tmp_path / "a.gguf", "Q4_K_S", importance=known).path.read_bytes()
    written = stream.OpenFile.end_tensor

    def killed(self, pool, signal):
        written(self, pool, signal)
        if len(self.errors) == 1 + [spec.name for spec in self.writer.tensors].index(after):
            self.wait()
            raise KilledError

    path = tmp_path / "b.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(stream.OpenFile, "end_tensor", killed)
        patch.setattr(stream.TensorWriter, "__exit__", lambda self, *_: self._file._file.flush())
        with pytest.raises(KilledError):
            convert(source, path, "Q4_K_S", importance=known)
    convert(source, path, "Q4_K_S", importance=known)
    assert "resumed after" in caplog.text
    assert path.read_bytes() == wanted


def interrupting(after, error):
    """Return a progress function that raises an error at the tensor with this number."""
    seen = set()

    def progress(_done, _total, name):
        seen.add(name)
        if len(seen) > after:
            raise error

    return progress


def test_an_interrupted_calibrated_conversion_continues(tmp_path, source, statistics, caplog):
    """Hours of rounding are kept, but not for an error that comes again, and not where none were spent."""
    known, path = statistics["calibration"], tmp_path / "b.gguf"
    wanted = convert(source, tmp_path / "a.gguf", "Q4_K_S", importance=known).path.read_bytes()
    left = {"a.gguf": set(), "b.gguf": {".b.gguf.tmp", ".b.gguf.journal"}}
    for importance, error, files in (
        (known, QuantError("bad"), left["a.gguf"]),
        (statistics["importance"], KeyboardInterrupt(), left["a.gguf"]),
        (known, KeyboardInterrupt(), left["b.gguf"]),
    ):
        with pytest.raises(type(error)):
            convert(source, path, "Q4_K_S", importance=importance, progress=interrupting(4, error))
        assert {file.name for file in tmp_path.iterdir()} == {"a.gguf"} | files
    assert "; the same conversion continues there. To give it up, delete" in caplog.text
    convert(source, path, "Q4_K_S", importance=known)
    assert "resumed after" in caplog.text
    assert path.read_bytes() == wanted


def test_verify_counts_no_corrected_bias(tmp_path, source, statistics):
    report = convert(source, tmp_path / "a.gguf", "Q2_K", importance=statistics["importance"])
    path = report.path
    _, largest = report.text().split("largest errors")
    assert not any(f"dB  {name}" in largest for name in report.metadata["wanquant.corrected_biases"])
    verification = verify(path, source)
    assert BIAS in verification.corrected and len(verification.corrected) == len(statistics["importance"])
    assert "biases differ on purpose" in verification.text()
    (bias,) = (tensor for tensor in verification.tensors if tensor.name == BIAS)
    assert bias.noise > 0
    counted = [t for t in verification.tensors if t.name not in verification.corrected]
    assert math.isclose(verification.by_role[-1].noise, sum(t.noise for t in counted))


def test_a_recovery_lora_leaves_the_mean_to_the_bias(tmp_path, source, statistics):
    known = statistics["importance"]
    path = convert(source, tmp_path / "a.gguf", "Q2_K", importance=known).path
    with pytest.raises(QuantError, match="makes up for the error of its weight, but no mean input is known"):
        recover(path, source, tmp_path / "l.safetensors", 1e-4)
    lora = load_file(recover(path, source, tmp_path / "l.safetensors", 2e-4, importance=known).path)
    layer = "diffusion_model.blocks.0.ffn.0"
    change = lora[f"{layer}.lora_B.weight"].float() @ lora[f"{layer}.lora_A.weight"].float()
    torch.testing.assert_close(lora[f"{layer}.diff_b"].float(), -(change @ known.mean(NAME)), rtol=0.02, atol=1e-4)


def test_the_command_line_recovers_a_calibrated_file(tmp_path, source, statistics, capsys):
    calibration = str(write_calibration(tmp_path / "c.safetensors", statistics["calibration"]))
    file, lora = str(tmp_path / "a.gguf"), str(tmp_path / "l.safetensors")
    assert main(["convert", str(source), file, "--recipe", "Q2_K", "--calibrate", calibration]) == 0
    assert "biases make up for the mean error" in capsys.readouterr().out
    arguments = ["recover", file, str(source), lora, "--size", "2e-4"]
    assert main(arguments) == 1
    assert "give the importance matrix or calibration that the file was made with" in capsys.readouterr().err
    assert main([*arguments, "--calibrate", calibration]) == 0
    assert "the LoRA gains much less than the share" in capsys.readouterr().out


def test_a_source_whose_biases_come_first_gets_the_same_digest(tmp_path, source, statistics):
    """Biases are read out of order, but the file is hashed in its own."""
    moved = tmp_path / "first.safetensors"
    state = load_file(source)
    save_file({n: v.float() if n.endswith("bias") else v for n, v in state.items()}, moved)
    report = convert(moved, tmp_path / "a.gguf", "Q4_0", importance=statistics["importance"])
    assert report.metadata["wanquant.source_sha256"] == hashlib.sha256(moved.read_bytes()).hexdigest()
