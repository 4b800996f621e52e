"""Transformers that draw pictures, and CLIP, in two spellings each: the authors' and diffusers' (for CLIP Hugging Face's)."""

from __future__ import annotations

from .layout import Blocks, Layout

_TIME_TEXT, _TIME_GUIDANCE = "time_text_embed.", "time_guidance_embed."

FLUX = Layout(
    original_has=(r"(?:double|single)_blocks\.\d+\.(?:img_|txt_|linear1|linear2|modulation)",),
    other_has=(r"single_transformer_blocks\.\d+\.(?:proj_mlp|proj_out|norm\.linear)",),
    blocks=(
        Blocks(
            "double_blocks",
            "transformer_blocks",
            {
                "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "img_attn.proj": ("attn.to_out.0",),
                "txt_attn.proj": ("attn.to_add_out",),
                "img_mod.lin": ("norm1.linear",),
                "txt_mod.lin": ("norm1_context.linear",),
                "img_mlp.0": ("ff.net.0.proj",),
                "img_mlp.2": ("ff.net.2",),
                "txt_mlp.0": ("ff_context.net.0.proj",),
                "txt_mlp.2": ("ff_context.net.2",),
                "img_attn.norm.query_norm.scale": ("attn.norm_q",),
                "img_attn.norm.key_norm.scale": ("attn.norm_k",),
                "txt_attn.norm.query_norm.scale": ("attn.norm_added_q",),
                "txt_attn.norm.key_norm.scale": ("attn.norm_added_k",),
            },
        ),
        Blocks(
            "single_blocks",
            "single_transformer_blocks",
            {
                "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                "linear2": ("proj_out",),
                "modulation.lin": ("norm.linear",),
                "norm.query_norm.scale": ("attn.norm_q",),
                "norm.key_norm.scale": ("attn.norm_k",),
            },
        ),
    ),
    top={
        "img_in": ("x_embedder", "img_in.proj"),
        "txt_in": ("context_embedder",),
        "time_in.in_layer": (_TIME_TEXT + "timestep_embedder.linear_1",),
        "time_in.out_layer": (_TIME_TEXT + "timestep_embedder.linear_2",),
        "vector_in.in_layer": (_TIME_TEXT + "text_embedder.linear_1",),
        "vector_in.out_layer": (_TIME_TEXT + "text_embedder.linear_2",),
        "guidance_in.in_layer": (_TIME_TEXT + "guidance_embedder.linear_1",),
        "guidance_in.out_layer": (_TIME_TEXT + "guidance_embedder.linear_2",),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
        "pos_embed_input": ("controlnet_x_embedder",),
    },
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
)

_FLUX_DOUBLE, _FLUX_SINGLE = FLUX.blocks

