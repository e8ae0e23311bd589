"""data/tokenizer.py: hand-worked merges, exact chat ids, equality with Hugging Face in both
directions."""
import json
import os
import random
import sysconfig
import unicodedata
from pathlib import Path

import pytest
import tiktoken
import torch

from data import tokenizer as T
from data.run import UserError
from data.tokenizer import (SPECIALS, Tokenizer, bytes_tokenizer, char_tokenizer, get, named,
                            train_bpe)

DATA = Path(__file__).parents[1] / os.environ.get("DATA_DIR", "../shared/data")
CODE = [path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:24]]
PIECES = ["'s", "'S", "'ſ", "K", "é", "e\u0301", "\u0301", "ﬁ", "😀", "🇩🇪", "12", "345", "٣", "²",
          "½", "ß",
          "👩‍👩‍👧", "한국", "日本語", "مرحبا", "नमस्ते", "\u212b", "\u1100\u1161", "the ", " the",
          "self.", "==", "aaaaaa", "\r\n", "\n\n", "   ",
          *"\0\t\n\v\f\r \x1c\x1f\x85\xa0\u1680\u180e\u2003\u2028\u200b\u3000\ufeff"]


def strings(n, seed=0):
    """n random Unicode strings: awkward pieces, ASCII, and code points from everywhere but the
    surrogates."""
    rng = random.Random(seed)
    draw = [lambda: rng.choice(PIECES), lambda: chr(rng.randint(32, 126)),
            lambda: chr(rng.randint(0, 0x2FFF)),
            lambda: chr(rng.choice([rng.randint(0, 0xD7FF), rng.randint(0xE000, 0x10FFFF)]))]
    for _ in range(n):
        yield "".join(rng.choices(draw, [5, 5, 2, 1])[0]() for _ in range(rng.randint(0, 25)))


@pytest.fixture(scope="module")
def bpe():
    """600 ids trained on CODE."""
    return train_bpe(CODE, 600)


@pytest.fixture(params=["bytes", "bpe"])
def tok(request, bpe):
    """Both kinds in turn: bytes alone, and with merges."""
    return bytes_tokenizer() if request.param == "bytes" else bpe


# --- text and ids ---------------------------------------------------------------------------------

def test_nothing_is_lost(tok):
    for text in ["", "\0", "\r\n", "\u0301", "e\u0301", "😀", *CODE[:4], *strings(1000)]:
        ids = tok.encode(text)
        assert tok.decode(ids) == tok.decode(torch.tensor(ids)) == text
        assert not set(ids) & set(tok.specials.values())


def test_text_outside_the_pattern_is_kept():
    tok = train_bpe(["ab 12 ab"], 256 + len(SPECIALS), pattern=r"\p{N}+")
    assert tok.decode(tok.encode("ab 12 é!")) == "ab 12 é!"


def test_special_text_is_plain_unless_asked(tok):
    text = "a<|im_end|><|bos|>b"
    assert tok.decode(tok.encode(text)) == text
    end, bos = tok.specials["<|im_end|>"], tok.bos
    assert tok.encode(text, specials=True) == [*tok.encode("a"), end, bos, *tok.encode("b")]
    assert tok.decode(tok.encode(text, specials=True)) == "ab"
    assert tok.decode(tok.encode(text, specials=True), skip_specials=False) == text


def test_the_longest_special_wins():
    specials = {"<a>": 256, "<a>b": 257}
    tok = Tokenizer([bytes([b]) for b in range(256)] + [b"<a>", b"<a>b"], list(range(256)),
                    specials,
                    bos=None, eos=None, pad=None)
    assert tok.encode("<a>b<a>", specials=True) == [257, 256]


def test_partial_utf8_decodes_to_the_replacement_character():
    tok = bytes_tokenizer()
    ids = tok.encode("é😀")                                           # 2 + 4 bytes
    assert tok.decode(ids[:1]) == tok.decode(ids[1:2]) == "\ufffd"
    assert tok.decode(ids[:5]) == "é\ufffd"
    assert tok.decode([104, 10_000, 105]) == "hi"  # the padded tail of an embedding


def test_bos_eos_and_pad_differ(tok):
    for t in (tok, char_tokenizer("ab")):
        assert len({t.bos, t.eos, t.pad}) == 3
        assert [t.tokens[i] for i in (t.pad, t.bos, t.eos)] == [b"<|pad|>", b"<|bos|>", b"<|eos|>"]
    assert bytes_tokenizer().vocab_size == 261


