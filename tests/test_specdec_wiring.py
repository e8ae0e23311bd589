"""What reaches the methods of specdec.py in its own runs, compared with the same quantity computed
apart: from the checkpoints, the texts and the labels, by plain code."""
import functools
import itertools
import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import close, merged, rand, tiny_model
from test_specdec import COST, few_repetitions
from wiring import catch

import sft
import specdec
from data import prefs, tasks
from data.run import batch_indices, configure
from data.tokenizer import bytes_tokenizer, train_bpe
from model import ModelConfig, generate, init, load, save
from optim import optimiser

FIXTURES = few_repetitions

# --- the same, apart ------------------------------------------------------------------------------


def opened(path, c):
    """A checkpoint, and its tokenizer; a base is made with the settings of the run's size."""
    return load(sft.find(path, c.config, device="cpu", seed=c.seed), "cpu", torch.float32)


def predictions(model, rows, words):
    """log-probs of every prediction of a completion's token, row by row.   [N, words]"""
    out = []
    for prompt, answer in rows:
        hidden = model(torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1:-1]
        out.append(model.logits(hidden)[:, :words].float().log_softmax(-1))
    return torch.cat(out)


def log_prob(model, prompt, answer):
    """log π of an answer, of all the rows that a head has."""
    p = predictions(model, [(prompt, answer)], None)
    return p[range(len(answer)), answer].sum()


DIVERGENCES = dict(forward_kl=lambda p, q: (p.exp() * (p - q)).sum(-1),
                   reverse_kl=lambda p, q: (q.exp() * (q - p)).sum(-1),
                   tvd=lambda p, q: (p.exp() - q.exp()).abs().sum(-1) / 2)


def jsd(p, q, beta):
    m = (beta * p.exp() + (1 - beta) * q.exp()).log()
    return beta * (p.exp() * (p - m)).sum(-1) + (1 - beta) * (q.exp() * (q - m)).sum(-1)


def moved(model, to, begin):
    """How far `model` is from `to`, as a share of the way from `begin`."""
    a, b, c = (torch.cat([p.detach().flatten() for p in m.parameters()])
               for m in (model, to, begin))
    assert (b - c).norm() > 0.02
    return ((a - b).norm() / (b - c).norm()).item()


def trained(model, c, loss_of, floor=0.0):
    """The model after c.steps of loss_of(step) -> (mean loss, numbers), plainly; the numbers."""
    opt, rows = optimiser(model.requires_grad_(), lr=c.lr), []
    for step in range(c.steps):
        loss, numbers = loss_of(step)
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        left = (c.steps - step) / max(1, c.steps - c.warmup)
        rate = min(1, (step + 1) / c.warmup) * min(1, left)
        for group in opt.param_groups:
            group["lr"] = c.lr * max(floor, rate)
        for p in model.parameters():
            p.grad *= min(1, c.clip / norm)
        opt.step()
        opt.zero_grad()
        rows.append(dict(loss=loss.item(), norm=norm.item(), **numbers))
    return model.requires_grad_(False), rows


# --- a draft's training ---------------------------------------------------------------------------


def begun(pair, c, is_text):
    """A row's prompt: of a text the first tokens of a window."""
    return [*pair[0], *pair[1]][:c.prompt] if is_text else list(pair[0])


def continued(model, pairs, c, g, is_text):
    """Rows with the model's own completions, as long as the context allows."""
    prompts = [begun(x, c, is_text) for x in pairs]
    most = min(c.context, model.config.max_position_embeddings) - max(map(len, prompts))
    roll = generate(model, prompts, most, generator=g)
    return [(p, row[m > 0].tolist()) for p, row, m in zip(prompts, roll.tokens, roll.mask)]


def batches(c, rows, models, g, is_text):
    """The rows of every step, by the definition of each source."""
    pool = []
    for step in range(c.steps):
        if c.source != "data" and step % c.refresh == 0:
            at = [i for x in range(step, min(step + c.refresh, c.steps))
                  for i in batch_indices(len(rows), c.batch, x, c.seed).tolist()]
            pool = [rows[i] for i in at]
            if c.source == "mixed":
                pool[1::2] = continued(models["draft"], pool[1::2], c, g, is_text)
            else:
                pool = continued(models[dict(on_policy="draft", target="target")[c.source]], pool,
                                 c, g, is_text)
        elif c.source == "data":
            pool = [rows[i] for i in batch_indices(len(rows), c.batch, step, c.seed).tolist()]
        yield pool[:c.batch]
        pool = pool[c.batch:]


def chosen(c, loss, other, g):
    """The tokens that count: the share 0.4 of the largest values, the smallest of them by place."""
    if c.select == "every":
        return torch.ones(len(loss), dtype=torch.bool)
    lot = torch.rand(len(loss), generator=g) if c.select == "at_random" else None
    value = dict(adaspec=lambda: loss - other, smallest=lambda: other - loss,
                 easiest=lambda: -other, at_random=lambda: lot)[c.select]()
    return value >= value.sort().values[math.ceil(0.6 * (len(value) - 1))]


def distilled(draft, target, rows, words, c, divergence, is_text, reference):
    """A draft that has learned by the definition, and the numbers of each step."""
    g = torch.Generator().manual_seed(c.seed)
    steps = batches(c, rows, dict(draft=draft, target=target), g, is_text)

    def loss_of(step):
        some, total, share = next(steps), 0.0, 0.0
        for i in range(0, len(some), c.micro):                       # a selection's own tokens
            p, q = (predictions(m, some[i:i + c.micro], words) for m in (target, draft))
            loss = divergence(p, q)
            other = divergence(p, predictions(reference, some[i:i + c.micro], words))
            counts = chosen(c, loss.detach(), other, g)
            weight = len(loss) / sum(len(y) for _, y in some)
            total = total + loss[counts].mean() * weight
            share += counts.float().mean().item() * weight
        return total, dict(share=share)
    return trained(draft, c, loss_of, floor=0.1)


def near(target, draft, rows, words):
    """overlap, KL(p‖q) and agreement on the likeliest token, over the completions' tokens."""
    p, q = (predictions(m, rows, words) for m in (target, draft))
    return dict(overlap=(1 - (p.exp() - q.exp()).abs().sum(-1) / 2).mean(),
                kl=(p.exp() * (p - q)).sum(-1).mean(),
                same_top=(p.argmax(-1) == q.argmax(-1)).float().mean())


