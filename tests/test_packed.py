"""Packed layers: hand-worked bytes, sizes against the papers' formulas, kernels against the dense
weight."""
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import kernels as K
import model as M
from data.run import UserError
from data.tokenizer import bytes_tokenizer
from kernels import (PackedLinear, pack_armor, pack_bits, pack_int, pack_nm24, pack_vq, quantize,
                     unpack_bits)
from model import LoRA, lora, merge
from optim import optimiser

TOL = {torch.float32: dict(atol=1e-5, rtol=1e-5), torch.bfloat16: dict(atol=2e-2, rtol=2e-2)}


@pytest.fixture(autouse=True)
def auto():
    """Every test ends on the default path."""
    yield
    K.use("auto")


def normal(*shape, seed=0):
    """Standard normal numbers of a fixed seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_of_four(out, inputs, seed=0):
    """A random 2:4 weight on bfloat16's grid; some groups hold fewer than two."""
    W = F.pad(normal(out, inputs, seed=seed), (0, -inputs % 4)) / inputs ** 0.5
    W = W.unflatten(1, (-1, 4))
    keep = torch.rand(W.shape, generator=torch.Generator().manual_seed(seed)).topk(2, -1).indices
    W = torch.zeros_like(W).scatter(-1, keep, W.gather(-1, keep))
    W[1::5, ::3, 1] = 0
    return W.flatten(1)[:, :inputs].bfloat16().float()


