"""Every family that ComfyUI lists: what files call its layers, and which rows those names mean."""

from __future__ import annotations

import dataclasses
import re

import comfy.lora
import comfy.supported_models as supported
import every_family
import pytest
import torch
from comfyui_oft.nodes.binding import names as host_names
from comfyui_oft.nodes.training.prediction import UNSUITED
from comfyui_oft.oft_core import NameIndex, ShapeError, Strength, Target, guess_family, read_tensors
from comfyui_oft.oft_core.formats import write
from comfyui_oft.oft_core.place import place
from patching import applied, close, loaded, raises, rotated_out, state

from dev import families as measure

#: Where ComfyUI's table is wrong: family -> the names, and why.
HOST_IS_WRONG = {
    # Thirds of a matrix whose keys and values are narrower than its queries.
    "lumina2": re.compile(r"(?:diffusion_model\.|lycoris_).*attention[._]to_[kv]$"),
    # An MLP without a gate: the last rows belong to nobody.
    "flux2": re.compile(r".*single_transformer_blocks[._]\d+[._]proj_mlp$"),
}


@pytest.fixture(scope="module", params=every_family.available())
def subject(request) -> measure.Subject:
    return measure.subject(request.param)


def index_of(subject: measure.Subject) -> NameIndex:
    return NameIndex(host_names.shapes_of(subject.model))


def target(piece) -> Target:
    return Target(f"diffusion_model.{piece.path}.weight", piece.rows, piece.swap)


def test_every_entry_of_the_hosts_list_has_a_tiny_model():
    listed = {cls.__name__ for cls in supported.models}
    assert listed <= {family.host for family in every_family.FAMILIES.values()}
    assert set(measure.TITLES) == set(every_family.FAMILIES)
    assert len(every_family.available()) >= 68
    absent = [f.missing for f in every_family.FAMILIES.values() if f.missing]
    assert all(re.fullmatch(r"this ComfyUI has no \w+", reason) for reason in absent)


def test_it_samples(subject: measure.Subject):
    latent = every_family.sampled(subject.family)
    # The refiner's latents are packed when they enter and leave the model.
    assert latent.ndim == subject.family.latents().ndim and torch.isfinite(latent).all()


def test_every_spelling_leads_to_the_right_rows(subject: measure.Subject):
    for spelling in measure.SPELLINGS.values():
        right, count, wrong = measure.found(subject, spelling)
        assert right == count > 0, (spelling.title, wrong)
    covered = {piece.path for piece in subject.diffusers.values()}
    # Layers that diffusers, or ComfyUI's table of its names, does not have.
    beyond = {
        "sd_x4_upscaler": r"label_emb",
        "chroma_radiance": r"distilled_guidance_layer\..*|nerf_.*|img_in_patch",
        "stable_audio": r"timestep_features",
        "wan22_animate": r"motion_encoder\.dec\.direction",
    }.get(subject.family.name, "")
    if subject.diffusers:
        assert [path for path in subject.own if path not in covered and not re.fullmatch(beyond, path)] == []


turned: set[frozenset[str]] = set()


def test_rotations_are_exact(subject: measure.Subject):
    # Of several families with the same names the first is turned under all of them, the others under the authors'.
    names = frozenset((*subject.own, *subject.diffusers))
    spellings = [measure.SPELLINGS["original"]] if names in turned else measure.SPELLINGS.values()
    turned.add(names)
    for spelling in spellings:
        assert measure.exact(subject, spelling) == [], spelling.title


def test_the_committed_tables_say_what_is_measured(subject: measure.Subject):
    """What loads; that every family trains or is refused as the table says is test_train_every_family's matter."""
    counts = [column.measure(subject) for column in measure.LOADING[:-1]]
    family = subject.family
    refused = family.host in UNSUITED or family.kind in ("audio", "shape")
    for at, page in enumerate(measure.PAGES):
        yes = ("yes", "是")[at]
        trains = [("refused", "拒绝")[at], "–"] if refused else [yes, yes]
        row = measure.committed(page)[measure.TITLES[family.name]]
        assert row == [*(cell[at] for cell in counts), yes, *trains], page


def test_the_committed_tables_have_these_rows_and_columns():
    for at, page in enumerate(measure.PAGES):
        head, *rows = measure.committed(page).items()
        assert head[1] == [(column.title, column.title_zh)[at] for column in measure.COLUMNS]
        assert [name for name, _ in rows] == [measure.TITLES[name] for name in every_family.available()]


