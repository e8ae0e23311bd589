"""
beside.py - our scripts beside what people would use instead: one model, one data set, one machine.

    python tests/beside.py                     # every row, ten minutes on two cores
    python tests/beside.py sft grpo            # rows whose name contains one of the words
    python tests/beside.py grpo --rounds 5
    python tests/beside.py real --model FOLDER --dtype bfloat16       # of a checkpoint

Needs transformers, trl and datasets beside requirements.txt. Each side is a process of its own, the
two in turn; a step's time is the median of a process's steps, two of warm-up left out. The model is
new, a Llama of 4 layers and width 256 with 2,048 words; texts are random letters, a token each.
Rows "real" train and sample the checkpoint in FOLDER: sft.py beside TRL, generate beside
transformers' own.
"""
import argparse
import json
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

WARM, STEPS = 2, 8
# prompts and responses: tokens, or a range of them; rows a step
SHAPES = dict(
    sft=dict(prompt=1, response=253, rows=16), reward=dict(prompt=(16, 112), response=(16, 112),
                                                           rows=16),
    dpo=dict(prompt=(16, 112), response=(16, 112), rows=16),
    grpo=dict(prompt=64, response=64, rows=8, samples=8),
    grpo_256=dict(prompt=256, response=64, rows=8, samples=8),
    real_sft=dict(prompt=8, response=420, rows=4),                       # 4 x 256 tokens or so
    real_sample_1=dict(prompt=24, response=64, rows=1),
    real_sample_16=dict(prompt=24, response=64, rows=16))


def words(rng, size):
    """Random letters, as many as tokens are asked for."""
    n = size if isinstance(size, int) else rng.randint(*size)
    return "".join(rng.choices(string.ascii_lowercase, k=n))


def made(folder, shape, kind, checkpoint=""):
    """A model's folder and a file of rows, as both sides read them."""
    from data.tokenizer import bytes_tokenizer
    from model import init, preset, save
    tok, rng = bytes_tokenizer(), random.Random(0)
    if checkpoint:
        (folder / "model").symlink_to(Path(checkpoint).resolve())
    else:
        config = replace(preset("4x256", tok, 512, "llama"), vocab_size=2048)
        save(init(config, 0), tok, folder / "model")
    rows = []
    for _ in range(shape["rows"] * (WARM + STEPS) + 16):
        row = dict(prompt=words(rng, shape["prompt"]))
        if kind in ("dpo", "reward"):
            row |= {side: words(rng, shape["response"]) for side in ("chosen", "rejected")}
        else:
            row |= dict(completion=words(rng, shape["response"]))
        rows.append(row)
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "score.py").write_text("def score(prompt, response, row):\n"
                                     "    return response.count('e') / 10\n")


def our_samples(folder, prompts, new, dtype):
    """Seconds of sampling `new` tokens after prompts, greedily, some times over."""
    import torch

    from model import generate, load
    model, tok = load(folder / "model", "cpu", getattr(torch, dtype))
    ids = [tok.prompt(x) for x in prompts]
    return timed(lambda: generate(model, ids, new, temperature=0, stop=[]))


