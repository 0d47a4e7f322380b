# %% [markdown]
# # Compiling a transformer, and asking what happened to it
#
# `torch.compile(model, backend="tilewright")` on a small BERT: what is fused, how right the result is, where the time goes, what happens
# with other sizes, and what with an operator that Tilewright does not have.

# %%
import time

import torch
import transformers

import tilewright

torch.manual_seed(0)
torch.set_num_threads(2)
config = transformers.BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024, vocab_size=5000)
model = transformers.BertModel(config).eval()
ids = torch.randint(0, 5000, (1, 128))

# %% [markdown]
# ## Compile and run
# The first call compiles; kernels are kept on disk, so that a second process starts at once.

# %%
fast = torch.compile(model, backend="tilewright")
with torch.no_grad():
    start = time.perf_counter()
    ours = fast(ids).last_hidden_state
    print(f"first call: {time.perf_counter() - start:.1f} s")
    eager = model(ids).last_hidden_state
print("largest difference from eager:", float((ours - eager).abs().max()))

# %% [markdown]
# ## Is it right?
# `verify` runs eager, ours and float64. The budget of an error is three times eager's own, or 16 units in the last place.

# %%
checked = tilewright.verify(model, ids)
print(checked)
assert checked

# %% [markdown]
# ## What happened to it?
# Every operator that PyTorch kept, every fused kernel with its share of the time.

# %%
with torch.no_grad():
    report = tilewright.explain(model, ids)
print("\n".join(str(report).splitlines()[:20]))
assert report.fallback_share < 0.02

# %% [markdown]
# ## How fast?
# In turns, medians.

# %%
def milliseconds(function, runs=30):
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function(ids)
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[len(times) // 2]


with torch.no_grad():
    for _ in range(5):
        fast(ids), model(ids)
    rounds = [(milliseconds(fast), milliseconds(model)) for _ in range(3)]
for ours_ms, eager_ms in rounds:
    print(f"{ours_ms:.2f} ms compiled, {eager_ms:.2f} ms eager")

# %% [markdown]
# ## One plan for many sizes
# With `dynamic=True` sizes are symbols, and nothing is compiled again inside their range.

# %%
flexible = torch.compile(model, backend="tilewright", dynamic=True)
with torch.no_grad():
    for batch, length in ((2, 40), (3, 77), (5, 128)):
        tokens = torch.randint(0, 5000, (batch, length))
        start = time.perf_counter()
        result = flexible(tokens).last_hidden_state
        taken = time.perf_counter() - start
        error = float((result - model(tokens).last_hidden_state).abs().max())
        print(f"{batch} x {length}: {taken:.2f} s, difference from eager {error:.1e}")

# %% [markdown]
# ## An operator that is not ours
# It stays PyTorch's, between two groups, and the report says so.

# %%
class WithFourier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(64, 128), torch.nn.Linear(128, 16)

    def forward(self, x):
        mixed = torch.fft.fft(self.first(x).relu()).real
        return self.second(mixed)


print(tilewright.explain(WithFourier(), torch.randn(32, 64)))
