"""The base class of image flows with several resolutions, their levels, and the learned priors of their latents.

An image passes L levels. Each level applies invertible layers to feature maps, squeezes space into channels, and
(except the last level) splits off half of its channels as latents (Dinh et al., arXiv 1605.08803, section 3.6; Kingma
and Dhariwal, arXiv 1807.03039, figure 2b). Latents have a Gaussian prior with a learned mean and log-deviation, and are
standardised:

    z = (h - mean) exp(-log_std),        log|det| -= sum log_std

so ``z`` is standard normal as a whole and one temperature acts on every level.

The surprise (the nats of an image) is divided among places. At level l, after the squeeze, a place is a square of 2^l
by 2^l pixels. It contributes the nats of its latents under their prior and the log-scales of couplings at this place. A
log-determinant that is equal everywhere (ActNorm, 1x1 convolution) is shared evenly among places. Layers mix the pixels
and channels of a place, so these get equal shares of its contribution.

Shapes: B batch, D dimensions, L levels. log_det: nats, summed over dimensions.
"""

import itertools
from collections.abc import Sequence

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from tarflow_scale.config.sampling import Guidance
from tarflow_scale.flows.conditions import Condition, embed
from tarflow_scale.flows.coupling import Layer, Normalization, ZeroConv, squeeze, unsqueeze
from tarflow_scale.flows.flow import Flow
from tarflow_scale.flows.guidance import guided
from tarflow_scale.flows.normal import standard_normal_nats
from tarflow_scale.flows.recompute import run_layers

__all__ = ["Level", "MultiScaleFlow", "Prior", "Step"]

Groups = Sequence[Sequence[Layer]]


class Prior(nn.Module):
    """Predicts the mean and log-deviation of latents from the label and the features that go on to the next level.

    Args:
        context_channels: number of channels of these features; if 0, mean and log-deviation are learned constants.
        channels: number of channels of the latents.
        num_classes: number of classes, or None.
    """

    def __init__(self, context_channels: int, channels: int, num_classes: int | None) -> None:
        super().__init__()
        self.network = ZeroConv(context_channels, 2 * channels) if context_channels else None
        self.constant = None if context_channels else nn.Parameter(torch.zeros(2 * channels))
        self.class_embedding = None if num_classes is None else nn.Parameter(torch.zeros(num_classes, 2 * channels))

    def forward(self, context: Tensor | None, y: Condition) -> tuple[Tensor, Tensor]:
        """Mean and log-deviation ``(B or 1, C, H or 1, W or 1)`` in fp32 or wider; constants need no ``context``."""
        if self.network is not None:
            assert context is not None
            out = self.network(context).to(context.dtype)
        else:
            assert self.constant is not None
            out = self.constant[None, :, None, None]
        if self.class_embedding is not None:
            out = out + embed(self.class_embedding, y)[:, :, None, None]
        mean, log_std = out.chunk(2, dim=1)
        return mean, log_std


class Step(nn.Module):
    """Layers that are checkpointed together, as one group of `tarflow_scale.flows.recompute`."""

    def layers(self) -> tuple[Layer, ...]:
        """The layers, in the direction from data to noise."""
        raise NotImplementedError


