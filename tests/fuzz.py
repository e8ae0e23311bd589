"""
fuzz.py - hostile command lines, files, checkpoints, faults: is anything lost, silent, a traceback?

    python tests/fuzz.py                        # every case, two at a time: some minutes
    python tests/fuzz.py --sample 40 --seed 3   # as many, drawn by a seed: what the suite does
    python tests/fuzz.py --only toml,resume     # some kinds; --show: what every case said
    python tests/fuzz.py --kills 40             # kill -9 at random moments, resume: the same end?

A case is a command in a folder of its own with some files in it, run in a forked child of this
process, which has imported everything. Afterwards it is one of

    good        refused: exit code 2, one line "error: …", and the folder as before, to the byte;
                or, where the command is right, exit code 0
    traceback   whatever the exit code             code     another exit code than 2
    silent      a wrong command that ran           refused  a right one that did not
    lines       more than one line of error        hang     no answer in a minute
    lost        a file that was there is gone, or has changed
    left        a refusal that left something behind

`silent` is judged on commands that would be right but for one thing: see RIGHT.
"""
import argparse
import dataclasses
import fcntl
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from safetensors.torch import load_file, save_file

from data.run import Range, cli, hyper, kinds
from data.tokenizer import bytes_tokenizer
from model import init, preset, save

SCRIPTS = ("sft", "ppo", "grpo", "dpo", "reward", "compress", "specdec")
MODULES = {name: importlib.import_module(name) for name in (*SCRIPTS, "model")}
RESUMABLE = ("sft", "ppo", "grpo", "dpo", "reward", "specdec")
SECONDS = 60                             # a case that takes longer hangs

# --- what is right --------------------------------------------------------------------------------


def lines(rows):
    """Rows as JSONL."""
    return "".join(json.dumps(r) + "\n" for r in rows)


DEMOS = [dict(prompt=f"say {i}: ", completion=f"{i} it is #### {i}") for i in range(24)]
PAIRS = [dict(prompt=f"say {i}: ", chosen=f"{i} yes", rejected=f"no {i}") for i in range(24)]
LABELS = [dict(prompt=f"say {i}: ", completion=f"{i} yes", label=i % 2 == 0) for i in range(24)]
STORY = "Story {0}. Once there was a {0}, and it was good to be {0}. "
CORPUS = "<|endoftext|>".join(STORY.format(i) * 4 for i in range(40))
SCORE = "def score(problem, text, finished):\n    return float(len(text))\n"
FILES = {"demos.jsonl": lines(DEMOS), "pairs.jsonl": lines(PAIRS), "labels.jsonl": lines(LABELS),
         "corpus.txt": CORPUS, "reward.py": SCORE}
RIGHT = dict(
    sft="--config tiny --steps 1 --context 64 --init base --data demos.jsonl",
    ppo="--config tiny --steps 1 --init base --base base --data demos.jsonl",
    grpo="--config tiny --steps 1 --init base --data demos.jsonl",
    dpo="--config tiny --steps 1 --init base --data pairs.jsonl",
    reward="--config tiny --steps 1 --init base --data pairs.jsonl",
    compress="--config tiny,nowag_p --init base --data corpus.txt",
    specdec="--config tiny --steps 1 --init base --draft small --data corpus.txt",
    model="base --prompt ab --tokens 3")


class Case(NamedTuple):
    """script and argv run where FILES, the checkpoints base and small, and `files` lie;
    setup(folder) does the rest. right: it must run; free: the names that may change; env: more
    environment variables."""
    kind: str
    script: str
    argv: list
    files: dict = {}
    setup: object = None
    right: bool = False
    free: tuple = ()
    env: dict = {}
    limit: int = 0                       # of a file's size in bytes: a full disk


def command(script, *changes):
    """RIGHT's words with some options changed: ("--lr", "nan")."""
    words = RIGHT[script].split()
    options = dict(zip(words[::2], words[1::2])) if script != "model" else {}
    if script == "model":
        return [*words, *changes]
    options |= dict(zip(changes[::2], changes[1::2]))
    return [x for pair in options.items() for x in pair]


# --- 1 values -------------------------------------------------------------------------------------

NUMBERS = ("nan", "inf", "-inf", "1e999", "-1", "abc", "", "99999999999999999999999", "1.5", "0")


def wrong(kind, default, text):
    """Whether an option of this annotation and default must refuse the text."""
    allowed = kind if isinstance(kind, Range) else Range("(-inf, inf)" if default < 0
                                                         else "[0, inf)")
    try:
        x = type(default)(text)
    except ValueError:
        return True
    return x not in allowed or type(default) is int and x > 2 ** 31 - 1


