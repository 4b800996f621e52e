"""OFT Stack in a running ComfyUI: order, switches, LORA_STACK, blending, reading once."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dev.client import Client, Graph, Node, PromptFailed
from dev.server import ComfyServer
from dev.workflows import Parts, stock_parts, text_to_image, tiny_parts

ATTENTION = ("attn1_to_q", "attn1_to_out_0", "attn2_to_v", "ff_net_2")
STEM = "lora_unet_{}_1_transformer_blocks_0_{}"
PLACES = ("input_blocks_1", "middle_block", "output_blocks_2")
WIDTH = 320


def make_file(
    seed: int, block: int = 8, kind: str = "out", degrees: float = 30.0, text: bool = True
) -> dict[str, torch.Tensor]:
    """An adapter of the stock tiny SD1.5's attention: LyCORIS blocks (out) or OneTrainer's (in)."""
    tensors, size = {}, degrees / 57.3 / 2 / block**0.5
    g = torch.Generator().manual_seed(seed)
    widths = {STEM.format(place, a): WIDTH for place in PLACES for a in ATTENTION if a != "ff_net_2"}
    if text:
        widths |= {f"lora_te_text_model_encoder_layers_{i}_self_attn_q_proj": 768 for i in range(2)}
    for name, width in widths.items():
        if kind == "out":
            tensors[f"{name}.oft_blocks"] = torch.randn(width // block, block, block, generator=g) * size / 2
            tensors[f"{name}.alpha"] = torch.tensor(0.0)
        elif "attn2_to_v" not in name:  # whose input is the text's width
            n = block * (block - 1) // 2
            tensors[f"{name}.oft_R.weight"] = torch.randn(width // block, n, generator=g) * size * 0.2
    return tensors


@pytest.fixture(scope="module")
def files(oft_dir: Path) -> dict[str, str]:
    (oft_dir / "stack").mkdir(parents=True, exist_ok=True)
    made = {
        "a": make_file(1),
        "b": make_file(2, 16),
        "c": make_file(3, 20, "in", text=False),
        "d": make_file(4, 8),
        "unet": make_file(5, text=False),
    }
    for name, tensors in made.items():
        save_file(tensors, oft_dir / "stack" / f"{name}.safetensors")
    return {name: f"stack/{name}.safetensors" for name in made}


def load(g: Graph, parts: Parts, name: str, s: float = 1.0, s_clip: float | None = None, **more) -> Parts:
    s_clip = s if s_clip is None else s_clip
    node = g.OFT_Load(
        model=parts.model, clip=parts.clip, oft_name=name, strength_model=s, strength_clip=s_clip, **more
    )
    return Parts(node[0], node[1], parts.vae)


def stack_node(g: Graph, rows: list[tuple], **more) -> Node:
    """rows: (file name, on, model strength, clip strength), and a mode where the row has its own."""
    inputs = {"mode": "rotation", "coft": "file", **more}
    for i, (name, on, s_model, s_clip, *mode) in enumerate(rows, 1):
        inputs |= {f"oft_name_{i}": name, f"on_{i}": on}
        inputs |= {f"strength_model_{i}": s_model, f"strength_clip_{i}": s_clip}
        inputs |= {f"mode_{i}": own for own in mode}
    return g.OFT_Stack(**inputs)


def apply_stack(g: Graph, parts: Parts, stack, how: str = "compose", **more) -> Parts:
    node = g.OFT_ApplyStack(stack=stack, model=parts.model, clip=parts.clip, how=how, **more)
    return Parts(node[0], node[1], parts.vae)


def picture(client: Client, adapter=None) -> np.ndarray:
    g = Graph()
    preview = text_to_image(g, stock_parts(g, "sd15"), "sd15", adapter=adapter)
    return client.run(g).image(preview)


def stacked(rows: list[tuple], how: str = "compose", **more):
    return lambda g, parts: apply_stack(g, parts, stack_node(g, rows, **more), how)


def in_a_row(*loads: tuple):
    def add(g: Graph, parts: Parts) -> Parts:
        for one in loads:
            parts = load(g, parts, *one)
        return parts

    return add


# --- composing ----------------------------------------------------------------------------------------------


def test_compose_is_loading_one_after_the_other(client: Client, files: dict[str, str]) -> None:
    rows = [(files["a"], True, 0.8, 0.5), (files["b"], True, -0.6, 1.0), (files["c"], True, 1.0, 0.0)]
    loads = [(files["a"], 0.8, 0.5), (files["b"], -0.6, 1.0), (files["c"], 1.0, 0.0)]
    got = picture(client, stacked(rows))
    assert (got == picture(client, in_a_row(*loads))).all()
    assert (got != picture(client, in_a_row(*loads[::-1]))).any(), "the order must show, or this says nothing"
    assert (picture(client, stacked(rows[::-1])) == picture(client, in_a_row(*loads[::-1]))).all()


def test_stacks_in_a_row_and_adapters_in_memory(client: Client, files: dict[str, str]) -> None:
    def chained(g: Graph, parts: Parts) -> Parts:
        first = stack_node(g, [(files["a"], True, 0.8, 0.8)])
        adapter = g.OFT_LoadAdapter(oft_name=files["b"])
        second = stack_node(
            g,
            [("none", True, 0.5, 0.5), (files["d"], True, 0.7, 0.7)],
            stack=first[0],
            adapter_1=adapter[0],
            mode="geodesic",
        )
        return apply_stack(g, parts, second[0])

    def plain(g: Graph, parts: Parts) -> Parts:
        parts = load(g, parts, files["a"], 0.8)
        return load(g, load(g, parts, files["b"], 0.5, mode="geodesic"), files["d"], 0.7, mode="geodesic")

    assert (picture(client, chained) == picture(client, plain)).all()


def test_rows_that_are_off_do_nothing(client: Client, files: dict[str, str]) -> None:
    rows = [(files["a"], True, 0.8, 0.8), (files["b"], False, 1.0, 1.0)]
    only = picture(client, in_a_row((files["a"], 0.8)))
    for how in ("compose", "blend"):
        assert np.abs(picture(client, stacked(rows, how)).astype(int) - only).max() <= 1
    none = [(name, False, s, t) for name, _, s, t in rows]
    plain = picture(client)
    for how in ("compose", "blend"):
        assert (picture(client, stacked(none, how)) == plain).all()
    assert (only != plain).any()


def test_switching_does_not_read_files_again(client: Client, oft_dir: Path, files: dict[str, str]) -> None:
    """After the first run the files' contents are ruined behind the server's back, times and sizes kept: only
    a second reading could notice.
    """
    names = []
    for n in ("a", "b"):
        path = oft_dir / "stack" / f"once_{n}.safetensors"
        shutil.copyfile(oft_dir / files[n], path)
        names.append(f"stack/{path.name}")
    one = [(names[0], True, 0.8, 0.8), (names[1], True, 0.5, 0.5)]
    off = [one[0], (names[1], False, 0.5, 0.5)]
    both = picture(client, stacked(one))
    for name in names:
        path = oft_dir / name
        stat = path.stat()
        path.write_bytes(b"\0" * stat.st_size)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    first = picture(client, stacked(off))
    assert (first != both).any()
    assert (picture(client, stacked(one)) == both).all()
    assert (picture(client, stacked([(n, on, 0.3, 0.3) for n, on, *_ in one])) != both).any()
    for name in names:
        os.utime(oft_dir / name)  # now the times differ, and the ruined file is noticed
    with pytest.raises(PromptFailed, match="damaged"):
        picture(client, stacked(one))


def test_a_row_that_is_off_is_not_read(client: Client, oft_dir: Path, files: dict[str, str]) -> None:
    (oft_dir / "stack" / "broken.safetensors").write_bytes(b"nothing")
    rows = [(files["a"], True, 0.8, 0.8), ("stack/broken.safetensors", False, 1.0, 1.0)]
    assert (picture(client, stacked(rows)) == picture(client, in_a_row((files["a"], 0.8)))).all()


@pytest.mark.parametrize("how", ["compose", "blend"])
def test_activations_give_the_same_picture(client: Client, files: dict[str, str], how: str) -> None:
    rows = [(files["a"], True, 0.8, 0.5), (files["c"], True, 1.0, 0.0)]

    def live(g: Graph, parts: Parts) -> Parts:
        return apply_stack(g, parts, stack_node(g, rows), how, runtime="activations")

    got, expected = picture(client, live).astype(int), picture(client, stacked(rows, how)).astype(int)
    assert np.abs(got - expected).max() <= 1 and np.abs(got - picture(client)).max() > 3


# --- a mode for each row ------------------------------------------------------------------------------------

MODES = ("geodesic", "linear", "core")
STRENGTHS = (1.6, 0.4, 0.5)


def test_each_row_has_its_own_mode(client: Client, files: dict[str, str]) -> None:
    """As Load OFT nodes in a row with those modes. The last row is an adapter in memory and takes the node's."""

    def chained(modes: tuple[str, ...], last: str):
        def add(g: Graph, parts: Parts) -> Parts:
            for n, s, mode in zip("bda", STRENGTHS, modes, strict=True):
                parts = load(g, parts, files[n], s, mode=mode)
            return load(g, parts, files["c"], 1.3, 0.0, mode=last)

        return add

    def in_stack(modes: tuple[str, ...], runtime: str = "auto"):
        rows = [(files[n], True, s, s, m) for n, s, m in zip("bda", STRENGTHS, modes, strict=True)]

        def add(g: Graph, parts: Parts) -> Parts:
            adapter = g.OFT_LoadAdapter(oft_name=files["c"])
            more = {"strength_model_4": 1.3, "strength_clip_4": 0.0, "adapter_4": adapter[0]}
            stack = stack_node(g, rows, mode="geodesic", **more)
            return apply_stack(g, parts, stack[0], runtime=runtime)

        return add

    expected = picture(client, chained(MODES, "geodesic"))
    assert (picture(client, in_stack(MODES)) == expected).all()
    live, as_node = in_stack(MODES[:2] + ("linear",), "activations"), ("as the node",) * 3
    others = [
        chained(("rotation", "linear", "core"), "geodesic"),
        chained(("geodesic", "rotation", "core"), "geodesic"),
        chained(("geodesic", "linear", "linear"), "geodesic"),
        chained(MODES, "linear"),
        in_stack(as_node),
    ]
    shown = [picture(client, other) for other in others]
    assert all((one != expected).any() for one in shown), "every row's mode must show, or this says nothing"
    assert np.abs(picture(client, live).astype(int) - shown[2]).max() <= 1
    assert (shown[-1] == picture(client, chained(("geodesic",) * 3, "geodesic"))).all()


