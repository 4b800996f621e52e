"""Files with a layer twice, with the layer's own weight, with numbers that make no rotation, or metadata that is no JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from oft_core import (
    Diff,
    FormatError,
    NameIndex,
    ReadOptions,
    ShapeError,
    Strength,
    ValueFault,
    describe,
    read_tensors,
)
from oft_core.cli import main

Q = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
K = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
DIFFUSERS = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def rand(*shape: int, seed: int = 0, size: float = 0.1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


BASE = {
    f"model.{Q}.weight": rand(16, 16, seed=1, size=1.0),
    "model.diffusion_model.input_blocks.1.1.proj_in.weight": rand(16, 16, 1, 1, seed=2, size=1.0),
    "logit_scale": torch.tensor(1.0),
}
INDEX = NameIndex({k: t.shape for k, t in BASE.items()})


def applied(tensors: dict[str, torch.Tensor], strength: float = 1.0, mode: str = "rotation", **kw) -> torch.Tensor:
    """The attention weight after all patches that the file has for it."""
    weight = BASE[f"model.{Q}.weight"].clone()
    for patch in read_tensors(tensors, **kw).bind(INDEX).patches:
        if patch.key == f"model.{Q}.weight":
            patch.apply_(weight, Strength(strength, mode))
    return weight


@pytest.mark.parametrize("other", [f"oft_unet_{K[10:]}", DIFFUSERS, Q, f"lycoris_{K[10:]}"])
def test_a_layer_under_two_names_is_applied_once(other: str) -> None:
    blocks = rand(4, 4, 4)
    once = applied({f"{K}.oft_blocks": blocks})
    twice = {f"{K}.oft_blocks": blocks, f"{other}.oft_blocks": blocks.clone()}
    assert torch.equal(applied(twice), once) and not torch.equal(once, BASE[f"model.{Q}.weight"])
    (reason,) = read_tensors(twice).bind(INDEX).unmatched.values()
    assert "applied once" in reason and reason.split()[4].rstrip(",") in (K, other)


def test_a_rotation_and_a_difference_of_one_layer_under_two_names_both_count() -> None:
    rotation, change = {f"{K}.oft_blocks": rand(4, 4, 4)}, {f"{Q}.diff": rand(16, 16, seed=5)}
    expected = applied(rotation) + change[f"{Q}.diff"]
    assert torch.allclose(applied(rotation | change), expected, atol=1e-6)


def test_parts_of_a_fused_layer_are_not_the_same_layer() -> None:
    index = NameIndex({"double_blocks.0.img_attn.qkv.weight": (48, 16)})
    part = "transformer.transformer_blocks.0.attn.to_{}.oft_blocks"
    three = read_tensors({part.format(x): rand(4, 4, 4, seed=i) for i, x in enumerate("qkv")}).bind(index)
    assert len(three.matched) == 3 and not three.unmatched
    fused = read_tensors({part.format("k"): rand(4, 4, 4), "lora_unet_double_blocks_0_img_attn_qkv.oft_blocks": rand(12, 4, 4)})
    assert len(fused.bind(index).matched) == 1


def test_the_layers_own_weight_is_turned_as_peft_does() -> None:
    """PEFT writes embeddings' base weights into its files; every layer's, in a live state dict, are the base model's unless asked for."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=12
    )
    model = transformers.CLIPTextModel(config).eval()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    wrapped = peft.get_peft_model(model, peft.OFTConfig(oft_block_size=4, r=0, target_modules=["q_proj", "token_embedding"]))
    for i, (name, parameter) in enumerate(wrapped.named_parameters()):
        if "oft_" in name:
            parameter.data = rand(*parameter.shape, seed=i)
        elif name.endswith("base_layer.weight"):
            parameter.data = parameter.data + rand(*parameter.shape, seed=i)
    state = {k: v.detach().clone() for k, v in wrapped.state_dict().items() if v.is_floating_point()}
    truth = wrapped.merge_and_unload().state_dict()

    config = {"peft_type": "OFT", "peft_version": peft.__version__, "oft_block_size": 4}
    plain = read_tensors(state, config=config).bind(NameIndex({k: v.shape for k, v in base.items()}))
    own = [p.key for p in plain.patches if isinstance(p.op, Diff)]
    assert len(own) == 1 and "token_embedding" in own[0]
    adapter = read_tensors(state, config=config, options=ReadOptions(peft_base="apply"))
    assert adapter.components == ["te1"]
    binding = adapter.bind(NameIndex({k: v.shape for k, v in base.items()}))
    for patch in binding.patches:
        patch.apply_(base[patch.key], Strength())
    turned = [k for k in base if "q_proj.weight" in k or "token_embedding" in k]
    assert len(turned) == 3
    for key in turned:
        assert torch.allclose(base[key], truth[key], atol=2e-6), key


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        ({f"{K}.oft_R.weight": torch.full((4, 6), 1e30)}, ValueFault, "generator of norm"),
        ({f"{K}.oft_R.weight": torch.full((4, 6), 200.0)}, ValueFault, "generator of norm"),
        ({f"{K}.oft_blocks": rand(4, 4, 4, size=1e30)}, ValueFault, "generator of norm"),
        ({f"{K}.oft_R.weight": rand(4, 6), f"{K}.dora_log_multiplier": torch.full((16,), 200.0)}, ValueFault, "not finite"),
        ({f"{K}.oft_R.weight": rand(4, 6), f"{K}.oft_R.clipped_oft": torch.tensor(-1.0)}, FormatError, "negative"),
        ({f"{K}.oft_R.weight": rand(4, 6), f"{K}.dora_scale": torch.zeros(0)}, ShapeError, "empty"),
        ({f"{K}.oft_blocks": rand(4, 4, 4), f"{K}.rescale": torch.zeros(0)}, ShapeError, "empty"),
    ],
)
def test_numbers_that_make_no_rotation(tensors: dict[str, torch.Tensor], error: type, words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        read_tensors(tensors, name="a.safetensors")
    assert "a.safetensors" in str(caught.value) and (K in str(caught.value) or error is FormatError)


def test_many_terms_of_a_series_in_its_range_are_no_fault() -> None:
    """The cheap bound of a large block lies above 1 where its true norm does not."""
    tensors = {f"{K}.oft_R.weight": rand(1, 120, size=0.11), f"{K}.oft_R.neumann_terms": torch.tensor(60.0)}
    op = read_tensors(tensors).entries[K].pieces(None)[0].op
    assert op.lam_bound() > 1.2 and float(op.largest_lam().max()) < 1


@pytest.mark.parametrize("count", [4, 15, 32])
def test_column_factors_have_to_fit(count: int) -> None:
    adapter = read_tensors({f"{K}.oft_R.weight": rand(4, 6), f"{K}.dora_log_multiplier_col": rand(count)})
    with pytest.raises(ShapeError, match=f"{count} factors.*16 columns"):
        adapter.bind(INDEX)


def test_a_difference_with_other_rows_does_not_fit() -> None:
    with pytest.raises(ShapeError, match="difference"):
        read_tensors({f"{K}.oft_blocks": rand(4, 4, 4), f"{K}.diff": rand(256)}).bind(INDEX)


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{K}.oft_R.weight": rand(4, 6), f"{K}.oft_coft_buffer": torch.tensor(1.0), f"{K}.oft_coft_eps_buffer": torch.tensor(-1.0)},
        {f"{K}.oft_R.weight": rand(4, 6)},
    ],
)
def test_a_negative_limit_is_refused(tensors: dict[str, torch.Tensor]) -> None:
    """It would multiply the generator by a negative number, so turn the other way."""
    metadata = {"ot_config": json.dumps({"oft_coft": True, "coft_eps": -1})}
    with pytest.raises(FormatError, match="negative"):
        read_tensors(tensors, metadata)
    if len(tensors) == 1:
        with pytest.raises(FormatError, match="negative"):
            read_tensors({f"base_model.model.{Q}.oft_R.weight": rand(4, 6)}, config={"peft_type": "OFT", "coft": True, "eps": -1})


