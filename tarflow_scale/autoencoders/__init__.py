"""Autoencoders, on whose latents flows reach high resolutions; the only user of diffusers.

`contract` is what they have in common. `tiny` is taef2, `diffusers_kl` any ``AutoencoderKL``, `convolutional` is
trained here. `pixels_given_latent` has log p(x | z). `stored` reads and writes their files, and `rendering` turns the
latents that a flow draws into images.
"""
