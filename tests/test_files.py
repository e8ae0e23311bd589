"""Files of rows as others write them: what is read, what it becomes, and that nothing is changed,
dropped or ignored without a word."""
import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import prefs, tasks, text
from data.prefs import encode_labels, encode_pairs, load_labels, load_pairs
from data.run import UserError
from data.tasks import Jsonl, demonstrations, scorer
from data.tokenizer import bytes_tokenizer, char_tokenizer


def user(content):
    """A message."""
    return dict(role="user", content=content)


def bot(content, **more):
    """An answer."""
    return dict(role="assistant", content=content, **more)


def system(content):
    """A system prompt."""
    return dict(role="system", content=content)


def write(path, rows):
    """Rows as JSONL, or bytes as they are, packed if the name says so; returns the path."""
    lines = "\n".join(map(json.dumps, rows)).encode() if isinstance(rows, list) else rows
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


PC = dict(prompt="p", completion="c")
ASKED = dict(prompt="user: hi\nassistant: ", messages=[user("hi")])
LONG = dict(prompt="user: hi\nassistant: yo\nuser: more\nassistant: ",
            messages=[user("hi"), bot("yo"), user("more")])


# --- schemas --------------------------------------------------------------------------------------

@pytest.mark.parametrize("row, want", [
    (dict(conversations=[{"from": "system", "value": "be"}, {"from": "human", "value": "hi"},
                         {"from": "gpt", "value": "yo"}]),
     dict(prompt="system: be\nuser: hi\nassistant: ", messages=[system("be"), user("hi")],
          completion="yo")),
    (dict(messages=[user("hi"), bot("yo"), user("more"), bot("ok")]), LONG | dict(completion="ok")),
    (dict(messages=[dict(role="developer", content="be"), user("hi"), bot("yo")]),
     dict(prompt="system: be\nuser: hi\nassistant: ", messages=[system("be"), user("hi")],
          completion="yo")),
    (dict(messages=[user([dict(type="text", text="h"), dict(type="text", text="i")]), bot("yo")]),
     ASKED | dict(completion="yo")),
    (dict(messages=[user("hi"), bot("yo", tool_calls=[], reasoning_content=None, weight=1)]),
     ASKED | dict(completion="yo")),
    (dict(messages=[user("hi")], answer=4), ASKED | dict(answer="4")),
    (dict(prompt=[user("hi")], completion=[bot("yo")]), ASKED | dict(completion="yo")),
    (dict(prompt=[user("hi")], completion=[bot("yo"), user("more"), bot("ok")]),
     LONG | dict(completion="ok")),
    (dict(prompt=[user("hi")], completion=[bot("yo")], label=0),
     ASKED | dict(completion="yo", label=False)),
    (dict(prompt="hi", chosen=[user("hi"), bot("yo")], rejected=[user("hi"), bot("no")]),
     ASKED | dict(completion="yo")),
    (dict(instruction="i", output="o"), dict(prompt="i", completion="o")),
    (dict(instruction="i", input=None, output="o"), dict(prompt="i", completion="o")),
    (dict(instruction="i", input="x", output="o", system="be"),
     dict(prompt="be\n\ni\n\nx", messages=[system("be"), user("i\n\nx")], completion="o")),
    (dict(messages=[user("hi"), bot("yo")], system="be"),
     dict(prompt="system: be\nuser: hi\nassistant: ", messages=[system("be"), user("hi")],
          completion="yo")),
    (dict(messages=[system("be"), user("hi"), bot("yo")], system_prompt="be"),
     dict(prompt="system: be\nuser: hi\nassistant: ", messages=[system("be"), user("hi")],
          completion="yo")),
    (dict(prompt="p", answer="4", level=3), dict(prompt="p", answer="4")),
    (dict(prompt="p", ground_truth=2.5), dict(prompt="p", answer="2.5")),
    (dict(prompt="p", solution=r"so \boxed{4}", answer=None),
     dict(prompt="p", answer=r"so \boxed{4}")),
    (PC | dict(messages=None, tools=[], system="", history=None, images=[]), PC)])
def test_rows_of_others_become_ours(row, want):
    assert text.normalise(row) == want


