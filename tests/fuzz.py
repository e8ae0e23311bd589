"""
fuzz.py - hostile command lines, files, checkpoints and faults: is anything lost, silent, or answered by a traceback?

    python tests/fuzz.py                        # every case, two at a time: some minutes
    python tests/fuzz.py --sample 40 --seed 3   # as many, drawn by a seed: what the suite does
    python tests/fuzz.py --only toml,resume     # some kinds; --show: what every case said
    python tests/fuzz.py --kills 40             # kill -9 at random moments, resume: are the last weights the same?

A case is a command in a folder of its own with some files in it, run in a forked child of this process, which has
imported everything. Afterwards it is one of

    good        refused: exit code 2, one line "error: …", and the folder as it was before, to the byte;
                or, where the command is right, exit code 0
    traceback   whatever the exit code             code     another exit code than 2
    silent      a wrong command that ran           refused  a right one that did not
    lines       more than one line of error        hang     no answer in a minute
    lost        a file that was there is gone or has changed        left     a refusal that left something behind

`silent` is judged on commands that would be right but for one thing: see RIGHT.
"""
import argparse
import dataclasses
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
from itertools import product
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
SECONDS = 60                             # a case that takes longer hangs

# --- what is right ----------------------------------------------------------------------------------------


def lines(rows):
    """Rows as JSONL."""
    return "".join(json.dumps(r) + "\n" for r in rows)


DEMOS = [dict(prompt=f"say {i}: ", completion=f"{i} it is #### {i}") for i in range(24)]
PAIRS = [dict(prompt=f"say {i}: ", chosen=f"{i} yes", rejected=f"no {i}") for i in range(24)]
LABELS = [dict(prompt=f"say {i}: ", completion=f"{i} yes", label=i % 2 == 0) for i in range(24)]
CORPUS = "<|endoftext|>".join(f"Story {i}. Once there was a {i}, and it was good to be {i}. " * 4 for i in range(40))
FILES = {"demos.jsonl": lines(DEMOS), "pairs.jsonl": lines(PAIRS), "labels.jsonl": lines(LABELS),
         "corpus.txt": CORPUS, "reward.py": "def score(problem, text, finished):\n    return float(len(text))\n"}
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
    """script and argv run where FILES, the checkpoints base and small, and `files` lie; setup(folder) does the rest.
    right: the command must run; free: the names that may change; env: further environment variables."""
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


# --- 1 values ---------------------------------------------------------------------------------------------

NUMBERS = ("nan", "inf", "-inf", "1e999", "-1", "abc", "", "99999999999999999999999", "1.5", "0")


def wrong(kind, default, text):
    """Whether an option of this annotation and default must refuse the text."""
    allowed = kind if isinstance(kind, Range) else Range("(-inf, inf)" if default < 0 else "[0, inf)")
    try:
        x = type(default)(text)
    except ValueError:
        return True
    return x not in allowed or type(default) is int and x > 2 ** 31 - 1


def values():
    """Every field of every Config with values of other kinds."""
    for script in SCRIPTS:
        for x in dataclasses.fields(MODULES[script].Config):
            if x.name in ("config", "out", "resume"):
                continue
            if isinstance(x.default, bool):
                texts = ("maybe", "2", "")
            elif isinstance(x.default, str):
                texts = ("nosuch", "no/such", "x" * 300, "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"))
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
                        texts = [t for t in ("nan", "abc", "-3", "1e999") if wrong(kinds(fn).get(key), default, t)]
                    for text in texts:
                        if row != "PATH":
                            yield Case("arguments", script, command(script, *chosen, f"--{axis}.{key}", text))


# --- 2 command lines ----------------------------------------------------------------------------------------


