"""What one process takes of a GPU, while all but a budget of its memory is taken."""

from __future__ import annotations

from collections.abc import Callable

from wanquant.bench.harness import GIB, Row, sampled


class Meter:
    """What one process takes of the GPU; without a GPU, nothing is measured."""

    def __init__(self) -> None:
        import torch

        self._gpu = torch.cuda.is_available()
        self.context = self._used() if self._gpu else 0

    def synchronize(self) -> None:
        import torch

        if self._gpu:
            torch.cuda.synchronize()

    def run(self, work: Callable[[], Row], budget: int) -> Row:
        """What `work` returns, and the most it took while all but `budget` bytes of the device were taken."""
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
            except torch.cuda.OutOfMemoryError as error:
                row["error"] = str(error).partition("\n")[0]
        peaks = {"torch": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        del ballast
        row |= {f"{name}_gib": gib(nbytes - taken) for name, nbytes in (peaks | {"device": max(device)}).items()}
        return row | {"fragmentation_gib": gib(peaks["reserved"] - peaks["torch"])}

    def _used(self) -> int:
        """Bytes of the whole device: no other program must use it."""
        import torch

        free, total = torch.cuda.mem_get_info()
        return int(total - free)


def gib(nbytes: float) -> float:
    return round(nbytes / GIB, 3)


def of_predicted(row: Row, *, dynamic: bool) -> float | None:
    """The measured peak over the predicted one and the weights that stayed; None where there is no GPU."""
    if "torch_gib" not in row or "resident_gib" not in row:
        return None
    parts = row["predicted_gib"]
    tensors = parts["weights"] + parts["scratch"] + parts["activations"] + row["resident_gib"]
    measured = row["device_gib"] if dynamic else row["torch_gib"]
    return round(measured / (tensors + (parts["context"] if dynamic else 0)), 3)
