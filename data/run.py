"""
run.py - what goes into a run (configuration) and what comes out of it (log, curve, checkpoints,
claims).

    c, f = configure(Config, PRESETS, AXES, __doc__)  # defaults < --config a,b,my.toml < --key
    value
    with Run(c, f, "sft", CURVES) as run:             # out/sft/<name>: run.json, log.jsonl,
    curve.png, step-*
        for step in run.steps(c.steps): ...; run.log(step, loss=...); run.save(step, write, **state)

Map      1 errors   2 what a value may be   3 configure   4 several ranks   5 files   6 the run's
folder
         7 the curve   8 claims
Promise  Only files that this run made, by exact name, are ever removed or replaced; a folder that
holds
         anything else is refused. What is saved is finite. One run has one process.
"""
import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib
import weakref
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
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
    """'; did you mean …' for a mistyped word, else the whole list: the tail of an error message."""
    hit = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {hit[0]!r}?" if hit else f"; choose from {', '.join(sorted(known)) or 'nothing'}"


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
        fail(f"out of memory: try a smaller --micro, where there is one (results do not change); {first}")


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
        low = f"{'at least' if self.text[0] == '[' else 'above'} {self.low:g}" * math.isfinite(self.low)
        high = f"{'at most' if self.text[-1] == ']' else 'below'} {self.high:g}" * math.isfinite(self.high)
        return " and ".join(filter(None, (low, high))) or "finite"


Positive, Share, Fraction = Range("(0, inf)"), Range("[0, 1]"), Range("[0, 1)")
Count, Signed = Range("[1, inf)"), Range("(-inf, inf)")
NonNegative = Range("[0, inf)")          # of every number that is not annotated, unless its default is below
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
            made = {"true": True, "false": False}[str(value).lower()]
        elif isinstance(value, str) or type(value) is want or (want, type(value)) == (float, int):
            made = want(value)
        else:
            raise ValueError
    except (ValueError, KeyError, OverflowError):
        raise UserError(f"--{key} {value}: expected {want.__name__}, for example {like!r}") from None
    if get_origin(kind) is Literal and made not in get_args(kind):
        raise UserError(f"--{key} {made}: choose from {', '.join(map(str, get_args(kind)))}")
    if number:
        allowed = kind if isinstance(kind, Range) else Signed if like < 0 else NonNegative
        if made not in allowed:
            raise UserError(f"--{key} {value}: must be {allowed}")
        if abs(made) > (most := LARGEST if want is int else HUGE):
            raise UserError(f"--{key} {value}: must be at most {most}")
    if want is str and "\0" in made:
        raise UserError(f"--{key} {made!r}: a text without a zero byte is expected")
    return made


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
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, from cuda:0")
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
            if argv and not argv[0].startswith("--") and (not flag
                                                          or argv[0].lower() in ("true", "false")):
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


def layer(name, presets):
    """One --config entry, a preset's name or a TOML file's path, as a dict of keys."""
    if name.endswith(".toml"):
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
        for key, value in row.items():
            if not isinstance(value, (bool, int, float, str)):
                raise UserError(f"{name}: {key} is a {type(value).__name__}: expected a number, true, false "
                                "or a text")
        for key in row.keys() & {"config", "resume"}:
            raise UserError(f"{name}: {key} belongs on the command line, not in a file")
        return row
    if name not in presets:
        raise UserError(f"no preset {name!r}{nearest(name, presets)}")
    return presets[name]


