"""Data sets on disk: plain WebDataset tars, an index beside each, and a manifest; the only user of webdataset.

A data set is a folder (or URL): ``<name>.tar``, beside each ``<name>.index.npz`` (where samples start, and a checksum
of each), and ``manifest.json``, written last: without it there is no data set. Writing: `sources` reads images,
`packing` plans and packs them, `writer` makes one tar. Reading: `order` decides the order of samples, `reader` reads
ranges and checks every sample, `loader` feeds training and replaces corrupt samples, `mix` joins several sets.
`inspection` checks and describes a packed set; `duplicates` finds near copies, and `copies` keeps them out of training.
"""