def test_blended_rows_may_differ_in_mode(client: Client, host: ComfyServer, files: dict[str, str]) -> None:
    """The blend of two files is the geodesic half-way between them, each taken at its strength in its mode."""
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    both = [(files["a"], 1.7, "geodesic"), (files["d"], -0.6, "rotation")]

    def blended(g: Graph, parts: Parts) -> Parts:
        stack = stack_node(g, [(n, True, s, s, m) for n, s, m in both])
        return apply_stack(g, parts, stack[0], "blend")

    def alone(name: str, s: float, mode: str):
        return lambda g, parts: load(g, parts, name, s, mode=mode)

    linalg = pytest.importorskip("scipy.linalg")
    base = weights(client, host)[key].double()
    logs = []
    for one in both:
        turned = weights(client, host, alone(*one))[key].double()
        blocks = [b @ torch.linalg.pinv(a) for a, b in zip(base.split(8), turned.split(8), strict=True)]
        logs.append(torch.block_diag(*(torch.from_numpy(linalg.logm(b.numpy()).real) for b in blocks)))
    expected = torch.matrix_exp(sum(logs) / 2) @ base
    got = weights(client, host, blended)[key].double()
    assert (got - expected).norm() / (expected - base).norm() < 5e-3  # the stored weights are fp16
    same = weights(client, host, stacked([(n, True, s, s) for n, s, _ in both], "blend"))[key].double()
    assert (same - expected).norm() / (expected - base).norm() > 2e-2, "the mode must show"

    straight = [(files["a"], True, 0.5, 0.5, "rotation"), (files["d"], True, 0.5, 0.5, "linear")]
    with pytest.raises(PromptFailed) as failed:
        picture(client, stacked(straight, "blend"))
    for words in ("linear", files["d"], "rotation or geodesic"):
        assert words in failed.value.text, failed.value.text


