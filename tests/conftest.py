"""Makes the pack importable as `wanquant` with the root off sys.path, where our `nodes` would shadow the host's."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update", action="store_true", help="write workflows/, subgraphs/ and the pictures anew")


package = types.ModuleType("wanquant")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("wanquant", package)
