"""
run.py - what goes into a run (configuration) and what comes out of it (log, curve, checkpoints, claims).

    c, f = configure(Config, PRESETS, AXES, __doc__)  # defaults < --config a,b,my.toml < --key value
    with Run(c, f, "sft", CURVES) as run:             # out/sft/<name>: run.json, log.jsonl, curve.png, step-*
        for step in run.steps(c.steps): ...; run.log(step, loss=...); run.save(step, write, **state)

Map      1 errors   2 configure   3 several ranks   4 the run's folder   5 the curve   6 claims
"""
import contextlib
import dataclasses
import difflib
import hashlib
import inspect
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
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:              # Windows: no lock, so run the arms of a claim with --jobs 1 there
    fcntl = resource = None

# --- errors -------------------------------------------------------------------------------------------


class UserError(ValueError):
    """Something the user can mend: one line naming the thing and the remedy, shown without a traceback."""


def nearest(word, known):
    """'; did you mean …' for a mistyped word, else the whole list: the tail of an error message."""
    hit = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {hit[0]!r}?" if hit else f"; choose from {', '.join(sorted(known)) or 'nothing'}"


def cli(main):
    """Run main() as a command: a UserError becomes one line and exit code 2, running out of memory too."""
    try:
        main()
    except UserError as e:
        first = os.environ.get("RANK", "0") == "0"             # torchrun: one rank says it for all
        sys.exit((print(f"error: {e}", file=sys.stderr) if first else None) or 2)
    except KeyboardInterrupt:
        print("\nstopped; --resume goes on from the last checkpoint, if there is one", file=sys.stderr)
        sys.exit(130)
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as e:
        if os.environ.get("RANK", "0") != "0" and "onnection" in str(e):
            sys.exit(2)                                        # rank 0 is gone, and has said why
        if isinstance(e, RuntimeError) and "memory" not in str(e):
            raise
        sys.exit(print("error: out of memory: try a smaller --micro (results do not change)",
                       file=sys.stderr) or 2)


# --- configure ----------------------------------------------------------------------------------------


def hyper(fn):
    """A method's hyper-parameters are its keyword-only arguments: def f(x, *, beta=0.1) -> {'beta': 0.1}."""
    return {k: p.default for k, p in inspect.signature(fn).parameters.items() if p.kind is p.KEYWORD_ONLY}


def needs(fn):
    """The names of a function's positional arguments, in order: what the caller must provide."""
    return [k for k, p in inspect.signature(fn).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]


def cast(key, value, like):
    """Turn `value` (command-line text, or a TOML/preset value) into the type of the default `like`."""
    kind = type(like)
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if isinstance(value, str) or kind is float or type(value) is kind:
            return kind(value)
    except (ValueError, KeyError):
        pass
    raise UserError(f"--{key} {value}: expected {kind.__name__}, for example {like!r}")


def parse(argv, fields):
    """['--lr', '1e-3', '--steps=5', '--resume'] -> [('lr', '1e-3'), ('steps', '5'), ('resume', 'true')]."""
    pairs, argv = [], list(argv)
    while argv:
        word = argv.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"unexpected argument {word!r}: options look like --key value")
        key, eq, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if not eq:
            flag = isinstance(fields.get(key), bool)
            if argv and not argv[0].startswith("--") and (not flag or argv[0].lower() in ("true", "false")):
                value = argv.pop(0)
            elif flag or key == "help":
                value = "true"
            else:
                raise UserError(f"--{key} needs a value")
        pairs.append((key, value))
    return pairs


def layer(name, presets):
    """One --config entry, a preset's name or a TOML file's path, as a dict of keys."""
    if name.endswith(".toml"):
        try:
            return tomllib.loads(Path(name).read_text())
        except FileNotFoundError:
            raise UserError(f"no config file {name}: check the path") from None
        except tomllib.TOMLDecodeError as e:
            raise UserError(f"{name} is not valid TOML: {e}") from None
    if name not in presets:
        raise UserError(f"no preset {name!r}{nearest(name, presets)}")
    return presets[name]