def test_as_the_hosts_own_table(subject: measure.Subject):
    """Alone, and with the table behind it, as files are loaded."""
    table = comfy.lora.model_lora_keys_unet(subject.model.model, {})
    shapes = host_names.shapes_of(subject.model)
    ours, both = NameIndex(shapes), host_names.HostIndex(shapes, host_names._aliases(table))
    wrong, compared = HOST_IS_WRONG.get(subject.family.name), 0
    for name, to in table.items():
        key, span = (to, None) if isinstance(to, str) else to[:2]
        if key not in shapes:
            continue
        compared += 1
        want = [Target(key, span and tuple(span[1:]), not isinstance(to, str) and len(to) > 2)]
        if wrong and wrong.match(name):
            assert ours.resolve(name) == both.resolve(name) != want, name
            begin, length = want[0].rows
            # What the host cuts out reaches beyond the matrix or ends before it, ours fits.
            rows = ours.resolve(name)[0].rows
            assert sum(rows) <= shapes[key][0]
            assert begin + length > shapes[key][0] or (sum(rows) == shapes[key][0] != begin + length) or name.endswith("to_k")
        else:
            assert ours.resolve(name) == both.resolve(name) == want, name
    assert compared > 50


def test_a_model_in_diffusers_layout_takes_the_authors_names(subject: measure.Subject):
    if not subject.diffusers or subject.diffusers.keys() == subject.own.keys():
        pytest.skip("one layout")
    shapes, parts, full = {}, {}, host_names.shapes_of(subject.model)
    for name, piece in subject.diffusers.items():
        shape = full[f"diffusion_model.{piece.path}.weight"]
        begin, length = piece.rows or (0, shape[0])
        if name.replace("class_embedding", "add_embedding") in subject.diffusers.keys() - {name}:
            continue  # one layer, of which diffusers has one or the other
        parts.setdefault(piece.path, {})[begin] = (name, piece.swap)
        shapes[f"{name}.weight"] = (length, *shape[1:])
    if subject.family.name.startswith("cosmos1"):  # what tells it from Cosmos Predict 2
        shapes |= {f"learnable_pos_embed.pos_emb_{axis}": (4, 4) for axis in "thw"}
    index = NameIndex(shapes)
    for path, found in parts.items():
        want = [Target(f"{name}.weight", None, swap) for _, (name, swap) in sorted(found.items())]
        assert index.resolve(f"diffusion_model.{path}") == want, path
    # PEFT's files are for such models, under their own names.
    for key in shapes:
        if key.startswith("learnable_pos_embed"):
            continue
        assert index.spelling(key).diffusers, key
        assert write._diffusers(index.spelling(key), index) == [(key.removesuffix(".weight"), None, False)]


def test_files_for_diffusers_get_its_names(subject: measure.Subject):
    """What the PEFT writer calls the layers of ComfyUI's model."""
    index, names = index_of(subject), {}
    for name, piece in subject.diffusers.items():
        names.setdefault(piece.path, set()).add((name, piece.rows, piece.swap))
    for path, want in names.items():
        got = write._diffusers(index.spelling(f"diffusion_model.{path}.weight"), index)
        embedding = path.startswith("label_emb.")  # diffusers has one of two names for it
        assert set(got) <= want and (embedding or len(got) == len(want)), (path, got, want)


def test_fused_names_of_separate_projections(subject: measure.Subject):
    """``to_qkv`` and ``to_kv``: all rows of the parts, wherever they are."""
    index, names = index_of(subject), subject.diffusers or subject.own
    for name in names:
        parent = name.removesuffix(".to_q")
        parts = [names.get(f"{parent}.to_{part}") for part in "qkv"]
        if parent == name or None in parts:
            continue
        for fused, of in (("to_qkv", parts), ("to_kv", parts[1:])):
            if f"{parent}.{fused}" in names:
                continue
            want = rows_of(index, [target(piece) for piece in of])
            assert rows_of(index, index.resolve(f"transformer.{parent}.{fused}")) == want, f"{parent}.{fused}"


def test_numbered_parts_of_fused_matrices(subject: measure.Subject):
    """OMI's names, which OneTrainer can write: the authors' path and the part's number."""
    index, parts = index_of(subject), {}
    for piece in set(subject.diffusers.values()):
        if piece.rows:
            parts.setdefault(piece.path, []).append(piece)
    for path, pieces in parts.items():
        for n, piece in enumerate(sorted(pieces, key=lambda piece: piece.rows)):
            assert index.resolve(f"transformer.{path}.{n}") == [target(piece)], path