def forms():
    """Words that are no options, options twice, presets that are not there."""
    for script in SCRIPTS:
        right = command(script)
        for more in (["--lrr", "1"], ["lr=1"], ["--"], [""], ["-h"], ["--lr"], ["--=1"], ["--seed", "1", "--seed", "2"],
                     ["--seed=1", "--seed", "2"], ["--config", "tiny"], ["--claim", "nosuch"], ["--é", "1"],
                     ["--claim", "x", "--seeds", "0"], ["--seeds", "3"], ["--stop", "-3"], ["--resume"],
                     ["--resume", "--out", "nosuch"], ["--device", "cuda:99"], ["--device", "cpu:0"], ["--kernels", "x"],
                     ["--seed", str(2 ** 64)], ["--keep", "0"]):
            yield Case("forms", script, [*right, *more])
        for presets in ("nosuch", "tiny,nosuch", "tiny,,,tinyy", "nosuch.toml", "base", "demos.jsonl", "tiny, tiny"):
            yield Case("forms", script, command(script, "--config", presets))
        yield Case("forms", script, ["--help"], right=True)
        yield Case("forms", script, [*right, "--out", "new"], right=True, free=("new",))
        for path in ("base:", "base:nosuch", "base:,", "nosuch", "demos.jsonl", "", "/dev/null"):
            if not (script == "sft" and path == ""):               # a new model
                yield Case("forms", script, command(script, "--init", path))
    for more in (["--tokens", "-1"], ["--tokens", "0"], ["--temperature", "nan"], ["--temperature", "-1"],
                 ["--top-p", "2"], ["--top-p", "0"], ["--top-k", "-1"], ["--seed", str(2 ** 70)], ["--device", "tpu"],
                 ["--nosuch"]):
        yield Case("forms", "model", command("model", *more))
    for path in ("nosuch", "demos.jsonl", ".", "", "/dev/null"):
        yield Case("forms", "model", [path, "--prompt", "a"])
    for argv, script in (("--clip -1", "sft"), ("--clip 0", "sft"), ("--beta -1", "dpo"), ("--beta 0", "dpo"),
                         ("--sft -1", "dpo"), ("--samples 1 --advantage best", "ppo"), ("--samples 1", "grpo"),
                         ("--gamma 2", "ppo"), ("--lam -1", "ppo"), ("--teacher base", "sft"), ("--kd_lr 1", "compress"),
                         ("--other base", "sft"), ("--vocab 600", "sft"), ("--model 1x64", "sft"), ("--epochs 1", "sft"),
                         ("--family llama", "sft"), ("--teacher base", "grpo"), ("--chooser top", "grpo"),
                         ("--rounds 3", "grpo"), ("--base base --reward gold", "ppo"), ("--judge base", "dpo"),
                         ("--combine cagrad", "dpo"), ("--noise 0.1", "dpo"), ("--refresh 3", "dpo"),
                         ("--noise 0.1", "reward"), ("--attack overoptimise", "reward"), ("--aggregate uwo", "reward"),
                         ("--loss listwise", "reward"), ("--recipe armo", "reward"), ("--recipe polar", "reward"),
                         ("--eval base", "reward"), ("--domain corpus.txt", "compress"), ("--context 100000", "sft"),
                         ("--context 100000", "compress"), ("--context 100000", "specdec"), ("--samples 4", "specdec"),
                         ("--decode deal", "specdec"), ("--refresh 3", "specdec"), ("--prompts 3", "grpo"),
                         ("--feedback hindsight --mix q", "sft"), ("--feedback scored --data corpus.txt", "sft"),
                         ("--data corpus.txt --chat", "sft"), ("--data corpus.txt --rows 3", "sft"),
                         ("--data corpus.txt", "ppo"), ("--data corpus.txt", "grpo"), ("--data corpus.txt", "dpo"),
                         ("--data corpus.txt", "reward"), ("--data demos.jsonl", "compress"), ("--data demos.jsonl", "dpo"),
                         ("--data demos.jsonl", "reward"), ("--data labels.jsonl", "dpo"), ("--split ood", "specdec"),
                         ("--reward base", "ppo"), ("--reward nosuch.py:f", "grpo"), ("--watch corpus.txt", "grpo"),
                         ("--bits 5", "compress"), ("--method gptq --bits 5", "compress"), ("--pattern 9:2", "compress"),
                         ("--pattern no", "compress"), ("--loss dckd", "sft"), ("--peft lora --store int8", "sft"),
                         ("--prune journey --begin 0.9", "sft"), ("--suggest --init base:pretrain", "sft")):
        words, bare = argv.split(), []
        if words[-1].startswith("--") or "--suggest" in words or "--chat" in words:
            flag = next(w for w in words if w in ("--suggest", "--chat"))
            words.remove(flag)
            bare = [flag]
        yield Case("forms", script, [*command(script, *words), *bare])


