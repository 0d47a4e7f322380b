"""More small models for the wide check of coverage (`torch_coverage.py`): families beyond those of `torch_models.py`, and modules by hand.

Each entry of `ZOO` makes a model and its arguments. To add one: a line of `families`, `pictures` or a function with `@model`.
"""

from torch_models import SIZES, images, tokens, torch, torchvision, transformers
from torch_zoo_hand import HAND, Made, random

F, nn = torch.nn.functional, torch.nn
ZOO = dict(HAND)


def model(function):
    ZOO[function.__name__] = function
    return function


# ---- torchvision ------------------------------------------------------------------------------------


def pictures(name, **settings):
    ZOO[name] = lambda: (getattr(torchvision.models, name)(num_classes=10, **settings), dict(x=images()))


for name in ("vgg11_bn", "squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5", "regnet_y_400mf"):
    pictures(name)

# ---- transformers -----------------------------------------------------------------------------------


def masked():
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 9:] = 0
    return dict(input_ids=tokens(), attention_mask=mask)


def prompt():
    return dict(input_ids=tokens(), use_cache=False)


def pair():
    return dict(input_ids=tokens(), decoder_input_ids=tokens(length=8), use_cache=False)


def family(name, architecture, config, inputs, **settings):
    def made():
        told = getattr(transformers, config)(**{"pad_token_id": 0, **SIZES, **settings})
        # A form of the experts that float64 has, too.
        told._experts_implementation = "batched_mm"
        return getattr(transformers, architecture)(told), inputs()

    ZOO[name] = made


BASE = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
SHARED = dict(BASE, num_key_value_heads=2, max_position_embeddings=64)
WINDOWS = dict(SHARED, head_dim=16, sliding_window=8)
EXPERTS = dict(SHARED, num_experts=4, num_experts_per_tok=2)
BOTH = dict(
    d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128,
    decoder_ffn_dim=128, max_position_embeddings=64, decoder_start_token_id=2,
)  # fmt: skip
T5 = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0)
OLD = dict(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=64)

for row in (
    ("distilbert", "DistilBertModel", masked, dict(dim=64, n_layers=2, n_heads=4, hidden_dim=128)),
    ("roberta", "RobertaModel", masked, BASE),
    ("albert", "AlbertModel", masked, dict(BASE, embedding_size=32)),
    ("electra", "ElectraModel", masked, dict(BASE, embedding_size=32)),
    ("deberta", "DebertaV2Model", masked, dict(BASE, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, max_position_embeddings=64)),
    ("mpnet", "MPNetModel", masked, BASE),
    ("modernbert", "ModernBertModel", masked, dict(BASE, local_attention=8, cls_token_id=1, sep_token_id=2)),
    ("opt", "OPTForCausalLM", prompt, dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128, word_embed_proj_dim=64)),
    ("gpt_neox", "GPTNeoXForCausalLM", prompt, dict(BASE, max_position_embeddings=64)),
    ("gptj", "GPTJForCausalLM", prompt, OLD),
    ("bloom", "BloomForCausalLM", prompt, dict(hidden_size=64, n_layer=2, n_head=4)),
    ("falcon", "FalconForCausalLM", prompt, dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)),
    ("phi", "PhiForCausalLM", prompt, SHARED),
    ("phi3", "Phi3ForCausalLM", prompt, SHARED),
    ("gemma2", "Gemma2ForCausalLM", prompt, WINDOWS),
    ("olmo2", "Olmo2ForCausalLM", prompt, SHARED),
    ("cohere", "CohereForCausalLM", prompt, SHARED),
    ("stablelm", "StableLmForCausalLM", prompt, SHARED),
    ("starcoder2", "Starcoder2ForCausalLM", prompt, SHARED),
    ("mixtral", "MixtralForCausalLM", prompt, dict(SHARED, num_local_experts=4)),
    ("qwen3_moe", "Qwen3MoeForCausalLM", prompt, dict(EXPERTS, head_dim=16, moe_intermediate_size=32)),
    ("mamba", "MambaForCausalLM", prompt, dict(hidden_size=64, num_hidden_layers=2, state_size=8)),
    ("bart", "BartModel", pair, BOTH),
    ("pegasus", "PegasusModel", pair, BOTH),
    ("mt5", "MT5Model", pair, T5),
):
    name, architecture, inputs, settings = row
    stem = architecture.removesuffix("ForCausalLM").removesuffix("Model")
    family(name, architecture, f"{stem}Config", inputs, **settings)
family(
    "gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", prompt, **WINDOWS, layer_types=["sliding_attention", "full_attention"]
)  # fmt: skip


@model
def dinov2():
    config = transformers.Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
    return transformers.Dinov2Model(config), dict(pixel_values=images(size=32))


@model
def wav2vec2():
    config = transformers.Wav2Vec2Config(
        conv_dim=[16, 16, 16], conv_stride=[5, 2, 2], conv_kernel=[10, 3, 3], num_conv_pos_embeddings=16, num_feat_extract_layers=3,
        num_conv_pos_embedding_groups=4, mask_time_prob=0.0, layerdrop=0.0, **BASE,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config), dict(input_values=random(2, 1600))


# ---- by hand ----------------------------------------------------------------------------------------


