"""Machine instructions per weight of the compiled GPU kernels, by the unit that runs them; needs no GPU.

A kernel can only reach the memory's bandwidth if no unit needs more time than the memory does. The last columns are
the time of the busiest unit over that of the memory, from the clock and bandwidth in the data sheets. Above 1, the
unit is the limit. IQ1 to IQ3 read rows of a table, for which the threads of a warp may wait for each other. That is not
counted. The rows "int8" are of the kernel that makes rotated 8-bit integers. It does everything twice, and where a GPU
has much memory bandwidth for its units, they are the limit.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..quant.kernels import triton_int8, triton_kernel
from ..quant.qtype import QTYPES
from . import harness
from .gpus import GPU, H200, RTX_3060, RTX_4090, RTX_5090

PLAIN = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}
"""Triton's names of the types without blocks, which only the int8 kernel reads."""
NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
COLUMNS = 5120
"""Of the weight for which the int8 kernel is compiled."""


GPUS = (H200, RTX_5090, RTX_4090, RTX_3060)
# Threads per clock and multiprocessor, for all instructions and by unit: "Throughput of Native Arithmetic Instructions"
# in the CUDA C++ Programming Guide 12.8, compute capability 8.6 to 12.0.
RATES = {"all": 128, "integer": 64, "multiply": 64, "float": 128, "special": 16, "memory": 32}
UNITS = {
    "float": r"FADD|FMUL|FFMA|HADD2|HMUL2|HFMA2|FSETP",
    "multiply": r"IMAD",
    "special": r"I2F\b|F2I|MUFU|F2F\b",
    "memory": r"LDG|STG|LDS|STS|LDC|SHFL",
    "integer": r"LOP3|SHF|IADD3|I2FP|F2FP|PRMT|ISETP|SEL|LEA|VIADD|VIMNMX|IMNMX|SGXT|MOV|IABS|PLOP3",
}


def compiled(name: str, dtype: str, target: GPUTarget, *, with_lora: bool = False) -> dict[str, Any]:
    """Return the output of every stage of the compiler, for a launch with aligned pointers.

    Args:
        dtype: of the result; "i8" is for rotated 8-bit integers.
        with_lora: something in bfloat16 is added before these are rounded.
    """
    qtype = QTYPES[name]
    constants, source = triton_kernel.constants(qtype), PLAIN.get(name, "u8")
    arguments: dict[str, str | None]
    if dtype == "i8":
        constants |= triton_int8.shape_of(qtype, COLUMNS, COLUMNS)._asdict()
        arguments = {"packed": f"*{source}", "codes": "*i8", "scales": "*fp32", "n_rows": "i32", "columns": "i32"}
        arguments |= {"integers": "i32", "grid": "*u8", "delta": "*bf16"}
        kernel, multiples_of_16 = triton_int8.int8_kernel, {"packed", "codes", "scales", "columns", "grid", "delta"}
    else:
        constants |= {"TILE": triton_kernel.TILE}
        arguments = {"packed": "*u8", "out": f"*{dtype}", "n_elements": "i64", "integers": "i32", "grid": "*u8"}
        kernel, multiples_of_16 = triton_kernel.dequantize_kernel, {"packed", "out", "n_elements", "grid"}
    form = triton_kernel.FORMATS.get(name)
    absent = set() if form and form.grid_steps else {"grid"}
    absent |= set() if with_lora or dtype != "i8" else {"delta"}
    places = {key: (i,) for i, key in enumerate(arguments)}
    aligned = {places[key]: [["tt.divisibility", 16]] for key in multiples_of_16 - absent}
    for key in absent:  # a launch compiles None as a constant
        del arguments[key]
        constants[key] = None
    signature = arguments | dict.fromkeys(constants, "constexpr")
    stages: dict[str, Any] = triton.compile(
        ASTSource(kernel, signature, constants, aligned), target=target, options=triton_kernel.OPTIONS
    ).asm
    return stages


def weights_of_a_thread(name: str, dtype: str) -> int:
    """Return how many weights a thread converts at a time."""
    if dtype == "i8":
        return triton_int8.shape_of(QTYPES[name], COLUMNS, COLUMNS).EACH
    return triton_kernel.TILE // (32 * triton_kernel.OPTIONS["num_warps"])


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
    code = machine_code(compiled(name, dtype, GPUTarget("cuda", capability, 32))["cubin"])
    counts, weights = Counter(_unit(instruction) for instruction in code), weights_of_a_thread(name, dtype)
    return {"all": len(code) / weights} | {unit: counts[unit] / weights for unit in UNITS}


def _unit(name: str) -> str:
    # Instructions of the uniform unit (U...) run in parallel to the others and count nowhere.
    return next((unit for unit, pattern in UNITS.items() if re.match(pattern, name)), "other")


def busiest(name: str, gpu: GPU, dtype: str = "bf16") -> float:
    """Return the time of the busiest unit over that of the memory, by the data sheet."""
    qtype = QTYPES[name]
    clocks = max(count / RATES[unit] for unit, count in per_weight(name, gpu.capability, dtype).items())
    memory_ns = (qtype.type_size / qtype.block_size + (1 if dtype == "i8" else 2)) / gpu.memory_gb_s
    return clocks / (gpu.multiprocessors * gpu.clock_ghz) / memory_ns


def rows() -> list[dict[str, Any]]:
    names = [(name, "bf16") for name in triton_kernel.FORMATS]
    names += [(name, "i8") for name in (*triton_kernel.FORMATS, *PLAIN)]
    return [
        {"type": name, "to": "int8" if dtype == "i8" else dtype}
        | per_weight(name, GPUS[0].capability, dtype)
        | {gpu.name: busiest(name, gpu, dtype) for gpu in GPUS}
        for name, dtype in names
    ]


def main() -> None:
    options = harness.arguments(__doc__).parse_args()
    found = [
        {key: value if isinstance(value, str) else round(value, 2) for key, value in row.items()} for row in rows()
    ]
    result = {"machine": harness.machine(), "triton": triton.__version__, "rows": found}
    harness.conclude(options, result, harness.table(list(found[0]), [list(row.values()) for row in found]))


if __name__ == "__main__":
    main()
