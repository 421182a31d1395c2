"""TarFlow: a stack of autoregressive transformer blocks over image patches.

Zhai et al., "Normalizing Flows are Capable Generative Models", arXiv 2412.06329. An image is cut into T tokens of D
features. Each block predicts a log-scale and a mean for every token from the tokens before it:

    z_t = (x_t - mean_t) * exp(-log_scale_t),    log|det| = -sum_t sum_d log_scale_td        (their equation 5)

and each block reads the tokens in the reverse order of the previous block. Training processes all tokens at once;
sampling inverts a block token by token with a key/value cache. The volume-preserving variant predicts means only; after
the last block it divides each feature of each token by a learned deviation:

    z = u exp(-log_std),    log|det| = -sum log_std

Options give the flow of STARFlow (Gu et al., arXiv 2506.06276): blocks of different depths, the last of them deep and
perhaps wider; a learned start token before the first one, so that a block transforms its first token too; rotary
positions; the scale softplus(a + log(e - 1)) in place of exp(a), and bounded outputs; other norms and MLPs; grouped
queries; the condition as a token before all others, perhaps in the last block only; and the closed form of guidance.

Differences from the public code (apple/ml-tarflow): log_det is a sum in nats, not a mean per dimension. The
volume-preserving loss is the likelihood, and log_std is learned by gradient; the public code estimates the scale by a
moving average of z^2 and leaves its logarithm out of the loss. The output layer starts at exactly zero (the public one
has a random bias), so a new flow is the identity. Attention is causal by SDPA's ``is_causal``, not by a stored mask, so
it can skip half of the work. The cache is an argument, not module state. Log-scales may be bounded smoothly by
c tanh(a / c), as in STARFlow at high resolution. Layers may have dropout, for small data sets.

These parts are as published: the order of tokens and features (channel, row, column), the shift of outputs by one token
with an unchanged first token, the mean class embedding for dropped labels, and the rules of guidance.
`tarflow_scale.flows.ml_tarflow` reads the public weights. The options of STARFlow keep this order of features; its
public code (apple/ml-starflow) has the order (row, column, channel).

Shapes: B batch, T tokens, D features per token, C width, K classes.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from tarflow_scale.config.model import TarFlowConfig
from tarflow_scale.config.sampling import Guidance
from tarflow_scale.flows.attention import KeyValueCache, RMSNorm, TransformerLayer
from tarflow_scale.flows.conditions import Condition, embed
from tarflow_scale.flows.flow import Flow
from tarflow_scale.flows.guidance import guided
from tarflow_scale.flows.recompute import checkpoint
from tarflow_scale.flows.rotary import rotation

__all__ = ["TarFlow", "TarFlowBlock", "patchify", "unpatchify"]

_UNIT_SOFTPLUS = math.log(math.e - 1)
"""softplus of this is 1."""


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
        grid: number of rows and columns of tokens; T is their product.
        features: number of features D of a token.
        num_layers: number of transformer layers.
        num_classes: number of classes K, or None.
        flip: whether the block reads the tokens back to front.
        config: the section ``model``.
        width: number of channels C; None for ``config.width``.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        features: int,
        num_layers: int,
        num_classes: int | None,
        flip: bool,
        config: TarFlowConfig,
        width: int | None = None,
    ) -> None:
        super().__init__()
        width, self.grid, self.flip, self.config = width or config.width, grid, flip, config
        self.side = math.sqrt(math.prod(grid))
        """Square root of the number of tokens of a training image; see `tarflow_scale.flows.rotary`."""
        self.proj_in = nn.Linear(features, width)
        rotary, prefix = config.positions == "rotary", config.conditioning == "prefix"
        self.position = None if rotary else nn.Parameter(torch.randn(math.prod(grid), width) * 1e-2)
        rows = None if num_classes is None else num_classes + prefix
        self.class_embedding = None if rows is None else nn.Parameter(torch.randn(rows, width) * 1e-2)
        self.layers = nn.ModuleList(TransformerLayer(config, width) for _ in range(num_layers))
        self.final_norm = RMSNorm(width) if config.final_norm else None
        self.proj_out = nn.Linear(width, 2 * features if config.variant == "affine" else features)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        self.start_token = nn.Parameter(torch.randn(features)) if config.start_token else None

    @property
    def num_tokens(self) -> int:
        """Number of tokens T."""
        return math.prod(self.grid)

    @property
    def width(self) -> int:
        """Number of channels C."""
        return self.proj_in.out_features

    @property
    def has_prefix(self) -> bool:
        """Whether the condition is a token before all others."""
        return self.class_embedding is not None and self.config.conditioning == "prefix"

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
        log_scale, mean = self._predicted(x, y, recompute, twice)
        with torch.autocast(x.device.type, enabled=False):
            if log_scale is None:
                return self.order(x - mean), None
            return self.order((x - mean) * torch.exp(-log_scale)), self.order(log_scale)

    def _predicted(self, x: Tensor, y: Condition, recompute: bool, twice: bool) -> tuple[Tensor | None, Tensor]:
        """Log-scales and means of all tokens, each computed from the tokens before it."""
        read = x if self.start_token is None else self.after_start(x)[:, :-1]
        h = self.proj_in(read)
        h = h + (0.0 if self.position is None else self.order(self.position[None])) + self.condition(y)
        prefix, turn = self.prefix(y, len(x)), self.turn(h)
        if prefix is not None:
            h = torch.cat([prefix.to(h), h], dim=1)
        for layer in self.layers:
            h = checkpoint(layer, h, turn, twice) if recompute else layer(h, turn, twice)
        out = self.output(h if prefix is None else h[:, 1:]).to(x)
        if self.start_token is None:  # the outputs of a token belong to the next one; the first token has none
            out = torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], dim=1)
        return self.parameters_of(out)

    def inverse(
        self, z: Float[Tensor, "B T D"], y: Condition, guidance: Guidance | None = None
    ) -> Float[Tensor, "B T D"]:
        """Map noise to data, token by token; ``guidance`` is None unless it has an effect.

        The second prediction that guidance needs is computed in the same batch.
        """
        batch, z = len(z), self.order(z)
        guidance = guidance if self.follows(guidance) else None
        like = self.proj_in.weight
        offsets, prefix = self.offsets(y).expand(batch, -1, -1), self.prefix(y, batch)
        lanes, sharpness = 1, None
        if guidance is not None:
            lanes = 2
            offsets = torch.cat([offsets, self.offsets(None).expand(batch, -1, -1)])
            prefix = None if prefix is None else torch.cat([prefix, self.prefix(None, batch)])  # type: ignore[list-item]
            if guidance.attention_temperature != 1:
                sharpness = like.new_ones(2 * batch, 1, 1, 1)
                sharpness[batch:] /= guidance.attention_temperature
        layer = self.layers[0]
        assert isinstance(layer, TransformerLayer)
        size = self.num_tokens + self.has_prefix
        cache = KeyValueCache(len(self.layers), lanes * batch, layer.num_key_heads, size, layer.head_width, like)
        turn = self.turn(like)
        if prefix is not None:
            self._step(prefix.to(like), cache, sharpness, turn)
        noise = z if self.start_token is None else self.after_start(z)  # the noise of the start token is not used
        tokens, steps = [noise[:, :1]], noise.shape[1] - 1
        for t in range(steps):
            h = self.proj_in(tokens[-1].repeat(lanes, 1, 1).to(like)) + offsets[:, t : t + 1]
            out = self._step(h, cache, sharpness, turn)
            log_scale, mean = self.parameters_of(out[:batch])
            if guidance is not None:
                strength = guidance.scale * ((t + 1) / steps if guidance.annealed else 1.0)
                log_scale, mean = guided(log_scale, mean, *self.parameters_of(out[batch:]), strength, guidance)
            scale = 1.0 if log_scale is None else torch.exp(log_scale.to(z))
            tokens.append(noise[:, t + 1 : t + 2] * scale + mean.to(z))
        return self.order(torch.cat(tokens if self.start_token is None else tokens[1:], dim=1))

    def _step(self, h: Tensor, cache: KeyValueCache, sharpness: Tensor | None, turn: Tensor | None) -> Tensor:
        """Output ``(B, 1, D or 2 D)`` of the block for the next token ``h (B, 1, C)``, which joins the cache."""
        if turn is not None:
            turn = turn[:, cache.length : cache.length + 1]
        for index, layer in enumerate(self.layers):
            h = layer.step(h, cache, index, sharpness, turn)  # pyright: ignore[reportCallIssue]
        cache.length += 1
        return self.output(h)

    def output(self, h: Float[Tensor, "B t C"]) -> Float[Tensor, "B t E"]:
        """The output layer, after the final norm if there is one; E is D or 2 D."""
        return self.proj_out(h if self.final_norm is None else self.final_norm(h))

    def parameters_of(self, out: Tensor) -> tuple[Tensor | None, Tensor]:
        """Split an output, in the published order, into log-scale (None if the block preserves volume) and mean."""
        bound = self.config.output_bound
        if bound is not None:
            out = bound * torch.tanh(out / bound)
        if self.config.variant == "volume_preserving":
            return None, out
        log_scale, mean = out.chunk(2, dim=-1)
        bound = self.config.log_scale_bound
        if bound is not None:
            log_scale = bound * torch.tanh(log_scale / bound)
        return _log_softplus(log_scale + _UNIT_SOFTPLUS) if self.config.scale == "softplus" else log_scale, mean

    def order(self, tokens: Tensor) -> Tensor:
        """Put tokens ``(B, T, ...)`` into the order that this block reads; a second call restores the old order."""
        return tokens.flip(dims=(1,)) if self.flip else tokens

    def after_start(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B S D"]:
        """The start token, then all tokens: S = T + 1."""
        assert self.start_token is not None
        return torch.cat([self.start_token.to(tokens).expand(len(tokens), 1, -1), tokens], dim=1)

    def condition(self, y: Condition) -> Tensor:
        """Class embedding ``(B or 1, 1, C)`` to add to all tokens; the mean over classes for a dropped label."""
        if self.class_embedding is None or self.has_prefix:
            return self.proj_in.weight.new_zeros(1, 1, self.width)
        return embed(self.class_embedding, y)[:, None]

    def offsets(self, y: Condition) -> Tensor:
        """Sum of the position and condition embeddings ``(B or 1, T, C)``, in reading order."""
        condition = self.condition(y)
        if self.position is None:
            return condition.expand(-1, self.num_tokens, -1)
        return self.order(self.position[None]) + condition

    def prefix(self, y: Condition, batch: int) -> Float[Tensor, "B 1 C"] | None:
        """The token of the condition, if it is one; the last row of the table is for dropped labels."""
        if not self.has_prefix:
            return None
        table = self.class_embedding
        assert table is not None
        if y is None:
            return table[-1].expand(batch, 1, -1)
        if y.ndim == 2:
            return embed(table[:-1], y)[:, None]
        return table[torch.where(y < 0, len(table) - 1, y)][:, None]

    def turn(self, like: Tensor) -> Tensor | None:
        """`rotation` of the prefix and the places of the grid; None for learned positions.

        The k-th token that is read has the k-th place, also if the block reads the tokens back to front.
        """
        if self.position is not None:
            return None
        axis = self.config.conditioning == "prefix"
        turn = rotation(*self.grid, self.config.head_width, axis, self.side, like)
        return turn if self.has_prefix or not axis else turn[:, 1:]

    def follows(self, guidance: Guidance | None) -> bool:
        """Whether guidance affects this block; without a condition, only an attention temperature does."""
        return guidance is not None and (self.class_embedding is not None or guidance.attention_temperature != 1)


def _log_softplus(a: Tensor) -> Tensor:
    """log(softplus(a)); for very negative values softplus(a) is exp(a)."""
    return torch.where(a < -30, a, torch.log(F.softplus(a.clamp(min=-30))))


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
        self.config, self.patch_size = config, patch_size
        grid, features = (height // patch_size, width // patch_size), channels * patch_size**2
        volume = config.variant == "volume_preserving"
        self.log_std = nn.Parameter(torch.zeros(math.prod(grid), features)) if volume else None
        self.blocks = nn.ModuleList()
        for index, (num_layers, block_width) in enumerate(
            zip(config.layers_per_block, config.block_widths, strict=True)
        ):
            flip = (index % 2 == 1) == (config.first_order == "forward")
            classes = num_classes if config.has_condition(index) else None
            self.blocks.append(TarFlowBlock(grid, features, num_layers, classes, flip, config, block_width))

    def resized(self, height: int, width: int) -> "TarFlow":
        """The flow for images of another height and width, in pixels; it shares the weights of this one.

        Raises:
            ValueError: the flow has weights for each token, or the size is not a multiple of the patch size.
        """
        assert isinstance(self.config, TarFlowConfig)
        if self.log_std is not None or self.config.positions == "learned":
            raise ValueError(
                "images of another size need model.positions=rotary and variant=affine (got a weight for each token); "
                "train a model with rotary positions"
            )
        with torch.device("meta"):
            flow = TarFlow((self.event_shape[0], height, width), self.num_classes, self.config)
        flow.dequantizer = self.dequantizer  # `build` adds it, not the class
        flow.load_state_dict(self.state_dict(keep_vars=True), assign=True)
        for block, own in zip(flow.blocks, self.blocks, strict=True):
            block.side = own.side
        flow.num_conditions, flow.pixels, flow.class_names = self.num_conditions, self.pixels, self.class_names
        flow.latents, flow.renderer, flow.decoder = self.latents, self.renderer, None
        return flow.train(self.training)

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
