"""sft.py: the loss falls where it should, big batch = accumulated batch, exact resume, bad input."""
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import sft
from data.run import UserError, checkpoint, read_log
from data.tokenizer import bytes_tokenizer
from model import collate, generate, load
from optim import RULES

FAST = ["--model", "1x64", "--tokenizer", "bytes", "--context", "96", "--batch", "8", "--micro", "8",
        "--rows", "64", "--init", "", "--data", "arithmetic", "--eval_every", "1000", "--warmup", "2"]


def weights(folder):
    """A checkpoint's tensors, by name."""
    return {k: v for k, v in load(folder)[0].state_dict().items()}


def same(a, b):
    """Whether two such dicts are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def run(*extra):
    """The result of a small run with these arguments added."""
    return sft.main([*FAST, *extra])


def test_windows_cover_the_corpus_once_with_bos_and_eos():
    tok = bytes_tokenizer()
    rows = sft.packed(["ab", "c"], tok, 4)
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
    (prompt, completion), = sft.demonstrations(Echo(), [dict(prompt="ab")], tok, 10)
    tokens, mask = collate([(prompt, completion)], tok.pad)
    assert tokens[0].tolist() == [tok.bos, 97, 98, 65, 66, tok.eos] and mask[0].tolist() == [0, 0, 0, 1, 1, 1]


def test_rows_that_do_not_fit_are_counted_and_prompts_that_do_not_are_errors(capsys):
    rows = sft.demonstrations(Echo(), [dict(prompt="ab"), dict(prompt="abcde")], bytes_tokenizer(), 10)
    assert len(rows) == 1 and "1 of 2 rows are longer than --context 10" in capsys.readouterr().out
    with pytest.raises(UserError, match="echo, row 1: a prompt of 11 tokens does not fit --context 10"):
        sft.demonstrations(Echo(), [dict(prompt="x" * 10)], bytes_tokenizer(), 10)


def test_it_learns_and_leaves_a_checkpoint_that_generates(workdir):
    out = run("--steps", "150", "--rows", "512", "--lr", "3e-3", "--batch", "32", "--micro", "32",
              "--eval_every", "50", "--data", "toyif", "--tokenizer", "toyif", "--context", "32",
              "--out", "o")
    log = read_log("o")
    assert log[0]["loss"] > 3.5 and log[-1]["loss"] < 2.4 and out["val_loss"] == log[-1]["val_loss"] < 2.4
    assert out["val_gold"] > 0.45 and (workdir / "o/curve.png").exists()  # random symbols and no EOS: about 0
    net, tok = load("o")
    assert generate(net, [tok.prompt("<Fc#4=")], 12, temperature=0).finished.all()      # EOS was trained


@pytest.mark.parametrize("extra", ["--peft full", "--peft lora --peft.rank 4", "--peft bone --peft.rank 32",
                                   "--peft hft", "--peft loram", "--optimiser normuon", "--optimiser soap",
                                   "--optimiser galore --every 2", "--optimiser eco --store int4",
                                   "--optimiser qgalore --store int8", "--store bfloat16"])
def test_resume_is_exact(extra, workdir):
    """6 steps = 3 steps + --resume + 3 steps, bit for bit"""
    args = ["--steps", "6", *extra.split(), "--save_every", "3"]
    run(*args, "--out", "a")
    run(*args, "--out", "b", "--stop", "3")
    assert checkpoint("b").name == "step-000003"
    run(*args, "--out", "b", "--resume")
    assert same(weights("a"), weights("b"))
    assert [r["loss"] for r in read_log("a")] == [r["loss"] for r in read_log("b")]


PARTS = sorted(k for k, v in sft.PRESETS.items() if {"optimiser", "peft"} & v.keys())


@pytest.mark.parametrize("name", PARTS)
def test_every_optimiser_and_adapter_learns_and_leaves_a_plain_checkpoint(name, workdir):
    """20 steps with its preset's settings; the checkpoint is a float model without adapters"""
    run("--config", name, "--steps", "20", "--data", "toyif", "--tokenizer", "toyif", "--context", "32",
        "--out", "o", *(["--peft.rank", "32"] if name in ("bone", "bat") else []))
    log = read_log("o")
    assert log[-1]["loss"] < log[0]["loss"] - 0.01
    assert all(torch.isfinite(v).all() for v in weights("o").values())
    assert load("o")[0].layers[0].mlp.up_proj.weight.dtype == torch.float32


