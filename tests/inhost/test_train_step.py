"""Training: what a step does."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import comfy.model_sampling
import comfy.sd
import comfy.supported_models
import comfy.utils
import families
import folder_paths
import torch
from comfyui_oft.nodes import dataset
from comfyui_oft.nodes.binding import apply as host
from comfyui_oft.nodes.training import host as train_host
from comfyui_oft.nodes.training import mode as train_mode
from comfyui_oft.nodes.training import run as train_run
from comfyui_oft.oft_core import Strength
from comfyui_oft.oft_core.training import (
    ConfigError,
)
from comfyui_oft.oft_core.training import blocks as train_blocks
from learning import (
    a_run,
    a_set,
    fixed_loss,
    fresh_user,
    go,
    learnt,
    merged,
    parts,
    pictures,
    raises,
    replaced,
    same,
    state,
    untouched,
    zeros,
)
from PIL import Image
from safetensors.torch import load_file

from dev.inprocess import work_dir


def test_checkpointing_changes_nothing():
    """Blocks of several families add to their input in place: computed twice they must start from the same."""
    for family in ("sd15", "sd3", "flux"):
        losses = []
        for low_vram in ("off", "checkpointing"):
            fresh_user()
            run = a_run(family, low_vram=low_vram, config={"prior": "none"})
            outcome = go(run)
            losses.append((outcome.losses, learnt(outcome)))
        blocks = train_blocks.blocks_of(run.host.net)
        assert len(blocks) >= 2, [type(b).__name__ for b in blocks]
        # Gradients of values that are used twice are added in another order.
        for one, other in zip(losses[0][0], losses[1][0], strict=True):
            assert abs(one - other) < 2e-6 * one, f"{family}: {losses[0][0]} {losses[1][0]}"
        for key, one in losses[0][1].items():
            assert torch.allclose(one.float(), losses[1][1][key].float(), atol=2e-4), f"{family} {key}"


def test_partly_loaded_models_train():
    """Weights that are copied when they are used, patches of earlier nodes included, give the same as merged ones."""
    fresh_user()
    first = go(a_run(config={"conv_modules": "all-conv"}))
    outcomes = []
    for low_vram in ("off", "offload"):
        fresh_user()
        with torch.inference_mode():
            model = families.make_model("sd15")
            patched = host.apply(first.adapter, model, None, Strength(1.0), Strength(1.0)).model
        run = a_run(
            of_parts=(patched, *parts("sd15")[1:]), low_vram=low_vram, config={"conv_modules": "all-conv"}
        )
        base = run.host.base

        def partly(models, *args, base=base, **options):
            ours = [m for m in models if m.model is base]
            if len(ours) < len(models):
                whole([m for m in models if m not in ours], *args, **options)
            for m in ours:
                if not base.model_lowvram:
                    m.patch_model(torch.device("cpu"), lowvram_model_memory=1)

        if low_vram == "offload":
            with replaced(comfy.model_management, "load_models_gpu", partly) as whole:
                outcomes.append(go(run))
                assert base.model_lowvram
        else:
            outcomes.append(go(run))
    for a, b in zip(outcomes[0].losses, outcomes[1].losses, strict=True):
        assert abs(a - b) < 1e-5, f"{outcomes[0].losses} {outcomes[1].losses}"
    unpatched = go(a_run(config={"conv_modules": "all-conv"}))
    assert abs(unpatched.losses[0] - outcomes[0].losses[0]) > 1e-4


def test_captions_of_a_batch_are_not_combined():
    of = a_set(captions=["a red cat", "a long story of a blue dog " * 20])
    for family in ("sd15", "sdxl", "flux"):
        run = a_run(family, of)
        with torch.inference_mode(), train_mode.training_mode(), torch.no_grad():
            run.host.encode_pictures(of)
            run.host.encode_texts([*(r.caption for r in of.records), ""])
            run.host.load()
            records = list(of.records)
            loaded = run.host.load_batch(records)
            noised = run.objective.noised(loaded.latents, 0, 0, [0, 1])
            together = run.host.predict(noised, records)
            for i, record in enumerate(records):
                alone = run.objective.noised(loaded.latents[i : i + 1], 0, 0, [i])
                one = run.host.predict(alone, [record])
                assert torch.allclose(one[0], together[i], atol=2e-5), f"{family} {i}"
            swapped = run.host.predict(noised, records[::-1])
        assert not torch.allclose(swapped, together, atol=1e-3), "the captions have no effect"


def test_targets_are_the_hosts_own():
    """A model that answers with the exact target is turned back into the clean latent by the host's sampling."""
    for family in ("sd15", "sd3", "flux"):
        run = a_run(family)
        x0 = torch.randn(2, 4, 8, 8)
        noised = run.objective.noised(x0, 1, 1, [0, 1])
        x = run.host.sampling.noise_scaling(noised.sigma, noised.noise.clone(), noised.x0)
        target = run.objective.target(noised)
        back = run.host.sampling.calculate_denoised(noised.sigma, target, x)
        assert torch.allclose(back, x0, atol=1e-4), family
        # sigmas lie on the model's own schedule
        assert float(noised.sigma.max()) <= float(run.host.sampling.sigma_max) * 1.001
    assert [a_run(f, config={"sample_cfg": 0.0}).plan.samples.cfg for f in ("sd15", "flux")] == [5.0, 1.0]
    shift = a_run("flux").objective.shift
    assert abs(shift - 2.718281828**1.15) < 0.02, shift


