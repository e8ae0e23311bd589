"""The families beside Llama's: what each switches, against values that transformers gave, and
against the equations; what a config.json leaves out, says twice, or says and is not computed.

`python tests/test_families.py` prints GIVEN anew, where transformers is installed (5.24 made it).
"""
import json
import math
import os
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model as M
from data.run import UserError
from data.tokenizer import bytes_tokenizer
from model import Cache, ScalarModel, from_hf, generate, init, load, save, to_hf, token_logprobs

SIZES = dict(vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
             bos_token_id=256, eos_token_id=257, pad_token_id=258, rms_norm_eps=1e-5)
EXPERTS = SIZES | dict(num_local_experts=4, num_experts_per_tok=2)
PHI = dict(type="longrope", short_factor=[1.0, 1.2, 1.5, 2.0], long_factor=[1.0, 2.0, 3.0, 5.0])
YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=32)
GEMMA = SIZES | dict(model_type="gemma3_text", head_dim=8, sliding_window=12, rope_theta=1e6,
                     query_pre_attn_scalar=20, rope_scaling=dict(rope_type="linear", factor=8.0),
                     layer_types=["sliding_attention", "full_attention"])
CASES = {                                # config.json, in transformers 4's words and in 5's
    "llama, biases": SIZES | dict(model_type="llama", attention_bias=True, mlp_bias=True,
                                  hidden_act="gelu"),
    "llama, yarn": SIZES | dict(model_type="llama", rope_scaling=YARN | dict(
        mscale=1.0, mscale_all_dim=0.7, truncate=False, beta_fast=16)),
    "llama, dynamic": SIZES | dict(model_type="llama", rope_parameters=dict(
        rope_type="dynamic", factor=2.0, rope_theta=5e3)),
    "mistral": SIZES | dict(model_type="mistral", sliding_window=12, head_dim=16),
    "qwen2, upper layers": SIZES | dict(model_type="qwen2", sliding_window=12, max_window_layers=1,
                                        use_sliding_window=True, rope_scaling=YARN),
    "qwen3, biases": SIZES | dict(model_type="qwen3", attention_bias=True, head_dim=8),
    "mixtral, window": EXPERTS | dict(model_type="mixtral", sliding_window=12),
    "phi3": SIZES | dict(model_type="phi3", sliding_window=12, partial_rotary_factor=0.5),
    "phi3, longrope": SIZES | dict(model_type="phi3", rope_scaling=PHI,
                                   original_max_position_embeddings=96),
    "phimoe": EXPERTS | dict(model_type="phimoe", attention_bias=True, lm_head_bias=True,
                             sliding_window=12, router_jitter_noise=0.2, rope_scaling=PHI | dict(
                                 short_mscale=1.1, long_mscale=1.3,
                                 original_max_position_embeddings=96)),
    "gemma3_text": GEMMA,
    "gemma3_text, newer": {k: v for k, v in GEMMA.items() if not k.startswith("rope_")} | dict(
        attention_bias=True, tie_word_embeddings=False, rope_parameters=dict(
            full_attention=dict(rope_type="default", rope_theta=2e5),
            sliding_attention=dict(rope_type="default", rope_theta=3e3)))}
