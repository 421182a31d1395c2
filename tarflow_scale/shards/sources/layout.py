"""The rules that find the splits and classes of image files in folders and zips.

1. Hidden files and files of operating systems are ignored. A folder that contains all other folders is skipped.
2. Splits come from the patterns of the configuration; else from the folders at the top (``train/cat/1.png``); else from
   the folders below the classes (``cat/train/1.png``); else from the file names, if all of them name a split
   (``train_1.png``). `splits` says which names mean a split.
3. Classes come from a label table (see `label_tables`), else from the first folder of a path that is neither skipped
   nor a split: ``cat`` in ``train/cat/images/1.png``. A folder such as ``images`` is not a class unless there are
   folders beside it.
4. An ambiguous layout is refused. The message names the setting that decides.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tarflow_scale.config.prepare import SourceConfig, SplitConfig
from tarflow_scale.errors import DataError
from tarflow_scale.shards.images import FILE_EXTENSIONS
from tarflow_scale.shards.sources import splits
from tarflow_scale.shards.sources.classes import classes_of_labels
from tarflow_scale.shards.sources.junk import junk_kind, sort_files
from tarflow_scale.shards.sources.label_tables import LabelTables
from tarflow_scale.shards.sources.split_choice import Group, settle

__all__ = ["ImageFiles", "lay_out"]

_EXTENSIONS = tuple(f".{extension}" for extension in FILE_EXTENSIONS)
_CONTAINERS = ("images", "image", "imgs", "img", "jpegimages", "jpegs", "jpg", "png", "data", "photos", "pictures")
"""Names of folders that contain the images of a split or class, but are not classes."""
_PARTS = (
    *_CONTAINERS,
    *("masks", "mask", "labels", "annotations", "segmentation", "groundtruth", "gt", "depth", "thumbs"),
)
"""Names of sibling folders that contain parts of the same samples, such as images and masks."""
_TWIN_ENDS = ("_mask", "_masks", "_seg", "_segmentation", "_label", "_gt", "_depth", "_thumb", "-mask", "-seg")


@dataclass
class _Image:
    """An image: its path, its split, and the parts of its path (folders and file name) that are not interpreted yet."""

    path: str
    role: splits.Role | None
    parts: list[str]


@dataclass(frozen=True)
class ImageFiles:
    """Splits and classes of the images of a source.

    Args:
        names: paths of the images that are packed, sorted.
        labels: label of each image, ``(n,)``; zeros if there are no classes.
        class_names: names of the classes, in the order of the labels; empty if there are no classes.
        official: split of each image, ``(n,)``; see `ImageSource`.
        lines: lines of text that are printed before packing.
        words: description of the split for the manifest; empty if the source has no splits.
        ignored: number of files that are not packed, by kind.
        by_table: whether the labels come from a table and not from the paths.
    """

    names: list[str]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    official: NDArray[np.int8] | None
    lines: tuple[str, ...]
    words: str
    ignored: Counter[str]
    by_table: bool


def lay_out(
    files: Sequence[str],
    read: Callable[[str], bytes],
    names_in: Callable[[str], Iterable[str]],
    config: SourceConfig,
    split: SplitConfig,
    where: str,
) -> ImageFiles:
    """Find the splits and classes of the images among ``files``.

    Args:
        files: paths of all files below the source, sorted.
        read: reads the file at a path.
        names_in: lists the names of the files and folders (including empty ones) in a folder.
        config: the label table, its column of labels, and the table of class names.
        split: the patterns, and whether splits are also recognized by name.
        where: path of the source, for messages.

    Raises:
        DataError: there are no images, the layout is ambiguous, or some images have no label.
    """
    names, ignored = sort_files(files, _EXTENSIONS)
    if not names:
        raise DataError(
            f"no images in {where} or its subfolders (looked for files that end in {', '.join(FILE_EXTENSIONS)}); "
            f"check source.path"
        )
    images = _decide(names, split, where)
    num_ignored = len(names) - len(images)
    lines = [f"left out by split.ignore: {splits.counted(num_ignored, 'image')}"] if num_ignored else []
    lines += _skip_top_folders(images)
    if split.by_name:
        lines += _recognize(images, where)
    groups = _groups(images, where)
    lines += _skip_folders_of_splits(images)
    if split.by_name and not groups:
        lines += splits.unread_lists([name for name in files if junk_kind(name) is None])
    tables = LabelTables(files, read, config, split, where)
    labels: dict[str, int | str | None] = {}
    for role in groups or [None]:
        members = [image for image in images if image.role == role]
        paths = [image.path for image in members]
        of_members = tables.labels_of(paths, flat=all(len(image.parts) == 1 for image in members))
        if of_members is None:
            of_members = _classes_of(members, split, where)
        labels |= dict(zip(paths, of_members, strict=True))
        if role is not None and of_members[0] is not None:
            groups[role].num_labelled = len(members)
    tables.check()
    settled = settle(groups, split)
    kept = [image for image in images if settled.keeps(image.role)]
    class_names, numbers = _numbered({image.path: labels[image.path] for image in kept}, config, where)
    lines += [*tables.lines, *settled.lines]
    if not class_names:
        lines.append("no classes: no class folders and no label table")
    elif len(class_names) == 1:
        lines.append(f"warning: only one class, {class_names[0]}; if it is not a class, set source.path to its folder")
    if class_names and not tables.used:
        ignored_folders = splits.Patterns(SplitConfig(ignore=split.ignore))
        lines += [*_deeper_folders(kept), *_empty_folders(kept, set(files), names_in, ignored_folders)]
    return ImageFiles(
        names=[image.path for image in kept],
        labels=numbers,
        class_names=class_names,
        official=settled.codes([image.role for image in kept]),
        lines=tuple(lines),
        words=settled.words,
        ignored=ignored,
        by_table=tables.used,
    )


def _decide(names: list[str], split: SplitConfig, where: str) -> list[_Image]:
    """The images that ``split.ignore`` does not match, with the splits that the other patterns assign to them."""
    patterns = splits.Patterns(split)
    images: list[_Image] = []
    for name in names:
        decision = patterns.decide(name) if patterns else None
        parts = name.split("/")
        if decision is None:
            images.append(_Image(name, None, parts))
        elif decision[0] != "ignore":
            depth = decision[1].count("/")
            if depth < len(parts) - 1:  # the folder of the split is not a class
                del parts[depth]
            images.append(_Image(name, decision[0], parts))
    patterns.check(where)
    if not images:
        raise DataError(f"split.ignore must not match all images (got all {len(names)} of {where}); narrow it")
    return images


def _common_top(images: list[_Image], below: int) -> str:
    """The top folder that contains all images; empty if there is none, or if any path has at most ``below`` parts."""
    tops = {image.parts[0] if len(image.parts) > below else "" for image in images}
    return tops.pop() if len(tops) == 1 else ""


def _skip_top_folders(images: list[_Image]) -> list[str]:
    """Drop top folders that contain all images and are not named after a split; returns a line about these folders."""
    dropped: list[str] = []
    while (top := _common_top(images, 2)) and splits.role_of(top) is None:
        dropped.append(top)
        for image in images:
            del image.parts[0]
    return [f"skipped the folder {'/'.join(dropped)}, which contains all images"] if dropped else []


def _recognize(images: list[_Image], where: str) -> list[str]:
    """Set the split of each image that no pattern matched, from its folders or its file name."""
    undecided = [image for image in images if image.role is None]
    lines: list[str] = []
    for level in (0, 1):
        if undecided and all(len(image.parts) > level + 1 for image in undecided):
            roles, warning = _level_roles(sorted({image.parts[level] for image in undecided}), where)
            lines += warning
            if roles:
                for image in undecided:
                    image.role = roles[image.parts.pop(level)]
                return lines
    _refuse_splits_among_classes(undecided, where)
    if len(undecided) == len(images):
        lines += _roles_by_file_name(undecided, where)
    return lines


def _level_roles(folders: list[str], where: str) -> tuple[dict[str, splits.Role], list[str]]:
    """The split that each sibling folder names (an empty dict if they are not splits), and a list of warnings."""
    roles = {name: splits.role_of(name) for name in folders}
    meant = {name: role for name, role in roles.items() if role is not None}
    exact = [name for name in meant if splits.looks_split(name)]
    both = {"train", "several"} & set(meant.values()) and {"test", "validation"} & set(meant.values())
    strong = exact or both
    pair = splits.paired(folders)
    if not strong and not pair:
        unclear = next((name for name in meant if len(folders) > 1), None)
        return {}, [f"warning: the folder {unclear} is used as a class (its name may mean a split)"] if unclear else []
    times = Counter(meant.values())
    same_rest = len({splits.other_words(name) for name in meant}) == 1
    if meant and len(meant) == len(folders) and max(times.values()) == 1 and same_rest and "several" not in times:
        return meant, []
    raise DataError(
        f"folders must all be splits, or all be classes (got {splits.named(folders, 6)} in {where}, where "
        f"{' and '.join(exact[:2] or list(meant)[:2] or pair or ())} may be splits); assign the folders with "
        f"split.train, split.test and split.ignore, or set split.by_name=false if they are classes"
    )


def _refuse_splits_among_classes(images: list[_Image], where: str) -> None:
    for image in images:
        folder = next((part for part in image.parts[:-1] if splits.looks_split(part)), None)
        if folder is not None:
            raise DataError(
                f"a folder with the name of a split must be a split (got {folder} in {image.path} of {where}, beside "
                f"or below folders that are not splits); assign the folders with split.train, split.test and "
                f"split.ignore, or set split.by_name=false if {folder} is a class"
            )


def _roles_by_file_name(images: list[_Image], where: str) -> list[str]:
    """Set the split of each image from its file name, if all file names mean a split."""
    roles = [splits.role_of(image.parts[-1].rpartition(".")[0], strong=True) for image in images]
    times = Counter(role for role in roles if role is not None)
    if "train" not in times or not times.keys() & {"test", "validation"}:
        return []
    if len(roles) == times.total() and "several" not in times:
        for image, role in zip(images, roles, strict=True):
            image.role = role
        return ["splits: from the file names"]
    shown = ", ".join(f"{count} {role}" for role, count in sorted(times.items()))
    if 2 * times.total() > len(roles):
        raise DataError(
            f"either all file names or none must mean a split (got {shown} of {len(roles)} in {where}); assign the "
            f"files with split.train, split.test and split.ignore, or set split.by_name=false"
        )
    return [f"warning: some file names may mean a split ({shown} of {len(roles)}); these names are ignored"]


def _groups(images: list[_Image], where: str) -> dict[splits.Role, Group]:
    """The folders and number of images of each split; empty if the source has no splits."""
    groups: dict[splits.Role, Group] = {}
    for image in images:
        if image.role is not None:
            groups.setdefault(image.role, Group()).num_images += 1
    if not groups:
        return {}
    undecided = next((image for image in images if image.role is None), None)
    if undecided is not None:
        raise DataError(
            f"either all images or none must belong to a split (got {undecided.path}, outside the splits of {where}); "
            f"assign it with split.train, split.validation, split.test or split.ignore"
        )
    for role, group in groups.items():
        dropped = {i.path.removesuffix("/".join(i.parts)).rstrip("/") or i.path for i in images if i.role == role}
        group.names = sorted(dropped)  # the folder of the split, and the folders above it
    return groups


def _skip_folders_of_splits(images: list[_Image]) -> list[str]:
    """Drop folders that hold all images of a split but are not classes, as in ``train/train/cat`` or ``val/images``."""
    dropped: set[str] = set()
    for role in {image.role for image in images}:
        members = [image for image in images if image.role == role]
        while (top := _common_top(members, 1)) and (
            top.lower() in _CONTAINERS or (role is not None and splits.role_of(top) == role)
        ):
            dropped.add(top)
            for image in members:
                del image.parts[0]
    if top := _common_top(images, 2):
        dropped.add(top)
        for image in images:
            del image.parts[0]
    return [f"skipped folders within the splits: {', '.join(sorted(dropped))}"] if dropped else []


def _classes_of(images: list[_Image], split: SplitConfig, where: str) -> list[str] | list[None]:
    """The class folder of every image, or None for every image if there are no class folders."""
    folders = [image.parts[0] if len(image.parts) > 1 else "" for image in images]
    classes = set(folders)
    _refuse_twins(images, where)
    if classes == {""}:
        return [None] * len(images)
    if "" in classes:
        stray = images[folders.index("")].path
        raise DataError(
            f"images must all be in class folders, or all in one folder (got {stray} beside class folders in {where}); "
            f"move it, or leave it out with split.ignore"
        )
    if len(classes) > 1 and all(name.lower() in _PARTS for name in classes):
        raise DataError(
            f"each class folder must be a class (got {', '.join(sorted(classes))} in {where}, which seem to hold parts "
            f"of the same samples); exclude all of them except the images with split.ignore"
        )
    below = {"/".join(image.parts[:2]) for image in images if len(image.parts) > 2}
    if len(classes) == 1 and len(below) > 1:
        raise DataError(
            f"all images of {where} are in one class folder, {classes.pop()}, but it has subfolders that may "
            f"be the classes ({', '.join(sorted(below)[:3])}); set source.path to the folder that contains the classes"
        )
    if split.by_name:
        _refuse_splits_among_classes(images, where)
        _refuse_classes_below(images, where)
    return folders


def _refuse_classes_below(images: list[_Image], where: str) -> None:
    """Refuse a subfolder name that occurs in two class folders or is also a class: classes may be one level lower."""
    above = {image.parts[0]: "" for image in images}
    for image in images:
        below = next((part for part in image.parts[1:-1] if part.lower() not in _CONTAINERS), None)
        if below not in (None, image.parts[0]) and above.setdefault(below, image.parts[0]) != image.parts[0]:
            other = f"in {above[below]}" if above[below] else "as a class"
            raise DataError(
                f"class folders must not share the names of their subfolders (got {below} {other} and in "
                f"{image.parts[0]} of {where}, so the class folders may be splits or domains); assign splits with "
                f"split.train and split.test, set source.path to one domain, or set split.by_name=false if they are "
                f"classes"
            )


def _refuse_twins(images: list[_Image], where: str) -> None:
    """Refuse sources where most images come in pairs, such as an image and its mask."""
    stems = Counter(image.path.rpartition(".")[0] for image in images)
    twins = sum(count for count in stems.values() if count > 1)
    masks = [stem for stem in stems for end in _TWIN_ENDS if stem.endswith(end) and stem.removesuffix(end) in stems]
    if 2 * twins < len(images) and 4 * len(masks) < len(images):
        return
    shown = masks[0] if masks else next(stem for stem, count in stems.items() if count > 1)
    raise DataError(
        f"an image must be one file (got two files for most images of {where}, such as {shown}; one may be a mask); "
        f"exclude the files that are not images, for example with "
        f'split.ignore=["*{"_mask.png" if masks else ".png"}"]'
    )


def _numbered(
    labels: dict[str, int | str | None], config: SourceConfig, where: str
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Compute the class names, and the class number of each image, from the label of each path."""
    missing = [path for path, label in labels.items() if label is None]
    if 0 < len(missing) < len(labels):
        raise DataError(
            f"either all images or none must have labels (got none for {missing[0]} of {where}); label or remove it"
        )
    values = list(labels.values())
    if any(isinstance(label, str) for label in values):
        values = [str(label) for label in values]
    if config.label_names is not None and all(str(label).isdigit() for label in values):
        values = [int(str(label)) for label in values]
    return classes_of_labels(values, config.label_names, where)


