"""Transformers that make videos and sound (and HunyuanImage), in the authors' spelling and in diffusers'."""

from __future__ import annotations

from .layout import Blocks, Layout
from .picture_tables import FLUX

_TEXT_OF_TIME, _TOKENS = "context_embedder.time_text_embed.", "context_embedder.token_refiner."


def _hunyuan(original_has: tuple[str, ...], other_has: tuple[str, ...], time: str) -> Layout:
    """The blocks of Flux behind a text encoder of their own. time: what diffusers calls the embedding of the time step."""
    return Layout(
        original_has=(r"txt_in\.individual_token_refiner\.", *original_has),
        other_has=(r"context_embedder\.token_refiner\.", *other_has),
        blocks=(
            *FLUX.blocks,
            Blocks(
                "txt_in.individual_token_refiner.blocks",
                _TOKENS + "refiner_blocks",
                {
                    "self_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                    "self_attn.proj": ("attn.to_out.0",),
                    "mlp.0": ("ff.net.0.proj",),
                    "mlp.2": ("ff.net.2",),
                    "adaLN_modulation.1": ("norm_out.linear",),
                    "norm1": ("norm1",),
                    "norm2": ("norm2",),
                },
            ),
        ),
        top={
            **FLUX.top,
            "img_in.proj": ("x_embedder.proj",),
            "time_in.in_layer": (time + "timestep_embedder.linear_1",),
            "time_in.out_layer": (time + "timestep_embedder.linear_2",),
            "time_r_in.in_layer": (time + "timestep_embedder_r.linear_1",),
            "time_r_in.out_layer": (time + "timestep_embedder_r.linear_2",),
            "guidance_in.in_layer": (time + "guidance_embedder.linear_1",),
            "guidance_in.out_layer": (time + "guidance_embedder.linear_2",),
            "txt_in.input_embedder": ("context_embedder.proj_in",),
            "txt_in.t_embedder.in_layer": (_TEXT_OF_TIME + "timestep_embedder.linear_1",),
            "txt_in.t_embedder.out_layer": (_TEXT_OF_TIME + "timestep_embedder.linear_2",),
            "txt_in.c_embedder.in_layer": (_TEXT_OF_TIME + "text_embedder.linear_1",),
            "txt_in.c_embedder.out_layer": (_TEXT_OF_TIME + "text_embedder.linear_2",),
            "byt5_in.layernorm": ("context_embedder_2.norm",),
            "byt5_in.fc1": ("context_embedder_2.linear_1",),
            "byt5_in.fc2": ("context_embedder_2.linear_2",),
            "byt5_in.fc3": ("context_embedder_2.linear_3",),
            "vision_in.proj.0": ("image_embedder.norm_in",),
            "vision_in.proj.1": ("image_embedder.linear_1",),
            "vision_in.proj.3": ("image_embedder.linear_2",),
            "vision_in.proj.4": ("image_embedder.norm_out",),
            "cond_type_embedding": ("cond_type_embed",),
        },
        swapped=FLUX.swapped,
    )


HUNYUAN = (
    _hunyuan((r"vector_in\.",), (r"time_text_embed\.",), "time_text_embed."),  # HunyuanVideo
    _hunyuan((r"vision_in\.",), (r"image_embedder\.",), "time_embed."),  # HunyuanVideo 1.5
    _hunyuan((), (), "time_guidance_embed."),  # HunyuanImage 2.1
)

_CONDITION = "condition_embedder."
_WAN_BLOCK = {
    **{f"self_attn.{which}": (f"attn1.to_{which}",) for which in "qkv"},
    "self_attn.o": ("attn1.to_out.0",),
    **{f"cross_attn.{which}": (f"attn2.to_{which}",) for which in "qkv"},
    "cross_attn.o": ("attn2.to_out.0",),
    "cross_attn.k_img": ("attn2.add_k_proj",),
    "cross_attn.v_img": ("attn2.add_v_proj",),
    "self_attn.norm_q": ("attn1.norm_q",),
    "self_attn.norm_k": ("attn1.norm_k",),
    "cross_attn.norm_q": ("attn2.norm_q",),
    "cross_attn.norm_k": ("attn2.norm_k",),
    "cross_attn.norm_k_img": ("attn2.norm_added_k",),
    "ffn.0": ("ffn.net.0.proj",),
    "ffn.2": ("ffn.net.2",),
    "norm3": ("norm2",),  # the other two have no weights
    "modulation": ("scale_shift_table",),
}

def _wan_motion() -> dict[str, tuple[str, ...]]:
    """The encoder of faces in Wan 2.2 Animate; its blocks are counted from one there and from zero in diffusers."""
    theirs, ours = "motion_encoder.enc.net_app.convs.", "motion_encoder."
    table: dict[str, tuple[str, ...]] = {f"{theirs}0.0": (ours + "conv_in",), f"{theirs}8": (ours + "conv_out",)}
    for n in range(7):
        for inner, name in (("conv1.0", "conv1"), ("conv2.1", "conv2"), ("skip.1", "conv_skip")):
            table[f"{theirs}{n + 1}.{inner}"] = (f"{ours}res_blocks.{n}.{name}",)
    return table | {f"motion_encoder.enc.fc.{n}": (f"{ours}motion_network.{n}",) for n in range(5)}


