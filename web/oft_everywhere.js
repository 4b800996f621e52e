// The setting that makes LoRA loaders of ComfyUI and other packs read OFT files. The server acts on it at once.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const ID = "OFT.everywhere";

function say(severity, detail) {
  app.extensionManager.toast.add({ severity, summary: "OFT", detail, life: 10000 });
}

async function tell(on) {
  const answer = await api.fetchApi("/oft/everywhere", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ on }),
  });
  if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
  for (const note of (await answer.json()).notes) say("warn", note);
}

app.registerExtension({
  name: "OFT.Everywhere",
  settings: [
    {
      id: ID,
      name: "LoRA loaders read OFT files too",
      tooltip:
        "ComfyUI's own and other packs' LoRA loaders apply OFT files as Load OFT does (rotation, the loader's " +
        "strength). Takes effect at the next run. One setting for the whole server.",
      category: ["OFT", "Loaders", "everywhere"],
      type: "boolean",
      defaultValue: false,
      onChange(value, before) {
        // Called without an old value while the page loads: the server has read the setting itself then.
        if (before === undefined || value === before) return;
        tell(value).catch((error) => say("error", `The server did not take the setting: ${error.message}`));
      },
    },
  ],
});
