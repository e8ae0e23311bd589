"""
tokenizer.py - tiktoken behind one small class: bytes, characters, a BPE made here, a checkpoint's.

    tok = get("bytes")                    # 256 bytes and five specials; or a folder, or "gpt2"
    tok = train_bpe(texts, 2048)          # 4 MB of Python source: 2 s on one core
    ids = tok.encode("def f(x):")         # no BOS or EOS; "<|im_end|>" in the text stays plain text
    ids = tok.render([{"role": "user", "content": "2+2?"}])             # the chat template's ids
    tok.save(folder); Tokenizer.load(folder)     # Hugging Face files: transformers gives the same

Map      1 bytes and letters   2 chat templates   3 the tokenizer   4 tokenizer.json   5 made here
Ranks    tiktoken merges by rank: 0..255 are the bytes, 256 + i the i-th merged token; a table gives
         the ids.
Watch    nothing is lost: decode(encode(text)) == text, unless a checkpoint asks for NFC or a prefix
         space.
"""
import heapq
import json
import re
import sys
import unicodedata
from bisect import bisect_left
from collections import Counter, defaultdict
from datetime import datetime
from functools import cache
from itertools import accumulate, groupby
from pathlib import Path

import tiktoken
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tqdm import tqdm

from data.run import UserError, expect, nearest, read_json

SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")    # of what is made here
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM: digits one by one, then GPT-2.  As one pattern, a digit ends a run of spaces as the end
# of the text does.
DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# Qwen2's, our default: single digits (arithmetic is learnable), line breaks apart from indentation
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def total(pattern):
    """The pattern plus one more alternative: the runs of text in which it matches nowhere.

    tiktoken silently drops such text; Hugging Face's "Isolated" keeps each run as one piece, and so
    do we.
    """
    return rf"(?:{pattern})|(?:(?!{pattern})[\s\S])+"


# --- 1 bytes and letters --------------------------------------------------------------------------

# GPT-2's alphabet, one visible letter a byte: printable ones stand for themselves, " " is "Ġ"
LETTER = {b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
LETTER |= {b: chr(256 + n) for n, b in enumerate(sorted(set(range(256)) - LETTER.keys()))}
BYTE = {letter: b for b, letter in LETTER.items()}


def letters(token):
    """Bytes -> the string that stands for them in tokenizer.json.   b" the" -> "Ġthe" """
    return "".join(LETTER[b] for b in token)


def spelled(text):
    """A vocabulary string -> its bytes; outside the alphabet it stands for itself, as HF has it."""
    try:
        return bytes([BYTE[c] for c in text])
    except KeyError:
        return text.encode("utf-8", "replace")


# --- 2 chat templates -----------------------------------------------------------------------------

ROLES = ("system", "user", "assistant")
QUESTION = {"role": "user", "content": "?"}          # any: what stands before an answer
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}{{ '\n' + m['content'] }}<|im_end|>"
          "{{ '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}")
APART = "\ufdd0"          # keeps a special's text in a message plain: a code point of no character
BEGIN, END = "\ufdd1", "\ufdd2"           # around what a template's generation blocks hold


class Generation(Extension):
    """{% generation %} … {% endgeneration %}: what the assistant says, put between BEGIN and
    END."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        mark = [nodes.Output([nodes.TemplateData(x)], lineno=line) for x in (BEGIN, END)]
        return [mark[0], *body, mark[1]]


def refuse(words):
    """What a template calls raise_exception."""
    raise TemplateError(words)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """The filter tojson as chat templates expect it: no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


@cache
def compiled(template):
    """A chat template, ready to render, in Jinja's sandbox with what Hugging Face's templates may
    call. UserError if it is no Jinja."""
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                          extensions=[Generation, loopcontrols])
    jinja.filters["tojson"] = to_json
    jinja.globals["raise_exception"] = refuse
    jinja.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return jinja.from_string(template)
    except TemplateError as e:
        raise UserError(f"the chat template is no Jinja that can be read ({e}): copy "
                        "tokenizer_config.json or chat_template.jinja again") from None


def any_of(texts):
    """A pattern that finds each of the texts, the longest first, in its only group."""
    longest_first = "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
    return re.compile(f"({longest_first or '(?!)'})")


