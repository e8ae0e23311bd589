"""What a run holds at its peak, told before step 0: worked values, what is kept between the passes,
which settings fit, and what is said where memory runs out all the same."""
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import data.run
import model as lm
import optim
import sft
from kernels import pack_int, quantize

SHAPE = dict(model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48,
             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
             max_position_embeddings=256)
# embedding 64·32; a block: q, o 32·32, k, v 16·32, three matrices 48·32, two norms; the last norm
COUNT = 64 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32) + 32
SETTINGS = SimpleNamespace(device="cpu", dtype="float32", micro=8, recompute=False, peft="full",
                           seed=0, merge=True)


def tiny(**changes):
    """A random model in float32."""
    return lm.init(lm.ModelConfig(**SHAPE | changes))


def told(work, trained, frozen=(), state=0, held=0):
    """forecast() of models, measured now."""
    measured = [lm.growth(m, SETTINGS) for m in trained]
    return lm.forecast(work, trained, frozen, measured, state, held, "float32")


def counted(model, rows, width):
    """Bytes that a pass really keeps for its backward, its own weights apart: every storage that is
    saved, once."""
    own = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}
    found = {}

    def keep(x):
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    tokens = torch.randint(model.config.vocab_size, (rows, width),
                           generator=torch.Generator().manual_seed(1))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = lm.token_logprobs(model, tokens)
    assert out.requires_grad
    return sum(size for where, size in found.items() if where not in own)


def test_weights_gradients_and_adamw_s_states_are_the_sizes_worked_by_hand():
    model = tiny()
    parts = told(lm.Work(4, 64, 8), [model], state=optim.state_bytes(optim.optimiser(model)),
                 held=10 ** 9)
    assert parts["weights"] == parts["gradients"] == 4 * COUNT
    assert parts["optimiser"] == 8 * COUNT and parts["process"] == 10 ** 9 - 4 * COUNT
    assert lm.peak_of(parts) == 10 ** 9 + 12 * COUNT + parts["activations"]


def test_gradients_of_a_single_pass_come_as_its_activations_go():
    several, small, large = (told(work, [tiny()]) for work in (
        lm.Work(4, 64, 8), lm.Work(1, 2, 1), lm.Work(8, 64, 8)))
    assert several["gradients"] == 4 * COUNT and large["gradients"] == 4 * 64 * 32
    assert small["gradients"] + small["activations"] == pytest.approx(4 * COUNT)


def test_a_model_that_recomputes_is_measured_like_one_that_does_not():
    """what a block keeps is asked for in both cases; afterwards it recomputes as before"""
    plain, again = tiny(), lm.recomputing(tiny(), True)
    assert lm.growth(plain, SETTINGS) == lm.growth(again, SETTINGS)
    assert again.recompute and not plain.recompute


def test_keys_and_values_of_a_rollout_are_the_size_worked_by_hand():
    model = tiny()
    assert lm.cache_bytes(model.config, 6, 50, 4) == 2 * 6 * 50 * (2 * 2 * 8) * 4
    parts = told(lm.Work(1, 16, 1, sampled=600, slots=256), [model])
    assert parts["cache"] == 2 * 600 * 256 * (2 * 2 * 8) * 4 + 600 * 64 * 20
    assert lm.peak_of(parts) == 4 * COUNT + parts["cache"] > 4 * COUNT + parts["activations"]
    half = lm.sampling_bytes(model, lm.Work(1, 16, 1, sampled=6, slots=50), "bfloat16")
    assert half == 2 * 6 * 50 * (2 * 2 * 8) * 2 + 6 * 64 * 20


def test_a_policy_of_adapters_and_its_reference_hold_the_base_once():
    policy = lm.lora(tiny().requires_grad_(False), torch.Generator(), rank=2)
    reference = lm.swapped(lm.sharing(policy), "linear", lambda layer: layer.linear)
    adapters = 2 * 2 * (4 * 32 + 2 * 16 + 32 + 32 + 3 * (32 + 48))     # rank 2, two blocks
    parts = told(lm.Work(2, 32, 4), [policy], [reference])
    assert parts["weights"] == 4 * (COUNT + adapters) and parts["gradients"] == 4 * adapters
    assert told(lm.Work(2, 32, 4), [tiny()], [tiny()])["weights"] == 2 * 4 * COUNT


FAMILIES = dict(dense={}, qk_norm=dict(model_type="qwen3"), experts=dict(
    model_type="qwen3_moe", num_experts=4), gemma=dict(model_type="gemma3_text"))