TRAINING = ["--steps", "4", "--batch", "4", "--lr", "0.01", "--warmup", "2", "--clip", "0.05"]
LESSONS = {
    "few rows, states remembered": ["--rows", "6", "--eval_rows", "64", "--eval_every", "2",
                                    "--save_every", "3", "--keep", "2"],
    "adaspec, sampled": ["--config", "adaspec,arena,tiny", "--rows", "0", "--ref_batch", "3",
                         "--micro", "2"],
    "smallest": ["--select", "smallest", "--ref_batch", "3"],
    "easiest": ["--select", "easiest"],
    "at random, lengths by verdict": ["--select", "at_random", "--length", "heuristic"],
    "on policy": ["--source", "on_policy"],
    "target": ["--source", "target", "--loss", "reverse_kl", "--warmup", "20"],
    "mixed": ["--source", "mixed", "--loss", "tvd"],
    "jsd, of a task": ["--config", "docs,tiny", "--data", "signatures", "--context", "320",
                       "--loss", "jsd", "--beta", "0.2", "--rows", "40"]}


def lively(shape, vocab, tok, folder, seed, sharp=15.0, context=384):
    """A random model whose predictions are far from uniform, saved."""
    layers, width = shape
    model = init(ModelConfig(vocab_size=vocab, hidden_size=width, intermediate_size=2 * width,
                             num_hidden_layers=layers, num_attention_heads=2,
                             num_key_value_heads=1, head_dim=16, eos_token_id=(tok.eos,),
                             tie_word_embeddings=False, max_position_embeddings=context), seed)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(25)
        model.lm_head.weight.mul_(sharp)
    save(model, tok, folder)


WORDS = "a draft of two models says what it reads, and the other one keeps some of it".split()


@pytest.fixture
def pair(workdir):
    """A working directory with a target and a draft of bytes, neither like the other."""
    for name, shape, seed in (("target", (2, 48), 0), ("draft", (1, 32), 1)):
        lively(shape, 320, bytes_tokenizer(), workdir / name, seed)
    pick = random.Random(0)
    some = [" ".join(pick.choices(WORDS, k=60)) + "." for _ in range(60)]
    (workdir / "few.txt").write_text("<|endoftext|>".join(some))
    return workdir


def settings(*argv):
    """A run's command line, and what it comes to; its text is a short one."""
    argv = merged("--config", "tiny", "--out", "out/run", "--device", "cpu", "--data", "few.txt",
                  "--init", "target", "--draft", "draft", *argv)
    return argv, *configure(specdec.Config, specdec.PRESETS, specdec.AXES, "", argv,
                            specdec.readers)


@pytest.mark.parametrize("name", LESSONS)
def test_a_draft_learns_what_plain_code_teaches(name, pair, monkeypatch, capsys):
    """the same weights, the same numbers in the log, the same agreement before and after"""
    argv, c, f = settings(*TRAINING, *LESSONS[name])
    if name in ("smallest", "easiest", "target", "mixed"):             # others decode, too
        monkeypatch.setattr(specdec, "race", lambda *rest: {})
    numbers = specdec.main(argv)
    (target, tok), is_text = opened(c.init, c), c.data == "few.txt"
    draft, begin, reference = (opened(c.draft, c)[0] for _ in range(3))
    rows = tasks.rows(c, tok, "train")
    if c.rows and is_text:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(c.seed))
        rows = [rows[i] for i in order[:c.rows].tolist()]
    known = dict(target=target, rows=rows, words=tok.vocab_size, is_text=is_text,
                 divergence=DIVERGENCES.get(c.loss, functools.partial(jsd, beta=0.2)))
    if c.select in ("adaspec", "smallest", "easiest"):
        alike = replace(c, select="every", batch=c.ref_batch)
        reference, _ = distilled(reference, c=alike, reference=begin, **known)
        assert moved(load("out/run/reference", "cpu")[0], reference, begin) < 1e-3
    draft, log = distilled(draft, c=c, reference=reference, **known)
    assert moved(load("out/run/step-000004", "cpu")[0], draft, begin) < 1e-3
    for mine, line in zip(log, open("out/run/log.jsonl"), strict=True):
        theirs = json.loads(line)
        assert close([theirs[k] for k in mine], [*mine.values()], 2e-3)
        assert ("overlap" in theirs) == (theirs["step"] in (c.eval_every, 2 * c.eval_every, 4))
    assert (pair / "out/run/step-000003").exists() == (c.save_every == 3)
    held = tasks.rows(c, tok, "val")[:-1 if is_text else None][:c.eval_rows]
    held = continued(target, held, c, torch.Generator().manual_seed(c.seed), is_text)
    for prefix, model in (("start_", begin), ("", draft)):
        for k, x in near(target, model, held, tok.vocab_size).items():
            assert abs(numbers[prefix + k] - x) < 2e-4
    assert (f"overlap {numbers['start_overlap']:.3f} -> {numbers['overlap']:.3f}, kl "
            f"{numbers['start_kl']:.3f} -> {numbers['kl']:.3f}") in capsys.readouterr().out


# --- a race ---------------------------------------------------------------------------------------


class Clock:
    """A clock that goes on where the functions under it are called, by their own seconds."""
    now = 0.0

    def __call__(self, device):
        return self.now

    def under(self, fn, seconds):
        @functools.wraps(fn)
        def timed(*args, **kw):
            self.now += seconds(*args)
            return fn(*args, **kw)
        return timed


