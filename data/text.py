"""
text.py - corpora and files: what a run reads.

    documents("stdlib", "train")          # this Python's own sources and reference topics, split by
    file
    signatures("val")                     # real (signature -> first docstring sentence) pairs, same
    files
    documents("shakespeare", "train")     # a named download: URL and SHA-256 in NAMED
    examples(read_jsonl("my.jsonl"))      # the ecosystem's schemas, all brought to {"prompt",
    "completion"}

Map      1 the standard library   2 signatures and ROUGE-L   3 downloads   4 files and their schemas
Watch    the corpus is the interpreter's own: another Python version is another corpus, so compare
within one.
"""
import ast
import contextlib
import hashlib
import json
import os
import re
import sys
import sysconfig
import textwrap
import urllib.request
import warnings
from collections import Counter
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
    cache = CACHE / f"signatures-{digest(json.dumps([VERSION, sys.version, sizes]))[:16]}.json"
    with contextlib.suppress(OSError, ValueError):                   # absent or damaged: parse anew
        return json.loads(cache.read_text(encoding="utf-8"))[split]
    rows = {s: [] for s in SPLITS}
    for s in SPLITS:
        for file in files[s]:
            rows[s] += file_pairs(file[0], read_source(*file))
    found = curate(rows)
    with contextlib.suppress(OSError):                          # a read-only folder costs only time
        write_atomic(cache, json.dumps(found).encode())
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


# --- 4 files and their schemas --------------------------------------------------------------------

def read_text(path):
    """The text of a UTF-8 file; UserError if it is something else, or empty."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")            # -sig: skips a byte-order mark
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({e})") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    return text


def read_jsonl(path):
    """[object of each line]; UserError "path:line: …" at the first line that is not a JSON object,
    or that holds a key twice or half a character (an escape like \\ud83d without its partner)."""
    rows = []
    for i, line in enumerate(read_text(path).rstrip().split("\n"),
                             1):                                    # splitlines would cut at U+2028
        row, why = None, ""
        try:
            row = json.loads(line, object_pairs_hook=without_repeats)
            if "\\ud" in line.lower():
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            raise UserError(f"{path}:{i}: {e.object[e.start]!r} is half of a character: write "
                            "both, or take it out") from None
        except (ValueError, RecursionError) as e:
            why = f" ({e})"
        if not isinstance(row, dict):
            raise UserError(f"{path}:{i}: not a JSON object (one a line): {line[:60]!r}{why}")
        rows.append(row)
    return rows


def is_corpus(name_or_path):
    """Whether documents() reads this: running text, not the prompts and completions of a task or a
    file."""
    suffix = Path(NAMED[name_or_path][0] if name_or_path in NAMED else name_or_path).suffix
    if name_or_path == "stdlib" or suffix == ".txt":
        return True
    if suffix != ".jsonl" or name_or_path in NAMED:
        return False
    return "text" in read_jsonl(locate(name_or_path))[0]


def documents(name_or_path, split="train"):
    """A corpus as a list of documents: "stdlib", a name of NAMED, a text file or a .jsonl with
    {"text"}.

    A text file is one document, or several between <|endoftext|>. val is the last 5 % of the
    documents (of the characters, if there is one document); only stdlib has an ood split.
    """
    if name_or_path == "stdlib":
        return stdlib(split)
    check_split(split, ("train", "val"))
    path = locate(name_or_path)
    if path.suffix == ".jsonl":
        docs = [row.get("text") for row in read_jsonl(path)]
        if bad := [i for i, doc in enumerate(docs, 1) if not isinstance(doc, str)]:
            raise UserError(f'{path}:{bad[0]}: no string under "text": a corpus is one {{"text": '
                            f'…}} a line')
    else:
        docs = read_text(path).split("<|endoftext|>")
    docs = [doc for doc in docs if doc.strip()]
    if sum(map(len, docs)) < 2:
        raise UserError(f"{path}: there is no text in it")
    if len(docs) == 1:
        cut = len(docs[0]) * 19 // 20
        cut = docs[0].rfind("\n", 0, cut) + 1 or cut             # at a line's start if there is one
        docs = [docs[0][:cut], docs[0][cut:]]
    held = max(1, len(docs) // 20)
    return docs[:-held] if split == "train" else docs[-held:]


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


def split_rows(rows, split, key="prompt"):
    """train or val of rows with a text under `key`: val is the 1/16 of the distinct texts (one at
    least) with the smallest hash, so that equal texts never stand on both sides."""
    check_split(split, ("train", "val"))
    texts = sorted({row[key] for row in rows}, key=digest)
    held = set(texts[:max(1, len(texts) // 16)])
    return [row for row in rows if (row[key] in held) == (split == "val")]


SCHEMAS = ('{"prompt", "completion"}, the same with "label": true, {"prompt", "chosen", '
           '"rejected"}, '
           '{"question", "answer"}, {"messages": [{"role", "content"}, … {"role": "assistant", '
           '"content"}]}, '
           '{"instruction", "input", "output"}, {"instruction", "instances": [{"input", '
           '"output"}]}')


def normalise(row):
    """{"prompt" or "messages", "completion"[, "label"]} of a row in one of SCHEMAS; {} if it is in
    none."""
    match row:
        case {"messages": [_, *_, {"role": "assistant", "content": str(text)}] as turns} if all(
                isinstance(t, dict) and type(t.get("role")) is type(t.get("content")) is str
                for t in turns):
            return dict(messages=turns[:-1], completion=text)
        case {"prompt": str(prompt), "completion": str(text), "label": label}:
            return dict(prompt=prompt, completion=text,
                        label=bool(label)) if label in (0, 1) else {}
        case ({"prompt": str(prompt), "completion": str(text)}
              | {"prompt": str(prompt), "chosen": str(text), "rejected": str()}
              | {"question": str(prompt), "answer": str(text)}):
            return dict(prompt=prompt, completion=text)
        case ({"instruction": str(prompt), "input": str(more), "output": str(text)}
              | {"instruction": str(prompt),
                 "instances": [{"input": str(more), "output": str(text)}]}):
            return dict(prompt=f"{prompt}\n\n{more}" if more else prompt, completion=text)
    return {}


def examples(rows, path="rows"):
    """Rows of read_jsonl(path) as [{"prompt", "completion"}]; SCHEMAS lists what they may look
    like.

    Conversations keep {"messages" (all before the answer), "completion"}; a pair's completion is
    its chosen side; "label" becomes a bool. UserError "path:line: …" for other schemas and values
    of other types.
    """
    out = [normalise(row) for row in rows]
    if {} in out:
        i = out.index({})
        types = ", ".join(f"{k}: {type(v).__name__}" for k, v in rows[i].items())
        raise UserError(f"{path}:{i + 1}: no schema fits {{{types}}}; accepted are {SCHEMAS}")
    if not any(row["completion"].strip() for row in out):
        raise UserError(f"{path}: every completion is empty: there is nothing to learn")
    return out
