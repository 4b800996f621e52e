"""The nodes in a running ComfyUI, over HTTP: pictures against baked models, every family, bad files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dev.client import Client, Graph, PromptFailed, PromptRejected
from dev.server import ComfyServer
from dev.workflows import Parts, stock_parts, text_to_image, tiny_parts
from oft_core.cli import main

REPO = Path(__file__).resolve().parents[2]
STRENGTHS = (-1.0, 0.5, 1.0, 1.5)
MODES = ("rotation", "geodesic", "linear", "core")
ATTENTION = r"attn\d?\.(to_|qkv|proj)|_attn\.(qkv|proj)|self_attn\.|SelfAttention|linear[12]"
STOCK = {
    "sd15": ("checkpoints/tiny_sd15", "model.diffusion_model."),
    "sd2": ("diffusion_models/tiny_sd2", ""),
    "sdxl": ("diffusion_models/tiny_sdxl", ""),
    "sd3": ("diffusion_models/tiny_sd3", ""),
    "sd35": ("diffusion_models/tiny_sd35", ""),
}


# --- files --------------------------------------------------------------------------------------------------


def make_oft(
    shapes: dict[str, tuple[int, ...]], side: str = "out", block: int = 8, degrees: float = 25.0
) -> dict[str, torch.Tensor]:
    """Random adapter tensors for modules {name: weight shape}: LyCORIS (out) or OneTrainer (in)."""
    out, size = {}, degrees / 57.3 / 2 / block**0.5
    for i, (name, shape) in enumerate(shapes.items()):
        g = torch.Generator().manual_seed(i)
        length = shape[0] if side == "out" else int(np.prod(shape[1:]))
        if length % block:
            continue
        if side == "out":
            out[f"{name}.oft_blocks"] = torch.randn(length // block, block, block, generator=g) * size / 2
            out[f"{name}.alpha"] = torch.tensor(0.0)
        else:
            out[f"{name}.oft_R.weight"] = (
                torch.randn(length // block, block * (block - 1) // 2, generator=g) * size
            )
    assert out
    return out


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, "pt") as f:
        return {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118 (a file handle, not a dict)


def unet_modules(shapes: dict[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    """kohya's names for the attention weights of a diffusion model with its own names."""
    return {
        "lora_unet_" + k.removeprefix(prefix).removesuffix(".weight").replace(".", "_"): s
        for k, s in shapes.items()
        if k.startswith(prefix) and k.endswith(".weight") and len(s) in (2, 4) and re.search(ATTENTION, k)
    }


def clip_l_modules(layers: int = 2) -> dict[str, tuple[int, ...]]:
    stem = "lora_te_text_model_encoder_layers_{}_self_attn_{}_proj"
    return {stem.format(i, p): (768, 768) for i in range(layers) for p in ("q", "k", "v", "out")}


def merge(
    adapter: Path, base: Path, out: Path, strength: float, mode: str = "rotation", process: bool = False
) -> None:
    """The command line's merge, in a process of its own only if asked for (importing torch takes seconds).

    fp32, because the server rotates in fp32 too and rounds once.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    command = ["merge", adapter, base, "-o", out, "--strength", strength, "--mode", mode, "--dtype", "fp32"]
    command = list(map(str, command))
    if not process:
        assert main(command) == 0
        return
    whole = [sys.executable, "-m", "oft_core", *command]
    done = subprocess.run(whole, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def files(models: Path, oft_dir: Path) -> dict[str, str]:
    """One adapter a stock model: {family: name in the combo}. sd15's also has a text encoder part."""
    names = {}
    for i, (family, (base, prefix)) in enumerate(STOCK.items()):
        modules = unet_modules(shapes_in(models / f"{base}.safetensors"), prefix)
        if family == "sd15":
            modules |= clip_l_modules()
        # sd15 and sd3 on the output side, so that ComfyUI's own loader reads them too (mode core).
        side = "in" if i % 2 else "out"
        names[family] = f"http/{family}.safetensors"
        (oft_dir / "http").mkdir(exist_ok=True)
        save_file(make_oft(modules, "out" if family == "sd3" else side), oft_dir / names[family])
    return names


