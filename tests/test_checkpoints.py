"""model.py: what a saved folder says of itself, reward models' pads, PEFT adapters in and out."""
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import ids, small

import model as M
from data.run import UserError
from data.tokenizer import Tokenizer, bytes_tokenizer
from model import ScalarModel, Transformer, load, save, sequence_score
from sft import main as sft_main

SAMPLED = dict(do_sample=True, temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.1,
               max_new_tokens=99, transformers_version="4.51.3")


def read(folder, name="config.json"):
    """The object of a folder's JSON file."""
    return json.loads((folder / name).read_text())


def write(folder, name="config.json", **changes):
    """Change keys of a folder's JSON file, or make it."""
    old = read(folder, name) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(old | changes))


@pytest.fixture
def base(tmp_path):
    """A small llama's folder."""
    save(small("llama"), bytes_tokenizer(), tmp_path / "base")
    return tmp_path / "base"


# --- what is saved --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_config_json_says_the_dtype_of_its_tensors(dtype, base, tmp_path):
    """in the newer and the older key, of language and reward models"""
    net, tok = load(base, dtype=dtype)
    for x, name in ((net, "lm"), (ScalarModel.from_lm(net).to(dtype), "reward")):
        save(x, tok, tmp_path / name)
        stored = {str(v.dtype) for v in load_file(tmp_path / name / "model.safetensors").values()}
        d = read(tmp_path / name)
        assert stored == {str(dtype)} == {f"torch.{d['dtype']}"} == {f"torch.{d['torch_dtype']}"}


def test_sampling_defaults_travel_with_the_model(base, tmp_path):
    """through copies and merged adapters; the ids are the model's, where it has one"""
    write(base, "generation_config.json", **SAMPLED, eos_token_id=[7, 8], pad_token_id=3)
    write(base, pad_token_id=None)
    net, tok = load(base)
    net = M.merge(M.lora(net, torch.Generator()))
    net.config = replace(net.config, eos_token_id=(8, 9))
    save(net, tok, tmp_path / "again")
    bos = bytes_tokenizer().bos
    assert read(tmp_path / "again", "generation_config.json") == SAMPLED | dict(
        bos_token_id=bos, eos_token_id=[8, 9], pad_token_id=3)
    assert read(tmp_path / "again")["eos_token_id"] == [8, 9]
    assert load(tmp_path / "again")[0].generation["top_k"] == 20
    assert small().generation == {}                     # of a new model nothing but ids is said
    save(small(), tok, tmp_path / "new")
    assert read(tmp_path / "new", "generation_config.json").keys() == {
        "bos_token_id", "eos_token_id", "pad_token_id"}


def test_a_second_save_leaves_no_weights_of_the_first(base):
    """single over sharded, sharded over single, and of fewer shards; other files stay"""
    (base / "notes.safetensors").write_text("mine")
    names = []
    for size in (10 ** 9, 60_000, 100_000, 10 ** 9):
        save(small("llama"), bytes_tokenizer(), base, size)
        assert all(torch.equal(a, b) for a, b in zip(load(base)[0].parameters(),
                                                     small("llama").parameters()))
        names.append({p.name for p in base.glob("*.safetensors*")} - {"notes.safetensors"})
    assert names[0] == names[3] == {"model.safetensors"}
    for some in names[1:3]:
        shards = {f"model-{i + 1:05d}-of-{len(some) - 1:05d}.safetensors"
                  for i in range(len(some) - 1)}
        assert some == shards | {"model.safetensors.index.json"}
    assert len(names[1]) > len(names[2]) > 2 and (base / "notes.safetensors").exists()


# --- reward models --------------------------------------------------------------------------------

EOS, PAD = 258, 256


def one_end(base):
    """The folder of a chat model whose pad is its end, as many are: both <|eos|>."""
    write(base, pad_token_id=EOS)
    write(base, "generation_config.json", pad_token_id=EOS)
    write(base, "tokenizer_config.json", pad_token="<|eos|>")
    return base