# --- 3 TOML -------------------------------------------------------------------------------------------------


def tomls():
    """Config files of all sorts."""
    texts = dict(list="lr = [1, 2]", date="lr = 2020-01-01", table="[lr]\nx = 1", true="lr = true", nan="lr = nan",
                 inf="lr = inf", unknown="lrr = 1", config='config = "tiny"', resume="resume = true", half="lr = ",
                 text='lr = "fast"', twice="seed = 1\nseed = 2", float="seed = 1.5", zero='out = "a\\u0000b"',
                 number="out = 5", negative="seed = -1", huge="seed = 99999999999999999999", empty_key='"" = 1',
                 dotted="a.b = 1", nested="x = {a = 1}", loss='loss = "nosuch"')
    for script, (name, text) in product(SCRIPTS, texts.items()):
        if (name, script) not in {("loss", "ppo"), ("loss", "grpo"), ("loss", "compress"), ("list", "x")} and not (
                script == "compress" and text.startswith("lr")):
            yield Case("toml", script, command(script, "--config", f"tiny,{name}.toml"), {f"{name}.toml": text})
    for script in SCRIPTS:
        yield Case("toml", script, command(script, "--config", "bytes.toml"), {"bytes.toml": b"\xff\xfe\x00"})
        yield Case("toml", script, command(script, "--config", "folder.toml"), setup=lambda f: (f / "folder.toml").mkdir())
        yield Case("toml", script, [*command(script, "--config", f"{RIGHT[script].split()[1]},fine.toml"), "--out", "new"],
                   {"fine.toml": "seed = 3\n"}, right=True, free=("new",))


# --- 4 folders ----------------------------------------------------------------------------------------------


def thesis(folder):
    """A folder with years of somebody's work."""
    for name in ("D", "D/step-000001", "D/step-000001-copy"):
        (folder / name).mkdir()
        (folder / name / "thesis.txt").write_text("years of work")
    (folder / "D/log.jsonl").write_text("mine\n")
    (folder / "D/notes.tmp").write_text("mine too\n")


def occupied(folder):
    """An empty folder that another process has locked, as a run would."""
    import fcntl
    (folder / "busy").mkdir()
    fcntl.flock(os.open(folder / "busy", os.O_RDONLY), fcntl.LOCK_EX)


def folders():
    """--out on what is there already, and on what cannot be a folder."""
    for script in SCRIPTS:
        for out in ("D", "base", ".", "..", "demos.jsonl", "demos.jsonl/x", "/proc/nosuch", "/dev/null", "/dev/null/x",
                    "x" * 300, "D/step-000001", "busy"):
            setup = occupied if out == "busy" else thesis
            yield Case("folders", script, [*command(script), "--out", out], setup=setup)
            yield Case("folders", script, [*command(script), "--out", out, "--resume"], setup=setup)
        yield Case("folders", script, [*command(script, "--init", "nosuch"), "--out", "D"], setup=thesis)
        yield Case("folders", script, [*command(script), "--out", "empty"], setup=lambda f: (f / "empty").mkdir(),
                   right=True, free=("empty",))
        yield Case("folders", script, [*command(script), "--out", "full"], limit=20_000, free=("full",))
        yield Case("folders", script, [*command(script), "--out", "ranks"], env=dict(WORLD_SIZE="2", RANK="0"))


# --- 5 data ---------------------------------------------------------------------------------------------------


def broken(rows):
    """{what is wrong: the file} of a right JSONL file of rows."""
    first, *rest = rows
    texts = {k: "" if isinstance(v, str) else v for k, v in first.items()}
    bare = {k: v for k, v in first.items() if k != "prompt"}
    return dict(
        empty="", blank="\n\n", bytes=b"\xff\xfe\x00\x01", list=lines([[1]]), number="1\n", half=lines(rest) + '{"prompt": ',
        other=lines([dict(foo=1)]), types=lines([{k: 1 for k in first}]), null=lines([{k: None for k in first}]),
        missing=lines([bare]), late=lines(rest) + lines([bare]), surrogate=lines(rest) + '{"prompt": "\\ud83d", ' + (
            json.dumps({k: v for k, v in first.items() if k != "prompt"})[1:] + "\n"),
        twice='{"prompt": "a", ' + json.dumps(first)[1:] + "\n" + lines(rest), one=lines([first]),
        empties=lines([dict(r, **{k: "" for k in texts if k != "prompt" and isinstance(r[k], str)}) for r in rows]),
        deep="[" * 100_000 + "\n", nul=b"\x00" * 40)


