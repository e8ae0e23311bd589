"""Tests run from anywhere: the repository's root goes on the path; every test has another working
directory, so that none reads or writes the checkout's own out/."""
import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: its threads wait for each other, and
import torch                                   # on a busy machine most of a tiny test is waiting

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels.py is imported: it then runs on the CPU
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        plain_dot = interpreter.InterpreterBuilder.create_dot

        def dot(self, a, b, *rest):
            """Triton 3.9's interpreter multiplies the integers that it stores bfloat16 as: widen
            first."""
            a, b = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x
                    for x in (a, b))
            return plain_dot(self, a, b, *rest)

        interpreter.InterpreterBuilder.create_dot = dot
    except ImportError:                         # no Triton here: tests of its path are skipped
        pass

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data.run
import kernels

DATA_DIR = Path(os.environ.get("DATA_DIR", ROOT.parent / "shared" / "data"))


def ring_pairs(path):
    """A small file of pairs in the letters of the world Ring, which takes no evaluation by gold."""
    letters = "qrnwsilvubgmdopej" * 3
    rows = [dict(prompt=f"{a}{b}=", chosen=b * (n % 5 + 1), rejected=a * (n % 3 + 1))
            for n, (a, b) in enumerate(zip(letters, letters[1:]))]
    Path(path).write_text("\n".join(map(json.dumps, rows)))


def close(a, b, tol=1e-6):
    """Whether two tensors or nested numbers have one shape and agree to an absolute tolerance."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=tol)


def rand(*shape, seed=0):
    """Normal float64 numbers, fixed by the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny_model(vocab=8, layers=2, seed=0, context=64, eos=(), sharp=6.0):
    """A random model of width 32, float64, whose next-token laws are far from uniform."""
    from model import ModelConfig, init
    model = init(ModelConfig(vocab_size=vocab, hidden_size=32, intermediate_size=32,
                             num_hidden_layers=layers,
                             num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                             eos_token_id=eos,
                             max_position_embeddings=context, tie_word_embeddings=False),
                 seed).double()
    with torch.no_grad():
        model.embed_tokens.weight.mul_(25)
        model.lm_head.weight.mul_(sharp * 5)
    return model.requires_grad_(False)


def rule(name="fixed", **kw):
    """A row of specdec.LENGTHS with its arguments bound, as configure() hands it to the script."""
    from specdec import LENGTHS
    return partial(LENGTHS[name], **{**data.run.hyper(LENGTHS[name]), **kw})


def chi_square(counts, law):
    """Pearson's test: (degrees of freedom, p); cells that expect fewer than five are one."""
    assert counts.sum() > 0 and counts[law == 0].sum() == 0
    expected = law * counts.sum()
    big = expected >= 5
    a, b = (torch.cat([x[big], x[~big].sum()[None]]) for x in (counts.double(), expected))
    a, b = a[b > 1e-9], b[b > 1e-9]
    half = torch.tensor((len(b) - 1) / 2, dtype=torch.float64)
    return len(b) - 1, torch.special.gammaincc(half, ((a - b) ** 2 / b).sum() / 2).item()


def merged(*argv):
    """A command line in which an option replaces an earlier one of its name: scripts refuse the
    second."""
    options = {}
    for word in argv:
        if word.startswith("--"):
            key = word[2:].partition("=")[0].replace("-", "_")
            options[key] = [word]
        else:
            options[key].append(word)
    return [word for words in options.values() for word in words]


@pytest.fixture(scope="session")
def nowhere(tmp_path_factory):
    """A working directory with nothing in it."""
    return tmp_path_factory.mktemp("nowhere")


@pytest.fixture(autouse=True)
def not_in_the_checkout(nowhere, monkeypatch):
    """A test that asks for no folder of its own is in an empty one."""
    monkeypatch.chdir(nowhere)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty working directory, so that runs write their out/ there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def default_kernels():
    """Every test starts with each kernel on its usual path."""
    kernels.use("auto")


@pytest.fixture(autouse=True)
def few_curves(request, monkeypatch):
    """A run's curve is half of the time of a run of two steps: only test_run.py and what is marked
    draws it."""
    if request.path.name != "test_run.py" and not request.node.get_closest_marker("curve"):
        monkeypatch.setattr(data.run, "draw", lambda folder, curves: None)


@pytest.fixture(scope="session")
def bases_folder(tmp_path_factory):
    """Where shared_bases keeps the base models of the session, or of many: $BASES."""
    if "BASES" in os.environ:
        Path(os.environ["BASES"]).mkdir(exist_ok=True)
        return Path(os.environ["BASES"])
    return tmp_path_factory.mktemp("bases")


@pytest.fixture
def shared_bases(workdir, bases_folder):
    """An empty working directory whose out/sft lasts for the session: tiny base models are trained
    once."""
    (workdir / "out").mkdir()
    (workdir / "out" / "sft").symlink_to(bases_folder, target_is_directory=True)
    return workdir


@pytest.fixture(scope="session")
def stories():
    """The real 260 K-parameter Llama checkpoint that lies beside the data sets."""
    path = DATA_DIR.parent / "models" / "stories260k"
    if not path.exists():
        pytest.skip(f"no checkpoint at {path}: set DATA_DIR to the folder of real data sets")
    return path


def on_triton(item):
    """Whether this is a test of a kernel's Triton path, which runs on a GPU where there is one."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return params.get("path") == "triton" and item.path.name.startswith("test_kernels")


@pytest.hookimpl(tryfirst=True)                  # before -m chooses
def pytest_collection_modifyitems(config, items):
    """Skip what is marked gpu where there is none, and slow unless -m asks for it."""
    for item in items:
        if torch.cuda.is_available() and on_triton(item):
            item.add_marker("gpu")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("slow") and "slow" not in (config.option.markexpr or ""):
            item.add_marker(pytest.mark.skip(reason="slow: run it with -m slow"))


def pytest_configure(config):
    """Declare our markers."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: minutes; run with -m slow")
    config.addinivalue_line("markers", "curve: draws the run's curve")