def values():
    """Every field of every Config with values of other kinds."""
    for script in SCRIPTS:
        for x in dataclasses.fields(MODULES[script].Config):
            if x.name in ("config", "out", "resume", "system", "ask"):         # of any words
                continue
            if isinstance(x.default, bool):
                texts = ("maybe", "2", "")
            elif isinstance(x.default, str):
                texts = ("nosuch", "no/such", "x" * 300,
                         "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"))
            else:
                texts = [t for t in NUMBERS if wrong(x.type, x.default, t)]
            for text in texts:
                yield Case("values", script, command(script, f"--{x.name}", text))


def arguments():
    """Every argument of every row of every axis: NaN, a text, below what it takes."""
    for script in SCRIPTS:
        for axis, rows in MODULES[script].AXES.items():
            for row, fn in rows.items():
                for key, default in hyper(fn).items():
                    chosen = ["--" + axis, row] * (len(rows) > 1 and row != "PATH")
                    if isinstance(default, bool):
                        texts = ("maybe",)
                    elif isinstance(default, str):
                        texts = ("nosuch",) * (key in kinds(fn))
                    else:
                        kind = kinds(fn).get(key)
                        texts = [t for t in ("nan", "abc", "-3", "1e999")
                                 if wrong(kind, default, t)]
                    for text in texts if row != "PATH" else ():
                        yield Case("arguments", script,
                                   command(script, *chosen, f"--{axis}.{key}", text))


# --- 2 command lines ------------------------------------------------------------------------------

WORDS = (["--lrr", "1"], ["lr=1"], ["--"], [""], ["-h"], ["--lr"], ["--=1"], ["--é", "1"],
         ["--seeds", "3"],
         ["--seed", "1", "--seed", "2"], ["--seed=1", "--seed", "2"], ["--config", "tiny"],
         ["--keep", "0"],
         ["--claim", "nosuch"], ["--claim", "x", "--seeds", "0"], ["--stop", "-3"], ["--resume"],
         ["--resume", "--out", "nosuch"], ["--device", "cuda:99"], ["--device", "cpu:0"],
         ["--kernels", "x"], ["--seed", str(2 ** 64)])
INITS = ("base:", "base:nosuch", "base:,", "nosuch", "demos.jsonl", "", "/dev/null")
CONFIGS = ("nosuch", "tiny,nosuch", "tiny,,,tinyy", "nosuch.toml", "base", "demos.jsonl",
           "tiny, tiny")
MODEL = ("--tokens -1", "--tokens 0", "--temperature nan", "--temperature -1", "--top-p 2",
         "--top-p 0", "--top-k -1", "--seed 9999999999999", "--device tpu", "--nosuch")
IDLE = dict(                             # what does nothing, or does not go together, by script
    sft=("--clip -1", "--clip 0", "--teacher base", "--other base", "--vocab 600", "--model 1x64",
         "--epochs 1", "--family llama", "--context 100000", "--feedback hindsight --mix q",
         "--feedback scored --data corpus.txt", "--data corpus.txt --chat true",
         "--data corpus.txt --rows 3", "--loss dckd", "--peft lora --store int8",
         "--prune journey --begin 0.9", "--suggest true --init base:pretrain"),
    ppo=("--samples 1 --advantage best", "--gamma 2", "--lam -1", "--base base --reward gold",
         "--data corpus.txt", "--reward base", "--advantage best --critic_lr 1"),
    grpo=("--samples 1", "--teacher base", "--ratio 0.5", "--rounds 3", "--prompts 3",
          "--data corpus.txt", "--reward nosuch.py:f", "--watch corpus.txt", "--level group",
          "--surrogate drpo --advantage rloo", "--shaper regraded", "--shaper agreed",
          "--reward PATH", "--draw twins --prompts 3", "--weight recap", "--prepare hinted"),
    dpo=("--beta -1", "--beta 0", "--sft -1", "--judge base", "--combine cagrad", "--noise 0.1",
         "--refresh 3", "--key b", "--data corpus.txt", "--data demos.jsonl",
         "--data labels.jsonl"),
    reward=("--noise 0.1", "--rl_steps 3", "--aggregate uwo", "--loss listwise",
            "--recipe armo",
            "--recipe polar", "--eval base", "--data corpus.txt", "--data demos.jsonl",
            "--context 100000", "--recipe ensemble --stop 1"),
    compress=("--kd_lr 1", "--domain corpus.txt", "--context 100000", "--data demos.jsonl",
              "--bits 5",
              "--method gptq --bits 5", "--pattern 9:2", "--pattern no", "--smooth awq"),
    specdec=("--context 100000", "--samples 4", "--decode deal", "--refresh 3", "--split ood",
             "--ref_batch 3", "--chat true", "--drafter lookup"))


