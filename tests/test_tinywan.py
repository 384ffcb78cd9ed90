"""TinyWan: its clips, the detector that scores them, the committed checkpoint, and its errors when quantized."""

from __future__ import annotations

import json
import struct
from statistics import fmean

import comfy_kitchen as ck
import pytest
import torch

from wanquant.testing.hosts import ROOT, checkout

if not (checkout() / "comfy").is_dir():
    pytest.skip("no ComfyUI: run `python3 dev.py setup` or set COMFYUI_PATH", allow_module_level=True)

from wanquant.bench import quality, sensitivity, train_tinywan
from wanquant.bench.tinywan import reference as sampling
from wanquant.bench.tinywan.activations import quantize_inputs, rounding
from wanquant.bench.tinywan.allocation import HALVES, by_half
from wanquant.bench.tinywan.data import CAPTIONS, HELD_OUT, MOTIONS, TRAINING, WORDS, draw, to_latent, word_embeddings
from wanquant.bench.tinywan.encodings import NATIVE_METHODS, within
from wanquant.bench.tinywan.equivalents import reordered
from wanquant.bench.tinywan.model import build
from wanquant.bench.tinywan.pictures import draw_quality
from wanquant.bench.tinywan.reference import Reference, load_model, load_weights, prompts
from wanquant.bench.tinywan.score import right
from wanquant.ops.conditioning import load_conditioning
from wanquant.quant.statistics.calibration import CalibrationCollector
from wanquant.testing.kitchen import kitchen_values

import comfy.model_management  # isort: skip (wanquant.bench.tinywan puts the host on the path)

FOLDER = ROOT / "bench" / "tinywan"


@pytest.fixture(scope="module")
def clips():
    return to_latent(draw(CAPTIONS, torch.Generator().manual_seed(5)))


def test_detector_is_right_on_every_drawn_clip(clips):
    assert right(clips, CAPTIONS).all()
    assert right(clips + 0.1 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0)), CAPTIONS).all()


def test_detector_sees_motion_backwards_frozen_and_absent(clips):
    for other in (clips.flip(2), clips[:, :, :1].expand_as(clips)):
        colour, motion = right(other, CAPTIONS).T
        assert colour.all()
        assert not motion.any()
    assert not right(torch.zeros_like(clips), CAPTIONS).any()


def test_every_word_and_pair_is_learned_and_no_held_out_caption():
    assert not set(HELD_OUT) & set(TRAINING)
    pairs = {(c.colour, c.shape) for c in TRAINING} | {(c.colour, c.motion) for c in TRAINING}
    assert len(pairs) == 6 * 3 + 6 * len(MOTIONS)


def test_word_files_are_the_embeddings_it_was_trained_with():
    for word, embedding in word_embeddings().items():
        tokens, fields = load_conditioning(str(FOLDER / "words" / f"{word}.safetensors"))[0]
        assert not fields
        assert torch.equal(tokens.float(), embedding.view(1, 1, -1))
    assert len(list((FOLDER / "words").iterdir())) == len(WORDS)


def test_checkpoint_is_small_and_quantizable():
    path = FOLDER / "tinywan.safetensors"
    with open(path, "rb") as file:
        header = json.loads(file.read(*struct.unpack("<Q", file.read(8))))
    matrices = {name: entry["shape"] for name, entry in header.items() if len(entry["shape"]) == 2}
    assert path.stat().st_size <= 16e6
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert all(shape[1] % 256 == 0 for shape in matrices.values())


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "in_training", False)  # and it is again afterwards
    monkeypatch.setattr(train_tinywan, "score", lambda *_: {})
    monkeypatch.setattr(train_tinywan, "SIZE", 8)
    settings = train_tinywan.Settings(steps=2, batch=1, rate=1e-3, seed=0)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    whole.mkdir()
    halves.mkdir()
    expected = train_tinywan.train(settings, whole, "cpu", 2).state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(train_tinywan, "score", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_tinywan.train(settings, halves, "cpu", 1)
    resumed = train_tinywan.train(settings, halves, "cpu", 2).state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())
    with pytest.raises(SystemExit, match="begun with"):
        train_tinywan.train(train_tinywan.Settings(steps=2, batch=1, rate=1e-4, seed=0), halves, "cpu", 2)


