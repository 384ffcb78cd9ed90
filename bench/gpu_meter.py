"""Measurement of the GPU memory of one process while only a budget of the memory is free."""

from __future__ import annotations

from collections.abc import Callable

from wanquant.bench.harness import GIB, Row, sampled

_NO_BUFFER = "VRAM grow failed"
"""Of comfy-aimdo's message when its buffers for streamed weights do not fit."""


class Meter:
    """A meter of the GPU memory that this process uses; without a GPU it measures nothing."""

    def __init__(self) -> None:
        import torch

        self._gpu = torch.cuda.is_available()
        self.device = "cuda" if self._gpu else "cpu"
        self.context = self._used() if self._gpu else 0

    def synchronize(self) -> None:
        import torch

        if self._gpu:
            torch.cuda.synchronize()

    def run(self, work: Callable[[], Row], budget: int) -> Row:
        """Run `work` while all but `budget` bytes of the GPU are occupied, and return its row with the peaks."""
        import torch

        if not self._gpu:
            return work()
        torch.cuda.empty_cache()
        taken = max(0, torch.cuda.mem_get_info()[1] - max(budget, self._used()))
        ballast = torch.empty(taken, dtype=torch.uint8, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        row: Row = {"context_gib": gib(self.context)}
        with sampled(self._used, 0.01) as device:
            try:
                row |= work()
            except RuntimeError as error:
                if not isinstance(error, torch.cuda.OutOfMemoryError) and _NO_BUFFER not in str(error):
                    raise
                row["error"] = str(error).partition("\n")[0]
        peaks = {"torch": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        del ballast
        row |= {f"{name}_gib": gib(nbytes - taken) for name, nbytes in (peaks | {"device": max(device)}).items()}
        return row | {"fragmentation_gib": gib(peaks["reserved"] - peaks["torch"])}

    def _used(self) -> int:
        """Return the used bytes of the whole GPU, which no other program may use."""
        import torch

        free, total = torch.cuda.mem_get_info()
        return int(total - free)


def gib(nbytes: float) -> float:
    return round(nbytes / GIB, 3)


def of_predicted(row: Row, *, dynamic: bool) -> float | None:
    """Return the measured peak over the sum of prediction, resident weights and kept rows, or None without a GPU."""
    if "torch_gib" not in row or "resident_gib" not in row:
        return None
    parts = row["predicted_gib"]
    measured, beside = row["device_gib"], 0.0
    if not dynamic:
        measured, beside = row["torch_gib"], parts["context"] + parts["fragmentation"]
    return round(measured / (sum(parts.values()) - beside + row["resident_gib"] + row.get("kept_rows_gib", 0)), 3)