def data():
    """Broken data files, for every script that reads such ones."""
    for script, rows, key in (("sft", DEMOS, "--data"), ("ppo", DEMOS, "--data"), ("grpo", DEMOS, "--data"),
                              ("sft", DEMOS, "--watch"), ("dpo", PAIRS, "--data"), ("reward", PAIRS, "--data"),
                              ("specdec", DEMOS, "--data"), ("grpo", DEMOS, "--watch")):
        for name, text in broken(rows).items():
            yield Case("data", script, command(script, key, f"{name}.jsonl"), {f"{name}.jsonl": text})
        yield Case("data", script, command(script, key, "folder.jsonl"), setup=lambda f: (f / "folder.jsonl").mkdir())
        yield Case("data", script, command(script, key, "none.jsonl"))
        yield Case("data", script, command(script, key, "none.jsonl", "--init", "base:pretrain"))
    for name, text in broken(LABELS).items():
        yield Case("data", "dpo", command("dpo", "--config", "kto,tiny", "--data", f"{name}.jsonl"), {f"{name}.jsonl": text})
    for script, (name, text) in product(("sft", "compress", "specdec"), dict(
            empty="", blank=" \n ", bytes=b"\xff\xfe\xff", nul=b"", short="a", separators="<|endoftext|>" * 9).items()):
        yield Case("data", script, command(script, "--data", f"{name}.txt"), {f"{name}.txt": text})
        yield Case("data", script, command(script, "--data", f"{name}.jsonl"),
                   {f"{name}.jsonl": lines([dict(text=text.decode("latin-1") if isinstance(text, bytes) else text)])
                    if name in ("empty", "blank", "nul") else lines([dict(text=5)])})
    for name, code in dict(
            none="return None", text="return 'good'", nan="return float('nan')", inf="return float('inf')",
            fails="return 1 / 0", list="return [1]", leaves="import sys; sys.exit(0)", big="return 10 ** 400").items():
        yield Case("data", "grpo", [*command("grpo", "--reward", "mine.py:f"), "--out", "new"], {
            "mine.py": f"def f(problem, text, finished):\n    {code}\n"}, free=("new",))
    for code in ("def f(x): return 1", "def f(a, b, c, d): return 1", "f = 5", "def f(: return", "import nosuch", "1 / 0",
                 "\x00", "raise SystemExit(0)", "def g(a, b, c): return 1"):
        yield Case("data", "grpo", command("grpo", "--reward", "mine.py:f"), {"mine.py": code})


# --- 6 checkpoints ----------------------------------------------------------------------------------------------


def edited(name, change):
    """A setup that changes the JSON file base/<name> by change(object)."""
    def setup(folder):
        path = folder / "base" / name
        found = json.loads(path.read_text())
        path.write_text(json.dumps(change(found) or found))
    return setup


def rewritten(change):
    """A setup that changes base's tensors by change({name: tensor})."""
    def setup(folder):
        path = folder / "base" / "model.safetensors"
        found = load_file(path)
        save_file({k: v.contiguous() for k, v in change(found).items()}, path, metadata={"format": "pt"})
    return setup


