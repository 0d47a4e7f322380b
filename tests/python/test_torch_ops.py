"""The operator pack on the CPU: values and gradients against float64, PyTorch's own checks, compiling, exporting, bad input, patched
models of transformers. The GPU's side is gpu/test_ops.py.
"""

import contextlib
import io

import torch.nn.functional as F
import torch.utils.flop_counter
from torch_models import run_all, torch, transformers

import tilewright
from tilewright import ops

TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 3e-2, torch.float64: 1e-11}
PACK = torch.ops.tilewright
GELU = ops.linears._ACTIVATIONS["gelu"].text


def rms(x, w, eps=1e-6):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w


def rotated(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-b, a), -1) * sin.unsqueeze(1)


def rich_loss(x, t):
    v = torch.tanh(x / 3.0) * 3.0
    l = torch.logsumexp(v, -1)
    kept = t != -100
    loss = F.cross_entropy(v, t, label_smoothing=0.1, reduction="none") + 1e-2 * l * l
    return torch.where(kept, loss, 0).sum() / kept.sum()


def sdpa(q, k, v, mask=None, causal=False):
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)


# Function of the pack, the same in PyTorch in any float type, shapes of the tensors ("t": targets of a row of logits).
CASES = {
    "rms_norm": (ops.rms_norm, rms, [(3, 5, 100), (100,)]),
    "rms_norm, residual": (lambda x, r, w: ops.rms_norm(x, w, residual=r), lambda x, r, w: (rms(x + r, w), x + r), [(15, 64), (15, 64), (64,)]),
    "rms_norm, no weight": (ops.rms_norm, lambda x: rms(x, 1), [(7, 33)]),
    "layer_norm": (ops.layer_norm, lambda x, w, b: F.layer_norm(x, w.shape, w, b), [(15, 100), (100,), (100,)]),
    "layer_norm, residual": (
        lambda x, r, w, b: ops.layer_norm(x, w, b, residual=r),
        lambda x, r, w, b: (F.layer_norm(x + r, w.shape, w, b), x + r),
        [(15, 64), (15, 64), (64,), (64,)],
    ),
    "softmax": (ops.softmax, lambda x: torch.softmax(x, -1), [(15, 100)]),
    "log_softmax": (ops.log_softmax, lambda x: torch.log_softmax(x, -1), [(15, 100)]),
    "gelu": (ops.gelu, F.gelu, [(15, 100)]),
    "gelu, tanh": (lambda x: ops.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh"), [(15, 100)]),
    "silu": (ops.silu, F.silu, [(1000,)]),
    "swiglu": (ops.swiglu, lambda x, y: F.silu(x) * y, [(15, 100), (15, 100)]),
    "geglu": (ops.geglu, lambda x, y: F.gelu(x) * y, [(15, 100), (15, 100)]),
    "a formula": (ops.elementwise("x * sigmoid(1.702 * x)"), lambda x: x * torch.sigmoid(1.702 * x), [(15, 100)]),
    "a formula, broadcast": (ops.elementwise("a * tanh(b) + a"), lambda a, b: a * torch.tanh(b) + a, [(4, 1, 9), (5, 1)]),
    "a formula of three": (ops.elementwise("a * b + tanh(c)"), lambda a, b, c: a * b + torch.tanh(c), [(5, 9), (5, 9), (5, 9)]),
    "cross_entropy": (ops.cross_entropy, F.cross_entropy, [(15, 100), "t"]),
    "cross_entropy, everything": (
        lambda x, t: ops.cross_entropy(x, t, label_smoothing=0.1, z_loss=1e-2, softcap=3.0),
        rich_loss,
        [(15, 100), "t"],
    ),
    "rotary": (ops.rotary, rotated, [(2, 3, 5, 16), "table (2, 5, 16)", "table (2, 5, 16)"]),
    "rotary, shared": (ops.rotary, rotated, [(2, 3, 5, 16), "table (1, 5, 16)", "table (1, 5, 16)"]),
    "linear": (ops.linear, F.linear, [(15, 24), (40, 24), (40,)]),
    "linear, gelu, residual": (
        lambda x, w, b, r: ops.linear(x, w, b, "gelu", r),
        lambda x, w, b, r: F.gelu(F.linear(x, w, b)) + r,
        [(15, 24), (40, 24), (40,), (15, 40)],
    ),
    "linear, gelu, residual, in training by two kernels": (
        lambda x, w, b, r: PACK.linear_apart(x, w, b, r, GELU)[0],
        lambda x, w, b, r: F.gelu(F.linear(x, w, b)) + r,
        [(15, 24), (40, 24), (40,), (15, 40)],
    ),
    "linear, gelu, in training by two kernels": (
        lambda x, w: PACK.linear_apart(x, w, None, None, GELU)[0],
        lambda x, w: F.gelu(F.linear(x, w)),
        [(3, 5, 24), (40, 24)],
    ),
    "linear, residual, in training by PyTorch's product": (
        lambda x, w, b, r: PACK.linear_apart(x, w, b, r, "")[0],
        lambda x, w, b, r: F.linear(x, w, b) + r,
        [(15, 24), (40, 24), (40,), (15, 40)],
    ),
    "linear_cross_entropy": (
        lambda x, w, t, b: ops.linear_cross_entropy(x, w, t, b, rows=4),
        lambda x, w, t, b: F.cross_entropy(F.linear(x, w, b), t),
        [(15, 24), (100, 24), "t", (100,)],
    ),
    "attention": (ops.attention, sdpa, [(2, 4, 9, 16), (2, 4, 11, 16), (2, 4, 11, 16)]),
    "attention, causal, shared heads": (
        lambda q, k, v: ops.attention(q, k, v, causal=True),
        lambda q, k, v: sdpa(q, k, v, causal=True),
        [(2, 4, 9, 16), (2, 2, 9, 16), (2, 2, 9, 16)],
    ),
    "attention, masked": (ops.attention, sdpa, [(2, 4, 9, 16), (2, 4, 11, 16), (2, 4, 11, 16), "table (2, 1, 9, 11)"]),
}


def tensors(shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in shapes:
        if shape == "t":
            rows, classes = made[0].shape[0], 100
            targets = torch.randint(0, classes, (rows,), generator=generator)
            targets[3] = -100
            made.append(targets)
        elif isinstance(shape, str):
            made.append(torch.randn(*eval(shape.split(" ", 1)[1]), generator=generator).to(dtype))
        else:
            made.append(torch.randn(*shape, generator=generator).to(dtype).requires_grad_())
    return made


def flat(value):
    return list(value) if isinstance(value, (tuple, list)) else [value]


def values_and_gradients_are_those_of_float64():
    for name, (ours, reference, shapes) in CASES.items():
        for dtype, tolerance in TOLERANCE.items():
            mine = tensors(shapes, dtype)
            wide = [(t.detach().double() if t.is_floating_point() else t).requires_grad_(t.requires_grad) for t in mine]
            given, wanted = flat(ours(*mine)), flat(reference(*wide))
            seeds = [torch.randn(g.shape, generator=torch.Generator().manual_seed(1)).to(g.dtype) for g in given]
            torch.autograd.backward(given, seeds)
            torch.autograd.backward(wanted, [s.double() for s in seeds])
            pairs = list(zip(given, wanted)) + [(a.grad, b.grad) for a, b in zip(mine, wide) if a.requires_grad]
            for number, (a, b) in enumerate(pairs):
                error = ((a.double() - b).abs().max() / b.abs().max()).item()
                assert error < tolerance, f"{name} {dtype}: value {number} is off by {error:.1e}"
            with torch.no_grad():
                for a, b in zip(flat(ours(*mine)), given):
                    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def derivatives_are_those_of_finite_differences():
    for name, (ours, _, shapes) in CASES.items():
        small = [s if isinstance(s, str) else tuple(min(n, 5) for n in s) for s in shapes]
        if any(isinstance(s, str) for s in shapes) or len(shapes[0]) > 3:
            continue
        args = tensors(small, torch.float64)
        assert torch.autograd.gradcheck(ours, args), name
    x, w = tensors([(5, 7), (7,)], torch.float64)
    t = torch.tensor([0, 6, -100, 3, 2])
    loss = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 2.0}
    assert torch.autograd.gradcheck(lambda x: ops.cross_entropy(x, t, **loss), (x,))
    assert torch.autograd.gradcheck(lambda x, w: ops.linear_cross_entropy(x, w, t, rows=2, **loss), tensors([(5, 4), (7, 4)], torch.float64))
    q, k = tensors([(1, 2, 3, 4), (1, 1, 5, 4)], torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: ops.attention(q, k, k, causal=True), (q, k))
    (x, cos, sin) = tensors([(1, 2, 3, 4), "table (1, 3, 4)", "table (1, 3, 4)"], torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.rotary(x, cos, sin), (x,))


def pytorchs_own_checks_pass():
    x, w, b = tensors([(6, 8), (8,), (8,)], torch.float32)
    q, cos, sin = tensors([(2, 4, 3, 8), "table (1, 3, 8)", "table (1, 3, 8)"], torch.float32)
    t = torch.tensor([0, 1, 2, -100, 7, 3])
    numbers = (-100, 0.1, 0.1, 4.0)
    y, rstd = (v.detach() for v in PACK.rms_norm.default(x, w, 1e-6))
    mean = rstd * 0
    for op, args in (
        (PACK.rms_norm, (x, w, 1e-6)),
        (PACK.add_rms_norm, (x, x.detach() + 1, None, 1e-6)),
        (PACK.layer_norm, (x, w, b, 1e-6)),
        (PACK.add_layer_norm, (x, x.detach() + 1, w, None, 1e-6)),
        (PACK.softmax, (x, True)),
        (PACK.map, ([x, x.detach() + 1, x.detach()], "x * sigmoid(y) + z")),
        (PACK.map1, (x, "x * sigmoid(x)")),
        (PACK.map2, (x, x.detach() + 1, "x * sigmoid(y)")),
        (PACK.map1_backward, (y, y, "x * sigmoid(x)")),
        (PACK.map2_backward, (y, y, y, "x * sigmoid(y)")),
        (PACK.cross_entropy, (x, t, *numbers)),
        (PACK.rotary, (q, cos, sin, False)),
        (PACK.attention, (q, q.detach(), q.detach(), None, 0.3, True)),
        (PACK.linear, (x.detach(), tensors([(5, 8)], torch.float32)[0].detach(), None, None, "x * sigmoid(x)")),
        (PACK.linear_apart, (x.detach(), tensors([(5, 8)], torch.float32)[0].detach(), None, None, "x * sigmoid(x)")),
        (PACK.column_sums, (y, w.detach())),
        (PACK.rms_norm_backward, (y, x.detach(), rstd, None, w.detach(), 1e-6)),
        (PACK.layer_norm_backward, (y, x.detach(), mean, rstd, y, w.detach(), b.detach(), 1e-6)),
        (PACK.softmax_backward, (y, y, False)),
        (PACK.map_backward, (y, [y, y], "x * sigmoid(y)")),
        (PACK.cross_entropy_backward, (rstd[:, 0], y, t, rstd[:, 0], *numbers)),
    ):
        torch.library.opcheck(op.default, args)


class Block(torch.nn.Module):
    """A bit of a model, with most of the pack."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(16))
        self.up = torch.nn.Linear(16, 16)

    def forward(self, x, r):
        y, h = ops.rms_norm(x, self.w, residual=r)
        y = ops.swiglu(self.up(y), h)
        return ops.softmax(ops.linear(y, self.up.weight, self.up.bias, "gelu")).sum(-1) + ops.layer_norm(y).sum(-1)


def losses_with_their_gradients_compile_whole():
    x, w, h = tensors([(9, 31), (31, 7), (9, 7)], torch.float32)
    t = torch.arange(9)
    t[2] = -100
    for reduction in ("mean", "sum", "none"):
        mine, theirs = ops.cross_entropy(x, t, reduction=reduction), F.cross_entropy(x, t, reduction=reduction)
        torch.testing.assert_close(mine, theirs)
        for seed in (torch.ones_like(theirs), torch.full_like(theirs, 3.0)):
            # The second time from gradients that were scaled in place.
            a, b = (torch.autograd.grad(y, x, seed, retain_graph=True)[0] for y in (mine, theirs))
            torch.testing.assert_close(a, b)
    fast = torch.compile(lambda h, w: ops.linear_cross_entropy(h, w, t, rows=4), fullgraph=True, backend="aot_eager")
    wanted = F.cross_entropy(F.linear(h, w), t)
    found = fast(h, w)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(torch.autograd.grad(found, (h, w)), torch.autograd.grad(wanted, (h, w))):
        torch.testing.assert_close(a, b)
    for op, args in (
        (PACK.linear_cross_entropy, (h, w, None, t, -100, 0.0, 0.0, 0.0, True, 4, [True, True, False])),
        (PACK.cross_entropy_total, (x, t, -100, 0.1, 0.0, 0.0, True)),
        (PACK.scale_, (x.detach(), torch.tensor(2.0))),
    ):
        torch.library.opcheck(op.default, args)


def attention_with_truth_values():
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, 4, n, 16, dtype=torch.float64, requires_grad=True) for n in (9, 11, 11))
    seen = torch.rand(2, 1, 9, 11) > 0.3
    seen[1, :, 4] = False
    low = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    for mask in (seen, low):
        given, wanted = ops.attention(q, k, v, mask), sdpa(q, k, v, mask)
        torch.testing.assert_close(given, wanted)
        assert (given[1, :, 4] == 0).all()
        down = torch.randn_like(given)
        for a, b in zip(torch.autograd.grad(given, (q, k, v), down), torch.autograd.grad(wanted, (q, k, v), down)):
            torch.testing.assert_close(a, b)


def attention_takes_some_queries_at_a_time():
    from tilewright.ops import attentions

    q, k, v, mask = (t.detach().requires_grad_() for t in tensors([(2, 4, 9, 8), (2, 2, 11, 8), (2, 2, 11, 5), (1, 4, 9, 11)], torch.float64))
    all_at_once, attentions.SCORES = attentions.SCORES, 2 * 4 * 11 * 4
    try:
        for causal in (False, True):
            assert torch.autograd.gradcheck(lambda q, k, v: ops.attention(q, k, v, causal=causal), (q, k, v))
            assert torch.autograd.gradcheck(lambda *args: ops.attention(*args, causal=causal), (q, k, v, mask))
    finally:
        attentions.SCORES = all_at_once
    torch.library.opcheck(PACK.attention_rows.default, (q.detach()[0, 0], q.detach()[0, 1], 0.5, 2.0))


def they_compile_export_and_cast():
    torch.manual_seed(0)
    model, x, r = Block(), torch.randn(5, 16), torch.randn(5, 16)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 9):
        a, b = torch.randn(rows, 16), torch.randn(rows, 16)
        torch.testing.assert_close(fast(a, b), model(a, b), rtol=1e-4, atol=1e-5)
    fast(x, r).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x, r).sum().backward()
    for g, p in zip(grads, model.parameters()):
        torch.testing.assert_close(g, p.grad, rtol=1e-4, atol=1e-5)
    rows = torch.export.Dim("rows", min=2, max=64)
    with torch.no_grad():
        exported = torch.export.export(model, (x, r), dynamic_shapes=({0: rows}, {0: rows}))
    targets = {str(n.target) for n in exported.graph.nodes}
    assert any("tilewright.add_rms_norm" in t for t in targets), targets
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    a, b = torch.randn(7, 16), torch.randn(7, 16)
    torch.testing.assert_close(torch.export.load(file).module()(a, b), model(a, b), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x, r)
    torch.testing.assert_close(y.float(), model(x, r), rtol=0.1, atol=0.1)


def views_empty_tensors_and_special_numbers_are_right():
    base = torch.randn(9, 33)
    for view in (base[:, 1:], base.t()[1:].t(), base[1::2], base[3], base.expand(2, 9, 33), base[:, ::3]):
        torch.testing.assert_close(ops.softmax(view), torch.softmax(view, -1))
        torch.testing.assert_close(ops.gelu(view), F.gelu(view), rtol=1e-5, atol=1e-6)
    for shape in ((0, 5), (3, 0, 5), (3, 0)):
        empty = torch.randn(shape, requires_grad=True)
        weight = torch.ones(shape[-1], requires_grad=True)
        for f in (ops.softmax, ops.silu, lambda x: ops.rms_norm(x, weight), lambda x: ops.layer_norm(x, weight, weight)):
            y = f(empty)
            assert y.shape == empty.shape
            y.sum().backward()
        assert weight.grad.abs().sum() == 0
    odd = torch.tensor([[1.0, float("nan"), 2.0], [float("inf"), 1.0, 2.0], [float("-inf"), 1.0, 2.0]])
    torch.testing.assert_close(ops.softmax(odd), torch.softmax(odd, -1), equal_nan=True)
    torch.testing.assert_close(ops.rms_norm(odd[2:]), rms(odd[2:], 1), equal_nan=True)
    with torch.inference_mode():
        assert ops.softmax(base).shape == base.shape
    assert PACK.softmax.default(base.to("meta"), False).device.type == "meta"


def bad_input_is_refused_in_words():
    if not tilewright._native.HAS_CPU:
        print("  a build without LLVM has PyTorch's operators on the processor, and their words: left out")
        return
    x = torch.randn(3, 4)
    for call, words in (
        (lambda: ops.rms_norm(x, torch.randn(5)), "weight has shape [5]; it must be [4]"),
        (lambda: ops.rms_norm(x, torch.randn(4), eps=float("nan")), "eps is NaN"),
        (lambda: ops.rms_norm(x, residual=torch.randn(4, 3)), "residual has shape [4, 3]"),
        (lambda: ops.softmax(torch.tensor(1.0)), "x has no axes"),
        (lambda: ops.softmax(x.long()), "x is i64; it must be float32"),
        (lambda: ops.softmax(x.to(torch.complex64)), "complex"),
        (lambda: ops.softmax(x.to_sparse()), "SparseCPU"),
        (lambda: ops.cross_entropy(x, torch.tensor([0, 1, 9])), "targets reach from 0 to 9"),
        (lambda: ops.cross_entropy(x, torch.tensor([0, 1])), "targets are i64 of shape [2]"),
        (lambda: ops.cross_entropy(x, torch.tensor([0, 1, 2]), reduction="max"), "reduction is 'max'"),
        (lambda: ops.elementwise("x * "), "expected"),
        (lambda: ops.elementwise("2.0"), "no variables"),
        (lambda: ops.elementwise("x + y")(x), "1 tensors for the variables"),
        (lambda: ops.gelu(x, "fast"), "approximate is 'fast'"),
        (lambda: ops.linear(x, torch.randn(5, 3)), "weight is f32 of shape [5, 3]"),
        (lambda: ops.linear(x, torch.randn(5, 4), activation="sin"), "activation is 'sin'"),
        (lambda: ops.attention(x, x, x), "q, k and v must have the axes"),
        (lambda: ops.rotary(torch.randn(1, 1, 2, 3), x, x), "rows of 3 numbers"),
        (lambda: ops.rotary(torch.randn(1, 1, 3, 4), x[None], x[None].double()), "sin is f64 of shape [1, 3, 4], and cos f32"),
        (lambda: ops.linear(x, torch.randn(5, 4), residual=torch.ones(3, 5).double()), "residual is f64 of shape [3, 5]; it must be f32"),
        (lambda: ops.linear_cross_entropy(x, torch.randn(5, 4), torch.arange(3), bias=torch.ones(1, 5)), "bias has shape [1, 5]; it must be [5]"),
        (lambda: ops.linear_cross_entropy(x, torch.randn(4), torch.arange(3)), "weight has shape [4]; it must be [N, 4]"),
        (lambda: ops.elementwise("x * y")(x, 2.0), "y of 'x * y' is a float; it must be a tensor"),
        (lambda: ops.dropout(x, training=False, residual=torch.ones(4)), "residual has shape [4], and x [3, 4]"),
        (lambda: ops.dropout_rms_norm(x, x, p=2.0, training=False), "p is 2.0"),
    ):
        try:
            call()
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            assert words in str(error), f"{words!r} is not in {str(error)[:300]!r}"
            continue
        raise AssertionError(f"not refused: {words}")
    y = torch.randn(1, 1, 2, 3, requires_grad=True)
    for call in (lambda: ops.attention(y, y, y), lambda: ops.cross_entropy(y[0, 0], torch.tensor([0, 1]))):
        try:
            torch.autograd.grad(call().square().sum(), y, create_graph=True)
        except NotImplementedError as error:
            assert "no second derivative" in str(error)
            continue
        raise AssertionError("a second derivative came out of nowhere")


def second_derivatives_are_those_of_finite_differences():
    t = torch.tensor([0, 6, -100, 3, 2])
    for name, call, shapes in (
        ("softmax", ops.softmax, [(3, 5)]),
        ("log_softmax", ops.log_softmax, [(3, 5)]),
        ("gelu", ops.gelu, [(3, 5)]),
        ("swiglu", ops.swiglu, [(3, 5), (3, 5)]),
        ("a formula of three", ops.elementwise("a * b + tanh(c) * a"), [(3, 2), (3, 2), (3, 2)]),
        ("rms_norm", ops.rms_norm, [(3, 5), (5,)]),
        ("rms_norm, residual", lambda x, r, w: ops.rms_norm(x, w, residual=r), [(3, 5), (3, 5), (5,)]),
        ("layer_norm", ops.layer_norm, [(3, 5), (5,), (5,)]),
        ("layer_norm, residual", lambda x, r, w: ops.layer_norm(x, w, residual=r), [(3, 5), (3, 5), (5,)]),
        ("a norm by a weight of its own rows", lambda x: ops.rms_norm(x, x[0]), [(3, 5)]),
        ("cross_entropy", lambda x: ops.cross_entropy(x, t, softcap=2.0, z_loss=0.1, reduction="none"), [(5, 7)]),
        ("rotary", lambda x: ops.rotary(x * x, torch.ones(1, 3, 4, dtype=x.dtype), torch.ones(1, 3, 4, dtype=x.dtype)), [(1, 2, 3, 4)]),
    ):
        args = tensors(shapes, torch.float64)
        assert torch.autograd.gradgradcheck(call, args), name


def small_models():
    sizes = dict(vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    shared = dict(sizes, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    ids = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    text = dict(input_ids=ids, attention_mask=mask, labels=ids)
    t = transformers
    yield t.BertForMaskedLM(t.BertConfig(**sizes)), text
    yield t.GPT2LMHeadModel(t.GPT2Config(vocab_size=120, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)), text
    for kind in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma"):
        yield getattr(t, kind + "ForCausalLM")(getattr(t, kind + "Config")(**shared)), text
    # Heads that are turned in part; attention with caps of scores, or sinks, which stays the model's.
    turned = {k: v for k, v in shared.items() if k not in ("num_key_value_heads", "head_dim")}
    yield t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**turned)), text
    yield t.Gemma2ForCausalLM(t.Gemma2Config(**shared)), text
    yield t.GptOssForCausalLM(t.GptOssConfig(**shared, num_local_experts=2, num_experts_per_tok=1)), text
    picture = dict(pixel_values=torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)))
    yield t.ViTModel(t.ViTConfig(**{k: v for k, v in sizes.items() if k != "vocab_size"}, image_size=32, patch_size=8)), picture
    whisper = t.WhisperConfig(
        vocab_size=120, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=10, max_target_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, begin_suppress_tokens=None, suppress_tokens=None,
    )
    sound = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(3))
    yield t.WhisperForConditionalGeneration(whisper), dict(input_features=sound, labels=ids)


def outcome(model, inputs):
    """Loss or last state, and all gradients, without dropout."""
    model.eval()
    model.zero_grad()
    out = model(**inputs)
    value = out.loss if "loss" in out else out.last_hidden_state.square().mean()
    value.backward()
    return value.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def attention_has_caps_and_sinks():
    from tilewright import patching

    patching.register_attention()
    for model, inputs in small_models():
        name = type(model).__name__
        if name not in ("Gemma2ForCausalLM", "GptOssForCausalLM"):
            continue
        if name.startswith("Gemma2"):
            # So small that all scores feel it.
            for layer in model.model.layers:
                layer.self_attn.attn_logit_softcapping = 0.01
        for mask in (inputs["attention_mask"], inputs["attention_mask"].flip(-1), None):
            model.set_attn_implementation("eager")
            want, want_grads = outcome(model, inputs | {"attention_mask": mask})
            model.set_attn_implementation("tilewright")
            got, grads = outcome(model, inputs | {"attention_mask": mask})
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
            for a, b in zip(grads, want_grads, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def patched_models_give_the_same():
    for model, inputs in small_models():
        name = type(model).__name__
        value, grads = outcome(model, inputs)
        done = tilewright.patch(model)
        kinds = str(done)
        own = name in ("Gemma2ForCausalLM", "GptOssForCausalLM")
        assert ("attention" in kinds) != own and "norm" in kinds, f"{name}: {done}"
        if name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM"):
            assert "rotary" in kinds and "cross_entropy" in kinds and "gated" in kinds, f"{name}: {done}"
        with torch.profiler.profile() as seen:
            patched, patched_grads = outcome(model, inputs)
        calls = {e.key for e in seen.key_averages() if e.key.startswith("tilewright::")}
        assert any("attention" in c for c in calls) != own and any("norm" in c for c in calls), f"{name}: {calls}"
        torch.testing.assert_close(patched, value, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")
        for a, b in zip(patched_grads, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4, msg=lambda m: f"{name}: {m}")
        if "gated" in kinds:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            read = torch.load(file, weights_only=False)
            assert "forward" in vars(next(m for m in read.modules() if type(m).__name__.endswith("RMSNorm")))
            torch.testing.assert_close(outcome(read, inputs)[0], patched, msg=lambda m: f"{name}, read from a file: {m}")
        done.undo()
        again, _ = outcome(model, inputs)
        assert torch.equal(again, value), f"{name} is not what it was"


def calls_past_the_dispatcher_are_those_that_it_would_not_change():
    """Plain tensors in eager mode go past it; whoever stands in or before it sees the call."""
    x = torch.randn(4, 64)
    now = tilewright._native.Direct.of("softmax", None, 0).call
    if tilewright._native.direct_state() is None:
        return  # A PyTorch without what this takes: everything goes through the dispatcher.
    expected = PACK.softmax.inference(x, False)
    for taken in (contextlib.nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")):
        with taken():
            assert torch.equal(now(x, False), expected)
            assert not ops.softmax(x).requires_grad
    with torch.device("cpu"):
        assert now(x, False) is None, "a mode before all functions"
    with torch.profiler.profile(), torch.utils.flop_counter.FlopCounterMode(display=False):
        assert now(x, False) is None
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert now(x, False) is None, "a mode inside of the dispatcher"

    def transformed(row):
        assert now(row, False) is None, "a function that is transformed"
        return row * 2

    torch.vmap(transformed)(x)
    torch.func.grad(lambda v: transformed(v).sum())(x)
    traced = torch.jit.trace(lambda v: ops.softmax(v) * 2, x, check_trace=False)
    assert torch.equal(traced(x + 1), ops.softmax(x + 1) * 2), "a call that is traced is no constant"

    class Own(torch.Tensor):
        pass

    odd = {
        "negative": torch._neg_view(x),
        "sparse": x.to_sparse(),
        "turned": x.t(),
        "of a class of its own": x.as_subclass(Own),
        "on the meta device": x.to("meta"),
        "whole numbers": x.long(),
        "no tensor": 3,
        "nothing": None,
    }
    for name, value in odd.items():
        assert now(value, False) is None, name
    for arguments in ((), (x,), (x, 1), (x, None), (x, False, 2), (x, False, None, x)):
        assert now(*arguments) is None, arguments
    assert torch.equal(ops.softmax(odd["negative"]), ops.softmax(-x)), "a negative view"
    # What is converted before it is differentiated.
    a, b = (torch.randn(4, 64, dtype=d, requires_grad=True) for d in (torch.float32, torch.bfloat16))
    for y in (ops.rms_norm(a, residual=b)[0], ops.layer_norm(b, residual=a)[0], ops.swiglu(a, b), ops.swiglu(a, b[:1]), ops.dropout(a, 0.5, residual=b)):
        assert y.dtype == torch.float32 and y.shape == a.shape
        grads = torch.autograd.grad(y.sum(), (a, b), allow_unused=True)
        assert [g.dtype for g in grads] == [torch.float32, torch.bfloat16]


if __name__ == "__main__":
    run_all(
        [
            calls_past_the_dispatcher_are_those_that_it_would_not_change,
            values_and_gradients_are_those_of_float64,
            derivatives_are_those_of_finite_differences,
            second_derivatives_are_those_of_finite_differences,
            pytorchs_own_checks_pass,
            losses_with_their_gradients_compile_whole,
            attention_takes_some_queries_at_a_time,
            attention_with_truth_values,
            they_compile_export_and_cast,
            views_empty_tensors_and_special_numbers_are_right,
            bad_input_is_refused_in_words,
            attention_has_caps_and_sinks,
            patched_models_give_the_same,
        ]
    )