# --- graphs -------------------------------------------------------------------------------------------------


def oft_load(name: str, strength: float, **more: object):
    def add(g: Graph, parts: Parts) -> Parts:
        inputs = {
            "strength_model": strength,
            "strength_clip": strength,
            "mode": "rotation",
            "coft": "file",
            **more,
        }
        node = g.OFT_Load(model=parts.model, clip=parts.clip, oft_name=name, **inputs)
        return Parts(node[0], node[1], parts.vae)

    return add


def picture(client: Client, family: str, adapter=None, parts=stock_parts) -> np.ndarray:
    g = Graph()
    preview = text_to_image(g, parts(g, family), family, adapter=adapter)
    return client.run(g).image(preview).astype(int)


_plain: dict[str, np.ndarray] = {}


def plain_picture(client: Client, family: str) -> np.ndarray:
    """The base model's picture, drawn once."""
    if family not in _plain:
        _plain[family] = picture(client, family)
    return _plain[family]


def baked_parts(name: str):
    """The stock graph with another model file in place of the family's own."""

    def build(g: Graph, family: str) -> Parts:
        if family == "sd15":
            node = g.CheckpointLoaderSimple(ckpt_name=name)
            return Parts(node[0], node[1], node[2])
        rest = stock_parts(g, family)
        return Parts(g.UNETLoader(unet_name=name, weight_dtype="default")[0], rest.clip, rest.vae)

    return build


# --- pictures -----------------------------------------------------------------------------------------------

CASES = [("sd3", s, m) for m in MODES for s in STRENGTHS]
CASES += [("sd15", -1.0, "rotation"), ("sd15", 1.5, "linear"), ("sd15", 0.5, "core")]
CASES += [(f, 0.5, "rotation") for f in ("sd2", "sdxl", "sd35")] + [("sd2", 1.5, "geodesic")]


@pytest.mark.parametrize(("family", "strength", "mode"), CASES)
def test_picture_equals_that_of_a_baked_model(
    client: Client,
    host: ComfyServer,
    models: Path,
    files: dict[str, str],
    family: str,
    strength: float,
    mode: str,
) -> None:
    base = models / f"{STOCK[family][0]}.safetensors"
    # A name of its own, because loaders are cached by name.
    baked = host.models / Path(STOCK[family][0]).parent / f"{family}_{mode}_{strength}.safetensors"
    merge(
        host.models / "oft" / files[family],
        base,
        baked,
        strength,
        mode,
        process=(strength, mode) == (1.0, "rotation"),
    )
    try:
        expected = picture(client, family, parts=baked_parts(baked.name))
    finally:
        baked.unlink()
    got = picture(client, family, oft_load(files[family], strength, mode=mode))
    assert np.abs(got - expected).max() <= 1
    assert np.abs(got - plain_picture(client, family)).max() > 3, (
        "the adapter must show, or this says nothing"
    )


@pytest.mark.parametrize("family", STOCK)
def test_strength_zero_is_the_base_picture(client: Client, files: dict[str, str], family: str) -> None:
    plain = plain_picture(client, family)
    for mode in ("rotation", "linear"):
        assert (picture(client, family, oft_load(files[family], 0.0, mode=mode)) == plain).all()


def test_two_runs_are_identical(client: Client, files: dict[str, str]) -> None:
    first = picture(client, "sd15", oft_load(files["sd15"], 0.8))
    client.free()
    assert (picture(client, "sd15", oft_load(files["sd15"], 0.8)) == first).all()


def test_base_is_untouched_afterwards(client: Client, files: dict[str, str]) -> None:
    client.free()
    before = picture(client, "sd3")
    picture(client, "sd3", oft_load(files["sd3"], 3.0))
    assert (picture(client, "sd3") == before).all()