def test_a_limit_of_zero_lets_nothing_through_and_is_valid_json() -> None:
    metadata = {"ot_config": json.dumps({"oft_coft": True, "coft_eps": 0})}
    tensors = {f"{K}.oft_R.weight": rand(4, 6)}
    assert torch.allclose(applied(tensors, metadata=metadata), BASE[f"model.{Q}.weight"], atol=1e-7)
    report = describe(read_tensors(tensors, metadata))
    assert "a radius of 0" in report.to_text()
    json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


DEEP, LONG = "[" * 100_000, "1" * 5_000


@pytest.mark.parametrize(
    "metadata",
    [
        {"ss_network_args": '{"constraint": NaN}'}, {"ss_network_args": f'{{"constraint": {"1" * 400}}}'},
        {"ss_network_args": f'{{"constraint": {LONG}}}'}, {"ss_network_args": DEEP},
        {"ss_network_module": "networks.oft", "ss_network_alpha": "nan"},
        {"ss_tag_frequency": '{"a": {"x": Infinity, "y": NaN, "z": 3}}'}, {"ss_tag_frequency": DEEP},
        {"ss_tag_frequency": f'{{"a": {{"x": {LONG}}}}}'},
    ],
)
def test_metadata_that_is_no_number_changes_nothing(metadata: dict[str, str]) -> None:
    tensors = {f"{K}.oft_blocks": rand(4, 4, 4), f"{K}.alpha": torch.tensor(0.0)}
    plain = applied({f"{K}.oft_blocks": rand(4, 4, 4)})
    assert torch.equal(applied(tensors, metadata=metadata), plain)
    report = describe(read_tensors(tensors, metadata))
    assert report.trigger_words == (["z"] if "Infinity" in str(metadata) else [])
    json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("eps", ["1" * 400, "NaN"])
def test_a_limit_that_is_no_number_is_an_error(eps: str) -> None:
    with pytest.raises(FormatError, match="coft_eps"):
        read_tensors({f"{K}.oft_R.weight": rand(4, 6)}, {"ot_config": f'{{"oft_coft": true, "coft_eps": {eps}}}'})


