"""Metrics of images and likelihoods. Every result is stored with its protocol. Only this package uses torch-fidelity.

`features` computes features of images, and `parts` stores features and likelihoods as mergeable parts on disk.
`measure`, `frechet`, `kernel`, `manifold`, `inception_score`, `bits` and `jackknife` compute metrics and their errors
from parts. `reference` binds a protocol to its reference images, and `protocol_id` computes the id of this pair. Parts
are written atomically. If an evaluation was killed, its next start computes only the missing parts.
"""
