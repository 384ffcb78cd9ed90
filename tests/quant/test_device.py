"""Tables and kernels that stay on a device are allocated within the context that the host sets."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from wanquant.quant import QTYPES, device
from wanquant.quant.device import allocate_within, cached_on_device

QUANT = Path(device.__file__).parent


@pytest.fixture
def contexts() -> Iterator[list[str]]:
    """A record of the events inside the host's context."""
    seen: list[str] = []

    @contextmanager
    def context() -> Iterator[None]:
        seen.append("in")
        yield
        seen.append("out")

    before = device._context
    allocate_within(context)
    yield seen
    allocate_within(before)


@pytest.mark.parametrize(("free", "cached", "elements"), [(40, 0, 1 << 24), (1, 1, 1 << 23), (0, 0, 1)])
def test_what_is_encoded_at_a_time_leaves_half_of_the_memory(
    free: int, cached: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mocks stand for a GPU with `free` GiB, and `cached` more in torch's allocator."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: (cached + 3) << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 3 << 30)
    assert device.elements_at_a_time(torch.device("cuda", 0)) == elements
    assert device.elements_at_a_time(torch.device("mps")) == 1 << 22


def test_tables_are_made_once_within_the_context(contexts: list[str]) -> None:
    @cached_on_device
    def small(device: torch.device) -> torch.Tensor:
        contexts.append("small")
        return torch.arange(4, device=device)

    @cached_on_device
    def large(device: torch.device, size: int) -> torch.Tensor:
        contexts.append("large")
        return small(device).repeat(size)

    cpu = torch.device("cpu")
    assert large(cpu, 2) is large(cpu, 2)
    assert contexts == ["in", "large", "small", "out"], "hosts do not nest their contexts"
    small(cpu)
    large(cpu, 3)
    assert contexts[4:] == ["in", "large", "out"]


def test_only_the_first_launch_of_a_kernel_is_within_the_context(
    contexts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = pytest.importorskip("wanquant.quant.kernels.triton_kernel")
    packed, out = torch.zeros(34, dtype=torch.uint8), torch.empty(32)
    monkeypatch.setattr(torch.cpu, "device", lambda _: nullcontext(), raising=False)
    monkeypatch.setattr(kernel, "launch", lambda *_: contexts.append("launch"))
    monkeypatch.setattr(kernel, "_loaded", set())
    for _ in range(2):
        kernel.dequantize(QTYPES["Q8_0"], packed, out)
    assert contexts == ["in", "launch", "out", "launch"]


@pytest.mark.parametrize("path", [*QUANT.glob("*.py"), *QUANT.glob("kernels/*.py")], ids=lambda path: path.stem)
def test_no_other_cache_is_keyed_by_the_device(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and any(
            isinstance(d, ast.Name) and d.id in ("cache", "lru_cache") for d in node.decorator_list
        ):
            assert not any(a.annotation and "device" in ast.unparse(a.annotation) for a in node.args.args), node.name
