"""Files by name, in the folders of several systems."""

from __future__ import annotations

import ntpath
from pathlib import Path
from types import SimpleNamespace

import folder_paths
import torch
from comfyui_oft.nodes import dataset, load, save, stack
from comfyui_oft.nodes.binding import everywhere, files, folders
from comfyui_oft.oft_core import (
    AdapterError,
    FileError,
    ReadOptions,
)
from comfyui_oft.oft_core.training import ConfigError, filenames
from patching import ATTENTION, diag_oft, generator, raises, run_node, sd15, shapes_of, write
from safetensors.torch import save_file


def test_folders_are_merged():
    extra = Path(folder_paths.models_dir).parent / "extra_oft"
    extra.mkdir(exist_ok=True)
    folder_paths.folder_names_and_paths["oft"] = ([str(extra)], set())
    folders.register()
    folders.register()
    paths, extensions = folder_paths.folder_names_and_paths["oft"]
    assert paths[0] == str(extra) and len(paths) == len(set(paths)) and extensions == {".safetensors", ".sft"}
    assert (
        str(Path(folder_paths.models_dir) / "oft") in paths
        and folder_paths.get_folder_paths("loras")[0] in paths
    )
    tensors = {"lora_unet_x.oft_blocks": torch.zeros(2, 4, 4), "lora_unet_x.alpha": torch.tensor(0.0)}
    write("loras", "in_loras.safetensors", tensors)
    write("oft/sub", "in_oft.safetensors", tensors)
    save_file(tensors, extra / "in_extra.safetensors")
    write("loras", "short.SFT", tensors)
    (Path(folder_paths.models_dir) / "loras" / "pickle.pt").write_bytes(b"x")
    folder_paths.filename_list_cache.clear()
    listed = folders.names()
    assert {"in_loras.safetensors", str(Path("sub") / "in_oft.safetensors"), "in_extra.safetensors", "short.SFT"} <= set(
        listed
    )
    assert folders.read("short.SFT").entries
    assert "pickle.pt" not in listed
    assert folders.find("../../outside.safetensors") is None
    check_file = load.OFTLoad.validate_inputs
    assert check_file("no_oft.safetensors") is not True and check_file("in_loras.safetensors") is True
    assert check_file(None) is True and check_file("in_loras.safetensors", "linear", "12.5") is True
    assert "mode" in check_file("in_loras.safetensors", "cubic") and "coft" in check_file(
        "in_loras.safetensors", "core", "many"
    )


def turns(seed=0):
    """The tensors of a small OFT file."""
    blocks = torch.randn(2, 4, 4, generator=generator(seed)) * 0.1
    return {"lora_unet_x.oft_blocks": blocks, "lora_unet_x.alpha": torch.tensor(0.0)}


def test_names_of_other_systems_mean_the_file_that_fits():
    folders.register()
    names = ("names/Deep/One.safetensors", "names/zwei.sft", "names/M\u00fcller.safetensors", "names/v1.5.safetensors")
    for seed, name in enumerate(names):
        write("oft", name, turns(seed))
    one, two, accent, dotted = names
    means = {
        r"names\Deep\One.safetensors": one,
        "NAMES/deep/one.SafeTensors": one,
        r".\names\deep\ONE": one,
        "One.safetensors": one,
        "deep/one": one,
        r"zwei": two,
        r"NAMES\ZWEI.sft": two,
        "names/Mu\u0308ller.safetensors": accent,  # as macOS writes it
        "v1.5": dotted,
    }
    for given, listed in means.items():
        assert folders.meant(given) == [listed] and folders.locate(given) == listed, given
        assert load.OFTLoad.validate_inputs(given) is True, given
        assert folders.read(given) is folders.read(listed)
        assert folders.fingerprint(given) == folders.fingerprint(listed) != ""
        assert listed in folders.other_name(given), given
    assert all(folders.other_name(name) is None for name in names)
    text = run_node(load.OFTLoadAdapter, oft_name=r"names\deep\one").args[1]
    assert r"names\deep\one" in text.splitlines()[-1] and one in text.splitlines()[-1], text
    assert one not in run_node(load.OFTLoadAdapter, oft_name=one).args[1].splitlines()[-1]
    # The place named is the best fit, although a file of that name lies elsewhere too.
    write("oft", "names/other/Deep/One.safetensors", turns(9))
    assert folders.locate(r"names\deep\one.safetensors") == one


