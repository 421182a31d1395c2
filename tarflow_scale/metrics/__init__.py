"""Metrics of images and likelihoods, which are stored with their protocol; the only user of torch-fidelity.

`features` computes features of images, and `parts` stores features and likelihoods as mergeable parts on disk.
`measure`, `frechet`, `kernel`, `manifold`, `inception_score`, `bits` and `jackknife` compute numbers and their errors
from parts. `reference` binds a protocol to its reference images, which determine its id (`protocol_id`). Parts are
written atomically, so an evaluation that was killed computes only the missing parts.
"""