def test_saved_graphs_keep_their_values(client: Client) -> None:
    """The page stores the values of widgets by their place: later ones may only follow."""
    order = client.object_info("OFT_Stack")["input_order"]
    names = [n for part in ("required", "optional") for n in order.get(part, ()) if "adapter_" not in n]
    row = ("on_{}", "oft_name_{}", "strength_model_{}", "strength_clip_{}")
    rows = [name.format(i) for i in range(1, 5) for name in row]
    start = ["stack", "lora_stack", "mode", "coft", "coft_degrees"]
    assert names == [*start, *rows, *(f"mode_{i}" for i in range(1, 5))]


# --- LORA_STACK ---------------------------------------------------------------------------------------------


def test_lora_stack_is_read_and_written(client: Client, host: ComfyServer, files: dict[str, str]) -> None:
    lora = {
        f"{STEM.format('middle_block', 'attn1_to_q')}.lora_up.weight": torch.randn(WIDTH, 4),
        f"{STEM.format('middle_block', 'attn1_to_q')}.lora_down.weight": torch.randn(4, WIDTH),
    }
    save_file(lora, host.models / "loras" / "a_lora.safetensors")
    incoming = [["a_lora.safetensors", 0.4, 0.3], [files["b"], -0.6, 1.0], ["missing.safetensors", 1.0, 1.0]]
    g = Graph()
    source = g.Tiny_LoraStack(entries=json.dumps(incoming))
    rows = [(files["a"], True, 0.8, 0.5, "geodesic"), (files["d"], False, 1.0, 1.0, "linear")]
    stack = stack_node(g, rows, lora_stack=source[0])
    show = {i: g.Tiny_ShowLoraStack(lora_stack=stack[i]) for i in (1, 2)}
    parts = apply_stack(g, stock_parts(g, "sd15"), stack[0])
    preview = text_to_image(g, parts, "sd15")
    result = client.run(g)
    assert json.loads(result.text(show[1])) == [incoming[0], incoming[2], incoming[1], [files["a"], 0.8, 0.5]]
    assert json.loads(result.text(show[2])) == [incoming[0], incoming[2]]
    assert "a_lora.safetensors" in result.text(stack) and "(off)" in result.text(stack)
    left_out = next(line for line in result.text(stack).splitlines() if "no place" in line)
    assert f"{files['a']} (geodesic" in left_out and files["b"] not in left_out and files["d"] not in left_out

    def first_as(mode: str):
        return lambda g, parts: load(
            g, load(g, parts, files["b"], -0.6, 1.0), files["a"], 0.8, 0.5, mode=mode
        )

    assert (result.image(preview) == picture(client, first_as("geodesic"))).all()

    # What was written gives the same again, but for the mode.
    expected = picture(client, first_as("rotation"))
    g = Graph()
    again = stack_node(g, [], lora_stack=g.Tiny_LoraStack(entries=result.text(show[1]))[0])
    preview = text_to_image(g, apply_stack(g, stock_parts(g, "sd15"), again[0]), "sd15")
    assert (client.run(g).image(preview) == expected).all()


