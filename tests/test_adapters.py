"""Adapters in every script that trains: one copy of the weights is policy and reference, a run goes
on exactly, what is saved is whole or a PEFT folder; blocks that are computed again."""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ring_pairs, tiny_model
from safetensors.torch import load_file

import dpo
import grpo
import ppo
import reward
import sft
import specdec
from data.run import UserError
from kernels import PackedLinear, pack_int, quantize
from model import (PEFT, LoRA, ModelConfig, ScalarModel, adapters_of, init, load, merge,
                   open_trained, plain_model, recomputing, reference, replace_linears, save,
                   snapshot, token_logprobs, with_peft)

SCRIPTS = dict(dpo=dpo, grpo=grpo, ppo=ppo, reward=reward, sft=sft, specdec=specdec)
SETTINGS = SimpleNamespace(peft="lora", dtype="float32", device="cpu", chat=False, seed=0,
                           recompute=False, merge=True)


def moved(model, seed=3):
    """The model, what trains in it moved by a little noise."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model


def lora_of(model, rank=4, seed=0):
    """The model with LoRAs of random numbers."""
    return moved(PEFT["lora"](model, torch.Generator().manual_seed(seed), rank=rank))


def logits(model, tokens):
    """A model's logits, or a reward model's scores."""
    with torch.no_grad():
        return model(tokens) if isinstance(model, ScalarModel) else model.logits(model(tokens))


TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 1], [7, 6, 5, 4, 3, 2, 1, 0]])


@pytest.mark.parametrize("name", ["lora", "bone", "bat"])
def test_the_reference_of_an_adapted_policy_is_its_base_on_the_same_tensors(name):
    """it stays as it was when the policy trains, and holds no number of its own"""
    base = tiny_model()
    before = logits(base, TOKENS)
    options = dict(rank=8)
    policy = moved(PEFT[name](base, torch.Generator().manual_seed(0), **options))
    ref = reference(policy, SETTINGS, "")
    assert torch.equal(logits(ref, TOKENS), before)
    assert not torch.allclose(logits(policy, TOKENS), before, atol=1e-3)
    mine = {p.data_ptr() for p in policy.parameters()}
    assert {p.data_ptr() for p in ref.parameters()} <= mine and not adapters_of(ref)
    assert not any(p.requires_grad for p in ref.parameters())
    assert len(adapters_of(policy)) == 14                      # the copy is of the structure alone


def test_a_policy_that_trains_whole_has_a_reference_of_its_own(stories):
    policy, _ = open_trained(SimpleNamespace(**vars(SETTINGS) | dict(peft="full")), PEFT["full"],
                             stories)
    ref = reference(policy, SETTINGS, stories)
    before = logits(ref, TOKENS)
    moved(policy)
    assert torch.equal(logits(ref, TOKENS), before)
    assert not torch.allclose(logits(policy, TOKENS), before, atol=1e-3)


def test_packed_layers_carry_adapters_and_are_shared_too():
    """QLoRA: the packed codes are in memory once"""
    model = tiny_model().float()
    replace_linears(model, lambda name, layer: packed(layer))
    policy = lora_of(model)
    ref = reference(policy, SETTINGS, "")
    codes = {x.data_ptr() for m in policy.modules() if isinstance(m, PackedLinear)
             for x in m.buffers()}
    theirs = [x.data_ptr() for m in ref.modules() if isinstance(m, PackedLinear)
              for x in m.buffers()]
    assert len(theirs) > 14 and set(theirs) == codes
    assert torch.allclose(logits(merge(policy), TOKENS), logits(policy, TOKENS), atol=1e-4)


def packed(layer):
    """A linear layer in 4 bits."""
    return pack_int(*quantize(layer.weight.data, 4, 16), bits=4, group=16)


def test_a_shared_trunk_is_the_policys_and_its_critic_trains_a_head_and_adapters():
    policy = with_peft(tiny_model().float(), SETTINGS, PEFT["lora"])
    critic = with_peft(ScalarModel.from_lm(reference(policy, SETTINGS, ""), share=True), SETTINGS,
                       PEFT["lora"], apart=1)
    frozen = {p.data_ptr() for p in policy.parameters() if not p.requires_grad}
    names = {name for name, p in critic.named_parameters() if p.requires_grad}
    assert names == {"score.weight"} | {n for n, _ in critic.named_parameters()
                                        if n.endswith((".A", ".B"))}
    theirs = {p.data_ptr() for n, p in critic.named_parameters() if n not in names}
    assert theirs <= frozen
    A, B = (next(m for m in x.modules() if isinstance(m, LoRA)).A for x in (policy, critic))
    assert A.data_ptr() != B.data_ptr() and not torch.equal(A, B)         # draws of its own
    assert torch.equal(critic(TOKENS), torch.zeros(2, 8))                 # the head begins at 0
    moved(critic)
    assert not any(p.requires_grad for p in reference(policy, SETTINGS, "").parameters())


def test_merging_leaves_what_trains_alone():
    """no tensor of the merged model is the live one's, biases and what is frozen included"""
    model = init(ModelConfig(model_type="qwen2", vocab_size=16, hidden_size=32, head_dim=16,
                             intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                             num_key_value_heads=1, eos_token_id=(0,)), 0)
    policy = lora_of(model)
    whole = merge(policy)
    assert torch.allclose(logits(whole, TOKENS), logits(policy, TOKENS), atol=1e-5)
    mine = {p.data_ptr() for p in policy.parameters()}
    assert all(p.requires_grad and p.data_ptr() not in mine for p in whole.parameters())
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == {
        n for n, _ in policy.named_parameters() if n.endswith((".A", ".B"))}
    assert plain_model(whole) is whole


