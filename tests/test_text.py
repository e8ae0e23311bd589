"""Corpora and files: splits that never meet, ROUGE-L by hand, checked downloads, errors that name a
line."""
import hashlib
import json
import random
import re
import shutil
from collections import Counter

import pytest
import torch

from data import text
from data.run import UserError
from data.tokenizer import bytes_tokenizer


def write(path, lines):
    lines = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pairs():
    return {split: text.signatures(split) for split in text.SPLITS}


# --- the standard library -------------------------------------------------------------------------

def test_splits_share_no_file_and_no_document():
    files = {split: {rel for rel, _ in rows} for split, rows in text.sources().items()}
    docs = {split: text.stdlib(split) for split in text.SPLITS}
    size = {split: sum(map(len, rows)) for split, rows in docs.items()}
    for a, b in (("train", "val"), ("train", "ood"), ("val", "ood")):
        assert not files[a] & files[b]
        assert not {d for d in docs[a] if len(d) > 2000} & {d for d in docs[b] if len(d) > 2000}
    assert size["train"] > 5e6 and 0.02 < size["val"] / sum(size.values()) < 0.10
    assert 0.07 < size["ood"] / sum(size.values()) < 0.12
    assert docs["train"] == text.stdlib("train") == text.documents("stdlib", "train")


def test_tests_and_generated_data_are_left_out():
    rels = [rel for rows in text.sources().values() for rel, _ in rows]
    assert not [r for r in rels
                if re.search(r"(^|/)(tests?|idle_test|site-packages|pydoc_data)/", r)]
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(rels)


def test_documents_open_with_their_path_and_topics_are_prose():
    docs = text.stdlib("ood")
    assert any(d.startswith("# asyncio/events.py\n") for d in docs)
    prose = [d for split in text.SPLITS for d in text.stdlib(split) if not d.startswith("# ")]
    assert sum(map(len, prose)) > 3e5 and any("assignment" in d for d in prose)


def test_a_stripped_installation_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "ROOT", tmp_path)
    (tmp_path / "only.py").write_text("x = 1")
    with pytest.raises(UserError, match="only 1 sources of the standard library"):
        text.stdlib("train")


# --- signatures -----------------------------------------------------------------------------------

SOURCE = '''# pkg/mod.py
class Timer(Base, metaclass=Meta):
    def when(self, x,
             y=1):
        """Return a time, e.g. noon. Then more.

        Details."""
    @property
    async def name(self):
        r"""
        The name
        of it
        """
    def one(self): """On one line only."""
if True:
    def free():
        \'\'\'Free as a bird\'\'\'
        def closure():
            """Not seen at all."""
def silent(): pass
def brief():
    """Too short."""
'''


def test_pairs_of_a_file_by_hand():
    rows = text.file_pairs("pkg/mod.py", SOURCE)
    assert [(r["completion"], r["source"]) for r in rows] == [
        ("Return a time, e.g. noon.", "pkg/mod.py:2"), ("The name of it", "pkg/mod.py:8"),
        ("Free as a bird", "pkg/mod.py:15")]
    cls = "# pkg/mod.py\nclass Timer(Base, metaclass=Meta):\n"
    assert rows[0]["prompt"] == cls + '    def when(self, x,\n             y=1):\n        """'
    assert rows[1]["prompt"] == cls + '    async def name(self):\n        """'
    assert rows[2]["prompt"] == '# pkg/mod.py\ndef free():\n    """'
    assert text.file_pairs("bad.py", "# bad.py\ndef f(:\n") == []


@pytest.mark.parametrize("said, head, kept", [
    ("One two three.", "def f():", True), ("One two.", "def f():", False),
    ("One -- two.", "def f():", False),                  # three pieces, two of them words
    (" ".join(["word"] * 30), "def f():", True), (" ".join(["word"] * 31), "def f():", False),
    ("See this: >>> f()", "def f():", False), ("One two three.", f"def {'f' * 278}():", True),
    ("One two three.", f"def {'f' * 279}():", False)])
