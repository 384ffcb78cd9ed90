"""ComfyUI's own formats: kitchen decodes our tensors to our values, and our errors are below those of kitchen."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from wanquant.quant import QuantError
from wanquant.quant.conversion.layer_encoder import LayerEncoder
from wanquant.quant.native.layer_type import LayerType
from wanquant.quant.native.native_format import Part
from wanquant.quant.native.registry import NATIVE
from wanquant.quant.native.rotation import rotate
from wanquant.tests.quant.native.kitchen import DECODE, kitchen_values

FORMATS = NATIVE
UNROTATED = ("FP8", "MXFP8", "NVFP4")
DTYPES = {"I8": torch.int8, "U8": torch.uint8, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
every_format = pytest.mark.parametrize("name", FORMATS)
both_efforts = pytest.mark.parametrize("effort", ["fast", "best"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def student_t(*shape: int) -> Tensor:
    """Return samples of Student's t distribution with 4 degrees of freedom."""
    squares = sum(normal(*shape, seed=seed).square() for seed in range(1, 5))
    return normal(*shape) * (4 / squares).sqrt()


def outlier_columns() -> Tensor:
    weight = normal(64, 1024)
    weight[:, ::97] *= 40
    return weight


def sparse() -> Tensor:
    weight = normal(64, 1024)
    weight[:, :512] = 0
    weight[3] = 0
    weight[5, 600] = 1e4
    return weight


def student_t2(*shape: int) -> Tensor:
    """Return samples of Student's t distribution with 2 degrees of freedom."""
    squares = sum(normal(*shape, seed=seed).square() for seed in (1, 2))
    return normal(*shape) * (2 / squares).sqrt()


# Weights whose tails are heavy once they are rotated, where kitchen fits another table of W4A8.
HEAVY_TAILED = {
    "heavy tails": rotate(student_t2(64, 1024)),
    "heavy tails in some rows": torch.cat([normal(32, 1024), rotate(student_t2(32, 1024))]),
    "few weights": rotate(normal(64, 1024) * (normal(64, 1024, seed=1) > 1.3)),
    "scales of rotated channels": rotate(normal(64, 1024) * normal(1024, seed=1).mul(2).exp()),
}
WEIGHTS = {
    **HEAVY_TAILED,
    "normal": normal(64, 1024),
    "normal, one row": normal(1, 256),
    "normal, many rows": normal(700, 1280) * 0.02,
    "Student's t": student_t(64, 1024),
    "outlier columns": outlier_columns(),
    "channel scales": normal(64, 1024) * normal(1024, seed=1).exp(),
    "row scales": normal(64, 1024) * (3 * normal(64, 1, seed=1)).exp(),
    "sparse": sparse(),
    "zeros": torch.zeros(32, 512),
    "constant": torch.full((32, 512), 0.37),
    "constant rows": normal(32, 1).expand(32, 512).contiguous(),
    "tiny": normal(32, 512) * 1e-30,
    "tinier": normal(32, 512) * 1e-37,
    "huge": normal(32, 512) * 1e30,
    "bfloat16": normal(64, 1024).bfloat16().float(),
}
every_weight = pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())


def error(values: Tensor, weight: Tensor) -> float:
    """Return the norm of the error, relative to that of the weight; infinite for values that are no numbers."""
    difference = (values.double() - weight.double()).norm() / weight.double().norm().clamp(min=1e-300)
    return float(difference.nan_to_num(torch.inf))


def coded(name: str, weight: Tensor, **options: object) -> Tensor:
    return FORMATS[name].decode(FORMATS[name].encode(weight, **options), tuple(weight.shape))


@both_efforts
@every_weight
@every_format
def test_kitchen_decodes_the_same_bits(name, weight, effort):
    parts = FORMATS[name].encode(weight, effort=effort)
    shape = tuple(weight.shape)
    values = FORMATS[name].decode(parts, shape)
    assert values.dtype == torch.float32 and values.shape == shape and values.isfinite().all()
    # The views as integers tell zeros apart by their signs.
    assert torch.equal(values.view(torch.int32), DECODE[name](parts, shape).contiguous().view(torch.int32))


@every_weight
@every_format
def test_never_worse_than_kitchen(name, weight):
    # An error of 1e-7 is that of float32, in which weights are rotated.
    assert error(coded(name, weight), weight) <= error(kitchen_values(name, weight), weight) * (1 + 1e-5) + 1e-7


