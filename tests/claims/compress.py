"""The claims of compress.py: arms as --config strings, contrasts, what was published; their
headlines."""
from claims import Claim, in_parts


def below(*pairs, **kw):
    """Tests 'a < b' of arms, {label: contrast}; a keyword's pairs get its name before the label."""
    out = {f"{a} < {b}": {a: 1, b: -1} for a, b in pairs}
    for name, more in kw.items():
        out |= {f"{name}: {a} < {b}": {a: 1, b: -1} for a, b in more}
    return out


def at_bits(bits, *names):
    """Arms at so many bits: {"RTN, 2": "rtn,bits2", …}."""
    presets = {"RTN": "rtn", "GPTQ": "gptq", "GPTQ, act order": "gptq,act_order=true",
               "AWQ": "awq", "SmoothQuant+": "smoothquant", "k-means": "kmeans",
               "k-means, norms": "kmeans,norms=true", "k-means, weights": "kmeans,weights=true",
               "NoWag-VQ": "nowag_vq", "GPTVQ": "gptvq"}
    return {f"{name}, {bits}": f"{presets[name]},bits{bits}" for name in names or presets}


ALSO = ("kl", "bits", "proxy")
ROUNDERS = ("RTN", "GPTQ", "AWQ", "SmoothQuant+", "k-means", "GPTVQ")
CLAIMS = dict(
    pruning=Claim(
        "At 2:4 ARMOR loses less than NoWag-P, that no more than Wanda, that less than magnitude; "
        "ARMOR also less than SparseGPT and than a low-rank correction of its size",
        "2510.05528: Llama-2-7B perplexity 7.21 (ARMOR), 11.14 (NoWag-P), 11.35 (Wanda), 10.16 "
        "(SparseGPT), 5.12 dense (second-hand)",
        {"magnitude": "magnitude", "Wanda": "wanda", "NoWag-P": "nowag_p", "SparseGPT": "sparsegpt",
         "low rank 4": "lowrank24,block=4", "ARMOR 4": "armor,block=4", "low rank 8": "lowrank24",
         "ARMOR 8": "armor",
         "half, magnitude": "magnitude,pattern=50%", "half, Wanda": "wanda,pattern=50%",
         "half, NoWag-P": "nowag_p,pattern=50%", "half, SparseGPT": "sparsegpt,pattern=50%"},
        "loss_increase",
        below(order=[("ARMOR 4", "NoWag-P"), ("NoWag-P", "Wanda"), ("Wanda", "magnitude")],
              controls=[("ARMOR 4", "low rank 4"), ("ARMOR 8", "low rank 8")],
              rival=[("ARMOR 4", "SparseGPT"), ("ARMOR 8", "SparseGPT")],
              half=[("half, NoWag-P", "half, Wanda"), ("half, Wanda", "half, magnitude"),
                    ("half, SparseGPT", "half, NoWag-P")])
        | {"proxy: ARMOR 4 < NoWag-P": {"ARMOR 4|proxy": 1, "NoWag-P|proxy": -1}},
        better="lower", also=ALSO,
        conclude=in_parts("order", "controls", "rival", "half", "proxy"),
        smallest={"loss_increase": 0.01, "proxy": 0.01},
        why="1 % of the perplexity: half of the published ln(11.35 / 11.14) between NoWag-P and "
            "Wanda"),
    codes=Claim(
        "NoWag-VQ loses less than other ways to round at about as many bits",
        "2504.14569: below one-shot QuIP#, AQLM and GPTVQ-like methods at 2 bits (second-hand)",
        at_bits(4, "RTN", "GPTQ", "NoWag-VQ") | at_bits(3) | at_bits(2)
        | {"NoWag-VQ, 2, triples": "nowag_vq,bits2,dim=3",
           "k-means, 2, triples": "kmeans,bits2,dim=3"},
        "loss_increase",
        below(**{f"{bits} bits": [(f"NoWag-VQ, {bits}", f"{name}, {bits}") for name in ROUNDERS]
                 for bits in (3, 2)},
              corrected=[("GPTQ, 3", "RTN, 3"), ("GPTQ, 2", "RTN, 2"),
                         ("GPTQ, act order, 2", "GPTQ, 2")],
              parts=[("NoWag-VQ, 2", "k-means, 2"), ("k-means, norms, 2", "k-means, 2"),
                     ("k-means, weights, 2", "k-means, 2")]),
        better="lower", also=ALSO, conclude=in_parts("3 bits", "2 bits", "corrected", "parts"),
        smallest={"loss_increase": 0.01},
        why="1 % of the perplexity"),
    widths=Claim(
        "Bits given where columns lose most (BAQ) beat the same bits everywhere; groups that need "
        "4 bits are found by sensitivity",
        "2506.05664: BAQ below GPTQ at equal average bits;  2311.16442: 4-bit groups by "
        "sensitivity",
        {f"{name}, {bits}": f"baq,bits{bits}{more}" for bits in (4, 3, 2)
         for name, more in (("BAQ", ""), ("uniform", ",allocate=false"))}
        | {"mixed": "mixed", "mixed, range": "mixed,by=range", "mixed, random": "mixed,by=random"},
        "kl", below(BAQ=[(f"BAQ, {b}", f"uniform, {b}") for b in (4, 3, 2)],
                    mixed=[("mixed", "mixed, random"), ("mixed", "mixed, range")]),
        better="lower", also=("loss_increase", "bits"), conclude=in_parts("BAQ", "mixed"),
        smallest={"kl": 0.002},
        why="a third of what 4 bits cost"),
    arena=Claim(
        "Methods that handle outliers win where outliers are: AWQ and SmoothQuant+ over rounding, "
        "Wanda over magnitude, rotation and permutation over plain 4-bit activations",
        "2306.00978, 2312.03788, 2306.11695, 2410.12168, 2501.02625; here two channels of every "
        "norm are made 20 times larger, what reads them 20 times smaller: no output changes",
        {f"{name}{mark}": f"{preset}{more}"
         for mark, more in (("", ""), (", spiky", ",outliers=20")) for name, preset in (
             ("RTN 4", "rtn"), ("AWQ 4", "awq"), ("SmoothQuant+ 4", "smoothquant"),
             ("magnitude", "magnitude,pattern=50%,scope=row"), ("Wanda", "wanda,pattern=50%"),
             ("W4A4", "w4a4"), ("W4A4 blocks", "w4a4,block=16"),
             ("8-bit blocks", "w4a4,block=16,wide=true"), ("COMET", "comet"), ("HALO", "halo"))},
        "kl", below(**{kind: [(f"{a}{mark}", f"{b}{mark}") for a, b in (
            ("AWQ 4", "RTN 4"), ("SmoothQuant+ 4", "RTN 4"), ("Wanda", "magnitude"),
            ("COMET", "8-bit blocks"), ("8-bit blocks", "W4A4 blocks"), ("W4A4 blocks", "W4A4"),
            ("HALO", "W4A4"))]
            for kind, mark in (("plain", ""), ("spiky", ", spiky"))}),
        better="lower", also=("loss_increase", "bits"), conclude=in_parts("plain", "spiky"),
        smallest={"kl": 0.002},
        why="a third of what rounding to 4 bits costs"),
    kv=Claim(
        "A 2-bit cache wants keys by channel and values by token; trained heads know which tokens "
        "may go",
        "2402.02750: a 2-bit cache loses least with keys by channel, values by token;  "
        "2410.01805: retaining heads above sliding windows and sums of attention at equal budgets "
        "(both second-hand)",
        {f"{name}{mark}": f"kivi,decoded{more}{window}"
         for mark, window in (("", ""), (", no window", ",cache_window=0")) for name, more in (
             ("KIVI", ""), ("keys by token", ",keys=token"),
             ("values by channel", ",values=channel"))}
        | {f"{score}, {kept}": f"evicting,decoded,score={score},budget={kept}" for kept in (32, 16)
           for score in ("locret", "recency", "random", "attention")},
        "cache_increase",
        below(keys=[("KIVI", "keys by token"), ("KIVI, no window", "keys by token, no window"),
                    ("KIVI, no window", "keys by token")],
              values=[("KIVI", "values by channel"),
                      ("KIVI, no window", "values by channel, no window")],
              heads=[(f"locret, {kept}", f"{other}, {kept}") for kept in (32, 16)
                     for other in ("recency", "random", "attention")]),
        better="lower", also=("cache_bytes",), conclude=in_parts("keys", "values", "heads"),
        smallest={"cache_increase": 0.005},
        why="half a percent of the perplexity"),
    slim=Claim(
        "Slimming experts in stages beats one cut at equal tokens, and slimming beats dropping "
        "experts, random neurons, new weights and a dense model of its active size",
        "2506.18349: stages above one shot, slimming above dropping experts (no numbers at hand)",
        {"two stages": "slimmoe,tuned", "one stage": "slimmoe,tuned,stages=1",
         "one stage, restarted": "slimmoe,tuned,at_once=true",
         "random neurons": "slimmoe,tuned,stages=1,importance=random",
         "drop experts": "drop_experts,tuned", "new weights": "fresh,tuned",
         "dense": "dense_active,tuned",
         "two stages, long": "slimmoe,tuned,kd_steps=1200",
         "one stage, long": "slimmoe,tuned,stages=1,kd_steps=1200",
         "two stages, top 8": "slimmoe,tuned,kd_loss=kd_topk",
         "one stage, top 8": "slimmoe,tuned,stages=1,kd_loss=kd_topk"},
        "loss_increase",
        below(stages=[("two stages", "one stage"), ("two stages", "one stage, restarted"),
                      ("two stages, long", "one stage, long"),
                      ("two stages, top 8", "one stage, top 8")],
              after=[("one stage", x) for x in ("drop experts", "random neurons", "new weights",
                                                "dense")])
        | {f"cut: one stage < {x}": {"one stage|cut_loss": 1, f"{x}|cut_loss": -1}
           for x in ("drop experts", "random neurons", "new weights")}
        | {"KL: two < one": {"two stages|kl": 1, "one stage|kl": -1}},
        better="lower", also=("cut_loss", "kl", "parameters"),
        conclude=in_parts("stages", "KL", "after", "cut"),
        smallest={"loss_increase": 0.01, "cut_loss": 0.1, "kl": 0.002},
        why="1 % of the perplexity after training, 10 % of it right after the cut"),
    widths_of_layers=Claim(
        "The exact choice of a width for every layer beats one width for all, and that a random "
        "choice; neurons chosen by activations beat a policy that reads weights, and that chance",
        "2411.19146: an integer programme over distilled blocks;  2407.14679;  2501.15296",
        {"exact": "puzzle,cut", "uniform": "puzzle,cut,choice=uniform",
         "random": "puzzle,cut,choice=random",
         "Minitron": "minitron,cut,share=0.7", "PruneNet": "prunenet,cut,share=0.7",
         "PruneNet, largest": "prunenet,cut,share=0.7,sampled=false",
         "random neurons": "slimmoe,cut,stages=1,importance=random,share=0.7"},
        "kl", below(choice=[("exact", "uniform"), ("uniform", "random")],
                    neurons=[("Minitron", "PruneNet"), ("PruneNet", "random neurons")]),
        better="lower", also=("loss_increase", "parameters"),
        conclude=in_parts("choice", "neurons"),
        smallest={"kl": 0.02},
        why="a tenth of what one width for all costs"))

