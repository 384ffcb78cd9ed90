"""QuantType and QTYPES: sizes, exactness of dequantization, chunks, and refused input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from wanquant.quant import QTYPES, QuantError, QuantType
from wanquant.quant.kernels import eager
from wanquant.quant.qtype import QTYPES_BY_ID, qtype_of
from wanquant.testing.libggml import LibGGML
from wanquant.tests.quant.portable import PortableOps
from wanquant.tests.quant.samples import assert_same_bits, random_blocks, special_blocks

ROOT = Path(__file__).resolve().parents[2]
PLAIN = ("I8", "I16", "I32", "I64", "F64")
"""Types that ggml only stores."""
NEWER = {"Q1_0", "Q2_0"}
"""Types that the package gguf 0.19 does not dequantize; libggml does."""
BLOCKS = {name: quant for name, quant in QTYPES.items() if name not in PLAIN}
every_type = pytest.mark.parametrize("quant", BLOCKS.values(), ids=BLOCKS.keys())
Q8_0, Q4_K = QTYPES["Q8_0"], QTYPES["Q4_K"]


def test_every_type_that_gguf_dequantizes_is_known() -> None:
    dequantizable = {quant.name for quant in gguf.quants._type_traits} | {"F16", "F32"}
    assert BLOCKS.keys() == dequantizable | NEWER
    assert len(QTYPES) == 33


@every_type
def test_sizes_are_those_of_gguf_and_libggml(quant: QuantType, libggml: LibGGML) -> None:
    sizes = (quant.block_size, quant.type_size)
    assert sizes == libggml.sizes(quant.name)
    if quant.name != "Q2_0":
        assert sizes == GGML_QUANT_SIZES[GGMLQuantizationType(quant.ggml_type)]
        assert GGMLQuantizationType(quant.ggml_type).name == quant.name
    assert qtype_of(quant.ggml_type) is quant
    assert quant.bits_per_weight == 8 * quant.type_size / quant.block_size


@every_type
@pytest.mark.parametrize(
    "blocks", [lambda quant: random_blocks(quant, 2000), special_blocks], ids=["random", "special"]
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_dequantization_is_bit_exact(quant: QuantType, blocks, libggml: LibGGML) -> None:
    packed = blocks(quant)
    weight = quant.dequantize_blocks(packed).numpy()
    assert_same_bits(weight, libggml.dequantize(quant.name, packed.numpy()))
    if quant.name not in NEWER:
        assert_same_bits(weight, gguf.quants.dequantize(packed.numpy(), GGMLQuantizationType[quant.name]))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("I8", torch.int8), ("I16", torch.int16), ("I32", torch.int32), ("I64", torch.int64), ("F64", torch.float64)],
)
def test_plain_numbers_are_rounded_to_float32(name: str, dtype: torch.dtype) -> None:
    numbers = torch.tensor([-(2**7), -1, 0, 1, 2**7 - 1] if dtype is torch.int8 else [-12345, 0, 1, 32767, 7]).to(dtype)
    assert GGMLQuantizationType[name] == QTYPES[name].ggml_type
    packed = numbers.view(torch.uint8) if dtype is torch.int8 else numbers.view(-1, 1).view(torch.uint8)
    assert torch.equal(QTYPES[name].dequantize(packed.flatten()), numbers.float())


@every_type
def test_dequantization_is_portable(quant: QuantType) -> None:
    packed = random_blocks(quant, 8)
    with PortableOps() as ops:
        eager.dequantize(quant, packed, torch.empty(8, quant.block_size, dtype=torch.bfloat16))
    assert {"copy", "view"} <= ops.seen


@pytest.mark.parametrize(
    "bad",
    [
        lambda: torch.zeros(2, dtype=torch.float64) + 1,
        lambda: torch.zeros(2, dtype=torch.uint8) >> 1,
        lambda: torch.zeros(2, dtype=torch.uint8).view(torch.int8).view(torch.uint8) << 1,
        lambda: torch.zeros(2, dtype=torch.uint16).clone(),
        lambda: torch.linalg.inv(torch.eye(2)),
    ],
)
def test_portable_ops_refuses_operations_and_dtypes_that_some_devices_lack(bad) -> None:
    with pytest.raises(AssertionError), PortableOps():
        bad()


@every_type
def test_leading_axes_are_kept_and_values_are_rounded_once(quant: QuantType) -> None:
    packed = random_blocks(quant, 24).view(2, 3, 4 * quant.type_size)
    weight = quant.dequantize(packed)
    assert weight.shape == quant.unpacked_shape(packed.shape) == (2, 3, 4 * quant.block_size)
    assert quant.packed_shape(weight.shape) == packed.shape
    for dtype in (torch.bfloat16, torch.float16):
        torch.testing.assert_close(quant.dequantize(packed, dtype), weight.to(dtype), rtol=0, atol=0, equal_nan=True)


@every_type
def test_dequantization_in_chunks_equals_that_of_all_blocks(quant: QuantType, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = random_blocks(quant, 7)
    monkeypatch.setattr(eager, "CPU_ELEMENTS", 3 * quant.block_size)
    monkeypatch.setattr(eager, "CPU_PRODUCTS", 2 * quant.block_size)
    weight = torch.empty(7, quant.block_size)
    eager.dequantize(quant, packed, weight)
    assert_same_bits(weight.numpy(), quant.dequantize_blocks(packed).numpy())


@every_type
def test_odd_offsets_and_strides_give_the_same_bits(quant: QuantType) -> None:
    blocks = random_blocks(quant, 6)
    whole = quant.dequantize(blocks).numpy()
    shifted = torch.cat((torch.zeros(1, dtype=torch.uint8), blocks.flatten()))[1:].view(6, -1)
    assert_same_bits(quant.dequantize(shifted).numpy(), whole)
    assert_same_bits(quant.dequantize(shifted[:1]).numpy(), whole[:1])
    assert_same_bits(quant.dequantize(blocks[::2]).numpy(), whole[::2])
    assert_same_bits(quant.dequantize(blocks.t().contiguous().t()).numpy(), whole)


@every_type
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 5)], ids=str)
def test_empty_tensors_keep_their_shape(quant: QuantType, shape: tuple[int, ...]) -> None:
    shape = (*shape[:-1], shape[-1] * quant.type_size)
    weight = quant.dequantize(torch.empty(shape, dtype=torch.uint8))
    assert weight.shape == quant.unpacked_shape(shape)
    if quant.fast:
        assert quant.quantize(weight, torch.ones(weight.shape[-1]), effort="fast").shape == shape


REFUSED = {
    "packed dtype": (lambda: Q8_0.dequantize(torch.zeros(34)), "Q8_0: packed data is torch.float32"),
    "cut row": (lambda: Q8_0.dequantize(torch.zeros(3, 33, dtype=torch.uint8)), r"\(3, 33\).*type size 34"),
    "packed scalar": (lambda: Q8_0.dequantize(torch.zeros((), dtype=torch.uint8)), r"\(\).*Q8_0"),
    "row length": (lambda: Q4_K.packed_shape((4, 1500)), r"\(4, 1500\).*Q4_K block size 256"),
    "weight dtype": (lambda: Q8_0.quantize(torch.zeros(32, dtype=torch.int32), effort="fast"), "torch.int32"),
    "weight scalar": (lambda: Q8_0.quantize(torch.tensor(1.0), effort="fast"), r"\(\).*Q8_0"),
    "effort": (lambda: Q8_0.quantize(torch.zeros(32), effort="slow"), "'slow' is unknown; choose from fast, best"),  # type: ignore[arg-type]
    "no encoder": (
        lambda: QTYPES["NVFP4"].quantize(torch.zeros(256)),
        "NVFP4: this type has no best encoder; choose from F32, F16",
    ),
    "importance length": (
        lambda: Q8_0.quantize(torch.zeros(2, 64), torch.ones(32), "fast"),
        r"\(32,\), expected \(64,\)",
    ),
    "importance axes": (lambda: Q8_0.quantize(torch.zeros(2, 64), torch.ones(2, 64), "fast"), r"expected \(64,\)"),
    "importance sign": (lambda: Q8_0.quantize(torch.zeros(64), -torch.ones(64), "fast"), "expected .* at least 0"),
    "importance dtype": (
        lambda: Q8_0.quantize(torch.zeros(64), torch.ones(64).int(), "fast"),
        "torch.int32 .*floating point",
    ),
    "unknown type": (lambda: qtype_of(99), "ggml type 99 is unknown, .* 8 Q8_0"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_with_a_reason(call, message: str) -> None:
    with pytest.raises(QuantError, match=message):
        call()


def test_ids_and_names_are_unique() -> None:
    assert len(QTYPES_BY_ID) == len(QTYPES) == len({quant.name for quant in QTYPES.values()})
    assert all(name == quant.name for name, quant in QTYPES.items())


def test_import_is_lean() -> None:
    """Importing `quant` imports neither the host nor a compiler of torch or triton, and does not start CUDA."""
    code = (
        "import sys, torch\n"
        "torch.cuda._lazy_init = lambda: sys.exit('CUDA was started')\n"
        "import quant\n"
        "heavy = ('comfy', 'nodes', 'folder_paths', 'triton', 'torch._dynamo.')\n"
        "print(len(quant.QTYPES), *(name for name in sys.modules if name.startswith(heavy)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.split(), result.stderr) == (0, ["33"], "")