@every_format
def test_fast_is_kitchens_own_choice(name):
    for weight in (WEIGHTS["normal"], WEIGHTS["Student's t"], WEIGHTS["outlier columns"]):
        expected = kitchen_values(name, weight)
        values = coded(name, weight, effort="fast")
        if name in UNROTATED:
            assert torch.equal(values, expected)
        else:
            # Kitchen rotates all rows at once, so that a few sums are rounded otherwise.
            assert error(values, weight) == pytest.approx(error(expected, weight), rel=1e-4)


@pytest.mark.parametrize("weight", HEAVY_TAILED.values(), ids=HEAVY_TAILED.keys())
@pytest.mark.parametrize("name", ["W4A8", "W4A8_G32"])
def test_heavy_tails_get_a_table_of_their_own(name, weight):
    frozen = FORMATS[name].encode(normal(64, 1024))["weight_codebook"]
    parts = FORMATS[name].encode(weight)
    assert not torch.equal(parts["weight_codebook"], frozen)
    assert (parts["weight_codebook"].diff() > 0).all() and parts["weight_codebook"].abs().max() <= 1
    assert error(coded(name, weight), weight) < 0.98 * error(kitchen_values(name, weight), weight)
    # Codes are those of the nearest levels of this table, up to values that lie less than a level apart.
    groups = (rotate(weight) / parts["weight_s_channel"].unsqueeze(1)).view(len(weight), -1, FORMATS[name].group, 1)
    levels = parts["weight_s_rel"].float().unsqueeze(-1) * parts["weight_codebook"]
    nearest = (groups - levels.round().clamp(-127, 127).unsqueeze(2)).abs().amin(-1)
    stored = rotate(FORMATS[name].decode(parts)) / parts["weight_s_channel"].unsqueeze(1)
    torch.testing.assert_close((groups.squeeze(-1) - stored.view(nearest.shape)).abs(), nearest, rtol=1e-4, atol=0.1)


def test_a_fitted_table_does_not_depend_on_threads():
    weight, threads = rotate(student_t2(1100, 1024)), torch.get_num_threads()
    try:
        tables = []
        for count in (1, 2):
            torch.set_num_threads(count)
            tables.append(FORMATS["W4A8"].encode(weight)["weight_codebook"])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*tables)


GOALS = {
    **{"FP8": 0.02645, "MXFP8": 0.0266, "INT8": 0.0087, "W4A8": 0.0712, "W4A8_G32": 0.0793, "W6A8": 0.0202},
    **{"NVFP4": 0.0815, "INT4": 0.1140},
}


@every_format
def test_errors_reach_their_goals(name):
    weight = normal(256, 5120)
    assert error(coded(name, weight), weight) <= GOALS[name]


@pytest.mark.parametrize("name", ["W4A8", "W4A8_G32", "W6A8"])
def test_a_file_has_2_percent_less_error_than_kitchens(name):
    """A file has the gain of rows restored, which costs a little error."""
    weight = normal(128, 2048)
    qtype = LayerType(FORMATS[name], (128, 2048))
    stored = qtype.dequantize(LayerEncoder().quantize(qtype, weight))
    assert error(stored, weight) < 0.98 * error(kitchen_values(name, weight), weight)


@every_format
def test_zeros_stay_zeros(name):
    assert (coded(name, torch.zeros(16, 512)) == 0).all()
    weight = normal(16, 512)
    weight[7] = 0
    assert (coded(name, weight)[7] == 0).all()


@both_efforts
@every_format
def test_parts_describe_what_is_encoded(name, effort):
    for shape in ((1, 256), (48, 768)):
        encoded = FORMATS[name].encode(normal(*shape), effort=effort)
        parts = FORMATS[name].parts(shape)
        assert [part.suffix for part in parts] == list(encoded)
        assert parts[0].suffix == "weight" and parts[-1].suffix == "comfy_quant"
        for part in parts:
            tensor = encoded[part.suffix]
            assert tensor.is_contiguous() and tensor.nbytes == part.nbytes
            assert part == Part(part.suffix, part.dtype, tuple(tensor.shape)) and tensor.dtype == DTYPES[part.dtype]
        assert json.loads(bytes(encoded["comfy_quant"].tolist())) == FORMATS[name].config
        assert FORMATS[name].bits_per_weight(shape) == 8 * sum(p.nbytes for p in parts) / (shape[0] * shape[1])