def sharded(change):
    """A setup that splits base into two shards, and changes the index by change(weight_map)."""
    def setup(folder):
        path = folder / "base"
        found = load_file(path / "model.safetensors")
        names = sorted(found)
        parts = {"model-1.safetensors": names[:3], "model-2.safetensors": names[3:]}
        for file, some in parts.items():
            save_file({k: found[k] for k in some}, path / file, metadata={"format": "pt"})
        (path / "model.safetensors").unlink()
        where = {k: file for file, some in parts.items() for k in some}
        (path / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=change(where) or where)))
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
    first = "model.layers.0.self_attn.q_proj.weight"
    setups = {f"{k}={v!r}"[:60]: edited("config.json", lambda d, k=k, v=v: d | {k: v}) for k, values in dict(
        model_type=("nosuch", None, 5, [], "gpt2"), architectures=([], None, ["GPT2LMHeadModel"], "x", [5]),
        vocab_size=(0, -1, 1.5, "x", None, True, 10 ** 12, 100), hidden_size=(0, None, 48, "32", 31),
        intermediate_size=(0, None, 33), num_hidden_layers=(0, 1, 3, -1, None, 99), num_attention_heads=(0, 3, None, 1.0),
        num_key_value_heads=(0, 3, "x"), head_dim=(0, 7, 64, -2), max_position_embeddings=(0, None, "x"),
        rms_norm_eps=("x", -1, 0), rope_theta=("x", 0, -5), tie_word_embeddings=(5, "yes", []),
        rope_parameters=([], "x", dict(rope_type="nosuch"), dict(rope_type="linear"), dict(
            rope_type="linear", factor=0), dict(rope_type="llama3", factor=8.0)), attention_bias=(True, "x"),
        mlp_bias=(True,), hidden_act=("gelu", 5), quantization_config=(5, dict(quant_method="gptq"), dict(
            quant_method="minimal-post-training", layers=5)), eos_token_id=("x", 1.5, [[]], 10 ** 9, {}),
        bos_token_id=("x", 10 ** 9), pad_token_id=([[1]], 10 ** 9), layer_widths=([-1], "x", [1, 2, 3]),
        swift_layer=(9, -1), routed_heads=(9,), head_router=("x", 5)).items() for v in values}
    setups |= {f"no {k}": edited("config.json", lambda d, k=k: {x: y for x, y in d.items() if x != k}) for k in (
        "model_type", "architectures", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "intermediate_size", "max_position_embeddings")}
    setups |= {f"tensor {k}": rewritten(v) for k, v in {
        "bias": lambda t: t | {first.replace("weight", "bias"): torch.zeros(32)},
        "99th layer": lambda t: t | {first.replace(".0.", ".99."): t[first].clone()},
        "unknown": lambda t: t | {"foo": torch.zeros(2)}, "gone": lambda t: {k: v for k, v in t.items() if k != first},
        "head": lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1},
        "shape": lambda t: t | {first: t[first][:, :16]}, "integer": lambda t: t | {first: t[first].long()},
        "complex": lambda t: t | {first: t[first].to(torch.complex64)}, "bool": lambda t: t | {first: t[first] > 0},
        "nan": lambda t: t | {first: t[first] * torch.nan}, "inf": lambda t: t | {first: t[first] + torch.inf},
        "float8": lambda t: t | {first: t[first].to(torch.float8_e4m3fn)},
        "one nan": lambda t: t | {first: t[first].index_fill(0, torch.tensor([3]), torch.nan)},
        "none": lambda t: {}, "empty": lambda t: t | {first: torch.zeros(0, 32)}}.items()}
    setups |= {f"index {k}": sharded(v) for k, v in {
        "outside": lambda m: m | {first: "../x.safetensors"}, "absolute": lambda m: m | {first: "/etc/passwd"},
        "missing file": lambda m: m | {first: "model-9.safetensors"}, "wrong file": lambda m: m | {
            min(m): "model-2.safetensors"}, "list": lambda m: [1], "number": lambda m: m | {first: 5},
        "unlisted": lambda m: {k: v for k, v in m.items() if k != first}, "extra": lambda m: m | {
            "foo": "model-1.safetensors"}, "folder": lambda m: m | {first: "sub/model-1.safetensors"}}.items()}
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        setups |= {f"{name} {k}": replaced(name, v) for k, v in dict(
            empty=b"", list=b"[]", half=b'{"a": ', bytes=b"\xff\xfe", number=b"5", deep=b"[" * 100_000,
            twice=b'{"vocab_size": 1, "vocab_size": 2}').items() if (name, k) != ("tokenizer_config.json", "twice")
            and (name, k) != ("generation_config.json", "twice") or k == "twice"}
    setups |= {"no config.json": replaced("config.json", None), "no weights": replaced("model.safetensors", None),
               "no tokenizer": replaced("tokenizer.json", None), "cut weights": replaced("model.safetensors", b"x" * 99),
               "empty weights": replaced("model.safetensors", b"")}
    setups |= {f"generation eos {v!r}": edited("generation_config.json", lambda d, v=v: d | dict(eos_token_id=v))
               for v in ("x", 1.5, [None], 10 ** 9)}

    def bpe(change):
        return edited("tokenizer.json", lambda d: d | dict(model=d["model"] | change(d["model"])))
    setups |= {f"tokenizer {k}": v for k, v in {
        "no model": edited("tokenizer.json", lambda d: {k: v for k, v in d.items() if k != "model"}),
        "model list": edited("tokenizer.json", lambda d: d | dict(model=[])),
        "type": bpe(lambda m: dict(type="Unigram")), "vocab list": bpe(lambda m: dict(vocab=[])),
        "vocab empty": bpe(lambda m: dict(vocab={})), "vocab text": bpe(lambda m: dict(vocab={"a": "b"})),
        "vocab half": bpe(lambda m: dict(vocab=dict(list(m["vocab"].items())[:40] + [("zz", 10 ** 12)]))),
        "vocab negative": bpe(lambda m: dict(vocab=m["vocab"] | {"a": -1})),
        "vocab huge": bpe(lambda m: dict(vocab=m["vocab"] | {"zz": 10 ** 12})),
        "vocab twice": bpe(lambda m: dict(vocab=m["vocab"] | {"zz": 5})),
        "vocab beyond": bpe(lambda m: dict(vocab=m["vocab"] | {"zz": 5000})),
        "merges text": bpe(lambda m: dict(merges="x")), "merges numbers": bpe(lambda m: dict(merges=[1])),
        "merges one": bpe(lambda m: dict(merges=["ab"])), "merges unknown": bpe(lambda m: dict(merges=["q q"])),
        "merges three": bpe(lambda m: dict(merges=[["a", "b", "c"]])), "added text": edited(
            "tokenizer.json", lambda d: d | dict(added_tokens="x")),
        "added number": edited("tokenizer.json", lambda d: d | dict(added_tokens=[5])),
        "added no id": edited("tokenizer.json", lambda d: d | dict(added_tokens=[dict(content="<s>", special=True)])),
        "added no text": edited("tokenizer.json", lambda d: d | dict(added_tokens=[dict(id=1, special=True)])),
        "added huge": edited("tokenizer.json", lambda d: d | dict(added_tokens=[dict(id=10 ** 10, content="<s>")])),
        "pre list": edited("tokenizer.json", lambda d: d | dict(pre_tokenizer=[1])),
        "pre type": edited("tokenizer.json", lambda d: d | dict(pre_tokenizer=dict(type="Whitespace"))),
        "pre odd": edited("tokenizer.json", lambda d: d | dict(pre_tokenizer=dict(type="Sequence", pretokenizers=5))),
        "pre regex": edited("tokenizer.json", lambda d: d | dict(pre_tokenizer=dict(type="Sequence", pretokenizers=[
            dict(type="Split", pattern=dict(Regex="("), behavior="Isolated", invert=False),
            dict(type="ByteLevel", add_prefix_space=False, use_regex=False)]))),
        "normaliser": edited("tokenizer.json", lambda d: d | dict(normalizer=dict(type="Lowercase"))),
        "normaliser text": edited("tokenizer.json", lambda d: d | dict(normalizer="x")),
        "eos unknown": edited("tokenizer_config.json", lambda d: d | dict(eos_token="<nosuch>")),
        "eos number": edited("tokenizer_config.json", lambda d: d | dict(eos_token=1.5)),
        "eos none": edited("tokenizer_config.json", lambda d: d | dict(eos_token=None)),
        "eos object": edited("tokenizer_config.json", lambda d: d | dict(eos_token=dict(x=1)))}.items()}
    for i, (name, setup) in enumerate(setups.items()):
        yield Case("checkpoints", "model", command("model"), setup=setup, env=dict(CASE=name))
        yield Case("checkpoints", SCRIPTS[i % 7], command(SCRIPTS[i % 7]), setup=setup, env=dict(CASE=name))