@pytest.mark.parametrize("more, words", [
    (dict(tools=[dict(name="f")]), "'tools' changes what the row means"),
    (dict(reasoning_content="hm"), "'reasoning_content'"),
    (dict(history=[["a", "b"]]), "'history'"),
    (dict(images=["x.png"]), "'images'"), (dict(weight=0), "the weight is '0'"),
    (dict(weight=0.5), "the weight is '0.5'"), (dict(system=["x"]), "the system prompt is"),
    (dict(messages=[user("a"), bot("b", weight=0)]), "the weight is '0'"),
    (dict(messages=[user("a"), bot("b", reasoning_content="x")]), "'reasoning_content'"),
    (dict(messages=[user("a"), bot(None, tool_calls=[1])]), "'tool_calls'"),
    (dict(messages=[user("a"), dict(role="tool", content="x"), bot("b")]), "role is 'tool'"),
    (dict(messages=[user("a"), dict(role="function", content="x"), bot("b")]), "is 'function'"),
    (dict(messages=[user([dict(type="image_url")]), bot("b")]), "a part 'image_url'"),
    (dict(messages=["hi", bot("b")]), "a message is 'hi'"),
    (dict(messages=[dict(role="user"), bot("b")]), "content is 'None'"),
    (dict(messages=[bot("b")]), "nothing is asked"), (dict(prompt=[]), "nothing is asked"),
    (dict(completion=None, chosen=[], rejected=[], prompt=None), "nothing is asked"),
    (dict(messages=[system("a"), user("b"), bot("c")], system="other"), "two system prompts"),
    (dict(completion=[user("other"), bot("b")]), "begin otherwise than the prompt")])
def test_what_changes_a_row_and_is_not_used_is_refused_by_its_line(more, words, tmp_path):
    path = write(tmp_path / "a.jsonl", [PC, PC | more])
    with pytest.raises(UserError, match=rf"a\.jsonl:2: .*{words}"):
        text.examples(path)


def test_a_pair_that_is_not_used_is_refused_by_its_line(tmp_path):
    pair = dict(prompt="p", chosen="a", rejected="b")
    path = write(tmp_path / "a.jsonl", [pair, pair | dict(tools=[1])])
    with pytest.raises(UserError, match=r"a\.jsonl:2: 'tools'"):
        load_pairs(path)
    path = write(tmp_path / "b.jsonl", [PC | dict(label=True), PC | dict(label=True, weight=0)])
    with pytest.raises(UserError, match=r"b\.jsonl:2: the weight is '0'"):
        load_labels(path)


def test_a_dialogue_that_nobody_answers_is_not_trained_on(tmp_path, capsys):
    rows = [dict(messages=[user(f"{i}"), bot("yo")]) for i in range(20)]
    rows += [dict(messages=[user("hi"), bot("yo"), user("?")])]
    task = Jsonl(write(tmp_path / "unanswered.jsonl", rows))
    assert len(task.lessons("train") + task.lessons("val")) == 20 and task.metric == "rouge_l"
    out = capsys.readouterr().out
    assert "1 of 21 rows have no completion and are not trained on" in out
    assert "unanswered.jsonl:21)" in out


def test_a_row_keeps_its_columns_for_a_reward_of_the_users(tmp_path):
    """also those whose names we use ourselves; none of them reaches the prompt"""
    row = dict(prompt=[user("hi")], answer="#### 4", level="easy", hint="no", source="mine")
    task = Jsonl(write(tmp_path / "a.jsonl", [row, row | dict(prompt="other")]))
    (tmp_path / "mine.py").write_text(
        "def f(problem, text, finished):\n"
        "    assert problem['answer'] == '#### 4' and problem['level'] == 'easy'\n"
        "    assert problem['source'] == 'mine' and problem['hint'] == 'no'\n"
        "    return float(problem['prompt'] == 'user: hi\\nassistant: ')\n")
    score = scorer(f"{tmp_path}/mine.py:f", task)
    both = task.problems("train") + task.problems("val")
    assert sorted(score(p, "x", True) for p in both) == [0, 1]
    assert {p["source"] for p in both} == {f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:2"}
    tok = bytes_tokenizer()
    assert tok.decode(tok.prompt(next(p for p in both if "messages" in p))) == ASKED["prompt"]


# --- answers --------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer, right, wrong", [
    (4, "#### 4", "#### 5"), ("4", r"\boxed{4}", "4"), ("#### 1,000", "#### 1000", "#### 1"),
    (r"so \boxed{\frac{1}{2}}", "#### 0.5", "#### 1"), ("$12$", "#### 12", "#### 2"),
    ("Paris", r"\boxed{\text{Paris}}", "Paris"), (2.5, "#### 5/2", "#### 2"),
    ("two lines\n#### 7", "#### 7", "#### 2")])
