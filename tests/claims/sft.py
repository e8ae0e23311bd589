"""The claims of sft.py: arms as --config strings, contrasts, what was published, headlines."""
from claims import Claim


def versus(*pairs):
    """Tests 'a < b' of arms: {label: contrast}."""
    return {f"{a} < {b}": {a: 1, b: -1} for a, b in pairs}


COST = ("val_loss", "reached", "seconds_to", "state_bytes", "opt_share", "ns_share")
SHARES = dict(never=",fraction=-1.0", formula="", all=",fraction=1.0") | {
    f"last {x} %": f",fraction={x / 100}" for x in (5, 10, 20, 40, 70)}
OTHER_TIMES = {  # and the steps that cost as much as 240 of 25 to 75 %, from prune_at
    "0 to 50 %": (0.0, 0.5, 316), "50 to 100 %": (0.5, 1.0, 164),
    "at the end": (1.0, 1.0, 78), "from the start": (0.0, 0.0, 389)}
LONG = "pretrain,adamw,race,qat,calm,steps=400,eval_every=400"
LIGHT = "pretrain,adamw,race,calm,batch=16,steps=200"
PRUNED = "pretrain,adamw,race,journey,calm,model=3x64,sparsity=0.8"
TUNE = ("lr", 2.0, "tune_loss")          # validation rows that no other number comes from
CLAIMS = dict(
    normuon=Claim(
        "NorMuon needs fewer steps than Muon, and Muon fewer than AdamW, to the same "
        "validation loss",
        "2510.05491: 21.74 % more efficient than Adam and 11.31 % than Muon at 1.1 B parameters",
        {"AdamW, one lr": "pretrain,adamw,race,aux_lr=0.0", "AdamW": "pretrain,adamw,race",
         "NorMuon": "pretrain,normuon,race,lr=0.012", "Muon": "pretrain,muon,race,lr=0.012",
         "Muon, no NS": "pretrain,muon,race,ns_steps=0,lr=0.012",
         "SOAP": "pretrain,soap,race", "Shampoo": "pretrain,shampoo,race",
         "Dion": "pretrain,dion,race",
         "Lion": "pretrain,lion,race", "sign-SGD": "pretrain,signsgd,race",
         "Adam-mini": "pretrain,adam_mini,race"},
        "steps_to", versus(("NorMuon", "Muon"), ("Muon", "AdamW"), ("NorMuon", "AdamW"),
                           ("NorMuon", "Muon, no NS")),
        better="lower", also=COST, tune=TUNE, curve="val_loss",
        smallest={"steps_to": 3},
        why="5 % of Muon's 59 steps: half of the published 11.31 %"),
    lowrank=Claim(
        "Fira, APOLLO and FRUGAL reach a lower loss than GaLore with no more state; "
        "APOLLO-Mini beats sign-SGD",
        "2410.01623, 2412.05270, 2411.07837: each reports lower perplexity than GaLore in "
        "pre-training",
        {"AdamW": "pretrain,adamw,race", "GaLore": "pretrain,galore,race,every=40",
         "GaLore, random": "pretrain,galore,race,every=40,basis=random",
         "Fira": "pretrain,fira,race,every=40",
         "APOLLO": "pretrain,apollo,race,every=40",
         "APOLLO-Mini": "pretrain,apollo_mini,race,every=40",
         "FRUGAL, columns": "pretrain,frugal_columns,race,every=40",
         "FRUGAL, blocks": "pretrain,frugal,race,every=40",
         "GradNormLoRP": "pretrain,gradnormlorp,race,every=40",
         "Q-GaLore, int8": "pretrain,qgalore,race,every=40",
         "sign-SGD": "pretrain,signsgd,race"},
        "val_loss", versus(("Fira", "GaLore"), ("APOLLO", "GaLore"), ("FRUGAL, columns", "GaLore"),
                           ("APOLLO-Mini", "sign-SGD"), ("GaLore", "GaLore, random"))
        | {"Q-GaLore < 1.02 GaLore": {"Q-GaLore, int8": 1, "GaLore": -1.02}},
        better="lower", also=("steps_to", *COST[1:]), tune=TUNE, curve="val_loss",
        smallest={"val_loss": 0.02},
        why="2 % of the perplexity"),
    lion=Claim(
        "Lion with decay λ keeps every weight of the matrices within 1/λ, "
        "and fills that box when it is small",
        "2310.05898: Lion minimises the loss subject to |W|_inf <= 1/λ",
        {f"{name}, λ {x}": f"pretrain,{name.lower()},race,weight_decay={x}.0,lr=1e-3"
         for name, x in (("Lion", 3), ("Lion", 10), ("Lion", 30), ("AdamW", 30), ("Muon", 30))},
        "box", {f"Lion, λ {x}: inside": {f"Lion, λ {x}": 1, "": -1.001} for x in (3, 10, 30)}
        | {"Lion, λ 30: the wall is reached": {"Lion, λ 30": -1, "": 0.95}},
        better="lower", also=("at_wall", "val_loss"),
        smallest={"box": 0.05},
        why="5 % of the box's half width"),
    eco=Claim(
        "ECO trains weights that exist only in 4 bits to within 1 % of float32, "
        "where plain rounding is worse",
        "2601.22101: matches training with master weights from 30 M to 2.1 B parameters "
        "(second-hand)",
        {"AdamW, float32": "pretrain,adamw,race", "ECO, int4": "pretrain,eco,race,store=int4",
         "AdamW, int4, stochastic": "pretrain,adamw,race,store=int4",
         "AdamW, int4, nearest": "pretrain,adamw,race,store=int4,rounding=nearest",
         "ECO, int4, nearest": "pretrain,eco,race,store=int4,rounding=nearest"},
        "val_loss", {"ECO < 1.01 float32": {"ECO, int4": 1, "AdamW, float32": -1.01}}
        | versus(("ECO, int4", "AdamW, int4, stochastic"),
                 ("AdamW, int4, stochastic", "AdamW, int4, nearest")),
        better="lower", also=("steps_to", *COST[1:]), tune=TUNE,
        smallest={"val_loss": 0.02},
        why="the 1 % of the loss within which the claim calls two runs equal"),
    hft=Claim(
        "Half fine-tuning forgets less than full fine-tuning at the same learning rate",
        "2404.18466: less forgetting, and no worse on the new task (second-hand)",
        {f"{name}, lr {lr}": f"{preset},forget,lr={lr}" for lr in ("3e-4", "1e-3", "3e-3")
         for name, preset in (("full", "adamw"), ("HFT", "hft"))},
        "watch_loss", versus(*((f"HFT, lr {lr}", f"full, lr {lr}")
                               for lr in ("3e-4", "1e-3", "3e-3"))),
        better="lower", also=("val_loss",),
        smallest={"watch_loss": 0.1},
        why="10 % of the perplexity on what was known before"),
    qat=Claim(
        "At 2 bits rounding weights in the last steps of training beats rounding them at the end, "
        "and the paper's share of the steps is as good as any",
        "2509.22935: the optimal share follows from tokens per byte of weights, exp(-6.73 / ln S)",
        {f"{name}, 2 bits": f"{LONG},bits=2{share}" for name, share in SHARES.items()}
        | {f"{name}, 4 bits": f"{LONG}{SHARES[name]}"
           for name in ("never", "formula", "last 20 %", "all")}
        | {f"last {x} %, cooldown 30 %, 2 bits": f"{LONG},bits=2,fraction={x / 100},fuse=false"
           for x in (20, 40)},
        "saved_loss", versus(("last 20 %, 2 bits", "never, 2 bits"),
                             ("last 20 %, 2 bits", "all, 2 bits"),
                             *(("formula, 2 bits", f"{x}, 2 bits") for x in (
                                 "last 5 %", "last 10 %", "last 20 %", "last 40 %", "last 70 %",
                                 "all")),
                             ("last 20 %, 4 bits", "never, 4 bits"),
                             ("last 20 %, 4 bits", "all, 4 bits")),
        better="lower", also=("val_loss", "quantised"),
        smallest={"saved_loss": 0.02},
        why="2 % of the perplexity"),
    lowbit=Claim(
        "Training with all products in INT8 costs nothing, in MXFP4 less with Quartet than without",
        "2501.02625, 2505.14669: INT8 and MXFP4 training near full precision from 30 M parameters "
        "up",
        {"float32": LIGHT,
         **{f"HALO {level}, {name}": f"{LIGHT},halo,level={level}{more}"
            for name, more in (("INT8", ""), ("FP6", ",format=fp6")) for level in (0, 1, 2)},
         "MXFP4": f"{LIGHT},halo,level=0,format=mxfp4",
         "Quartet": f"{LIGHT},quartet",
         "Quartet, nearest backward": f"{LIGHT},quartet,backward=nearest",
         "Quartet, floored scale": f"{LIGHT},quartet,exponent=quest_floor"},
        "val_loss", {"HALO 2, INT8 < 1.005 float32": {"HALO 2, INT8": 1, "float32": -1.005}}
        | versus(("HALO 1, FP6", "HALO 0, FP6"), ("Quartet", "MXFP4"),
                 ("Quartet", "Quartet, floored scale"), ("Quartet", "Quartet, nearest backward")),
        better="lower", also=("saved_loss",),
        smallest={"val_loss": 0.02},
        why="2 % of the perplexity"),
    lost=Claim(
        "LOST's initialisation, its dense columns and φ each help at equal parameters",
        "2508.02668: better than low-rank pre-training at equal memory, close to full rank "
        "(second-hand)",
        {"dense": "pretrain,adamw,race,calm"}
        | {f"{a}, {b}, {c}": f"pretrain,adamw,race,lost,calm{x}{y}{z}"
           for a, x in (("SVD", ""), ("random", ",start=random"))
           for b, y in (("columns", ""), ("no columns", ",columns=0.0"))
           for c, z in (("φ", ""), ("no φ", ",phi=identity"))},
        "val_loss", versus(*(("SVD, columns, φ", x)
                             for x in ("random, columns, φ", "SVD, no columns, φ",
                             "SVD, columns, no φ", "random, no columns, no φ"))),
        better="lower",
        smallest={"val_loss": 0.02},
        why="2 % of the perplexity"),
    sparse=Claim(
        "Pruning between 25 and 75 % of the compute beats other times at equal compute, "
        "and costs what a dense model of the average size does at equal tokens, too",
        "2501.12486: 25 to 75 % is near the best; one scaling law with the average size (abstract)",
        {"25 to 75 %": PRUNED,
         "dense, average size": "pretrain,adamw,race,calm,model=1x64",
         "dense": "pretrain,adamw,race,calm,model=3x64"}
        | {name + tail: f"{PRUNED},begin={begin},end={end}{length}"
           for name, (begin, end, steps) in OTHER_TIMES.items() for tail, length in (
               ("", f",steps={steps},eval_every={steps}"), (", equal tokens", ""))},
        "val_loss", versus(*(("25 to 75 %", name + tail) for name in OTHER_TIMES for tail in (
            "", ", equal tokens")))
        | {"25 to 75 % < 1.01 dense, average size": {"25 to 75 %": 1,
                                                     "dense, average size": -1.01}},
        better="lower",
        smallest={"val_loss": 0.02},
        why="2 % of the perplexity"))