# --- 7 runs that are resumed --------------------------------------------------------------------------------------


def resumes():
    """Runs whose traces were broken, or whose data changed, before --resume."""
    def cut(path, n=30):
        path.write_bytes(path.read_bytes()[:n])

    def change(path, **keys):
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    def weights(run, value):
        path = sorted(run.glob("step-*"))[-1] / "model.safetensors"
        found = load_file(path)
        found[min(found)] = found[min(found)] * value
        save_file(found, path, metadata={"format": "pt"})
    faults = dict(
        state=lambda f: cut(sorted(f.glob("run/step-*/state.pt"))[-1]), no_state=lambda f: sorted(
            f.glob("run/step-*/state.pt"))[-1].unlink(), text_state=lambda f: sorted(f.glob("run/step-*/state.pt"))[
            -1].write_text("state"), empty_state=lambda f: torch.save([], sorted(f.glob("run/step-*/state.pt"))[-1]),
        weights=lambda f: cut(sorted(f.glob("run/step-*/model.safetensors"))[-1]),
        nan=lambda f: weights(f / "run", torch.nan), config=lambda f: cut(sorted(f.glob("run/step-*/config.json"))[-1]),
        info=lambda f: cut(f / "run/run.json"), info_list=lambda f: (f / "run/run.json").write_text("[]"),
        info_bare=lambda f: (f / "run/run.json").write_text("{}"),
        info_config=lambda f: change(f / "run/run.json", config=5), info_made=lambda f: change(f / "run/run.json", made=5),
        script=lambda f: change(f / "run/run.json", script="other"), no_info=lambda f: (f / "run/run.json").unlink(),
        log=lambda f: (f / "run/log.jsonl").write_text("[1]\n{}\n"), log_bytes=lambda f: (
            f / "run/log.jsonl").write_bytes(b"\xff\xff\n\xff\n"), log_steps=lambda f: (f / "run/log.jsonl").write_text(
            '{"step": "x", "time": 1}\n{"step": 2, "time": 1}\n'))
    for script in ("sft", "ppo", "grpo", "dpo", "reward", "specdec"):
        data = dict(zip(RIGHT[script].split()[::2], RIGHT[script].split()[1::2]))["--data"]
        for name, fault in (faults | dict(data=lambda f, d=data: (f / d).write_text((f / d).read_text() * 2))).items():
            yield Case("resume", script, [*command(script, "--steps", "4"), "--out", "run", "--resume"],
                       setup=lambda f, script=script, fault=fault: (shutil.copytree(MADE[script], f / "run"), fault(f)),
                       env=dict(CASE=name))
        yield Case("resume", script, [*command(script, "--steps", "4"), "--out", "run", "--resume"],
                   setup=lambda f, script=script: shutil.copytree(MADE[script], f / "run"), right=True, free=("run",))
        yield Case("resume", script, [*command(script, "--steps", "4", "--lr", "0.5"), "--out", "run", "--resume"],
                   setup=lambda f, script=script: shutil.copytree(MADE[script], f / "run"))
        yield Case("resume", script, [*command(script, "--steps", "4"), "--out", "run"],
                   setup=lambda f, script=script: shutil.copytree(MADE[script], f / "run"))


