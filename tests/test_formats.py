"""Packed folders as other engines store them (compressed-tensors), and dense ones: the bits, what
config.json says, in and out again, and what cannot be said."""
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import model as M
from data.run import UserError
from data.tokenizer import bytes_tokenizer
from kernels import PackedLinear, pack_int, packed, quantize
from model import THEIRS

QUERY = "model.layers.0.self_attn.q_proj"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(family="llama", bits=4, group=32, symmetric=False, only=None):
    """A model of two layers whose linear ones (or those whose name has `only` in it) are packed; of
    whole rows also some whose codes fill no whole words."""
    net = M.init(replace(M.preset("2x64", bytes_tokenizer(), 96, family), num_attention_heads=4,
                         num_key_value_heads=2, head_dim=16,
                         intermediate_size=180 if group < 0 else 192), seed=1)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))

    def make(name, layer):
        if only and only not in name:
            return layer
        codes, scale, zero = quantize(layer.weight.detach(), bits, group, symmetric)
        size = layer.in_features if group < 0 else group
        return pack_int(codes, scale, zero, bits=bits, group=size, bias=layer.bias)
    return M.replace_linears(net, make)


def stored(folder):
    """config.json and all tensors of a folder."""
    state = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
    return json.loads((folder / "config.json").read_text()), state