def test_modes_and_limits_differ(client: Client, files: dict[str, str]) -> None:
    seen = [picture(client, "sd3", oft_load(files["sd3"], 1.5, mode=mode)) for mode in MODES]
    seen.append(picture(client, "sd3", oft_load(files["sd3"], 1.5, coft="limit", coft_degrees=3.0)))
    for i, one in enumerate(seen):
        assert all((one != other).any() for other in seen[:i])
    by_number = picture(client, "sd3", oft_load(files["sd3"], 1.5, coft="3.0"))
    assert (by_number == seen[-1]).all()


def test_node_pairs_give_the_same_picture(client: Client, files: dict[str, str]) -> None:
    def pair(g: Graph, parts: Parts) -> Parts:
        adapter = g.OFT_LoadAdapter(oft_name=files["sd15"])
        node = g.OFT_Apply(
            adapter=adapter, model=parts.model, clip=parts.clip, strength_model=0.7, strength_clip=0.7
        )
        return Parts(node[0], node[1], parts.vae)

    def model_only(g: Graph, parts: Parts) -> Parts:
        node = g.OFT_LoadModelOnly(model=parts.model, oft_name=files["sd15"], strength_model=0.7)
        return Parts(node[0], parts.clip, parts.vae)

    whole = picture(client, "sd15", oft_load(files["sd15"], 0.7))
    assert (picture(client, "sd15", pair) == whole).all()
    only = picture(client, "sd15", model_only)
    assert (only == picture(client, "sd15", oft_load(files["sd15"], 0.7, strength_clip=0.0))).all()
    assert (only != whole).any()


# --- every family, by numbers -------------------------------------------------------------------------------

TEXT = {
    "sd15": {"clip_l": "lora_te"},
    "sd2": {"clip_h": "lora_te"},
    "sdxl": {"clip_l": "lora_te1", "clip_g": "lora_te2"},
    "sd3": {"clip_l": "lora_te1", "clip_g": "lora_te2", "t5xxl": "lora_te3"},
    "flux": {"clip_l": "lora_te1", "t5xxl": "lora_te2"},
}