def test_adapters_in_memory_are_written_by_their_file(client: Client, files: dict[str, str]) -> None:
    g = Graph()
    adapter = g.OFT_LoadAdapter(oft_name=files["b"])
    stack = stack_node(g, [("none", True, 0.5, 0.25)], adapter_1=adapter[0])
    show = g.Tiny_ShowLoraStack(lora_stack=stack[1])
    assert json.loads(client.run(g).text(show)) == [[files["b"], 0.5, 0.25]]


# --- blending -----------------------------------------------------------------------------------------------


def weights(client: Client, host: ComfyServer, adapter=None) -> dict[str, torch.Tensor]:
    g = Graph()
    parts = stock_parts(g, "sd15")
    parts = adapter(g, parts) if adapter else parts
    g.Tiny_SaveWeights(pattern="attn|self_attn", filename="stack_weights", model=parts.model, clip=parts.clip)
    client.run(g)
    return load_file(host.output / "stack_weights.safetensors")


def test_blend_does_not_depend_on_the_order(client: Client, files: dict[str, str]) -> None:
    rows = [(files["a"], True, 0.8, 0.5), (files["b"], True, -0.9, 1.0), (files["c"], True, 1.2, 0.0)]
    pictures = [picture(client, stacked(list(p), "blend")).astype(int) for p in itertools.permutations(rows)]
    for one in pictures[1:]:
        assert np.abs(one - pictures[0]).max() <= 1
    composed = picture(client, stacked(rows))
    assert np.abs(composed - pictures[0]).max() > 3 and np.abs(picture(client) - pictures[0]).max() > 3


def test_blending_a_file_with_itself_is_that_file(client: Client, files: dict[str, str]) -> None:
    twice = [(files["a"], True, 0.8, 0.8)] * 2
    alone = picture(client, in_a_row((files["a"], 0.8))).astype(int)
    assert np.abs(picture(client, stacked(twice, "blend")) - alone).max() <= 1
    assert np.abs(picture(client, stacked(twice)) - alone).max() > 3


