"""PEFT's documented example, saved in every way a user saves it, against PEFT's own merge.

The documentation wraps the parts of a Stable Diffusion pipeline in ``OFTModel``. What is then saved, by diffusers' and transformers'
``save_pretrained`` or by ``state_dict()``, is the state of the whole model: no config lies beside it, the adapter's name stands in
the keys, and the base model's weights stand beside the rotations. What tensors cannot tell comes from read options.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from oft_core import (
    Adapter,
    FileError,
    FormatError,
    NameIndex,
    ReadOptions,
    Strength,
    describe,
    load_adapter,
    read_tensors,
)

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

LIMIT = 1e-5
#: The target modules of PEFT's documentation of OFT.
UNET = ["proj_in", "proj_out", "to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
TEXT = ["k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2"]


def unet() -> nn.Module:
    """SD1.5's names in small: 1x1 convolutions as proj_in and proj_out, attention, feed-forward."""
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=24, attention_head_dim=2, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def text_encoder() -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=60, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=12,
        bos_token_id=1, eos_token_id=2,
    )
    return transformers.CLIPTextModel(config)


PARTS = {"unet": (unet, UNET, "conv_out"), "text": (text_encoder, TEXT, "final_layer_norm")}
WRAPPERS = ("OFTModel", "get_peft_model")


