// Shows the report of an OFT node inside the node after a run. The report is also the node's last output.
import { app } from "../../scripts/app.js";

const WIDGET = "oft_report";
const MIN_HEIGHT = 110;
const REPORTS = new Set(["report", "summary"]);

function makePanel(node) {
  const element = document.createElement("div");
  Object.assign(element.style, {
    boxSizing: "border-box",
    padding: "4px 6px",
    overflow: "auto",
    whiteSpace: "pre-wrap",
    overflowWrap: "anywhere",
    userSelect: "text",
    fontSize: "11px",
    lineHeight: "1.35",
    borderLeft: "3px solid transparent",
    borderRadius: "4px",
    color: "var(--input-text)",
    background: "var(--comfy-input-bg)",
  });
  element.style.setProperty("--comfy-widget-min-height", String(MIN_HEIGHT));
  // Scrolling and selecting text must not zoom or drag the canvas.
  for (const kind of ["wheel", "pointerdown"]) element.addEventListener(kind, (event) => event.stopPropagation());

  const widget = node.addDOMWidget(WIDGET, "OFT_PANEL", element, {
    getValue: () => element.textContent,
    setValue: (value) => {
      element.textContent = value ?? "";
    },
    getMinHeight: () => MIN_HEIGHT,
    serialize: false,
    hideOnZoom: false,
  });
  widget.serialize = false;
  return { widget, element };
}

function show(node, text) {
  node.oftPanel ??= makePanel(node);
  const { widget, element } = node.oftPanel;
  widget.value = text;
  element.style.borderLeftColor = /^warning/im.test(text) ? "var(--warning-text, #e6a23c)" : "transparent";
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width, 300), Math.max(node.size[1], height)]);
  node.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "OFT.Report",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("OFT_")) return;
    // Nodes 2.0 shows only widgets that are there from the start.
    if (node.outputs?.some((output) => REPORTS.has(output.name))) node.oftPanel ??= makePanel(node);
    const before = node.onExecuted;
    node.onExecuted = function (output, ...rest) {
      before?.call(this, output, ...rest);
      if (Array.isArray(output?.text)) show(this, output.text.join("\n"));
    };
  },
});
