"""The pack as a user installs it: its archive in custom_nodes under any name, its requirements by pip."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from wanquant.testing.archive import unpack_published
from wanquant.testing.graphs import node
from wanquant.testing.hosts import ROOT, checkout
from wanquant.testing.server import HostServer
from wanquant.tests.host.test_server import NODES
from wanquant.tests.host.workflow_files import prompt, saved_files, shrunk

pytestmark = pytest.mark.host

# A second download, in a folder of one's own wording. ComfyUI serves no page of a folder with a space in its name.
FOLDER = "my-Wan quant (1)"
TEMPLATE = ROOT / "workflows" / "Wan 2.1 text to video, 1.3B.json"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostServer]:
    if not checkout().is_dir() or not (ROOT / ".git").exists():
        pytest.skip("needs a ComfyUI and a git checkout of the pack")
    base = tmp_path_factory.mktemp("installed")
    pack = base / "unpacked"
    unpack_published(pack)
    # Without an index: ComfyUI's environment has it all, and a test must not change what the others run in.
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "-r", str(pack / "requirements.txt")]
    subprocess.run(pip, check=True)
    with HostServer(base / "comfyui", folder=FOLDER, pack=pack, log=base / "comfyui.log") as running:
        yield running


def test_check_passes_and_a_template_runs(installed: HostServer):
    from wanquant.tests.host.tiny_models import write_models  # imports the host

    assert "IMPORT FAILED" not in installed.log.read_text()
    schemas = installed.get("/object_info")
    assert set(NODES) <= set(schemas)
    assert "checks passed" in str(installed.run({"check": node("WanQuantCheck")}))
    write_models(installed.models)
    small = shrunk(json.loads(TEMPLATE.read_text(encoding="utf-8")), schemas)
    written = saved_files(installed.run(prompt(small, schemas)), installed.output)
    assert [file.suffix for file in written] == [".mp4"]


def test_log_says_that_the_page_does_not_find_the_folder(installed: HostServer):
    assert f"named '{FOLDER}', so ComfyUI's page may not find" in installed.pack_log.read_text(encoding="utf-8")


def test_templates_and_languages_are_listed(installed: HostServer):
    assert TEMPLATE.stem in installed.get("/workflow_templates")[FOLDER]
    languages = installed.get("/i18n")
    assert {"en", "zh", "ja", "ko"} <= languages.keys()
    assert set(NODES) <= languages["zh"]["nodeDefs"].keys()