def _deeper_folders(images: list[_Image]) -> list[str]:
    """A line about folders below the class folders, which are not classes."""
    deeper = {"/".join(image.parts[:2]) for image in images if len(image.parts) > 2}
    deeper = [name for name in sorted(deeper) if name.rpartition("/")[2].lower() not in _CONTAINERS]
    if not deeper:
        return []
    number = splits.counted(len(deeper), "folder")
    return [f"folders below the class folders are not used as classes ({number}, such as {deeper[0]})"]


def _empty_folders(
    images: list[_Image], files: set[str], names_in: Callable[[str], Iterable[str]], ignored: splits.Patterns
) -> list[str]:
    """A warning about folders beside the class folders that contain no image."""
    classes: dict[str, set[str]] = {}
    for image in images:
        parts = image.path.split("/")
        depth = len(parts) - len(image.parts)
        depth -= parts[depth] != image.parts[0]  # a folder of a split below the class folder was removed
        classes.setdefault("/".join(parts[:depth]), set()).add(image.parts[0])
    known = {*_PARTS, *(name for names in classes.values() for name in names)}
    empty: list[str] = []
    for above in sorted(classes):
        for name in sorted(names_in(above)):
            path = f"{above}/{name}" if above else name
            is_known = path in files or not known.isdisjoint((name, name.lower()))
            if not is_known and junk_kind(path) is None and ignored.decide(path) is None:
                empty.append(path)
    if not empty:
        return []
    return [f"warning: {splits.counted(len(empty), 'class folder')} without an image: {splits.named(empty, 5)}"]
