"""Products with packed weights on a GPU, in 16 bits and in 8-bit integers; a stand-alone script.

    python bench/gpu_linear.py results.jsonl [--carried out/gpu-host] [--minutes 3]      (on the machine with the GPU)
    python bench/gpu_linear.py results.jsonl --selftest                                  (a tiny layer, no GPU)

It needs torch, triton, numpy and the folder that `python3 dev.py bench gpu-host` assembles; comfy-kitchen's compiled
kernels must be added to it for products at their full speed. A JSON line is written for each type and number of tokens,
for a layer of Wan 14B, in microseconds:

    bf16_us             a weight that is resident in bfloat16
    exact_us            packed, as the nodes do it by default
    int8_us             packed, with the node's int8
    rows_us             of int8_us, the time to make 8-bit rows of the packed weight
    rows_lora_us        the same with a LoRA of rank 64
    rows_kitchen_us     by comfy-kitchen instead, from tiles in bfloat16
    int8_resident_us    the host's INT8 with a weight that is resident in 8 bits
    exact_error, int8_error, int8_resident_error     relative to the product in float32
"""

from __future__ import annotations

import argparse
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
for name, place in (("wanquant", ROOT), ("wanquant.bench", ROOT / "bench")):
    if name not in sys.modules:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(place)]

from wanquant.bench import gpu_host  # noqa: E402
from wanquant.bench.harness import Row, gpu_machine, write_row  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

TYPES = ("Q4_K", "Q8_0", "Q2_K", "Q6_K")
LAYER, TOKENS = (13824, 5120), (32760, 8190, 1024, 75600, 2048, 4096)
TINY_LAYER, TINY_TOKENS = (512, 256), (1024,)


def backends() -> Row:
    """Return which of comfy-kitchen's backends can run and which one would multiply 8-bit integers."""
    import comfy_kitchen
    import torch
    from comfy_kitchen.registry import registry

    found = {name: bool(info.get("available")) for name, info in comfy_kitchen.list_backends().items()}
    row: Row = {"case": "backends", "available": found, "version": getattr(comfy_kitchen, "__version__", None)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, w = (torch.zeros(1024, 5120, device=device, dtype=dtype) for dtype in (torch.bfloat16, torch.int8))
    scale = torch.ones(1024, 1, device=device)
    try:
        kwargs = {"x": x, "weight": w, "weight_scale": scale, "bias": None, "out_dtype": x.dtype}
        kwargs |= {"convrot": True, "convrot_groupsize": 256}
        row["int8_linear"] = registry.get_capable_backend("int8_linear", kwargs)
    except Exception as error:  # noqa: BLE001 (another kitchen's interface; the row says so)
        row["int8_linear"] = f"{type(error).__name__}: {error}"
    return row


def median_us(call: Callable[[], object]) -> float:
    """Return the microseconds of a call, the median of many on a GPU and one elsewhere."""
    import torch

    if torch.cuda.is_available():
        from triton.testing import do_bench

        return float(do_bench(call, warmup=25, rep=150, return_mode="median")) * 1e3
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e6


def kitchen_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return comfy-kitchen's int8 codes, (rows, columns), and float32 scales, (rows, 1), of a bfloat16 weight."""
    from comfy_kitchen.tensor import TensorWiseINT8Layout

    codes, params = TensorWiseINT8Layout.quantize(weight, per_channel=True, convrot=True)
    return codes, params.scale.view(-1, 1)


def row_of(name: str, tokens: int, layer: tuple[int, int]) -> Row:
    """Measure one type and number of tokens; the layer is its number of rows and columns."""
    import torch
    from comfy.weight_adapter import LoRAAdapter
    from torch.nn.functional import linear

    from wanquant.ops import host
    from wanquant.ops.packed.int8 import int8_linear, int8_rows
    from wanquant.ops.packed.layout import pack
    from wanquant.ops.packed.matmul import PatchedRows, dequantized_tiles, packed_linear
    from wanquant.ops.packed.patches import OnTheFly
    from wanquant.quant import QTYPES
    from wanquant.quant.native.rotation import GROUP

    torch.manual_seed(0)
    rows, columns = layer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight, bias = torch.randn(layer, device=device) / columns**0.5, torch.randn(rows, device=device).bfloat16()
    blocks = QTYPES[name].quantize(weight, effort="fast")
    packed = pack(blocks, name, layer, torch.bfloat16)
    dense = QTYPES[name].dequantize(blocks, torch.bfloat16)
    x = torch.randn(tokens, columns, device=device).bfloat16()
    up, down = (torch.randn(n, 64, device=device).bfloat16() / 256 for n in layer)
    codes, scales = kitchen_rows(dense)

    def rows_by_kitchen() -> None:
        for part, tile in dequantized_tiles(PatchedRows(packed, (), x), slice(0, rows), x):
            codes[part], scales[part] = kitchen_rows(tile)

    layer_of_lora = torch.nn.Module()
    layer_of_lora.weight = packed
    adapter = LoRAAdapter(set(), (up, down.t().contiguous(), None, None, None, None))
    lora = OnTheFly("", [(1.0, adapter, 1.0, None, None)], layer_of_lora)
    lora.move_to(torch.device(device))

    calls = {
        "bf16_us": lambda: linear(x, dense, bias),
        "exact_us": lambda: packed_linear(x, packed, bias),
        "int8_us": lambda: int8_linear(x, packed, bias),
        "rows_us": lambda: int8_rows(packed, (), x),
        "rows_lora_us": lambda: int8_rows(packed, (lora,), x),
        "rows_kitchen_us": rows_by_kitchen,
        "int8_resident_us": lambda: host.int8_linear(x, codes, scales, bias, GROUP),
    }
    row: Row = {"case": "linear", "type": name, "tokens": tokens}
    expected = linear(x[:512].float(), dense.float(), bias.float())
    for key in ("exact", "int8", "int8_resident"):
        product = calls[f"{key}_us"]()[:512].float()
        row[f"{key}_error"] = float(f"{float((product - expected).norm() / expected.norm()):.2e}")
    for key, call in calls.items():
        row[key] = round(median_us(call), 1)
    return row


def measurements(layer: tuple[int, int], all_tokens: Sequence[int]) -> Iterator[Row]:
    yield backends()
    for tokens in all_tokens:
        for name in TYPES:
            yield row_of(name, tokens, layer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="file for the JSON lines")
    parser.add_argument("--carried", type=Path, default=ROOT / "out" / "gpu-host", help="the assembled folder")
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--selftest", action="store_true", help="a tiny layer, also on the CPU")
    options = parser.parse_args()
    gpu_host.start(options.carried, dynamic=False)
    import torch

    if not (torch.cuda.is_available() or options.selftest):
        print("no CUDA device: try --selftest")
        return
    deadline = time.monotonic() + 60 * options.minutes
    with options.results.open("a") as file, torch.inference_mode():
        write_row(file, gpu_machine())
        for row in measurements(*((TINY_LAYER, TINY_TOKENS) if options.selftest else (LAYER, TOKENS))):
            write_row(file, row)
            if time.monotonic() > deadline:
                break


if __name__ == "__main__":
    main()