def configure(Config, presets, axes, doc="", argv=None):
    """Resolve a command line into (c, f): the frozen Config, and one bound function per axis.

    axes: {axis: {row name: function}}. The Config field of the axis's name says which row is used (an axis
    with a single row needs no field); its keyword-only arguments are keys like any other (`--beta 0.1`, or
    `--kl.beta 0.1` if two rows share it). A row called PATH is the one for values that are existing paths.
    Raises UserError for an unknown key or preset (with the nearest name), a wrong type, a key nobody reads.
    """
    fields = {x.name: x.default for x in dataclasses.fields(Config)}
    given = parse(sys.argv[1:] if argv is None else argv, fields)
    if any(k == "help" for k, _ in given):
        print(help_text(Config, presets, axes, doc))
        raise SystemExit(0)
    names = [n for k, v in given if k == "config" for n in v.split(",") if n]
    values, typed = {}, {k for k, _ in given}            # typed: keys that the user wrote, which must be read
    for name in names:
        values |= layer(name, presets)
        typed |= set(layer(name, presets)) if name.endswith(".toml") else set()
    values |= dict(given) | dict(config=",".join(names))

    resolved = {k: cast(k, values.pop(k, d), d) for k, d in fields.items()}
    bound, known = {}, {}
    chosen = {}
    for axis, rows in axes.items():
        row = resolved.get(axis, next(iter(rows)))
        if row not in rows and not ("PATH" in rows and Path(row).exists()):
            missing = "; there is no such folder or file" * ("PATH" in rows and "/" in row)
            raise UserError(f"no {axis} {row!r}{missing or nearest(row, rows)}")
        fn = chosen[axis] = rows.get(row) or rows["PATH"]
        bound[axis] = {}
        for key, default in hyper(fn).items():
            known |= {key: True, f"{axis}.{key}": True}
            value = values.get(f"{axis}.{key}", values.get(key, default))
            bound[axis][key] = cast(key, value, default)
    for key in values:
        owners = [a for a, rows in axes.items() for fn in rows.values() if key in hyper(fn)]
        if key not in known and (key in typed or not owners):     # a preset's key is idle under another row
            owners = [f"{a} {r!r}" for a, rows in axes.items() for r, fn in rows.items() if key in hyper(fn)]
            hint = f"; it belongs to {' or '.join(owners)}" if owners else nearest(key, [*fields, *known])
            raise UserError(f"unknown key --{key}{hint}")

    cuda = torch.cuda.is_available()
    if resolved.get("device", "cpu").startswith("cuda") and not cuda:
        raise UserError(f"--device {resolved['device']}: this torch sees no CUDA device; use --device cpu")
    if resolved.get("device") == "auto":
        resolved["device"] = "cuda" if cuda else "cpu"
    if resolved.get("device", "").startswith("cuda:"):       # cuda:1 is then the device of every launch, too
        torch.cuda.set_device(resolved["device"])
    if resolved.get("dtype") == "auto":
        resolved["dtype"] = "bfloat16" if resolved["device"].startswith("cuda") else "float32"
    if resolved.get("dtype", "float32") not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {resolved['dtype']}: choose float32 or bfloat16")
    numbers = {k: v for row in bound.values() for k, v in row.items()} | resolved
    for key in ("batch", "micro", "rollouts", "samples", "eval_every", "save_every", "keep", "steps",
                "members", "rounds", "votes"):
        if numbers.get(key, 1) < (0 if key == "steps" else 1):
            raise UserError(f"--{key} {numbers[key]}: must be positive")
    f = SimpleNamespace(**{a: partial(chosen[a], **kw) for a, kw in bound.items()})
    return Config(**resolved), f


