"""Models by hand for the wide check of coverage (`torch_coverage.py`), of families that no package has whole: what each is, in a few lines.

`torch_zoo.py` takes them into its list. To add one: a function with `@model` that gives a module and its arguments by name.
"""

from torch_models import tokens, torch

F, nn = torch.nn.functional, torch.nn
HAND = {}


def model(function):
    HAND[function.__name__] = function
    return function


def random(*shape, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Made(nn.Module):
    """Layers, and a function of them and the arguments."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for key, value in layers.items():
            plain = isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)
            self.register_buffer(key, value) if plain else setattr(self, key, value)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def edges():
    """Of a graph of 20 nodes."""
    return torch.randint(0, 20, (2, 60), generator=torch.Generator().manual_seed(1))


@model
def radiance_field():
    def lifted(x):
        angles = (x[..., None] * 2.0 ** torch.arange(6, dtype=x.dtype, device=x.device)).flatten(-2)
        return torch.cat([x, angles.sin(), angles.cos()], -1)

    def run(m, points, directions):
        x = lifted(points)
        h = m.second(torch.cat([m.first(x), x], -1))
        seen = lifted(directions)[:, None].expand(-1, points.shape[1], -1)
        alpha = 1 - torch.exp(-F.softplus(m.density(h))[..., 0] * 0.1)
        passed = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha], 1), 1)[:, :-1]
        return ((alpha * passed)[..., None] * m.colour(torch.cat([h, seen], -1)).sigmoid()).sum(1)

    layers = dict(first=nn.Sequential(nn.Linear(39, 64), nn.ReLU()), second=nn.Sequential(nn.Linear(103, 64), nn.ReLU()))
    return Made(run, **layers, density=nn.Linear(64, 1), colour=nn.Linear(103, 3)), dict(points=random(8, 16, 3), directions=random(8, 3))


@model
def coupling_flow():
    def run(m, x):
        total = x.new_zeros(x.shape[0])
        for i, (scale, shift) in enumerate(zip(m.scales, m.shifts)):
            kept, changed = x.chunk(2, 1) if i % 2 == 0 else x.chunk(2, 1)[::-1]
            log = scale(kept).tanh()
            total = total + log.sum(1)
            x = torch.cat([changed * log.exp() + shift(kept), kept], 1)
        return total - 0.5 * x.square().sum(1)

    def net():
        return nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(), nn.Linear(16, 4))

    return Made(run, scales=nn.ModuleList(net() for _ in range(4)), shifts=nn.ModuleList(net() for _ in range(4))), dict(x=random(6, 8))


@model
def quantised_autoencoder():
    def run(m, x):
        z = m.encoder(x).permute(0, 2, 3, 1)
        codes = F.embedding(torch.cdist(z.reshape(-1, 8), m.book).argmin(1), m.book).view_as(z)
        straight = z + (codes - z).detach()
        return m.decoder(straight.permute(0, 3, 1, 2)), (codes - z.detach()).square().mean(), (codes.detach() - z).square().mean()

    layers = dict(encoder=nn.Conv2d(3, 8, 4, 2, 1), book=nn.Parameter(random(16, 8)), decoder=nn.ConvTranspose2d(8, 3, 4, 2, 1))
    return Made(run, **layers), dict(x=random(2, 3, 16, 16))


@model
def style_generator():
    def run(m, z):
        w = m.mapping(F.normalize(z, dim=1))
        x = m.start.expand(z.shape[0], -1, -1, -1)
        for kernel, style, size in zip(m.kernels, m.styles, (8, 16)):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            k = kernel[None] * (style(w) + 1)[:, None, :, None, None]
            k = k * torch.rsqrt(k.square().sum((2, 3, 4), keepdim=True) + 1e-8)
            # A convolution of its own for each sample.
            x = F.conv2d(x.reshape(1, -1, size, size), k.flatten(0, 1), padding=1, groups=z.shape[0]).view(-1, 8, size, size)
            x = F.leaky_relu(x, 0.2)
        return m.colours(x).tanh()

    layers = dict(mapping=nn.Sequential(nn.Linear(16, 16), nn.LeakyReLU(0.2)), start=nn.Parameter(random(1, 8, 4, 4)), colours=nn.Conv2d(8, 3, 1))
    kernels, styles = nn.ParameterList(random(8, 8, 3, 3, seed=i) for i in range(2)), nn.ModuleList(nn.Linear(16, 8) for _ in range(2))
    return Made(run, **layers, kernels=kernels, styles=styles), dict(z=random(2, 16))


@model
def messages():
    """Attention along the edges of a graph."""

    def run(m, x, edges):
        source, target = edges
        h = m.values(x).view(-1, 2, 4)
        score = F.leaky_relu((h[source] * m.mine).sum(-1) + (h[target] * m.theirs).sum(-1), 0.2)
        most = torch.full((20, 2), -1e9, dtype=x.dtype, device=x.device).scatter_reduce(0, target[:, None].expand(-1, 2), score, "amax")
        weight = (score - most[target]).exp()
        total = weight.new_zeros(20, 2).index_add(0, target, weight)
        return h.new_zeros(20, 2, 4).index_add(0, target, (weight / (total[target] + 1e-9))[..., None] * h[source]).flatten(1)

    return Made(run, values=nn.Linear(8, 8), mine=nn.Parameter(random(2, 4)), theirs=nn.Parameter(random(2, 4, seed=8))), dict(x=random(20, 8), edges=edges())


@model
def point_sets():
    def run(m, x):
        centres = x[:, ::5]
        near = torch.cdist(centres, x).topk(8, -1, largest=False)[1]
        every = x[:, None].expand(-1, centres.shape[1], -1, -1)
        return m.net(torch.gather(every, 2, near[..., None].expand(-1, -1, -1, 3)) - centres[:, :, None]).amax(2)

    return Made(run, net=nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 8))), dict(x=random(2, 50, 3))


@model
def splines():
    """A layer of Kolmogorov and Arnold."""

    def run(m, x):
        e, g = x[..., None], m.knots
        basis = ((e >= g[:-1]) & (e < g[1:])).to(x.dtype)
        for k in range(1, 4):
            left = (e - g[: -k - 1]) / (g[k:-1] - g[: -k - 1]) * basis[..., :-1]
            basis = left + (g[k + 1 :] - e) / (g[k + 1 :] - g[1:-k]) * basis[..., 1:]
        return F.linear(F.silu(x), m.base) + torch.einsum("bik,oik->bo", basis, m.weights)

    return Made(run, knots=torch.arange(12) * 0.4 - 2.2, base=nn.Parameter(random(8, 4)), weights=nn.Parameter(random(8, 4, 8))), dict(x=random(6, 4).tanh())


@model
def label_paths():
    """A chain of labels: the sum over all paths."""

    def run(m, x):
        scores = m.head(x)
        path = scores[:, 0]
        for t in range(1, x.shape[1]):
            path = torch.logsumexp(path[:, :, None] + m.moves, 1) + scores[:, t]
        return torch.logsumexp(path, 1)

    return Made(run, head=nn.Linear(8, 6), moves=nn.Parameter(random(6, 6))), dict(x=random(2, 12, 8))


@model
def frames():
    """A recurrent cell of convolutions."""

    def run(m, x):
        h = c = x.new_zeros(2, 8, 8, 8)
        for t in range(x.shape[1]):
            i, f, o, g = m.gates(torch.cat([x[:, t], h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h

    return Made(run, gates=nn.Conv2d(11, 32, 3, padding=1)), dict(x=random(2, 3, 3, 8, 8))


@model
def turned_pictures():
    """A transformer of space: the sampling grid comes out of the picture."""

    def run(m, x):
        theta = (m.look(x).flatten(1) @ m.weight + m.bias).view(-1, 2, 3)
        return m.head(F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False))

    look = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
    bias = nn.Parameter(torch.tensor([1.0, 0, 0, 0, 1, 0]))
    return Made(run, look=look, weight=nn.Parameter(random(16, 6) * 0.1), bias=bias, head=nn.Conv2d(3, 2, 3)), dict(x=random(2, 3, 12, 12))


@model
def linear_attention():
    def run(m, x):
        q, k, v = m.all(x).chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        sums = torch.einsum("bnd,bne->bnde", k, v).cumsum(1)
        return torch.einsum("bnd,bnde->bne", q, sums) / torch.einsum("bnd,bnd->bn", q, k.cumsum(1))[..., None]

    return Made(run, all=nn.Linear(8, 24)), dict(x=random(2, 10, 8))


@model
def spikes():
    def run(m, x):
        charge = total = 0
        for t in range(x.shape[1]):
            charge = 0.9 * charge + m.first(x[:, t])
            soft = torch.sigmoid(4 * (charge - 1))
            spike = soft + ((charge > 1).to(x.dtype) - soft).detach()
            charge = charge * (1 - spike)
            total = total + m.second(spike)
        return total

    return Made(run, first=nn.Linear(8, 16), second=nn.Linear(16, 3)), dict(x=random(2, 4, 8))


@model
def next_item():
    """What comes next after a sequence of items: causal attention over an embedding that is the head too."""

    def run(m, ids):
        length = ids.shape[1]
        x = m.items(ids) * 4 + m.places(torch.arange(length, device=ids.device))
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=ids.device, dtype=x.dtype)
        return m.layers(x, mask=mask, src_key_padding_mask=ids == 0) @ m.items.weight.T

    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, activation="gelu", batch_first=True)
    layers = dict(items=nn.Embedding(60, 16, padding_idx=0), places=nn.Embedding(10, 16), layers=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    return Made(run, **layers), dict(ids=tokens(3, 10) % 50 + 1)


@model
def detector_head():
    def run(m, x):
        batch, _, height, width = x.shape
        p = m.head(x).view(batch, 2, 7, height, width).permute(0, 1, 3, 4, 2)
        rows, columns = torch.meshgrid(torch.arange(height, device=x.device), torch.arange(width, device=x.device), indexing="ij")
        centre = (p[..., :2].sigmoid() * 2 - 0.5 + torch.stack([columns, rows], -1)) * 8
        size = (p[..., 2:4].sigmoid() * 2).square() * m.anchors[:, None, None]
        return torch.cat([centre, size, p[..., 4:].sigmoid()], -1).flatten(1, 3)

    return Made(run, head=nn.Conv2d(8, 14, 1), anchors=torch.tensor([[10.0, 13], [30, 40]])), dict(x=random(2, 8, 4, 4))


@model
def margins():
    """A loss with a margin between angles, and one of pairs."""

    def run(m, x, target):
        z = F.normalize(m.net(x))
        cosine = F.linear(z, F.normalize(m.classes)).clamp(-1 + 1e-6, 1 - 1e-6)
        chosen = (target[:, None] == m.numbers).to(x.dtype)
        pairs = (z @ z.T / 0.1).masked_fill(m.same, -1e9)
        scores = 30 * (chosen * torch.cos(torch.acos(cosine) + 0.5) + (1 - chosen) * cosine)
        return F.cross_entropy(scores, target, reduction="none") + torch.logsumexp(pairs, 1)

    return Made(run, net=nn.Linear(10, 8), classes=nn.Parameter(random(6, 8)), same=torch.eye(5, dtype=torch.bool), numbers=torch.arange(6)), dict(x=random(5, 10), target=torch.tensor([0, 1, 2, 3, 5]))