def test_half_fine_tuning_leaves_the_other_half_alone(workdir):
    run("--steps", "1", "--out", "start")
    run("--steps", "3", "--out", "o", "--init", "start", "--config", "hft", "--weight_decay", "0.5")
    a, b = weights("start"), weights("o")
    frozen = {k for k in a if torch.equal(a[k], b[k])}
    assert sum(k.endswith("_proj.weight") for k in frozen) in (3, 4) and "embed_tokens.weight" not in frozen


def test_loram_trains_on_the_small_model_and_is_used_on_the_whole_one(workdir):
    """pruned by half, trained, recovered: the whole model gets better too"""
    world = ["--steps", "150", "--lr", "3e-3", "--data", "toyif", "--tokenizer", "toyif", "--context", "32",
             "--rows", "512"]
    run(*world, "--out", "start")
    run(*world, "--config", "loram", "--init", "start", "--out", "o")
    a, b = weights("start"), weights("o")
    assert a.keys() == b.keys() and all(a[k].shape == b[k].shape for k in a)
    net, tok = load("o")
    c, _ = sft.configure(sft.Config, sft.PRESETS, sft.AXES, "", [*FAST, "--data", "toyif", "--context", "32"])
    val = sft.rows(c, tok, "val")
    before = sft.evaluate(load("start")[0], tok, val, c)["loss"]
    assert sft.evaluate(net, tok, val, c)["loss"] < before - 0.004


def test_watch_and_target_are_in_the_result(workdir):
    """what the checkpoint knew before, and when the target was reached: between two evaluations"""
    out = run("--steps", "20", "--eval_every", "5", "--target", "4.8", "--watch", "toyif", "--out", "o")
    log = [r for r in read_log("o") if "val_loss" in r]
    after = next(r for r in log if r["val_loss"] <= 4.8)
    assert after["step"] - 5 < out["steps_to"] <= after["step"] and out["reached"] == 1
    assert 0 < out["seconds_to"] <= log[-1]["seconds"] and out["state_bytes"] == 8.0
    assert 0 < out["opt_share"] < 1 and out["watch_loss"] > 0
    rows = [dict(step=10, seconds=1.0, val_loss=3.0), dict(step=20, seconds=3.0, val_loss=2.0)]
    assert sft.reached(rows, 2.25) == dict(steps_to=17.5, seconds_to=2.5, reached=1.0)
    assert sft.reached(rows, 1.0) == dict(steps_to=20, seconds_to=3.0, reached=0.0)


def test_suggest_prints_step_law_and_trains_nothing(workdir, capsys):
    out = run("--suggest", "--steps", "10")
    assert "Step Law (2503.04715)" in capsys.readouterr().out and not (workdir / "out/sft").exists()
    assert 1e-3 < out["lr"] < 1 and out["batch_tokens"] > 0


@pytest.mark.parametrize("name", sft.CLAIMS)
def test_claims_are_made_of_presets_and_their_tests_of_arms(name):
    claim = sft.CLAIMS[name]
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
    assert [r["loss"] for r in read_log("a")] == pytest.approx([r["loss"] for r in read_log("b")], rel=1e-5)


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


@pytest.mark.parametrize("name", [k for k, row in sft.PRESETS.items()       # PARTS: above; arms of one key
                                  if k not in PARTS and (k not in sft.ARMS or len(row) > 2)])
