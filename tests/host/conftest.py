"""One ComfyUI server for all host tests, with the pack in a folder of another name than the repository's."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest

from wanquant.testing.hosts import checkout
from wanquant.testing.server import HostServer
from wanquant.tests.host.browser import CHROMIUM, Canvas, open_canvas
from wanquant.tests.ops.conftest import HOST  # noqa: F401 (puts the host on sys.path)
from wanquant.workflow_generators.canvas import Schemas
from wanquant.workflow_generators.tools import COMFYUI_GGUF


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[HostServer]:
    if not checkout().is_dir():
        pytest.skip(f"no ComfyUI at {checkout()}: run `python3 dev.py setup`, or set COMFYUI_PATH")
    base = tmp_path_factory.mktemp("host")
    # The folder's name is in the pictures. Without a dot, at which the canvas would cut it and find no help pages.
    folder = "ComfyUI-WanQuant" if pytestconfig.getoption("update") else "renamed_pack-2"
    with HostServer(base, folder=folder, log=base / "comfyui.log") as running:
        yield running


@pytest.fixture(scope="session")
def schemas(server: HostServer) -> Schemas:
    """The schemas of all nodes that the templates use."""
    return server.get("/object_info") | COMFYUI_GGUF


@pytest.fixture(scope="session")
def tiny_models(server: HostServer) -> None:
    """Puts the files that the templates ask for into the server's folders."""
    # Only here, as it imports the host.
    from wanquant.tests.host.tiny_models import write_inputs, write_models

    write_models(server.models)
    write_inputs(server.base / "input")


@pytest.fixture(scope="module")
def canvas(server: HostServer, tiny_models: None) -> Iterator[Canvas]:
    """A browser on the server's page. An open page keeps drawing, so it is closed after each module."""
    if CHROMIUM is None:
        message = "no browser: install chromium to test the canvas"
        pytest.fail(message) if os.environ.get("WANQUANT_BROWSER") == "required" else pytest.skip(message)
    with open_canvas(server) as opened:
        yield opened


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of the server's log with a failure."""
    report = yield
    running = getattr(item, "funcargs", {}).get("server")
    if report.failed and isinstance(running, HostServer):
        report.sections.append(("ComfyUI's log", running.log_tail()))
    return report
