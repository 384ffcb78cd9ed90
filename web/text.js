// Keeps the text that a node gives in a box on the node, until the node runs again.
// The canvas has a text for progress only, which it takes away when a run ends.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const BOX = "wanquant_text", PROGRESS = "$$node-text-preview";
const LINE = 16, LEAST_LINES = 8; // pixels; a smaller box is scrolled

const isOurs = (type) => type?.startsWith("WanQuant");

function addBox(node) {
    const element = document.createElement("textarea");
    element.className = "comfy-multiline-input";
    element.readOnly = true;
    const height = () => LINE * (element.value.split("\n").length + 2);
    const box = node.addDOMWidget(BOX, BOX, element, {
        getValue: () => element.value,
        setValue: (value) => { element.value = value; },
        getMinHeight: () => Math.min(height(), LINE * LEAST_LINES),
        getMaxHeight: () => (node.imgs?.length ? height() : undefined), // leaves the rest to the picture
        serialize: false, // not an input of the node
    });
    box.serialize = false; // nor part of a saved workflow
    return box;
}

function remove(node, name) {
    const widget = node?.widgets?.find((widget) => widget.name === name);
    if (widget) node.removeWidget(widget);
}

function show(node, output) {
    if (!output?.text) return;
    remove(node, PROGRESS);
    const box = node.widgets?.find((widget) => widget.name === BOX) ?? addBox(node);
    box.value = [output.text].flat().join("\n");
    node.expandToFitContent();
}

// "3" in the root graph, "7:3" in the subgraph of its node 7.
function running(id) {
    let node, graph = app.rootGraph;
    for (const part of String(id).split(":")) {
        node = graph?.getNodeById(part);
        graph = node?.subgraph;
    }
    return node;
}

// "3" in the root graph, "UUID:3" in the subgraph with this UUID.
function located(place) {
    const [id, uuid] = place.split(":").reverse();
    return (uuid ? app.rootGraph.subgraphs.get(uuid) : app.rootGraph)?.getNodeById(id);
}

api.addEventListener("executing", ({ detail }) => remove(running(detail), BOX));

app.registerExtension({
    name: "WanQuant.Text",
    beforeRegisterNodeDef({ prototype }, { name }) {
        if (!isOurs(name)) return;
        const { onExecuted } = prototype;
        prototype.onExecuted = function (output) {
            onExecuted?.call(this, output);
            show(this, output);
        };
    },
    // When another workflow's tab was open meanwhile.
    onNodeOutputsUpdated(outputs) {
        for (const [place, output] of Object.entries(outputs)) {
            const node = located(place);
            if (isOurs(node?.type)) show(node, output);
        }
    },
});
