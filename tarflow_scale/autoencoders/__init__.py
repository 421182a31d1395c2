"""Autoencoders, on whose latents flows reach high resolutions; the only user of diffusers.

`autoencoder` is what they have in common. `tiny` is taef2, `diffusers_kl` any ``AutoencoderKL``, `convolutional` is
trained here. `likelihood` has log p(x | z), `weights` the files.
"""
