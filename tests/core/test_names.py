"""Adapter module name -> model parameter, for every spelling and layout.

Model names are generated at full depth, with tiny widths.
"""

from __future__ import annotations

import time

import pytest

from oft_core.names import NameIndex, Target, component, guess_family
from oft_core.names.other_names import other_names

# ----------------------------------------------------------------------------------------------------
# Model names, written from the architectures


def prefixed(prefix: str, shapes: dict) -> dict:
    return {prefix + key: shape for key, shape in shapes.items()}


def linear(name: str, out: int, into: int, bias: bool = True) -> dict:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def conv(name: str, out: int, into: int, kernel: int = 3) -> dict:
    return {f"{name}.weight": (out, into, kernel, kernel), f"{name}.bias": (out,)}


def norm(name: str, size: int) -> dict:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def ldm_unet(
    levels: int, resnets: int, depths: list[int], middle: int, context: int, linear_in: bool, vector: bool
):
    """An ldm U-Net of width 8; `depths`: transformer blocks in each place of a level (0 = no attention)."""
    c = 8

    def resnet(at):
        return {
            **norm(f"{at}.in_layers.0", c),
            **conv(f"{at}.in_layers.2", c, c),
            **linear(f"{at}.emb_layers.1", c, 4 * c),
            **norm(f"{at}.out_layers.0", c),
            **conv(f"{at}.out_layers.3", c, c),
            **conv(f"{at}.skip_connection", c, c, 1),
        }

    def attention(at, depth):
        found = norm(f"{at}.norm", c)
        for name in ("proj_in", "proj_out"):
            found |= linear(f"{at}.{name}", c, c) if linear_in else conv(f"{at}.{name}", c, c, 1)
        for i in range(depth):
            t = f"{at}.transformer_blocks.{i}"
            for n, width in ((1, c), (2, context)):
                found |= linear(f"{t}.attn{n}.to_q", c, c, False)
                found |= linear(f"{t}.attn{n}.to_k", c, width, False) | linear(
                    f"{t}.attn{n}.to_v", c, width, False
                )
                found |= linear(f"{t}.attn{n}.to_out.0", c, c)
            found |= linear(f"{t}.ff.net.0.proj", 8 * c, c) | linear(f"{t}.ff.net.2", c, 4 * c)
            found |= norm(f"{t}.norm1", c) | norm(f"{t}.norm2", c) | norm(f"{t}.norm3", c)
        return found

    shapes = linear("time_embed.0", 4 * c, c) | linear("time_embed.2", 4 * c, 4 * c)
    if vector:
        shapes |= linear("label_emb.0.0", 4 * c, c) | linear("label_emb.0.2", 4 * c, 4 * c)
    shapes |= conv("input_blocks.0.0", c, 4)
    n = 1
    for level in range(levels):
        for _ in range(resnets):
            shapes |= resnet(f"input_blocks.{n}.0")
            if depths[level]:
                shapes |= attention(f"input_blocks.{n}.1", depths[level])
            n += 1
        if level < levels - 1:
            shapes |= conv(f"input_blocks.{n}.0.op", c, c)
            n += 1
    shapes |= resnet("middle_block.0") | attention("middle_block.1", middle) | resnet("middle_block.2")
    n = 0
    for level in reversed(range(levels)):
        for i in range(resnets + 1):
            shapes |= resnet(f"output_blocks.{n}.0")
            if depths[level]:
                shapes |= attention(f"output_blocks.{n}.1", depths[level])
            if level and i == resnets:
                shapes |= conv(f"output_blocks.{n}.{2 if depths[level] else 1}.conv", c, c)
            n += 1
    return shapes | norm("out.0", c) | conv("out.2", 4, c)


def sd1_unet():
    return ldm_unet(4, 2, [1, 1, 1, 0], 1, context=768, linear_in=False, vector=False)


def sdxl_unet():
    return ldm_unet(3, 2, [0, 2, 10], 10, context=2048, linear_in=True, vector=True)


def flux(double: int = 19, single: int = 38):
    h, mlp = 6, 24
    shapes = linear("img_in", h, 4) | linear("txt_in", h, 10)
    for name in ("time_in", "vector_in", "guidance_in"):
        shapes |= linear(f"{name}.in_layer", h, 5) | linear(f"{name}.out_layer", h, h)
    for i in range(double):
        for side in ("img", "txt"):
            b = f"double_blocks.{i}.{side}"
            shapes |= (
                linear(f"{b}_mod.lin", 6 * h, h)
                | linear(f"{b}_attn.qkv", 3 * h, h)
                | linear(f"{b}_attn.proj", h, h)
            )
            shapes |= linear(f"{b}_mlp.0", mlp, h) | linear(f"{b}_mlp.2", h, mlp)
            shapes |= {f"{b}_attn.norm.query_norm.scale": (2,), f"{b}_attn.norm.key_norm.scale": (2,)}
    for i in range(single):
        b = f"single_blocks.{i}"
        shapes |= linear(f"{b}.linear1", 3 * h + mlp, h) | linear(f"{b}.linear2", h, h + mlp)
        shapes |= linear(f"{b}.modulation.lin", 3 * h, h)
        shapes |= {f"{b}.norm.query_norm.scale": (2,), f"{b}.norm.key_norm.scale": (2,)}
    return shapes | linear("final_layer.linear", 4, h) | linear("final_layer.adaLN_modulation.1", 2 * h, h)