def test_marker_is_compact():
    marker = bytes(NATIVE["INT8"].encode(normal(1, 256))["comfy_quant"].tolist())
    text = b'{"format":"int8_tensorwise","convrot":true,"convrot_groupsize":256}'
    assert marker == text.ljust(-(-len(text) // 8) * 8)


@pytest.mark.parametrize("name", UNROTATED)
def test_odd_shapes_are_padded(name):
    for shape in ((1, 3), (130, 250), (33, 40)):
        weight = normal(*shape)
        parts = FORMATS[name].encode(weight)
        for part in FORMATS[name].parts(shape):
            assert tuple(parts[part.suffix].shape) == part.shape
        values = FORMATS[name].decode(parts, shape)
        assert torch.equal(values, DECODE[name](parts, shape))
        assert error(values, weight) <= error(kitchen_values(name, weight), weight)


def test_shapes_that_do_not_fit():
    for name in FORMATS.keys() - set(UNROTATED):
        assert FORMATS[name].takes((8, 100)) == "rows of 100, not a multiple of 256"
        with pytest.raises(QuantError, match=rf"^{name} cannot hold a weight of rows of 100, not a multiple of 256;"):
            FORMATS[name].encode(torch.zeros(8, 100))
    for name, format in FORMATS.items():
        assert format.takes((8, 512)) is None
        assert format.takes((8,)) == "shape 8, not a matrix"
        assert format.takes((8, 4, 256)) == "shape 8x4x256, not a matrix", name


@both_efforts
def test_every_row_of_int8_has_the_largest_code(effort):
    for weight in (*(normal(200, 512, seed=seed) for seed in range(5)), student_t(64, 1024), WEIGHTS["tiny"]):
        codes = NATIVE["INT8"].encode(weight, effort=effort)["weight"]
        assert (codes.abs().amax(1) == 127).all() and codes.min() >= -127


def test_importance_weights_errors_of_nvfp4():
    weight, importance = normal(64, 512), normal(512, seed=1).mul(2).exp()
    plain, weighted = (coded("NVFP4", weight, importance=factors) for factors in (None, importance))
    assert ((weighted - weight) ** 2 * importance).sum() < 0.95 * ((plain - weight) ** 2 * importance).sum()
    for factors in (torch.ones(512), torch.full((512,), 7.0)):
        assert torch.equal(coded("NVFP4", weight, importance=factors), plain)
    nothing = coded("NVFP4", weight, importance=torch.zeros(512))
    assert torch.equal(nothing, coded("NVFP4", weight, effort="fast"))


@every_format
def test_bytes_do_not_depend_on_the_number_of_threads(name):
    weight, before = normal(300, 2560), torch.get_num_threads()
    encoded = []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            encoded.append(FORMATS[name].encode(weight))
    finally:
        torch.set_num_threads(before)
    for other in encoded[1:]:
        for suffix, tensor in encoded[0].items():
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), other[suffix].reshape(-1).view(torch.uint8))


@every_format
def test_the_weight_is_left_alone(name):
    weight = normal(8, 512)
    before = weight.clone()
    FORMATS[name].encode(weight)
    assert torch.equal(weight, before)
    half = weight.bfloat16()
    expected = FORMATS[name].encode(half.float())
    assert all(torch.equal(expected[suffix], tensor) for suffix, tensor in FORMATS[name].encode(half).items())


@pytest.mark.parametrize("name", ["W4A8", "W4A8_G32", "W6A8"])
def test_codes_are_those_of_the_nearest_levels(name):
    weight, format = normal(16, 512), FORMATS[name]
    parts = format.encode(weight)
    rotated = (rotate(weight) / parts["weight_s_channel"].unsqueeze(1)).view(16, -1, format.group, 1)
    table = parts.get("weight_codebook", format.values.table(weight.device))
    # Kitchen leaves out the first of the 64 codes, so that levels are symmetric.
    used = table[1 if name == "W6A8" else 0 :]
    levels = parts["weight_s_rel"].float().unsqueeze(-1) * used
    distances = (rotated - levels.round().clamp(-127, 127).unsqueeze(2)).abs()
    codes = format.values.unpack(parts["weight"].view(torch.uint8)).long().view_as(rotated)
    values = table[codes] * parts["weight_s_rel"].float().view(16, -1, 1, 1)
    chosen = (rotated - values.round().clamp(-127, 127)).abs()
    torch.testing.assert_close(chosen.squeeze(-1), distances.amin(-1), rtol=1e-5, atol=1e-3)
