"""Lines for `gpu/rows_peer.py check`: rows of random lengths and distances that begin or end within units of 16 bytes.

    python3 gpu/rows_sweep.py SEED COUNT > sweep.txt
    cargo run --release -p tilewright-kernels --example show_rows -- --json sweep.txt > sweep.json
    python3 gpu/rows_peer.py check sweep.json

Lengths of 64 to 262144 of every remainder by 8; rows that lie densely, or further apart, aligned or not.
"""
import random, sys

OPERATIONS = ["softmax", "logsoftmax", "layernorm", "rmsnorm", "crossentropy"]
NEAR = [64, 96, 128, 200, 256, 384, 512, 768, 1000, 1024, 1536, 2000, 2048, 3000, 4096, 5000, 6144, 8184, 8192, 12000,
        16376, 16384, 20000, 32760, 32768, 50256, 65528, 65536, 100000, 131072, 262136]
# Shares of one are fewer than the digits of f16 behind this.
F16_SOFTMAX_MOST = 60000


def line(random, k):
    """The k-th line, or None where its rows are whole units."""
    op, dtype = OPERATIONS[k % 5], ["bf16", "f32", "f16"][k // 5 % 3]
    n = min(random.choice(NEAR) + k % 8 + (0 if k % 3 else 8 * random.randrange(4)), 262144)
    m = random.choice([1, 2, 3, 7, 9, 17, 33]) if n < 40000 else random.choice([1, 2, 5, 9])
    gap = random.choice([0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 16 - n % 8, 8 - n % 8])
    residual = op in ("layernorm", "rmsnorm") and random.random() < 0.3
    if n % 8 == 0 and gap % 8 == 0 or (op, dtype) == ("softmax", "f16") and n > F16_SOFTMAX_MOST:
        return None
    apart = f" ldx={n + gap} ldy={n + gap}" if gap else ""
    return f"{op} {dtype} M={m} N={n}{apart}{' residual=1' if residual else ''}"


def main(seed, count):
    numbers, found, k = random.Random(seed), [], 0
    while len(found) < count:
        new, k = line(numbers, k), k + 1
        if new and new not in found:
            found.append(new)
    print("\n".join(found))


main(int(sys.argv[1]), int(sys.argv[2]))
