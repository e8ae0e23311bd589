"""
text.py - corpora and files: what a run reads.

    documents("stdlib", "train")          # this Python's own sources and reference topics, split by
    file
    signatures("val")                     # real (signature -> first docstring sentence) pairs, same
    files
    documents("shakespeare", "train")     # a named download: URL and SHA-256 in NAMED
    examples("my.jsonl")                  # the ecosystem's schemas, all brought to {"prompt",
    "completion"}

Map      1 the standard library   2 signatures and ROUGE-L   3 downloads   4 files   5 schemas
Watch    the corpus is the interpreter's own: another Python version is another corpus, so compare
within one.
"""
import ast
import contextlib
import csv
import gzip
import hashlib
import io
import json
import os
import re
import sys
import sysconfig
import textwrap
import urllib.request
import warnings
import zlib
from collections import Counter
from functools import cache
from inspect import cleandoc
from pathlib import Path

import torch
from tqdm import tqdm

from data.run import UserError, nearest, without_repeats

CACHE = Path(__file__).parent / "cache"
VERSION = 1  # of the parsing below: raise it and every cached parse is made anew


def digest(text):
    """SHA-256 of a string, in hex: the stable hash behind every split (Python's own changes per
    process)."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def write_atomic(path, data):
    """Write bytes under a temporary name, then rename: a reader sees the old file or the whole new
    one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    tmp.write_bytes(data)
    os.replace(tmp, path)


# --- 1 the standard library -----------------------------------------------------------------------

ROOT = Path(sysconfig.get_paths()["stdlib"])
SPLITS = ("train", "val", "ood")
OOD = {"asyncio", "xml", "mailbox.py",
       "statistics.py"}  # concurrency, markup, mail, numbers: 9 % of it
SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


def check_split(split, known=SPLITS):
    """UserError if split is not one of the known ones."""
    if split not in known:
        raise UserError(f"no split {split!r}{nearest(split, known)}")


def split_of(rel):
    """train, val (5 % of the files) or ood (whole packages) of a path relative to the standard
    library."""
    if rel.split("/")[0] in OOD:
        return "ood"
    return "val" if int(digest(rel)[:8], 16) % 20 == 0 else "train"


def sources():
    """{split: sorted [(relative path, Path)]}; UserError where the installation has no sources."""
    found = []
    for folder, below, names in os.walk(ROOT):
        below[:] = [d for d in below if d not in SKIP
                    and not d.startswith("config-")]                               # prunes the walk
        found += [Path(folder, n) for n in names if n.endswith(".py")
                  and not n.startswith("_sysconfigdata")]
    if len(found) < 100:
        raise UserError(f"only {len(found)} sources of the standard library under {ROOT}: "
                        "use a Python that has them (python.org, pyenv, uv), or give --data FILE")
    pairs = sorted((path.relative_to(ROOT).as_posix(), path) for path in found)
    files = {split: [] for split in SPLITS}
    for rel, path in pairs:
        files[split_of(rel)].append((rel, path))
    return files


def read_source(rel, path):
    """A source file under a comment with its path, so that a prompt can name the file (see
    signatures)."""
    return f"# {rel}\n{path.read_text(encoding='utf-8', errors='replace')}"


def stdlib(split):
    """One split as a list of documents: the sources, then the topics that help() prints (if
    any)."""
    check_split(split)
    code, topics = [read_source(*file) for file in sources()[split]], {}
    with contextlib.suppress(ImportError):
        from pydoc_data.topics import topics
    return code + [text for name, text in sorted(topics.items())
                   if split_of(f"topics/{name}") == split]


# --- 2 signatures ---------------------------------------------------------------------------------

