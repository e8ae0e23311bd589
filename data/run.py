"""
run.py - what goes into a run (configuration) and what comes out of it (log, curve, checkpoints).

    c, f = configure(Config, PRESETS, AXES, __doc__)   # defaults < --config a,b,k=v < --key value
    with Run(c, f, "sft", CURVES) as run:              # out/sft/<name>: run.json, log.jsonl, step-*
        for step in run.steps(c.steps):
            run.log(step, loss=...)
            run.save(step, write, **state)

Map      1 errors   2 what a value may be   3 configure   4 several ranks   5 files
         6 the run's folder   7 the curve   8 a script's source: chapters, --eject   9 its main
Promise  Only files that this run made, by exact name, are ever removed or replaced; a folder that
         holds anything else is refused. What is saved is finite. One run has one process.
"""
import ast
import contextlib
import ctypes
import dataclasses
import difflib
import functools
import gc
import hashlib
import importlib.machinery
import inspect
import itertools
import json
import keyword
import math
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib
import weakref
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:              # Windows: no lock, so run the arms of a claim with --jobs 1 there
    fcntl = resource = None

# --- errors ---------------------------------------------------------------------------------------


class UserError(ValueError):
    """Something the user can mend: one line naming the thing and the remedy, shown without a
    traceback."""


def nearest(word, known):
    """'; did you mean …' for a mistyped word, else the whole list: the tail of an error."""
    known = sorted({*known} - {"PATH"})                # a table's row for paths has no name
    hit = difflib.get_close_matches(word, known, 1)
    return (f"; did you mean {hit[0]!r}?" if hit else
            f"; choose from {', '.join(known) or 'nothing'}")


OUTLOOK = {}             # of the run that began last: see Run.outlook
LARGE = 1e8              # bytes of weights that are worth large_blocks_go_back
ALLOCATION = re.compile(r"out of memory|allocate memory|not enough memory|ALLOC_FAILED", re.I)


def cli(main):
    """Run main() as a command. What the user can mend (UserError, a file or a device that says no,
    memory that runs out) becomes one line and exit code 2; Ctrl-C exits with 130; only a bug has a
    traceback."""
    sys.stdout = sys.stdout or open(os.devnull, "w")           # closed by the shell, >&-
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):  # a terminal without UTF-8 still gets π
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
        leave_ranks()
    except KeyboardInterrupt:
        print("\nstopped; --resume goes on from the last checkpoint, if there is one",
              file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # … | head: its reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except UserError as e:
        fail(e)
    except OSError as e:
        fail(f"{e.filename}: {e.strerror}" if e.filename and e.strerror else e)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
        if number_of("RANK") and re.search("[Cc]onnection|closed by peer", str(e)):
            sys.exit(2)                                        # rank 0 is gone, and has said why
        if type(e) is RuntimeError and not ALLOCATION.search(str(e)):
            raise
        first = (str(e) or type(e).__name__).splitlines()[0]
        fail(f"out of memory{OUTLOOK.get('at', '')}: "
             + (OUTLOOK.get("remedies") or "try a smaller --micro, where there is one (results do "
                "not change)") + f"; {first}")


def number_of(name):
    """The whole number that an environment variable of torchrun holds, 0 if it is not set or no
    number."""
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else 0


def fail(why):
    """Say why in one line on stderr, and exit with 2. Of torchrun's ranks 0 speaks first: the
    others wait, so that torchrun ends them if they would only say the same, and then name
    themselves."""
    me = number_of("RANK")
    if me:
        time.sleep(3)
    print(f"rank {me}: " * (me > 0) + f"error: {' '.join(str(why).split())}", file=sys.stderr,
          flush=True)
    sys.exit(2)


# --- what a value may be --------------------------------------------------------------------------


class Range:
    """The numbers that an option takes, as its annotation: k: Range("(0, 1]") = 0.4. NaN is in no
    range."""

    def __init__(self, text):
        self.text, (low, high) = text, text[1:-1].split(",")
        self.low, self.high = float(low), float(high)

    def __contains__(self, x):
        return ((x > self.low or x == self.low and self.text[0] == "[")
                and (x < self.high or x == self.high and self.text[-1] == "]"))

    def __str__(self):
        low = f"{'at least' if self.text[0] == '[' else 'above'} {self.low:g}"
        high = f"{'at most' if self.text[-1] == ']' else 'below'} {self.high:g}"
        ends = [low] * math.isfinite(self.low) + [high] * math.isfinite(self.high)
        return " and ".join(ends) or "finite"


Positive, Share, Fraction = Range("(0, inf)"), Range("[0, 1]"), Range("[0, 1)")
Count, Signed = Range("[1, inf)"), Range("(-inf, inf)")
NonNegative = Range("[0, inf)")  # of every number without annotation, unless its default is below
LARGEST = 2 ** 31 - 1  # of every whole number, seeds included: sums of them stay exact
HUGE = 1e30                              # of every other number: float32 ends at 3.4e38


def cast(key, value, like, kind=None):
    """Turn `value` (command-line text, or a TOML or preset value) into the type of the default
    `like`.

    kind: the option's annotation, a Range or Literal["a", "b"]; any other means a finite number,
    not below 0 unless the default is. Raises UserError that says what was expected.
    """
    want, number = type(like), type(like) in (int, float)
    try:
        if want is bool:
            result = {"true": True, "false": False}[str(value).lower()]
        elif isinstance(value, str) or type(value) is want or (want, type(value)) == (float, int):
            result = want(value)
        else:
            raise ValueError
    except (ValueError, KeyError, OverflowError):
        raise UserError(f"--{key} {value}: expected {want.__name__}, for example "
                        f"{like!r}") from None
    if get_origin(kind) is Literal and result not in get_args(kind):
        raise UserError(f"--{key} {result}: choose from {', '.join(map(str, get_args(kind)))}")
    if number:
        allowed = kind if isinstance(kind, Range) else Signed if like < 0 else NonNegative
        if result not in allowed:
            raise UserError(f"--{key} {value}: must be {allowed}")
        if abs(result) > (most := LARGEST if want is int else HUGE):
            raise UserError(f"--{key} {value}: must be at most {most}")
    if want is str and "\0" in result:
        raise UserError(f"--{key} {result!r}: a text without a zero byte is expected")
    return result


def device_of(name):
    """--device as a torch device's name, auto resolved; UserError for one that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise UserError(f"--device {name}: choose auto, cpu, cuda, or cuda:N")
    if name != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this torch sees no CUDA device; use --device cpu")
    number = int(name.partition(":")[2] or 0)
    if name != "cpu" and number >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, "
                        "from cuda:0")
    return name


# --- configure ------------------------------------------------------------------------------------


def hyper(fn):
    """A method's hyper-parameters are its keyword-only arguments: def f(x, *, beta=0.1) -> {'beta':
    0.1}."""
    return {k: p.default for k, p in inspect.signature(fn).parameters.items()
            if p.kind is p.KEYWORD_ONLY}


def kinds(fn):
    """{hyper-parameter: its annotation} of those that have one: see cast."""
    return {k: p.annotation for k, p in inspect.signature(fn).parameters.items()
            if p.kind is p.KEYWORD_ONLY and p.annotation is not p.empty}


def needs(fn):
    """The names of a function's positional arguments, in order: what the caller must provide."""
    return [k for k, p in inspect.signature(fn).parameters.items()
            if p.kind is p.POSITIONAL_OR_KEYWORD]


def call(fn, known):
    """A function of what its positional arguments name."""
    return fn(**{name: known[name] for name in needs(fn)})


def ask(names, table, known):
    """Add to `known` what a table's functions say under these names, and what they ask for."""
    for name in sorted(names & table.keys()):
        if name not in known:
            ask(set(needs(table[name])), table, known)
            known[name] = call(table[name], known)


def asked_by(functions, tables):
    """The names that functions ask for, and those that what answers them in the tables asks for."""
    names, more = set(), {name for fn in functions for name in needs(fn)}
    while more - names:
        names |= more
        answers = [table[name] for table in tables for name in sorted(names & table.keys())]
        more = {name for fn in answers for name in needs(fn)}
    return names


def parse(argv, fields):
    """['--lr', '1e-3', '--steps=5', '--resume'] -> [('lr', '1e-3'), ('steps', '5'), ('resume',
    'true')]."""
    pairs, argv = [], list(argv)
    while argv:
        word = argv.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"unexpected argument {word!r}: options look like --key value")
        key, eq, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if not eq:
            flag = isinstance(fields.get(key), bool)
            follows = argv and not argv[0].startswith("--")
            if follows and (not flag or argv[0].lower() in ("true", "false")):
                value = argv.pop(0)
            elif flag or key == "help":
                value = "true"
            else:
                raise UserError(f"--{key} needs a value")
        if key in dict(pairs):
            raise UserError(f"--{key} is given twice: give it once"
                            + " (presets: --config a,b)" * (key == "config"))
        pairs.append((key, value))
    return pairs