def adapted(model):
    """With LoRA on every layer, each packed into four bits."""
    def pack(name, layer):
        return pack_int(*quantize(layer.weight.detach(), 4, 16), bits=4, group=16)
    model = lm.replace_linears(model, pack).requires_grad_(False)
    return lm.lora(model, torch.Generator().manual_seed(0), rank=2)


@pytest.mark.parametrize("name", [*FAMILIES, "packed"])
def test_what_a_pass_keeps_is_foretold_within_a_tenth(name):
    model = tiny(num_hidden_layers=12, **FAMILIES.get(name, {}))
    model = adapted(model) if name == "packed" else model
    work = lm.Work(3, 100, 8)
    foretold, real = told(work, [model])["activations"], counted(model, 3, 100)
    assert abs(foretold - lm.head_scratch(model, 300) - real) < 0.1 * real
    assert told(work._replace(micro=6), [model])["activations"] > 1.8 * foretold


def test_a_context_shorter_than_the_short_passes_is_no_obstacle():
    model = tiny(max_position_embeddings=20)
    foretold, real = told(lm.Work(2, 20, 2), [model])["activations"], counted(model, 2, 20)
    assert foretold > real > 0.5 * foretold


def test_windows_that_bite_keep_a_mask_of_their_own():
    plain, windows = tiny(), tiny(model_type="mistral", sliding_window=60,
                                  layer_types=("sliding_attention",) * 2)
    work = lm.Work(1, 200, 1)
    a, b = (told(work, [m])["activations"] for m in (plain, windows))
    assert b - a == pytest.approx(2.5 * 4 * 200 ** 2, rel=0.01)    # two layers, half a block again
    assert counted(windows, 1, 200) - counted(plain, 1, 200) == pytest.approx(
        2 * 4 * 200 ** 2, rel=0.01)


def test_recomputed_activations_are_the_blocks_inputs_and_one_block():
    model = tiny(num_hidden_layers=10)
    work = lm.Work(4, 64, 4)
    full, again = (told(work._replace(recompute=x), [model])["activations"] for x in (False, True))
    block = lm.growth(model, SETTINGS)[1][3] * 4 * 64
    assert full - again == pytest.approx(9 * block - 10 * 4 * 64 * 32 * 4, rel=0.01)
    assert again < full / 3


def test_a_pass_has_no_more_rows_than_its_step_and_whole_groups(monkeypatch):
    assert lm.Work(8, 10, 6, sides=2).rows() == 12
    assert lm.Work(10, 10, 64, group=4).rows() == 8 and lm.Work(2, 10, 64, group=4).rows() == 4
    monkeypatch.setattr(lm, "ranks", lambda: 2)
    assert lm.Work(8, 10, 6).rows() == 3


@pytest.mark.parametrize("name", optim.RULES)
def test_a_state_s_size_is_known_before_the_first_step(name):
    model = tiny()
    opt = optim.optimiser(model, optim.RULES[name])
    foretold = optim.state_bytes(opt)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
    real = sum(row["bytes"] for row in optim.memory_report(opt).values())
    adamw = 8 * sum(p.numel() for p in model.parameters())
    assert foretold == real or name == "qgalore" and foretold <= adamw


class Paper:
    """A run that only listens."""

    def __init__(self, held, room):
        self.there, self.said = (held, room), []

    def expect_large(self, weights):
        self.weights = weights

    def memory(self):
        return self.there

    def say(self, text):
        self.said.append(text)

    def outlook(self, *words):
        self.words = words


def test_a_run_that_fits_says_its_parts_and_draws_nothing():
    model, run, draws = tiny(), Paper(10 ** 8, 10 ** 9), torch.get_rng_state()
    model.recompute = True
    lm.foresee(run, SETTINGS, lm.Work(8, 64, 16), [model], state=8 * COUNT)
    assert torch.equal(draws, torch.get_rng_state()) and model.recompute
    assert run.weights == 4 * COUNT
    for word in ("process 0.10", "weights 0.00", "optimiser", "gradients", "activations", "of 1.0"):
        assert word in run.said[0]
    assert "WARNING" not in run.said[0] and run.said[0].count("\n") == 0