def text_modules(family: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    out = {}
    for key, shape in shapes.items():
        encoder, _, path = key.partition(".transformer.")
        if (
            len(shape) == 2
            and path.endswith(".weight")
            and re.search(ATTENTION, path)
            and ".layers.0." in key.replace("block.0.layer.0", "layers.0")
        ):
            out[f"{TEXT[family][encoder]}_{path.removesuffix('.weight').replace('.', '_')}"] = shape
    return out


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("family", TEXT)
def test_weights_equal_the_merged_ones(
    client: Client, host: ComfyServer, oft_dir: Path, tmp_path: Path, family: str, side: str
) -> None:
    """Model and text encoders as the server has them while it runs, against the same tensors baked by the
    command line.
    """

    def weights(name: str | None) -> dict[str, dict[str, torch.Tensor]]:
        g = Graph()
        parts = tiny_parts(g, family)
        node = oft_load(name, 0.8)(g, parts) if name else parts
        for part, link in (("model", {"model": node.model}), ("clip", {"clip": node.clip})):
            g.Tiny_SaveWeights(pattern=".", filename=f"{part}_weights", **link)
        client.run(g)
        return {
            "model": load_file(host.output / "model_weights.safetensors"),
            "clip": {
                k.removeprefix("clip."): v
                for k, v in load_file(host.output / "clip_weights.safetensors").items()
            },
        }

    base = weights(None)
    modules = unet_modules({k: tuple(v.shape) for k, v in base["model"].items()}, "diffusion_model.")
    text = text_modules(family, {k: tuple(v.shape) for k, v in base["clip"].items()})
    assert len(text) >= 4 * len(TEXT[family])
    name = f"http/numbers_{family}_{side}.safetensors"
    (oft_dir / "http").mkdir(exist_ok=True)
    save_file(make_oft({**modules, **text}, side), oft_dir / name)
    patched = weights(name)

    save_file({k: v for part in base.values() for k, v in part.items()}, tmp_path / "base.safetensors")
    merge(oft_dir / name, tmp_path / "base.safetensors", tmp_path / "baked.safetensors", 0.8)
    baked, changed = load_file(tmp_path / "baked.safetensors"), 0
    for part, tensors in patched.items():
        for key, got in tensors.items():
            if torch.equal(got, base[part][key]):
                assert torch.equal(baked[key], base[part][key].to(baked[key].dtype)), key
                continue
            changed += 1
            error = (got.double() - baked[key].double()).norm() / (
                baked[key] - base[part][key]
            ).double().norm()
            assert error < (1e-5 if got.dtype == torch.float32 else 2e-2), (key, float(error))
    assert changed > len(text)


# --- what people read ---------------------------------------------------------------------------------------


def loader_text(client: Client, family: str, name: str, **more: object) -> str:
    g = Graph()
    parts = tiny_parts(g, family)
    node = g.OFT_Load(
        model=parts.model, clip=parts.clip, oft_name=name, strength_model=1.0, strength_clip=1.0, **more
    )
    show = g.PreviewAny(source=node[2])
    g.Tiny_SaveWeights(pattern="norm", filename="unused", model=node[0])
    result = client.run(g)
    assert result.text(show) == result.text(node), "the report output is what the node shows"
    return result.text(node)


def test_report_stands_in_the_node(client: Client, oft_dir: Path, files: dict[str, str]) -> None:
    tensors = make_oft({"lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q": (64, 64)})
    save_file(tensors, oft_dir / "http" / "one_layer.safetensors", {"modelspec.trigger_phrase": "qwe dog"})
    text = loader_text(client, "sd15", "http/one_layer.safetensors")
    assert "LyCORIS" in text and "1 of 1" in text and "qwe dog" in text and "°" in text
    assert "WARNING" not in text


def test_partly_matched_is_a_warning(
    client: Client, host: ComfyServer, oft_dir: Path, files: dict[str, str]
) -> None:
    modules = {
        "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q": (64, 64),
        "lora_unet_elsewhere": (64, 64),
    }
    save_file(make_oft(modules), oft_dir / "http" / "part.safetensors")
    text = loader_text(client, "sd15", "http/part.safetensors")
    assert "WARNING" in text and "lora_unet_elsewhere" in text and "1 of 2" in text
    assert "lora_unet_elsewhere" in host.log_text()


def test_files_of_all_folders_are_offered(client: Client, host: ComfyServer, oft_dir: Path) -> None:
    tensors = make_oft({"lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q": (64, 64)})
    save_file(tensors, host.models / "loras" / "from_loras.safetensors")
    (oft_dir / "sub").mkdir(exist_ok=True)
    save_file(tensors, oft_dir / "sub" / "from_oft.safetensors")
    (oft_dir / "pickle.pt").write_bytes(b"")
    for node in ("OFT_Load", "OFT_LoadModelOnly", "OFT_LoadAdapter"):
        offered = client.choices(node, "oft_name")
        assert {"from_loras.safetensors", "sub/from_oft.safetensors"} <= {
            o.replace("\\", "/") for o in offered
        }
        assert "pickle.pt" not in offered
    assert "LyCORIS" in loader_text(client, "sd15", "from_loras.safetensors")


# --- bad files ----------------------------------------------------------------------------------------------

LAYER = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"


def bad_truncated(path: Path) -> None:
    save_file(make_oft({LAYER: (64, 64)}), path)
    path.write_bytes(path.read_bytes()[:-100])


def bad_lora(path: Path) -> None:
    save_file(
        {f"{LAYER}.lora_down.weight": torch.zeros(4, 64), f"{LAYER}.lora_up.weight": torch.zeros(64, 4)}, path
    )


def bad_nan(path: Path) -> None:
    save_file({f"{LAYER}.oft_blocks": torch.full((8, 8, 8), float("nan"))}, path)


def bad_family(path: Path) -> None:
    save_file(make_oft({"lora_unet_double_blocks_0_img_attn_proj": (3072, 3072)}, block=64), path)


def bad_width(path: Path) -> None:
    save_file(make_oft({LAYER: (1280, 1280)}), path)


def bad_text(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html>not found</html>")


BAD = {
    bad_truncated: ("damaged",),
    bad_lora: ("LoRA",),
    bad_nan: ("NaN", LAYER),
    bad_family: ("Flux", "Stable Diffusion 1"),
    bad_width: (LAYER, "1280"),
    bad_text: ("safetensors",),
}


@pytest.mark.parametrize("make", BAD, ids=lambda f: f.__name__)
def test_bad_files_are_explained(client: Client, oft_dir: Path, files: dict[str, str], make) -> None:
    name = f"http/{make.__name__}.safetensors"
    make(oft_dir / name)
    g = Graph()
    preview = text_to_image(g, tiny_parts(g, "sd15"), "sd15", adapter=oft_load(name, 1.0))
    with pytest.raises(PromptFailed) as failed:
        client.run(g)
    error = failed.value
    assert error.node_type == "OFT_Load" and make.__name__ in error.text
    assert 30 < len(error.text) < 700 and "Traceback" not in error.text
    for word in BAD[make]:
        assert word in error.text, error.text
    g = Graph()
    preview = text_to_image(g, tiny_parts(g, "sd15"), "sd15")
    assert client.run(g).image(preview).std() > 5, "the server goes on working"


def test_undefined_strength_is_explained(client: Client, files: dict[str, str]) -> None:
    g = Graph()
    text_to_image(g, stock_parts(g, "sd2"), "sd2", adapter=oft_load(files["sd2"], 0.5, mode="core"))
    with pytest.raises(PromptFailed, match="ComfyUI's own loader"):
        client.run(g)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"oft_name": "no_such_file.safetensors"}, "no_such_file"),
        ({"oft_name": "../../../outside.safetensors"}, "outside"),
        ({"mode": "cubic"}, "cubic"),
        ({"coft": "200"}, "200"),
        ({"strength_model": 11.0}, "strength_model"),
    ],
)
def test_bad_inputs_are_rejected_before_the_run(
    client: Client, files: dict[str, str], inputs: dict[str, object], words: str
) -> None:
    g = Graph()
    preview = text_to_image(g, tiny_parts(g, "sd15"), "sd15", adapter=oft_load(files["sd15"], 1.0))
    next(n for n in g.nodes.values() if n.class_type == "OFT_Load").set(**inputs)
    with pytest.raises(PromptRejected) as rejected:
        client.run(g)
    assert words in str(rejected.value) and preview.id in g.nodes