def sd3(depth: int = 24, second_attention: int = 0):
    h = 8
    shapes = {"pos_embed": (1, 16, h)} | conv("x_embedder.proj", h, 4, 2) | linear("context_embedder", h, 10)
    for name in ("t_embedder", "y_embedder"):
        shapes |= linear(f"{name}.mlp.0", h, 5) | linear(f"{name}.mlp.2", h, h)
    for i in range(depth):
        last = i == depth - 1
        x, context = f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        shapes |= linear(f"{x}.adaLN_modulation.1", (9 if i < second_attention else 6) * h, h)
        shapes |= linear(f"{x}.attn.qkv", 3 * h, h) | linear(f"{x}.attn.proj", h, h)
        if i < second_attention:
            shapes |= linear(f"{x}.attn2.qkv", 3 * h, h) | linear(f"{x}.attn2.proj", h, h)
        shapes |= linear(f"{x}.mlp.fc1", 4 * h, h) | linear(f"{x}.mlp.fc2", h, 4 * h)
        shapes |= linear(f"{context}.adaLN_modulation.1", (2 if last else 6) * h, h)
        shapes |= linear(f"{context}.attn.qkv", 3 * h, h)
        if not last:
            shapes |= linear(f"{context}.attn.proj", h, h)
            shapes |= linear(f"{context}.mlp.fc1", 4 * h, h) | linear(f"{context}.mlp.fc2", h, 4 * h)
    return shapes | linear("final_layer.linear", 4, h) | linear("final_layer.adaLN_modulation.1", 2 * h, h)


def clip(layers: int, h: int = 8):
    shapes = {
        "text_model.embeddings.token_embedding.weight": (20, h),
        "text_model.embeddings.position_embedding.weight": (7, h),
    }
    for i in range(layers):
        at = f"text_model.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{at}.self_attn.{name}", h, h)
        shapes |= linear(f"{at}.mlp.fc1", 4 * h, h) | linear(f"{at}.mlp.fc2", h, 4 * h)
        shapes |= norm(f"{at}.layer_norm1", h) | norm(f"{at}.layer_norm2", h)
    return shapes | norm("text_model.final_layer_norm", h) | {"text_projection.weight": (h, h)}


def open_clip(layers: int, h: int = 8):
    shapes = {
        "token_embedding.weight": (20, h),
        "positional_embedding": (7, h),
        "text_projection": (h, h),
        "logit_scale": (),
    }
    for i in range(layers):
        at = f"transformer.resblocks.{i}"
        shapes |= {f"{at}.attn.in_proj_weight": (3 * h, h), f"{at}.attn.in_proj_bias": (3 * h,)}
        shapes |= linear(f"{at}.attn.out_proj", h, h)
        shapes |= linear(f"{at}.mlp.c_fc", 4 * h, h) | linear(f"{at}.mlp.c_proj", h, 4 * h)
        shapes |= norm(f"{at}.ln_1", h) | norm(f"{at}.ln_2", h)
    return shapes | norm("ln_final", h)


def t5(layers: int = 3, h: int = 8):
    shapes = {"shared.weight": (20, h), "encoder.final_layer_norm.weight": (h,)}
    for i in range(layers):
        at = f"encoder.block.{i}.layer"
        for name in "qkvo":
            shapes |= linear(f"{at}.0.SelfAttention.{name}", h, h, False)
        for name, size in (("wi_0", (4 * h, h)), ("wi_1", (4 * h, h)), ("wo", (h, 4 * h))):
            shapes |= linear(f"{at}.1.DenseReluDense.{name}", *size, bias=False)
    return shapes


def sd1_checkpoint():
    return (
        prefixed("model.diffusion_model.", sd1_unet())
        | prefixed("cond_stage_model.transformer.", clip(12))
        | conv("first_stage_model.encoder.conv_in", 8, 3)
        | {"alphas_cumprod": (1000,), "model_ema.decay": ()}
    )


def sdxl_checkpoint():
    return (
        prefixed("model.diffusion_model.", sdxl_unet())
        | prefixed("conditioner.embedders.0.transformer.", clip(12))
        | prefixed("conditioner.embedders.1.model.", open_clip(32, 10))
    )


def sd3_checkpoint():
    return (
        prefixed("model.diffusion_model.", sd3())
        | prefixed("text_encoders.clip_l.transformer.", clip(12))
        | prefixed("text_encoders.clip_g.transformer.", clip(32, 10))
        | prefixed("text_encoders.t5xxl.transformer.", t5())
    )


def in_other_layout(shapes: dict) -> tuple[dict, dict]:
    """The same model under its other names, and how: original module -> its parts there, in row order."""
    modules = {k.removesuffix(".weight"): s for k, s in shapes.items() if not k.endswith(".bias")}
    modules = {k.replace(".in_proj_weight", ".in_proj"): s for k, s in modules.items()}
    found: dict[str, list] = {}
    for alias in other_names(modules):
        (module, rows), *_ = alias.parts
        if not alias.further and not alias.name.startswith("class_embedding"):
            found.setdefault(module, []).append((rows or (0, modules[module][0]), alias))
    there, how = {}, {}
    for module, parts in found.items():
        parts.sort(key=lambda part: part[0])
        how[module] = [(f"{a.name}.weight", a.swap) for _, a in parts]
        for (_, length), alias in parts:
            there[f"{alias.name}.weight"] = (length, *modules[module][1:])
    return there, how


def keys(index: NameIndex, module: str) -> list[str]:
    return [target.key for target in index.resolve(module)]


# ----------------------------------------------------------------------------------------------------
# U-Net