def interrupt(*_):
    raise KeyboardInterrupt


def test_it_draws_the_colours_and_motions_that_held_out_captions_say():
    model = build()
    model.load_state_dict(load_weights())
    # 58 of 64 where it was trained; another rounding may tip a clip. In 16 bits some CPUs take minutes.
    assert train_tinywan.score(model, 16, torch.float32)["both"] >= 0.85


def test_heads_start_out_looking_one_frame_back_and_one_ahead():
    attention = build().blocks[1].self_attn
    query, key = (bias.view(2, 64, 2)[:, :22] for bias in (attention.q.bias, attention.k.bias))
    frequencies = 10000 ** -(torch.arange(22) / 22)
    scores = []
    for frames in range(-3, 4):
        cosine, sine = (frames * frequencies).cos(), (frames * frequencies).sin()
        turned = torch.stack([cosine * key[..., 0] - sine * key[..., 1], sine * key[..., 0] + cosine * key[..., 1]], -1)
        scores.append((query * turned).sum((1, 2)))
    assert (torch.stack(scores).argmax(0) - 3).tolist() == [-1, 1]


def test_draws_the_same_clips_in_any_order_of_its_channels(monkeypatch):
    monkeypatch.setattr(sampling, "STEPS", 3)
    weights, reference = load_weights(), Reference.sample(1)
    assert reordered(weights, 0) is weights
    for order in (1, 2):
        others = reordered(weights, order)
        layers = [name for name, tensor in weights.items() if name.startswith("blocks.") and tensor.ndim == 2]
        assert not any(torch.equal(others[name], weights[name]) for name in layers)
        assert min(reference.errors(load_model(others)).latent_psnr) > 90


@pytest.fixture(scope="module")
def measured():
    """The errors of Q2_K and NVFP4 by method: {(recipe, method): Quality}, measured once because that takes long."""
    methods = [method for method in quality.ALL_METHODS if method not in ("thorough", "narrow")]
    rows = quality.measure(("Q2_K", "NVFP4"), methods, roundings=1, clips=1, captions=2)
    return {(row.recipe, row.method): row for row in rows}


def test_a_narrow_calibration_has_no_covariances_of_distant_channels():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 256, generator=generator) @ torch.randn(256, 256, generator=generator) + 1
    collector = CalibrationCollector()
    collector.add("w", inputs)
    collector.samples = 1
    whole = collector.result()
    narrow = within(whole, 64)
    found, expected = (known.moments("w", centered=True) for known in (narrow, whole))
    assert not found.factors.any()
    run = torch.arange(256) // 64
    wanted = expected.blocks + (expected.factors @ expected.factors.mT)
    torch.testing.assert_close(found.blocks, torch.where(run[:, None] == run, wanted, 0), rtol=1e-5, atol=1e-5)


def test_quality_at_equal_bytes(measured):
    """A method with more statistics has a smaller error at equal bytes."""
    rows = {method: row for (recipe, method), row in measured.items() if recipe == "Q2_K"}
    steps = {method: sum(row.velocity_sqnr) / len(row.velocity_sqnr) for method, row in rows.items()}
    assert rows["ggml"].nbytes == rows["plain"].nbytes < rows["importance + LoRA"].nbytes < 1.06 * rows["plain"].nbytes
    assert rows["plain"].weight_sqnr > rows["ggml"].weight_sqnr
    assert rows["plain"].output_sqnr > rows["ggml"].output_sqnr + 0.3
    assert rows["importance"].output_sqnr > rows["ggml + importance"].output_sqnr + 0.1
    assert steps["plain"] > steps["ggml"]
    assert steps["importance"] > steps["ggml"] + 1
    assert steps["calibrated"] > steps["importance"] > steps["ggml + importance"]
    assert steps["importance + LoRA"] > steps["importance"]