class Trained:
    """A wrapped model with random rotations, its base and PEFT's merge. ``biases``: those that the config trains have moved too."""

    def __init__(self, part: str, wrapper: str, kind: str = "OFT", **options: object):
        make, targets, head = PARTS[part]
        torch.manual_seed(3)
        model = make().eval()
        for p in model.parameters():  # norms and biases of a fresh model are 1 and 0
            p.data += 0.02 * torch.randn_like(p)
        self.base = {k: v.clone() for k, v in model.state_dict().items()}
        if kind == "OFT" and not options.get("oft_block_size"):
            options = {"r": 4, "oft_block_size": 0, **options}
        if options.pop("head", False):
            options["modules_to_save"] = [head]
        name = options.pop("name", "default")
        config = getattr(peft, f"{kind}Config")(target_modules=targets, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = (
                peft.get_peft_model(model, config, adapter_name=name) if wrapper == "get_peft_model"
                else getattr(peft, f"{kind}Model")(model, config, name)
            )
        for key, p in self.model.named_parameters():
            if "oft_R" in key or "boft_R" in key:
                nn.init.normal_(p, std=0.1)
            elif "boft_s" in key or "modules_to_save" in key or (p.requires_grad and key.endswith("bias")):
                p.data += 0.2 * torch.randn_like(p)
        self.state = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.saved = peft.get_peft_model_state_dict(self.model, adapter_name=name) if wrapper == "get_peft_model" else {}
        self.config = config

    def merged(self) -> dict[str, torch.Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {k: v.clone() for k, v in self.model.merge_and_unload().state_dict().items()}


def check(trained: Trained, adapter: Adapter) -> None:
    """Every parameter of PEFT's merge, as relative error of the change; what PEFT leaves alone stays as it is, bit for bit."""
    got = {k: v.clone() for k, v in trained.base.items()}
    binding = adapter.bind(NameIndex({k: tuple(v.shape) for k, v in got.items()}))
    assert not binding.unmatched
    for patch in binding.patches:
        patch.apply_(got[patch.key], Strength())
    changed = 0
    for key, want in trained.merged().items():
        change = (want.double() - trained.base[key].double()).norm()
        if change == 0:
            assert torch.equal(got[key], trained.base[key]), f"{key} must not change"
            continue
        changed += 1
        error = ((got[key].double() - want.double()).norm() / change).item()
        assert error <= LIMIT, f"{key}: relative error {error:.2e}"
    assert changed >= 12


#: Options of the config that change the mathematics -> the read options that say so where no config does.
OPTIONS = {
    "documented": ({}, {}),
    "exact": ({"use_cayley_neumann": False}, {"peft_neumann": "exact"}),
    "terms": ({"num_cayley_neumann_terms": 7}, {"peft_terms": 7}),
    "coft": ({"coft": True, "eps": 0.2}, {"peft_coft": 0.2}),
    "share": ({"block_share": True}, {}),
    "share_coft_exact": ({"block_share": True, "coft": True, "eps": 0.3, "use_cayley_neumann": False}, {"peft_coft": 0.3, "peft_neumann": "exact"}),
    "block_size": ({"oft_block_size": 8}, {}),
    "bias_all": ({"bias": "all"}, {"peft_base": "apply"}),
    "bias_oft_only": ({"bias": "oft_only"}, {"peft_base": "apply"}),
    "another_name": ({"name": "my-dog"}, {}),
    "module_dropout": ({"module_dropout": 0.3}, {}),
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("part", PARTS)
def test_the_state_of_a_whole_model(part: str, wrapper: str, case: str, tmp_path: Path) -> None:
    options, reading = OPTIONS[case]
    trained = Trained(part, wrapper, **options)
    save_file({k: v.contiguous() for k, v in trained.state.items() if v.is_floating_point()}, tmp_path / "state.safetensors")
    adapter = load_adapter(tmp_path / "state.safetensors", ReadOptions(**reading))
    assert adapter.dialect == "F9" and not adapter.unknown
    text = describe(adapter).to_text()
    assert "PEFT" in text and ("tensors of the base model" in text) == ("peft_base" not in reading)
    if not reading:
        assert "peft_neumann" in text and "peft_coft" in text
    check(trained, adapter)


@pytest.mark.parametrize("case", [c for c in OPTIONS if c != "another_name"])
@pytest.mark.parametrize("part", PARTS)
def test_a_state_with_its_config_beside_it_needs_no_option(part: str, case: str, tmp_path: Path) -> None:
    trained = Trained(part, "OFTModel", **OPTIONS[case][0])
    save_file({k: v.contiguous() for k, v in trained.state.items() if v.is_floating_point()}, tmp_path / "state.safetensors")
    trained.config.save_pretrained(str(tmp_path))
    check(trained, load_adapter(tmp_path / "state.safetensors"))


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("part", PARTS)
def test_the_adapters_own_state(part: str, case: str) -> None:
    """get_peft_model_state_dict: no base model, no name in the keys, and no config with it."""
    options, reading = OPTIONS[case]
    trained = Trained(part, "get_peft_model", **options)
    check(trained, read_tensors(trained.saved, options=ReadOptions(**{k: v for k, v in reading.items() if k != "peft_base"})))


@pytest.mark.parametrize("part", PARTS)
def test_as_diffusers_and_transformers_save_it(part: str, tmp_path: Path) -> None:
    """``model.unet.save_pretrained``: a folder, named as the model is."""
    trained = Trained(part, "OFTModel")
    trained.model.save_pretrained(str(tmp_path / "saved" / part))
    check(trained, load_adapter(tmp_path / "saved" / part))
    with pytest.raises(FileError, match=part):
        load_adapter(tmp_path / "saved")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_boft_states(part: str, wrapper: str) -> None:
    trained = Trained(part, wrapper, "BOFT", boft_block_size=4)
    adapter = read_tensors(trained.state)
    assert adapter.dialect == "F10" and not adapter.unknown
    check(trained, adapter)


@pytest.mark.parametrize("part", PARTS)
def test_modules_trained_whole(part: str) -> None:
    trained = Trained(part, "get_peft_model", head=True)
    adapter = read_tensors(trained.state)
    assert not adapter.unknown
    check(trained, adapter)


def test_old_peft_versions_states() -> None:
    """``oft_r.default`` (0.7-0.15) is the same as its saved form; the merge of those is in the golden cases."""
    a, rows = torch.randn(4, 6, 6) * 0.1, torch.rand(24, 1)
    for extra in ({}, {"oft_s": rows}):
        saved = read_tensors({f"base_model.model.a.to_q.{k}": v for k, v in {"oft_r": a, **extra}.items()})
        live = read_tensors({
            **{f"a.to_q.{k}.my_name": v for k, v in {"oft_r": a, **extra}.items()}, "a.to_q.base_layer.weight": torch.randn(24, 24),
        })
        assert live.dialect == saved.dialect and not live.unknown
        one, other = torch.eye(24), torch.eye(24)
        for adapter, weight in ((saved, one), (live, other)):
            next(iter(adapter.operations().values()))[0].op.apply_(weight, Strength())
        assert torch.equal(one, other) and not torch.equal(one, torch.eye(24))


def test_of_several_adapters_one_is_chosen() -> None:
    trained = Trained("unet", "get_peft_model")
    config = peft.OFTConfig(r=4, oft_block_size=0, target_modules=UNET)
    trained.model.add_adapter("second", config)
    for key, p in trained.model.named_parameters():
        if "oft_R.second" in key:
            nn.init.normal_(p, std=0.2)
    state = trained.model.state_dict()
    with pytest.raises(FormatError, match="default, second"):
        read_tensors(state)
    with pytest.raises(FormatError, match="no adapter of this name"):
        read_tensors(state, options=ReadOptions(adapter_name="third"))
    trained.model.set_adapter("second")
    check(trained, read_tensors(state, options=ReadOptions(adapter_name="second")))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_fsdp_wrapped_module.", "module._orig_mod."])
def test_states_of_wrapped_models(prefix: str) -> None:
    trained = Trained("unet", "get_peft_model")
    check(trained, read_tensors({prefix + k: v for k, v in trained.state.items()}))
    inside = {k.replace("transformer_blocks.0.", f"transformer_blocks.0.{prefix}"): v for k, v in trained.state.items()}
    check(trained, read_tensors(inside))


def test_bare_names_need_the_writer() -> None:
    """Stripped of every sign of PEFT, a file is taken for OneTrainer's, which turns convolutions the other way; the note says so."""
    trained = Trained("unet", "get_peft_model")
    bare = {k.removeprefix("base_model.model."): v for k, v in trained.saved.items()}
    shapes = {k: tuple(v.shape) for k, v in trained.base.items()}
    guessed = read_tensors(bare)
    guessed.bind(NameIndex(shapes))
    assert guessed.dialect == "F11" and any("oft_writer" in n for n in guessed.notes)
    check(trained, read_tensors(bare, options=ReadOptions(oft_writer="peft")))


def test_a_file_that_speaks_of_oft_is_called_nothing_else() -> None:
    with pytest.raises(FormatError, match="OFT keys are not of a known form"):
        read_tensors({"transformer_blocks.0.attn.to_q.oft_unheard.weight": torch.zeros(3), "down_blocks.0.weight": torch.zeros(3)})


def test_the_command_line_knows_the_options(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from oft_core.cli import main

    trained = Trained("unet", "OFTModel", use_cayley_neumann=False, coft=True, eps=0.2, name="dog")
    save_file(trained.state, tmp_path / "state.safetensors")
    save_file(trained.base, tmp_path / "base.safetensors")
    options = ["--peft-neumann", "exact", "--peft-coft", "0.2", "--adapter-name", "dog"]
    command = ["merge", str(tmp_path / "state.safetensors"), str(tmp_path / "base.safetensors"), "-o", str(tmp_path / "out.safetensors")]
    assert main([*command, *options]) == 0
    got = load_file(tmp_path / "out.safetensors")
    for key, want in trained.merged().items():
        change = (want - trained.base[key]).norm()
        assert (got[key] - want).norm() <= 1e-5 * change
    assert main(["inspect", str(tmp_path / "state.safetensors"), "--json", *options]) == 0
    assert json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))["dialect"] == "F9"
    assert main(["inspect", str(tmp_path / "state.safetensors"), "--peft-terms", "-3"]) == 1
    assert "peft_terms" in capsys.readouterr().err
