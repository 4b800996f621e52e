"""A page with the pack's tab, cards, editor and settings, as a web UI would build it. Run by the page tests, in their environment.

    python app.py FOLDER PORT      FOLDER: with models/OFT, models/Lora, models/Stable-diffusion
"""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent.parent
# Behind the real packages: there is a stand-in for gradio as well.
sys.path += [str(HERE.parent / "standin" / "forge"), str(HERE.parent / "standin" / "common")]

import gradio as gr
from modules import paths, script_callbacks, sd_models, shared, ui_extra_networks

folder, port = Path(sys.argv[1]), int(sys.argv[2])
paths.models_path = str(folder / "models")
shared.cmd_opts.lora_dir = str(folder / "models" / "Lora")
shared.opts.add_option("samples_format", shared.OptionInfo("png"))
sd_models.folder = folder / "models" / "Stable-diffusion"
sd_models.list_models()

spec = importlib.util.spec_from_file_location("oft.py", REPO / "scripts" / "oft.py")
door = importlib.util.module_from_spec(spec)
spec.loader.exec_module(door)
script_callbacks.run("before_ui")
script_callbacks.run("ui_settings")
page = ui_extra_networks.pages[0]
editor = page.create_user_metadata_editor(None, "txt2img")

JAVASCRIPT = """
    window.opts = {extra_networks_default_multiplier: 1};
    window.clicked = [];
    window.cardClicked = (prompt, negative) => window.clicked.push([prompt, negative]);
    window.gradioApp = () => document;
    window.randomId = () => "task(1)";
    window.requestProgress = () => { window.progressAsked = true; };
    window.create_submit_args = args => Array.from(args);
"""
script = "() => {" + JAVASCRIPT + (REPO / "javascript" / "oft.js").read_text() + "}"
# As in the hosts: tabs are built on their own, then put into the page.
tabs = [tab for made in script_callbacks.run("ui_tabs") for tab in made]
# gradio 3 runs it when the page loads, gradio 4 too, under another name.
three = gr.__version__.startswith("3.")
with gr.Blocks(analytics_enabled=False, **({} if three else {"js": script})) as demo:
    if three:
        demo.load(fn=None, inputs=None, outputs=None, _js=script)
    with gr.Tabs():
        with gr.TabItem("Cards"):
            cards = gr.HTML(page.create_html(), elem_id="cards")
            again = gr.Button("Refresh cards", elem_id="cards_refresh")
            again.click(fn=page.create_html, inputs=[], outputs=[cards])
            editor.create_ui()
        with gr.TabItem("Settings"):
            for key, option in shared.opts.data_labels.items():
                if key.startswith("oft_"):
                    kind = option.component or (gr.Checkbox if isinstance(option.default, bool) else gr.Textbox)
                    kind(label=option.label, value=option.default, elem_id=f"setting_{key}", **(option.component_args or {}))
        for blocks, title, name in tabs:
            with gr.TabItem(title, elem_id=name):
                blocks.render()

app, *_ = demo.queue().launch(
    server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, show_api=False, quiet=True, share=False
)
script_callbacks.run("app_started", demo, app)
print("ready", flush=True)
demo.block_thread()
