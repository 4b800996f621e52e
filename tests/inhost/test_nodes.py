"""Nodes: schemas, reports, errors."""

from __future__ import annotations

import asyncio
import json
import math
import re
from pathlib import Path

import comfy.hooks
import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import families
import folder_paths
import pytest
import torch
from comfyui_oft.nodes import compat, inspector, load, schedule, train
from comfyui_oft.nodes.binding import apply as host
from comfyui_oft.nodes.binding import folders
from comfyui_oft.nodes.binding import names as host_names
from comfyui_oft.nodes.binding import patch as host_patch
from comfyui_oft.oft_core import (
    AdapterError,
    ModelMismatch,
    Strength,
    StrengthError,
    read_tensors,
)
from patching import (
    ATTENTION,
    adapter_for,
    applied,
    close,
    diag_oft,
    generator,
    input_oft,
    loaded,
    raises,
    run_node,
    same,
    scheduled,
    sd15,
    shapes_of,
    state,
    weight_names,
    write,
)

from dev.inprocess import REPO


def test_entry_point_and_schemas():
    import comfyui_oft

    extension = asyncio.run(comfyui_oft.comfy_entrypoint())
    nodes = {n.GET_SCHEMA().node_id: n for n in asyncio.run(extension.get_node_list())}
    assert list(nodes) == [
        *("OFT_Load", "OFT_LoadModelOnly", "OFT_LoadAdapter", "OFT_Apply"),
        *("OFT_Stack", "OFT_ApplyStack", "OFT_Blocks", "OFT_Schedule", "OFT_Hook"),
        *("OFT_Dataset", "OFT_Train", "OFT_TrainConfig", "OFT_Save", "OFT_Inspect"),
    ]
    translations = {
        lang: json.loads((REPO / "locales" / lang / "nodeDefs.json").read_text("utf-8"))
        for lang in ("en", "zh")
    }
    for name, node in nodes.items():
        schema = node.GET_SCHEMA()
        node.GET_NODE_INFO_V1()
        assert schema.description and schema.category == "OFT"
        for lang, texts in translations.items():
            said = texts[name]
            assert set(said["inputs"]) == {i.id for i in schema.inputs}, (lang, name)
            assert len(said["outputs"]) == len(schema.outputs), (lang, name)
            for i in schema.inputs:
                assert i.tooltip and said["inputs"][i.id]["tooltip"], (lang, name, i.id)
                assert lang != "en" or said["inputs"][i.id]["tooltip"] == i.tooltip, (name, i.id)
            for n, o in enumerate(schema.outputs):
                assert o.tooltip and said["outputs"][str(n)]["tooltip"], (lang, name, n)
                assert lang != "en" or said["outputs"][str(n)]["tooltip"] == o.tooltip, (name, n)
            assert lang != "en" or (said["display_name"], said["description"]) == (
                schema.display_name,
                schema.description,
            )
        assert (REPO / "web" / "docs" / f"{name}.md").is_file() and (
            REPO / "web" / "docs" / name / "zh.md"
        ).is_file()
    mode = next(i for i in nodes["OFT_Load"].GET_SCHEMA().inputs if i.id == "mode")
    assert "core" in mode.options and "ComfyUI's own" in mode.tooltip


def test_advice_on_steps_is_the_guides():
    """The tooltip and the help page, in both languages, name the guide's numbers, and its steps are the default."""

    def numbers(text):
        return [float(n) for n in re.findall(r"\d+(?:\.\d+)?", text)]

    guide = (REPO / "docs" / "training.md").read_text("utf-8")
    usual = re.search(r"`subject`, (\d+) steps, learning rate ([\d.]+\d)", guide)
    hurry = re.search(r"In a hurry: (\d+) steps at ([\d.]+\d)", guide)
    steps, rate = (i for i in train.OFTTrain.GET_SCHEMA().inputs if i.id in ("steps", "learning_rate"))
    assert [steps.default, rate.default] == numbers(usual[0]), usual[0]
    expected = [5.0, 20.0, steps.default, *numbers(hurry[0])]  # for 5 to 20 pictures
    said = {}
    for lang, page in (("en", "OFT_Train.md"), ("zh", "OFT_Train/zh.md")):
        texts = json.loads((REPO / "locales" / lang / "nodeDefs.json").read_text("utf-8"))
        said[f"tooltip {lang}"] = texts["OFT_Train"]["inputs"]["steps"]["tooltip"]
        rows = (REPO / "web" / "docs" / page).read_text("utf-8").splitlines()
        said[f"page {lang}"] = next(row for row in rows if row.startswith("| `steps`"))
    for where, text in said.items():
        assert sorted(numbers(text)) == sorted(expected), (where, text, expected)


