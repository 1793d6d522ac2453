"""Train a tiny Safe-VLM from nothing: ``python -m benchmarks.tiny.recipe --model tiny-safegem --out DIR``.

Two CPU cores, bfloat16 autocast, about an hour a model. First the vision tower and the projector learn to see,
through a throw-away probe that names what lies in each cell of an image. Then the whole model and the guard
head are trained jointly, and both once more with the questions that are learned last. Many questions about one
image share its prefix: they are packed as branches of one sequence, each seeing the prefix and itself alone,
at the positions that it would have by itself.

Shapes: B images, K questions an image, T image tokens, P prefix tokens (image included), L packed tokens,
H hidden width, V vocabulary, C classes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.tiny.blueprints import BLUEPRINTS, Blueprint
from benchmarks.tiny.network import TinyNetwork
from benchmarks.tiny.packing import Packer
from benchmarks.tiny.pictures import Pictures
from benchmarks.tiny.shipping import ship
from benchmarks.tiny.tokenizers import corpus
from calibration.holisafe_mini.questions import Pair, sample_pair
from calibration.holisafe_mini.scene import Scene, world
from safevlm.checkpoint.families import FAMILIES
from safevlm.terminal.commandline import run

__all__ = ["Recipe", "train"]

log = logging.getLogger(__name__)
IGNORED = -100
"""No truth for a token: cross-entropy passes over it."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What a joint step is made of: the share of safe images, questions an image, shares of their types."""

    safe_images: float = 0.5
    safe_questions: int = 6
    unsafe_questions: int = 3
    questions: tuple[float, ...] | None = None
    """Shares of the kinds of harmless questions; by default, the world's own."""
    safe_types: Mapping[str, float] = field(default_factory=lambda: {"SSS": 0.62, "SSU": 0.25, "SUU": 0.13})
    unsafe_types: Mapping[str, float] = field(default_factory=lambda: {"USU": 0.7, "UUU": 0.3})

    def sample(self, scene: Scene, rng: np.random.Generator) -> list[Pair]:
        """Sample the questions asked about one image in one step."""
        types = self.unsafe_types if scene.label else self.safe_types
        count = self.unsafe_questions if scene.label else self.safe_questions
        chosen = rng.choice(list(types), size=count, p=list(types.values()))
        return [sample_pair(scene, str(pair_type), rng, self.questions) for pair_type in chosen]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a tiny checkpoint is trained; the defaults made the ones that ship."""

    seed: int = 0
    pictures: int = 24_000
    see_steps: int = 1_100
    see_batch: int = 64
    joint_steps: int = 1_300
    joint_batch: int = 24
    look_steps: int = 300
    polish_steps: int = 900
    joint_mix: Mix = Mix()
    polish_mix: Mix = Mix(
        safe_images=0.85,
        safe_questions=7,
        unsafe_questions=2,
        questions=(0.08, 0.06, 0.28, 0.04, 0.28, 0.24, 0.02),
        safe_types={"SSS": 0.7, "SSU": 0.27, "SUU": 0.03},
    )
    guard_weight: float = 1.0
    probe_weight: float = 0.3
    see_rate: float = 1.5e-3
    joint_rate: float = 8e-4
    vision_share: float = 0.3
    """Of the joint rate, for vision tower and projector: at the full rate they forget what they saw."""
    warmup: int = 100
    weight_decay: float = 0.02


class Probe(nn.Module):
    """Name at every image token what lies in its cell of the image; thrown away after training.

    Every token has to know the kind and the colour of the same thing, which is what a question binds together.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        kinds = len(world()["shapes"]) + len(world()["classes"]) + 1
        self.norm = nn.LayerNorm(width)
        self.kind = nn.Linear(width, kinds)
        self.colour = nn.Linear(width, len(world()["colours"]) + 1)

    def forward(self, features: Tensor, cells: Tensor) -> Tensor:
        """Return the loss for ``features`` B×T×H against ``cells`` B×4×2 (kind, colour; 0 is nothing)."""
        side = round(features.shape[1] ** 0.5)
        half = torch.arange(side) * 2 // side
        truth = cells[:, (2 * half[:, None] + half).flatten()].clone()  # B × T × 2
        between = 2 * torch.arange(side) + 1 == side  # the middle of an odd side lies in two cells
        truth[:, (between[:, None] | between).flatten()] = IGNORED
        truth = truth.flatten(0, 1)
        seen = self.norm(features.float()).flatten(0, 1)
        kind = F.cross_entropy(self.kind(seen).float(), truth[:, 0])
        return kind + F.cross_entropy(self.colour(seen).float(), truth[:, 1])