def test_a_reward_model_is_saved_with_a_pad_that_ends_no_text(base, tmp_path):
    """transformers reads the score at the last id that is not pad: with pad = EOS a token early"""
    net, tok = load(one_end(base))
    assert tok.pad == EOS == net.config.pad_token_id
    model = ScalarModel.from_lm(net, std=0.5)
    save(model, tok, tmp_path / "reward")
    pad = read(tmp_path / "reward")["pad_token_id"]
    back, its = load(tmp_path / "reward")
    assert pad == its.pad == back.config.pad_token_id and pad in its.hidden
    assert pad not in (EOS, tok.bos) and its.eos == EOS and its.tokens == tok.tokens
    text = its.tokens[pad].decode()
    assert read(tmp_path / "reward", "tokenizer_config.json")["pad_token"] == text
    x = torch.cat([ids(2, 9), torch.full((2, 1), EOS), torch.full((2, 2), pad)], 1)      # [2, 12]
    at_the_end = model(x)[:, 9]
    for m in (model, back):                               # while it is trained, and as it was saved
        assert torch.allclose(sequence_score(m, x, torch.tensor([10, 10])), at_the_end, atol=1e-5)
    save(net, tok, tmp_path / "lm")                       # a language model's stays
    assert read(tmp_path / "lm")["pad_token_id"] == EOS


def test_without_another_special_a_reward_model_has_no_pad(base, tmp_path):
    """transformers then scores rows one by one, rightly, and refuses a batch"""
    net, tok = load(one_end(base))
    one = Tokenizer(tok.tokens[:257] + [b"<|eos|>"], tok.order, {"<|eos|>": 257}, bos=None, eos=257,
                    pad=257)
    net.config = replace(net.config, eos_token_id=(257,), pad_token_id=257)
    save(ScalarModel.from_lm(net), one, tmp_path / "reward")
    assert read(tmp_path / "reward")["pad_token_id"] is None


def test_others_reward_models_are_scored_as_transformers_scores_them(base, tmp_path, capsys):
    """at the last id that is not pad, and the reader is told where that is not the end"""
    model = ScalarModel.from_lm(small("llama"), std=0.5)
    save(model, bytes_tokenizer(), tmp_path / "reward")
    load(tmp_path / "reward")
    assert capsys.readouterr().err == ""
    write(tmp_path / "reward", pad_token_id=EOS)
    theirs, _ = load(tmp_path / "reward")
    assert "also ends a text" in capsys.readouterr().err
    x = ids(3, 8)
    x[0, 4:], x[1, 7], x[2, 6:] = EOS, EOS, EOS
    length, scores = torch.tensor([6, 8, 7]), theirs(x)
    want = torch.stack([scores[0, 3], scores[1, 6], scores[2, 5]])
    assert torch.allclose(sequence_score(theirs, x, length), want, atol=1e-5)
    save(theirs, bytes_tokenizer(), tmp_path / "copy")                # its meaning is kept
    assert read(tmp_path / "copy")["pad_token_id"] == EOS


# --- adapters -------------------------------------------------------------------------------------

Q = "base_model.model.model.layers.1.self_attn.q_proj"
UP = "base_model.model.model.layers.0.mlp.up_proj"
LORA = dict(peft_type="LORA", task_type="CAUSAL_LM", r=4, lora_alpha=8, bias="none",
            base_model_name_or_path="someone/base", target_modules=["q_proj", "up_proj"],
            lora_dropout=0.05, init_lora_weights=True, peft_version="0.18.0", use_dora=False,
            megatron_core="megatron.core", loftq_config={}, rank_pattern={}, alpha_pattern={})


def adapter(folder, tensors=(), **changes):
    """An adapter's folder as peft writes it, on two layers: rank 4 on q, as many as A has on up."""
    g = torch.Generator().manual_seed(5)
    rank = changes.get("rank_pattern", {}).get("up_proj", changes.get("r", 4))
    shapes = {f"{Q}.lora_A.weight": (changes.get("r", 4), 64),
              f"{Q}.lora_B.weight": (64, changes.get("r", 4)),
              f"{UP}.lora_A.weight": (rank, 64), f"{UP}.lora_B.weight": (192, rank)}
    made = {k: torch.randn(x, generator=g) * 0.1 for k, x in shapes.items()} | dict(tensors)
    folder.mkdir()
    file = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in made.items() if v is not None}, file)
    write(folder, "adapter_config.json", **LORA | changes)
    return made


@pytest.mark.parametrize("changes, scales", [
    ({}, (2.0, 2.0)), (dict(use_rslora=True), (4.0, 4.0)), (dict(lora_alpha=2), (0.5, 0.5)),
    (dict(r=8), (1.0, 1.0)),
    (dict(rank_pattern=dict(up_proj=2)), (2.0, 4.0)),
    (dict(rank_pattern=dict(up_proj=2), use_rslora=True), (4.0, 8 / math.sqrt(2))),
    (dict(alpha_pattern={r"layers\.1\.self_attn\.q_proj": 1}), (0.25, 2.0))])