def test_names_that_fit_no_file_or_several_are_explained():
    folders.register()
    for seed, name in enumerate(("two/a/koala_v1.safetensors", "two/b/koala_v1.safetensors", "two/b/Same.sft")):
        write("oft", name, turns(seed))
    write("oft", "two/b/Same.safetensors", turns(7))
    outside = Path(folder_paths.models_dir) / "outside_koala.safetensors"
    save_file(turns(), outside)
    several = {"koala_v1": ("two/a/koala_v1", "two/b/koala_v1"), "two/b/same": ("two/b/Same.sft", "two/b/Same.safe")}
    for given, words in several.items():
        for text in (raises(FileError, lambda g=given: folders.read(g)), load.OFTLoad.validate_inputs(given)):
            assert all(w in text for w in ("Several files", given, *words)), text
    # A folder that is named is meant: every PEFT file has the same name.
    for given in ("two/c/koala_v1.safetensors", "koala_v2.safetensors", r"D:\loras\koala_v1.safetensors"):
        for text in (raises(FileError, lambda g=given: folders.read(g)), load.OFTLoad.validate_inputs(given)):
            assert all(w in text for w in ("no file of this name", given, "similar", "two/a/koala_v1")), text
    for given in ("", "/", "..", "../", "qqqqqqqq", "x\0y", str(outside), "../outside_koala.safetensors", r"..\outside_koala", 5):
        assert isinstance(load.OFTLoad.validate_inputs(given), str), given
        assert folders.find(str(given)) is None and folders.meant(str(given)) == [], given
    assert "similar" not in load.OFTLoad.validate_inputs("qqqqqqqq")
    outside.unlink()


def test_stacks_take_names_of_other_systems():
    folders.register()
    write("oft", "rows/One.safetensors", turns(1))
    write("oft", "rows/x/two.safetensors", turns(2))
    write("oft", "rows/y/two.safetensors", turns(3))
    write("loras", "plain.safetensors", {"a.lora_up.weight": torch.ones(1)})
    check_rows = stack.OFTStack.validate_inputs
    assert check_rows(oft_name_1=r"rows\one", oft_name_2="none", oft_name_3=None) is True
    assert "Several files" in check_rows(oft_name_1=r"rows\one", oft_name_4="two.safetensors")
    assert check_rows(oft_name_2="missing_in_rows.safetensors", on_2=False) is True
    assert "missing_in_rows" in check_rows(oft_name_2="missing_in_rows.safetensors", on_2=None)
    given = [(r"ROWS\One.safetensors", 1.0, 0.5), (r"sub\elsewhere.safetensors", 1.0, 1.0), ("Plain", 0.5, 0.5)]
    rows = {"oft_name_1": r"rows\X\two.safetensors", "oft_name_2": "gone", "on_2": False}
    made, written, others, text = run_node(stack.OFTStack, lora_stack=given, **rows).args
    assert [(row.name, row.on) for row in made] == [
        ("rows/One.safetensors", True), ("rows/x/two.safetensors", True), ("gone", False)
    ]
    assert others == given[1:] and [e[0] for e in written[2:]] == ["rows/One.safetensors", "rows/x/two.safetensors"]
    for words in (r"'ROWS\One.safetensors' is not listed here; read from rows/One.safetensors", r"'rows\X\two.safetensors'"):
        assert words in text, text
    assert r"Not in the folders here: sub\elsewhere.safetensors" in text and "folders here: Plain" not in text, text
    raises(FileError, lambda: run_node(stack.OFTStack, lora_stack=[("two.safetensors", 1.0, 1.0)]))


