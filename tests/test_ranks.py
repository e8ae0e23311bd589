"""Several ranks: two gloo processes on the CPU against one, by torchrun as a user starts them."""
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, ring_pairs

import data.run
import dpo
import grpo
import model
import ppo
import reward
import sft
import specdec
from data.run import UserError, configure
from model import load
from optim import RULES, Ranks

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()),
                                reason="no gloo here")
RUN = ["--config", "pretrain,tiny,normuon", "--data", "arithmetic", "--tokenizer", "bytes",
       "--rows", "300", "--context", "64", "--steps", "20", "--warmup", "2", "--eval_every", "20",
       "--save_every", "10"]


def python(*args, ranks=0, timeout=240):
    """Run a script of the project, under torchrun if ranks -> what it printed; fails as it does."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, *(torchrun if ranks else []), *args], text=True,
                         capture_output=True, timeout=timeout, env=env | dict(OMP_NUM_THREADS="1"))
    assert out.returncode == 0, out.stderr[-3000:]
    return out.stdout


def weights(folder):
    """A run's newest checkpoint, {name: tensor}."""
    return load(folder)[0].state_dict()


def apart(a, b):
    """The largest relative difference of two checkpoints' tensors."""
    return max(((a[k] - b[k]).norm() / a[k].norm()).item() for k in a)


def test_two_ranks_are_one_process(workdir):
    """20 NorMuon steps: the same weights and log; saved after 10 by two ranks and resumed by one,
    and back"""
    script = str(ROOT / "sft.py")
    sft.main([*RUN, "--out", "one"])
    text = python(script, *RUN, "--out", "two", ranks=2)
    assert "x 2 ranks" in text and text.count("2 ranks") == 1                     # one rank speaks
    one, two = weights("one"), weights("two")
    assert apart(one, two) <= 1e-5
    logs = [[json.loads(line) for line in open(f"{x}/log.jsonl")] for x in ("one", "two")]
    for a, b in zip(*logs):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["norm"] == pytest.approx(b["norm"], rel=1e-4)
    assert logs[0][-1]["val_loss"] == pytest.approx(logs[1][-1]["val_loss"], rel=1e-5)

    python(script, *RUN, "--out", "down", "--stop", "10", ranks=2)
    sft.main([*RUN, "--out", "down", "--resume"])                                 # 2 ranks, then 1
    sft.main([*RUN, "--out", "up", "--stop", "10"])
    python(script, *RUN, "--out", "up", "--resume", ranks=2)                      # 1 rank, then 2
    assert apart(one, weights("down")) <= 1e-5 and apart(one, weights("up")) <= 1e-5
    states = [torch.load(f"{x}/step-000020/state.pt", weights_only=True)["opt"]["stacks"]
              for x in ("one", "down")]
    for a, b in zip(*states):
        assert a["names"] == b["names"] and a["state"]["t"] == b["state"]["t"] == 20


WORKER = """
import gc, sys, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
from functools import partial
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
import optim
dist.init_process_group("gloo")
mesh, rank = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank()

def walk(name, shapes, shard, steps=4, **kw):
    g = torch.Generator().manual_seed(0)
    grads = [[torch.randn(s, generator=g, dtype=torch.float64)
              * torch.logspace(-1, 1, s[0], dtype=torch.float64)[:, None] for s in shapes]
             for _ in range(steps)]
    put = (lambda x: distribute_tensor(x, mesh, [Shard(0)])) if shard else (lambda x: x.clone())
    ps = [torch.nn.Parameter(put(torch.ones(s, dtype=torch.float64))) for s in shapes]
    make = lambda: optim.Optimiser([dict(params=ps, rule=partial(optim.RULES[name], **kw), lr=.01,
                                         weight_decay=.1)])
    opt = make()
    for i, gs in enumerate(grads):
        if i == 2:                                         # through a checkpoint of whole matrices
            box, opt = [opt.state_dict()], make()
            dist.broadcast_object_list(box, src=0)                     # rank 0 has it, as in a file
            opt.load_state_dict(box[0])
        for p, x in zip(ps, gs):
            p.grad = put(x)
        opt.step()
    return [(p.full_tensor() if shard else p).detach() for p in ps]

# even and uneven rows, fewer rows than would fill both ranks, K not a multiple of P. Null spaces of
# wide and tall covariances have an arbitrary basis: SOAP is compared on square matrices
for shapes in ([(6, 4)] * 3, [(5, 7)] * 2 + [(1, 3)], [(8, 8)]):
    for name in {rules!r}:
        if name == "soap" and any(m != n for m, n in shapes):
            continue
        kw = dict(rank=1) if "rank" in optim.hyper(optim.RULES[name]) else dict()
        a, b = walk(name, shapes, False, **kw), walk(name, shapes, True, **kw)
        worst = max(((x - y).norm() / x.norm()).item() for x, y in zip(a, b))
        assert worst < 1e-6, (name, shapes, worst)
local = walk("normuon", [(6, 4)], True, local_norm=True)[0]
whole = walk("normuon", [(6, 4)], False)[0]
assert (local - whole).abs().max() > 1e-4                # a shard's own norm: another optimiser
if rank == 0:
    print("equal", flush=True)
dist.barrier()
dist.destroy_process_group()
del mesh                        # gloo aborts if a mesh is still there when the interpreter ends
gc.collect()
"""