def test_newer_keywords_are_detected():
    class Old:
        def __init__(self, a):
            self.a = a

    class New:
        def __init__(self, a, advanced=False):
            self.a, self.advanced = a, advanced

    assert compat.entry(Old, a=1, advanced=True).a == 1
    assert compat.entry(New, a=1, advanced=True).advanced
    with pytest.raises(TypeError):
        compat.entry(Old, a=1, advancde=True)


def test_nodes_run():
    folders.register()
    model, clip = families.make_model("sd15"), families.make_clip("sd15")
    te = {
        f"lora_te_text_model_encoder_layers_0_self_attn_{p}.oft_blocks": torch.randn(
            96, 8, 8, generator=generator(i)
        )
        * 0.1
        for i, p in enumerate(("q_proj", "k_proj"))
    }
    write("oft", "both.safetensors", {**diag_oft(shapes_of(model, ATTENTION)), **te})
    out = run_node(
        load.OFTLoad,
        model=model,
        clip=clip,
        oft_name="both.safetensors",
        strength_model=0.8,
        strength_clip=0.0,
    )
    assert (
        out.args[0].patches and not out.args[1].patcher.patches and out.ui.as_dict()["text"][0] == out.args[2]
    )
    assert not model.patches
    only = run_node(load.OFTLoadModelOnly, model=model, oft_name="both.safetensors", strength_model=0.8)
    same(loaded(only.args[0]), loaded(out.args[0]), "model only")
    read = run_node(load.OFTLoadAdapter, oft_name="both.safetensors", alpha_rule="scaled")
    again = run_node(load.OFTApply, adapter=read.args[0], model=model, strength_model=0.8, strength_clip=1.0)
    same(loaded(again.args[0]), loaded(out.args[0]), "apply")
    text = run_node(load.OFTApply, adapter=read.args[0], clip=clip, strength_model=0.8, strength_clip=1.0)
    assert text.args[0] is None and len(text.args[1].patcher.patches) == 2
    limited = run_node(
        load.OFTLoadModelOnly,
        model=model,
        oft_name="both.safetensors",
        strength_model=4.0,
        coft="limit",
        coft_degrees=1.0,
    )
    key = next(iter(limited.args[0].patches))
    base, got = state(model)[key], loaded(limited.args[0])[key]
    assert 0 < float((got - base).norm() / base.norm()) <= 2 * math.sin(math.radians(0.5)) + 1e-4
    for value in (float("nan"), float("inf")):
        raises(
            StrengthError,
            lambda value=value: run_node(
                load.OFTLoadModelOnly, model=model, oft_name="both.safetensors", strength_model=value
            ),
        )