def by_hand(codes, bits):
    """Codes of a row in 32-bit words, the first in the lowest bits, over the words' borders."""
    number = sum(code << i * bits for i, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return [number >> 32 * i & 0xFFFFFFFF for i in range(count)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_and_zeros_are_in_words_as_compressed_tensors_packs_them(bits, symmetric, tmp_path):
    net = rounded(bits=bits, symmetric=symmetric, only="q_proj")
    layer = net.layers[0].self_attn.q_proj
    M.save(net, bytes_tokenizer(), tmp_path, form=THEIRS)
    d, state = stored(tmp_path)
    codes = torch.tensor([[(int.from_bytes(bytes(row.tolist()), "little") >> i * bits) % 2 ** bits
                           for i in range(64)] for row in layer.codes])
    words = state[f"{QUERY}.weight_packed"]
    assert words.dtype == torch.int32 and words.shape == (64, 2 * bits)
    for row, want in zip(words, codes.tolist()):
        assert [x & 0xFFFFFFFF for x in row.tolist()] == by_hand(want, bits)
    assert state[f"{QUERY}.weight_shape"].tolist() == [64, 64]
    assert torch.equal(state[f"{QUERY}.weight_scale"], layer.scale)
    assert (f"{QUERY}.weight_zero_point" in state) != symmetric
    whole = (codes.view(64, 2, 32) - (2 ** (bits - 1) if symmetric else zeros(
        state, bits)[..., None])) * layer.scale.float()[..., None]
    torch.testing.assert_close(whole.view(64, 64), layer.dequantize(), rtol=0, atol=1e-7)
    assert "packed" not in d["model_type"] and f"{QUERY}.weight" not in state


def zeros(state, bits):
    """The zeros [out, groups] that are packed along the outputs."""
    words = state[f"{QUERY}.weight_zero_point"]                         # [out bits / 32, groups]
    assert words.dtype == torch.int32 and words.shape == (2 * bits, 2)
    columns = []
    for column in words.T.tolist():
        number = sum((x & 0xFFFFFFFF) << 32 * i for i, x in enumerate(column))
        columns.append([number >> i * bits & 2 ** bits - 1 for i in range(64)])
    return torch.tensor(columns).T


@pytest.mark.parametrize("family, bits, group, symmetric, shard", [
    ("llama", 4, 32, False, 5e9), ("qwen2", 8, 64, True, 20_000), ("qwen3", 3, 32, False, 30_000),
    ("llama", 2, 32, True, 5e9), ("llama", 4, -1, False, 5e9), ("phi3", 4, 16, False, 5e9)])
def test_such_a_folder_is_ours_again(family, bits, group, symmetric, shard, tmp_path):
    net = rounded(family, bits, group, symmetric)
    M.save(net, bytes_tokenizer(), tmp_path, shard, form=THEIRS)
    back, _ = M.load(tmp_path)
    x = torch.arange(40).view(2, 20)
    assert torch.equal(back.logits(back(x)), net.logits(net(x))) and back.config == net.config
    held = dict(net.named_buffers())
    for name, b in back.named_buffers():
        assert torch.equal(b, held.pop(name))
    assert not held
    specs = {name: m.spec() for name, m in net.named_modules() if isinstance(m, PackedLinear)}
    assert specs == {name: m.spec() for name, m in back.named_modules()
                     if isinstance(m, PackedLinear)}
    M.save(back, bytes_tokenizer(), tmp_path / "ours")
    assert stored(tmp_path / "ours")[0]["model_type"].startswith("packed-")


def test_config_json_says_what_the_engines_read(tmp_path):
    M.save(rounded(), bytes_tokenizer(), tmp_path / "all", form=THEIRS)
    quant = stored(tmp_path / "all")[0]["quantization_config"]
    weights = dict(num_bits=4, type="int", symmetric=False, dynamic=False, strategy="group",
                   group_size=32, observer="minmax")
    assert quant == dict(
        quant_method="compressed-tensors", format="pack-quantized", ignore=["lm_head"],
        quantization_status="compressed", config_groups=dict(group_0=dict(
            targets=["Linear"], weights=weights, input_activations=None, output_activations=None)))
    some = rounded(only="q_proj")
    M.save(some, bytes_tokenizer(), tmp_path / "queries", form=THEIRS)
    group, = stored(tmp_path / "queries")[0]["quantization_config"]["config_groups"].values()
    assert group["targets"] == [QUERY, QUERY.replace("0", "1")]
    layer = some.layers[1].self_attn
    layer.k_proj = pack_int(*quantize(layer.k_proj.weight.detach(), 8, -1, True), bits=8, group=64)
    M.save(some, bytes_tokenizer(), tmp_path / "some", form=THEIRS)
    first, second = stored(tmp_path / "some")[0]["quantization_config"]["config_groups"].values()
    assert first["targets"] == [QUERY, QUERY.replace("0", "1")] and first["weights"] == weights
    assert second["targets"] == ["model.layers.1.self_attn.k_proj"]
    assert second["weights"] == weights | dict(num_bits=8, symmetric=True, strategy="channel",
                                               group_size=None)
    back, _ = M.load(tmp_path / "some")
    assert [type(x).__name__ for x in (back.layers[1].self_attn.k_proj, back.layers[0].mlp.up_proj)
            ] == ["PackedLinear", "Linear"]


def test_others_folders_may_name_layers_by_a_pattern_and_have_other_scales(tmp_path):
    net = rounded(symmetric=True)
    M.save(net, bytes_tokenizer(), tmp_path, form=THEIRS)
    d, state = stored(tmp_path)
    group = d["quantization_config"]["config_groups"]["group_0"]
    group["targets"] = ["re:.*lm_head", r"re:.*\.mlp\.", "re:.*self_attn.*proj$"]
    d["quantization_config"]["config_groups"] = dict(            # of a layer that is not there
        first=group | dict(targets=[QUERY[:-1]], weights=dict(num_bits=8)), second=group)
    del d["packed_sha256"]
    (tmp_path / "config.json").write_text(json.dumps(d))
    state = {k: v.bfloat16() if k.endswith("scale") else v for k, v in state.items()}
    save_file(state, tmp_path / "model.safetensors")
    back, _ = M.load(tmp_path)
    assert torch.equal(back.layers[0].mlp.up_proj.scale,
                       net.layers[0].mlp.up_proj.scale.bfloat16().half())


def change_config(change):
    """A change of config.json as one of a folder."""
    def apply(folder):
        d = json.loads((folder / "config.json").read_text())
        change(d["quantization_config"], d["quantization_config"]["config_groups"]["group_0"])
        (folder / "config.json").write_text(json.dumps(d))
    return apply


def change_tensors(change):
    """A change of the tensors as one of a folder."""
    def apply(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")
    return apply


def flip(folder):
    """One bit of the codes."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("spoil, words", [
    (change_config(lambda q, g: q.update(format="float")), "s format is 'float'"),
    (change_config(lambda q, g: q.update(config_groups={})), "_proj is packed, and no config"),
    (change_config(lambda q, g: g.update(targets=["re:.*mlp"])), "attn.[kqvo]_proj is packed, and"),
    (change_config(lambda q, g: g.update(input_activations=dict(num_bits=8))), "rounds its inputs"),
    (change_config(lambda q, g: g["weights"].update(type="float")), "of floats"),
    (change_config(lambda q, g: g["weights"].update(num_bits=5)), "bits of 2, 3, 4 or 8"),
    (change_config(lambda q, g: g["weights"].update(group_size=64)), "q_proj.scale has shape"),
    (change_config(lambda q, g: g["weights"].update(symmetric=True)), "_proj.zero does not belong"),
    (change_tensors(lambda s: s.pop(f"{QUERY}.weight_shape")), "no weight_shape"),
    (change_tensors(lambda s: s.pop(f"{QUERY}.weight_scale")), "q_proj.scale is missing"),
    (change_tensors(lambda s: s.update({f"{QUERY}.weight_g_idx": torch.zeros(64)})), r"\(g_idx\)"),
    (flip, "was changed after it was packed"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "no.* readable safetensors"),
])
def test_what_is_wrong_with_such_a_folder_is_named(spoil, words, tmp_path):
    M.save(rounded(), bytes_tokenizer(), tmp_path, form=THEIRS)
    spoil(tmp_path)
    with pytest.raises(UserError, match=words):
        M.load(tmp_path)


def test_what_that_format_cannot_say_is_refused_before_anything_is_written(tmp_path):
    net = rounded()
    W = net.layers[1].mlp.down_proj.dequantize()
    order = torch.arange(W.size(1)).flip(0).to(torch.int16)
    codes, scale, zero = quantize(W, 4, 32)
    layer = pack_int(codes, scale, zero, bits=4, group=32)
    cases = dict(order=packed(W.shape, None, layer.spec() | dict(order=True),
                              dict(layer.named_buffers()) | dict(order=order)),
                 act=packed(W.shape, None, layer.spec() | dict(act=[8, 0, 0]),
                            dict(layer.named_buffers())))
    codes, scale, zero = quantize(W, 4, 40)
    cases["192 inputs, which are no whole groups of 40"] = pack_int(codes, scale, zero, bits=4,
                                                                    group=40)
    for words, layer in cases.items():
        net.layers[1].mlp.down_proj = layer
        with pytest.raises(UserError, match=f"layers.1.mlp.down_proj .*{words}"):
            M.save(net, bytes_tokenizer(), tmp_path / "out", form=THEIRS)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no layer of the model is packed"):
        M.save(M.init(net.config, 0), bytes_tokenizer(), tmp_path / "out", form=THEIRS)


def test_a_dense_folder_holds_the_unpacked_weights(tmp_path):
    net = rounded("qwen2").bfloat16()
    M.save(net, bytes_tokenizer(), tmp_path, form="dense")
    d, state = stored(tmp_path)
    assert "quantization_config" not in d and d["model_type"] == "qwen2"
    layer = net.layers[0].self_attn.q_proj
    assert torch.equal(state[f"{QUERY}.weight"], layer.dequantize().bfloat16())
    assert torch.equal(state[f"{QUERY}.bias"], layer.bias)
    assert isinstance(layer, PackedLinear)                               # the model keeps its own


def test_a_folder_is_exported_in_another_format(tmp_path, capsys):
    M.save(rounded(), bytes_tokenizer(), tmp_path / "ours")
    for form, type_ in ((THEIRS, "llama"), ("dense", "llama"), ("ours", "packed-llama")):
        M.main([str(tmp_path / "ours"), f"--export={tmp_path / form}2", f"--format={form}"])
        d, state = stored(tmp_path / f"{form}2")
        assert d["model_type"] == type_ and (f"{QUERY}.weight_packed" in state) == (form == THEIRS)
        assert (f"{QUERY}.weight" in state) == (form == "dense")
    with pytest.raises(UserError, match="--format: --eval"):
        M.main([str(tmp_path / "ours"), "--eval=x.txt", "--format=dense"])
