"""`Flow`, the class that users call: it adds densities, samples and pictures to `tarflow_scale.flows.bijection`.

``log_prob`` and ``sample`` check the values of their arguments (`tarflow_scale.flows.inputs`). Several threads may use
a flow at the same time if none of them changes it.
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
    """A normalizing flow: a `Bijection` that can also compute densities and draw samples."""

    def rsample_and_log_prob(
        self, num: int, y: GivenCondition = None, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "B ..."], Float[Tensor, " B"]]:
        """Differentiable samples ``(num, *event)`` and their log densities ``(num,)`` in nats.

        Raises:
            ValueError: the labels do not fit this flow.
        """
        check_draws(num, generator=generator)
        reference = next(self.parameters())
        labels = self._checked_labels(y, num, reference.device)
        z = torch.randn(num, self.num_dims, generator=generator, dtype=reference.dtype).to(reference.device)
        x, log_det = self.inverse_and_log_det(z, labels)
        return x, standard_normal_log_prob(z) - log_det

    def log_prob(self, x: Tensor, y: GivenCondition = None) -> Float[Tensor, " B"]:
        """Log of the continuous density at ``x (B, *event)``, in nats.

        It is differentiable, and twice differentiable if ``x`` requires gradients. It works under `torch.vmap` and
        torch.func, but values are not checked there. The model `Continuous` does not support all of this; its error
        messages say what to change.

        Args:
            x: images on [-1, 1], or vectors, in the precision of the weights.
            y: labels ``(B,)``; one class for all, by number or name; a list of classes; conditions ``(B, K)`` for a
                flow that is conditioned on numbers; or None, which drops the labels.

        Raises:
            ValueError: the type, shape or scale of the data is wrong, a value is not finite, or the labels do not fit.
        """
        return self._log_prob(x, y, dequantize=False)

    def log_prob_of_images(self, x: Tensor, y: GivenCondition = None) -> Float[Tensor, " B"]:
        """Log density ``(B,)`` in nats of images with uniform noise ``x (B, C, H, W)``, minus log q of learned noise.

        Without a `dequantizer` the result equals `log_prob`. A dequantizer maps ``x`` to x' inside the same bins, and
        the result is log p(x') - log q(u' | image). For n-bit data, the mean of the result over noise, minus
        D (n - 1) ln 2, is a lower bound of the log probability of the discrete image. The logarithm of the mean density
        over several draws of noise, minus the same constant, is another bound; see `tarflow_scale.flows.likelihood`.

        Raises:
            ValueError: see `log_prob`; or the flow has a dequantizer, but the bit depth of pixels is unknown.
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
        """Check data and labels; return the labels as a tensor.

        Raises:
            ValueError: see `log_prob`.
        """
        pixels = self.pixels if self.latents is None else None
        check_values(x, self.event_shape, next(self.parameters()), pixels, self.logit_alpha)
        return self._checked_labels(y, len(x), x.device)

    def _checked_labels(self, y: GivenCondition, num: int, device: torch.device) -> Condition:
        labels = self._labels(y, num, device)
        self.check_labels(labels, num)
        return labels

    @torch.no_grad()
    def nats_of_values(self, x: Tensor, y: GivenCondition = None, *, dequantize: bool = False) -> Tensor:
        """The surprise of each value, in the shape of ``x``: its contribution to ``-log_prob`` in nats.

        The contribution is the negative log density of the value's latent under a standard normal, minus the value's
        log-determinant. The contributions add up to ``-log_prob`` exactly; how the total is divided among the values
        depends on the model. The model must map each value to one latent. `MultiScaleFlow` does not, but is supported:
        it mixes the values of a square of pixels, so these values get equal shares. With ``dequantize``, the sum is
        ``-log_prob_of_images``.

        Raises:
            ValueError: see `log_prob`; or this model does not map each value to one latent.
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
        """Compute `nats_of_values` for ``h``, the input of `encode`.

        Raises:
            ValueError: see `encode_values`.
        """
        z, log_dets = self.encode_values(h, y)
        return standard_normal_nats(z) - log_dets

    @property
    def shown_shape(self) -> tuple[int, ...]:
        """Shape of a sample: of an image if a `renderer` turns events into images, else of an event."""
        return self.event_shape if self.renderer is None else self.renderer.image_shape(self.event_shape)

    def shown(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """Events as samples: latents as images if there is a `renderer`, other events unchanged."""
        return x if self.renderer is None else self.renderer(x)

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
        """Draw ``num`` samples ``(num, *event)``.

        Image values are roughly in [-1, 1]; `pictures` converts them to PIL images.

        A flow on latents that has a `renderer` draws images, too.

        Args:
            num: number of samples.
            y: see `log_prob`.
            temperature: standard deviation of the latents; at 0 all latents are 0, the mean.
            guidance: a `Guidance`, or only its scale.
            generator: random generator of the latents.
            seed: if given, sample i depends only on (seed, i), not on ``num``, as in the verb ``generate``.
            batch_size: number of samples decoded together; None decodes all together.
            progress: whether to show a progress bar.

        Raises:
            ValueError: labels or guidance do not fit this flow, a number is out of range, or both a seed and a
                generator are given.
        """
        check_draws(num, temperature, batch_size, seed, generator)
        if seed is not None and generator is not None:
            raise ValueError("seed and generator must not be passed together (got both); pass one of them")
        reference = next(self.parameters())
        labels = self._checked_labels(y, num, reference.device)
        if isinstance(guidance, Real):
            guidance = Guidance(scale=float(guidance))
        if guidance is not None and not isinstance(guidance, Guidance):
            raise ValueError(f"guidance must be a tarflow_scale.flows.Guidance or a number (got {guidance!r})")
        if seed is None:
            z = torch.randn(num, self.num_dims, generator=generator, dtype=reference.dtype, device=reference.device)
        else:
            z = latents(int(seed), range(num), self.num_dims).to(reference)
        size = batch_size or max(1, num)
        samples: list[Tensor] = []
        with console.ProgressBar(num, "sample", enabled=progress) as bar:
            for low in range(0, num, size):
                part = z[low : low + size]
                labels_of_part = None if labels is None else labels[low : low + size]
                decode = None if self.decoder is None else self.decoder(partial(_advance, bar, len(part)))
                samples.append(self.shown(self.inverse(temperature * part, labels_of_part, guidance, decode)))
                if decode is None:
                    bar.update(len(part))
        return torch.cat(samples) if samples else z.new_empty(0, *self.shown_shape)

    def stored(self, x: Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B C H W"]:
        """Convert images to stored pixels, with the rounding that inverts the training noise.

        Raises:
            ValueError: the flow has no pixel format, the images have the wrong shape or are already pixels, or a value
                is not finite.
        """
        check_stored(x, self.shown_shape)
        if self.latents is not None and self.renderer is None:
            raise ValueError("this flow is of latents and has no autoencoder; load it with tarflow_scale.load")
        if self.pixels is None or self.pixels.noise == "none":
            unknown = "has no pixel format; train it with tarflow-scale, or load it with tarflow_scale.load"
            raise ValueError(f"this flow {'models vectors, which have no pixels' if self.pixels else unknown}")
        return quantize(x, self.pixels.bit_depth, rounding_of(self.pixels))

    def pictures(self, x: Float[Tensor, "B C H W"]) -> "list[Image]":
        """Convert images to PIL images.

        Raises:
            ValueError: see `stored`; or the number of channels is not 1 or 3.
        """
        from PIL import Image

        levels = self.stored(x).permute(0, 2, 3, 1).cpu().numpy()
        if levels.shape[3] not in (1, 3):
            raise ValueError(f"pictures must have 1 or 3 channels (got {levels.shape[3]}); use flow.stored(x)")
        return [Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image) for image in levels]

    def denoised(self, x: Tensor, y: Condition, noise_std: float, strength: float = 1.0) -> Tensor:
        """Denoise images by one step of Tweedie's formula, ``x + strength * noise_std^2 * grad log p(x)``.

        A flow that was trained with noise N(0, noise_std^2) samples noisy images. At strength 1, the result is the mean
        of the clean image given the noisy one (arXiv 2412.06329, section 3.3).
        """
        kept, self._activations = self._activations, "keep"  # rebuilding would change the gradients of parameters
        try:
            with torch.inference_mode(False), torch.enable_grad():
                y = None if y is None else y.clone()  # tensors of inference mode have no gradients
                x = x.detach().clone().requires_grad_()
                z, log_det = self(x, y)
                (score,) = torch.autograd.grad((standard_normal_log_prob(z) + log_det).sum(), x)
        finally:
            self._activations = kept
        return x.detach() + strength * noise_std**2 * score


class _OneDerivative(torch.autograd.Function):
    """The identity, but second derivatives raise an error that says what to do; torch's error only names a kernel."""

    @staticmethod
    def forward(ctx: Any, log_prob: Tensor) -> Tensor:
        del ctx
        return log_prob.view_as(log_prob)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        del ctx
        if torch.is_grad_enabled():  # with create_graph=True
            raise ValueError(
                "second derivatives of log_prob need x.requires_grad=True (got False, and create_graph=True); call "
                "x.requires_grad_() before log_prob, also for derivatives with respect to parameters"
            )
        return gradients[0]


def _advance(bar: Any, num: int, share: float) -> None:
    bar.update(num * share)
