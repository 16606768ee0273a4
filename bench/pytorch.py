"""PyTorch: eager, compiled, and for images channels last and compiled, on tensors in memory."""

import time
from collections.abc import Callable
from typing import Any

from bench.works import ADAM, TOLD, Work, data


def network(work: Work):  # noqa: ANN201
    import torch
    from torch import nn
    from torch.nn import functional as F

    s = work.sizes

    def dense(*sizes: int) -> list[nn.Module]:
        pairs = zip(sizes[:-1], sizes[1:])
        return [m for a, b in pairs for m in (nn.Linear(a, b), nn.ReLU())][:-1]

    if work.kind == "mlp":
        return nn.Sequential(*dense(s["inputs"], *s["hidden"], s["outputs"]))
    if work.kind == "autoencoder":
        encoder, code, *decoder = s["hidden"]
        return nn.Sequential(*dense(s["inputs"], encoder, code), *dense(code, *decoder, s["inputs"]))
    if work.kind == "cnn":
        a, b, c = s["features"]
        parts = [nn.Conv2d(1, a, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(a, b, 3), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(
            *parts, nn.Conv2d(b, c, 3), nn.ReLU(), nn.Flatten(), *dense(9 * c, s["dense"], s["outputs"])
        )

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            tokens = work.kind == "lstm_tokens"
            self.embed = nn.Embedding(s["vocabulary"], s["width"]) if tokens else nn.Identity()
            self.lstm = nn.LSTM(
                s["width"] if tokens else s["inputs"], s["hidden"][0], len(s["hidden"]), batch_first=True
            )
            self.head = nn.Linear(s["hidden"][-1], s["outputs"])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(self.embed(x))[0][:, -1])

    if work.kind in ("lstm", "lstm_tokens"):
        return Recurrent()
    causal, D, H = work.kind == "gpt", s["width"], s["heads"]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)
            self.up, self.down = nn.Linear(D, s.get("mlp", 4 * D)), nn.Linear(s.get("mlp", 4 * D), D)
            self.first, self.second = nn.LayerNorm(D), nn.LayerNorm(D)

        def attend(self, x: torch.Tensor) -> torch.Tensor:
            B, L, _ = x.shape
            q, k, v = (t.view(B, L, H, D // H).transpose(1, 2) for t in self.qkv(x).split(D, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            return self.o(y.transpose(1, 2).reshape(B, L, D))

        def feed(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(F.gelu(self.up(x), approximate="tanh" if causal else "none"))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if causal:
                x = x + self.attend(self.first(x))
                return x + self.feed(self.second(x))
            x = self.first(x + self.attend(x))
            return self.second(x + self.feed(x))

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(s["vocabulary"], D), nn.Embedding(s["context"], D)
            self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(s["layers"]))), nn.LayerNorm(D)
            if causal:
                self.head = nn.Linear(D, s["vocabulary"], bias=False)
            else:
                self.head = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, s["outputs"]))
            for parameter in (p for p in self.parameters() if p.ndim > 1):
                nn.init.normal_(parameter, std=0.02)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.tokens(x) + self.places.weight
            x = self.blocks(x if causal else self.norm(x))
            return self.head(self.norm(x) if causal else x[:, 0])

    return Transformer()


def timed(work: Work, size: int, update: Callable[[slice], Any]) -> tuple[float, list[float]]:
    """(the loss after some updates, examples a second of each part of the rest); update: of these of `size` rows."""

    def train(updates: int) -> tuple[list[float], float]:
        starts, begin = ((n * work.batch) % (size - work.batch + 1) for n in range(updates)), time.perf_counter()
        told = [update(slice(start, start + work.batch)) for start in starts]
        return [float(t) for t in told], updates * work.batch / (time.perf_counter() - begin)

    losses, _ = train(TOLD)
    return sum(losses[-10:]) / 10, [train(max(work.updates // 4, 1))[1] for _ in range(4)]


def players(work: Work):  # noqa: ANN201
    """(generator, discriminator) of a DCGAN."""
    from torch import nn

    s = work.sizes
    (first, *more), grid = s["generator"], s["side"] // 4
    parts = [nn.Linear(s["latent"], grid * grid * first), nn.Unflatten(1, (first, grid, grid)), nn.LeakyReLU(0.2)]
    for width in more:
        parts += [nn.ConvTranspose2d(first, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        first = width
    generator = nn.Sequential(*parts, nn.Conv2d(first, 1, 3, padding=1), nn.Sigmoid())
    a, b = s["discriminator"]
    convs = [nn.Conv2d(1, a, 3, stride=2, padding=1, bias=False), nn.LeakyReLU(0.2)]
    convs += [nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.LeakyReLU(0.2)]
    discriminator = nn.Sequential(*convs, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(b, 1))
    for parameter in (*generator.parameters(), *discriminator.parameters()):
        nn.init.xavier_uniform_(parameter) if parameter.ndim > 1 else nn.init.zeros_(parameter)
    return generator, discriminator


def run_players(work: Work, *, compiled: bool = False, last: bool = False) -> tuple[float, list[float]]:
    import torch
    from torch.nn.functional import softplus

    torch.manual_seed(0)
    x_all = torch.from_numpy(data(work)["x"]).permute(0, 3, 1, 2).contiguous()
    models = players(work)
    if last:
        models, x_all = (
            [m.to(memory_format=torch.channels_last) for m in models],
            x_all.to(memory_format=torch.channels_last),
        )
    g_adam, d_adam = (torch.optim.Adam(m.parameters(), ADAM, fused=True) for m in models)
    generate, judge = map(torch.compile, models) if compiled else models

    def update(rows: slice) -> torch.Tensor:
        real = x_all[rows] * 2 - 1
        fake = generate(torch.randn(work.batch, work.sizes["latent"])) * 2 - 1
        loss = softplus(-judge(real)).mean() + softplus(judge(fake.detach())).mean()
        d_adam.zero_grad()
        loss.backward()
        d_adam.step()
        deceived = softplus(-judge(fake)).mean()
        g_adam.zero_grad()
        deceived.backward()
        g_adam.step()
        return loss.detach()

    return timed(work, len(x_all), update)


def run(work: Work, *, compiled: bool = False, last: bool = False) -> tuple[float, list[float]]:
    import torch
    from torch.nn import functional as F

    if work.kind == "dcgan":
        return run_players(work, compiled=compiled, last=last)
    torch.manual_seed(0)
    given, model = data(work), network(work)
    x_all, y_all = torch.from_numpy(given["x"]), torch.from_numpy(given["y"])
    y_all = y_all if y_all.is_floating_point() else y_all.long()
    if work.kind == "cnn":
        x_all = x_all.permute(0, 3, 1, 2).contiguous()
    if last:
        model, x_all = model.to(memory_format=torch.channels_last), x_all.to(memory_format=torch.channels_last)
    forward = torch.compile(model) if compiled else model
    adam = torch.optim.Adam(model.parameters(), ADAM, fused=True)

    def update(rows: slice) -> torch.Tensor:
        x, y = x_all[rows], y_all[rows]
        logits = forward(x)
        if work.kind == "autoencoder":
            loss = F.binary_cross_entropy_with_logits(logits, y)
        else:
            loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), y.reshape(-1))
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss.detach()

    return timed(work, len(x_all), update)


SIDES = {
    "PyTorch": run,
    "PyTorch compiled": lambda work: run(work, compiled=True),
    "PyTorch channels last": lambda work: run(work, last=True),
    "PyTorch compiled, channels last": lambda work: run(work, compiled=True, last=True),
}
