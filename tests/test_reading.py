"""How a run reads its file (--val, --system, --ask, --answer, --epochs), and what it says of it."""
import json
from types import SimpleNamespace

import pytest
import torch

import dpo
import grpo
import model as M
import ppo
import sft
from data import prefs, tasks, text
from data.run import UserError, configure, read_log
from data.tokenizer import bytes_tokenizer
from model import init, preset, save

SUMS = [dict(question=f"{a}+{a}?", answer=f"{a}+{a}={2 * a}\n#### {2 * a}") for a in range(2, 22)]


def lines(path, rows):
    """Rows as a JSONL file -> its name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def base(tmp_path):
    """The folder of a small model that reads bytes, untrained."""
    save(init(preset("1x32", bytes_tokenizer(), context=256)), bytes_tokenizer(), tmp_path / "base")
    return str(tmp_path / "base")


# --- words around a question ----------------------------------------------------------------------


def test_system_and_ask_stand_around_a_plain_prompt_and_in_its_messages():
    row = dict(prompt="2+2?", completion="4")
    assert text.framed(row) is row
    assert text.framed(row, ask="Only a number.") == dict(
        prompt="2+2?\nOnly a number.", completion="4",
        messages=[dict(role="user", content="2+2?\nOnly a number.")])
    both = text.framed(row, system="Be brief.", ask="A number.")
    assert both["prompt"] == "Be brief.\n\n2+2?\nA number."
    assert both["messages"] == [dict(role="system", content="Be brief."),
                                dict(role="user", content="2+2?\nA number.")]
    assert row == dict(prompt="2+2?", completion="4")                  # it is left as it was


def test_system_and_ask_stand_around_a_conversation():
    turns = [dict(role="user", content="a"), dict(role="assistant", content="b"),
             dict(role="user", content="c")]
    row = dict(prompt=text.written(turns), messages=turns)
    got = text.framed(row, system="s", ask="q")
    assert got["messages"] == [dict(role="system", content="s"), *turns[:2],
                               dict(role="user", content="c\nq")]
    assert got["prompt"] == "system: s\nuser: a\nassistant: b\nuser: c\nq\nassistant: "
    own = dict(row, messages=[dict(role="system", content="own"), *turns], source="a.jsonl:3")
    with pytest.raises(UserError, match="a.jsonl:3: the row has a system message of its own"):
        text.framed(own, system="s")
    assert text.framed(own, ask="q")["messages"][0]["content"] == "own"


def test_every_reader_of_files_frames_both_splits(tmp_path):
    words = dict(system="S", ask="Q")
    task = tasks.task(lines(tmp_path / "sums.jsonl", SUMS), **words)
    for split in ("train", "val"):
        for p in task.problems(split):
            assert p["prompt"] == f"S\n\n{p['row']['question']}\nQ"
            assert [m["content"] for m in p["messages"]] == ["S", f"{p['row']['question']}\nQ"]
    pairs = [dict(prompt=f"p{i}", chosen="a", rejected="b") for i in range(20)]
    train, held = prefs.pair_sets(lines(tmp_path / "pairs.jsonl", pairs), **words)
    assert len(train) + len(held["val"]) == 20
    assert all(r["prompt"].startswith("S\n\np") and r["prompt"].endswith("\nQ")
               for r in train + held["val"])
    labels = [dict(prompt=f"p{i}", completion="a", label=i % 2 == 0) for i in range(20)]
    for split in ("train", "val"):
        found = prefs.load_labels(lines(tmp_path / "labels.jsonl", labels), split, **words)
        assert found and all(r["messages"][0]["content"] == "S" for r in found)


@pytest.mark.parametrize("answer, right", [
    ("mark", [1, 1, 0, 0]), ("last", [1, 1, 1, 0]), ("boxed", [0, 1, 0, 0])])
def test_answer_says_what_a_response_is_read_for(answer, right, tmp_path):
    task = tasks.task(lines(tmp_path / "sums.jsonl", SUMS), answer=answer)
    p, = [p for split in ("train", "val") for p in task.problems(split)
          if p["row"]["question"] == "6+6?"]
    texts = ["#### 12", r"So \boxed{12}", "it is 12", "I do not know"]
    assert [task.reward(p, x) for x in texts] == right
    assert tasks.stated(task, texts[2]) == ("12" if answer == "last" else "")


@pytest.mark.parametrize("column", ["completion", "answer"])
def test_rows_of_classes_are_right_as_a_whole_or_wrong(column, tmp_path):
    """a column "answer" or the completion is the class; the longest decides how many tokens"""
    names = ["good", "not good", "bad"]
    rows = [{"prompt": f"text {i}", column: f" {names[i % 3]}\n"} for i in range(30)]
    task = tasks.task(lines(tmp_path / "labels.jsonl", rows), answer="whole")
    assert task.metric == "accuracy" and task.max_new == 9
    problems = task.problems("train") + task.problems("val")
    p = next(p for p in problems if p["prompt"] == "text 4")
    assert task.demo(p) == "not good" and len(problems) == 30
    texts = ["not good", " not good\n", "good", "not", "not good at all", "Not good", ""]
    assert [task.reward(p, x) for x in texts] == [1, 1, 0, 0, 0, 0, 0]
    assert task.reward(p, "not good", finished=False) == 0
    assert tasks.task(str(tmp_path / "labels.jsonl")).metric == (
        "accuracy" if column == "answer" else "rouge_l")


def test_a_run_hands_on_what_it_sets_and_nothing_else():
    c = sft.Config(data="a.jsonl")
    assert tasks.reading(c) == {}
    c = sft.Config(data="a.jsonl", val="b.jsonl", system="s", ask="q", answer="last")
    assert tasks.reading(c) == dict(val="b.jsonl", system="s", ask="q", answer="last")


@pytest.mark.parametrize("argv, words", [
    (["--data", "toyif", "--ask", "x"], "--ask is for a file of rows as --data"),
    (["--data", "chain+sort", "--system", "x"], "--system is for a file of rows"),
    (["--data", "stdlib", "--val", "x.jsonl"], "--val is for a file as --data"),
    (["--data", "arithmetic", "--answer", "last"], "--answer is for a file of rows with answers"),
    (["--data", "toyif", "--turns", "last"], "--turns is for runs with --chat")])
def test_a_world_does_not_read_what_files_do(argv, words):
    with pytest.raises(UserError, match=words):
        configure(sft.Config, sft.PRESETS, sft.AXES, "", argv, sft.readers)


def test_pairs_have_no_answers_to_read(tmp_path):
    pairs = lines(tmp_path / "pairs.jsonl", [dict(prompt="p", chosen="a", rejected="b")])
    with pytest.raises(UserError, match="--answer is for"):
        configure(dpo.Config, dpo.PRESETS, dpo.AXES, "",
                  ["--data", pairs, "--answer", "last"], dpo.readers)


def test_a_text_is_held_out_by_another(tmp_path):
    (tmp_path / "a.txt").write_text("aaa<|endoftext|>bb<|endoftext|>cc")
    (tmp_path / "b.txt").write_text("bb<|endoftext|>dd")
    tok, c = bytes_tokenizer(), sft.Config(data=str(tmp_path / "a.txt"),
                                           val=str(tmp_path / "b.txt"))
    assert [tok.decode([*p, *y]) for p, y in tasks.rows(c, tok, "train")] == ["aaacc"]
    assert [tok.decode([*p, *y]) for p, y in tasks.rows(c, tok, "val")] == ["bbdd"]


# --- runs -----------------------------------------------------------------------------------------

QUICK = ["--device", "cpu", "--micro", "8", "--eval_every", "1", "--save_every", "9"]


def test_sft_learns_the_framed_rows_and_measures_the_held_out_file_before_it_begins(
        base, tmp_path, capsys):
    few, held = lines(tmp_path / "few.jsonl", SUMS[:1]), lines(tmp_path / "held.jsonl", SUMS[1:3])
    argv = ["--config", "tiny", "--init", base, "--data", few, "--val", held, "--chat",
            "--system", "Be brief.", "--ask", "End with ####.", "--steps", "1", "--batch", "1",
            "--context", "200", *QUICK, "--out", str(tmp_path / "run")]
    sft.main(argv)
    log = read_log(tmp_path / "run")
    assert log[0]["step"] == 0 and log[0]["val_loss"] > 5 and "loss" not in log[0]
    asked = "<|im_start|>system\\nBe brief.<|im_end|>\\n<|im_start|>user\\n3+3?\\nEnd with ####."
    assert asked in (out := capsys.readouterr().out)          # as the model reads it
    assert "2+2?" not in out.split("prompt ")[-1]
    c = sft.Config(data=few, val=held, chat=True, system="Be brief.", ask="End with ####.",
                   context=200)
    tok = bytes_tokenizer()
    row, = tasks.rows(c, tok, "train")
    assert tok.decode(row[0]).endswith("user\n2+2?\nEnd with ####.\nassistant\n")
    assert row[1] == [*b"2+2=4\n#### 4", tok.specials["<|im_end|>"]]
    assert sorted(tok.decode(y) for _, y in tasks.rows(c, tok, "val")) == [
        r["answer"] for r in SUMS[1:3]]


def test_grpo_says_why_nothing_earns_a_reward_and_counts_passes(base, tmp_path, capsys):
    data = lines(tmp_path / "sums.jsonl", SUMS)
    argv = ["--config", "tiny", "--init", base, "--data", data, "--max_new", "4", "--pool", "8",
            "--eval_prompts", "1", *QUICK]
    grpo.main([*argv, "--epochs", "0.5", "--out", str(tmp_path / "a")])
    out = capsys.readouterr().out
    assert "WARNING: every response earned 0" in out and "ran out of tokens: raise --max_new" in out
    assert "8 of 19 prompts, 1 steps" in out                             # 8 / 2 prompts, 4 a step
    assert [r["step"] for r in read_log(tmp_path / "a") if "loss" in r] == [1]


def test_ppo_asks_for_the_model_that_one_s_own_was_tuned_from(base, tmp_path):
    argv = ["--config", "tiny", "--init", base, "--data", lines(tmp_path / "sums.jsonl", SUMS)]
    with pytest.raises(UserError, match="give --base FOLDER too, the model that it was tuned from"):
        ppo.main([*argv, "--device", "cpu", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
    c, f = configure(ppo.Config, ppo.PRESETS, ppo.AXES, "", [*argv, "--base", base], ppo.readers)
    ppo.check(c, f)                                           # with it, nothing is wrong


def test_what_dpo_hands_on_knows_how_many_steps_the_passes_are(base, tmp_path, monkeypatch):
    """such as a curriculum, which turns in the middle of the run"""
    pairs = [dict(prompt=f"p{i}", chosen="a", rejected="b") for i in range(20)]
    seen, evaluate = [], dpo.evaluate

    def watched(c, f, known, sets, before):
        seen.append((c.steps, known["c"].steps))
        return evaluate(c, f, known, sets, before)
    monkeypatch.setattr(dpo, "evaluate", watched)
    dpo.main(["--config", "tiny", "--init", base, "--data", lines(tmp_path / "p.jsonl", pairs),
              "--epochs", "1", "--batch", "8", "--max_new", "2", "--device", "cpu",
              "--out", str(tmp_path / "run")])
    assert {*seen} == {(3, 3)}                                       # 19 rows, 8 a step


@pytest.mark.parametrize("texts, cut, score, words", [
    (["12", "it is 3"], [0, 0], 0, "100% state no answer: say with --ask how to"),
    (["#### 3", "#### 5"], [0, 0], 0, "all are wrong: take easier prompts"),
    (["#### 3", "x"], [1, 1], 0, "100% ran out of tokens: raise --max_new"),
    (["#### 3", "#### 5"], [0, 0], 0.5, "look at what it reads")])
def test_what_is_wrong_is_said_with_an_example(texts, cut, score, words, tmp_path):
    task = tasks.task(lines(tmp_path / "sums.jsonl", SUMS))
    seen = dict(score=torch.full((1, 2), float(score)), truncated=torch.tensor([cut]) > 0)
    got = tasks.no_signal(task, texts, seen)
    assert words in got and f"earned {score:g}" in got and repr(texts[0]) in got


@pytest.mark.parametrize("texts, cut", [
    (["#### 3", "on and on"], [0, 1]), (["#### 3", "it is 3"], [0, 0]),
    (["it is 3", "#### 3", "#### 5"], [0, 0, 0])])
def test_the_example_is_one_of_those_that_are_named(texts, cut, tmp_path):
    task = tasks.task(lines(tmp_path / "sums.jsonl", SUMS))
    seen = dict(score=torch.zeros(1, len(cut)), truncated=torch.tensor([cut]) > 0)
    assert f"One of them: {texts[1]!r}" in tasks.no_signal(task, texts, seen)


def test_a_rollout_with_a_signal_or_without_a_fault_says_nothing(tmp_path):
    task = tasks.task(lines(tmp_path / "sums.jsonl", SUMS))
    whole = torch.zeros(1, 2) > 0
    assert tasks.no_signal(task, ["a", "b"], dict(score=torch.tensor([[0.0, 1.0]]),
                                                  truncated=whole)) == ""
    assert tasks.no_signal(task, ["a", "b"], dict(score=torch.ones(1, 2), truncated=whole)) == ""


def test_how_many_of_a_file_s_prompts_are_used_is_told(tmp_path):
    task = tasks.task(lines(tmp_path / "sums.jsonl", SUMS))
    assert tasks.out_of(task.problems("train", 5), task) == "5 of 19 prompts"
    assert tasks.out_of(task.problems("train"), task) == "19 prompts"
    assert tasks.out_of([1, 2], SimpleNamespace()) == "2 prompts"


def test_model_py_evaluates_with_the_same_words(base, tmp_path, capsys):
    data = lines(tmp_path / "sums.jsonl", SUMS[:3])
    M.main([base, "--eval", data, "--max_new", "2", "--ask", "A number.", "--answer", "last"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == 3
    with pytest.raises(UserError, match="--answer: --eval of pairs does not read it"):
        pairs = lines(tmp_path / "pairs.jsonl", [dict(prompt="p", chosen="a", rejected="b")])
        M.main([base, "--eval", pairs, "--answer", "last"])


@pytest.mark.parametrize("n", [1, 7, 40, 1319])
def test_the_interval_of_a_share_stays_a_share(n):
    assert M.interval(0.0, n)[0] >= 0 and M.interval(1.0, n)[1] <= 1
    assert M.interval(0.0, n)[1] == pytest.approx(3.8416 / (n + 3.8416))