def test_a_changed_file_is_read_again(client: Client, oft_dir: Path, files: dict[str, str]) -> None:
    name = "http/changing.safetensors"
    modules = {LAYER: (64, 64), LAYER.replace("to_q", "to_k"): (64, 64)}
    save_file(make_oft(modules), oft_dir / name)
    assert "2 of 2" in loader_text(client, "sd15", name)
    save_file(make_oft({LAYER: (64, 64)}), oft_dir / name)
    assert "1 of 1" in loader_text(client, "sd15", name)


# --- names from elsewhere -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(oft_dir: Path) -> dict[str, str]:
    """Files that workflows of another system spell in another way."""
    (oft_dir / "elsewhere" / "Koala").mkdir(parents=True, exist_ok=True)
    (oft_dir / "elsewhere" / "twice").mkdir(exist_ok=True)
    names = {"one": "elsewhere/Koala/One.safetensors", "short": "elsewhere/short.sft"}
    for name in (*names.values(), "elsewhere/double.safetensors", "elsewhere/twice/double.sft"):
        save_file(make_oft({LAYER: (64, 64)}), oft_dir / name, {"format": "pt"})
    return names


def test_sft_files_are_offered_and_loaded(client: Client, elsewhere: dict[str, str]) -> None:
    for node, name in (("OFT_Load", "oft_name"), ("OFT_LoadAdapter", "oft_name"), ("OFT_Stack", "oft_name_2")):
        assert elsewhere["short"] in [o.replace("\\", "/") for o in client.choices(node, name)]
    assert "1 of 1" in loader_text(client, "sd15", elsewhere["short"])