def forms():
    """Words that are no options, options twice, unknown presets, options that nothing reads."""
    for script in SCRIPTS:
        right = command(script)
        for words in WORDS:
            yield Case("forms", script, [*right, *words])
        for presets in CONFIGS:
            yield Case("forms", script, command(script, "--config", presets))
        for path in INITS[:-2] if script == "sft" else INITS:        # sft.py --init '': a new model
            yield Case("forms", script, command(script, "--init", path))
        for words in IDLE[script]:
            yield Case("forms", script, command(script, *words.split()))
        yield Case("forms", script, ["--help"], right=True)
        yield Case("forms", script, [*right, "--out", "new"], right=True, free=("new",))
    for words in MODEL:
        yield Case("forms", "model", command("model", *words.split()))
    for path in ("nosuch", "demos.jsonl", ".", "", "/dev/null"):
        yield Case("forms", "model", [path, "--prompt", "a"])


# --- 3 TOML ---------------------------------------------------------------------------------------

TOML = ("seed = [1, 2]", "seed = 2020-01-01", "[seed]\nx = 1", "seed = true", "seed = nan",
        "seed = 1.5",
        "seed = -1", 'seed = "fast"', "seed = 99999999999999999999", "seed = 1\nseed = 2",
        "seed = ",
        "seedd = 1", '"" = 1', 'config = "tiny"', "resume = true", 'out = "a\\u0000b"', "out = 5",
        "a.b = 1", "x = {a = 1}", "device = 0", b"\xff\xfe\x00")


def tomls():
    """Config files of all sorts."""
    for script in SCRIPTS:
        presets = RIGHT[script].split()[1]
        for i, text in enumerate(TOML):
            argv = command(script, "--config", f"{presets},{i}.toml")
            yield Case("toml", script, argv, {f"{i}.toml": text})
        argv = command(script, "--config", "folder.toml")
        yield Case("toml", script, argv, setup=new_folder("folder.toml"))
        argv = [*command(script, "--config", f"{presets},fine.toml"), "--out", "new"]
        yield Case("toml", script, argv, {"fine.toml": "seed = 3\n"}, right=True, free=("new",))


# --- 4 folders ------------------------------------------------------------------------------------

PLACES = ("D", "D/step-000001", "base", ".", "..", "demos.jsonl", "demos.jsonl/x", "/proc/nosuch",
          "/dev/null", "/dev/null/x", "x" * 300)


def thesis(folder):
    """A folder with years of somebody's work."""
    for name in ("D", "D/step-000001", "D/step-000001-copy"):
        (folder / name).mkdir()
        (folder / name / "thesis.txt").write_text("years of work")
    (folder / "D/log.jsonl").write_text("mine\n")
    (folder / "D/notes.tmp").write_text("mine too\n")


def new_folder(name):
    """A setup that makes a folder."""
    return lambda folder: (folder / name).mkdir()


def occupied(folder):
    """An empty folder that another process has locked, as a run would."""
    (folder / "busy").mkdir()
    fcntl.flock(os.open(folder / "busy", os.O_RDONLY), fcntl.LOCK_EX)


def folders():
    """--out on what is there already, and on what cannot be a folder."""
    for script in SCRIPTS:
        right = command(script)
        for out in PLACES:
            yield Case("folders", script, [*right, "--out", out], setup=thesis)
            yield Case("folders", script, [*right, "--out", out, "--resume"], setup=thesis)
        yield Case("folders", script, [*command(script, "--init", "nosuch"), "--out", "D"],
                   setup=thesis)
        yield Case("folders", script, [*right, "--out", "busy"], setup=occupied)
        yield Case("folders", script, [*right, "--out", "empty"], setup=new_folder("empty"),
                   right=True,
                   free=("empty",))
        yield Case("folders", script, [*right, "--out", "full"], limit=20_000, free=("full",))
        yield Case("folders", script, [*right, "--out", "fuller"], limit=400)
        yield Case("folders", script, [*right, "--out", "ranks"],
                   env=dict(WORLD_SIZE="2", RANK="0"))


# --- 5 data ---------------------------------------------------------------------------------------


def broken(rows):
    """{what is wrong: the file} of a right JSONL file of rows."""
    first, *rest = rows
    bare = {k: v for k, v in first.items() if k != "prompt"}
    tail = json.dumps(bare)[1:] + "\n"
    silent = [{k: "" if k != "prompt" and isinstance(v, str) else v for k, v in r.items()}
              for r in rows]
    return dict(
        empty="",
        blank="\n\n",
        bytes=b"\xff\xfe\x00\x01",
        nul=b"\x00" * 40,
        deep="[" * 100_000 + "\n",
        list=lines([[1]]),
        number="1\n",
        half=lines(rest) + '{"prompt": ',
        other=lines([dict(foo=1)]),
        types=lines([dict.fromkeys(first, 1)]),
        null=lines([dict.fromkeys(first)]),
        missing=lines([bare]),
        late=lines(rest) + lines([bare]),
        surrogate=lines(rest) + '{"prompt": "\\ud83d", ' + tail,
        twice='{"prompt": "a", "prompt": "b", ' + tail + lines(rest),
        one=lines([first]),
        empties=lines(silent))


