"""The claims of grpo.py: arms as --config strings, contrasts, what was published; headlines."""
from claims import Claim, in_parts


def arms(**presets):
    """Arms as --config strings, each evaluated with eight samples a prompt after its last step."""
    return {name.replace("_", " "): f"{names},wide" for name, names in presets.items()}


def above(label, ours, theirs, on="", by=0.0):
    """{label: contrast}: ours + by > theirs on a metric ("": the claim's)."""
    return {label: {f"{ours}|{on}": 1, f"{theirs}|{on}": -1} | ({"": by} if by else {})}


def gain(label, ours, theirs="", share=0.0):
    """{label: contrast}: our rise over the SFT model is at least a share of theirs (or just above
    0)."""
    return {label: {ours: 1, f"{ours}|sft_val_accuracy": share - 1}
            | ({theirs: -share} if theirs else {})}


TEACHERS = dict(kd="opd", exopd="exopd", kdrl="kdrl", rlad="rlad")
LENGTHS = ("dler", "dot", "drpo", "easy", "hapo", "arlcp", "linear")
CLAIMS = dict(
    lengths=Claim(
        "Length methods shorten responses at GRPO's accuracy (within 0.02)",
        "2510.15110, 2601.03969, 2510.04474, 2505.18086, 2505.11225, 2602.12113: 30-70 % shorter, "
        "no loss",
        arms(grpo="grpo", **{x: x for x in LENGTHS}), "val_accuracy",
        {k: v for x in LENGTHS for k, v in (above(f"{x}: as accurate", x, "grpo", by=0.02)
                                            | above(f"{x}: shorter", "grpo", x,
                                                    "val_length")).items()},
        also=("val_length", "val_guess", "val_fillers", "ood_accuracy"),
        conclude=in_parts(*LENGTHS),
        smallest={"val_accuracy": 0.02, "val_length": 2.5},
        why="accuracy: the loss that the claim allows; length: a tenth of GRPO's 25 tokens, "
            "where 30 to 70 % are published"),
    exploration=Claim(
        "Clip-Cov and KL-Cov keep the entropy at GRPO's accuracy (within 0.02), ACE and RAPO raise "
        "pass@8",
        "2505.22617: higher entropy and plateau; 2602.21420, 2510.03865: higher pass@k",
        arms(grpo="grpo,tokens", clip_cov="clip_cov,tokens", kl_cov="kl_cov,tokens",
             kl_cov_off="kl_cov,tokens,coef=0.0", ace="ace,tokens", harsher="harsher,tokens",
             rapo="rapo,tokens", reverse_kl="reverse,tokens"), "ood_pass@8",
        {k: v for part, x in (("Clip-Cov", "clip cov"), ("KL-Cov", "kl cov")) for k, v in (
            above(f"{part}: entropy", x, "grpo", "train_entropy")
            | above(f"{part}: accuracy", x, "grpo", "val_accuracy", 0.02)).items()}
        | above("KL-Cov: entropy over no penalty", "kl cov", "kl cov off", "train_entropy")
        | above("ACE: pass@8", "ace", "grpo")
        | above("ACE: pass@8 over its control", "ace", "harsher")
        | above("RAPO: pass@8", "rapo", "grpo")
        | above("RAPO: pass@8 over reverse KL", "rapo", "reverse kl"),
        also=("ood_accuracy", "val_pass@8", "val_accuracy", "train_entropy"),
        conclude=in_parts("Clip-Cov", "KL-Cov", "ACE", "RAPO"),
        smallest={"train_entropy": 0.02, "val_accuracy": 0.02, "ood_pass@8": 0.03},
        why="entropy: a tenth of GRPO's 0.21; accuracy: the loss that the claim allows; pass@8: "
            "three points, as published gains have"),
    rewards=Claim(
        "RL survives 40 % of flipped rewards, and rewards without a verifier do nearly as well",
        "2505.22653: 72 % for 76 % of clean; 2506.18254: RLPR at or above verifiers; 2508.00410",
        arms(grpo="grpo", noisy="noisy", noisy_each="noisy,level=response", rpr="rpr",
             rpr_noisy="rpr_noisy",
             rlpr="rlpr", co_reward="co_reward"), "val_accuracy",
        gain("noise: 80 % of the gain", "noisy", "grpo", 0.8)
        | gain("noise by response: 80 % of the gain", "noisy each", "grpo", 0.8)
        | above("RPR: helps a noisy reward", "rpr noisy", "noisy")
        | gain("RPR: alone raises", "rpr")
        | gain("RLPR: 80 % of the gain", "rlpr", "grpo", 0.8)
        | gain("Co-Reward: raises", "co reward"),
        also=("val_greedy", "val_pass@8", "val_length", "val_guess"),
        conclude=in_parts("noise", "RPR", "RLPR", "Co-Reward"),
        smallest={"val_accuracy": 0.04, "sft_val_accuracy": 0.04},
        why="published: 72 % for 76 % of clean rewards, four points"),
    stale=Claim(
        "With importance weights a policy learns as well from rollouts that are four iterations "
        "old",
        "2505.24034: AIPO matches on-policy training in an asynchronous system",
        arms(on_policy="aipo,actor=current", aipo_1="aipo,lag=1", aipo_4="aipo",
             ppo_4="aipo,clip_stale", none_4="aipo,reinforce"), "val_accuracy",
        above("lag 1: AIPO within 0.03", "aipo 1", "on policy", by=0.03)
        | above("lag 4: AIPO within 0.03", "aipo 4", "on policy", by=0.03)
        | above("harm without it: on policy > none", "on policy", "none 4")
        | above("correction: AIPO > none", "aipo 4", "none 4")
        | above("clip: AIPO > PPO's", "aipo 4", "ppo 4"),
        also=("train_kl", "train_entropy", "val_length"),
        conclude=in_parts("lag 1", "lag 4", "harm", "correction", "clip"),
        smallest={"val_accuracy": 0.03},
        why="the margin within which the claim calls two runs equal"),
    teachers=Claim(
        "RL with a teacher beats RL alone and distillation alone within 15 steps",
        "2506.02208: KDRL over GRPO and KD; 2602.22495: RLAD over both; 2602.12125: ExOPD past the "
        "teacher",
        arms(grpo="grpo,steps=15", **{arm: f"{name},teacher=base:chain_right,steps=15"
                                      for arm, name in TEACHERS.items()}),
        "val_accuracy",
        {f"{x} > {y}": {x: 1, y: -1} for x in ("kdrl", "rlad") for y in ("grpo", "kd")} | above(
            "exopd > kd", "exopd", "kd"),
        also=("val_greedy", "train_kl", "val_length", "ood_accuracy"),
        conclude=in_parts("kdrl", "rlad", "exopd"),
        smallest={"val_accuracy": 0.01},
        why="one point of accuracy: the arms differ by two"),
    forgetting=Claim(
        "RECAP's weights and instance filtering forget less of the old task than RL on the new one "
        "alone",
        "2510.21978: RECAP keeps general skills; 2507.05386: RL forgets little, filtering "
        "stabilises it",
        arms(grpo="grpo,on_sort", rif="rif,on_sort", replay="replay", recap="recap",
             recap_05="recap,reweigh=0.5"),
        "chain_val_accuracy",
        above("RECAP: > grpo", "recap", "grpo") | above("weights: > replay", "recap", "replay")
        | above("weights, T = .5: > replay", "recap 05", "replay")
        | above("filtering: > grpo", "rif", "grpo")
        | {"RL: forgets": {"grpo|sft_chain_val_accuracy": 1, "grpo": -1}},
        also=("sort_val_accuracy", "sft_chain_val_accuracy", "sft_sort_val_accuracy"),
        conclude=in_parts("RECAP", "weights", "filtering", "RL"),
        smallest={"chain_val_accuracy": 0.02, "sft_chain_val_accuracy": 0.02},
        why="two points of the old task's accuracy"))

