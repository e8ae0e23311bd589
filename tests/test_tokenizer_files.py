"""data/tokenizer.py on folders that others wrote: added tokens of every flag, what begins a text,
BPE over characters with byte fallback, and the splits, normal forms and decoders of families.

The ids in VALUES are those of Hugging Face's tokenizers 0.23.3 on the same tokenizer.json
(encode(text, add_special_tokens=False), once with encode_special_tokens; decode).
"""
import json
import os
import random
import unicodedata

import pytest
from test_tokenizer import LEVEL, hf, strings

from data import tokenizer as T
from data.run import UserError
from data.tokenizer import Tokenizer, bytes_tokenizer

FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
FALLBACK = [f"<0x{b:02X}>" for b in range(256)]
PAIRS = ["▁ t", "h e", "▁t he", "l l", "▁ ▁", "▁▁ ▁▁", "日 本"]
TEXTS = ["<unk>", "<s>", "</s>", *FALLBACK, *"▁thelo日本", *(x.replace(" ", "") for x in PAIRS)]


def added(i, text, *flags):
    """An added token of tokenizer.json."""
    return dict(id=i, content=text, **{flag: flag in flags for flag in FLAGS})


def sequence(name, *steps):
    """One step as it is, several as a Sequence."""
    return steps[0] if len(steps) == 1 else {"type": "Sequence", name: [*steps]}


def replace(old, new):
    """The step that puts new in the place of old."""
    return dict(type="Replace", pattern=dict(String=old), content=new)


def bytewise(folder, tokens=(), merges=("Ġ t", "h e", "Ġt he"), config=None, **change):
    """A folder with a byte-level BPE: 256 bytes, " t" 256, "he" 257, " the" 258, then the added."""
    vocab = [*T.LETTER.values(), *(m.replace(" ", "") for m in merges)]
    vocab = {text: i for i, text in enumerate(vocab)}
    model = dict(type="BPE", dropout=None, unk_token=None, fuse_unk=False, byte_fallback=False,
                 continuing_subword_prefix=None, end_of_word_suffix=None, vocab=vocab,
                 merges=[*merges], ignore_merges=False)
    spec = dict(version="1.0", truncation=None, padding=None, added_tokens=[*tokens],
                normalizer=None, pre_tokenizer=LEVEL, post_processor=None, decoder=LEVEL,
                model=model | change.pop("model", {})) | change
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return folder


STRIP = dict(type="Strip", content=" ", start=1, stop=0)
FROM_BYTES = [replace("▁", " "), dict(type="ByteFallback"), dict(type="Fuse")]
LLAMA2 = dict(normalizer=sequence("normalizers", dict(type="Prepend", prepend="▁"),
                                  replace(" ", "▁")),
              pre_tokenizer=None, decoder=sequence("decoders", *FROM_BYTES, STRIP))
GEMMA = dict(normalizer=replace(" ", "▁"), decoder=sequence("decoders", *FROM_BYTES),
             pre_tokenizer=dict(type="Split", pattern=dict(String=" "), invert=False,
                                behavior="MergedWithPrevious"))


def metaspace(scheme, split):
    """What transformers 5 makes of Llama 2's: the mark is put by the pre_tokenizer."""
    step = dict(type="Metaspace", replacement="▁", prepend_scheme=scheme, split=split)
    return dict(normalizer=None, pre_tokenizer=step, decoder=step)


def charwise(folder, tokens=(), kind=LLAMA2, **model):
    """A folder with SentencePiece's kind: TEXTS, then the added tokens."""
    ends = [added(i, TEXTS[i], "special") for i in range(3)]
    model = dict(vocab={text: i for i, text in enumerate(TEXTS)}, merges=PAIRS, byte_fallback=True,
                 unk_token="<unk>", fuse_unk=True) | model
    return bytewise(folder, [*ends, *tokens], model=model, **kind)


N = len(TEXTS)
MANY = [added(259, "<think>"), added(260, "<l>", "lstrip"), added(261, "<r>", "rstrip"),
        added(262, "<w>", "single_word"), added(263, "<|s|>", "special"), added(264, "  "),
        added(265, "<think>!"), added(266, "<lr>", "lstrip", "rstrip", "special")]