# --- running ------------------------------------------------------------------------------------------------------

BUILDERS = dict(values=values, arguments=arguments, forms=forms, toml=tomls, folders=folders, data=data,
                checkpoints=checkpoints, resume=resumes)
MADE = {}                                # {script: a paused run of it}
STATE = {}                               # what the workers inherit: cases, fixtures


def tree(folder):
    """{path: its content's hash} of everything under a folder."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
            for p in folder.rglob("*")}


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
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
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
    errors = [x for x in said.strip().splitlines() if not x.startswith("usage:") and not x.startswith("  ")]
    if len(errors) != 1 or "error: " not in errors[0]:
        return "lines"
    return "left" if any(mine(k) for k in after.keys() - before.keys()) else "good"


def main(argv=None):
    """Run the cases, print the table and what was not good; exit code 1 if anything was not."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    p.add_argument("--sample", type=int, default=0, help="only so many cases, drawn by --seed (0: all)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", default="", help=f"kinds with commas between: {', '.join(BUILDERS)}")
    p.add_argument("--show", action="store_true", help="print what every case said")
    p.add_argument("--kills", type=int, default=0, help="instead: so many runs killed at a random moment and resumed")
    a = p.parse_args(argv)
    torch.set_num_threads(1)
    if a.kills:
        return kills(a.kills, random.Random(a.seed))
    cases = [c for kind, build in BUILDERS.items() if not a.only or kind in a.only.split(",") for c in build()]
    if a.sample:
        cases = random.Random(a.seed).sample(cases, min(a.sample, len(cases)))
    began, table, bad = time.time(), {kind: Counter() for kind in BUILDERS}, []
    with tempfile.TemporaryDirectory() as home:
        fixtures = Path(home, "fixtures")
        fixtures.mkdir()
        prepare(fixtures)
        if any(c.kind == "resume" for c in cases):
            for script in ("sft", "ppo", "grpo", "dpo", "reward", "specdec"):
                make_run(script, fixtures, Path(home))
        STATE.update(cases=cases, fixtures=fixtures)
        with multiprocessing.get_context("fork").Pool(2) as pool:                        # workers without threads
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
            print(f"{kind:<12} {sum(row.values()):>5}  " + "  ".join(f"{row[w]:>{len(w)}}" for w in words))
    print(f"{len(cases)} cases, {len(bad)} not good, {time.time() - began:.0f} s")
    return 1 if bad else 0