def test_an_adapter_is_added_to_its_base(changes, scales, base, tmp_path):
    """W + scale B A: alpha / r, or alpha / sqrt(r) if rank-stabilised, by layer where a pattern
    says; the base is found beside the folder, by its last name"""
    made = adapter(tmp_path / "ad", **changes)
    net, tok = load(tmp_path / "ad")
    plain = small("llama").state_dict()
    assert isinstance(net, Transformer) and all(p.requires_grad for p in net.parameters())
    changed = {"layers.1.self_attn.q_proj.weight": (Q, scales[0]),
               "layers.0.mlp.up_proj.weight": (UP, scales[1])}
    for name, value in net.state_dict().items():
        want = plain[name]
        if name in changed:
            key, scale = changed[name]
            want = want + scale * made[f"{key}.lora_B.weight"] @ made[f"{key}.lora_A.weight"]
        assert torch.allclose(value, want, atol=1e-6), name
    assert M.peek(tmp_path / "ad") == net.config
    save(net, tok, tmp_path / "whole")
    with pytest.raises(UserError, match="ad holds an adapter"):
        save(net, tok, tmp_path / "ad")


def test_an_adapter_may_hold_whole_modules_and_its_own_tokenizer(tmp_path):
    """modules_to_save, where the base does not tie the head to the embedding"""
    save(small("llama", tie_word_embeddings=False), bytes_tokenizer(), tmp_path / "base")
    whole = {"base_model.model.lm_head.weight": torch.ones(320, 64),
             "base_model.model.model.norm.weight": torch.full((64,), 3.0)}
    adapter(tmp_path / "ad", whole, modules_to_save=["lm_head", "norm"],
            base_model_name_or_path=str(tmp_path / "base"))
    bytes_tokenizer().save(tmp_path / "ad")
    write(tmp_path / "ad", "tokenizer_config.json", pad_token="<|im_end|>")
    net, tok = load(tmp_path / "ad")
    assert (net.lm_head.weight == 1).all() and (net.norm.weight == 3).all()
    assert tok.pad == tok.specials["<|im_end|>"] and net.config.pad_token_id == PAD


WRONG = {
    "no base": (dict(base_model_name_or_path="someone/else"), {}, "'someone/else', and no check"),
    "null base": (dict(base_model_name_or_path=None), {}, "None, and no check"),
    "dora": (dict(use_dora=True), {}, "use_dora = True is not supported"),
    "fan in": (dict(fan_in_fan_out=True), {}, "fan_in_fan_out = True"),
    "bias": (dict(bias="all"), {}, "bias = 'all'"),
    "pissa": (dict(init_lora_weights="pissa"), {}, "init_lora_weights = 'pissa'"),
    "kind": (dict(peft_type="IA3"), {}, "peft_type = 'IA3'"),
    "task": (dict(task_type="TOKEN_CLS"), {}, "task_type = 'TOKEN_CLS'"),
    "unknown": (dict(brand_new=[1]), {}, r"brand_new = \[1\] is not supported"),
    "rank": (dict(rank_pattern=dict(q_proj=3)), {}, "r = 3 does not fit the tensors of model.lay"),
    "no alpha": (dict(lora_alpha=None), {}, "lora_alpha is missing"),
    "half": ({}, {f"{Q}.lora_B.weight": None}, "does not fit the tensors of model.layers.1.self"),
    "stray": ({}, {f"{Q.replace('1', '7')}.lora_A.weight": torch.ones(4, 64)},
              "nothing reads the tensor model.layers.7"),
    "NaN": ({}, {f"{Q}.lora_B.weight": torch.full((64, 4), math.nan)}, "holds NaN or infinity"),
    "longer": ({}, {"base_model.model.model.embed_tokens.weight": torch.ones(330, 64)},
               r"embed_tokens.weight has shape \[330, 64\], in its base \[320, 64\]"),
    "untied": (dict(modules_to_save=["embed_tokens"]),
               {"base_model.model.model.embed_tokens.weight": torch.ones(320, 64)},
               "modules_to_save unties the head")}


@pytest.mark.parametrize("name", WRONG)
def test_what_an_adapter_asks_for_and_we_do_not_compute_is_named(name, base, tmp_path):
    changes, tensors, words = WRONG[name]
    adapter(tmp_path / "ad", tensors, **changes)
    with pytest.raises(UserError, match=words):
        load(tmp_path / "ad")