def functions(tree, cls=""):
    """Yield (header of the enclosing class or "", function node) of a module; closures are left
    out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(ast.unparse(b) for b in node.bases + node.keywords)
            yield from functions(node, f"class {node.name}({bases}):" if bases
                                 else f"class {node.name}:")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield cls, node
        elif isinstance(node, (ast.stmt, ast.excepthandler)):            # def under if, try, with
            yield from functions(node, cls)


def first_sentence(doc):
    """A docstring's first sentence on one line: up to . ! ? before a capital, else its first
    paragraph."""
    paragraph = " ".join(re.split(r"\n[ \t]*\n", cleandoc(doc))[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z`'\"(])", paragraph)[0]


def file_pairs(rel, source):
    """[{"prompt", "completion", "source", "head"}] of read_source's text; head is the def as
    written. The prompt ends in the docstring's opening quotes, so that the completion is what the
    source says next."""
    lines, rows, tree = source.split("\n"), [], ast.Module([], [])
    with warnings.catch_warnings(), contextlib.suppress(SyntaxError, ValueError):
        warnings.simplefilter("ignore")                             # invalid escapes in old sources
        tree = ast.parse(source)
    for cls, node in functions(tree):
        head = textwrap.dedent("\n".join(lines[node.lineno - 1:node.body[0].lineno - 1])).rstrip()
        text = first_sentence(ast.get_docstring(node, clean=False) or "")
        opening = f'{head}\n    """'
        prompt = f"# {rel}\n" + (f"{cls}\n{textwrap.indent(opening, '    ')}" if cls else opening)
        fits = len(words(text)) >= 3 and 3 <= len(text.split()) <= 30 and len(prompt) <= 300
        if fits and head.endswith(":") and ">>>" not in text:     # no def and docstring on one line
            rows.append(dict(prompt=prompt, completion=text, source=f"{rel}:{node.lineno - 1}",
                             head=head))
    return rows


def curate(splits, *, often=5, keep=3):
    """{split: rows} without repeats: equal pairs; boilerplate (a completion seen over `often`
    times) after its first `keep`; in val and ood, what train holds with the same def and
    completion."""
    count = Counter(row["completion"] for rows in splits.values() for row in rows)
    train = {(row["head"], row["completion"]) for row in splits["train"]}
    seen, kept, out = set(), Counter(), {split: [] for split in SPLITS}
    for split, row in ((split, row) for split in SPLITS for row in splits[split]):
        text, pair = row["completion"], (row["prompt"], row["completion"])
        leak = split != "train" and (row["head"], text) in train
        if pair not in seen and not leak and (count[text] <= often or kept[text] < keep):
            seen.add(pair)
            kept[text] += 1
            out[split].append({k: row[k] for k in ("prompt", "completion", "source")})
    return out


def signatures(split):
    """Real demonstrations [{"prompt", "completion", "source"}]: a signature, its docstring's first
    sentence.

    Files and splits are stdlib's: a model pre-trained on stdlib("train") has read the training
    pairs in their files, and nothing of val or ood. The parse (3 s) is cached under CACHE.
    """
    check_split(split)
    files = sources()
    sizes = [(rel, path.stat().st_size) for s in SPLITS for rel, path in files[s]]
    kept = CACHE / f"signatures-{digest(json.dumps([VERSION, sys.version, sizes]))[:16]}.json"
    with contextlib.suppress(OSError, ValueError):                   # absent or damaged: parse anew
        return json.loads(kept.read_text(encoding="utf-8"))[split]
    rows = {s: [] for s in SPLITS}
    for s in SPLITS:
        for file in files[s]:
            rows[s] += file_pairs(file[0], read_source(*file))
    found = curate(rows)
    with contextlib.suppress(OSError):                          # a read-only folder costs only time
        write_atomic(kept, json.dumps(found).encode())
    return found[split]