# claim: (the test that judges the headline, method, baseline, statement, what is measured, as
# published). Method and baseline are arms, "arm|metric" for another metric than the claim's,
# {arm|metric: weight} for a sum, or a number.
HEADLINES = dict(
    pruning=("order: ARMOR 4 < NoWag-P", "ARMOR 4", "NoWag-P",
             "At 2:4 ARMOR loses less than NoWag-P (2504.14569), that than Wanda, that than "
             "magnitude; and less than SparseGPT and than a low-rank correction of its size",
             "nats lost ↓",
             "Llama-2-7B perplexity 7.2 against 11.1; Wanda 11.4, SparseGPT 10.2 (second-hand)"),
    codes=("2 bits: NoWag-VQ, 2 < GPTVQ, 2", "NoWag-VQ, 2", "GPTVQ, 2",
           "NoWag-VQ loses less than other ways to round at about as many bits",
           "nats lost, 2 bits ↓", "better than other one-shot vector quantisers (second-hand)"),
    widths=("BAQ: BAQ, 3 < uniform, 3", "BAQ, 3", "uniform, 3",
            "Bits where columns lose most (BAQ) beat the same bits everywhere; groups that need 4 "
            "bits are found by sensitivity", "KL to the original, 3 bits ↓",
            "below GPTQ at equal average bits"),
    arena=("spiky: AWQ 4, spiky < RTN 4, spiky", "AWQ 4, spiky", "RTN 4, spiky",
           "Methods that handle outliers win where outliers are", "KL to the original ↓", "-"),
    kv=("keys: KIVI < keys by token", "KIVI", "keys by token",
        "A 2-bit cache wants keys by channel and values by token; trained heads know which tokens "
        "may go",
        "nats lost ↓", "2 bits lose least with keys by channel, values by token (second-hand)"),
    slim=("stages: two stages < one stage", "two stages", "one stage",
          "Slimming experts in stages beats one cut at equal tokens, and slimming beats dropping "
          "experts, random neurons, new weights and a dense model of its active "
          "size", "nats lost ↓",
          "stages above one shot"),
    widths_of_layers=("choice: exact < uniform", "exact", "uniform",
                      "The exact choice of a width for every layer beats one width for all, and "
                      "that a random choice; neurons chosen by activations beat a policy that "
                      "reads weights, and that chance",
                      "KL to the original ↓", "-"),
)
