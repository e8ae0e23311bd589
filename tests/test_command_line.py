"""model.py's command line: a completion, a chat, evaluations, exports; and how a folder wants to be
sampled."""
import io
import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoints import SAMPLED, read, write
from test_model import ids, small

import model as M
from data.run import UserError
from data.tokenizer import bytes_tokenizer
from model import ScalarModel, generate, load, pick, save, sequence_score, token_logprobs


@pytest.fixture
def folder(tmp_path):
    """A small llama's folder: byte tokens, ChatML, a context of 96."""
    save(small("llama"), bytes_tokenizer(), tmp_path / "it")
    return tmp_path / "it"


def run(capsys, folder, *argv):
    """What `python model.py FOLDER …` prints -> stdout, stderr."""
    capsys.readouterr()
    M.main([str(folder), *map(str, argv)])
    return capsys.readouterr()


def result(capsys, folder, *argv):
    """The JSON line of an evaluation."""
    return json.loads(run(capsys, folder, *argv).out.splitlines()[-1])


def answers(monkeypatch, *texts):
    """Replace the model by these answers, byte by byte, an end after each; -> the prompts that it
    is given, as texts, filled as it is asked; an exception as an answer is raised at its end."""
    tok, asked, left = bytes_tokenizer(), [], list(texts)

    def stream(model, prompt, **how):
        asked.append(tok.decode(prompt, skip_specials=False))
        text = left.pop(0)
        yield from tok.encode(text[0] if isinstance(text, tuple) else text)
        if isinstance(text, tuple):
            raise text[1]
        yield tok.specials["<|im_end|>"]

    monkeypatch.setattr(M, "stream", stream)
    return asked


