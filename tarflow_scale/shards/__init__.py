"""Data sets on disk: WebDataset tars, an index beside each tar, and a manifest. Only this package uses webdataset.

A data set is a folder (or URL) of shards ``<name>.tar``. Beside each shard is its index ``<name>.index.npz``, which has
the offset and a checksum of every sample. ``manifest.json`` is written last; a folder without it is not a data set.

* Writing: `sources` reads images, `packing` packs them shard by shard, `writer` makes one tar.
* Reading: `order` sets the order of samples, `reader` reads ranges and checks every sample, `loader` feeds training and
  replaces corrupt samples, `mix` joins data sets.
* Inspection: `inspection` checks and describes a packed data set, `duplicates` finds near copies, `copies` reports them
  or drops them from training.
"""