FLUX2 = Layout(
    original_has=(r"double_stream_modulation_img\.lin$",),
    other_has=(r"double_stream_modulation_img\.linear$",),
    blocks=(
        Blocks(
            "double_blocks",
            "transformer_blocks",
            {
                **_FLUX_DOUBLE.table,
                # Gate and value are one matrix on both sides, in the same order.
                "img_mlp.0": ("ff.linear_in",),
                "img_mlp.2": ("ff.linear_out",),
                "txt_mlp.0": ("ff_context.linear_in",),
                "txt_mlp.2": ("ff_context.linear_out",),
            },
        ),
        Blocks(
            "single_blocks",
            "single_transformer_blocks",
            {
                **_FLUX_SINGLE.table,
                "linear1": ("attn.to_qkv_mlp_proj",),
                "linear2": ("attn.to_out",),
            },
        ),
    ),
    top={
        **FLUX.top,
        "time_in.in_layer": (_TIME_GUIDANCE + "timestep_embedder.linear_1",),
        "time_in.out_layer": (_TIME_GUIDANCE + "timestep_embedder.linear_2",),
        "guidance_in.in_layer": (_TIME_GUIDANCE + "guidance_embedder.linear_1",),
        "guidance_in.out_layer": (_TIME_GUIDANCE + "guidance_embedder.linear_2",),
        "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
        "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
        "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    },
    swapped=FLUX.swapped,
)

CHROMA = Layout(
    original_has=(r"distilled_guidance_layer\.layers\.\d+\.in_layer$",),
    other_has=(r"distilled_guidance_layer\.layers\.\d+\.linear_1$",),
    blocks=(
        *FLUX.blocks,
        Blocks(
            "distilled_guidance_layer.layers",
            "distilled_guidance_layer.layers",
            {"in_layer": ("linear_1",), "out_layer": ("linear_2",)},
        ),
    ),
    top=FLUX.top,
    swapped=FLUX.swapped,
)

SD3 = Layout(
    original_has=(r"joint_blocks\.\d+\.",),
    other_has=(r"pos_embed\.proj$", r"transformer_blocks\.\d+\.(?:attn\.add_q_proj|norm1_context\.linear)"),
    blocks=(
        Blocks(
            "joint_blocks",
            "transformer_blocks",
            {
                "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
                "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "x_block.attn.proj": ("attn.to_out.0",),
                "x_block.attn2.proj": ("attn2.to_out.0",),
                "context_block.attn.proj": ("attn.to_add_out",),
                "x_block.adaLN_modulation.1": ("norm1.linear",),
                "context_block.adaLN_modulation.1": ("norm1_context.linear",),
                "x_block.mlp.fc1": ("ff.net.0.proj",),
                "x_block.mlp.fc2": ("ff.net.2",),
                "context_block.mlp.fc1": ("ff_context.net.0.proj",),
                "context_block.mlp.fc2": ("ff_context.net.2",),
                "x_block.attn.ln_q": ("attn.norm_q",),
                "x_block.attn.ln_k": ("attn.norm_k",),
                "x_block.attn2.ln_q": ("attn2.norm_q",),
                "x_block.attn2.ln_k": ("attn2.norm_k",),
                "context_block.attn.ln_q": ("attn.norm_added_q",),
                "context_block.attn.ln_k": ("attn.norm_added_k",),
            },
        ),
    ),
    top={
        "x_embedder.proj": ("pos_embed.proj",),
        "pos_embed": ("pos_embed.pos_embed",),
        "context_embedder": ("context_embedder",),
        "t_embedder.mlp.0": (_TIME_TEXT + "timestep_embedder.linear_1",),
        "t_embedder.mlp.2": (_TIME_TEXT + "timestep_embedder.linear_2",),
        "y_embedder.mlp.0": (_TIME_TEXT + "text_embedder.linear_1",),
        "y_embedder.mlp.2": (_TIME_TEXT + "text_embedder.linear_2",),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    },
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
    swapped_if_two=frozenset({"context_block.adaLN_modulation.1"}),
)

# Of the projections only open_clip's is stored transposed, so `text_projection` has no counterpart here.
CLIP = Layout(
    original_has=(r"transformer\.resblocks\.",),
    other_has=(r"encoder\.layers\.\d+\.(?:self_attn|mlp)\.",),
    blocks=(
        Blocks(
            "transformer.resblocks",
            "encoder.layers",
            {
                "attn.in_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "attn.out_proj": ("self_attn.out_proj",),
                "mlp.c_fc": ("mlp.fc1",),
                "mlp.c_proj": ("mlp.fc2",),
                "ln_1": ("layer_norm1",),
                "ln_2": ("layer_norm2",),
            },
        ),
    ),
    top={
        "token_embedding": ("embeddings.token_embedding",),
        "positional_embedding": ("embeddings.position_embedding",),
        "ln_final": ("final_layer_norm",),
    },
)

AURAFLOW = Layout(
    original_has=(r"(?:double|single)_layers\.\d+\.attn\.w1q",),
    other_has=(r"(?:joint|single)_transformer_blocks\.\d+\.ff\.out_projection",),
    blocks=(
        Blocks(
            "double_layers",
            "joint_transformer_blocks",
            {
                "attn.w2q": ("attn.to_q",),
                "attn.w2k": ("attn.to_k",),
                "attn.w2v": ("attn.to_v",),
                "attn.w2o": ("attn.to_out.0",),
                "attn.w1q": ("attn.add_q_proj",),
                "attn.w1k": ("attn.add_k_proj",),
                "attn.w1v": ("attn.add_v_proj",),
                "attn.w1o": ("attn.to_add_out",),
                "mlpX.c_fc1": ("ff.linear_1",),
                "mlpX.c_fc2": ("ff.linear_2",),
                "mlpX.c_proj": ("ff.out_projection",),
                "mlpC.c_fc1": ("ff_context.linear_1",),
                "mlpC.c_fc2": ("ff_context.linear_2",),
                "mlpC.c_proj": ("ff_context.out_projection",),
                "modX.1": ("norm1.linear",),
                "modC.1": ("norm1_context.linear",),
            },
        ),
        Blocks(
            "single_layers",
            "single_transformer_blocks",
            {
                "attn.w1q": ("attn.to_q",),
                "attn.w1k": ("attn.to_k",),
                "attn.w1v": ("attn.to_v",),
                "attn.w1o": ("attn.to_out.0",),
                "modCX.1": ("norm1.linear",),
                "mlp.c_fc1": ("ff.linear_1",),
                "mlp.c_fc2": ("ff.linear_2",),
                "mlp.c_proj": ("ff.out_projection",),
            },
        ),
    ),
    top={
        "positional_encoding": ("pos_embed.pos_embed",),
        "t_embedder.mlp.0": ("time_step_proj.linear_1",),
        "t_embedder.mlp.2": ("time_step_proj.linear_2",),
        "cond_seq_linear": ("context_embedder",),
        "init_x_linear": ("pos_embed.proj",),
        "final_linear": ("proj_out",),
        "modF.1": ("norm_out.linear",),
    },
    swapped=frozenset({"modF.1"}),
)

_ADALN = "adaln_single.emb."

PIXART = Layout(
    original_has=(r"blocks\.\d+\.cross_attn\.kv_linear$",),
    other_has=(r"pos_embed\.proj$", r"caption_projection\.", r"transformer_blocks\.\d+\.attn1\."),
    blocks=(
        Blocks(
            "blocks",
            "transformer_blocks",
            {
                "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
                "attn.proj": ("attn1.to_out.0",),
                "cross_attn.q_linear": ("attn2.to_q",),
                "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
                "cross_attn.proj": ("attn2.to_out.0",),
                "mlp.fc1": ("ff.net.0.proj",),
                "mlp.fc2": ("ff.net.2",),
            },
        ),
    ),
    top={
        "x_embedder.proj": ("pos_embed.proj",),
        "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
        "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
        "y_embedder.y_embedding": ("caption_projection.y_embedding",),
        "t_embedder.mlp.0": (_ADALN + "timestep_embedder.linear_1",),
        "t_embedder.mlp.2": (_ADALN + "timestep_embedder.linear_2",),
        "csize_embedder.mlp.0": (_ADALN + "resolution_embedder.linear_1",),
        "csize_embedder.mlp.2": (_ADALN + "resolution_embedder.linear_2",),
        "ar_embedder.mlp.0": (_ADALN + "aspect_ratio_embedder.linear_1",),
        "ar_embedder.mlp.2": (_ADALN + "aspect_ratio_embedder.linear_2",),
        "t_block.1": ("adaln_single.linear",),
        "final_layer.linear": ("proj_out",),
        "final_layer.scale_shift_table": ("scale_shift_table",),
    },
)

_Z_BLOCK = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
    "attention.q_norm": ("attention.norm_q",),
    "attention.k_norm": ("attention.norm_k",),
}

