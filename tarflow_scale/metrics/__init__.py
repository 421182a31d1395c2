"""Images and likelihoods to numbers that carry their protocol; the only user of torch-fidelity.

Images become features (`features`), features and likelihoods mergeable parts on disk (`store`), parts numbers with
errors (`measure`, `frechet`, `kernel`, `manifold`, `inception_score`, `bits`, `jackknife`), and `reference` binds a
protocol to the images that it compares with, which gives it its id. Parts are written whole or not at all, so an
evaluation that was killed makes only those that are missing.
"""