TEXTS = dict(empty="", blank=" \n ", bytes=b"\xff\xfe\xff", short="a",
             separators="<|endoftext|>" * 9)
NO_TEXTS = dict(empty=[dict(text="")], blank=[dict(text=" \n ")] * 3, number=[dict(text=5)],
                none=[dict(text=None)])
REWARDS = ("return None", "return 'good'", "return float('nan')", "return float('inf')",
           "return 1 / 0",
           "return [1]", "import sys; sys.exit(0)", "return 10 ** 400", "raise BaseException",
           "return 1e39")
SOURCES = ("def f(x): return 1", "def f(a, b, c, d): return 1", "f = 5", "def f(: return",
           "import nosuch", "1 / 0", "\x00", "raise SystemExit(0)", "def g(a, b, c): return 1")


def data():
    """Broken data files, for every script that reads such ones, and broken rewards."""
    readers = [("sft", DEMOS, "--data"), ("sft", DEMOS, "--watch"), ("ppo", DEMOS, "--data"),
               ("grpo", DEMOS, "--data"), ("grpo", DEMOS, "--watch"), ("specdec", DEMOS, "--data"),
               ("dpo", PAIRS, "--data"), ("reward", PAIRS, "--data")]
    for script, rows, key in readers:
        for name, text in broken(rows).items():
            yield Case("data", script, command(script, key, f"{name}.jsonl"),
                       {f"{name}.jsonl": text})
        yield Case("data", script, command(script, key, "folder.jsonl"),
                   setup=new_folder("folder.jsonl"))
        yield Case("data", script, command(script, key, "none.jsonl"))
        yield Case("data", script, command(script, key, "none.jsonl", "--init", "base:pretrain"))
    for name, text in broken(LABELS).items():
        argv = command("dpo", "--config", "kto,tiny", "--data", f"{name}.jsonl")
        yield Case("data", "dpo", argv, {f"{name}.jsonl": text})
    for script in ("sft", "compress", "specdec"):
        for name, text in TEXTS.items():
            yield Case("data", script, command(script, "--data", f"{name}.txt"),
                       {f"{name}.txt": text})
        for name, rows in NO_TEXTS.items():
            argv = command(script, "--data", f"{name}.jsonl")
            yield Case("data", script, argv, {f"{name}.jsonl": lines(rows)})
    for line in REWARDS:
        code = f"def f(problem, text, finished):\n    {line}\n"
        argv = [*command("grpo", "--reward", "mine.py:f"), "--out", "new"]
        yield Case("data", "grpo", argv, {"mine.py": code}, free=("new",))
    for code in SOURCES:
        yield Case("data", "grpo", command("grpo", "--reward", "mine.py:f"), {"mine.py": code})


# --- 6 checkpoints --------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj.weight"
LINEAR, LLAMA3 = dict(rope_type="linear"), dict(rope_type="llama3", factor=8.0)
QUANT = dict(quant_method="minimal-post-training", layers=5)
CONFIG = dict(  # values that a key of config.json must not have; base has two layers
    model_type=("nosuch", None, 5, [], "gpt2"),
    architectures=([], ["GPT2LMHeadModel"], "x", [5]),
    vocab_size=(0, -1, 1.5, "x", None, True, 10 ** 12, 100),
    hidden_size=(0, None, 48, "32", 31),
    intermediate_size=(0, None, 33),
    num_hidden_layers=(0, 1, 3, -1, None, 99),
    num_attention_heads=(0, 3, None, 1.0),
    num_key_value_heads=(0, 3, "x"),
    head_dim=(0, 7, 64, -2),
    max_position_embeddings=(0, None, "x"),
    rms_norm_eps=("x", -1, 0),
    rope_theta=("x", 0, -5),
    rope_parameters=([], "x", dict(rope_type="nosuch"), LINEAR, LINEAR | dict(factor=0), LLAMA3),
    tie_word_embeddings=(5, "yes", []),
    attention_bias=(True, "x"),
    mlp_bias=(True,),
    hidden_act=("gelu", 5),
    quantization_config=(5, dict(quant_method="gptq"), QUANT),
    eos_token_id=("x", 1.5, [[]], 10 ** 9, {}),
    bos_token_id=("x", [], [1], 10 ** 9),
    pad_token_id=([[1]], [1], 10 ** 9),
    layer_widths=([-1], "x", [1, 2, 3]),
    swift_layer=(9, -1),
    routed_heads=(9,),
    head_router=("x", 5))
NEEDED = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers",
          "num_attention_heads", "intermediate_size", "max_position_embeddings")