def test_a_prompt_is_bos_the_text_and_the_hint_or_the_chat():
    tok, hinted = bytes_tokenizer(), dict(prompt="ab", hint="c")
    assert tok.prompt("ab") == [tok.bos, *b"ab"] and tok.prompt(hinted) == [tok.bos, *b"abc"]
    assert tok.prompt(hinted, chat=True) == tok.render([dict(role="user", content="abc")])
    own = [dict(role="system", content="x"), dict(role="user", content="y")]
    assert tok.prompt(hinted | dict(messages=own), chat=True) == tok.render(own)
    bare = Tokenizer([bytes([b]) for b in range(256)], list(range(256)), {}, bos=None, eos=None,
                     pad=None)
    assert bare.prompt("a") == [*b"a"]


def test_how_many_ids_spell_so_many_characters():
    tok = train_bpe(["aaab ab ab"], 256 + 4 + len(SPECIALS))
    ids = tok.encode("aaab ab aab")                             # aaab| ab| |a|ab
    assert [tok.spelled(ids, n) for n in (0, 1, 4, 5, 7, 8, 9, 10, 11)] == [0, 1, 1, 2, 2, 3, 4, 5,
                                                                           5]


# --- training -------------------------------------------------------------------------------------

def test_merges_worked_by_hand():
    """Pieces: "aaab" once, " ab" twice.   Counts: ab 3, aa 2, " a" 2  ->  merge ab.
    Now a a ab | " " ab:   " ab" 2, aa 1, a+ab 1  ->  merge " ab".   Now aa 1 and a+ab 1: a tie, and
    the smaller pair of ids (97, 97) goes first  ->  aa, then aa+ab."""
    tok = train_bpe(["aaab ab ab"], 256 + 4 + len(SPECIALS))
    assert tok.tokens[256:260] == [b"ab", b" ab", b"aa", b"aaab"]
    assert tok.encode("aaab ab aab") == [259, 257, 32, 97, 256]
    with pytest.raises(UserError, match="1 more than the texts give"):
        train_bpe(["aaab ab ab"], 256 + 5 + len(SPECIALS))


def test_a_special_s_text_is_never_one_merged_token():
    """its seven letters give five merges, and the sixth would be the whole"""
    tok = train_bpe(["<|pad|> <|pad|>"], 256 + 5 + len(SPECIALS), pattern="[^ ]+| ")
    assert max(map(len, tok.tokens[256:-len(SPECIALS)])) < 7
    with pytest.raises(UserError, match="1 more than the texts give"):
        train_bpe(["<|pad|> <|pad|>"], 256 + 6 + len(SPECIALS), pattern="[^ ]+| ")


def test_counts_stay_right_while_merging(bpe):
    """The slow definition: recount every pair before each merge."""
    text = CODE[0][:3000]
    pieces = [hit[0].encode() for hit in T.compiled(T.total(T.PATTERN)).finditer(text)]
    words, merged = [[bytes([b]) for b in piece] for piece in pieces], []
    for _ in range(60):
        count, number = {}, {bytes([b]): b for b in range(256)} | {t: 256 + n
                                                                   for n, t in enumerate(merged)}
        for pair in (pair for word in words for pair in zip(word, word[1:])):
            count[pair] = count.get(pair, 0) + 1
        best = min(count, key=lambda pair: (-count[pair], number[pair[0]], number[pair[1]]))
        merged.append(best[0] + best[1])
        for word in words:
            for n in range(len(word)):
                if tuple(word[n:n + 2]) == best:
                    word[n:n + 2] = [merged[-1]]
    assert train_bpe([text], 256 + 60 + len(SPECIALS)).tokens[256:316] == merged


def test_training_is_deterministic_and_ids_are_in_order(bpe):
    again = train_bpe(iter(CODE), 600)
    assert again.tokens == bpe.tokens and again.vocab_size == 600
    assert bpe.tokens[:256] == [bytes([b]) for b in range(256)]
    assert bpe.specials == {text: 595 + n for n, text in enumerate(SPECIALS)}
    assert len(bpe.encode(CODE[0])) < 0.55 * len(CODE[0].encode())             # it does compress


LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def llama3():
    """Bytes and Llama 3's special tokens."""
    tokens = [bytes([b]) for b in range(256)] + [text.encode() for text in LLAMA3]
    return Tokenizer(tokens, list(range(256)), {text: 256 + n for n, text in enumerate(LLAMA3)},
                     bos=256, eos=259, pad=None)


# --- files ----------------------------------------------------------------------------------------