def train(blueprint: Blueprint, out: Path, recipe: Recipe = Recipe()) -> None:
    """Train ``blueprint`` and write the checkpoint folder ``out``; an interrupted run resumes after its last stage."""
    torch.manual_seed(recipe.seed)
    out.mkdir(parents=True, exist_ok=True)
    blueprint.train_tokenizer(corpus(FAMILIES[blueprint.family]), out)
    pictures = Pictures.drawn("train", recipe.pictures, blueprint)
    packer = Packer(blueprint, out)
    network = TinyNetwork(blueprint)
    network.compile_layers()
    log.info("%s: %.2f M parameters", blueprint.name, network.parameter_count / 1e6)
    probe = Probe(network.width)
    stages: dict[str, Callable[[], None]] = {
        "see": lambda: learn_to_see(network, probe, pictures, recipe.see_steps, recipe),
        "joint": lambda: learn_jointly(network, probe, pictures, packer, recipe.joint_steps, recipe.joint_mix, recipe),
        "look": lambda: learn_to_see(network, probe, pictures, recipe.look_steps, recipe),
        "polish": lambda: learn_jointly(
            network, probe, pictures, packer, recipe.polish_steps, recipe.polish_mix, recipe
        ),
    }
    done = [name for name in stages if _state(out, name).exists()]
    if done:
        network.load_state_dict(torch.load(_state(out, done[-1]), weights_only=True))
    for name in list(stages)[list(stages).index(done[-1]) + 1 if done else 0 :]:
        stages[name]()
        torch.save(network.state_dict(), _state(out, name))
    ship(network, out)


def _state(out: Path, stage: str) -> Path:
    """Return where the network is kept behind a stage: beside ``out``, not in it."""
    return out.parent / f".{out.name}.{stage}.pt"


def learn_to_see(network: TinyNetwork, probe: Probe, pictures: Pictures, steps: int, recipe: Recipe) -> None:
    """Train vision tower and projector until every image token names what lies in its cell."""
    parameters = [p for module in (probe, *network.vision_modules) for p in module.parameters()]
    rng = np.random.default_rng([recipe.seed, 1, steps])
    for step, optimizer in _steps([{"params": parameters, "lr": recipe.see_rate}], steps, recipe):
        batch = rng.integers(len(pictures), size=recipe.see_batch)
        with torch.autocast("cpu", torch.bfloat16):
            loss: Any = probe(network.image_features(pictures.rgb(batch)), pictures.cells(batch))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        _report("see", step, probe=loss)


def learn_jointly(
    network: TinyNetwork, probe: Probe, pictures: Pictures, packer: Packer, steps: int, mix: Mix, recipe: Recipe
) -> None:
    """Train language model, vision tower, projector and guard head together; the probe keeps the tower seeing."""
    vision = [p for module in network.vision_modules for p in module.parameters()]
    known = set(map(id, vision))
    others = [p for p in (*network.parameters(), *probe.parameters()) if id(p) not in known]
    groups = [
        {"params": vision, "lr": recipe.joint_rate * recipe.vision_share},
        {"params": others, "lr": recipe.joint_rate},
    ]
    rng = np.random.default_rng([recipe.seed, 2, steps])
    for step, optimizer in _steps(groups, steps, recipe):
        batch = pictures.sample(rng, recipe.joint_batch, mix.safe_images)
        packed = packer.pack([mix.sample(pictures.scenes[i], rng) for i in batch])
        with torch.autocast("cpu", torch.bfloat16):
            logits, guard, features = network(pictures.rgb(batch), packed)
            probe_loss = probe(features, pictures.cells(batch))
        loss = F.cross_entropy(logits.float(), packed.targets)
        guard_loss = F.cross_entropy(guard.float(), pictures.labels(batch))
        total: Any = loss + recipe.guard_weight * guard_loss + recipe.probe_weight * probe_loss
        total.backward()
        nn.utils.clip_grad_norm_([*vision, *others], 1.0)
        optimizer.step()
        right = (logits.argmax(-1) == packed.targets).float().mean()
        accuracy = (guard.argmax(-1) == pictures.labels(batch)).float().mean()
        _report("joint", step, answer=loss, token=right, guard=guard_loss, accuracy=accuracy, probe=probe_loss)


def _steps(groups: list[dict[str, Any]], count: int, recipe: Recipe) -> Iterator[tuple[int, torch.optim.Optimizer]]:
    """Yield step numbers with a fresh AdamW under warm-up and linear decay of each group's rate."""
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    rates = [group["lr"] for group in groups]
    for step in range(count):
        factor = min((step + 1) / recipe.warmup, (count - step) / count)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.zero_grad(set_to_none=True)
        yield step, optimizer


_started = time.monotonic()


def _report(stage: str, step: int, **values: Tensor) -> None:
    if step % 50 == 0:
        text = " ".join(f"{name} {value.item():.3f}" for name, value in values.items())
        log.info("%6.0f s  %s %5d  %s", time.monotonic() - _started, stage, step, text)


@click.command()
@click.option("--model", type=click.Choice(list(BLUEPRINTS)), required=True, help="Tiny checkpoint to train.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; must not exist.")
@click.option(
    "--joint-steps", type=int, default=Recipe.joint_steps, show_default=True, help="Training steps of the whole model."
)
@click.option(
    "--see-steps", type=int, default=Recipe.see_steps, show_default=True, help="Training steps on what images show."
)
@click.option(
    "--look-steps", type=int, default=Recipe.look_steps, show_default=True, help="Training steps of the guard head."
)
@click.option(
    "--polish-steps",
    type=int,
    default=Recipe.polish_steps,
    show_default=True,
    help="Training steps at a low learning rate.",
)
def main(model: str, out: Path, joint_steps: int, see_steps: int, look_steps: int, polish_steps: int) -> None:
    """Train a tiny Safe-VLM and write its checkpoint folder."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(
        BLUEPRINTS[model],
        out,
        Recipe(joint_steps=joint_steps, see_steps=see_steps, polish_steps=polish_steps, look_steps=look_steps),
    )


if __name__ == "__main__":
    run(main)
