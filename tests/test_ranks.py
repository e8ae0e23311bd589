"""Several ranks: two gloo processes on the CPU against one, by torchrun as a user starts them."""
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

import sft
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


def test_one_rank_sends_nothing():
    """Ranks without a process group hands tensors through"""
    ranks, x = Ranks((3, 4)), torch.randn(2, 3, 4)
    assert ranks.whole(x) is x and ranks.rows(x, 2) is x and ranks.sum(x) is x
    assert ranks.pad(x[0]).shape == (3, 4)