def test_an_answer_column_is_the_truth_with_or_without_a_mark(answer, right, wrong, tmp_path):
    rows = [dict(prompt=f"{i}", answer=answer) for i in range(3)]
    task = Jsonl(write(tmp_path / "a.jsonl", rows))
    problem = task.problems("train")[0]
    assert task.metric == "accuracy" and task.lessons("train") == []
    assert (task.reward(problem, right), task.reward(problem, wrong)) == (1, 0)
    assert task.reward(problem, right, finished=False) == 0


def test_prompts_alone_are_for_a_reward_of_the_users(tmp_path):
    path = str(write(tmp_path / "a.jsonl", [dict(prompt=f"{i}", level=i) for i in range(20)]))
    task = Jsonl(path)
    assert task.metric == "reward" and len(task.problems("train")) == 19
    with pytest.raises(UserError, match="neither a completion nor an answer"):
        task.reward(task.problems("train")[0], "x")
    tasks.check_data(path, is_text=False, needs="")
    with pytest.raises(UserError, match="neither a completion nor an answer to grade by"):
        tasks.check_data(path, is_text=False, needs="answers")
    with pytest.raises(UserError, match="have no completion to learn"):
        tasks.check_data(path)


@pytest.mark.parametrize("first", [True, False])
def test_one_row_without_an_answer_is_named_and_changes_no_reward(first, tmp_path, capsys):
    """and it is no held-out prompt, even where its hash says so"""
    rows = [dict(question=f"{i}+1", answer=f"#### {i + 1}") for i in range(30)]
    odd = [dict(question="who?", answer="no number here")]
    name = f"answers-{first}"
    task = Jsonl(write(tmp_path / f"{name}.jsonl", odd + rows if first else rows + odd))
    assert task.metric == "accuracy" and len(task.problems("val")) == 1
    assert not any(p["prompt"] == "who?" for x in ("train", "val") for p in task.problems(x))
    assert any(p["prompt"] == "who?" for p in task.lessons("train"))
    place = f"{tmp_path}/{name}.jsonl:{1 if first else 31}"
    assert f"{name}: 1 of 31 rows state no answer and are not posed ({place})" in (
        capsys.readouterr().out)
    few = [dict(question=f"{i}", answer="#### 1" if i < 10 else "in words") for i in range(20)]
    assert Jsonl(write(tmp_path / "few.jsonl", few)).metric == "rouge_l"


def test_annotations_are_stripped_from_gsm8ks_own_schema_alone(tmp_path):
    code = "return ((x << 5) | (x >> 27))\nstd::cout << a = b >> c;\n#### 1"
    rows = [dict(prompt=f"{i}", completion=code) for i in range(3)]
    assert Jsonl(write(tmp_path / "a.jsonl", rows)).problems("train")[0]["completion"] == code
    rows = [dict(question=f"{i}", answer=f"<<1+{i}={i + 1}>>{i + 1}, x << 5 >> 2\n#### 1")
            for i in range(3)]
    task = Jsonl(write(tmp_path / "b.jsonl", rows))
    assert {p["completion"] for p in task.problems("train")} < {
        f"{i + 1}, x << 5 >> 2\n#### 1" for i in range(3)}
    rows = [dict(question=f"{i}", answer="y << 1+1=2 >> z") for i in range(3)]      # without a mark
    assert Jsonl(write(tmp_path / "c.jsonl", rows)).demo(
        Jsonl(tmp_path / "c.jsonl").problems("train")[0]) == "y << 1+1=2 >> z"


ODD = " \u2028x\u0000\r\n\ufeff e\u0301 \u00e9\t\u200b\n "


