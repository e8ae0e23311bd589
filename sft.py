"""
sft.py - supervised learning: pre-training a small base model, and fine-tuning on demonstrations.

    python sft.py                                  # docstrings from signatures, its own base first
    python sft.py --config pretrain                # only the base model, on the Python standard library
    python sft.py --config arithmetic              # addition with a chain of thought, from scratch
    python sft.py --init Qwen2.5-0.5B --data demos.jsonl --config lora

Map      1 config   2 the loss   3 data   4 start   5 evaluate   6 train          B rows, T tokens
preset      data                                       idea
pretrain    stdlib: sources and prose, packed          next-token loss on every token
sft         signatures: (signature, docstring) pairs   loss on the completion only, its EOS included
arithmetic  column-wise addition, bytes                a verifiable task, from scratch
toyif_base  the three behaviours of the world ToyIF    the base of the claims about rewards
toyif       its good demonstrations only               few rows: what Self-Rewarding PPO starts from
lora        any                                        adapters on every linear layer, merged when saved
tiny        any                                        30 s on any CPU: shows that everything turns
Watch    val_loss is nats per scored token and is the number to believe; a falling train loss with a rising
         val_loss is memorising. bpb (bits per byte) is the one to compare between tokenizers.
"""
import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

import kernels
from data import prefs, tasks, text, tokenizer
from data.run import Run, UserError, batch_indices, checkpoint, cli, configure, launch, lock, result, settings
from model import (Transformer, autocast, collate, generate, init, load, load_balance_loss, preset, save,
                   token_logprobs)
from optim import OPTIMISERS, SCHEDULES, adapter_state, add_lora, merge_lora, set_lr

# --- config -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What every run has; what belongs to a loss, schedule or optimiser is an argument of its function."""
    config: str = ""             # presets and TOML files, left to right
    data: str = "signatures"     # stdlib or another text (packed); a task, a JSONL of demonstrations
    rows: int = 0                # use only so many demonstrations (0: all)
    init: str = "base:pretrain"  # checkpoint to start from; base:PRESETS makes it first; empty: a new model
    model: str = "4x128"         # layers x width of a new model
    family: str = "qwen3"        # its architecture: llama, qwen2, qwen3, mixtral, qwen3_moe
    tokenizer: str = "bpe"       # of a new model: bpe (trained on the data), bytes, toyif, a folder, gpt2 …
    vocab: int = 2048            # size of a trained bpe
    context: int = 256           # longest row in tokens; a new model's context is twice that
    chat: bool = False           # wrap prompts in the checkpoint's chat template
    loss: str = "nll"            # which row of LOSSES
    optimiser: str = "adamw"     # which row of OPTIMISERS
    schedule: str = "cosine"     # which row of SCHEDULES
    steps: int = 0               # optimizer steps (0: epochs decides)
    epochs: float = 3.0          # passes over the data, where steps is 0
    batch: int = 32              # rows per optimizer step
    micro: int = 32              # rows per forward pass: lower it when memory runs out, results do not change
    lr: float = 1e-3             # peak learning rate
    warmup: int = 20             # steps of linear warm-up
    weight_decay: float = 0.1    # on matrices, not on norms and biases
    clip: float = 1.0            # largest gradient norm
    lora: int = 0                # rank of LoRA adapters (0: train everything)
    eval_every: int = 100        # steps between evaluations
    save_every: int = 200        # steps between checkpoints
    keep: int = 2                # checkpoints to keep
    stop: int = 0                # pause after this step (0: no); --resume goes on
    out: str = ""                # run folder (default out/sft/<presets>)
    seed: int = 0                # of initialisation, data order and sampling
    device: str = "auto"         # cpu or cuda
    dtype: str = "auto"          # of the matmuls: float32, or bfloat16 under autocast (default on CUDA)
    compile: bool = False        # torch.compile the model
    kernels: str = "auto"        # auto, or torch: the plain definition of every kernel
    resume: bool = False         # go on from the newest checkpoint of the run folder


