"""Metrics of images and likelihoods, stored with their protocol; the only user of torch-fidelity.

`features` turns images into features, `parts` stores features and likelihoods as mergeable parts on disk; `measure`,
`frechet`, `kernel`, `manifold`, `inception_score`, `bits` and `jackknife` compute numbers with errors from parts.
`reference` binds a protocol to its reference images, which determine its id (`protocol_id`). Parts are written
atomically, so an evaluation that was killed only computes the missing ones.
"""