# the first logits behind TEXT, and the greedy tokens after it
GIVEN = {
    "llama, biases": (
        [-1.020979, 1.591639, -0.901637, 2.036677],
        [247, 185, 156, 156, 156, 156, 177, 21, 231, 206, 89, 177, 136, 73, 249, 3, 1, 247, 185,
         108, 177, 239, 183, 73]),
    "llama, yarn": (
        [-1.088175, 2.830122, 0.091262, 1.979887],
        [249, 247, 82, 79, 82, 199, 247, 135, 7, 94, 1, 247, 135, 247, 189, 89, 207, 82, 93, 192,
         249, 247, 177, 136]),
    "llama, dynamic": (
        [-0.929161, 0.04304, -1.385149, 0.82031],
        [247, 1, 82, 148, 82, 11, 199, 136, 100, 7, 177, 136, 79, 13, 123, 73, 29, 167, 148, 249,
         82, 251, 82, 89]),
    "mistral": (
        [0.982508, 1.784844, 1.034941, -2.441568],
        [70, 245, 254, 70, 146, 43, 117, 56, 225, 136, 199, 7, 35, 7, 35, 199, 153, 117, 117, 117,
         143, 94, 249, 231]),
    "qwen2, upper layers": (
        [-1.004142, 2.780654, 1.174023, 0.76203],
        [1, 156, 82, 148, 257, 73, 257, 230, 150, 148, 257, 73, 80, 73, 148, 148, 148, 148, 135,
         247, 230, 150, 148, 148]),
    "qwen3, biases": (
        [-0.715924, 1.700037, -0.764797, 2.025053],
        [107, 177, 82, 79, 247, 148, 247, 185, 177, 18, 247, 148, 247, 148, 247, 148, 82, 259,
         249, 247, 148, 247, 148, 82]),
    "mixtral, window": (
        [1.415093, -0.638363, -1.072042, -2.747453],
        [165, 74, 164, 43, 28, 242, 165, 165, 165, 165, 87, 65, 252, 74, 170, 110, 252, 74, 246,
         243, 190, 139, 252, 138]),
    "phi3": (
        [-0.157472, 1.282382, 0.677953, 0.800354],
        [105, 196, 97, 121, 206, 202, 53, 140, 19, 177, 219, 19, 177, 59, 70, 73, 80, 79, 32, 219,
         246, 132, 22, 132]),
    "phi3, longrope": (
        [0.399285, -1.230074, -2.980448, 0.071858],
        [162, 146, 154, 248, 18, 6, 154, 6, 154, 248, 249, 62, 217, 144, 136, 244, 150, 154, 7,
         154, 136, 244, 180, 6]),
    "phimoe": (
        [-0.943192, -0.805401, -0.64363, -1.980154],
        [165, 76, 76, 76, 76, 76, 76, 76, 76, 136, 136, 136, 243, 220, 243, 76, 243, 253, 243, 76,
         256, 243, 129, 67]),
    "gemma3_text": (
        [-0.343547, -0.01741, -0.037407, -0.234429],
        [192, 192, 192, 192, 192, 192, 166, 166, 166, 166, 166, 166, 166, 166, 166, 166, 166, 166,
         166, 166, 166, 166, 166, 166]),
    "gemma3_text, newer": (
        [-0.69265, -1.574442, 0.127907, -1.918159],
        [48, 247, 247, 247, 247, 247, 247, 247, 247, 73, 259, 80, 93, 93, 93, 93, 93, 13, 199,
         238, 6, 192, 13, 199]),}
TEXT = [(7 * i * i + 3 * i) % 256 for i in range(40)]


def wave(name, shape):
    """Numbers from a tensor's name: sines of k²."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return 0.3 * torch.sin(0.37 * k * k + zlib.crc32(name.encode()) % 1000).float().view(shape)


def written(folder, config):
    """A checkpoint of waves, norms around 1, with this config.json and transformers' names."""
    net = init(from_hf(config))
    save(net, bytes_tokenizer(), folder)
    plus = 0.0 if config["model_type"] == "gemma3_text" else 1.0
    stored = load_file(folder / "model.safetensors")
    for name, x in stored.items():
        norm = "norm" in name and name.endswith("weight")
        stored[name] = wave(name, x.shape) + plus * norm
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    return folder


def reads(folder):
    """What our model says of TEXT: the first logits, the greedy tokens."""
    net = load(folder)[0]
    roll = generate(net, [TEXT], 24, temperature=0, stop=[])
    logits = net.logits(net(torch.tensor([TEXT]))[:, -1])[0, :4]
    return [round(x, 6) for x in logits.tolist()], roll.tokens[0, len(TEXT):].tolist()


