"""
tokenizer.py - tiktoken behind one small class: bytes, characters, a BPE made here, a checkpoint's.

    tok = get("bytes")                    # 256 bytes and five specials; or a folder, or "gpt2"
    tok = train_bpe(texts, 2048)          # 4 MB of Python source: 2 s on one core
    ids = tok.encode("def f(x):")         # no BOS or EOS; "<|im_end|>" in the text stays plain text
    ids = tok.render([{"role": "user", "content": "2+2?"}])             # the chat template's ids
    tok.save(folder); Tokenizer.load(folder)     # Hugging Face files: transformers gives the same

Map      1 bytes and letters   2 chat templates   3 the tokenizer   4 joining listed pairs
         5 a checkpoint's steps   6 tokenizer.json   7 made here
Ranks    tiktoken merges by rank: 0..255 are the bytes, 256 + i the i-th merged token; a table gives
         the ids.  What it cannot do (Llama 2, Gemma, DeepSeek) Joiner does, in ranks as well.
Watch    nothing is lost: decode(encode(text)) == text, unless a checkpoint asks for a normal form
         or a prefix space.
"""
import heapq
import json
import re
import unicodedata
from bisect import bisect_left
from collections import Counter, defaultdict
from datetime import datetime
from functools import cache, lru_cache, partial
from itertools import accumulate, chain, groupby, takewhile
from pathlib import Path

import regex     # tiktoken requires it
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
# a letter's code point -> its byte; 256, which latin-1 has not, for what is no letter
BYTE = defaultdict(lambda: 256, {ord(letter): b for b, letter in LETTER.items()})


def letters(token):
    """Bytes -> the string that stands for them in tokenizer.json.   b" the" -> "Ġthe" """
    return token.decode("latin-1").translate(LETTER)


def spelled(text):
    """A vocabulary string -> its bytes; outside the alphabet it stands for itself, as HF has it."""
    try:
        return text.translate(BYTE).encode("latin-1")
    except UnicodeEncodeError:
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
def jinja_of(template):
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

SPACES = ("\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"
          "\u200a\u2028\u2029\u202f\u205f\u3000")
WORD = regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]")


def longest_of(words):
    """A regular expression for the longest of the words that begins at a place; of none: never."""
    if len(words) < 2:
        return re.escape(words[0]) if words else "(?!)"
    tails = defaultdict(list)
    for word in words:
        tails[word[:1]].append(word[1:])
    end = "?" if tails.pop("", ()) else ""                             # a word may end here
    branches = [re.escape(first) + longest_of(tails[first]) for first in tails]
    return f"(?:{'|'.join(branches)}){end}"