def their_samples(folder, prompts, new, dtype):
    """The same of transformers' generate."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tok = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    tok.pad_token = tok.pad_token or tok.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, dtype))
    ids = tok(prompts, return_tensors="pt", padding=True)
    return timed(lambda: model.generate(**ids, max_new_tokens=new, min_new_tokens=new,
                                        do_sample=False, pad_token_id=tok.pad_token_id))


def timed(work, times=4):
    """Seconds of work(), without those of the first time."""
    out = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        out.append(time.perf_counter() - begin)
    return out[1:]


def ours(folder, kind, shape, dtype):
    """Seconds of a step of our script."""
    from data.run import read_log
    script = kind.removeprefix("real_").partition("_")[0]
    if script == "sample":
        return our_samples(folder, prompts_in(folder, shape["rows"]), shape["response"], dtype)
    options = dict(init=f"{folder}/model", data=f"{folder}/rows.jsonl", out=f"{folder}/run",
                   steps=WARM + STEPS, save_every=1000, dtype=dtype, warmup=0, micro=64, lr=1e-5)
    if script != "reward":                               # which has no held-out rows here
        options |= dict(eval_every=1000)
    if kind.startswith("real"):
        options |= dict(context=512, chat="false", eval_prompts=0)
    options |= dict(
        prompts=shape["rows"], samples=shape["samples"], minibatches=1, max_new=shape["response"],
        eval_prompts=1, eval_samples=1, reward=f"{folder}/score.py:score",
    ) if script == "grpo" else dict(batch=shape["rows"])
    words = [f"--{k}={v}" for k, v in options.items()]
    out = subprocess.run([sys.executable, str(ROOT / f"{script}.py"), *words],
                         capture_output=True, text=True)
    if out.returncode:
        raise SystemExit(out.stderr[-2000:])
    if script == "grpo":
        return [row["t_gen"] + row["t_score"] + row["t_update"] for row in read_log(f"{folder}/run")
                if "t_gen" in row][WARM:]
    at = [row["time"] for row in read_log(f"{folder}/run") if "loss" in row]
    return [b - a for a, b in zip(at[WARM - 1:], at[WARM:])]


def prompts_in(folder, count):
    """The first prompts of the rows, which differ."""
    lines = (folder / "rows.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[:count]]


def as_text(row):
    """What TRL learns from with every token scored."""
    return dict(text=row["prompt"] + row["completion"])


def theirs(folder, kind, shape, dtype):
    """Seconds of a step of TRL's trainer."""
    script = kind.removeprefix("real_").partition("_")[0]
    if script == "sample":
        return their_samples(folder, prompts_in(folder, shape["rows"]), shape["response"], dtype)
    import datasets
    import trl
    from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification,
                              AutoTokenizer, TrainerCallback)
    tok = AutoTokenizer.from_pretrained(folder / "model")
    tok.pad_token = tok.pad_token or tok.eos_token
    rows = datasets.load_dataset("json", data_files=f"{folder}/rows.jsonl", split="train",
                                 cache_dir=f"{folder}/cache")
    at = []

    class Clock(TrainerCallback):
        """Notes when every step ends."""
        def on_step_end(self, *_, **__):
            at.append(time.perf_counter())

    common = dict(output_dir=f"{folder}/trl", max_steps=WARM + STEPS, use_cpu=True,
                  report_to="none", logging_steps=1000, save_strategy="no",
                  bf16=dtype == "bfloat16",
                  per_device_train_batch_size=shape["rows"], gradient_checkpointing=False,
                  learning_rate=1e-5, disable_tqdm=True)
    lm = AutoModelForSequenceClassification if script == "reward" else AutoModelForCausalLM
    more = dict(num_labels=1) if script == "reward" else {}
    model = lm.from_pretrained(folder / "model", dtype="float32", **more)
    model.config.pad_token_id = tok.pad_token_id
    if script == "sft":
        rows = rows.map(as_text, remove_columns=rows.column_names)
        trainer = trl.SFTTrainer(model, trl.SFTConfig(max_length=512, **common), train_dataset=rows,
                                 processing_class=tok)
    elif script == "dpo":
        config = trl.DPOConfig(precompute_ref_log_probs=True, **common)      # as ours: once, before
        trainer = trl.DPOTrainer(model, None, config, train_dataset=rows, processing_class=tok)
    elif script == "reward":
        trainer = trl.RewardTrainer(model, trl.RewardConfig(**common), train_dataset=rows,
                                    processing_class=tok)
    else:
        n = shape["samples"]
        common |= dict(per_device_train_batch_size=shape["rows"] * n)
        config = trl.GRPOConfig(num_generations=n, max_completion_length=shape["response"],
                                beta=0.0, temperature=1.0, **common)
        trainer = trl.GRPOTrainer(
            model, lambda completions, **_: [x.count("e") / 10 for x in completions], config,
            train_dataset=rows.remove_columns("completion"), processing_class=tok)
    trainer.add_callback(Clock())
    trainer.train()
    return [b - a for a, b in zip(at[WARM - 1:], at[WARM:])]


def measured(side, kind, dtype, checkpoint):
    """The median step of a side, in a process of its own."""
    out = subprocess.run([sys.executable, __file__, "--side", side, kind, dtype,
                          *["--model", checkpoint] * bool(checkpoint)],
                         capture_output=True, text=True)
    if out.returncode:
        raise SystemExit(f"{side} {kind}:\n{out.stdout[-1000:]}\n{out.stderr[-3000:]}")
    return float(out.stdout.split()[-1])


def main(argv=None):
    """The table, or with --side the child process that makes one of its numbers."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--model", default="", help="a checkpoint for the rows named real")
    parser.add_argument("--side", nargs=3)
    asked = parser.parse_args(argv)
    if asked.side:
        side, kind, dtype = asked.side
        with tempfile.TemporaryDirectory() as folder:
            folder, shape = Path(folder), SHAPES[kind]
            made(folder, shape, kind, asked.model)
            print(statistics.median(dict(ours=ours, trl=theirs)[side](folder, kind, shape, dtype)))
        return
    print(f"{'row':<15}{'ours, s':>10}{'theirs, s':>10}{'ratio':>8}   {asked.dtype}")
    for kind in SHAPES:
        if asked.words and not any(w in kind for w in asked.words) or (
                kind.startswith("real") != bool(asked.model)):
            continue
        took = dict(ours=[], trl=[])
        for i in range(asked.rounds):
            for side in (("ours", "trl"), ("trl", "ours"))[i % 2]:
                took[side].append(measured(side, kind, asked.dtype, asked.model))
        a, b = (statistics.median(took[x]) for x in ("ours", "trl"))
        print(f"{kind:<15}{a:>10.3f}{b:>10.3f}{b / a:>7.2f}x", flush=True)


if __name__ == "__main__":
    main()