def test_every_rule_steps_over_two_ranks_as_on_one(workdir):
    """row shards and owners, in float64, with a save and load of the state in between"""
    (workdir / "worker.py").write_text(WORKER.format(root=str(ROOT),
                                                     rules=sorted(RULES.keys() - {"frugal"})))
    assert "equal" in python(str(workdir / "worker.py"), ranks=2)


def test_bad_use_over_ranks_is_one_line(workdir):
    for extra, message in ((["--batch", "7", "--micro", "7"],
                            "--batch 7 is not a multiple of the 2 ranks"),
                           (["--store", "int8"], "--store int8 runs on one rank")):
        with pytest.raises(AssertionError) as e:
            python(str(ROOT / "sft.py"), *RUN, *extra, ranks=2)
        assert str(e.value).count(message) == 1


# --- every script that trains ---------------------------------------------------------------------

SCRIPTS = dict(sft=sft, dpo=dpo, grpo=grpo, ppo=ppo, reward=reward, specdec=specdec)
SMALL = ["--eval_every", "4", "--eval_prompts", "4"]
SLOW = ["--lr", "2e-5"]          # or Adam makes rounding large, and a sampled token is another
TINY = dict(
    sft=["--data", "demos.jsonl", "--context", "64", "--init", "base:pretrain", "--eval_every",
         "4", "--micro", "1"],       # 3 rows are held out: passes that are not as many on both
    dpo=SMALL, grpo=SMALL, ppo=SMALL + SLOW, reward=["--data", "pairs.jsonl", "--lr", "1e-4"],
    specdec=["--data", "arithmetic", "--rows", "40", "--eval_rows", "2", "--prompts", "2",
             "--max_new", "4", "--eval_every", "4"])
# the default and three methods of each: their losses, samples, groups, memories and adapters
METHODS = dict(sft=["sft", "muon", "normuon", "lora"],
               dpo=["tiny", "simpo,data=pairs.jsonl,micro=1", "online", "lora,kto,recompute=true"],
               grpo=["grpo", "dapo", "rloo", "lora,reinforce_pp"],
               ppo=["srppo", "ppo", "raft,rollouts=8,samples=2", "lora,recompute=true"],
               reward=["bt", "margin", "smooth", "lora"],
               specdec=["tiny", "reverse_kl", "jsd", "tvd"])
RUNS = {f"{script}-{i}": (script, method) for script, methods in METHODS.items()
        for i, method in enumerate(methods)}
# saved after two of the four steps by so many processes, finished by others
ACROSS = ["dpo-2", "dpo-3", "grpo-0", "ppo-0", "ppo-3", "reward-3", "specdec-0"]
MANY = """
import importlib, json, sys
sys.path.insert(0, {root!r})
from data.run import cli

def main():
    for script, argv in json.load(open("runs.json")):
        importlib.import_module(script).main(argv)

cli(main)
"""


def command(name, out, *more):
    """The command line of one of RUNS: four steps, a checkpoint after two."""
    script, method = RUNS[name]
    config = ",".join(dict.fromkeys([*method.split(","), "tiny"]))
    return [*TINY.get(script, []), "--config", config, "--steps", "4", "--save_every", "2",
            "--out", out, *more]


def on_two_ranks(folder, runs):
    """Run many command lines one after the other in one pair of processes."""
    (folder / "many.py").write_text(MANY.format(root=str(ROOT)))
    (folder / "runs.json").write_text(json.dumps(runs))
    return python(str(folder / "many.py"), ranks=2)


def distance(a, b):
    """Of two models' weights, over their size."""
    off = sum((a[k].double() - b[k].double()).norm() ** 2 for k in a)
    return (off / sum(x.double().norm() ** 2 for x in a.values())).sqrt().item()