WAN = Layout(
    original_has=(r"blocks\.\d+\.self_attn\.q$", r"head\.head$"),
    other_has=(r"blocks\.\d+\.attn1\.to_q$", r"condition_embedder\.time_proj$"),
    blocks=(
        Blocks("blocks", "blocks", _WAN_BLOCK),
        Blocks(
            "vace_blocks",
            "vace_blocks",
            {**_WAN_BLOCK, "before_proj": ("proj_in",), "after_proj": ("proj_out",)},
        ),
        Blocks(
            "face_adapter.fuser_blocks",
            "face_adapter",
            {
                "linear1_q": ("to_q",),
                "linear1_kv": ("to_k", "to_v"),
                "linear2": ("to_out",),
                "q_norm": ("norm_q",),
                "k_norm": ("norm_k",),
            },
        ),
    ),
    top={
        "time_embedding.0": (_CONDITION + "time_embedder.linear_1",),
        "time_embedding.2": (_CONDITION + "time_embedder.linear_2",),
        "text_embedding.0": (_CONDITION + "text_embedder.linear_1",),
        "text_embedding.2": (_CONDITION + "text_embedder.linear_2",),
        "time_projection.1": (_CONDITION + "time_proj",),
        "img_emb.proj.0": (_CONDITION + "image_embedder.norm1",),
        "img_emb.proj.1": (_CONDITION + "image_embedder.ff.net.0.proj",),
        "img_emb.proj.3": (_CONDITION + "image_embedder.ff.net.2",),
        "img_emb.proj.4": (_CONDITION + "image_embedder.norm2",),
        "head.head": ("proj_out",),
        "head.modulation": ("scale_shift_table",),
        **_wan_motion(),
        "face_encoder.conv1_local.conv": ("face_encoder.conv1_local",),
        "face_encoder.conv2.conv": ("face_encoder.conv2",),
        "face_encoder.conv3.conv": ("face_encoder.conv3",),
    },
)

LTX = Layout(
    original_has=(r"patchify_proj$", r"adaln_single\."),
    other_has=(r"proj_in$", r"time_embed\.emb\."),
    blocks=(
        Blocks(
            "transformer_blocks",
            "transformer_blocks",
            {
                f"attn{n}.{which}_norm": (f"attn{n}.norm_{which}",)
                for n in (1, 2)
                for which in "qk"
            },
        ),
    ),
    top={
        "patchify_proj": ("proj_in",),
        "adaln_single.linear": ("time_embed.linear",),
        "adaln_single.emb.timestep_embedder.linear_1": ("time_embed.emb.timestep_embedder.linear_1",),
        "adaln_single.emb.timestep_embedder.linear_2": ("time_embed.emb.timestep_embedder.linear_2",),
    },
)


def _cosmos1_block() -> dict[str, tuple[str, ...]]:
    table: dict[str, tuple[str, ...]] = {
        "blocks.2.block.layer1": ("ff.net.0.proj",),
        "blocks.2.block.layer2": ("ff.net.2",),
    }
    for n in (0, 1):
        attention = f"blocks.{n}.block.attn"
        table |= {f"{attention}.to_{which}.0": (f"attn{n + 1}.to_{which}",) for which in "qkv"}
        table |= {f"{attention}.to_{which}.1": (f"attn{n + 1}.norm_{which}",) for which in "qk"}
        table[f"{attention}.to_out.0"] = (f"attn{n + 1}.to_out.0",)
    for n in (0, 1, 2):
        table |= {f"blocks.{n}.adaLN_modulation.{i}": (f"norm{n + 1}.linear_{i}",) for i in (1, 2)}
    return table


_COSMOS_TOP = {
    "t_embedder.1.linear_1": ("time_embed.t_embedder.linear_1",),
    "t_embedder.1.linear_2": ("time_embed.t_embedder.linear_2",),
    "x_embedder.proj.1": ("patch_embed.proj",),
    "final_layer.linear": ("proj_out",),
}

