"""Tags in prompts on every stand-in host: what the model's weights are then, and that the base comes back."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from .conftest import close, equal

PROMPT = "a photo"


def test_a_tag_is_the_merged_checkpoint(web):
    path = web.oft("koala")
    base = web.drawn(PROMPT)
    assert close(web.drawn("a photo <oft:koala:1>"), web.merged((path,)))
    assert close(web.drawn("a photo <oft:koala>"), web.merged((path,))), "without a number: 1"
    assert equal(web.drawn(PROMPT), base), "the base comes back bit for bit"


@pytest.mark.parametrize("value", [-1.0, 0.5, 2.0])
def test_strengths_stay_rotations(web, value):
    path = web.oft("koala")
    assert close(web.drawn(f"<oft:koala:{value}>"), web.merged((path, value)))


def test_strength_0_changes_nothing(web):
    web.oft("koala")
    assert equal(web.drawn("<oft:koala:0>"), web.drawn(PROMPT))


def test_the_words_of_a_tag(web):
    path = web.oft("koala")
    found = web.drawn("<oft:koala:te=0:unet=0.5:mode=geodesic:coft=hold>")
    expected = web.merged((path, 0.5, "geodesic", "hold")) | {
        k: v for k, v in web.drawn(PROMPT).items() if k.startswith("cond_stage_model")
    }
    assert close(found, expected)
    only = web.drawn("<oft:koala:1:blocks=all=0, middle=1>")
    changed = {k for k, v in web.drawn(PROMPT).items() if not torch.equal(v, only[k])}
    assert changed == {"model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"}


def test_two_numbers_are_text_encoders_and_diffusion_model_as_with_loras(web):
    web.oft("koala")
    assert equal(web.drawn("<oft:koala:0.3:0.8>"), web.drawn("<oft:koala:te=0.3:unet=0.8>"))


def test_settings_give_mode_and_limit(web):
    path = web.oft("koala", degrees=60)
    web.modules.shared.opts.data |= {"oft_mode": "linear", "oft_coft": "10"}
    assert close(web.drawn("<oft:koala:0.5>"), web.merged((path, 0.5, "linear", 10.0)))
    assert close(web.drawn("<oft:koala:0.5:mode=rotation:coft=off>"), web.merged((path, 0.5, "rotation", "off")))
    web.modules.shared.opts.data |= {"oft_coft": "a lot"}
    _, p = web.picture("<oft:koala:0.5>")
    assert any("Unknown COFT choice" in text and "Settings" in text for text in p.comments)


def test_two_files_act_in_the_order_of_the_prompt(web):
    one, two = web.oft("one", seed=1), web.oft("two", seed=2)
    first, second = web.merged((one,), (two,)), web.merged((two,), (one,))
    assert not close(first, second), "the order makes a difference"
    assert close(web.drawn("<oft:one:1> and <oft:two:1>"), first)
    assert close(web.drawn("<oft:two:1> and <oft:one:1>"), second)


def test_a_file_twice_acts_twice(web):
    path = web.oft("koala")
    assert close(web.drawn("<oft:koala:1><oft:koala:1>"), web.merged((path,), (path,)))


def _added(weights, delta, strength=1.0):
    return {k: v.float() + strength * delta[k] if k in delta else v for k, v in weights.items()}


def test_the_order_among_loras_and_ours(web):
    path, delta = web.oft("koala"), web.lora("ink")
    base = web.drawn(PROMPT)
    turned_last = web.drawn("<lora:ink:0.5><oft:koala:1>")
    added_last = web.drawn("<oft:koala:1><lora:ink:0.5>")
    assert close(added_last, _added(web.merged((path,)), delta, 0.5))
    save_file({k: v.contiguous() for k, v in _added(base, delta, 0.5).items()}, web.base)
    assert close(turned_last, web.merged((path,)))
    assert not close(turned_last, added_last)
    assert close(web.drawn("<lora:ink:0.5>"), _added(base, delta, 0.5)), "the LoRA alone again"
    assert equal(web.drawn(PROMPT), base)


def test_between_two_loras(web):
    path = web.oft("koala")
    ink, oil = web.lora("ink", 1), web.lora("oil", 2)
    found = web.drawn("<lora:ink:1><oft:koala:1><lora:oil:1>")
    base = web.drawn(PROMPT)
    save_file({k: v.contiguous() for k, v in _added(base, ink).items()}, web.base)
    assert close(found, _added(web.merged((path,)), oil))


def test_each_pass_has_its_own_tags(web):
    path = web.oft("koala")
    base = web.drawn(PROMPT)
    (first, hires), p = web.picture("<oft:koala:1>", "<oft:koala:0.5>")
    assert close(first, web.merged((path,))) and close(hires, web.merged((path, 0.5)))
    (first, hires), _ = web.picture("<oft:koala:1>", PROMPT)
    assert close(first, web.merged((path,))) and equal(hires, base)
    (first, hires), p = web.picture(PROMPT, "<oft:koala:1>")
    assert equal(first, base) and close(hires, web.merged((path,)))
    assert p.extra_generation_params["OFT hashes"].startswith("koala: ")


def test_each_pass_has_its_own_order(web):
    one, two = web.oft("one", seed=1), web.oft("two", seed=2)
    (first, hires), _ = web.picture("<oft:one:1><oft:two:1>", "<oft:two:1><lora:none:1><oft:one:1>")
    assert close(first, web.merged((one,), (two,))) and close(hires, web.merged((two,), (one,)))
    delta = web.lora("ink")
    base = web.drawn(PROMPT)
    (first, hires), _ = web.picture("<lora:ink:1><oft:one:1>", "<oft:one:1><lora:ink:1>")
    assert close(hires, _added(web.merged((one,)), delta))
    save_file({k: v.contiguous() for k, v in _added(base, delta).items()}, web.base)
    assert close(first, web.merged((one,)))


def test_batches_and_series(web):
    path = web.oft("koala")
    drawn, _ = web.picture("<oft:koala:1>", batch_size=2, n_iter=3)
    assert len(drawn) == 3 and all(close(each, web.merged((path,))) for each in drawn)


def test_the_base_without_extra_networks(web):
    web.oft("koala")
    base = web.drawn(PROMPT)
    web.drawn("<oft:koala:1>")
    (found,), _ = web.picture("<oft:koala:1>", disable_extra_networks=True)
    assert equal(found, base)


def test_a_file_that_was_replaced_acts_at_once(web):
    web.oft("koala", seed=1)
    web.drawn("<oft:koala:1>")
    path = web.oft("koala", seed=5)
    os.utime(path, ns=(5, 5))
    assert close(web.drawn("<oft:koala:1>"), web.merged((path,)))


def test_nothing_is_done_again_for_the_same_tags(web_of):
    web = web_of("forge")
    web.oft("koala")
    web.drawn("<oft:koala:1>")
    merges = web.sd_model.forge_objects.unet.lora_loader.merges
    web.drawn("another prompt, same tag <oft:koala:1>")
    assert web.sd_model.forge_objects.unet.lora_loader.merges == merges


def test_forge_asks_in_every_step_where_it_keeps_fp8(web_of):
    web = web_of("forge")
    path = web.oft("koala")
    base = web.drawn(PROMPT)
    import backend.args

    web.monkeypatch.setitem(backend.args.dynamic_args, "online_lora", True)
    web.sd_model.forge_objects_original.unet.model.storage_dtype = torch.float8_e4m3fn
    merged = web.merged((path,))
    for _ in range(2):
        assert close(web.drawn("<oft:koala:1>"), merged)
    loader = web.sd_model.forge_objects.unet.lora_loader
    assert not loader.backup and loader.online, "no weight was written"
    assert equal(web.drawn(PROMPT), base)


def test_a1111_composes_where_it_keeps_fp8(web_of):
    web = web_of("a1111")
    one, two, delta = web.oft("one", seed=1), web.oft("two", seed=2), web.lora("ink")
    for module in web.sd_model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.fp16_weight = module.weight.detach().clone()
    found = web.drawn("<oft:one:1><oft:two:1>")
    assert close(found, web.merged((one,), (two,)))
    assert close(web.drawn("<oft:one:1><lora:ink:1>"), _added(web.merged((one,)), delta))


def test_a_nunchaku_model_is_refused_by_name(web_of):
    web = web_of("neo")
    web.oft("koala")
    import backend.args

    web.monkeypatch.setattr(backend.args.dynamic_args, "nunchaku", True)
    _, p = web.picture("<oft:koala:1>")
    assert any("nunchaku" in text for text in p.comments)
    assert p.extra_generation_params["OFT not applied"] == "<oft:koala:1>"


def test_lora_tags_read_oft_files_only_if_the_settings_say_so(web):
    path = web.oft("koala")
    web.lora("ink")
    os.rename(path, web.loras / path.name)
    path = web.loras / path.name
    base = web.drawn(PROMPT)
    assert equal(web.drawn("<lora:koala:1>"), base)
    web.modules.shared.opts.data["oft_lora_tags"] = True
    assert close(web.drawn("<lora:koala:1>"), web.merged((path,)))
    both = web.drawn("<lora:ink:1><lora:koala:1>")
    assert equal(both, web.drawn("<lora:ink:1><oft:koala:1>")), "a LoRA stays one"


def test_in_place_of_what_the_host_made_of_it(web):
    path = web.oft("koala")
    web.lora("koala")  # the host knows something of this name too
    web.modules.shared.opts.data["oft_lora_tags"] = True
    assert close(web.drawn("<lora:koala:1>"), web.merged((path,)))


def test_a1111_turns_torchs_own_attention(web_of):
    web = web_of("a1111")
    web.use_openclip()
    path = web.folder / "clip.safetensors"
    random, width = torch.Generator().manual_seed(4), 32
    tensors = {}
    for i in range(2):
        for name, rows in (("self_attn_q_proj", width), ("self_attn_v_proj", width), ("self_attn_out_proj", width), ("mlp_fc1", 64)):
            if (i, name) != (1, "self_attn_v_proj"):  # not every third has to be there
                layer = f"lora_te_text_model_encoder_layers_{i}_{name}"
                tensors[f"{layer}.oft_blocks"] = torch.randn(rows // 8, 8, 8, generator=random) * 0.1
                tensors[f"{layer}.alpha"] = torch.tensor(0.0)
    save_file(tensors, path, {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "diag-oft"}'})
    base = web.drawn(PROMPT)
    merged = web.merged((path,))
    changed = {key for key, value in merged.items() if not torch.equal(value, base[key].float())}
    assert "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight" in changed
    assert close(web.drawn("<oft:clip:1>"), merged)
    assert close(web.drawn("<oft:clip:1><oft:clip:-0.5>"), web.merged((path, 1.0), (path, -0.5)))
    assert equal(web.drawn(PROMPT), base)


def test_files_that_depend_on_the_models_own_weights(web):
    """DoRA's row norms and PSOFT's directions are those of the unpatched weight, also beside another file."""
    random = torch.Generator().manual_seed(7)
    name = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    width = web.drawn(PROMPT)[key].shape[1]
    save_file({f"{name}.psoft_R.weight": 0.5 * torch.randn(28, generator=random)}, web.folder / "own.safetensors")
    dora = {f"{name}.oft_R.weight": 0.1 * torch.randn(width // 8, 28, generator=random)}
    save_file(dora | {f"{name}.dora_scale": 2 + torch.rand(width, 1, generator=random)}, web.folder / "dora.safetensors")
    base = web.drawn(PROMPT)
    for oft in ("own", "dora"):
        path = web.folder / f"{oft}.safetensors"
        assert close(web.drawn(f"<oft:{oft}:0.7>"), web.merged((path, 0.7)))
        assert not torch.equal(web.drawn(f"<oft:{oft}:0.7>")[key], base[key])
    assert equal(web.drawn(PROMPT), base)


def test_the_hosts_autocast_changes_nothing(web):
    """Web UIs draw under autocast, on a CPU in bfloat16."""
    path = web.oft("koala")
    with torch.autocast("cpu", torch.bfloat16):
        found = web.drawn("<oft:koala:0.6>")
    assert close(found, web.merged((path, 0.6)))