def words(text):
    """Lower-cased words, as the rouge_score package cuts them."""
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge_l(reference, candidate):
    """ROUGE-L F1 in [0, 1], Lin 2004 §3.   P = LCS/|candidate|,  R = LCS/|reference|,  F = 2PR/(P +
    R)

    LCS is the longest common subsequence of words, in Hyyrö's bit-parallel form. No common word: 0.
    """
    ref, cand, where = words(reference), words(candidate), Counter()
    for i, word in enumerate(ref):
        where[word] |= 1 << i
    full = row = (1 << len(ref)) - 1
    for hit in (where[word]
                for word in cand):  # a zero at bit i of row: the LCS grows at reference word i
        row = (row + (row & hit) | row & ~hit) & full
    lcs = len(ref) - row.bit_count()
    return 2 * lcs / (len(ref) + len(cand)) if lcs else 0.0


# --- 3 downloads ----------------------------------------------------------------------------------

RAW = "https://raw.githubusercontent.com"
GSM8K = f"{RAW}/openai/grade-school-math/master/grade_school_math/data"
NAMED = dict(                                                  # name = (URL, SHA-256 of the file)
    shakespeare=(f"{RAW}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                 "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    wikitext2=(f"{RAW}/pytorch/examples/main/word_language_model/data/wikitext-2/valid.txt",
               "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8"),
    gsm8k=(f"{GSM8K}/train.jsonl",
           "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
    gsm8k_test=(f"{GSM8K}/test.jsonl",
                "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    gsm8k_solutions=(f"{GSM8K}/example_model_solutions.jsonl",
                     "4bc62db838f8418365d51c627bd66294cbdca9fb7f01519cb13f0dce8c51580b"),
)


def download(name):
    """Path of a named file under CACHE, fetched once; UserError when offline or on another
    SHA-256."""
    url, sha = NAMED[name]
    path = CACHE / f"{name}{Path(url).suffix}"
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha:
        return path
    data, by_hand = b"", f"put it at {path} by hand (SHA-256 {sha})"
    try:
        with urllib.request.urlopen(url, timeout=30) as reply, tqdm(desc=name, unit="B") as bar:
            while chunk := reply.read(1 << 16):
                data += chunk
                bar.update(len(chunk))
    except OSError as e:                                            # URLError, timeouts, resets too
        raise UserError(f"cannot fetch {name} from {url} ({e}): {by_hand}") from None
    if (got := hashlib.sha256(data).hexdigest()) != sha:
        raise UserError(f"{url} is another file (SHA-256 {got}) than the {name} that is meant: "
                        f"{by_hand}")
    write_atomic(path, data)
    return path


def locate(name_or_path):
    """Path of a named download or of a file; UserError with the nearest known name where there is
    neither."""
    path = Path(name_or_path)
    if name_or_path not in NAMED and not path.is_file():
        if path.is_dir():
            raise UserError(f"{path} is a folder: give a file")
        known = ["stdlib", *NAMED,
                 *(str(p) for p in path.parent.glob(f"*{path.suffix}") if p.is_file())]
        raise UserError(f"no file and no named data {str(path)!r}{nearest(str(path), known)}")
    return download(name_or_path) if name_or_path in NAMED else path


# --- 4 files --------------------------------------------------------------------------------------

ARROW = "from datasets import Dataset; Dataset.from_file('{}').to_json('{}')"
PANDAS = "import pandas; pandas.read_{}('{{}}').to_json('{{}}', orient='records', lines=True)"
PACKED = {".parquet": PANDAS.format("parquet"), ".arrow": ARROW, ".xlsx": PANDAS.format("excel"),
          ".feather": PANDAS.format("feather")}                # what is not read: how to convert it


@cache
def tell(line):
    """Print a line once: the parts of a run read its files more than once."""
    print(line, flush=True)


@contextlib.contextmanager
def at(where):
    """What is wrong inside is said of a place: "rows.jsonl:7: …"."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def places(found):
    """Where rows stand, in words.   ["a.jsonl:7", "a.jsonl:9"] -> "a.jsonl:7, 9" """
    first = found[0].rstrip("0123456789")
    few = [found[0], *(x.removeprefix(first) for x in found[1:5])]
    return ", ".join(few) + f" and {len(found) - 5} more" * (len(found) > 5)


def kind(path):
    """A file's suffix, that of the packed file if it is gzip's.   "a.jsonl.gz" -> ".jsonl" """
    path = Path(path)
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def decoded(path):
    """The text of a UTF-8 file, unpacked if it is .gz, its line ends as they are; UserError if it
    is something else, or empty."""
    path = Path(path)
    if kind(path) in PACKED:
        code = PACKED[kind(path)].format(path, path.with_suffix(".jsonl"))
        raise UserError(f'{path}: {kind(path)} is not read here; make it JSONL: python -c "{code}"')
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        text = data.decode("utf-8-sig")                              # -sig: skips a byte-order mark
    except UnicodeDecodeError as e:
        line = data[:e.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: cannot be read as UTF-8 text ({e})") from None
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({e})") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    if text.count("\0") > len(text) // 4:
        raise UserError(f"{path}: cannot be read as UTF-8 text (it seems to be UTF-16): save it "
                        "as UTF-8")
    return text


def read_text(path):
    """decoded() with \n at the end of every line, as Python opens a text."""
    return decoded(path).replace("\r\n", "\n").replace("\r", "\n")


def parsed(text, where):
    """The JSON object that a text is; UserError for anything else, and for one that holds a key
    twice or half a character (an escape like \\ud83d without its partner)."""
    row, why = None, ""
    try:
        row = json.loads(text, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as e:
        why = f" ({e})"
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object (one a line): {text[:60]!r}{why}")
    if "\\ud" in text.lower():
        check_characters(row, where)
    return row


def check_characters(row, where):
    """UserError for a text that no UTF-8 can write."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{where}: {e.object[e.start]!r} is half of a character: write "
                        "both, or take it out") from None


def read_jsonl(path):
    """[object of each line]; UserError "path:line: …" at the first line that is none."""
    lines = read_text(path).rstrip().split("\n")                    # splitlines would cut at U+2028
    return [parsed(line, f"{path}:{i}") for i, line in enumerate(lines, 1)]


def read_array(path):
    """[(path and number, object)] of a JSON array of objects."""
    text, rows = read_text(path), []
    try:
        items = json.loads(text, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not a JSON array of objects ({e})") from None
    escapes = "\\ud" in text.lower()
    for i, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise UserError(f"{path}, item {i}: not a JSON object: {str(item)[:60]!r}")
        if escapes:
            check_characters(item, f"{path}, item {i}")
        rows.append((f"{path}, item {i}", item))
    if not rows:
        raise UserError(f"{path}: the array is empty")
    return rows


def read_csv(path):
    """[(path:line, object)] of a comma-separated file, whose first line names the columns. An empty
    cell is none; labels and numbers (CELLS) are read as such, all else is text."""
    csv.field_size_limit(2**31 - 1)
    table = csv.reader(io.StringIO(decoded(path), newline=""), strict=True)
    rows, line, names = [], 1, []
    try:
        for cells in table:
            if not names and len(set(cells)) < len(cells):
                raise UserError(f"{path}:1: two columns have one name: {', '.join(cells)}")
            if names and cells and len(cells) != len(names):
                raise UserError(f"{path}:{line}: {len(cells)} cells under {len(names)} columns")
            if names and cells:
                rows.append((f"{path}:{line}", {k: cell(k, x) for k, x in zip(names, cells)}))
            names, line = names or cells, table.line_num + 1
    except csv.Error as e:
        raise UserError(f"{path}:{line}: no comma-separated values ({e})") from None
    if not rows:
        raise UserError(f"{path}: no row stands under the names of its columns")
    return rows


CELLS = ("label", "margin", "strength", "ratings", "weight", "score_chosen", "score_rejected")


def cell(name, text):
    """A cell of a CSV as a JSON value."""
    if not text:
        return None
    try:
        return json.loads(text.lower()) if name in CELLS else text
    except ValueError:
        return text


def read_rows(path):
    """[(where, object)] of a file of rows: .csv, a .json array, else one JSON object a line; where
    is "path:line", of an array "path, item n"."""
    if kind(path) == ".csv":
        return read_csv(path)
    if kind(path) == ".json" and decoded(path).lstrip().startswith("["):
        return read_array(path)
    return [(f"{path}:{i}", row) for i, row in enumerate(read_jsonl(path), 1)]


def first_row(path):
    """The first object of a file of rows, the others unread where they are lines."""
    if kind(path) == ".jsonl":
        return parsed(read_text(path).split("\n", 1)[0], f"{path}:1")
    return read_rows(path)[0][1]


ROWS = (".jsonl", ".json", ".csv")                   # that may also be texts: rows of {"text"}


def is_corpus(name_or_path):
    """Whether documents() reads this: running text, not the prompts and completions of a task or a
    file. A file of rows is a corpus if its first has a "text" and nothing that can be learnt."""
    suffix = kind(NAMED[name_or_path][0] if name_or_path in NAMED else name_or_path)
    if name_or_path == "stdlib" or suffix == ".txt":
        return True
    if suffix not in ROWS or name_or_path in NAMED:
        return False
    row = first_row(locate(name_or_path))
    try:
        return "text" in row and "completion" not in normalise(row)
    except UserError:                                # a demonstration with what is not used
        return False


def documents(name_or_path, split="train", val=""):
    """A corpus as a list of documents: "stdlib", a name of NAMED, a text file or rows of {"text"}.

    A text file is one document, or several between <|endoftext|>; blank ones are none. val is the
    last 5 % of the documents (of the characters, if there is one document), or another corpus,
    whose documents are then left out here; only stdlib has an ood split.
    """
    if val and split == "val":
        return whole_corpus(val)
    if val and split == "train":
        held = set(whole_corpus(val))
        found = whole_corpus(name_or_path)
        docs = [doc for doc in found if doc not in held]
        if len(docs) < len(found):
            tell(f"{name_or_path}: left out {len(found) - len(docs)} documents that {val} has too")
        return docs
    if name_or_path == "stdlib":
        return stdlib(split)
    check_split(split, ("train", "val"))
    docs = whole_corpus(name_or_path)
    if len(docs) == 1:
        cut = len(docs[0]) * 19 // 20
        cut = docs[0].rfind("\n", 0, cut) + 1 or cut             # at a line's start if there is one
        docs = [docs[0][:cut], docs[0][cut:]]
    held = max(1, len(docs) // 20)
    return docs[:-held] if split == "train" else docs[-held:]


def whole_corpus(name_or_path):
    """All documents of a corpus, those of stdlib that are for training."""
    if name_or_path == "stdlib":
        return stdlib("train")
    path = locate(name_or_path)
    if kind(path) in ROWS:
        found = [(where, row.get("text")) for where, row in read_rows(path)]
        if bad := [where for where, doc in found if not isinstance(doc, str)]:
            raise UserError(f'{bad[0]}: no string under "text": a corpus is one {{"text": '
                            f'…}} a line')
        docs = [doc for _, doc in found]
    else:
        docs = read_text(path).split("<|endoftext|>")
    docs = [doc for doc in docs if doc.strip()]
    if sum(map(len, docs)) < 2:
        raise UserError(f"{path}: there is no text in it")
    return docs


def stream(documents, tok, wanted):
    """At least `wanted` ids of documents, if they have as many: BOS document EOS BOS document …"""
    ids = []
    for document in documents:
        ids += [*tok.prompt(""), *tok.encode(document), tok.eos]
        if len(ids) > wanted:
            break
    return torch.tensor(ids)


def shuffled(name, generator):
    """The training documents of a text in random order."""
    rows = documents(name, "train")
    return (rows[i] for i in torch.randperm(len(rows), generator=generator).tolist())


def split_rows(rows, split, key="prompt", held=None, of=""):
    """train or val of rows with a text under `key`: val is the 1/16 of the distinct texts (one at
    least) with the smallest hash, so that equal texts never stand on both sides; or it is `held`,
    the rows of another file, whose texts are left out of train (the file `of`), aloud."""
    check_split(split, ("train", "val"))
    if held is None:
        texts = sorted({row[key] for row in rows}, key=digest)
        asked = set(texts[:max(1, len(texts) // 16)])
        return [row for row in rows if (row[key] in asked) == (split == "val")]
    asked = {row[key] for row in held}
    kept = [row for row in rows if row[key] not in asked]
    if len(kept) < len(rows):
        tell(f"{of}: left out {len(rows) - len(kept)} rows, whose prompts are held out")
    return kept if split == "train" else held


# --- 5 schemas ------------------------------------------------------------------------------------

SCHEMAS = ('{"messages": [{"role", "content"}, … {"role": "assistant", "content"}]}, '
           '{"conversations": [{"from": "human", "value"}, … {"from": "gpt", "value"}]}, '
           '{"prompt", "completion"}, the same with "label": true, '
           '{"prompt", "chosen", "rejected"}, {"chosen", "rejected"} that begin alike (each of '
           'these a text, or messages), {"question", "answer"}, '
           '{"instruction", "input", "output"}, {"instruction", "instances": [{"input", '
           '"output"}]}, and for a reward {"prompt", "answer"}')
ROLES = dict(system="system", developer="system", user="user", human="user", assistant="assistant",
             gpt="assistant", chatgpt="assistant", bing="assistant", bard="assistant",
             model="assistant")
# what would change a row's meaning and is not used, where it says anything
UNUSED = ("tools", "functions", "tool_calls", "function_call", "reasoning_content", "images",
          "image", "videos", "audio", "documents", "history", "suffix", "chat_template_kwargs")
EMPTY = (None, "", "[]", "{}", "null", [], {}, False)
ANSWERS = ("answer", "ground_truth", "solution")     # columns that say what is right
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"    # turns in the texts of HH-RLHF


def check_unused(row, more=()):
    """UserError for a column that changes what a row means and that nothing here uses."""
    for key in (*UNUSED, *more):
        if row.get(key) not in EMPTY:
            raise UserError(f"{key!r} changes what the row means and is not used here: take it out")
    if row.get("weight") not in (None, 1):
        raise UserError(f"the weight is {str(row['weight'])[:20]!r}, but here all count alike: "
                        "take out what is not to be learnt")


def spoken(content):
    """A message's text: a string, or a list of parts that are all text."""
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            what = part.get("type", part) if isinstance(part, dict) else part
            raise UserError(f"a message holds a part {str(what)[:40]!r}: only text is read")
    if not isinstance(content, (str, list)):
        raise UserError(f"a message's content is {str(content)[:40]!r}: expected a text")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def chat(turns):
    """Messages of {"role", "content"}, or ShareGPT's {"from", "value"}, as [{"role", "content"}]
    with the roles system, user and assistant."""
    out = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise UserError(f'a message is {str(turn)[:40]!r}: expected {{"role", "content"}}')
        check_unused(turn, ("reasoning", "thinking"))
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(f"a message's role is {str(role)[:40]!r}: "
                            f"it must be one of {', '.join(ROLES)}")
        out.append(dict(role=ROLES[role], content=spoken(turn.get("content", turn.get("value")))))
    return out


def written(messages):
    """Messages as plain text that an answer continues: what models without a template read."""
    return "\n".join([*(f"{turn['role']}: {turn['content']}" for turn in messages), "assistant: "])


def reading(c):
    """How a run wants its file read: the options that it sets, of what reads files."""
    set_ = dict(val=c.val, system=c.system, ask=c.ask, answer=c.answer)
    return {key: value for key, value in set_.items() if value not in ("", "mark")}


def framed(row, system="", ask=""):
    """A row under a system message and with words behind its question."""
    if not (system or ask):
        return row
    turns = row.get("messages") or [dict(role="user", content=row["prompt"])]
    if system and turns[0]["role"] == "system":
        raise UserError(f"{row['source']}: the row has a system message of its own: leave --system "
                        "out")
    turns = [dict(role="system", content=system)] * bool(system) + turns
    if ask:
        turns = [*turns[:-1], turns[-1] | dict(content=f"{turns[-1]['content']}\n{ask}")]
    parts = [system, f"{row['prompt']}\n{ask}" if ask else row["prompt"]]
    plain = written(turns) if "messages" in row else "\n\n".join(filter(None, parts))
    return row | dict(prompt=plain, messages=turns)


def asked(row, prompt):
    """{"prompt"[, "messages"]} of a prompt, a text or messages, under the row's system prompt."""
    check_unused(row)
    messages = [] if isinstance(prompt, str) else chat(prompt)
    system = row.get("system") or row.get("system_prompt") or ""
    if not isinstance(system, str):
        raise UserError(f"the system prompt is {str(system)[:40]!r}: expected a text")
    if system and messages[:1] != [dict(role="system", content=system)]:
        if "system" in (turn["role"] for turn in messages):
            raise UserError("there are two system prompts, a column and a message: give one")
        question = messages or [dict(role="user", content=prompt)]
        messages = [dict(role="system", content=system), *question]
    if isinstance(prompt, str):
        plain = f"{system}\n\n{prompt}" if system else prompt
        return dict(prompt=plain) | (dict(messages=messages) if messages else {})
    if not messages:
        raise UserError("nothing is asked: an answer has messages before it")
    return dict(prompt=written(messages), messages=messages)


def answered(row, prompt, answer):
    """asked() and the "completion", if the assistant has the last word. An answer is a text, or
    messages: of the assistant first, or the whole dialogue with the prompt in it."""
    if isinstance(answer, str):
        return asked(row, prompt) | dict(completion=answer)
    turns = chat(answer)
    if not turns or turns[0]["role"] == "assistant":
        turns = [*([dict(role="user", content=prompt)] if isinstance(prompt, str) else
                   chat(prompt)), *turns]
    elif not begins(turns, prompt):
        raise UserError("the messages of the answer begin otherwise than the prompt: make them "
                        "begin with it, or with the assistant")
    if not turns or turns[-1]["role"] != "assistant":
        return asked(row, turns)
    return asked(row, turns[:-1]) | dict(completion=turns[-1]["content"])


def begins(turns, prompt):
    """Whether a dialogue begins with a prompt, a text or messages; a system message may precede."""
    if isinstance(prompt, str):
        spoken_first = [turn["content"].strip() for turn in turns[:2]]
        return not prompt.strip() or prompt.strip() in spoken_first
    opening = chat(prompt)
    return opening in (turns[:len(opening)], turns[1:len(opening) + 1])


def hh_rlhf(chosen, rejected):
    """Two texts of HH-RLHF -> (messages, prompt, chosen, rejected), cut behind the last
    "\n\nAssistant:" (and its space) that they share; None if that is not how they are written."""
    shared = os.path.commonprefix([chosen, rejected])
    end = shared.rfind(ASSISTANT) + len(ASSISTANT)
    end += all(text[end:end + 1] == " " for text in (chosen, rejected))
    head, *parts = re.split(r"(?:\n\n|^)(Human|Assistant): ?", shared[:end])
    if ASSISTANT not in shared or head:
        return None
    roles = dict(Human="user", Assistant="assistant")
    turns = [dict(role=roles[who], content=text) for who, text in zip(parts[:-2:2], parts[1::2])]
    return turns, shared[:end], chosen[end:], rejected[end:]


def pair_of(row):
    """{"prompt"[, "messages"], "chosen", "rejected"} of a row of preferences, None if it is none,
    {} if its two sides are answers to different dialogues."""
    prompt, sides = row.get("prompt", row.get("question")), (row.get("chosen"), row.get("rejected"))
    if not all(isinstance(x, str) for x in sides) and not all(isinstance(x, list) for x in sides):
        return None
    if prompt is None and isinstance(sides[0], str):
        if not (found := hh_rlhf(*sides)):
            return None
        turns, text, *sides = found
        if any(HUMAN in side for side in sides):
            return {}
        return asked(row, turns) | dict(prompt=text, chosen=sides[0], rejected=sides[1])
    if not isinstance(prompt, (str, list)) and prompt is not None:
        return None
    win, lose = (answered(row, [] if prompt is None else prompt, side) for side in sides)
    chosen, rejected = (side.pop("completion", None) for side in (win, lose))
    if win != lose or chosen is None or rejected is None:
        return {}
    return win | dict(chosen=chosen, rejected=rejected)


def normalise(row):
    """{"prompt"[, "messages", "completion", "label", "answer"]} of a row in one of SCHEMAS, the
    first that fits; {} if none does. Columns that are null are not there."""
    row = {key: value for key, value in row.items() if value is not None}
    says = [str(row[key]) for key in ANSWERS if isinstance(row.get(key), (str, int, float))]
    answer = dict(answer=says[0]) if says else {}
    match row:
        case {"messages": [_, *_] as turns} | {"conversations": [_, *_] as turns}:
            last = chat(turns[-1:])[0]
            found = asked(row, turns[:-1] if last["role"] == "assistant" else turns) | answer
            return found | (dict(completion=last["content"]) if last["role"] == "assistant" else {})
        case {"prompt": str() | list() as prompt, "completion": str() | list() as text}:
            if row.get("label", 1) not in (0, 1):
                return {}
            label = dict(label=bool(row["label"])) if "label" in row else {}
            return answered(row, prompt, text) | label | answer
        case {"chosen": _, "rejected": _}:
            if found := pair_of(row):
                question = {k: found[k] for k in ("prompt", "messages") if k in found}
                return question | dict(completion=found["chosen"])
        case {"question": str(prompt), "answer": str(text)}:
            return answered(row, prompt, text)
        case ({"instruction": str(prompt), "output": str(text)}
              | {"instruction": str(prompt), "instances": [{"output": str(text)}]}):
            more = row.get("instances", [row])[0].get("input") or ""
            if isinstance(more, str):
                return answered(row, f"{prompt}\n\n{more}" if more else prompt, text)
        case {"prompt": str() | list() as prompt} if not {"completion", "chosen",
                                                          "rejected"} & row.keys():
            return asked(row, prompt) | answer
    return {}


def examples(path):
    """The rows of a file, as normalise() gives them, each with its "source", "path:line", and the
    "row" as the file has it. UserError, with the line, for one that no schema fits; a preference
    whose sides answer different dialogues is left out, aloud."""
    out, parted = [], []
    for where, row in read_rows(path):
        with at(where):
            found = normalise(row)
            if not found and pair_of(row) == {}:
                parted.append(where)
                continue
            if not found:
                types = ", ".join(f"{k}: {type(v).__name__}" for k, v in row.items())
                raise UserError(f"no schema fits {{{types}}}; accepted are {SCHEMAS}")
        out.append(found | dict(source=where, row=row))
    if parted:
        tell(f"{path}: left out {len(parted)} pairs of dialogues that part before their last "
             f"answers ({places(parted)})")
    texts = [row["completion"] for row in out if "completion" in row]
    if texts and not any(text.strip() for text in texts):
        raise UserError(f"{path}: every completion is empty: there is nothing to learn")
    return out
