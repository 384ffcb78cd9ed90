"""Machine instructions per weight of the compiled GPU kernels, by the unit that runs them; needs no GPU.

A kernel can only reach the memory's bandwidth if no unit needs more time than the memory does. The last columns are
the time of the busiest unit over that of the memory, from the clock and bandwidth in the data sheets. Above 1, the
unit is the limit. IQ1 to IQ3 read rows of a table, for which the threads of a warp may wait for each other. That is not
counted.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..quant.kernels import triton_kernel
from ..quant.qtype import QTYPES
from . import harness

NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
WEIGHTS = triton_kernel.TILE // (32 * triton_kernel.OPTIONS["num_warps"])
"""Weights that one thread dequantizes."""


class GPU(NamedTuple):
    name: str
    capability: int
    multiprocessors: int
    clock_ghz: float
    memory_gb_s: float


GPUS = (
    GPU("H200", 90, 132, 1.98, 4800),
    GPU("RTX 5090", 120, 170, 2.41, 1792),
    GPU("RTX 4090", 89, 128, 2.52, 1008),
    GPU("RTX 3060", 86, 28, 1.78, 360),
)
# Threads per clock and multiprocessor, for all instructions and by unit: "Throughput of Native Arithmetic Instructions"
# in the CUDA C++ Programming Guide 12.8, compute capability 8.6 to 12.0.
RATES = {"all": 128, "integer": 64, "multiply": 64, "float": 128, "special": 16, "memory": 32}
UNITS = {
    "float": r"FADD|FMUL|FFMA|HADD2|HMUL2|HFMA2|FSETP",
    "multiply": r"IMAD",
    "special": r"I2F\b|F2I|MUFU|F2F\b",
    "memory": r"LDG|STG|LDS|STS|LDC",
    "integer": r"LOP3|SHF|IADD3|I2FP|F2FP|PRMT|ISETP|SEL|LEA|VIADD|VIMNMX|IMNMX|SGXT|MOV|IABS|PLOP3",
}


def compiled(name: str, dtype: str, target: GPUTarget) -> dict[str, Any]:
    """Return the output of every stage of the compiler, for a launch with aligned pointers."""
    constants = triton_kernel.constants(QTYPES[name]) | {"TILE": triton_kernel.TILE}
    arguments = {"packed": "*u8", "out": f"*{dtype}", "n_elements": "i64", "integers": "i32", "grid": "*u8"}
    aligned = {(index,): [["tt.divisibility", 16]] for index in (0, 1, 2, 4)}
    if not triton_kernel.FORMATS[name].grid_steps:  # a launch compiles None as a constant
        del arguments["grid"], aligned[4,]
        constants["grid"] = None
    signature = arguments | dict.fromkeys(constants, "constexpr")
    source = ASTSource(triton_kernel.dequantize_kernel, signature, constants, aligned)
    stages: dict[str, Any] = triton.compile(source, target=target, options=triton_kernel.OPTIONS).asm
    return stages


def machine_code(cubin: bytes) -> list[str]:
    """Return the names of the instructions up to the last that runs, without the padding after it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([NVDISASM, "-c", file.name], capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)", text, re.M)
    return names[: len(names) - names[::-1].index("EXIT")]


def per_weight(name: str, capability: int, dtype: str = "bf16") -> dict[str, float]:
    """Return the instructions per weight, by unit."""
    names = machine_code(compiled(name, dtype, GPUTarget("cuda", capability, 32))["cubin"])
    counts = Counter(_unit(name) for name in names)
    return {"all": len(names) / WEIGHTS} | {unit: counts[unit] / WEIGHTS for unit in UNITS}


def _unit(name: str) -> str:
    # Instructions of the uniform unit (U...) run in parallel to the others and count nowhere.
    return next((unit for unit, pattern in UNITS.items() if re.match(pattern, name)), "other")


def busiest(name: str, gpu: GPU) -> float:
    """Return the time of the busiest unit over that of the memory, by the data sheet."""
    qtype = QTYPES[name]
    clocks = max(count / RATES[unit] for unit, count in per_weight(name, gpu.capability).items())
    memory_ns = (qtype.type_size / qtype.block_size + 2) / gpu.memory_gb_s
    return clocks / (gpu.multiprocessors * gpu.clock_ghz) / memory_ns


def rows() -> list[dict[str, Any]]:
    return [
        {"type": name, **per_weight(name, GPUS[0].capability)} | {gpu.name: busiest(name, gpu) for gpu in GPUS}
        for name in triton_kernel.FORMATS
    ]


def main() -> None:
    options = harness.arguments(__doc__).parse_args()
    found = [{key: value if key == "type" else round(value, 2) for key, value in row.items()} for row in rows()]
    result = {"machine": harness.machine(), "triton": triton.__version__, "rows": found}
    harness.conclude(options, result, harness.table(list(found[0]), [list(row.values()) for row in found]))


if __name__ == "__main__":
    main()
