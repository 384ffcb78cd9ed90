"""The benchmark of real weights, on TinyWan: jobs that go on after an interruption, their page, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch

from wanquant.bench import quality_wan
from wanquant.bench.comparison import Spread
from wanquant.bench.quality_wan import CAPTION
from wanquant.bench.wan import jobs
from wanquant.bench.wan.page import write_page
from wanquant.bench.wan.sampling import Decoder, conditionings, similarity
from wanquant.quant import QuantError
from wanquant.testing.text_encoder_files import WIDTH
from wanquant.testing.tiny_wan import write_tiny_wan
from wanquant.tests.ops.loading.conftest import llama_file, processor, spiece, weights  # noqa: F401

SMALL = ["--size", "64x64", "--frames", "5", "--steps", "2"]


def options_of(folder, *arguments):
    return quality_wan.parse(["--out", str(folder), *SMALL, *arguments])


def measure(options):
    return quality_wan.measure(options, quality_wan.settings_of(options))


def test_an_interrupted_measurement_goes_on(tmp_path, monkeypatch):
    options, sampled = options_of(tmp_path, "--recipes", "Q2_K,FP8"), []

    def counted(*arguments):
        if len(sampled) == 2:
            raise KeyboardInterrupt
        sampled.append(arguments)
        return sample(*arguments)

    sample = jobs.sample
    monkeypatch.setattr(jobs, "sample", counted)
    with pytest.raises(KeyboardInterrupt):
        measure(options)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "jobs").iterdir()}
    assert len(kept) == 2

    sampled.clear()
    bench, rows = measure(options)
    assert len(sampled) == 1 and all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert [row["version"] for row in rows] == ["unquantized", "Q2_K", "FP8"]
    unquantized, coarse, fine = rows
    assert "latent_psnr" not in unquantized
    assert 20 < coarse["latent_psnr"] < fine["latent_psnr"] < 100 and coarse["ssim"] < fine["ssim"] < 1
    assert all(row["seconds_a_step"] > 0 and row["peak_gib"] > 0 for row in rows)

    page = write_page(bench, rows, "dev.py bench quality-wan").read_text(encoding="utf-8")
    assert f"| {coarse['latent_psnr']:.1f} |" in page and "1. red + ball + right" in page
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("quality.png", "frames.png"))

    with pytest.raises(SystemExit, match="measured with"):
        measure(options_of(tmp_path, "--recipes", "Q2_K", "--steps", "3"))


def test_equal_files_have_no_error(tmp_path):
    source = write_tiny_wan(tmp_path / "wan.safetensors", layers=1, ffn_dim=512)
    other = source.with_name("copy.safetensors")
    other.write_bytes(source.read_bytes())
    files = {jobs.UNQUANTIZED: source, "copy": other}
    settings = quality_wan.settings_of(options_of(tmp_path))
    bench = jobs.Bench(tmp_path, settings, files, [CAPTION], [0, 1])
    with torch.inference_mode():
        rows = bench.run(conditionings(bench.prompts, None, tmp_path))
    assert [row["latent_psnr"] for row in rows[2:]] == [math.inf] * 2 and {row["ssim"] for row in rows[2:]} == {1.0}
    assert "| copy |" in write_page(bench, rows, "").read_text(encoding="utf-8")


def test_frames_of_a_vae(tmp_path):
    import comfy.taesd.taehv
    import comfy.utils

    torch.manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in comfy.taesd.taehv.TAEHV(latent_channels=16).state_dict().items()}
    state = {name: torch.randn(shape) * (2 / shape[1:].numel()) ** 0.5 for name, shape in shapes.items()}
    comfy.utils.save_torch_file(state, str(tmp_path / "vae.safetensors"))
    with torch.inference_mode():
        frames = Decoder(tmp_path / "vae.safetensors").frames(torch.randn(1, 16, 2, 8, 8))
    assert frames.shape == (5, 64, 64, 3) and frames.dtype == torch.uint8 and len(frames.unique()) > 100


def test_similarity_is_that_of_structure():
    picture = torch.randint(100, 140, (2, 32, 32, 3), generator=torch.Generator().manual_seed(0)).byte()
    brighter, other = picture + 2, picture.flip(1)
    assert similarity(picture, picture) == 1.0 > similarity(picture, brighter) > 0.99
    assert similarity(picture, other) < 0.2


def test_the_plan_says_time_and_disk(tmp_path):
    options = options_of(tmp_path / "out", "--recipes", "Q8_0,Q4_K_M", "--seeds", "0", "1")
    text = quality_wan.plan_of(options, quality_wan.settings_of(options), tmp_path / "out")
    assert "tinywan-Q4_K_M.gguf" in text and "disk: " in text and "6 videos of 2 forwards" in text
    assert not (tmp_path / "out").exists()


def test_a_forward_costs_what_its_layers_do():
    """What 32 tokens more cost: products with the blocks' weights, patches and head, and attention."""
    counts = []
    for frames in (5, 13):
        options = quality_wan.parse(["--size", "64x64", "--frames", str(frames)])
        counts.append(quality_wan.flops_of(options.model, quality_wan.settings_of(options)))
    before, after, prompt, dim, ffn, blocks = 32, 64, 512, 256, 768, 4
    multiplied = blocks * (6 * dim**2 + 2 * dim * ffn) + 2 * 64 * dim
    scores = after * (after + prompt) - before * (before + prompt)
    assert counts[1] - counts[0] == 2 * (after - before) * multiplied + 4 * blocks * dim * scores


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "wan.safetensors"], "has no prompts; add"),
        (["--size", "large"], "expected WIDTHxHEIGHT"),
        (["--vae", "none.safetensors"], "no such file; name"),
        (["--steps", "0"], "expected at least 1; choose"),
        (["--cfg", "6"], "needs a negative prompt; add"),
    ],
)
def test_refuses_what_it_cannot_measure(arguments, message):
    with pytest.raises(SystemExit, match=message):
        quality_wan.settings_of(quality_wan.parse(arguments))


def test_a_text_needs_an_encoder(tmp_path):
    with pytest.raises(SystemExit, match="a text needs --text-encoder FILE; name it"):
        conditionings(["a red ball"], None, tmp_path)
    with pytest.raises(QuantError, match=r"none\.safetensors"):
        conditionings([str(tmp_path / "none.safetensors")], None, tmp_path)


def test_texts_are_encoded_once(tmp_path, llama_file):  # noqa: F811
    with torch.inference_mode():
        ((tokens, _),) = conditionings(["a red ball", CAPTION], llama_file, tmp_path)["a red ball"]
    assert tokens.shape[-1] == WIDTH and len(list(tmp_path.glob("*.safetensors"))) == 1


def test_one_video_has_no_deviation():
    assert str(Spread.of([1.0])) == "1.0" and str(Spread.of([math.inf, 1.0])) == "inf"


def test_settings_are_json(tmp_path):
    (tmp_path / "vae.safetensors").touch()
    options = options_of(tmp_path, "--negative", "x", "--cfg", "2", "--vae", str(tmp_path / "vae.safetensors"))
    assert json.loads(json.dumps(quality_wan.settings_of(options).json()))["vae"] == "vae.safetensors"