PRESETS = dict(
    pretrain=dict(data="stdlib", init="", steps=800, batch=16, micro=16, lr=3e-3, warmup=60, eval_every=200),
    sft=dict(),                                                                  # the defaults
    arithmetic=dict(data="arithmetic", init="", tokenizer="bytes", model="2x128", context=128, rows=20000,
                    steps=1500, batch=64, micro=64, lr=2e-3, eval_every=250),
    toyif_base=dict(data="toyif_base", init="", tokenizer="toyif", model="2x64", context=32, rows=30000,
                    steps=3500, batch=64, micro=64, lr=2e-3, eval_every=500, save_every=1000, keep=1),
    toyif=dict(data="toyif", init="base:toyif_base", context=32, epochs=4.0, rows=512, lr=3e-4, warmup=0,
               weight_decay=0.0, save_every=1000, eval_every=1000, keep=1),
    n64=dict(rows=64),
    more=dict(steps=304),                                  # toyif's 64 steps, plus the 240 of ppo.py's toyif
    more64=dict(steps=248),                                # 8 plus 240
    lora=dict(lora=8, lr=2e-3),
    tiny=dict(model="2x64", steps=100, batch=8, micro=8, context=192, vocab=512, warmup=10, eval_every=50),
)
SIZES = ("tiny",)                # presets that a run hands on to the base that it makes

CURVES = {"nats per token": ["loss", "val_loss", "ood_loss"], "bits per byte": ["val_bpb", "ood_bpb"],
          "learning rate": ["lr"]}

# --- the loss -----------------------------------------------------------------------------------------


def nll(logp):
    """Cross-entropy: the negative log-probability of every scored token.   [B, T] -> [B, T]"""
    return -logp


LOSSES = dict(nll=nll)
AXES = dict(loss=LOSSES, optimiser=OPTIMISERS, schedule=SCHEDULES, kernels=kernels.MODES)

# --- data ---------------------------------------------------------------------------------------------


def packed(documents, tok, width):
    """Documents -> windows of `width` tokens of BOS doc EOS BOS doc …, as (first, rest) rows."""
    ids = [i for d in documents for i in [*tok.prompt(""), *tok.encode(d), tok.eos]]
    flat = torch.tensor(ids, dtype=torch.int32)
    return [(w[:1], w[1:]) for w in flat.split(width) if len(w) > 1]


def demonstrations(task, problems, tok, width, chat=False):
    """Problems -> (prompt ids, completion ids + EOS) rows that fit `width`; longer ones are left out, aloud.

    Raises UserError for a prompt that alone fills the context.
    """
    out, long = [], 0
    for i, p in enumerate(problems):
        prompt, completion = tok.prompt(p, chat), [*tok.encode(task.demo(p)), tok.eos]
        if len(prompt) >= width:
            raise UserError(f"{task.name}, row {i + 1}: a prompt of {len(prompt)} tokens does not fit "
                            f"--context {width}; raise it or shorten the prompt")
        long += len(prompt) + len(completion) > width
        out += [(prompt, completion)] if len(prompt) + len(completion) <= width else []
    if long:
        print(f"{task.name}: {long} of {len(problems)} rows are longer than --context {width} and left out",
              flush=True)
    return out


def rows(c, tok, split):
    """The data set of a split as (prompt ids, completion ids) rows; the loss falls on the completions."""
    if text.is_corpus(c.data):
        return packed(text.documents(c.data, split), tok, c.context)
    task = tasks.task(c.data)
    problems = task.problems(split, c.rows if split == "train" else 256, c.seed)
    return demonstrations(task, problems, tok, c.context, c.chat)