Z_IMAGE = Layout(
    original_has=(r"(?:noise_refiner|layers)\.\d+\.attention\.qkv$",),
    other_has=(r"(?:noise_refiner|layers)\.\d+\.attention\.to_q$",),
    blocks=tuple(Blocks(name, name, _Z_BLOCK) for name in ("layers", "noise_refiner", "context_refiner")),
    top={
        "final_layer.linear": ("all_final_layer.2-1.linear",),
        "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
        "x_embedder": ("all_x_embedder.2-1",),
    },
)

_TIME_CAPTION = "time_caption_embed."
_LUMINA_CONTEXT = {
    "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.out": ("attn.to_out.0",),
    "attention.q_norm": ("attn.norm_q",),
    "attention.k_norm": ("attn.norm_k",),
    "feed_forward.w1": ("feed_forward.linear_1",),
    "feed_forward.w2": ("feed_forward.linear_2",),
    "feed_forward.w3": ("feed_forward.linear_3",),
    "attention_norm1": ("norm1",),
    "attention_norm2": ("norm2",),
}
_LUMINA_BLOCK = {
    **_LUMINA_CONTEXT,
    "attention_norm1": ("norm1.norm",),
    "adaLN_modulation.1": ("norm1.linear",),
}

LUMINA2 = Layout(
    original_has=(r"layers\.\d+\.attention\.qkv$", r"layers\.\d+\.adaLN_modulation\.1$"),
    other_has=(r"layers\.\d+\.feed_forward\.linear_1$", r"layers\.\d+\.norm1\.linear$", r"norm_out\.linear_1$"),
    blocks=(
        Blocks("layers", "layers", _LUMINA_BLOCK),
        Blocks("noise_refiner", "noise_refiner", _LUMINA_BLOCK),
        Blocks("context_refiner", "context_refiner", _LUMINA_CONTEXT),
    ),
    top={
        "t_embedder.mlp.0": (_TIME_CAPTION + "timestep_embedder.linear_1",),
        "t_embedder.mlp.2": (_TIME_CAPTION + "timestep_embedder.linear_2",),
        "cap_embedder.0": (_TIME_CAPTION + "caption_embedder.0",),
        "cap_embedder.1": (_TIME_CAPTION + "caption_embedder.1",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear_1",),
        "final_layer.linear": ("norm_out.linear_2",),
    },
)

_TIME_EXTRA = "time_extra_emb."

HUNYUAN_DIT = Layout(
    original_has=(r"blocks\.\d+\.attn1\.Wqkv$",),
    other_has=(r"blocks\.\d+\.attn1\.to_q$", r"time_extra_emb\."),
    blocks=(
        Blocks(
            "blocks",
            "blocks",
            {
                "attn1.Wqkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
                "attn1.out_proj": ("attn1.to_out.0",),
                "attn1.q_norm": ("attn1.norm_q",),
                "attn1.k_norm": ("attn1.norm_k",),
                "attn2.q_proj": ("attn2.to_q",),
                "attn2.kv_proj": ("attn2.to_k", "attn2.to_v"),
                "attn2.out_proj": ("attn2.to_out.0",),
                "attn2.q_norm": ("attn2.norm_q",),
                "attn2.k_norm": ("attn2.norm_k",),
                "default_modulation.1": ("norm1.linear",),
                "mlp.fc1": ("ff.net.0.proj",),
                "mlp.fc2": ("ff.net.2",),
            },
        ),
    ),
    top={
        "x_embedder.proj": ("pos_embed.proj",),
        "t_embedder.mlp.0": (_TIME_EXTRA + "timestep_embedder.linear_1",),
        "t_embedder.mlp.2": (_TIME_EXTRA + "timestep_embedder.linear_2",),
        "mlp_t5.0": ("text_embedder.linear_1",),
        "mlp_t5.2": ("text_embedder.linear_2",),
        "extra_embedder.0": (_TIME_EXTRA + "extra_embedder.linear_1",),
        "extra_embedder.2": (_TIME_EXTRA + "extra_embedder.linear_2",),
        "style_embedder": (_TIME_EXTRA + "style_embedder",),
        "pooler.positional_embedding": (_TIME_EXTRA + "pooler.positional_embedding",),
        **{f"pooler.{which}_proj": (f"{_TIME_EXTRA}pooler.{which}_proj",) for which in "qkvc"},
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    },
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
)

# ComfyUI keeps query, key and value apart where the authors' own files have one matrix, `attention.attn.in_proj`.
_CASCADE_ATTENTION = {
    "attention.attn.to_q": ("attention.to_q",),
    "attention.attn.to_k": ("attention.to_k",),
    "attention.attn.to_v": ("attention.to_v",),
    "attention.attn.out_proj": ("attention.to_out.0",),
}

CASCADE = Layout(
    original_has=(r"down_blocks\.\d+\.\d+\.attention\.attn\.to_q$",),
    other_has=(r"down_blocks\.\d+\.\d+\.attention\.to_q$",),
    blocks=tuple(Blocks(f"{way}_blocks.#.#", f"{way}_blocks.#.#", _CASCADE_ATTENTION) for way in ("down", "up")),
    top={"clip_mapper": ("clip_txt_pooled_mapper",)},
)

# The more special stand first: a layout that also fits gives further names only.
LAYOUTS = (FLUX2, CHROMA, FLUX, SD3, AURAFLOW, PIXART, LUMINA2, Z_IMAGE, HUNYUAN_DIT, CASCADE, CLIP)