@model
def lstm_cell():
    def run(m, x):
        h = c = x.new_zeros(x.shape[0], 32)
        for t in range(x.shape[1]):
            h, c = m.cell(x[:, t], (h, c))
        return m.head(h)

    return Made(run, cell=nn.LSTMCell(16, 32), head=nn.Linear(32, 5)), dict(x=random(2, 6, 16))


@model
def transformer():
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    both = nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(5)

    def run(m, a, b):
        return m.both(a, b, tgt_mask=m.mask, src_key_padding_mask=m.padding)

    return Made(run, both=both, mask=mask, padding=padding), dict(a=random(2, 6, 32), b=random(2, 5, 32))


@model
def encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), dict(src=random(2, 6, 32))


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.SiLU())


@model
def unet():
    def run(m, x):
        a = m.first(x)
        b = m.second(F.max_pool2d(a, 2))
        c = m.middle(F.avg_pool2d(b, 2))
        y = m.third(torch.cat([F.interpolate(c, scale_factor=2, mode="nearest"), b], 1))
        return m.out(m.fourth(torch.cat([m.turned(y), a], 1)))

    layers = dict(first=block(3, 8), second=block(8, 16), middle=block(16, 16), third=block(32, 16), fourth=block(16, 8))
    return Made(run, **layers, turned=nn.ConvTranspose2d(16, 8, 2, 2), out=nn.Conv2d(8, 2, 1)), dict(x=random(2, 3, 16, 16))


@model
def generator():
    layers = [nn.ConvTranspose2d(16, 16, 4), nn.BatchNorm2d(16), nn.ReLU(True), nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh()]
    return nn.Sequential(*layers), dict(input=random(2, 16, 1, 1))


@model
def discriminator():
    normed = nn.utils.parametrizations.spectral_norm
    layers = [normed(nn.Conv2d(3, 8, 4, 2, 1)), nn.LeakyReLU(0.2), nn.InstanceNorm2d(8, affine=True), nn.Flatten(), normed(nn.Linear(512, 1))]
    return nn.Sequential(*layers), dict(input=random(2, 3, 16, 16))


@model
def weight_norm():
    normed = nn.utils.parametrizations.weight_norm
    layers = [normed(nn.Conv1d(4, 8, 3, padding=1)), nn.ELU(), normed(nn.ConvTranspose1d(8, 4, 4, 2, 1)), nn.PReLU(), normed(nn.Linear(16, 4))]
    return nn.Sequential(*layers), dict(input=random(2, 4, 8))


@model
def ranking():
    def run(m, x, rows):
        bags = torch.stack([m.bottom(x), *(bag(rows[:, i]) for i, bag in enumerate(m.bags))], 1)
        pairs = torch.bmm(bags, bags.transpose(1, 2))
        i, j = torch.tril_indices(4, 4, -1, device=x.device)
        return m.top(torch.cat([bags[:, 0], pairs[:, i, j]], 1))

    bags = nn.ModuleList([nn.EmbeddingBag(20, 8, mode=mode) for mode in ("sum", "mean", "sum")])
    rows = torch.randint(0, 20, (4, 3, 5), generator=torch.Generator().manual_seed(1))
    return Made(run, bags=bags, bottom=nn.Linear(5, 8), top=nn.Linear(14, 1)), dict(x=random(4, 5), rows=rows)


@model
def experts():
    def run(m, x):
        weights = m.gate(x).softmax(-1)
        most, which = weights.topk(2, -1)
        gate = torch.zeros_like(weights).scatter(-1, which, most / most.sum(-1, keepdim=True))
        y = torch.einsum("teh,ehd->ted", F.gelu(torch.einsum("td,edh->teh", x, m.up)), m.down)
        return (y * gate[..., None]).sum(1)

    up, down = nn.Parameter(random(4, 16, 32) * 0.2), nn.Parameter(random(4, 32, 16) * 0.2)
    return Made(run, gate=nn.Linear(16, 4), up=up, down=down), dict(x=random(10, 16))


@model
def segmentation():
    def run(m, x, target):
        return F.cross_entropy(m.head(x), target, m.weight, ignore_index=255)[None]

    target = torch.randint(0, 4, (2, 8, 8), generator=torch.Generator().manual_seed(1))
    return Made(run, head=nn.Conv2d(3, 4, 3, padding=1), weight=torch.tensor([1.0, 2, 3, 0.5])), dict(x=random(2, 3, 8, 8), target=target)


@model
def resized():
    kinds = (("bicubic", {}), ("bilinear", dict(align_corners=True)), ("bilinear", dict(antialias=True)), ("area", {}), ("nearest", {}))

    def run(m, x):
        return m.mix(torch.cat([F.interpolate(x, (13, 13), mode=mode, **more) for mode, more in kinds], 1))

    return Made(run, mix=nn.Conv2d(15, 4, 1)), dict(x=random(2, 3, 8, 8))


@model
def per_sample():
    def run(m, x):
        def loss(v):
            return (m.layer(v).tanh() ** 2).sum()

        return torch.func.vmap(torch.func.grad(loss))(x) + torch.func.jvp(lambda v: m.layer(v).sin(), (x,), (torch.ones_like(x),))[1]

    return Made(run, layer=nn.Linear(6, 6)), dict(x=random(3, 6))