def typed(monkeypatch, *lines):
    """Lines on the standard input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{x}\n" for x in lines)))


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, words", [
    (["--max_new", "0"], "--max_new 0: must be at least 1"),
    (["--max-new=0"], "--max_new 0: must be at least 1"),
    (["--temperature", "nan"], "--temperature nan"),
    (["--top-p", "2"], "--top_p 2: must be above 0"), (["--seed", str(2 ** 70)], "--seed"),
    (["--device", "x"], "--device x"), (["--dtype", "int8"], "--dtype int8: choose from auto"),
    (["--tokens", "5"], "unknown key --tokens: it is --max_new"),
    (["--top_q", "5"], "unknown key --top_q; did you mean 'top_p'"),
    (["--samples", "2"], "--samples: talking does not read it"),
    (["--system", "Be brief."], "--system: only a chat"),
    (["--eval", "no.txt"], "--prompt: --eval of text does not read it")])
def test_an_option_that_is_wrong_is_named(argv, words, folder):
    with pytest.raises(UserError, match=words):
        M.main([str(folder), "--prompt", "a", *argv])
    with pytest.raises(UserError, match="no file and no named data 'no.txt'"):
        M.main([str(folder), "--eval", "no.txt"])


def test_a_command_line_names_its_folder_first(folder, capsys):
    for argv in ([], ["--prompt", "a"]):
        with pytest.raises(UserError, match="which checkpoint"):
            M.main(argv)
    with pytest.raises(SystemExit):
        M.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"--{x.name} " in out for x in M.fields(M.Options)) and "2048" in out


# --- a completion ---------------------------------------------------------------------------------


def test_a_prompt_is_continued_as_generate_continues_it(folder, capsys):
    net, tok = load(folder)
    out = run(capsys, folder, "--prompt", "Zoë", "--max-new=12", "--temperature", 0)
    roll = generate(net, [tok.prompt("Zoë")], 12, temperature=0)
    assert out.out == "Zoë" + tok.decode(roll.completions()[0]) + "\n"
    assert "tokens/s" in out.err and "[cut after 12 tokens: --max_new]" in out.err
    with pytest.raises(UserError, match="96 tokens fill the context of 96"):
        run(capsys, folder, "--prompt", "x" * 95)


def test_command_line_tells_a_story(stories, capsys):
    out = run(capsys, stories, "--prompt", "Once upon a time", "--max_new", 20, "--temperature", 0)
    assert out.out.startswith("Once upon a time, there was a little girl named")


def test_no_character_is_cut_and_none_is_lost():
    """bytes come one by one; what never becomes a character is shown as decode shows it"""
    tok = bytes_tokenizer()
    text = "né 你好 👩‍💻!"
    pieces = list(M.spoken(tok, tok.encode(text)))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert [x for x in pieces if x] == list(text)
    for broken in (b"a\xf0\x9f", b"\xe4\xbd", b"\x80b\xc3", b"\xff\xff\xff"):
        assert "".join(M.spoken(tok, list(broken))) == broken.decode(errors="replace")
    assert list(M.spoken(tok, [])) == [""]


def test_a_long_answer_is_decoded_in_linear_time():
    class Counting:
        seen = 0

        def decode(self, ids):
            self.seen += len(ids)
            return "x" * len(ids)
    tok = Counting()
    assert "".join(M.spoken(tok, range(1000))) == "x" * 1000 and tok.seen < 5000


def test_a_word_keeps_its_space_after_a_prompt():
    """a tokenizer that drops the first space of a text is asked with the token before"""
    class Words:
        def decode(self, ids):
            return "".join(f" {i}" for i in ids).removeprefix(" ")
    assert "".join(M.spoken(Words(), [5, 6])) == "5 6"
    assert "".join(M.spoken(Words(), [5, 6], after=[3, 4])) == " 5 6"


# --- sampling -------------------------------------------------------------------------------------


def test_the_folder_s_sampling_goes_before_the_defaults(folder, capsys):
    """and the command line's before both; what is not computed is named"""
    write(folder, "generation_config.json", **SAMPLED, min_p=0.1, num_beams=1, typical_p=None,
          bad_words_ids=[[5]])
    net = load(folder)[0]
    c, given = M.options([str(folder), "--top_p", "0.5"])
    how = M.sampling(net, c, given)
    assert how == dict(temperature=0.6, top_k=20, top_p=0.5, repetition_penalty=1.1,
                       max_new_tokens=99)
    err = capsys.readouterr().err
    assert "min_p 0.1, bad_words_ids [[5]]: not computed here" in err and "num_beams" not in err
    assert "(temperature, top_k, repetition_penalty: the folder's)" in err
    net.generation["do_sample"] = False
    assert M.sampling(net, c, given)["temperature"] == 0
    c, given = M.options([str(folder), "--temperature", "0.3", "--max_new", "7"])
    assert [M.sampling(net, c, given)[k] for k in ("temperature", "max_new_tokens")] == [0.3, 7]
    net.generation = dict(do_sample=True, top_k=64)
    c, given = M.options([str(folder)])
    assert M.sampling(net, c, given)["temperature"] == 1                  # Gemma's folders
    net.generation = dict(top_k="many")
    with pytest.raises(UserError, match="generation_config.json's top_k many: expected int"):
        M.sampling(net, c, given)


def test_repetition_penalty_by_hand():
    """of ids that have been there: positive logits divided, negative ones multiplied"""
    logits, seen = torch.tensor([[2.0, -1.0, 3.0, -4.0]]), torch.tensor([True, True, False, False])
    assert M.penalised(logits, seen, 2.0).tolist() == [[1.0, -2.0, 3.0, -4.0]]


def test_the_prompt_and_the_answer_are_penalised():
    net, prompt = small("llama"), list(range(0, 160, 2))
    net.config = M.replace(net.config, eos_token_id=())
    text = list(prompt)
    for _ in range(8):
        logits = net.logits(net(torch.tensor([text]))[:, -1])[0]
        for i in set(text):
            logits[i] = logits[i] / 1.8 if logits[i] > 0 else logits[i] * 1.8
        text.append(int(pick(logits[None], torch.rand(1), temperature=0)[0]))
    got = list(M.stream(net, prompt, 8, temperature=0, repetition_penalty=1.8))
    assert got == text[len(prompt):] != list(M.stream(net, prompt, 8, temperature=0))


# --- a chat ---------------------------------------------------------------------------------------


def turns(*pairs):
    """ChatML of (role, text) pairs, and the opening of an answer."""
    text = "".join(f"<|im_start|>{role}\n{x}<|im_end|>\n" for role, x in pairs)
    return text + "<|im_start|>assistant\n"