def test_save_then_load_gives_equal_ids(tok, tmp_path):
    tok.save(tmp_path / "one")
    again = get(tmp_path / "one")
    again.save(tmp_path / "two")
    for name in ("tokenizer.json", "tokenizer_config.json"):       # a loaded one is saved unchanged
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    same = ("tokens", "order", "specials", "bos", "eos", "pad", "template", "hidden")
    assert all(getattr(tok, key) == getattr(again, key) for key in same)
    for text in [*strings(300), "<|eos|>x", CODE[1]]:
        assert tok.encode(text, specials=True) == again.encode(text, specials=True)


def test_tokenizer_json_is_consistent(bpe, tmp_path):
    bpe.save(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert sorted(model["vocab"].values()) == list(range(600))
    made = [model["vocab"][left + right] for left, right in model["merges"]]
    assert made == sorted(made) and set(made) == set(range(256,
                                                           595))    # every merged id, in rank order
    assert all(left in model["vocab"] and right in model["vocab"]
               for left, right in model["merges"])


def test_tokens_that_the_listed_merges_cannot_reach_are_never_made():
    """ "abc" is listed as ab + c, but b + c comes first: HF gives a, bc, so must we; "abcd" falls
    with it."""
    pairs = [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c"), (b"abc", b"d"), (b"x", b"y")]
    assert T.reachable(pairs) == [b"bc", b"ab", b"xy"]


LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
OPEN = dict(type="Split", pattern=dict(Regex="("), behavior="Isolated", invert=False)


def write(folder, **change):
    """A minimal tokenizer.json with some parts replaced; a dotted key reaches inside the model."""
    model = dict(type="BPE", vocab={T.LETTER[b]: b for b in range(256)}, merges=[])
    model |= {key.removeprefix("model_"): change.pop(key) for key in list(change)
              if key.startswith("model_")}
    spec = dict(added_tokens=[], normalizer=None, pre_tokenizer=LEVEL, post_processor=None,
                decoder=LEVEL, model=model) | change
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder


def test_a_checkpoint_may_compose_characters_and_put_a_space_before_a_text(tmp_path):
    composed = Tokenizer.load(write(tmp_path, normalizer=dict(type="NFC")))
    assert composed.encode("e\u0301") == [*"\u00e9".encode()]
    level = dict(type="ByteLevel", add_prefix_space=True, use_regex=True)
    spaced = Tokenizer.load(write(tmp_path, pre_tokenizer=level))
    assert [spaced.encode(x) for x in ("a", " a", "")] == [[*b" a"], [*b" a"], []]
    assert spaced.encode("e\u0301") == [*" e\u0301".encode()]


@pytest.mark.parametrize("change, error", [
    (dict(model_type="Unigram"), "holds Unigram, not plain BPE: choose"),
    (dict(model_type="WordPiece"), "holds WordPiece, not"),
    (dict(model_dropout=0.1), "dropout 0.1 makes a text's ids random"),
    (dict(model_unk_token="<unk>"), "unk_token '<unk>' is not in the vocabulary"),
    (dict(model_end_of_word_suffix="</w>"), "'</w>' around words, not"),
    (dict(model_merges=["a b"]), "a merge makes 'ab', which the vocabulary lacks"),
    (dict(normalizer=dict(type="Nmt")), "the normalizer Nmt is none of NFC, "),
    (dict(normalizer=dict(type="Prepend")), "normalizer Prepend: prepend is missing"),
    (dict(pre_tokenizer=None, decoder=None),
     "BPE of characters (pre_tokenizer: none) without a decoder"),
    (dict(pre_tokenizer=dict(type="Sequence", pretokenizers=[dict(type="Metaspace"), LEVEL])),
     "pre_tokenizer Metaspace: replacement is missing"),
    (dict(pre_tokenizer=dict(type="Sequence",
                             pretokenizers=[dict(type="Punctuation", behavior="Odd"), LEVEL])),
     "pre_tokenizer Punctuation: behavior 'Odd' is none of Isolated, "),
    (dict(pre_tokenizer=dict(type="Sequence",
                             pretokenizers=[dict(type="BertPreTokenizer"), LEVEL])),
     "the pre_tokenizer BertPreTokenizer is none of Split, "),
    (dict(decoder=dict(type="WordPiece")), "the decoder of a byte-level BPE is not ByteLevel"),
    (dict(pre_tokenizer=None, decoder=dict(type="CTC")), "the decoder CTC is none of Replace, "),
    (dict(pre_tokenizer=dict(type="Sequence", pretokenizers=[OPEN, OPEN, LEVEL])),
     "the pattern '(' cannot be read"),
    (dict(post_processor=dict(type="Odd")), "the post_processor Odd is none of Template"),
    (dict(post_processor=dict(type="TemplateProcessing", single=[5])),
     "the post_processor TemplateProcessing cannot be read"),
    (dict(added_tokens=[dict(id=5, content="!")]), "'!' has the id 5, but tokenizers reads 33"),
    (dict(added_tokens=[dict(id=257, content="<s>")]),
     "'<s>' has the id 257, but tokenizers reads 256")])
def test_files_that_cannot_be_read_say_why(change, error, tmp_path):
    with pytest.raises(UserError) as e:
        Tokenizer.load(write(tmp_path, **change))
    assert error in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("config, error", [
    ("{", "tokenizer_config.json is not JSON"),
    ('{"eos_token": "</s>"}', "eos_token '</s>' is not in tokenizer.json")])
def test_bad_configs_say_why(config, error, tmp_path):
    (write(tmp_path) / "tokenizer_config.json").write_text(config)
    with pytest.raises(UserError, match=error):
        Tokenizer.load(tmp_path)


def test_bos_eos_pad_come_from_the_first_file_that_says(tmp_path):
    added = [dict(id=256, content="<s>", special=True),
             dict(id=257, content="<tool>", special=False)]
    write(tmp_path, added_tokens=added)
    (tmp_path
     / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}, "pad_token": null}')
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 7, "eos_token_id": [5, 6]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 8, "pad_token_id": 9}')
    tok = Tokenizer.load(tmp_path)
    assert (tok.bos, tok.eos, tok.pad, tok.vocab_size) == (256, 5, None, 258)
    assert tok.decode([65, 256, 257]) == "A<tool>"  # an added token that is not special is shown