class Tokenizer:
    """Text <-> ids.  A loaded one saves its files unchanged; one made here writes tokenizer.json
    anew.

    tokens    id -> bytes, special tokens included, holes b""
    order     rank -> id: the 256 single bytes (-1: no such token), then the other tokens in order
    specials  text -> id of the special and the other added tokens
    flags     text -> of an added token, those that tokenizer.json gives it; {"special"} by default
    begin     ids before a text that stands alone; [bos] by default
    normal    functions text -> text, applied to what is between added tokens
    prefix    characters of which the first is put before a text, and with once=False before each
              part between added tokens, that begins with none of them
    direct    a piece that is a token is taken whole, without merges to it (HF: ignore_merges)
    engine    what finds the ranks, by default tiktoken with the pattern
    readers   functions [vocabulary string] -> [string] that decode, by default the tokens' bytes
    template  the chat template, in Jinja, "" for none
    names     what it may call by name: {"eos_token": text, …}
    stops     ids that end a completion: EOS, with a chat template also the end of its turns
    """

    def __init__(self, tokens, order, specials, *, bos, eos, pad, begin=None, pattern=PATTERN,
                 flags=None, normal=(), prefix="", once=False, direct=False, engine=None,
                 strings=(), readers=(), files=(), template="", names=()):
        self.tokens, self.order, self.specials, self.pattern = tokens, order, specials, pattern
        self.bos, self.eos, self.pad, self.direct = bos, eos, pad, direct
        self.begin = [bos] * (bos is not None) if begin is None else begin
        self.normal, self.prefix, self.once, self.files = normal, prefix, once, dict(files)
        self.strings, self.readers = strings, readers
        self.flags = flags or {text: {"special"} for text in specials}
        self.hidden = {bos, eos, pad}.union(specials[x] for x in specials
                                            if "special" in self.flags[x])
        self.template, self.names, self.stops = template, dict(names), (eos,)
        controls = [text for text in specials if "special" in self.flags[text]]
        self.control = re.compile(f"({longest_of(controls)})")
        self.control_ids = {eos, *(specials[text] for text in controls)}
        # added tokens that are found before the text is brought into its normal form, and after
        # (that of two with one normal form: a special one, else the first)
        after = sorted((x for x in reversed(specials) if "normalized" in self.flags[x]),
                       key=lambda x: "special" in self.flags[x])
        self.marks = [{x: x for x in specials if "normalized" not in self.flags[x]},
                      {self.normalised(x): x for x in after}]
        self.split = [re.compile(longest_of([*some])) for some in self.marks]
        self.engine = engine or self.tiktoken()

    def tiktoken(self):
        """The engine that splits by the pattern, then joins neighbours whose bytes are a token."""
        ranks = {bytes([b]): b for b in range(256)}
        ranks |= {self.tokens[i]: 256 + n for n, i in enumerate(self.order[256:])}
        try:
            return tiktoken.Encoding("", pat_str=total(self.pattern), mergeable_ranks=ranks,
                                     special_tokens={})
        except ValueError as e:
            raise UserError(f"tiktoken cannot compile the pattern {self.pattern!r} ({e}): "
                            "choose another") from e

    @property
    def vocab_size(self) -> int:
        """Highest id + 1: the rows that an embedding needs."""
        return len(self.tokens)

    def normalised(self, text):
        """The text in the normal form that the checkpoint asks for."""
        for change in self.normal:
            text = change(text)
        return text

    def marked(self, text, stage, specials):
        """A text from left to right as (place, plain part, None) and (place, "", an added token's
        id); stage: 0 before the normal form, 1 after.
        """
        done = 0
        for hit in self.split[stage].finditer(text):
            start, stop = hit.span()
            token = self.marks[stage][hit[0]]
            flags, around = self.flags[token], text[start - 1:start] + text[stop:stop + 1]
            if ("special" in flags and not specials
                    or "single_word" in flags and WORD.search(around)):
                continue
            if "lstrip" in flags:           # not what the token before took, even of this one's own
                start = max(done, len(text[done:start].rstrip(SPACES)) + done)
            while "rstrip" in flags and stop < len(text) and text[stop] in SPACES:
                stop += 1
            if done < start:
                yield done, text[done:start], None
            if start < stop:
                yield start, "", self.specials[token]
            done = stop
        if done < len(text):
            yield done, text[done:], None

    def pieces(self, text, first=True) -> list[int]:
        """Ids of a text in its normal form, without added tokens; first: of a text's begin."""
        text = text.replace(APART, "")
        if self.prefix and text[:1] not in self.prefix and (first or not self.once):
            text = self.prefix[0] + text
        ids = [self.order[rank] for rank in self.engine.encode_ordinary(text)]
        if -1 in ids:
            absent = {rank for rank, i in enumerate(self.order) if i < 0}
            lost = [c for c in text if absent & {*self.engine.encode_ordinary(c)}]
            raise UserError(f"no token for {[*lost, text][0]!r}: take it out or widen the alphabet")
        return ids

    def encode(self, text: str, specials=False) -> list[int]:
        """Ids of a text, no BOS or EOS added.  Added tokens are found in it, but a special's text
        is plain unless specials=True: what a user writes cannot become a control token.
        """
        ids = []
        for place, part, token in self.marked(text, 0, specials):
            if token is not None:
                ids.append(token)
                continue
            for inner, part, token in self.marked(self.normalised(part), 1, specials):
                ids += self.pieces(part, place + inner == 0) if token is None else [token]
        return ids

    def decode(self, ids, skip_specials=True) -> str:
        """Text of a list or tensor of ids.  Broken UTF-8 becomes U+FFFD, an unknown id nothing."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        hidden = self.hidden if skip_specials else ()
        known = [i for i in ids if 0 <= i < len(self.tokens) and i not in hidden]
        if not self.readers:
            return b"".join([self.tokens[i] for i in known]).decode("utf-8", "replace")
        parts = [self.strings[i] for i in known if self.strings[i]]
        for read in self.readers:
            parts = read(parts)
        return "".join(parts)

    def spelled(self, ids, chars) -> int:
        """How many of the ids spell the first `chars` characters of their text."""
        # a character of which bytes are missing does not count: it may be several U+FFFD
        return bisect_left(range(len(ids)), chars,
                           key=lambda i: len(self.decode(ids[:i]).rstrip("\ufffd")))

    def prompt(self, problem, chat=False) -> list[int]:
        """Ids that a completion continues, of a text or a task's {"prompt"[, "messages", "hint"]}.

        What begins a text (BOS, if the folder says so), the text and the hint; with chat the
        rendered messages, or the user's turn.
        """
        problem = {"prompt": problem} if isinstance(problem, str) else problem
        if chat:
            return self.render(self.messages(problem))
        text = problem["prompt"] + problem.get("hint", "")
        return [*self.begin, *self.encode(text)]

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
            ids = self.replied(text)
        end = next(i for i in reversed(range(len(ids))) if ids[i] in self.control_ids)
        return ids if finished else ids[:end]

    def replied(self, text) -> list[int]:
        """Ids of an answer and its end, as they follow a prompt that is a row of its own: where one
        token spans the end of the prompt and the answer's begin, the answer's own instead."""
        messages = [QUESTION, {"role": "assistant", "content": text}]
        before, ids = self.dialogue(messages)
        whole, spans = self.spans(messages)
        begin, end = spans[-1]
        if before == self.rendered(whole[:begin]):
            return ids
        ids = self.encode(whole[begin:end], specials=True)
        return ids if self.control_ids & {*ids} else [*ids, self.eos]

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
            return jinja_of(self.template).render(
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
        if not messages:                 # a default system prompt may still stand before it
            return self.unasked(text)
        head = self.written(messages)
        if text.startswith(head):
            return len(head)
        before = self.written(messages, reply=False)         # Qwen 3.5's opened reply has a thought
        if not text.startswith(before):
            raise UserError("the chat template writes a message otherwise once others follow it: "
                            "train the last answers only, --turns last")
        return max(len(before), common(text, head))

    def unasked(self, text) -> int:
        """Where the answer begins in a conversation's text that the assistant opens."""
        before, head = (self.written([QUESTION], reply) for reply in (False, True))
        opening = head[len(before):] if head.startswith(before) else ""
        if not opening or opening not in text:
            raise UserError("the assistant speaks first, and the chat template does not show where:"
                            " put a user's message before it")
        return text.index(opening) + len(opening)

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
        for name, content in (self.files or hf_files(self)).items():
            content = content.encode() if isinstance(content, str) else content
            (Path(folder) / name).write_bytes(content)

    @staticmethod
    def load(folder) -> "Tokenizer":
        """A checkpoint's BPE from its tokenizer.json; its configs name its ends."""
        path = Path(folder) / "tokenizer.json"
        spec = read_json(path, MISSING)
        check_spec(spec, path)
        settings = {name: read_json(path.with_name(name)) for name in SETTINGS
                    if path.with_name(name).exists()}
        config = settings.get("tokenizer_config.json", {})
        expect(config, path.with_name("tokenizer_config.json"), add_bos_token="flag")
        pairs, vocab = read_model(spec, path)
        added = read_added(spec, vocab, path)
        specials = {a["content"]: a["id"] for a in added}
        ends = {end: read_id(end, settings, vocab | specials) for end in ("bos", "eos", "pad")}
        flags = {a["content"]: {*filter(a.get, FLAGS)} for a in added}
        for text in specials:
            flags[text] |= {"special"} if specials[text] in ends.values() else set()
        strings = [""] * (1 + max([*vocab.values(), *specials.values()]))
        for text, i in [*vocab.items(), *specials.items()]:
            strings[i] = text
        # no pair and no whole piece may make a control token of a user's text
        control = {text for text in specials if "special" in flags[text]}
        kept = vocab.keys() - control | {spec["model"].get("unk_token")}
        vocab = {text: i for text, i in vocab.items() if text in kept}
        pairs = [(left, right) for left, right in pairs
                 if control.isdisjoint((left, right, left + right))]
        by_bytes = any(step["type"] == "ByteLevel" for step in steps(spec, "pre_tokenizer"))
        parts = (read_bytes if by_bytes else read_characters)(spec, pairs, vocab, path)
        tokens = [*map(spelled if by_bytes else spaced, strings)]
        begin = read_begin(spec, config, ends["bos"], path)
        files = read_files(spec, path, begin, strings)
        normal = read_steps(spec, "normalizer", NORMALIZERS)
        for text, i in specials.items():
            for change in normal if "normalized" in flags[text] else ():    # as HF shows them
                text = change(text)
            strings[i], tokens[i] = text, text.encode("utf-8", "replace")
        return Tokenizer(tokens, specials=specials, flags=flags, begin=begin, strings=strings,
                         normal=normal, **ends, **parts, files=files,
                         names=read_names(settings), template=read_template(path.parent))