def test_a_snapshot_copies_what_trains_and_shares_the_rest():
    policy = lora_of(tiny_model())
    old = snapshot(policy)
    before = logits(policy, TOKENS)
    moved(policy, 9)
    assert torch.equal(logits(old, TOKENS), before)
    assert not torch.allclose(logits(policy, TOKENS), before, atol=1e-3)
    same = {p.data_ptr() for p in old.parameters()} & {p.data_ptr() for p in policy.parameters()}
    assert same == {p.data_ptr() for p in policy.parameters() if not p.requires_grad}


def test_frozen_layers_in_bfloat16_are_what_autocast_makes_of_them(tmp_path):
    """the same loss and gradients, bit for bit, from half of the bytes"""
    import model as module
    whole, path = tiny_model().float(), tmp_path / "base"
    save(whole, None, tmp_path / "fine")             # what is stored in float32 is never rounded
    fine = load_without_tokenizer(module, tmp_path / "fine", torch.bfloat16)
    assert {p.dtype for p in fine.parameters()} == {torch.float32} and fine.products == "float32"
    save(whole.bfloat16(), None, path)
    plain = load_without_tokenizer(module, path, None)
    small = load_without_tokenizer(module, path, torch.bfloat16)
    assert {p.dtype for n, p in small.named_parameters() if "_proj" in n} == {torch.bfloat16}
    assert {p.dtype for n, p in small.named_parameters() if "_proj" not in n} == {torch.float32}
    assert torch.allclose(logits(small, TOKENS), logits(plain, TOKENS), atol=0.2, rtol=0.1)
    critic = ScalarModel.from_lm(small)              # a copy that trains whole is fine again
    assert {p.dtype for p in critic.parameters()} == {torch.float32}
    assert critic.model.products == "float32" and small.products == "bfloat16"
    grads = []
    for model in (plain, small):
        lora_of(model)
        assert all(m.A.dtype == torch.float32 for m in adapters_of(model))
        with torch.autocast("cpu", torch.bfloat16):
            loss = -token_logprobs(model, TOKENS).sum()
        loss.backward()
        grads.append([loss.detach(), *(m.A.grad for m in adapters_of(model)),
                      *(m.B.grad for m in adapters_of(model))])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def load_without_tokenizer(module, path, matrices):
    """load() of a folder that has no tokenizer."""
    original = module.read_tokenizer
    module.read_tokenizer = lambda *_: None
    try:
        return load(path, matrices=matrices)[0]
    finally:
        module.read_tokenizer = original


# --- runs -----------------------------------------------------------------------------------------

TINY = dict(
    sft=["--config", "tiny", "--data", "arithmetic", "--init", "base:pretrain", "--rows", "40",
         "--context", "64", "--eval_every", "4"],
    dpo=["--config", "tiny"], grpo=["--config", "tiny"], ppo=["--config", "tiny"],
    reward=["--config", "tiny", "--data", "pairs.jsonl"],
    specdec=["--config", "tiny", "--data", "arithmetic", "--rows", "40", "--eval_every", "4",
             "--eval_rows", "2", "--prompts", "2", "--max_new", "4"])