def test_no_text_is_changed_on_its_way_to_the_tokenizer(tmp_path):
    """blanks around it, CRLF, NUL, a byte-order mark inside, U+2028, what NFC would compose"""
    rows = [dict(prompt=f"{i}{ODD}", completion=ODD) for i in range(2)]
    task, tok = Jsonl(write(tmp_path / "a.jsonl", rows)), bytes_tokenizer()
    (x, y), = demonstrations(task, task.lessons("train"), tok, 200)
    assert tok.decode(x)[1:] == tok.decode(y) == ODD
    pairs = [dict(prompt=ODD, chosen="a" + ODD, rejected=ODD)]
    row = (load_pairs(write(tmp_path / "b.jsonl", pairs), "val")[0])[0]
    ids, = encode_pairs([row], tok, 200)
    assert [tok.decode(ids[k]) for k in ("prompt", "chosen", "rejected")] == [ODD, "a" + ODD, ODD]
    write(tmp_path / "c.csv", f'prompt,completion\n"{ODD}","{ODD}"\n'.encode())
    assert text.examples(tmp_path / "c.csv")[0]["completion"] == ODD


def test_false_labels_are_not_imitated(tmp_path, capsys):
    rows = [dict(prompt=f"{i}", completion="yes" if i % 2 else "no", label=bool(i % 2))
            for i in range(20)]
    task = Jsonl(write(tmp_path / "labels.jsonl", rows))
    assert {p["completion"] for x in ("train", "val") for p in task.lessons(x)} == {"yes"}
    assert "labels.jsonl: 10 of 20 rows are labelled false and left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="all rows are labelled false"):
        Jsonl(write(tmp_path / "none.jsonl", rows[::2]))


# --- pairs ----------------------------------------------------------------------------------------

HH = "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: more\n\nAssistant:"
BOTH = dict(chosen=[bot("good")], rejected=[bot("bad")])
WHOLE = dict(chosen=[user("hi"), bot("good")], rejected=[user("hi"), bot("bad")])


@pytest.mark.parametrize("row, want", [
    (BOTH | dict(prompt=[user("hi")]), ASKED), (BOTH | dict(prompt="hi"), ASKED),
    (BOTH | dict(prompt=LONG["messages"]), LONG), (WHOLE, ASKED),
    (WHOLE | dict(prompt="hi"), ASKED),
    (WHOLE | dict(prompt=[user("hi")]), ASKED),
    ({side: [*LONG["messages"], *BOTH[side]] for side in BOTH}, LONG),
    (dict(chosen=f"{HH} good", rejected=f"{HH} bad"), LONG | dict(prompt=f"{HH} ")),
    (dict(chosen=f"{HH}good", rejected=f"{HH} bad"), LONG | dict(prompt=HH, rejected=" bad")),
    (dict(chosen=f"{HH} goodbye", rejected=f"{HH} good"),
     LONG | dict(prompt=f"{HH} ", chosen="goodbye", rejected="good")),
    (dict(system="be", question="q", chosen="good", rejected="bad"),
     dict(prompt="be\n\nq", messages=[system("be"), user("q")])),
    (WHOLE | dict(prompt="hi", score_chosen=8.5, score_rejected=7), ASKED | dict(margin=1.5)),
    (WHOLE | dict(score_chosen=8.5, score_rejected=7, margin=3), ASKED | dict(margin=3))])
def test_pairs_of_others_become_ours(row, want, tmp_path):
    path = write(tmp_path / "a.jsonl", [row])
    (got,), dropped = load_pairs(path, "val")
    assert got == dict(chosen="good", rejected="bad", source=f"{path}:1") | want and not dropped


def test_a_score_that_is_no_number_drops_its_pair(tmp_path):
    rows = [WHOLE | dict(score_chosen=1, score_rejected="x"),
            WHOLE | dict(score_chosen=1, score_rejected=None)]
    (got,), dropped = load_pairs(write(tmp_path / "a.jsonl", rows), "val")
    assert dropped == {"non-finite": 1} and "margin" not in got


@pytest.mark.parametrize("row", [
    dict(chosen=f"{HH} good", rejected=f"{HH} bad".replace("yo", "no")),
    dict(chosen=[user("hi"), bot("a"), user("b"), bot("c")],
         rejected=[user("hi"), bot("d"), user("e"), bot("f")]),
    dict(chosen=[user("hi"), bot("a")], rejected=[user("hi"), bot("b"), user("c")])])
