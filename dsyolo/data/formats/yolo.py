"""The YOLO data format: `data.yaml`, images, and one label file per image.

labels.py reads the label files; `Labels`, `Problem` and `read_labels` are exported here too.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from dsyolo.base.errors import UserError
from dsyolo.base.safe_io import BadYamlError, parse_yaml, read_text, shortened
from dsyolo.config.spec import DataSpec
from dsyolo.data.labels import Labels, Problem, read_labels

__all__ = [
    "DataSpec",
    "Labels",
    "Problem",
    "label_path",
    "list_images",
    "read_data_yaml",
    "read_labels",
]

# Folders are searched for these. OpenCV may not read all of them: building the index reports those, instead of
# skipping them silently.
IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".dng", ".gif", ".heic", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"}
    | {".pfm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
SPLITS = ("train", "val", "test")
MOST_CLASSES = 100_000
MOST_PATH = 4096  # characters: no system opens longer ones
MOST_LIST_BYTES = 1 << 30  # ten million images


# ---- data.yaml


def read_data_yaml(path: str | Path, required: Sequence[str] = ("train", "val")) -> DataSpec:
    """Read and check a `data.yaml`. A `download:` key is ignored.

    `path:` is relative to the file's folder, else to the working directory; the splits are relative to `path:`.
    A split is None if it is not required and its folder is missing.

    Raises:
        UserError: no such file, no YAML, missing keys or folders, gaps in `names`, an `nc` that disagrees.
    """
    path = Path(path)
    headline = f"{path} cannot be used as a data set"
    given = _load_mapping(path, headline)
    problems: list[str] = []
    names = _names(given, problems)
    root = _root(path, given, problems)
    splits: dict[str, tuple[Path, ...] | None] = {}
    for split in SPLITS:
        splits[split] = _split(split, given, path, root, split in required, problems)
    if problems:
        raise UserError(headline, problems)
    return DataSpec(path=path, names=names, **splits)


def _load_mapping(path: Path, headline: str) -> dict[str, Any]:
    try:
        given = parse_yaml(read_text(path))
    except FileNotFoundError:
        beside = (
            sorted(p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml"))
            if path.parent.is_dir()
            else []
        )
        hint = difflib.get_close_matches(path.name, beside, 1, 0.4) or beside[:1]
        remedy = (
            f"Did you mean {path.parent / hint[0]}?"
            if hint
            else "`dsyolo sample DST` draws a data set to try."
        )
        raise UserError(headline, [f"no such file (working directory {Path.cwd()}). {remedy}"]) from None
    except BadYamlError as error:
        raise UserError(headline, [str(error)]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            headline, [f"cannot be read: {getattr(error, 'strerror', None) or error}."]
        ) from error
    if not isinstance(given, dict):
        kind = "empty" if given is None else f"a {type(given).__name__}"
        raise UserError(headline, [f"{kind}, but it must map keys to values: train, val and names."])
    return {str(key): value for key, value in given.items()}


def _missing_key(key: str, given: dict[str, Any], what: str) -> str:
    others = [k for k in given if k not in (*SPLITS, "names", "nc", "path", "download")]
    close = difflib.get_close_matches(key, others, 1, 0.5)
    return f"{key}: missing. " + (f"Did you mean it by `{close[0]}`?" if close else what)


def _names(given: dict[str, Any], problems: list[str]) -> tuple[str, ...]:
    names, num_given = given.get("names"), given.get("nc")
    if num_given is not None and (
        isinstance(num_given, bool) or not isinstance(num_given, int) or not 1 <= num_given <= MOST_CLASSES
    ):
        rule = f"It is the number of classes, 1 to {MOST_CLASSES:,}; or leave it out."
        problems.append(f"nc: {shortened(repr(num_given))} given. {rule}")
        num_given = None
    if names is None:
        if num_given is not None and "names" not in given:
            return tuple(f"class{i}" for i in range(num_given))
        problems.append(_missing_key("names", given, "Give the classes as a list or as a map `0: cat`."))
        return ()
    if isinstance(names, dict):
        if not all(isinstance(k, int) and not isinstance(k, bool) for k in names):
            problems.append(f"names: keys must be whole numbers from 0, {list(names)[:5]} given.")
            return ()
        gaps = list(islice((k for k in range(max(names, default=-1)) if k not in names), 5))
        if gaps or any(k < 0 for k in names):
            problems.append(
                f"names: must number its {len(names)} classes 0 to {len(names) - 1}, but "
                + (f"{', '.join(map(str, gaps))} missing." if gaps else "a key is negative.")
            )
            return ()
        names = [names[k] for k in sorted(names)]
    if (
        not isinstance(names, list)
        or not names
        or any(isinstance(n, (dict, list)) or n is None for n in names)
    ):
        rule = "Give at least one class, as a list or as a map `0: cat`."
        problems.append(f"names: {shortened(repr(names))} given. {rule}")
        return ()
    if len(names) > MOST_CLASSES:
        problems.append(f"names: {len(names):,} classes given, and {MOST_CLASSES:,} is the most.")
        return ()
    if any(isinstance(name, bool) for name in names):
        rule = "YAML takes yes, no, on, off, true and false for these. Put the names in quotes"
        problems.append(
            f"names: {' and '.join({str(n): 0 for n in names if isinstance(n, bool)})} given. {rule}."
        )
    elif repeated := [name for name, count in Counter(map(str, names)).items() if count > 1]:
        problems.append(f"names: {', '.join(repeated)} given more than once. Rename or merge them.")
    if num_given is not None and num_given != len(names):
        problems.append(
            f"nc: {num_given} given, but names has {len(names)}. Correct one of them, or leave nc out."
        )
    return tuple(str(name) for name in names)


def _root(path: Path, given: dict[str, Any], problems: list[str]) -> Path:
    root = given.get("path") or "."
    if not isinstance(root, str) or len(root) > MOST_PATH:
        problems.append(
            f"path: {shortened(repr(root))} given. It is the folder that train and val are relative to."
        )
        return path.parent
    candidates = [path.parent / Path(root).expanduser(), Path(root).expanduser()]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    problems.append(f"path: {root} given, but there is no such folder: tried {_listed(candidates)}.")
    return candidates[0]


def _split(
    split: str, given: dict[str, Any], path: Path, root: Path, required: bool, problems: list[str]
) -> tuple[Path, ...] | None:
    entries = given.get(split)
    if not entries:
        if required:
            problems.append(
                _missing_key(split, given, "Give a folder of images, a list file, or a list of such.")
            )
        return None
    entries = entries if isinstance(entries, list) else [entries]
    found: list[Path] = []
    missing: list[str] = []
    for entry in map(str, entries):
        if len(entry) > MOST_PATH:
            missing.append(f"{split}: {shortened(entry)} is longer than any path.")
            continue
        # Exported data sets often have `../train/images` for the folder beside the file.
        candidates = [root / entry, *([root / entry[3:]] if entry.startswith("../") else []), Path(entry)]
        here = next((c for c in candidates if c.exists()), None)
        if here is None:
            near = _near(root / entry)
            missing.append(f"{split}: {entry} does not exist: tried {_listed(candidates)}." + near)
        elif not here.is_dir() and not here.is_file():
            missing.append(
                f"{split}: {entry} is a device or pipe, but only folders and .txt lists of images can be given."
            )
        elif here.is_file() and here.suffix != ".txt":
            missing.append(
                f"{split}: {entry} is a file, but only folders and .txt lists of images can be given."
            )
        else:
            found.append(here)
    if not required and missing:
        return None
    problems.extend(missing)
    return tuple(found)


def _near(path: Path) -> str:
    """Return a did-you-mean for the deepest part of `path` that does not exist."""
    while not path.parent.exists() and path.parent != path:
        path = path.parent
    try:
        close = difflib.get_close_matches(path.name, os.listdir(path.parent), 1, 0.5)
    except OSError:
        close = []
    return f" Did you mean {path.parent / close[0]}?" if close else ""


def _listed(paths: Iterable[Path]) -> str:
    return ", ".join(dict.fromkeys(str(p) for p in paths))


# ---- images and where their labels are


def list_images(sources: Iterable[str | Path]) -> list[Path]:
    """List the images of folders (recursively), of list files, and those named, in order, repeats included.

    In a list file `./` means the list's folder; other relative paths are tried from the working directory, then
    from the list's folder. Listed files need not exist: building the index reports them.

    Raises:
        UserError: a source that does not exist or cannot be read, or no image in any of them.
    """
    sources = [Path(source) for source in sources]
    images: list[Path] = []
    problems: list[str] = []
    for source in sources:
        if source.is_dir():
            images += _walk(source)
        elif source.is_file() and source.suffix.lower() in IMAGE_SUFFIXES:
            images.append(source)
        elif source.is_file():
            try:
                images += _listed_images(source)
            except (OSError, UnicodeDecodeError) as error:
                problems.append(f"{source}: cannot be read as a list of images: {shortened(str(error))}")
        else:
            problems.append(f"{source}: no such folder, image or list file.{_near(source)}")
    if not problems and not images:
        problems = [
            f"{source}: no image in it (looked for {' '.join(sorted(IMAGE_SUFFIXES))})." for source in sources
        ]
    if problems:
        raise UserError("No images to read", problems)
    return images


def _walk(folder: Path) -> list[Path]:
    images: list[Path] = []
    seen: set[str] = set()  # real paths, so that a link to a parent folder does not loop
    for top, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(top)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        # macOS leaves `._name.jpg` beside `name.jpg`, which is no image.
        images += [
            Path(top, name)
            for name in sorted(files)
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    return images


def _listed_images(list_file: Path) -> list[Path]:
    images: list[Path] = []
    for line in read_text(list_file, MOST_LIST_BYTES).splitlines():
        line = line.strip()
        if not line:
            continue
        path = Path(line)
        if line.startswith("./") or not (path.is_absolute() or path.exists()):
            path = list_file.parent / path
        images.append(path)
    return images


def label_path(image: str | Path) -> Path:
    """Return the label file of an image: the last folder `images` of its path replaced by `labels`, ending in .txt."""
    # On strings: Path would take most of the time of loading a cached index.
    folder, name = os.path.split(os.fspath(image))
    before, images, after = f"{os.sep}{folder}{os.sep}".rpartition(f"{os.sep}images{os.sep}")
    if images:
        folder = f"{before}{os.sep}labels{os.sep}{after}"[1:]
    return Path(folder, os.path.splitext(name)[0] + ".txt")