def test_a_chat_remembers_until_it_is_told_to_forget(folder, capsys, monkeypatch):
    asked = answers(monkeypatch, "Hi Zoë.", "Zoë.", "Who?")
    typed(monkeypatch, "I am Zoë", "", "Who am I?", "/reset", "Who am I?", "/exit", "never read")
    out = run(capsys, folder, "--system", "S", "--max_new", 5)
    assert out.out == "Hi Zoë.\nZoë.\nWho?\n" and "forgotten" in out.err and "chat;" in out.err
    first = ("system", "S"), ("user", "I am Zoë"), ("assistant", "Hi Zoë."), ("user", "Who am I?")
    assert asked == [turns(*first[:2]), turns(*first), turns(first[0], first[3])]


def test_ctrl_c_stops_the_answer_and_not_the_program(folder, capsys, monkeypatch):
    """what was said so far is remembered; at the prompt it only reminds"""
    asked = answers(monkeypatch, ("One tw", KeyboardInterrupt()), "three")
    lines = iter(["count", KeyboardInterrupt(), "go on"])

    def typing(prompt):
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line
    monkeypatch.setattr("builtins.input", typing)
    out = run(capsys, folder, "--max_new", 5)
    assert out.out == "One tw\nthree\n" and "[stopped]" in out.err
    assert out.err.count("Ctrl-C stops an answer") == 2
    assert asked[1] == turns(("user", "count"), ("assistant", "One tw"), ("user", "go on"))


def test_a_full_context_forgets_the_oldest_turns_aloud(folder, capsys, monkeypatch):
    """the system message stays: 72 tokens of 96 are for the conversation, and five messages need
    70, seven 93"""
    asked = answers(monkeypatch, "b" * 9, "d", "f")
    typed(monkeypatch, "a" * 9, "c", "e")
    out = run(capsys, folder, "--system", "S", "--max_new", 30)
    assert out.err.count("is full without the oldest 1 turns") == 1
    first, old = ("system", "S"), [("user", "a" * 9), ("assistant", "b" * 9)]
    new = [("user", "c"), ("assistant", "d"), ("user", "e")]
    assert asked[1:] == [turns(first, *old, new[0]), turns(first, *new)]


def test_a_message_that_does_not_fit_is_refused_and_the_chat_goes_on(folder, capsys, monkeypatch):
    """and forgets nothing for it"""
    typed(monkeypatch, "b", "x" * 200, "hi")
    prompts, stream = [], M.stream
    monkeypatch.setattr(M, "stream", lambda model, ids, *a, **kw: (
        prompts.append(len(ids)) or stream(model, ids, *a, **kw)))
    out = run(capsys, folder, "--max_new", 3, "--temperature", 0)
    assert "error: the prompt's 219 tokens fill the context of 96" in out.err
    assert out.err.count("[cut after 3 tokens: --max_new]") == 2
    assert prompts[0] < prompts[2] < 96


def test_an_answer_ends_where_the_template_ends_a_turn(folder, capsys, monkeypatch):
    """though the folder names another end of text"""
    net, tok, seen = *load(folder), []
    assert tok.specials["<|im_end|>"] not in net.config.eos_token_id
    monkeypatch.setattr(M, "stream", lambda model, *a, **kw: seen.append(model.config) or iter(()))
    typed(monkeypatch, "a")
    run(capsys, folder)
    assert set(seen[0].eos_token_id) == {tok.eos, tok.specials["<|im_end|>"]}


def test_without_a_chat_template_each_line_is_continued(stories, capsys, monkeypatch):
    typed(monkeypatch, "Once upon a time")
    out = run(capsys, stories, "--max_new", 8, "--temperature", 0)
    assert "no chat template, each line is continued" in out.err
    assert out.out.startswith(", there was a")


def test_a_chat_folder_continues_lines_if_asked(folder, capsys, monkeypatch):
    asked = answers(monkeypatch, "b")
    typed(monkeypatch, "a")
    assert "each line is continued" in run(capsys, folder, "--chat", "false").err
    assert asked == ["<|bos|>a"]


def test_a_reward_model_does_not_talk(tmp_path):
    save(ScalarModel.from_lm(small("llama")), bytes_tokenizer(), tmp_path)
    with pytest.raises(UserError, match="is a reward model: it scores texts and writes none"):
        M.main([str(tmp_path), "--prompt", "a"])