def test_dialogues_that_part_before_their_last_answers_are_no_pair(row, tmp_path, capsys):
    fine = [dict(prompt=f"{i}", chosen="a", rejected="b") for i in range(4)]
    path = write(tmp_path / "parted.jsonl", [*fine, row])
    rows, dropped = load_pairs(path)
    assert dropped == {prefs.PARTED: 1} and len(rows) == 3
    task = Jsonl(path)
    assert len(task.problems("train")) == 3
    assert "left out 1 pairs of dialogues that part" in (out := capsys.readouterr().out)
    assert "parted.jsonl:5)" in out


@pytest.mark.parametrize("row", [
    dict(chosen="plain", rejected="texts"), dict(prompt="p", chosen="a", rejected=[bot("b")]),
    dict(chosen="x\n\nAssistant: a", rejected="x\n\nAssistant: b")])
def test_what_is_no_pair_is_told_by_its_line(row, tmp_path):
    path = write(tmp_path / "a.jsonl", [dict(prompt="p", chosen="a", rejected="b"), row])
    with pytest.raises(UserError, match=r"a\.jsonl:2: no pair: give"):
        load_pairs(path)


def test_a_pair_of_messages_is_rendered_with_the_template():
    tok = bytes_tokenizer()
    row = ASKED | dict(chosen="a", rejected="b")
    (plain,), (chat,) = (encode_pairs([row], tok, 200, chat=x) for x in (False, True))
    assert plain["prompt"] == tok.prompt(ASKED["prompt"])
    assert chat["prompt"] == tok.render([user("hi")])
    label, = encode_labels([ASKED | dict(completion="a", label=True)], tok, 200, chat=True)
    assert label["prompt"] == tok.render([user("hi")])
    assert prefs.prompts_of([row | dict(source="a:1"), row]) == [ASKED | dict(source="a:1")]
    assert prefs.after("Well: ", row) == dict(prompt="Well: " + ASKED["prompt"],
                                              messages=[user("Well: hi")])


def test_labels_of_messages(tmp_path):
    rows = [dict(prompt=[user("hi")], completion=[bot(y)], label=y == "yo") for y in ("yo", "no")]
    path = write(tmp_path / "a.jsonl", rows)
    assert load_labels(path, "val") == [
        ASKED | dict(completion=y, label=y == "yo", source=f"{path}:{i}")
        for i, y in ((1, "yo"), (2, "no"))]
    path = write(tmp_path / "b.jsonl", [*rows, dict(prompt="p", completion="c")])
    with pytest.raises(UserError, match=r"b\.jsonl:3: no label"):
        load_labels(path)


# --- files ----------------------------------------------------------------------------------------

TWO = [dict(prompt="a, \"b\"\nc", completion="d", label=True),
       dict(prompt="e", completion="f", label=False)]
TABLE = 'prompt,completion,label\r\n"a, ""b""\nc",d,True\r\n\r\ne,f,0\r\n'.encode()


@pytest.mark.parametrize("name, content, places", [
    ("a.jsonl.gz", TWO, ("a.jsonl.gz:1", "a.jsonl.gz:2")),
    ("a.json", TWO, ("a.json:1", "a.json:2")),
    ("a.json", json.dumps(TWO, indent=1).encode(), ("a.json, item 1", "a.json, item 2")),
    ("a.json.gz", json.dumps(TWO).encode(), ("a.json.gz, item 1", "a.json.gz, item 2")),
    ("a.csv", TABLE, ("a.csv:2", "a.csv:5")), ("a.csv.gz", TABLE, ("a.csv.gz:2", "a.csv.gz:5"))])
def test_other_files_of_rows(name, content, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path(name), content)
    got = text.read_rows(name)
    assert [where for where, _ in got] == list(places)
    assert [row | dict(label=bool(row["label"])) for _, row in got] == TWO
    assert {r["label"] for r in load_labels(name) + load_labels(name, "val")} == {True, False}


def test_numbers_in_a_table_are_numbers_and_empty_cells_nothing(tmp_path):
    path = write(tmp_path / "a.csv", b"prompt,chosen,rejected,margin,note\n007,1,2,0.5,\n")
    (got,), dropped = load_pairs(path, "val")
    assert got == dict(prompt="007", chosen="1", rejected="2", margin=0.5, source=f"{path}:2")
    assert text.read_rows(path)[0][1]["note"] is None