def test_a_folder_with_two_models_is_refused(base):
    write(base, "adapter_config.json", **LORA)
    with pytest.raises(UserError, match="a whole model and an adapter"):
        load(base)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_an_adapter_that_we_save_is_read_as_it_was(family, tmp_path):
    save(small(family), bytes_tokenizer(), tmp_path / "base")
    net = M.lora(load(tmp_path / "base")[0], torch.Generator().manual_seed(1), rank=3, alpha=5.0)
    g = torch.Generator().manual_seed(2)
    for name, p in net.named_parameters():
        if name.endswith(".B"):
            p.data.add_(0.1 * torch.randn(p.shape, generator=g))
    M.save_adapter(net, tmp_path / "ad", tmp_path / "base")
    back, _ = load(tmp_path / "ad")
    assert torch.allclose(back(ids(2, 20)), net(ids(2, 20)), atol=1e-5)
    assert not torch.allclose(back(ids(2, 20)), load(tmp_path / "base")[0](ids(2, 20)), atol=0.1)
    d, stored = (read(tmp_path / "ad", "adapter_config.json"),
                 load_file(tmp_path / "ad/adapter_model.safetensors"))
    assert d["r"] == 3 and d["lora_alpha"] == 5 and d["base_model_name_or_path"] == str(
        tmp_path / "base") and d["target_modules"] == sorted(
        f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down"))
    assert len(stored) == 28 and stored[f"{Q}.lora_A.weight"].shape == (3, 64)


def test_a_lora_run_leaves_the_adapter_beside_the_merged_model(base, workdir):
    """the same function, from the base and from the whole model; another run can start there"""
    argv = ["--data", "signatures", "--context", "96", "--batch", "2", "--micro", "2",
            "--eval_every", "9", "--lr", "0.01"]
    (workdir / "rows.jsonl").write_text("".join(
        json.dumps(dict(prompt=f"{n}?", completion=f"{n}!")) + "\n" for n in range(40)))
    argv[1] = "rows.jsonl"
    run = [*argv, "--steps", "2", "--config", "peft=lora,rank=2"]
    sft_main([*run, "--init", str(base), "--out", "one"])
    step = workdir / "one/step-000002"
    merged, added = load(step)[0], load(step / "adapter")[0]
    assert torch.allclose(merged(ids(1, 9)), added(ids(1, 9)), atol=1e-5)
    assert not torch.allclose(merged(ids(1, 9)), load(base)[0](ids(1, 9)), atol=1e-4)
    sft_main([*argv, "--steps", "1", "--init", str(step / "adapter"), "--out", "two"])
    assert load(workdir / "two")[0].config == merged.config


# --- against the libraries, where they are installed ----------------------------------------------


def test_transformers_scores_our_reward_models_alike(base, tmp_path):
    """single rows and a padded batch, of a model whose pad was its end"""
    hf = pytest.importorskip("transformers")
    net, tok = load(one_end(base))
    save(ScalarModel.from_lm(net, std=0.5), tok, tmp_path / "reward")
    ours, its = load(tmp_path / "reward")
    theirs = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    rows = [[*its.encode(text), its.eos] for text in ("one", "twenty", "three hundred")]
    words = hf.AutoTokenizer.from_pretrained(tmp_path / "reward")
    batch = words.pad(dict(input_ids=rows), return_tensors="pt", padding_side="right")
    assert batch["input_ids"][0, -1] == its.pad
    with torch.no_grad():
        scores = theirs(**batch).logits[:, 0]
        for row, score in zip(rows, scores):
            x, n = torch.tensor([row]), torch.tensor([len(row)])
            assert sequence_score(ours, x, n).item() == pytest.approx(score.item(), abs=1e-4)
            assert theirs(x).logits.item() == pytest.approx(score.item(), abs=1e-4)


def test_peft_opens_our_adapters_and_we_open_its(base, tmp_path):
    hf, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    x, whole = ids(2, 20), hf.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.get_peft_model(whole, peft.LoraConfig(
        r=4, lora_alpha=9, target_modules=["q_proj", "up_proj"], use_rslora=True,
        rank_pattern=dict(q_proj=2), task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            p.data.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = M.lora(load(base)[0], torch.Generator().manual_seed(1), rank=3, alpha=5.0)
    for name, p in ours.named_parameters():
        if name.endswith(".B"):
            p.data.add_(0.1 * torch.randn_like(p))
    M.save_adapter(ours, tmp_path / "ours", base)
    again = peft.PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(base),
                                           tmp_path / "ours")
    with torch.no_grad():
        opened = load(tmp_path / "theirs")[0]
        assert torch.allclose(theirs.eval()(x).logits, opened.logits(opened(x)), atol=1e-5)
        assert torch.allclose(again(x).logits, ours.logits(ours(x)), atol=1e-5)