def given(folder):
    """What transformers says of it."""
    import transformers
    net = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.tensor([TEXT])
    with torch.no_grad():
        logits = net(ids).logits[0, -1, :4]
        out = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24,
                           do_sample=False, eos_token_id=None, pad_token_id=258)
    return [round(x, 6) for x in logits.tolist()], out[0, len(TEXT):].tolist()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: a checkpoint of waves} of every case."""
    root = tmp_path_factory.mktemp("families")
    out = {}
    for i, (name, config) in enumerate(CASES.items()):
        (root / str(i)).mkdir()
        out[name] = written(root / str(i), config)
    return out


# --- what they compute ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_family_says_what_transformers_says(name, folders):
    logits, tokens = reads(folders[name])
    assert logits == pytest.approx(GIVEN[name][0], abs=1e-4) and tokens == GIVEN[name][1]


@pytest.mark.parametrize("name", CASES)
def test_decoding_with_a_cache_is_the_full_forward(name, folders):
    """one token at a time, in one piece of several, and in static steps; prompts of two lengths"""
    net, (short, long) = load(folders[name])[0], (TEXT[:5], TEXT[:23])
    roll = generate(net, [short, long], 20, temperature=0, stop=[])
    for row, prompt in zip(roll.tokens, (short, long)):
        text = row[:len(prompt) + 20]
        best = net.logits(net(text[None]))[0].argmax(-1)
        assert torch.equal(best[len(prompt) - 1:-1], text[len(prompt):])
    cache, ids = Cache(net.config, 1, 40, "cpu", torch.float32), torch.tensor([TEXT])
    parts = torch.cat([net(x, cache) for x in ids.split([9, 14, 1, 16], 1)], 1)
    assert torch.allclose(parts, net(ids), atol=1e-4)
    net.config = replace(net.config, eos_token_id=())
    assert list(M.stream(net, long, 20, temperature=0)) == roll.tokens[1, 23:43].tolist()


@pytest.mark.parametrize("name", ["mistral", "phimoe", "gemma3_text"])
def test_static_steps_and_the_policy(name, folders, monkeypatch):
    net, stop = load(folders[name])[0], list(range(0, 250, 9))
    draw = lambda: generate(net, [TEXT[:5], TEXT[:20]], 20, samples=4, stop=stop, temperature=0.9,
                            generator=torch.Generator().manual_seed(0))
    plain = draw()
    monkeypatch.setattr(M, "graphed", lambda model: True)
    static = draw()
    assert torch.equal(plain.tokens, static.tokens) and plain.row_steps < static.row_steps
    logp = token_logprobs(net, plain.tokens, plain.mask, temperature=0.9)
    assert (logp - plain.logp).abs().max() < 1e-4 and plain.finished.any()


@pytest.mark.parametrize("name", CASES)
def test_the_future_is_unseen_and_the_window_ends(name, folders):
    """in float64; a changed token reaches what follows it, through two layers of 12 tokens not
    further than 22, unless a layer sees everything"""
    net, ids = load(folders[name], dtype=torch.float64)[0], torch.tensor([TEXT])
    other = ids.clone()
    other[0, 10] = 99
    moved = (net(ids) - net(other)).abs().amax(-1)[0] > 1e-9
    slides = [x == "sliding_attention" for x in net.config.layer_types]
    reach = 10 + 22 if slides and all(slides) else 39
    assert not moved[:10].any() and moved[10:reach + 1].all() and not moved[reach + 1:].any()


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_is_what_was_loaded(name, folders, tmp_path):
    """bitwise, in one file and in several, with the rotary options under one key"""
    net, tok = load(folders[name])
    for shard in (10 ** 9, 20_000):
        save(net, tok, tmp_path / str(shard), shard)
        back = load(tmp_path / str(shard))[0]
        a, b = net.state_dict(), back.state_dict()
        assert back.config == net.config and a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    d = json.loads((tmp_path / "20000/config.json").read_text())
    first = load_file(folders[name] / "model.safetensors")
    assert load_file(tmp_path / f"{10 ** 9}/model.safetensors").keys() == first.keys()
    assert "rope_parameters" not in d and d["rope_theta"] == net.config.rope_theta
    assert len(set(json.loads((tmp_path / "20000/model.safetensors.index.json").read_text())
                   ["weight_map"].values())) > 1


def test_windows_by_hand():
    """three tokens in all: itself and the two before it; of the slots that are there, the last"""
    assert M.within(5, 3, "cpu").int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    seen = torch.tensor([[True] * 4 + [False], [True] * 2 + [False] * 3])
    assert M.nearest_of(seen, 3).int().tolist() == [[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]]


def test_the_sparse_mixer_by_hand():
    """noise 0.1: rivals are within a fifth of the larger. Of 4, 3.5, 1, -4 the first two are, so
    that the likeliest has 1 / (1 + e^-0.5); of the rest 3.5 stands alone."""
    c = replace(from_hf(CASES["phimoe"]), router_jitter_noise=0.1)
    logits = torch.tensor([[4.0, 3.5, 1.0, -4.0]], requires_grad=True)
    share, chosen = M.sparsemixer(c, logits)
    assert chosen.tolist() == [[0, 1]]
    assert share[0].tolist() == pytest.approx([1 / (1 + math.exp(-0.5)), 1.0])
    share[0, 0].backward()
    assert logits.grad[0, 0] > 0 > logits.grad[0, 1] and logits.grad[0, 2:].abs().sum() == 0


# --- rotary positions -----------------------------------------------------------------------------


def angles(name, change=(), **kw):
    """The angles of position 1 and the factor of all cosines, of a case with other options."""
    c = from_hf(CASES[name] | dict(change))
    cos, sin = M.rope_table(c, torch.device("cpu"), **kw)
    return torch.atan2(sin[1], cos[1]), cos[0, 0].item()


def test_yarn_by_hand():
    """Heads of 8, theta 10000, old context 32, factor 4. A frequency turns 32 and 1 times in 32
    tokens at number 8 ln(32 / 64π) / (2 ln 1e4) = -0.80 and 8 ln(32 / 2π) / (2 ln 1e4) = 0.71, so
    between 0 and 1: the first is kept, the others are over 4. Cosines times 0.1 ln 4 + 1."""
    said, factor = angles("llama, yarn", dict(rope_scaling=YARN).items())
    want = torch.tensor([1.0, 0.1, 0.01, 0.001]) / torch.tensor([1.0, 4, 4, 4])
    assert torch.allclose(said, want, rtol=1e-4) and factor == pytest.approx(1.138629, abs=1e-6)
    whole = dict(rope_scaling=YARN | dict(truncate=False, attention_factor=1.5))
    said, factor = angles("llama, yarn", whole.items())
    ramp = 1 / (8 * math.log(32 / (2 * math.pi)) / (2 * math.log(1e4)))               # over 0.71
    assert torch.allclose(said, want, rtol=1e-4) and factor == 1.5 and ramp > 1
    slow = dict(rope_scaling=YARN | dict(truncate=False, beta_slow=0.1, mscale=2.0,
                                         mscale_all_dim=1.0))
    said, factor = angles("llama, yarn", slow.items())
    high = 8 * math.log(32 / (0.2 * math.pi)) / (2 * math.log(1e4))                     # 1.707
    assert said[1].item() == pytest.approx(0.1 * (1 - 1 / high) + 0.025 / high, rel=1e-4)
    assert factor == pytest.approx((0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1), abs=1e-6)


def test_longrope_by_hand():
    """its list by the length, and sqrt(1 + ln(128 / 96) / ln 96) in both; Phi-3.5-MoE's own
    factors"""
    base = torch.tensor([1.0, 0.1, 0.01, 0.001])
    for long, key in ((False, "short_factor"), (True, "long_factor")):
        said, factor = angles("phi3, longrope", long=long)
        assert torch.allclose(said, base / torch.tensor(PHI[key]), rtol=1e-4)
        assert factor == pytest.approx(math.sqrt(1 + math.log(128 / 96) / math.log(96)), abs=1e-6)
        own = angles("phimoe", long=long)[1]
        assert own == pytest.approx(1.3 if long else 1.1)


def test_longrope_changes_where_the_text_is_longer(folders):
    """the whole text is read anew: streaming across is the full forward's argmax; what cannot be
    read anew is refused, with the number"""
    net = load(folders["phi3, longrope"])[0]
    text = [(5 * i * i) % 256 for i in range(90)]
    net.config = replace(net.config, eos_token_id=())
    for token in M.stream(net, text, 14, temperature=0):
        assert token == int(net.logits(net(torch.tensor([text]))[:, -1]).argmax())
        text.append(token)
    ids = torch.tensor([text[:96]])
    for prompts in ([text[:90]], [text[:90], text[:100]]):
        with pytest.raises(UserError, match="both sides of 96, where this model's longrope"):
            generate(net, prompts, 10)
    assert generate(net, [text[:98], text[:100]], 10, stop=[]).tokens.shape == (2, 110)
    assert generate(net, [text[:80]], 16, stop=[]).tokens.shape == (1, 96)
    cache = Cache(net.config, 1, 99, "cpu", torch.float32)
    net(ids, cache)
    with pytest.raises(UserError, match="cache was made of 96 tokens"):
        net(ids[:, :1], cache)


def test_layers_with_a_window_turn_by_their_own_theta(folders):
    """and the others by the scaled one, of position 1: theta^(-1/4), over 8 where it is scaled"""
    assert angles("gemma3_text")[0][1].item() == pytest.approx(1e6 ** -0.25 / 8, rel=1e-4)
    assert angles("gemma3_text", local=True)[0][1].item() == pytest.approx(1e4 ** -0.25, rel=1e-4)
    newer = "gemma3_text, newer"
    assert angles(newer)[0][1].item() == pytest.approx(2e5 ** -0.25, rel=1e-4)
    assert angles(newer, local=True)[0][1].item() == pytest.approx(3e3 ** -0.25, rel=1e-4)
    assert load(folders[newer])[0].local == [True, False]


LINEAR = dict(type="linear", factor=2.0)
DISAGREE = {                             # what is put into a config.json, and the two that disagree
    "an edited older key": (dict(rope_scaling=LINEAR, rope_parameters=dict(
        rope_type="default", rope_theta=1e4)), "rope_scaling and rope_parameters disagree on"),
    "another factor": (dict(rope_scaling=LINEAR, rope_parameters=LINEAR | dict(factor=4.0)),
                       r"disagree on factor \(2.0, 4.0\)"),
    "an option in one of them": (dict(rope_scaling=YARN, rope_parameters=YARN | dict(
        attention_factor=1.5)), "disagree on attention_factor"),
    "two thetas": (dict(rope_theta=1e4, rope_parameters=dict(rope_type="default", rope_theta=5e5)),
                   r"config.json and rope_parameters disagree on rope_theta \(10000.0, 500000.0\)"),
    "two names of a type": (dict(rope_scaling=dict(type="linear", rope_type="dynamic", factor=2.0)),
                            "rope_type 'dynamic' and type 'linear' disagree")}


@pytest.mark.parametrize("name", DISAGREE)
def test_rotary_options_under_two_names_agree_or_are_refused(name):
    change, words = DISAGREE[name]
    with pytest.raises(UserError, match=words):
        from_hf(SIZES | dict(model_type="llama") | change)


def test_rotary_options_that_agree_are_read():
    """as this file's older checkpoints have them, in either spelling, one of them null"""
    base = SIZES | dict(model_type="llama")
    linear, pairs = dict(rope_type="linear", factor=2.0), (("factor", 2.0), ("rope_type", "linear"))
    for said in (dict(rope_scaling=LINEAR), dict(rope_parameters=linear, rope_scaling=None),
                 dict(rope_scaling=LINEAR, rope_parameters=linear | dict(rope_theta=7.0))):
        c = from_hf(base | said | dict(rope_theta=7.0))
        assert c.rope_scaling == pairs and c.rope_theta == 7
    old = dict(rope_theta=1e4, rope_scaling=None,
               rope_parameters=dict(rope_type="default", rope_theta=1e4))
    assert from_hf(base | old) == from_hf(base)
    at_top = YARN | dict(original_max_position_embeddings=None)
    c = from_hf(base | dict(rope_scaling=at_top, original_max_position_embeddings=64))
    assert dict(c.rope_scaling)["original_max_position_embeddings"] == 64
    c = from_hf(base | dict(rope_scaling=at_top))                       # transformers' default
    assert dict(c.rope_scaling)["original_max_position_embeddings"] == 128