def test_the_network_sees_the_noised_latent():
    """In every family the network's own input is signal * picture + spread * noise."""
    for family in ("sd15", "sd3", "flux"):
        run = a_run(family)
        seen = []
        with torch.inference_mode(), train_mode.training_mode(), torch.no_grad():
            run.host.encode_pictures(run.dataset)
            run.host.encode_texts([r.caption for r in run.dataset.records])
            run.host.load()
            records = list(run.dataset.records)
            noised = run.objective.noised(run.host.load_batch(records).latents, 5, 0, [0, 1])
            hook = run.host.net.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[:2]))
            try:
                run.host.predict(noised, records)
            finally:
                hook.remove()
        assert torch.allclose(seen[0][0], noised.x_t, atol=1e-4), family
        count = 1 if family == "flux" else 1000
        assert torch.allclose(seen[0][1].float(), noised.timestep.float() * count / 1000, atol=1.0), family


def test_latents_pass_process_latent_in():
    run = a_run("flux")
    with torch.inference_mode(), train_mode.training_mode(), torch.no_grad():
        run.host.encode_pictures(run.dataset)
        image, _ = run.dataset.load(run.dataset.records[0])
        raw = run.host.vae.encode(image.unsqueeze(0))
        mine = next(iter(run.host.latents.values()))
        expected = run.host.base.process_latent_in(raw.clone())
    assert torch.allclose(mine, expected, atol=1e-5) and not torch.allclose(mine, raw, atol=1e-2)


def test_random_latents_are_the_same_again():
    """Some VAEs draw their latents at random, from torch's common generator."""
    vae = parts("sd15")[2]
    with replaced(vae, "encode", vae.encode) as encode:
        vae.encode = lambda image: (x := encode(image)) + torch.randn_like(x)
        runs = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            fresh_user()
            runs.append(a_run())
            with torch.inference_mode(), train_mode.training_mode():
                runs[-1].host.encode_pictures(runs[-1].dataset)
    same(*(dict(enumerate(r.host.latents.values())) for r in runs))