TENSORS = dict(                          # {name: tensor} -> what must be refused
    bias=lambda t: t | {Q.replace("weight", "bias"): torch.zeros(32)},
    layer99=lambda t: t | {Q.replace(".0.", ".99."): t[Q].clone()},
    unknown=lambda t: t | {"foo": torch.zeros(2)},
    gone=lambda t: {k: v for k, v in t.items() if k != Q},
    head=lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1},
    shape=lambda t: t | {Q: t[Q][:, :16]},
    empty=lambda t: t | {Q: torch.zeros(0, 32)},
    none=lambda t: {},
    integer=lambda t: t | {Q: t[Q].long()},
    bool=lambda t: t | {Q: t[Q] > 0},
    complex=lambda t: t | {Q: t[Q].to(torch.complex64)},
    float8=lambda t: t | {Q: t[Q].to(torch.float8_e4m3fn)},
    nan=lambda t: t | {Q: t[Q] * torch.nan},
    inf=lambda t: t | {Q: t[Q] + torch.inf},
    overflow=lambda t: t | {Q: t[Q].double() * 1e300},
    one_nan=lambda t: t | {Q: t[Q].index_fill(0, torch.tensor([3]), torch.nan)})
INDEX = dict(                            # weight_map of two shards -> what must be refused
    outside=lambda m: m | {Q: "../x.safetensors"},
    absolute=lambda m: m | {Q: "/etc/passwd"},
    below=lambda m: m | {Q: "sub/model-1.safetensors"},
    missing_file=lambda m: m | {Q: "model-9.safetensors"},
    wrong_file=lambda m: m | {min(m): "model-2.safetensors"},
    number=lambda m: m | {Q: 5},
    list=lambda m: [1],
    unlisted=lambda m: {k: v for k, v in m.items() if k != Q},
    extra=lambda m: m | {"foo": "model-1.safetensors"})
NO_JSON = (b"", b"[]", b'{"a": ', b"\xff\xfe", b"5", b"[" * 100_000, b'{"a": 1, "a": 2}')
REGEX = dict(type="Split", pattern=dict(Regex="("), behavior="Isolated", invert=False)
LEVEL = dict(type="ByteLevel", add_prefix_space=False, use_regex=False)
TOKENIZER = dict(                        # the object of tokenizer.json, to be changed in place
    no_model=lambda d: d.pop("model"),
    model_list=lambda d: d.update(model=[]),
    unigram=lambda d: d["model"].update(type="Unigram"),
    vocab_list=lambda d: d["model"].update(vocab=[]),
    vocab_empty=lambda d: d["model"].update(vocab={}),
    vocab_text=lambda d: d["model"].update(vocab={"a": "b"}),
    vocab_half=lambda d: d["model"].update(vocab=dict([*d["model"]["vocab"].items()][:40])),
    vocab_negative=lambda d: d["model"]["vocab"].update(a=-1),
    vocab_huge=lambda d: d["model"]["vocab"].update(zz=10 ** 12),
    vocab_twice=lambda d: d["model"]["vocab"].update(zz=5),
    vocab_beyond=lambda d: d["model"]["vocab"].update(zz=5000),
    merges_none=lambda d: d["model"].update(merges=None),
    merges_text=lambda d: d["model"].update(merges="x"),
    merges_numbers=lambda d: d["model"].update(merges=[1]),
    merges_one=lambda d: d["model"].update(merges=["ab"]),
    merges_three=lambda d: d["model"].update(merges=[["a", "b", "c"]]),
    merges_unknown=lambda d: d["model"].update(merges=["q q"]),
    added_text=lambda d: d.update(added_tokens="x"),
    added_number=lambda d: d.update(added_tokens=[5]),
    added_no_id=lambda d: d.update(added_tokens=[dict(content="<s>")]),
    added_no_text=lambda d: d.update(added_tokens=[dict(id=1)]),
    added_huge=lambda d: d.update(added_tokens=[dict(id=10 ** 10, content="<s>")]),
    pre_list=lambda d: d.update(pre_tokenizer=[1]),
    pre_type=lambda d: d.update(pre_tokenizer=dict(type="Whitespace")),
    pre_odd=lambda d: d.update(pre_tokenizer=dict(type="Sequence", pretokenizers=5)),
    pre_regex=lambda d: d.update(pre_tokenizer=dict(type="Sequence", pretokenizers=[REGEX, LEVEL])),
    normaliser=lambda d: d.update(normalizer=dict(type="Lowercase")),
    normaliser_text=lambda d: d.update(normalizer="x"))
ENDS = ("<nosuch>", 1.5, 5, [5], None, dict(x=1),
        dict(content=5))                                        # eos_token of tokenizer_config.json


def changed(name, change):
    """A setup that changes the object of the JSON file base/<name> in place."""
    def setup(folder):
        path = folder / "base" / name
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))
    return setup


def with_key(name, key, value):
    """A setup that sets one key of the JSON file base/<name>."""
    return changed(name, lambda d: d.update({key: value}))


def without_key(name, key):
    """A setup that takes one key out of the JSON file base/<name>."""
    return changed(name, lambda d: d.pop(key))