def test_every_preset_takes_two_steps(name, shared_bases):
    """with the size preset tiny, on the real data it names"""
    names, out = name if name == "tiny" else f"{name},tiny", f"preset-{name}"
    sft.main(["--config", names, "--steps", "2", "--rows", "64", "--out", out, "--eval_every", "2"])
    assert read_log(out)[-1]["step"] == 2 and checkpoint(out)


def test_the_map_names_every_preset():
    named = {line.split()[0] for line in sft.__doc__.splitlines() if line.split()}
    rules = re.search(r"settings: ([\w\s]+?)\nlora ", sft.__doc__)[1].split()
    assert set(rules) == set(RULES) and sft.PRESETS.keys() - sft.ARMS.keys() - set(rules) <= named


def test_base_is_made_once_and_found_again(workdir, capsys):
    a = sft.base("arithmetic,tiny", steps=2, rows=32)
    assert "making" in capsys.readouterr().out
    assert sft.base("arithmetic,tiny", steps=2, rows=32) == a and "making" not in capsys.readouterr().out
    assert sft.base("arithmetic", like="lora,tiny", steps=2, rows=32) == a         # the size is handed on
    assert sft.base("arithmetic,tiny", steps=2, rows=32, seed=1) != a


def test_a_base_knows_what_its_own_base_is(monkeypatch):
    def tag():
        return sft.fingerprint(*sft.configured("toyif_judge", "tiny")[2])
    before = tag()
    monkeypatch.setitem(sft.PRESETS, "toyif_checks", sft.PRESETS["toyif_checks"] | dict(lr=1e-3))
    assert len(before) == 8 and tag() != before


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
    (workdir / "long.jsonl").write_text("\n".join(json.dumps(dict(prompt=f"{i}" * 500, completion=str(i)))
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
    (["--data", "long.jsonl"], "row 1: a prompt of 501 tokens does not fit --context 96"),
    (["--init", "nowhere"], "nowhere does not exist"),
    (["--init", "base:nothing"], "no preset 'nothing'"),
    (["--model", "big"], "--model big: expected LAYERSxWIDTH"),
    (["--device", "cuda:9"], "sees no CUDA device"),
    (["--optimiser", "moun"], "no optimiser 'moun'; did you mean 'muon'"),
    (["--optimiser", "galore", "--optimiser.rank", "500"], "--rank 500 does not fit a 64x64 matrix"),
    (["--peft", "lora", "--peft.rank", "0"], "--rank 0: the rank must be at least 1"),
    (["--store", "int8", "--rounding", "up"], "--rounding up: choose stochastic or nearest"),
    (["--optimiser", "muon", "--scale", "big"], "--scale big"),
    (["--optimiser", "soap", "--every", "0"], "--every counts steps, from 1"),
    (["--lr", "-1"], "a learning rate is not negative"),
    (["--suggest", "--init", "base:pretrain"], "--suggest is about pre-training: add --config pretrain"),
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
    """kill -9 at ten random moments of a run that saves after every step; each time on from where it was"""
    script = os.path.abspath(sft.__file__)
    command = [sys.executable, script, *FAST, "--steps", "100000", "--save_every", "1", "--out", "o"]
    rng, reached = random.Random(0), []
    for i in range(10):
        process = subprocess.Popen(command + ["--resume"] * (i > 0),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        start, last = time.time(), reached[-1] if reached else 0
        while time.time() - start < 60 and not any(int(p.name[5:11]) > last
                                                   for p in workdir.glob("o/step-??????")):
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.02)
        time.sleep(rng.random() * 0.4)
        process.send_signal(signal.SIGKILL)
        process.wait()
        net, tok = load("o")
        torch.load(checkpoint("o") / "state.pt", weights_only=True)
        reached.append(int(checkpoint("o").name[5:]))
        assert (net.head.isfinite().all() and tok.encode("1")
                and json.loads((workdir / "o/run.json").read_text()))
        assert [r["step"] for r in read_log("o")][:reached[-1]] == list(range(1, reached[-1] + 1))
    assert reached == sorted(set(reached))