def test_buckets_and_batches():
    fresh_user()
    of = a_set(
        pictures=[pictures(2, (64, 128)), pictures(2, (128, 64)), pictures(1, (128, 128))],
        resolution=128,
        flips=True,
    )
    assert {r.bucket for r in of.records} == {(128, 64), (64, 128), (128, 128)} and len(of.records) == 10
    run = a_run(of=of, steps=4, config={"batch_size": 2, "accumulation": 2})
    outcome = go(run)
    assert {tuple(t.shape[-2:]) for t in run.host.latents.values()} == {(8, 16), (16, 8), (16, 16)}
    assert outcome.samples.shape[1:3] in ((64, 128), (128, 64))
    sheet = dataset.contact_sheet(of)
    assert sheet.shape[0] == 1 and sheet.shape[2] == 5 * dataset.TILE and "128 x 64: 2" in dataset.summary(of)


def test_masked_parts_do_not_count():
    """Two sets that differ only where the mask is black learn the same; without masks they do not."""
    base = pictures(1)
    other = base.clone()
    other[:, :, 32:] = 1 - other[:, :, 32:]
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :16] = 1
    run = a_run(of=a_set(pictures=[base], masks=[mask]))
    with torch.inference_mode(), train_mode.training_mode():
        run.host.encode_pictures(run.dataset)
    loaded = run.host.load_batch([run.dataset.records[0]])
    assert (
        loaded.mask.shape == (1, 1, 8, 8)
        and loaded.mask[..., :2].min() == 1
        and loaded.mask[..., 2:].max() == 0
    )
    fresh_user()
    masked = go(a_run(of=a_set(pictures=[base], masks=[mask]))).losses
    plain = go(a_run(of=a_set(pictures=[base]))).losses
    assert masked != plain
    # Transparency is a mask as well.
    rgba = torch.cat([base, mask.unsqueeze(-1)], -1)
    assert go(a_run(of=a_set(pictures=[rgba]))).losses == masked
    assert not a_set(pictures=[torch.cat([base, torch.ones(1, 64, 64, 1)], -1)]).records[0].has_mask


def test_pictures_of_which_nothing_counts_are_refused():
    import nodes

    root = Path(folder_paths.get_input_directory())
    Image.new("RGB", (64, 64), "red").save(root / "opaque.png")
    whole = pictures(2)
    with torch.inference_mode():
        image, mask = nodes.LoadImage().load_image("opaque.png")
    said = raises(ConfigError, lambda: a_set(pictures=[image], masks=[mask]), "picture 1", "invert that mask")
    assert "black everywhere" in said
    assert a_set(pictures=[image], masks=[1 - mask]).records[0].has_mask
    masks = torch.ones(2, 64, 64)
    masks[1] = 0
    raises(ConfigError, lambda: a_set(pictures=[whole], masks=[masks]), "picture 2", "black everywhere")
    raises(ConfigError, lambda: a_set(pictures=[whole], masks=[masks[1:]]), "picture 1", "black everywhere")
    # White only where the picture is cut off.
    edge = torch.zeros(1, 64, 136)
    edge[..., :8] = 1
    wide = {"pictures": [pictures(1, (64, 136))], "masks": [edge]}
    raises(ConfigError, lambda: a_set(**wide, buckets=False), "picture 1", "64 x 64", "in the middle")
    assert a_set(**wide, resolution=128).records[0].has_mask
    # Transparency, over a link and in a folder.
    clear = torch.cat([whole, masks.unsqueeze(-1)], -1)
    said = raises(ConfigError, lambda: a_set(pictures=[clear]), "picture 2", "transparent everywhere")
    assert "Load Image" not in said
    (root / "clear").mkdir()
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(root / "clear" / "a.png")
    raises(ConfigError, lambda: a_set(folder="clear"), "a.png", "transparent everywhere")
    assert a_set(folder="clear", masks=[masks[:1]]).records[0].has_mask, "a connected mask goes before it"