def rewritten(change):
    """A setup that changes base's tensors by change({name: tensor}) -> {name: tensor}."""
    def setup(folder):
        path = folder / "base" / "model.safetensors"
        found = {k: v.contiguous() for k, v in change(load_file(path)).items()}
        save_file(found, path, metadata={"format": "pt"})
    return setup


def sharded(change):
    """A setup that splits base into two shards, their index being change(weight_map)."""
    def setup(folder):
        path = folder / "base"
        found = load_file(path / "model.safetensors")
        (path / "model.safetensors").unlink()
        where = {k: f"model-{1 + (i > 2)}.safetensors" for i, k in enumerate(sorted(found))}
        for file in set(where.values()):
            some = {k: found[k] for k in found if where[k] == file}
            save_file(some, path / file, metadata={"format": "pt"})
        index = dict(weight_map=change(where))
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return setup


def replaced(name, content):
    """A setup that puts bytes, or nothing for None, in the place of base/<name>."""
    def setup(folder):
        (folder / "base" / name).unlink()
        if content is not None:
            (folder / "base" / name).write_bytes(content)
    return setup


def checkpoints():
    """Checkpoints that are broken, or say other things than they hold."""
    setups = {f"no {key}": without_key("config.json", key) for key in NEEDED}
    for key, some in CONFIG.items():
        setups |= {f"{key} {value!r:.50}": with_key("config.json", key, value) for value in some}
    setups |= {f"tensor {k}": rewritten(change) for k, change in TENSORS.items()}
    setups |= {f"index {k}": sharded(change) for k, change in INDEX.items()}
    for name in ("config.json", "generation_config.json", "tokenizer.json",
                 "tokenizer_config.json"):
        setups |= {f"{name} {text[:20]}": replaced(name, text) for text in NO_JSON}
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        setups |= {f"no {name}": replaced(name, None)}
    setups |= {f"weights of {n}": replaced("model.safetensors", b"x" * n) for n in (0, 8, 99)}
    setups |= {f"ends {x!r}": with_key("generation_config.json", "eos_token_id", x)
               for x in ("x", 1.5, [None], 10 ** 9)}
    setups |= {f"tokenizer {k}": changed("tokenizer.json", change)
               for k, change in TOKENIZER.items()}
    setups |= {f"eos {x!r}": with_key("tokenizer_config.json", "eos_token", x) for x in ENDS}
    for i, (name, setup) in enumerate(setups.items()):
        for script in ("model", SCRIPTS[i % 7]):
            yield Case("checkpoints", script, command(script), setup=setup, env=dict(CASE=name))


# --- 7 runs that are resumed ----------------------------------------------------------------------


def newest(folder, name):
    """A file of the run's newest checkpoint."""
    return sorted(folder.glob("run/step-*"))[-1] / name


def cut(path):
    """Keep the first 30 bytes."""
    path.write_bytes(path.read_bytes()[:30])


def info(folder, **keys):
    """Set keys of the run's run.json."""
    path = folder / "run/run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def scaled(folder, factor):
    """One tensor of the newest checkpoint's weights times a factor."""
    found = load_file(newest(folder, "model.safetensors"))
    found[min(found)] = found[min(found)] * factor
    save_file(found, newest(folder, "model.safetensors"), metadata={"format": "pt"})


LOG = '{"step": "x", "time": 1}\n{"step": 2, "time": 1}\n'
FAULTS = dict(
    state=lambda f: cut(newest(f, "state.pt")),
    no_state=lambda f: newest(f, "state.pt").unlink(),
    text_state=lambda f: newest(f, "state.pt").write_text("state"),
    list_state=lambda f: torch.save([], newest(f, "state.pt")),
    other_state=lambda f: torch.save(dict(step=2), newest(f, "state.pt")),
    older_state=lambda f: shutil.copy(f / "run/step-000001/state.pt", f / "run/step-000002"),
    other_weights=lambda f: scaled(f, 1.5),
    no_config=lambda f: newest(f, "config.json").unlink(),
    init=lambda f: shutil.copy(f / "small/config.json", f / "base"),
    weights=lambda f: cut(newest(f, "model.safetensors")),
    no_weights=lambda f: newest(f, "model.safetensors").unlink(),
    nan=lambda f: scaled(f, torch.nan),
    config=lambda f: cut(newest(f, "config.json")),
    tokenizer=lambda f: cut(newest(f, "tokenizer.json")),
    info=lambda f: cut(f / "run/run.json"),
    info_list=lambda f: (f / "run/run.json").write_text("[]"),
    info_bare=lambda f: (f / "run/run.json").write_text("{}"),
    info_config=lambda f: info(f, config=5),
    info_made=lambda f: info(f, made=5),
    script=lambda f: info(f, script="other"),
    no_info=lambda f: (f / "run/run.json").unlink(),
    log=lambda f: (f / "run/log.jsonl").write_text("[1]\n{}\n"),
    log_bytes=lambda f: (f / "run/log.jsonl").write_bytes(b"\xff\xff\n\xff\n"),
    log_steps=lambda f: (f / "run/log.jsonl").write_text(LOG),
    data=lambda f: [p.write_text(p.read_text() * 2)
                    for p in (*f.glob("*.jsonl"), f / "corpus.txt")])