def make_run(script, fixtures, home):
    """A run of four steps, checkpoints at 1 and 2, paused after two: what the cases of `resume` break."""
    folder = home / f"make-{script}"
    shutil.copytree(fixtures, folder)
    case = Case("resume", script, [*command(script, "--steps", "4"), "--save_every", "1", "--keep", "2", "--stop", "2",
                                   "--out", "run"], right=True)
    pid = os.fork()
    if not pid:
        child(case, folder)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise SystemExit(f"the run to break cannot be made: {(home / 'stderr').read_text()}")
    MADE[script] = folder / "run"


def finished(case, folder, after=None):
    """Run a case in a fork of its own, killed after so many seconds. -> its exit code, None if it was killed."""
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
    return ({str(p.relative_to(newest)): p.read_bytes() for p in sorted(newest.rglob("*.safetensors"))},
            [(r["step"], r.get("loss")) for r in rows])


def kills(n, rng):
    """Kill n runs at random moments, some of them twice, and resume them; 1 if any ends elsewhere than the whole run."""
    scripts, bad = ("sft", "grpo", "dpo", "ppo", "reward", "specdec"), 0
    with tempfile.TemporaryDirectory() as home:
        fixtures = Path(home, "fixtures")
        fixtures.mkdir()
        prepare(fixtures)
        whole = {}
        for i in range(n):
            script, folder = scripts[i % len(scripts)], Path(home, f"{i}", "work")
            case = Case("kills", script, [*command(script, "--steps", "8", "--save_every", "2"), "--out", "run"])
            if script not in whole:
                reference = Path(home, script, "work")
                shutil.copytree(fixtures, reference)
                began = time.monotonic()
                assert finished(case, reference) == 0, (reference.parent / "stderr").read_text()
                whole[script] = time.monotonic() - began, last_weights(reference / "run")
            shutil.copytree(fixtures, folder)
            seconds, told = whole[script][0], []
            for turn in range(3):                        # killed, perhaps killed again, then left alone
                after = rng.uniform(0, seconds) if turn == 0 or turn == 1 and rng.random() < 0.3 else None
                again = (folder / "run/run.json").exists()
                code = finished(case._replace(argv=[*case.argv, *["--resume"] * again]), folder, after)
                told.append(f"{after:.2f} s" if code is None else f"exit {code}")
                if code is not None:
                    break
            same = code == 0 and last_weights(folder / "run") == whole[script][1]
            bad += not same
            print(f"{'same' if same else 'OTHER':<6} {script:<8} {', '.join(told)}"
                  + ("" if same else f"\n{(folder.parent / 'stderr').read_text()[-500:]}"), flush=True)
    print(f"{n} killed runs, {bad} ended elsewhere")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