SOME = [added(N, "<think>"), added(N + 1, "<n>", "normalized"), added(N + 2, "<r>", "rstrip")]
SPLITS = sequence("pretokenizers", *(
    dict(type="Split", pattern=dict(Regex=x), behavior="Isolated", invert=False)
    for x in (r"\p{N}{1,3}", "[日本]+", r"\s+(?!\S)|\s+|[^\s]+")), LEVEL | dict(use_regex=False))
FALCON = sequence("pretokenizers", dict(type="Punctuation", behavior="Contiguous"), LEVEL,
                  dict(type="Digits", individual_digits=False),
                  dict(type="Split", pattern=dict(Regex="[0-9][0-9]"), behavior="Isolated",
                       invert=False))
LOWER = sequence("normalizers", dict(type="NFD"), dict(type="Lowercase"),
                 dict(type="Replace", pattern=dict(Regex="[0-9]+"), content="0"))
MAKE = dict(
    many=lambda folder: bytewise(folder, MANY),
    prefixed=lambda folder: bytewise(folder, MANY, pre_tokenizer=LEVEL | dict(
        add_prefix_space=True)),
    nfc=lambda folder: bytewise(folder, [added(259, "é日", "normalized")],
                                normalizer=dict(type="NFC")),
    lower=lambda folder: bytewise(folder, [added(259, "<T>", "normalized"), added(51, "T")],
                                  normalizer=LOWER),
    splits=lambda folder: bytewise(folder, merges=["Ġ t", "1 2", "12 3", "Ġ Ġ"],
                                   pre_tokenizer=SPLITS),
    falcon=lambda folder: bytewise(folder, merges=["1 2", "12 3", "- -"], pre_tokenizer=FALCON),
    whole=lambda folder: bytewise(folder, merges=["h e", "t he"], model=dict(
        ignore_merges=True, merges=["h e"])),
    llama2=lambda folder: charwise(folder, SOME),
    gemma=lambda folder: charwise(folder, SOME, GEMMA),
    first=lambda folder: charwise(folder, SOME, metaspace("first", False)),
    always=lambda folder: charwise(folder, SOME, metaspace("always", True)),
    never=lambda folder: charwise(folder, SOME, metaspace("never", True)),
    unknown=lambda folder: charwise(folder, SOME, byte_fallback=False),
    unfused=lambda folder: charwise(folder, SOME, byte_fallback=False, fuse_unk=False))
