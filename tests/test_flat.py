"""Rows without padding, prompts computed once: the same numbers and gradients as the plain pass,
of fewer tokens."""
import copy
from dataclasses import replace

import pytest
import torch

import model as M
from data.tokenizer import bytes_tokenizer
from model import (FAMILIES, LAYOUTS, Flat, ScalarModel, collate, flattened, init, last_hidden,
                   preset, sequence_score, states, token_logprobs, token_values)

T = torch.tensor
DENSE = [name for name in FAMILIES if name not in ("mixtral", "qwen3_moe", "phimoe")]


def small(family="llama", **changes):
    """A random model in float64: two layers, two query heads a key head."""
    config = preset("2x64", bytes_tokenizer(), 96, family)
    net = init(replace(config, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                       **changes), seed=1).double()
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return net


def rows(groups=3, samples=4, longest=17, seed=0, responses=11):
    """Groups of responses to prompts of other lengths, in an order that is not the groups'."""
    g = torch.Generator().manual_seed(seed)

    def text(most):
        n = int(torch.randint(1, most + 1, (), generator=g))
        return torch.randint(0, 256, (n,), generator=g).tolist()
    out = [(p, text(responses)) for p in [text(longest) for _ in range(groups)]
           for _ in range(samples)]
    return [out[i] for i in torch.randperm(len(out), generator=g).tolist()]


@pytest.fixture(autouse=True)
def back():
    """Leaves the layout as it was."""
    yield
    M.worth = LAYOUTS["auto"]


def both(net, says):
    """What says() comes to with each layout, and the gradients of a sum of it: two lists."""
    out = []
    for mode in ("false", "true"):
        M.worth = LAYOUTS[mode]
        net.zero_grad()
        told = says()
        told = told if isinstance(told, tuple) else (told,)
        weight = torch.linspace(-1, 2, told[0].numel(), dtype=torch.float64).view(told[0].shape)
        sum((x * weight).sin().sum() for x in told).backward()
        out.append([*told, *(p.grad for p in net.parameters() if p.grad is not None)])
    return out


def agree(plain, flat, tolerance=1e-10):
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(plain, flat))


@pytest.mark.parametrize("family", DENSE)
def test_log_probs_entropies_and_gradients_are_those_of_the_plain_pass(family):
    net, (tokens, mask) = small(family), collate(rows(), 0)
    assert agree(*both(net, lambda: token_logprobs(net, tokens, mask, entropy=True,
                                                   temperature=0.7)))


@pytest.mark.parametrize("window", [1, 3, 8, 16])
def test_a_window_ends_in_the_prompt_the_response_or_before_both(window):
    net = small("mistral", sliding_window=window,
                layer_types=("sliding_attention", "full_attention"))
    tokens, mask = collate(rows(), 0)
    far = token_logprobs(net, tokens, mask)
    assert agree(*both(net, lambda: token_logprobs(net, tokens, mask)))
    net.layers[0].self_attn.window = 0
    assert (far - token_logprobs(net, tokens, mask)).abs().max() > 1e-6        # the window bites


@pytest.mark.parametrize("says", [
    lambda net, tokens, mask, start, end: token_values(net, tokens, mask),
    lambda net, tokens, mask, start, end: sequence_score(net, tokens, end, start),
    lambda net, tokens, mask, start, end: sequence_score(net, tokens, end),
    lambda net, tokens, mask, start, end: last_hidden(net, tokens, end, start)[:, 0].double()])
def test_values_scores_and_states_of_a_scalar_model(says):
    net, (tokens, mask) = ScalarModel.from_lm(small(), std=1.0).double(), collate(rows(), 0)
    start = mask.argmax(1)
    ends = start + mask.sum(1).long()
    every, one = net(tokens), torch.arange(len(tokens))
    assert torch.allclose(sequence_score(net, tokens, ends), every[one, ends - 1], atol=1e-5)
    assert torch.allclose(last_hidden(net, tokens, ends),
                          net(tokens, states=True)[one, ends - 1].float(), atol=1e-5)
    before = torch.nn.functional.pad(every[:, :-1], (1, 0)) * mask
    assert torch.allclose(token_values(net, tokens, mask), before, atol=1e-5)
    assert agree(*both(net, lambda: says(net, tokens, mask, start, ends)), 1e-5)   # float32 scores


@pytest.mark.parametrize("prepare", [
    lambda net: M.recomputing(net, True),
    lambda net: M.lora(net.requires_grad_(False), torch.Generator().manual_seed(0))])