def test_bad_files():
    folders.register()
    model = sd15()
    good = diag_oft(shapes_of(model, ATTENTION))
    name = next(iter(good))
    path = write("oft", "cut.safetensors", good)
    path.write_bytes(path.read_bytes()[:-1000])
    write("oft", "nan.safetensors", {**good, name: torch.full_like(good[name], float("nan"))})
    stem = name.removesuffix(".oft_blocks")
    write(
        "oft",
        "lora.safetensors",
        {f"{stem}.lora_down.weight": torch.zeros(4, 32), f"{stem}.lora_up.weight": torch.zeros(32, 4)},
    )
    flux = {"lora_unet_double_blocks_0_img_attn_qkv.oft_blocks": torch.zeros(64, 144, 144)}
    write("oft", "flux.safetensors", flux)
    write("oft", "wide.safetensors", {name: torch.zeros(40, 8, 8), f"{stem}.alpha": torch.tensor(0.0)})
    (Path(folder_paths.models_dir) / "oft" / "empty.safetensors").write_bytes(b"")
    folder_paths.filename_list_cache.clear()
    said = {}
    for bad in ("cut", "nan", "lora", "flux", "wide", "empty"):

        def run(bad=bad):
            run_node(load.OFTLoadModelOnly, model=model, oft_name=f"{bad}.safetensors", strength_model=1.0)

        said[bad] = raises(AdapterError, run)
        assert f"{bad}.safetensors" in said[bad], said[bad]
    assert "lora" in said["lora"].lower() and "nan" in said["nan"].lower()
    assert "Flux" in said["flux"] and "Stable Diffusion 1" in said["flux"], said["flux"]
    assert not model.patches


def test_only_a_part_matches():
    model, clip = families.make_model("sd15"), families.make_clip("sd15")
    tensors = diag_oft(shapes_of(model, ("attn1.to_q",)))
    count = len(tensors) // 2
    tensors["lora_unet_no_such_layer.oft_blocks"] = torch.randn(4, 8, 8, generator=generator(0))
    done = applied(read_tensors(tensors, {}, name="part"), model)
    assert len(done.model.patches) == count and done.warnings and "no_such_layer" in done.report, done.report
    te = {
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.oft_blocks": torch.randn(
            96, 8, 8, generator=generator(1)
        )
        * 0.1
    }
    both = applied(
        read_tensors({**diag_oft(shapes_of(model, ("attn1.to_q",))), **te}, {}, name="both"), model
    )
    assert not both.warnings and "text encoder" in both.report, both.report
    text_only = read_tensors(te, {}, name="text.safetensors")
    assert applied(text_only, model, clip=clip).clip.patcher.patches
    assert "CLIP" in raises(ModelMismatch, lambda: applied(text_only, model))


def test_modes_that_are_not_defined():
    model = sd15()
    adapter = adapter_for(model, ATTENTION, make=input_oft)
    raises(StrengthError, lambda: applied(adapter, model, 0.5, "core"))
    strong = read_tensors(input_oft(shapes_of(model, ATTENTION), std=1.0), {}, name="strong")
    raises(StrengthError, lambda: applied(strong, model, 0.5))
    assert applied(strong, model, 1.0).model.patches and applied(strong, model, 0.5, "linear").model.patches


def reflecting(model):
    """A file of finished matrices that reflect, which have no power."""
    tensors = {}
    for key, (rows, _) in shapes_of(model, ("attn1.to_q",)).items():
        q = torch.linalg.qr(torch.randn(rows // 8, 8, 8, generator=generator(rows)))[0]
        q[:, :, 0] *= -torch.linalg.det(q).sign()[:, None]
        tensors["lora_unet_" + key[16:-7].replace(".", "_") + ".oft_diag"] = q
    return read_tensors(tensors, {}, name="reflects")


def test_strengths_that_come_later_are_checked_too():
    """By a schedule, by a hook's keyframes, or by a pack that adds patches by itself."""
    model = sd15()
    adapter = reflecting(model)
    strong = read_tensors(input_oft(shapes_of(model, ATTENTION), std=1.0), {}, name="strong")
    for file in (adapter, strong):
        raises(StrengthError, lambda file=file: applied(file, model, 0.5))
        assert applied(scheduled(file, "step 0:0, 0.5:1"), model).model.patches
        raises(StrengthError, lambda file=file: applied(scheduled(file, "linear"), model))
        raises(StrengthError, lambda file=file: applied(scheduled(file, "step 0:1, 0.5:-1"), model))

    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    for strength in (1.0, 0.5):
        frames = comfy.hooks.HookKeyframeGroup()
        frames.add(comfy.hooks.HookKeyframe(strength=1.0))
        frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=0.4))
        group = run_node(schedule.OFTCreateHook, adapter=adapter, strength_model=1.0, strength_clip=1.0).args[0]
        group.set_keyframes_on_hooks(frames)
        patcher = model.clone()
        if strength == 1:
            patcher.register_all_hook_patches(group, target)
            assert patcher.hook_patches
        else:
            raises(StrengthError, lambda p=patcher, g=group: p.register_all_hook_patches(g, target))

    side = host_names.model_side(model)
    patches = adapter.bind(host_names.HostIndex(side.shapes, side.aliases)).patches
    dictionaries, keeper = host_patch.make_patches(side, patches, "rotation", "file")
    later = model.clone()
    later.add_patches(dictionaries[0], 0.5)
    text = raises(StrengthError, lambda: loaded(later))
    assert any(p.module in text for p in patches) and keeper.batches