def common(a, b):
    """How many leading entries two lists share."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def check_messages(messages):
    """UserError unless they are a list of {"role", "content"} with texts, as templates want
    them."""
    for n, m in enumerate(messages):
        if missing := [key for key in ("role", "content") if not isinstance(m.get(key), str)]:
            raise UserError(f"message {n} has no text under {missing[0]!r}: write "
                            '{"role": "user", "content": "..."}')
        if m["role"] == "tool" or "tool_calls" in m:
            raise UserError(f"message {n} is of a tool: tools are not supported, take such "
                            "conversations out")
        if m["role"] not in ROLES:
            raise UserError(f"message {n} has the unknown role {m['role']!r}"
                            f"{nearest(m['role'], ROLES)}")


def read_template(folder):
    """A folder's own chat template, "" if it has none. In the order of transformers:
    chat_template.jinja, then tokenizer_config.json (of several the one named default), and what
    processors write, chat_template.json."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_utf8(path)
    files = (folder / name for name in ("tokenizer_config.json", "chat_template.json"))
    found = [read_json(file).get("chat_template") for file in files if file.exists()]
    found = next((x for x in found if x is not None), None)
    if isinstance(found, list):
        named = {x.get("name"): x.get("template") for x in found if isinstance(x, dict)}
        found = named.get("default", found)
    if not isinstance(found, (str, type(None))):
        raise UserError(f"{folder}: chat_template is a {type(found).__name__}: expected its text, "
                        "or a list with one that is named default")
    return found or ""


# --- 3 the tokenizer ------------------------------------------------------------------------------