def test_every_script_does_on_two_ranks_what_it_does_alone(shared_bases):
    """weights after four steps, of the default and three methods each; saved by two processes and
    finished by one, and the other way round; the log is one run's"""
    ring_pairs("pairs.jsonl")
    rows = [json.loads(line) for line in open("pairs.jsonl")]
    (shared_bases / "demos.jsonl").write_text("\n".join(
        json.dumps(dict(prompt=r["prompt"], completion=r["chosen"])) for r in rows))
    for name, (script, _) in RUNS.items():
        SCRIPTS[script].main(command(name, f"one-{name}"))
    for name in ACROSS:
        SCRIPTS[RUNS[name][0]].main(command(name, f"up-{name}", "--stop", "2"))
    runs = [(script, command(name, f"two-{name}")) for name, (script, _) in RUNS.items()]
    runs += [(RUNS[x][0], command(x, f"down-{x}", "--stop", "2")) for x in ACROSS]
    runs += [(RUNS[x][0], command(x, f"up-{x}", "--resume")) for x in ACROSS]
    on_two_ranks(shared_bases, runs)
    for name, (script, _) in RUNS.items():
        one, two = weights(f"one-{name}"), weights(f"two-{name}")
        assert one.keys() == two.keys() and distance(one, two) <= 1e-5, name
        logs = [[json.loads(line) for line in open(f"{x}-{name}/log.jsonl")]
                for x in ("one", "two")]
        key = "loss" if script != "ppo" else "reward"
        for a, b in zip(*logs, strict=True):
            assert a.keys() == b.keys(), name
            assert a.get(key, 0.0) == pytest.approx(b.get(key, 0.0), rel=1e-3, abs=1e-5), name
    for name in ACROSS:
        SCRIPTS[RUNS[name][0]].main(command(name, f"down-{name}", "--resume"))
        one = weights(f"one-{name}")
        assert distance(one, weights(f"down-{name}")) <= 1e-5, name
        assert distance(one, weights(f"up-{name}")) <= 1e-5, name


@pytest.mark.parametrize("name, argv, words", [
    ("dpo", ["--config", "nash_mp"], "opponents runs on one rank"),
    ("dpo", ["--config", "raco"], "objectives runs on one rank"),
    ("grpo", ["--config", "aipo"], "past runs on one rank"),
    ("grpo", ["--config", "care"], "slow runs on one rank"),
    ("reward", ["--config", "ensemble"], "ensemble run on one rank"),
    ("reward", ["--config", "goal"], "goal and .* run on one rank"),
    ("specdec", ["--config", "adaspec"], "start others without torchrun"),
    ("sft", ["--config", "implicit"], "run on one rank"),
    ("compress", [], "compress.py runs on one rank"),
    ("model", ["out"], "model.py runs on one rank")])
def test_what_cannot_be_spread_is_refused_in_one_line(shared_bases, monkeypatch, name, argv, words):
    if name in ("compress", "model"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        script = __import__(name)
        with pytest.raises(UserError, match=words):
            script.main(argv)
        return
    script = SCRIPTS[name]
    for module in (data.run, script):
        if hasattr(module, "ranks"):
            monkeypatch.setattr(module, "ranks", lambda: 2)
    c, f = configure(script.Config, script.PRESETS, script.AXES, argv=argv)
    with pytest.raises(UserError, match=words) as e:
        if name == "sft":
            script.check(c, f, 2)
        elif name == "grpo":
            script.check(c, f, script.tasks.of_run(c))
        else:
            script.check(c, f)
    assert "\n" not in str(e.value)


def parted(monkeypatch, ranks, function):
    """What a function of model.py gives on each of so many ranks."""
    out = []
    monkeypatch.setattr(model, "ranks", lambda: ranks)
    for i in range(ranks):
        monkeypatch.setattr(model, "rank", lambda i=i: i)
        out.append(function())
    return out


@pytest.mark.parametrize("n, ranks, micro", [(8, 2, 2), (7, 2, 2), (1, 2, 4), (5, 4, 1), (6, 1, 4)])
def test_passes_take_every_row_once_and_are_as_many_on_every_rank(monkeypatch, n, ranks, micro):
    shares = parted(monkeypatch, ranks, lambda: [
        (rows.tolist(), weight) for rows, weight in model.passes(torch.arange(n), micro)])
    assert len({len(x) for x in shares}) == 1
    counted = [i for share in shares for rows, weight in share for i in rows if weight]
    assert sorted(counted) == [*range(n)]
    assert {weight for share in shares for _, weight in share} <= {0, ranks}
    assert {0 < len(rows) <= micro for share in shares for rows, _ in share} == {True}


@pytest.mark.parametrize("n, ranks", [(8, 2), (7, 2), (3, 4), (1, 3)])
def test_shares_of_rows_are_all_rows_in_order(monkeypatch, n, ranks):
    rows = [*range(n)]
    assert sum(parted(monkeypatch, ranks, lambda: model.own_part(rows)), []) == rows
    shares = parted(monkeypatch, ranks, lambda: model.own_rows(n))
    assert len({len(x) for x in shares}) == 1 and torch.cat(shares)[:n].tolist() == rows


def test_one_rank_sends_nothing():
    """Ranks without a process group hands tensors through"""
    ranks, x = Ranks((3, 4)), torch.randn(2, 3, 4)
    assert ranks.whole(x) is x and ranks.rows(x, 2) is x and ranks.sum(x) is x
    assert ranks.pad(x[0]).shape == (3, 4)