def test_a_run_that_does_not_fit_names_the_settings_that_do():
    model = tiny(num_hidden_layers=8)
    work, state = lm.Work(8, 200, 64), optim.state_bytes(optim.optimiser(model))
    sizes = {n: lm.peak_of(told(work._replace(micro=n), [model], state=state, held=10 ** 7))
             for n in range(1, 9)}
    run = Paper(10 ** 7, (sizes[5] + sizes[6]) // 2)
    lm.foresee(run, SETTINGS, work, [model], state=state)
    assert "WARNING" in run.said[0] and run.said[0].count("\n") == 1
    again = lm.peak_of(told(work._replace(recompute=True), [model], state=state, held=10 ** 7))
    assert f"--micro 5 needs about {sizes[5] / 1e9:.2f} GB" in run.said[0]
    assert f"--recompute true needs about {again / 1e9:.2f} GB" in run.said[0]
    peak, at, words = run.words
    assert peak == sizes[8] and at.startswith("--micro 8, of ") and words in run.said[0]


def test_adapters_are_named_where_they_hold_less():
    run, large = Paper(10 ** 6, 1), tiny(vocab_size=4096)
    lm.foresee(run, SETTINGS, lm.Work(1, 2, 1), [large], state=8 * 4 * 32 * 4096)
    assert "WARNING: that may not fit: --peft lora needs about 0.00 GB" in run.said[0]


def test_a_run_that_fits_keeps_half_of_it_for_when_memory_runs_out_all_the_same():
    run = Paper(10 ** 7, 10 ** 10)
    lm.foresee(run, SETTINGS, lm.Work(8, 200, 64), [tiny(num_hidden_layers=8)])
    assert "--micro 4 needs" in run.words[2] and "--peft" not in run.words[2]
    lm.foresee(run, SETTINGS, lm.Work(8, 9, 64, sampled=1000, slots=256, knob="--prompts"),
               [tiny()])
    assert run.words[2].startswith("50% of --prompts")


def test_settings_that_a_run_has_already_are_not_named():
    run, c = Paper(10 ** 7, 10 ** 7), SimpleNamespace(**vars(SETTINGS) | dict(
        recompute=True, peft="lora"))
    lm.foresee(run, c, lm.Work(1, 64, 64, recompute=True), [tiny()])
    assert "WARNING" in run.said[0] and "--" not in run.said[0]
    assert "smaller model" in run.said[0]


def test_where_samples_are_the_peak_fewer_of_them_are_named():
    run = Paper(10 ** 7, 2 * 10 ** 7)
    lm.foresee(run, SETTINGS, lm.Work(8, 64, 16, sampled=1000, slots=256, knob="--prompts"),
               [tiny()])
    each = 2 * 256 * (2 * 2 * 8) * 4 + 64 * 20
    most = (10 ** 7 - 4 * COUNT * 0) // each
    assert f"{most / 1000:.0%} of --prompts" in run.said[0] and "--micro" not in run.said[0]


def test_merged_layers_of_a_checkpoint_are_the_peak_of_a_small_step():
    policy, run = adapted(tiny()), Paper(10 ** 7, 10 ** 9)
    lm.foresee(run, SETTINGS, lm.Work(1, 2, 1), [policy])
    assert "merged" in run.said[0].split("(or")[0]
    dense = 4 * 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    held = told(lm.Work(1, 2, 1), [policy])["weights"]
    assert lm.merged_bytes(policy, SETTINGS) == dense + held       # the embedding, codes, A and B
    plain = lm.lora(tiny(), torch.Generator(), rank=2)
    rest = told(lm.Work(1, 2, 1), [plain])["weights"] - dense
    assert lm.merged_bytes(plain, SETTINGS) == dense + rest
    alone = SimpleNamespace(**vars(SETTINGS) | dict(merge=False))
    assert lm.merged_bytes(policy, alone) == 0 == lm.merged_bytes(tiny(), SETTINGS)
    parts = dict(process=1, weights=2, optimiser=3, gradients=4, activations=5, cache=6, merged=7)
    assert lm.peak_of(parts) == 15 and lm.peak_of(parts | dict(merged=10)) == 16


def test_a_lora_s_parts_have_one_copy_and_no_large_states():
    policy, reference = tiny(), tiny()
    parts = told(lm.Work(8, 64, 16), [policy], [reference], state=8 * COUNT)
    small = lm.with_lora(parts, [policy], [reference])
    adapters = 4 * 8 * 2 * (4 * 32 + 2 * 16 + 32 + 32 + 3 * (32 + 48))
    assert small["weights"] == 4 * COUNT + adapters and small["gradients"] == adapters
    assert small["optimiser"] == 2 * adapters and small["activations"] == parts["activations"]


TINY = ["--config", "pretrain,tiny", "--tokenizer", "bytes", "--steps", "2", "--context", "32",
        "--batch", "4", "--micro", "2", "--eval_every", "2"]


@pytest.fixture
def text(workdir):
    """A small text to train on."""
    path = workdir / "text.txt"
    path.write_text("\n\n".join(f"One line, the {i}th of many, and its end." for i in range(200)))
    return str(path)


def test_a_script_tells_its_peak_before_the_first_step_and_beside_it_afterwards(text, capsys):
    sft.main([*TINY, "--data", text, "--out", "run"])
    out = capsys.readouterr().out
    assert out.index("  memory: process") < out.index("step     1") < out.index("peak memory ")
    memory = json.loads(open("run/run.json").read())["memory"]
    assert f"predicted {memory['predicted'] / 1e9:.2f}" in out
    assert memory["peak"] == pytest.approx(data.run.peak_bytes("cpu"), rel=0.2)


def test_memory_that_runs_out_in_a_step_is_answered_with_settings(text, monkeypatch, capsys):
    def step(self):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")
    monkeypatch.setattr(optim.Optimiser, "step", step)
    with pytest.raises(SystemExit) as stop:
        data.run.cli(lambda: sft.main([*TINY, "--data", text, "--out", "run"]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: out of memory at --micro 2, of ")
    for option in ("--micro 1 needs about", "--recompute true needs", "--peft lora needs"):
        assert option in error
    assert "can't allocate memory" in error


def test_a_process_holds_what_it_allocates_and_may_hold_more():
    before, room = data.run.held_bytes("cpu"), data.run.room_bytes("cpu")
    x = torch.ones(30_000_000)
    assert data.run.held_bytes("cpu") - before == pytest.approx(x.nbytes, rel=0.05)
    assert before < room < 1e13


def holes(ours):
    """Bytes that a process still holds of 200 MB in blocks which lay between others and are
    free."""
    del ours[0]
    torch.ones(7_000_000)                                # glibc's heap takes all below 28 MB now
    before = data.run.held_bytes("cpu")
    blocks = [torch.ones(n) for _ in range(100) for n in (500_000, 25_000)]
    ours += blocks[1::2]
    del blocks
    return data.run.held_bytes("cpu") - before


FRESH = """
import sys
sys.path[:0] = {paths!r}
import data.run, test_memory
run = object.__new__(data.run.Run)
run.expect_large({weights})
print(test_memory.holes([0]) / 1e7)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap")
def test_a_large_run_gives_back_what_it_frees():
    def last(weights):
        """In a new process, as a heap does not forget."""
        paths = [str(ROOT), str(ROOT / "tests")]
        done = subprocess.run([sys.executable, "-c", FRESH.format(paths=paths, weights=weights)],
                              capture_output=True, text=True, check=True)
        return float(done.stdout)
    assert last(9e7) >= 15 and last(2e8) <= 3


def test_what_a_resumed_run_has_read_is_not_the_process_s_own(monkeypatch):
    monkeypatch.setattr(data.run, "held_bytes", lambda device: 1e9)
    run = object.__new__(data.run.Run)
    run.c, run.state = SETTINGS, None
    alone, room = run.memory()
    assert alone == 1e9 and room > alone
    run.state = dict(opt=dict(stacks=[dict(state=dict(m=torch.zeros(10_000_000)))]), step=3)
    assert run.memory()[0] == 1e9 - 4e7
    run.c = SimpleNamespace(device="cpu")
    assert data.run.tensor_bytes(run.state) == 4e7


def test_ranks_share_a_machine(monkeypatch):
    alone = data.run.room_bytes("cpu") - data.run.held_bytes("cpu")
    monkeypatch.setattr(data.run, "ranks", lambda: 4)
    four = data.run.room_bytes("cpu") - data.run.held_bytes("cpu")
    assert four == pytest.approx(alone / 4, rel=0.2)


def test_finite_numbers_whose_sum_is_not_are_fine():
    assert data.run.not_finite(dict(a=torch.full((4,), 2e38))) == ""
    assert data.run.not_finite(dict(a=torch.tensor([torch.inf, -torch.inf]))) == "a"


@pytest.mark.parametrize("where", [0, 31, 32, 79])
def test_a_number_that_is_not_finite_is_found_wherever_it_lies(where, workdir):
    from safetensors.torch import save_file
    tensors = {f"t{i:03d}": torch.zeros(2) for i in range(80)}
    save_file(tensors, workdir / "a.safetensors")
    assert data.run.not_finite_in(workdir) == ""
    tensors[f"t{where:03d}"][1] = torch.nan
    save_file(tensors, workdir / "a.safetensors")
    assert data.run.not_finite_in(workdir) == f"t{where:03d}"