class Tokenizer:
    """Text <-> ids.  A loaded one saves its files unchanged; one made here writes tokenizer.json
    anew.

    tokens    id -> bytes, special tokens included, holes b""
    order     rank -> id: the 256 single bytes (-1: no such token), then the merged tokens in order
    specials  text -> id of the special and the added tokens
    visible   ids of those that decode always shows
    template  the chat template, in Jinja, "" for none
    names     what it may call by name: {"eos_token": text, …}
    stops     ids that end a completion: EOS, with a chat template also the end of its turns
    direct    a piece that is a token is taken whole, without merges to it (HF: ignore_merges)
    """

    def __init__(self, tokens, order, specials, *, bos, eos, pad, pattern=PATTERN, visible=(),
                 nfc=False, prefix_space=False, direct=False, files=(), template="", names=()):
        self.tokens, self.order, self.specials, self.pattern = tokens, order, specials, pattern
        self.bos, self.eos, self.pad, self.direct = bos, eos, pad, direct
        self.nfc, self.prefix_space, self.files = nfc, prefix_space, dict(files)
        self.hidden = (set(specials.values()) | {bos, eos, pad}) - set(visible)
        self.template, self.names, self.stops = template, dict(names), (eos,)
        controls = {text: i for text, i in specials.items() if i not in set(visible)}
        self.control, self.control_ids = any_of(controls), {*controls.values(), eos}
        self.split = any_of(specials)
        ranks = {bytes([b]): b for b in range(256)}
        ranks |= {tokens[i]: 256 + n for n, i in enumerate(order[256:])}
        try:
            self.engine = tiktoken.Encoding("", pat_str=total(pattern), mergeable_ranks=ranks,
                                            special_tokens={})
        except ValueError as e:
            raise UserError(f"tiktoken cannot compile the pattern {pattern!r} ({e}): "
                            "choose another") from e

    @property
    def vocab_size(self) -> int:
        """Highest id + 1: the rows that an embedding needs."""
        return len(self.tokens)

    def plain(self, text) -> list[int]:
        """Ids of a text in which nothing is special."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        text = " " + text if self.prefix_space and text and text[0] != " " else text
        ids = [self.order[rank] for rank in self.engine.encode_ordinary(text)]
        if -1 in ids:
            absent = {b for b in range(256) if self.order[b] < 0}
            lost = [c for c in text if absent & set(c.encode("utf-8", "surrogatepass"))]
            raise UserError(f"no token for {[*lost, text][0]!r}: take it out or widen the alphabet")
        return ids

    def encode(self, text: str, specials=False) -> list[int]:
        """Ids of a text, no BOS or EOS added.  A special's text is plain unless specials=True."""
        if not specials:
            return self.plain(text)
        ids = []
        for n, part in enumerate(self.split.split(text)):  # plain, special, plain, ..., plain
            ids += [self.specials[part]] if n % 2 else self.plain(part.replace(APART, ""))
        return ids

    def decode(self, ids, skip_specials=True) -> str:
        """Text of a list or tensor of ids.  Broken UTF-8 becomes U+FFFD, an unknown id nothing."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        hidden = self.hidden if skip_specials else ()
        known = [self.tokens[i] for i in ids if 0 <= i < len(self.tokens) and i not in hidden]
        return b"".join(known).decode("utf-8", "replace")

    def spelled(self, ids, chars) -> int:
        """How many of the ids spell the first `chars` characters of their text."""
        return bisect_left(range(len(ids) + 1), chars, key=lambda i: len(self.decode(ids[:i])))

    def prompt(self, problem, chat=False) -> list[int]:
        """Ids that a completion continues, of a text or a task's {"prompt"[, "messages", "hint"]}.

        BOS (if any), the text and the hint; with chat the rendered messages, or the user's turn.
        """
        problem = {"prompt": problem} if isinstance(problem, str) else problem
        if chat:
            return self.render(self.messages(problem))
        text = problem["prompt"] + problem.get("hint", "")
        return ([] if self.bos is None else [self.bos]) + self.encode(text)

    def shown(self, problem, chat=False) -> str:
        """What a model reads of a problem, special tokens included."""
        return self.decode(self.prompt(problem, chat), skip_specials=False)

    @staticmethod
    def messages(problem) -> list[dict]:
        """A problem's messages; without them its text is the user's turn."""
        text = problem["prompt"] + problem.get("hint", "")
        return problem.get("messages") or [{"role": "user", "content": text}]

    def answer(self, text, chat=False, finished=True) -> list[int]:
        """Ids of an answer and of what ends it, unless it is not finished: EOS; with chat as the
        template has them."""
        ids = [*self.encode(text), self.eos]
        if chat:
            ids = self.dialogue([QUESTION, {"role": "assistant", "content": text}])[1]
        end = next(i for i in reversed(range(len(ids))) if ids[i] in self.control_ids)
        return ids if finished else ids[:end]

    def ends(self, chat=False) -> tuple:
        """The ids that end a completion: EOS; with chat also the end of the template's turns."""
        turn = [i for i in self.answer("Yes.", chat) if i in self.control_ids]
        return tuple(dict.fromkeys([*turn[-1:], self.eos]))

    def render(self, messages, reply=True) -> list[int]:
        """[{"role", "content"}] -> ids, those of transformers' apply_chat_template; reply opens the
        assistant's turn. No content can become a special token."""
        return self.rendered(self.written(messages, reply))

    def rendered(self, text) -> list[int]:
        """Ids of a template's text, with marks or without."""
        return self.encode(text.replace(BEGIN, "").replace(END, ""), specials=True)

    def written(self, messages, reply=True) -> str:
        """The template's text of a conversation, with BEGIN and END where it marks them. UserError
        for messages that it refuses."""
        check_messages(messages)
        if not self.template:
            raise UserError("the tokenizer has no chat template: add chat_template.jinja to its "
                            "folder")
        messages = [m | dict(content=self.guard(m["content"])) for m in messages]
        try:
            return compiled(self.template).render(
                messages=messages, add_generation_prompt=reply, tools=None, documents=None,
                **self.names)
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as e:
            raise UserError(f"the checkpoint's chat template refuses a conversation "
                            f"({', '.join(m['role'] for m in messages) or 'empty'}): {e}") from None

    def guard(self, text) -> str:
        """A message in which no special token's text stands: APART is put into each."""
        return self.control.sub(lambda hit: hit[0][0] + APART + hit[0][1:], text)

    def use_chat(self):
        """From now on texts end as the chat template's turns do. A tokenizer without one gets
        ChatML, aloud; where its vocabulary lacks ChatML's tokens they are plain text, and EOS ends
        a turn."""
        if not self.template:
            print("the checkpoint has no chat template: ChatML is used, and saved with it",
                  flush=True)
            end = "<|im_end|>" if "<|im_end|>" in self.specials else "{{ eos_token }}"
            self.template = CHATML.replace("<|im_end|>", end)
            self.names.setdefault("eos_token", self.tokens[self.eos].decode("utf-8", "replace"))
            if self.files:
                self.files["chat_template.jinja"] = self.template
        self.stops = self.ends(chat=True)

    def spans(self, messages, turns="all"):
        """A conversation's text, and where in it the assistant speaks: [(begin, end)], each with
        the special token that ends the turn, if there is one.

        By the template's generation blocks; else a turn begins where the text parts from that of
        what is before it with a reply opened. UserError where later messages change earlier ones.
        """
        text = self.written(messages, reply=False)
        if BEGIN in text:
            pieces = re.split(f"[{BEGIN}{END}]", text)
            at = [0, *accumulate(map(len, pieces))]
            out = [(at[i], at[i + 1]) for i in range(1, len(pieces), 2)]
            return "".join(pieces), out if turns == "all" else out[-1:]
        out, answers = [], [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        for i in answers if turns == "all" else answers[-1:]:
            begin = self.opened(text, messages[:i])
            answer = re.escape(self.guard(messages[i]["content"]).strip())
            patterns = rf"{answer}\s*{self.control.pattern}", self.control.pattern, answer
            found = (re.compile(x).search(text, begin) for x in patterns)
            out.append((begin, next((x.end() for x in found if x), len(text.rstrip()))))
        return text, out

    def opened(self, text, messages) -> int:
        """Where a conversation's text begins to be the answer to its first messages."""
        head = self.written(messages)
        if text.startswith(head):
            return len(head)
        before = self.written(messages, reply=False)         # Qwen 3.5's opened reply has a thought
        if not text.startswith(before):
            raise UserError("the chat template writes a message otherwise once others follow it: "
                            "train the last answers only, --turns last")
        return max(len(before), common(text, head))

    def reached(self, ids, text) -> int:
        """How many of the ids of a longer text spell its beginning `text`; not the one in whose
        midst that ends."""
        part = self.rendered(text)
        n = common(ids, part)
        left = sum(len(self.tokens[i]) for i in part[n:])
        while left > 0 and n < len(ids) and len(self.tokens[ids[n]]) <= left:
            left -= len(self.tokens[ids[n]])
            n += 1
        return n

    def dialogue(self, messages, turns="all"):
        """What training reads of a conversation that ends in an answer -> (ids before the first
        trained answer, ids from there on); of the latter, ~id is read and not trained.

        turns: all of the assistant's, or the "last". An answer ends in the special token that the
        template puts behind it, else the last one in EOS.
        """
        if not messages or messages[-1].get("role") != "assistant":
            raise UserError("a conversation to learn from must end with the assistant's answer")
        text, spans = self.spans(messages, turns)
        ids, trained = self.rendered(text), set()
        for begin, end in spans:
            trained.update(range(self.reached(ids, text[:begin]), self.reached(ids, text[:end])))
        first, last = min(trained, default=len(ids)), max(trained, default=len(ids) - 1)
        closing = self.reached(ids, text[:spans[-1][0]])         # where the last answer begins
        if not self.control_ids & {*ids[closing:last + 1]}:
            ids, last = [*ids[:last + 1], self.eos], last + 1
            trained.add(last)
        return ids[:first], [ids[i] if i in trained else ~ids[i] for i in range(first, last + 1)]

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json as transformers reads them."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, text in (self.files or hf_files(self)).items():
            (Path(folder) / name).write_bytes(text.encode())

    @staticmethod
    def load(folder) -> "Tokenizer":
        """A checkpoint's byte-level BPE from its tokenizer.json; its configs name its ends."""
        path = Path(folder) / "tokenizer.json"
        spec = read_json(path, MISSING)
        check_spec(spec, path)
        pairs, vocab, added = *read_model(spec, path), spec.get("added_tokens") or []
        pattern, prefix_space = read_pattern(spec.get("pre_tokenizer"))
        specials = {a["content"]: a["id"] for a in added}
        tokens = [b""] * (1 + max([*vocab.values(), *specials.values()]))
        for text, i in [*vocab.items(), *specials.items()]:
            tokens[i] = text.encode("utf-8", "replace") if text in specials else spelled(text)
        ids = {spelled(text): i for text, i in vocab.items() if set(text) <= BYTE.keys()}
        merged = reachable(pairs)
        if lost := [token for token in merged if token not in ids]:
            raise UserError(f"{path}: a merge makes {letters(lost[0])!r}, which the vocabulary "
                            "lacks: download it again")
        direct = bool(spec["model"].get("ignore_merges"))
        if direct:
            # HF takes a token that no merge makes if it is a whole piece; here it also merges,
            # after the others: the same where every split is listed (Llama 3), for then its halves
            # never stand alone
            rest = ids.keys() - set(merged) - {text.encode() for text in specials}
            merged += sorted((token for token in rest if len(token) > 1), key=ids.get)
        order = [ids.get(bytes([b]), -1) for b in range(256)] + [ids[token] for token in merged]
        kept = {name: path.with_name(name) for name in KEPT if path.with_name(name).exists()}
        settings = [read_json(path.with_name(name)) for name in SETTINGS
                    if path.with_name(name).exists()]
        return Tokenizer(
            tokens, order, specials, pattern=pattern, prefix_space=prefix_space, direct=direct,
            **{end: read_id(end, settings, vocab | specials) for end in ("bos", "eos", "pad")},
            visible=[a["id"] for a in added if not a.get("special")],
            nfc=read_nfc(spec.get("normalizer")), names=read_names(settings),
            template=read_template(path.parent),
            files={name: read_utf8(file) for name, file in kept.items()})


# --- 4 tokenizer.json -----------------------------------------------------------------------------

KEPT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "chat_template.jinja", "chat_template.json")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
            "config.json")