def bind(axis, rows, row, values):
    """The function of an axis's row, its keyword-only arguments bound to the values that are meant
    for it."""
    if row not in rows and not ("PATH" in rows and Path(row).exists()):
        missing = "; there is no such folder or file" * ("PATH" in rows and "/" in row)
        raise UserError(f"no {axis} {row!r}{missing or nearest(row, rows)}")
    fn, numbers = rows.get(row) or rows["PATH"], {}
    for key, default in hyper(fn).items():
        value = values.get(f"{axis}.{key}", values.get(key, default))
        numbers[key] = cast(key, value, default, kinds(fn).get(key))
    return partial(fn, **numbers)


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
    if any(k == "help" for k, _ in given):
        print(help_text(Config, presets, axes, doc))
        raise SystemExit(0)
    names = [n for k, v in given if k == "config" for n in v.split(",") if n]
    values, typed = {}, {k for k, _ in given}  # typed: keys that the user wrote, which must be read
    for name in names:
        row = layer(name, presets)
        values |= row
        typed |= set(row) if name.endswith(".toml") else set()
    values |= dict(given) | dict(config=",".join(names))

    resolved = {k: cast(k, values.pop(k, x.default), x.default, x.type) for k, x in fields.items()}
    bound = {axis: bind(axis, rows, resolved.get(axis, next(iter(rows))), values)
             for axis, rows in axes.items()}
    known = {f"{a}.{k}" for a, fn in bound.items() for k in fn.keywords} | {
        k for fn in bound.values() for k in fn.keywords}
    for key in values:
        owners = [a for a, rows in axes.items() for fn in rows.values() if key in hyper(fn)]
        if key not in known and (key in typed
                                 or not owners):  # a preset's key is idle under another row
            owners = [f"{a} {r!r}" for a, rows in axes.items() for r, fn in rows.items()
                      if key in hyper(fn)]
            hint = f"; it belongs to {' or '.join(owners)}" if owners else nearest(key, [*fields,
                                                                                         *known])
            raise UserError(f"unknown key --{key}{hint}")

    if "device" in resolved:
        resolved["device"] = device_of(resolved["device"])
        if resolved["device"].startswith("cuda:"):  # cuda:1 is then the device of every launch, too
            torch.cuda.set_device(resolved["device"])
    if resolved.get("dtype") == "auto":
        resolved["dtype"] = "bfloat16" if resolved["device"].startswith("cuda") else "float32"
    if resolved.get("dtype", "float32") not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {resolved['dtype']}: choose float32 or bfloat16")
    c, f = Config(**resolved), SimpleNamespace(**bound)
    for key, (read, reader) in (readers(c, f) if readers else {}).items():
        given = [key, *(bound[key].keywords if key in bound else ())]      # and an axis's arguments
        if idle := [x for x in given if not read and {x, f"{key}.{x}"} & typed]:
            raise UserError(f"--{idle[0]}: this run does not read it; --{key} is for {reader}")
    return c, f