# kind: (text, ids, ids if a special's text is plain, the first ids' text), None: the same
VALUES = dict(
    many=[
        ('<think>\n the</think>',
         [259, 198, 258, 27, 14, 83, 71, 72, 77, 74, 29],
         None,
         '<think>\n the</think>'),
        ('the  <l>a <r>  b<w>c <w> the',
         [83, 257, 264, 260, 64, 220, 261, 264, 65, 27, 86, 29, 66, 220, 262, 258],
         None,
         'the  <l>a <r>  b<w>c <w> the'),
        ('<|s|> <think>!<think>',
         [263, 220, 265, 259],
         [27, 91, 82, 91, 29, 220, 265, 259],
         ' <think>!<think>'),
        ('a   <lr>   <lr>  <l>b',
         [64, 264, 266, 264, 266, 264, 260, 65],
         [64, 264, 220, 27, 75, 81, 29, 264, 220, 27, 75, 81, 29, 264, 260, 65],
         'a      <l>b'),
        (' 日  the', [220, 162, 245, 98, 264, 83, 257], None, ' 日  the'),
        ('b<w> x<w>c <w>', [65, 27, 86, 29, 220, 87, 27, 86, 29, 66, 220, 262], None,
         'b<w> x<w>c <w>')],
    prefixed=[
        ('a<think>b <think> c',
         [220, 64, 259, 220, 65, 220, 259, 220, 66],
         None,
         ' a<think> b <think> c'),
        ('<|s|>x', [263, 220, 87], [220, 27, 91, 82, 91, 29, 87], ' x')],
    nfc=[
        ('é日é', [259, 127, 102], None, 'é日é'),
        ('é日 the', [259, 258], None, 'é日 the')],
    lower=[
        ('É12<T> T<t>x', [68, 136, 223, 15, 27, 51, 29, 220, 51, 259, 87], None, 'é0<T> T<t>x')],
    splits=[
        ('1234  日本12 the\n',
         [258, 19, 259, 162, 245, 98, 162, 250, 105, 257, 220, 83, 71, 68, 198],
         None,
         '1234  日本12 the\n'),
        ('   1', [259, 220, 16], None, '   1')],
    falcon=[
        ('a--1234!?12 -- ²3',
         [64, 258, 256, 18, 19, 0, 30, 256, 220, 258, 220, 126, 110, 18],
         None,
         'a--1234!?12 -- ²3')],
    whole=[
        ('the the he', [257, 220, 83, 256, 220, 256], None, 'the the he')],
    llama2=[
        ('the hello', [269, 259, 268, 270, 264], None, 'the hello'),
        (' the', [259, 269], None, ' the'),
        (' the  ', [259, 269, 271], None, ' the  '),
        ('日本語\n', [259, 273, 235, 173, 161, 13], None, '日本語\n'),
        ('<think> the<think>the', [274, 259, 269, 274, 269], None, '<think>  the<think> the'),
        ('a<n>b<n> <r>  the',
         [259, 100, 63, 113, 65, 101, 63, 113, 65, 259, 276, 269],
         None,
         'a<n>b<n> <r> the'),
        ('</s>x', [2, 259, 123], [259, 63, 50, 118, 65, 123], 'x'),
        ('', [], None, ''),
        ('    tt', [272, 267, 260], None, '    tt'),
        ('é😀', [259, 198, 172, 243, 162, 155, 131], None, 'é😀')],
    gemma=[
        ('the hello', [260, 268, 259, 268, 270, 264], None, 'the hello'),
        (' the', [269], None, ' the'),
        (' the  ', [269, 271], None, ' the  '),
        ('日本語\n', [273, 235, 173, 161, 13], None, '日本語\n'),
        ('<think> the<think>the', [274, 269, 274, 260, 268], None, '<think> the<think>the'),
        ('a<n>b<n>', [100, 275, 101, 275], None, 'a<n>b<n>'),
        ('    tt', [271, 259, 267, 260], None, '    tt')],
    first=[
        ('the hello', [269, 259, 268, 270, 264], None, 'the hello'),
        (' the', [269], None, 'the'),
        ('<think>the', [274, 260, 268], None, '<think>the'),
        ('the<think>the', [269, 274, 260, 268], None, 'the<think>the')],
    always=[
        ('the hello', [269, 259, 268, 270, 264], None, 'the hello'),
        (' the', [269], None, 'the'),
        ('the<think>the  t', [269, 274, 269, 259, 267], None, 'the<think> the  t')],
    never=[
        ('the hello', [260, 268, 259, 268, 270, 264], None, 'the hello'),
        (' the the', [269, 269], None, ' the the'),
        ('<think>the', [274, 260, 268], None, '<think>the')],
    unknown=[
        ('the éé日 é', [269, 259, 0, 265, 259, 0], None, 'the 日 ')],
    unfused=[
        ('the éé日 é', [269, 259, 0, 0, 265, 259, 0], None, 'the 日 ')])


@pytest.mark.parametrize("kind", VALUES)
def test_ids_and_text_are_those_of_the_library(kind, tmp_path):
    tok = Tokenizer.load(MAKE[kind](tmp_path))
    for text, ids, plain, shown in VALUES[kind]:
        assert tok.encode(text, specials=True) == ids, text
        assert tok.encode(text) == (plain or ids), text
        assert tok.decode(ids) == shown


def test_an_added_token_that_is_not_special_is_found_in_plain_text(tmp_path):
    tok = Tokenizer.load(bytewise(tmp_path, [added(259, "<think>"), added(260, "</think>"),
                                             added(261, "<|end|>", "special")]))
    text = "<think>\n2+2\n</think>\n4<|end|>"
    ids = [259, 198, 17, 10, 17, 198, 260, 198, 19]               # of GPT-2's alphabet: "!" is 0
    assert tok.encode(text, specials=True) == [*ids, 261]
    assert tok.encode(text) == [*ids, *tok.encode("<|"), *tok.encode("end|>")]
    assert tok.decode([*ids, 261]) == text.removesuffix("<|end|>")
    assert tok.decode([*ids, 261], skip_specials=False) == text