# --- 4 joining listed pairs -----------------------------------------------------------------------

class Joiner:
    """tiktoken's twin for what tiktoken cannot do: text -> ranks by a list of pairs, as HF has it.

    steps    functions piece -> pieces, the pre_tokenizer's
    ranks    vocabulary string -> rank
    pairs    {(rank, rank): (place in the list, rank of both together)}
    single   bytes that a character without a rank becomes, if it has no others
    unknown  rank of what then has none, None: its bytes all the same;  fuse: a run of them is one
    direct   a piece that is a token is taken whole
    """

    def __init__(self, steps, ranks, pairs, single=(), unknown=None, fuse=False, direct=False):
        self.steps, self.ranks, self.single, self.direct = steps, ranks, {*single}, direct
        self.unknown, self.fuse = unknown, fuse
        self.pairs = {(ranks[a], ranks[b]): (n, ranks[a + b]) for n, (a, b) in enumerate(pairs)}
        self.joints = {(a[-1], b[0]) for a, b in pairs}  # characters that some pair brings together
        self.join = lru_cache(1 << 16)(self.join)

    def encode_ordinary(self, text) -> list[int]:
        """Ranks of a text."""
        pieces, out = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")], []
        for step in self.steps:
            pieces = [part for piece in pieces for part in step(piece)]
        for piece in pieces:
            if self.direct and piece in self.ranks:
                out.append(self.ranks[piece])
                continue
            for part in self.parts(piece):
                out += self.join(part)
        return out

    def parts(self, piece):
        """The piece, cut where no pair can ever join: so parts are short, and join remembers them.
        """
        joints, at = self.joints, 0
        for n, both in enumerate(zip(piece, piece[1:]), 1):
            if both not in joints and not (self.fuse and self.ranks.keys().isdisjoint(both)):
                yield piece[at:n]
                at = n
        yield piece[at:]

    def join(self, part):
        """Ranks of a part: its characters', then the pair that is listed first is joined, the
        leftmost of equal ones, until none is listed.
        """
        ranks = []
        for c in part:
            if c in self.ranks:
                ranks.append(self.ranks[c])
            elif self.unknown is None or self.single.issuperset(c.encode()):
                ranks += c.encode()
            elif not (self.fuse and ranks and ranks[-1] == self.unknown):
                ranks.append(self.unknown)
        size, none = len(ranks), (-1, -1)
        after, before = [*range(1, size + 1)], [*range(-1, size - 1)]
        ranks.append(-1)                                           # its pairs are never listed
        heap = [(self.pairs[both][0], n) for n, both in enumerate(zip(ranks, ranks[1:]))
                if both in self.pairs]
        heapq.heapify(heap)
        while heap:
            place, n = heapq.heappop(heap)
            found, joined = self.pairs.get((ranks[n], ranks[after[n]]), none)
            if found != place:                                # one of the two is part of another
                continue
            gone = after[n]
            ranks[n], ranks[gone], after[n] = joined, -2, after[gone]
            if after[n] < size:
                before[after[n]] = n
            for m in (before[n], n):
                if m >= 0 and (both := (ranks[m], ranks[after[m]])) in self.pairs:
                    heapq.heappush(heap, (self.pairs[both][0], m))
        return [rank for rank in ranks if rank >= 0]