def test_class_is_kept():
    fresh_user()
    of = a_set(class_prompt="a photo of a dog")
    run = a_run(of=of, config={"prior": "pictures", "class_pictures": 2}, steps=3)
    with_pictures = go(run)
    shapes = [tuple(t.shape) for p in run.store.folder.iterdir() for t in load_file(p).values()]
    assert shapes.count((2, 4, 8, 8)) == 1, shapes
    drawn = []
    sample = train_host.HostModel.sample_latent
    with replaced(train_host.HostModel, "sample_latent", lambda *a: drawn.append(a[1]) or sample(*a)):
        go(a_run(of=of, config={"prior": "pictures", "class_pictures": 2}, steps=4))
    assert "a photo of a dog" not in drawn, "class pictures were drawn again"
    match = go(a_run(of=of, steps=3))
    none = go(a_run(of=of, config={"prior": "none"}, steps=3))
    assert with_pictures.losses != match.losses != none.losses
    # At the first step the model is unchanged, so its own prediction is matched exactly.
    assert match.losses[0] == none.losses[0] and with_pictures.losses[0] > none.losses[0]


def test_the_largest_seed_draws_class_pictures():
    fresh_user()
    of = a_set(class_prompt="a photo of a dog")
    seeds = []
    sample = train_host.HostModel.sample_latent
    with replaced(train_host.HostModel, "sample_latent", lambda *a: seeds.append(a[4]) or sample(*a)):
        go(a_run(of=of, steps=1, seed=2**64 - 1, config={"prior": "pictures", "class_pictures": 2, "sample_seed": 5}))
    assert seeds[:2] == [2**64 - 1, 0], seeds