def help_text(Config, presets, axes, doc):
    """--help: the script's docstring, fields with comments and defaults, presets, each row's
    arguments."""
    comments = dict(re.findall(r"^ +(\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    lines = [inspect.cleandoc(doc or ""), "", "options (--key value):"]
    lines += [f"  --{x.name:<12} {str(x.default)!s:<12} {comments.get(x.name, '')}"
              for x in dataclasses.fields(Config)]
    lines += ["",
              "  --claim NAME, --seeds 5, --jobs 0: run a claim's arms over seeds, instead of one run"]
    lines += ["", "presets (--config a,b or a .toml file, left to right):"]
    lines += [f"  {name:<14} " + ", ".join(f"{k}={v}" for k, v in row.items())
              for name, row in presets.items()]
    for axis, rows in axes.items():
        lines += ["", f"--{axis}, and what each reads:" if axis in comments else f"{axis}:"]
        for row, fn in rows.items():
            first = " ".join((inspect.getdoc(fn) or "").split("\n\n")[0].split())
            shown = {k: repr(v) if isinstance(v, str) and "\n" in v else v
                     for k, v in hyper(fn).items()}
            takes = {k: f" ({'|'.join(map(str, get_args(x))) or x.text})"
                     for k, x in kinds(fn).items()}
            lines.append(f"  {row:<12} {first}  " + " ".join(
                f"--{k} {v}{takes.get(k, '')}" for k, v in shown.items()))
    return "\n".join(lines)


# --- several ranks --------------------------------------------------------------------------------


def refuse_ranks(name):
    """UserError under torchrun, of a script that would do the same work on every rank."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks != "1":
        raise UserError(f"{name} runs on one rank, and would do the same {ranks} times here: start it "
                        "without torchrun (sft.py is what runs on several)")


def start_ranks(device):
    """Join torchrun's process group (gloo on CPUs, nccl on GPUs); -> (rank, how many), (0, 1)
    alone."""
    if "RANK" in os.environ and not dist.is_initialized():
        if missing := {"WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR",
                       "MASTER_PORT"} - os.environ.keys():
            raise UserError(f"RANK is set and {min(missing)} is not: start several ranks by torchrun, one "
                            "without RANK in the environment")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
            if not os.environ[name].isdigit():
                raise UserError(f"{name} is {os.environ[name]!r} in the environment: expected a number")
        if device.startswith("cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def rank():
    """This process's number among torchrun's, 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


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
        raise UserError(f"{path} cannot be written ({e.strerror}): free some space or choose another "
                        "--out") from None


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
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice in an object")
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
        raise UserError(f"{path}: expected an object {{…}}, found a {type(found).__name__}: {what}")
    return found


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
    """A hash of a checkpoint's files (by default config.json and the weights): of each the name,
    the size, and the first and the last 32 MB."""
    mark, most = hashlib.sha256(), 1 << 25
    for name in files or sorted(["config.json", *(p.name for p in folder.glob("*.safetensors"))]):
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
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0         # Windows: not told
    return used * (1 if sys.platform == "darwin" else 1024)


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
            raise UserError(f'{path}:{i}: no row of a log, {{"step", "time", …}}: {line[:60]!r}; take it out')
    return rows


STEP = re.compile(r"step-(\d{6,})")      # a checkpoint's name; by number step-1000000 comes after step-999999


def steps_of(folder):
    """A run's checkpoints, oldest first: [folder of each]. Copies and half-made ones are not among
    them."""
    found = [(int(m[1]), p) for p in Path(folder).glob("step-*")
             if (m := STEP.fullmatch(p.name)) and (p / "config.json").is_file()]
    return [p for _, p in sorted(found)]


def checkpoint(path):
    """The Hugging Face folder `path` means: itself, or the newest step of a run folder. Raises
    UserError."""
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    if steps := steps_of(path):
        return steps[-1]
    what = ("has neither config.json nor step-* folders" if path.is_dir() else
            "is a file" if path.exists() else "does not exist")
    raise UserError(f"{path} {what}: give a Hugging Face checkpoint folder or a run folder under out/")


def older_than(path):
    """The tail of an error about a run's broken checkpoint: the older one to go on from. "" outside
    a run."""
    path = Path(path)
    if not STEP.fullmatch(path.name):
        return ""
    before = [p for p in steps_of(path.parent) if int(p.name[5:]) < int(path.name[5:])]
    return (f"; the next older checkpoint is {before[-1]}: move {path} away, and --resume goes on from there"
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
        return "" if x.isfinite().all() else name or "it"
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x,
                                                                             (list, tuple)) else ()
    return next((bad for k, v in items if (bad := not_finite(v, f"{name}.{k}".strip(".")))), "")


def not_finite_in(folder):
    """not_finite of all safetensors under a folder, read back as they lie on the disk."""
    for path in sorted(Path(folder).rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if bad := not_finite(file.get_tensor(name), name):
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
        "micro", "compile"}               # may change on --resume


def settings(c, f):
    """All that decides a run's numbers, as JSON holds it: the Config's fields and each axis's
    arguments."""
    return json.loads(json.dumps(dataclasses.asdict(c) |
                                 {f"{axis}.{k}": v for axis, fn in vars(f).items()
                                  for k, v in fn.keywords.items()}))


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
        self.at = 0                                            # steps of a run's earlier stages
        self.release, rows = (lambda: None), []
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
        c, names = self.c, [Path(n).stem for n in self.c.config.split(",") if n]
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
                with contextlib.suppress(FileExistsError):     # an older run, or one that starts beside us
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
            raise UserError(f"--out {base} holds no run, but other files ({', '.join(found[:3])} …): nothing "
                            "is touched; choose a new or an empty folder")
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
            raise UserError(f"{folder}: another process is at work on this run ({who}): wait for it, or "
                            "choose another --out") from None
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
        made = sorted((int(m[1]), home / k) for k in self.info["made"] if (m := STEP.fullmatch(k)))
        if made and made[-1][1].exists() and made[-1][1] not in steps_of(home):
            raise UserError(f"{made[-1][1]} has no config.json any more{older_than(made[-1][1])}")
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
        was, new = old["config"], self.info["config"]
        for key in sorted(new.keys() | was.keys()):
            if key not in FREE and was.get(key) != new.get(key):
                raise UserError(f"--resume: {key} was {was.get(key)!r} and is now {new.get(key)!r}; "
                                f"resume with the run's own settings, or start a new run")
        for key, before in (old.get("files") or {}).items():
            if self.info["files"].get(key) != before:
                raise UserError(f"--resume: --{key} {new.get(key)} does not hold what it did when the run "
                                "began: put it back, or start a new run")

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
            yield step
            self.bar.update()
        self.bar.close()

    def log(self, step, show=False, **metrics):
        """What is true after `step` steps: one row to log.jsonl, at most one aligned line in two
        seconds to the terminal (always with show). Stops the run when the loss or the gradient norm
        is not finite."""
        self.begin()
        row = ({"step": step, "time": round(time.time() - self.t0, 2)}
               | {k: float(v) for k, v in metrics.items()})
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
        good = f"the last good checkpoint is {self.last}" if self.last else "no checkpoint had been saved"
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
        self.put(name, write, step, {"state.pt": dict(state, step=step)})
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
            raise UserError(f"{self.folder / name} cannot be written ({why}): free some space or choose "
                            f"another --out; {self.last or 'no checkpoint'} is the newest") from None
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
        config.json goes first: what a kill leaves of it is no checkpoint."""
        folder = self.folder / name
        if re.fullmatch(r"\.[\w.-]+-\d+\.tmp", name):          # half written: all of it is ours
            shutil.rmtree(folder, ignore_errors=True)
        self.info["marks"].pop(name, None)
        files = [Path(x) for x in self.info["made"].pop(name, [])]
        files = [x for x in files if Path(name).name == name and not x.is_absolute()
                 and ".." not in x.parts]
        for file in sorted(files, key=lambda x: str(x) != "config.json"):
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

    def finish(self, **metrics):
        """Record the run's result in run.json (which marks it finished), and return it."""
        self.begin()
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
        order[epoch] = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003
                                                                                 + epoch))
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
    rows = read_log(folder)
    seen = dict.fromkeys(k for r in rows for k in r)         # "loss", or of a stage "member-0 loss"
    panels = {t: [k for key in keys for k in seen if k == key or k.endswith(f" {key}")]
              for t, keys in curves.items()}
    panels = {t: keys for t, keys in panels.items() if keys}
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


