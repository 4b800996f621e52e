"""Training in the tab, on stand-ins of Automatic1111 and Forge: learns, changes nothing, stops and goes on, says what cannot be."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from oft_core.training import euler

from . import learner

TRAINERS = pytest.mark.parametrize("name", ["a1111", "forge"])


@pytest.fixture
def pictures(tmp_path):
    """A folder of three pictures, one with a caption."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, colour in enumerate(((200, 40, 40), (40, 200, 40), (60, 60, 220))):
        Image.new("RGB", (64, 64), colour).save(folder / f"{i}.png")
    (folder / "1.txt").write_text("zwx in a meadow", "utf-8")
    return folder


class Trainer:
    """The tab's Train button on a stand-in."""

    def __init__(self, web, folder):
        self.web, self.folder = web, folder
        self.ui = web.pack("webui.training.ui")

    def press(self, **changed):
        """Everything that the tab shows until the training ends."""
        inputs = {
            "folder": str(self.folder), "trigger": "zwx", "instance": "a photo of [trigger]", "class_prompt": "", "preset": "subject",
            "steps": 24, "rate": 0.02, "block": 8, "resolution": 64, "batch": 1, "seed": 3, "memory": "checkpointing",
            "prompts": "a photo of [trigger]", "every": 10, "sample_steps": 3, "name": "subject", "resume": True,
        }
        assert not set(changed) - set(inputs)
        shown = list(self.ui.train(*(inputs | changed).values()))
        return [text for text, *_ in shown], shown[-1]

    def watch(self, monkeypatch, at_step=None):
        """Keep the runs; press Stop after a step."""
        self.seen = []
        made = self.web.pack("webui.training.run").WebRun
        begin, tick = made.__init__, made.tick

        def kept(run, *args):
            begin(run, *args)
            self.seen.append(run)

        def ticked(run, step, steps, picture=None):
            if step == at_step and picture is None:
                self.ui.stop()
            tick(run, step, steps, picture)

        monkeypatch.setattr(made, "__init__", kept)
        monkeypatch.setattr(made, "tick", ticked)


def fixed_loss(run, values) -> float:
    """Mean error at eight fixed noises and levels with these rotations; None: those that were learnt."""
    records, total = list(run.dataset.records), 0.0
    with torch.no_grad(), run.host.trainee.ready(), run.bank.installed(), run.bank.evaluation(values):
        for k in range(8):
            one = [records[k % len(records)]]
            noised = run.objective.noised(run.host.load_batch(one).latents, 77, k, [0])
            total += float((run.host.predict(noised, one) - run.objective.target(noised)).square().mean())
    return total / 8