def rows_of(index: NameIndex, targets: list[Target]) -> list[tuple[str, int]]:
    """(parameter, row) in order."""
    out = []
    for one in targets:
        begin, length = one.rows or (0, index.shapes[one.key][0])
        out += [(one.key, row) for row in range(begin, begin + length)]
    return out


# ---------------------------------------------------------------- single families


@pytest.mark.parametrize(
    ("family", "name", "path", "rows"),
    [
        # What the authors of HunyuanVideo and HunyuanImage call layers, and what comes of them in files.
        ("hunyuan_video", "transformer.double_blocks.0.img_attn_qkv", "double_blocks.0.img_attn.qkv", None),
        ("hunyuan_video", "transformer.double_blocks.0.img_mlp.fc1", "double_blocks.0.img_mlp.0", None),
        ("hunyuan_video", "transformer.double_blocks.1.txt_mlp.fc0", "double_blocks.1.txt_mlp.0", None),
        ("hunyuan_video", "lora_unet_double_blocks_0_img_mod_linear", "double_blocks.0.img_mod.lin", None),
        ("hunyuan_video", "diffusion_model.txt_in.t_embedder.mlp.2", "txt_in.t_embedder.out_layer", None),
        ("hunyuan_video", "transformer.txt_in.c_embedder.linear_1", "txt_in.c_embedder.in_layer", None),
        ("hunyuan_image21", "double_blocks.0.img_attn_k", "double_blocks.0.img_attn.qkv", (64, 64)),
        ("hunyuan_image21", "lora_unet_double_blocks_1_txt_attn_v", "double_blocks.1.txt_attn.qkv", (128, 64)),
        ("hunyuan_image21", "single_blocks.0.linear1_k", "single_blocks.0.linear1", (64, 64)),
        ("hunyuan_image21", "single_blocks.1.linear1_mlp", "single_blocks.1.linear1", (192, 256)),
        ("hunyuan_image21", "single_blocks.1.linear2.fc", "single_blocks.1.linear2", None),
        ("flux", "diffusion_model.single_blocks.0.linear1_qkv", "single_blocks.0.linear1", (0, 192)),
        ("flux2", "diffusion_model.single_blocks.0.linear1_mlp", "single_blocks.0.linear1", (192, 384)),
        ("flux2", "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", "single_blocks.0.linear1", None),
        ("flux", "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", "single_blocks.0.linear1", None),
        ("flux", "transformer.transformer_blocks.0.attn.to_added_qkv", "double_blocks.0.txt_attn.qkv", None),
        ("z_image", "diffusion_model.layers.0.attention.to_k", "layers.0.attention.qkv", (256, 256)),
        ("z_image", "lora_unet_layers_1_attention_to_out_0", "layers.1.attention.out", None),
        ("lumina2", "diffusion_model.layers.0.attention.to_v", "layers.0.attention.qkv", (128, 32)),
        ("stable_audio", "transformer.layers.0.cross_attn.to_v", "transformer.layers.0.cross_attn.to_kv", (768, 768)),
        ("cascade_c", "unet.down_blocks.0.2.attention.attn.in_proj.1", "down_blocks.0.2.attention.attn.to_k", None),
        ("wan21_i2v", "transformer.blocks.0.attn2.add_k_proj", "blocks.0.cross_attn.k_img", None),
    ],
)
def test_customary_words(family: str, name: str, path: str, rows):
    model = every_family.FAMILIES[family].build()
    found = NameIndex(host_names.shapes_of(model)).resolve(name)
    assert found == [Target(f"diffusion_model.{path}.weight", rows)]


def test_weights_depend_on_names_and_the_seed_alone():
    for name in ("sd3", "pixart_alpha", "wan21_t2v", "qwen_image"):
        family = every_family.FAMILIES[name]
        one, two, other = (state(family.build(seed)) for seed in (0, 0, 1))
        assert all(torch.equal(one[key], two[key]) for key in one), name
        assert any(not torch.equal(one[key], other[key]) for key in one), name
        assert torch.equal(family.conditioning("a")[0][0], family.conditioning("a")[0][0])
        assert not torch.equal(family.conditioning("a")[0][0], family.conditioning("b")[0][0])


