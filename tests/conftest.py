"""Set-up of all tests: the pack is importable as `wanquant`.

The root stays off sys.path, where our `nodes` would shadow ComfyUI's.
"""

from __future__ import annotations

import sys
import types
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update", action="store_true", help="rewrite workflows/, subgraphs/ and the pictures")
    forms = ("function", "keywords", "forward")
    parser.addoption("--call-form", choices=forms, help="call the pack as a newer ComfyUI does: tests/newer_host.py")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was skipped and why, in one line."""
    skipped = [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped")]
    if skipped:
        reasons = (f"{count} ({reason})" for reason, count in Counter(skipped).most_common())
        terminalreporter.write_line(f"not tested here: {'; '.join(reasons)}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed each test by its name, so that it draws the same values in any order and process."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(zlib.crc32(item.nodeid.encode()))


@pytest.fixture(autouse=True)
def no_path_is_lost() -> Iterator[None]:
    """Fails a test in which a faster path gave up on a type: the torch operations would hide that."""
    yield
    if optional := sys.modules.get("wanquant.quant.kernels.optional"):
        assert not optional.FUSED.lost | optional.GGML.lost


package = types.ModuleType("wanquant")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("wanquant", package)