def read_toml(name):
    """A TOML file of settings as a dict of keys."""
    if Path(name).exists() and not Path(name).is_file():
        raise UserError(f"{name} is no TOML file: give a text file in UTF-8")
    try:
        row = tomllib.loads(Path(name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no config file {name}: check the path") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{name} is no TOML file ({e}): give a text file in UTF-8") from None
    except tomllib.TOMLDecodeError as e:
        raise UserError(f"{name} is not valid TOML: {e}") from None
    for table in [key for key, value in row.items() if isinstance(value, dict)]:
        row |= {f"{table}.{key}": value for key, value in row.pop(table).items()}      # kl.beta = 1
    for key, value in row.items():
        if not isinstance(value, (bool, int, float, str)):
            raise UserError(f"{name}: {key} is a {type(value).__name__}: expected a number, true, "
                            "false or a text")
    return row


def entries(config):
    """The entries of --config: a,b,weights=0.2,0.8 is a, b and weights=0.2,0.8, as no entry is a
    number."""
    return [x for x in re.split(r",(?!\s*[-+]?[\d.]+(?:e[-+]?\d+)?\s*(?:,|$))", config) if x]


def layer(name, presets, axes):
    """One --config entry, as a dict of keys: a preset's name, a TOML file's path, key=value, or the
    name of a row that only one axis has (`ipo` for loss=ipo)."""
    key, equals, value = name.partition("=")
    if equals or name.endswith(".toml"):
        row = {key.replace("-", "_"): value} if equals else read_toml(name)
        for key in row.keys() & {"config", "resume"}:
            raise UserError(f"{name}: {key} belongs on the command line, not in "
                            + ("--config" if equals else "a file"))
        return row
    if name in presets:
        return presets[name]
    owners = [axis for axis, rows in axes.items() if name in rows and name != "PATH"]
    if len(owners) == 1:
        return {owners[0]: name}
    if owners:
        raise UserError(f"{name!r} is no preset, but a row of {' and '.join(owners)}: write "
                        f"--config {owners[0]}={name}")
    rows = {row for table in axes.values() for row in table} - {"PATH"}
    raise UserError(f"no preset {name!r}{nearest(name, [*presets, *rows])}")


def bind(axis, rows, row, values):
    """The function of an axis's row, its keyword-only arguments bound to the values that are meant
    for it."""
    path = "PATH" in rows and row and (".py:" in row or Path(row).exists())
    if row == "PATH" or row not in rows and not path:
        missing = "; there is no such folder or file" * ("PATH" in rows and "/" in row)
        missing = "; write the path itself" if row == "PATH" else missing
        raise UserError(f"no {axis} {row!r}{missing or nearest(row, rows)}")
    fn, numbers = rows.get(row) or rows["PATH"], {}
    for key, default in hyper(fn).items():
        value = values.get(f"{axis}.{key}", values.get(key, default))
        numbers[key] = cast(key, value, default, kinds(fn).get(key))
    return partial(fn, **numbers)


@dataclasses.dataclass(frozen=True)
class Common:
    """What every run has; a script's Config adds its own, and gives a default where it has
    another."""
    config: str = ""             # presets, TOML files and key=value, left to right
    data: str = ""               # what it learns from or is measured on
    init: str = ""               # the checkpoint to start from; base:PRESETS makes it first
    out: str = ""                # run folder (default out/<script>/<presets>)
    seed: int = 0                # of initialisation, data order and sampling
    device: str = "auto"         # cpu or cuda
    kernels: str = "auto"        # auto, or torch: the plain definition of every kernel
    share_prompts: Literal["auto", "true", "false"] = "auto"  # rows without padding, prompts once
    keep: Count = 2              # checkpoints to keep
    resume: bool = False         # go on from the newest checkpoint of the run folder


@dataclasses.dataclass(frozen=True)
class Training(Common):
    """What every run has that takes optimizer steps."""
    chat: bool = False           # wrap prompts in the checkpoint's chat template
    system: str = ""             # words before every prompt of a file: its system message
    ask: str = ""                # words behind every prompt of a file: how to answer
    answer: Literal["mark", "last", "boxed", "whole"] = "mark"  # behind ####, last number, …, all
    val: str = ""                # a file of held-out rows; else 1 of 16 prompts of --data
    steps: int = 0               # optimizer steps, or iterations
    epochs: NonNegative = 0.0    # passes over the data, in the place of --steps
    micro: Count = 64            # rows a forward pass: lower it if memory runs out, results stay
    lr: Positive = 1e-3          # peak learning rate
    warmup: int = 0              # steps of linear warm-up
    eval_every: Count = 20       # steps between evaluations
    save_every: Count = 200      # steps between checkpoints
    stop: int = 0                # pause after this step (0: no); --resume goes on
    slots: int = 0               # rows that are sampled at once, the others wait (0: all)
    peft: str = "full"           # what is trained: a row of model.PEFT, such as lora
    merge: bool = True           # save adapters merged into whole models; false: PEFT's folders
    recompute: bool = False      # activations of a block made again in its backward pass
    dtype: str = "auto"          # of the products: float32, or bfloat16 (autocast) where that pays
    compile: bool = False        # torch.compile the model that is trained
    profile: bool = False        # at the end, where a step's time went, and the least it could take

    @property
    def computes(self):
        """Where, in what, and why where that was measured: "cpu float32 (…)"."""
        why = ""
        if self.device == "cpu" and bfloat16_gain.cache_info().currsize:
            why = f" (a layer in bfloat16 is {bfloat16_gain():.1f} times as fast here)"
        return f"{self.device} {self.dtype}{why}"


def in_passes(c, rows, a_step):
    """The run with as many steps as its --epochs over so many rows take, where it gives them."""
    if not c.epochs:
        return c
    return dataclasses.replace(c, steps=max(1, math.ceil(c.epochs * rows / a_step)))


def configure(Config, presets, axes, doc="", argv=None, readers=None):
    """Resolve a command line into (c, f): the frozen Config, and one bound function per axis.

    axes: {axis: {row name: function}}. The Config field of the axis's name says which row is used
    (an axis with a single row needs no field); its keyword-only arguments are keys like any other
    (`--beta 0.1`, or `--kl.beta 0.1` if two rows share it). A row called PATH is the one for values
    that are existing paths. An annotation says which values a field or an argument takes: see cast.
    readers(c, f): {field: (whether this run reads it, what does)} of the fields that not every run
    reads. Raises UserError for an unknown key or preset (with the nearest name), a wrong type, a
    value out of its range, a key nobody reads.
    """
    fields = {x.name: x for x in dataclasses.fields(Config)}
    given = parse(sys.argv[1:] if argv is None else argv, {k: x.default for k, x in fields.items()})
    if any(key == "help" for key, _ in given):
        print(help_text(Config, presets, axes, doc))
        raise SystemExit(0)
    values, typed = layered(given, presets, {k: rows for k, rows in axes.items() if k in fields})
    resolved = {k: cast(k, values.pop(k, x.default), x.default, x.type) for k, x in fields.items()}
    bound = {axis: bind(axis, rows, resolved.get(axis, next(iter(rows))), values)
             for axis, rows in axes.items()}
    refuse_unknown(values, typed, fields, bound, axes)
    c, f = Config(**with_device(resolved)), SimpleNamespace(**bound)
    for key, (read, reader) in (readers(c, f) if readers else {}).items():
        arguments = [key, *(bound[key].keywords if key in bound else ())]  # and an axis's arguments
        idle = [x for x in arguments if not read and {x, f"{key}.{x}"} & typed]
        if idle:
            raise UserError(f"--{idle[0]}: this run does not read it; --{key} is for {reader}")
    return c, f


def layered(given, presets, axes):
    """The keys of a command line's presets, files and options, the later ones on top: (values, the
    keys that the user wrote, which must be read)."""
    names = [name for key, value in given if key == "config" for name in entries(value)]
    values, typed = {}, {key for key, _ in given}
    for name in names:
        row = layer(name, presets, axes)
        values |= row
        typed |= set() if name in presets else set(row)
    return values | dict(given) | dict(config=",".join(names)), typed


def rows_used(c, axes):
    """{axis: the row that a run uses}. Where an axis has one row, as in a script of one method, the
    Config needs no field for it."""
    return {axis: getattr(c, axis, next(iter(rows))) for axis, rows in axes.items()}


def refuse_unknown(values, typed, fields, bound, axes):
    """UserError for a key that no function reads. A preset's key may be idle under another row."""
    known = {key for fn in bound.values() for key in fn.keywords}
    known |= {f"{axis}.{key}" for axis, fn in bound.items() for key in fn.keywords}
    for key in values.keys() - known:
        owners = [f"{axis} {row!r}" for axis, rows in axes.items() for row, fn in rows.items()
                  if key in hyper(fn)]
        if key in typed or not owners:
            hint = (f"; it belongs to {' or '.join(owners)}" if owners else
                    nearest(key, [*fields, *known]))
            raise UserError(f"unknown key --{key}{hint}")
    for key in typed & values.keys():
        readers = [axis for axis, fn in bound.items() if key in fn.keywords]
        if readers and all(f"{axis}.{key}" in values for axis in readers):
            raise UserError(f"--{key} does nothing beside --{readers[0]}.{key}: leave one out")


def with_device(resolved):
    """The settings with --device and --dtype as what they come to on this machine."""
    out = dict(resolved)
    if "device" in out:
        out["device"] = device_of(out["device"])
        if out["device"].startswith("cuda:"):    # cuda:1 is then the device of every launch, too
            torch.cuda.set_device(out["device"])
    if out.get("dtype") == "auto":
        out["dtype"] = dtype_of(out["device"], out.get("init", ""))
    if out.get("dtype", "float32") not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {out['dtype']}: choose float32 or bfloat16")
    return out


MANY, GAIN = 20_000_000, 1.3     # weights, and how much faster a layer is: bfloat16 pays (ours)


def dtype_of(device, init):
    """What --dtype auto comes to: bfloat16 on CUDA, and on a CPU whose products are GAIN times as
    fast in it, for a checkpoint `init` of MANY weights or more; else float32."""
    if device.startswith("cuda"):
        return "bfloat16"
    small = numbers_in(init) < MANY or number_of("WORLD_SIZE") > 1       # each rank would measure
    return "float32" if small or bfloat16_gain() < GAIN else "bfloat16"


def numbers_in(init):
    """How many numbers a checkpoint's safetensors hold, an adapter's with its base's; 0 where there
    are none."""
    if not init:
        return 0
    try:
        folder = checkpoint(init)
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path", "") if (
            folder / "adapter_config.json").exists() else ""
        count = numbers_in(base) if base else 0
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as stored:
                count += sum(math.prod(stored.get_slice(k).get_shape()) for k in stored.keys())
        return count
    except (UserError, OSError, SafetensorError):
        return 0                                      # a base:… to be made, or load() says why