# --- 5 a checkpoint's steps -----------------------------------------------------------------------

def cut(text, pattern, behavior="Isolated", invert=False):
    """The pieces of a text in which a pattern matches, by the five ways of the library's Split."""
    runs, at = [], 0
    for hit in pattern.finditer(text):
        runs += [(text[at:hit.start()], invert), (hit[0], not invert)]
        at = hit.end()
    runs = [(run, hit) for run, hit in [*runs, (text[at:], invert)] if run]
    if behavior == "Removed":
        return [run for run, hit in runs if not hit]
    backward, out, last = behavior == "MergedWithNext", [], False
    for run, hit in runs[::-1] if backward else runs:
        glued = hit == last if behavior == "Contiguous" else hit and not last
        if out and glued and behavior != "Isolated":
            out[-1] = run + out[-1] if backward else out[-1] + run
        else:
            out.append(run)
        last = hit
    return out[::-1] if backward else out


def as_letters(piece, pattern=None, space=False):
    """ByteLevel: the pieces of a piece, each in the letters of its bytes."""
    piece = " " + piece if space and piece[0] != " " else piece
    return [letters(part.encode()) for part in (cut(piece, pattern) if pattern else [piece])]


def at_marks(piece, mark, split):
    """Metaspace: spaces become marks, and each mark begins a piece; Tokenizer puts the first one.
    """
    piece = piece.replace(" ", mark)
    return cut(piece, regex.compile(mark), "MergedWithNext") if split else [piece]


def as_meant(pattern):
    """A pattern of HF's library, which reads x{1,3}+ as (x{1,3})+, for tiktoken and regex."""
    return re.sub(r"\{(\d+),\d+\}\+", r"{\1,}", pattern)


def read_regex(pattern):
    """{"String": …} or {"Regex": …} of tokenizer.json -> a compiled pattern."""
    text = as_meant(pattern["Regex"]) if "Regex" in pattern else regex.escape(pattern["String"])
    try:
        return regex.compile(text)
    except regex.error as e:
        raise UserError(f"tokenizer.json: the pattern {text!r} cannot be read ({e})") from None


def replaced(parts, pattern, new):
    """Replace as a decoder: in each of the parts."""
    return [pattern.sub(lambda hit: new, part) for part in parts]


def from_bytes(parts):
    """ByteFallback: runs of <0x0A> become text, or U+FFFD for each byte if they are no UTF-8."""
    out = []
    for single, run in groupby(parts, lambda part: BYTE_TOKEN.fullmatch(part) is not None):
        run = [*run]
        if single:
            data = bytes([int(part[3:5], 16) for part in run])
            try:
                run = [data.decode()]
            except UnicodeDecodeError:
                run = ["\ufffd"] * len(data)
        out += run
    return out


