"""The README's generated table is what its command prints."""

from __future__ import annotations

from wanquant.bench import sizes
from wanquant.dev import ROOT


def test_size_table_is_current(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sizes"])
    sizes.main()
    assert capsys.readouterr().out in (ROOT / "README.md").read_text()
