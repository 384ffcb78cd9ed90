"""One ComfyUI server for all host tests, with the pack in a folder of another name than the repository's."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from wanquant.dev import checkout
from wanquant.tests.host.server import HostServer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostServer]:
    if not checkout().is_dir():
        pytest.skip(f"no ComfyUI at {checkout()}: run `python3 dev.py setup`, or set COMFYUI_PATH")
    base = tmp_path_factory.mktemp("host")
    with HostServer(base, folder="renamed-pack.2", log=base / "comfyui.log") as running:
        yield running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of the server's log with a failure."""
    report = yield
    running = getattr(item, "funcargs", {}).get("server")
    if report.failed and isinstance(running, HostServer):
        report.sections.append(("ComfyUI's log", running.log_tail()))
    return report