def stripped(parts, mark, start, stop):
    """Strip as a decoder: up to so many marks from each part's ends."""
    for _ in range(start):
        parts = [part.removeprefix(mark) for part in parts]
    for _ in range(stop):
        parts = [part.removesuffix(mark) for part in parts]
    return parts


def unspaced(parts, mark, prefix):
    """Metaspace as a decoder: marks become spaces, those of the first part nothing if one was put
    there."""
    first = [part.replace(mark, "" if prefix else " ") for part in parts[:1]]
    return first + [part.replace(mark, " ") for part in parts[1:]]


BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
GPT2_PIECES = regex.compile(GPT2)
FORMS = dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD"),
                      lambda step: partial(unicodedata.normalize, step["type"]))
CHOICES = dict(prepend_scheme=("always", "first", "never"),
               behavior=("Isolated", "Removed", "Contiguous", "MergedWithPrevious",
                         "MergedWithNext"))
OF_STEPS = dict.fromkeys(("content", "prepend", "replacement", "behavior"), "text") | dict(
    pattern="object", start="whole", stop="whole") | dict.fromkeys(
        ("invert", "split", "individual_digits", "add_prefix_space", "use_regex"), "flag")
NEEDS = {("normalizer", "Prepend"): ("prepend",), ("normalizer", "Replace"): ("pattern", "content"),
         ("pre_tokenizer", "Split"): ("pattern", "behavior", "invert"),
         ("pre_tokenizer", "Metaspace"): ("replacement",),
         ("decoder", "Metaspace"): ("replacement",), ("decoder", "Replace"): ("pattern", "content"),
         ("decoder", "Strip"): ("content", "start", "stop")}
# Each row: a step's object -> a function text -> text, piece -> pieces, parts -> parts.
NORMALIZERS = FORMS | dict(
    Lowercase=lambda step: lambda text: "".join(map(str.lower, text)),
    Prepend=lambda step: lambda text: step["prepend"] + text if text else text,
    Replace=lambda step: partial(read_regex(step["pattern"]).sub, lambda hit: step["content"]))
SPLITTERS = dict(
    Split=lambda step: partial(cut, pattern=read_regex(step["pattern"]), invert=step["invert"],
                               behavior=step["behavior"]),
    Digits=lambda step: partial(cut, pattern=regex.compile(r"\p{N}"), behavior="Isolated"
                                if step.get("individual_digits") else "Contiguous"),
    Punctuation=lambda step: partial(cut, pattern=regex.compile(r"[\p{P}$+<=>^`|~]"),
                                     behavior=step.get("behavior", "Isolated")),
    Metaspace=lambda step: partial(at_marks, mark=step["replacement"],
                                   split=step.get("split", True)),
    ByteLevel=lambda step: partial(as_letters, space=step.get("add_prefix_space", True),
                                   pattern=GPT2_PIECES if step.get("use_regex", True) else None))
DECODERS = dict(
    Replace=lambda step: partial(replaced, pattern=read_regex(step["pattern"]),
                                 new=step["content"]),
    ByteFallback=lambda step: from_bytes,
    Fuse=lambda step: lambda parts: ["".join(parts)],
    Strip=lambda step: partial(stripped, mark=step["content"], start=step["start"],
                               stop=step["stop"]),
    Metaspace=lambda step: partial(unspaced, mark=step["replacement"],
                                   prefix=scheme(step) != "never"))


# --- 6 tokenizer.json -----------------------------------------------------------------------------

# --- 4 tokenizer.json -----------------------------------------------------------------------------

KEPT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "chat_template.jinja", "chat_template.json")
BINARY = ("tokenizer.model",)  # SentencePiece's own, for other programs
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
            "config.json")
FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
CHOOSE = "choose a BPE as those of Llama, Qwen, Mistral, Gemma, GPT-2, or train one with train_bpe"
MISSING = ("copy it from the checkpoint's page; if that has only a tokenizer.model, transformers "
           "writes it: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)")
MOST_IDS = 1 << 23  # no tokenizer has more: a larger id is a slip, and fills memory


def steps(spec, part):
    """The steps of a part of tokenizer.json, as a list of objects."""
    step = spec.get(part) or {}
    inner = {"pre_tokenizer": "pretokenizers", "normalizer": "normalizers", "decoder": "decoders",
             "post_processor": "processors"}[part]
    return step.get(inner, [step] if step else [])


