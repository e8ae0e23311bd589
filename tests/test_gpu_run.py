"""The GPU run: what is rendered, skipped and recorded; that the plain twin is our model; that the
test files it runs are those that hold GPU tests."""
import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import bench
import gpu
import kernels
from gpu import Part
from model import token_logprobs


@pytest.fixture(autouse=True)
def no_commit(monkeypatch):
    """git takes longer than a test."""
    monkeypatch.setattr(gpu, "commit", lambda: "0123abc")


def lives(device):
    return True


@pytest.fixture
def here():
    return SimpleNamespace(device="cpu", seconds=240.0, rates=dict(
        matmul_flops=1e11, copy_bytes=1e10, device_flops=None))


@pytest.fixture
def report():
    return gpu.machine("cpu") | dict(began=time.time(), seconds=240.0, parts={})


def fine(out, here):
    out["number"] = 1.0


def broken(out, here):
    out["half"] = 2.0
    raise RuntimeError("CUDA error: an illegal memory access\nDevice-side assertions are off")


def test_a_part_that_fails_is_recorded_and_the_others_run(here, report, tmp_path):
    parts = dict(one=Part(1, fine), two=Part(1, broken), three=Part(1, fine))
    assert gpu.run(report, parts, here, tmp_path / "out" / "gpu.json", lives)
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]
    assert [found[name]["status"] for name in parts] == ["done", "failed", "done"]
    assert found["two"]["half"] == 2.0 and found["two"]["why"].startswith("RuntimeError: CUDA")
    assert "in broken" in found["two"]["traceback"] and found["three"]["number"] == 1.0


def test_what_does_not_fit_is_skipped_and_says_why(here, report, tmp_path):
    parts = dict(one=Part(1, fine), long=Part(1e4, broken), last=Part(1, fine))
    gpu.run(report, parts, here, tmp_path / "gpu.json", lives)
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [x["status"] for x in found.values()] == ["done", "skipped", "done"]
    assert "240 s were used" in found["long"]["why"]
    assert "long: skipped, " in gpu.table(report)


def test_the_file_says_which_part_was_running_when_the_run_was_killed(here, report, tmp_path):
    def killed(out, here):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        parts = dict(one=Part(1, fine), two=Part(1, killed))
        gpu.run(report, parts, here, tmp_path / "gpu.json", lives)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {k: x["status"] for k, x in found["parts"].items()} == dict(one="done", two="running")
    assert "two: running" in gpu.table(found)


def test_a_dead_device_ends_the_process_and_the_next_one_goes_on(here, report, tmp_path):
    """what failed is not tried again, and what was measured stays"""
    parts = dict(one=Part(1, fine), two=Part(1, broken), three=Part(1, fine))
    path = tmp_path / "gpu.json"
    assert not gpu.run(report, parts, here, path, lambda device: False)
    again = json.loads(path.read_text())
    assert "three" not in again["parts"]
    assert gpu.run(again, parts | dict(two=Part(1, fine)), here, path, lives)
    found = json.loads(path.read_text())["parts"]
    assert [found[name]["status"] for name in parts] == ["done", "failed", "done"]


def test_a_dead_device_starts_a_new_process_with_the_same_words(monkeypatch, tmp_path):
    begun, path = [], tmp_path / "gpu.json"

    def stop(program, argv):
        begun.append(argv[2:])
        raise InterruptedError
    monkeypatch.setattr(gpu, "all_parts", lambda: dict(rates=Part(1, broken), two=Part(1, broken)))
    monkeypatch.setattr(gpu, "alive", lambda device: False)
    monkeypatch.setattr(gpu.os, "execv", stop)
    argv = ["--cpu", "--out", str(path)]
    for more in ([], ["--go_on"]):
        with pytest.raises(InterruptedError):
            gpu.main([*argv, *more])
        assert begun.pop() == [*argv, "--go_on"]
    assert {*json.loads(path.read_text())["parts"]} == {"rates", "two"}
    assert gpu.main([*argv, "--go_on"]) == 1                               # nothing is left to run


@pytest.mark.parametrize("run, code", [(fine, 0), (broken, 1)])
def test_the_exit_code_says_whether_a_part_failed(run, code, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "all_parts", lambda: dict(rates=Part(1, fine), one=Part(1, run)))
    assert gpu.main(["--cpu", "--out", str(tmp_path / "gpu.json")]) == code
    assert "## On a GPU" in capsys.readouterr().out
    assert gpu.main(["--table", str(tmp_path / "gpu.json")]) == 0