def help_text(Config, presets, axes, doc):
    """--help: the script's docstring, fields with comments and defaults, presets, each row's arguments."""
    comments = dict(re.findall(r"^ +(\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    lines = [inspect.cleandoc(doc or ""), "", "options (--key value):"]
    lines += [f"  --{x.name:<12} {str(x.default)!s:<12} {comments.get(x.name, '')}"
              for x in dataclasses.fields(Config)]
    lines += ["", "  --claim NAME, --seeds 5, --jobs 0: run a claim's arms over seeds, instead of one run"]
    lines += ["", "presets (--config a,b or a .toml file, left to right):"]
    lines += [f"  {name:<14} " + ", ".join(f"{k}={v}" for k, v in row.items())
              for name, row in presets.items()]
    for axis, rows in axes.items():
        lines += ["", f"--{axis}, and what each reads:" if axis in comments else f"{axis}:"]
        for row, fn in rows.items():
            first = " ".join((inspect.getdoc(fn) or "").split("\n\n")[0].split())
            shown = {k: repr(v) if isinstance(v, str) and "\n" in v else v for k, v in hyper(fn).items()}
            lines.append(f"  {row:<12} {first}  " + " ".join(f"--{k} {v}" for k, v in shown.items()))
    return "\n".join(lines)


# --- several ranks ------------------------------------------------------------------------------------


def start_ranks(device):
    """Join torchrun's process group (gloo on CPUs, nccl on GPUs); -> (rank, how many), (0, 1) alone."""
    if "RANK" in os.environ and not dist.is_initialized():
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


# --- the run's folder ---------------------------------------------------------------------------------


def write_text(path, text):
    """Write a file so that a reader, or a kill at any moment, sees the old or the new content, never half."""
    tmp = Path(f"{path}.tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


@contextlib.contextmanager
def lock(path):
    """Let one process at a time into the block; others wait. The system frees it if the holder is killed."""
    path = Path(f"{path}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def peak_bytes(device):
    """The most memory that this process has held: of the GPU where it computes there, else of the machine."""
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
    """Bytes a second that a 256 MB copy reads and writes on this device: the floor decoding is held to."""
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
    """The rows of a run's log.jsonl; a last line cut short by a kill is dropped."""
    path, rows = Path(folder) / "log.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def checkpoint(path):
    """The Hugging Face folder `path` means: itself, or the newest step of a run folder. Raises UserError."""
    path = Path(path)
    if (path / "config.json").exists():
        return path
    steps = sorted(p for p in path.glob("step-*") if (p / "config.json").exists() and p.suffix != ".tmp")
    if steps:
        return steps[-1]
    what = "has neither config.json nor step-* folders" if path.is_dir() else "does not exist"
    raise UserError(f"{path} {what}: give a Hugging Face checkpoint folder or a run folder under out/")


def result(folder):
    """What a finished run returned (a dict), or None for a run that is unfinished or absent."""
    path = Path(folder) / "run.json"
    return json.loads(path.read_text()).get("result") if path.exists() else None


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
    """A hash of the project's code: a claim reuses an arm's result only if it was made by the same code."""
    root = Path(__file__).parent.parent
    files = sorted([*root.glob("*.py"), *root.glob("data/*.py")])
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


FREE = {"resume", "stop", "out", "steps", "keep", "save_every", "eval_every", "device", "config", "micro",
        "compile"}               # may change on --resume


def settings(c, f):
    """All that decides a run's numbers, as JSON holds it: the Config's fields and each axis's arguments."""
    return json.loads(json.dumps(dataclasses.asdict(c) |
                                 {f"{axis}.{k}": v for axis, fn in vars(f).items()
                                  for k, v in fn.keywords.items()}))


class Run:
    """A run's folder out/<script>/<name>/ and its traces; a context manager that draws the curve on exit.

    Without --out a second run of the same name gets a new folder (name-2), so nothing is overwritten; with
    --resume the newest of them is continued, and `state` holds what its last save() was given.
    """

    def __init__(self, c, f, script, curves=None):
        self.c, self.curves, self.shown, self.total = c, curves or {}, 0.0, 0
        self.quiet, self.settings = rank() > 0, settings(c, f)
        self.state, self.start, self.last = None, 0, None
        self.at = 0                                            # steps of a run's earlier stages
        self.folder = None if self.quiet else self.choose_folder(script)
        home = Path(share(str(self.folder)))                   # of rank 0; the others write to nowhere
        self.folder = Path(tempfile.mkdtemp()) if self.quiet else home
        if c.resume:
            self.check_settings(home)
            with contextlib.suppress(UserError):
                self.last = checkpoint(home)
            if self.last:
                self.state = torch.load(self.last / "state.pt", map_location="cpu", weights_only=True)
                self.start = self.state["step"]
            self.say(f"resuming {home} at step {self.start}")
        stages = c.resume and any(self.folder.glob("*/stage.pt"))      # then stage() cuts the log
        rows = [r for r in read_log(self.folder) if stages or self.start and r["step"] <= self.start]
        write_text(self.folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
        self.t0 = time.time() - (rows[-1]["time"] if rows else 0.0)
        done = {"result": result(self.folder)} if result(self.folder) else {}
        self.info = dict(config=self.settings, command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                         commit=commit(), source=source(),
                         versions=dict(python=platform.python_version(), torch=torch.__version__)) | done
        write_text(self.folder / "run.json", json.dumps(self.info, indent=2))

    def choose_folder(self, script):
        """The run's folder, made, and cleared of what a kill left half written."""
        c = self.c
        names = [Path(n).stem for n in c.config.split(",") if n]
        base = Path(c.out or Path("out") / script / ("-".join(names) or "default"))
        taken = [p for p in [base, *(base.with_name(f"{base.name}-{i}") for i in range(2, 1000))]
                 if p.exists()]
        if c.resume:
            if not taken:
                raise UserError(f"--resume: no run in {base}; start it without --resume")
            folder = base if c.out else taken[-1]
        elif c.out and (base / "run.json").exists():
            raise UserError(f"--out {base} already holds a run: "
                            "add --resume to go on, or choose another folder")
        else:
            folder = base if c.out or not taken else base.with_name(f"{base.name}-{len(taken) + 1}")
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.tmp"):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        return folder

    def check_settings(self, home):
        """--resume must not change what is computed. Raises UserError naming the first setting that did."""
        path, new = home / "run.json", self.settings
        old = json.loads(path.read_text())["config"] if path.exists() else new
        for key in sorted(new.keys() | old.keys()):
            if key not in FREE and old.get(key) != new.get(key):
                raise UserError(f"--resume: {key} was {old.get(key)!r} and is now {new.get(key)!r}; "
                                f"resume with the run's own settings, or start a new run")

    def __enter__(self):
        self.file = open(self.folder / "log.jsonl", "a")
        return self

    def __exit__(self, *failure):
        self.file.close()
        if self.quiet:
            shutil.rmtree(self.folder)
        elif failure[0] and not self.last and not read_log(self.folder):
            shutil.rmtree(self.folder)                     # it never began: a typo leaves no run behind
        elif self.curves:
            draw(self.folder, self.curves)

    def steps(self, total):
        """Yield start..total-1 under a progress bar (on a terminal); --stop N pauses the run after step N."""
        self.total, end = total, min(total, self.c.stop) if self.c.stop else total
        self.bar = tqdm(total=total, initial=self.start, disable=True if self.quiet else None,
                        dynamic_ncols=True, leave=False)
        for step in range(self.start, end):
            yield step
            self.bar.update()
        self.bar.close()

    def log(self, step, show=False, **metrics):
        """What is true after `step` steps: one row to log.jsonl, at most one aligned line in two seconds to
        the terminal (always with show). Stops the run when the loss or the gradient norm is not finite."""
        row = ({"step": step, "time": round(time.time() - self.t0, 2)}
               | {k: float(v) for k, v in metrics.items()})
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        bad = [k for k in row if k.split()[-1] in ("loss", "norm") and not math.isfinite(row[k])]
        if bad:
            good = f"the last good checkpoint is {self.last}" if self.last else "no checkpoint had been saved"
            raise UserError(f"{bad[0]} became {row[bad[0]]} at step {step}; {good}; try a lower --lr")
        now = time.time()
        if self.quiet:
            return
        if now - self.shown > 2 or show or step == self.total:
            self.shown = now
            text = "  ".join(f"{k} {v:<9.4g}" for k, v in row.items() if k not in ("step", "time"))
            tqdm.write(f"step {step:>5}  {row['time']:>6.0f}s  {text}")
            sys.stdout.flush()

    def say(self, text):
        """A line of prose (samples, evaluations) that does not tear the progress bar."""
        if not self.quiet:
            tqdm.write(text)
            sys.stdout.flush()

    def save(self, step, write, **state):
        """Checkpoint after `step` steps: write(folder) makes the Hugging Face folder, `state` goes to
        state.pt (what torch.load(weights_only=True) reads). Gets its final name only when complete. Of
        several ranks only the first writes."""
        if self.quiet:
            return
        final = self.folder / f"step-{step:06d}"
        if not final.exists():
            tmp = final.with_suffix(".tmp")
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)
            write(tmp)
            torch.save(dict(state, step=step), tmp / "state.pt")
            os.replace(tmp, final)
        self.last = final
        for old in sorted(p for p in self.folder.glob("step-*") if p.suffix != ".tmp")[:-self.c.keep]:
            doomed = old.with_suffix(".tmp")               # renamed first: a kill never leaves half a folder
            os.replace(old, doomed)
            shutil.rmtree(doomed)

    def stage(self, name, write):
        """The folder of one stage of a run with several: write(folder) makes it, or a resumed run has it."""
        final = self.folder / name
        if final.exists():
            self.at = torch.load(final / "stage.pt", weights_only=True)["step"]
            return final
        self.cut()
        tmp = final.with_suffix(".tmp")
        shutil.rmtree(tmp, ignore_errors=True)
        write(tmp)
        torch.save(dict(step=self.at), tmp / "stage.pt")
        os.replace(tmp, final)
        return final

    def cut(self):
        """Drop from a resumed run's log what comes after the finished stages: it is made again."""
        if self.c.resume:
            self.file.close()
            rows = [r for r in read_log(self.folder) if r["step"] <= self.at]
            write_text(self.folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
            self.file = open(self.folder / "log.jsonl", "a")

    def finish(self, **metrics):
        """Record the run's result in run.json (which marks it finished), and return it."""
        self.info["result"] = {k: float(v) for k, v in metrics.items()}
        write_text(self.folder / "run.json", json.dumps(self.info, indent=2))
        return self.info["result"]


def batch_indices(n, batch, step, seed):
    """The rows of optimizer step `step`: [batch] indices into n examples, reshuffled every epoch.

    A pure function of its arguments, so that a resumed run needs no data cursor. Raises UserError if n is 0.
    """
    if n == 0:
        raise UserError("the data set is empty: nothing to train on; check --data")
    flat = range(step * batch, (step + 1) * batch)
    order = {}
    for epoch in {i // n for i in flat}:
        order[epoch] = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return torch.stack([order[i // n][i % n] for i in flat])


# --- the curve ----------------------------------------------------------------------------------------


def pyplot():
    """matplotlib.pyplot on the file backend; imported late because it costs a second."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.alpha": 0.25, "font.size": 9, "legend.frameon": False, "figure.dpi": 120})
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
            ax.plot(*zip(*xy), marker="o" if len(xy) < 40 else "", ms=3, lw=1.4, label=key.replace("_", " "))
        ax.set(title=title, xlabel="step")
        ax.legend()
    fig.tight_layout()
    fig.savefig(Path(folder) / "curve.tmp.png")
    os.replace(Path(folder) / "curve.tmp.png", Path(folder) / "curve.png")
    plt.close(fig)


# --- claims -------------------------------------------------------------------------------------------


def report(run, before, after, look):
    """The last words of a run: two samples a split, then SFT beside the policy on held-out prompts."""
    for prompt, text, reference in look:
        run.say(f"  prompt     {prompt!r}\n  policy     {text!r}\n  reference  {reference!r}")
    run.say(f"\n  held-out prompts    {'SFT':>10} {'now':>10}")
    for key in before:
        run.say(f"  {key:<18} {before[key]:>11.3f} {after[key]:>10.3f}")
    run.say(f"\n  {run.folder}: curve.png, log.jsonl; checkpoint {run.last or '(none: no step was made)'}")


def launch(script, Config, presets, axes, claims, doc, train, argv=None):
    """A script's main: train one run, or with --claim NAME [--seeds 5] [--jobs 0] every arm of a claim.

    jobs: arms trained at once, each on one thread (0: one per core, four at most). Other keys go to every
    arm; those that an arm or the seeds set are refused.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    setup = partial(configure, Config, presets, axes, doc)
    options = dict(parse(argv, {x.name: x.default for x in dataclasses.fields(Config)}))
    if "claim" not in options:
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
    extra = [f"--{k}={v}" for k, v in options.items()]
    return run_claim(name, claims[name], script, setup, train, seeds=seeds, jobs=jobs, extra=extra)


def check_first_ratio(told, dtype):
    """UserError unless the first minibatch after a rollout finds π = π_old; else every later ratio is wrong.

    Exact to 1e-3 in float32; in bfloat16 the two passes round differently: the mean is held to 2 %.
    """
    off, limit = (told["worst"], 1e-3) if dtype == "float32" else (told["off"], 0.02)
    if off > limit:
        raise UserError(f"the first ratio after a rollout is off by {off:.2g}: the sampler is not the policy "
                        f"(another temperature, dtype or weights?)")


T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
        2.201, 2.179, 2.160, 2.145, 2.131]


def interval(values):
    """(mean, half width of the 95 % interval) by Student's t over the values; the width is inf for one."""
    n = len(values)
    if n < 2:
        return values[0], math.inf
    t = T975[n - 2] if n - 2 < len(T975) else 1.96 + 2.5 / (n - 1)
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n)


def verdict(diffs, better="higher"):
    """'holds', 'does not hold' or 'undecided', from the 95 % interval of the paired differences alone."""
    mean, half = interval(diffs)
    mean = mean if better == "higher" else -mean
    return "holds" if mean - half > 0 else "does not hold" if mean + half < 0 else "undecided"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A paper's claim as an experiment: arms (name -> --config string), a metric, and what must exceed 0.

    tests: {label: {arm: weight}}, each a contrast of arms paired by seed; {"ours": 1, "theirs": -1} says that
    ours is better; the arm "" is the constant 1, "ours|accuracy" another metric than the claim's.
    conclude({label: verdict}) may give the claim's own word; by default every test must hold.
    Arms of the same config share one run, whose result names them: {"ours|gold": …, "theirs|gold": …}.
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
    curve: str = ""                  # a key of the log to draw against steps and seconds of training
    sweep: tuple = ()                # (x's name, metrics): draw each arm's results "metric@x" against x


def conclude_all(verdicts):
    """'holds' if every test does, 'does not hold' if any fails, else 'undecided'."""
    words = set(verdicts.values())
    return "holds" if words == {"holds"} else "does not hold" if "does not hold" in words else "undecided"


def in_parts(*parts):
    """A claim of several parts in one line: each part, and what the tests with its name in the label say."""
    return lambda verdicts: "; ".join(
        f"{x}: {conclude_all({k: v for k, v in verdicts.items() if x in k})}" for x in parts)


def gated(what, *parts):
    """in_parts, and before it "what (gate: …: not met)" if a test whose label begins with gate is not met."""
    def conclude(verdicts):
        gates = [k for k, v in verdicts.items() if k.startswith("gate") and v != "holds"]
        told = in_parts(*parts)({k: v for k, v in verdicts.items() if not k.startswith("gate")})
        return f"{what} ({'; '.join(gates)}: not met), {told}" if gates else told
    return conclude


def run_arm(job):
    """One arm, one seed, in its own process: the run's result, from its folder if it is there already."""
    configure_arm, train, argv, folder, threads = job
    c, f = configure_arm([*argv, "--out", folder])
    path = Path(folder, "run.json")
    old = json.loads(path.read_text()) if path.exists() else {}
    if "result" in old and old["config"] == settings(c, f) and old["source"] == source():
        return old["result"]
    shutil.rmtree(folder, ignore_errors=True)
    torch.set_num_threads(threads)
    with open(f"{folder}.txt", "w") as out, contextlib.redirect_stdout(out):
        return train(c, f)


TUNING_SEED = 1000               # of data order and initialisation while tuning: never one that is reported


def try_arm(job):
    """run_arm, or {} for a run that diverged: the grid goes on without it."""
    try:
        return run_arm(job)
    except UserError as e:
        if "became" not in str(e):
            raise
        return {}


def tune_arms(claim, configure_arm, job, pool, widest=6):
    """Each arm's best value of claim.tune's key: {arm: {"value": x, "edge": bool, "grid": {x: metric}}}.

    Every arm starts from its preset's value, half and twice it (for ratio 2), all on TUNING_SEED; while the
    best is at an end, the grid grows there, at most `widest` times: then edge says so. Lower is better.
    """
    key, ratio, metric = claim.tune
    centre = {arm: vars(configure_arm(["--config", config])[0])[key] for arm, config in claim.arms.items()}
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


def run_claim(name, claim, script, configure_arm, train, *, seeds=5, jobs=0, extra=(),
              results="data/results"):
    """Train every arm on every seed (`jobs` at once, finished ones reused), compare, write JSON and picture.

    configure_arm(argv) -> (c, f); `extra` is appended to every arm's command line. Returns the JSON's dict.
    """
    Path("out/claims", name).mkdir(parents=True, exist_ok=True)
    jobs = jobs or max(1, min(4, os.cpu_count() or 1))

    def job(arm, seed, changes, tag=""):
        return (configure_arm, train, ["--config", claim.arms[arm], "--seed", str(seed), *changes, *extra],
                f"out/claims/{name}/{re.sub(r'[^A-Za-z0-9._-]+', '_', arm)}-s{seed}{tag}",
                1 if jobs > 1 else torch.get_num_threads())

    first = {config: arm for arm, config in reversed(claim.arms.items())}
    runs = {arm: arm if claim.tune else first[config] for arm, config in claim.arms.items()}     # who runs it
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
                           + "".join(f" {x}" for x in extra),
                   commit=commit(), torch=torch.__version__, minutes=round((time.time() - t0) / 60, 1))
    write_text(Path(results) / f"{name}.json", json.dumps(report, indent=1))
    draw_claim(report, Path(results) / f"{name}.png")
    print(table(report), f"\n\n{report['verdict']}", flush=True)
    return report


def of(result, arm, metric):
    """An arm's metric in the result of its run: its own "arm|metric" where several arms share the run."""
    key = f"{arm}|{metric}" if f"{arm}|{metric}" in result else metric
    if key not in result:
        raise UserError(f"the run of arm {arm!r} has no {metric!r}{nearest(metric, list(result))}")
    return result[key]


def judge(name, claim, seeds, got):
    """A claim's report from got[(arm, seed)] -> result: means, intervals, paired differences, verdict."""
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
    return dict(claim=name, text=claim.text, paper=claim.paper, metric=claim.metric, better=claim.better,
                seeds=seeds, verdict=(claim.conclude or conclude_all)(verdicts), arms=arms, tests=tests)


def table(report):
    """The report as aligned text: mean ± 95 % per arm and metric, then the paired differences."""
    metrics = list(next(iter(report["arms"].values())))
    lines = ["", f"{'arm':<20}" + "".join(f"{m:>20}" for m in metrics)]
    for arm, ms in report["arms"].items():
        lines.append(f"{arm:<20}"
                     + "".join(f"{ms[m]['mean']:>11.3f} ± {ms[m]['interval']:<6.3f}" for m in metrics))
    side = "above" if report["better"] == "higher" else "below"
    lines.append(f"\npaired contrasts over {report['seeds']} seeds, 95 %, of {report['metric']} or of what "
                 f"the label names; a label holds where its contrast is {side} 0")
    lines += [f"{t['test']:<36}" + f"{t['difference']:>+8.3f} ± {t['interval']:<6.3f}  {t['verdict']}"
              for t in report["tests"]]
    return "\n".join(lines)


def mean_curve(logs, key):
    """[[step, seconds, value]] of the steps at which every log has the key: means over the logs."""
    rows = [{r["step"]: r for r in log if key in r} for log in logs]
    steps = sorted(set.intersection(*(set(r) for r in rows)))
    return [[step, *(round(statistics.fmean(r[step][k] for r in rows), 4) for k in ("seconds", key))]
            for step in steps]


def sweep(claim, seeds, got):
    """{metric: {arm: [[x, mean, half width]]}} of the results "metric@x" (or "arm|metric@x") of a claim."""
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
    """One panel a metric, one line an arm, its 95 % interval shaded; x logarithmic where it spans decades."""
    plt = pyplot()
    panels = {m: arms for m, arms in report["sweep"].items() if arms}
    fig, axes = plt.subplots(1, len(panels), figsize=(4.8 * len(panels), 3.8), squeeze=False)
    for ax, (metric, arms) in zip(axes[0], panels.items()):
        for i, (arm, rows) in enumerate(arms.items()):
            x, mean, half = zip(*rows)
            ax.plot(x, mean, lw=1.4, marker="o", ms=3, label=arm, color=f"C{i % 10}",
                    ls=("-", "--")[i // 10])
            ax.fill_between(x, [m - h for m, h in zip(mean, half)], [m + h for m, h in zip(mean, half)],
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
        ax.errorbar(ms[m]["mean"], y, xerr=ms[m]["interval"], fmt="o", ms=5, capsize=3, color="tab:blue")
    ax.set(yticks=range(len(arms)), yticklabels=list(arms),
           xlabel=f"{m.replace('_', ' ')} ({report['better']} is better)",
           title=textwrap.fill(f"{report['claim']}, {report['seeds']} seeds: {report['verdict']}", 60))
    ax.invert_yaxis()
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)
