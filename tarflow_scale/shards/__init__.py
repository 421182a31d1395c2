"""Data sets on disk: plain WebDataset tars, an index beside each, and a manifest; the only user of webdataset.

A data set is a folder (or URL) of ``<name>.tar``, an index ``<name>.index.npz`` for each (offsets and checksums of
samples), and ``manifest.json``, which is written last: a folder without it is not a data set. Writing: `sources` opens
images, `packing` cuts them into shards and packs these, `writer` writes one tar. Reading: `order` defines the order of
samples, `reader` reads ranges and verifies every sample, `loader` feeds training and replaces corrupt samples, `mix`
joins several data sets. `inspection` prints a packed data set; `duplicates` finds near copies, and `copies` keeps them
out of training.
"""