def test_no_recipe_is_below_ggml(measured, monkeypatch):
    """Layers are compared by recipe; steps and clips, which depend on chance, by their mean over the recipes."""
    monkeypatch.setattr(sampling, "STEPS", 3)
    # With Q2_K one for each kind of block. The encoders' own tests compare every type.
    recipes = ("Q8_0", "Q4_K_M", "Q4_0", "IQ4_XS")
    rows = quality.measure(recipes, ("ggml", "plain"), roundings=1, clips=1, captions=1)
    gains = {row.recipe: row.gains for row in (*rows, measured["Q2_K", "plain"]) if row.method == "plain"}
    assert set(gains) == {*recipes, "Q2_K"}
    assert all(gain["layers"].mean > 0.1 for gain in gains.values())
    assert fmean(gain["velocity"].mean for gain in gains.values()) > 0.3
    assert fmean(gain["latent"].mean for gain in gains.values()) > 0.5


def test_steps_count_by_the_noise_that_they_take_away():
    row = sensitivity.Sensitivity("a.weight", (0.0,) * len(sensitivity.LEVELS[:-1]))
    high, low = (row.of_half(half) for half in ("high", "low"))
    taken = torch.tensor(sensitivity.LEVELS).diff().square().sum().item()
    assert high + low == pytest.approx(taken)
    assert low > high, "the schedule spends most of its steps where the noise is high"


def test_each_half_has_its_model():
    x, text = torch.zeros(1), torch.zeros(1)
    model = by_half({half: lambda *_, half=half: half for half in HALVES})
    halves = [model(x, torch.tensor([1000 * level]), text) for level in sensitivity.LEVELS[:-1]]
    assert halves == ["high"] * 5 + ["low"] * 3


@pytest.mark.parametrize("count", [8, 16, 54])
def test_prompts_have_every_word(count):
    chosen = prompts(count)
    assert len(set(chosen)) == count
    assert {word for caption in chosen for word in caption.words} == set(WORDS)


def test_native_formats_against_kitchen(measured):
    """A calibration and a search bring the outputs of layers closer than kitchen's encoder, at its bytes."""
    kitchen, *ours = (measured["NVFP4", method] for method in ("kitchen", "plain", "calibrated"))
    assert not kitchen.gains
    assert ours[0].nbytes == kitchen.nbytes
    assert all(row.gains["layers"].mean > 0.8 for row in ours)


def test_products_in_8_bits_change_little(measured):
    exact, row = measured["Q2_K", "plain"], measured["Q2_K", "int8"]
    assert row.nbytes == exact.nbytes and row.weight_sqnr < exact.weight_sqnr
    assert row.velocity_sqnr != exact.velocity_sqnr
    assert abs(row.gains["velocity"].mean) < 0.3


def test_a_run_replaces_the_committed_rows_that_it_measured():
    def row(recipe, method, networks):
        return {"recipe": recipe, "method": method, "networks": networks}

    before = {"machine": "a", "clips": 1, "rows": [row("Q8_0", "plain", 16), row("INT4", "kitchen", 16)]}
    rows = [row("IQ1_M", "plain", 2), row("Q8_0", "plain", 2)]
    merged = quality.merged(before, {"machine": "b", "clips": 1, "rows": rows})
    assert merged == {"machine": "a; b", "clips": 1, "rows": [rows[1], rows[0], before["rows"][1]]}
    assert quality.merged(merged, {"machine": "b", "clips": 1, "rows": rows}) == merged, "each machine is named once"
    with pytest.raises(SystemExit, match=r"the committed rows have clips 1, got 2: measure all rows anew"):
        quality.merged(before, {"machine": "a", "clips": 2, "rows": rows})


def test_a_method_makes_only_files_that_it_can(measured):
    assert ("Q2_K", "ggml") in measured and ("Q2_K", "kitchen") not in measured
    assert ("NVFP4", "kitchen") in measured and ("NVFP4", "ggml") not in measured