# claim: (the test that judges the headline, method, baseline, statement, what is measured, as
# published). Method and baseline are arms, "arm|metric" for another metric than the claim's,
# {arm|metric: weight} for a sum, or a number.
HEADLINES = dict(
    lengths=("dler: shorter", "dler|val_length", "grpo|val_length",
             "Length methods shorten responses at GRPO's accuracy (within 0.02)",
             "length, tokens ↓", "30-70 % shorter without loss"),
    stale=("lag 4: AIPO within 0.03", "aipo 4", "on policy",
           "With importance weights a policy learns as well (within 0.03) from rollouts that are "
           "four "
           "iterations old", "accuracy ↑", "matches on-policy training"),
    exploration=("Clip-Cov: entropy", "clip cov|train_entropy", "grpo|train_entropy",
                 "Clip-Cov and KL-Cov keep the entropy at GRPO's accuracy (within 0.02), ACE and "
                 "RAPO raise "
                 "pass@8", "entropy, nats ↑", "higher entropy and plateau, higher pass@k"),
    rewards=("noise: 80 % of the gain", "noisy", "grpo",
             "RL survives 40 % of flipped rewards, and rewards without a verifier do nearly as "
             "well",
             "accuracy ↑", "72 % for 76 % of clean; RLPR at or above verifiers"),
    teachers=("kdrl > grpo", "kdrl", "grpo",
              "RL with a teacher beats RL alone and distillation alone within 15 steps",
              "accuracy ↑", "KDRL and RLAD over GRPO and KD; ExOPD past the teacher"),
    forgetting=("RECAP: > grpo", "recap", "grpo",
                "RECAP's weights and instance filtering forget less of the old task than RL on the "
                "new one "
                "alone", "accuracy, old task ↑", "RECAP keeps general skills; RL forgets little"),
)