LORA = ["--peft", "lora", "--steps", "4", "--save_every", "2", "--lr", "0.01"]


def newest(folder):
    """The newest checkpoint's folder of a run."""
    return folder / "step-000004"


@pytest.mark.parametrize("name", list(TINY))
def test_a_run_with_adapters_goes_on_exactly_and_saves_whole_models(shared_bases, name):
    """merged weights are the same after a pause; the adapter's folder on its base is the merged
    model; with --merge false it is all that is there, and also goes on"""
    script, root = SCRIPTS[name], shared_bases
    ring_pairs("pairs.jsonl")
    script.main([*TINY[name], *LORA, "--out", "whole"])
    script.main([*TINY[name], *LORA, "--out", "two", "--stop", "2"])
    script.main([*TINY[name], *LORA, "--out", "two", "--resume"])
    one, two = (load_file(newest(root / x) / "model.safetensors") for x in ("whole", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    merged, _ = load(newest(root / "whole"))
    assert not adapters_of(merged)
    fold, _ = load(newest(root / "whole") / "adapter")
    assert type(fold) is type(merged)
    assert torch.allclose(logits(fold, TOKENS), logits(merged, TOKENS), atol=1e-5)

    script.main([*TINY[name], *LORA, "--out", "thin", "--merge", "false", "--stop", "2"])
    script.main([*TINY[name], *LORA, "--out", "thin", "--merge", "false", "--resume"])
    files = {p.name for p in newest(root / "thin").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    thin, _ = load(root / "thin")                              # a run's folder: its newest step
    assert torch.allclose(logits(thin, TOKENS), logits(merged, TOKENS), atol=1e-5)


@pytest.mark.parametrize("name", ["dpo", "grpo", "ppo"])
def test_the_run_compares_with_its_base(shared_bases, monkeypatch, name):
    """the reference's log-probs of a run are those of the checkpoint that it began with, while the
    policy's have moved away"""
    seen = []
    script = SCRIPTS[name]
    true = script.reference

    def spy(policy, c, origin):
        ref = true(policy, c, origin)
        seen.append((policy, ref, load(origin)[0]))
        return ref

    monkeypatch.setattr(script, "reference", spy)
    script.main([*TINY[name], *LORA, "--out", "run"])
    (policy, ref, start), = seen
    assert torch.equal(logits(ref, TOKENS), logits(start, TOKENS))
    assert not torch.allclose(logits(policy, TOKENS), logits(start, TOKENS), atol=1e-3)
    held = {p.data_ptr() for p in policy.parameters()}
    assert {p.data_ptr() for p in ref.parameters()} <= held


@pytest.mark.parametrize("share", ["true", "false"])
def test_ppos_critic_shares_the_trunk_if_it_is_told_to(shared_bases, monkeypatch, share):
    seen = {}
    true = ppo.open_models
    monkeypatch.setattr(ppo, "open_models", lambda *a: seen.setdefault("models", true(*a)))
    ppo.main([*TINY["ppo"], *LORA, "--share_trunk", share, "--out", "run"])
    policy, critic, *_ = seen["models"]
    ours = {p.data_ptr() for p in policy.parameters()}
    shared = {p.data_ptr() for p in critic.parameters()} & ours
    assert bool(shared) == (share == "true")
    assert bool(adapters_of(critic)) == (share == "true")
    found, _ = load(newest(shared_bases / "run") / "critic")
    assert torch.allclose(logits(found, TOKENS), logits(plain_model(critic), TOKENS), atol=1e-5)
    assert found.score.weight.abs().max() > 0                  # the head has learnt


@pytest.mark.parametrize("name, extra, words", [
    ("dpo", ["--peft", "bone", "--merge", "false"], "PEFT folders hold a LoRA"),
    ("dpo", ["--merge", "false"], "--merge: this run does not read it"),
    ("ppo", ["--share_trunk", "false"], "--share_trunk: this run does not read it"),
    ("reward", ["--recipe", "ensemble", "--peft", "lora"], "--peft: this run does not read it"),
    ("specdec", ["--draft", "1x32", "--peft", "lora"], "a new draft has nothing"),
    ("sft", ["--init", "", "--peft", "lora", "--merge", "false"], "PEFT folders hold a LoRA")])
def test_what_adapters_cannot_do_is_refused(shared_bases, name, extra, words):
    line = [x for x in TINY[name] if not (name == "sft" and x in ("--init", "base:pretrain"))]
    with pytest.raises(UserError, match=words):
        SCRIPTS[name].main([*line, *extra, "--out", "no"])


@pytest.mark.parametrize("name", ["grpo", "ppo", "dpo"])
def test_rows_that_wait_for_a_slot_draw_what_they_would_have_drawn(shared_bases, name):
    """a run with few slots is the run with all, but for rounding"""
    extra = ["--config", "online,tiny"] if name == "dpo" else TINY[name]
    for out, slots in (("all", "0"), ("few", "3")):
        SCRIPTS[name].main([*extra, "--steps", "2", "--lr", "1e-5", "--out", out, "--slots", slots])
    a, b = (load_file(shared_bases / x / "step-000002" / "model.safetensors")
            for x in ("all", "few"))
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    rows = [[json.loads(x) for x in open(shared_bases / out / "log.jsonl")]
            for out in ("all", "few")]
    for one, two in zip(*rows):
        assert one.get("length") == two.get("length")


def test_slots_reach_what_samples(shared_bases, monkeypatch):
    for name in ("grpo", "ppo", "dpo"):
        seen, script = [], SCRIPTS[name]                      # training, evaluation, calibration
        true = script.generate
        monkeypatch.setattr(script, "generate", lambda *a, true=true, **kw: (
            seen.append(kw.get("slots")), true(*a, **kw))[1])
        extra = ["--config", "online,tiny"] if name == "dpo" else TINY[name]
        script.main([*extra, "--steps", "1", "--out", name, "--slots", "5"])
        assert {*seen} == {5}, name


# --- recomputation --------------------------------------------------------------------------------

FAMILIES = dict(qwen3={}, qwen3_moe=dict(num_experts=4), gemma3_text=dict(
    layer_types=("sliding_attention", "full_attention"), sliding_window=4,
    rope_local_base_freq=1e4, hidden_act="gelu_pytorch_tanh"))


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("adapted", [False, True])
def test_recomputed_blocks_have_the_same_gradients_bit_for_bit(family, adapted):
    config = ModelConfig(model_type=family, vocab_size=16, hidden_size=32, head_dim=16,
                         intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, eos_token_id=(0,), **FAMILIES[family])
    out = []
    for recompute in (False, True):
        model = init(config, 0)
        model = recomputing(lora_of(model) if adapted else model, recompute)
        loss = -token_logprobs(model, TOKENS).sum()
        loss.backward()
        out.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*out)) and len(out[0]) > 10


def test_recomputation_keeps_a_blocks_input_alone():
    """what autograd holds after the forward pass, of eight blocks and of sixteen: the difference is
    one state [B, T, D] a block"""
    kept = []
    for layers in (8, 16):
        model = recomputing(tiny_model(layers=layers).float().requires_grad_(), True)
        held = {}

        def pack(x):
            held[x.data_ptr()] = x.nbytes
            return x
        own = {p.data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(TOKENS)
        kept.append(sum(n for key, n in held.items() if key not in own))
    assert kept[1] - kept[0] <= 8 * (TOKENS.numel() * 32 * 4 + 2048)


def test_every_script_recomputes_what_it_trains(shared_bases, monkeypatch):
    """blocks of policy and critic, of draft and reward model: as often again as they ran"""
    import model
    calls = []
    ring_pairs("pairs.jsonl")
    true = model.again
    monkeypatch.setattr(model, "again", lambda *a: calls.append(a[0]) or true(*a))
    for name, script in SCRIPTS.items():
        calls.clear()
        script.main([*TINY[name], "--steps", "2", "--recompute", "--out", f"{name}-again"])
        blocks = {id(x) for x in calls}
        assert len(blocks) % (4 if name == "ppo" else 2) == 0 and blocks, name
        script.main([*TINY[name], "--steps", "2", "--out", f"{name}-once"])
        a, b = (load_file(shared_bases / f"{name}-{x}" / "step-000002" / "model.safetensors")
                for x in ("again", "once"))
        assert all(torch.equal(a[k], b[k]) for k in a), name