@pytest.mark.parametrize("name", quality.NATIVE)
def test_inputs_are_quantized_as_kitchen_does(name):
    """Kitchen quantizes rows of inputs; a rotated row is one that it multiplies by its matrix first."""
    inputs = torch.randn(2, 40, 512, generator=torch.Generator().manual_seed(0))
    inputs[..., 3] *= 30
    rows = inputs.flatten(0, 1)
    if name == "FP8":
        one = torch.ones(())
        expected = ck.dequantize_per_tensor_fp8(ck.quantize_per_tensor_fp8(rows, one), one, torch.float32)
    else:
        expected = kitchen_values({"W4A8": "INT8", "W6A8": "INT8"}.get(name, name), rows)
    torch.testing.assert_close(rounding(name)(inputs).flatten(0, 1), expected, rtol=1e-5, atol=1e-4)
    factors = torch.linspace(0.5, 2, 512)
    torch.testing.assert_close(rounding(name, factors)(inputs / factors), rounding(name)(inputs) / factors)


def test_large_inputs_of_fp8_are_cut_off():
    assert rounding("FP8")(torch.tensor([[1000.0, -449.0, 1.03]])).tolist() == [[448, -448, 1]]


def test_the_linears_of_a_model_quantize_their_inputs():
    layers = torch.nn.ModuleDict({"a": torch.nn.Linear(256, 8), "b": torch.nn.Linear(256, 8)})
    x = torch.randn(3, 256)
    expected = [layers["a"](rounding("INT4")(x)), layers["b"](x)]
    quantize_inputs(layers, {"a.weight": rounding("INT4"), "c.weight": rounding("FP8")})
    assert all(torch.equal(layer(x), value) for layer, value in zip(layers.values(), expected, strict=True))


def test_errors_of_files_are_kept_and_taken_from_another_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "STEPS", 1)
    settings = {"roundings": 2, "clips": 1, "captions": 1, "parts": tmp_path}
    rows = quality.measure(("INT8",), ("kitchen", "plain"), **settings, jobs=2)
    assert rows[0].nbytes == rows[1].nbytes and rows[1].gains["layers"].mean > 0.05
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{network:02}-INT8-{method}.json" for network in (0, 1) for method in ("kitchen", "plain")
    ]
    monkeypatch.setattr(quality.Bench, "_measure", lambda *_: pytest.fail("measured again"))
    assert quality.measure(("INT8",), ("kitchen", "plain"), **settings) == rows
    single = {**settings, "roundings": 1, "first": 1}
    assert quality.measure(("INT8",), ("plain",), **single)[0].velocity_sqnr != rows[1].velocity_sqnr
    with pytest.raises(SystemExit, match=r"00-INT8-plain.json: measured with .*'clips': 1.*, expected .*'clips': 2"):
        quality.measure(("INT8",), ("plain",), **{**settings, "clips": 2})


def test_the_picture_shows_every_format(tmp_path, monkeypatch):
    row = {"networks": 2, "nbytes": 5_000_000, "latent_psnr": {"mean": 50.0, "deviation": 1.0}}
    native = [(name, method) for name in quality.NATIVE for method in NATIVE_METHODS]
    files = [("Q8_0", "ggml"), ("Q8_0", "plain"), *native]
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: drawn.append(figure))
    rows = [row | {"recipe": recipe, "method": method} for recipe, method in files]
    fewer = row | {"recipe": "IQ1_M", "method": "plain", "networks": 1}
    draw_quality([*rows, fewer], tmp_path / "quality.png")
    left, right = drawn[0].axes
    assert [text.get_text() for text in left.texts] == ["Q8_0"]
    assert sorted(text.get_text() for text in right.texts) == sorted(quality.NATIVE)
    assert {"ComfyUI's encoders", "WanQuant", "WanQuant, calibrated"} <= set(right.get_legend_handles_labels()[1])
