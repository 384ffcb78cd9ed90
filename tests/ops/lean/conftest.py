"""What the tests of lean blocks share."""

from __future__ import annotations

import pytest

from wanquant.ops.lean.block import LeanBlock


@pytest.fixture
def lean_blocks(monkeypatch):
    """Return the list of the blocks that ran lean, in order; it grows as they run."""
    seen, run = [], LeanBlock.__call__
    monkeypatch.setattr(LeanBlock, "__call__", lambda self, *args: (seen.append(self.block), run(self, *args))[1])
    return seen
