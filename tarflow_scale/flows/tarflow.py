"""TarFlow: a stack of autoregressive transformer blocks over image patches.

Zhai et al., "Normalizing Flows are Capable Generative Models", arXiv 2412.06329. An image is cut into T tokens of D
features. Each block predicts a log-scale and a mean for every token from the tokens before it:

    z_t = (x_t - mean_t) * exp(-log_scale_t),    log|det| = -sum_t sum_d log_scale_td        (their equation 5)

and each block reads the tokens in the reverse order of the previous block. Training processes all tokens at once;
sampling inverts a block token by token with a key/value cache. The volume-preserving variant predicts means only; after
the last block it divides each feature of each token by a learned deviation:

    z = u exp(-log_std),    log|det| = -sum log_std

Blocks may have different depths, such as one deep block and several shallow ones in STARFlow (arXiv 2506.06276).

Differences from the public code (apple/ml-tarflow): log_det is a sum in nats, not a mean per dimension. The
volume-preserving loss is the likelihood, and log_std is learned by gradient; the public code estimates the scale by a
moving average of z^2 and leaves its logarithm out of the loss. The output layer starts at exactly zero (the public one
has a random bias), so a new flow is the identity. Attention is causal by SDPA's ``is_causal``, not by a stored mask, so
it can skip half of the work. The cache is an argument, not module state. Log-scales may be bounded smoothly by
c tanh(a / c), as in STARFlow at high resolution. Layers may have dropout, for small data sets.

These parts are as published: the order of tokens and features (channel, row, column), the shift of outputs by one token
with an unchanged first token, the mean class embedding for dropped labels, and the rules of guidance.
`tarflow_scale.flows.ml_tarflow` reads the public weights.

Shapes: B batch, T tokens, D features per token, C width, K classes.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from tarflow_scale.config.model import TarFlowConfig
from tarflow_scale.config.sampling import Guidance
from tarflow_scale.flows.attention import KeyValueCache, TransformerLayer
from tarflow_scale.flows.conditions import Condition, embed
from tarflow_scale.flows.flow import Flow
from tarflow_scale.flows.recompute import checkpoint

__all__ = ["TarFlow", "TarFlowBlock", "patchify", "unpatchify"]


def patchify(x: Float[Tensor, "B c H W"], patch_size: int) -> Float[Tensor, "B T D"]:
    """Cut images into row-major tokens whose features are ordered (channel, row, column)."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(tokens: Float[Tensor, "B T D"], patch_size: int, height: int) -> Float[Tensor, "B c H W"]:
    """Inverse of `patchify`; ``height`` is the height of the images in pixels."""
    p = patch_size
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height // p, p=p, q=p)