def test_corpora_may_be_packed_and_tables(tmp_path):
    for name, content in (("a.txt.gz", b"one<|endoftext|>two\r\n"),
                          ("a.csv", b"text,id\none,1\n\"two\n\",2\n"),
                          ("a.json", b'[{"text": "one"}, {"text": "two\\n"}]')):
        path = str(write(tmp_path / name, content))
        assert text.is_corpus(path)
        assert text.documents(path) + text.documents(path, "val") == ["one", "two\n"]


@pytest.mark.parametrize("row, corpus", [
    (dict(text="a"), True), (dict(text="a", label=1), True), (dict(text="a", prompt="b"), True),
    (dict(instruction="i", input="", output="o", text="### i"), False),
    (dict(messages=[user("hi"), bot("yo")], text="x"), False), (PC | dict(text="x"), False),
    (dict(prompt="p", chosen="a", rejected="b", text="x"), False),
    (PC | dict(text="x", tools=[1]), False), (PC, False)])
def test_a_text_beside_a_demonstration_is_no_corpus(row, corpus, tmp_path):
    assert text.is_corpus(str(write(tmp_path / "a.jsonl", [row]))) == corpus


@pytest.mark.parametrize("name, content, words", [
    ("a.json", b"[", "a.json: not a JSON array of objects"), ("a.json", b"[]", "array is empty"),
    ("a.json", b'[{"prompt": "p"}, 3]', "a.json, item 2: not a JSON object: '3'"),
    ("a.json", b'[{"a": 1, "a": 2}]', "stands twice"),
    ("a.json", b'[{"a": 1}, {"a": "\\ud83d"}]', "a.json, item 2: .*half of a character"),
    ("a.json", b'{"data": [1]}\n', "a.json:1: no schema fits"),
    ("a.jsonl.gz", b'{"a": 1}\n{"a": "\\ud83d"}', "a.jsonl.gz:2: .*half of a character"),
    ("a.csv", b"prompt,completion\na,b\nc\n", "a.csv:3: 1 cells under 2 columns"),
    ("a.csv", b"prompt,prompt\na,b\n", "a.csv:1: two columns have one name"),
    ("a.csv", b'prompt,completion\na,b\nc,"d', "a.csv:3: no comma-separated values"),
    ("a.csv", b"prompt,completion\n", "a.csv: no row stands under"),
    ("a.csv", b"prompt,completion\na,b\nc,\xed\xa0\xbd\n", "a.csv:3: cannot be read as UTF-8"),
    ("a.jsonl", b'{"a": 1}\n{"a": "\xed\xa0\xbd"}\n', "a.jsonl:2: cannot be read as UTF-8"),
    ("a.jsonl", "{}".encode("utf-16-le") * 9, "seems to be UTF-16")])
def test_a_broken_file_is_told_by_its_line(name, content, words, tmp_path):
    with pytest.raises(UserError, match=words):
        text.examples(write(tmp_path / name, content))


def test_a_lone_surrogate_in_a_text_is_told_by_its_line(tmp_path):
    path = write(tmp_path / "a.txt", b"one\ntwo\nthree \xed\xa0\xbd\n")
    with pytest.raises(UserError, match=r"a\.txt:3: cannot be read as UTF-8"):
        text.documents(str(path))
    (tmp_path / "b.gz").write_bytes(b"no")
    with pytest.raises(UserError, match=r"b\.gz: cannot be read"):
        text.read_text(tmp_path / "b.gz")


@pytest.mark.parametrize("name, words", [
    ("a.parquet", "read_parquet('a.parquet').to_json('a.jsonl', orient='records', lines=True)"),
    ("a.arrow", "Dataset.from_file('a.arrow').to_json('a.jsonl')"),
    ("a.xlsx", "read_excel('a.xlsx').to_json('a.jsonl'")])