CHOOSE = "choose a byte-level BPE (Llama 3, Qwen, GPT-2, SmolLM) or train one with train_bpe"
MISSING = ("copy it from the checkpoint's page; if that has only a SentencePiece tokenizer.model, "
           f"{CHOOSE}")
MOST_IDS = 1 << 23  # no tokenizer has more: a larger id is a slip, and fills memory


def read_utf8(path):
    """The text of a checkpoint's file; UserError if it is not UTF-8."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 ({e}): copy it again") from None


def check_spec(spec, path):
    """UserError for a tokenizer.json that lacks a part or has one of another kind."""
    expect(spec, path, ("model",), model="object", added_tokens="list", pre_tokenizer="object",
           normalizer="object")
    for part in ("pre_tokenizer", "normalizer"):
        steps = spec.get(part) or {"type": ""}
        steps = steps.get("pretokenizers", steps.get("normalizers", [steps]))
        right = isinstance(steps, list) and all(isinstance(x, dict) for x in steps)
        if not right or not all(type(x.get("type")) is str for x in steps):
            raise UserError(f'{path}: {part} is no list of {{"type": …}}: download it again')
    expect(spec["model"], f"{path}, model", type="text", vocab="object", merges="list",
           byte_fallback="flag", ignore_merges="flag")
    ids = [*(spec["model"].get("vocab") or {}).values()]
    for token in spec.get("added_tokens") or []:
        text = token.get("content") if isinstance(token, dict) else None
        if not isinstance(text, str) or not text:
            raise UserError(f"{path}: an added token is {str(token)[:60]}: expected "
                            '{"id": 0, "content": "<s>", "special": true}')
        expect(token, f"{path}, added token {text!r}", ("id",), id="whole", special="flag")
        ids.append(token["id"])
    if bad := [i for i in ids if type(i) is not int or not 0 <= i < MOST_IDS]:
        raise UserError(f"{path}: a token's id is {bad[0]!r}: "
                        f"expected a whole number below {MOST_IDS}")
    words = spec["model"].get("vocab") or {}
    if len(set(words.values())) < len(words):
        raise UserError(f"{path}: two entries of the vocabulary have one id: download it again")


def read_model(spec, path):
    """tokenizer.json -> (merges as pairs of bytes, vocabulary string -> id)."""
    model = spec.get("model") or {}
    kind = model.get("type", "BPE")
    kind = "SentencePiece (byte_fallback)" if model.get("byte_fallback") else kind
    affix = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if kind != "BPE" or affix or model.get("merges") is None:
        affix = f" with {affix!r} around words" if affix else ""
        raise UserError(f"{path} holds {kind}{affix}, not byte-level BPE: {CHOOSE}")
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    for m in merges:
        if not isinstance(m, list) or len(m) != 2 or not all(isinstance(x, str) for x in m):
            raise UserError(f"{path}: a merge is {m!r}: expected two tokens; download it again")
    if not model.get("vocab"):
        raise UserError(f"{path} has no vocabulary: download it again")
    return [(spelled(left), spelled(right)) for left, right in merges], model["vocab"]


def read_pattern(pre):
    """pre_tokenizer of tokenizer.json -> (one regular expression, prefix space?)."""
    match pre.get("pretokenizers", [pre]) if pre else []:
        case [{"type": "ByteLevel", **level}]:
            pattern = GPT2 if level.get("use_regex", True) else r"[\s\S]+"
            return pattern, level.get("add_prefix_space", True)
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
               "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            return re.sub(r"\{1,\d+\}\+", "+", pattern), False       # HF reads x{1,3}+ as (x{1,3})+
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, **level}
              ] if level.get("use_regex", True):
            return DIGITS, False
        case steps:
            kinds = " + ".join(step["type"] for step in steps) or "none"
            raise UserError(f"the pre_tokenizer ({kinds}) is not one pattern, then bytes: {CHOOSE}")


def read_nfc(normalizer) -> bool:
    """normalizer of tokenizer.json -> compose characters (NFC) before encoding?

    HF's library has older Unicode tables than Python: 98 combining marks that came later (counted
    with Python 3.11) compose differently beside another mark.
    """
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    if other := [step["type"] for step in steps if step["type"] != "NFC"]:
        raise UserError(f"the normalizer {other[0]} is not NFC: {CHOOSE}")
    return bool(steps)


def read_id(end, settings, ids):
    """Id of "bos", "eos" or "pad": the first file that has the key decides, null included."""
    for setting in settings:
        if not isinstance(setting.get(f"{end}_token"), (str, dict, type(None))):
            raise UserError(f"{end}_token is {str(setting[f'{end}_token'])[:60]!r}: "
                            "expected a token's text")
        for value in (setting[key] for key in (f"{end}_token", f"{end}_token_id")
                      if key in setting):
            return one_end(end, value, ids)
    return None


def read_names(settings):
    """{"bos_token": text, …} of all special tokens that the settings name, the first file first."""
    out = {}
    for key, value in [item for setting in reversed(settings) for item in setting.items()]:
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            out[key] = text
    return out


def one_end(end, value, ids):
    """The id that a key's value means: a token's text, {"content": text}, its id, a list of ids
    (the first counts), null or -1 for none. UserError for anything else."""
    text = value.get("content", 0) if isinstance(value, dict) else value
    number = value[0] if isinstance(value, list) and value else value
    if value is None:
        return None
    if isinstance(text, str):
        if text not in ids:
            raise UserError(f"{end}_token {text!r} is not in tokenizer.json: "
                            "add it to its added_tokens")
        return ids[text]
    if type(number) is not int:
        raise UserError(f"{end}_token is {str(value)[:60]!r}: expected a token's text or its id")
    return number if number >= 0 else None


def reachable(pairs) -> list[bytes]:
    """Tokens that Hugging Face's merging can produce, in the order of the pairs that produce them.

    HF joins only the listed pairs, tiktoken any two neighbours whose bytes are a token.  They agree
    once the tokens are dropped that HF does not reach from their own bytes: inside a text, as long
    as no merge crosses a token's ends, its bytes go through the same states as they do alone.  So
    two neighbours that join to it are always the last of these states, the listed pair; and
    tiktoken may take a whole piece at once.
    """
    rank, found = {pair: n for n, pair in enumerate(pairs)}, {}
    for token in {left + right for left, right in pairs}:
        parts = [token[i:i + 1] for i in range(len(token))]
        near = [rank.get(pair, len(pairs)) for pair in zip(parts, parts[1:])]   # rank of each joint
        while near and (low := min(near)) < len(pairs):
            at = near.index(low)
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
            lo, hi = max(at - 1, 0), at + 2
            near[lo:hi] = [rank.get(pair, len(pairs))
                           for pair in zip(parts[lo:hi - 1], parts[lo + 1:hi])]
        if len(parts) == 1:
            found[token] = low
    return sorted(found, key=found.get)


def hf_files(tok) -> dict[str, str]:
    """The two JSON files of a tokenizer made here.

    Every split of every token is listed as a merge, in rank order: tiktoken joins any neighbours
    whose bytes are a token, and HF then does the same.
    """
    merged = [tok.tokens[i] for i in tok.order[256:]]
    known = {tok.tokens[i] for i in tok.order if i >= 0}
    merges = [(letters(token[:n]), letters(token[n:])) for token in merged
              for n in range(1, len(token)) if token[:n] in known and token[n:] in known]
    pattern = re.sub(r"(\{\d+,\d*\})\+", r"\1", tok.pattern)       # HF reads x{1,3}+ as (x{1,3})+
    split = dict(type="Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    vocab = {letters(tok.tokens[i]): i for i in tok.order if i >= 0} | tok.specials
    literal = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    added = [dict(id=i, content=text, **literal) for text, i in tok.specials.items()]
    spec = dict(version="1.0", added_tokens=added, decoder=level,
                pre_tokenizer=dict(type="Sequence", pretokenizers=[split, level]),
                model=dict(type="BPE", ignore_merges=tok.direct, vocab=vocab, merges=merges))
    text = {i: text for text, i in tok.specials.items()}
    config = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False,
                  bos_token=text.get(tok.bos), eos_token=text.get(tok.eos),
                  pad_token=text.get(tok.pad))
    config |= {"chat_template": tok.template} if tok.template else {}
    return {"tokenizer.json": json.dumps(spec, ensure_ascii=False, indent=1),
            "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=1)}


# --- 5 made here ----------------------------------------------------------------------------------

def made(merged, pattern=PATTERN) -> Tokenizer:
    """Ids in this order: 256 bytes, the merged tokens, SPECIALS."""
    tokens = [bytes([b]) for b in range(256)] + merged
    specials = {text: len(tokens) + n for n, text in enumerate(SPECIALS)}
    n = len(tokens)
    names = dict(pad_token=SPECIALS[0], bos_token=SPECIALS[1], eos_token=SPECIALS[2])
    return Tokenizer(tokens + [text.encode() for text in SPECIALS], list(range(n)), specials,
                     pad=n, bos=n + 1, eos=n + 2, pattern=pattern, template=CHATML, names=names)


def bytes_tokenizer() -> Tokenizer:
    """No merges at all: 256 bytes and the specials, 261 ids."""
    return made([])


def char_tokenizer(alphabet: str) -> Tokenizer:
    """<|pad|> <|bos|> <|eos|> are 0, 1, 2, then an id for each character of an ASCII alphabet."""
    if odd := [c for c, n in Counter(alphabet).items() if n > 1 or not c.isascii()]:
        raise UserError(f"the alphabet's {odd[0]!r} is repeated or not ASCII: "
                        "give each ASCII character once")
    specials = {text: n for n, text in enumerate(SPECIALS[:3])}
    at = {c: 3 + n for n, c in enumerate(alphabet)}
    return Tokenizer([text.encode() for text in [*specials, *alphabet]],
                     [at.get(chr(b), -1) for b in range(256)], specials, pad=0, bos=1, eos=2)


@cache
def code_points(kind):
    """The ranges of a Unicode category's code points, as re takes them between brackets."""
    codes = (c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)).startswith(kind))
    out = ""
    for _, run in groupby(enumerate(codes), lambda item: item[1] - item[0]):
        run = [c for _, c in run]
        out += f"\\U{run[0]:08x}-\\U{run[-1]:08x}"
    return out


