"""Type plans for a file size: the size that is reached, the error, and the sensitive tensors that get more bits."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from wanquant.quant import QTYPES, QuantError
from wanquant.quant.conversion.convert import convert, convert_all
from wanquant.quant.conversion.output import Output
from wanquant.quant.conversion.planning import plan_outputs
from wanquant.quant.conversion.settings import Settings, Target
from wanquant.quant.conversion.stream import Stream
from wanquant.quant.gguf.reader import open_gguf
from wanquant.quant.inspection.verify import verify
from wanquant.quant.plan import target_size as budget
from wanquant.quant.plan.file_size import predicted_size
from wanquant.quant.plan.recipe import RECIPES, plan_types
from wanquant.quant.plan.target_size import ParetoFront, TypeOption, allocate
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.testing.tiny_wan import write_tiny_wan

GIB = 1 << 30
TYPES = [QTYPES[name] for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_wan(tmp_path_factory.mktemp("source") / "wan.safetensors", layers=14, dim=256, ffn_dim=512)


def sized(source, folder, nbytes, **settings):
    settings = {"effort": "fast", "overwrite": True, **settings}
    return convert(source, folder / "sized.gguf", target_size=nbytes / GIB, **settings)


def qtypes(report):
    return {tensor.name: QTYPES[tensor.qtype] for tensor in report.tensors}


def front(*points):
    return ParetoFront.of([TypeOption(q, *point) for q, point in zip(TYPES, points, strict=False)])


def test_front_leaves_out_options_that_are_larger_and_not_better():
    found = front((10, 8.0), (20, 9.0), (30, 4.0), (40, 3.9), (50, 1.0))
    assert [option.nbytes for option in found.options] == [10, 30, 40, 50]
    assert [option.nbytes for option in found.hull] == [10, 30, 50]
    assert found.multipliers == pytest.approx([0.2, 0.15])


@pytest.mark.parametrize(
    ("multiplier", "nbytes"),
    [(1e9, 10), (0.21, 10), (0.19, 30), (0.16, 30), (0.14, 50), (0, 50)],
)
def test_best_option_minimizes_error_plus_multiplier_times_bytes(multiplier, nbytes):
    points = ((10, 8.0), (20, 9.0), (30, 4.0), (40, 3.9), (50, 1.0))
    assert front(*points).best_option(multiplier).nbytes == nbytes
    assert front(*points).best_option(math.inf).nbytes == 10


def test_error_of_an_allocation_is_nearly_the_smallest_of_all():
    draw = random.Random(1)
    for _ in range(20):
        fronts = {}
        for name in "abcde":
            scale = draw.uniform(1, 10)
            fronts[name] = front(*((10 * bits, scale * 4.0**-bits) for bits in range(1, 5)))
        nbytes = draw.randrange(60, 190)
        chosen = allocate(fronts, nbytes)
        assert sum(option.nbytes for option in chosen.values()) <= nbytes
        every = itertools.product(*(f.options for f in fronts.values()))
        best = min(sum(c.error for c in mix) for mix in every if sum(c.nbytes for c in mix) <= nbytes)
        assert sum(option.error for option in chosen.values()) <= 1.1 * best


def test_size_is_used_and_never_exceeded(tmp_path, source):
    with pytest.raises(QuantError, match=r"choose a size from ([\d.]+) to ([\d.]+) GiB") as refused:
        sized(source, tmp_path, 1)
    low, high = (float(word) * GIB for word in str(refused.value).split()[-4:-1:2])
    wanted = [int(low + fraction * (high - low)) for fraction in (0.01, 0.1, 0.35, 0.6, 0.9)]
    targets = [Target(tmp_path / f"{nbytes}.gguf", target_size=nbytes / GIB) for nbytes in wanted]
    for report, nbytes in zip(convert_all(source, targets, Settings(effort="fast")), wanted, strict=True):
        assert 0.99 * nbytes <= report.nbytes <= nbytes
        assert report.nbytes == report.destination.stat().st_size


def test_error_is_below_that_of_the_recipe_of_the_same_size(tmp_path, source):
    recipe = convert(source, tmp_path / "recipe.gguf", "Q4_K_M", effort="fast")
    found = sized(source, tmp_path, recipe.nbytes)
    noise = [sum(t.noise for t in verify(report.destination, source).tensors) for report in (found, recipe)]
    assert found.nbytes <= recipe.nbytes
    assert noise[0] < noise[1]


def test_first_and_last_blocks_and_early_text_keys_get_more_bits(tmp_path, source):
    types = qtypes(sized(source, tmp_path, convert(source, tmp_path / "a.gguf", "Q4_0", effort="fast").nbytes))
    bits = {name: qtype.bits_per_weight for name, qtype in types.items()}
    square = ("0.self_attn.q", "13.cross_attn.o", "4.cross_attn.k", "10.cross_attn.v")
    for names, role in ((square, "self_attn.q"), (("1.ffn.2",), "ffn.2"), (("11.ffn.0",), "ffn.0")):
        usual = min(bits[f"blocks.{block}.{role}.weight"] for block in range(2, 11))
        assert all(bits[f"blocks.{name}.weight"] > usual for name in names)
    assert types["time_projection.1.weight"].name in ("Q8_0", "BF16")
    assert types["blocks.0.modulation"].name == "F32"


def test_a_tensor_of_zeros_has_no_error():
    assert budget.relative_error(QTYPES["Q4_K"], torch.zeros(2, 256), None, "fast") == 0


def test_importance_takes_bits_from_a_tensor_with_few_important_input_channels(tmp_path, source):
    name, importance = "blocks.7.ffn.2.weight", torch.full((512,), 1e-3)
    plain = sized(source, tmp_path, 9 << 20)
    assert qtypes(sized(source, tmp_path, 9 << 20, importance={name: importance})) == qtypes(plain)
    importance[::32] = 1
    weighted = sized(source, tmp_path, 9 << 20, importance={name: importance})
    assert qtypes(weighted)[name].bits_per_weight < qtypes(plain)[name].bits_per_weight


def test_another_size_is_another_conversion(tmp_path, source):
    report = sized(source, tmp_path, 9 << 20)
    assert open_gguf(report.destination).metadata["wanquant.target_size"] == 9 << 20
    assert sized(source, tmp_path, 9 << 20, overwrite=False).reused
    for settings in ({"target_size": 9.5 / 1024}, {"recipe": "Q4_K_M"}):
        with pytest.raises(QuantError, match="is not this conversion"):
            convert(source, report.destination, effort="fast", **settings)


@pytest.mark.parametrize(("nbytes", "shown"), [(1 << 20, "0.0009766"), (1 << 40, "1024")])
def test_unreachable_size_is_refused_before_anything_is_measured(tmp_path, source, monkeypatch, nbytes, shown):
    monkeypatch.setattr(budget, "measure", None)
    with pytest.raises(QuantError, match=rf"target size {shown} GiB: cannot be reached.* from 0\.006 to 0\.024 GiB"):
        sized(source, tmp_path, nbytes)


@pytest.mark.parametrize("size", [0.0, -1.0, math.inf, math.nan])
def test_sizes_that_are_not_positive_and_finite_are_refused(tmp_path, source, size):
    with pytest.raises(QuantError, match="not a size"):
        convert(source, tmp_path / "a.gguf", target_size=size)


def test_tensors_are_quantized_from_the_source(tmp_path, source):
    file, weights = open_gguf(sized(source, tmp_path, 12 << 20).destination), load_file(source)
    for name, tensor in file.tensors.items():
        assert torch.equal(tensor.data.flatten(), tensor.qtype.quantize(weights[name], effort="fast").flatten())


def planned(checkpoint, folder, *sizes):
    """Return the types that files of these sizes get if they are made in one pass."""
    targets = [Target(folder / f"{nbytes}.gguf", target_size=nbytes / GIB) for nbytes in sizes]
    outputs = [Output.of(target, checkpoint, Settings()) for target in targets]
    plans = plan_outputs(Stream(checkpoint, Settings(), torch.device("cpu"), None), outputs)
    return [plan.types for plan in plans]


def test_sizes_below_that_of_q3_k_use_the_small_types_whatever_else_is_made(tmp_path, source, monkeypatch):
    # The errors of Gaussian weights, nearly; those of grids are a little less at the same size.
    small = {QTYPES[name] for name in budget.SMALL_TYPES}
    monkeypatch.setattr(
        budget, "relative_error", lambda qtype, *_: 4**-qtype.bits_per_weight * (0.9 if qtype in small else 1)
    )
    # The second is just large enough for Q3_K everywhere, in place of which IQ3_S would be chosen.
    recipes = RECIPES["IQ2_XXS"], replace(RECIPES["Q3_K_S"], protected="Q8_0")
    with open_checkpoint(source) as checkpoint:
        plans = [plan_types(recipe, checkpoint.tensors).types for recipe in recipes]
        low, high = (predicted_size(types, checkpoint.tensors) + 8192 for types in plans)
        together = planned(checkpoint, tmp_path, low, high)
        assert together == [*planned(checkpoint, tmp_path, low), *planned(checkpoint, tmp_path, high)]
    assert [bool(small & set(types.values())) for types in together] == [True, False]