def test_names_that_some_system_reads_as_paths_are_not_saved():
    folders.register()
    root = folder_paths.get_folder_paths(folders.FOLDER)[0]
    names = (r"..\evil", r"a\..\..\evil", "a/../b", "C:evil", r"C:\evil", "a<b", 'a"b', "a|b", "what?", "a*", "a\nb", "a\0b")
    names += ("CON", "nul", "sub/Aux.txt", "com1", "LPT\u00b9.x", "NUL .x", "dot.", "sub./x", "space ", "sub /x", "x" * 191)
    for name in names:
        text = raises(ConfigError, lambda n=name: files.new_file(n, root))
        assert "cannot be saved" in text and repr(name) in text, text
    adapter = sound()
    before = sorted(Path(root).rglob("*"))
    for name in (r"..\evil", "nul"):
        options = {"dialect": "as it is", "precision": "fp32", "folder": "oft"}
        raises(ConfigError, lambda n=name, o=options: run_node(save.OFTSave, adapter=adapter, name=n, **o))
    assert sorted(Path(root).rglob("*")) == before
    for name, below in ((r"sub\name", "sub/name_00001_"), ("a.b c/d-e", "a.b c/d-e_00001_"), ("./console", "console_00001_")):
        path = files.new_file(name, root)
        assert path.relative_to(root).as_posix() == f"{below}.safetensors", path
        path.parent.mkdir(exist_ok=True)


def sound():
    """An adapter that was read from a file."""
    folders.register()
    write("oft", "sound.sft", turns())
    return folders.read("sound.sft")


def test_files_of_either_ending_are_copied_and_found_for_other_loaders():
    written = run_node(
        save.OFTSave, adapter=sound(), name="copied", dialect="as it is", precision="fp32", folder="oft"
    ).args[0]
    assert written.endswith(".safetensors") and folders.read(written).entries
    own = turns(77)
    write("loras", "of_a_loader.sft", own)
    assert everywhere.file_of(own) == "of_a_loader.sft"


def test_folders_may_be_on_other_drives():
    """Windows knows no way from one drive to another."""
    drives = [r"C:\ComfyUI\models\oft", r"C:\ComfyUI\models\loras", r"D:\loras"]
    windows = SimpleNamespace(path=ntpath, sep="\\", pardir="..")
    there = SimpleNamespace(isfile=lambda p: True, isdir=lambda p: True)
    kept = [(m, m.os) for m in (filenames, stack, dataset)]
    before = folder_paths.get_folder_paths, folders.find, folder_paths.get_input_directory
    try:
        filenames.os = windows
        stack.os = SimpleNamespace(path=there)
        dataset.os = SimpleNamespace(path=SimpleNamespace(**{**vars(ntpath), **vars(there)}))
        folder_paths.get_folder_paths = lambda name: drives
        folder_paths.get_input_directory = lambda: r"C:\ComfyUI\input"
        folders.find = lambda name: name
        for path, name in (
            (r"D:\loras\a\x.safetensors", r"a\x.safetensors"),
            (r"c:\comfyui\models\oft\..x.safetensors", "..x.safetensors"),
            (r"C:\ComfyUI\models\x.safetensors", None),
            (r"E:\x.safetensors", None),
        ):
            assert files.listed(path) == (name or path), path
            assert stack.listed_name(SimpleNamespace(path=path)) == name, path
        assert dataset.folder_path("cats")
        for elsewhere in ("D:cats", r"D:\cats", r"..\cats"):
            try:
                dataset.folder_path(elsewhere)
                raise AssertionError(elsewhere)
            except AdapterError as error:
                assert "input folder" in str(error)
    finally:
        for module, own in kept:
            module.os = own
        folder_paths.get_folder_paths, folders.find, folder_paths.get_input_directory = before


