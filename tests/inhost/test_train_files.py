"""Training: written files, bad inputs, what is said."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import comfy.model_management
import comfy.model_sampling
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from comfyui_oft.nodes import dataset, save
from comfyui_oft.nodes.binding import apply as host
from comfyui_oft.nodes.binding import folders
from comfyui_oft.nodes.training import store as train_store
from comfyui_oft.nodes.training.prediction import foreseen
from comfyui_oft.oft_core import AdapterError, Strength
from comfyui_oft.oft_core.errors import FileError, FormatError
from comfyui_oft.oft_core.training import (
    ConfigError,
    TrainingError,
)
from learning import a_run, a_set, fresh_user, go, learnt, parts, pictures, raises, replaced, same, state
from PIL import Image
from safetensors.torch import load_file, save_file

from dev.inprocess import REPO


def test_saves_in_other_dialects():
    fresh_user()
    model = parts("sd15")[0]
    outcome = go(a_run())
    write = save.OFTSave.execute

    def saved(**options):
        with torch.inference_mode():
            given = {
                "name": "saved/x",
                "dialect": save.AS_IS,
                "precision": "fp32",
                "folder": "oft",
                **options,
            }
            return write(adapter=outcome.adapter, **given).args[0]

    name = saved()
    assert name in folders.names(), "not in the loader's list at once"
    same(load_file(folders.find(name)), learnt(outcome))
    assert saved() != name
    half = load_file(folders.find(saved(precision="fp16")))
    assert any(t.dtype == torch.float16 for t in half.values())
    converted = folders.read(saved(dialect="peft", model=model))
    assert converted.dialect != outcome.adapter.dialect
    with torch.inference_mode():
        a, b = (
            host.apply(x, model, None, Strength(1.0), Strength(1.0)).model
            for x in (converted, outcome.adapter)
        )
        for one in (a, b):
            comfy.model_management.load_models_gpu([one], force_patch_weights=True)
            one.weights = state(one)
    worst = max(float((a.weights[k] - b.weights[k]).abs().max()) for k in a.weights)
    assert worst < 1e-5, worst
    raises(ConfigError, lambda: saved(dialect="peft"), "model")
    raises(FormatError, lambda: saved(dialect="kohya", model=model), "kohya", "side")
    raises(ConfigError, lambda: saved(name="../../outside"), "name")
    inside = saved(folder="output")
    assert (Path(folder_paths.get_output_directory()) / inside).is_file()


def test_a_copy_of_a_peft_folder_keeps_its_config():
    """Without it the same numbers are other rotations."""
    root = Path(folder_paths.get_folder_paths(folders.FOLDER)[0])
    layer = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    g = torch.Generator().manual_seed(0)
    oft = {f"{layer}.oft_R.weight": torch.randn(4, 28, generator=g) * 0.3}
    boft = {f"{layer}.boft_R": torch.randn(1, 4, 8, 8, generator=g) * 0.1, f"{layer}.boft_s": torch.ones(32, 1)}
    other_tool = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    kohya = {f"{other_tool}.oft_R.weight": oft[f"{layer}.oft_R.weight"]}
    exact = {"peft_type": "OFT", "peft_version": "0.18.0", "use_cayley_neumann": False, "coft": True, "eps": 0.05}

    def rotation(adapter):
        return next(iter(adapter.operations().values()))[0].op.build(Strength(), torch.device("cpu")).matrices

    def saved(adapter, **more):
        options = {"name": "copy/x", "dialect": save.AS_IS, "precision": "fp32", "folder": "oft", **more}
        with torch.inference_mode():
            return save.OFTSave.execute(adapter=adapter, **options).args[0]

    for name, tensors, config in (("oft", oft, exact), ("boft", boft, {"peft_type": "BOFT"})):
        folder = root / "peft" / name
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
        first = folders.read(f"peft/{name}/adapter_model.safetensors")
        for other in (saved(first), saved(first)):
            assert other in folders.names() and other.endswith("_/adapter_model.safetensors"), other
            assert torch.equal(rotation(folders.read(other)), rotation(first)), name
            assert json.loads((root / other).with_name("adapter_config.json").read_text("utf-8")) == config
    inside = Path(folder_paths.get_output_directory()) / saved(first, folder="output")
    assert inside.is_file() and (inside.parent / "adapter_config.json").is_file()
    # A file of another tool in the same folder has no use for it.
    save_file(kohya, root / "peft" / "oft" / "other.safetensors")
    assert saved(folders.read("peft/oft/other.safetensors")).endswith("_.safetensors")
    # Files of PEFT that were moved out of their folders stay single files.
    save_file(oft, root / "alone.safetensors")
    assert saved(folders.read("alone.safetensors")).endswith("_.safetensors")
    (root / "peft" / "oft" / "adapter_config.json").write_bytes(b"{")
    first.path = str(root / "peft" / "oft" / "adapter_model.safetensors")
    raises(FileError, lambda: saved(first), "adapter_config.json")


def test_every_way_of_training_gives_a_file():
    for options in (
        {"side": "output"},
        {"rescale": True},
        {"block_share": True},
        {"use_cayley_neumann": True},
        {"conv_modules": "all-conv"},
        {"target_modules": "to_q, to_v"},
        {"blocks": 4},
        {"use_cayley_neumann": True, "num_cayley_neumann_terms": 7},
        {"fan_in_fan_out": True, "alpha_pattern": '{"to_q": 8}'},
        {"init_weights": False},
    ):
        fresh_user()
        run = a_run(config=options, steps=3)
        outcome = go(run)
        assert len(outcome.adapter.entries) > 5, options
        terms = {op.terms for e in outcome.adapter.operations().values() for op in (e[0].op,)}
        assert terms == {options.get("num_cayley_neumann_terms", 5)}, terms
        for name in ("fan_in_fan_out", "alpha_pattern"):
            assert (f"{name} has no effect" in outcome.report) == (name in options), outcome.report
    fresh_user()
    outcome = go(a_run(coft="angle", coft_degrees=0.5, steps=6))
    angle = outcome.report.split("Largest angle ")[1].split("°")[0]
    assert abs(float(angle) - 0.5) < 0.01, angle
    go(a_run(coft="eps", coft_eps=0.01, steps=2))
    fresh_user()
    raises(FormatError, lambda: go(a_run(config={"side": "output", "block_share": True})), "hold")


def test_folders_as_source():
    root = Path(folder_paths.get_input_directory()) / "my pictures"
    root.mkdir(parents=True, exist_ok=True)
    for i, size in enumerate([(64, 64), (96, 64), (64, 96)]):
        picture = Image.new("RGB", size, (40 * i, 90, 200 - 40 * i))
        exif = picture.getexif()
        exif[0x0112] = 6 if i == 1 else 1  # turned by a quarter
        picture.save(root / f"{i}.jpg", exif=exif)
    (root / "0.txt").write_text("a cat", "utf-8")
    of = a_set(folder="my pictures", pictures=None, captions=["", "", "third"])
    assert [r.caption for r in of.records] == ["ohwx, a cat", "a photo of ohwx", "ohwx, third"]
    assert of.load(of.records[1])[0].shape == (64, 64, 3) and "my pictures" in dataset.folder_choices()
    wide = a_set(folder="my pictures", pictures=None, resolution=128)
    assert wide.records[1].bucket[0] <= wide.records[1].bucket[1], "EXIF rotation is ignored"
    before = dataset.OFTDatasetNode.fingerprint_inputs(folder=["my pictures"])
    (root / "1.txt").write_text("a dog", "utf-8")
    assert dataset.OFTDatasetNode.fingerprint_inputs(folder=["my pictures"]) != before
    for bad in ("../outside", "/etc", "missing"):
        raises(ConfigError, lambda bad=bad: a_set(folder=bad, pictures=None), "input folder")
        assert dataset.OFTDatasetNode.validate_inputs(folder=[bad]) is not True
    (root / "9.png").write_bytes(b"not a picture")
    raises(ConfigError, lambda: a_set(folder="my pictures", pictures=None), "9.png")
    (root / "9.png").unlink()


def test_bad_inputs_are_explained(monkeypatch):
    raises(ConfigError, lambda: a_set(pictures=None), "pictures", "folder")
    raises(ConfigError, lambda: a_set(captions=["a", "b", "c"]), "captions", "2")
    raises(ConfigError, lambda: a_set(masks=[torch.ones(3, 8, 8)]), "masks")
    raises(ConfigError, lambda: a_run(config={"prior": "match"}), "class prompt")
    raises(ConfigError, lambda: a_run(config={"rank_pattern": "{"}), "rank_pattern")
    raises(ConfigError, lambda: a_run(config={"layers_to_transform": "one"}), "layers_to_transform")
    raises(ConfigError, lambda: a_run(config={"target_modules": "(("}), "regular expression")
    fresh_user()
    raises(AdapterError, lambda: go(a_run(config={"target_modules": "nothing"})), "target_modules")
    raises(ConfigError, lambda: go(a_run(of_parts=(*parts("sd15")[:2], parts("flux")[2]))), "VAE")
    raises(ConfigError, lambda: go(a_run(name="../../outside")), "name")
    for name in ("", " ", ".", "./"):
        raises(ConfigError, lambda name=name: go(a_run(name=name)), "name", "training/subject")
    for name in ("lr", "weight_decay", "params"):
        raises(ConfigError, lambda name=name: a_run(config={"optimizer_args": json.dumps({name: 1})}), "optimizer_args", name)
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)  # as if it were not installed
    raises(TrainingError, lambda: go(a_run(config={"optimizer": "lion"})), "lion-pytorch")
    strange = comfy.model_sampling.IMG_TO_IMG()
    strange.sigma_data = 0.5
    raises(ConfigError, lambda: foreseen(strange), "cannot be trained")


def test_what_is_not_finite_first_is_named():
    """Latents and embeddings before any step, without advice on the learning rate, and nothing of them in the cache."""
    fresh_user()
    of = a_set(pictures=[pictures(3)], captions=["a", "b", "c"], class_prompt="a dog")
    vae = parts("sd15")[2]
    nan = float("nan")

    def refused(*words, run=None, advice=False):
        run = run or a_run(of=of)
        said = raises(TrainingError, lambda: go(run), "not finite", *words)
        assert ("learning rate" in said.lower()) == advice, said
        return run

    encode = vae.encode
    second = of.load(of.records[1])[0]
    with replaced(vae, "encode", lambda image: encode(image) * (nan if torch.equal(image[0], second) else 1)):
        run = refused("VAE's latent", "picture 2", "--fp32-vae")
        assert run.trainer is None
    embed = comfy.sd.CLIP.encode_from_tokens_scheduled

    def broken(self, tokens, **options):
        made = embed(self, tokens, **options)
        words = [w[0] for w in tokens["l"][0]]
        wanted = [w[0] for w in self.tokenize("ohwx, b")["l"][0]]
        return [[cond * (nan if words == wanted else 1), more] for cond, more in made]

    with replaced(comfy.sd.CLIP, "encode_from_tokens_scheduled", broken):
        refused("text embedding of 'ohwx, b'", "--fp32-text-enc")
    run = a_run(of=of)
    predict = run.host.predict
    run.host.predict = lambda *a: predict(*a) * nan
    refused("the model's output for picture", "step 1", "also without what was trained", run=run)
    run = a_run(of=of, config={"prior": "pictures", "class_pictures": 2})
    draw = run.host.sample_latent
    run.host.sample_latent = lambda *a: draw(*a) * nan
    refused("class picture 1", run=run)
    # Text encoders that are trained were finite before the first step.
    run = a_run(of=of, config={"text_encoder_lr": 0.01}, steps=3)
    tokens = run.host.encoders.encode_token_weights

    def later(*a):
        cond, *more = tokens(*a)
        return (cond * (nan if run.trainer and run.trainer.step == 1 else 1), *more)

    with replaced(run.host.encoders, "encode_token_weights", later):
        refused("text embedding", "text encoders", run=run, advice=True)
    del run.host.encoders.encode_token_weights
    # The cache holds none of it.
    fine = go(a_run(of=of))
    assert all(map(math.isfinite, fine.losses))
    for where, values in (("picture", pictures()), ("mask", torch.ones(1, 64, 64))):
        values[0, 3, 4] = nan
        given = {"pictures": [values]} if where == "picture" else {"masks": [values]}
        raises(ConfigError, lambda given=given: a_set(**given), "not finite", f"{where} 1")


def said_in(lang):
    return json.loads((REPO / "locales" / lang / "nodeDefs.json").read_text("utf-8"))


def test_promises_about_going_on_are_kept():
    """How long runs are kept, and which schedule lets a run go on, in tooltips and help pages of both languages."""
    pages = {"en": "OFT_Train.md", "zh": "OFT_Train/zh.md"}
    kept = [str(train_store.KEPT_RUNS), str(train_store.KEPT_DAYS)]
    for lang, page in pages.items():
        tip = said_in(lang)["OFT_Train"]["inputs"]["resume"]["tooltip"]
        rows = (REPO / "web" / "docs" / page).read_text("utf-8").splitlines()
        row = next(row for row in rows if row.startswith("| `resume`"))
        for where, text in (("tooltip", tip), ("page", row)):
            assert all(n in re.findall(r"\d+", text) for n in kept) and "constant" in text, (lang, where, text)


def test_options_of_the_diffusion_model_say_so():
    for lang, words in (("en", ("diffusion model", "text encoders")), ("zh", ("扩散模型", "文本编码器"))):
        inputs = said_in(lang)["OFT_TrainConfig"]["inputs"]
        for name in ("target_modules", "exclude_modules", "conv_modules", "layers_to_transform"):
            assert any(w in inputs[name]["tooltip"] for w in words), (lang, name)
        assert "joint_blocks" in inputs["layers_pattern"]["tooltip"], lang
    own = a_run(config={"target_modules": "to_q", "text_encoder_lr": 0.01}).plan.parts()
    assert "self_attn" in own["te"].target_modules, "the tooltips are wrong"


def test_help_pages_lead_to_what_their_readers_have():
    """The published pack leaves out what .comfyignore names: pages lead there by the repository's address."""
    left_out = [line.strip("/\n") for line in (REPO / ".comfyignore").read_text("utf-8").splitlines() if line.strip()]
    address = re.search(r'^Repository = "(.+)"', (REPO / "pyproject.toml").read_text("utf-8"), re.MULTILINE)[1]
    texts = [*(REPO / "web").rglob("*.md"), *(REPO / "locales").rglob("*.json")]
    found = 0
    for path in texts:
        text = path.read_text("utf-8")
        for match in re.finditer(rf"(?<![\w/])(?:{'|'.join(map(re.escape, left_out))})/[\w./]+", text):
            raise AssertionError(f"{path.relative_to(REPO)}: {match[0]}")
        for place in re.findall(re.escape(address) + r"/blob/main/([\w./-]+\w)", text):
            assert (REPO / place).is_file(), (path, place)
            found += 1
    assert found >= 4, found