# --- what a config.json leaves out, or says -------------------------------------------------------

SHORT = {k: v for k, v in SIZES.items() if not k.endswith(("_id", "_heads", "_eps"))}
SHORT |= dict(num_attention_heads=32, hidden_size=256, num_key_value_heads=...)
ABSENT = dict(                           # what transformers 5.24's config classes take
    llama=dict(num_key_value_heads=32, rms_norm_eps=1e-6, rope_theta=1e4, head_dim=8,
               tie_word_embeddings=False, bos_token_id=1, eos_token_id=(2,), pad_token_id=-1),
    mistral=dict(num_key_value_heads=8, rms_norm_eps=1e-6, rope_theta=1e4, head_dim=8,
                 sliding_window=100, eos_token_id=(2,)),
    qwen2=dict(num_key_value_heads=32, rms_norm_eps=1e-6, rope_theta=1e4, head_dim=8,
               sliding_window=0, eos_token_id=(), bos_token_id=-1),
    qwen3=dict(num_key_value_heads=32, head_dim=128, attention_bias=False),
    phi3=dict(num_key_value_heads=32, rms_norm_eps=1e-5, rope_theta=1e4, bos_token_id=1,
              eos_token_id=(), sliding_window=0),
    mixtral=dict(num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e6, num_experts=8,
                 num_experts_per_tok=2, router_aux_loss_coef=0.001, sliding_window=0),
    qwen3_moe=dict(num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=1e4, num_experts=128,
                   num_experts_per_tok=8, norm_topk_prob=False, head_dim=8),
    phimoe=dict(num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e6, num_experts=16,
                router_jitter_noise=0.01, lm_head_bias=False, tie_word_embeddings=False),
    gemma3_text=dict(num_key_value_heads=4, head_dim=256, rms_norm_eps=1e-6, rope_theta=1e6,
                     rope_local_base_freq=1e4, tie_word_embeddings=True, sliding_window=4096,
                     hidden_act="gelu_pytorch_tanh", query_pre_attn_scalar=0.0, bos_token_id=2,
                     eos_token_id=(1,), pad_token_id=0))