@pytest.mark.parametrize("name", [r"elsewhere\Koala\One.safetensors", "ELSEWHERE/koala/one", "One.safetensors", "One"])
def test_names_of_other_systems_are_found(client: Client, elsewhere: dict[str, str], name: str) -> None:
    text = loader_text(client, "sd15", name)
    assert "1 of 1" in text and f"'{name}' is not listed here; read from {elsewhere['one']}." in text
    g = Graph()
    stack = g.OFT_Stack(mode="rotation", coft="file", oft_name_1=name, on_1=True)
    g.PreviewAny(source=stack[3])
    assert f"read from {elsewhere['one']}" in client.run(g).text(stack)


def test_names_that_fit_no_file_or_several_are_rejected(client: Client, elsewhere: dict[str, str]) -> None:
    """Before anything runs, with what the user can choose from."""
    wanted = {
        "Onne.safetensors": ("no file of this name", "similar", elsewhere["one"]),
        r"other\One.safetensors": ("no file of this name", "similar", elsewhere["one"]),
        "double": ("Several files fit", "elsewhere/double.safetensors", "elsewhere/twice/double.sft"),
        r"..\..\elsewhere\short.sft": ("no file of this name",),
    }
    for name, words in wanted.items():
        for node in ("OFT_LoadAdapter", "OFT_Stack"):
            g = Graph()
            entry = {"oft_name": name} if node == "OFT_LoadAdapter" else {"oft_name_3": name, "on_3": True}
            g.PreviewAny(source=g.add(node, **entry)[0])
            with pytest.raises(PromptRejected) as rejected:
                client.run(g)
            for word in (name, *words):
                assert word in str(rejected.value), (node, str(rejected.value))
    g = Graph()
    g.PreviewAny(source=g.OFT_Stack(oft_name_3="Onne.safetensors", on_3=False)[3])
    client.run(g)  # a row that is off needs no file


@pytest.mark.parametrize("name", [r"..\evil", "C:evil", "con", "sub/what?", "end."])
def test_names_that_another_system_reads_as_paths_are_not_saved(
    client: Client, host: ComfyServer, elsewhere: dict[str, str], name: str
) -> None:
    before = sorted(host.models.rglob("*"))
    g = Graph()
    adapter = g.OFT_LoadAdapter(oft_name=elsewhere["short"])
    g.OFT_Save(adapter=adapter, name=name, dialect="as it is", precision="fp32", folder="oft")
    with pytest.raises(PromptFailed) as failed:
        client.run(g)
    assert failed.value.node_type == "OFT_Save" and "cannot be saved under this name" in failed.value.text
    assert sorted(host.models.rglob("*")) == before


def test_backslashes_in_a_name_to_save_are_folders(
    client: Client, oft_dir: Path, elsewhere: dict[str, str]
) -> None:
    g = Graph()
    adapter = g.OFT_LoadAdapter(oft_name=elsewhere["short"])
    node = g.OFT_Save(adapter=adapter, name=r"elsewhere\saved", dialect="as it is", precision="fp32", folder="oft")
    assert "elsewhere/saved_00001_.safetensors" in client.run(g).text(node).replace("\\", "/")
    assert (oft_dir / "elsewhere" / "saved_00001_.safetensors").is_file()