# --- evaluations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n, context, stride, want", [
    (10, 4, 4, [(0, 1, 4), (4, 5, 8), (8, 9, 10)]), (9, 4, 4, [(0, 1, 4), (4, 5, 8)]),
    (10, 4, 2, [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]), (3, 9, 9, [(0, 1, 3)]),
    (1, 4, 4, []), (7, 4, 3, [(0, 1, 4), (3, 4, 7)])])
def test_windows_by_hand(n, context, stride, want):
    assert M.windows(n, context, stride) == want


TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, é. " * 3


@pytest.mark.parametrize("argv, context, stride", [
    ((), 96, 96), (("--context", 20, "--micro", 3), 20, 20),
    (("--context", 20, "--stride", 7), 20, 7)])
def test_perplexity_is_that_of_every_window_computed_apart(argv, context, stride, folder, capsys):
    """the whole file, BOS first; each token once, given at most a window"""
    net, tok = load(folder)
    (folder / "text.txt").write_text(TEXT)
    text, total, count, whole, done = [tok.bos, *TEXT.encode()], 0.0, 0, [], 1
    for begin in range(0, len(text), stride):
        window = text[begin:begin + context]
        logp = torch.log_softmax(net.logits(net(torch.tensor([window])))[0].double(), -1)
        nats = [-logp[i - 1, window[i]].item() for i in range(1, len(window))
                if begin + i >= done]
        total, count, done = total + sum(nats), count + len(nats), begin + len(window)
        whole += nats if len(window) == context else []
        if done == len(text):
            break
    got = result(capsys, folder, "--eval", folder / "text.txt", *argv)
    assert got["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-6)
    assert got["bits_per_byte"] == pytest.approx(total / count / math.log(2), rel=1e-6)
    assert (got["tokens"], got["scored"], got["context"], got["stride"]) == (
        len(TEXT.encode()) + 1, count, context, stride)
    if stride == context:
        assert got["perplexity_of_whole_windows"] == pytest.approx(
            math.exp(sum(whole) / len(whole)), rel=1e-6)


def test_a_corpus_of_rows_is_its_documents_one_after_the_other(folder, capsys):
    """as a text with <|endoftext|> between them; what cannot be cut into windows is refused"""
    (folder / "a.txt").write_text("one two<|endoftext|>three")
    (folder / "a.jsonl").write_text('{"text": "one two"}\n{"text": "three"}\n')
    a, b = (result(capsys, folder, "--eval", folder / x) for x in ("a.txt", "a.jsonl"))
    net, tok = load(folder)
    row = [tok.bos, *b"one two", tok.eos, *b"three"]
    nats = -token_logprobs(net, torch.tensor([row])).sum().item() / (len(row) - 1)
    assert a["perplexity"] == b["perplexity"] == pytest.approx(math.exp(nats), rel=1e-6)
    (folder / "b.jsonl").write_text('{"text": "one"}\n{"text": 2}\n')
    with pytest.raises(UserError, match='b.jsonl:2: no string under "text"'):
        run(capsys, folder, "--eval", folder / "b.jsonl")
    for argv in (("--context", 97), ("--context", 1), ("--context", 9, "--stride", 10)):
        with pytest.raises(UserError, match="expected 2 to the model's 96"):
            run(capsys, folder, "--eval", folder / "a.txt", *argv)
    with pytest.raises(UserError, match="--chat: --eval of text does not read it"):
        run(capsys, folder, "--eval", folder / "a.txt", "--chat")


@pytest.fixture
def rows(folder):
    """A file of six sums, whose answers are 1 to 6."""
    path = folder / "sums.jsonl"
    path.write_text("".join(json.dumps(dict(prompt=f"{n}+0?", completion=f"#### {n}")) + "\n"
                            for n in range(1, 7)))
    return path


def test_rows_are_answered_and_graded(folder, rows, capsys, monkeypatch):
    """all of a file's rows, greedily; the share that is right, with its interval"""
    seen = []

    def generate(model, prompts, new, *, samples, temperature, **how):
        seen.append((len(prompts), new, samples, temperature))
        tok, out = bytes_tokenizer(), []
        for p in prompts:
            number = tok.decode(p)[0]
            out += [f"#### {number if number < '4' or s else 0}" for s in range(samples)]
        return M.Rollout(*[torch.zeros(0)] * 4, torch.ones(len(out)))._replace(
            tokens=out)

    monkeypatch.setattr(M, "generate", generate)
    monkeypatch.setattr(M.Rollout, "completions", lambda roll: [x.encode() for x in roll.tokens])
    monkeypatch.setattr(M.Tokenizer, "decode", lambda self, ids, skip=True: bytes(
        i for i in ids if i < 256).decode())
    got = result(capsys, folder, "--eval", rows, "--micro", 4, "--max_new", 9)
    assert got["accuracy"] == 0.5 and got["rows"] == 6 and got["samples"] == got["finished"] == 1
    assert got["interval"] == pytest.approx([0.1876, 0.8124], abs=1e-4)           # Wilson, 3 of 6
    assert seen == [(4, 9, 1, 0.0), (2, 9, 1, 0.0)]
    got = result(capsys, folder, "--eval", rows, "--samples", 3, "--max_new", 9)
    assert got["accuracy"] == pytest.approx((3 + 3 * 2 / 3) / 6) and seen[-1] == (6, 9, 3, 1.0)
    got = result(capsys, folder, "--eval", rows, "--rows", 2, "--max_new", 9)
    assert got["rows"] == 2


def test_rows_that_do_not_fit_are_left_out_aloud(folder, rows, capsys):
    with open(rows, "a") as file:
        file.write(json.dumps(dict(prompt="9" * 80, completion="#### 9")) + "\n")
    out = run(capsys, folder, "--eval", rows, "--max_new", 20)
    assert "left out 1 of 7 rows" in out.err and json.loads(out.out.splitlines()[-1])["rows"] == 6
    with pytest.raises(UserError, match="no row is left to answer: lower --max_new"):
        run(capsys, folder, "--eval", rows, "--max_new", 95)


@pytest.mark.parametrize("scalar", [True, False])
def test_pairs_are_told_apart_by_score_or_log_prob(scalar, folder, capsys):
    """of both splits of the file"""
    pairs = [dict(prompt=f"{n}?", chosen=f"yes {n}", rejected="no" * (n % 3 + 1))
             for n in range(30)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in pairs))
    net, tok = load(folder)
    if scalar:
        net = ScalarModel.from_lm(net, std=0.5)
        save(net, tok, folder / "reward")
    wins, each = 0, 0
    for pair in pairs:
        scores = []
        for side in ("chosen", "rejected"):
            prompt, y = tok.prompt(pair["prompt"]), [*tok.encode(pair[side]), tok.eos]
            x = torch.tensor([prompt + y])
            logp = 0 if scalar else token_logprobs(net, x)[0, len(prompt):]
            scores.append((sequence_score(net, x, torch.tensor([x.size(1)])),) * 2 if scalar else
                          (logp.sum(), logp.mean()))
        wins += bool(scores[0][0] > scores[1][0])
        each += bool(scores[0][1] > scores[1][1])
    got = result(capsys, folder / "reward" if scalar else folder, "--eval", folder / "pairs.jsonl")
    assert got["pairs"] == 30 and got["accuracy"] == pytest.approx(wins / 30) and 0 < wins < 30
    assert scalar or got["accuracy_a_token"] == pytest.approx(each / 30)


def test_a_reward_model_is_held_to_pairs_alone(folder, rows, tmp_path, capsys):
    save(ScalarModel.from_lm(small("llama")), bytes_tokenizer(), tmp_path / "reward")
    with pytest.raises(UserError, match="is a reward model, which is held to rows of"):
        run(capsys, tmp_path / "reward", "--eval", rows)


# --- exports --------------------------------------------------------------------------------------


def test_an_export_is_the_same_model_in_fewer_bits(folder, tmp_path, capsys):
    run(capsys, folder, "--export", tmp_path / "half", "--dtype", "bfloat16")
    want = load(folder)[0].state_dict()
    stored = load_file(tmp_path / "half/model.safetensors")
    assert read(tmp_path / "half")["dtype"] == "bfloat16"
    assert torch.equal(stored["model.embed_tokens.weight"], want["embed_tokens.weight"].bfloat16())
    with pytest.raises(UserError, match="half exists: choose a new folder"):
        run(capsys, folder, "--export", tmp_path / "half")
    with pytest.raises(UserError, match="--max_new: --export does not read it"):
        run(capsys, folder, "--export", tmp_path / "other", "--max_new", 5)