def new_tokenizer(c):
    """The tokenizer of a new model; a BPE is trained once on the training documents, in data/cache/."""
    if c.tokenizer != "bpe":
        return prefs.tokenizer() if c.tokenizer == "toyif" else tokenizer.get(c.tokenizer)
    if text.is_corpus(c.data):
        documents = text.documents(c.data, "train")
    else:
        task = tasks.task(c.data)
        documents = [p["prompt"] + task.demo(p) for p in task.problems("train", c.rows, c.seed)]
    name = hashlib.sha256("\0".join(documents).encode(errors="replace")).hexdigest()[:12]
    folder = text.CACHE / f"bpe-{c.vocab}-{name}"
    with lock(folder):
        if not folder.exists():
            sample = documents[:: max(1, sum(map(len, documents)) // 4_000_000)]
            made = Path(f"{folder}.tmp")
            tokenizer.train_bpe(sample, c.vocab).save(made)
            made.rename(folder)
    return tokenizer.Tokenizer.load(folder)


# --- start --------------------------------------------------------------------------------------------


def base(presets, like="", **changes):
    """The checkpoint folder that `sft.py --config presets` leaves, made now if it is not under out/sft/.

    like: the asking run's own --config, whose size preset (tiny) is handed on. changes: further keys, e.g.
    seed=1. The folder's name carries a hash of all settings, so that different ones never share a checkpoint
    (delete it by hand after changing the code).
    """
    names = [*presets.split(","), *(s for s in SIZES if s in like.split(","))]
    argv = ["--config", ",".join(names), *(f"--{k}={v}" for k, v in changes.items())]
    c, f = configure(Config, PRESETS, AXES, __doc__, argv)
    tag = hashlib.sha256(repr(sorted(settings(replace(c, device=""), f).items())).encode()).hexdigest()[:8]
    folder = Path("out/sft") / f"base-{'-'.join(names)}-{tag}"
    with lock(folder):
        if result(folder) is None:
            print(f"making {folder}  (python sft.py {' '.join(argv)})", flush=True)
            train(replace(c, out=str(folder), resume=(folder / "run.json").exists()), f)
    return checkpoint(folder)


def find(path, like, **changes):
    """--init's value as a folder: base:PRESETS is made if need be, anything else stands for itself."""
    return base(path.removeprefix("base:"), like, **changes) if path.startswith("base:") else path


def start(c, origin):
    """The model and tokenizer that training starts from: the folder `origin`'s, or new ones if it is ''."""
    if not origin:
        tok = new_tokenizer(c)
        return init(preset(c.model, tok, 2 * c.context, c.family), c.seed).to(c.device), tok
    model, tok = load(origin, c.device)
    if not isinstance(model, Transformer):
        raise UserError(f"--init {c.init} is a reward model; sft.py needs a language model")
    if c.context > model.config.max_position_embeddings:
        longest = model.config.max_position_embeddings
        raise UserError(f"--context {c.context} exceeds the {longest} tokens of {c.init}: lower it")
    return model, tok


# --- evaluate -----------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, tok, data, c, limit=256):
    """Mean nats per scored token, and bits per byte of scored text, over the first `limit` rows."""
    data, nats, count, size = data[:limit], 0.0, 0.0, 0
    for i in range(0, len(data), c.micro):
        tokens, mask = collate(data[i:i + c.micro], tok.pad or 0, c.device)
        with autocast(c.device, c.dtype):
            nats -= token_logprobs(model, tokens, mask).sum().item()
        count += mask.sum().item()
        size += sum(len(tok.tokens[t]) for t in tokens[mask > 0].tolist() if t not in tok.hidden)
    return dict(loss=nats / max(count, 1), bpb=nats / math.log(2) / max(size, 1))


def show(model, tok, task, problems, c, run):
    """Print three completions of held-out prompts; -> the task's metric over all problems, at T=1."""
    g = torch.Generator().manual_seed(c.seed)
    prompts = [tok.prompt(p, c.chat) for p in problems]
    room = model.config.max_position_embeddings - max(map(len, prompts))
    roll = generate(model, prompts, min(task.max_new, room), generator=g)
    answers = [tok.decode(ids) for ids in roll.completions()]
    for p, a in list(zip(problems, answers))[:3]:
        run.say(f"  prompt     {p['prompt']!r}\n  model      {a!r}\n  reference  {task.demo(p)!r}")
    scores = [task.reward(p, a, f) for p, a, f in zip(problems, answers, roll.finished.tolist())]
    return {task.metric: sum(scores) / len(scores)}


# --- train --------------------------------------------------------------------------------------------


def train(c, f):
    """One run: load, loop, log, save. Returns the last evaluation's numbers."""
    origin = find(c.init, c.config, device=c.device)             # made before this run's clock starts
    kernels.use(c.kernels)
    with Run(c, f, "sft", CURVES) as run:
        resumed = run.last if run.last and not c.lora else None
        model, tok = load(resumed, c.device) if resumed else start(c, origin)
        if c.lora:
            add_lora(model, c.lora, generator=torch.Generator().manual_seed(c.seed))
        data = rows(c, tok, "train")
        held_out = {s: rows(c, tok, s) for s in tasks.held_out(c.data)}
        total = c.steps or max(1, math.ceil(len(data) * c.epochs / c.batch))
        opt = f.optimiser(model, c.lr, c.weight_decay)
        if run.state:
            opt.load_state_dict(run.state["opt"])
            model.load_state_dict(run.state["adapter"], strict=False)
        forward = torch.compile(model) if c.compile else model
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        size = sum(p.numel() for p in model.parameters())
        run.say(f"{run.folder}: {size / 1e6:.2f} M parameters ({trained / 1e6:.2f} M trained), {len(data)} "
                f"rows, {total} steps of {c.batch}, {c.device} {c.dtype}")
        if data:
            prompt, completion = (tok.decode(ids, False) for ids in data[0])
            run.say(f"  not scored {prompt[-160:]!r}\n  scored     {completion[:160]!r}")

        def write(folder):
            save(merge_lora(model) if c.lora else model, tok, folder)

        def measure():
            rows = {s: evaluate(model, tok, d, c) for s, d in held_out.items() if d}
            return {f"{split}_{k}": v for split, row in rows.items() for k, v in row.items()}

        def state():
            return dict(opt=opt.state_dict(), adapter=adapter_state(model) if c.lora else {})

        scores = {}
        for step in run.steps(total):
            # 1. get data
            picked = batch_indices(len(data), c.batch, step, c.seed).tolist()
            n = sum(len(data[i][1]) for i in picked)                             # scored tokens of the step
            # 2. score
            loss, aux = 0.0, 0.0
            for i in range(0, c.batch, c.micro):
                part = [data[j] for j in picked[i:i + c.micro]]
                tokens, mask = collate(part, tok.pad or 0, c.device)                     # [b, T], [b, T]
                with autocast(c.device, c.dtype):
                    logp = token_logprobs(forward, tokens, mask)                         # [b, T]
                    part_loss = (f.loss(logp) * mask).sum() / n
                    ends = torch.tensor([len(p) + len(r) for p, r in part], device=tokens.device)
                    real = torch.arange(tokens.size(1), device=tokens.device) < ends[:, None]  # [b, T]
                    balance = load_balance_loss(model, real) * len(part) / c.batch
                (part_loss + model.config.router_aux_loss_coef * balance).backward()
                loss, aux = loss + part_loss.item(), aux + balance.item()
            # 3. update
            norm = clip_grad_norm_([p for p in model.parameters() if p.requires_grad], c.clip)
            set_lr(opt, c.lr * f.schedule(step, total, c.warmup))
            opt.step()
            opt.zero_grad()
            # 4. tell
            row = dict(loss=loss, norm=norm, lr=opt.param_groups[0]["lr"], tokens=n)
            row |= dict(aux=aux) if aux else {}
            if (step + 1) % c.eval_every == 0 or step + 1 == total:
                scores = measure()
                row |= scores
            run.log(step + 1, **row)
            if (step + 1) % c.save_every == 0 or step + 1 == total or step + 1 == c.stop:
                run.save(step + 1, write, **state())
        if c.stop and c.stop < total:
            return scores
        if run.start >= total:                                   # resumed after its last step
            scores = measure()
        if not text.is_corpus(c.data):
            task = tasks.task(c.data)
            quality = show(model, tok, task, task.problems("val", 64, c.seed), c, run)
            run.say(f"  held out: " + "  ".join(f"{k} {v:.3f}" for k, v in (scores | quality).items()))
            scores |= {f"val_{k}": v for k, v in quality.items()}
        return run.finish(**scores)


# --- main ---------------------------------------------------------------------------------------------


def main(argv=None):
    """python sft.py …: see the docstring above, or --help."""
    return launch("sft", Config, PRESETS, AXES, {}, __doc__, train, argv)


if __name__ == "__main__":
    cli(main)