# claim: (the test that judges the headline, method, baseline, statement, what is measured, as
# published). Method and baseline are arms, "arm|metric" for another metric than the claim's,
# {arm|metric: weight} for a sum, or a number.
HEADLINES = dict(
    normuon=("NorMuon < Muon", "NorMuon", "Muon",
             "NorMuon needs fewer steps than Muon, and Muon fewer than AdamW",
             "steps to a loss of 2.30 ↓", "11 % and 22 % more efficient, at 1.1 B parameters"),
    lowrank=("Fira < GaLore", "Fira", "GaLore",
             "Fira, APOLLO and FRUGAL reach a lower loss than GaLore, APOLLO-Mini than sign-SGD",
             "validation loss ↓", "lower perplexity than GaLore"),
    eco=("ECO < 1.01 float32", "ECO, int4", "AdamW, float32",
         "ECO trains weights that exist only in 4 bits to within 1 % of float32, and beats plain "
         "rounding",
         "validation loss ↓", "matches float32, 30 M to 2.1 B (second-hand)"),
    hft=("HFT, lr 1e-3 < full, lr 1e-3", "HFT, lr 1e-3", "full, lr 1e-3",
         "Half fine-tuning forgets less than full fine-tuning at the same learning rate",
         "loss on the old task ↓", "less forgetting, no worse on the new task (second-hand)"),
    lion=("Lion, λ 30: inside", "Lion, λ 30", 1.0,
          "Lion with decay λ keeps every weight within 1/λ, and fills that box when it is small",
          "largest weight × λ ↓", "the loss is least within that box"),
    sparse=("25 to 75 % < from the start", "25 to 75 %", "from the start",
            "Pruning between 25 and 75 % of the compute beats other times at equal compute, and "
            "costs what a dense model of the average size does", "validation loss ↓",
            "25 to 75 % is near the best"),
)
