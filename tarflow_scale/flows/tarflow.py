"""TarFlow: a stack of autoregressive transformer blocks over image patches.

Zhai et al., "Normalizing Flows are Capable Generative Models", arXiv 2412.06329. An image becomes T tokens of
D = C p p features; each block predicts, from the tokens before it, a log-scale and a mean for every token:

    z_t = (x_t - mean_t) * exp(-log_scale_t),    log|det| = -sum_t sum_d log_scale_td        (their equation 5)

with the order of tokens reversed from one block to the next. Training sees all tokens at once; sampling inverts a
block token by token with a key/value cache.

What differs from the public code, and why: log_det is a sum in nats, not a mean per dimension; the output layer
starts at exactly zero (the public one leaves its bias random), so a fresh flow is the identity; causality is
SDPA's ``is_causal``, not a stored mask; the cache is an object that is passed, not module state; layers may have
dropout, for small data sets. Token order, feature order (channel, row, column), the shift of the output by one
token with an untouched first token, and the mean class embedding for dropped labels are as published.

Shapes: B batch, T tokens, D features per token, C width, K classes.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from tarflow_scale.flows.attention import KeyValueCache, TransformerLayer
from tarflow_scale.flows.flow import Condition, Flow

__all__ = ["TarFlow", "TarFlowBlock", "patchify", "unpatchify"]


def patchify(x: Float[Tensor, "B c H W"], patch_size: int) -> Float[Tensor, "B T D"]:
    """Cut images into row-major tokens whose features are ordered (channel, row, column)."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(tokens: Float[Tensor, "B T D"], patch_size: int, height: int) -> Float[Tensor, "B c H W"]:
    """Inverse of `patchify` for images of ``height`` pixels."""
    p = patch_size
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height // p, p=p, q=p)


