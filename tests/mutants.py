"""
mutants.py - inversions of the code's own lines, and whether a test notices: two arguments
exchanged, a sign turned, a term dropped, an order reversed, a memory that is not updated.

    python tests/mutants.py                        # all of them; what survives is printed
    python tests/mutants.py ppo.py data/prefs.py   # those of two files
    python tests/mutants.py ppo.py --words entropy # those whose description has the word

mutants/<file>.txt holds those of a file, from most to least telling:

    > test_ppo.py -k wiring                        # the tests for those below, up to the next >
    # the SFT model's log-probs and the base's exchanged
    - sft_logp - base_logp
    + base_logp - sft_logp

The text behind "- " stands once in the file, that behind "+ " replaces it; several such lines are
several lines. "= reason" under a mutant says why no test can notice it.
"""
import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).parent
ROOT, TABLES = HERE.parent, HERE / "mutants"
LIMIT = 600            # seconds; a mutant that never ends is noticed too
# what bases are made of: a mutant in one of them trains its own, others share a worker's
ROOTS = ("sft.py", "model.py", "optim.py", "kernels.py", "data/")


@dataclass(frozen=True)
class Mutant:
    """One change of a file: what it does in words, the text and what replaces it, the tests that
    are to notice it, and the argument if none can."""
    file: str
    what: str
    old: str
    new: str
    tests: tuple
    argued: str = ""

    def applied(self, text):
        """The file's text with the change; ValueError unless it can be made in one place."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file}: {text.count(self.old)} places have {self.old!r}, "
                             f"wanted one ({self.what})")
        return text.replace(self.old, self.new)


def read_table(path):
    """The mutants of a file, from its table's text.   -> [Mutant]"""
    file, tests, out = path.relative_to(TABLES).with_suffix("").as_posix(), (), []
    found = None

    def finish():
        if found:
            old, new = ("\n".join(found[sign]) for sign in "-+")
            out.append(Mutant(file, " ".join(found["#"]), old, new, found[">"],
                              " ".join(found["="])))

    for number, line in enumerate(path.read_text().splitlines(), 1):
        sign, rest = line[:1], line[2:]
        if not line.strip():
            continue
        if sign == ">":
            tests = tuple(rest.split(maxsplit=2))
        elif sign == "#" and (found is None or found["-"]):
            finish()
            found = {x: [] for x in "#-+="} | {"#": [rest], ">": tests}
        elif sign in "#-+=" and found:
            found[sign].append(rest)
        else:
            raise ValueError(f"{path}:{number}: {line!r} begins with none of > # - + =")
    finish()
    return out


def tables(files=()):
    """All mutants, or those of some files.   -> [Mutant]"""
    paths = sorted(TABLES.rglob("*.txt"))
    known = [p.relative_to(TABLES).with_suffix("").as_posix() for p in paths]
    for x in files:
        if x not in known:
            raise SystemExit(f"no mutants of {x!r}: there are {', '.join(known)}")
    return [m for p, name in zip(paths, known) if not files or name in files
            for m in read_table(p)]


def copy_of(folder):
    """The checkout's files that git would keep, in a folder, without results."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout.split("\n")
    for name in listed:
        if name and (ROOT / name).is_file() and not name.startswith("data/results/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def pytest_in(folder, tests, bases, told):
    """Run in a process of its own: the tests, in the copy."""
    import pytest
    import torch
    sys.path[:] = [x for x in sys.path if not Path(x or ".").resolve().is_relative_to(ROOT)]
    os.chdir(folder)
    os.environ |= dict(BASES=str(bases)) if bases else {}
    os.environ.setdefault("DATA_DIR", str(ROOT.parent / "shared" / "data"))
    torch.set_num_threads(1)
    with open(told, "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        file, *rest = tests
        os._exit(int(pytest.main([f"tests/{file}", *rest, "-x", "-q", "-p", "no:cacheprovider",
                                  f"--basetemp={folder}/tmp"])))


class Workplace(threading.local):
    """A worker's copy of the checkout, and the bases that it has trained."""
    folder = None

    def begin(self, home):
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(dir=home)) / "copy"
            copy_of(self.folder)

    def run(self, tests, file=""):
        """The tests' outcome: 'passed', 'failed', 'late', or pytest's code for what else.   str"""
        bases = None if file.startswith(ROOTS) else self.folder.parent / "bases"
        told = self.folder.parent / "told.txt"
        job = multiprocessing.get_context("forkserver").Process(
            target=pytest_in, args=(self.folder, tests, bases, told))
        job.start()
        job.join(LIMIT)
        late = job.is_alive()
        if late:
            job.kill()
            job.join()
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)
        words = {0: "passed", 1: "failed", 5: "no such test"}
        return "late" if late else words.get(job.exitcode, f"pytest's code {job.exitcode}: "
                                             + told.read_text()[-2000:])


