"""Finds images that two splits share: under one path, by links of folders and files, and as copies."""

import os
from typing import NamedTuple

from dsyolo.data.index import DatasetIndex

_Content = tuple[bytes, bytes, bytes]


class SharedImages(NamedTuple):
    """How many images of `val` are files of `train`, how many others are most likely copies, and the first of either."""

    files: int
    copies: int
    first: str


class _File(NamedTuple):
    inode: tuple[int, int]
    name: str
    size: int


def shared_images(train: DatasetIndex, val: DatasetIndex) -> SharedImages:
    """Return what two splits share. Only images of the same labels and size are looked up on the disk."""
    paths = set(_real_paths(train))
    of_val = _real_paths(val)
    in_both = {i for i, path in enumerate(of_val) if path in paths}
    by_content: dict[_Content, list[int]] = {}
    wanted = {_content(val, i) for i in range(len(val)) if i not in in_both}
    for i in range(len(train)) if wanted else ():
        if (content := _content(train, i)) in wanted:
            by_content.setdefault(content, []).append(i)
    copies: list[str] = []
    seen = {content: _files(train, places) for content, places in by_content.items()}
    inodes = {content: {file.inode for file in files} for content, files in seen.items()}
    names = {content: {file[1:] for file in files} for content, files in seen.items()}
    for i in range(len(val)):
        content = _content(val, i)
        if i in in_both or content not in seen:
            continue
        for file in _files(val, [i]):
            if file.inode in inodes[content]:
                in_both.add(i)
            elif file[1:] in names[content]:
                copies.append(of_val[i])
    first = min((of_val[i] for i in in_both), default=min(copies, default=""))
    return SharedImages(len(in_both), len(copies), first)


def _content(index: DatasetIndex, i: int) -> _Content:
    labels = index.labels(i)
    return index.sizes_hw[i].tobytes(), labels.classes.tobytes(), labels.boxes_xyxy.tobytes()


def _files(index: DatasetIndex, places: list[int]) -> list[_File]:
    files = []
    for i in places:
        path = index.path(i)
        try:
            status = os.stat(path)
        except OSError:  # removed since it was read
            continue
        files.append(_File((status.st_dev, status.st_ino), os.path.basename(path), status.st_size))
    return files


def _real_paths(index: DatasetIndex) -> list[str]:
    """Return the paths of images with the links of folders resolved, each folder once."""
    real: dict[str, str] = {}
    paths = []
    for i in range(len(index)):
        folder, name = os.path.split(index.path(i))
        if folder not in real:
            real[folder] = os.path.realpath(folder)
        paths.append(os.path.join(real[folder], name))
    return paths
