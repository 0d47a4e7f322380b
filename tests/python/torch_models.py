"""Small models that the tests of the PyTorch backend share, and what they count."""

import contextlib
import logging
import os
import pathlib
import shutil
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIBRARY = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "libtilewright_python.so"


def install() -> None:
    """Puts the package with the library of this build first on the path, with a cache of its own."""
    folder = tempfile.mkdtemp(prefix="tilewright-torch-")
    package = pathlib.Path(folder, "tilewright")
    shutil.copytree(ROOT / "python" / "tilewright", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(LIBRARY, package / "_native.abi3.so")
    os.environ["TILEWRIGHT_CACHE"] = str(pathlib.Path(folder, "cache"))
    sys.path.insert(0, folder)
    logging.getLogger("transformers").setLevel(logging.ERROR)


install()

import torch  # noqa: E402
import torchvision  # noqa: E402
import transformers  # noqa: E402

import tilewright  # noqa: E402, F401
from tilewright.pytorch import backend  # noqa: E402


def tokens(batch=2, length=16):
    return torch.randint(0, 500, (batch, length), generator=torch.Generator().manual_seed(1))


def images(batch=2, size=64):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))


SIZES = dict(vocab_size=500, bos_token_id=1, eos_token_id=2)


def bert():
    config = transformers.BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, vocab_size=500
    )
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 9:] = 0
    return transformers.BertModel(config), dict(input_ids=tokens(), attention_mask=mask)


def gpt2():
    config = transformers.GPT2Config(n_embd=128, n_layer=2, n_head=4, n_positions=64, **SIZES)
    return transformers.GPT2LMHeadModel(config), dict(input_ids=tokens(), use_cache=False)


def llama():
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, **SIZES,
    )
    return transformers.LlamaForCausalLM(config), dict(input_ids=tokens(), use_cache=False)


def resnet():
    return torchvision.models.resnet18(num_classes=10), dict(x=images())


def mobilenet():
    return torchvision.models.mobilenet_v3_small(num_classes=10), dict(x=images())


def vit():
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    )
    torch.nn.init.normal_(model.heads[0].weight)
    return model, dict(x=images(size=32))


MODELS = {f.__name__: f for f in (resnet, mobilenet, vit, bert, gpt2, llama)}


def made(name):
    """A model with seeded weights, in inference, and its arguments."""
    torch.manual_seed(0)
    model, arguments = MODELS[name]()
    return model.eval(), arguments


def first(result):
    """The main tensor of what a model returns."""
    if isinstance(result, torch.Tensor):
        return result
    return result.logits if hasattr(result, "logits") else result[0]


@contextlib.contextmanager
def graphs():
    """The graphs that are compiled meanwhile, in order."""
    torch._dynamo.reset()
    seen = []
    backend.OBSERVERS.append(seen.append)
    try:
        yield seen
    finally:
        backend.OBSERVERS.remove(seen.append)
        torch._dynamo.reset()


def compiled(function, **options):
    return torch.compile(function, backend=backend.tilewright_backend, **options)


def run_all(tests) -> None:
    for test in tests:
        test()
        print(f"ok: {test.__name__}", flush=True)
