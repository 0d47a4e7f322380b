# %% [markdown]
# # A training run with the operator pack
#
# A small decoder learns to continue words, twice from the same weights: once written with PyTorch's own functions, once with the
# fused ones of `tilewright.ops` (RMS norm with residual, SwiGLU, cross-entropy). The losses must agree to rounding; the times stand beside each other.
# It runs on the CPU; on a machine with an NVIDIA GPU set `device = "cuda"`.

# %%
import time

import torch
from torch import nn

from tilewright import ops

device = "cpu"
torch.manual_seed(0)
torch.set_num_threads(2)

# %% [markdown]
# ## Data
# A few hundred made-up words from syllables: enough structure for a loss that falls.

# %%
generator = torch.Generator().manual_seed(1)
syllables = ["ka", "to", "mi", "re", "su", "no", "li", "va"]


def word():
    count = int(torch.randint(2, 5, (1,), generator=generator))
    first = int(torch.randint(0, len(syllables), (1,), generator=generator))
    # Each syllable is followed by one of two.
    chosen = [first]
    for _ in range(count - 1):
        chosen.append((chosen[-1] * 3 + 1 + int(torch.randint(0, 2, (1,), generator=generator))) % len(syllables))
    return "".join(syllables[i] for i in chosen)


text = " ".join(word() for _ in range(2000))
letters = sorted(set(text))
codes = torch.tensor([letters.index(c) for c in text])
print(text[:60], "...", len(letters), "letters,", len(codes), "positions")


def batch(length=64, rows=32):
    starts = torch.randint(0, len(codes) - length - 1, (rows,), generator=generator)
    picked = torch.stack([codes[s : s + length + 1] for s in starts]).to(device)
    return picked[:, :-1], picked[:, 1:]


# %% [markdown]
# ## The model, in both forms
# The only difference is which functions it calls.

# %%
class Plain:
    @staticmethod
    def norm_after_adding(x, residual, weight):
        h = x + residual
        return nn.functional.rms_norm(h, h.shape[-1:], weight, 1e-6), h

    @staticmethod
    def gated(gate, up):
        return nn.functional.silu(gate) * up

    @staticmethod
    def loss(logits, targets):
        return nn.functional.cross_entropy(logits, targets)


class Fused:
    @staticmethod
    def norm_after_adding(x, residual, weight):
        return ops.rms_norm(x, weight, 1e-6, residual=residual)

    gated = staticmethod(ops.swiglu)
    loss = staticmethod(ops.cross_entropy)


class Block(nn.Module):
    def __init__(self, width, heads, form):
        super().__init__()
        self.heads, self.form = heads, form
        self.norms = nn.ParameterList(nn.Parameter(torch.ones(width)) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x, residual):
        y, residual = self.form.norm_after_adding(x, residual, self.norms[0])
        b, s, w = y.shape
        q, k, v = self.qkv(y).view(b, s, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = self.out(y.transpose(1, 2).reshape(b, s, w))
        y, residual = self.form.norm_after_adding(y, residual, self.norms[1])
        return self.down(self.form.gated(self.gate(y), self.up(y))), residual


class Model(nn.Module):
    def __init__(self, form, width=128, heads=4, layers=2):
        super().__init__()
        self.form = form
        self.embedding = nn.Embedding(len(letters), width)
        self.positions = nn.Parameter(torch.randn(64, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, form) for _ in range(layers))
        self.norm, self.head = nn.Parameter(torch.ones(width)), nn.Linear(width, len(letters), bias=False)

    def forward(self, tokens, targets):
        residual = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        x = torch.zeros_like(residual)
        for block in self.blocks:
            x, residual = block(x, residual)
        y, _ = self.form.norm_after_adding(x, residual, self.norm)
        return self.form.loss(self.head(y).flatten(0, 1), targets.flatten())


# %%
plain = Model(Plain).to(device)
fused = Model(Fused).to(device)
fused.load_state_dict(plain.state_dict())
print(sum(p.numel() for p in plain.parameters()), "parameters")

# %% [markdown]
# ## Training, step by step beside each other

# %%
optimisers = [torch.optim.AdamW(m.parameters(), lr=3e-3) for m in (plain, fused)]
seconds, history = [0.0, 0.0], []
for step in range(60):
    tokens, targets = batch()
    losses = []
    for i, model in enumerate((plain, fused)):
        start = time.perf_counter()
        optimisers[i].zero_grad()
        loss = model(tokens, targets)
        loss.backward()
        optimisers[i].step()
        losses.append(loss.item())
        if step >= 5:
            seconds[i] += time.perf_counter() - start
    history.append(losses)
    if step % 10 == 0 or step == 59:
        print(f"step {step:>2}: loss {losses[0]:.5f} plain, {losses[1]:.5f} fused")
print(f"{1e3 * seconds[0] / 55:.1f} ms a step plain, {1e3 * seconds[1] / 55:.1f} ms fused")

# %% [markdown]
# Both runs see the same batches. The losses differ by rounding, which training magnifies slowly.

# %%
first = max(abs(a - b) for a, b in history[:10])
print(f"largest difference of the losses in the first ten steps: {first:.1e}")
assert first < 1e-3 and history[-1][1] < 0.75 * history[0][1]