def paused(script, fault=None):
    """A setup that puts a paused run of a script into the folder, and breaks it."""
    def setup(folder):
        shutil.copytree(MADE[script], folder / "run")
        if fault:
            fault(folder)
    return setup


def resumes():
    """Runs whose traces were broken, or whose data changed, before --resume."""
    for script in RESUMABLE:
        argv = [*command(script, "--steps", "4"), "--out", "run"]
        for name, fault in FAULTS.items():
            again = paused(script, fault)
            yield Case("resume", script, [*argv, "--resume"], setup=again, env=dict(CASE=name))
        yield Case("resume", script, [*argv, "--resume"], setup=paused(script), right=True,
                   free=("run",))
        yield Case("resume", script, [*argv, "--resume", "--lr", "0.5"], setup=paused(script))
        yield Case("resume", script, argv, setup=paused(script))


# --- running --------------------------------------------------------------------------------------

BUILDERS = dict(values=values, arguments=arguments, forms=forms, toml=tomls, folders=folders,
                data=data,
                checkpoints=checkpoints, resume=resumes)
MADE = {}                                # {script: a paused run of it}
STATE = {}                               # what the workers inherit: cases, fixtures


def tree(folder):
    """{path: its content's hash} of everything under a folder."""
    def mark(path):
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return {str(p.relative_to(folder)): mark(p) for p in folder.rglob("*")}


def prepare(folder):
    """What every case finds in its folder: FILES and two checkpoints."""
    for name, text in FILES.items():
        (folder / name).write_text(text)
    tok = bytes_tokenizer()
    for name, size in (("base", "2x32"), ("small", "1x32")):
        save(init(preset(size, tok, 512, "llama"), 1), tok, folder / name)


def child(case, folder):
    """The forked child: this process runs the command and never returns."""
    os.chdir(folder)
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))
    os.environ.update(case.env)
    sys.argv = [f"{case.script}.py", *case.argv]
    if case.limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (case.limit, case.limit))
    code = 1
    try:
        module = MODULES[case.script]
        cli(lambda: module.main(case.argv))
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                pass
        os._exit(code)


def run(case, fixtures):
    """(class of what happened, what was said) of one case, in a copy of the fixtures."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home, "work")
        shutil.copytree(fixtures, folder)
        for name, text in case.files.items():
            if isinstance(text, str):
                text = text.encode("utf-8", "surrogatepass")
            (folder / name).write_bytes(text)
        if case.setup:
            case.setup(folder)
        before = tree(folder)
        pid = os.fork()
        if not pid:
            child(case, folder)
        code, end = None, time.monotonic() + SECONDS
        while code is None and time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done else time.sleep(0.02)
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        said = Path(home, "stderr").read_text(errors="replace")
        return judge(case, code, said, before, tree(folder)), said.strip()[-2000:]


def numbered(i):
    """run() of case i, in a worker."""
    return run(STATE["cases"][i], STATE["fixtures"])


def judge(case, code, said, before, after):
    """The class of a case, from its exit code, stderr, and the folder before and after."""
    def mine(path):
        return path.split("/")[0] not in case.free
    if any(after.get(k) != v for k, v in before.items() if mine(k)):
        return "lost"
    if code is None:
        return "hang"
    if "Traceback" in said:
        return "traceback"
    if case.right:
        return "good" if code == 0 else "refused"
    if code == 0:
        return "silent"
    if code != 2:
        return "code"
    errors = [x for x in said.strip().splitlines() if not x.startswith("usage:")
              and not x.startswith("  ")]
    if len(errors) != 1 or "error: " not in errors[0]:
        return "lines"
    return "left" if any(mine(k) for k in after.keys() - before.keys()) else "good"


def main(argv=None):
    """Run the cases, print the table and what was not good; exit code 1 if anything was not."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    p.add_argument("--sample", type=int, default=0,
                   help="only so many cases, drawn by --seed (0: all)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", default="", help=f"kinds with commas between: {', '.join(BUILDERS)}")
    p.add_argument("--show", action="store_true", help="print what every case said")
    p.add_argument("--kills", type=int, default=0,
                   help="instead: so many runs killed at a random moment and resumed")
    a = p.parse_args(argv)
    torch.set_num_threads(1)
    if a.kills:
        return kills(a.kills, random.Random(a.seed))
    wanted = a.only.split(",") if a.only else BUILDERS
    cases = [case for kind in wanted for case in BUILDERS[kind]()]
    if a.sample:
        cases = random.Random(a.seed).sample(cases, min(a.sample, len(cases)))
    began, table, bad = time.time(), {kind: Counter() for kind in BUILDERS}, []
    with tempfile.TemporaryDirectory() as home:
        fixtures = Path(home, "fixtures")
        fixtures.mkdir()
        prepare(fixtures)
        if any(c.kind == "resume" for c in cases):
            for script in RESUMABLE:
                make_run(script, fixtures, Path(home))
        STATE.update(cases=cases, fixtures=fixtures)
        with multiprocessing.get_context("fork").Pool(2) as pool:        # workers without threads
            for case, (word, said) in zip(cases, pool.imap(numbered, range(len(cases)))):
                table[case.kind][word] += 1
                if word != "good":
                    bad.append((word, case, said))
                if a.show or word != "good":
                    print(f"{word:<10} {case.kind} {case.script} {' '.join(case.argv)[:200]} "
                          f"{case.env.get('CASE', '')}\n           {said[-600:]}", flush=True)
    print(f"\n{'kind':<12} cases  " + "  ".join(sorted({w for row in table.values() for w in row})))
    words = sorted({w for row in table.values() for w in row})
    for kind, row in table.items():
        if row:
            print(f"{kind:<12} {sum(row.values()):>5}  "
                  + "  ".join(f"{row[w]:>{len(w)}}" for w in words))
    print(f"{len(cases)} cases, {len(bad)} not good, {time.time() - began:.0f} s")
    return 1 if bad else 0