# --- claims ---------------------------------------------------------------------------------------


def report(run, before, after, look):
    """The last words of a run: two samples a split, then SFT beside the policy on held-out
    prompts."""
    for prompt, text, reference in look:
        run.say(f"  prompt     {prompt!r}\n  policy     {text!r}\n  reference  {reference!r}")
    run.say(f"\n  held-out prompts    {'SFT':>10} {'now':>10}")
    for key in before:
        run.say(f"  {key:<18} {before[key]:>11.3f} {after[key]:>10.3f}")
    run.say(f"\n  {run.folder}: curve.png, log.jsonl; checkpoint {run.last or '(none: no step was made)'}")


def launch(script, Config, presets, axes, claims, doc, train, argv=None, readers=None, ranks=False):
    """A script's main: train one run, or with --claim NAME [--seeds 5] [--jobs 0] every arm of a
    claim.

    jobs: arms trained at once, each on one thread (0: one per core, four at most). Other keys go to
    every arm; those that an arm or the seeds set are refused. readers: see configure; ranks:
    torchrun may start it.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    setup = partial(configure, Config, presets, axes, doc, readers=readers)
    options = dict(parse(argv, {x.name: x.default for x in dataclasses.fields(Config)}))
    if not ranks or "claim" in options:
        refuse_ranks(f"{script}.py" + " --claim" * ("claim" in options))
    if "claim" not in options or "help" in options:
        if "help" in options and claims:
            print(f"claims (--claim NAME): {', '.join(claims)}\n")
        return train(*setup(argv))
    name = options.pop("claim")
    if name not in claims:
        raise UserError(f"no claim {name!r}{nearest(name, claims)}")
    seeds, jobs = (cast(k, options.pop(k, d), d) for k, d in (("seeds", 5), ("jobs", 0)))
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: at least 1, and 2 for an interval")
    layers = [layer(n, presets) for n in options.get("config", "").split(",") if n] + [options]
    fixed = {"seed", "out", "resume", "stop", *claims[name].tune[:1]} | {
        k for arm in claims[name].arms.values() for n in arm.split(",") for k in presets[n]}
    for key in {k for row in layers for k in row} & fixed:
        raise UserError(f"--claim {name} with {key}: the claim sets it itself; "
                        "an arm would not be what its name says")
    more = options.pop("config", "")
    extra = [f"--{k}={v}" for k, v in options.items()]
    for arm in claims[name].arms.values():                       # all options, before any arm runs
        setup(["--config", ",".join(filter(None, (arm, more))), *extra])
    return run_claim(name, claims[name], script, setup, train, seeds=seeds, jobs=jobs, extra=extra,
                     config=more)


def check_first_ratio(told, dtype):
    """UserError unless the first minibatch after a rollout finds π = π_old; else every later ratio
    is wrong.

    Exact to 1e-3 in float32; in bfloat16 the two passes round differently: the mean is held to 2 %.
    """
    off, limit = (told["worst"], 1e-3) if dtype == "float32" else (told["off"], 0.02)
    if off > limit:
        raise UserError(f"the first ratio after a rollout is off by {off:.2g}: the sampler is not the policy "
                        f"(another temperature, dtype or weights?)")


T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
        2.201, 2.179, 2.160, 2.145, 2.131]


def interval(values):
    """(mean, half width of the 95 % interval) by Student's t over the values; the width is inf for
    one."""
    n = len(values)
    if n < 2:
        return values[0], math.inf
    t = T975[n - 2] if n - 2 < len(T975) else 1.96 + 2.5 / (n - 1)
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n)


def verdict(diffs, better="higher"):
    """'holds', 'does not hold' or 'undecided', from the 95 % interval of the paired differences
    alone."""
    mean, half = interval(diffs)
    mean = mean if better == "higher" else -mean
    return "holds" if mean - half > 0 else "does not hold" if mean + half < 0 else "undecided"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A paper's claim as an experiment: arms (name -> --config string), a metric, and what must
    exceed 0.

    tests: {label: {arm: weight}}, each a contrast of arms paired by seed; {"ours": 1, "theirs": -1}
    says that ours is better; the arm "" is the constant 1, "ours|accuracy" another metric than the
    claim's. conclude({label: verdict}) may give the claim's own word; by default every test must
    hold. Arms of the same config share one run, whose result names them: {"ours|gold": …,
    "theirs|gold": …}.
    """
    text: str
    paper: str
    arms: dict
    metric: str
    tests: dict
    better: str = "higher"
    also: tuple = ()                 # further metrics to tabulate
    conclude: object = None
    tune: tuple = ()                 # (key, ratio, metric): tune the key first, see tune_arms
    curve: str = ""  # a key of the log to draw against steps and seconds of training
    sweep: tuple = ()  # (x's name, metrics): draw each arm's results "metric@x" against x


