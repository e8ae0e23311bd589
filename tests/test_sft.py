"""sft.py: the loss falls where it should, big batch = accumulated batch, exact resume, bad
input."""
import dataclasses
import functools
import json
import math
import multiprocessing
import random
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import sft
from conftest import ROOT, close, merged, rand
from data import prefs, tasks
from data.run import (UserError, checkpoint, claims_of, code_of, configure, headings, read_log,
                      result)
from data.tokenizer import bytes_tokenizer, train_bpe
from model import PEFT, collate, generate, init, load, preset, save
from optim import RULES
from sft import fake_quant, prune_at
from wiring import catch

FAST = ["--model", "1x64", "--tokenizer", "bytes", "--context", "96", "--batch", "8", "--micro",
        "8",
        "--rows", "64", "--init", "", "--data", "arithmetic", "--eval_every", "1000", "--warmup",
        "2"]


def weights(folder):
    """A checkpoint's tensors, by name."""
    return {k: v for k, v in load(folder)[0].state_dict().items()}


def same(a, b):
    """Whether two such dicts are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def run(*extra):
    """The result of a small run with these arguments; one that starts from a checkpoint makes no
    model."""
    old = "--init" in extra and extra[extra.index("--init") + 1]
    return sft.main(merged(*(FAST[4:] if old else FAST), *extra))


def test_windows_cover_the_corpus_once_with_bos_and_eos():
    tok = bytes_tokenizer()
    rows = tasks.packed(["ab", "c"], tok, 4)
    flat = [i for r in rows for part in r for i in part]
    assert (flat == [tok.bos, 97, 98, tok.eos, tok.bos, 99, tok.eos]
            and [len(a) + len(b) for a, b in rows] == [4, 3])


class Echo:
    """A task of two rows."""
    name = "echo"

    def demo(self, p):
        return p["prompt"].upper()


def test_the_loss_falls_on_the_completion_and_its_eos_only():
    tok = bytes_tokenizer()
    (prompt, completion), = tasks.demonstrations(Echo(), [dict(prompt="ab")], tok, 10)
    tokens, mask = collate([(prompt, completion)], tok.pad)
    assert tokens[0].tolist() == [tok.bos, 97, 98, 65, 66,
                                  tok.eos] and mask[0].tolist() == [0, 0, 0, 1, 1, 1]


def test_rows_that_do_not_fit_are_counted_and_named(capsys):
    rows = tasks.demonstrations(Echo(), [dict(prompt="ab"), dict(prompt="abcde")],
                                bytes_tokenizer(), 10)
    out = capsys.readouterr().out
    assert len(rows) == 1 and "1 of 2 rows are longer than --context 10 and left out (row 2)" in out


@pytest.mark.curve
def test_it_learns_and_leaves_a_checkpoint_that_generates(workdir):
    out = run("--steps", "150", "--rows", "512", "--lr", "3e-3", "--batch", "32", "--micro", "32",
              "--eval_every", "50", "--data", "toyif", "--tokenizer", "toyif", "--context", "32",
              "--out", "o")
    log = read_log("o")
    assert log[0]["loss"] > 3.5 and log[-1]["loss"] < 2.4
    assert out["val_loss"] == log[-1]["val_loss"] < 2.4
    assert out["val_gold"] > 0.45 and (workdir  # random symbols and no EOS: about 0
                                       / "o/curve.png").exists()
    net, tok = load("o")
    assert generate(net, [tok.prompt("<Fc#4=")], 12,
                    temperature=0).finished.all()                                  # EOS was trained


@pytest.mark.parametrize("extra",
                         ["--peft full", "--peft lora --peft.rank 4", "--peft bone --peft.rank 32",
                                   "--peft hft", "--peft loram", "--optimiser normuon",
                                   "--optimiser soap",
                                   "--optimiser galore --every 2", "--optimiser eco --store int4",
                                   "--optimiser qgalore --store int8", "--store bfloat16",
                                   "--linear qat --fraction 0.7 --bits 2 --schedule wsd",
                                   "--linear halo",
                                   "--linear quartet", "--linear lost",
                                   "--linear lost --phi identity",
                                   "--prune journey --sparsity 0.8",
                                   "--prune journey --optimiser normuon",
                                   "--loss glow --rows 16",                      # three passes
                                   "--prune journey --linear qat --fraction 0.5"])
def test_resume_is_exact(extra, workdir):
    """6 steps = 3 steps + --resume + 3 steps, bit for bit"""
    args = merged("--steps", "6", *extra.split(), "--save_every", "4")
    run(*args, "--out", "a")
    run(*args, "--out", "b", "--stop", "3")
    assert checkpoint("b").name == "step-000003" and result("b") is None              # it pauses
    run(*args, "--out", "b", "--resume")
    a, b = (load_file(checkpoint(x) / "model.safetensors") for x in "ab")
    assert same(a, b)
    assert [r["loss"] for r in read_log("a")] == [r["loss"] for r in read_log("b")]
    seconds = [r["seconds"] for r in read_log("b")]
    assert len(seconds) == 6 and seconds == sorted(set(seconds))               # the clock goes on


PARTS = sorted({*RULES, *PEFT})          # presets of their names, or the rows themselves


@pytest.mark.parametrize("name", PARTS)
def test_every_optimiser_and_adapter_learns_and_leaves_a_plain_checkpoint(name, workdir,
                                                                          monkeypatch):
    """20 steps with its preset's settings, all of which the optimiser got; the checkpoint is a
    float model without adapters"""
    made = catch(monkeypatch, SimpleNamespace(update=sft.AXES["update"]), "update")
    argv = ["--config", name, "--steps", "20", "--data", "toyif", "--tokenizer", "toyif",
            "--context", "32", "--out", "o",
            *(["--peft.rank", "32"] if name in ("bone", "bat") else [])]
    run(*argv)
    c, f = configure(sft.Config, sft.PRESETS, sft.AXES, "", merged(*FAST, *argv))
    (opt,), row = made["optimiser"], sft.PRESETS.get(name, {})
    assert opt.rule.func.__name__ == (name if name in RULES else "adamw")
    assert opt.rule.keywords == f.optimiser.keywords
    assert all(opt.rule.keywords[k] == row[k] for k in opt.rule.keywords.keys() & row.keys())
    assert (opt.lr, opt.weight_decay, opt.seed, opt.aux_lr) == (
        row.get("lr", 1e-3), row.get("weight_decay", 0.1), 0, row.get("aux_lr", 0.0))
    log = read_log("o")
    lr = [opt.lr * min(1, (k + 1) / 2) * (.05 + .475 * (1 + math.cos(math.pi * max(0, k - 2) / 18)))
          for k in range(20)]
    assert [r["lr"] for r in log] == pytest.approx(lr)
    assert log[-1]["loss"] < log[0]["loss"] - 0.01
    assert all(torch.isfinite(v).all() for v in weights("o").values())
    assert load("o")[0].layers[0].mlp.up_proj.weight.dtype == torch.float32


def test_half_fine_tuning_leaves_the_other_half_alone(workdir):
    run("--steps", "1", "--out", "start")
    run("--steps", "3", "--out", "o", "--init", "start", "--config", "hft", "--weight_decay", "0.5")
    a, b = weights("start"), weights("o")
    frozen = {k for k in a if torch.equal(a[k], b[k])}
    assert sum(k.endswith("_proj.weight")
               for k in frozen) in (3, 4) and "embed_tokens.weight" not in frozen


def test_loram_trains_on_the_small_model_and_is_used_on_the_whole_one(workdir):
    """pruned by half, trained, recovered: the whole model gets better too"""
    world = ["--steps", "150", "--lr", "3e-3", "--data", "toyif", "--context", "32", "--rows",
             "512"]
    run(*world, "--tokenizer", "toyif", "--out", "start")
    run(*world, "--config", "loram", "--init", "start", "--out", "o")
    a, b = weights("start"), weights("o")
    assert a.keys() == b.keys() and all(a[k].shape == b[k].shape for k in a)
    net, tok = load("o")
    argv = merged(*FAST, "--data", "toyif", "--context", "32")
    c, _ = sft.configure(sft.Config, sft.PRESETS, sft.AXES, "", argv)
    val = tasks.rows(c, tok, "val")
    before = sft.evaluate(load("start")[0], tok, val, c)["loss"]
    assert sft.evaluate(net, tok, val, c)["loss"] < before - 0.004


def test_loram_keeps_what_is_large_in_all_of_its_matrices():
    """a neuron's size is the product of its rows' norms and its column's"""
    net = init(preset("2x64", bytes_tokenizer()), seed=1)
    kept = sft.kept_units(net, 0.75)
    for i, layer in enumerate(net.layers):
        gate, up, down = (m.weight.detach() for m in (layer.mlp.gate_proj, layer.mlp.up_proj,
                                                      layer.mlp.down_proj))
        size = [(g.square().sum() * u.square().sum() * d.square().sum()).item()
                for g, u, d in zip(gate, up, down.T)]
        best = sorted(sorted(range(len(size)), key=lambda j: -size[j])[:len(size) // 4])
        assert kept[f"layers.{i}.mlp.up_proj"][0].tolist() == best
        assert kept[f"layers.{i}.mlp.down_proj"][1].tolist() == best


BLOCKS = "_proj.weight"


@pytest.mark.parametrize("fraction, share", [(0.5, 0.5), (-1.0, 0.0), (0.0, 0.02), (1.0, 1.0)])
def test_qat_rounds_in_the_last_steps_and_saves_rounded_weights(fraction, share, workdir):
    """and the cooldown lasts as long; share 0.02: the formula's least, one step"""
    out = run("--steps", "8", "--config", "qat", "--bits", "2", f"--fraction={fraction}", "--out",
              "o", "--lr", "3e-3", "--warmup", "0")
    assert out["quantised"] == share and (out["saved_loss"] == out["val_loss"]) == (share > 0)
    for name, W in weights("o").items():
        if name.endswith(BLOCKS):
            assert torch.equal(W, fake_quant(W, 2)) and all(len(set(row)) <= 3
                                                            for row in W.tolist())
    lr = [r["lr"] for r in read_log("o")]
    falls = max(1, round(8 * share)) if share else 1                               # wsd's own: 20 %
    assert all(x == 3e-3 for x in lr[:8 - falls]) and (lr[-1] < 3e-3 or falls == 1)


def test_the_low_precision_layers_save_what_they_train(workdir):
    """a plain float checkpoint, close to the layers' own loss; LOST with φ only for --resume"""
    for i, extra in enumerate(("halo", "halo --format fp6 --level 1", "quartet",
                               "lost --phi identity")):
        out = run("--steps", "8", "--linear", *extra.split(), "--out", f"o{i}")
        assert abs(out["saved_loss"] - out["val_loss"]) < (1e-5 if "lost" in extra else 0.02)
        net, tok = load(f"o{i}")
        assert net.layers[0].mlp.up_proj.weight.shape == (192, 64)
    run("--steps", "2", "--linear", "lost", "--out", "phi")
    with pytest.raises(UserError, match="lost-qwen3"):
        load("phi")
    assert any(k.endswith("q_proj.columns")
               for k in load_file(checkpoint("phi") / "model.safetensors"))


def test_pruning_while_training_is_exact_and_monotone(workdir):
    args = ["--steps", "40", "--prune", "journey", "--sparsity", "0.8", "--out", "o"]
    out = run(*args, "--save_every", "10", "--keep", "9")
    assert [r["sparsity"] for r in read_log("o")] == [prune_at(k, 40, .8) for k in range(1, 41)]
    gone, steps = {}, sorted(workdir.glob("o/step-*"))
    for folder, s in zip(steps, (10, 20, 30, 40)):
        state = torch.load(folder / "state.pt", weights_only=True)
        moments = {n: [x[i] for x in stack["state"].values() if torch.is_tensor(x)]
                   for stack in state["opt"]["stacks"] for i, n in enumerate(stack["names"])}
        for name, W in weights(folder).items():
            if name.endswith(BLOCKS):
                zero = W == 0
                assert zero.sum() == round(prune_at(s, 40, .8) * W.numel())
                assert torch.equal(zero, ~state["memories"]["journey"][name])
                assert not (gone.get(name, zero) & ~zero).any()
                assert all(not m[zero].any() and m[~zero].any() for m in moments[name])
                gone[name] = zero
    assert out["sparsity"] == pytest.approx(.8, abs=1e-4) and 0.2 < out["mean_density"] < 0.5


def test_the_times_of_pruning_are_compared_at_equal_compute():
    def cost(steps, *times):
        return sum(1 - prune_at(k, steps, .8, *times) for k in range(steps))
    for begin, end, steps in claims_of("sft").OTHER_TIMES.values():
        assert abs(cost(steps, begin, end) / cost(sft.PRESETS["calm"]["steps"]) - 1) < 0.01


def test_layers_and_pruning_run_on_one_rank():
    for extra in ("--linear halo", "--prune journey"):
        c, f = configure(sft.Config, sft.PRESETS, sft.AXES, "", [*FAST, *extra.split()])
        sft.check(c, f, 1)
        with pytest.raises(UserError, match=f"{extra} runs on one rank: start it without torchrun"):
            sft.check(c, f, 2)


def test_no_sparsity_and_no_rounding_change_nothing(workdir):
    run("--steps", "3", "--out", "a")
    run("--steps", "3", "--out", "b", "--prune", "journey", "--sparsity", "0")
    run("--steps", "3", "--out", "c", "--linear", "halo", "--format", "float32", "--level", "0")
    run("--steps", "3", "--out", "d", "--prune", "journey", "--begin", "1", "--end", "1",
        "--sparsity", "0.5")
    a = weights("a")
    assert same(a, weights("b")) and all(torch.allclose(a[k], v, atol=1e-5)
                                         for k, v in weights("c").items())
    assert all(torch.equal(v, a[k] * (v != 0)) for k, v in weights("d").items())    # cut at the end


def test_watch_and_target_are_in_the_result(workdir):
    """what the checkpoint knew before, and when the target was reached: between two evaluations"""
    out = run("--steps", "20", "--eval_every", "5", "--target", "4.8", "--watch", "toyif", "--out",
              "o")
    log = [r for r in read_log("o") if "val_loss" in r]
    after = next(r for r in log if r["val_loss"] <= 4.8)
    assert [r["step"] for r in log] == [5, 10, 15, 20]
    assert after["step"] - 5 < out["steps_to"] <= after["step"] and out["reached"] == 1
    assert 0 < out["seconds_to"] <= log[-1]["seconds"] and out["state_bytes"] == 8.0
    assert 0 < out["opt_share"] < 1 and out["watch_loss"] > 0
    rows = [dict(step=10, seconds=1.0, val_loss=3.0), dict(step=20, seconds=3.0, val_loss=2.0)]
    assert sft.reached(rows, 2.25) == dict(steps_to=17.5, seconds_to=2.5, reached=1.0)
    assert sft.reached(rows, 1.0) == dict(steps_to=20, seconds_to=3.0, reached=0.0)


@pytest.mark.parametrize("length, seen", [(["--steps", "10"], 80), (["--epochs", "2"], 128)])
def test_suggest_prints_step_law_and_trains_nothing(length, seen, workdir, capsys):
    """of the weights that are no embedding, and of the tokens of all rows that the run will see"""
    out = run("--suggest", *length)
    told = capsys.readouterr().out
    task, net = tasks.task("arithmetic"), init(preset("1x64", bytes_tokenizer(), 192))
    N = sum(p.numel() for p in net.parameters()) - net.embed_tokens.weight.numel()
    rows = [2 + len(p["prompt"] + task.demo(p)) for p in task.problems("train", 64, 0)]
    D = sum(rows) / len(rows) * seen
    lr, batch = 1.79 * N ** -.713 * D ** .307, .58 * D ** .571
    assert out == pytest.approx(dict(lr=lr, batch_tokens=batch))
    assert f"{N:,} parameters without embeddings, {D:,.0f} tokens: lr {lr:.2e}" in told
    rows = round(batch * 64 / sum(rows))
    assert f"--lr {lr:.1e} --batch {rows}; this run has 0.001 and 8" in told
    assert "Step Law (2503.04715)" in told and not (workdir / "out/sft").exists()


def test_the_race_s_numbers_by_hand(monkeypatch):
    """the clock's shares, the state's bytes, the box of the blocks' matrices, the rows behind those
    that val_loss sees"""
    net = torch.nn.Module()
    net.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    net.embed = torch.nn.Linear(2, 2)
    with torch.no_grad():
        net.layers[0].weight.copy_(torch.tensor([[-10., 9.4], [9.3, 1]]))
        net.layers[0].bias.fill_(30)
        net.embed.weight.fill_(50)
    opt = SimpleNamespace(stacks=[SimpleNamespace(ranks=SimpleNamespace(seconds=x))
                                  for x in (1, 2)])
    monkeypatch.setattr(sft, "memory_report", lambda opt: dict(
        muon=dict(bytes=40, parameters=10), adamw=dict(bytes=80, parameters=10)))
    monkeypatch.setattr(sft, "evaluate", lambda net, tok, rows, c: dict(loss=rows))
    monkeypatch.setattr(sft, "read_log", lambda folder: [dict(step=4, seconds=2., val_loss=1.),
                                                         dict(step=6, seconds=4., val_loss=.5)])
    c = SimpleNamespace(optimiser="muon", target=.625, weight_decay=.1)
    got = sft.race(c, SimpleNamespace(folder=""), net, None, opt, dict(all=20., update=5.),
                   dict(val=[*range(258)]))
    assert got.pop("tune_loss") == [256, 257]
    assert got == pytest.approx(dict(opt_share=.25, ns_share=.15, steps_to=5.5,
                                     seconds_to=3.5, reached=1, state_bytes=4, box=1, at_wall=.25))
    assert "tune_loss" not in sft.race(c, SimpleNamespace(folder=""), net, None, opt,
                                       dict(all=20., update=5.), dict(val=[1]))
    assert sft.reached([dict(step=3, seconds=2., val_loss=.1)], .2) == dict(
        steps_to=3, seconds_to=2, reached=1)


def test_epochs_are_passes_over_the_rows(workdir):
    args = ["--epochs", "1.3", "--rows", "20", "--out", "o"]
    out = run(*args)
    assert read_log("o")[-1]["step"] == 4 == math.ceil(20 * 1.3 / 8)
    assert run(*args, "--resume")["val_loss"] == out["val_loss"]            # nothing is left to do


def test_only_the_first_rows_are_evaluated_and_none_is_no_error():
    tok = bytes_tokenizer()
    c, net = SimpleNamespace(micro=2, device="cpu", dtype="float32"), init(preset("1x64", tok))
    rows = [([97] * k, [98] * k + [tok.eos]) for k in range(1, 6)]
    assert sft.evaluate(net, tok, rows, c, limit=3) == sft.evaluate(net, tok, rows[:3], c)
    assert sft.evaluate(net, tok, rows, c) != sft.evaluate(net, tok, rows[:4], c)
    assert sft.measure(net, tok, dict(val=[], ood=rows), c).keys() == {"ood_loss", "ood_bpb"}


def test_a_new_tokenizer_is_of_the_rows_of_its_task(workdir, monkeypatch):
    monkeypatch.setattr(sft.text, "CACHE", workdir)
    argv = merged(*FAST, "--tokenizer", "bpe", "--vocab", "265", "--rows", "9")
    c, _ = configure(sft.Config, sft.PRESETS, sft.AXES, "", argv)
    task = tasks.task("arithmetic")
    texts = [p["prompt"] + task.demo(p) for p in task.problems("train", 9, 0)]
    assert sft.new_tokenizer(c).tokens == train_bpe(texts, 265).tokens
    for name, words in (("chain", tasks.chain_tokenizer), ("ring", prefs.ring_tokenizer),
                        ("toyif", prefs.tokenizer), ("bytes", bytes_tokenizer)):
        assert sft.new_tokenizer(dataclasses.replace(c, tokenizer=name)).tokens == words().tokens


def test_rounding_lasts_as_long_as_the_cooldown():
    net = torch.nn.Sequential(sft.QATLinear(torch.nn.Linear(4, 4), 2))
    c = SimpleNamespace(schedule="wsd")

    def memory(fraction, fuse=True, c=c):
        how = functools.partial(sft.qat, bits=2, fraction=fraction, fuse=fuse)
        return sft.Rounding(c, SimpleNamespace(linear=how), net, None, dict(steps=10, tokens=900.))
    some = memory(0.3)
    rounds = []
    for step in range(10):
        some.begin(step)
        rounds.append(net[0].rounding)
    assert rounds == [False] * 7 + [True] * 3 and some.report() == dict(quantised=0.3)
    assert some.schedule(sft.SCHEDULES["wsd"]).keywords == dict(cooldown=0.3)
    for other in (memory(0.3, False), memory(0.3, c=SimpleNamespace(schedule="linear"))):
        assert other.schedule(max) is max
    best = sft.qat_fraction(16, 9000., 2)
    assert 0.02 < best < 1 and memory(0.0).report() == dict(quantised=best)
    never = memory(-1.0)
    never.begin(9)
    assert not net[0].rounding and never.report() == dict(quantised=0)


@pytest.mark.parametrize("extra, ranks, words", [
    ([], 3, "--batch 8 is not a multiple of the 3 ranks"),
    (["--loss", "glow"], 2, "--loss glow --feedback none run on one rank"),
    (["--feedback", "filtered", "--data", "toyif_base"], 2, "--feedback filtered run on one rank"),
    (["--store", "int8"], 2, "--store int8 runs on one rank"),
    (["--peft", "lora", "--store", "int8"], 1, "trains the layers that --peft lora freezes"),
    (["--init", "base:toyif_base", "--context", "65"], 1, "exceeds the 64 tokens of base:toyif"),
    (["--loss", "adpa", "--feedback", "sampled", "--data", "toyif"], 1, "needs --teacher CHECKP"),
    (["--loss", "aligndistil", "--feedback", "chosen", "--data", "toyif", "--teacher", "net"], 1,
     "needs --other CHECKPOINT"),
    (["--loss", "dckd", "--feedback", "both", "--data", "toyif", "--teacher", "nowhere"], 1,
     "nowhere does not exist"),
    (["--feedback", "both", "--data", "arithmetic"], 1, "no preference data 'arithmetic'"),
    (["--watch", "arithmetik"], 1, "did you mean 'arithmetic'"),
    (["--prune", "journey", "--linear", "halo", "--peft", "lora"], 1, "--linear halo and --peft"),
])
def test_what_does_not_combine_is_told_before_anything_is_made(extra, ranks, words, workdir):
    argv = merged(*(FAST if "--init" not in extra else FAST[4:]), *extra)
    c, f = configure(sft.Config, sft.PRESETS, sft.AXES, "", argv)
    save(init(preset("1x64", bytes_tokenizer())), bytes_tokenizer(), "net")
    with pytest.raises(UserError, match=words):
        sft.check(c, f, ranks)


@pytest.mark.parametrize("name", [x for x, row in sft.PRESETS.items() if row.get("init")
                                  and "loss" not in row])
def test_presets_fit_the_bases_that_they_start_from(name):
    """at their own size and at tiny's; a base's base says how long its context is"""
    for config in (name, f"{name},tiny"):
        c, f = configure(sft.Config, sft.PRESETS, sft.AXES, "", ["--config", config])
        room = c
        while room.init:
            room = sft.configured(room.init.removeprefix("base:"), config)[2][0]
        assert sft.find(c.init, config, make=False) == sft.longest(c) == 2 * room.context
        assert c.context <= 2 * room.context


def test_a_run_reads_what_its_rows_need():
    def reads(*argv):
        c, f = configure(sft.Config, sft.PRESETS, sft.AXES, "", [*argv])
        return {key for key, (used, _) in sft.readers(c, f).items() if used}
    always = {"target", "suggest"}
    assert reads("--init", "", "--data", "stdlib", "--steps", "3") == always | {
        "model", "family", "tokenizer", "vocab", "warmup"}
    assert reads("--init", "", "--tokenizer", "bytes") == always | {
        "model", "family", "tokenizer", "rows", "chat", "epochs", "warmup", "eval_prompts"}
    assert reads("--config", "adpa", "--steps", "0") == always | {
        "rows", "chat", "epochs", "warmup", "teacher", "other", "eval_prompts"}
    assert reads("--config", "dckd") == always | {
        "rows", "chat", "epochs", "warmup", "teacher", "eval_prompts"}
    assert reads("--data", "stdlib", "--watch", "toyif") == always | {"chat", "epochs", "warmup"}


@pytest.mark.parametrize("name", claims_of("sft").CLAIMS)
def test_claims_are_made_of_presets_and_their_tests_of_arms(name):
    claim = claims_of("sft").CLAIMS[name]
    for config in claim.arms.values():
        sft.configure(sft.Config, sft.PRESETS, sft.AXES, "", ["--config", config])
    assert all(set(weights) <= {*claim.arms, ""} for weights in claim.tests.values())


def test_two_runs_with_one_seed_are_equal_and_two_seeds_are_not(workdir):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run("--steps", "2", "--seed", seed, "--out", name)
    assert same(weights("a"), weights("b")) and not same(weights("a"), weights("c"))


def test_micro_does_not_change_the_result(workdir):
    for name, micro in (("a", "8"), ("b", "3")):
        run("--steps", "3", "--micro", micro, "--out", name, "--clip", "1e9")
    a, b = weights("a"), weights("b")
    assert all(torch.allclose(a[k], b[k], atol=2e-4) for k in a)
    assert [r["loss"] for r in read_log("a")] == pytest.approx([r["loss"] for r in read_log("b")],
                                                               rel=1e-5)


def test_the_plain_kernels_give_the_same_losses(workdir):
    """--kernels torch, to rounding: the twins of every kernel, through a whole run"""
    for name in ("auto", "torch"):
        run("--steps", "3", "--kernels", name, "--out", name)
    fast, plain = ([(r["loss"], r["norm"]) for r in read_log(name)] for name in ("auto", "torch"))
    assert len(fast) == 3 and all(a == pytest.approx(b, rel=1e-4) for a, b in zip(fast, plain))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixtral", "qwen3_moe"])
def test_every_family_takes_two_steps(family, workdir):
    run("--steps", "2", "--family", family, "--out", "o")
    row = read_log("o")[-1]
    assert row["loss"] < 7 and ("aux" in row) == ("mix" in family or "moe" in family)


def test_the_map_names_every_preset():
    chapters = headings(Path(sft.__file__).read_text())
    named = {name for names, _ in chapters for name in re.split(r", *", names)}
    assert sft.PRESETS.keys() - named == {"pretrain", "sft", "tiny"}                # the spine's
    assert {*sft.LINEARS, *sft.PRUNING} - named == {"plain", "none"}


def test_base_is_made_once_and_found_again(workdir, capsys):
    a = sft.base("arithmetic,tiny", steps=2, rows=32)
    assert "making" in capsys.readouterr().out
    assert sft.base("arithmetic,tiny", steps=2,
                    rows=32) == a and "making" not in capsys.readouterr().out
    assert sft.base("arithmetic", like="lora,tiny", steps=2, rows=32) == a   # the size is handed on
    assert sft.base("arithmetic,tiny", steps=2, rows=32, seed=1) != a


def test_a_base_knows_what_its_own_base_is(monkeypatch):
    def tag():
        return sft.fingerprint(*sft.configured("toyif_judge", "tiny")[2])
    before = tag()
    monkeypatch.setitem(sft.PRESETS, "toyif_checks", sft.PRESETS["toyif_checks"] | dict(lr=1e-3))
    assert len(before) == 8 and tag() != before


BASES = sorted(name for name, row in sft.PRESETS.items() if "init" in row and "loss" not in row)


def codes(home):
    """Each base's hash of its code in a copy of the project."""
    return {name: code_of("sft", sft.configured(name)[2][0], sft.AXES, home=home) for name in BASES}


def edited(home, *edits):
    """A copy of the project's files in which texts are others; edits: (file, text, other text)."""
    (home / "data").mkdir(parents=True)
    for path in (*ROOT.glob("*.py"), *ROOT.glob("data/*.py")):
        place, text = str(path.relative_to(ROOT)), path.read_text()
        for file, old, new in edits:
            assert file != place or old in text
            text = text.replace(old, new, 1) if file == place else text
        (home / place).write_text(text)
    return home


def test_a_base_knows_the_code_that_trains_it(tmp_path):
    """another loss makes other bases; a comment, a docstring, a method that it does not use and a
    field that nobody reads do not"""
    before, field, loss = codes(ROOT), '    store: str = "float32"', "    return -logp\n"
    assert len(BASES) > 10
    same_code = edited(tmp_path / "a", ("sft.py", loss, f"    # as ever\n{loss}"),
                       ("sft.py", '"""Cross-entropy: the', '"""The'),
                       ("sft.py", "beta=10.0):", "beta=11.0):"),
                       ("sft.py", field, f"    unread: int = 0\n{field}"))
    assert codes(same_code) == before
    order = edited(tmp_path / "e", ("data/run.py", "1_000_003", "1_000_033"))
    assert not {*codes(order).values()} & {*before.values()}                # the order of the data
    for name, edit in dict(b=("sft.py", loss, "    return -1.0 * logp\n"),
                           c=("optim.py", "set_lr(optimiser, lr):", "set_lr(optimiser, lr, x=0):")
                           ).items():
        after = codes(edited(tmp_path / name, edit))
        assert all(after[base] != before[base] for base in BASES), edit


def test_a_base_knows_the_defaults_that_train_it(monkeypatch):
    def tag():
        return sft.fingerprint(*sft.configured("toyif_judge", "tiny")[2])
    before = tag()
    for field, value, other in (("clip", 0.1, True), ("save_every", 3, False)):
        kind = dataclasses.make_dataclass("Wider", [(field, float, value)], bases=(sft.Config,),
                                          frozen=True)
        with monkeypatch.context() as m:
            m.setattr(sft, "Config", kind)
            assert (tag() != before) == other, field


def test_a_new_field_renames_no_base_and_forbids_no_resume(workdir, monkeypatch):
    def tag():
        return sft.fingerprint(*sft.configured("toyif_judge", "tiny")[2])
    before = tag()
    run("--steps", "2", "--stop", "1", "--out", "o")
    wider = dataclasses.make_dataclass("Wider", [("unread", int, 0)], bases=(sft.Config,),
                                       frozen=True)
    monkeypatch.setattr(sft, "Config", wider)
    assert tag() == before
    run("--steps", "2", "--out", "o", "--resume")
    assert checkpoint("o").name == "step-000002"


def test_jsonl_of_ones_own(workdir):
    rows = [dict(prompt=f"say {i}: ", completion=str(i)) for i in range(40)]
    (workdir / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = run("--data", "my.jsonl", "--steps", "3", "--out", "o")
    assert {"val_loss", "val_rouge_l"} <= out.keys() and "ood_loss" not in out


def bad(workdir):
    """Write files that are wrong, each in its own way."""
    (workdir / "empty.jsonl").write_text("")
    (workdir / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": oops}\n')
    (workdir / "odd.jsonl").write_text('{"foo": 1}\n')
    (workdir
     / "long.jsonl").write_text("\n".join(json.dumps(dict(prompt=f"{i}" * 500, completion=str(i)))
                                                  for i in range(9)))


@pytest.mark.parametrize("argv, words", [
    (["--dta", "x"], "unknown key --dta; did you mean 'data'"),
    (["--lr", "high"], "--lr high: expected float"),
    (["--config", "lroa"], "no preset 'lroa'; did you mean 'lora'"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--data", "arithmetik"], "did you mean 'arithmetic'"),
    (["--data", "stdlibb"], "did you mean 'stdlib'"),
    (["--data", "empty.jsonl"], "empty.jsonl: the file is empty"),
    (["--data", "broken.jsonl"], "broken.jsonl:2: not a JSON object"),
    (["--data", "odd.jsonl"], "odd.jsonl:1: no schema fits"),
    (["--data", "long.jsonl"], "long.jsonl: no row fits --context 96, prompt and completion"),
    (["--init", "nowhere"], "nowhere does not exist"),
    (["--init", "base:nothing"], "no preset 'nothing'"),
    (["--model", "big"], "--model big: expected LAYERSxWIDTH"),
    (["--device", "cuda:9"], "sees no CUDA device"),
    (["--optimiser", "moun"], "no optimiser 'moun'; did you mean 'muon'"),
    (["--optimiser", "galore", "--optimiser.rank", "500"],
     "--rank 500 does not fit a 64x64 matrix"),
    (["--peft", "lora", "--peft.rank", "0"], "--rank 0: must be at least 1"),
    (["--store", "int8", "--rounding", "up"], "--rounding up: choose from stochastic, nearest"),
    (["--optimiser", "muon", "--scale", "big"], "--scale big"),
    (["--optimiser", "soap", "--every", "0"], "--every 0: must be at least 1"),
    (["--lr", "-1"], "--lr -1: must be above 0"),
    (["--linear", "qta"], "no linear 'qta'; did you mean 'qat'"),
    (["--linear", "qat", "--bits", "9"], "--bits 9: must be at least 1 and at most 8"),
    (["--linear", "qat", "--fraction=-0.5"], "--fraction -0.5: expected 0 to 1, or -1 for never"),
    (["--linear", "qat", "--fraction", "2"], "--fraction 2: must be at least -1 and at most 1"),
    (["--linear", "halo", "--format", "int4"],
     "--format int4: choose from float32, int8, fp8, fp6, mxfp4"),
    (["--linear", "halo", "--level", "3"], "--level 3: choose from 0, 1, 2"),
    (["--linear", "quartet", "--backward", "up"], "--backward up: choose from stochastic, nearest"),
    (["--linear", "lost", "--phi", "relu"], "--phi relu: choose from silu, identity"),
    (["--linear", "lost", "--peft", "lora"], "--linear lost and --peft lora do not go together"),
    (["--linear", "qat", "--store", "int8"], "--linear qat and --store int8 do not go together"),
    (["--linear", "halo", "--compile"], "--linear halo and --compile True do not go together"),
    (["--prune", "journey", "--linear", "lost"],
     "cuts matrices, which --linear lost does not have"),
    (["--prune", "journey", "--peft", "hft"], "--prune journey and --peft hft do not go together"),
    (["--prune", "journey", "--sparsity", "1"], "--sparsity 1: must be at least 0 and below 1"),
    (["--optimiser", "eco"], "--optimiser eco with --store float32 rounds nothing: add --store"),
    (["--prune", "journey", "--begin", "0.8"], "--begin 0.8: expected 0 to 0.75"),
    (["--suggest", "--init", "base:pretrain"],
     "--suggest is about pre-training: add --config pretrain"),
    (["--claim", "normuon", "--seeds", "0"], "--seeds 0: at least 1"),
])
def test_bad_input_is_one_line_and_exit_code_2(argv, words, workdir, capsys):
    if argv[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    bad(workdir)
    with pytest.raises(SystemExit) as stop:
        sft.cli(lambda: sft.main(argv) if "--claim" in argv else run("--steps", "1", *argv))
    err = capsys.readouterr().err.strip().splitlines()
    assert (stop.value.code == 2 and words in err[-1] and err[-1].startswith("error: ")
            and "Traceback" not in "".join(err))


def test_a_kill_at_any_moment_leaves_a_run_that_loads_and_resumes(workdir):
    """kill -9 at ten random moments of a run that saves after every step; each time on from where
    it was"""
    argv = [*FAST, "--steps", "100000", "--save_every", "1", "--out", "o"]
    rng, reached = random.Random(0), []
    for i in range(10):
        process = multiprocessing.get_context("fork").Process(                # torch is there
            target=sft.main, args=(argv + ["--resume"] * (i > 0),))
        process.start()
        start, last = time.time(), reached[-1] if reached else 0
        while time.time() - start < 60 and not any(int(p.name[5:11]) > last
                                                   for p in workdir.glob("o/step-??????")):
            assert process.is_alive()
            time.sleep(0.02)
        time.sleep(rng.random() * 0.4)
        process.kill()
        process.join()
        net, tok = load("o")
        torch.load(checkpoint("o") / "state.pt", weights_only=True)
        reached.append(int(checkpoint("o").name[5:]))
        assert (net.head.isfinite().all() and tok.encode("1")
                and json.loads((workdir / "o/run.json").read_text()))
        assert [r["step"] for r in read_log("o")][:reached[-1]] == list(range(1, reached[-1] + 1))
    assert reached == sorted(set(reached))


# --- objectives beside likelihood -----------------------------------------------------------------

D = functools.partial(torch.tensor, dtype=torch.float64)
TOK, ONES = D([[-1., -2, -.5]]), torch.ones(1, 3).double()
E_LOGP, E_REF = D([[-1., -2, -3, -2, -2]]), D([[-1.5, -2, -3.5, -2, -2]])         # a log-ratio of 1


@pytest.mark.parametrize("beta, values", [(.1, (-.1, -.0975, -.090909, -.090903)),
                                          (1., (-1, -.75, -.5, -.48988))])
def test_implicit_rewards_by_hand(beta, values):
    for phi, value in zip(("tv", "chi2", "hellinger", "js"), values):
        assert close(sft.implicit(E_LOGP, E_REF, phi=phi, beta=beta), [value], 2e-6)


def test_implicit_rewards_begin_as_sft_and_chi2_stops():
    for phi in sft.PHI:
        x = E_REF.clone().requires_grad_()
        sft.implicit(x, E_REF, phi=phi, beta=1.).sum().backward()
        assert close(x.grad, -torch.ones(1, 5))
    for ratio, slope in ((2., 0.), (3., .5)):
        x = (E_REF + ratio / 5).requires_grad_()
        sft.implicit(x, E_REF, beta=1.).sum().backward()
        assert close(x.grad, slope * torch.ones(1, 5))
    for phi in ("hellinger", "js"):
        assert sft.implicit(E_REF - 100, E_REF, phi=phi).isfinite().all()
    with pytest.raises(UserError, match="--phi"):
        sft.implicit(E_LOGP, E_REF, phi="kl")


def test_unlikelihood_by_hand():
    tok = TOK.T  # three rows of one token, the second bad
    assert close(sft.unlikelihood(tok, D([1., 0, 1])).mean(), .548471)
    assert close(sft.unlikelihood(tok, D([1., 1, 1])), sft.nll(tok)) and close(sft.nll(tok).mean(),
                                                                               1.166667)
    certain = D([[0.]]).requires_grad_()
    sft.unlikelihood(certain, D([0.])).sum().backward()
    assert certain.grad.isfinite().all()


def test_rwr_by_hand():
    tok, reward = TOK.T, -D([.1, .9, .2])
    assert close(sft.rwr(tok, reward, temperature=10.).mean(), 1.102671)
    assert close(sft.rwr(tok, reward, temperature=1.).mean(), .709114)
    assert close(sft.rwr(tok, reward, temperature=1e9), sft.nll(tok))


def test_glow_by_hand():
    now = 3.5 / 3
    for drop, weight in ((0., 1.), (.1, .537883), (-.1, 1.462117), (.2, .5), (-9., 2.),
                         (math.nan, 1.)):
        assert close(sft.glow(TOK, ONES, D([now + drop])), weight * -TOK, 5e-6)
    assert close(sft.glow(TOK, ONES, D([now + 9]), beta=0.), -TOK)
    x = TOK.clone().requires_grad_()
    sft.glow(x, ONES, D([now + .1])).sum().backward()
    assert close(x.grad, -.537883 * ONES, 1e-5)                    # no gradient through the weight


def test_reweighting_by_hand():
    losses = D([1., 2, 3, 5])
    w = sft.batch_weights(losses) / 4
    assert close(w, [.1237, .2039, .3362, .3362], 1e-4) and close((w * losses).sum(), 3.2211, 1e-4)
    for rule, total in (("quadratic", 2.6903), ("extremes", 2.7961)):
        assert close((sft.batch_weights(losses, rule=rule) / 4 * losses).sum(), total, 1e-4)
    assert close(sft.batch_weights(losses, spread=1e9), torch.ones(4)) and close(
        sft.batch_weights(torch.ones(4).double()), torch.ones(4))
    assert close(sft.reweighted(TOK, ONES, D([2.])), [2 * 3.5 / 3])
    with pytest.raises(UserError, match="--rule"):
        sft.batch_weights(losses, rule="upper")


def test_distillation_by_hand():
    """of one scored token, the second of its row; logits are h W with W the identity"""
    z_dpo, z_start, z = ((D([row]), torch.eye(3).double())
                         for row in ([1., 0, -1], [0., .5, 0], [.2, .1, 0]))
    mask, logp = D([[0., 1]]), D([[0., -3]])
    good, bad = D([1.]), D([0.])
    assert close(sft.adpa(z, z_dpo, z_start, logp, mask, bad), [[0, .212786]])
    assert close(sft.adpa(z, z_dpo, z_start, logp, mask, good), [[0, 3.]])
    assert close(sft.adpa(z, z_dpo, z_dpo, logp, mask, bad), [[0, 0.]])
    assert close(sft.dckd(z, z_dpo, logp, mask, good, lam=2.), [[0, 3 + 2 * .212026]], 2e-6)
    assert close(sft.dckd(z, z_dpo, logp, mask, bad), [[0, .212026]])
    assert close(sft.aligndistil(z, z_dpo, z_start, mask), [.107887])
    same = sft.aligndistil(z, z_dpo, z_dpo, mask)  # no difference: w = .001, the DPO model
    log_q, log_p = (torch.log_softmax(x, -1) for x, _ in (z, z_dpo))
    assert close(same, [.1 / 1e-3 * (log_q.exp() * (log_q - log_p)).sum()], 1e-4)


def test_distillation_is_that_of_whole_distributions():
    """and its gradient, at many tokens: the heads' products against logits that are held"""
    heads = [(rand(9, 8, seed=i), rand(40, 8, seed=i + 10)) for i in range(3)]
    (h, W), (t, U), (o, V) = heads
    mask = torch.cat([torch.zeros(3, 1), torch.ones(3, 3)], 1).double()
    w = 10 * (torch.softmax(t @ U.T, -1) - torch.softmax(o @ V.T, -1)).abs().sum(-1) + 1e-3
    found, wanted = (h.clone().requires_grad_() for _ in "ab")
    got = sft.aligndistil((found, W), (t, U), (o, V), mask)
    log_q = torch.log_softmax(wanted @ W.T, -1)
    beyond = torch.log_softmax(t @ U.T + w[:, None] * (t @ U.T - o @ V.T), -1)
    kl = .1 / w * (log_q.exp() * (log_q - beyond)).sum(-1)
    assert close(got, kl.view(3, 3).mean(1), 1e-4)
    got.sum().backward()
    kl.view(3, 3).mean(1).sum().backward()
    assert close(found.grad, wanted.grad, 1e-4)
    far = (torch.softmax(t @ U.T, -1) - torch.softmax(o @ V.T, -1)).abs().sum(-1)
    assert all(close(sft.distance((t, U), (o, V), rows=n), far) for n in (2, 9, 256))
    gain = sft.adpa(heads[0], heads[1], heads[2], 0 * mask, mask, torch.zeros(3).double())
    q = torch.softmax(h @ W.T, -1)
    log_ratio = torch.log_softmax(t @ U.T, -1) - torch.log_softmax(o @ V.T, -1)
    assert close(gain[:, 1:], -(q * log_ratio).sum(-1).view(3, 3), 1e-5)


WORLD = ["--data", "toyif_base", "--init", "", "--tokenizer", "toyif", "--model", "1x64", "--rows",
         "64", "--steps", "1", "--context", "32"]


def test_filtering_and_tags_follow_the_gold_reward():
    argv = merged("--config", "conditional,tiny", *WORLD, "--rows", "400")
    c, f = configure(sft.Config, sft.PRESETS, sft.AXES, "", argv)
    task, tok = sft.tasks.task("toyif_base"), sft.prefs.tokenizer()
    problems = task.problems("train", 400, c.seed)
    gold = [task.reward(p, task.demo(p)) for p in problems]
    data, infos = sft.scored(c, tok, None, None)
    cut = sorted(gold)[200]
    assert all((g > cut) == (i["good"] > 0) for g, i in zip(gold, infos) if g != cut)
    assert abs(sum(i["score"] for i in infos)) < 1e-2
    kept, _ = sft.filtered(c, tok, None, None)
    assert [row for row, i in zip(data, infos) if i["good"]] == kept and len(kept) == 200
    tagged, _ = sft.conditional(c, tok, None, torch.Generator().manual_seed(0))
    good, bad = tok.encode("."), tok.encode(",")
    marks = [p[-1:] for p, _ in tagged]
    assert all(m == (good if i["good"] else bad) or p == row[0]
               for m, i, (p, _), row in zip(marks, infos, tagged, data))
    assert sum(p == row[0] for (p, _), row in zip(tagged, data)) < 20
    half, _ = sft.conditional(c, tok, None, torch.Generator().manual_seed(0), untagged=0.5)
    u = torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.5
    assert [p == row[0] for (p, _), row in zip(half, data)] == u.tolist()
    best = sorted(range(400), key=lambda j: -gold[j])[:100]
    for rows, infos in (sft.scored(c, tok, None, None, share=.25),
                        sft.conditional(c, tok, None, torch.Generator(), share=.25)):
        assert [j for j, i in enumerate(infos) if i["good"]] == sorted(best)
    assert sft.filtered(c, tok, None, None, share=.25)[0] == [data[j] for j in sorted(best)]


def test_rows_that_do_not_fit_go_with_their_numbers(capsys):
    c = SimpleNamespace(context=4, data="mine", feedback="scored")
    found = [([1], [2, 3, 4], "a"), ([1, 1], [2, 3, 4], "b"), ([5], [6], "c")]
    assert sft.fitting(found, c) == ([([1], [2, 3, 4]), ([5], [6])], ["a", "c"])
    assert "mine: 1 of 3 rows are longer than --context 4 and left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="--feedback scored: no row fits --context 4"):
        sft.fitting(found[1:2], c)


def test_a_file_s_pairs_are_trained_on_and_its_held_out_chosen_sides_evaluated(workdir):
    rows = [dict(prompt=f"{i}", chosen=f"yes {i}", rejected=f"no {i}") for i in range(40)]
    (workdir / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["--data", "pairs.jsonl", "--feedback", "both", "--init", "", "--tokenizer", "bytes"]
    c, f = configure(sft.Config, sft.PRESETS, sft.AXES, "", argv)
    tok, (train, val) = bytes_tokenizer(), prefs.pair_sets("pairs.jsonl")
    ten = dataclasses.replace(c, context=10, rows=9)     # "<bos>1" and "yes 1<eos>" are eight
    assert len(sft.pair_ids(ten, tok)) == 9 and len(sft.pair_ids(c, tok)) == len(train)
    short = [r for r in train if len(r["prompt"]) == 1]
    eight = dataclasses.replace(c, context=8)
    assert [r["text"] for r in sft.pair_ids(eight, tok)] == short
    assert len(train) + len(val["val"]) == 40 and val["val"]
    assert sft.held(c, f, tok) == dict(val=[
        (tok.prompt(r["prompt"]), [*tok.encode(r["chosen"]), tok.eos]) for r in val["val"]])
    sides = [[*tok.encode(r[side]), tok.eos] for r in train for side in ("chosen", "rejected")]
    assert [y for _, y in sft.both(c, tok, None, None)[0]] == sides
    assert [i["good"] for i in sft.both(c, tok, None, None)[1]] == [1, 0] * len(train)
    assert [y for _, y in sft.chosen(c, tok, None, None)[0]] == sides[::2]


def test_a_teacher_must_speak_the_policy_s_words(workdir):
    c = SimpleNamespace(teacher="t", device="cpu", config="", init="start")
    net = init(preset("1x64", bytes_tokenizer()))
    save(net, bytes_tokenizer(), "t")
    found = sft.open_frozen("teacher", c, None, net, bytes_tokenizer())
    assert same(found.state_dict(), net.state_dict())
    assert not any(p.requires_grad for p in found.parameters())
    with pytest.raises(UserError, match="--teacher t: need a language model with the tokenizer of"):
        sft.open_frozen("teacher", c, None, net, prefs.tokenizer())
    wide = init(dataclasses.replace(net.config, vocab_size=net.config.vocab_size + 64))
    with pytest.raises(UserError, match=r"t has a vocabulary padded to \d+, start one to"):
        sft.open_frozen("teacher", c, None, wide, bytes_tokenizer())


def test_hindsight_scores_both_answers_and_no_tag():
    argv = ["--config", "hindsight,tiny", "--rows", "20", "--context", "64"]
    c, f = configure(sft.Config, sft.PRESETS, sft.AXES, "", argv)
    tok = sft.prefs.tokenizer()
    found = sft.pair_ids(c, tok)
    good, bad = tok.encode("."), tok.encode(",")
    data, infos = sft.hindsight(c, tok, None, torch.Generator().manual_seed(0), mix="np")
    for (prompt, answer), info, r in zip(data, infos, found):
        assert prompt == r["prompt"] + bad and info == {}
        assert answer == [*r["rejected"], *(~i for i in good), *r["chosen"]]
    data, infos = sft.hindsight(c, tok, None, torch.Generator().manual_seed(0), mix="p")
    assert data == [(r["prompt"] + good, r["chosen"]) for r in found]
    assert all(i == {} for i in infos)
    with pytest.raises(UserError, match="--mix"):
        sft.hindsight(c, tok, None, None, mix="p,x")


@pytest.mark.parametrize("argv, words", [
    (["--config", "mle,tiny", "--data", "stdlib", "--init", ""], "is a text"),
    (["--config", "tiny", *WORLD, "--loss", "unlikelihood"], "reads good"),
    (["--config", "filtered,tiny", *WORLD, "--share", "0"], "--share 0: must be above 0"),
    ([*FAST, "--feedback", "filtered"], "no better half"),
    (["--config", "reweighted,tiny", *WORLD, "--rule", "upper"], "choose from linupper")])
def test_feedback_s_errors(argv, words, workdir):
    with pytest.raises(UserError, match=words):
        sft.main(merged(*argv, "--out", "run"))
