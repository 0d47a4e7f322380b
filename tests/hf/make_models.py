"""Makes the tiny models of this folder and what transformers computes with them.

    python tests/hf/make_models.py                (torch, transformers, safetensors)
    python tests/hf/make_models.py MINILM_DIR     (minilm/expected.safetensors alone)
    python tests/hf/make_models.py generate       (generated.json of the decoders alone)

Each folder gets config.json and model.safetensors (as `save_pretrained` writes them) and
expected.safetensors with inputs (`in.<name>`) and float32 outputs (`out.<name>`). Weights are random
with a fixed seed and far from the usual initialisation: a forgotten bias or scale shows in the result.
"""

import json
import pathlib
import shutil
import sys

import torch
import transformers as tf
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent


def randomise(model):
    gen = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=gen)
            if "norm" in name.lower() and name.endswith("weight") or ".ln_" in name and name.endswith("weight"):
                p.copy_(1 + 0.3 * noise)
            elif p.ndim >= 2:
                p.copy_(noise * 1.2 / max(p.shape[-1], 1) ** 0.5)
            else:
                p.copy_(0.3 * noise)


def text_inputs(vocab, causal, types):
    gen = torch.Generator().manual_seed(11)
    ids = torch.randint(0, vocab, (3, 7), generator=gen)
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    mask[2, 2:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if types:
        inputs["token_type_ids"] = torch.randint(0, 2, (3, 7), generator=gen)
    return inputs


def make(folder, cls, config, inputs, outputs, dtype=torch.float32, shard=None):
    out = HERE / folder
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = cls(config).eval()
    randomise(model)
    model = model.to(dtype)
    extra = {} if shard is None else {"max_shard_size": shard}
    model.save_pretrained(out, **extra)
    (out / "generation_config.json").unlink(missing_ok=True)
    # The reference computes in float32 with the weights as stored.
    model = cls.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        result = model(**inputs)
    tensors = {f"in.{k}": v.contiguous() for k, v in inputs.items()}
    for name in outputs:
        tensors[f"out.{name}"] = result[name].float().contiguous()
    save_file(tensors, out / "expected.safetensors")
    names = sorted(f.name for f in out.iterdir())
    print(folder, sum(f.stat().st_size for f in out.iterdir()), names, json.loads((out / "config.json").read_text()).get("architectures"))


BERT = dict(vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=16)
LLAMA = dict(vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=24, max_position_embeddings=32, bos_token_id=1, eos_token_id=2)


def main():
    bert = text_inputs(24, False, True)
    plain = text_inputs(24, False, False)
    make("bert", tf.BertModel, tf.BertConfig(**BERT), bert, ["last_hidden_state", "pooler_output"])
    make("bert_float16", tf.BertModel, tf.BertConfig(**BERT), bert, ["last_hidden_state", "pooler_output"],
         dtype=torch.float16)
    make("bert_masked_lm", tf.BertForMaskedLM, tf.BertConfig(**BERT, hidden_act="gelu_new"), bert, ["logits"])
    make("bert_classifier", tf.BertForSequenceClassification, tf.BertConfig(**BERT, num_labels=5), bert, ["logits"])
    make("bert_tokens", tf.BertForTokenClassification, tf.BertConfig(**BERT, num_labels=5), bert, ["logits"])
    distil = tf.DistilBertConfig(vocab_size=24, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=16)
    make("distilbert", tf.DistilBertModel, distil, plain, ["last_hidden_state"])
    make("distilbert_masked_lm", tf.DistilBertForMaskedLM, distil, plain, ["logits"])
    distil = tf.DistilBertConfig(vocab_size=24, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=16, num_labels=4)
    make("distilbert_classifier", tf.DistilBertForSequenceClassification, distil, plain, ["logits"])
    gpt2 = tf.GPT2Config(vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2)
    make("gpt2", tf.GPT2LMHeadModel, gpt2, plain, ["logits"])
    make("gpt2_model", tf.GPT2Model, gpt2, plain, ["last_hidden_state"], dtype=torch.float16)
    llama3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                  original_max_position_embeddings=16)
    make("llama", tf.LlamaForCausalLM,
         tf.LlamaConfig(**LLAMA, rope_parameters=llama3, attention_bias=True, mlp_bias=True), plain, ["logits"],
         dtype=torch.bfloat16, shard="4KB")
    make("mistral", tf.MistralForCausalLM,
         tf.MistralConfig(**LLAMA, head_dim=6, sliding_window=None, tie_word_embeddings=False), plain, ["logits"])
    make("qwen2", tf.Qwen2ForCausalLM, tf.Qwen2Config(**LLAMA, tie_word_embeddings=True), plain, ["logits"])
    make("qwen3", tf.Qwen3ForCausalLM, tf.Qwen3Config(**LLAMA, head_dim=8, tie_word_embeddings=True), plain, ["logits"])
    # Behind the end of a text nothing is asked for, and there transformers and we differ once a window has padding alone.
    longer = dict(plain, attention_mask=plain["attention_mask"].clone())
    longer["attention_mask"][2] = 1
    make("mistral_window", tf.MistralForCausalLM,
         tf.MistralConfig(**LLAMA, head_dim=6, sliding_window=3, tie_word_embeddings=False), longer, ["logits"])
    # The first layer sees everything, the second one five positions.
    make("qwen2_window", tf.Qwen2ForCausalLM,
         tf.Qwen2Config(**LLAMA, tie_word_embeddings=True, use_sliding_window=True, sliding_window=5, max_window_layers=1), longer,
         ["logits"])
    # Padding is token 1 in input_ids, too: positions are counted from it. Its own place is inside the text.
    roberta = dict(BERT, max_position_embeddings=18, type_vocab_size=1, pad_token_id=1)
    padded = dict(plain, input_ids=plain["input_ids"].where(plain["attention_mask"] == 1, 1))
    padded["input_ids"][0, 2:4] = torch.tensor([1, 5])
    make("roberta", tf.RobertaModel, tf.RobertaConfig(**roberta), padded, ["last_hidden_state", "pooler_output"])
    make("roberta_masked_lm", tf.RobertaForMaskedLM, tf.RobertaConfig(**roberta), padded, ["logits"])
    make("roberta_classifier", tf.RobertaForSequenceClassification, tf.RobertaConfig(**roberta, num_labels=5), padded,
         ["logits"], dtype=torch.float16)
    make("xlm_roberta_tokens", tf.XLMRobertaForTokenClassification, tf.XLMRobertaConfig(**roberta, num_labels=5), padded,
         ["logits"], dtype=torch.bfloat16)
    vit = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=12,
               patch_size=4, num_channels=3)
    pixels = {"pixel_values": torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))}
    make("vit", tf.ViTModel, tf.ViTConfig(**vit), pixels, ["last_hidden_state", "pooler_output"])
    make("vit_bfloat16", tf.ViTModel, tf.ViTConfig(**vit), pixels, ["last_hidden_state", "pooler_output"],
         dtype=torch.bfloat16)
    make("vit_classifier", tf.ViTForImageClassification, tf.ViTConfig(**vit, num_labels=5), pixels, ["logits"])