def conclude_all(verdicts):
    """'holds' if every test does, 'does not hold' if any fails, else 'undecided'."""
    words = set(verdicts.values())
    return "holds" if words == {"holds"} else "does not hold" if "does not hold" in words else "undecided"


def in_parts(*parts):
    """A claim of several parts in one line: each part, and what the tests with its name in the
    label say."""
    return lambda verdicts: "; ".join(
        f"{x}: {conclude_all({k: v for k, v in verdicts.items() if x in k})}" for x in parts)


def gated(what, *parts):
    """in_parts, and before it "what (gate: …: not met)" if a test whose label begins with gate is
    not met."""
    def conclude(verdicts):
        gates = [k for k, v in verdicts.items() if k.startswith("gate") and v != "holds"]
        told = in_parts(*parts)({k: v for k, v in verdicts.items() if not k.startswith("gate")})
        return f"{what} ({'; '.join(gates)}: not met), {told}" if gates else told
    return conclude


def run_arm(job):
    """One arm, one seed, in its own process: the run's result, from its folder if it is there
    already."""
    configure_arm, train, argv, folder, threads = job
    c, f = configure_arm([*argv, "--out", folder])
    path = Path(folder, "run.json")
    old = read_json(path) if path.exists() else {}
    if "result" in old and old["config"] == settings(c, f) and old["source"] == source():
        return old["result"]
    torch.set_num_threads(threads)
    with open(f"{folder}.txt", "w") as out, contextlib.redirect_stdout(out):
        if Path(folder).exists():  # by other code or settings, or unfinished
            set_aside(folder)
        return train(c, f)