def test_what_ends_a_text_is_special_whatever_its_flag_says(tmp_path):
    folder = bytewise(tmp_path, [added(259, "<end>")], config=dict(eos_token="<end>"))
    tok = Tokenizer.load(folder)
    assert 259 not in tok.encode("a<end>") and tok.encode("a<end>", specials=True)[-1] == 259


def test_merges_cannot_make_a_control_token_of_plain_text(tmp_path):
    """the file lists merges to "<s>", and takes whole pieces"""
    pairs = ["< s", "<s >"]
    tok = Tokenizer.load(bytewise(tmp_path, [added(257, "<s>", "special")], pairs,
                                  model=dict(ignore_merges=True)))
    assert 257 not in tok.encode("<s>") and tok.encode("<s>", specials=True) == [257]
    assert tok.decode(tok.encode("<s>")) == "<s>"


def test_broken_bytes_become_one_replacement_character_each(tmp_path):
    tok = Tokenizer.load(charwise(tmp_path))
    e, acute = 3 + 0xC3, 3 + 0xA9                                                    # é is C3 A9
    shown = {(e, acute): "é", (e,): "\ufffd", (264, e): "o\ufffd", (e, acute, e): "\ufffd" * 3,
             (e, 264, acute): "\ufffdo\ufffd", (259, 259): " ", (269, 269): "the the"}
    assert {ids: tok.decode([*ids]) for ids in shown} == shown


def test_a_character_that_is_cut_is_not_spelled(tmp_path):
    tok = Tokenizer.load(charwise(tmp_path))
    ids = tok.encode("o😀é")                                 # ▁ o, 4 bytes, 2 bytes
    assert len(ids) == 8
    assert [tok.spelled(ids, n) for n in range(4)] == [0, 2, 6, 8]
    ids = bytes_tokenizer().encode("é\ufffd")
    assert [bytes_tokenizer().spelled(ids, n) for n in (0, 1, 2, 9)] == [0, 2, 5, 5]


def test_the_bytes_of_a_token_are_those_of_its_text(tmp_path):
    """other vocabularies are compared with them"""
    tok = Tokenizer.load(charwise(tmp_path))
    assert [tok.tokens[i] for i in (269, 3 + 10, 273)] == [b" the", b"\n", "日本".encode()]
    assert [tok.order[rank] for rank in tok.engine.encode_ordinary("▁the\n")] == [269, 3 + 10]


def test_smollm2_reads_as_the_library_does():
    """a real vocabulary: digits one by one, no BOS, special text plain or special"""
    if not os.environ.get("MODEL_DIR"):
        pytest.skip("needs SmolLM2-135M-Instruct: set MODEL_DIR to its folder")
    tok = Tokenizer.load(os.environ["MODEL_DIR"])
    text, line = "<|im_start|>user\n2 + 12 = 14!<|im_end|>\n", [4093, 198, 34, 1232, 216, 33, 34,
                                                               446, 216, 33, 36, 17]
    assert tok.encode(text, specials=True) == [1, *line, 2, 198]
    assert tok.encode(text) == [44, 108, 306, 79, 3738, 108, 46, *line, 44, 108, 306, 79, 486, 108,
                                46, 198]
    assert tok.begin == [] and (tok.bos, tok.eos) == (1, 2)


# --- what begins a text ---------------------------------------------------------------------------

TEMPLATE = dict(type="TemplateProcessing", pair=[],
                single=[dict(SpecialToken=dict(id="<s>", type_id=0)),
                        dict(Sequence=dict(id="A", type_id=0)),
                        dict(SpecialToken=dict(id="</s>", type_id=0))],
                special_tokens={"<s>": dict(id="<s>", ids=[259], tokens=["<s>"]),
                                "</s>": dict(id="</s>", ids=[260], tokens=["</s>"])})
PLAIN = TEMPLATE | dict(single=TEMPLATE["single"][1:2])