def test_a_second_model_of_a_merge_brings_its_turned_activations():
    one, two = sd15(0), sd15(1)
    adapter = adapter_for(two, ATTENTION)
    turned, base, own = loaded(applied(adapter, two).model), state(one), state(two)
    at = Strength()
    live = host.apply(adapter, two, None, at, at, "activations").model
    key = weight_names(two, ("attn1.to_q",))[0]
    lora = live.clone()
    lora.add_patches({key: ("diff", (torch.full_like(own[key], 0.1),))}, 1.0)
    for second, change in ((live, 0.0), (live.clone().clone(), 0.0), (lora, 0.1)):
        merged = one.clone()
        for name, value in second.get_key_patches("diffusion_model.").items():
            merged.add_patches({name: value}, 0.5, 0.5)
        got = loaded(merged)
        for name in shapes_of(two, ATTENTION):
            more = change if name == key else 0.0
            close(got[name], 0.5 * base[name] + 0.5 * (turned[name] + more), 1e-6)
    assert all(len(found) == 1 for found in live.get_key_patches().values()), "what the patcher asks for itself"


def test_a_merge_tells_what_it_cannot_take():
    """A schedule belongs to the model that it was set on."""
    import logging

    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("oft").addHandler(handler)
    try:
        model = sd15()
        adapter, at = adapter_for(model, ATTENTION), Strength()
        for how in ("weights", "activations"):
            for file, expected in ((adapter, 0), (scheduled(adapter, "linear"), 1)):
                told.clear()
                patched = host.apply(file, model, None, at, at, how).model.clone()
                patched.get_key_patches("diffusion_model.")
                assert sum("schedule" in text for text in told) == expected, (how, expected, told)
    finally:
        logging.getLogger("oft").removeHandler(handler)


def test_core_mode_repeats_the_hosts_loader():
    model = sd15()
    tensors = diag_oft(shapes_of(model, ATTENTION))
    adapter = read_tensors(tensors, {}, name="test")
    host_patches = comfy.lora.load_lora(dict(tensors), comfy.lora.model_lora_keys_unet(model.model, {}))
    for s in (0.5, -1.0, 2.0):
        theirs = model.clone()
        assert len(theirs.add_patches(host_patches, s)) == len(host_patches) > 20
        ours = loaded(applied(adapter, model, s, "core").model)
        expected = loaded(theirs)
        for key in expected:
            close(ours[key], expected[key], 5e-6)


def test_an_adapter_is_drawn_as_in_the_model_and_against_another():
    with torch.inference_mode():
        model = sd15()
    first, second = (adapter_for(model, seed=seed) for seed in (0, 1))
    alone = run_node(inspector.OFTInspect, adapter=first, model=model)
    picture, report, numbers = alone.args
    assert picture.shape[0] == 1 and picture.shape[2:] == (1200, 3) and picture.std() > 0.05
    assert "Largest angle" in report
    layers = json.loads(numbers)["layers_detail"]
    assert layers[0]["name"].startswith("diffusion_model.input_blocks") and layers[0]["learnt"]
    both = run_node(inspector.OFTInspect, adapter=first, against=second, model=model)
    assert both.args[0].shape[1] != picture.shape[1] and "likeness" in both.args[1]
    assert all(b["angle"] > 0 for b in json.loads(both.args[2])["against"])