def test_what_is_not_read_says_how_to_convert_it(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(b"PAR1")
    for read in (tasks.task, load_pairs, load_labels, text.documents):
        with pytest.raises(UserError) as told:
            read(name)
        assert words in str(told.value) and "\n" not in str(told.value)


# --- places ---------------------------------------------------------------------------------------


def test_what_has_no_token_is_told_by_its_line(tmp_path):
    tok, c = char_tokenizer("abcp "), SimpleNamespace(max_new=0, chat=False)
    task = Jsonl(write(tmp_path / "a.jsonl", [dict(prompt="p", completion="a"),
                                              dict(prompt="a", completion="b\u00e9")]))
    rows = [row for x in ("train", "val") for row in task.lessons(x)]
    with pytest.raises(UserError, match=r"a\.jsonl:2: no token for '\u00e9'"):
        demonstrations(task, rows, tok, 99)
    with pytest.raises(UserError, match=r"a\.jsonl:7: no token for 'z'"):
        tasks.fitting(c, tok, [dict(prompt="z", source="a.jsonl:7")], {}, 9, 99)
    with pytest.raises(UserError, match="the document 'zz': no token for 'z'"):
        tasks.packed(["a", "zz"], tok, 9)
    pair = dict(prompt="p", chosen="a", rejected="z", source="a.jsonl:3")
    with pytest.raises(UserError, match=r"a\.jsonl:3: 'p': no token for 'z'"):
        encode_pairs([pair], tok, 9)
    with pytest.raises(UserError, match=r"a\.jsonl:4: no token for 'z'"):
        encode_labels([dict(prompt="p", completion="z", label=1, source="a.jsonl:4")], tok, 9)


def test_long_rows_are_left_out_by_their_lines(capsys):
    """places: the first five, then how many more"""
    tok = bytes_tokenizer()
    long = [dict(prompt="p", chosen="a" * 50, rejected="b", completion="a" * 50, label=True,
                 source=f"a.jsonl:{i}") for i in range(1, 8)]
    short = dict(prompt="p", chosen="a", rejected="b", completion="a", label=True, source="a:9")
    words = "(a.jsonl:1, 2, 3, 4, 5 and 2 more)"
    assert len(encode_pairs([*long, short], tok, 40)) == 1
    assert f"7 longer than the context of 40 tokens of 8 pairs {words}" in capsys.readouterr().out
    assert len(encode_labels([*long, short], tok, 40)) == 1 and words in capsys.readouterr().out
    task = SimpleNamespace(name="a", demo=lambda p: p["completion"])
    assert len(demonstrations(task, [*long, short], tok, 40)) == 1
    assert f"left out {words}" in capsys.readouterr().out


# --- another file of held-out rows ----------------------------------------------------------------


def test_held_out_rows_may_be_another_file(tmp_path, capsys):
    """all of them; training leaves out their prompts, aloud"""
    def file(name, rows):
        return str(write(tmp_path / name, rows))
    pairs = [dict(prompt=f"{i}", chosen="a", rejected="b") for i in range(9)]
    train, val = file("train.jsonl", pairs[:7]), file("val.jsonl", pairs[6:])
    assert [r["prompt"] for r in load_pairs(train, "train", val)[0]] == list("012345")
    assert [r["prompt"] for r in load_pairs(train, "val", val)[0]] == list("678")
    assert f"{train}: left out 1 rows, whose prompts are held out" in capsys.readouterr().out
    some, held = prefs.pair_sets(train, val=val, whole=True)
    assert len(some) == 6 and len(held["val"]) == 3 and len(held["all"]) == 9
    task = tasks.task(train, val=val)
    assert len(task.problems("train")) == len(task.lessons("train")) == 6
    assert {p["prompt"] for p in task.problems("val")} == set("678")
    labels = [PC | dict(prompt=f"{i}", label=i == 1) for i in range(3)]
    train, val = file("l.jsonl", labels[:2]), file("m.jsonl", labels[2:])
    assert [len(load_labels(train, x, val)) for x in ("train", "val")] == [2, 1]
    texts = [dict(text=x) for x in ("one", "two", "three")]
    train, val = file("t.jsonl", texts), file("v.jsonl", texts[2:])
    assert text.documents(train, "train", val) == ["one", "two"]
    assert text.documents(train, "val", val) == ["three"]
    assert "left out 1 documents that" in capsys.readouterr().out


def test_one_prompt_is_enough_with_another_file(tmp_path):
    train = write(tmp_path / "a.jsonl", [PC])
    val = write(tmp_path / "b.jsonl", [dict(prompt="q", completion="d")])
    assert len(Jsonl(train, val=str(val)).lessons("train")) == 1
    with pytest.raises(UserError, match="one prompt cannot be split"):
        Jsonl(train)