@pytest.mark.parametrize("processor, config, begin", [
    (None, {}, []), (LEVEL, {}, []), (None, dict(add_bos_token=True), [259]),
    (LEVEL, dict(add_bos_token=True), [259]), (None, dict(add_bos_token=False), []),
    (TEMPLATE, {}, [259]), (TEMPLATE, dict(add_bos_token=False), [259]),
    (PLAIN, dict(add_bos_token=True), []),
    (sequence("processors", LEVEL, TEMPLATE), {}, [259]),
    (dict(type="RobertaProcessing", cls=["<s>", 259], sep=["</s>", 260]), {}, [259]),
    (None, dict(add_bos_token=True, bos_token=None), [])])
def test_bos_is_what_the_folder_says(processor, config, begin, tmp_path):
    """a template decides, as in transformers 5; without one, add_bos_token, as in transformers 4"""
    ends = [added(259, "<s>", "special"), added(260, "</s>", "special")]
    folder = bytewise(tmp_path, ends, post_processor=processor, config=dict(bos_token="<s>")
                      | config)
    tok = Tokenizer.load(folder)
    assert tok.begin == begin and tok.encode("the") == [83, 257]
    assert tok.bos == (None if "bos_token" in config else 259)
    tok.save(tmp_path / "again")
    spec = json.loads((tmp_path / "again" / "tokenizer.json").read_text())
    (tmp_path / "again" / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    assert Tokenizer.load(tmp_path / "again").begin == begin           # the file alone says it then
    if processor in (TEMPLATE, PLAIN):
        assert spec["post_processor"] == processor


def test_a_folder_of_an_earlier_version_of_ours_begins_with_bos(tmp_path):
    bytes_tokenizer().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    spec = json.loads(path.read_text())
    assert spec.pop("post_processor")["single"][0] == dict(
        SpecialToken=dict(id="<|bos|>", type_id=0))
    path.write_text(json.dumps(spec))
    assert Tokenizer.load(tmp_path).begin == bytes_tokenizer().begin == [257]


def test_other_programs_files_are_kept(tmp_path):
    (charwise(tmp_path) / "tokenizer.model").write_bytes(b"\xff\x00")
    Tokenizer.load(tmp_path).save(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == b"\xff\x00"


def test_a_folder_with_only_a_sentencepiece_model_says_what_to_do(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError, match="only a tokenizer.model, transformers writes it: AutoTok"):
        Tokenizer.load(tmp_path)


def test_a_character_without_a_token_is_named(tmp_path):
    tok = Tokenizer.load(charwise(tmp_path, byte_fallback=False, unk_token=None))
    with pytest.raises(UserError, match="no token for 'é'"):
        tok.encode("the é")


# --- the two engines ------------------------------------------------------------------------------

def merged(text, place):
    """The definition: join the pair that is listed first, the leftmost of equal ones."""
    parts = [*text]
    while near := [place[pair] for pair in zip(parts, parts[1:]) if pair in place]:
        at = [*zip(parts, parts[1:])].index(min(place, key=lambda x: place[x] != min(near)))
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return parts


def by_rank(text, rank):
    """The same as tiktoken does it: any two neighbours that are a token together."""
    parts = [*text]
    while near := {n: rank[a + b] for n, (a, b) in enumerate(zip(parts, parts[1:]))
                   if a + b in rank}:
        at = min(near, key=near.get)
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return parts


def test_lists_of_pairs_on_every_engine():
    """Random lists over two letters: what is reachable, and that both engines follow the list."""
    rng, left = random.Random(0), 0
    for trial in range(400):
        tokens, pairs = [*"ab"], {}
        for _ in range(rng.randint(1, 10)):
            a, b = rng.choice(tokens), rng.choice(tokens)
            pairs |= {(a, b): 0} if len(a + b) < 9 else {}
            tokens = [*dict.fromkeys([*"ab", *map("".join, pairs)])]
        pairs = rng.sample([*pairs], len(pairs)) if trial % 3 == 0 else [*pairs]
        place = {pair: n for n, pair in enumerate(pairs)}
        texts = ["".join(rng.choices("ab", k=rng.randint(1, 14))) for _ in range(12)]
        ranks = {text: n for n, text in enumerate(tokens)}
        joiner = T.Joiner([], ranks, pairs)
        for text in texts:
            found = [tokens[rank] for rank in joiner.encode_ordinary(text)]
            assert found == merged(text, place), (pairs, text)
        got = T.reachable(pairs)
        left += got is None
        if got is not None:
            assert {*got} == {x for x in tokens[2:] if merged(x, place) == [x]}, pairs
            rank = {text: n for n, text in enumerate(got)}
            assert all(by_rank(text, rank) == merged(text, place) for text in texts), pairs
    assert 20 < left < 200


def test_pairs_that_are_all_listed_go_to_tiktoken(tmp_path):
    """Llama 3's kind: "a b" comes before "ab", of which it is a split all the same"""
    pairs = ["a b", "ab a", "a ba", "b a"]
    for n, (merges, kind) in enumerate([(pairs, "Encoding"), (pairs[1:], "Joiner"),
                                        ([*pairs[:2], pairs[3], pairs[2]], "Joiner")]):
        (tmp_path / str(n)).mkdir()
        vocab = {text: i for i, text in enumerate([*T.LETTER.values(), "ab", "aba", "ba"])}
        tok = Tokenizer.load(bytewise(tmp_path / str(n), model=dict(
            vocab=vocab, merges=merges, ignore_merges=True)))
        assert type(tok.engine).__name__ == kind
        place = {tuple(m.split(" ")): n for n, m in enumerate(merges)}
        for text in ("abaab", "baba", "bbaa", "abab", "aabaa"):
            assert [tok.tokens[i].decode() for i in tok.encode(text)] == merged(text, place)


def test_long_texts_take_time_in_proportion(tmp_path):
    """one piece of 100,000 characters, of which many can join"""
    tok = Tokenizer.load(charwise(tmp_path))
    ids = tok.encode(" " * 99_999)
    assert ids == [272] * 25_000 and tok.decode(ids) == " " * 99_999


# --- Hugging Face ---------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["gpt2", "llama3", "qwen2", *(k for k in MAKE if k != "whole")])
def test_odd_strings_around_tokens_of_every_flag(kind, tmp_path):
    lib, rng = pytest.importorskip("tokenizers"), random.Random(1)
    if kind in MAKE:
        MAKE[kind](tmp_path)
    else:
        split = T.PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")
        hf(**dict(gpt2=dict(), llama3=dict(pattern=split, ignore_merges=True),
                  qwen2=dict(pattern=T.PATTERN, nfc=True))[kind]).save(
                      str(tmp_path / "tokenizer.json"))
    path = tmp_path / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    words = ["<a>", "<a>b", " x ", "  ", "\n\n", "</b>", "日日", "<q>"]
    last = max([*spec["model"]["vocab"].values(), *(a["id"] for a in spec["added_tokens"])])
    known = {a["content"] for a in spec["added_tokens"]}
    for n, text in enumerate(x for x in words if x not in known):
        flags = [flag for flag in FLAGS[1:] if rng.random() < 0.5] + ["special"] * (n % 3 == 0)
        spec["added_tokens"].append(added(last + 1 + n, text, *flags))
    path.write_text(json.dumps(spec), encoding="utf-8")
    ours, theirs = Tokenizer.load(tmp_path), lib.Tokenizer.from_file(str(path))
    old = unicodedata.ucd_3_2_0          # their tables are older, and marks that came later differ
    for text in strings(60):
        text = "".join(c + rng.choice([*words, "", "", ""]) for c in text
                       if unicodedata.category(c)[0] == old.category(c)[0] != "C" or c < " ")
        theirs.encode_special_tokens = False
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, specials=True) == ids, text
        assert ours.decode(ids, skip_specials=False) == theirs.decode(ids, False)
        theirs.encode_special_tokens = True
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


def test_transformers_puts_bos_where_we_do(tmp_path):
    auto = pytest.importorskip("transformers").AutoTokenizer
    tok = bytes_tokenizer()
    tok.save(tmp_path)
    theirs = auto.from_pretrained(str(tmp_path))
    assert theirs("a b")["input_ids"] == [*tok.begin, *tok.encode("a b")] == [257, *b"a b"]