TUNING_SEED = 1000  # of data order and initialisation while tuning: never one that is reported


def try_arm(job):
    """run_arm, or {} for a run that diverged: the grid goes on without it."""
    try:
        return run_arm(job)
    except UserError as e:
        if "became" not in str(e):
            raise
        return {}


def tune_arms(claim, configure_arm, job, pool, widest=6):
    """Each arm's best value of claim.tune's key: {arm: {"value": x, "edge": bool, "grid": {x:
    metric}}}.

    Every arm starts from its preset's value, half and twice it (for ratio 2), all on TUNING_SEED;
    while the best is at an end, the grid grows there, at most `widest` times: then edge says so.
    Lower is better.
    """
    key, ratio, metric = claim.tune
    centre = {arm: vars(configure_arm(["--config", config])[0])[key]
              for arm, config in claim.arms.items()}
    grids = {arm: {} for arm in claim.arms}
    todo = [(arm, i) for arm in grids for i in (-1, 0, 1)]

    def value(arm, i):
        return float(f"{centre[arm] * ratio ** i:.3g}")

    for _ in range(widest + 1):
        jobs = [job(arm, TUNING_SEED, [f"--{key}={value(arm, i)}"], f"-{key}{value(arm, i)}")
                for arm, i in todo]
        with tqdm(total=len(jobs), desc=f"tuning {key}", dynamic_ncols=True) as bar:
            for (arm, i), out in zip(todo, pool.map(try_arm, jobs)):
                grids[arm][i] = out.get(metric, math.inf)
                bar.set_postfix_str(f"{arm} {value(arm, i)}: {grids[arm][i]:.4g}")
                bar.update()
        best = {arm: min(grid, key=grid.get) for arm, grid in grids.items()}
        todo = [(arm, best[arm] + side) for arm, grid in grids.items() for side in (-1, 1)
                if best[arm] + side not in grid]
        if not todo:
            break
    return {arm: dict(value=value(arm, best[arm]), edge=any(t[0] == arm for t in todo),
                      grid={value(arm, i): x for i, x in sorted(grid.items())})
            for arm, grid in grids.items()}


