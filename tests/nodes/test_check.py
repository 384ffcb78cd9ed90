"""Check Installation without a server."""

from __future__ import annotations

import logging
import sys

from wanquant.nodes.check import WanQuantCheck


def test_everything_is_checked_each_time(models):
    assert WanQuantCheck.fingerprint_inputs() != WanQuantCheck.fingerprint_inputs()
    result = WanQuantCheck.execute()
    (text,) = result.args
    assert text.startswith("WanQuant: 8 checks passed")
    assert text in result.ui.as_dict()["text"]


def test_an_update_that_broke_loading_is_named(models, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wanquant.ops.check", None)
    with caplog.at_level(logging.ERROR):
        (text,) = WanQuantCheck.execute().args
    assert "FAILED load: ComfyUI" in text and "lacks what loading needs" in text
    assert "check of load failed" in caplog.text