SHORT = {k: v for k, v in SHORT.items() if v is not ...}


def shortest(family):
    """A config.json with sizes only; a context of 5000 lets the default window of 4096 bite."""
    extra = dict(moe_intermediate_size=24) if family == "qwen3_moe" else {}
    return SHORT | extra | dict(model_type=family, max_position_embeddings=5000)


@pytest.mark.parametrize("family", ABSENT)
def test_an_absent_key_means_what_transformers_means(family):
    c = from_hf(shortest(family))
    want = ABSENT[family] | (dict(sliding_window=4096) if family == "mistral" else {})
    assert {k: getattr(c, k) for k in want} == want
    if family == "mistral":
        assert from_hf(shortest(family) | dict(sliding_window=None)).sliding_window == 0
        null = from_hf(shortest(family) | dict(num_key_value_heads=None))
        assert null.num_key_value_heads == 32                         # null is not absent
    if family == "gemma3_text":
        c = from_hf(shortest(family) | dict(num_hidden_layers=7))
        assert [x[0] for x in c.layer_types] == list("sssssfs")       # every sixth sees it all


@pytest.mark.parametrize("family", ABSENT)
def test_absent_keys_against_transformers(family):
    hf = pytest.importorskip("transformers")
    d, ours = shortest(family), from_hf(shortest(family))
    theirs = hf.AutoConfig.for_model(family, **{k: v for k, v in d.items() if k != "model_type"})
    rope = theirs.rope_parameters
    rope = rope.get("full_attention", rope)
    assert (ours.rope_theta, ours.rms_norm_eps) == (rope["rope_theta"], theirs.rms_norm_eps)
    width = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == width and ours.num_key_value_heads == theirs.num_key_value_heads
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    window = getattr(theirs, "sliding_window", None)
    types = getattr(theirs, "layer_types", ["sliding_attention"])
    slides = "sliding_attention" in types
    assert ours.sliding_window == (window or 0 if slides else 0)
    act = getattr(theirs, "hidden_activation", None) or theirs.hidden_act
    assert ours.hidden_act == act
    if ours.moe:
        assert (ours.num_experts, ours.num_experts_per_tok) == (
            theirs.num_local_experts, theirs.num_experts_per_tok)