class Level(nn.Module):
    """Steps before and after a squeeze, and the prior of the latents that this level emits.

    Args:
        steps: steps after the squeeze.
        channels: number of channels after the squeeze.
        split: whether half of the channels go on to the next level.
        num_classes: number of classes, or None.
        before: steps before the squeeze.
        squeezes: whether there is a squeeze.
        prior_sees_rest: whether a convolution predicts the prior from the half that goes on. If not, it is constant.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        channels: int,
        split: bool,
        num_classes: int | None,
        before: Sequence[Step] = (),
        squeezes: bool = True,
        prior_sees_rest: bool = True,
    ) -> None:
        super().__init__()
        if before:
            self.before = nn.ModuleList(before)
        self.steps = nn.ModuleList(steps)
        self.squeezes = squeezes
        self.passed_on = channels // 2 if split else 0
        self.prior = Prior(self.passed_on if prior_sees_rest else 0, channels - self.passed_on, num_classes)
        self.groups_before: Groups = [step.layers() for step in before]
        """Layers of each step before the squeeze."""
        self.groups: Groups = [step.layers() for step in steps]
        """Layers of each step after the squeeze."""

    def take_latents(self, h: Tensor, y: Condition) -> tuple[Tensor | None, Tensor, Tensor]:
        """Split ``h``; return features that go on (None at the last level), standardised latents, log-deviations."""
        context, latents = (h[:, : self.passed_on], h[:, self.passed_on :]) if self.passed_on else (None, h)
        mean, log_std = self.prior(context, y)
        with torch.autocast(h.device.type, enabled=False):
            return context, (latents - mean) * torch.exp(-log_std), log_std.expand_as(latents)

    def give_latents(self, z: Tensor, context: Tensor | None, y: Condition, guidance: Guidance | None) -> Tensor:
        """Inverse of `take_latents`; ``guidance`` is None unless it has an effect."""
        mean, log_std = self.prior(context, y)
        if guidance is not None:
            weak_mean, weak_log_std = self.prior(context, None)
            moved, mean = guided(log_std, mean, weak_log_std, weak_mean, guidance.scale, guidance)
            assert moved is not None
            log_std = moved
        latents = z * torch.exp(log_std) + mean
        return latents if context is None else torch.cat([context, latents], dim=1)


class MultiScaleFlow(Flow):
    """A flow that consists of `Level` modules.

    Args:
        event_shape: ``(C, H, W)``.
        num_classes: number of classes; None for an unconditional model.
        logit_alpha: see `Bijection`.
    """

    def __init__(self, event_shape: tuple[int, int, int], num_classes: int | None, logit_alpha: float | None) -> None:
        super().__init__(event_shape, num_classes, logit_alpha)
        self.levels = nn.ModuleList()
        self.latent_shapes: list[tuple[int, int, int]] = []
        """Shape of the latents of each level; ``z`` is the concatenation of all latents, flattened."""

    def add_level(self, level: Level, channels: int, height: int, width: int) -> None:
        """Add a level; the other arguments are the shape of its last feature maps."""
        self.levels.append(level)
        self.latent_shapes.append((channels - level.passed_on, height, width))

    @torch.no_grad()
    def initialize(self, x: Float[Tensor, "B c H W"], y: Condition = None) -> None:
        """Initialise every normalisation from ``x``, this rank's part of one batch; all ranks must call this."""
        norms = [module for module in self.modules() if isinstance(module, Normalization)]
        hooks = [norm.register_forward_pre_hook(_initialize_norm) for norm in norms]
        try:
            self(x, y)
        finally:
            for hook in hooks:
                hook.remove()

    def encode(self, h: Float[Tensor, "B c H W"], y: Condition) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Map data to noise: ``z (B, D)``, in the order of levels, and ``log_det (B,)`` in nats."""
        log_det, latents = h.new_zeros(len(h)), list[Tensor]()
        passed_on: Tensor | None = h
        for level in self._levels():
            assert passed_on is not None
            mapped, log_det = self._run(level.groups_before, passed_on, log_det)
            mapped, log_det = self._run(level.groups, squeeze(mapped) if level.squeezes else mapped, log_det)
            passed_on, z, log_std = level.take_latents(mapped, y)
            latents.append(z.flatten(1))
            log_det = log_det - log_std.sum(dim=(1, 2, 3))
        return torch.cat(latents, dim=1), log_det

    def nats_of_encoded(self, h: Float[Tensor, "B c H W"], y: Condition) -> Float[Tensor, "B c H W"]:
        """See `Flow.nats_of_encoded`; all values of a place get equal shares, as the module describes."""
        nats = torch.zeros_like(h)
        passed_on: Tensor | None = h
        for level in self._levels():
            assert passed_on is not None
            mapped, log_dets = _map_places(level.groups_before, passed_on)
            nats = nats - _spread(log_dets, h)
            mapped, log_dets = _map_places(level.groups, squeeze(mapped) if level.squeezes else mapped)
            passed_on, z, log_std = level.take_latents(mapped, y)
            nats_of_latents = standard_normal_nats(z) + log_std
            nats = nats + _spread(nats_of_latents.sum(dim=1) - log_dets, h)
        return nats

    def decode(self, z: Float[Tensor, "B D"], y: Condition, guidance: Guidance | None) -> Float[Tensor, "B c H W"]:
        """Map noise to data.

        Guidance changes the means and log-deviations of the priors, which read the label.
        """
        parts = z.split([c * h * w for c, h, w in self.latent_shapes], dim=1)
        h: Tensor | None = None
        for level, part, shape in zip(
            reversed(self._levels()), reversed(parts), reversed(self.latent_shapes), strict=True
        ):
            h = level.give_latents(part.unflatten(1, shape), h, y, guidance)
            h = _undo(level.groups, h)
            h = _undo(level.groups_before, unsqueeze(h) if level.squeezes else h)
        assert h is not None
        return h

    def is_guided(self, y: Condition, guidance: Guidance | None) -> bool:
        """See `Flow.is_guided`; settings that only TarFlow supports raise ValueError too."""
        if guidance is None or guidance.scale == 0:
            return False
        if self.num_classes is None or y is None:
            raise ValueError(
                f"guidance of {type(self).__name__} needs classes and labels (got scale={guidance.scale}); set the "
                f"scale to 0"
            )
        if guidance.blocks != "all":
            raise ValueError(f"guidance.blocks=first is for TarFlow (got {type(self).__name__}); use all")
        if guidance.annealed or guidance.attention_temperature != 1:
            raise ValueError(
                f"annealed and attention_temperature have no effect on {type(self).__name__} (got "
                f"{guidance.annealed} and {guidance.attention_temperature}); remove them"
            )
        return True

    def _run(self, groups: Groups, h: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        h, more = run_layers(groups, h, self.activations)
        return h, log_det + more

    def _levels(self) -> list[Level]:
        return list(self.levels)  # pyright: ignore[reportReturnType]


def _undo(groups: Groups, h: Tensor) -> Tensor:
    for group in reversed(groups):
        for layer in reversed(group):
            h = layer.inverse(h)
    return h


def _map_places(groups: Groups, h: Tensor) -> tuple[Tensor, Float[Tensor, "B H W"]]:
    """Apply all layers of all groups; return the output and the log-determinant of each place."""
    log_dets = torch.zeros_like(h[:, 0])
    for layer in itertools.chain.from_iterable(groups):
        h, more = layer.map_places(h)
        log_dets = log_dets + more
    return h, log_dets


def _spread(nats: Float[Tensor, "B h w"], like: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """The nats of each place, shared evenly among the pixels and channels of the place."""
    size = like.shape[2] // nats.shape[1]
    shares = nats / (size**2 * like.shape[1])
    return repeat(shares, "b h w -> b c (h p) (w q)", c=like.shape[1], p=size, q=size)


def _initialize_norm(norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    assert isinstance(norm, Normalization)
    norm.initialize(arguments[0])