@pytest.mark.parametrize("call, error", [
    (lambda tmp: get(tmp), "tokenizer.json does not exist"),
    (lambda tmp: get("gpt22"), "neither a folder nor an encoding; did you mean 'gpt2'"),
    (lambda tmp: train_bpe(CODE, 100), "vocab_size 100 is below the 256 bytes"),
    (lambda tmp: train_bpe(CODE, 300, pattern="(a"), "cannot compile the pattern '"),
    (lambda tmp: T.made([], pattern="(a"), "cannot compile the pattern '(a'"),
    (lambda tmp: char_tokenizer("aba"), "'a' is repeated"),
    (lambda tmp: char_tokenizer("aé"), "'é' is repeated or not ASCII"),
    (lambda tmp: char_tokenizer("ab").encode("abc"), "no token for 'c'"),
    (lambda tmp: char_tokenizer("ab?").encode("a\udc80"), "no token for '\\udc80'"),
    (lambda tmp: char_tokenizer("ab").encode("aé"), "no token for 'é'")])
def test_other_errors(call, error, tmp_path):
    with pytest.raises(UserError) as e:
        call(tmp_path)
    assert error in str(e.value) and "\n" not in str(e.value)


def test_char_tokenizer_is_one_id_per_character():
    tok = char_tokenizer("0123456789+= \n")
    assert tok.specials == {"<|pad|>": 0, "<|bos|>": 1, "<|eos|>": 2} and tok.vocab_size == 17
    assert tok.encode("1+2 =\n") == [4, 13, 5, 15, 14, 16]
    assert tok.decode([1, 4, 13, 5, 2, 0]) == "1+2"


# --- tiktoken's encodings -------------------------------------------------------------------------

def shuffled(bpe):
    """A tiktoken encoding as they come: bytes not in order, a hole before the special, possessive
    digits."""
    rng = random.Random(0)
    ranks = {bytes([b]): n for n, b in enumerate(rng.sample(range(256), 256))}
    ranks |= {token: 256 + n for n, token in enumerate(bpe.tokens[256:595])}
    cl100k = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
              r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s")
    return tiktoken.Encoding("shuffled", pat_str=cl100k, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 600})


def test_named_gives_tiktokens_ids(bpe, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: shuffled(bpe))
    tok = named("gpt2")
    assert (tok.bos, tok.eos, tok.pad, tok.vocab_size) == (600, 600, None, 601)
    for text in [CODE[2], *strings(500)]:
        assert tok.encode(text) == shuffled(bpe).encode_ordinary(text)


def test_named_says_that_it_is_offline(monkeypatch):
    def offline(name):
        raise ConnectionError("no route")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="must download 'gpt2' once and is offline"):
        get("gpt2")


# --- Hugging Face ---------------------------------------------------------------------------------

def assert_same_as_hf(folder, texts):
    """AutoTokenizer and load agree on the ids of the texts, on their decoding, and on random
    ids."""
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(str(folder))
    ours = Tokenizer.load(folder)
    assert (ours.bos, ours.eos, ours.pad) == (theirs.bos_token_id, theirs.eos_token_id,
                                              theirs.pad_token_id)
    rng = random.Random(0)
    for text in texts:
        ids = ours.encode(text, specials=True)  # as HF reads special text by default
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], text[:99]
        for some in (ids, rng.choices(range(ours.vocab_size), k=12)):
            assert ours.decode(some) == theirs.decode(some, skip_special_tokens=True)
            assert ours.decode(some, skip_specials=False) == theirs.decode(some)
    return ours, theirs