def other_sampling(family):
    """A family's model, and a clone that a node makes sample in another way."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingSD3

    with torch.inference_mode():
        model = families.make_model(family)
        if family == "sd3":
            return model, ModelSamplingSD3().patch(model, 5.0)[0]
        return model, ModelSamplingDiscrete().patch(model, "v_prediction", True)[0]


def test_what_is_loaded_does_not_change_which_run_it_is():
    """ComfyUI swaps the way of sampling on the shared model while a clone with another one is loaded."""
    for family in ("sd15", "sd3"):
        of, (model, patched) = a_set(), other_sampling(family)

        def keys(family=family, of=of, models=(model, patched)):
            return [a_run(family, of, (m, *parts(family)[1:])).key for m in models]

        first = keys()
        assert first[0] != first[1], "another way of sampling is taken for the same run"
        for loaded in (patched, model):
            with torch.inference_mode():
                comfy.model_management.load_models_gpu([loaded])
            assert keys() == first, family
        comfy.model_management.unload_all_models()
        assert keys() == first, family


def test_class_pictures_are_of_the_models_way_of_sampling():
    """Drawn anew where it changes; not where only what is trained changes."""
    fresh_user()
    of, (model, patched) = a_set(class_prompt="a photo of a dog"), other_sampling("sd3")
    drawn = []
    sample = train_host.HostModel.sample_latent
    options = {"prior": "pictures", "class_pictures": 1}
    with replaced(train_host.HostModel, "sample_latent", lambda *a: drawn.append(a[1]) or sample(*a)):
        for expected, one, more in ((1, model, {}), (2, patched, {}), (2, patched, {"caption_dropout": 0.5})):
            of_parts = (one, *parts("sd3")[1:])
            go(a_run("sd3", of, of_parts, config={**options, **more}, steps=1))
            assert drawn.count("a photo of a dog") == expected, (drawn, more)
    # A run that goes on must not meet other class pictures than it began with.
    for prior, several in (("pictures", 2), ("match", 1)):
        steps = [{"prior": prior, "sample_steps": n} for n in (2, 3)]
        assert len({a_run("sd3", of, parts("sd3"), config=one).key for one in steps}) == several, prior


def test_captions_beside_pictures_hold_the_trigger():
    root = Path(folder_paths.get_input_directory()) / "captioned"
    root.mkdir()
    for name, text in (("a", "a [trigger] dog in snow"), ("b", "two desks"), ("c", "")):
        Image.new("RGB", (64, 64), "red").save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(text, "utf-8")
    said = [r.caption for r in a_set(folder="captioned", trigger="sks", instance_prompt="my [trigger] toy").records]
    assert said == ["a sks dog in snow", "sks, two desks", "my sks toy"], said


def test_the_trigger_stands_in_sample_prompts_too():
    options = {"sample_prompts": "[trigger] in a boat\na cat", "config": {"sample_negative": "not [trigger]"}}
    plan = a_run(of=a_set(trigger="sks"), **options).plan.samples
    assert plan.prompts == ("sks in a boat", "a cat") and plan.negative == "not sks", plan
    of = a_set(trigger="")
    plan = a_run(of=of, **options).plan.samples
    assert plan.prompts == ("in a boat", "a cat") and plan.negative == "not", plan
    # Without a word it is taken out of captions as well, which is said.
    assert of.records[0].caption == "a photo of"
    assert "[trigger] was taken out of 2 captions" in dataset.summary(of), dataset.summary(of)
    plain = a_set(trigger="", instance_prompt="a photo")
    assert "[trigger]" not in dataset.summary(plain) + dataset.summary(a_set())


def test_files_that_are_not_learnt_from_are_named():
    root = Path(folder_paths.get_input_directory()) / "mixed"
    root.mkdir()
    for name in ("a.jpg", "b.gif", "c.jfif"):
        Image.new("RGB", (64, 64), "red").save(root / name, format="GIF" if name == "b.gif" else "JPEG")
    (root / "a.txt").write_text("a cat", "utf-8")
    for name in ("._a.jpg", ".DS_Store", "Thumbs.db"):
        (root / name).write_bytes(b"\x00\x05\x16\x07")
    of = a_set(folder="mixed")
    assert len(of.records) == 3 and "left out" not in dataset.summary(of), dataset.summary(of)
    (root / "d.heic").write_bytes(b"")
    assert "1 file was left out: d.heic" in dataset.summary(a_set(folder="mixed"))
    for i in range(6):
        (root / f"e{i}.json").write_bytes(b"")
        (root / f"f{i}.caption").write_bytes(b"")
    said = dataset.summary(a_set(folder="mixed"))
    assert "7 files were left out: d.heic, e0.json, e1.json, e2.json, e3.json, …" in said, said
    assert "6 caption files belong to no picture: f0.caption, f1.caption" in said, said
    assert "1 of 3 pictures have captions of their own; the others have the instance prompt." in said, said
    assert a_set(folder="mixed").digest == of.digest


def test_a_folder_of_pictures_and_texts_stays_the_same_set():
    """Runs that were begun by earlier versions go on only with the digest that they had."""
    root = Path(folder_paths.get_input_directory()) / "plain"
    root.mkdir()
    Image.new("RGB", (96, 64), (200, 30, 60)).save(root / "a.png")
    Image.new("RGBA", (64, 96), (20, 130, 60, 128)).save(root / "b.png")
    Image.new("L", (64, 64), 90).save(root / "C 1.png")
    (root / "a.txt").write_text("a cat", "utf-8")
    options = {"folder": "plain", "resolution": 128, "bucket_step": 32}
    known = {"0a0df6019bf772f07348232d0e27a7146227ffbb053365a5f5c529037b214065": {}}
    known["da1fd10539dbd32285a0423d5484fd813f3cc5d27dab6131410fd30ca59e05b6"] = {
        "flips": True, "repeats": 3, "class_prompt": "a dog", "buckets": False,
    }  # fmt: skip
    for digest, more in known.items():
        assert a_set(**options, **more).digest == digest, more


def test_masks_beside_pictures_are_no_pictures():
    root = Path(folder_paths.get_input_directory()) / "masked"
    root.mkdir()
    base = dataset.to_pillow(pictures(1)[0])
    base.save(root / "1.png")
    plain = a_set(folder="masked")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 16, 64))
    mask.save(root / "1-masklabel.png")
    base.save(root / "1-condlabel.png")
    of = a_set(folder="masked")
    said = dataset.summary(of)
    assert "1 pictures, 1 with a mask" in said and "1 control picture is not used: 1-condlabel.png" in said, said
    assert of.digest != plain.digest
    # The same as the mask over a link, which goes before a file.
    connected = dataset.from_pillow(mask)[..., 0]
    over_link = a_set(pictures=[dataset.from_pillow(base)], masks=[connected])
    assert over_link.digest == of.digest
    assert all(torch.equal(a, b) for a, b in zip(of.load(of.records[0]), over_link.load(over_link.records[0]), strict=True))
    other = a_set(folder="masked", masks=[1 - connected])
    assert "Masks are connected, so mask files are not used: 1-masklabel.png" in dataset.summary(other)
    assert other.records[0].mask is None and of.records[0].mask.endswith("1-masklabel.png")
    assert torch.equal(other.load(other.records[0])[1], 1 - of.load(of.records[0])[1]) and other.digest != of.digest
    run = a_run(of=of)
    with torch.inference_mode(), train_mode.training_mode():
        run.host.encode_pictures(of)
    inside = run.host.load_batch(list(of.records)).mask
    assert inside[..., :2].min() == 1 and inside[..., 2:].max() == 0
    assert dataset.contact_sheet(of)[0, 100, 150].max() < 0.3, "what does not count is not dimmed"


def test_subfolders_with_repeats():
    """The summary as the node puts it out, and that the node runs again when something changes in a subfolder."""
    root = Path(folder_paths.get_input_directory()) / "kohya"
    for name in ("10_zwx dog/a.png", "10_zwx dog/b.png", "1_dog/a.png", "reg_dog/a.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (128, 64) if name.startswith("1_") else (64, 64), "red").save(root / name)
    (root / "10_zwx dog" / "A.TXT").write_text("asleep", "utf-8")
    node = dataset.OFTDatasetNode
    given = {"folder": ["kohya"], "trigger": ["zwx"], "resolution": [64], "instance_prompt": ["a photo of [trigger]"]}
    assert node.validate_inputs(folder=given["folder"]) is True
    of, said, sheet = node.execute(**given, captions=["\n\ntyped"]).args
    assert [r.caption for r in of.records] == ["zwx, asleep", "zwx dog", "zwx, typed"], of.records
    assert [r.repeats for r in of.records] == [10, 10, 1] and sheet.shape[2] == 3 * dataset.TILE
    for part in (
        "21 steps of one picture are one pass",
        "10_zwx dog (2 pictures, 10 times each), 1_dog (1 picture, 1 time each)",
        "1 subfolder was left out: reg_dog",
        "2 of 3 pictures have captions of their own; the others have the name of their subfolder.",
        "More than 20 % is cut off of 1 picture: 1_dog/a.png 50 %",
    ):
        assert part in said, said
    before = node.fingerprint_inputs(folder=["kohya"])
    for change in (
        lambda: (root / "1_dog" / "a.txt").write_text("!", "utf-8"),
        lambda: (root / "1_dog" / "a.txt").unlink(),
        lambda: (root / "10_zwx dog").rename(root / "9_zwx dog"),
        lambda: (root / "reg_dog").rename(root / "reg_cat"),
        lambda: Image.new("L", (64, 64), 255).save(root / "1_dog" / "a-masklabel.png"),
        lambda: Image.new("RGB", (64, 64)).save(root / "own.png"),
    ):
        change()
        after = node.fingerprint_inputs(folder=["kohya"])
        assert after != before, "a change is not seen"
        before = after
    said = dataset.summary(a_set(folder="kohya"))
    assert "1 pictures" in said and "subfolders were left out: 1_dog, 9_zwx dog, reg_cat" in said, said


def test_choices_that_match_no_layer_are_said():
    fresh_user()
    chosen = {"target_modules": "to_q, to_k, to_zz", "exclude_modules": "to_k, to_x", "text_encoder_lr": 0.01}
    report = go(a_run(steps=1, config={**chosen, "rank_pattern": '{"to_q": 2, "q_proj": 2, "zz": 2}'})).report
    said = [line for line in report.splitlines() if "matched no layer" in line]
    expected = [("target_modules", "to_zz"), ("exclude_modules", "to_x"), ("rank_pattern", "zz")]
    assert said == [f"Option '{o}': '{p}' matched no layer, so it has no effect." for o, p in expected], said
    # A preset can be left out by name.
    fresh_user()
    run = a_run(steps=1, config={"exclude_modules": "text-attention"})
    assert "matched no layer" not in go(run).report
    names = [c.name for c in run.bank.parts["unet"][1].layers]
    assert names and not any("attn2.to_k" in n for n in names) and any("attn1.to_k" in n for n in names)


def test_block_numbers_count_in_named_lists():
    config = {"target_modules": "qkv", "layers_to_transform": "0"}
    raises(ConfigError, lambda: go(a_run("sd3", config=config)), "layers_to_transform", "layers_pattern", "joint_blocks")
    fresh_user()
    run = a_run("sd3", steps=1, config={**config, "layers_pattern": "input_blocks, joint_blocks"})
    report = go(run).report
    assert {c.name.split(".")[1] for c in run.bank.parts["unet"][1].layers} == {"0"}
    assert "'layers_pattern': 'input_blocks' matched no layer" in report, report


def test_what_is_left_to_the_model():
    """A loss scale of 1 that was typed in is no default, and a distilled model is sampled without CFG."""
    of = a_set()
    for given, usual in (({}, True), ({"loss_scale": 0.0}, True), ({"loss_scale": 1.0}, False)):
        assert a_run(of=of, config=given).plan.usual_loss_scale is usual, given

    def usual_cfg(kind, embed):
        base = SimpleNamespace(model_config=kind({}))
        net = SimpleNamespace(params=SimpleNamespace(guidance_embed=embed))
        return train_host.HostModel.usual_cfg.fget(SimpleNamespace(base=base, net=net))

    flux = comfy.supported_models
    assert [usual_cfg(flux.Flux, True), usual_cfg(flux.SD3, False)] == [1, 5]


def test_a_model_distilled_to_few_steps_is_known_and_said(monkeypatch):
    """By the name of its file; samples are drawn without CFG, and the report says what helps."""
    fresh_user()
    config = {"sample_cfg": 0.0}
    assert a_run(config=config, steps=2).plan.samples.cfg == 5
    file = Path(tempfile.mkdtemp(dir=work_dir())) / "sd_turbo_lightning.safetensors"
    file.write_bytes(b"a checkpoint")
    monkeypatch.setattr(train_run, "model_file", lambda *_: file)
    run = a_run(config=config, steps=2)
    assert run.plan.samples.cfg == 1
    assert "distilled to few steps ('turbo')" in go(run).report


def test_text_encoders_train():
    for family, low_vram in (("sd15", "checkpointing"), ("sdxl", "off")):
        fresh_user()
        clip = parts(family)[1]
        before = state(clip.patcher)
        run = a_run(family, steps=3, config={"text_encoder_lr": 0.02}, low_vram=low_vram)
        outcome = go(run)
        same(before, state(clip.patcher))
        untouched(clip.cond_stage_model)
        moved = [float(p.detach().abs().max()) for p in run.bank.groups()["te"]]
        assert moved and min(moved) > 0, moved
        assert {"te1", "unet"} <= set(outcome.adapter.components), outcome.adapter.components
        with torch.inference_mode():
            applied = host.apply(outcome.adapter, *parts(family)[:2], Strength(1.0), Strength(1.0))
        assert "te1" in applied.report.lower() or "text" in applied.report.lower()
        # Samples are drawn with the encoders as they are trained, not with embeddings of before.
        plan, vae = run.plan.samples, parts(family)[2]
        with torch.inference_mode(), train_mode.training_mode(), torch.no_grad():
            drawn = [
                vae.decode(one.sample_latent(plan.prompts[0], plan, (64, 64), plan.seed))[0]
                for one in (
                    train_host.HostModel(applied.model, applied.clip, vae),
                    train_host.HostModel(applied.model, clip, vae),
                )
            ]
        off, other = ((picture - outcome.samples[-1]).abs().mean() for picture in drawn)
        assert off < 0.2 * other, f"{family}: {off:.5f}, with untrained encoders {other:.5f}"


def test_models_in_dynamic_vram_train_another_way():
    """Weights that ComfyUI lends to one forward at a time are not trained through; unchanged where none are."""
    model, clip, vae = parts("sd15")

    def dynamic(patcher, init):
        out = patcher.clone()
        out.is_dynamic, out.cached_patcher_init = (lambda: True), init
        out.clone = lambda disable_dynamic=False: patcher if disable_dynamic else out
        return out

    clip_of_later_hosts = clip.clone()
    for init in (None, (object, ())):
        late = dynamic(model, init)
        clip_of_later_hosts.patcher = dynamic(clip.patcher, init)
        clip_of_later_hosts.clone = lambda: clip_of_later_hosts
        if init is None:
            raises(ConfigError, lambda late=late: train_host.HostModel(late, clip, vae), "dynamic VRAM", "loader")
            encoders = (model, clip_of_later_hosts, vae)
            raises(ConfigError, lambda of=encoders: train_host.HostModel(*of, train_encoders=True), "dynamic VRAM")
        else:
            made = train_host.HostModel(late, clip_of_later_hosts, vae, train_encoders=True)
            assert made.patcher is model and made.clip.patcher is clip.patcher
            assert made.encoders is clip.patcher.model
            clip_of_later_hosts.patcher = late_clip = dynamic(clip.patcher, init)
            assert train_host.HostModel(late, clip_of_later_hosts, vae).clip.patcher is late_clip


def test_t5_trains():
    """T5 with its own learning rate, alone and beside CLIP; its layers are in the file and act."""
    for family, config in (("sd3", {"t5_lr": 0.03}), ("flux", {"t5_lr": 0.03, "text_encoder_lr": 0.01})):
        fresh_user()
        clip = parts(family)[1]
        before = state(clip.patcher)
        # The diffusion model as good as stands still: whatever falls is the encoders' work.
        run = a_run(family, steps=8, learning_rate=1e-7, config=config, low_vram="checkpointing")
        outcome = go(run)
        same(before, state(clip.patcher))
        untouched(clip.cond_stage_model)
        groups = run.bank.groups()
        assert set(groups) == {"unet", "t5"} | ({"te"} if "text_encoder_lr" in config else set())
        assert min(float(p.detach().abs().max()) for p in groups["t5"]) > 0.01
        was, now = fixed_loss(run, zeros(run.bank)), fixed_loss(run, None)
        assert now < was - 0.002 * was, f"{family}: {was:.5f}, then {now:.5f}"
        assert "te3" in outcome.adapter.components and ("te1" in outcome.adapter.components) == ("te" in groups)
        with torch.inference_mode():
            turned = merged(
                host.apply(outcome.adapter, *parts(family)[:2], Strength(1.0), Strength(1.0)).clip.patcher
            )
        moved = [k for k in before if k in turned and not torch.equal(turned[k], before[k])]
        assert sum("SelfAttention" in k for k in moved) == 12, moved
    raises(ConfigError, lambda: go(a_run("sd15", config={"t5_lr": 0.01})), "T5", "t5_lr")