def of(family, **change):
    """A case's config.json with a change."""
    base = dict(mixtral="mixtral, window", qwen2="qwen2, upper layers", llama="llama, biases",
                qwen3="qwen3, biases")
    return CASES[base.get(family, family)] | change


REFUSED = {
    "a picture model": (of("llama", model_type="gemma3", text_config={}), "reads more than text"),
    "Gemma 2": (of("llama", model_type="gemma2"), "model_type 'gemma2' is not supported"),
    "capped logits": (of("gemma3_text", final_logit_softcapping=30.0), "final_logit_softcapping"),
    "capped scores": (of("gemma3_text", attn_logit_softcapping=50.0), "attn_logit_softcapping"),
    "both directions": (of("gemma3_text", use_bidirectional_attention=True), "bidirectional"),
    "scaled logits": (of("llama", logits_scaling=8.0), "logits_scaling = 8.0"),
    "scaled scores": (of("llama", attention_multiplier=0.1), "attention_multiplier"),
    "clipped": (of("llama", clip_qkv=8.0), "clip_qkv"),
    "a bias it has not": (of("mistral", attention_bias=True), "attention_bias = True"),
    "an MLP's bias": (of("qwen3", mlp_bias=True), "mlp_bias = True is not supported in qwen3"),
    "a head's bias": (of("llama", lm_head_bias=True), "lm_head_bias"),
    "a part of the head": (of("llama", partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
    "a tied head's bias": (of("phimoe", tie_word_embeddings=True), "lm_head_bias"),
    "three experts": (of("phimoe", num_experts_per_tok=3), "num_experts_per_tok = 3"),
    "no mscale": (of("phimoe", rope_scaling=PHI | dict(original_max_position_embeddings=96)),
                  "short_mscale"),
    "llama3 in Phi": (of("phi3", rope_scaling=LINEAR), "rope_type 'linear' is not supported in"),
    "a short list": (CASES["phi3, longrope"] | dict(rope_scaling=PHI | dict(short_factor=[1.0])),
                     "short_factor has 1 entries: expected 4"),
    "a list of words": (CASES["phi3, longrope"] | dict(rope_scaling=PHI | dict(
        long_factor=["x"] * 4)), "long_factor has 4 entries"),
    "no list": (CASES["phi3, longrope"] | dict(rope_scaling=dict(type="longrope")),
                "short_factor is missing"),
    "an unknown option": (of("llama", rope_scaling=LINEAR | dict(alpha=1e3)), "alpha is nothing"),
    "an unknown scaling": (of("llama", rope_scaling=dict(type="ntk", factor=2.0)),
                           "rope_type 'ntk' is not supported in llama; choose default"),
    "a type that is a list": (of("llama", rope_scaling=dict(type=[])), r"rope_type \[\] is not"),
    "no factor": (of("llama", rope_scaling=dict(type="yarn")), "factor is missing"),
    "low above high": (of("llama", rope_scaling=dict(
        type="llama3", factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0)), "high_freq_factor"),
    "by layers": (of("llama", rope_parameters=dict(full_attention=LINEAR)), "expected one object"),
    "not by layers": (GEMMA | dict(rope_parameters=LINEAR), "an object for each kind of layer"),
    "a scaled window": (GEMMA | dict(rope_parameters=dict(sliding_attention=LINEAR)),
                        "sliding_attention has rope_type 'linear'"),
    "a window of Llama's": (of("llama", use_sliding_window=True, max_window_layers=0,
                               sliding_window=12), "sliding_window = 12 is not supported in llama"),
    "too few kinds": (of("gemma3_text", layer_types=["full_attention"]), "for each layer"),
    "another kind": (of("qwen2", layer_types=["chunked_attention"] * 2), "chunked_attention"),
    "kinds it has not": (of("mistral", layer_types=["full_attention"] * 2), "not what mistral"),
    "windows switched off": (of("qwen2", use_sliding_window=False, layer_types=[
        "sliding_attention"] * 2), "use_sliding_window is not true"),
    "no window": (of("gemma3_text", sliding_window=None), "sliding_window is missing"),
    "half a number": (of("phi3", partial_rotary_factor=0.4), "even whole number"),
    "an activation": (of("gemma3_text", hidden_activation="relu2"), "hidden_act = 'relu2'")}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_at_load(name, tmp_path):
    config, words = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words) as e:
        load(tmp_path)
    assert "\n" not in str(e.value) and "config.json" in str(e.value)


def test_keys_that_change_nothing_are_none():
    """null, off, one; the class's name in the released SlimMoE checkpoints; no class at all"""
    off = dict(attn_logit_softcapping=None, logits_scaling=1.0, use_mrope=False, mlp_only_layers=[],
               attention_dropout=0.0, pretraining_tp=1)
    plain = from_hf(CASES["phimoe"])
    for names in ({}, dict(architectures=["PhiMoEForCausalLM"]), dict(architectures=None),
                  dict(architectures=["PhimoeForCausalLM"])):
        assert from_hf(CASES["phimoe"] | off | names) == plain


# --- what walks a model by the names of its modules -----------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("peft", ["lora", "hft", "bone"])
def test_adapters_train_every_family(name, peft, folders):
    """gradients reach what is trained; merged, the model says the same"""
    net, ids = load(folders[name])[0], torch.tensor([TEXT])
    net = M.PEFT[peft](net, torch.Generator().manual_seed(0))
    token_logprobs(net, ids).sum().backward()
    M.load_balance_loss(net)                                              # forgets the forward
    trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.01 if p.grad is None else -0.01 * p.grad.sign())
    assert torch.allclose(M.merge(net)(ids), net(ids), atol=2e-4)