def test_what_is_a_pair(said, head, kept):
    """3 words at least, 30 at most, no doctest, a prompt of 300 characters at most"""
    rows = text.file_pairs("a.py", f'# a.py\n{head}\n    """{said}"""\n')
    assert [r["completion"] for r in rows] == [said] * kept
    assert all(r["head"] == head for r in rows)


@pytest.mark.parametrize("doc, first", [
    ("One. two. Three.", "One. two."), ("Is it? Yes.", "Is it?"), ("e.g. 'this'. More", "e.g."),
    ("no end\n\nnext", "no end"), ("over\n  two lines. (Then more.)", "over two lines."),
    ("Version 3.5 is old", "Version 3.5 is old")])
def test_first_sentences(doc, first):
    assert text.first_sentence(doc) == first


def test_curation_by_hand():
    def row(i, head="def f():", said="Do it now.", **other):
        return dict(prompt=f"p{i}", completion=said, source=f"s{i}", head=head) | other
    splits = dict(train=[row(0), row(0), *(row(i, said="Boiler plate here.") for i in range(1, 5))],
                  val=[row(10), row(11, head="def g():"),
                       row(12, said="Boiler plate here.", head="def h():")],
                  ood=[row(20), row(21, said="Boiler plate here.", head="def i():")])
    out = text.curate(splits)
    assert {s: [r["source"] for r in rows] for s, rows in out.items()} == dict(
        train=["s0", "s1", "s2", "s3"], val=["s11"], ood=[])
    often = dict(train=[row(i, said="Said five times.") for i in range(5)], val=[], ood=[])
    assert len(text.curate(often)["train"]) == 5
    assert len(text.curate(often, often=4, keep=2)["train"]) == 2
    assert text.curate(often)["train"][1] == dict(prompt="p1", completion="Said five times.",
                                                  source="s1")


def test_a_file_s_split_is_its_path_s():
    """whole packages are out of the domain; of the others one in twenty, by hash"""
    for rel in ("asyncio/a.py", "xml/dom/x.py", "mailbox.py", "statistics.py"):
        assert text.split_of(rel) == "ood"
    assert text.split_of("lib/asyncio.py") != "ood" != text.split_of("xmlrpc/client.py")
    names = [f"m{i}.py" for i in range(400)]
    val = [x for x in names if int(hashlib.sha256(x.encode()).hexdigest()[:8], 16) % 20 == 0]
    assert [x for x in names if text.split_of(x) == "val"] == val and len(val) > 10
    topics = {d for split in ("train", "ood") for d in text.stdlib(split)}
    assert not [x for x in text.stdlib("val") if x in topics and not x.startswith("# ")]


def test_real_pairs_are_clean_and_do_not_leak(pairs):
    assert len(pairs["train"]) > 3500 and len(pairs["val"]) > 100 and len(pairs["ood"]) >= 350
    rows = [r for split in text.SPLITS for r in pairs[split]]
    assert len({(r["prompt"], r["completion"]) for r in rows}) == len(rows)
    assert max(Counter(r["completion"] for r in rows).values()) <= 5
    for r in rows:
        said = r["completion"]
        assert said == " ".join(said.split()) and 3 <= len(said.split()) <= 30
        assert len(r["prompt"]) <= 300
        assert r["prompt"].startswith("# ") and r["prompt"].endswith('"""')
    defs = {split: {(r["prompt"].split("\n")[-2].strip(), r["completion"]) for r in rows
                    if r["prompt"].count("\n") == 2
                    + ("\nclass " in r["prompt"])}                               # a def of one line
            for split, rows in pairs.items()}
    assert not defs["train"] & (defs["val"] | defs["ood"]) and len(defs["train"]) > 2000
    for split, files in text.sources().items():
        assert {r["source"].rpartition(":")[0] for r in pairs[split]} <= {rel for rel, _ in files}


def test_the_prompt_is_the_source_and_source_names_the_line(pairs):
    for r in random.Random(0).sample(pairs["train"], 100):
        rel, _, line = r["source"].rpartition(":")
        at = (text.ROOT / rel).read_text(encoding="utf-8",
                                         errors="replace").split("\n")[int(line) - 1]
        assert at.strip() and at.strip() in r["prompt"]