def run_claim(name, claim, script, configure_arm, train, *, seeds=5, jobs=0, extra=(), config="",
              results="data/results"):
    """Train every arm on every seed (`jobs` at once, finished ones reused), compare, write JSON and
    picture.

    configure_arm(argv) -> (c, f); `extra` is appended to every arm's command line, `config` to its
    presets. Returns the JSON's dict.
    """
    Path("out/claims", name).mkdir(parents=True, exist_ok=True)
    jobs = jobs or max(1, min(4, os.cpu_count() or 1))

    def job(arm, seed, changes, tag=""):
        presets = ",".join(filter(None, (claim.arms[arm], config)))
        return (configure_arm, train, ["--config", presets, "--seed", str(seed), *changes, *extra],
                f"out/claims/{name}/{re.sub(r'[^A-Za-z0-9._-]+', '_', arm)}-s{seed}{tag}",
                1 if jobs > 1 else torch.get_num_threads())

    first = {config: arm for arm, config in reversed(claim.arms.items())}
    runs = {arm: arm if claim.tune else first[config]
            for arm, config in claim.arms.items()}                                     # who runs it
    todo = [(arm, seed) for seed in range(seeds) for arm in claim.arms if runs[arm] == arm]
    print(f"{claim.text}\n{claim.paper}\n{len(claim.arms)} arms x {seeds} seeds, {jobs} at a time",
          flush=True)
    t0, got, tuned = time.time(), [], {}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        if claim.tune:
            tuned = tune_arms(claim, configure_arm, job, pool)
        work = [job(arm, seed, [f"--{claim.tune[0]}={tuned[arm]['value']}"] if tuned else [])
                for arm, seed in todo]
        with tqdm(total=len(work), desc=name, dynamic_ncols=True) as bar:
            for (arm, seed), out in zip(todo, pool.map(run_arm, work)):
                bar.set_postfix_str(f"{arm} seed {seed}: {claim.metric} {of(out, arm, claim.metric):.4g}")
                bar.update()
                got.append(out)
    Path(results).mkdir(parents=True, exist_ok=True)
    got = dict(zip(todo, got))
    got = {(arm, seed): got[runs[arm], seed] for arm in claim.arms for seed in range(seeds)}
    report = judge(name, claim, seeds, got)
    report |= dict(tuned=tuned) if tuned else {}
    if claim.curve:
        logs = {key: read_log(path) for key, (*_, path, _) in zip(todo, work)}
        report["curve"] = {arm: mean_curve([logs[arm, s] for s in range(seeds)], claim.curve)
                           for arm in claim.arms}
        draw_curves(report, claim.curve, Path(results) / f"{name}_curves.png")
    if claim.sweep:
        report["sweep"] = sweep(claim, seeds, got)
        draw_sweep(report, claim.sweep[0], Path(results) / f"{name}_sweep.png")
    report |= dict(command=f"python {script}.py --claim {name} --seeds {seeds}"
                           + f" --config {config}" * bool(config) + "".join(f" {x}" for x in extra),
                   commit=commit(), torch=torch.__version__,
                   minutes=round((time.time() - t0) / 60, 1))
    write_text(Path(results) / f"{name}.json", json.dumps(report, indent=1))
    draw_claim(report, Path(results) / f"{name}.png")
    print(table(report), f"\n\n{report['verdict']}", flush=True)
    return report


def of(result, arm, metric):
    """An arm's metric in the result of its run: its own "arm|metric" where several arms share the
    run."""
    key = f"{arm}|{metric}" if f"{arm}|{metric}" in result else metric
    if key not in result:
        raise UserError(f"the run of arm {arm!r} has no {metric!r}{nearest(metric, list(result))}")
    return result[key]


def judge(name, claim, seeds, got):
    """A claim's report from got[(arm, seed)] -> result: means, intervals, paired differences,
    verdict."""
    metrics = (claim.metric, *claim.also)
    values = {arm: {m: [of(got[arm, s], arm, m) for s in range(seeds)] for m in metrics}
              for arm in claim.arms}

    def value(key, s):
        arm, _, metric = key.partition("|")
        return of(got[arm, s], arm, metric or claim.metric) if arm else 1.0

    tests, verdicts = [], {}
    for label, weights in claim.tests.items():
        diffs = [sum(w * value(key, s) for key, w in weights.items()) for s in range(seeds)]
        mean, half = interval(diffs)
        verdicts[label] = verdict(diffs, claim.better)
        tests.append(dict(test=label, difference=mean, interval=half, verdict=verdicts[label]))
    arms = {arm: {m: dict(zip(("mean", "interval"), interval(v)), values=v) for m, v in ms.items()}
            for arm, ms in values.items()}
    return dict(claim=name, text=claim.text, paper=claim.paper, metric=claim.metric,
                better=claim.better,
                seeds=seeds, verdict=(claim.conclude or conclude_all)(verdicts), arms=arms,
                tests=tests)


def table(report):
    """The report as aligned text: mean ± 95 % per arm and metric, then the paired differences."""
    metrics = list(next(iter(report["arms"].values())))
    lines = ["", f"{'arm':<20}" + "".join(f"{m:>20}" for m in metrics)]
    for arm, ms in report["arms"].items():
        lines.append(f"{arm:<20}"
                     + "".join(f"{ms[m]['mean']:>11.3f} ± {ms[m]['interval']:<6.3f}"
                               for m in metrics))
    side = "above" if report["better"] == "higher" else "below"
    lines.append(f"\npaired contrasts over {report['seeds']} seeds, 95 %, of {report['metric']} or of what "
                 f"the label names; a label holds where its contrast is {side} 0")
    lines += [f"{t['test']:<36}"
              + f"{t['difference']:>+8.3f} ± {t['interval']:<6.3f}  {t['verdict']}"
              for t in report["tests"]]
    return "\n".join(lines)