@pytest.mark.parametrize("name", ["phimoe", "gemma3_text", "phi3"])
def test_reward_models_of_the_families(name, folders, tmp_path):
    """a body without the head and its bias; saved, loaded, under transformers' name"""
    body, tok = load(folders[name])
    net, ids = ScalarModel.from_lm(body, std=0.5), torch.tensor([TEXT])
    save(net, tok, tmp_path)
    assert torch.equal(load(tmp_path)[0](ids), net(ids)) and net(ids).abs().sum() > 0
    d = json.loads((tmp_path / "config.json").read_text())
    assert d["architectures"] == [dict(phimoe="Phimoe", gemma3_text="Gemma3Text", phi3="Phi3")[name]
                                  + "ForSequenceClassification"]


@pytest.mark.parametrize("family", M.FAMILIES)
def test_a_new_model_of_every_family(family, tmp_path):
    """norms are 1 at first, saved and loaded; it says every token is as likely as the others"""
    config = M.preset("2x64", bytes_tokenizer(), 64, family)
    net = init(config, seed=0)
    save(net, bytes_tokenizer(), tmp_path)
    assert load(tmp_path)[0].config == config
    x = torch.randn(3, 64)
    unit = x / (x ** 2).mean(-1, keepdim=True).sqrt()
    if family != "phimoe":
        assert torch.allclose(net.layers[0].input_layernorm(x), unit, atol=1e-4)
    assert (token_logprobs(net, torch.tensor([TEXT]))[0, 1:].mean() + math.log(320)).abs() < 0.3