@pytest.mark.parametrize(
    ("diffusers", "ldm"),
    [
        ("conv_in", "input_blocks.0.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("down_blocks.0.resnets.0.conv1", "input_blocks.1.0.in_layers.2"),
        ("down_blocks.0.resnets.1.time_emb_proj", "input_blocks.2.0.emb_layers.1"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        ),
        ("down_blocks.2.resnets.1.conv_shortcut", "input_blocks.8.0.skip_connection"),
        ("down_blocks.2.downsamplers.0.conv", "input_blocks.9.0.op"),
        ("down_blocks.3.resnets.1.conv2", "input_blocks.11.0.out_layers.3"),
        ("mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
        ("mid_block.resnets.1.conv1", "middle_block.2.in_layers.2"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
        (
            "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj",
            "output_blocks.5.1.transformer_blocks.0.ff.net.0.proj",
        ),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("up_blocks.3.attentions.2.proj_out", "output_blocks.11.1.proj_out"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
    ],
)
def test_sd1_unet(diffusers: str, ldm: str):
    index = NameIndex(sd1_checkpoint())
    key = f"model.diffusion_model.{ldm}.weight"
    kohya = diffusers.replace(".", "_")
    spellings = [
        f"lora_unet_{kohya}",
        f"oft_unet_{kohya}",
        f"oftv2_unet_{kohya}",
        f"lycoris_{kohya}",
        f"lora_unet.{diffusers}",
        f"unet.{diffusers}",
        f"base_model.model.{diffusers}",
        f"base_model.model.unet.{diffusers}",
        f"unet.base_model.model.{diffusers}",
        f"base_model.model.{diffusers}.default",
        diffusers,
        f"lora_unet_{ldm.replace('.', '_')}",
        f"diffusion_model.{ldm}",
        f"model.diffusion_model.{ldm}",
        ldm,
    ]
    assert {name: index.resolve(name) for name in spellings} == {name: [Target(key)] for name in spellings}


@pytest.mark.parametrize(
    ("diffusers", "ldm"),
    [
        ("add_embedding.linear_1", "label_emb.0.0"),
        (
            "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",
            "input_blocks.4.1.transformer_blocks.1.attn2.to_k",
        ),
        (
            "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2",
            "input_blocks.8.1.transformer_blocks.9.ff.net.2",
        ),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.1.attentions.0.proj_in", "output_blocks.3.1.proj_in"),
        ("up_blocks.2.resnets.2.conv1", "output_blocks.8.0.in_layers.2"),
    ],
)
def test_sdxl_unet(diffusers: str, ldm: str):
    index = NameIndex(sdxl_checkpoint())
    for name in (f"lora_unet_{diffusers.replace('.', '_')}", f"oft_unet_{ldm.replace('.', '_')}"):
        assert keys(index, name) == [f"model.diffusion_model.{ldm}.weight"]


def test_paper_names_without_the_sublayer_number():
    index = NameIndex(sd1_checkpoint())
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    base = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1"
    assert keys(index, f"unet.{attention}.processor.to_q") == [f"{base}.to_q.weight"]
    assert keys(index, f"{attention}.processor.to_out") == [f"{base}.to_out.0.weight"]
    assert keys(index, f"{attention}.to_out") == [f"{base}.to_out.0.weight"]


@pytest.mark.parametrize("unet", [sd1_unet, sdxl_unet])
@pytest.mark.parametrize("prefix", ["", "unet."])
def test_diffusers_unet_takes_ldm_names(unet, prefix: str):
    there, how = in_other_layout(unet())
    index = NameIndex(prefixed(prefix, there))
    assert len(how) == sum(k.endswith(".weight") for k in unet())
    for module, parts in how.items():
        assert keys(index, "oft_unet_" + module.replace(".", "_")) == [prefix + parts[0][0]]
        assert keys(index, "lora_unet_" + parts[0][0].removesuffix(".weight").replace(".", "_")) == [
            prefix + parts[0][0]
        ]


def test_block_numbers_that_cannot_be_known_are_not_guessed():
    whole = sdxl_unet()
    without_block_2 = NameIndex({k: s for k, s in whole.items() if not k.startswith("input_blocks.2.")})
    assert keys(without_block_2, "lora_unet_down_blocks_0_resnets_0_conv1") == [
        "input_blocks.1.0.in_layers.2.weight"
    ]
    assert without_block_2.resolve("lora_unet_down_blocks_1_resnets_0_conv1") == []
    some = NameIndex({"input_blocks.4.1.proj_in.weight": (8, 8)})
    assert some.resolve("lora_unet_down_blocks_0_attentions_0_proj_in") == []
    assert keys(some, "lora_unet_input_blocks_4_1_proj_in") == ["input_blocks.4.1.proj_in.weight"]


# ----------------------------------------------------------------------------------------------------
# Flux and SD3

FLUX_NAMES = [
    ("transformer_blocks.0.attn.to_q", "double_blocks.0.img_attn.qkv", (0, 6), False),
    ("transformer_blocks.0.attn.to_k", "double_blocks.0.img_attn.qkv", (6, 6), False),
    ("transformer_blocks.18.attn.to_v", "double_blocks.18.img_attn.qkv", (12, 6), False),
    ("transformer_blocks.3.attn.add_k_proj", "double_blocks.3.txt_attn.qkv", (6, 6), False),
    ("transformer_blocks.0.attn.to_out.0", "double_blocks.0.img_attn.proj", None, False),
    ("transformer_blocks.0.attn.to_add_out", "double_blocks.0.txt_attn.proj", None, False),
    ("transformer_blocks.0.norm1.linear", "double_blocks.0.img_mod.lin", None, False),
    ("transformer_blocks.18.norm1_context.linear", "double_blocks.18.txt_mod.lin", None, False),
    ("transformer_blocks.0.ff.net.0.proj", "double_blocks.0.img_mlp.0", None, False),
    ("transformer_blocks.0.ff_context.net.2", "double_blocks.0.txt_mlp.2", None, False),
    ("single_transformer_blocks.37.attn.to_v", "single_blocks.37.linear1", (12, 6), False),
    ("single_transformer_blocks.0.proj_mlp", "single_blocks.0.linear1", (18, 24), False),
    ("single_transformer_blocks.0.proj_out", "single_blocks.0.linear2", None, False),
    ("single_transformer_blocks.0.norm.linear", "single_blocks.0.modulation.lin", None, False),
    ("x_embedder", "img_in", None, False),
    ("context_embedder", "txt_in", None, False),
    ("time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer", None, False),
    ("proj_out", "final_layer.linear", None, False),
    ("norm_out.linear", "final_layer.adaLN_modulation.1", None, True),
]
SD3_NAMES = [
    ("transformer_blocks.0.attn.to_k", "joint_blocks.0.x_block.attn.qkv", (8, 8), False),
    ("transformer_blocks.23.attn.add_v_proj", "joint_blocks.23.context_block.attn.qkv", (16, 8), False),
    ("transformer_blocks.5.attn2.to_q", "joint_blocks.5.x_block.attn2.qkv", (0, 8), False),
    ("transformer_blocks.5.attn2.to_out.0", "joint_blocks.5.x_block.attn2.proj", None, False),
    ("transformer_blocks.0.attn.to_add_out", "joint_blocks.0.context_block.attn.proj", None, False),
    ("transformer_blocks.0.ff_context.net.0.proj", "joint_blocks.0.context_block.mlp.fc1", None, False),
    ("transformer_blocks.0.norm1.linear", "joint_blocks.0.x_block.adaLN_modulation.1", None, False),
    (
        "transformer_blocks.22.norm1_context.linear",
        "joint_blocks.22.context_block.adaLN_modulation.1",
        None,
        False,
    ),
    (
        "transformer_blocks.23.norm1_context.linear",
        "joint_blocks.23.context_block.adaLN_modulation.1",
        None,
        True,
    ),
    ("pos_embed.proj", "x_embedder.proj", None, False),
    ("context_embedder", "context_embedder", None, False),
    ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0", None, False),
    ("norm_out.linear", "final_layer.adaLN_modulation.1", None, True),
    ("proj_out", "final_layer.linear", None, False),
]


@pytest.mark.parametrize(
    ("model", "diffusers", "original", "rows", "swap"),
    [("flux", *row) for row in FLUX_NAMES] + [("sd3", *row) for row in SD3_NAMES],
)
def test_transformer(model: str, diffusers: str, original: str, rows, swap: bool):
    index = NameIndex(prefixed("diffusion_model.", flux() if model == "flux" else sd3(second_attention=13)))
    target = Target(f"diffusion_model.{original}.weight", rows, swap)
    flat = diffusers.replace(".", "_")
    names = [
        f"transformer.{diffusers}",
        f"lora_transformer_{flat}",
        f"lora_transformer.{diffusers}",
        f"lora_unet_{flat}",
        f"lycoris_{flat}",
        f"base_model.model.{diffusers}",
        f"base_model.model.transformer.{diffusers}",
        f"transformer_{flat}",
        diffusers,
        flat,
    ]
    assert {name: index.resolve(name) for name in names} == {name: [target] for name in names}
    for own in (f"oft_unet_{original.replace('.', '_')}", f"diffusion_model.{original}", original):
        if original != diffusers:
            assert index.resolve(own) == [Target(target.key)]


@pytest.mark.parametrize(
    "shapes", [flux(), sd3(), sd3(second_attention=13)], ids=["flux", "sd3", "sd3.5 medium"]
)
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_diffusers_transformer_takes_original_names(shapes: dict, prefix: str):
    there, how = in_other_layout(shapes)
    index = NameIndex(prefixed(prefix, there))
    assert len(how) == sum(not k.endswith(".bias") for k in shapes)
    for module, parts in how.items():
        wanted = [Target(prefix + key, None, swap) for key, swap in parts]
        assert index.resolve("lora_unet_" + module.replace(".", "_")) == wanted
        assert index.resolve("diffusion_model." + module) == wanted


def test_fused_names_on_split_weights_keep_their_row_order():
    there, _ = in_other_layout(flux(2, 2))
    index = NameIndex(prefixed("transformer.", there))
    block = "transformer.single_transformer_blocks.1"
    attention = [f"{block}.attn.to_{x}.weight" for x in "qkv"]
    assert keys(index, "oft_unet_single_blocks_1_linear1") == [*attention, f"{block}.proj_mlp.weight"]
    assert keys(index, "diffusion_model.single_blocks.1.linear1_qkv") == attention


def test_a_fused_matrix_with_a_missing_part_is_not_found():
    there, _ = in_other_layout(flux(2, 2))
    del there["transformer_blocks.1.attn.to_k.weight"]
    index = NameIndex(there)
    assert index.resolve("lora_unet_double_blocks_1_img_attn_qkv") == []
    assert len(index.resolve("lora_unet_double_blocks_0_img_attn_qkv")) == 3


def test_omi_names_number_the_parts_of_a_fused_matrix():
    index = NameIndex(prefixed("diffusion_model.", flux(1, 1)))
    linear1 = "diffusion_model.single_blocks.0.linear1.weight"
    assert index.resolve("transformer.single_blocks.0.linear1.1") == [Target(linear1, (6, 6))]
    assert index.resolve("transformer.single_blocks.0.linear1.3") == [Target(linear1, (18, 24))]
    assert index.resolve("transformer.double_blocks.0.txt_attn.qkv.2") == [
        Target("diffusion_model.double_blocks.0.txt_attn.qkv.weight", (12, 6))
    ]
    assert keys(index, "transformer.img_in.proj") == ["diffusion_model.img_in.weight"]
    index = NameIndex(in_other_layout(flux(1, 1))[0])
    assert keys(index, "transformer.single_blocks.0.linear1.3") == [
        "single_transformer_blocks.0.proj_mlp.weight"
    ]
    assert keys(index, "transformer.img_in.proj") == ["x_embedder.weight"]
    encoders = NameIndex(sd3_checkpoint())
    for part in ("clip_l", "clip_g"):
        assert keys(encoders, f"{part}.{Q_DOTTED}") == [f"text_encoders.{part}.transformer.{Q_DOTTED}.weight"]
    assert keys(encoders, "t5.shared") == ["text_encoders.t5xxl.transformer.shared.weight"]


def test_flux_rows_without_linear2_come_from_the_input_width():
    shapes = {"single_blocks.0.linear1.weight": (130, 30)}
    assert NameIndex(shapes).resolve("transformer.single_transformer_blocks.0.proj_mlp") == [
        Target("single_blocks.0.linear1.weight", (90, 40))
    ]


def test_shapes_without_rows_are_no_reason_to_fail():
    index = NameIndex({key: () for key in flux(1, 1) | sd3(2) | open_clip(1)})
    assert keys(index, "lora_unet_single_blocks_0_linear1") == ["single_blocks.0.linear1.weight"]
    assert index.resolve("transformer.single_transformer_blocks.0.proj_mlp") == []


def test_grouped_attention_splits_by_the_output_projection():
    shapes = {"layers.0.attention.qkv.weight": (40, 24), "layers.0.attention.out.weight": (24, 24)}
    index = NameIndex(prefixed("diffusion_model.", shapes))
    rows = [index.resolve(f"transformer.layers.0.attention.to_{x}")[0].rows for x in "qkv"]
    assert rows == [(0, 24), (24, 8), (32, 8)]


# ----------------------------------------------------------------------------------------------------
# Text encoders

Q = "text_model_encoder_layers_0_self_attn_q_proj"
Q_DOTTED = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "name",
    [
        f"lora_te_{Q}",
        f"lora_te1_{Q}",
        f"text_encoder.{Q_DOTTED}",
        f"base_model.model.{Q_DOTTED}",
        Q_DOTTED,
        f"lycoris_{Q}",
    ],
)
@pytest.mark.parametrize(
    "prefix",
    [
        "clip_l.transformer.",
        "cond_stage_model.transformer.",
        "text_encoders.clip_l.transformer.",
        "te1.",
        "text_encoder.",
        "te.",
        "",
    ],
)
def test_clip_l(name: str, prefix: str):
    index = NameIndex(prefixed(prefix, clip(12)))
    assert keys(index, name) == [f"{prefix}{Q_DOTTED}.weight"]
    for other in (f"lora_te2_{Q}", f"lora_te3_{Q}", f"text_encoder_2.{Q_DOTTED}", f"lora_unet_{Q}"):
        assert index.resolve(other) == []


def test_old_checkpoints_without_text_model():
    shapes = {k.removeprefix("text_model."): s for k, s in clip(2).items()}
    index = NameIndex(prefixed("cond_stage_model.transformer.", shapes))
    assert keys(index, f"lora_te_{Q}") == [
        "cond_stage_model.transformer.encoder.layers.0.self_attn.q_proj.weight"
    ]


@pytest.mark.parametrize(
    "prefix", ["cond_stage_model.model.", "conditioner.embedders.0.model.", "clip_h.", ""]
)
def test_sd2_open_clip(prefix: str):
    index = NameIndex(prefixed(prefix, open_clip(23)))
    fused = f"{prefix}transformer.resblocks.22.attn.in_proj_weight"
    for i, letter in enumerate("qkv"):
        name = f"text_model_encoder_layers_22_self_attn_{letter}_proj"
        assert index.resolve(f"lora_te_{name}") == [Target(fused, (8 * i, 8))]
        assert index.resolve(f"lora_te1_{name}") == [Target(fused, (8 * i, 8))]
        assert index.resolve(f"lora_te2_{name}") == []
    block = f"{prefix}transformer.resblocks.1"
    assert keys(index, "lora_te_text_model_encoder_layers_1_mlp_fc1") == [f"{block}.mlp.c_fc.weight"]
    assert keys(index, "lora_te_text_model_encoder_layers_1_mlp_fc2") == [f"{block}.mlp.c_proj.weight"]
    assert keys(index, "lora_te_text_model_encoder_layers_1_self_attn_out_proj") == [
        f"{block}.attn.out_proj.weight"
    ]
    assert keys(index, "text_encoder.text_model.embeddings.token_embedding") == [
        f"{prefix}token_embedding.weight"
    ]
    assert index.resolve("lora_te_text_projection") == []  # stored transposed


def test_clip_takes_open_clip_names():
    index = NameIndex(prefixed("clip_g.transformer.", clip(32)))
    layer = "clip_g.transformer.text_model.encoder.layers.31"
    assert keys(index, "lora_te2_transformer_resblocks_31_attn_in_proj") == [
        f"{layer}.self_attn.{x}_proj.weight" for x in "qkv"
    ]
    assert keys(index, "text_encoders.clip_g.transformer.resblocks.31.mlp.c_fc") == [
        f"{layer}.mlp.fc1.weight"
    ]


def test_sdxl_routes_by_number_and_never_across():
    index = NameIndex(sdxl_checkpoint())
    first = f"conditioner.embedders.0.transformer.{Q_DOTTED}.weight"
    second = Target("conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight", (0, 10))
    for name in (
        f"lora_te_{Q}",
        f"lora_te1_{Q}",
        f"text_encoder.{Q_DOTTED}",
        f"text_encoders.clip_l.transformer.{Q_DOTTED}",
    ):
        assert keys(index, name) == [first]
    for name in (
        f"lora_te2_{Q}",
        f"text_encoder_2.{Q_DOTTED}",
        f"text_encoders.clip_g.transformer.{Q_DOTTED}",
    ):
        assert index.resolve(name) == [second]
    assert index.resolve(f"lora_te3_{Q}") == []
    layer_20 = "text_model_encoder_layers_20_mlp_fc1"  # only CLIP-G is that deep
    assert keys(index, f"lora_te2_{layer_20}") == [
        "conditioner.embedders.1.model.transformer.resblocks.20.mlp.c_fc.weight"
    ]
    for prefix in ("lora_te_", "lora_te1_", "lora_unet_", "lycoris_", ""):
        assert index.resolve(prefix + layer_20) == []


def test_bare_clip_g_is_known_by_its_depth():
    for shapes in (clip(32), open_clip(32)):
        index = NameIndex(shapes)
        assert len(index.resolve(f"lora_te2_{Q}")) == 1
        assert index.resolve(f"lora_te1_{Q}") == []
        assert len(index.resolve(f"base_model.model.{Q_DOTTED}")) == 1


def test_t5_wins_over_the_number():
    path = "encoder_block_2_layer_0_SelfAttention_q"
    key = "t5xxl.transformer.encoder.block.2.layer.0.SelfAttention.q.weight"
    live = prefixed("clip_l.transformer.", clip(12)) | prefixed("t5xxl.transformer.", t5())  # Flux
    index = NameIndex(live)
    for name in (
        f"lora_te2_{path}",
        f"lora_te3_{path}",
        "text_encoder_2.encoder.block.2.layer.0.SelfAttention.q",
        "text_encoder_3.encoder.block.2.layer.0.SelfAttention.q",
        "text_encoders.t5xxl.transformer.encoder.block.2.layer.0.SelfAttention.q",
        "base_model.model.encoder.block.2.layer.0.SelfAttention.q",
    ):
        assert keys(index, name) == [key]
        assert component(name) == "te3"
    assert keys(index, "lora_te2_shared") == ["t5xxl.transformer.shared.weight"]
    assert index.resolve(f"lora_te2_{Q}") == []
    index = NameIndex(sd3_checkpoint())
    assert keys(index, f"lora_te3_{path}") == [f"text_encoders.{key}"]
    bare = key.removeprefix("t5xxl.").removesuffix(".weight")
    assert keys(index, f"text_encoders.{bare}") == keys(index, f"text_encoders_{bare}") == [f"text_encoders.{key}"]
    assert keys(index, f"lora_te2_{Q}") == [f"text_encoders.clip_g.transformer.{Q_DOTTED}.weight"]
    assert keys(NameIndex(prefixed("text_encoder_2.", t5())), f"lora_te2_{path}") == [
        "text_encoder_2.encoder.block.2.layer.0.SelfAttention.q.weight"
    ]


def test_unknown_language_model_encoder():
    index = NameIndex(
        {"qwen25_7b.transformer.model.layers.0.self_attn.q_proj.weight": (8, 8), "blocks.0.x.weight": (4, 4)}
    )
    key = ["qwen25_7b.transformer.model.layers.0.self_attn.q_proj.weight"]
    assert keys(index, "text_encoder.model.layers.0.self_attn.q_proj") == key
    assert keys(index, "text_encoders.qwen25_7b.transformer.model.layers.0.self_attn.q_proj") == key
    assert index.resolve("lora_unet_model_layers_0_self_attn_q_proj") == []


# ----------------------------------------------------------------------------------------------------
# Guards, ambiguity, unknown families


def test_parts_do_not_mix():
    index = NameIndex(sd1_checkpoint())
    assert index.resolve(f"lora_unet_{Q}") == []
    assert index.resolve(f"unet.{Q_DOTTED}") == []
    assert index.resolve("lora_te_input_blocks_1_1_proj_in") == []
    assert index.resolve("text_encoder.input_blocks.1.1.proj_in") == []
    assert index.resolve("lora_unet_encoder_conv_in") == []  # the VAE is no target
    assert index.resolve("first_stage_model.encoder.conv_in") == []


def test_unknown_family_by_its_own_names():
    index = NameIndex(
        {"model.transformer_blocks.0.attn1.to_q.weight": (36, 36), "model.patchify_proj.weight": (24, 12)}
    )
    key = ["model.transformer_blocks.0.attn1.to_q.weight"]
    for name in (
        "lora_unet_model_transformer_blocks_0_attn1_to_q",
        "lora_unet_transformer_blocks_0_attn1_to_q",
        "diffusion_model.transformer_blocks.0.attn1.to_q",
        "model.transformer_blocks.0.attn1.to_q",
        "transformer_blocks_0_attn1_to_q",
    ):
        assert keys(index, name) == key
    live = NameIndex({"diffusion_model.blocks.0.self_attn.q.weight": (8, 8)})
    for name in (
        "lora_unet_blocks_0_self_attn_q",
        "oftv2_unet_blocks_0_self_attn_q",
        "transformer.blocks.0.self_attn.q",
    ):
        assert keys(live, name) == ["diffusion_model.blocks.0.self_attn.q.weight"]


def test_a_bare_name_keeps_its_first_word():
    index = NameIndex({"blocks.0.ff.weight": (4, 4)})
    assert index.resolve("transformer_blocks_0_ff") == []
    assert keys(index, "transformer.blocks.0.ff") == ["blocks.0.ff.weight"]
    assert keys(index, "lora_transformer_blocks_0_ff") == ["blocks.0.ff.weight"]


def test_own_name_wins_over_the_other_layout():
    shapes = flux(1, 1) | linear("proj_out", 3, 3)  # would also be diffusers' name of final_layer.linear
    assert keys(NameIndex(shapes), "lora_unet_proj_out") == ["proj_out.weight"]


def test_two_modules_of_one_flat_name_need_their_dots():
    index = NameIndex({"diffusion_model.a.b_c.weight": (4, 4), "diffusion_model.a_b.c.weight": (4, 4)})
    assert index.resolve("lora_unet_a_b_c") == []
    assert keys(index, "diffusion_model.a_b.c") == ["diffusion_model.a_b.c.weight"]
    assert keys(index, "diffusion_model.a.b_c") == ["diffusion_model.a.b_c.weight"]


def test_other_parameters_by_their_own_names():
    index = NameIndex(prefixed("diffusion_model.", flux(1, 1)))
    scale = "double_blocks.0.img_attn.norm.query_norm.scale"
    for name in (f"diffusion_model.{scale}", "transformer.transformer_blocks.0.attn.norm_q"):
        assert keys(index, name) == [f"diffusion_model.{scale}"]
    assert keys(index, "diffusion_model.img_in.bias") == ["diffusion_model.img_in.bias"]
    assert keys(index, "diffusion_model.img_in") == ["diffusion_model.img_in.weight"]


def test_mixed_file():
    shapes = (
        prefixed("unet.", {"down_blocks.1.attentions.0.proj_in.weight": (24, 30, 1, 1)})
        | prefixed("te1.", clip(1))
        | prefixed("te2.", clip(1, 10))
        | prefixed("te3.", t5(1))
    )
    index = NameIndex(shapes)
    assert keys(index, "lora_unet_down_blocks_1_attentions_0_proj_in") == [
        "unet.down_blocks.1.attentions.0.proj_in.weight"
    ]
    for n in "12":
        assert keys(index, f"lora_te{n}_{Q}") == [f"te{n}.{Q_DOTTED}.weight"]
    assert keys(index, "lora_te3_shared") == ["te3.shared.weight"]


def test_embedding_of_a_bare_text_encoder():
    index = NameIndex(clip(1))
    name = "base_model.model.text_model.embeddings.token_embedding"
    assert keys(index, name) == ["text_model.embeddings.token_embedding.weight"]


@pytest.mark.parametrize(
    "module", ["", ".", "lora_unet_", "lycoris_", "base_model.model.", "transformer.", "x.default"]
)
def test_names_of_nothing(module: str):
    assert NameIndex(sd1_checkpoint()).resolve(module) == []
    assert NameIndex({}).resolve(module) == []


# ----------------------------------------------------------------------------------------------------
# component, families, speed


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("oft_unet_input_blocks_1_1_proj_in", "unet"),
        ("lora_prior_unet_down_blocks_0_1", "unet"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "te1"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "te1"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "te2"),
        ("lora_prior_te_text_model_encoder_layers_0_mlp_fc1", "te2"),
        ("lora_te2_encoder_block_0_layer_0_SelfAttention_q", "te3"),
        ("text_encoder_3.encoder.block.0.layer.0.SelfAttention.q", "te3"),
        ("text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1", "te2"),
        ("text_encoders.t5xxl.transformer.shared", "te3"),
        ("text_encoders.transformer.encoder.block.2.layer.0.SelfAttention.q", "te3"),
        ("text_encoders.transformer.shared", "te3"),
        ("text_encoders.transformer.model.layers.0.self_attn.q_proj", "te1"),
        ("base_model.model.text_model.encoder.layers.0.mlp.fc1", "te1"),
        ("lycoris_text_model_encoder_layers_0_mlp_fc1", "te1"),
        ("lycoris_transformer_blocks_0_attn_to_q", "unet"),
        ("base_model.model.down_blocks.0.resnets.0.conv1", "unet"),
        ("transformer.transformer_blocks.0.attn.to_q", "unet"),
        ("transformer_blocks.0.attn.to_q", "unet"),
    ],
)
def test_component(module: str, part: str):
    assert component(module) == part


@pytest.mark.parametrize(
    ("shapes", "family"),
    [
        (sd1_checkpoint(), "sd1"),
        (ldm_unet(4, 2, [1, 1, 1, 0], 1, context=1024, linear_in=True, vector=False), "sd2"),
        (ldm_unet(4, 2, [1, 1, 1, 0], 1, context=5, linear_in=False, vector=False), "sd1"),
        (sdxl_checkpoint(), "sdxl"),
        (in_other_layout(sdxl_unet())[0], "sdxl"),
        (prefixed("diffusion_model.", flux()), "flux"),
        (in_other_layout(flux())[0], "flux"),
        (sd3_checkpoint(), "sd3"),
        (in_other_layout(sd3())[0], "sd3"),
        (prefixed("clip_l.transformer.", clip(2)), "text encoder"),
        ({"something.weight": (2, 2)}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_family(shapes: dict, family: str):
    assert NameIndex(shapes).family == family


@pytest.mark.parametrize(
    ("modules", "family"),
    [
        (["oft_unet_double_blocks_0_img_attn_qkv"], "flux"),
        (
            [
                "transformer.single_transformer_blocks.0.attn.to_q",
                "transformer.transformer_blocks.0.attn.to_q",
            ],
            "flux",
        ),
        (["lycoris_transformer_blocks_0_attn_add_k_proj"], "flux or sd3"),
        (["lora_unet_joint_blocks_0_x_block_attn_qkv"], "sd3"),
        (["oft_unet_input_blocks_7_1_transformer_blocks_9_attn1_to_q"], "sdxl"),
        (["lora_unet_down_blocks_1_attentions_0_proj_in", f"lora_te2_{Q}"], "sdxl"),
        (["lora_unet_down_blocks_0_attentions_0_proj_in", f"lora_te_{Q}"], "sd1 or sd2"),
        (["oft_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"], "sd1, sd2 or sdxl"),
        ([f"lora_te1_{Q}"], "text encoder"),
        ([Q_DOTTED], "text encoder"),
        (["lora_unet_blocks_0_self_attn_q"], "wan"),
        (["diffusion_model.layers.3.attention.to_k"], "lumina2"),
        (["lora_unet_blocks_0_mlp"], "unknown"),
        ([], "unknown"),
    ],
)
def test_guess_family(modules: list[str], family: str):
    assert guess_family(modules) == family


def test_speed():
    shapes = sdxl_checkpoint()
    assert len(shapes) > 2000
    start = time.perf_counter()
    index = NameIndex(shapes)
    built = time.perf_counter() - start
    names = ["lora_unet_" + k.removeprefix("model.diffusion_model.").replace(".", "_") for k in shapes]
    start = time.perf_counter()
    for name in names:
        index.resolve(name.removesuffix("_weight"))
    resolved = time.perf_counter() - start
    assert built < 2 and resolved < 2  # about 0.05 s each; the limits are for busy machines


PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
@pytest.mark.parametrize(
    "spelling",
    [
        "{w}.{p}", "base_model.model.{w}.{p}", "{w}.base_model.model.{p}", "unet.{w}.{p}", "base_model.model.{w}.unet.{p}",
        "down_blocks.0.{w}.attentions.0.{w}.transformer_blocks.0.attn1.to_q", "{w}.{w}.{p}", "lora_unet_{w}_{u}", "lora_unet_{w}_{w}_{u}",
    ],
)
def test_wrappers_of_models_are_noise(wrapper: str, spelling: str) -> None:
    index = NameIndex({f"{PATH}.weight": (8, 8), f"{PATH[:-1]}k.weight": (8, 8)})
    name = spelling.format(w=wrapper, p=PATH, u=PATH.replace(".", "_"))
    assert [t.key for t in index.resolve(name)] == [f"{PATH}.weight"]
    assert component(name) == "unet"


@pytest.mark.parametrize("name", ["pipe.dit.blocks.3.self_attn.q", "pipe_dit_blocks_3_self_attn_q", "lora_unet_pipe_dit_blocks_3_self_attn_q"])
def test_a_pipelines_prefix_is_noise(name: str) -> None:
    index = NameIndex({"diffusion_model.blocks.3.self_attn.q.weight": (8, 8)})
    assert [t.key for t in index.resolve(name)] == ["diffusion_model.blocks.3.self_attn.q.weight"]


# ----------------------------------------------------------------------------------------------------
# Customary words for the same layer


def test_customary_words_beside_the_same_parent():
    fused = NameIndex({"a.attn.qkv.weight": (24, 8), "a.attn.proj.weight": (8, 8), "b.attn.kv.weight": (12, 8)})
    assert fused.resolve("lora_unet_a_attn_to_k") == [Target("a.attn.qkv.weight", (8, 8))]
    assert fused.resolve("diffusion_model.a.attn.wv") == [Target("a.attn.qkv.weight", (16, 8))]
    assert fused.resolve("a.attn.in_proj") == fused.resolve("a.attn.to_qkv") == [Target("a.attn.qkv.weight")]
    assert keys(fused, "a.attn.to_out.0") == keys(fused, "a.attn.o") == ["a.attn.proj.weight"]
    assert fused.resolve("b.attn.to_v") == fused.resolve("b.attn.kv_proj.1") == [Target("b.attn.kv.weight", (6, 6))]
    assert fused.resolve("b.attn.to_q") == fused.resolve("c.attn.to_q") == []
    split = NameIndex({f"a.attn.{which}_proj.weight": (8, 8) for which in "qkv"} | {"a.mlp.0.weight": (8, 8), "a.mlp.2.weight": (8, 8)})
    parts = [f"a.attn.{which}_proj.weight" for which in "qkv"]
    assert keys(split, "a.attn.qkv") == parts and keys(split, "lora_unet_a_attn_to_kv") == parts[1:]
    assert keys(split, "a.attn.qkv.2") == parts[2:]
    assert keys(split, "a.mlp.fc2") == ["a.mlp.2.weight"] and keys(split, "a.mlp.net.0.proj") == ["a.mlp.0.weight"]


def test_customary_words_do_not_guess():
    # Narrower keys and values, known by the output projection; not known where nothing tells.
    grouped = NameIndex({"a.attn.qkv.weight": (16, 8), "a.attn.out.weight": (8, 8), "b.attn.qkv.weight": (16, 8)})
    assert grouped.resolve("a.attn.to_k") == [Target("a.attn.qkv.weight", (8, 4))]
    assert grouped.resolve("b.attn.to_k") == []
    # A part is missing; an output projection of what is no attention; half a pair.
    some = NameIndex({"a.attn.to_q.weight": (8, 8), "a.attn.to_v.weight": (8, 8), "x.proj.weight": (8, 8), "a.mlp.0.weight": (8, 8)})
    assert some.resolve("a.attn.to_qkv") == some.resolve("x.to_out.0") == some.resolve("a.mlp.fc1") == []
    # Exchanged halves are not cut, and the module that has the name itself wins.
    own = NameIndex({"a.attn.qkv.weight": (24, 8), "a.attn.to_q.weight": (8, 8)})
    assert own.resolve("a.attn.to_q") == [Target("a.attn.to_q.weight")]


@pytest.mark.parametrize(
    ("shapes", "name", "target"),
    [
        (
            {"blocks.block3.blocks.0.block.attn.to_q.0.weight": (8, 8), "blocks.block3.blocks.2.block.layer1.weight": (32, 8)},
            "transformer_blocks.3.ff.net.0.proj", Target("blocks.block3.blocks.2.block.layer1.weight"),
        ),
        (
            {"down_blocks.1.2.attention.attn.to_q.weight": (8, 8), "up_blocks.0.11.attention.attn.out_proj.weight": (8, 8)},
            "up_blocks.0.11.attention.to_out.0", Target("up_blocks.0.11.attention.attn.out_proj.weight"),
        ),
        (
            {"blocks.0.attn.qkv_x.weight": (24, 8), "blocks.0.mlp_x.w1.weight": (32, 8)},
            "transformer_blocks.0.ff.net.0.proj", Target("blocks.0.mlp_x.w1.weight", None, True),
        ),
        (
            {"input_blocks.1.0.in_layers.0.weight": (8,), "input_blocks.1.0.time_stack.in_layers.0.weight": (8,),
             "input_blocks.1.0.time_stack.in_layers.2.weight": (8, 8, 3, 1, 1)},
            "down_blocks.0.resnets.0.temporal_res_block.conv1", Target("input_blocks.1.0.time_stack.in_layers.2.weight"),
        ),
    ],
)
def test_blocks_with_several_numbers_and_exchanged_halves(shapes: dict, name: str, target: Target):
    assert NameIndex(prefixed("diffusion_model.", shapes)).resolve(f"transformer.{name}") == [
        Target(f"diffusion_model.{target.key}", target.rows, target.swap_halves)
    ]


@pytest.mark.parametrize(
    ("module", "family"),
    [
        ("double_stream_modulation_img.lin", "flux2"), ("latent_in", "hunyuan3d"), ("ref_image_refiner.0.attn.to_q", "omnigen2"),
        ("double_stream_blocks.0.block.attn1.to_q", "hidream"), ("blocks.0.attn1.Wqkv", "hunyuan_dit"),
        ("blocks.block0.blocks.0.block.attn.to_q.0", "cosmos"), ("blocks.0.attn.qkv_x", "mochi"),
        ("down_blocks.0.0.depthwise", "cascade"), ("lyric_proj", "ace_step"),
        ("transformer.layers.0.self_attn.to_qkv", "stable_audio"), ("input_blocks.1.1.time_stack.0.attn1.to_q", "svd"),
        ("condition_embedder.time_proj", "wan"),
    ],
)  # fmt: skip
def test_marks_of_families(module: str, family: str):
    assert NameIndex({f"diffusion_model.{module}.weight": (24, 8)}).family == family