@pytest.mark.parametrize("text", [DEEP, f'{{"peft_type": "OFT", "eps": {LONG}}}'])
def test_a_config_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    save_file({f"base_model.model.{Q}.oft_R.weight": rand(4, 6)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(text)
    assert main(["inspect", str(tmp_path)]) == 1


def test_odd_version_numbers_and_keys() -> None:
    config = {"peft_type": "OFT", "peft_version": "0.\N{SUPERSCRIPT TWO}"}
    assert read_tensors({f"base_model.model.{Q}.oft_R.weight": rand(4, 6)}, config=config).dialect == "F8"
    odd = ("oft_blocks.00", "oft_blocks.\N{ARABIC-INDIC DIGIT ZERO}", "oft_blocks." + "9" * 5_000)
    adapter = read_tensors({f"{K}.oft_blocks": rand(4, 4, 4)} | {f"{K}.{s}": rand(4, 4, 4) for s in odd})
    assert len(adapter.unknown) == 3


def test_a_parameter_without_rows_is_no_layer() -> None:
    adapter = read_tensors({f"{K}.oft_blocks": rand(4, 4, 4), "logit_scale.oft_blocks": rand(1, 1, 1)})
    assert adapter.bind(INDEX).unmatched == {"logit_scale": "the layer has no parameter of this kind"}


def test_types_that_adapters_do_not_have() -> None:
    with pytest.raises(FormatError, match="float4"):
        read_tensors({f"{K}.oft_blocks": rand(4, 4, 4), f"{K}.rescale": torch.empty(16, dtype=torch.float4_e2m1fn_x2)})


def files(folder: Path, tensors: dict[str, torch.Tensor]) -> list[str]:
    save_file(tensors, folder / "a.safetensors")
    save_file(BASE, folder / "base.safetensors")
    return ["merge", str(folder / "a.safetensors"), str(folder / "base.safetensors"), "-o"]


def test_outputs_that_are_no_files_are_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = files(tmp_path, {f"{K}.oft_blocks": rand(4, 4, 4)})
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("oft_core.merge.read_header", lambda path: pytest.fail("the work began"))
    for name in ("folder", "pipe"):
        assert main([*command, str(tmp_path / name)]) == 1
        assert f"file: {tmp_path / name};" in capsys.readouterr().err
    assert (tmp_path / "folder").is_dir() and (tmp_path / "pipe").is_fifo()


def test_a_full_disk_names_the_output(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    command = files(tmp_path, {f"{K}.oft_blocks": rand(4, 4, 4)})

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("oft_core.merge.tensor_bytes", full)
    assert main([*command, str(tmp_path / "out.safetensors")]) == 1
    error = capsys.readouterr().err
    assert f"file: {tmp_path / 'out.safetensors'}; found: No space left" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "base.safetensors"]


def test_names_from_a_file_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hostile = "\x1b]0;owned\x07\x1b[2J"
    tensors = {f"{K}.oft_blocks": rand(4, 4, 4), f"{hostile}x.lora_down.weight": rand(2, 2), f"{hostile}.oft_blocks": rand(4, 4, 4)}
    out = tmp_path / "out.safetensors"
    assert main([*files(tmp_path, tensors), str(out), "--allow-partial"]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err and "owned" in captured.out and "owned" in captured.err
    assert len(load_file(out)) == len(BASE)


# ------------------------------------------------------------------ text encoders whose names have no prefix


def clip_names(layers: int, root: str, width: int) -> dict[str, tuple[int, int]]:
    return {f"{root}encoder.layers.{i}.self_attn.q_proj.weight": (width, width) for i in range(layers)}


@pytest.mark.parametrize("inner", ["text_model.", ""])
@pytest.mark.parametrize(("layers", "part", "width"), [(12, "te1", 12), (32, "te2", 20)])
def test_peft_files_of_a_clip_go_to_the_clip_of_their_depth(inner: str, layers: int, part: str, width: int) -> None:
    """``text_model`` is missing in files made with transformers 5; shared blocks would fit either encoder."""
    index = NameIndex(
        clip_names(12, "text_encoders.clip_l.transformer.text_model.", 12)
        | clip_names(32, "text_encoders.clip_g.transformer.text_model.", 20)
        | {f"model.{Q}.weight": (16, 16)}
    )
    adapter = read_tensors(
        {f"base_model.model.{inner}encoder.layers.{i}.self_attn.q_proj.oft_R.weight": rand(1, 6) for i in range(layers)},
        config={"peft_type": "OFT", "peft_version": "0.18.0", "block_share": True},
    )
    binding = adapter.bind(index)
    assert adapter.components == [part] and len(binding.matched) == layers
    assert all(f"clip_{'lg'[part == 'te2']}" in p.key and p.component == part and p.op.axis == width for p in binding.patches)


def test_a_bare_clip_of_transformers_5_is_a_text_encoder() -> None:
    for layers, part in ((12, "te1"), (32, "te2")):
        index = NameIndex(clip_names(layers, "", 12))
        name = f"lora_{part}_text_model_encoder_layers_3_self_attn_q_proj"
        assert [t.key for t in index.resolve(name)] == ["encoder.layers.3.self_attn.q_proj.weight"]