def for_re(pattern):
    r"""The pattern for Python's own re, which knows no \p{L}: each becomes its code points."""
    bracketed = re.sub(r"(\[[^\]]*\])|(\\p\{\w+\})", lambda hit: hit[1] or f"[{hit[2]}]", pattern)
    try:
        return re.compile(re.sub(r"\\p\{(\w+)\}", lambda hit: code_points(hit[1]), bracketed))
    except re.error as e:
        raise UserError(f"Python cannot compile the pattern {pattern!r} ({e}): "
                        "choose another one") from e


def train_bpe(texts, vocab_size: int, pattern=PATTERN) -> Tokenizer:
    """Byte-pair encoding (1508.07909 alg. 1) on bytes.  vocab_size: bytes, merges and specials.

    Each step joins the most frequent pair of neighbours; ties go to the smallest pair of ids, so
    the result is a function of the texts alone.
    """
    if vocab_size < 256 + len(SPECIALS):
        raise UserError(f"vocab_size {vocab_size} is below the 256 bytes and {len(SPECIALS)} "
                        f"specials: give at least {256 + len(SPECIALS)}")
    split, times = for_re(total(pattern)), Counter()
    for text in [texts] if isinstance(texts, str) else texts:
        times.update(hit[0] for hit in split.finditer(text))
    words = [word.encode("utf-8", "replace").decode("latin-1") for word in times]
    tokens = grow(words, list(times.values()), vocab_size - len(SPECIALS))
    if short := vocab_size - len(SPECIALS) - len(tokens):
        raise UserError(f"vocab_size {vocab_size} is {short} more than the texts give: "
                        "lower it or add text")
    return made(tokens[256:], pattern)


