"""The Triton kernels without a GPU: their results in Triton's interpreter, and the instructions they compile to."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from wanquant.quant import QTYPES
from wanquant.quant.formats import iquants

triton = pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from triton.backends.compiler import GPUTarget  # noqa: E402

from wanquant.bench.instructions import GPUS, NVDISASM, busiest, compiled, weights_of_a_thread  # noqa: E402
from wanquant.quant.kernels import triton_int8, triton_kernel  # noqa: E402
from wanquant.quant.kernels.triton_grids import grid_codes  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
GRIDS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
OTHERS = ("TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0", "Q2_0")
TYPES = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
    *GRIDS,
    *OTHERS,
)
PLAIN = ("F32", "F16", "BF16")
DTYPES = ("fp32", "fp16", "bf16")
# One for each code that the compiler makes: see `test_other_targets_get_the_same_code`.
TARGETS = [GPUTarget("cuda", arch, 32) for arch in (75, 90, 120)]
TARGETS += [GPUTarget("hip", arch, 32) for arch in ("gfx1100", "gfx1201")]
H200 = TARGETS[1]
THREADS = 32 * triton_kernel.OPTIONS["num_warps"]


def test_no_block_type_is_left_to_torch_operations() -> None:
    blocks = {name for name, quant in QTYPES.items() if quant.block_size > 1}
    assert set(triton_kernel.FORMATS) == blocks
    assert tuple(triton_int8.PLAIN) == PLAIN


def test_every_type_is_bit_exact_in_the_interpreter() -> None:
    code = (
        "import runpy, sys, types\n"
        "sys.modules['wanquant'] = package = types.ModuleType('wanquant')\n"
        f"package.__path__ = [{str(ROOT)!r}]\n"
        "runpy.run_module('wanquant.tests.quant.interpreted', run_name='__main__')\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-I", "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    names = [line.split()[0] for line in result.stdout.splitlines()]
    assert names == [*(name for name in TYPES for _ in DTYPES), *TYPES, *PLAIN]


class StubDriver:
    """A driver without a GPU: it records launches and runs nothing."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.utils = types.SimpleNamespace(
            load_binary=lambda *_: (1, 2, 30, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": 1 << 16}
        )

    def launcher_cls(self, *_: object) -> Callable[..., None]:
        return lambda *arguments: self.launches.append(arguments)

    def get_current_device(self) -> int:
        return 99  # a number under which no other kernels are cached

    def get_current_stream(self, _: int) -> int:
        return 7

    def get_current_target(self) -> GPUTarget:
        return H200


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_S"])
def test_a_launch_reaches_the_driver(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of Triton's launch, which neither the interpreter nor the compiler makes, pass."""
    stub = StubDriver()
    monkeypatch.setattr(triton.runtime.driver, "_active", stub)
    packed = torch.zeros(3 * triton_kernel.TILE // 256 * QTYPES[name].type_size, dtype=torch.uint8)
    out = torch.empty(3 * triton_kernel.TILE, dtype=torch.float16)
    triton_kernel.launch(QTYPES[name], packed, out)
    ((*grid, stream), arguments) = stub.launches[0][:4], stub.launches[0][4:]
    assert (grid, stream) == ([3, 1, 1], 7)
    assert any(argument is packed for argument in arguments)
    table = grid_codes(name, 1, packed.device) if name in GRIDS else None
    assert table is None or any(argument is table for argument in arguments)


@pytest.mark.parametrize("name", GRIDS)
def test_a_table_is_the_grid_in_small(name: str) -> None:
    """The table of codes is made once and has at most 16 KiB, so that a multiprocessor's cache holds it."""
    steps = triton_kernel.FORMATS[name].grid_steps
    table = grid_codes(name, steps, torch.device("cpu"))
    assert table is grid_codes(name, steps, torch.device("cpu"))
    assert table.nbytes <= 16 << 10
    assert table.dtype is torch.uint8
    assert torch.equal((table.float() - 128) / steps, iquants.grid(name))


@pytest.mark.parametrize("name", TYPES)
def test_no_constant_is_a_function(name: str) -> None:
    """Triton 3.2, which torch 2.6 needs, would not launch the kernel."""
    assert not [key for key, value in triton_kernel.constants(QTYPES[name]).items() if callable(value)]


@pytest.mark.parametrize("name", TYPES)
def test_offsets_of_a_program_are_64_bits_wide(name: str) -> None:
    """The program's number is widened before it is multiplied, so that a weight may have more than 2^31 elements."""
    stage = compiled(name, "bf16", H200)["ttir"]
    (number,) = re.findall(r"(%\w+) = tt\.get_program_id", stage)
    uses = re.findall(rf"= (\S+) .*{number}\b(?!.*get_program_id).*", stage)
    assert uses == ["arith.extsi"], "of i32 to i64"


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
@pytest.mark.parametrize("name", TYPES)
def test_compiles_to_few_instructions(name: str, target: GPUTarget) -> None:
    """There are at most 25 instructions per weight, no spills, and at most eight single-byte loads per 32 weights.

    All stores write 16 bytes. Float16 is bfloat16 with another conversion, and float32, on one target, has none.
    """
    for dtype in ("fp32", "bf16") if target is H200 else ("bf16",):
        assembly = compiled(name, dtype, target)["ptx" if target.backend == "cuda" else "amdgcn"]
        if target.backend == "hip":
            assert "scratch_" not in assembly
            assert len(re.findall(r"^\s+(?:[vs]|global|buffer|ds)_\w+", assembly, re.M)) <= 25 * 32
            continue
        instructions = re.findall(r"^\s+(?:@%?!?\w+ )?([a-z]\w*(?:\.\w+)+|bra|ret)[\s;]", assembly, re.M)
        assert 100 < len(instructions) <= 25 * triton_kernel.TILE // THREADS
        assert ".local" not in assembly
        assert instructions.count("st.global.v4.b32") == sum(i.startswith("st.global") for i in instructions) > 0
        single = sum(i.startswith(("ld.global.b8", "ld.global.u8", "ld.global.s8")) for i in instructions)
        assert single <= (18 if name == "MXFP4" else 8)  # its blocks have 17 bytes


@pytest.mark.parametrize(("name", "dtype"), [("Q4_K", "bf16"), ("NVFP4", "bf16"), ("Q8_0", "i8")])
def test_other_targets_get_the_same_code(name: str, dtype: str) -> None:
    def code(arch: int) -> str:
        ptx = compiled(name, dtype, GPUTarget("cuda", arch, 32))["ptx"]
        return re.sub(r"//.*|\.target.*", "", ptx[: ptx.index("\t.section")])

    assert code(80) == code(86) == code(89) == code(90)
    assert code(100) == code(120)


# One type for each number of bit fields and each distance between these, a grid and a type without blocks.
INT8_TYPES = ("Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ2_S", "NVFP4", "BF16")
INT8_CASES = [("Q4_K", target) for target in TARGETS] + [(name, H200) for name in INT8_TYPES if name != "Q4_K"]


@pytest.mark.parametrize(("name", "target"), INT8_CASES, ids=lambda case: str(getattr(case, "arch", case)))
def test_int8_rows_compile_to_few_instructions(name: str, target: GPUTarget) -> None:
    """There are at most 90 instructions per weight for both passes, no spills, and all codes are stored in 16 bytes."""
    assembly = compiled(name, "i8", target)["ptx" if target.backend == "cuda" else "amdgcn"]
    weights = weights_of_a_thread(name, "i8")
    if target.backend == "hip":
        assert "scratch_" not in assembly
        assert len(re.findall(r"^\s+(?:[vs]|global|buffer|ds)_\w+", assembly, re.M)) <= 90 * weights
        return
    assert ".local" not in assembly
    assert assembly.count("st.global.v4.b32") == weights // 16
    assert len(re.findall(r"st\.global", assembly)) == weights // 16 + 1, "and the scales"


@pytest.mark.parametrize("target", [TARGETS[0], H200, TARGETS[-1]], ids=lambda target: str(target.arch))
def test_int8_rows_with_a_lora_compile_without_spills(target: GPUTarget) -> None:
    stages = compiled("Q4_K", "i8", target, with_lora=True)
    if target.backend == "hip":
        assert "scratch_" not in stages["amdgcn"]
        return
    assert ".local" not in stages["ptx"]
    assert len(re.findall(r"ld\.global\.v4", stages["ptx"])) >= 2 * weights_of_a_thread("Q4_K", "i8") // 8, "16 bytes"


@pytest.mark.parametrize("name", [name for name in TYPES if name not in ("NVFP4", "Q1_0")])
def test_16_bit_weights_do_not_go_through_shared_memory(name: str) -> None:
    """Each thread stores the weights that it dequantizes itself.

    Of NVFP4 and Q1_0, one thread loads single bytes for four.
    """
    assert "st.shared" not in compiled(name, "bf16", H200)["ptx"]


@pytest.mark.skipif(not NVDISASM.exists(), reason="this Triton has no disassembler")
@pytest.mark.parametrize("name", TYPES)
def test_memory_bandwidth_is_the_limit_on_an_h200(name: str) -> None:
    """The H200 has the most bandwidth for its units; even there, no unit needs as long as the memory does."""
    assert GPUS[0].name == "H200"
    assert busiest(name, GPUS[0]) < (0.9 if name in ("IQ4_NL", "IQ4_XS", *OTHERS) else 0.65)


@pytest.mark.skipif(not NVDISASM.exists(), reason="this Triton has no disassembler")
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_int8_rows_cost_few_instructions_in_both_passes(name: str) -> None:
    """Even on the H200, whose units are slow for its memory, they are below five times the memory's time."""
    assert busiest(name, GPUS[0], "i8") < 5