def test_a_race_decodes_alike_and_times_all_but_its_beginning(pair, monkeypatch):
    argv, c, f = settings("--steps", "0", "--prompts", "5", "--together", "2", "--temperature",
                          "0.8", "--top_k", "7", "--top_p", "0.9", "--lenience", "0.7",
                          "--length", "optimal", "--gamma", "3", "--max_new", "9", "--prompt", "6",
                          "--seed", "2")
    clock = Clock()
    monkeypatch.setattr(specdec, "clock", clock)
    monkeypatch.setattr(specdec, "measure_costs", lambda *rest: costs.append(rest) or COST)
    monkeypatch.setattr(specdec, "generate", clock.under(specdec.generate, lambda *rest: 2.0))
    monkeypatch.setattr(specdec, "speculate", clock.under(
        specdec.speculate, lambda target, drafter, *rest: 3.0 if drafter.model else 0.5))
    calls, costs = catch(monkeypatch, specdec, "speculate", "generate", "verify",
                         "LENGTHS.optimal"), []
    numbers = specdec.main(argv)
    (target, tok), draft = opened("target", c), opened("draft", c)[0]
    prompts = [[*p, *y][:6] for p, y in tasks.rows(c, tok, "val")[:-1]][:5]
    parts = [prompts[:2], prompts[:2], prompts[2:4], prompts[4:]]      # the first only warms up
    plain = [x for x in calls["generate"] if x.max_new_tokens == 9]
    small = [x for x in calls["speculate"] if x.drafter.model]
    looks = [x for x in calls["speculate"] if not x.drafter.model]
    assert len(calls["speculate"]) == 8 and calls["speculate"][::2] == looks
    for runs in (plain, small, looks):
        assert [x.prompts for x in runs] == parts
        assert [x.generator.initial_seed() for x in runs] == [200_006 + i for i in range(4)]
        assert all((x.temperature, x.top_k, x.top_p) == (0.8, 7, 0.9) for x in runs)
    assert all(same_weights(x.target, target) and x.lenience == 0.7 for x in small + looks)
    assert all(x.length_rule.keywords["gamma"] == 3 and x.facts["cost"] == COST for x in small)
    assert {x.lenience for x in calls["verify"]} == {0.7}
    assert {id(x.tally) for x in calls["optimal"]} == {id(x.tally) for x in small + looks}
    assert all(x.cost == COST for x in calls["optimal"])
    drafter = small[0].drafter
    assert same_weights(drafter.model, draft) and drafter.sampling == (0.8, 7, 0.9)
    assert (drafter.vocab, drafter.words) == (320, 261)
    rate = sum(x.out.mask.sum().item() for x in plain[1:]) / 6
    assert close(numbers["plain_tokens_per_second"], rate)
    for name, runs, seconds in (("draft", small, 9.0), ("lookup", looks, 1.5)):
        tokens = sum(x.out[0].mask.sum().item() for x in runs[1:])
        assert close(numbers[f"{name}_speedup"], tokens / seconds / rate)
        assert close(numbers[f"{name}_efficiency"],
                     (tokens - 5) / sum(x.out[0].row_steps for x in runs[1:]))
        assert len({id(x.tally) for x in runs[1:]}) == 1 and runs[0].tally is not runs[1].tally
    assert [x[1] and same_weights(x[1], draft) for x in costs] == [None, True]
    assert [x[2:] for x in costs] == [(2, 6 + 9 // 2, 3)] * 2      # rows, half-way, the longest


def test_lookup_drafts_alone_and_with_its_own_length(pair, monkeypatch):
    calls = catch(monkeypatch, specdec, "speculate")
    numbers = specdec.main(merged("--config", "lookup,tiny", "--n", "2", "--device", "cpu",
                                  "--data", "few.txt", "--init", "target"))
    assert numbers["lookup_same"] == 1 and not any(k.startswith("draft_") for k in numbers)
    assert {(x.drafter.n, x.length_rule.keywords["gamma"]) for x in calls["speculate"]} == {(2, 8)}


def test_every_preset_and_every_row_has_a_test_here():
    lessons = [specdec.PRESETS.get(x, {}) | {"": x} for x in ("docs", "adaspec", "arena", "tiny")]
    decoders = "ead", "at_once", "deal", "genarm", "self_eval", "equilibrium"
    others = {*decoders, "lookup", "omnidraft", "lora"}                  # see test_adapters.py
    assert {*specdec.PRESETS} == {x[""] for x in lessons} | others
    words = {word for argv in LESSONS.values() for word in argv} | {"every", "data", "forward_kl"}
    for table in (specdec.LOSSES, specdec.SELECT, specdec.SOURCES):
        assert {*table} <= words | {"adaspec"}


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_the_numbers_of_a_race_by_hand():
    tally = specdec.Tally()
    for kept, count in (([2, 0], [2, 2]), ([1, 1], [3, 1])):
        tally.note(torch.tensor(kept), torch.tensor(count), torch.full((2, max(count)), .55))
    tally.tokens, said = 8, []
    lane, run = SimpleNamespace(tally=tally, seconds=2.0), SimpleNamespace(say=said.append)
    monkey = SimpleNamespace(per_token=1.0)
    found = specdec.table(run, dict(x=monkey), dict(x=lane), dict(x=dict(cost=COST)), 4, 1.5)
    assert close([found[f"x_{k}"] for k in ("tokens_per_second", "speedup", "acceptance",
                                            "kept_of_drafted", "efficiency", "drafts")],
                 [(8 + 4) / 2, 6 / 1.5, 4 / 6, 4 / 8, 8 / 4, (2 + 3) / 2])
    assert found["plain_tokens_per_second"] == 1.5
    assert said[-1].endswith("were kept: 0.75 0.50")


def test_where_greedy_outputs_part_the_target_s_two_likeliest_are_compared():
    target = tiny_model()
    best = target.logits(target(torch.tensor([[1, 2, 3, 4]]))[0, -1]).topk(2).values
    for a, b in (([3, 4, 5], [3, 4, 6]), ([3, 4, 5, 1], [3, 4]), ([3, 4], [3, 4, 5, 1])):
        assert close(specdec.gap(target, a, b, [1, 2]), best[0] - best[1], 1e-9)
    assert specdec.gap(target, [3, 4], [3, 4], [1, 2]) is None


@pytest.mark.parametrize("dtype, gap, word", [
    (torch.float32, 5e-4, "rounding"), (torch.float32, 2e-3, "WRONG"),
    (torch.bfloat16, 0.05, "rounding"), (torch.bfloat16, 0.2, "WRONG")])
def test_outputs_that_differ_by_more_than_rounding_are_told(dtype, gap, word):
    said, target = [], SimpleNamespace(head=torch.zeros(1, dtype=dtype))
    lanes = dict(x=SimpleNamespace(gaps=[None, gap, None, gap / 2]),
                 y=SimpleNamespace(gaps=[None] * 4))
    found = specdec.equality(SimpleNamespace(say=said.append), lanes, target)
    assert found == dict(widest_gap=gap, x_same=0.5, y_same=1.0)
    assert "x 2 of 4, y 4 of 4" in said[0] and word in said[1]


def test_the_numbers_of_a_translated_draft_by_hand():
    drafter = object.__new__(specdec.Translated)
    drafter.passes, drafter.places = 12, 4
    drafter.cache = SimpleNamespace(hits=3, read=5)
    assert specdec.translation(None, {}, drafter) == dict(per_token=3.0, cache_knew=0.6)
    assert specdec.translation(None, {}, specdec.Lookup()) == {}


@pytest.mark.parametrize("mode, sampling", [("point", (0, 0, 1.0)), ("ngram", (0.5, 3, 0.8))])
def test_omnidraft_puts_the_draft_s_words_behind_a_cache_of_the_target_s(mode, sampling, pair,
                                                                         monkeypatch, capsys):
    tok = train_bpe((pair / "few.txt").read_text()[:3000], 280)
    lively((2, 48), 288, tok, pair / "words", 3)
    argv, c, f = settings("--config", "omnidraft,tiny", "--init", "words", "--mode", mode,
                          "--temperature", "0.5", "--top_k", "3", "--top_p", "0.8")
    calls = catch(monkeypatch, specdec, "DRAFTERS.omnidraft")
    numbers = specdec.main(argv)
    out, = [x.out for x in calls["omnidraft"]]
    assert same_weights(out.model, opened("draft", c)[0]) and out.vocab == 288
    assert out.cache.draft.tokens == bytes_tokenizer().tokens
    assert out.cache.words == {i: x for i, x in enumerate(tok.tokens) if i < 275}
    assert out.sampling == sampling and out.lossy == (mode == "ngram") and out.longest == 32
    assert ("lossy" in capsys.readouterr().out) == (mode == "ngram")
    assert numbers["draft_cache_knew"] == 1 and numbers["draft_per_token"] == out.per_token
    assert not {"overlap", "kl"} & numbers.keys()                 # nothing is trained or compared


# --- the other decoders ---------------------------------------------------------------------------


def decoder(name, *argv):
    """A decoder's command line, and what it comes to."""
    argv = merged("--config", f"{name},tiny", "--out", "out/run", "--device", "cpu", *argv)
    return argv, *configure(specdec.Config, specdec.PRESETS, specdec.AXES, "", argv,
                            specdec.readers)


def graded(problem, answer, done=True):
    """A reward that depends on the problem, on what is stated, and on whether the text ended."""
    return done * ((int(stated(answer)) + len(problem["prompt"])) % 5) / 4


def stated(answer):
    """What a text states: by its letters, for random models."""
    return str(sum(map(ord, answer)) % 5)


@pytest.fixture
def chains(workdir, monkeypatch):
    """The chain task, short and with other rewards, for which random models are good enough."""
    monkeypatch.setattr(tasks.Chain, "max_new", 30)
    monkeypatch.setattr(tasks.Chain, "reward", lambda self, *rest: graded(*rest))
    monkeypatch.setattr(tasks.Chain, "stated", lambda self, answer: stated(answer))
    for name, shape, seed in (("policy", (1, 48), 0), ("low", (1, 16), 1), ("middle", (2, 16), 2)):
        lively(shape, 40, tasks.chain_tokenizer(), workdir / name, seed)
    return workdir


def matrices(model):
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize("name", ["ead", "at_once"])
def test_ead_asks_the_larger_model_where_the_smaller_is_uncertain(name, chains, monkeypatch):
    asked = []

    def base(recipe, like, model, **kw):
        asked.append((recipe, like, model, kw))
        return {"1x32": "low", "1x64": "middle"}[model]
    monkeypatch.setattr(specdec.sft, "base", base)
    monkeypatch.setattr(tasks.Chain, "reward",
                        lambda self, p, x, done: sum(map(ord, x)) % 7 + len(p["prompt"]) + done / 4)
    more = ["--window", "3", "--stay", "2"] * (name == "ead")
    argv, c, f = decoder(name if name == "ead" else "ead,at_once", "--init", "policy", "--prompts",
                         "3", "--thresholds", "1.5,3", "--seed", "1", *more)
    calls = catch(monkeypatch, specdec, "by_turns", "switching", "uncertain", "coin")
    numbers = specdec.main(argv)
    (large, tok), low, middle = (opened(x, c) for x in ("policy", "low", "middle"))
    assert asked == [("chain_right", c.config, m, dict(device="cpu", seed=1))
                     for m in ("1x32", "1x64")]
    world, rows = tasks.task("chain"), {}
    problems = world.problems("val", 3, 1)
    for arm, call, i in zip(("large", "small", "middle", "EAD@1.5", "coin@1.5", "EAD@3",
                             "coin@3"), calls["by_turns"], range(7), strict=True):
        lesser = middle[0] if arm == "middle" else low[0]
        assert same_weights(call.models[0], lesser) and same_weights(call.models[1], large)
        found = calls["switching"][3 * i:3 * i + 3]
        a, outs = matrices(lesser) / matrices(large), [x.out for x in found]
        assert [x.prompt for x in found] == [tok.prompt(p) for p in problems]
        share = sum(sum(x.large) for x in outs) / sum(len(x.ids) for x in outs)
        rows[arm] = dict(
            accuracy=sum(world.reward(p, tok.decode(x.ids), x.ids[-1] == tok.eos)
                         for p, x in zip(problems, outs)) / 3,
            share=share, cost=share + (1 - share) * a,
            work=sum(x.read[0] * a + x.read[1] for x in outs))
        if arm in ("large", "small", "middle"):
            alone = large if arm == "large" else lesser
            plain = generate(alone, [tok.prompt(p) for p in problems], 30, temperature=0)
            assert [[t for t in x.ids if t != tok.eos] for x in outs] == plain.completions()
    for arm, row in rows.items():
        row["work"] /= rows["large"]["work"] if arm != "large" else 1
        name, _, at = arm.partition("@")
        for k, x in row.items():
            assert close(numbers[f"{name}|{k}" + f"@{at}" * bool(at)],
                         1.0 if arm == "large" and k == "work" else x), (arm, k)
    assert close(numbers["over_coin"], sum(rows[f"EAD@{t}"]["accuracy"]
                                           - rows[f"coin@{t}"]["accuracy"] for t in ("1.5", "3"))
                 / 2) and numbers["over_coin"] != 0
    window, stay = (3, 2) if more else (1, 1)
    assert {(x.window, x.stay) for x in calls["uncertain"]} == {(window, stay)}
    assert {x.threshold for x in calls["uncertain"]} == {1.5, 3}
    assert {(x.share, x.stay) for x in calls["coin"]} == {
        (rows[f"EAD@{t}"]["share"], stay) for t in ("1.5", "3")}


def brute_best(proxy, value, n):
    """The mean, over all n of the samples, of the value of the one with the largest proxy."""
    means = []
    for a, b in zip(proxy.tolist(), value.tolist()):
        picks = [b[max(some, key=a.__getitem__)]
                 for some in itertools.combinations(range(len(a)), n)]
        means.append(sum(picks) / len(picks))
    return sum(means) / len(means)


def judged(self, prompt, answer, done=True):
    """Which rules a text obeys, and what it is worth: by its letters, for random models."""
    hard = (sum(map(ord, answer)) + len(prompt)) % 5 / 4
    return dict(hard=hard, gold=hard + len(answer) % 3 + 10 * done)


@pytest.fixture
def wishes(workdir, monkeypatch):
    """A random model of the instructions whose rules can be judged."""
    monkeypatch.setattr(prefs.ToyIF, "judge", judged)
    lively((1, 48), 80, prefs.tokenizer(), workdir / "policy", 0)
    return workdir


def test_deal_looks_ahead_and_best_of_n_costs_as_much(wishes, monkeypatch):
    argv, c, f = decoder("deal", "--init", "policy", "--prompts", "5", "--seed", "1", "--ahead",
                         "3", "--beams", "2", "--expansions", "3", "--weight", "2.0")
    calls = catch(monkeypatch, specdec, "search", "generate", "judged_rows", "obeyed")
    rolls, numbers = calls["generate"], specdec.main(argv)
    tok, world = opened("policy", c)[1], prefs.ToyIF()
    problems = world.problems("val", 5, 1)

    def hard(i, ids):
        return world.judge(problems[i]["prompt"], tok.decode(ids))["hard"]
    assert all(x.out == hard(x.i, x.ids) for x in calls["obeyed"])
    arms = ["greedy", "sample", "beam search", "prefix", "DeAL", "best of n as prefix",
            "best of n as DeAL"]
    judged = dict(zip(arms, calls["judged_rows"], strict=True))
    searches = dict(zip(arms[2:5], calls["search"], strict=True))
    mine = [x for x in rolls if x.max_new_tokens == world.max_new]
    samples = dict(zip([arms[0], arms[1], *arms[5:]], mine, strict=True))
    for arm, call in judged.items():
        found = [world.judge(p["prompt"], tok.decode(y), done)
                 for p, y, done in zip(problems, call.ids, call.done, strict=True)]
        for k in ("gold", "hard"):
            assert close(numbers[f"{arm}|{k}"], sum(x[k] for x in found) / 5)
        assert close(numbers[f"{arm}|tokens"], call.tokens / 5)
    for arm, call in searches.items():
        ahead, weight = (3 if arm == "DeAL" else 0), (0.0 if arm == "beam search" else 2.0)
        assert (call.new, call.weight, call.beams, call.expansions) == (12, weight, 2, 3)
        assert call.complete.__self__.ahead == ahead and call.stop == {tok.eos}
        assert call.prompts == [tok.prompt(p) for p in problems]
        assert judged[arm].ids == [b.ids for b in call.out]
        assert judged[arm].done == [b.finished for b in call.out]
        assert judged[arm].tokens == call.complete.__self__.spent
    for arm, call in samples.items():
        n, roll = call.samples, call.out
        assert call.prompts == [tok.prompt(p) for p in problems]
        assert call.temperature == (0 if arm == "greedy" else 1)
        assert call.generator.initial_seed() == 1001 and judged[arm].tokens == roll.mask.sum()
        if arm.startswith("best"):
            like = arm.removeprefix("best of n as ")
            assert n == round(judged[like].tokens / judged["sample"].tokens) == numbers[f"{arm}|n"]
        ids, done, logp = roll.completions(), roll.finished.tolist(), roll.logp.sum(1).tolist()
        for i in range(5):
            best = max(range(n * i, n * i + n),
                       key=lambda j: (hard(i, ids[j]) if done[j] else -1, logp[j]))
            assert judged[arm].ids[i] == ids[best] and judged[arm].done[i] == done[best]
    assert samples["best of n as DeAL"].samples > samples["best of n as prefix"].samples > 1


def test_the_reader_of_a_search_counts_what_it_computes():
    target = tiny_model(eos=(0,))
    reader = specdec.Reader(target, 0, 6)
    texts = [[1, 2, 3], [4], [5, 6, 7, 1, 2]]
    logp = reader.expand(texts)
    for x, row in zip(texts, logp):
        assert close(row, target.logits(target(torch.tensor([x]))[0, -1]).log_softmax(-1), 1e-9)
    assert reader.spent == 3
    found = reader.complete(texts)
    plain = generate(target, texts, 6, temperature=0)
    assert found == list(zip(plain.completions(), plain.finished.tolist()))
    assert reader.spent == 3 + plain.mask.sum() and reader.complete([]) == []
    assert specdec.Reader(target, 0, 0).complete(texts) == [((), False)] * 3


def check_arm(c, begin, tok, world, numbers):
    """The reward model that was saved is the one that plain code teaches.   -> it"""
    arm = opened("policy", c)[0]
    made = {split: prefs.encode_pairs(world.pairs(24, seed, split), tok, 384)
            for split, seed in (("train", 1), ("val", 2))}

    def sides(model, row):
        return [log_prob(model, row["prompt"], row[side]) for side in ("chosen", "rejected")]

    def loss_of(step):
        pairs = [sides(arm, made["train"][i])
                 for i in batch_indices(len(made["train"]), 4, step, 1).tolist()]
        right = sum((a > b).item() + (a == b).item() / 2 for a, b in pairs) / 4
        return -sum(torch.sigmoid(0.05 * (a - b)).log() for a, b in pairs) / 4, dict(accuracy=right)
    arm, log = trained(arm, c, loss_of)
    learned = load("out/run/arm", "cpu")[0].requires_grad_(False)
    assert moved(learned, arm, begin) < 1e-3
    for mine, line in zip(log, open("out/run/log.jsonl"), strict=True):
        theirs = json.loads(line)
        assert close([theirs[k] for k in mine], [*mine.values()], 2e-3)
    right = [a > b for a, b in (sides(learned, row) for row in made["val"])]
    assert close(numbers["pair_accuracy"], sum(right) / len(right))
    return learned


def test_genarm_learns_from_pairs_and_guides_by_what_it_learned(wishes, monkeypatch):
    argv, c, f = decoder("genarm", "--init", "policy", "--prompts", "3", "--seed", "1", "--alphas",
                         "0.5,2", "--lr", "0.01", "--warmup", "2", "--clip", "0.02", "--pairs",
                         "24", "--samples", "4", "--batch", "4", "--steps", "4")
    calls = catch(monkeypatch, specdec, "generate")
    numbers = specdec.main(argv)
    (begin, tok), world = opened("policy", c), prefs.ToyIF()
    learned = check_arm(c, begin, tok, world, numbers)
    problems, rolls = world.problems("val", 3, 1), calls["generate"]
    arms = [("base", 0.0, learned, 1)]
    for x in ("0.5", "2"):
        arms += [(f"GenARM@{x}", float(x), learned, 2), (f"cooled@{x}", float(x), begin, 1)]
    assert all(x.prompts == [tok.prompt(p) for p in problems] and same_weights(x.model, begin)
               and x.max_new_tokens == 12 for x in rolls)
    for (name, alpha, other, cost), call in zip(arms, rolls):
        assert same_weights(call.contrast[0], other) and call.generator.initial_seed() == 1001
        # ((1 + a) l - a l_arm) / T = l + α l_arm
        assert close([(1 + call.contrast[1]) / call.temperature,
                      -call.contrast[1] / call.temperature], [1, alpha])
        kl, gold = gaps(call.out, begin, tok, world, problems)
        at = name.replace("@", "|{}@") if "@" in name else name + "|{}"
        assert close([numbers[at.format(k)] for k in ("kl", "gold", "cost")], [kl, gold, cost],
                     1e-4)
    last = rolls[5].out
    assert rolls[5].samples == 4 and rolls[5].generator.initial_seed() == 1002 and len(rolls) == 6
    proxy = torch.stack([log_prob(learned, tok.prompt(problems[i // 4]), row[m > 0].tolist())
                         for i, (row, m) in enumerate(zip(last.tokens, last.mask))]).view(3, 4)
    score = torch.tensor([world.reward(problems[i // 4], tok.decode(y), d) for i, (y, d) in
                          enumerate(zip(last.completions(), last.finished.tolist()))]).view(3, 4)
    for n in (2, 4):
        assert close([numbers[f"best of|{k}@{n}"] for k in ("gold", "kl", "cost")],
                     [brute_best(proxy, score, n), math.log(n) - (n - 1) / n, 2 * n], 1e-5)
    assert "best of|gold@8" not in numbers


def gaps(roll, base, tok, world, problems):
    """KL of the sampler to the base, as sampled, and the mean reward."""
    kl, gold = [], []
    for p, row, m, logp, y, d in zip(problems, roll.tokens, roll.mask, roll.logp,
                                     roll.completions(), roll.finished.tolist()):
        kl.append((logp.sum() - log_prob(base, tok.prompt(p), row[m > 0].tolist())).item())
        gold.append(world.reward(p, tok.decode(y), d))
    return sum(kl) / len(kl), sum(gold) / len(gold)


# --- self-evaluation and the consensus game -------------------------------------------------------


def verdicts(model, ids, prompt, part):
    """What is said after a part of an answer: log-probs of (NO, YES), and of (RIGHT, WRONG)."""
    z = model.logits(model(torch.tensor([[*prompt, *part, ids.ask, ids.check]]))[0, -2:])
    return (z[0, [ids.no, ids.yes]].log_softmax(-1), z[1, [ids.right, ids.wrong]].log_softmax(-1))


def rivals(score):
    """How often each is better than another of its row, a tie half."""
    out = []
    for row in score.tolist():
        for i, x in enumerate(row):
            wins = [1 if x > y else 0.5 * (x == y) for j, y in enumerate(row) if j != i]
            out.append(sum(wins) / len(wins))
    return out


P, IDS = 9, SimpleNamespace(right=28, wrong=29, check=30, ask=31, no=32, yes=33)


def check_policy(c, target, begin, tok, call):
    """The policy that was saved is the one that plain code teaches, on these samples.   -> it"""
    lessons, world = call.lessons, tasks.task("chain")
    problems = world.problems("train", 6, c.seed)
    answers = lessons.answers
    assert lessons.prompts == [tok.prompt(p) for p in problems for _ in range(c.samples)]
    ends = [y[-1] == tok.eos for y in answers]
    score = [graded(problems[i // c.samples], tok.decode(y), ends[i])
             for i, y in enumerate(answers)]
    label = rivals(torch.tensor(score).view(-1, c.samples))
    assert close(lessons.score, score) and close(lessons.rival, label)
    assert len({*score}) > 1 and any(ends) and not all(ends)
    g = torch.Generator().manual_seed(1000 * c.seed + 4)
    half, where = torch.rand(2, c.steps, c.batch, generator=g)
    model = begin

    def loss_of(step):
        nats, count, asked, checked = 0.0, 0, [], []
        for j, i in enumerate(batch_indices(len(answers), c.batch, step, c.seed).tolist()):
            prompt, y = lessons.prompts[i], answers[i]
            part = y[:int(where[step, j] * len(y)) + 1] if half[step, j] < 0.5 else y
            no, right = verdicts(model, IDS, prompt, part)
            asked.append(-label[i] * no[0] - (1 - label[i]) * no[1])
            checked.append(-score[i] * right[0] - (1 - score[i]) * right[1])
            under = [*prompt, IDS.right if score[i] > 0 else IDS.wrong]
            each = predictions(model, [(prompt, part)], None)[range(len(part)), part]
            own = torch.tensor(part) < IDS.right     # a random model says control tokens, too
            nats -= each[own].sum() + log_prob(model, under, y)
            count += own.sum() + len(y)
        parts = nats / count, sum(asked) / c.batch, sum(checked) / c.batch
        return sum(parts), dict(zip(("nats", "asked", "checked"), (x.item() for x in parts)))
    model, log = trained(model, c, loss_of)
    learned = load("out/run/policy", "cpu")[0]
    assert moved(learned, model, target) < 1e-3
    for mine, line in zip(log, open("out/run/log.jsonl"), strict=True):
        theirs = json.loads(line)
        assert close([theirs[k] for k in mine], [*mine.values()], 2e-3)
    return learned.requires_grad_(False)


def check_tries(x, learned, tok, c, split, salt):
    """Samples of a split, and what the policy says of each."""
    world, n = tasks.task("chain"), c.samples
    assert x.problems == world.problems(split, c.prompts, c.seed + salt)
    for i, (p, y) in enumerate(x.rows):
        a, b, problem = i // n, i % n, x.problems[i // n]
        assert p == tok.prompt(problem) and x.length[a, b] == len(y)
        no, right = verdicts(learned, IDS, p, y)
        assert close([x.no[a, b], x.right[a, b]], [no[0].exp(), right[0].exp()], 1e-4)
        z = predictions(learned, [(p, y)], None).index_fill(-1, torch.arange(28, 34), -math.inf)
        assert close(x.logp[a, b], z.log_softmax(-1)[range(len(y)), y].sum(), 1e-3)
        done = y[-1] == tok.eos
        assert x.score[a, b] == graded(problem, tok.decode(y), done)
        assert x.stated[a][b] == (stated(tok.decode(y)) if done else "")


def learning(name, chains, monkeypatch, *names):
    """A run of a decoder that learns to judge itself; its calls, settings, models and numbers."""
    argv, c, f = decoder(name, "--init", "policy", "--prompts", str(P), "--seed", "1", "--samples",
                         "4", "--train_prompts", "6", "--steps", "4", "--batch", "4", "--lr",
                         "0.01", "--warmup", "2", "--clip", "0.5", "--split", "ood")
    calls = catch(monkeypatch, specdec, "lesson_loss", "tried", "generate", *names)
    numbers = specdec.main(argv)
    (target, tok), begin = opened("policy", c), opened("policy", c)[0]
    learned = check_policy(c, target, begin, tok, calls["lesson_loss"][0])
    first = calls["generate"][0]
    assert same_weights(first.model, target) and first.generator.initial_seed() == 1003
    return calls, numbers, c, target, learned, tok


def ranking(x, good):
    """The chance that a good sample is ahead of a bad one, a tie half."""
    pairs = [(a, b) for a in x[good].tolist() for b in x[~good].tolist()]
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


def stopping(p, score, threshold):
    """Sampling until one is good enough, over all places to begin: its score, samples used."""
    values, used = [], []
    for row, r in zip(p.tolist(), score.tolist()):
        for k in range(len(row)):
            turn = [(row[i - k], r[i - k]) for i in range(len(row))]
            n = next((i + 1 for i, x in enumerate(turn) if x[0] >= threshold), len(row))
            values.append(max(turn[:n])[1])
            used.append(n)
    return sum(values) / len(values), sum(used) / len(used)


def elected(answers, score, weights):
    """Mean score of the answers of largest total weight, where one is stated."""
    out = []
    for names, r, w in zip(answers, score.tolist(), weights.tolist()):
        best = max(dict.fromkeys(names), key=lambda a: (a != "", sum(
            x for x, b in zip(w, names) if a == b)))
        out.append(r[names.index(best)])
    return sum(out) / len(out)


def worth_of(roll, problems, tok):
    """What each row of a rollout is worth."""
    n = len(roll.tokens) // len(problems)
    return [graded(problems[i // n], tok.decode(y), d) for i, (y, d) in enumerate(
        zip(roll.completions(), roll.finished.tolist()))]


def ballots(tries, n):
    """What the vote of n neighbours is worth, from every place, the first after the last."""
    N, score = 4, tries.score
    turns = [[(k + i) % N for i in range(n)] for k in range(N if n < N else 1)]
    return sum(elected([[s[j] for j in at] for s in tries.stated], score[:, at],
                       torch.ones(P, n)) for at in turns) / len(turns)


def signals(tries, half, place):
    """What each signal is worth, and how it ranks good samples before bad ones."""
    score, good, going = tries.score, tries.score > 0, tries.length > place
    out = {"vote|accuracy": elected(tries.stated, score, torch.ones(P, 4)),
           "weighted vote|accuracy": elected(tries.stated, score, tries.right),
           "some right|accuracy": good.any(1).float().mean(),
           "one sample|accuracy": score.mean(),
           "... if unfinished|auroc": ranking(half[going], good[going])}
    for arm, x in {"P(NO)": tries.no, "P(correct)": tries.right, "P(NO) at the cut": half,
                   "mean log-prob": tries.logp / tries.length}.items():
        out |= {f"{arm}|accuracy": brute_best(x, score, 4), f"{arm}|auroc": ranking(x, good)}
    return out


def lowest(p, score):
    """The lowest of 51 quantiles that keeps 0.9 of the gain of the best of 4."""
    one, top = score.mean().item(), brute_best(p, score, 4)
    grid = sorted(p.flatten().tolist())
    grid = [np.interp(i / 50 * (len(grid) - 1), range(len(grid)), grid) for i in range(51)]
    return next((t for t in grid if stopping(p, score, t - 1e-7)[0] >= one + 0.9 * (top - one)
                 - 1e-6), grid[-1])


def stopped(tries, tune, prices, chosen):
    """Rows of sampling that stops; prices(cost): the best and the vote of as many samples."""
    rate, out = tries.logp / tries.length, {}
    rival = lowest(tune.logp / tune.length, tune.score)
    for arm, x, t in [("adaptive", tries.no, t) for t in (0.3, 0.4, 0.5, 0.6, 0.7)] + [
            ("P(NO), chosen", tries.no, chosen), ("log-prob, chosen", rate, rival)]:
        value, used = stopping(x, tries.score, t)
        top, one = brute_best(x, tries.score, 4), brute_best(tries.no, tries.score, 1)
        row = dict(accuracy=value, samples=used, **prices(used),
                   gain_kept=(value - one) / (top - one) if top > one else 0)
        out |= {f"{arm}|{k}" + f"@{t:g}" * (arm == "adaptive"): v for k, v in row.items()}
    return out


def pruned(p, tries, place, prices):
    """A row where half of the samples go on after some tokens."""
    right, tokens, length = 0.0, 0, tries.length.tolist()
    for a in range(P):
        alive = sorted(range(4), key=lambda j: -p[a, j])[:2]
        right += tries.score[a, max(alive, key=lambda j: tries.no[a, j])].item() / P
        tokens += sum(min(n, place) + max(n - place, 0) * (j in alive)
                      for j, n in enumerate(length[a])) / P
    tokens /= tries.length.double().mean().item()
    one, top = (brute_best(tries.no, tries.score, n) for n in (1, 4))
    return dict(accuracy=right, tokens=tokens / 4, **prices(tokens),
                gain_kept=(right - one) / (top - one) if top > one else 0)


def annealed(rolls, learned, tries, tok):
    """The best of n by P(NO), the k-th drawn at a temperature of its own."""
    said = [[verdicts(learned, IDS, p, row[m > 0].tolist())[0][0].item() for p, row, m in zip(
        x.prompts, x.out.tokens, x.out.mask)] for x in rolls]
    said = torch.tensor(said).T                                                          # [P, N]
    worth = torch.tensor([worth_of(x.out, tries.problems, tok) for x in rolls]).T
    return {f"annealed|accuracy@{n}": worth[range(P), said[:, :n].argmax(1)].mean()
            for n in (1, 2, 3, 4)}


def test_self_evaluation_learns_from_its_rivals_and_is_judged_by_what_it_says(chains, monkeypatch):
    calls, numbers, c, target, learned, tok = learning("self_eval", chains, monkeypatch, "asked")
    tune, tries = (x.out for x in calls["tried"])
    check_tries(tune, learned, tok, c, "train", 5)
    check_tries(tries, learned, tok, c, "ood", 6)
    best = [brute_best(tries.no, tries.score, n) for n in (1, 2, 3, 4)]
    votes = [ballots(tries, n) for n in (1, 2, 3, 4)]

    def prices(cost):
        return {k: np.interp(cost, [1, 2, 3, 4], x) for k, x in (("fixed", best), ("vote", votes))}
    place = round(0.5 * tune.length.double().mean().item())
    half = torch.tensor([verdicts(learned, IDS, p, y[:place])[0][0].exp()
                         for p, y in tries.rows]).view(P, 4)
    drawn = {x.generator.initial_seed(): x for x in calls["generate"]}
    assert same_weights(drawn[1007].model, target) and drawn[1007].samples == 4
    before = worth_of(drawn[1007].out, tries.problems, tok)
    assert abs(numbers["threshold"] - lowest(tune.no, tune.score)) < 1e-5
    warm = [drawn[1041 + k] for k in range(4)]
    assert [x.temperature for x in warm] == [0, 0.5, 0.75, 0.875]
    for x, asked in zip(warm, calls["asked"][-4:], strict=True):
        assert asked.rows == [(p, row[m > 0].tolist())
                              for p, row, m in zip(x.prompts, x.out.tokens, x.out.mask)]
    assert all((x.model.logits(rand(1, 48).float())[:, 28:34] == -math.inf).all() for x in warm)
    lots = [pruned(torch.rand(P, 4, generator=torch.Generator().manual_seed(1010 + i)), tries,
                   place, prices) for i in range(20)]
    expected = signals(tries, half, place) | annealed(warm, learned, tries, tok) | {
        "before training|accuracy": sum(before) / len(before)}
    expected |= stopped(tries, tune, prices, numbers["threshold"])
    expected |= {f"annealed|fixed@{n}": best[n - 1] for n in (1, 2, 3, 4)}
    for k, x in pruned(half, tries, place, prices).items():
        expected |= {f"pruned|{k}": x, f"pruned by lot|{k}": sum(row[k] for row in lots) / 20}
    wrong = {k: (numbers[k], float(x)) for k, x in expected.items()
             if abs(numbers[k] - float(x)) > 2e-3}
    assert not wrong and {*numbers} - {*expected} == {"threshold"}


def by_lot(generator, discriminator, *, rounds=5000, eta=0.1, lam=0.1):
    """Another game, so that its four outcomes rank answers differently."""
    g = torch.Generator().manual_seed(rounds + 2)
    return tuple(torch.rand(generator.shape, generator=g) for _ in range(2))


def test_the_game_is_played_with_what_generator_and_discriminator_say(chains, monkeypatch):
    monkeypatch.setattr(specdec, "consensus", by_lot)
    calls, numbers, c, _, learned, tok = learning("equilibrium", chains, monkeypatch, "consensus")
    tries, = (x.out for x in calls["tried"])
    check_tries(tries, learned, tok, c, "ood", 6)
    first, last = calls["consensus"]
    assert first.rounds == 0 and (last.rounds, last.eta, last.lam) == (50, 0.1, 0.1)
    names = []
    for i, (said, logp, right) in enumerate(zip(tries.stated, tries.logp, tries.right)):
        here = [a for a in dict.fromkeys(said) if a] or [""]
        names.append(here)
        for v, verdict in enumerate((IDS.right, IDS.wrong)):
            ratio = [(log_prob(learned, [*p, verdict], y) - x).exp().item()
                     for (p, y), x in zip(tries.rows[4 * i:4 * i + 4], logp)]
            gen = [sum(r for r, b in zip(ratio, said) if a == b) / 4 for a in here]
            dis = [max(r for r, b in zip(right.tolist(), said) if a == b) for a in here]
            dis = [1 - x if v else x for x in dis]
            rest = 4 - len(here)
            assert close(first.generator[i, v], gen + [0] * rest, 2e-3 * max(1, *gen))
            assert close(first.discriminator[i, v], dis + [0.5] * rest, 1e-4)
    assert torch.equal(first.generator, last.generator)
    assert torch.equal(first.discriminator, last.discriminator)

    def mean(by):
        out = []
        for i, here in enumerate(names):
            best = max(range(len(here)), key=lambda j: by[i, 0, j])
            out.append(tries.score[i, tries.stated[i].index(here[best])].item())
        return sum(out) / len(out)
    score, ones = tries.score, torch.ones(P, 4)
    expected = {
        "one sample": score.mean(), "vote": elected(tries.stated, score, ones),
        "weighted vote": elected(tries.stated, score, tries.right),
        "best sample by P(correct)": brute_best(tries.right, score, 4),
        "best sample by mean log-prob": brute_best(tries.logp / tries.length, score, 4),
        "generator P(a|correct)": mean(first.generator), "generator, first": mean(first.out[0]),
        "discriminator P(correct|a)": mean(first.discriminator),
        "discriminator, first": mean(first.out[1]), "equilibrium": mean(last.out[1]),
        "equilibrium, generator": mean(last.out[0]),
        "some right": (score > 0).any(1).float().mean()}
    assert len({mean(x) for x in (*first.out, *last.out)}) == 4
    wrong = {k: (numbers[f"{k}|accuracy"], float(x)) for k, x in expected.items()
             if abs(numbers[f"{k}|accuracy"] - float(x)) > 1e-4}
    assert not wrong and len(expected) == sum("|" in k for k in numbers)
