"""Training on two processes, whose parts meet over gloo: DDP, optimizers that are shared out, and FSDP, beside one process."""

import copy
import os
import sys
import tempfile

from torch_package import install

install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch_models import run_all  # noqa: E402

from tilewright import ops, optim  # noqa: E402


class Net(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.ones(8, dtype=dtype))
        self.first, self.last = torch.nn.Linear(8, 17, dtype=dtype), torch.nn.Linear(17, 3, dtype=dtype)

    def forward(self, x):
        return ops.linear(ops.gelu(self.first(ops.rms_norm(x, self.weight))), self.last.weight, self.last.bias)


def replicated(model):
    return torch.nn.parallel.DistributedDataParallel(model)


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    return fully_shard(model, mesh=mesh)


def shared_out(params, **options):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(params, optimizer_class=optim.AdamW, **options)


CASES = {
    "DDP": (replicated, lambda p: optim.AdamW(p, lr=0.1, max_norm=0.5), torch.float32),
    "DDP, states shared out": (replicated, lambda p: shared_out(p, lr=0.1), torch.float32),
    "FSDP": (sharded, lambda p: optim.AdamW(p, lr=0.1), torch.float32),
    "FSDP, clipped": (sharded, lambda p: optim.AdamW(p, lr=0.1, max_norm=0.5), torch.float32),
    "FSDP, masters": (sharded, lambda p: optim.Lion(p, lr=0.01, max_norm=0.5), torch.bfloat16),
}


def one_of_two(rank: int, folder: str):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, (spread, made, dtype) in CASES.items():
        single = Net(dtype)
        model = spread(copy.deepcopy(single))
        optimizer, wanted = made(model.parameters()), (optim.Lion if "masters" in name else optim.AdamW)(
            single.parameters(), lr=0.01 if "masters" in name else 0.1, max_norm=0.5 if "clipped" in name or name == "DDP" or "masters" in name else None
        )
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            x = torch.randn(4, 8, generator=generator).to(dtype)
            for net, by, part in ((model, optimizer, x[2 * rank : 2 * rank + 2]), (single, wanted, x)):
                by.zero_grad()
                net(part).float().square().mean().backward()
                by.step()
        for (at, p), q in zip(model.named_parameters(), single.parameters(), strict=True):
            p = p.full_tensor() if hasattr(p, "full_tensor") else p
            tolerance = 1e-3 if dtype is torch.float32 else 0.03
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}, {at}: {m}")
        if name == "FSDP":
            theirs = torch.optim.AdamW(model.parameters(), lr=0.1)
            theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
            optimizer.step()
    dist.destroy_process_group()


def two_processes_train_as_one():
    import subprocess

    with tempfile.TemporaryDirectory() as folder:
        # The package is the one that is here, and not made again.
        package = os.path.dirname(os.path.dirname(os.path.abspath(sys.modules["tilewright"].__file__)))
        environment = {**os.environ, "TILEWRIGHT_TORCH_PACKAGE": package}
        running = [
            subprocess.Popen([sys.executable, __file__, str(rank), folder], env=environment, stderr=subprocess.PIPE, text=True) for rank in range(2)
        ]
        for process in running:
            _, said = process.communicate(timeout=300)
            assert process.returncode == 0, said[-3000:]


if __name__ == "__main__":
    if len(sys.argv) == 3:
        one_of_two(int(sys.argv[1]), sys.argv[2])
    else:
        run_all([two_processes_train_as_one])