def make_run(script, fixtures, home):
    """A run of four steps, checkpoints at 1 and 2, paused after two: what `resume` breaks."""
    folder = home / f"make-{script}"
    shutil.copytree(fixtures, folder)
    case = Case("resume", script,
                [*command(script, "--steps", "4"), "--save_every", "1", "--keep", "2",
                                   "--stop", "2",
                                   "--out", "run"], right=True)
    pid = os.fork()
    if not pid:
        child(case, folder)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise SystemExit(f"the run to break cannot be made: {(home / 'stderr').read_text()}")
    MADE[script] = folder / "run"


def finished(case, folder, after=None):
    """Run a case in a fork, killed after so many seconds. -> its exit code, or None."""
    pid, began = os.fork(), time.monotonic()
    if not pid:
        child(case, folder)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if after is not None and time.monotonic() - began > after:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.005)


def last_weights(run):
    """The bytes of all weights of a run's newest checkpoint, and its log without the times."""
    newest = sorted(run.glob("step-*"))[-1]
    rows = [json.loads(x) for x in (run / "log.jsonl").read_text().splitlines()]
    return ({str(p.relative_to(newest)): p.read_bytes()
             for p in sorted(newest.rglob("*.safetensors"))},
            [(r["step"], r.get("loss")) for r in rows])


def kills(n, rng):
    """Kill n runs at random moments, some twice, and resume; 1 if any ends elsewhere."""
    whole, bad = {}, 0
    with tempfile.TemporaryDirectory() as home:
        fixtures = Path(home, "fixtures")
        fixtures.mkdir()
        prepare(fixtures)
        for i in range(n):
            script, folder = RESUMABLE[i % len(RESUMABLE)], Path(home, f"{i}", "work")
            argv = [*command(script, "--steps", "8", "--save_every", "2"), "--out", "run"]
            case = Case("kills", script, argv)
            if script not in whole:
                reference, began = Path(home, script, "work"), time.monotonic()
                shutil.copytree(fixtures, reference)
                if finished(case, reference):
                    raise SystemExit((reference.parent / "stderr").read_text())
                whole[script] = time.monotonic() - began, last_weights(reference / "run")
            killed = killed_once(case, fixtures, folder, whole[script][0], rng)
            if rng.random() < 0.3:
                again = case._replace(argv=resumed(argv, folder))
                killed += [after for after in [rng.uniform(0, whole[script][0])]
                           if finished(again, folder, after) is None]
            code = finished(case._replace(argv=resumed(argv, folder)), folder)
            same = code == 0 and last_weights(folder / "run") == whole[script][1]
            bad += not same
            print(f"{'same' if same else 'OTHER':<6} {script:<8} killed after "
                  + ", ".join(f"{x:.2f} s" for x in killed), flush=True)
            if not same:
                print((folder.parent / "stderr").read_text()[-500:], flush=True)
    print(f"{n} killed runs, {bad} ended elsewhere")
    return 1 if bad else 0


def killed_once(case, fixtures, folder, seconds, rng):
    """Start the case and kill it within `seconds`; again, in a fresh folder, if it had ended. ->
    [after]"""
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(fixtures, folder)
        after = rng.uniform(0, seconds)
        if finished(case, folder, after) is None:
            return [after]


def resumed(argv, folder):
    """The command that goes on: --resume if the run had begun."""
    return [*argv, *["--resume"] * (folder / "run/run.json").exists()]


if __name__ == "__main__":
    sys.exit(main())