def minilm(directory):
    """Embeddings of three sentences by the real sentence encoder, whose weights are not stored here."""
    sentences = [
        "A cat sits on the mat.",
        "Der schnelle braune Fuchs springt über den faulen Hund, naïvely!",
        "Compilers turn tensor programs into fused kernels; 東京 42 tests.",
    ]
    inputs = tf.AutoTokenizer.from_pretrained(directory)(sentences, padding=True, return_tensors="pt")
    model = tf.AutoModel.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    kept = inputs["attention_mask"].unsqueeze(-1).float()
    pooled = torch.nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1).clamp(min=1e-9), dim=1)
    tensors = {f"in.{k}": v.contiguous() for k, v in inputs.items()}
    (HERE / "minilm").mkdir(exist_ok=True)
    save_file({**tensors, "out.sentence_embedding": pooled.contiguous()}, HERE / "minilm" / "expected.safetensors")


def generate():
    """generated.json: how transformers continues two prompts greedily, with its cache, in float32."""
    for folder in ["gpt2", "llama", "mistral", "mistral_window", "qwen2", "qwen2_window", "qwen3"]:
        model = tf.AutoModelForCausalLM.from_pretrained(HERE / folder, dtype=torch.float32, attn_implementation="eager")
        prompts = torch.tensor([[5, 9, 1, 17], [3, 3, 20, 8]])
        with torch.no_grad():
            out = model.eval().generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
                                        max_new_tokens=10, min_new_tokens=10, eos_token_id=None, pad_token_id=0)
        found = {"prompts": prompts.tolist(), "tokens": out[:, prompts.shape[1]:].tolist()}
        (HERE / folder / "generated.json").write_text(json.dumps(found) + "\n")


if sys.argv[1:] == ["generate"]:
    generate()
elif len(sys.argv) > 1:
    minilm(sys.argv[1])
else:
    main()
