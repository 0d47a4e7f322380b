"""Small models that the tests of the PyTorch backend share, and what they count."""

import contextlib

from torch_package import ROOT, install  # noqa: F401

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


def resnet50():
    return torchvision.models.resnet50(num_classes=10), dict(x=images())


def mobilenet_large():
    return torchvision.models.mobilenet_v3_large(num_classes=10), dict(x=images())


def efficientnet():
    return torchvision.models.efficientnet_b0(num_classes=10), dict(x=images())


def convnext():
    return torchvision.models.convnext_tiny(num_classes=10), dict(x=images())


def swin():
    return torchvision.models.swin_t(num_classes=10), dict(x=images())


def mistral():
    config = transformers.MistralConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, sliding_window=8, **SIZES,
    )
    return transformers.MistralForCausalLM(config), dict(input_ids=tokens(), use_cache=False)


def qwen2():
    config = transformers.Qwen2Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, **SIZES,
    )
    return transformers.Qwen2ForCausalLM(config), dict(input_ids=tokens(), use_cache=False)


def t5():
    config = transformers.T5Config(
        d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, vocab_size=500, decoder_start_token_id=0
    )
    return transformers.T5Model(config), dict(input_ids=tokens(), decoder_input_ids=tokens(length=8), use_cache=False)


def whisper():
    config = transformers.WhisperConfig(
        d_model=128, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=256, decoder_ffn_dim=256, vocab_size=500, max_source_positions=50, max_target_positions=32,
        num_mel_bins=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )
    features = torch.randn(2, 16, 100, generator=torch.Generator().manual_seed(3))
    return transformers.WhisperModel(config), dict(
        input_features=features, decoder_input_ids=tokens(length=8), use_cache=False
    )


def gemma():
    config = transformers.GemmaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, head_dim=32,
        max_position_embeddings=64, pad_token_id=0, **SIZES,
    )
    return transformers.GemmaForCausalLM(config), dict(input_ids=tokens(), use_cache=False)


def qwen3():
    config = transformers.Qwen3Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=64, **SIZES,
    )
    return transformers.Qwen3ForCausalLM(config), dict(input_ids=tokens(), use_cache=False)


def deit():
    config = transformers.DeiTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8
    )
    return transformers.DeiTModel(config, add_pooling_layer=False), dict(pixel_values=images(size=32))


class Step(torch.nn.Module):
    """A step of Whisper's generation: one token for each sequence, over the keys and values of those before it."""

    def __init__(self):
        super().__init__()
        self.model = whisper()[0]

    def forward(self, hidden, token, keys, values, cross_keys, cross_values):
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        past = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for layer in range(2):
            past.self_attention_cache.update(keys[layer], values[layer], layer)
            past.cross_attention_cache.update(cross_keys[layer], cross_values[layer], layer)
            past.is_updated[layer] = True
        found = self.model.decoder(
            input_ids=token, encoder_hidden_states=hidden, past_key_values=past, use_cache=True,
            position_ids=torch.full_like(token, 5),
        )
        return found[0]


def whisper_step():
    def made(length):
        return torch.randn(2, 2, 4, length, 32, generator=torch.Generator().manual_seed(length))

    hidden = torch.randn(2, 50, 128, generator=torch.Generator().manual_seed(4))
    return Step(), dict(
        hidden=hidden, token=tokens(length=1), keys=made(5), values=made(5) + 1, cross_keys=made(50), cross_values=made(50) + 1
    )


MODELS = {f.__name__: f for f in (resnet, mobilenet, vit, bert, gpt2, llama)}

# More, for the wide check of coverage: these take minutes on a processor.
MORE = {
    f.__name__: f
    for f in (
        resnet50, mobilenet_large, efficientnet, convnext, swin, mistral, qwen2, t5, whisper, gemma, qwen3, deit, whisper_step
    )  # fmt: skip
}


def made(name):
    """A model with seeded weights, in inference, and its arguments."""
    torch.manual_seed(0)
    model, arguments = (MODELS | MORE)[name]()
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