@functools.cache
def bfloat16_gain(n=512, rounds=5):
    """How many times as fast a linear layer is on this CPU in bfloat16 as in float32: medians of
    rounds in turn."""
    kinds, took = (torch.float32, torch.bfloat16), ([], [])
    layers = [(torch.ones(n // 2, n, dtype=kind), torch.ones(n, n, dtype=kind)) for kind in kinds]
    for _ in range(rounds + 1):
        for layer, seconds in zip(layers, took):
            start = time.perf_counter()
            torch.nn.functional.linear(*layer)
            seconds.append(time.perf_counter() - start)
    slow, fast = (statistics.median(x[1:]) for x in took)      # the first ones choose their kernels
    return slow / fast


def comments_of(Config):
    """{field: its comment}, of the Config and of what it adds to."""
    out = {}
    for kind in reversed([x for x in Config.__mro__ if dataclasses.is_dataclass(x)]):
        out |= dict(re.findall(r"^ +(\w+): .*?# (.*)$", inspect.getsource(kind), re.M))
    return out


def help_text(Config, presets, axes, doc):
    """--help: the script's docstring, the map of its chapters, fields with comments and defaults,
    presets, each row's arguments."""
    comments, lines = comments_of(Config), [inspect.cleandoc(doc or ""), ""]
    text = Path(inspect.getsourcefile(Config)).read_text()
    lines += [f"{names:<14} {about}" for names, about in headings(text)]
    lines += ["", "options (--key value, or key=value inside --config):"]
    lines += [f"  --{x.name:<12} {str(x.default)!s:<12} {comments.get(x.name, '')}"
              for x in dataclasses.fields(Config)]
    lines += ["", "presets (--config a,b,file.toml,key=value, left to right):"]
    for name, row in presets.items():
        lines.append(f"  {name:<14} " + ", ".join(f"{k}={v}" for k, v in row.items()))
    for axis, rows in axes.items():
        lines += ["", f"--{axis}, and what each reads:" if axis in comments else f"{axis}:"]
        lines += [help_of_row(row, fn) for row, fn in rows.items()]
    return "\n".join(lines)


def help_of_row(row, fn):
    """A row's line of --help: its function's first sentence and arguments."""
    first = " ".join((inspect.getdoc(fn) or "").split("\n\n")[0].split())
    takes = {k: f" ({'|'.join(map(str, get_args(x))) or x.text})" for k, x in kinds(fn).items()}
    shown = {k: repr(v) if isinstance(v, str) and "\n" in v else v for k, v in hyper(fn).items()}
    return f"  {row:<12} {first}  " + " ".join(
        f"--{k} {v}{takes.get(k, '')}" for k, v in shown.items())


# --- several ranks --------------------------------------------------------------------------------


def refuse_ranks(name):
    """UserError under torchrun, of a script that would do the same work on every rank."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks != "1":
        raise UserError(f"{name} runs on one rank, and would do the same {ranks} times here: start "
                        "it without torchrun (the training scripts run on several)")


def refuse_alone(c, asked, alone):
    """UserError under torchrun for a row of an axis, or what its functions ask for, that runs on
    one rank. alone: {its name: why}."""
    used = {*asked, *(x for x in dataclasses.asdict(c).values() if isinstance(x, str))}
    for name, why in alone.items():
        if ranks() > 1 and name in used:
            raise UserError(f"{name} runs on one rank ({why}): start it without torchrun")


def start_ranks(device):
    """Join torchrun's process group (gloo on CPUs, nccl on GPUs); -> (rank, how many), (0, 1)
    alone."""
    if "RANK" in os.environ and not dist.is_initialized():
        if missing := {"WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR",
                       "MASTER_PORT"} - os.environ.keys():
            raise UserError(f"RANK is set and {min(missing)} is not: start several ranks by "
                            "torchrun, one without RANK in the environment")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
            if not os.environ[name].isdigit():
                raise UserError(f"{name} is {os.environ[name]!r} in the environment: expected a "
                                "number")
        if device.startswith("cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        patience = timedelta(hours=6)              # what rank 0 does alone(), a slow reward
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=patience)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def leave_ranks():
    """Leave torchrun's process group together, with nothing left that uses it: gloo's threads abort
    a process that ends before them."""
    if dist.is_initialized():
        gc.collect()                                           # meshes of models that are gone
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()


def rank():
    """This process's number among torchrun's, 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


SOLO = []                        # what rank 0 does alone


@contextlib.contextmanager
def alone():
    """What one rank does while the others wait: it parts no work and gathers nothing."""
    SOLO.append(True)
    try:
        yield
    finally:
        SOLO.pop()


def ranks():
    """How many processes of torchrun share the work: 1 without it, and alone()."""
    return dist.get_world_size() if dist.is_initialized() and not SOLO else 1


def share(x):
    """Rank 0's x, on every rank. Waits for all."""
    box = [x]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


# --- files ----------------------------------------------------------------------------------------


def write_text(path, text):
    """Write a file so that a reader, or a kill at any moment, sees the old or the new content,
    never half."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}-{os.getpid()}.tmp")
    try:
        tmp.write_text(text)
        os.replace(tmp, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({e.strerror}): free some space or choose "
                        "another --out") from None


def set_aside(path):
    """Rename what stands at `path` to PATH.old-1, or the first free number: out of the way, not
    lost."""
    k = next(k for k in itertools.count(1) if not Path(f"{path}.old-{k}").exists())
    os.rename(path, f"{path}.old-{k}")
    print(f"  {path} was in the way: it is now {path}.old-{k}", flush=True)


@contextlib.contextmanager
def lock(path):
    """Let one process at a time into the block; others wait. The system frees it if the holder is
    killed."""
    path = Path(f"{path}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process, which makes {path.with_suffix('')}",
                      flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def without_repeats(pairs):
    """An object of JSON, as json's object_pairs_hook; ValueError if a key stands twice in it."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice in "
                         "an object")
    return row


def read_json(path, what="copy it again"):
    """The object that a JSON file holds. UserError, with `what` as the remedy, if it is missing or
    broken."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file: {what}")
    try:
        found = json.loads(path.read_bytes().decode(), object_pairs_hook=without_repeats)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {what}") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}): {what}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSON in UTF-8 ({e}): {what}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected an object {{…}}, found a {type(found).__name__}: "
                        f"{what}")
    return found


class MeanOf(float):
    """A mean that keeps what it is of: values [P], one a prompt or row, or [P, S] with S samples
    each. A run that finishes with it leaves them in values.json, where --claim --power reads what
    the prompts and the samples add to a result's spread."""

    def __new__(cls, values):
        values = torch.as_tensor(values)
        values = values if values.is_floating_point() else values.float()
        self = super().__new__(cls, values.mean())
        self.values = values.tolist()
        return self


def plain(x):
    """A state without MeanOfs, which torch.load(weights_only=True) would refuse."""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    return float(x) if isinstance(x, MeanOf) else x


def is_number(x):
    """Whether a JSON value is a finite number; true is none."""
    return type(x) in (int, float) and math.isfinite(x)


KINDS = dict(                            # what a key of a JSON file may be: in words, and as a test
    size=("a whole number from 1", lambda x: type(x) is int and 0 < x <= LARGEST),
    whole=("a whole number from 0", lambda x: type(x) is int and 0 <= x <= LARGEST),
    number=("a finite number", is_number),
    positive=("a number above 0", lambda x: is_number(x) and x > 0),
    flag=("true or false", lambda x: type(x) is bool),
    text=("a text", lambda x: type(x) is str),
    list=("a list", lambda x: type(x) is list),
    object=("an object", lambda x: type(x) is dict),
)


def expect(found, where, required=(), **kinds):
    """UserError unless every key of `found` that kinds names is null, absent or of that row of
    KINDS, and the required ones are there. where: the file's name."""
    for key, kind in kinds.items():
        words, test = KINDS[kind]
        value = found.get(key)
        if value is None and key in required:
            raise UserError(f"{where}: {key} is missing: expected {words}")
        if value is not None and not test(value):
            raise UserError(f"{where}: {key} is {str(value)[:60]!r}: expected {words}")


def sha256(path):
    """The SHA-256 of a file, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mark_of(folder, files=()):
    """A hash of a checkpoint's files (by default its config and the weights): of each the name,
    the size, and the first and the last 32 MB."""
    mark, most = hashlib.sha256(), 1 << 25
    own = [p.name for name in (*MODEL_FILES, "*.safetensors") for p in folder.glob(name)]
    for name in files or sorted(own):
        size = (folder / name).stat().st_size
        mark.update(f"{name} {size}".encode())
        with open(folder / name, "rb") as file:
            mark.update(file.read(most))
            file.seek(max(file.tell(), size - most))
            mark.update(file.read())
    return mark.hexdigest()


def files_of(c):
    """{field: hash} of every field that names a file (data, a reward's source) or a checkpoint: a
    resumed run must find them as they were."""
    texts = {key: x for key, x in dataclasses.asdict(c).items() if isinstance(x, str) and x}
    paths = {key: Path(re.sub(r"\.py:\w+$", ".py", x)) for key, x in texts.items()
             if key not in ("config", "out")}
    out = {key: sha256(path) for key, path in paths.items() if path.is_file()}
    for key, path in paths.items():
        if path.is_dir():
            with contextlib.suppress(UserError):
                out[key] = mark_of(checkpoint(path))
    return out


def peak_bytes(device):
    """The most memory that this process has held: of the GPU where it computes there, else of the
    machine."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    if not resource:                                           # Windows does not tell
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used * (1 if sys.platform == "darwin" else 1024)


def held_bytes(device):
    """What this process holds now: of the GPU where it computes there, else of the machine."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated()
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:                                            # no Linux: the most until now
        return peak_bytes(device)


def tensor_bytes(x):
    """Bytes of the tensors in a nest of dicts and lists."""
    if isinstance(x, torch.Tensor):
        return x.nbytes
    items = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    return sum(map(tensor_bytes, items))


def large_blocks_go_back(block=1 << 18):
    """From now on tensors above so many bytes have pages of their own, which go back to the system
    with them: in glibc's heap freed activations leave holes that the next ones do not fit. A row of
    100 tokens of width 576 has 0.2 MB."""
    with contextlib.suppress(OSError, AttributeError):         # another libc has no such call
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 64 * block)                           # M_TRIM_THRESHOLD
        libc.mallopt(-3, block)                                # M_MMAP_THRESHOLD


def room_bytes(device):
    """What this process may hold in all, its own with what is free; infinity where nothing tells.
    Of a machine its ranks have equal shares."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    room = math.inf
    with contextlib.suppress(OSError):
        free = re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())
        room = held_bytes(device) + int(free[1]) * 1024 // ranks()
    with contextlib.suppress(OSError, ValueError):             # a container's, "max": no limit
        room = min(room, int(Path("/sys/fs/cgroup/memory.max").read_text()) // ranks())
    return room


def clock(device):
    """Seconds now, after all work on the device (a torch.device) is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def bandwidth(device):
    """Bytes a second that a 256 MB copy reads and writes on this device: the floor decoding is held
    to."""
    x = torch.empty(64 << 20, device=device)
    y = torch.empty_like(x)
    best = math.inf
    for _ in range(4):
        t = time.perf_counter()
        y.copy_(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - t)
    return 2 * x.nbytes / best


def product_rate(device, dtype):
    """FLOPs a second of a large matrix product on this device: what training is held to."""
    n = 4096 if str(device).startswith("cuda") else 1024
    x, best = torch.ones(n, n, device=device, dtype=dtype), math.inf
    for _ in range(6):
        t = time.perf_counter()
        torch.nn.functional.linear(x, x)
        if x.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - t)
    return 2 * n ** 3 / best


class Products(TorchDispatchMode):
    """Counts matrix products, attention among them, while it is entered: their FLOPs, and the least
    seconds that they take at so many FLOPs and bytes a second, each the longer of the two."""

    def __init__(self, rate, speed):
        super().__init__()
        self.rate, self.speed, self.flops, self.least = rate, speed, 0, 0.0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        count = flop_registry.get(op._overloadpacket)
        if str(op._overloadpacket) == "mkldnn._linear_pointwise":          # the registry has it not
            flops = 2 * out.numel() * args[0].size(-1)
        else:
            flops = count(*args, **kwargs or {}, out_val=out) if count else 0
        if flops:
            moved = sum(x.numel() * x.element_size() for x in tree_leaves((args, kwargs, out))
                        if isinstance(x, torch.Tensor))
            self.flops += flops
            self.least += max(flops / self.rate, moved / self.speed)
        return out


class Clock:
    """How long the parts of a run's steps take, and in one step, whose products are counted, how
    long they had to."""

    def __init__(self):
        self.part, self.since, self.step = "", 0.0, {}     # of this step: {part: seconds}
        self.steps, self.counts, self.products = [], {}, None

    def next(self, part):
        """The step's next part begins, "" for none: the one before has ended."""
        now, p = time.perf_counter(), self.products
        if self.part:
            self.step[self.part] = self.step.get(self.part, 0.0) + now - self.since
            if p:
                self.counts[self.part] = (p.flops - self.at[0], p.least - self.at[1])
        self.part, self.since, self.at = part, now, (p.flops, p.least) if p else None

    def row(self):
        """The step has a row: {t_part: seconds}."""
        self.next("")
        return {f"t_{k}": x for k, x in self.step.items()}

    def end(self, seconds):
        """The step is over, after so many seconds in all."""
        self.next("")
        if self.products:
            self.counts["step"], self.products = (self.products.flops, self.products.least), None
        else:                          # what is counted is not timed
            self.steps.append(self.step | dict(step=seconds))
        self.step = {}

    def table(self):
        """Lines of --profile: each part's median seconds, share, FLOPs, and the least seconds."""
        if not self.counts or len(self.steps) < 2:
            return ["profile: too few steps to time some and count one: give three or more"]
        steps = self.steps[1:] if len(self.steps) > 2 else self.steps         # the first warms up
        took = {}
        for part in steps[-1]:
            took[part] = statistics.median(x.get(part, 0.0) for x in steps)
        whole = took.pop("step")
        took |= dict(rest=max(0.0, whole - sum(took.values()))) if took else {}
        counts, parts = dict(self.counts), [x for k, x in self.counts.items() if k != "step"]
        counts["rest"] = [a - sum(x) for a, *x in zip(counts["step"], *parts)]
        lines = [f"profile: median of {len(steps)} steps; least: of a step's matrix products, at "
                 "this machine's speed in a large one and in a copy",
                 f"  {'':<8}{'seconds':>9}{'share':>7}{'GFLOP':>10}{'least':>9}{'of it':>7}"]
        for name, seconds in [*took.items(), ("step", whole)]:
            flops, least = counts.get(name, (0, 0.0))
            lines.append(f"  {name:<8}{seconds:>9.4f}{seconds / whole:>7.0%}{flops / 1e9:>10.2f}"
                         f"{least:>9.4f}{least / max(seconds, 1e-9):>7.0%}")
        return lines


def read_log(folder):
    """The rows of a run's log.jsonl. A last line cut short by a kill is dropped; any other is a
    UserError."""
    path, rows = Path(folder) / "log.jsonl", []
    lines = path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []
    for i, line in enumerate(lines, 1):
        row = None
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
        if isinstance(row, dict) and type(row.get("step")) is int and is_number(row.get("time")):
            rows.append(row)
        elif i < len(lines):
            raise UserError(f'{path}:{i}: no row of a log, {{"step", "time", …}}: {line[:60]!r}; '
                            f'take it out')
    return rows


MODEL_FILES = "config.json", "adapter_config.json"       # what tells a model, or a PEFT adapter
STEP = re.compile(r"step-(\d{6,})")      # a checkpoint's name; by number 1000000 is after 999999


def steps_of(folder):
    """A run's checkpoints, oldest first: [folder of each]. Copies and half-made ones are not among
    them."""
    found = [(int(m[1]), p) for name in MODEL_FILES for p in Path(folder).glob("step-*")
             if (m := STEP.fullmatch(p.name)) and (p / name).is_file()]
    return [p for _, p in sorted({*found})]


def checkpoint(path):
    """The Hugging Face folder `path` means: itself, or the newest step of a run folder. Raises
    UserError."""
    path = Path(path)
    if any((path / name).is_file() for name in MODEL_FILES):
        return path
    if steps := steps_of(path):
        return steps[-1]
    what = ("has neither config.json nor step-* folders" if path.is_dir() else
            "is a file" if path.exists() else "does not exist")
    raise UserError(f"{path} {what}: give a Hugging Face checkpoint folder or a run folder under "
                    "out/")


def older_than(path):
    """The tail of an error about a run's broken checkpoint: the older one to go on from. "" outside
    a run."""
    path = Path(path)
    if not STEP.fullmatch(path.name):
        return ""
    before = [p for p in steps_of(path.parent) if int(p.name[5:]) < int(path.name[5:])]
    return (f"; the next older checkpoint is {before[-1]}: move {path} away, and --resume goes on "
            "from there"
            if before
            else f"; {path.parent} has no older checkpoint: start the run anew, in another folder")


def read_state(path):
    """What a run kept beside a checkpoint's weights, {"step": …}. UserError that names the next
    older one."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if type(state["step"]) is not int:
            raise ValueError("no state of a run")
    except Exception as e:  # pickle, zip, disk: all mean the same here
        why = (str(e) or type(e).__name__).splitlines()[0][:120]
        raise UserError(f"{path} cannot be read ({why}){older_than(Path(path).parent)}") from None
    return state


def not_finite(x, name=""):
    """The name of the first tensor with NaN or infinity in a nest of dicts and lists, "" if there
    is none."""
    if isinstance(x, torch.Tensor):
        if not x.is_floating_point():
            return ""
        x = x.to_local() if hasattr(x, "to_local") else x      # FSDP's: this rank's share
        x = x.float() if x.element_size() == 1 else x          # float8 knows no isfinite
        fine = x.sum().isfinite() or x.isfinite().all()        # a sum alone takes no memory
        return "" if fine else name or "it"
    items = x.items() if isinstance(x,
                                    dict) else enumerate(x) if isinstance(x, (list, tuple)) else ()
    return next((bad for k, v in items if (bad := not_finite(v, f"{name}.{k}".strip(".")))), "")


def not_finite_in(folder):
    """not_finite of all safetensors under a folder, read back as they lie on the disk. A few at a
    time: what is read of an open file counts as this process's memory."""
    for path in sorted(Path(folder).rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        for i in range(0, len(names), 32):
            with safe_open(path, "pt") as file:
                bad = not_finite({name: file.get_tensor(name) for name in names[i:i + 32]})
            if bad:
                return bad
    return ""


def result(folder):
    """What a finished run returned (a dict), or None for a run that is unfinished or absent."""
    path = Path(folder) / "run.json"
    return read_json(path, "it is a run's record").get("result") if path.exists() else None


def commit():
    """The project's git commit, with '+' if files differ from it; '' outside a repository."""
    def git(*words):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *words],
                              capture_output=True, text=True).stdout
    with contextlib.suppress(OSError):
        return (git("rev-parse", "--short", "HEAD").strip()
                + ("+" if git("status", "--porcelain", "-uno") else ""))
    return ""


def source():
    """A hash of the project's code: a claim reuses an arm's result only if it was made by the same
    code."""
    root = Path(__file__).parent.parent
    files = sorted([*root.glob("*.py"), *root.glob("data/*.py")])
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


# --- the run's folder -----------------------------------------------------------------------------


FULL_DISK = re.compile("writing file|file write|iostream|enforce fail")         # torch.save's words
FREE = {"resume", "stop", "out", "steps", "keep", "save_every", "eval_every", "device", "config",
        "micro", "compile", "share_prompts", "profile"}  # may change on --resume


def settings(c, f):
    """All that decides a run's numbers, as JSON holds it: the Config's fields and each axis's
    arguments."""
    bound = {f"{axis}.{k}": v for axis, fn in vars(f).items() for k, v in fn.keywords.items()}
    return json.loads(json.dumps(dataclasses.asdict(c) | bound))


def defaults(c, f):
    """settings() of a run of the same rows that gives no value of its own."""
    bound = {f"{axis}.{k}": v for axis, fn in vars(f).items() for k, v in hyper(fn.func).items()}
    fields = {x.name: x.default for x in dataclasses.fields(c)}
    return json.loads(json.dumps(fields | bound))


def changed(c, f):
    """The settings that differ from their defaults and change a result: what a base is known by."""
    usual = defaults(c, f) | dict(dtype="float32")
    return {k: v for k, v in settings(c, f).items()
            if v != usual[k] and (k == "steps" or k not in FREE)}


class Run:
    """A run's folder out/<script>/<name>/ and its traces; a context manager that draws the curve on
    exit.

    Without --out a second run of the same name gets a new folder (name-2), so nothing is
    overwritten; with --resume the newest of them is continued, and `state` holds what its last
    save() was given. The folder is locked while the run lives. Nothing is written before the first
    row, checkpoint or result: a run that fails before leaves an existing folder as it was, and no
    new one. run.json lists under "made" what the run wrote, {folder: [files]}: only these are ever
    removed or replaced.
    """

    def __init__(self, c, f, script, curves=None):
        self.c, self.curves, self.shown, self.total = c, curves or {}, 0.0, 0
        self.quiet, self.began, self.created = rank() > 0, False, []
        self.state, self.start, self.last = None, 0, None
        self.at, self.peak = 0, 0              # steps of a run's earlier stages; see outlook
        self.clock = Clock()
        OUTLOOK.clear()
        self.release, rows, self.usual = (lambda: None), [], defaults(c, f)
        self.info = dict(script=script, config=settings(c, f), files=files_of(c), made={}, marks={},
                         command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), commit=commit(),
                         source=source(), process=f"{os.getpid()} on {platform.node()}",
                         versions=dict(python=platform.python_version(), torch=torch.__version__))
        try:
            self.folder = None if self.quiet else self.open_folder(script)
            home = Path(share(str(self.folder)))  # of rank 0; the others write to nowhere
            self.folder = Path(tempfile.mkdtemp()) if self.quiet else home
            if c.resume:
                self.resume(home)
                rows = read_log(self.folder)
                if not any(self.folder.glob("*/stage.pt")):    # else stage() cuts the log
                    rows = [r for r in rows if self.start and r["step"] <= self.start]
        except BaseException:
            self.leave()
            raise
        self.rows, self.t0 = rows, time.time() - (rows[-1]["time"] if rows else 0.0)

    def open_folder(self, script):
        """The folder of a new run, or with --resume the one that holds the run; locked."""
        c, names = self.c, [Path(x).stem if x.endswith(".toml") else re.sub(r"[/\\]", "_", x)
                            for x in entries(self.c.config)]
        base = Path(c.out or Path("out") / script / ("-".join(names) or "default"))
        others = () if c.out else (base.with_name(f"{base.name}-{i}") for i in range(2, 10_000))
        numbered = [base, *others]
        if c.resume:
            runs = [p for p in numbered if (p / "run.json").exists()]
            if not runs:
                raise UserError(f"--resume: no run in {base}; start it without --resume")
            self.claim_folder(runs[-1])
            return runs[-1]
        if not c.out:
            for folder in numbered:
                with contextlib.suppress(FileExistsError):     # an older run, or one beside us
                    self.make(folder, exist_ok=False)
                    self.claim_folder(folder)
                    return folder
        if base.exists() and not base.is_dir():
            raise UserError(f"--out {base} is a file: give a folder")
        self.make(base)
        self.claim_folder(base)
        if (base / "run.json").exists():
            raise UserError(f"--out {base} already holds a run: "
                            "add --resume to go on, or choose another folder")
        if found := sorted(p.name for p in base.iterdir()):
            raise UserError(f"--out {base} holds no run, but other files ({', '.join(found[:3])} "
                            "…): nothing is touched; choose a new or an empty folder")
        return base

    def make(self, folder, exist_ok=True):
        """Make a folder and those above it; remember which of them are new."""
        new = [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=exist_ok)
        self.created = new

    def claim_folder(self, folder):
        """Lock the folder for this process; the system frees it when the process ends, however it
        ends."""
        if not fcntl:
            return
        handle = os.open(folder, os.O_RDONLY)
        self.release = weakref.finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = read_json(folder / "run.json") if (folder / "run.json").exists() else {}
            who = who.get("process", "just begun")
            raise UserError(f"{folder}: another process is at work on this run ({who}): wait for "
                            "it, or choose another --out") from None
        except OSError:
            pass                                               # a file system without locks

    def resume(self, home):
        """Read what the run left: its settings, which must be the same, and its newest checkpoint's
        state."""
        old = read_json(home / "run.json",
                        "it is the run's record: start the run anew, in another folder")
        expect(old, home / "run.json", ("config",), config="object", made="object", files="object",
               marks="object", script="text", writing="text", result="object")
        self.check_settings(old)
        self.info |= {k: old[k] for k in ("made", "marks", "writing", "result")
                      if old.get(k) is not None}
        self.last = (steps_of(home) or [None])[-1]
        steps = sorted((int(m[1]), home / k) for k in self.info["made"] if (m := STEP.fullmatch(k)))
        if steps and steps[-1][1].exists() and steps[-1][1] not in steps_of(home):
            raise UserError(f"{steps[-1][1]} has no config.json any more{older_than(steps[-1][1])}")
        if self.last:
            self.state = read_state(self.last / "state.pt")
            self.start = self.state["step"]
            files, written = (self.info[x].get(self.last.name) for x in ("made", "marks"))
            changed = written and any(not (self.last / x).is_file() for x in files) or (
                written and written != mark_of(self.last, files))
            if changed or self.start != int(self.last.name[5:]):
                raise UserError(f"{self.last} is not as this run wrote it{older_than(self.last)}")
        self.say(f"resuming {home} at step {self.start}")

    def check_settings(self, old):
        """--resume must not change what is computed. Raises UserError naming the first thing that
        did."""
        if (old.get("script") or self.info["script"]) != self.info["script"]:
            raise UserError(f"--resume: that run is one of {old['script']}.py")
        was, new = self.usual | old["config"], self.info["config"]     # fields since added: at rest
        for key in sorted(new.keys() | was.keys()):
            if key not in FREE and was.get(key) != new.get(key):
                raise UserError(f"--resume: {key} was {was.get(key)!r} and is now "
                                f"{new.get(key)!r}; "
                                "resume with the run's own settings, or start a new run")
        for key, before in (old.get("files") or {}).items():
            if self.info["files"].get(key) != before:
                raise UserError(f"--resume: --{key} {new.get(key)} does not hold what it did when "
                                "the run began: put it back, or start a new run")

    def begin(self):
        """Write run.json and the log: from here on the run is kept, whatever happens."""
        if self.began:
            return
        self.remove(self.info.pop("writing", ""))              # what a kill left half written
        try:
            self.write_info()
            write_text(self.folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in self.rows))
        except UserError:
            if not self.c.resume:                              # a full disk: nothing had been there
                (self.folder / "run.json").unlink(missing_ok=True)
            raise
        self.file, self.began = open(self.folder / "log.jsonl", "a"), True

    def write_info(self):
        """run.json as it now is."""
        write_text(self.folder / "run.json", json.dumps(self.info, indent=2))

    def __enter__(self):
        return self

    def __exit__(self, kind, failure, trace):
        if self.quiet:
            shutil.rmtree(self.folder)  # a rank's own, under the system's /tmp
        elif not self.began:                                   # a typo leaves no run behind
            return self.leave()
        else:
            try:
                self.file.close()
                if self.curves:
                    draw(self.folder, self.curves)
            except Exception as e:
                if not failure:  # never in the place of what ended the run
                    print(f"{self.folder / 'curve.png'} could not be drawn: {e}", file=sys.stderr)
        self.release()

    def leave(self):
        """Of a run that never began: give the folder back, as it was."""
        for folder in self.created:
            with contextlib.suppress(OSError):                 # somebody has put something there
                folder.rmdir()
        self.release()

    def steps(self, total):
        """Yield start..total-1 under a progress bar (on a terminal); --stop N pauses the run after
        step N."""
        self.total, end = total, min(total, self.c.stop) if self.c.stop else total
        self.bar = tqdm(total=total, initial=self.start, disable=True if self.quiet else None,
                        dynamic_ncols=True, leave=False)
        for step in range(self.start, end):
            began, counted = time.perf_counter(), contextlib.nullcontext()
            if getattr(self.c, "profile", False) and step == self.start + 1:
                counted = self.clock.products = Products(*self.speeds())
            with counted:
                yield step
            self.clock.end(time.perf_counter() - began)
            self.bar.update()
        self.bar.close()

    def speeds(self):
        """FLOPs and bytes a second of the run's device, in the dtype of its products."""
        return product_rate(self.c.device, getattr(torch, self.c.dtype)), bandwidth(self.c.device)

    def phase(self, part):
        """A step's next part, until another one or the step's row, which says its seconds as
        t_part."""
        self.clock.next(part)

    def log(self, step, show=False, **metrics):
        """What is true after `step` steps: one row to log.jsonl, at most one aligned line in two
        seconds to the terminal (always with show). Stops the run when the loss or the gradient norm
        is not finite."""
        self.begin()
        row = ({"step": step, "time": round(time.time() - self.t0, 2)}
               | {k: float(v) for k, v in (metrics | self.clock.row()).items()})
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        bad = [k for k in row if re.search(r"(^|[ _])(loss|norm)$", k)
               and not math.isfinite(row[k])]
        if bad:
            self.stop_for(bad[0], f"became {row[bad[0]]}", step)
        now = time.time()
        if self.quiet:
            return
        if now - self.shown > 2 or show or step == self.total:
            self.shown = now
            text = "  ".join(f"{k} {v:<9.4g}" for k, v in row.items() if k not in ("step", "time"))
            tqdm.write(f"step {step:>5}  {row['time']:>6.0f}s  {text}")
            sys.stdout.flush()

    def stop_for(self, what, how, step):
        """UserError: something is not finite any more, and where the last good weights are."""
        good = (f"the last good checkpoint is {self.last}" if self.last else
                "no checkpoint had been saved")
        raise UserError(f"{what} {how} at step {step}; {good}; try a lower --lr")

    def check(self, step, *models):
        """UserError unless all weights are finite: before they are evaluated or saved."""
        for model in models:
            if bad := not_finite(dict(model.named_parameters())):
                self.stop_for(f"the weight {bad}", "is not finite", step)

    def say(self, text):
        """A line of prose (samples, evaluations) that does not tear the progress bar."""
        if not self.quiet:
            tqdm.write(text)
            sys.stdout.flush()

    def save(self, step, write, **state):
        """Checkpoint after `step` steps: write(folder) makes the Hugging Face folder, `state` goes
        to state.pt (what torch.load(weights_only=True) reads). Gets its final name only when it is
        complete and all of it finite; only then older ones go, down to --keep. Of several ranks
        only the first writes."""
        name = f"step-{step:06d}"
        if self.quiet or self.last == self.folder / name:
            return
        self.put(name, write, step, {"state.pt": plain(dict(state, step=step))})
        self.last = self.folder / name
        mine = sorted((int(m[1]), k) for k in self.info["made"] if (m := STEP.fullmatch(k)))
        for _, old in mine[:-self.c.keep]:
            self.remove(old)
        self.write_info()

    def put(self, name, write, step=0, states=()):
        """Make the folder `name` of this run: write(folder), and torch.save of {file: state}. It
        gets its name when it is complete and all of it finite; what stood there goes if this run
        made it, else it is set aside. UserError, without a trace of the folder, if it cannot be
        written or is not finite."""
        self.begin()
        tmp = self.folder / f".{name}-{os.getpid()}.tmp"
        self.info |= dict(writing=tmp.name)
        self.write_info()
        try:
            tmp.mkdir()
            write(tmp)
            for file, state in dict(states).items():
                torch.save(state, tmp / file)
            bad = not_finite_in(tmp) or not_finite(dict(states))
        except (OSError, SafetensorError, RuntimeError) as e:
            shutil.rmtree(tmp, ignore_errors=True)
            if type(e) is RuntimeError and not FULL_DISK.search(str(e)):
                raise
            why = (str(e) or type(e).__name__).splitlines()[0]
            raise UserError(f"{self.folder / name} cannot be written ({why}): free some space or "
                            f"choose another --out; {self.last or 'no checkpoint'} is the "
                            "newest") from None
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)
            raise
        if bad:
            shutil.rmtree(tmp)
            self.stop_for(f"the weight {bad}", "is not finite", step)
        files = sorted(str(p.relative_to(tmp)) for p in tmp.rglob("*") if p.is_file())
        self.remove(name)
        if (self.folder / name).exists():
            set_aside(self.folder / name)
        os.replace(tmp, self.folder / name)
        self.info["made"][name] = files
        self.info["marks"][name] = mark_of(self.folder / name, files)
        del self.info["writing"]
        self.write_info()

    def remove(self, name):
        """Remove a folder that this run made: the files that it wrote there, then what is empty.
        MODEL_FILES go first: what a kill leaves of it is no checkpoint."""
        folder = self.folder / name
        if re.fullmatch(r"\.[\w.-]+-\d+\.tmp", name):          # half written: all of it is ours
            shutil.rmtree(folder, ignore_errors=True)
        self.info["marks"].pop(name, None)
        files = [Path(x) for x in self.info["made"].pop(name, [])]
        files = [x for x in files if Path(name).name == name and not x.is_absolute()
                 and ".." not in x.parts]
        for file in sorted(files, key=lambda x: str(x) not in MODEL_FILES):
            (folder / file).unlink(missing_ok=True)
        inside = {folder / parent for file in files for parent in file.parents}
        for path in sorted(inside, key=lambda x: -len(x.parts)):
            with contextlib.suppress(OSError):                 # the user keeps something there
                path.rmdir()

    def stage(self, name, write):
        """The folder of one stage of a run with several: write(folder) makes it, or a resumed run
        has it."""
        final = self.folder / name
        if (final / "stage.pt").exists():
            self.at = read_state(final / "stage.pt")["step"]
            return final
        self.cut()

        def whole(folder):
            write(folder)
            torch.save(dict(step=self.at), folder / "stage.pt")
        self.put(name, whole, self.at)
        return final

    def cut(self):
        """Drop from a resumed run's log what comes after the finished stages: it is made again."""
        if self.c.resume:
            self.begin()
            self.file.close()
            rows = [r for r in read_log(self.folder) if r["step"] <= self.at]
            write_text(self.folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
            self.file = open(self.folder / "log.jsonl", "a")

    def expect_large(self, weights):
        """large_blocks_go_back() where the models that train are so large that it is worth it."""
        if weights > LARGE:
            large_blocks_go_back()

    def memory(self):
        """Bytes that this process holds now, but for what a resumed run's state.pt was read into,
        and bytes that it may hold in all."""
        read = tensor_bytes(self.state) if self.c.device == "cpu" else 0
        return held_bytes(self.c.device) - read, room_bytes(self.c.device)

    def outlook(self, peak, at, remedies):
        """What the run will hold at its peak, in bytes; and what cli() answers where memory runs
        out all the same: at which settings, and which hold less, in words."""
        self.peak = peak
        OUTLOOK.update(at=f" at {at}", remedies=remedies)

    def finish(self, **metrics):
        """Record the run's result in run.json (which marks it finished), and return it."""
        self.begin()
        if self.peak:
            most = peak_bytes(self.c.device)
            self.info["memory"] = dict(peak=most, predicted=self.peak)
            self.say(f"  peak memory {most / 1e9:.2f} GB, predicted {self.peak / 1e9:.2f}")
        if getattr(self.c, "profile", False):
            self.say("\n".join(self.clock.table()))
        kept = {k: x.values for k, x in metrics.items() if isinstance(x, MeanOf)}
        if kept:
            write_text(self.folder / "values.json", json.dumps(kept))
        self.info["result"] = {k: float(v) for k, v in metrics.items()}
        self.write_info()
        return self.info["result"]


def batch_indices(n, batch, step, seed):
    """The rows of optimizer step `step`: [batch] indices into n examples, reshuffled every epoch.

    A pure function of its arguments, so that a resumed run needs no data cursor. Raises UserError
    if n is 0.
    """
    if n == 0:
        raise UserError("the data set is empty: nothing to train on; check --data")
    flat = range(step * batch, (step + 1) * batch)
    order = {}
    for epoch in {i // n for i in flat}:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order[epoch] = torch.randperm(n, generator=generator)
    return torch.stack([order[i // n][i % n] for i in flat])


# --- the curve ------------------------------------------------------------------------------------


def pyplot():
    """matplotlib.pyplot on the file backend; imported late because it costs a second."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.alpha": 0.25, "font.size": 9, "legend.frameon": False,
                         "figure.dpi": 120})
    return plt


def draw(folder, curves):
    """curve.png from log.jsonl. curves: {panel title: [keys]}; a key never logged is left out."""
    rows, panels = read_log(folder), {}
    logged = dict.fromkeys(k for r in rows for k in r)       # "loss", or of a stage "member-0 loss"
    for title, keys in curves.items():
        found = [k for key in keys for k in logged if k == key or k.endswith(f" {key}")]
        panels |= {title: found} if found else {}
    if not panels:
        return
    plt = pyplot()
    fig, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 2.8), squeeze=False)
    for ax, (title, keys) in zip(axes[0], panels.items()):
        for key in keys:
            xy = [(r["step"], r[key]) for r in rows if key in r]
            ax.plot(*zip(*xy), marker="o" if len(xy) < 40 else "", ms=3, lw=1.4,
                    label=key.replace("_", " "))
        ax.set(title=title, xlabel="step")
        ax.legend()
    fig.tight_layout()
    tmp = Path(folder) / f".curve-{os.getpid()}.png"
    fig.savefig(tmp)
    os.replace(tmp, Path(folder) / "curve.png")
    plt.close(fig)


# --- a script's source: its chapters, what a run reaches of it, --eject ---------------------------


HEADING = re.compile(r"# === ([\w, ]+): (.*?)(?: =+)?$")
SIZES = ("tiny",)                        # presets of size: they go with every method
HERE = {"config", "out", "device", "resume", "stop"}     # of this one run, not of a method
APART_OF_SFT = {"base", "tokenizer", "summary"}          # chapters that an ejected script imports
MAIN = {"launch", "cli", "Config", "PRESETS", "AXES", "train"}                # an ejected main's
APART = {"Config", "PRESETS", "CURVES", "AXES", "main"}  # say how a run is asked for and shown


def headings(text):
    """[(names, what it says)] of a script's chapters."""
    return [(m[1], m[2]) for line in text.splitlines() if (m := HEADING.match(line))]


class Unit:
    """A statement at the top level of a module: what it defines, what it uses, its source.

    rows: [(table, key, value)] of assignments to rows of tables, TABLE["key"] = value; parameters:
    the positional arguments of functions in it, what they ask the loop for, and their endings.
    """

    def __init__(self, node, first):
        self.node, self.first, self.last = node, first, node.end_lineno
        self.defines, self.rows = set(), []
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            self.defines = {node.name}
        elif imports(node):
            self.defines = {(x.asname or x.name).partition(".")[0] for x in node.names}
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                self.assign(target, node.value)
        else:
            self.defines = {x.id for x in ast.walk(node)
                            if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
        self.uses = set() if self.rows else names_in(node)
        functions = [x for x in ast.walk(node) if isinstance(x, ast.FunctionDef)]
        self.parameters = endings(a.arg for x in functions for a in x.args.args)

    def assign(self, target, value):
        """Note what an assignment defines: names, or rows of tables."""
        if isinstance(target, ast.Tuple):
            same = isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts)
            for i, x in enumerate(target.elts):
                self.assign(x, value.elts[i] if same else value)
        elif isinstance(target, ast.Name):
            self.defines.add(target.id)
        elif isinstance(target, ast.Subscript) and hasattr(target.value, "ctx"):
            key = target.slice.value if isinstance(target.slice, ast.Constant) else None
            self.rows.append((last_name(target.value), key, value))


def endings(names):
    """Names, and what is left of each without a prefix: chosen_ratio asks for ratio."""
    parts = [name.split("_") for name in names]
    return {"_".join(words[i:]) for words in parts for i in range(len(words))}


def imports(node):
    """Whether a statement is an import."""
    return isinstance(node, (ast.Import, ast.ImportFrom))


def last_name(node):
    """RULES of RULES and of optim.RULES."""
    return node.id if isinstance(node, ast.Name) else node.attr


def names_in(node):
    """The names that a piece of syntax reads, and "module.name" of attributes of a name."""
    out = {x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load)}
    return out | {f"{x.value.id}.{x.attr}" for x in ast.walk(node)
                  if isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name)}


@functools.lru_cache(64)
def units_of(text):
    """The statements of a module's text, each with the comments that stand right before it."""
    tree, lines, out, after = ast.parse(text), text.splitlines(), [], 0
    for node in tree.body:
        first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", []))])
        while first - 2 >= after and re.match(r"#(?! (===|---))", lines[first - 2]):
            first -= 1
        out.append(Unit(node, first))
        after = node.end_lineno
    return out


def table_rows(unit, tables):
    """{key: value} of a statement TABLE = dict(key=value, …) of one of the tables, else None."""
    if not (unit.defines & tables.keys() and isinstance(unit.node, ast.Assign)):
        return None
    call = unit.node.value
    if not (isinstance(call, ast.Call) and getattr(call.func, "id", "") == "dict"):
        return None
    return {x.arg: x.value for x in call.keywords if x.arg}


def reach(text, roots, tables, values=()):
    """What of a module the roots (names) come to: ({index of unit: kept rows or None}, names used).

    tables: {an axis's table: the row that is used}; of another table that chapters fill, a row is
    kept if a function that is kept has an argument of its name, or it is among `values`.
    """
    units, kept, names, asked = units_of(text), {}, set(roots), endings(values)
    while True:
        before = len(kept), len(names), len(asked), sum(len(x or ()) for x in kept.values())
        for i, unit in enumerate(units):
            rows = [x for x in unit.rows if x[0] in names and row_is_used(x, tables, asked)]
            if rows:
                kept[i] = rows
                names |= set().union(*(names_in(value) for *_, value in rows))
            elif unit.defines & names:
                own = table_rows(unit, tables)
                if own is None:
                    kept[i] = None
                    names |= MAIN if unit.defines == {"main"} else unit.uses
                else:
                    table = next(iter(unit.defines))
                    kept[i] = [(table, k, v) for k, v in own.items() if k == tables[table]]
                    names |= set().union(*(names_in(v) for _, _, v in kept[i]))
                asked |= unit.parameters
        if before == (len(kept), len(names), len(asked), sum(len(x or ()) for x in kept.values())):
            return kept, names


def row_is_used(row, tables, asked):
    """Whether a run reads TABLE["key"] = …: the row of its axis, or a name that something asks
    for. asked: names and their endings."""
    table, key, _ = row
    if table in tables:
        return tables[table] == key
    if table == "PRESETS":
        return key in SIZES
    return key is None or key in asked


def tables_of(text, c, axes):
    """{name of an axis's table: the row that this run uses}, read from AXES = dict(axis=TABLE,
    …)."""
    out = {}
    for unit in units_of(text):
        if "AXES" in unit.defines:
            for x in unit.node.value.keywords:
                if isinstance(x.value, (ast.Name, ast.Attribute)) and x.arg in axes:
                    row = getattr(c, x.arg, next(iter(axes[x.arg])))
                    out[last_name(x.value)] = row if row in axes[x.arg] else "PATH"
    return out


@functools.lru_cache(4096)
def code_in(unit):
    """A statement's syntax tree as text, without docstrings: comments and line breaks are not in
    it."""
    dump = ast.dump(unit.node)
    for x in ast.walk(unit.node):
        if isinstance(x, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(x) is not None:
            dump = dump.replace(ast.dump(x.body[0]), "", 1)
    return dump


@functools.lru_cache(4096)
def fields_in(unit):
    """The fields of a Config c that a statement reads."""
    return frozenset(x.attr for x in ast.walk(unit.node) if isinstance(x, ast.Attribute)
                     and getattr(x.value, "id", "") == "c")


@functools.lru_cache(64)
def attributes_in(text):
    """The names of all attributes that a module's text reads."""
    return frozenset(x.attr for x in ast.walk(ast.parse(text)) if isinstance(x, ast.Attribute))


def code_of(script, c, axes, root="train", home=Path(__file__).parent.parent):
    """A hash of the code that a run of `script` goes through, in it and in the modules below it,
    and of the defaults of the fields that this code reads.

    home: the folder of the project's files."""
    text = (home / f"{script}.py").read_text()
    read = attributes_in(text)
    tables = tables_of(text, c, {k: rows for k, rows in axes.items() if k in read})
    values = {x for k, x in dataclasses.asdict(c).items() if isinstance(x, str) and k in read}
    code, fields = code_reached(home, script, root, tuple(sorted(tables.items())),
                                frozenset(values))
    usual = [f"{x.name}={x.default!r}" for x in dataclasses.fields(c)
             if x.name in fields - (FREE - {"steps"})]
    return hashlib.sha256((code + " ".join(sorted(usual))).encode()).hexdigest()


@functools.lru_cache
def code_reached(home, script, root, tables, values):
    """A hash of the code that is reached, with the rows of tables that are used and the values that
    name rows of others -> it, {field that the code reads of a Config}"""
    tables, done, mark, fields = dict(tables), {}, hashlib.sha256(), set()
    todo = [(script, {root, *tables})]
    while todo:
        module, roots = todo.pop()
        path = home / f"{module.replace('.', '/')}.py"
        roots = roots & {"batch_indices"} if module == "data.run" else roots  # the order of data
        if not path.exists() or roots <= done.get(module, set()):
            continue
        done[module] = done.get(module, set()) | roots
        kept, names = reach(path.read_text(), done[module] - APART, tables, values)
        units = units_of(path.read_text())
        todo += [x for i in kept for x in imports_of(units[i].node, names)]
    for module in sorted(done):
        path = home / f"{module.replace('.', '/')}.py"
        kept, _ = reach(path.read_text(), done[module] - APART, tables, values)
        units = units_of(path.read_text())
        for i in sorted(kept):
            if not units[i].defines & APART and not imports(units[i].node):
                rows = kept[i]
                fields |= fields_in(units[i])
                mark.update(code_in(units[i]).encode() if rows is None else
                            "".join(f"{t} {k} {ast.dump(v)}" for t, k, v in rows).encode())
    return mark.hexdigest(), frozenset(fields)


def imports_of(node, names):
    """[(module, names of it)] that an import statement brings to code that uses `names`."""
    if isinstance(node, ast.ImportFrom):
        wanted = [x for x in node.names if (x.asname or x.name) in names]
        inside = {x.name for x in wanted}
        below = [(f"{node.module}.{x.name}", attributes(x.asname or x.name, names)) for x in wanted]
        return [(node.module, inside), *below]
    if isinstance(node, ast.Import):
        return [(x.name, attributes(x.asname or x.name, names)) for x in node.names]
    return []


def attributes(module, names):
    """{name} of every "module.name" among names."""
    return {x.partition(".")[2] for x in names if x.startswith(f"{module}.")}


def eject(path, file, c, f, axes, options, idle=()):
    """Write the script of one configuration: what of `path` it uses, its values as defaults.

    idle: fields that this configuration does not read. The file stands beside model.py, kernels.py,
    optim.py, sft.py and data/. Raises UserError if it exists, or has no name for a script.
    """
    file = check_ejected_name(Path(file), c)
    text, before = bases_apart(path.read_text()), None
    while text != before:                            # a field less may leave another one unread
        units, tables, before = units_of(text), tables_of(text, c, axes), text
        left = {x.name: x.default for x in dataclasses.fields(c) if x.name in fields_of(text, c)}
        values = {getattr(c, x.name) for x in dataclasses.fields(c)
                  if isinstance(getattr(c, x.name), str)}
        values |= {k for k, default in left.items() if getattr(c, k) != default}
        values |= {x for fn in vars(f).values() for x in fn.keywords.values() if isinstance(x, str)}
        kept, names = reach(text, {"train", "main", "cli", *tables}, tables, values)
        text = without_unread(text, [units[i] for i in kept], tables)
    lines, known = text.splitlines(), fields_of(text, c)
    asked = {*options, *(x.partition("=")[0] for x in entries(c.config))}
    known -= {"dtype"} - asked                       # auto is another on every machine
    for unit in units:
        if "AXES" in unit.defines:
            known = known.union(*(vars(f)[x.arg].keywords for x in unit.node.value.keywords))
    idle, given = sorted(known & {*idle}), arguments_elsewhere(units, rows_used(c, axes), f)
    names |= {"partial"} if given else set()
    names |= set() if "ranks=True" in text else {"refuse_ranks"}
    pieces = [(0, docstring_of(path, file, text, units, kept, c, options))]
    for i in sorted(kept):
        gap = "\n" * (not lines[units[i].first - 2].strip()) if imports(units[i].node) else ""
        pieces.append((units[i].first, gap + source_of(
            units[i], kept[i], lines, names, (known, file.stem, idle), c, f)))
    for k, line in enumerate(lines, 1):                        # headings of what is left
        if re.match(r"# (===|---)", line):
            end = next((j for j, x in enumerate(lines[k:], k + 1) if re.match(r"# (===|---)", x)),
                       len(lines) + 1)
            if any(k < first < end for first, _ in pieces):
                pieces.append((k, line))
    pieces += [(len(lines) + 1, given)] if given else []
    pieces.append((len(lines) + 2, 'if __name__ == "__main__":\n    cli(main)'))
    out = joined_pieces(sorted(pieces))
    ast.parse(out)
    write_text(file, out)
    print(f"{file}: {len(file.read_text().splitlines())} lines of {path.name}'s "
          f"{len(path.read_text().splitlines())}; "
          + (f"python {file} --config tiny shows that it turns"
             if file.resolve().parent == path.resolve().parent
             else f"it runs in {path.resolve().parent}, beside model.py"))
    return file


def check_ejected_name(file, c):
    """The path of a script to write; UserError for a name that is taken, or no module's."""
    word = next((x for x in entries(c.config) if x.isidentifier()), "mine")
    if file.suffix != ".py" or not file.stem.isidentifier() or keyword.iskeyword(file.stem):
        raise UserError(f"--eject {file}: give the name of a script, for example my_{word}.py")
    if file.exists():
        raise UserError(f"--eject {file}: it is there already; choose another name")
    if not file.parent.is_dir():
        raise UserError(f"--eject {file}: there is no folder {file.parent}")
    if file.stem in sys.stdlib_module_names or importlib.machinery.PathFinder.find_spec(file.stem):
        raise UserError(f"--eject {file}: a module is called {file.stem}; choose another name, for "
                        f"example my_{file.stem}.py")
    if set(SIZES) & {*entries(c.config)}:
        raise UserError(f"--eject with {' '.join(SIZES)}: an ejected script has it as a preset of "
                        "its own; leave it out here")
    return file


def bases_apart(text):
    """sft.py's text with the functions of its chapters APART_OF_SFT imported from it, not defined:
    a script of one method knows no base's presets. Any other script's text as it is."""
    lines, moved = text.splitlines(), []
    marks = {i: m[1] for i, line in enumerate(lines, 1) if (m := HEADING.match(line))}
    if not APART_OF_SFT <= {*marks.values()}:
        return text
    units = units_of(text)
    for unit in units:
        chapter = next((names for i, names in reversed(marks.items()) if i < unit.first), "")
        if chapter in APART_OF_SFT and isinstance(unit.node, ast.FunctionDef):
            moved.append(unit)
    for unit in reversed(moved):
        del lines[unit.first - 1:unit.last]
    names = ", ".join(sorted(unit.node.name for unit in moved))
    lines.insert(max(x.last for x in units if imports(x.node)), f"from sft import {names}")
    return "\n".join(lines) + "\n"


def without_unread(text, kept, tables):
    """A script's text without the fields of its Config, and the axes of their names, that none of
    the statements `kept` reads, nor a module below, and without the fields of axes of one row."""
    lines, home, read, of_c = text.splitlines(), Path(__file__).parent.parent, set(), set()
    for path in (*home.glob("data/*.py"), home / "model.py", home / "sft.py"):
        of_c |= set(re.findall(r"\bc\.(\w+)", path.read_text()))
    for unit in kept:
        if not unit.defines & {"Config", "AXES", "PRESETS"}:
            for x in ast.walk(unit.node):
                read |= {x.value} if isinstance(x, ast.Constant) else set()
                if isinstance(x, ast.Attribute):
                    read.add(x.attr)
                    of_c |= {x.attr} if "c" in (getattr(x.value, "id", ""),
                                                getattr(x.value, "attr", "")) else set()
    fields, single, defined = config_fields(text), set(), set()
    for unit in units_of(text):
        defined |= unit.defines if isinstance(unit.node, ast.Assign) else set()
        if "AXES" in unit.defines:
            axes = [x for x in unit.node.value.keywords if x.arg in read | of_c
                    or x.arg not in fields]
            single = {x.arg for x in axes if getattr(x.value, "id", "") in defined
                      and tables[x.value.id] != "PATH"}
            whole = textwrap.fill(f"AXES = dict({', '.join(segment(x, lines) for x in axes)})", 100,
                                  subsequent_indent=" " * 12)
            lines[unit.node.lineno - 1:unit.node.end_lineno] = whole.splitlines()
    for name, node in reversed(fields.items()):
        if name not in HERE | of_c and (name in single or name not in read):
            del lines[node.lineno - 1:node.end_lineno]
    return "\n".join(lines) + "\n"


def config_fields(text):
    """{name: its statement} of the fields that a script's Config has of its own."""
    return {x.target.id: x for unit in units_of(text) if "Config" in unit.defines
            for x in unit.node.body if isinstance(x, ast.AnnAssign)}


def fields_of(text, c):
    """The names of a Config's fields: those that every run has, and those left in the text."""
    return {*config_fields(text), *(x.name for x in dataclasses.fields(type(c).__bases__[0]))}


def joined_pieces(pieces):
    """The text of a script: two blank lines around definitions and headings, none between
    imports."""
    out, before = "", ""
    for _, piece in pieces:
        kind = piece.lstrip().split(None, 1)[0]
        kind = "import" if kind in ("import", "from") else "heading" if re.match(
            r"# (===|---)", piece) else "big" if re.match(
            r"(#.*\n)*(@|def |class |if __name__)", piece) else "small"
        gap = "" if not out else "\n" if kind == before == "import" else "\n\n" if (
            before == "heading") else "\n\n\n" if {kind, before} & {"big", "heading"} else "\n"
        out, before = out + gap + piece, kind
    return out + "\n"


def docstring_of(path, file, text, units, kept, c, options):
    """The docstring of an ejected script: the method, its paper, where it comes from, the
    letters."""
    marks = [(i, m) for i, line in enumerate(text.splitlines(), 1) if (m := HEADING.match(line))]
    asked, named = set(entries(c.config)), []
    for (begin, m), end in zip(marks, [*(i for i, _ in marks[1:]), len(text.splitlines()) + 1]):
        used = [k for k in kept if begin < units[k].first < end]
        named += [m] if used and asked & set(re.split(r", *", m[1])) else []
    doc = inspect.cleandoc(ast.get_docstring(ast.parse(text)) or "")
    about = "; ".join(f"{m[1]} ({m[2]})" for m in named) or doc.splitlines()[0].partition(" - ")[2]
    words = textwrap.wrap(f"{file.name} - {about}", 98, break_long_words=False)
    given = shlex.join(word for k, v in options.items() for word in (f"--{k}", str(v)))
    given = given.encode("utf-8", "backslashreplace").decode()
    given = given.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    come = textwrap.wrap(f"Written by `python {path.name} {given} --eject {file.name}`, commit "
                         f"{commit() or 'unknown'}: the spine and the chapters that it uses. It "
                         "stands beside model.py, kernels.py, optim.py, sft.py and data/.", 98)
    rest = re.search(r"^(Letters|Watch)\b.*", doc, re.M | re.S)
    runs = [f"    python {file.name}        # --config tiny: small, shows that all turns"]
    return "\n".join(['"""', *words, "", *runs, "", *come, *([rest[0].rstrip()] if rest else []),
                      '"""'])


def source_of(unit, rows, lines, names, fields, c, f):
    """A statement's text in an ejected script: rows, imports and defaults cut to what is used."""
    node = unit.node
    if imports(node):
        used = [x for x in node.names if (x.asname or x.name).partition(".")[0] in names]
        words = {f"{x.name} as {x.asname}" if x.asname else x.name for x in used}
        if "launch" in words:                                  # main calls others in its place
            words = words - {"launch"} | {"configure"} | names & {"refuse_ranks"}
        words = ", ".join(sorted(words))
        whole = f"from {node.module} import " if isinstance(node, ast.ImportFrom) else "import "
        if len(whole + words) <= 100:
            return whole + words
        return textwrap.fill(f"{whole}({words})", 100, subsequent_indent=" " * (len(whole) + 1))
    if unit.defines == {"PRESETS"}:
        rows = [x for x in getattr(node.value, "keywords", ()) if x.arg in SIZES]
        return "PRESETS = dict(\n    " + ",\n    ".join(
            size_preset(x, lines, fields[0]) for x in rows) + ")"
    if unit.defines == {"main"}:
        return main_of(fields[1], fields[2], "refuse_ranks" in names)
    if unit.defines == {"train"}:                              # its runs' folder has its name
        lines = [re.sub(r'(Run\(c, f, )"\w+"', rf'\1"{fields[1]}"', line) for line in lines]
    if rows is not None and not unit.rows:
        table = next(iter(unit.defines))
        row = ", ".join(f"{k}={segment(v, lines)}" for _, k, v in rows)
        return textwrap.fill(f"{table} = dict({row})", 100, break_long_words=False,
                             subsequent_indent=" " * len(f"{table} = dict("))
    if rows is not None:
        names, values = [f'{t}["{k}"]' for t, k, _ in rows], [segment(v, lines) for *_, v in rows]
        together = f"{', '.join(names)} = {', '.join(values)}"
        apart = "\n".join(f"{name} = {value}" for name, value in zip(names, values))
        return together if len(together) <= 100 else apart
    if unit.defines == {"Config"}:
        return config_with(unit, lines, fields[0], c)
    places = []
    if isinstance(node, ast.FunctionDef):
        mine = [fn for fn in vars(f).values() if fn.func.__name__ == node.name
                and fn.func.__module__ == type(c).__module__]
        for arg, default in zip(node.args.kwonlyargs, node.args.kw_defaults):
            if mine and mine[0].keywords[arg.arg] != hyper(mine[0].func)[arg.arg]:
                places.append((default, mine[0].keywords[arg.arg]))
    return replaced(unit, lines, places)


def arguments_elsewhere(units, rows, f):
    """A run's arguments of functions that stand in another module, as lines of an ejected script:
    where a function stands in the script they are its defaults."""
    here = {unit.node.name for unit in units if isinstance(unit.node, ast.FunctionDef)}
    axes = [x.arg for unit in units if "AXES" in unit.defines for x in unit.node.value.keywords]
    out = []
    for axis in axes:
        fn, usual = vars(f)[axis], hyper(vars(f)[axis].func)
        given = {k: x for k, x in fn.keywords.items() if x != usual[k]}
        if given and fn.func.__name__ not in here:
            row = rows[axis]
            words = ", ".join(f"{k}={literal(x)}" for k, x in given.items())
            out.append(f'AXES["{axis}"] = {{"{row}": partial(AXES["{axis}"]["{row}"], {words})}}')
    return "\n".join(out)


def main_of(name, idle, alone):
    """The main of an ejected script: it trains, and refuses the fields that it does not read, and
    (alone) to be started on several ranks."""
    out = (f'def main(argv=None):\n    """python {name}.py …: see the docstring above, or '
           f'--help."""\n' + f'    refuse_ranks("{name}.py")\n' * alone)
    if not idle:
        return out + "    return train(*configure(Config, PRESETS, AXES, __doc__, argv))"
    words = ", ".join(f'"{k}"' for k in idle) + "," * (len(idle) == 1)
    unread = textwrap.fill(f"unread = ({words})", 96, subsequent_indent=" " * 10)
    call = ("return train(*configure(Config, PRESETS, AXES, __doc__, argv, lambda c, f: "
            'dict.fromkeys(\n        unread, (False, "other methods"))))')
    return f"{out}{textwrap.indent(unread, ' ' * 4)}\n    {call}"


def size_preset(row, lines, known):
    """A size preset's text without the keys that are not here any more."""
    keys = ", ".join(segment(x, lines) for x in row.value.keywords if x.arg in known)
    return textwrap.fill(f"{row.arg}=dict({keys})", 94, break_long_words=False,
                         subsequent_indent=" " * (len(row.arg) + 10))


def config_with(unit, lines, known, c):
    """The Config's source with this run's values as its defaults; those of every run are added."""
    own, places, more = config_fields("\n".join(lines)), [], []
    for x in dataclasses.fields(c):
        value = getattr(c, x.name)
        if x.name in HERE or value == x.default or x.name not in known:
            continue
        if x.name in own:
            places.append((own[x.name].value, value))
        else:
            kind = x.type.__name__ if isinstance(x.type, type) else type(x.default).__name__
            more.append(f"    {x.name}: {kind} = {literal(value)}")
    return "\n".join([replaced(unit, lines, places), *more])


def replaced(unit, lines, places):
    """A statement's source with (syntax node, value) written in the nodes' places."""
    out = [line.encode() for line in lines[unit.first - 1:unit.last]]
    for node, value in sorted(places, key=lambda x: (x[0].lineno, x[0].col_offset), reverse=True):
        i = node.lineno - unit.first
        out[i] = out[i][:node.col_offset] + literal(value).encode() + out[i][node.end_col_offset:]
    return "\n".join(narrow(line.decode()) for line in out)


def narrow(line):
    """A line of at most 100 columns: its comment comes nearer, or stands above; arguments go on in
    the next line."""
    code, mark, comment = line.partition("  #")
    if len(line) <= 100:
        return line
    if mark and len(code.rstrip()) <= 100:
        code = code.rstrip()
        near, indent = f"{code}  #{comment}", len(code) - len(code.lstrip())
        return near if len(near) <= 100 else f"{' ' * indent}#{comment}\n{code}"
    cut, opened = line.rfind(", ", 0, 100), line.find("(") + 1
    if cut < 0:
        return line
    indent = opened if 0 < opened < cut else len(line) - len(line.lstrip())
    return f"{line[:cut + 1]}\n{narrow(' ' * indent + line[cut + 2:])}"


def literal(value):
    """A default as it stands in a script."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=not value.isprintable())
    return repr(value)


def segment(node, lines):
    """The source of a piece of syntax."""
    return ast.get_source_segment("\n".join(lines), node)


# --- a script's main ------------------------------------------------------------------------------


def report(run, before, after, samples):
    """The last words of a run: two samples a split, then SFT beside the policy on held-out
    prompts."""
    for prompt, text, reference in samples:
        run.say(f"  prompt     {prompt!r}\n  policy     {text!r}"
                + f"\n  reference  {reference!r}" * bool(reference))
    run.say(f"\n  held-out prompts    {'SFT':>10} {'now':>10}")
    for key in before:
        run.say(f"  {key:<18} {before[key]:>11.3f} {after[key]:>10.3f}")
    run.say(f"\n  {run.folder}: curve.png, log.jsonl; checkpoint "
            f"{run.last or '(none: no step was made)'}")


def claims_of(script):
    """The module of a script's claims, tests/claims/<script>.py, loaded only when it is asked
    for."""
    tests = Path(__file__).parent.parent / "tests"
    if not (tests / "claims" / f"{script}.py").exists():
        raise UserError(f"--claim: the claims of {script}.py are in {tests}/claims/{script}.py, "
                        "which is not there: take the folder tests/ along")
    if str(tests) not in sys.path:
        sys.path.append(str(tests))
    return importlib.import_module(f"claims.{script}")


def launch(script, Config, presets, axes, doc, train, argv=None, readers=None, ranks=False,
           instead={}):
    """A script's main: train one run, with --claim NAME every arm of a claim, or --eject FILE.

    readers: see configure; ranks: torchrun may start it. instead: {a first word: what it calls with
    the words that follow}.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    word, equals, first = argv[0].partition("=") if argv else ("", "", "")
    if word in instead:
        return instead[word]([first] * bool(equals) + argv[1:])
    setup = partial(configure, Config, presets, axes, doc, readers=readers)
    flags = {x.name: x.default for x in dataclasses.fields(Config)} | dict(power=False)
    options = dict(parse(argv, flags))
    if "power" in options and "claim" not in options:
        raise UserError("--power: say which claim it is to prepare: --claim NAME --power")
    if not ranks or "claim" in options:
        refuse_ranks(f"{script}.py" + " --claim" * ("claim" in options))
    if "help" in options:
        with contextlib.suppress(UserError, SystemExit):
            setup(argv)
        print("\n  --eject FILE: write this configuration as a script of its own, and stop")
        with contextlib.suppress(UserError):
            print("  --claim NAME, --power, --seeds 5, --jobs 0: run a claim's arms over seeds, or "
                  "with\n    --power a pilot that says how many seeds it takes; "
                  f"claims: {', '.join(claims_of(script).CLAIMS)}")
        raise SystemExit(0)
    elif "claim" in options:
        claims = claims_of(script).CLAIMS
        run_claim = sys.modules["claims"].run_from_options
        return run_claim(script, claims, setup, (presets, axes), train, options)
    elif "eject" in options:
        path = options.pop("eject")
        c, f = setup([f"--{k}={v}" for k, v in options.items()])
        idle = [k for k, (read, _) in (readers(c, f) if readers else {}).items() if not read]
        return eject(Path(inspect.getsourcefile(Config)), path, c, f, axes, options, idle)
    return train(*setup(argv))


def check_first_ratio(metrics, dtype):
    """UserError unless the first minibatch after a rollout finds π = π_old; else every later ratio
    is wrong.

    Exact to 1e-3 in float32; in bfloat16 the two passes round differently: the mean is held to 2 %.
    """
    off, limit = (metrics["worst"], 1e-3) if dtype == "float32" else (metrics["off"], 0.02)
    if off > limit:
        raise UserError(f"the first ratio after a rollout is off by {off:.2g}: the sampler is not "
                        "the policy (another temperature, dtype or weights?)")
