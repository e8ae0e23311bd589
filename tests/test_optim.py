"""optim.py: parameter groups, schedules by hand, and LoRA's identities."""
import pytest
import torch
from torch import nn

from data.run import UserError
from data.tokenizer import bytes_tokenizer
from model import init, preset
from optim import (LoRA, SCHEDULES, adamw, adapter_state, add_lora, constant, cosine, linear, merge_lora,
                   param_groups, set_lr, wsd)


def net(family="qwen2"):
    """A new model of one layer of width 64."""
    return init(preset("1x64", bytes_tokenizer(), 32, family), 0)


def test_norms_and_biases_are_not_decayed():
    m = net()
    decayed, plain = param_groups(m, 0.1)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert all(p.dim() == 2 for p in decayed["params"]) and all(p.dim() == 1 for p in plain["params"])
    assert (len(decayed["params"]) + len(plain["params"]) == len(list(m.parameters()))
            and len(plain["params"]) == 6)
    m.requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameter"):
        param_groups(m, 0.1)


def test_adamw_by_hand():
    """One step from 1 with gradient 2, lr .1, decay .5: 1 - .1·.5·1 - .1·2/(|2| + eps) = .85"""
    m = nn.Linear(1, 1, bias=False)
    m.weight.data.fill_(1.0)
    opt = adamw(m, 0.1, 0.5)
    m.weight.grad = torch.tensor([[2.0]])
    opt.step()
    assert m.weight.item() == pytest.approx(0.85, abs=1e-6)


@pytest.mark.parametrize("fn, values", [
    (constant, {0: .25, 1: .5, 3: 1, 4: 1, 19: 1}),
    (linear, {0: .25, 3: 1, 4: 1, 12: .5, 19: 1 / 16}),
    (cosine, {0: .25, 3: 1, 4: 1, 12: .525, 20: .05}),
    (wsd, {0: .25, 3: 1, 15: 1, 16: 1, 18: .5, 20: 0}),
])
def test_schedules_by_hand(fn, values):
    """20 steps, 4 of warm-up"""
    assert {s: fn(s, 20, 4) for s in values} == pytest.approx(values)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_stay_between_0_and_1(name):
    assert all(0 <= SCHEDULES[name](s, n, w) <= 1 for n in (1, 7, 100) for w in (0, 1, 10) for s in range(n))


def test_set_lr_respects_a_group_s_own_scale():
    opt = adamw(net(), 1.0)
    opt.param_groups[1]["scale"] = 0.1
    set_lr(opt, 0.5)
    assert [g["lr"] for g in opt.param_groups] == [0.5, 0.05]


def test_lora_starts_as_the_layer_and_merges_into_it():
    m, x = net(), torch.randint(0, 256, (2, 9))
    before = m(x).detach()
    add_lora(m, 4)
    assert torch.equal(m(x), before)                                        # B = 0
    state = adapter_state(m)
    assert len(state) == 14 and all(k.endswith((".A", ".B")) for k in state)
    assert sum(p.numel() for p in m.parameters() if p.requires_grad) == sum(p.numel() for p in state.values())
    with torch.no_grad():
        for p in state.values():
            p.normal_(std=0.1)
    after, plain = m(x).detach(), merge_lora(m)
    assert not torch.allclose(after, before, atol=1e-2)
    assert torch.allclose(plain(x), after, atol=1e-5)
    assert plain.state_dict().keys() == net().state_dict().keys()           # a plain checkpoint
    assert torch.equal(m(x), after)                                         # merging left the original alone


def test_lora_by_hand():
    """W = 2, A = 3, B = 5, rank 1, alpha 4: y = 2x + 4·5·3·x = 62x"""
    layer = LoRA(nn.Linear(1, 1, bias=False), 1, 4.0)
    for p, v in ((layer.linear.weight, 2.0), (layer.A, 3.0), (layer.B, 5.0)):
        p.data.fill_(v)
    assert layer(torch.ones(1, 1)).item() == 62 and layer.merged()(torch.ones(1, 1)).item() == 62
    assert not layer.linear.weight.requires_grad
    with pytest.raises(UserError, match="rank must be at least 1"):
        add_lora(net(), 0)