def test_blended_weights_are_the_mean_of_logarithms(
    client: Client, host: ComfyServer, files: dict[str, str]
) -> None:
    """Blocks of 8 and 16 from the files themselves, by another library's logarithm."""
    linalg = pytest.importorskip("scipy.linalg")
    base = weights(client, host)
    rows = [(files["a"], True, 0.8, 0.5), (files["b"], True, -0.9, 1.0)]
    got = weights(client, host, stacked(rows, "blend"))
    raw = {n: load_file(host.models / "oft" / files[n]) for n in ("a", "b")}

    def log(blocks: torch.Tensor, s: float) -> torch.Tensor:
        q = s * (blocks - blocks.transpose(1, 2)).double()
        eye = torch.eye(q.shape[-1], dtype=torch.float64)
        # LyCORIS turns rows by the transposed Cayley transform of A - A^T.
        parts = [linalg.logm(torch.linalg.solve(eye + one, eye - one).numpy()).real for one in q]
        return torch.block_diag(*map(torch.from_numpy, parts))

    text = "clip.clip_l.transformer."
    checked = {
        "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q": (0.8, -0.9),
        f"{text}text_model.encoder.layers.1.self_attn.q_proj": (0.5, 1.0),
    }
    for key, strengths in checked.items():
        name = key.replace("diffusion_model.", "lora_unet_").replace(text, "lora_te_").replace(".", "_")
        logs = [log(raw[n][f"{name}.oft_blocks"], s) for n, s in zip("ab", strengths, strict=True)]
        mean = sum(logs) / 2
        before = base[f"{key}.weight"].double()
        expected = torch.matrix_exp(mean) @ before
        change = (got[f"{key}.weight"].double() - expected).norm() / (expected - before).norm()
        assert change < 5e-3, (key, float(change))  # the stored weights are fp16
    changed = [k for k, v in got.items() if not torch.equal(v, base[k])]
    assert len(changed) == 9 + 2


def test_average_of_a_side_counts_the_adapters_that_have_it(
    client: Client, host: ComfyServer, files: dict[str, str]
) -> None:
    key = "clip.clip_l.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight"
    rows = [(files["a"], True, 1.0, 1.0), (files["unet"], True, 1.0, 1.0)]
    got = weights(client, host, stacked(rows, "blend"))[key]
    alone = weights(client, host, in_a_row((files["a"], 1.0)))[key]
    torch.testing.assert_close(got, alone, atol=2e-3, rtol=0)


def test_blending_what_cannot_be_is_explained(client: Client, oft_dir: Path, files: dict[str, str]) -> None:
    boft = {
        f"{STEM.format('middle_block', 'attn1_to_q')}.oft_blocks": torch.randn(3, 40, 8, 8) * 0.01,
        f"{STEM.format('middle_block', 'attn1_to_q')}.alpha": torch.tensor(0.0),
    }
    save_file(boft, oft_dir / "stack" / "boft.safetensors")
    rows = [(files["a"], True, 1.0, 1.0), ("stack/boft.safetensors", True, 1.0, 1.0)]
    with pytest.raises(PromptFailed) as failed:
        picture(client, stacked(rows, "blend"))
    assert failed.value.node_type == "OFT_ApplyStack"
    for words in ("BOFT", "stack/boft.safetensors", "middle_block_1", "compose"):
        assert words in failed.value.text, failed.value.text
    assert (picture(client, stacked(rows)) != picture(client, stacked(rows[:1]))).any()
    with pytest.raises(PromptFailed, match="linear"):
        picture(client, stacked([(files["a"], True, 0.5, 0.5)], "blend", mode="linear"))


def test_every_family(client: Client, host: ComfyServer, oft_dir: Path) -> None:
    """In-memory models: the blend of a file at 1 and at 0 is its half power."""
    layers = {
        "sd2": "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q",
        "sdxl": "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q",
        "sd3": "lora_unet_joint_blocks_0_x_block_attn_proj",
        "flux": "lora_unet_double_blocks_0_img_attn_proj",
    }
    for family, name in layers.items():
        g = Graph()
        width = {"sd3": 128}.get(family, 64)
        blocks = torch.randn(width // 8, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.1
        tensors = {f"{name}.oft_blocks": blocks, f"{name}.alpha": torch.tensor(0.0)}
        file = f"stack/{family}.safetensors"
        save_file(tensors, oft_dir / file)
        parts = tiny_parts(g, family)
        rows = [(file, True, 1.0, 1.0), (file, True, 0.0, 0.0)]
        blended = apply_stack(g, parts, stack_node(g, rows), "blend")
        half = load(g, parts, file, 0.5, mode="geodesic")
        for label, part in (("blended", blended), ("half", half), ("plain", parts)):
            g.Tiny_SaveWeights(pattern="attn", filename=f"{family}_{label}", model=part.model)
        client.run(g)
        saved = (host.output / f"{family}_{x}.safetensors" for x in ("blended", "half", "plain"))
        one, two, base = map(load_file, saved)
        changed = [k for k in one if not torch.equal(one[k], base[k])]
        assert len(changed) == 1
        for key in one:
            torch.testing.assert_close(one[key], two[key], atol=2e-6, rtol=0)
