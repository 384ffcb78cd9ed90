"""Dequantization of a 5120 x 5120 weight to bfloat16 on the CPU, against memcpy, libggml and a peer.

The peer is a checkout of ComfyUI-GGUF, called as its Linear does, in float16 arithmetic. `ms` is the best path and
`torch_ms` the torch operations alone, both into an existing output, as a layer has it; `new_ms` is the best path into a
new output, whose pages the system has to find first. `gb_s` is GB of output per second. The `of_` columns are the speed
of the best path over that of a copy of as many bytes, of libggml, and of the peer. libggml writes float32:
`of_libggml_f32` is with our output in float32, too, and `of_libggml` with ours in bfloat16 against its float32.
`torch_of_libggml` is that of the torch operations alone, which run where libggml is not installed. All times are
medians of at least five runs, in processor time and in inference mode, as ComfyUI runs its nodes. The last columns
count kernels per call and bytes moved per weight.
"""

from __future__ import annotations

import runpy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..quant import QTYPES, QuantType
from ..quant.kernels import eager
from ..quant.torch_op import dequantize_into
from . import harness

BLOCKS = [name for name, qtype in QTYPES.items() if qtype.block_size > 1]
Peer = Callable[[Tensor], Tensor]


class Traffic(TorchDispatchMode):
    """A count of the operations that compute, and of the bytes of the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, outputs = tensors((args, kwargs)), tensors(result)
        storages = {t.untyped_storage().data_ptr() for t in inputs}
        views = all(t.untyped_storage().data_ptr() in storages for t in outputs)
        if not views or func._schema.is_mutable:
            self.kernels += 1
            self.bytes += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in inputs + outputs)
        return result


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def our_traffic(qtype: QuantType, packed: Tensor) -> dict[str, float]:
    """Count the operator where a fused kernel implements it, else the torch operations."""
    from ..quant.kernels.triton_formats import FORMATS

    if qtype.name in FORMATS:
        return traffic(lambda: qtype.dequantize(packed, torch.bfloat16))
    return traffic(lambda: qtype.dequantize_blocks(packed.view(-1, qtype.type_size)).to(torch.bfloat16))


def traffic(dequantize: Callable[[], Tensor]) -> dict[str, float]:
    """Return the kernels of one call, and the bytes moved per weight of its result."""
    with Traffic() as count:
        weight = dequantize()
    return {"kernels": count.kernels, "bytes": round(count.bytes / weight.numel(), 2)}


def peer_of(path: Path, qtype: QuantType, shape: tuple[int, int]) -> Peer | None:
    """Return ComfyUI-GGUF's dequantization with its default settings, or None for a type that it leaves to numpy."""
    module = runpy.run_path(str(path / "dequant.py"))
    number = GGMLQuantizationType(qtype.ggml_type)
    if number not in module["dequantize_functions"]:
        return None
    return lambda packed: module["dequantize"](packed, number, shape, None).to(torch.bfloat16)


def libggml_of(qtype: QuantType, packed: Tensor) -> Callable[[], object]:
    from ..quant.kernels import libggml

    weights = torch.zeros(qtype.unpacked_shape(tuple(packed.shape)))
    to_float = libggml.type_traits(qtype).to_float
    return lambda: to_float(packed.data_ptr(), weights.data_ptr(), weights.numel())


def measure(qtype: QuantType, size: int, seconds: float, path: Path | None) -> dict[str, object]:
    packed = torch.randint(0, 64, qtype.packed_shape((size, size)), dtype=torch.uint8)
    out, source = torch.zeros(2, size, size, dtype=torch.bfloat16).unbind()
    wide = torch.zeros(size, size)
    peer = peer_of(path, qtype, (size, size)) if path else None
    calls: list[Callable[[], object]] = [
        lambda: dequantize_into(packed, qtype.name, out),
        lambda: eager.dequantize(qtype, packed, out),
        lambda: out.copy_(source),
        libggml_of(qtype, packed),
        lambda: dequantize_into(packed, qtype.name, wide),
        lambda: qtype.dequantize(packed, torch.bfloat16),
    ]
    calls += [lambda: peer(packed)] if peer else []
    with torch.inference_mode():
        times = harness.in_turns(seconds, *calls, clock=time.process_time, least=5)
    best, operations, copy, libggml, best_wide, new, *others = map(median, times)
    row: dict[str, object] = {
        "type": qtype.name,
        "ms": round(best, 1),
        "torch_ms": round(operations, 1),
        "new_ms": round(new, 1),
        "gb_s": round(out.nbytes / best / 1e6, 2),
        "of_memcpy": round(copy / best, 2),
        "of_libggml": round(libggml / best, 2),
        "of_libggml_f32": round(libggml / best_wide, 2),
        "torch_of_libggml": round(libggml / operations, 2),
        "ours": our_traffic(qtype, packed),
    }
    if peer:
        row |= {"of_peer": round(others[0] / best, 1), "torch_of_peer": round(others[0] / operations, 1)}
        row["peer"] = traffic(lambda: peer(packed))
    return row


def main() -> None:
    parser = harness.arguments(__doc__, threads=1)
    parser.add_argument("--peer", type=Path, help="a checkout of ComfyUI-GGUF")
    parser.add_argument("--types", nargs="+", default=BLOCKS, choices=BLOCKS)
    parser.add_argument("--size", type=int, default=5120)
    parser.add_argument("--seconds", type=float, default=2, help="time for each type")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure(QTYPES[name], options.size, options.seconds, options.peer) for name in options.types]
    result = {"machine": harness.machine(), "size": options.size, "rows": rows}
    columns = ("type", "ms", "torch_ms", "new_ms", "gb_s", "of_memcpy", "of_libggml", "of_libggml_f32")
    columns += ("torch_of_libggml", "of_peer", "torch_of_peer", "ours", "peer")
    shown = [
        {key: ", ".join(map(str, value.values())) if isinstance(value, dict) else value for key, value in row.items()}
        for row in rows
    ]
    text = harness.table(columns, harness.cells(shown, columns))
    harness.conclude(options, result, f"{result['machine']}; {options.size} x {options.size} to bfloat16\n{text}")


if __name__ == "__main__":
    main()
