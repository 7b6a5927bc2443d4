"""The loss of one training step; to be read beside the paper's "Training".

A picture at both sizes, each through its own model's VAE, is noised to one timestep by noises of their own. The frozen
base, told the caption, sees its latent; its features go through the mapping layers into the frozen upgraded model, told
nothing; the loss is the error of the upgraded model's prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..errors import DoesNotFit
from ..headless.noise_schedule import trained_alphas
from ..mapping import MappingLayers
from ..taps import FUSIONS, fuse_into, read_features, resized_like
from .encoding import EncodedRows
from .recipe import Recipe

NOISE, VELOCITY = "epsilon", "v_prediction"
TRAINED_WEIGHT = 1.0
"""Of the residuals in training."""


@dataclass(frozen=True)
class Diffusion:
    """How a model's latents are noised, and what it was trained to predict.

    Attributes:
        alphas_cumprod: ᾱ of every timestep.
        predicts: "epsilon" or "v_prediction".
    """

    alphas_cumprod: Tensor
    predicts: str = NOISE

    @classmethod
    def of(cls, pipeline: Any) -> Diffusion:
        """That of a diffusers pipeline's model.

        Raises:
            DoesNotFit: it was trained for something else.
        """
        predicts = pipeline.scheduler.config.get("prediction_type", NOISE)
        if predicts not in (NOISE, VELOCITY):
            raise DoesNotFit(f"The model predicts '{predicts}', expected noise ({NOISE}) or velocity ({VELOCITY}).")
        return cls(trained_alphas(pipeline.scheduler.config), predicts)

    def noised(self, latent: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ · latent + √(1 − ᾱ) · noise."""
        signal, share = self._shares(timesteps, latent)
        return signal * latent + share * noise

    def target(self, latent: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict: the noise, or the velocity √ᾱ · noise − √(1 − ᾱ) · latent."""
        if self.predicts == NOISE:
            return noise
        signal, share = self._shares(timesteps, latent)
        return signal * noise - share * latent

    def weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Min-SNR weighting (arXiv 2303.09556), (rows,): min(SNR, γ) / SNR for noise, … / (SNR + 1) for velocity."""
        if not gamma:
            return torch.ones_like(timesteps, dtype=torch.float32)
        alphas = self.alphas_cumprod.to(timesteps.device)[timesteps].float()
        snr = alphas / (1 - alphas)
        return snr.clamp(max=gamma) / (snr if self.predicts == NOISE else snr + 1)

    def _shares(self, timesteps: Tensor, like_latent: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self.alphas_cumprod.to(like_latent)[timesteps][:, None, None, None]
        return alphas.sqrt(), (1 - alphas).sqrt()


@dataclass(frozen=True)
class Draws:
    """All that is random in rows of a step.

    Attributes:
        timesteps: (rows,), of both models.
        empty: (rows,), whether the upgraded prompt is empty.
        upgraded_noise, base_noise: (rows, 4, h, w) and (rows, 4, h/2, w/2).
        upgraded_latent, base_latent: of the same sizes, by which latents are drawn from the VAEs' posteriors.
        controlled: (rows,), whether the base runs with its ControlNet.
    """

    timesteps: Tensor
    empty: Tensor
    upgraded_noise: Tensor
    base_noise: Tensor
    upgraded_latent: Tensor
    base_latent: Tensor
    controlled: Tensor

    @classmethod
    def of(cls, recipe: Recipe, step: int, rows: Sequence[int], size: tuple[int, int], timesteps: int) -> Draws:
        """Those of rows of a batch, whichever process computes them.

        Args:
            step: of the training, from 0.
            rows: their numbers in the whole batch.
            size: height and width of the upgraded latents.
            timesteps: of the models' training.
        """
        drawn = [_row(recipe, (recipe.seed, step, row), size, timesteps) for row in rows]
        return cls(*(torch.stack(column) for column in zip(*drawn, strict=True)))

    def to(self, device: torch.device, dtype: torch.dtype) -> Draws:
        """The same on a device, what is no whole number in a type."""
        moved = {name: value.to(device) for name, value in vars(self).items()}
        return Draws(**{name: value.to(dtype) if value.is_floating_point() else value for name, value in moved.items()})


def _row(recipe: Recipe, seed: tuple[int, ...], size: tuple[int, int], timesteps: int) -> tuple[Tensor, ...]:
    (state,) = numpy.random.SeedSequence(seed).generate_state(1, numpy.uint64)
    generator = torch.Generator().manual_seed(int(state))
    (height, width), base_size = size, (size[0] // 2, size[1] // 2)
    timestep = torch.randint(timesteps, (), generator=generator)
    empty = torch.rand((), generator=generator) < recipe.empty_prompts
    noises = [torch.randn(4, *shape, generator=generator) for shape in ((height, width), base_size) * 2]
    upgraded_noise, base_noise, upgraded_latent, base_latent = noises
    if recipe.shared_noise:
        # the mean of four pixels has half the deviation of one
        base_noise = 2 * functional.avg_pool2d(upgraded_noise, 2)
    controlled = torch.rand((), generator=generator) < recipe.controlled
    return timestep, empty, upgraded_noise, base_noise, upgraded_latent, base_latent, controlled


class TrainingStep:
    """Computes losses of rows, so that their gradients reach the mapping layers and nothing else.

    Args:
        base, upgraded: diffusers pipelines with frozen UNets, on the device.
        layers: the mapping layers.
        recipe: what is asked for.
        autocast: makes the context that the mapping layers run in.
        checkpointing: what the mapping layers make in passing is made again for the gradients.
        controlnet: of the base, frozen, on the device; None for none.

    Raises:
        DoesNotFit: the models were trained for other things than noise or velocity, or for unlike timesteps.
    """

    def __init__(
        self,
        base: Any,
        upgraded: Any,
        layers: MappingLayers,
        recipe: Recipe,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        checkpointing: bool = False,
        controlnet: nn.Module | None = None,
    ) -> None:
        self._controlnet = controlnet
        self._base, self._upgraded, self._layers, self._recipe = base.unet, upgraded.unet, layers, recipe
        self._autocast, self._checkpointing = autocast, checkpointing
        self.base_diffusion, self.diffusion = Diffusion.of(base), Diffusion.of(upgraded)
        self.timesteps = len(self.diffusion.alphas_cumprod)
        if len(self.base_diffusion.alphas_cumprod) != self.timesteps:
            raise DoesNotFit(
                f"The base was trained with {len(self.base_diffusion.alphas_cumprod)} timesteps, the upgraded model "
                f"with {self.timesteps}: there is no same timestep."
            )
        if checkpointing:
            upgraded.unet.enable_gradient_checkpointing()

    @contextmanager
    def losses(self, rows: EncodedRows, draws: Draws) -> Iterator[Tensor]:
        """The weighted loss of each row, (rows,); gradients are to be taken before the context closes.

        With gradient checkpointing the upgraded model's layers run again then, and meet their residuals again.
        """
        residuals = self._residuals(rows, draws)
        fuse = FUSIONS[self._layers.fusion]

        def fused(level: int, feature: Tensor) -> Tensor:
            return fuse(feature, resized_like(residuals[level], feature), TRAINED_WEIGHT)

        # the encoder sees nothing that needs a gradient, so the graph begins at the first residual by itself
        with fuse_into(self._upgraded, fused, taps=self._layers.taps):
            prediction, target = self._prediction(rows, draws)
            error = (prediction - target).square().mean(dim=(1, 2, 3))
            yield error * self.diffusion.weights(draws.timesteps, self._recipe.min_snr)

    def _residuals(self, rows: EncodedRows, draws: Draws) -> tuple[Tensor, ...]:
        """What the mapping layers make of the base's features."""
        weight = next(self._base.parameters())
        latent = rows.base_mean + rows.base_std * draws.base_latent
        noised = self.base_diffusion.noised(latent, draws.base_noise, draws.timesteps).to(weight)
        text = rows.base_text.to(weight)
        with torch.no_grad(), read_features(self._base, self._layers.taps) as reader:
            plugin = self._control(noised, text, rows, draws)
            self._base(noised, draws.timesteps, encoder_hidden_states=text, **plugin)
            features = reader.take()
        with self._autocast():
            levels = enumerate(features.levels)
            return tuple(self._mapped(level, feature, features.time_embedding) for level, feature in levels)

    def _control(self, noised: Tensor, text: Tensor, rows: EncodedRows, draws: Draws) -> dict[str, Any]:
        """What the ControlNet adds to the base, in the rows where it acts."""
        if self._controlnet is None or rows.control is None or not draws.controlled.any():
            return {}
        maps = rows.control.to(noised).expand(-1, 3, -1, -1)
        down, middle = self._controlnet(
            noised, draws.timesteps, encoder_hidden_states=text, controlnet_cond=maps, return_dict=False
        )
        acts = draws.controlled[:, None, None, None].to(noised)
        return {
            "down_block_additional_residuals": [acts * residual for residual in down],
            "mid_block_additional_residual": acts * middle,
        }

    def _mapped(self, level: int, feature: Tensor, time_embedding: Tensor) -> Tensor:
        if self._checkpointing:
            return checkpoint(self._layers.map_level, level, feature, time_embedding, use_reentrant=False)
        return self._layers.map_level(level, feature, time_embedding)

    def _prediction(self, rows: EncodedRows, draws: Draws) -> tuple[Tensor, Tensor]:
        """What the upgraded model says, and what it should say."""
        weight = next(self._upgraded.parameters())
        latent = rows.upgraded_mean + rows.upgraded_std * draws.upgraded_latent
        noised = self.diffusion.noised(latent, draws.upgraded_noise, draws.timesteps)
        text = torch.where(draws.empty[:, None, None], rows.empty_text, rows.upgraded_text)
        pooled = torch.where(draws.empty[:, None], rows.empty_pooled, rows.upgraded_pooled)
        prediction = self._upgraded(
            noised.to(weight),
            draws.timesteps,
            encoder_hidden_states=text.to(weight),
            added_cond_kwargs={"text_embeds": pooled.to(weight), "time_ids": rows.sizes},
            return_dict=False,
        )[0]
        target = self.diffusion.target(latent, draws.upgraded_noise, draws.timesteps)
        return prediction.to(target), target