# --- against transformers, where it is installed --------------------------------------------------

ROPES = dict(default=None, linear=LINEAR, dynamic=dict(type="dynamic", factor=2.0), yarn=YARN,
             llama3=dict(type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                         original_max_position_embeddings=32),
             yarn_scaled=YARN | dict(attention_factor=1.3), longrope=PHI | dict(
                 original_max_position_embeddings=96), longrope_factor=PHI | dict(
                 factor=3.0, original_max_position_embeddings=96))
HEADS = dict(tied=dict(tie_word_embeddings=True), untied=dict(tie_word_embeddings=False),
             theta=dict(rope_theta=5e5), heads=dict(head_dim=16), all_heads=dict(
                 num_key_value_heads=4))


def combined():
    """Every case, and every family's plain form with each scaling and each kind of head."""
    out = dict(CASES)
    windows = "sliding_window", "use_sliding_window", "max_window_layers"
    for name in ("llama, biases", "mistral", "qwen2, upper layers", "qwen3, biases", "phi3",
                 "mixtral, window", "phimoe", "gemma3_text"):
        plain = {k: v for k, v in CASES[name].items() if k not in ("rope_scaling", *windows)}
        family = plain["model_type"]
        whole = plain | dict(head_dim=8, sliding_window=12 if family == "gemma3_text" else None)
        for rope, options in ROPES.items() if "phi" not in family else ():
            if options:                      # transformers 5 overlooks Gemma's older spelling
                options = {"rope_type" if k == "type" else k: x for k, x in options.items()}
            out[f"{family} {rope}"] = whole | dict(rope_scaling=options)
        for head, change in HEADS.items():
            bias = dict(lm_head_bias=False) if family == "phimoe" else {}
            if family not in ("phi3", "phimoe") or head != "heads":
                out[f"{family} {head}"] = whole | change | bias
    return out


QUICK = "phi3, longrope", "phimoe", "gemma3_text, newer", "mixtral yarn", "mistral"
SLOW = [pytest.param(x, *y, marks=pytest.mark.slow) for x in combined()
        for y in (("float32", "5GB"), ("float32", "20KB"), ("bfloat16", "20KB"))]


@pytest.mark.parametrize("name, dtype, shard", [(x, "float32", "5GB") for x in QUICK] + SLOW)
def test_both_directions_with_transformers(name, dtype, shard, tmp_path):
    """what it saves we load, what we save it loads, and both say the same: logits, and 60 greedy
    tokens with a cache, past the window"""
    hf, config, ids = pytest.importorskip("transformers"), combined()[name], torch.tensor([TEXT])
    read = lambda x: hf.AutoModelForCausalLM.from_pretrained(
        x, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    (tmp_path / "first").mkdir()
    first = read(written(tmp_path / "first", config))[0].to(getattr(torch, dtype))
    first.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    bytes_tokenizer().save(tmp_path / "theirs")
    ours, tok = load(tmp_path / "theirs")
    save(ours, tok, tmp_path / "ours", 20_000)
    assert ours.config == load(tmp_path / "ours")[0].config
    texts = [torch.arange(n)[None] ** 2 % 256 for n in (40, 96)]
    greedy = generate(ours, [TEXT], 56, temperature=0, stop=[]).tokens
    for folder in ("theirs", "ours"):
        theirs, info = read(tmp_path / folder)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            for text in texts:
                assert torch.allclose(theirs(text).logits, ours.logits(ours(text)), atol=1e-4)
            out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=56,
                                  do_sample=False, eos_token_id=None, pad_token_id=258)
        assert torch.equal(out, greedy)


if __name__ == "__main__":
    import tempfile
    for case, said in CASES.items():
        with tempfile.TemporaryDirectory() as place:
            path = written(Path(place), said)
            theirs, ours = given(path), reads(path)
            assert theirs[1] == ours[1], (case, theirs, ours)
            print(f'    "{case}": (\n        {theirs[0]},\n        {theirs[1]}),')