class TarFlowBlock(nn.Module):
    """One autoregressive block: transformer in, log-scale and mean of the next token out.

    Args:
        num_tokens: T. features: D. width: C. num_layers: transformer layers. head_width: width of one head.
        num_classes: K, or None.
        flip: read the tokens back to front.
        dropout: dropout of the transformer layers.
    """

    def __init__(
        self,
        num_tokens: int,
        features: int,
        width: int,
        num_layers: int,
        head_width: int,
        num_classes: int | None,
        flip: bool,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.flip = flip
        self.head_width = head_width
        self.proj_in = nn.Linear(features, width)
        self.position = nn.Parameter(torch.randn(num_tokens, width) * 1e-2)
        self.class_embedding = None if num_classes is None else nn.Parameter(torch.randn(num_classes, width) * 1e-2)
        self.layers = nn.ModuleList(TransformerLayer(width, head_width, dropout) for _ in range(num_layers))
        self.proj_out = nn.Linear(width, 2 * features)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Float[Tensor, "B T D"], y: Condition) -> tuple[Float[Tensor, "B T D"], Float[Tensor, " B"]]:
        """Data to noise: tokens ``z`` and the log-determinant in nats."""
        x = self._order(x)
        h = self.proj_in(x) + self._order(self.position[None]) + self._condition(y)
        for layer in self.layers:
            h = layer(h)
        log_scale, mean = self._shifted_parameters(h, x)
        with torch.autocast(x.device.type, enabled=False):
            z = (x - mean) * torch.exp(-log_scale)
            log_det = -log_scale.sum(dim=(1, 2))
        return self._order(z), log_det

    def inverse(self, z: Float[Tensor, "B T D"], y: Condition, guidance: float = 0.0) -> Float[Tensor, "B T D"]:
        """Noise to data, token by token.

        With ``guidance`` g > 0 the predictions with the label are pushed away from those without it,
        ``a + g (a - a_dropped)`` for log-scale and mean alike (arXiv 2412.06329, section 3.4). Both lanes are
        decoded as one batch.
        """
        lanes = 2 if guidance > 0 else 1
        z = self._order(z)
        position, condition = self._order(self.position[None]), self._condition(y).expand(z.shape[0], -1, -1)
        if lanes == 2:
            condition = torch.cat([condition, self._condition(None).expand(z.shape[0], -1, -1)])
        heads = self.position.shape[1] // self.head_width
        like = self.proj_in.weight
        cache = KeyValueCache(len(self.layers), lanes * z.shape[0], heads, z.shape[1], self.head_width, like)
        tokens = [z[:, :1]]
        for t in range(z.shape[1] - 1):
            token = tokens[-1].repeat(lanes, 1, 1).to(like)
            log_scale, mean = self._step(token, position[:, t : t + 1] + condition, cache)
            if lanes == 2:
                log_scale, mean = _guided(log_scale, guidance), _guided(mean, guidance)
            tokens.append(z[:, t + 1 : t + 2] * torch.exp(log_scale.to(z)) + mean.to(z))
        return self._order(torch.cat(tokens, dim=1))

    def _step(self, token: Tensor, offset: Tensor, cache: KeyValueCache) -> tuple[Tensor, Tensor]:
        """Log-scale and mean ``(B, 1, D)`` of the token that follows ``token``."""
        h = self.proj_in(token) + offset
        for index, layer in enumerate(self.layers):
            h = layer.step(h, cache, index)  # pyright: ignore[reportCallIssue]
        cache.length += 1
        log_scale, mean = self.proj_out(h).chunk(2, dim=-1)
        return log_scale, mean

    def _shifted_parameters(self, h: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters of token t come from tokens < t; token 0 gets zeros, hence stays as it is."""
        out = self.proj_out(h).to(like)
        out = torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], dim=1)
        log_scale, mean = out.chunk(2, dim=-1)
        return log_scale, mean

    def _order(self, tokens: Tensor) -> Tensor:
        return tokens.flip(dims=(1,)) if self.flip else tokens

    def _condition(self, y: Int[Tensor, " B"] | None) -> Tensor:
        """Class embedding ``(B or 1, 1, C)``; the mean over classes where the label is dropped."""
        if self.class_embedding is None:
            return self.position.new_zeros(1, 1, self.position.shape[1])
        dropped = self.class_embedding.mean(dim=0)[None, None]
        if y is None:
            return dropped
        chosen = self.class_embedding[y.clamp(min=0)][:, None]
        return torch.where(y[:, None, None] < 0, dropped, chosen)


def _guided(lanes: Tensor, guidance: float) -> Tensor:
    labelled, dropped = lanes.chunk(2)
    return labelled + guidance * (labelled - dropped)


class TarFlow(Flow):
    """A stack of `TarFlowBlock`, every second one reading the tokens back to front.

    Args:
        event_shape: ``(C, H, W)``; H and W must be multiples of ``patch_size``.
        num_classes: K, or None for an unconditional model.
        patch_size: side of a patch in pixels.
        width: C, width of every block, a multiple of ``head_width``.
        layers_per_block: transformer layers of each block, from data to noise.
        head_width: width of one attention head.
        dropout: dropout of the transformer layers.

    Raises:
        ValueError: when the image does not divide into patches.
    """

    def __init__(
        self,
        event_shape: tuple[int, int, int],
        num_classes: int | None,
        *,
        patch_size: int,
        width: int,
        layers_per_block: tuple[int, ...],
        head_width: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(event_shape, num_classes)
        channels, height, image_width = event_shape
        if height % patch_size or image_width % patch_size:
            raise ValueError(
                f"image height and width must be multiples of model.patch_size "
                f"(got {height}x{image_width} and {patch_size}); choose another patch size"
            )
        self.patch_size = patch_size
        num_tokens = (height // patch_size) * (image_width // patch_size)
        self.blocks = nn.ModuleList(
            TarFlowBlock(
                num_tokens=num_tokens,
                features=channels * patch_size**2,
                width=width,
                num_layers=num_layers,
                head_width=head_width,
                num_classes=num_classes,
                flip=index % 2 == 1,
                dropout=dropout,
            )
            for index, num_layers in enumerate(layers_per_block)
        )

    def forward(
        self, x: Float[Tensor, "B c H W"], y: Condition = None
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Data to noise: ``z (B, D)`` in token order and ``log_det (B,)`` in nats."""
        tokens = patchify(x, self.patch_size)
        log_det = tokens.new_zeros(len(tokens))
        for block in self.blocks:
            tokens, block_log_det = block(tokens, y)
            log_det = log_det + block_log_det
        return rearrange(tokens, "b t d -> b (t d)"), log_det

    def inverse(self, z: Float[Tensor, "B D"], y: Condition = None, guidance: float = 0.0) -> Float[Tensor, "B c H W"]:
        """Noise to data, exact token-by-token decoding; see `TarFlowBlock.inverse` for ``guidance``."""
        if guidance > 0 and self.num_classes is None:
            raise ValueError(f"guidance needs a class-conditional flow (got guidance={guidance}); set it to 0")
        features = self.event_shape[0] * self.patch_size**2
        tokens = rearrange(z, "b (t d) -> b t d", d=features)
        for block in reversed(self.blocks):
            tokens = block.inverse(tokens, y, guidance)  # pyright: ignore[reportCallIssue]
        return unpatchify(tokens, self.patch_size, self.event_shape[1])
