"""The server of tests starts with flags that its ComfyUI knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from wanquant.testing.server import flags_of

OLD = ["--listen", "--disable-auto-launch", "--disable-api-nodes", "--database-url"]
NEW = [*OLD, "--offline", "--disable-assets"]


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (OLD, "--listen 127.0.0.1 --disable-auto-launch --disable-api-nodes --database-url sqlite:///:memory:"),
        (NEW, "--listen 127.0.0.1 --disable-auto-launch --offline --disable-assets --database-url sqlite:///:memory:"),
        (["--listen"], "--listen 127.0.0.1"),
    ],
    ids=["0.30", "0.39", "few"],
)
def test_flags_are_those_that_the_parser_takes(known: list[str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "comfy").mkdir()
    lines = ["import argparse", "parser = argparse.ArgumentParser()", *(f"parser.add_argument({f!r})" for f in known)]
    (tmp_path / "comfy" / "cli_args.py").write_text("\n".join(lines))
    assert flags_of(tmp_path) == expected.split()
