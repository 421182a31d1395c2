"""Files at a local path or a URL: read, list, write atomically, create if absent. Only this package imports fsspec.

A location is a local path or an fsspec URL (``s3://bucket/run``). A reader never sees an incomplete file: a local file
is written under a temporary name, flushed to disk and renamed; an object store shows an object only after its upload
is complete. If several writers call `create` for the same file, exactly one of them succeeds.
"""

from tarflow_scale.storage.files import (
    copy_file,
    create,
    digest,
    local_copy,
    modified_seconds,
    open_seekable,
    read_bytes,
    read_if_there,
    read_many,
    read_range,
    remove,
    retrying,
    size_bytes,
    write_bytes,
    writing,
)
from tarflow_scale.storage.folders import (
    FoundFile,
    exists,
    is_folder,
    list_names,
    list_sizes,
    make_folder,
    remove_abandoned,
    remove_tree,
    share,
    walk,
)
from tarflow_scale.storage.paths import PARTIAL, base_name, described, explained, group_of, is_remote, join, local

__all__ = [
    "PARTIAL",
    "FoundFile",
    "base_name",
    "copy_file",
    "create",
    "described",
    "digest",
    "exists",
    "explained",
    "group_of",
    "is_folder",
    "is_remote",
    "join",
    "list_names",
    "list_sizes",
    "local",
    "local_copy",
    "make_folder",
    "modified_seconds",
    "open_seekable",
    "read_bytes",
    "read_if_there",
    "read_many",
    "read_range",
    "remove",
    "remove_abandoned",
    "remove_tree",
    "retrying",
    "share",
    "size_bytes",
    "walk",
    "write_bytes",
    "writing",
]
