"""The YOLO data format: `data.yaml`, images, and one label file per image.

labels.py reads the label files.
"""

import difflib
import errno
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from dsyolo.base.errors import UserError
from dsyolo.base.safe_io import BadYamlError, parse_yaml, read_bytes, read_text, shortened
from dsyolo.base.text import decode_names, name_fault, on_disk
from dsyolo.config.spec import DataSpec
from dsyolo.data.formats.image_finder import as_posix
from dsyolo.data.formats.path_hints import escapes, images_beside, near, spellings, tried, unusable

# Folders are searched for these. OpenCV may not read all of them: building the index reports those, instead of
# skipping them silently.
IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".dng", ".gif", ".heic", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"}
    | {".pfm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
SPLITS = ("train", "val", "test")
MOST_CLASSES = 100_000
MOST_KEYPOINTS = 10_000
MOST_PATH = 4096  # characters: no system opens longer ones
MOST_FAULTS = 5  # names of classes that are listed
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
    splits = {split: _split(split, given, root, split in required, problems) for split in SPLITS}
    num_values = _num_keypoint_values(given.get("kpt_shape"), problems)
    if problems:
        raise UserError(headline, problems)
    return DataSpec(path=path, names=names, num_keypoint_values=num_values, **splits)


def _num_keypoint_values(shape: Any, problems: list[str]) -> int:
    """Return how many numbers a row of a pose data set has behind its box: [N, D] are N keypoints of D numbers."""
    if shape is None:
        return 0
    if (
        isinstance(shape, list)
        and [type(side) for side in shape] == [int, int]
        and 0 < shape[0] <= MOST_KEYPOINTS
        and shape[1] in (2, 3)
    ):
        return int(shape[0] * shape[1])
    rule = (
        "it must be the number of keypoints, and 2 or 3 for the numbers of each. Correct it or leave it out."
    )
    problems.append(f"kpt_shape: {shortened(repr(shape))} given, but {rule}")
    return 0


def _load_mapping(path: Path, headline: str) -> dict[str, Any]:
    try:
        given = parse_yaml(read_text(path))
    except FileNotFoundError:
        beside = sorted(file.name for file in path.parent.glob("*.y*ml"))
        hint = difflib.get_close_matches(path.name, beside, 1, 0.4) or beside[:1]
        remedy = "Check the path. `dsyolo sample DST` generates a small synthetic data set to try."
        if hint:
            remedy = f"Did you mean {path.parent / hint[0]}?"
        raise UserError(headline, [f"no such file (working directory {Path.cwd()}). {remedy}"]) from None
    except BadYamlError as error:
        raise UserError(headline, [str(error)]) from None
    except OSError as error:
        raise UserError(headline, [f"cannot be read: {error.strerror}."]) from error
    if isinstance(given, dict) and {"images", "annotations"} <= given.keys():
        rule = "it holds COCO's annotations. Convert them: dsyolo convert coco SRC DST (docs/data.md)."
        raise UserError(headline, [rule])
    if not isinstance(given, dict):
        kind = "empty" if given is None else f"a {type(given).__name__}"
        raise UserError(headline, [f"{kind}, but it must map keys to values: train, val and names."])
    return {str(key): value for key, value in given.items()}


def _missing_key(key: str, given: dict[str, Any], what: str) -> str:
    others = [k for k in given if k not in (*SPLITS, "names", "nc", "path", "download")]
    close = difflib.get_close_matches(key, others, 1, 0.5)
    return f"{key}: missing. " + (f"Did you mean it where you wrote `{close[0]}`?" if close else what)


def _names(given: dict[str, Any], problems: list[str]) -> tuple[str, ...]:
    names, num_given = given.get("names"), given.get("nc")
    if num_given is not None and not (type(num_given) is int and 1 <= num_given <= MOST_CLASSES):
        rule = f"it must be 1 to {MOST_CLASSES:,}, the number of classes. Correct it or leave it out."
        problems.append(f"nc: {shortened(repr(num_given))} given, but {rule}")
        num_given = None
    if names is None:
        if num_given is not None and "names" not in given:
            return tuple(f"class{i}" for i in range(num_given))
        problems.append(_missing_key("names", given, "Give the classes as a list or as a map `0: cat`."))
        return ()
    if isinstance(names, dict):
        if not all(type(k) is int for k in names):
            problems.append(
                f"names: the keys {list(names)[:5]} given, but they must be whole numbers from 0."
            )
            return ()
        gaps = list(islice((k for k in range(max(names, default=-1)) if k not in names), 5))
        if gaps or any(k < 0 for k in names):
            fault = f"{', '.join(map(str, gaps))} missing" if gaps else "a key is negative"
            rule = f"must number its {len(names)} classes 0 to {len(names) - 1}, but {fault}"
            problems.append(f"names: {rule}. Count from 0 without a gap, as the rows of the labels do.")
            return ()
        names = [names[k] for k in sorted(names)]
    if not isinstance(names, list) or not names:
        rule = "it must name at least one class. Give a list, or a map `0: cat`."
        problems.append(f"names: {shortened(repr(names))} given, but {rule}")
        return ()
    if other := [f"class {i}: {n!r}" for i, n in enumerate(names) if not isinstance(n, str | int | float)]:
        rule = "given, but a name is text or a number. Quote it"
        problems += [f"names: {shortened(one)} {rule}." for one in other[:MOST_FAULTS]]
        return ()
    if len(names) > MOST_CLASSES:
        problems.append(f"names: {len(names):,} classes given, but {MOST_CLASSES:,} is the maximum.")
        return ()
    if booleans := dict.fromkeys(str(name) for name in names if isinstance(name, bool)):
        rule = "YAML reads yes, no, on, off, true and false as booleans. Quote the names."
        problems.append(f"names: {' and '.join(booleans)} given, but {rule}")
    elif bad := [f"class {i}: {why}" for i, name in enumerate(names) if (why := name_fault(name))]:
        problems += [f"names: {why}." for why in bad[:MOST_FAULTS]]
    elif repeated := [
        name for name, count in Counter(str(name).strip() for name in names).items() if count > 1
    ]:
        problems.append(
            f"names: {shortened(', '.join(repeated))} given more than once. Rename or merge them."
        )
    if num_given is not None and num_given != len(names):
        rule = "Correct one of them, or leave nc out."
        problems.append(f"nc: {num_given} given, but names has {len(names)}. {rule}")
    return tuple(str(name).strip() for name in names)


def _root(path: Path, given: dict[str, Any], problems: list[str]) -> Path:
    root = given.get("path") or "."
    if not isinstance(root, str) or len(root) > MOST_PATH:
        rule = "it must be the folder that train and val are relative to. Correct it or leave it out."
        problems.append(f"path: {shortened(repr(root))} given, but {rule}")
        return path.parent
    homes = [Path(os.path.expanduser(text)) for text in spellings(root)]
    candidates = [Path(on_disk(str(at))) for home in homes for at in (path.parent / home, home)]
    found = next((candidate for candidate in candidates if os.path.isdir(candidate)), None)
    if found is None:
        entries = [one for split in SPLITS if isinstance(one := given.get(split), str)]
        hint = f"{tried(candidates)}.{escapes(root)}"
        if any(not _source(path.parent, entry)[1] for entry in entries):
            hint += (
                f" Leave path out: then they are relative to {shortened(str(path.parent))}, where they are."
            )
        problems.append(f"path: {shortened(root)} given, but there is no such folder: {hint}")
    return found or candidates[0]


def _split(
    split: str, given: dict[str, Any], root: Path, required: bool, problems: list[str]
) -> tuple[Path, ...] | None:
    entries = given.get(split)
    if not entries:
        if required:
            rule = "Give a folder of images, a list file, or a list of such."
            problems.append(_missing_key(split, given, rule))
        return None
    sources = [_source(root, str(entry)) for entry in (entries if isinstance(entries, list) else [entries])]
    faults = [f"{split}: {fault}" for _, fault in sources if fault]
    if faults and not required:
        return None
    problems += faults
    return tuple(source for source, fault in sources if not fault)


def _source(root: Path, entry: str) -> tuple[Path, str]:
    """Return the folder or list that an entry names, and what is wrong with it."""
    if len(entry) > MOST_PATH:
        return root, f"{shortened(entry)} is longer than any path."
    if "://" in entry:
        return (
            root,
            f"{shortened(entry)} given, but nothing is downloaded. Give a folder or list on this machine.",
        )
    # Exported data sets often have `../train/images` for the folder beside the file.
    candidates = [
        Path(on_disk(str(at)))
        for text in spellings(entry)
        for at in (root / text, *([root / text[3:]] if text.startswith("../") else []), Path(text))
    ]
    here = next((c for c in candidates if os.path.exists(c)), None)
    if here is None:
        hint = escapes(entry) or near(candidates[0])
        return root, f"{shortened(entry)} {unusable(candidates)}.{hint}"
    if here.is_dir() or (here.is_file() and here.suffix.lower() == ".txt"):
        return here, ""
    kind = "file" if here.is_file() else "device or pipe"
    return here, f"{shortened(entry)} is a {kind}, but only folders and .txt lists of images can be given."


# ---- images and where their labels are


def list_images(sources: Iterable[str | Path]) -> list[Path]:
    """List the images of folders (recursively), of list files, and those named, in order, repeats included.

    In a list file `./` means the list's folder; other relative paths are tried from the working directory, then
    from the list's folder. Listed files need not exist: building the index reports them.

    Raises:
        UserError: a source that does not exist or cannot be read, or no image in any of them.
    """
    images: list[Path] = []
    problems: list[str] = []
    paths = [Path(source) for source in sources]
    for source in paths:
        if os.path.isdir(source):
            images += _walk(source, problems)
        elif os.path.isfile(source) and source.suffix.lower() in IMAGE_SUFFIXES:
            images.append(source)
        elif os.path.isfile(source) and source.suffix.lower() != ".txt":
            kinds = f"no image ({' '.join(sorted(IMAGE_SUFFIXES))}) by its suffix, and lists of images end in .txt"
            problems.append(f"{source}: it is {kinds}.")
        elif os.path.isfile(source):
            try:
                images += _listed_images(source)
            except OSError as error:
                problems.append(f"{source}: cannot be read as a list of images: {error.strerror}")
        else:
            problems.append(f"{source}: no such folder, image or list file.{near(source)}")
    if not problems and not images:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        problems = [f"{path}: no image in it (looked for {suffixes}).{images_beside(path)}" for path in paths]
    if problems:
        raise UserError("No images to read", problems)
    return images


def _walk(folder: Path, problems: list[str]) -> list[Path]:
    def report(error: OSError) -> None:
        remedy = (
            "Change its permissions: `chmod -R a+rX`"
            if error.errno == errno.EACCES
            else "Repair or remove it"
        )
        problems.append(f"{error.filename}: this folder cannot be read: {error.strerror}. {remedy}.")

    images: list[Path] = []
    seen: set[str] = set()  # real paths, so that a link to a parent folder does not loop
    for top, folders, files in os.walk(folder, onerror=report, followlinks=True):
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
    def is_there(line: str) -> bool:
        return os.path.exists(_listed_image(list_file, line))

    lines = decode_names(read_bytes(list_file, MOST_LIST_BYTES), is_there, list_file)
    return [_listed_image(list_file, line) for line in lines]


def _listed_image(list_file: Path, line: str) -> Path:
    path = Path(on_disk(line))
    is_found = path.is_absolute() or (not line.startswith("./") and os.path.exists(path))
    path = path if is_found else Path(on_disk(str(list_file.parent / line)))
    if line.startswith("data/obj_") and not os.path.exists(path):
        # CVAT's YOLO export names a folder that it lacks.
        path = Path(on_disk(str(list_file.parent / line.removeprefix("data/"))))
    if "\\" in line and not os.path.exists(path):
        posix = _listed_image(list_file, as_posix(line))
        path = posix if os.path.exists(posix) else path
    return path


def label_path(image: str | Path) -> Path:
    """Return the label file of an image: the last folder `images` of its path replaced by `labels`, ending in .txt."""
    # On strings: Path would take most of the time of loading a cached index.
    folder, name = os.path.split(os.fspath(image))
    before, images, after = f"{os.sep}{folder}{os.sep}".rpartition(f"{os.sep}images{os.sep}")
    if images:
        folder = f"{before}{os.sep}labels{os.sep}{after}"[1:]
    return Path(folder, os.path.splitext(name)[0] + ".txt")