def test_parts_are_chosen_by_words(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(gpu, "run", lambda report, parts, *rest: ran.append(list(parts)) or True)
    gpu.main(["--cpu", "rope", "--out", str(tmp_path / "gpu.json")])
    assert ran == [["rates", "kernel rope"]]
    with pytest.raises(SystemExit, match="no part has nonsense in its name: choose from rates"):
        gpu.main(["--cpu", "nonsense"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_rehearsal_is_named(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--cpu rehearses" in capsys.readouterr().err


def test_the_table_shows_ratios_and_what_is_missing(report):
    kernel = dict(status="done", ours_seconds=1e-3, over_plain=2.0, floor=0.5, error=3e-3,
                  ours_bytes=4e6, plain_bytes=8e6)
    step = dict(status="done", mfu=0.25, peak_bytes=2e9)
    report["parts"] = {
        "rates": dict(status="done", matmul_flops=790e12, copy_bytes=4.3e12),
        "tests": dict(status="failed", passed=50, failed=1, why="1 tests failed"),
        "kernel rope": kernel, "sft 1B ours": step | dict(tokens_per_second=3000.0),
        "sft 1B compiled": step | dict(tokens_per_second=2000.0, peak_bytes=4e9),
        "generation 16": dict(status="done", graphs=dict(tokens_per_second=1234.0, floor=0.4))}
    text = gpu.table(json.loads(json.dumps(report)))
    for line in ("790 TFLOP/s, a copy at 4,300 GB/s", "GPU tests: 50 passed, 1 failed.",
                 "| `rope` | 1.000 ms | 2.00× | - | 50% | 3.0e-03 | 4 MB / 8 MB |",
                 "| sft | 1B | ours | 3,000 | 25% | - | 2.0 GB | - | - |",
                 "| sft | 1B | compiled | 2,000 | 25% | - | 4.0 GB | 1.50× | 0.50× |",
                 "| 16 | 1,234 | 40% |", "- tests: failed, 1 tests failed"):
        assert line in text, line


TEXT = """collected 90 items / 86 deselected / 4 selected
tests/test_a.py::test_one[x y] PASSED   [ 25%]
tests/test_a.py::test_two FAILED        [ 50%]
tests/test_a.py::test_three SKIPPED (no CUDA device) [ 75%]
"""


def test_what_pytest_said_is_read():
    out = {}
    with pytest.raises(AssertionError, match="1 tests failed"):
        gpu.read_tests(out, TEXT + "FAILED tests/test_a.py::test_two - assert 1 == 2\n", 1, 48)
    assert out["failures"] == ["tests/test_a.py::test_two"]
    assert (out["passed"], out["failed"], out["skipped"]) == (1, 1, 1)
    assert out["reasons"] == ["tests/test_a.py::test_two - assert 1 == 2"]
    cut = {}
    gpu.read_tests(cut, TEXT.replace("FAILED", "PASSED"), None, 48)
    assert cut["stopped"] == "after 48 s, 3 of 4 run"
    for text, code in (("", 4), (TEXT.replace("FAILED", "PASSED"), 3)):
        with pytest.raises(AssertionError, match="pytest said"):
            gpu.read_tests({}, text, code, 48)


def test_the_files_that_are_run_hold_every_gpu_test():
    marked = {p.name for p in ROOT.glob("tests/test_*.py")
              if "@pytest.mark.gpu" in p.read_text() or "marks=pytest.mark.gpu" in p.read_text()}
    found = [p.name for p in gpu.marked_files()]
    assert marked - {"test_gpu_run.py"} <= {*found}
    assert found[0] == "test_kernels_attention.py" and found[-1] == "test_reward.py"


def test_every_kernel_has_sizes_and_its_definition(here):
    """the largest difference of both sides, and of a wrong one"""
    assert {*bench.SIZES} == {*bench.KERNELS} < {*bench.ROWS}
    for name in ("rope", "decode_attention", "int4"):
        row = bench.kernel_row("cpu", name, "tiny")
        assert gpu.off(gpu.listed(row.ours()), gpu.listed(row.exact()))[1] < 1e-5
    wrong = [2 * x for x in gpu.listed(row.exact())]
    assert gpu.off(wrong, gpu.listed(row.exact()))[1] == pytest.approx(1.0)
    with pytest.raises(AssertionError, match="not finite"):
        gpu.off([torch.tensor([math.nan])], [torch.zeros(1)])


def test_a_wrong_kernel_fails_its_part(here, monkeypatch):
    monkeypatch.setattr(bench, "BACKEND", "eager")
    monkeypatch.setattr(kernels, "swiglu", lambda gate, up: gate * up)
    found = gpu.guarded(Part(1, lambda out, here: gpu.kernel_part(out, here, "swiglu")), here)
    assert found["status"] == "failed" and "off its definition" in found["why"]
    assert found["over_plain"] > 0 and found["over_compiled"] > 0


def test_the_plain_twin_is_our_model(here):
    """the same weights, the same log-probs, and its gradients land in our parameters"""
    job = gpu.job_of("135M", here)
    net = gpu.fresh(job.config, "cpu")
    twin, tokens = gpu.Plain(net), torch.tensor(job.ids(2, 8))
    logp = token_logprobs(net, tokens)[:, 1:]
    assert torch.allclose(-twin.nll(tokens), logp, atol=1e-5) and logp.std() > 0.05
    twin.nll(tokens).sum().backward()
    mine = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    (-token_logprobs(net, tokens)[:, 1:]).sum().backward()
    assert all(torch.allclose(a, p.grad, atol=1e-4) for a, p in zip(mine, net.parameters()))


@pytest.mark.parametrize("method", gpu.OURS)
def test_both_sides_do_the_same_work(method, here, monkeypatch):
    """ours and the plain one's gradients agree where they are given the same tokens"""
    monkeypatch.setattr(gpu, "autocast", lambda *_: gpu.bench.torch.enable_grad())
    job, grads = gpu.job_of("135M", here), []
    torch.manual_seed(0)
    net = gpu.fresh(job.config, "cpu")
    ref = gpu.frozen_twin(net, shared=False)
    settings = gpu.Job.settings
    monkeypatch.setattr(gpu.Job, "settings", lambda self, script, **options: settings(
        self, script, **options, dtype="float32"))
    for work in (gpu.OURS[method](job, net, ref),
                 gpu.PLAIN[method](job, gpu.Plain(net), gpu.Plain(ref), net)):
        next(work)
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        net.zero_grad()
    cosine = torch.nn.functional.cosine_similarity(*grads, dim=0)
    assert cosine > 0.999 and abs(grads[0].norm() / grads[1].norm() - 1) < 1e-2


def test_flops_count_what_a_method_does(here):
    """reference and samples are forward passes; frozen weights take no gradient"""
    job = gpu.job_of("135M", here)
    net = gpu.fresh(job.config, "cpu")
    full = {m: gpu.step_flops(net, job, m, False) for m in gpu.OURS}
    assert gpu.step_flops(net, job, "sft", True) == pytest.approx(full["sft"] * 2 / 3)
    both = bench.flops_per_token(net, job.T, 0.5) * 2 * job.B * job.T
    assert full["dpo"] == pytest.approx(4 / 3 * both)
    assert full["grpo"] - full["dpo"] == pytest.approx(full["sft"] / 6)
    matrices = sum(p.numel() for n, p in net.named_parameters() if p.dim() == 2)
    assert full["sft"] == pytest.approx(2 * job.B * job.T * 6 * (matrices + 2 * job.T * 64))


@pytest.mark.parametrize("name", ["sft 135M ours", "dpo 1B lora_recompute", "grpo 135M compiled"])
def test_a_step_is_measured(name, here, monkeypatch):
    monkeypatch.setattr(bench, "BACKEND", "eager")
    monkeypatch.setattr(gpu, "clean", lambda device: None)           # not in the interpreter
    found = gpu.guarded(gpu.all_parts()[name], here)
    assert found["status"] == "done", found["traceback"]
    assert found["tokens_per_second"] > 0 and 0 < found["mfu"] and "mfu_of_device" not in found
    assert name.startswith("grpo") == ("rollout_seconds" in found)


def test_graphs_are_what_is_asked_for(here):
    usual = gpu.llm.graphed
    for on in (True, False):
        with gpu.graphs(on, "cpu"):
            assert gpu.llm.graphed(None) == on
    with pytest.raises(ZeroDivisionError), gpu.graphs(False, "cuda"):
        assert gpu.llm.graphed(None) is False
        1 / 0
    with gpu.graphs(True, "cuda"):
        assert gpu.llm.graphed is usual
    assert gpu.llm.graphed is usual


@pytest.mark.slow
def test_the_rehearsal_runs(tmp_path):
    out = tmp_path / "gpu.json"
    command = [gpu.sys.executable, str(ROOT / "tests" / "gpu.py"), "--cpu", "--out", str(out)]
    assert gpu.subprocess.run(command).returncode == 0
    parts = json.loads(out.read_text())["parts"]
    assert {*parts} == {*gpu.all_parts()} and {x["status"] for x in parts.values()} == {"done"}