@pytest.mark.parametrize("kind", ["bytes", "bpe", "char", "named", "llama3"])
def test_transformers_reads_what_we_save(kind, bpe, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: shuffled(bpe))
    alphabet = "".join(map(chr, range(32, 91))) + "\n"
    tok = dict(bytes=bytes_tokenizer, bpe=lambda: bpe, char=lambda: char_tokenizer(alphabet),
               named=lambda: named("gpt2"), llama3=llama3)[kind]()
    tok.save(tmp_path)
    rng = random.Random(1)
    plain = ["".join(rng.choices(alphabet, k=30)) for _ in range(300)]
    texts = plain if kind == "char" else ["a<|im_end|> <|eos|>b<|eot_id|>", *strings(1000),
                                          *CODE[:8]]
    ours, theirs = assert_same_as_hf(tmp_path, texts)
    assert all(ours.encode(text) == tok.encode(text) for text in texts)


def hf(pattern="", digits=False, prefix=False, nfc=False, ignore_merges=False, trained=True):
    """A tokenizer made by Hugging Face's own library; ids are shuffled: they are not in merge
    order."""
    lib = pytest.importorskip("tokenizers")
    pre, level = lib.pre_tokenizers, lib.pre_tokenizers.ByteLevel
    made = lib.Tokenizer(lib.models.BPE(ignore_merges=ignore_merges))
    made.normalizer = lib.normalizers.NFC() if nfc else None
    made.pre_tokenizer, made.decoder = level(add_prefix_space=prefix), lib.decoders.ByteLevel()
    if pattern:
        made.pre_tokenizer = pre.Sequence([pre.Split(lib.Regex(pattern), "isolated"),
                                           level(add_prefix_space=False, use_regex=False)])
    if digits:
        made.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True),
                                           level(add_prefix_space=False)])
    made.train_from_iterator(CODE[:8], lib.trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=level.alphabet(), show_progress=False))
    spec = json.loads(made.to_str())
    ids = random.Random(0).sample(range(700), 700)
    spec["model"]["vocab"] = dict(zip(spec["model"]["vocab"], ids))
    if not trained:  # some tokens are out of reach then
        random.Random(0).shuffle(spec["model"]["merges"])
    made = lib.Tokenizer.from_str(json.dumps(spec))
    made.add_special_tokens(["<|im_start|>", "<|im_end|>", *LLAMA3])
    made.add_tokens(["<tool_call>"])
    return made


LLAMA3_SPLIT = T.PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")


KINDS = dict(
    gpt2=dict(), roberta=dict(prefix=True), smollm=dict(digits=True),
    qwen2=dict(pattern=T.PATTERN, nfc=True),
    llama3=dict(pattern=LLAMA3_SPLIT, ignore_merges=True),
    gaps=dict(pattern=r"\p{L}+|\p{N}{1,3}+"),  # and Oniguruma's own reading of {1,3}+
    mixed=dict(pattern=T.PATTERN, trained=False))


@pytest.mark.parametrize("kind", KINDS)
def test_we_read_what_tokenizers_writes(kind, tmp_path):
    hf(**KINDS[kind]).save(str(tmp_path / "tokenizer.json"))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    texts = ["a<|im_start|>b<tool_call>  c", *strings(600), *CODE[8:12]]
    if kind == "qwen2":  # HF's NFC does not know the combining marks of later Unicode
        old = unicodedata.ucd_3_2_0
        texts = ["".join(c for c in s if unicodedata.combining(c) == old.combining(c))
                 for s in texts]
    ours, _ = assert_same_as_hf(tmp_path, texts)
    assert ours.decode(ours.encode("<tool_call>", specials=True)) == "<tool_call>"


def test_a_real_checkpoint_reads_alike():
    folder, story = DATA.parent / "models" / "stories260k", DATA / "tinystories-30k.txt"
    if not folder.is_dir() or not story.is_file():
        pytest.skip(f"needs {folder} and {story}: set DATA_DIR")
    tok = Tokenizer.load(folder)
    text = story.read_text(encoding="utf-8")
    assert tok.decode(tok.encode(text)) == text and (tok.bos, tok.eos, tok.pad) == (1, 2, None)
    assert_same_as_hf(folder, [text, *text.splitlines(), *strings(2000)])