def read_utf8(path):
    """The text of a checkpoint's file; UserError if it is not UTF-8."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 ({e}): copy it again") from None


def check_spec(spec, path):
    """UserError for a tokenizer.json that lacks a part or has one of another kind."""
    parts = dict.fromkeys(("pre_tokenizer", "normalizer", "decoder", "post_processor"), "object")
    expect(spec, path, ("model",), model="object", added_tokens="list", **parts)
    for part in parts:
        found = steps(spec, part)
        right = isinstance(found, list) and all(isinstance(x, dict) for x in found)
        if not right or not all(type(x.get("type")) is str for x in found):
            raise UserError(f'{path}: {part} is no list of {{"type": …}}: download it again')
    expect(spec["model"], f"{path}, model", type="text", vocab="object", merges="list",
           byte_fallback="flag", ignore_merges="flag", fuse_unk="flag", unk_token="text")
    ids = [*(spec["model"].get("vocab") or {}).values()]
    words = spec["model"].get("vocab") or {}
    for token in spec.get("added_tokens") or []:
        text = token.get("content") if isinstance(token, dict) else None
        if not isinstance(text, str) or not text:
            raise UserError(f"{path}: an added token is {str(token)[:60]}: expected "
                            '{"id": 0, "content": "<s>", "special": true}')
        expect(token, f"{path}, added token {text!r}", ("id",), id="whole",
               **dict.fromkeys(FLAGS, "flag"))
        ids.append(token["id"])
    if bad := [i for i in ids if type(i) is not int or not 0 <= i < MOST_IDS]:
        raise UserError(f"{path}: a token's id is {bad[0]!r}: "
                        f"expected a whole number below {MOST_IDS}")
    if len(set(words.values())) < len(words):
        raise UserError(f"{path}: two entries of the vocabulary have one id: download it again")


def read_added(spec, vocab, path):
    """Added tokens; UserError where the library, which counts on, would read another id."""
    given, top = {}, -1
    for token in (found := spec.get("added_tokens") or []):
        text = token["content"]
        given[text] = i = vocab.get(text, given.get(text, max(len(vocab), top + 1)))
        top = max(top, i)
        if token["id"] != i:
            raise UserError(f"{path}: the added token {text!r} has the id {token['id']}, but "
                            f"tokenizers reads {i}: write the file with that library")
    return found


def read_model(spec, path):
    """tokenizer.json -> (merges as pairs of vocabulary strings, vocabulary string -> id)."""
    model = spec["model"]
    kind, affix = model.get("type", "BPE"), (model.get("continuing_subword_prefix")
                                             or model.get("end_of_word_suffix"))
    if kind != "BPE" or affix or model.get("merges") is None:
        affix = f" with {affix!r} around words" if affix else ""
        affix += "" if kind != "BPE" or affix else " without merges"
        raise UserError(f"{path} holds {kind}{affix}, not plain BPE: {CHOOSE}")
    if model.get("dropout"):
        raise UserError(f"{path}: dropout {model['dropout']} makes a text's ids random: set it to "
                        "null")
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) if isinstance(m, (str, list)) else m
              for m in model["merges"]]
    for m in merges:
        if type(m) is not tuple or len(m) != 2 or not type(m[0]) is type(m[1]) is str:
            raise UserError(f"{path}: a merge is {m!r}: expected two tokens; download it again")
    if not (vocab := model.get("vocab")):
        raise UserError(f"{path} has no vocabulary: download it again")
    if lost := {*chain(*merges), *map("".join, merges)} - vocab.keys():
        raise UserError(f"{path}: a merge makes {min(lost)!r}, which the vocabulary lacks: "
                        "download it again")
    if (unknown := model.get("unk_token")) is not None and unknown not in vocab:
        raise UserError(f"{path}: unk_token {unknown!r} is not in the vocabulary: "
                        "download it again")
    return merges, vocab


def read_steps(spec, part, known):
    """The functions of a part's steps; UserError for one that nothing here does."""
    found = steps(spec, part)
    if other := [step["type"] for step in found if step["type"] not in known]:
        raise UserError(f"the {part} {other[0]} is none of {', '.join(known)}: {CHOOSE}")
    for step in found:
        where = f"tokenizer.json, {part} {step['type']}"
        expect(step, where, NEEDS.get((part, step["type"]), ()), **OF_STEPS)
        for key in CHOICES.keys() & step.keys():
            if step[key] not in CHOICES[key]:
                raise UserError(f"{where}: {key} {step[key]!r} is none of "
                                f"{', '.join(CHOICES[key])}: {CHOOSE}")
        if "pattern" in step and not any(type(x) is str for x in step["pattern"].values()):
            raise UserError(f"{where}: pattern is {step['pattern']}: expected a String or a Regex")
    return [known[step["type"]](step) for step in found]


def read_pattern(pre):
    """Steps of a pre_tokenizer -> (one regular expression that is all of them, or None; prefix
    space?)."""
    match pre:
        case [{"type": "ByteLevel", **level}]:
            pattern = GPT2 if level.get("use_regex", True) else r"[\s\S]+"
            return pattern, level.get("add_prefix_space", True)
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated",
               "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            return as_meant(pattern), False
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, **level}
              ] if level.get("use_regex", True):
            return DIGITS, False
    return None, False


