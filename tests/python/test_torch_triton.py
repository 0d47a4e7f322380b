"""`impl="triton"` of the operator pack without a GPU: modules parse, what stands in the way is said, and where Triton is installed
and the build has the compiler for processors, values and gradients come out of Triton's interpreter. The GPU's side is gpu/test_ops.py.
"""

import ast
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch.nn.functional as F  # noqa: E402
from torch_models import run_all, torch  # noqa: E402

from tilewright import _native, ops  # noqa: E402
from tilewright.ops import _triton  # noqa: E402

ROWS = """graph @norm(M in 1..) {
  %x "x": bf16[M,1000] = input
  %f = map { a -> f32(a) } %x
  %s = reduce sum axes=[1] keep %f
  %y = map { a, s -> bf16(exp(a - s * 0.001)) } %f, %s
  return "y": %y
}
"""


def modules_are_python():
    for sizes in ([5], [16384]):
        for name, source in _native.triton_modules(ROWS, sizes):
            tree = ast.parse(source)
            functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
            assert {name, "launch"} <= functions, functions
            assert "libdevice.exp" in source and "tl.exp(" not in source


def refused(kind, words, call):
    try:
        call()
    except kind as problem:
        assert words in str(problem), problem
        return
    raise AssertionError(f"{words}: nothing was raised")


def what_stands_in_the_way_is_said():
    x = torch.randn(3, 50)
    refused(ValueError, "impl is 'cudnn'", lambda: ops.softmax(x, impl="cudnn"))
    refused(ValueError, "impl is 'cudnn'", lambda: ops.elementwise("x * x", impl="cudnn"))
    refused(ValueError, "impl is ''", lambda: ops.cross_entropy(x, torch.tensor([1, 2, 3]), impl=""))
    os.environ["TRITON_INTERPRET"] = "0"
    try:
        for call in (
            lambda: ops.softmax(x, impl="triton"),
            lambda: ops.rms_norm(x.requires_grad_(), impl="triton"),
            lambda: ops.swiglu(x, x, impl="triton"),
            lambda: ops.cross_entropy(x, torch.tensor([1, 2, 3]), impl="triton"),
        ):
            refused(RuntimeError, "impl='triton' is for CUDA tensors, and one lies on cpu", call)
    finally:
        os.environ["TRITON_INTERPRET"] = "1"


def without_triton_it_says_so():
    import sys

    kept, _triton._READY = sys.modules.get("triton"), False
    sys.modules["triton"] = None
    try:
        refused(ImportError, "needs Triton, which is not installed", lambda: ops.softmax(torch.randn(3, 50), impl="triton"))
    finally:
        del sys.modules["triton"]
        if kept is not None:
            sys.modules["triton"] = kept


def rms(x, w):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w


CASES = {
    "softmax": (ops.softmax, lambda x: torch.softmax(x, -1), [(15, 100)]),
    "rms_norm, residual": (
        lambda x, r, w, impl: ops.rms_norm(x, w, residual=r, impl=impl),
        lambda x, r, w: (rms(x + r, w), x + r),
        [(15, 64), (15, 64), (64,)],
    ),
    "layer_norm": (ops.layer_norm, lambda x, w, b: F.layer_norm(x, w.shape, w, b), [(15, 100), (100,), (100,)]),
    "swiglu": (ops.swiglu, lambda x, y: F.silu(x) * y, [(15, 100), (15, 100)]),
    "a formula of three": (
        lambda a, b, c, impl: ops.elementwise("a * b + tanh(c)", impl=impl)(a, b, c),
        lambda a, b, c: a * b + torch.tanh(c),
        [(5, 9), (5, 9), (5, 9)],
    ),
    "cross_entropy": (ops.cross_entropy, F.cross_entropy, [(15, 100), "t"]),
    "linear": (
        lambda x, w, b, r, impl: ops.linear(x, w, b, "silu", r, impl=impl),
        lambda x, w, b, r: F.silu(F.linear(x, w, b)) + r,
        [(9, 48), (40, 48), (40,), (9, 40)],
    ),
    "attention": (
        lambda q, k, v, impl: ops.attention(q, k, v, causal=True, impl=impl),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        [(2, 4, 9, 16), (2, 2, 9, 16), (2, 2, 9, 16)],
    ),
}


def flat(value):
    return list(value) if isinstance(value, tuple) else [value]


def interpreter() -> bool:
    """Gives Triton's interpreter the library that it lacks; whether values can be had here."""
    try:
        import triton.language as tl
    except ImportError:
        print("  no Triton: left out")
        return False
    if not _native.HAS_CPU:
        print("  a build without LLVM: left out")
        return False
    # Triton's interpreter has no libdevice.
    from test_triton import Libdevice

    plain = _triton._module

    def with_libdevice(source):
        import sys

        launch, named = plain(source)
        module = sys.modules[launch.__module__]
        if hasattr(module, "libdevice"):
            module.libdevice = Libdevice(tl)
        return launch, named

    _triton._module = with_libdevice
    return True


def dropout_draws_the_same_numbers():
    """Under one seed both forms drop the same elements, in the gradient as well."""
    found = []
    for impl in ("cuda", "triton"):
        torch.manual_seed(5)
        x, r = torch.linspace(1, 2, 999).requires_grad_(), torch.ones(999)
        y = ops.dropout(x, 0.3, residual=r, impl=impl)
        (dx,) = torch.autograd.grad(y.sum(), x)
        found.append((y.detach(), dx))
    assert 0.2 < (found[1][0] == 1).float().mean() < 0.4
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def values_and_gradients_come_out_of_the_interpreter():
    if not interpreter():
        return
    generator = torch.Generator().manual_seed(4)
    for name, (ours, reference, shapes) in CASES.items():
        given = []
        for shape in shapes:
            if shape == "t":
                given.append(torch.randint(0, given[0].shape[1], given[0].shape[:1], generator=generator))
            else:
                given.append(torch.randn(shape, generator=generator).requires_grad_())
        wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in given]
        got, want = flat(ours(*given, impl="triton")), flat(reference(*wide))
        seeds = [torch.randn(w.shape, generator=generator) for w in want]
        torch.autograd.backward(got, seeds)
        torch.autograd.backward(want, [s.double() for s in seeds])
        for a, b in list(zip(got, want)) + [(t.grad, w.grad) for t, w in zip(given, wide) if t.is_floating_point()]:
            torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5, msg=lambda m: f"{name}: {m}")
    dropout_draws_the_same_numbers()


if __name__ == "__main__":
    run_all(
        [
            modules_are_python,
            what_stands_in_the_way_is_said,
            without_triton_it_says_so,
            values_and_gradients_come_out_of_the_interpreter,
        ]
    )