def grow(words, times, size) -> list[bytes]:
    """The first `size` tokens of words that occur `times` times; fewer when no pair is left.

    A word is a string with one character for each token, chr(id), so that str.replace is the
    merge.  Counts change only in the words that hold the merged pair; the heap's entries are
    checked when they come up.
    """
    tokens, taken = [bytes([b]) for b in range(256)], {text.encode() for text in SPECIALS}
    count, where = Counter(), defaultdict(set)  # pair -> occurrences, words that had it
    for n, word in enumerate(words):
        for pair in zip(word, word[1:]):
            count[pair] += times[n]
            where[pair].add(n)
    heap = [(-c, pair) for pair, c in count.items()]
    heapq.heapify(heap)
    with tqdm(total=size, initial=256, desc="train bpe", unit=" tokens", delay=1) as bar:
        while heap and len(tokens) < size:
            c, (left, right) = heapq.heappop(heap)
            if -c != (now := count[left, right]):  # stale: other merges took some places
                heapq.heappush(heap, (-now, (left, right)))
                continue
            token, new, fresh = tokens[ord(left)] + tokens[ord(right)], chr(len(tokens)), set()
            if now == 0 or token in taken:  # a special's text must stay plain text
                continue
            tokens.append(token)
            for n in where.pop((left, right)):
                old, words[n] = words[n], words[n].replace(left + right, new)
                for pair in zip(old, old[1:]):
                    count[pair] -= times[n]
                for pair in zip(words[n], words[n][1:]):
                    count[pair] += times[n]
                    if new in pair:
                        where[pair].add(n)
                        fresh.add(pair)
            for pair in fresh:  # only pairs with the new token can grow
                heapq.heappush(heap, (-count[pair], pair))
            bar.update()
    return tokens