def read_bytes(spec, pairs, vocab, path):
    """A byte-level BPE -> {argument of Tokenizer: value}: tiktoken, where it does the same."""
    model, pre = spec["model"], steps(spec, "pre_tokenizer")
    if [step["type"] for step in steps(spec, "decoder")] not in ([], ["ByteLevel"]):
        raise UserError(f"{path}: the decoder of a byte-level BPE is not ByteLevel: {CHOOSE}")
    order = [vocab.get(LETTER[b], -1) for b in range(256)]
    unknown, direct = model.get("unk_token"), bool(model.get("ignore_merges"))
    pattern, space = read_pattern(pre)
    merged = None
    if pattern and (unknown is None or -1 not in order):
        merged = all_listed(pairs, vocab) if direct else reachable(pairs)
    if merged is not None:
        order += [vocab[text] for text in merged]
        return dict(order=order, pattern=pattern, prefix=" " * space, direct=direct)
    single = {LETTER[b]: b for b in range(256) if unknown is None or order[b] >= 0}
    return joiner(spec, pairs, single, vocab, order)


def read_characters(spec, pairs, vocab, path):
    """A BPE over characters, SentencePiece's kind -> {argument of Tokenizer: value}."""
    pre, fallback = steps(spec, "pre_tokenizer"), spec["model"].get("byte_fallback")
    readers = read_steps(spec, "decoder", DECODERS)
    if not readers:
        kinds = " + ".join(step["type"] for step in pre) or "none"
        raise UserError(f"{path}: a BPE of characters (pre_tokenizer: {kinds}) without a decoder: "
                        f"{CHOOSE}")
    single = {text: b for b in range(256) if fallback and (text := f"<0x{b:02X}>") in vocab}
    order = [vocab.get(f"<0x{b:02X}>", -1) if fallback else -1 for b in range(256)]
    marks = [step for step in pre if step["type"] == "Metaspace"]
    if marks and marks != pre[:1]:
        raise UserError(f"{path}: Metaspace is not the first pre_tokenizer: {CHOOSE}")
    prefix = [step["replacement"] + " " for step in marks if scheme(step) != "never"]
    return joiner(spec, pairs, single, vocab, order) | dict(
        readers=readers, prefix="".join(prefix), once=[*map(scheme, marks)] == ["first"])


def joiner(spec, pairs, single, vocab, order):
    """Engine and order of what tiktoken cannot do.   single: vocabulary string -> rank below 256"""
    rest, model = [text for text in vocab if text not in single], spec["model"]
    ranks = single | {text: 256 + n for n, text in enumerate(rest)}
    fallback = single.values() if model.get("byte_fallback") else ()
    direct = bool(model.get("ignore_merges"))
    engine = Joiner(read_steps(spec, "pre_tokenizer", SPLITTERS), ranks, pairs, fallback,
                    ranks.get(model.get("unk_token")), bool(model.get("fuse_unk")), direct)
    return dict(order=order + [vocab[text] for text in rest], engine=engine, direct=direct)


def reachable(pairs):
    """Tokens that Hugging Face's merging makes of their own letters, in the order of the pairs that
    make them; None if a pair that is listed before one of its halves can come into play.

    HF joins only the listed pairs, tiktoken any two neighbours whose bytes are a token.  They agree
    once the tokens are dropped that HF does not reach from their own letters: inside a text, as
    long as no merge crosses a token's ends, its letters go through the same states as they do
    alone.  So two neighbours that join to it are always the last of these states, the listed pair;
    and tiktoken may take a whole piece at once.
    """
    place, source, late = {pair: n for n, pair in enumerate(pairs)}, {}, []
    for n, (left, right) in enumerate(pairs):
        if (len(left) > 1 and left not in source) or (len(right) > 1 and right not in source):
            late.append((left, right))
        elif left + right not in source and meet(left, right, place, source):
            source[left + right] = n, left, right
    known = [(left, right) for left, right in late if (len(left) < 2 or left in source)
             and (len(right) < 2 or right in source) and meet(left, right, place, source)]
    return None if known or len(place) < len(pairs) else [*source]


def meet(left, right, place, source):
    """Are left and right both whole before a merge crosses the border between them?

    Back in time: of the two that touch there, the one that was made later is taken apart. They have
    touched since then, so they must not be a pair that is listed before.
    place: {pair: its place};  source: {token: (place of the pair that makes it, left, right)}
    """
    letter = -1, "", ""
    while True:
        first, second = source.get(left, letter), source.get(right, letter)
        if first[0] > second[0]:
            limit, _, left = first
        elif second[0] >= 0:   # of equal merges the leftmost comes first, which is the border's
            limit, right, _ = second
            limit += 1
        else:
            return True
        if place.get((left, right), limit) < limit:
            return False