def test_recomputed_blocks_and_adapters(prepare):
    net, (tokens, mask) = small(), collate(rows(), 0)
    prepare(net)
    net.double()
    assert agree(*both(net, lambda: token_logprobs(net, tokens, mask)))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_in_bfloat16_it_is_the_plain_pass_to_rounding(family):
    net, (tokens, mask) = small(family).float(), collate(rows(), 0)
    out = []
    for mode in ("false", "true"):
        M.worth = LAYOUTS[mode]
        with M.autocast(tokens.device, "bfloat16"):
            out.append(token_logprobs(net, tokens, mask))
        out[-1].sum().backward()
    assert out[0].abs().max() > 3 and torch.allclose(*out, atol=0.3)


def test_masks_with_holes_and_rows_where_nothing_is_wanted():
    net, (tokens, mask) = small(), collate(rows(), 0)
    mask[1], mask[4, ::2] = 0, 0
    assert agree(*both(net, lambda: token_logprobs(net, tokens, mask)))
    mask[:] = 0
    assert agree(*both(net, lambda: token_logprobs(net, tokens, mask)
                       + 0 * sum(p.sum() for p in net.parameters())))


def test_what_is_computed_is_every_prompt_once_and_no_token_behind_the_last_wanted():
    # two prompts of 3 and 2 tokens; a state is wanted of each prompt's last, and of the responses
    # but their last: 3 + 2 and 1 + 0 + 2
    tokens, mask = collate([([5, 6, 7], [1, 2]), ([8, 9], [3]), ([5, 6, 7], [4, 5, 6])], 0)
    where = torch.nn.functional.pad(mask[:, 1:] > 0, (0, 1))
    flat = flattened(tokens, where)
    assert flat.tokens.tolist() == [5, 6, 7, 8, 9, 1, 4, 5]
    assert flat.position[:, 0].tolist() == [0, 1, 2, 0, 1, 3, 3, 4]
    assert flat.place[where].tolist() == [2, 5, 4, 2, 6, 7]
    assert flat.n == 5 and flat.used == 4


def test_prompts_that_only_begin_alike_are_not_one():
    flat = Flat(T([[5, 6, 1], [5, 6, 7]]), T([2, 3]), T([3, 3]))
    assert flat.tokens.tolist() == [5, 6, 5, 6, 7, 1]


def test_rows_do_not_see_each_other():
    net, text = small(), rows()
    M.worth = LAYOUTS["true"]
    want = token_logprobs(net, *collate(text, 0))
    other = [(p, [255 - x for x in r]) if i else (p, r) for i, (p, r) in enumerate(text)]
    n = len(text[0][0]) + len(text[0][1])
    assert torch.allclose(token_logprobs(net, *collate(other, 0))[0, :n], want[0, :n], atol=1e-12)


@pytest.mark.parametrize("n, saves", [(20, False), (17, True)])
def test_another_layout_where_it_saves_a_tenth(n, saves):
    # four rows of 20 tokens, of one n: 80 - (20 - n) of 80; twins would be one row
    tokens = torch.arange(80).view(4, 20)
    where = torch.zeros(4, 20, dtype=torch.bool)
    where[:, -1] = True
    if saves:                                    # two rows of 11 leave 62 of 80
        where[:2] = torch.arange(20) == 10
    assert (flattened(tokens, where) is not None) == saves


def test_a_prompt_in_common_is_saved_though_there_is_no_padding():
    tokens, mask = collate([([7] * 16, [i, i + 1, i + 2]) for i in range(4)], 0)
    flat = flattened(tokens, torch.nn.functional.pad(mask[:, 1:] > 0, (0, 1)))
    assert len(flat.tokens) == 16 + 4 * 2
    tokens, mask = collate([([i], [7] * 18) for i in range(4)], 0)     # nothing in common
    assert flattened(tokens, torch.nn.functional.pad(mask[:, 1:] > 0, (0, 1))) is None


def test_experts_and_compiled_models_keep_the_plain_pass(monkeypatch):
    monkeypatch.setattr(M, "flattened", lambda *_: 1 / 0)
    tokens, mask = collate(rows(), 0)
    token_logprobs(small("mixtral").float(), tokens, mask)
    net = small()
    with pytest.raises(ZeroDivisionError):
        states(net, tokens, mask > 0)
    net._orig_mod = copy.copy(net)
    states(net, tokens, mask > 0)


def test_a_context_that_is_too_short_is_told_of():
    net = small()
    tokens, mask = collate([([1] * 90, [2] * 20), ([1], [2])], 0)
    M.worth = LAYOUTS["true"]
    with pytest.raises(M.UserError, match="109 tokens exceed the model's context of 96"):
        token_logprobs(net, tokens, mask)