def mean_curve(logs, key):
    """[[step, seconds, value]] of the steps at which every log has the key: means over the logs."""
    rows = [{r["step"]: r for r in log if key in r} for log in logs]
    steps = sorted(set.intersection(*(set(r) for r in rows)))
    return [[step, *(round(statistics.fmean(r[step][k] for r in rows), 4)
                     for k in ("seconds", key))]
            for step in steps]


def sweep(claim, seeds, got):
    """{metric: {arm: [[x, mean, half width]]}} of the results "metric@x" (or "arm|metric@x") of a
    claim."""
    out = {}
    for metric in claim.sweep[1]:
        out[metric] = {}
        for arm in claim.arms:
            marks = (f"{arm}|{metric}@", f"{metric}@")
            keys = [k for k in got[arm, 0] if k.startswith(marks[0])] or [
                k for k in got[arm, 0] if k.startswith(marks[1])]
            points = sorted((float(k.rpartition("@")[2]), k) for k in keys)
            rows = [[x, *interval([got[arm, s][k] for s in range(seeds)])] for x, k in points]
            out[metric] |= {arm: rows} if rows else {}
    return out


def draw_sweep(report, xlabel, path):
    """One panel a metric, one line an arm, its 95 % interval shaded; x logarithmic where it spans
    decades."""
    plt = pyplot()
    panels = {m: arms for m, arms in report["sweep"].items() if arms}
    fig, axes = plt.subplots(1, len(panels), figsize=(4.8 * len(panels), 3.8), squeeze=False)
    for ax, (metric, arms) in zip(axes[0], panels.items()):
        for i, (arm, rows) in enumerate(arms.items()):
            x, mean, half = zip(*rows)
            ax.plot(x, mean, lw=1.4, marker="o", ms=3, label=arm, color=f"C{i % 10}",
                    ls=("-", "--")[i // 10])
            ax.fill_between(x, [m - h for m, h in zip(mean, half)],
                            [m + h for m, h in zip(mean, half)],
                            alpha=0.12, lw=0, color=f"C{i % 10}")
        if min(x) > 0 and max(x) / min(x) > 30:
            ax.set_xscale("log", base=2)
        ax.set(xlabel=xlabel, ylabel=metric.replace("_", " "))
    axes[0][-1].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


def draw_curves(report, key, path):
    """The arms' mean curves, against steps and against seconds of training."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(9.6, 4.2), sharey=True)
    for i, (arm, points) in enumerate(report["curve"].items()):
        for ax, x in zip(axes, (0, 1)):
            ax.plot([p[x] for p in points], [p[2] for p in points], lw=1.4, label=arm,
                    ls=("-", "--")[i // 10], color=f"C{i % 10}")
    ends = sorted(p[2] for points in report["curve"].values() for p in points)
    axes[0].set(xlabel="step", ylabel=key.replace("_", " "),
                ylim=(ends[0] - 0.05, ends[int(0.8 * (len(ends) - 1))]))
    axes[1].set(xlabel="seconds of training")
    axes[1].legend(fontsize=7, ncol=2)
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


def draw_claim(report, path):
    """One dot a seed, mean and 95 % interval, a row an arm."""
    plt = pyplot()
    arms, m = report["arms"], report["metric"]
    fig, ax = plt.subplots(figsize=(6.4, 0.32 * len(arms) + 1.2))
    for y, (arm, ms) in enumerate(arms.items()):
        ax.plot(ms[m]["values"], [y] * len(ms[m]["values"]), "o", ms=3, alpha=0.4, color="tab:gray")
        ax.errorbar(ms[m]["mean"], y, xerr=ms[m]["interval"], fmt="o", ms=5, capsize=3,
                    color="tab:blue")
    ax.set(yticks=range(len(arms)), yticklabels=list(arms),
           xlabel=f"{m.replace('_', ' ')} ({report['better']} is better)",
           title=textwrap.fill(f"{report['claim']}, {report['seeds']} seeds: {report['verdict']}",
                               60))
    ax.invert_yaxis()
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)