def test_the_cache_is_used_and_a_damaged_one_is_made_anew(tmp_path, monkeypatch, pairs):
    made = [path for path in text.CACHE.glob("signatures-*.json")]
    monkeypatch.setattr(text, "CACHE", tmp_path)
    shutil.copytree(made[0].parent, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(text, "file_pairs", lambda *a: pytest.fail("parsed in spite of the cache"))
    assert text.signatures("val") == pairs["val"]
    for path in tmp_path.glob("signatures-*.json"):
        path.write_text("{")
    monkeypatch.setattr(text, "file_pairs", lambda rel, source: [])
    assert text.signatures("val") == [] and text.signatures("val") == []
    assert not list(tmp_path.glob("*.tmp"))


def test_other_sources_are_parsed_anew(tmp_path, monkeypatch):
    def sentences(said):
        write(tmp_path / "a.py", [f'def f():\n    """{said}"""\n'])
        return [r["completion"] for r in text.signatures("val")]
    monkeypatch.setattr(text, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(text, "sources",
                        lambda: dict(train=[], val=[("a.py", tmp_path / "a.py")], ood=[]))
    assert sentences("Says one thing.") == ["Says one thing."]
    assert sentences("Says another thing.") == ["Says another thing."]
    assert len(list((tmp_path / "cache").glob("*.json"))) == 2


# --- ROUGE-L --------------------------------------------------------------------------------------

@pytest.mark.parametrize("reference, candidate, f", [
    ("police killed the gunman", "police kill the gunman", 0.75),  # Lin 2004 §3.1: LCS 3 of 4 and 4
    ("police killed the gunman", "the gunman kill police", 0.5),
    ("police killed the gunman", "the gunman police killed", 0.5),
    ("Return the NAME.", "return (the) name", 1.0), ("a b c d", "b d", 2 / 3), ("a", "", 0.0),
    ("", "a", 0.0), ("", "", 0.0),
    ("a", "b", 0.0), ("a a a", "a", 0.5)])
def test_rouge_l_by_hand(reference, candidate, f):
    assert text.rouge_l(reference, candidate) == pytest.approx(f, abs=1e-12)


def test_rouge_l_is_the_textbook_recursion():
    rng = random.Random(0)
    for _ in range(300):
        a, b = ([rng.choice("abcd") for _ in range(rng.randint(1, 90))] for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                longest = max(table[i][j + 1], table[i + 1][j])
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else longest
        expected = 2 * table[-1][-1] / (len(a) + len(b))
        a, b = " ".join(a), " ".join(b)
        assert text.rouge_l(a, b) == text.rouge_l(b, a) == pytest.approx(expected)


# --- downloads ------------------------------------------------------------------------------------

@pytest.fixture
def play(tmp_path, monkeypatch):
    """A named download "play", served from a file."""
    source = write(tmp_path / "input.txt", ["to be or not"] * 100)
    monkeypatch.setattr(text, "CACHE", tmp_path / "cache")
    sha = text.hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setitem(text.NAMED, "play", (source.as_uri(), sha))
    return source, sha


def test_download_is_fetched_once_and_checked(play):
    source, _ = play
    got = text.download("play")
    assert got.read_bytes() == source.read_bytes() and got == text.CACHE / "play.txt"
    source.unlink()
    assert text.download("play") == got
    assert "".join(text.documents("play", s)[0] for s in ("train", "val")) == got.read_text()


def test_download_offline_says_where_the_file_goes(play):
    source, sha = play
    source.rename(source.with_name("by-hand"))
    with pytest.raises(UserError, match="cannot fetch play") as e:
        text.download("play")
    assert str(text.CACHE
               / "play.txt") in str(e.value) and sha in str(e.value) and "\n" not in str(e.value)
    text.CACHE.mkdir(exist_ok=True)
    shutil.copy(source.with_name("by-hand"), text.CACHE / "play.txt")
    assert text.download("play")


def test_another_file_is_refused_and_not_kept(play):
    source, sha = play
    source.write_text("tampered")
    with pytest.raises(UserError, match=sha):
        text.download("play")
    assert not list(text.CACHE.glob("*"))


def test_named_rows_are_complete():
    for url, sha in text.NAMED.values():
        assert url.startswith("https://") and re.fullmatch("[0-9a-f]{64}", sha)


# --- files ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("lines, message", [
    ([{"a": 1}, "{broken", {"a": 2}], r"f\.jsonl:2: not a JSON object"),
    ([{"a": 1}, "", {"a": 2}], r"f\.jsonl:2: "),
    ([{"a": 1}, "[1]"], r"f\.jsonl:2: "), (["3"], r"f\.jsonl:1: "),
    ([""], r"f\.jsonl: the file is empty"), ([{"a": 1}, "[" * 100_000], r"f\.jsonl:2: ")])
def test_malformed_jsonl_names_file_and_line(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        text.read_jsonl(write(tmp_path / "f.jsonl", lines))


def test_jsonl_survives_odd_but_legal_files(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes("\ufeff".encode() + '{"a": "x\u2028y"}\r\n{"a": "é"}\n\n'.encode())
    assert text.read_jsonl(path) == [{"a": "x\u2028y"}, {"a": "é"}]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        text.read_jsonl(path)


@pytest.mark.parametrize("name, content", [
    ("one.txt", "\n".join(f"line {i}" for i in range(400))), ("flat.txt", "x" * 400),
    ("many.txt", "<|endoftext|>".join(f"document {i}" for i in range(40))),
    ("rows.jsonl", "\n".join(json.dumps(dict(text=f"row {i}")) for i in range(40)))])
def test_val_is_the_last_twentieth(tmp_path, name, content):
    path = write(tmp_path / name, [content])
    train, val = (text.documents(str(path), split) for split in ("train", "val"))
    if len(train) == 1:
        assert train[0] + val[0] == content and 0.04 < len(val[0]) / len(content) < 0.08
        assert name == "flat.txt" or val[0].startswith("line")
    else:
        assert len(train) == 38 and len(val) == 2 and val[-1].endswith("39")


def test_documents_are_what_stands_between_marks(tmp_path):
    """blank ones are none; a text of one line is cut by characters"""
    path = write(tmp_path / "a.txt", ["one<|endoftext|>  \n<|endoftext|>two<|endoftext|>three"])
    assert text.documents(str(path)) == ["one", "two"]
    assert text.documents(str(path), "val") == ["three"]
    path = write(tmp_path / "b.txt", ["ab" * 20])
    assert [len(text.documents(str(path), x)[0]) for x in ("train", "val")] == [38, 2]
    with pytest.raises(UserError, match="there is no text in it"):
        text.documents(str(write(tmp_path / "c.txt", ["x"])))


def test_a_stream_has_the_ids_that_are_wanted_and_ends_with_a_document(monkeypatch):
    tok, docs = bytes_tokenizer(), ["ab", "c", "def"]
    one, two = [tok.bos, 97, 98, tok.eos], [tok.bos, 99, tok.eos]
    assert text.stream(docs, tok, 3).tolist() == one
    assert text.stream(docs, tok, 4).tolist() == one + two
    assert text.stream(docs, tok, 99).tolist() == one + two + [tok.bos, 100, 101, 102, tok.eos]
    asked = []
    monkeypatch.setattr(text, "documents", lambda *args: asked.append(args) or docs * 3)
    g = torch.Generator().manual_seed(5)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(5)).tolist()
    assert list(text.shuffled("it", g)) == [(docs * 3)[i] for i in order]
    assert asked == [("it", "train")]


def test_a_corpus_is_running_text(tmp_path):
    for row, corpus in ((dict(text="a"), True), (PC, False)):
        assert text.is_corpus(str(write(tmp_path / "f.jsonl", [row, PC]))) == corpus
    assert all(map(text.is_corpus, ("stdlib", "shakespeare", "wikitext2", "my.txt")))
    assert not any(map(text.is_corpus, ("gsm8k", "gsm8k_test", "arithmetic")))


@pytest.mark.parametrize("name, message", [
    ("shakespear", "did you mean 'shakespeare'"),
    ("nope.txt", "no file and no named data 'nope.txt'")])
def test_missing_data_gets_the_nearest_name(name, message):
    with pytest.raises(UserError, match=message):
        text.documents(name)


def test_wrong_splits_and_rows_are_named(tmp_path):
    path = write(tmp_path / "f.jsonl", [dict(text="a"), dict(txt="b")])
    with pytest.raises(UserError, match=r'f\.jsonl:2: no string under "text"'):
        text.documents(path)
    for call, args in ((text.documents, (path, "ood")), (text.stdlib, ("valid",)),
                       (text.signatures, ("test",))):
        with pytest.raises(UserError, match="no split"):
            call(*args)


def test_split_rows_keeps_equal_prompts_together():
    rows = [dict(prompt=f"p{i % 64}", i=i) for i in range(640)]
    train, val = text.split_rows(rows, "train"), text.split_rows(rows, "val")
    assert len(val) == 40 and len(train) == 600
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in val}
    assert text.split_rows(rows[::-1], "val") == val[::-1]


# --- schemas --------------------------------------------------------------------------------------

USER, BOT = dict(role="user", content="hi"), dict(role="assistant", content="hello")
PC = dict(prompt="p", completion="c")
HI = dict(prompt="user: hi\nassistant: ")


@pytest.mark.parametrize("row, want", [
    (PC, PC), (PC | dict(id=7), PC), (PC | dict(label=True), PC | dict(label=True)),
    (PC | dict(label=0), PC | dict(label=False)),
    (dict(question="p", answer="c"), PC), (dict(prompt="p", chosen="c", rejected="r"), PC),
    (dict(instruction="p", input="", output="c"), PC),
    (dict(instruction="p", input="x", output="c"), PC | dict(prompt="p\n\nx")),
    (dict(instruction="p", instances=[dict(input="", output="c")]), PC),
    (dict(messages=[USER, BOT]), HI | dict(messages=[USER], completion="hello")),
    (dict(messages=[USER, BOT, USER, BOT]),
     dict(prompt="user: hi\nassistant: hello\nuser: hi\nassistant: ",
          messages=[USER, BOT, USER], completion="hello"))])
def test_schemas_are_normalised(row, want):
    assert text.normalise(row) == want


def test_rows_without_any_completion_are_refused(tmp_path):
    blank = PC | dict(completion=" ")
    assert len(text.examples(write(tmp_path / "f.jsonl", [PC, blank]))) == 2
    with pytest.raises(UserError, match="every completion is empty"):
        text.examples(write(tmp_path / "g.jsonl", [blank]))


@pytest.mark.parametrize("line, words", [
    ('{"a": "\\ud83d"}', "is half of a character"), ('{"a": 1, "a": 2}', "not a JSON object")])
def test_halves_of_characters_and_keys_that_come_twice_are_refused(line, words, tmp_path):
    whole = '{"a": "\\ud83d\\ude00"}'
    assert text.read_jsonl(write(tmp_path / "f.jsonl", [whole])) == [{"a": "\U0001f600"}]
    with pytest.raises(UserError, match=rf"f\.jsonl:2: .*{words}"):
        text.read_jsonl(write(tmp_path / "f.jsonl", [whole, line]))


@pytest.mark.parametrize("row", [
    {}, dict(prompt="p", completion=3), dict(prompt=None, completion="c"), PC | dict(label="yes"),
    dict(prompt="p", chosen="c"), dict(question="q", answer=["a"]), dict(messages=[]),
    dict(chosen="c", rejected="r"), dict(prompt="p", chosen="c", rejected=3),
    dict(instruction="i", instances=[]), dict(instruction="i", input=1, output="o")])
def test_unknown_schemas_name_file_line_and_what_is_accepted(row, tmp_path):
    with pytest.raises(UserError, match=r"f\.jsonl:2: no schema fits .*accepted are .*chosen"):
        text.examples(write(tmp_path / "f.jsonl", [PC, row]))
