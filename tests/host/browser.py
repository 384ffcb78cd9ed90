"""ComfyUI's page in a real browser: files are dropped on the canvas and Run is pressed, as a person would."""

from __future__ import annotations

import base64
import io
import mimetypes
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from wanquant.testing.server import Graph, HostServer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VIEW = {"width": 1800, "height": 900}
# Text at every zoom, and nothing over the graph: the pictures are for reading.
SETTINGS = {"LiteGraph.Canvas.MinFontSizeForLOD": 0, "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False}

_DROP = """([content, name, type]) => {
    const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, {type}));
    const canvas = document.getElementById("graph-canvas");
    const {left, top, width, height} = canvas.getBoundingClientRect();
    const place = {clientX: left + width / 2, clientY: top + height / 2};
    const options = {dataTransfer: transfer, bubbles: true, cancelable: true, ...place};
    canvas.dispatchEvent(new DragEvent("drop", options));
}"""
_ADD_STYLE = "rules => document.head.append(Object.assign(document.createElement('style'), {textContent: rules}))"
_NODES = """() => app.graph.nodes.map(node => ({
    type: node.type,
    known: node.type in LiteGraph.registered_node_types,
    values: (node.widgets ?? []).map(widget => widget.value),
    rectangle: [...node.boundingRect],
}))"""

# Brings the nodes of these types to the top at full size, right of the menu; where they are on the page then.
_CLOSE_UP = """([types, links]) => {
    const boxes = app.graph.nodes.filter(node => types.includes(node.type)).map(node => [...node.boundingRect]);
    const left = Math.min(...boxes.map(box => box[0])) - 12, top = Math.min(...boxes.map(box => box[1])) - 30;
    const right = Math.max(...boxes.map(box => box[0] + box[2])), low = Math.max(...boxes.map(box => box[1] + box[3]));
    const {ds, canvas} = app.canvas;
    [ds.scale, ds.offset[0], ds.offset[1]] = [1, 300 - left, 40 - top];
    app.canvas.links_render_mode = links ? LiteGraph.SPLINE_LINK : LiteGraph.HIDDEN_LINK;
    app.canvas.deselectAll();  // the toolbar of a selected node would lie over another
    app.canvas.setDirty(true, true);
    const place = canvas.getBoundingClientRect();
    return [place.left + 300, place.top + 40, right + 12 - left, low + 12 - top];
}"""

# Until the page has drawn what changed, however busy the machine is.
_DRAWN = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


class Canvas:
    """The page with its graph."""

    def __init__(self, page: Page, server: HostServer) -> None:
        self.page = page
        self.server = server

    def drop(self, path: Path, content: bytes | None = None) -> None:
        """Drop a file on the canvas and wait for the graph in it; `content` takes the place of the file's own."""
        self.page.evaluate("app.graph.clear()")
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        encoded = base64.b64encode(path.read_bytes() if content is None else content).decode()
        self.page.evaluate(_DROP, [encoded, path.name, kind])
        self.page.wait_for_function("app.graph.nodes.length > 0")

    def refresh(self) -> None:
        """Press R: the lists of files are asked for anew."""
        self.page.locator("#graph-canvas").focus()
        with self.page.expect_response(lambda response: response.url.endswith("/object_info")) as asked:
            self.page.keyboard.press("r")
        asked.value.finished()
        self.page.wait_for_timeout(500)  # until the page has read the answer

    def nodes(self) -> list[dict[str, Any]]:
        """Type, whether it is known, values of the widgets, and place of every node."""
        return self.page.evaluate(_NODES)

    def prompt(self) -> Graph:
        """What Run would send."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def errors(self) -> str:
        """Text of the messages that the page shows, and types of the nodes that have a red frame."""
        red = self.page.evaluate("app.graph.nodes.filter(node => node.has_errors).map(node => node.type)")
        return " ".join([*self.page.get_by_text("errors found").all_inner_texts(), *red])

    def replace_missing(self) -> None:
        """Accept the host's offer to put known nodes in the place of unknown ones."""
        self.page.get_by_text("View details").click()
        self.page.get_by_role("button", name="Replace All").click()
        self.page.wait_for_function("app.graph.nodes.every(node => node.type in LiteGraph.registered_node_types)")
        self.close_panel()
        self.page.get_by_text("errors found").wait_for(state="hidden")

    def close_panel(self) -> None:
        """The one at the right."""
        self.page.evaluate("app.extensionManager.setting.set('Comfy.RightSidePanel.IsOpen', false)")

    def run(self, timeout: float = 600) -> dict[str, Any]:
        """Press Run and wait; what /history says of the run."""
        return self.result(self.start(), timeout)

    def start(self) -> str:
        """Press Run; the prompt's id."""
        with self.page.expect_response(lambda response: response.url.endswith("/prompt")) as sent:
            self.page.get_by_test_id("queue-button").click()
        return str(sent.value.json()["prompt_id"])

    def cancel(self) -> None:
        """Press the button that ends the run at hand."""
        self.page.get_by_role("button", name="Cancel current run").click()

    def result(self, prompt: str, timeout: float) -> dict[str, Any]:
        """What /history says of a run, once it has ended."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if finished := self.server.get(f"/history/{prompt}"):
                return finished[prompt]
            time.sleep(0.2)
        raise TimeoutError(f"no result in {timeout:.0f} s")

    def close_up(self, types: Sequence[str], *, links: bool = False) -> Image.Image:
        """The nodes of these types, at the size that they have before any zoom."""
        place = self.page.evaluate(_CLOSE_UP, [list(types), links])
        self.page.wait_for_timeout(500)
        picture = self._screenshot(*place)
        self.page.evaluate("app.canvas.links_render_mode = LiteGraph.SPLINE_LINK")
        return picture

    def help_picture(self, kind: str) -> tuple[int, int]:
        """Width and height of the picture in the help page that a click on the node's info button opens."""
        self.page.evaluate("kind => app.canvas.selectNode(app.graph.nodes.find(node => node.type === kind))", kind)
        self.page.get_by_test_id("info-button").dispatch_event("click")  # it may lie under the menu
        picture = self.page.locator(f".node-help-content img[src*='{kind}']")
        picture.wait_for()
        width, height = picture.evaluate(
            "image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])"
        )
        return width, height

    def _screenshot(self, left: float, top: float, width: float, height: float) -> Image.Image:
        self.page.evaluate(_DRAWN)
        clip = {"x": left, "y": top, "width": width, "height": height}
        return Image.open(io.BytesIO(self.page.screenshot(clip=clip))).convert("RGB")


@contextmanager
def open_canvas(server: HostServer) -> Iterator[Canvas]:
    """A browser on the server's page, with the dialog of the first visit closed."""
    with sync_playwright() as playwright:
        # The sandbox needs privileges that containers lack; the page is our own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport=VIEW, device_scale_factor=1.25)
        first_visit = "Comfy.TutorialCompleted" not in server.get("/settings")
        page.goto(server.url)
        page.get_by_test_id("queue-button").wait_for(timeout=90_000)
        if first_visit:
            page.get_by_role("dialog").wait_for()
            page.keyboard.press("Escape")
            page.get_by_role("dialog").wait_for(state="hidden")
        page.evaluate(
            "async values => { for (const [name, value] of Object.entries(values))"
            " await app.extensionManager.setting.set(name, value) }",
            SETTINGS,
        )
        # On a busy machine the page may never take away the mask that it shows while it loads.
        # Not by add_style_tag, which takes any request that the page is refused meanwhile for a failure of its own.
        page.evaluate(_ADD_STYLE, ".p-blockui-mask { pointer-events: none }")
        yield Canvas(page, server)
        browser.close()
