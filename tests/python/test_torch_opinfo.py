"""A slice of tests/python/torch_opinfo.py: operators of PyTorch's own database, one of each kind of rule, native and right."""

import torch
import torch_opinfo

NATIVE = [
    "add", "floor_divide", "remainder", "round_decimals_3", "fmax", "hypot", "bitwise_left_shift", "isfinite", "lgamma", "erfinv",
    "special_bessel_y0", "special_i1e", "as_strided", "diagonal", "unfold", "index_add", "scatter_reduce_amax", "msort", "cumprod",
    "amax", "argmin", "addbmm", "softmax", "nn_functional_layer_norm", "nn_functional_gelu", "nn_functional_avg_pool2d",
    "nn_functional_adaptive_avg_pool2d", "nn_functional_conv2d", "nn_functional_conv_transpose1d", "diagonal_scatter", "as_strided_scatter",
    "masked_scatter", "signbit", "index_put", "nn_functional_instance_norm", "_upsample_bilinear2d_aa",
]  # fmt: skip
# Right, and PyTorch's: no rule, complex numbers, decompositions of matrices.
LEFT = ["logcumsumexp", "fft_fft", "linalg_qr"]


def main() -> None:
    torch.set_num_threads(1)
    ops = torch_opinfo.database()
    missing = [name for name in NATIVE + LEFT if name not in ops]
    assert not missing, f"not in op_db: {missing}"
    tasks = [(n, d) for n in NATIVE + LEFT for d in ("float32", "int64") if torch_opinfo.DTYPES[d] in ops[n].dtypes]
    rows = torch_opinfo.run(ops, tasks, 2, 2, 60.0, lambda task, row: None)
    for (name, dtype), row in rows.items():
        wanted = ("native", "none") if name in NATIVE else ("left", "partly", "none")
        assert row["state"] in wanted, f"{name} {dtype}: {row}"
        if row["state"] != "none":
            assert row["samples"] > 0
    print(f"ok: {torch_opinfo.summary(rows)}")


if __name__ == "__main__":
    main()