class TarFlowBlock(nn.Module):
    """One autoregressive block: a transformer that predicts the log-scale and mean of the next token.

    Args:
        num_tokens: number of tokens T.
        features: number of features D of a token.
        num_layers: number of transformer layers.
        num_classes: number of classes K, or None.
        flip: whether the block reads the tokens back to front.
        config: the section ``model``.
    """

    def __init__(
        self,
        num_tokens: int,
        features: int,
        num_layers: int,
        num_classes: int | None,
        flip: bool,
        config: TarFlowConfig,
    ) -> None:
        super().__init__()
        self.flip = flip
        self.head_width, self.variant = config.head_width, config.variant
        self.log_scale_bound, width = config.log_scale_bound, config.width
        self.proj_in = nn.Linear(features, width)
        self.position = nn.Parameter(torch.randn(num_tokens, width) * 1e-2)
        self.class_embedding = None if num_classes is None else nn.Parameter(torch.randn(num_classes, width) * 1e-2)
        self.layers = nn.ModuleList(
            TransformerLayer(width, config.head_width, config.dropout) for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(width, 2 * features if config.variant == "affine" else features)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(
        self, x: Float[Tensor, "B T D"], y: Condition, recompute: bool = False, twice: bool = False
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, " B"]]:
        """Map data to noise: tokens ``z`` and the log-determinant in nats.

        ``recompute`` checkpoints every layer; see `TransformerLayer` for ``twice``.
        """
        z, log_scale = self.encode_values(x, y, recompute, twice)
        return z, x.new_zeros(len(x)) if log_scale is None else -log_scale.sum(dim=(1, 2))

    def encode_values(
        self, x: Float[Tensor, "B T D"], y: Condition, recompute: bool = False, twice: bool = False
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"] | None]:
        """Like `forward`, but return the log-scale of every value, or None if the block preserves volume."""
        x = self.order(x)
        h = self.proj_in(x) + self.order(self.position[None]) + self.condition(y)
        for layer in self.layers:
            h = checkpoint(layer, h, twice) if recompute else layer(h, twice)
        log_scale, mean = self._shifted_parameters(h, x)
        with torch.autocast(x.device.type, enabled=False):
            if log_scale is None:
                return self.order(x - mean), None
            return self.order((x - mean) * torch.exp(-log_scale)), self.order(log_scale)

    def inverse(
        self, z: Float[Tensor, "B T D"], y: Condition, guidance: Guidance | None = None
    ) -> Float[Tensor, "B T D"]:
        """Map noise to data, token by token; ``guidance`` is None unless it has an effect.

        The second prediction that guidance needs is computed in the same batch.
        """
        batch, num_tokens, _ = z.shape
        z = self.order(z)
        position, condition = self.order(self.position[None]), self.condition(y).expand(batch, -1, -1)
        lanes, sharpness, like = 1, None, self.proj_in.weight
        if guidance is not None:
            lanes = 2
            condition = torch.cat([condition, self.condition(None).expand(batch, -1, -1)])
            if guidance.attention_temperature != 1:
                sharpness = like.new_ones(2 * batch, 1, 1, 1)
                sharpness[batch:] /= guidance.attention_temperature
        heads = self.position.shape[1] // self.head_width
        cache = KeyValueCache(len(self.layers), lanes * batch, heads, num_tokens, self.head_width, like)
        tokens = [z[:, :1]]
        for t in range(num_tokens - 1):
            token = tokens[-1].repeat(lanes, 1, 1).to(like)
            log_scale, mean = self._step(token, position[:, t : t + 1] + condition, cache, sharpness)
            if guidance is not None:
                scale = guidance.scale * ((t + 1) / (num_tokens - 1) if guidance.annealed else 1.0)
                mean = _guided(mean, scale if guidance.what != "log_scale" else 0.0)
                log_scale = _guided(log_scale, scale if guidance.what != "mean" else 0.0)
            tokens.append(z[:, t + 1 : t + 2] * torch.exp(log_scale.to(z)) + mean.to(z))
        return self.order(torch.cat(tokens, dim=1))

    def _step(
        self, token: Tensor, offset: Tensor, cache: KeyValueCache, sharpness: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Log-scale and mean ``(B, 1, D)`` of the token that follows ``token``."""
        h = self.proj_in(token) + offset
        for index, layer in enumerate(self.layers):
            h = layer.step(h, cache, index, sharpness)  # pyright: ignore[reportCallIssue]
        cache.length += 1
        log_scale, mean = self.parameters_of(self.proj_out(h))
        return (torch.zeros_like(mean) if log_scale is None else log_scale), mean

    def _shifted_parameters(self, h: Tensor, like: Tensor) -> tuple[Tensor | None, Tensor]:
        """Log-scales and means of all tokens, each computed from the tokens before it; zeros for the first token."""
        out = self.proj_out(h).to(like)
        return self.parameters_of(torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], dim=1))

    def parameters_of(self, out: Tensor) -> tuple[Tensor | None, Tensor]:
        """Split an output, in the published order, into log-scale (None if the block preserves volume) and mean."""
        if self.variant == "volume_preserving":
            return None, out
        log_scale, mean = out.chunk(2, dim=-1)
        if self.log_scale_bound is not None:
            log_scale = self.log_scale_bound * torch.tanh(log_scale / self.log_scale_bound)
        return log_scale, mean

    def order(self, tokens: Tensor) -> Tensor:
        """Put tokens ``(B, T, ...)`` into the order that this block reads; a second call restores the old order."""
        return tokens.flip(dims=(1,)) if self.flip else tokens

    def condition(self, y: Condition) -> Tensor:
        """Class embedding ``(B or 1, 1, C)``; the mean over classes for a dropped label."""
        if self.class_embedding is None:
            return self.position.new_zeros(1, 1, self.position.shape[1])
        return embed(self.class_embedding, y)[:, None]


def _guided(lanes: Tensor, scale: float) -> Tensor:
    strong, weak = lanes.chunk(2)
    return strong + scale * (strong - weak)


class TarFlow(Flow):
    """A stack of `TarFlowBlock`; every second block reads the tokens back to front.

    Args:
        event_shape: shape of an image; height and width must be multiples of the patch size.
        num_classes: number of classes K; None for an unconditional model.
        config: the section ``model``.

    Raises:
        ValueError: the image cannot be divided into patches.
    """

    capabilities = TarFlowConfig.CAPABILITIES

    def __init__(self, event_shape: tuple[int, int, int], num_classes: int | None, config: TarFlowConfig) -> None:
        super().__init__(event_shape, num_classes, config.logit_alpha)
        (channels, height, width), patch_size = event_shape, config.patch_size
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"image height and width must be multiples of model.patch_size "
                f"(got {height}x{width} and {patch_size}); choose another patch size"
            )
        self.patch_size = patch_size
        tokens, features = (height // patch_size) * (width // patch_size), channels * patch_size**2
        self.log_std = nn.Parameter(torch.zeros(tokens, features)) if config.variant == "volume_preserving" else None
        self.blocks = nn.ModuleList(
            TarFlowBlock(tokens, features, num_layers, num_classes, index % 2 == 1, config)
            for index, num_layers in enumerate(config.layers_per_block)
        )

    def encode(self, h: Float[Tensor, "B c H W"], y: Condition) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Map data to noise: ``z (B, T D)`` in the order of tokens, and ``log_det (B,)`` in nats."""
        return self._encode(h, y, twice=False)

    def encode_twice(self, h: Tensor, y: Condition) -> tuple[Tensor, Tensor]:
        """See `Flow.encode_twice`; the memory of attention grows with the square of the number of tokens."""
        return self._encode(h, y, twice=True)

    def _encode(self, h: Tensor, y: Condition, twice: bool) -> tuple[Tensor, Tensor]:
        tokens = patchify(h, self.patch_size)
        log_det = tokens.new_zeros(len(tokens))
        recompute = torch.is_grad_enabled() and self.activations == "checkpoint"
        for block in self.blocks:
            tokens, block_log_det = block(tokens, y, recompute, twice)
            log_det = log_det + block_log_det
        if self.log_std is not None:
            tokens = tokens * torch.exp(-self.log_std)
            log_det = log_det - self.log_std.sum()
        return rearrange(tokens, "b t d -> b (t d)"), log_det

    def encode_values(self, h: Tensor, y: Condition) -> tuple[Tensor, Tensor]:
        """See `Flow.encode_values`."""
        tokens = patchify(h, self.patch_size)
        log_dets = torch.zeros_like(tokens)
        for block in self.blocks:
            tokens, log_scale = block.encode_values(tokens, y)  # pyright: ignore[reportCallIssue]
            log_dets = log_dets if log_scale is None else log_dets - log_scale
        if self.log_std is not None:
            tokens = tokens * torch.exp(-self.log_std)
            log_dets = log_dets - self.log_std
        height = self.event_shape[1]
        return unpatchify(tokens, self.patch_size, height), unpatchify(log_dets, self.patch_size, height)

    def decode(self, z: Float[Tensor, "B D"], y: Condition, guidance: Guidance | None) -> Float[Tensor, "B c H W"]:
        """Map noise to data by exact decoding, token by token; guidance acts in every block."""
        features = self.event_shape[0] * self.patch_size**2
        tokens = rearrange(z, "b (t d) -> b t d", d=features)
        if self.log_std is not None:
            tokens = tokens * torch.exp(self.log_std)
        for block in reversed(self.blocks):
            tokens = block.inverse(tokens, y, guidance)  # pyright: ignore[reportCallIssue]
        return unpatchify(tokens, self.patch_size, self.event_shape[1])

    def is_guided(self, y: Condition, guidance: Guidance | None) -> bool:
        """See `Flow.is_guided`; a volume-preserving model has no log-scales to guide."""
        guided = super().is_guided(y, guidance)
        if guided and guidance is not None and guidance.what == "log_scale" and self.log_std is not None:
            raise ValueError("a volume-preserving flow has no log-scales to guide (got what=log_scale); use what=mean")
        return guided