@TRAINERS
@pytest.mark.parametrize("kind", ["eps", "v", "xl"])
def test_it_learns_and_its_file_draws_what_was_trained(web_of, pictures, monkeypatch, name, kind):
    web = web_of(name)
    web.use_learner(xl=kind == "xl", prediction="v" if kind == "v" else "eps")
    trainer = Trainer(web, pictures)
    trainer.watch(monkeypatch)
    before = web.weights()
    texts, (report, samples, curve) = trainer.press()
    assert "In the list at once: <oft:subject_00001:1>" in report and "24 steps" in report, report
    assert texts[0] == "Waiting for the web UI to be free" or "Reading" in texts[0] or "Loading" in texts[0]
    assert len(samples) == 3 and samples[-1].size == (64, 64) and curve.size == (640, 320)
    # The model is what it was, and the host's own code too.
    after = web.weights()
    assert all(torch.equal(after[k], w) for k, w in before.items())
    assert all(m.checkpoint for m in web.unet.modules() if isinstance(m, learner.BasicTransformerBlock))
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks for m in web.unet.modules())
    if name == "a1111":
        assert web.pack("webui.hosts.a1111").sd_hijack.optimised
    (run,) = trainer.seen
    nothing = {n: torch.zeros_like(p) for n, p in run.bank.parameters.items()}
    was, now = fixed_loss(run, nothing), fixed_loss(run, None)
    assert now < 0.98 * was, (was, now)
    # The file in the prompt, through the host's own way: the same network.
    record = list(run.dataset.records)[:1]
    noised = run.objective.noised(run.host.load_batch(record).latents, 7, 0, [0])
    with torch.no_grad(), run.host.trainee.ready(), run.bank.installed(), run.bank.evaluation(None):
        trained = run.host.predict(noised, record)
    turned = web.drawn("a photo of zwx <oft:subject_00001:1>")
    assert not torch.equal(turned[web.prefix["model"] + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"],
                           before[web.prefix["model"] + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"])  # fmt: skip
    net = copy.deepcopy(web.unet)
    net.load_state_dict({k.removeprefix(web.prefix["model"]): v for k, v in turned.items() if k.startswith(web.prefix["model"])})
    for block in net.modules():
        if isinstance(block, learner.BasicTransformerBlock):
            block.checkpoint = False
    cond = run.host._cond(record[0].caption, record[0].bucket)
    with torch.no_grad():
        drawn = net(noised.x_t, noised.timestep, context=cond["crossattn"], y=cond.get("vector"))
    torch.testing.assert_close(drawn, trained, rtol=1e-4, atol=1e-4)
    if kind == "xl":
        assert ("a photo of zwx", 64, 64) in web.sd_model.seen


@TRAINERS
def test_stopping_keeps_the_work_and_the_same_inputs_go_on_exactly(web_of, pictures, monkeypatch, name):
    web = web_of(name)
    web.use_learner()
    trainer = Trainer(web, pictures)
    trainer.press(name="whole")
    shutil.rmtree(web.folder / ".training")  # or it would be known
    with monkeypatch.context() as patched:
        trainer.watch(patched, at_step=7)
        _, (said, *_) = trainer.press()
    assert "Stopped after 7 of 24 steps. Kept as subject_00001.safetensors" in said
    assert load_file(web.folder / "subject_00001.safetensors")
    _, (report, *_) = trainer.press()
    assert "7 of them from an earlier run" in report
    whole, again = (load_file(web.folder / f"{n}_00001.safetensors") for n in ("whole", "subject"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)
    # The list shows the two files and nothing of the trainings' own.
    assert {f.name for f in web.pack("webui.files").all_files()} == {"whole_00001", "subject_00001"}
    assert "nothing was trained again" in trainer.press()[1][0]


def test_a_model_with_tags_on_it_is_trained_as_the_base(web_of, pictures, monkeypatch):
    """What the last picture's tags did is taken off first, and put back by the next picture."""
    for name in ("a1111", "forge"):
        web = web_of(name)
        web.use_learner()
        web.oft("other", layers="attn1")
        trainer = Trainer(web, pictures)
        trainer.press(name="plain")
        turned = web.drawn("<oft:other:1>")
        trainer.press(name="after", resume=False)
        plain, after = (load_file(web.folder / f"{n}_00001.safetensors") for n in ("plain", "after"))
        assert all(torch.equal(plain[k], after[k]) for k in plain), name
        again = web.drawn("<oft:other:1>")
        assert all(torch.equal(turned[k], again[k]) for k in turned), name


@TRAINERS
def test_what_cannot_be_trained_is_said(web_of, pictures, tmp_path, name):
    web = web_of(name)
    web.use_learner()
    trainer = Trainer(web, pictures)

    def said(**changed):
        return trainer.press(**changed)[1][0]

    assert "no such folder" in said(folder=str(tmp_path / "nowhere"))
    assert "cannot be saved" in said(name="../elsewhere")
    assert "resolution" in said(resolution=0).lower()
    trainer.ui._one_at_a_time.acquire()
    try:
        assert "runs already" in said()
    finally:
        trainer.ui._one_at_a_time.release()
    web.use_learner(in_channels=9)
    assert "9 channels" in said()
    web.use_learner()
    web.sd_model.is_sd1 = False
    assert "SD 1.x, SD 2.x or SDXL" in said()
    if name == "forge":
        web.use_learner()
        web.sd_model.forge_objects_original.unet.model.storage_dtype = "nf4"
        assert "nf4" in said()
    else:
        web.use_learner()
        web.sd_model.lowvram = True
        assert "medvram" in said()
    assert not list(web.folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["reforge", "neo"])
def test_web_uis_that_cannot_train_say_so(web_of, pictures, name):
    assert "cannot train yet" in Trainer(web_of(name), pictures).press()[1][0]


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_sampler_ends_at_what_a_perfect_network_sees(prediction):
    """For a network that always sees one picture, Euler's last step is that picture, at any number of steps and any CFG."""
    alphas, picture = learner.alphas(), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def network(x, timestep, text):
        a = alphas[timestep].float().view(-1, 1, 1, 1)
        noise = (x - a.sqrt() * picture) / (1 - a).sqrt()
        return noise if prediction == "eps" else a.sqrt() * noise - (1 - a).sqrt() * picture

    for steps, cfg in ((1, 1.0), (7, 5.0)):
        found = euler.sample(network, alphas, prediction, picture.shape, text="", steps=steps, cfg=cfg, seed=4)
        torch.testing.assert_close(found, picture, rtol=1e-3, atol=1e-3)
    stopped = []
    euler.sample(network, alphas, prediction, picture.shape, text="", steps=5, each=lambda: stopped.append(1))
    assert len(stopped) == 5
