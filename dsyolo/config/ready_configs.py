"""Finds the DeepSpeed JSON files that come with dsyolo, by name: `zero2` is ds_configs/zero2.json, from any folder."""

from pathlib import Path

READY_FOLDER = "ds_configs"
# An installed package holds them inside (setup.py copies them there), a checkout beside itself.
_PACKAGE = Path(__file__).parents[1]
_PLACES = (_PACKAGE / READY_FOLDER, _PACKAGE.parent / READY_FOLDER)


def ready_folder() -> Path:
    """Return the folder of the ready files."""
    return next((place for place in _PLACES if place.is_dir()), _PLACES[0])


def ready_names() -> tuple[str, ...]:
    """Return the names of the ready files, without their suffix."""
    return tuple(sorted(path.stem for path in ready_folder().glob("*.json")))


def locate(given: str | Path) -> Path:
    """Return the path of a DeepSpeed JSON that was given as a path or as the name of a ready file.

    A file at that path comes first. `zero2`, `zero2.json` and `ds_configs/zero2.json` name a ready file from any folder.
    """
    path = Path(given)
    if path.is_file() or str(path.parent) not in (".", READY_FOLDER):
        return path
    ready = ready_folder() / (path.name if path.suffix == ".json" else f"{path.name}.json")
    return ready if ready.is_file() else path
