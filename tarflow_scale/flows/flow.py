"""What users do with a model: densities, samples and pictures, on top of `tarflow_scale.flows.bijection`.

``log_prob`` and ``sample`` are the edge of the API and check values (`tarflow_scale.flows.inputs`). Several threads
may use a flow at once, as long as none of them changes it.
"""

from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tarflow_scale.config.sampling import Guidance
from tarflow_scale.flows.bijection import Bijection, Decode
from tarflow_scale.flows.conditions import Condition, GivenCondition, is_transformed
from tarflow_scale.flows.inputs import check_draws, check_stored, check_values
from tarflow_scale.flows.latents import latents
from tarflow_scale.flows.likelihood import quantize, rounding_of
from tarflow_scale.flows.logits import logit_log_dets, to_logits
from tarflow_scale.flows.normal import standard_normal_log_prob, standard_normal_nats
from tarflow_scale.runtime import console

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Decode", "Flow"]


class Flow(Bijection):
    """A normalizing flow: a `Bijection`, its density and its samples."""

    def rsample_and_log_prob(
        self, num: int, y: GivenCondition = None, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "B ..."], Float[Tensor, " B"]]:
        """Samples ``(num, *event)`` and their log densities ``(num,)`` in nats, through which gradients pass.

        Raises:
            ValueError: labels that do not fit this flow.
        """
        check_draws(num, generator=generator)
        reference = next(self.parameters())
        labels = self._checked_labels(y, num, reference.device)
        z = torch.randn(num, self.num_dims, generator=generator, dtype=reference.dtype).to(reference.device)
        x, log_det = self.inverse_and_log_det(z, labels)
        return x, standard_normal_log_prob(z) - log_det

    def log_prob(self, x: Tensor, y: GivenCondition = None) -> Float[Tensor, " B"]:
        """Log density of ``x (B, *event)``, in nats of the continuous density.

        It is differentiable, twice where ``x`` requires gradients, and works under `torch.vmap` and torch.func, where
        values are not checked. A continuous flow supports less and reports what it needs.

        Args:
            x: images on [-1, 1], or vectors, in the precision of the weights.
            y: labels ``(B,)``; one label, by number or name of the class, for all; a list of them; conditions
                ``(B, K)`` of a flow that is given numbers; or None, which drops labels.

        Raises:
            ValueError: data of another kind, shape or scale, values that are not finite, or labels that do not fit.
        """
        return self._log_prob(x, y, dequantize=False)

    def log_prob_of_images(self, x: Tensor, y: GivenCondition = None) -> Float[Tensor, " B"]:
        """Log density of images under uniform noise ``x (B, C, H, W)``, less log q of the noise if that is learned.

        Without a `dequantizer` it is `log_prob`. With one it is log p(x') - log q(u' | image), where x' is what becomes
        of ``x`` inside its bins. Either way the mean over noise bounds the log probability of the discrete image from
        below, and so does the logarithm of a mean over several draws; see `tarflow_scale.flows.likelihood`.

        Raises:
            ValueError: as `log_prob`, or a depth of pixels that is not known.
        """
        return self._log_prob(x, y, dequantize=True)

    def _log_prob(self, x: Tensor, y: GivenCondition, dequantize: bool) -> Tensor:
        labels = self.check_data(x, y)
        twice = is_transformed() or (torch.is_grad_enabled() and x.requires_grad)
        z, log_det = self(x, labels, dequantize=dequantize, twice=twice)
        log_prob = standard_normal_log_prob(z) + log_det
        once = not twice and log_prob.requires_grad and type(self).encode_twice is not Flow.encode_twice
        return _OneDerivative.apply(log_prob) if once else log_prob  # pyright: ignore[reportReturnType]

    def check_data(self, x: Tensor, y: GivenCondition) -> Condition:
        """Labels as a tensor.

        Raises:
            ValueError: see `log_prob`.
        """
        check_values(x, self.event_shape, next(self.parameters()), self.pixels, self.logit_alpha)
        return self._checked_labels(y, len(x), x.device)

    def _checked_labels(self, y: GivenCondition, num: int, device: torch.device) -> Condition:
        labels = self._labels(y, num, device)
        self.check_labels(labels, num)
        return labels

    @torch.no_grad()
    def nats_of_values(self, x: Tensor, y: GivenCondition = None, *, dequantize: bool = False) -> Tensor:
        """``-log_prob`` divided among the values of each event, in the shape of ``x``: each value's surprise.

        A value's part is the negative log density of its latent under a standard normal, less its own log-determinant.
        The sum over values is exact; the division depends on the model, and needs one in which values keep their
        places. Where a model mixes the values of a place, as `MultiScaleFlow` does, the part of the place is spread
        evenly over them. ``dequantize`` divides `log_prob_of_images` instead.

        Raises:
            ValueError: a model whose latents mix values.
        """
        labels = self.check_data(x, y)
        log_q: Tensor | float = 0.0
        if dequantize and self.dequantizer is not None:
            x, log_q = self.dequantizer(x, self._bit_depth())
        if self.logit_alpha is None:
            return log_q + self.nats_of_encoded(x, labels)
        h, _ = to_logits(x, self.logit_alpha)
        return log_q + self.nats_of_encoded(h, labels) - logit_log_dets(h, self.logit_alpha)

    def nats_of_encoded(self, h: Tensor, y: Condition) -> Tensor:
        """`nats_of_values` for an input of `encode`.

        Raises:
            ValueError: as `encode_values`.
        """
        z, log_dets = self.encode_values(h, y)
        return standard_normal_nats(z) - log_dets

    @torch.no_grad()
    def sample(
        self,
        num: int,
        y: GivenCondition = None,
        temperature: float = 1.0,
        guidance: Guidance | float | None = None,
        generator: torch.Generator | None = None,
        *,
        seed: int | None = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw ``num`` samples ``(num, *event)``, images on about [-1, 1]; `pictures` converts them to PIL images.

        Args:
            num: how many.
            y: as in `log_prob`.
            temperature: standard deviation of the latent; at 0 all samples are the image of the mean latent.
            guidance: a `Guidance`, or its scale.
            generator: of the latents.
            seed: draw sample i from (seed, i) alone, as the verb ``generate`` does, whatever ``num`` is.
            batch_size: samples decoded together; None for all.
            progress: show a bar.

        Raises:
            ValueError: labels or guidance that do not fit this flow, numbers out of their range, or both a seed and a
                generator.
        """
        check_draws(num, temperature, batch_size, seed, generator)
        if seed is not None and generator is not None:
            raise ValueError("latents come from a seed or from a generator (got both); leave one out")
        reference = next(self.parameters())
        labels = self._checked_labels(y, num, reference.device)
        way = Guidance(scale=float(guidance)) if isinstance(guidance, Real) else guidance
        if way is not None and not isinstance(way, Guidance):
            raise ValueError(f"guidance must be a Guidance, or its scale (got {way!r}); tarflow_scale.flows has it")
        if seed is None:
            z = torch.randn(num, self.num_dims, generator=generator, dtype=reference.dtype, device=reference.device)
        else:
            z = latents(int(seed), range(num), self.num_dims).to(reference)
        size = batch_size or max(1, num)
        parts: list[Tensor] = []
        with console.ProgressBar(num, "sample", enabled=progress) as bar:
            for low in range(0, num, size):
                part = z[low : low + size]
                of_part = None if labels is None else labels[low : low + size]
                decode = None if self.decoder is None else self.decoder(partial(_advance, bar, len(part)))
                parts.append(self.inverse(temperature * part, of_part, way, decode))
                if decode is None:
                    bar.update(len(part))
        return torch.cat(parts) if parts else z.new_empty(0, *self.event_shape)

    def stored(self, x: Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B C H W"]:
        """Images as stored pixels, quantised as the training noise asks.

        Raises:
            ValueError: when the flow does not know its pixel format; images of another shape, pixels, or values that
                are not finite.
        """
        check_stored(x, self.event_shape)
        if self.pixels is None or self.pixels.noise == "none":
            what = "does not know its pixel format; train or load it through the pipeline"
            raise ValueError(f"this flow {'is of vectors and has no pixels' if self.pixels else what}")
        return quantize(x, self.pixels.bit_depth, rounding_of(self.pixels))

    def pictures(self, x: Float[Tensor, "B C H W"]) -> "list[Image]":
        """Images as PIL images.

        Raises:
            ValueError: when the flow does not know its pixel format, or there are not 1 or 3 channels.
        """
        from PIL import Image

        levels = self.stored(x).permute(0, 2, 3, 1).cpu().numpy()
        if levels.shape[3] not in (1, 3):
            raise ValueError(f"pictures have 1 or 3 channels (got {levels.shape[3]}); use the tensor")
        return [Image.fromarray(one.squeeze(2) if one.shape[2] == 1 else one) for one in levels]

    def denoised(self, x: Tensor, y: Condition, noise_std: float, strength: float = 1.0) -> Tensor:
        """One step of Tweedie's formula, ``x + strength noise_std^2 grad log p(x)``.

        A flow trained on images plus N(0, noise_std^2) samples noisy images; at strength 1 this is the mean of the
        clean image given the noisy one (arXiv 2412.06329, section 3.3).
        """
        how, self._activations = self._activations, "keep"  # rebuilding would change the gradients of parameters
        try:
            with torch.inference_mode(False), torch.enable_grad():
                y = None if y is None else y.clone()  # tensors of inference mode have no gradients
                x = x.detach().clone().requires_grad_()
                z, log_det = self(x, y)
                (score,) = torch.autograd.grad((standard_normal_log_prob(z) + log_det).sum(), x)
        finally:
            self._activations = how
        return x.detach() + strength * noise_std**2 * score


class _OneDerivative(torch.autograd.Function):
    """The identity; it explains what to do, where torch would only report that a kernel has no second derivative."""

    @staticmethod
    def forward(ctx: Any, log_prob: Tensor) -> Tensor:
        del ctx
        return log_prob.view_as(log_prob)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        del ctx
        if torch.is_grad_enabled():  # with create_graph=True
            raise ValueError(
                "second derivatives of log_prob need images that require gradients (got none, and create_graph=True); "
                "call x.requires_grad_() first, also for derivatives by parameters"
            )
        return gradients[0]


def _advance(bar: Any, num: int, share: float) -> None:
    bar.update(num * share)