def test_stand_ins_have_the_familys_form():
    for name in ("flux", "qwen_image", "ltxv", "cascade_c", "chroma_radiance"):
        family = every_family.FAMILIES[name]
        vae, clip = family.vae(), family.clip()
        latent = vae.encode(torch.rand(2, family.size, family.size, 3, generator=torch.Generator().manual_seed(0)))
        assert latent.shape[1:] == family.latents(frames=1).shape[1:], name
        assert vae.decode(latent).shape == (2, family.size, family.size, 3), name
        cross, more = clip.encode_from_tokens_scheduled(clip.tokenize("a cat"))[0]
        assert torch.equal(cross, family.conditioning("a cat")[0][0]) and cross.shape == (1, *family.cross)
        assert (more["pooled_output"] is None) == (family.pooled == 0)
    with pytest.raises(ValueError, match="no pictures"):
        every_family.FAMILIES["stable_audio"].vae()


def fused_wan(block: int) -> dict[str, torch.Tensor]:
    blocks = torch.randn(192 // block, block, block, generator=torch.Generator().manual_seed(0)) * 0.1
    return {"diffusion_model.blocks.0.self_attn.qkv.oft_blocks": blocks, "diffusion_model.blocks.0.self_attn.qkv.alpha": torch.tensor(0.0)}


def test_a_fused_layer_on_separate_projections():
    model = every_family.FAMILIES["wan21_t2v"].build()
    keys = [f"diffusion_model.blocks.0.self_attn.{which}.weight" for which in "qkv"]
    base = state(model)
    tensors = fused_wan(32)
    full = loaded(applied(read_tensors(tensors, {}, name="test"), model).model)
    want = rotated_out(torch.cat([base[key] for key in keys]), next(iter(tensors.values())))
    close(torch.cat([full[key] for key in keys]), want, 2e-6)
    assert all(torch.equal(full[key], value) for key, value in base.items() if key not in keys)


def test_blocks_across_the_cut_are_a_named_error():
    model = every_family.FAMILIES["wan21_t2v"].build()
    text = raises(ShapeError, lambda: applied(read_tensors(fused_wan(48), {}, name="test"), model))
    assert "blocks run across layers that are separate in this model" in text and "blocks.0.self_attn.qkv" in text


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("thing_high_noise", "for Wan 2.2's model for high noise; the one for low noise needs a file of its own"),
        ("Thing-LowNoise", "for Wan 2.2's model for low noise; the one for high noise needs a file of its own"),
        ("thing", "If this is Wan 2.2 (14B): its models for high and for low noise need a file each."),
    ],
)
def test_the_report_names_the_other_expert(file: str, words: str):
    model = every_family.FAMILIES["wan21_t2v"].build()
    adapter = read_tensors(fused_wan(32), {}, name=f"{file}.safetensors")
    assert words in place(adapter, host_names.sides_of(model, None), {"model": Strength(1.0)}).report
    other = every_family.FAMILIES["ltxv"].build()
    blocks = {"diffusion_model.patchify_proj.oft_blocks": torch.zeros(8, 8, 8)}
    elsewhere = read_tensors(blocks, {}, name=f"{file}.safetensors")
    assert "Wan" not in place(elsewhere, host_names.sides_of(other, None), {"model": Strength(1.0)}).report


def test_the_measurements_can_fail():
    one = measure.subject("flux")
    names = dict(one.diffusers)
    q, k = (f"transformer_blocks.0.attn.to_{which}" for which in "qk")
    names[q], names[k] = names[k], names[q]
    wrong = dataclasses.replace(one, diffusers=names)
    right, count, examples = measure.found(wrong, measure.SPELLINGS["onetrainer"])
    assert (right, count) == (48, 50) and f"lora_transformer_{q}".replace(".", "_") in examples
    key = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    assert measure.exact(wrong, measure.SPELLINGS["onetrainer"]) == [key]
    names = {n: dataclasses.replace(p, swap=False) for n, p in one.diffusers.items()}
    wrong = dataclasses.replace(one, diffusers=names)
    assert measure.exact(wrong, measure.SPELLINGS["kohya"]) == ["diffusion_model.final_layer.adaLN_modulation.1.weight"]


@pytest.mark.parametrize(
    "family",
    ["chroma", "flux2", "hunyuan_video", "qwen_image", "hidream", "lumina2", "z_image", "wan21_t2v", "cosmos1_t2v",
     "cosmos_predict2", "auraflow", "hunyuan_dit", "mochi", "flux", "sdxl", "sd3"],
)  # fmt: skip
def test_a_file_in_the_authors_names_tells_what_it_is_for(family: str):
    one = measure.subject(family)
    names = one.names(measure.SPELLINGS["original"])[0]
    assert index_of(one).family in re.split(", | or ", guess_family(names))