def make(kind, out=96, inputs=128, bias=False, seed=0, **o):
    """(packed layer, the dense weight that it must stand for) of random contents."""
    b = normal(out, seed=9) if bias else None
    if kind == "int":
        bits, group, symmetric = o.get("bits", 4), o.get("group", 32), o.get("symmetric", False)
        codes, scale, zero = quantize(normal(out, inputs, seed=seed) / inputs ** 0.5, bits, group,
                                      symmetric)
        size = inputs if group < 0 else group
        at = torch.arange(inputs) // size
        W = (codes - (2 ** (bits - 1) if symmetric else zero[:, at])) * scale[:, at]
        return pack_int(codes, scale, zero, bits=bits, group=group, bias=b), W
    if kind == "nm24":
        W = two_of_four(out, inputs, seed)
        return pack_nm24(W, bias=b), W
    if kind == "armor":
        bo, bi = o.get("blocks", (16, 32))
        A, B = (normal(n // b, b, b, seed=b).bfloat16() / 4 for n, b in ((out, bo), (inputs, bi)))
        S = two_of_four(out, inputs, seed)
        return (pack_armor(A, S, B, bias=b),
                torch.block_diag(*A.float()) @ S @ torch.block_diag(*B.float()))
    d, bits = o.get("dim", 6), o.get("bits", 8)
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 2 ** bits, (out, -(-inputs // d)), generator=g)
    C = normal(2 ** bits, d, seed=seed).bfloat16()
    r1 = (normal(inputs, seed=3).abs() / inputs ** 0.5).half()
    r2 = (normal(out, seed=4).abs() + 0.1).half()
    W = torch.cat([C.float()[index[:, i]] for i in range(index.size(1))], 1)[:, :inputs]
    W = r2.float()[:, None] * W * r1.float()
    return pack_vq(index, C, r1, r2, bias=b), W


EACH = [("int", dict(bits=b, group=g, symmetric=s)) for b, g, s in
        ((2, 16, False), (3, 64, False), (4, 32, False), (4, -1, True), (8, 40, False),
         (3, 48, True))]
EACH += [("nm24", {}), ("armor", {}), ("armor", dict(blocks=(8, 4)))]
EACH += [("vq", dict(bits=b, dim=d))
         for b, d in ((4, 2), (6, 3), (8, 4), (11, 2), (12, 6), (16, 8))]
ONE = [EACH[i] for i in (1, 2, 6, 7, 13)]        # a row of each kind, and three bits

# --- bits and bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 17))
def test_bits_round_trip(bits):
    g = torch.Generator().manual_seed(bits)
    for n in (1, 2, 7, 8, 13, 64):
        codes = torch.randint(0, 2 ** bits, (3, 2, n), generator=g)
        codes[0, 0, 0], codes[1, 1, -1] = 2 ** bits - 1, 2 ** bits - 1
        stream = pack_bits(codes, bits)
        assert stream.dtype == torch.uint8 and stream.shape == (3, 2, -(-n * bits // 8))
        assert torch.equal(unpack_bits(stream, bits, n), codes.int())
        whole = sum(c << i * bits for i, c in enumerate(codes[2, 1].tolist()))    # one long integer
        assert bytes(stream[2, 1].tolist()) == whole.to_bytes(stream.size(-1), "little")


def test_bits_by_hand():
    """3 bits: 1 2 3 4 5 6 7 0 is 000 111 110 101 100 011 010 001 from the right; 12 bits: 2 in 3
    bytes."""
    three = pack_bits(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0]), 3)
    assert three.tolist() == [0b11010001, 0b01011000, 0b11111]
    assert pack_bits(torch.tensor([0xABC, 0x123]), 12).tolist() == [0xBC, 0x3A, 0x12]
    assert pack_bits(torch.tensor([5, 9, 14]), 4).tolist() == [0x95, 0x0E]
    for bad in ([4], [-1]):
        with pytest.raises(ValueError, match="do not fit in 2 bits"):
            pack_bits(torch.tensor(bad), 2)


def test_two_of_four_by_hand():
    """(0 5 0 7) keeps 1 and 3: 1 + 4 * 3 = 13; (0 0 9 0) keeps 0, a zero, and 2: 4 * 2 = 8; 13 + 16
    * 8."""
    layer = pack_nm24(torch.tensor([[0., 5, 0, 7, 0, 0, 9, 0]]))
    assert layer.index.tolist() == [[13 + 16 * 8]] and layer.values.tolist() == [[5, 7, 0, 9]]
    assert layer.dequantize().tolist() == [[0, 5, 0, 7, 0, 0, 9, 0]]


def test_round_to_nearest_by_hand():
    w = torch.tensor([[-0.9, -0.2, 0.3, 0.6]])
    codes, scale, zero = quantize(w, 2, 4)
    assert codes.tolist() == [[0, 2, 3, 3]] and scale.tolist() == [[0.5]] and zero.tolist() == [[2]]
    layer = pack_int(codes, scale, zero, bits=2, group=4)
    assert layer.dequantize().tolist() == [[-1, 0, 0.5, 0.5]]
    codes, scale, zero = quantize(w, 2, 4, symmetric=True)
    assert codes.tolist() == [[1, 2, 2, 3]] and zero is None
    assert scale.item() == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_to_nearest_errs_by_half_a_step_and_repeats_itself(bits, symmetric):
    W = normal(5, 70)
    W[0], W[1], W[2], W[1, 0] = 0, W[1] * 1e-9, W[2].abs() * 1e3, 0    # W[1]: a scale below float16
    codes, scale, zero = quantize(W, bits, 32, symmetric)
    back = pack_int(codes, scale, zero, bits=bits, group=32).dequantize()
    step = scale.float().repeat_interleave(32, 1)[:, :70]
    slack = W.abs() * 1e-3 + 1e-8  # float16 scales; a rounded zero moves the ends
    assert ((W - back).abs() <= 0.5 * step + slack).float().mean() > 0.9
    assert ((W - back).abs() <= 1.01 * step + slack).all() and (back[0] == 0).all()
    again = quantize(back, bits, 32, symmetric)
    assert torch.allclose(pack_int(*again, bits=bits, group=32).dequantize(), back, rtol=2e-3,
                          atol=1e-8)


@pytest.mark.parametrize("shape, kind, spec, bits", [
    ((4096, 4096), "armor", dict(block_out=128, block_in=128), 10.0),
    ((4096, 4096), "vq", dict(bits=12, dim=6), 2.0322),
    ((11008, 4096), "vq", dict(bits=12, dim=6), 2.0151),
    ((4096, 11008), "vq", dict(bits=12, dim=6), 2.0144),
    ((128, 128), "vq", dict(bits=6, dim=2), 3.375),
    ((512, 128), "vq", dict(bits=6, dim=2), 3.1875),
    ((4096, 4096), "nm24", {}, 9.0),
    ((4096, 4096), "int", dict(bits=4, group=128, symmetric=False), 4.15625),
    ((4096, 4096), "int", dict(bits=4, group=128, symmetric=True), 4.125),
    ((4096, 4096), "int", dict(bits=4, group=32, symmetric=False), 4.625),
    ((4096, 4096), "int", dict(bits=3, group=128, symmetric=False), 3.1484375),
    ((4096, 4096), "int", dict(bits=2, group=16, symmetric=False), 3.125),
    ((13824, 5120), "armor", dict(block_out=128, block_in=128), 9 + 2048 * (1 / 13824 + 1 / 5120)),
])
def test_bits_of_a_weight_are_the_papers(shape, kind, spec, bits):
    with torch.device("meta"):
        layer = PackedLinear(shape[1], shape[0], kind=kind, **spec)
    assert 8 * layer.nbytes() / (shape[0] * shape[1]) == pytest.approx(bits, abs=6e-5)


@pytest.mark.parametrize("out, inputs", [(96, 128), (24, 20), (8, 172)])
def test_bytes_are_the_formula(out, inputs):
    up = lambda a, b: -(-a // b) * b
    for bits in (2, 3, 4, 8):
        for symmetric in (False, True):
            layer, _ = make("int", out, inputs, bits=bits, group=16, symmetric=symmetric)
            groups, unit = -(-inputs // 16), {2: 4, 3: 8, 4: 2, 8: 1}[bits]
            zero = 0 if symmetric else -(-groups * bits // 8)
            assert layer.nbytes() == out * (up(inputs, unit) * bits // 8 + 2 * groups + zero)
    assert make("nm24", out, inputs)[0].nbytes() == 1.125 * out * up(inputs, 8)
    assert (make("armor", out, inputs, blocks=(8, 4), bias=True)[0].nbytes()
            == 1.125 * out * up(inputs, 8) + 2 * (8 * out + 4 * inputs))
    for bits, d in ((4, 2), (12, 6), (16, 8)):
        assert (make("vq", out, inputs, bits=bits, dim=d)[0].nbytes()
                == -(-out * -(-inputs // d) * bits // 8) + 2 * (2 ** bits * d + out + inputs))


# --- products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, o", EACH)
@pytest.mark.parametrize("out, inputs", [(96, 128), (24, 20), (16, 172)])
def test_unpacking_gives_back_what_was_packed(kind, o, out, inputs):
    if kind == "armor":
        o = dict(blocks=(8, 4))
    layer, W = make(kind, out, inputs, **o)
    assert layer.dequantize().dtype == torch.float32
    assert torch.allclose(layer.dequantize(), W, atol=1e-5 if kind == "armor" else 0, rtol=0)


@pytest.mark.parametrize("path", ["torch", "auto", "triton"])
@pytest.mark.parametrize("dtype", TOL)
@pytest.mark.parametrize("kind, o", EACH)
def test_product_is_that_of_the_dense_weight(kind, o, dtype, path):
    layer, W = make(kind, bias=True, **o)
    K.use(path)
    x = normal(17, 128, seed=5).to(dtype)
    y = layer(x)
    want = F.linear(x.double(), W.double(), layer.bias.double())
    assert y.dtype == dtype and torch.allclose(y.double(), want, **TOL[dtype])


@pytest.mark.parametrize("kind, o", ONE)
def test_odd_sizes_on_the_kernel(kind, o):
    """Ragged last units and groups; one row, no row, leading dimensions; more rows than a tile."""
    K.use("triton")
    layer, W = make(kind, 40, 148, bias=True, **(dict(blocks=(4, 4)) if kind == "armor" else o))
    for shape in ((1, 148), (0, 148), (148,), (2, 3, 148), (0, 3, 148), (20, 148)):
        x = normal(*shape, seed=6)
        y = layer(x)
        assert y.shape == (*shape[:-1], 40)
        assert torch.allclose(y, F.linear(x, W, layer.bias), atol=1e-5)


@pytest.mark.parametrize("kind, o", ONE)
def test_a_long_row_is_split_and_a_transposed_input_is_read_right(kind, o):
    K.use("triton")
    layer, W = make(kind, 16, 1100, **(dict(blocks=(4, 4)) if kind == "armor" else o))
    x = normal(1100, 2, seed=7).T
    assert torch.allclose(layer(x), F.linear(x, W), atol=1e-5)


def test_a_tile_of_a_group_and_of_many_give_the_same():
    """Whole-row groups, groups of a tile, of less: each branch of the kernel, in both zero
    points."""
    K.use("triton")
    for group in (8, 48, 64, 256, -1):
        for symmetric in (False, True):
            layer, W = make("int", 20, 128, bits=4, group=group, symmetric=symmetric)
            x = normal(3, 128, seed=8)
            assert torch.allclose(layer(x), F.linear(x, W), atol=1e-5)


def test_large_inputs_stay_finite():
    for kind, o in ONE:
        layer, W = make(kind, **o)
        x = normal(3, 128) * 1e4
        for path in ("torch", "triton"):
            K.use(path)
            assert torch.allclose(layer(x), F.linear(x, W), rtol=1e-4, atol=0.1)


def test_many_rows_take_the_dense_matmul(monkeypatch):
    layer, W = make("int")
    K.use("triton")
    monkeypatch.setattr(K, "skinny", lambda *a, **k: pytest.fail("kernel called"))
    x = normal(K.SKINNY + 1, 128)
    assert torch.allclose(layer(x), F.linear(x, W), atol=1e-5)
    with pytest.raises(pytest.fail.Exception):
        layer(x[:-1])


@pytest.mark.parametrize("path", ["torch", "triton"])
@pytest.mark.parametrize("dtype", TOL)
@pytest.mark.parametrize("kind, o", ONE)
def test_gradient_of_the_input(kind, o, dtype, path):
    layer, W = make(kind, bias=True, **o)
    K.use(path)
    x, g = normal(2, 5, 128).to(dtype).requires_grad_(), normal(2, 5, 96, seed=1).to(dtype)
    layer(x).backward(g)
    assert x.grad.dtype == dtype
    assert torch.allclose(x.grad.double(), g.double() @ W.double(), **TOL[dtype])
    assert torch.allclose(layer.bias.grad, g.float().sum((0, 1)), **TOL[dtype])


def test_gradcheck():
    for kind, o in ONE:
        layer, _ = make(kind, 16, 32, **(dict(blocks=(4, 8)) if kind == "armor" else o))
        x = normal(3, 32).double().requires_grad_()
        assert torch.autograd.gradcheck(layer, x) and torch.autograd.gradgradcheck(layer, x)


def test_an_adapter_learns_over_a_packed_layer():
    """LoRA's A and B get gradients through and beside the layer, whose buffers do not change."""
    layer, W = make("int", 16, 16, bits=2, group=16)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    A, B = normal(4, 16).requires_grad_(), torch.zeros(16, 4, requires_grad=True)
    target, x = normal(16, 16, seed=3) / 4, normal(64, 16, seed=4)
    opt = torch.optim.Adam([A, B], 0.05)
    losses = []
    for _ in range(60):
        h = torch.tanh(layer(x) + x @ A.T @ B.T)
        losses.append((layer(h) - x @ target.T).square().mean())
        opt.zero_grad()
        losses[-1].backward()
        opt.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_autocast_and_casts():
    """Autocast decides the product's dtype, as it does a Linear's; .to(dtype) leaves the buffers
    alone."""
    layer, W = make("vq", bias=True)
    for path in ("auto", "triton"):
        K.use(path)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(normal(2, 128)).dtype == torch.bfloat16
    before = {k: v.clone() for k, v in layer.named_buffers()}
    layer.to(torch.bfloat16).double().half()
    assert layer.bias.dtype == torch.float16
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype
               for k, v in layer.named_buffers())
    with torch.device("meta"):
        empty = PackedLinear(128, 96, True, **layer.spec())
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(empty.dequantize(), layer.dequantize())


@pytest.mark.parametrize("call, words", [
    (lambda: pack_nm24(torch.tensor([[1., 1, 0, 0], [0, 0, 0, 0], [1, 0, 2, 3]])),
     "row 2, columns 0 to 3 hold more than two non-zero weights: prune the layer to 2:4"),
    (lambda: PackedLinear(8, 8, kind="int5"), "'int5' is unknown; choose from int, columns, mixed"),
    (lambda: PackedLinear(64, 8, kind="int", bits=5, group=32, symmetric=True),
     "bits of 2, 3, 4 or 8"),
    (lambda: PackedLinear(64, 8, kind="int", bits=3, group=20, symmetric=True), "whole pack units"),
    (lambda: PackedLinear(64, 8, kind="armor", block_out=16, block_in=16),
     "do not tile a weight of 8 x 64"),
    (lambda: PackedLinear(64, 8, kind="vq", bits=17, dim=2), "1 to 16 bits"),
    (lambda: pack_vq(torch.zeros(2, 2).long(), torch.zeros(6, 2), torch.ones(4), torch.ones(2)),
     "6 vectors: pad it to a power of two"),
    (lambda: pack_int(torch.zeros(2, 8).int(), torch.full((2, 1), 1e5), bits=4, group=8),
     "exceeds float16"),
])
def test_what_cannot_be_packed_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- checkpoints ----------------------------------------------------------------------------------


def mixed(family="qwen2"):
    """A tiny model with a layer of each kind, two of them with a bias."""
    config = replace(M.preset("2x64", bytes_tokenizer(), 96, family), tie_word_embeddings=True)
    net = M.init(config, seed=1)
    mlp = "layers.0.mlp.experts.3." if config.moe else "layers.0.mlp."
    for i, (name, (kind, o)) in enumerate({
            "layers.0.self_attn.q_proj": ("int", dict(bits=3, group=64)),
            mlp + "gate_proj": ("nm24", {}),
            "layers.1.self_attn.v_proj": ("vq", dict(bits=12, dim=6)),
            "layers.1.self_attn.o_proj": ("armor", dict(blocks=(16, 8)))}.items()):
        old = net.get_submodule(name)
        new, _ = make(kind, old.out_features, old.in_features, old.bias is not None, i, **o)
        net.set_submodule(name, new)
    return net


@pytest.mark.parametrize("dtype", TOL)
@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
@pytest.mark.parametrize("shard", [5_000_000_000, 100_000])
def test_a_packed_model_saves_and_loads(family, shard, dtype, tmp_path, capsys):
    net = mixed(family)
    M.save(net, bytes_tokenizer(), tmp_path, shard)
    back, tok = M.load(tmp_path, dtype=dtype)
    held = dict(net.named_buffers())
    assert {b.dtype for b in held.values()} == {torch.uint8, torch.float16, torch.bfloat16}
    for name, b in back.named_buffers():
        assert torch.equal(b, held.pop(name)) and b.dtype == dict(net.named_buffers())[name].dtype
    assert not held and back.config == net.config
    assert {p.dtype for p in back.parameters()} == {dtype}
    x = torch.arange(40).view(2, 20)
    if dtype == torch.float32:
        assert torch.equal(back.logits(back(x)), net.logits(net(x)))
    roll = M.generate(back, [[1, 2, 3], [4]], 4, temperature=0)
    assert torch.equal(roll.tokens[0, 3:],
                       torch.tensor(list(M.stream(back, [1, 2, 3], 4, temperature=0))))
    counted = sum(v.nbytes for v in net.state_dict().values())
    size = sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
    assert 0 <= size - counted < 12_000 * len(list(tmp_path.glob("*.safetensors")))
    if family == "qwen2":
        M.main([str(tmp_path), "--prompt", "ab", "--max_new", "3"])
        assert capsys.readouterr().out.startswith("ab")


def test_config_json_names_the_packed_layers(tmp_path):
    M.save(mixed("mixtral"), bytes_tokenizer(), tmp_path)
    d = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert d["quant_method"] == "minimal-post-training" and d["layers"] == {
        "model.layers.0.self_attn.q_proj": dict(kind="int", bits=3, group=64, symmetric=False),
        "model.layers.0.block_sparse_moe.experts.3.w1": dict(kind="nm24"),
        "model.layers.1.self_attn.v_proj": dict(kind="vq", bits=12, dim=6),
        "model.layers.1.self_attn.o_proj": dict(kind="armor", block_out=16, block_in=8)}


def test_a_scalar_model_with_packed_layers_saves_and_loads(tmp_path):
    net = M.ScalarModel.from_lm(M.init(M.preset("2x64", bytes_tokenizer(), 96)), std=0.5)
    net.model.layers[0].mlp.down_proj = make("nm24", 64, 192)[0]
    M.save(net, bytes_tokenizer(), tmp_path)
    back, _ = M.load(tmp_path)
    x = torch.arange(20).view(2, 10)
    assert isinstance(back, M.ScalarModel) and torch.equal(back(x), net(x))


def test_the_kernels_run_a_whole_model():
    net, x = mixed(), torch.arange(12).view(2, 6)
    want = net(x)
    K.use("triton")
    assert torch.allclose(net(x), want, atol=1e-4)


QUERY, GATE = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize("change, words", [
    (lambda q: q.update(quant_method="gptq"), "quantization_config = .*gptq.* is not supported"),
    (lambda q: q.pop("quant_method"), "quantization_config = .* is not supported"),
    (lambda q: q["layers"].update({"model.layers.7.mlp.up_proj": dict(kind="nm24")}),
     "model.layers.7.mlp.up_proj is no linear layer of this model's blocks"),
    (lambda q: q["layers"].update({"model.layers.0.input_layernorm": dict(kind="nm24")}),
     "no linear layer"),
    (lambda q: q["layers"].update({QUERY: dict(kind="fp3")}), "'fp3' is unknown"),
    (lambda q: q["layers"].update({QUERY: dict(kind="nm24", bits=3)}),
     "q_proj cannot be built .*unexpected keyword"),
    (lambda q: q["layers"][QUERY].update(bits=4),
     r"q_proj.codes has shape \[64, 24\], config.json asks for \[64, 32\]"),
    (lambda q: q["layers"].pop(GATE), "layers.0.mlp.gate_proj.weight is missing"),
    (lambda q: q["layers"][QUERY].update(symmetric=True),
     "q_proj.zero does not belong to a layer packed as quantization_config says"),
    (lambda q: q.update(layers=[QUERY]), "layers is .*: expected an object"),
])
def test_a_wrong_quantization_config_is_named(change, words, tmp_path):
    M.save(mixed(), bytes_tokenizer(), tmp_path)
    d = json.loads((tmp_path / "config.json").read_text())
    change(d["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(d))
    with pytest.raises(UserError, match=words):
        M.load(tmp_path)


def test_a_packed_tensor_of_another_dtype_is_named(tmp_path):
    M.save(mixed(), bytes_tokenizer(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state[QUERY + ".codes"] = state[QUERY + ".codes"].float()
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError,
                       match="q_proj.codes is stored as torch.float32, its format is torch.uint8"):
        M.load(tmp_path)


def test_transformers_refuses_our_packed_checkpoints(tmp_path):
    hf = pytest.importorskip("transformers")
    M.save(mixed(), bytes_tokenizer(), tmp_path)
    with pytest.raises(ValueError, match="packed-"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_adapters_train_over_packed_layers_and_nothing_else_does():
    """QLoRA: the layers stay, a step moves the adapters, and the merged layer is dense and equal"""
    net = M.init(M.preset("2x64", bytes_tokenizer(), 32), seed=1)
    for block in net.layers:
        W = block.mlp.up_proj.weight
        block.mlp.up_proj = pack_int(*quantize(W.detach(), 4, 32), bits=4, group=32)
    tokens = torch.arange(20).view(2, 10)
    with pytest.raises(UserError, match="packed layers cannot be trained: put adapters on them"):
        optimiser(net, lr=1e-2)
    before = M.token_logprobs(net, tokens).detach()
    lora(net, torch.Generator().manual_seed(0), rank=4)
    assert isinstance(net.layers[0].mlp.up_proj, LoRA)
    assert torch.equal(M.token_logprobs(net, tokens), before)
    opt = optimiser(net, lr=1e-2)
    for _ in range(3):
        loss = -M.token_logprobs(net, tokens).mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
    after = M.token_logprobs(net, tokens)
    assert after.mean() > before.mean() + 0.01 and net.layers[0].mlp.up_proj.B.abs().sum() > 0
    merged = merge(net)
    assert not any(isinstance(m, PackedLinear) for m in merged.modules())
    assert torch.allclose(M.token_logprobs(merged, tokens), after, atol=1e-5)