def test_stacks_hand_on_what_is_no_oft_file():
    """Whatever its format: the LORA_STACK of another pack may list pickles, which are not opened."""
    folders.register()
    loras = Path(folder_paths.get_folder_paths("loras")[0])
    for name in ("old.pt", "old.CKPT", "old.bin"):
        torch.save({"a": torch.ones(1)}, loras / name)
    save_file({"a.lora_up.weight": torch.ones(1)}, loras / "new.safetensors")
    turns = {"lora_unet_x.oft_blocks": torch.zeros(2, 4, 4), "lora_unet_x.alpha": torch.tensor(0.0)}
    save_file(turns, loras / "turns.SAFETENSORS")
    given = [(n, 1.0, 0.5) for n in ("old.pt", "new.safetensors", "turns.SAFETENSORS", "old.CKPT", "old.bin")]
    rows, written, others, text = run_node(stack.OFTStack, lora_stack=given).args
    assert [row.name for row in rows] == ["turns.SAFETENSORS"]
    assert others == [e for e in given if e[0] != "turns.SAFETENSORS"] and written == [*others, given[2]]
    assert "old.pt, new.safetensors" in text
    (loras / "new.safetensors").write_bytes(b"half")
    try:
        run_node(stack.OFTStack, lora_stack=given)
        raise AssertionError("a damaged file is handed on")
    except AdapterError as error:
        assert "new.safetensors" in str(error)
    finally:
        (loras / "new.safetensors").unlink()


def test_files_from_a_lora_stack_are_read_again_when_they_change():
    """The host does not say what is connected when it asks for changes, only that something is."""
    folders.register()
    model = sd15()
    path = write("loras", "from_stack.safetensors", diag_oft(shapes_of(model, ATTENTION)))
    ask = stack.OFTStack.fingerprint_inputs
    alone, before = ask(oft_name_1="none"), ask(lora_stack=None)
    given = [("from_stack.safetensors", 1.0, 1.0)]
    first = run_node(stack.OFTStack, lora_stack=given).args[0][0].adapter
    assert ask(lora_stack=None) == before, "nothing has changed"
    save_file(diag_oft(shapes_of(model, ATTENTION), seed=9), path)
    after = ask(lora_stack=None)
    assert after != before and ask(lora_stack=None) == after and ask(oft_name_1="none") == alone
    assert run_node(stack.OFTStack, lora_stack=given).args[0][0].adapter is not first
    assert ask(lora_stack=None) == after
    path.unlink()


def test_files_are_read_once():
    folders.register()
    model = sd15()
    path = write("oft", "once.safetensors", diag_oft(shapes_of(model, ATTENTION)))
    mark = folders.fingerprint("once.safetensors")
    first = folders.read("once.safetensors")
    assert folders.read("once.safetensors") is first
    assert folders.read("once.safetensors", ReadOptions(alpha_rule="raw")) is not first
    save_file(diag_oft(shapes_of(model, ATTENTION), seed=9), path)
    assert folders.fingerprint("once.safetensors") != mark and folders.read("once.safetensors") is not first
    assert folders.fingerprint("missing.safetensors") == ""


def test_trigger_words_are_an_output():
    model = sd15()
    tensors = diag_oft(shapes_of(model, ATTENTION))
    write("oft", "said.safetensors", tensors, {"modelspec.trigger_phrase": "zwx dog"})
    write("oft", "guessed.safetensors", tensors, {"ss_tag_frequency": '{"a": {"dog": 3}}'})
    how = {"strength_model": 1.0}
    for name, words in (("said.safetensors", "zwx dog"), ("guessed.safetensors", "")):
        loaded = run_node(load.OFTLoad, model=model, oft_name=name, strength_clip=1.0, **how).args
        assert len(loaded) == 4 and loaded[2].startswith(name) and loaded[3] == words
        assert run_node(load.OFTLoadModelOnly, model=model, oft_name=name, **how).args[2] == words
        assert run_node(load.OFTLoadAdapter, oft_name=name).args[2] == words


def test_relatives_of_oft_are_stacked_and_switched_as_oft():
    """A row, and the switch for stock loaders, know them by the names of their tensors."""
    model = sd15()
    name = next(iter(diag_oft(shapes_of(model, ATTENTION)))).partition(".")[0]
    vectors = torch.randn(32, 2, generator=generator(3)).repeat_interleave(2, 1) + 0.1
    path = write("loras", "hra.safetensors", {f"{name}.hra_u": vectors + 0.2 * torch.randn(32, 4, generator=generator(4))})
    assert stack.holds_oft(path) and everywhere.holds_oft([f"{name}.hra_u"])
    assert not everywhere.holds_oft([f"{name}.lora_up.weight", f"{name}.lora_down.weight"])
