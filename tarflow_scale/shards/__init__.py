"""Data sets on disk: plain WebDataset tars with an index beside each and a manifest; the only user of webdataset."""