COSMOS1 = Layout(
    original_has=(r"blocks\.block\d+\.blocks\.0\.block\.attn\.",),
    other_has=(r"time_embed\.t_embedder\.", r"learnable_pos_embed\."),
    blocks=(Blocks("blocks.block#", "transformer_blocks", _cosmos1_block()),),
    top={
        **_COSMOS_TOP,
        "affline_norm": ("time_embed.norm",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear_1",),
        "final_layer.adaLN_modulation.2": ("norm_out.linear_2",),
        **{f"extra_pos_embedder.pos_emb_{axis}": (f"learnable_pos_embed.pos_emb_{axis}",) for axis in "thw"},
    },
)


def _cosmos2_block() -> dict[str, tuple[str, ...]]:
    table: dict[str, tuple[str, ...]] = {"mlp.layer1": ("ff.net.0.proj",), "mlp.layer2": ("ff.net.2",)}
    for n, attention in ((1, "self_attn"), (2, "cross_attn")):
        table |= {f"{attention}.{which}_proj": (f"attn{n}.to_{which}",) for which in "qkv"}
        table |= {f"{attention}.{which}_norm": (f"attn{n}.norm_{which}",) for which in "qk"}
        table[f"{attention}.output_proj"] = (f"attn{n}.to_out.0",)
    for n, what in ((1, "self_attn"), (2, "cross_attn"), (3, "mlp")):
        table |= {f"adaln_modulation_{what}.{i}": (f"norm{n}.linear_{i}",) for i in (1, 2)}
    return table


# Cosmos Predict 2, and what is made from it (Anima).
COSMOS2 = Layout(
    original_has=(r"blocks\.\d+\.self_attn\.output_proj$", r"blocks\.\d+\.mlp\.layer1$"),
    other_has=(r"time_embed\.t_embedder\.", r"transformer_blocks\.\d+\.norm1\.linear_1$"),
    blocks=(Blocks("blocks", "transformer_blocks", _cosmos2_block()),),
    top={
        **_COSMOS_TOP,
        "t_embedding_norm": ("time_embed.norm",),
        "final_layer.adaln_modulation.1": ("norm_out.linear_1",),
        "final_layer.adaln_modulation.2": ("norm_out.linear_2",),
    },
)

MOCHI = Layout(
    original_has=(r"blocks\.\d+\.attn\.qkv_x$",),
    other_has=(r"transformer_blocks\.\d+\.attn1\.add_q_proj$", r"time_embed\.pooler\."),
    blocks=(
        Blocks(
            "blocks",
            "transformer_blocks",
            {
                "attn.qkv_x": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
                "attn.qkv_y": ("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj"),
                "attn.proj_x": ("attn1.to_out.0",),
                "attn.proj_y": ("attn1.to_add_out",),
                "attn.q_norm_x": ("attn1.norm_q",),
                "attn.k_norm_x": ("attn1.norm_k",),
                "attn.q_norm_y": ("attn1.norm_added_q",),
                "attn.k_norm_y": ("attn1.norm_added_k",),
                "mod_x": ("norm1.linear",),
                "mod_y": ("norm1_context.linear",),
                "mlp_x.w1": ("ff.net.0.proj",),
                "mlp_x.w2": ("ff.net.2",),
                "mlp_y.w1": ("ff_context.net.0.proj",),
                "mlp_y.w2": ("ff_context.net.2",),
            },
            last={"mod_y": ("norm1_context.linear_1",)},
        ),
    ),
    top={
        "x_embedder.proj": ("patch_embed.proj",),
        "t_embedder.mlp.0": ("time_embed.timestep_embedder.linear_1",),
        "t_embedder.mlp.2": ("time_embed.timestep_embedder.linear_2",),
        "t5_y_embedder.to_kv": ("time_embed.pooler.to_kv",),
        "t5_y_embedder.to_q": ("time_embed.pooler.to_q",),
        "t5_y_embedder.to_out": ("time_embed.pooler.to_out",),
        "t5_yproj": ("time_embed.caption_proj",),
        "final_layer.mod": ("norm_out.linear",),
        "final_layer.linear": ("proj_out",),
    },
    swapped=frozenset({"mlp_x.w1", "mlp_y.w1", "final_layer.mod"}),
)

STABLE_AUDIO = Layout(
    original_has=(r"transformer\.layers\.\d+\.self_attn\.to_qkv$",),
    other_has=(r"transformer_blocks\.\d+\.attn1\.to_q$", r"cross_attention_proj\."),
    blocks=(
        Blocks(
            "transformer.layers",
            "transformer_blocks",
            {
                "self_attn.to_qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
                "self_attn.to_out": ("attn1.to_out.0",),
                "cross_attn.to_q": ("attn2.to_q",),
                "cross_attn.to_kv": ("attn2.to_k", "attn2.to_v"),
                "cross_attn.to_out": ("attn2.to_out.0",),
                "ff.ff.0.proj": ("ff.net.0.proj",),
                "ff.ff.2": ("ff.net.2",),
                "pre_norm.gamma": ("norm1",),
                "cross_attend_norm.gamma": ("norm2",),
                "ff_norm.gamma": ("norm3",),
            },
        ),
    ),
    top={
        "transformer.project_in": ("proj_in",),
        "transformer.project_out": ("proj_out",),
        **{f"to_timestep_embed.{i}": (f"timestep_proj.{i}",) for i in (0, 2)},
        **{f"to_global_embed.{i}": (f"global_proj.{i}",) for i in (0, 2)},
        **{f"to_cond_embed.{i}": (f"cross_attention_proj.{i}",) for i in (0, 2)},
    },
)

LAYOUTS = (*HUNYUAN, WAN, LTX, COSMOS1, COSMOS2, MOCHI, STABLE_AUDIO)