def all_listed(pairs, vocab):
    """The tokens in the order of the pairs that make them, if tiktoken does what HF does that takes
    a whole piece that is a token (ignore_merges); else None.

    It does if each split of each token into two is listed, those of a token together (Llama 3):
    then the same neighbours are joined in the same order. Of a token's pairs only one can come up:
    its letters go through the same states everywhere, and one of these has two parts.
    """
    known = {text for text in vocab if BYTE.keys() >= {*map(ord, text)}}
    splits = sum(text[:n] in known and text[n:] in known
                 for text in known for n in range(1, len(text)))
    joined = [*map("".join, pairs)]
    order = dict.fromkeys(joined)
    groups = sum(a != b for a, b in zip(joined, joined[1:])) + bool(joined)
    if len({*pairs}) != splits or len(pairs) != splits or groups != len(order):
        return None
    return [*order, *sorted((x for x in known - order.keys() if len(x) > 1), key=vocab.get)]


def scheme(step):
    """Where Metaspace puts its mark: "always", "first" or "never"; older files have a flag."""
    return step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")


def spaced(text):
    """A vocabulary string of SentencePiece -> its bytes.   "▁the" -> b" the", "<0x41>" -> b"A" """
    if BYTE_TOKEN.fullmatch(text):
        return bytes([int(text[3:5], 16)])
    return text.replace("▁", " ").encode("utf-8", "replace")


def read_begin(spec, config, bos, path):
    """Ids that stand before a text: what the post_processor puts there; where it has no template,
    BOS if tokenizer_config.json has add_bos_token.  What it puts behind a text is not read: our
    training adds its own end, and a prompt has none.
    """
    found, begin = steps(spec, "post_processor"), []
    if other := [step["type"] for step in found if step["type"] not in BEFORE]:
        raise UserError(f"{path}: the post_processor {other[0]} is none of {', '.join(BEFORE)}: "
                        f"{CHOOSE}")
    for step in found:
        try:
            begin = [int(i) for i in BEFORE[step["type"]](step)] + begin
        except (KeyError, TypeError, IndexError, ValueError, AttributeError):
            raise UserError(f"{path}: the post_processor {step['type']} cannot be read: "
                            "download it again") from None
    if any(step["type"] != "ByteLevel" for step in found):
        return begin
    # without the key: written by an earlier version of this file, whose models saw BOS first
    asked = config.get("add_bos_token") or "post_processor" not in spec
    return [bos] if asked and bos is not None else []


def template_begin(step):
    """Ids that a TemplateProcessing puts before a text."""
    pieces = [*takewhile(lambda piece: "Sequence" not in piece, step["single"])]
    names = [piece["SpecialToken"]["id"] for piece in pieces]
    return [i for name in names for i in step["special_tokens"][name]["ids"]]


BEFORE = dict(TemplateProcessing=template_begin, RobertaProcessing=lambda step: [step["cls"][1]],
              BertProcessing=lambda step: [step["cls"][1]], ByteLevel=lambda step: [])


def opening(begin):
    """[(text, id)] before a text -> the post_processor of tokenizer.json that puts them there."""
    single = [dict(SpecialToken=dict(id=text, type_id=0)) for text, _ in begin]
    single.append(dict(Sequence=dict(id="A", type_id=0)))
    special = {text: dict(id=text, ids=[i], tokens=[text]) for text, i in begin}
    return dict(type="TemplateProcessing", single=single, special_tokens=special,
                pair=[*single, dict(Sequence=dict(id="B", type_id=0))])


def read_files(spec, path, begin, strings):
    """{name: content} of the files to save.  One thing is made plain in them: a BOS that nothing
    but add_bos_token asks for, which transformers 5 does not read.
    """
    files = {name: read_utf8(path.with_name(name)) for name in KEPT
             if path.with_name(name).exists()}
    files |= {name: path.with_name(name).read_bytes() for name in BINARY
              if path.with_name(name).exists()}
    found = steps(spec, "post_processor")
    if begin and all(step["type"] == "ByteLevel" for step in found):
        found = [*found, opening([(strings[i], i) for i in begin])]
        spec = spec | dict(post_processor=dict(type="Sequence", processors=found))
        files["tokenizer.json"] = json.dumps(spec, ensure_ascii=False)
    return files


def read_id(end, settings, ids):
    """Id of "bos", "eos" or "pad": the first file that has the key decides, null included."""
    for setting in settings.values():
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
    for setting in reversed(settings.values()):
        for key, value in setting.items():
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
    text = {i: text for text, i in tok.specials.items()}
    begin = opening([(text[i], i) for i in tok.begin])
    spec = dict(version="1.0", added_tokens=added, decoder=level, post_processor=begin,
                pre_tokenizer=dict(type="Sequence", pretokenizers=[split, level]),
                model=dict(type="BPE", ignore_merges=tok.direct, vocab=vocab, merges=merges))
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


def compiled(pattern):
    r"""A pattern as tiktoken has it, with \p{L} and so on, for Python."""
    try:
        return regex.compile(pattern)
    except regex.error as e:
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
    split, times = compiled(total(pattern)), Counter()
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