def named(name: str) -> Tokenizer:
    """One of tiktoken's encodings (gpt2, …), downloaded once into TIKTOKEN_CACHE_DIR."""
    if name not in (known := tiktoken.list_encoding_names()):
        raise UserError(f"{name!r} is neither a folder nor an encoding"
                        f"{nearest(name, ['bytes', *known])}")
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as e:
        raise UserError(f"tiktoken must download {name!r} once and is offline "
                        f"({type(e).__name__}): set TIKTOKEN_CACHE_DIR to a folder filled "
                        "elsewhere, or use 'bytes'") from e
    ranks, specials = encoding._mergeable_ranks, dict(encoding._special_tokens)
    tokens = [b""] * (1 + encoding.max_token_value)
    for token, i in [*ranks.items(), *((text.encode(), i) for text, i in specials.items())]:
        tokens[i] = token
    merged = sorted(i for token, i in ranks.items() if len(token) > 1)
    end = specials.get("<|endoftext|>")  # opens and closes a document, as GPT-2 does
    return Tokenizer(tokens, [ranks[bytes([b])] for b in range(256)] + merged, specials, bos=end,
                     eos=end, pad=None, pattern=encoding._pat_str, direct=True)


def get(name_or_path) -> Tokenizer:
    """"bytes", a checkpoint's folder, or a named encoding of tiktoken."""
    if str(name_or_path) == "bytes":
        return bytes_tokenizer()
    return Tokenizer.load(name_or_path) if Path(name_or_path).is_dir() else named(str(name_or_path))
