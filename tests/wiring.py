"""
wiring.py - what reaches a method's functions in a script's own run, caught for a test to compare.

    calls = catch(monkeypatch, ppo)                 # every row of every axis of ppo.py
    ppo.main([…])
    for call in calls["coherent"]:
        assert close(call.sft_logp, log_probs(…))   # the same quantity, computed apart
"""
import functools
import inspect
from collections import defaultdict
from types import SimpleNamespace

import torch


def copied(x):
    """Tensors as they are now, in containers too; models and the rest by reference."""
    if isinstance(x, torch.Tensor):
        return x.detach().clone()
    if isinstance(x, dict):
        return {k: copied(v) for k, v in x.items()}
    if isinstance(x, list | tuple) and type(x) in (list, tuple):
        return type(x)(copied(v) for v in x)
    return copied_fields(x) if isinstance(x, SimpleNamespace) else x


def copied_fields(x):
    """A namespace whose tensors are copies."""
    return SimpleNamespace(**copied(vars(x)))


def caught(calls, name, fn, see):
    """fn, which notes each call under its name: arguments by their names, `out`, and `grad`, the
    names of the arguments that a gradient would reach."""
    signature = inspect.signature(fn)

    @functools.wraps(fn)
    def noting(*args, **kw):
        bound = signature.bind(*args, **kw)
        bound.apply_defaults()
        known = bound.arguments
        grad = {k for k, x in known.items() if isinstance(x, torch.Tensor) and x.requires_grad}
        call = SimpleNamespace(**{k: copied(x) for k, x in known.items()}, grad=grad, out=None)
        if see:
            see(name, call)
        calls[name].append(call)
        out = fn(*args, **kw)
        call.out = copied(out)
        return out

    return noting


def catch(monkeypatch, script, *names, see=None):
    """{name: calls, in order} of a script's functions, filled while it runs.

    names: functions of the module ("scored"), rows of a table ("PROVIDE.sft_logp"), whole tables
    ("LOSSES"); none: every row of every axis. Rows that are classes are left alone. see(name, call)
    is called before the function runs, where weights must be read as they are at that moment.
    """
    calls = defaultdict(list)
    tables = [x for x in names if isinstance(getattr(script, x, None), dict)]
    rows = [(getattr(script, x), row) for x in tables for row in getattr(script, x)]
    rows += [(getattr(script, x.split(".")[0]), x.split(".")[1]) for x in names if "." in x]
    if not names:
        tables_of = {axis: x for axis, x in script.AXES.items() if axis not in ("kernels", "peft")}
        rows = [(table, row) for table in tables_of.values() for row in table]
    for table, row in rows:
        if callable(table[row]) and not inspect.isclass(table[row]):
            monkeypatch.setitem(table, row, caught(calls, row, table[row], see))
    for name in names:
        if name not in tables and "." not in name:
            monkeypatch.setattr(script, name, caught(calls, name, getattr(script, name), see))
    return calls