HERE_AND_NOW = Workplace()


def outcome(job):
    """What became of a mutant, or of tests that are given alone, unchanged code."""
    home, tests, mutant = job
    HERE_AND_NOW.begin(home)
    if mutant is None:
        return HERE_AND_NOW.run(tests)
    path = HERE_AND_NOW.folder / mutant.file
    text = path.read_text()
    try:
        path.write_text(mutant.applied(text))
        return HERE_AND_NOW.run(tests, mutant.file)
    finally:
        path.write_text(text)


def run_all(mutants, workers):
    """{mutant: outcome}; RuntimeError if a test fails on the code as it is."""
    out, home = {}, tempfile.mkdtemp(prefix="mutants-")
    try:
        with ThreadPoolExecutor(workers) as pool:
            suites = list(dict.fromkeys(m.tests for m in mutants))
            for tests, told in tqdm(zip(suites, pool.map(outcome, [(home, x, None)
                                                                   for x in suites])),
                                    total=len(suites), desc="unchanged"):
                if told != "passed":
                    raise SystemExit(f"{' '.join(tests)} on the code as it is: {told}")
            jobs = [(home, m.tests, m) for m in mutants]
            for m, told in tqdm(zip(mutants, pool.map(outcome, jobs)), total=len(jobs),
                                desc="mutants"):
                out[m] = told
                if told not in ("failed", "late") and not m.argued:
                    tqdm.write(f"{m.file}: {told}: {m.what}\n- {m.old}\n+ {m.new}\n")
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return out


def summary(found):
    """A line a file: how many mutants, noticed, argued; what survived."""
    lines, total = [f"{'':<20}{'mutants':>9}{'noticed':>9}{'argued':>9}{'survive':>9}"], Counter()
    for file in dict.fromkeys(m.file for m in found):
        mine = {m: told for m, told in found.items() if m.file == file}
        noticed = sum(told in ("failed", "late") for told in mine.values())
        argued = sum(bool(m.argued) and told == "passed" for m, told in mine.items())
        row = dict(mutants=len(mine), noticed=noticed, argued=argued,
                   survive=len(mine) - noticed - argued)
        total.update(row)
        lines.append(f"{file:<20}" + "".join(f"{x:>9}" for x in row.values()))
    return "\n".join([*lines, f"{'all':<20}" + "".join(f"{x:>9}" for x in total.values())])


def main(argv=None):
    """The command line; 1 if a mutant survives that nobody argued away."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="files whose mutants are tried (all)")
    parser.add_argument("--words", default="", help="only descriptions with these words")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    asked = parser.parse_args(argv)
    mutants = [m for m in tables(asked.files) if asked.words in m.what]
    for m in mutants:
        compile(m.applied((ROOT / m.file).read_text()), m.file, "exec")    # before any is run
    if os.environ.get("CUDA_VISIBLE_DEVICES", "") == "" and not Path("/dev/nvidia0").exists():
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ |= dict(OMP_NUM_THREADS="1")
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["torch", "torch._dynamo", "numpy", "pytest", "triton", "tqdm", "safetensors.torch"])
    began, found = time.time(), run_all(mutants, asked.jobs)
    print(f"\n{summary(found)}\n{len(found)} mutants in {(time.time() - began) / 60:.0f} minutes")
    return int(any(t not in ("failed", "late") and not m.argued for m, t in found.items()))


if __name__ == "__main__":
    sys.exit(main())
