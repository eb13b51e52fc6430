"""Reads the zip files of `torch.save` without running anything in them: tensors, plain values, and inert objects.

Source of the format: torch's documentation on serialization. `data.pkl` is a pickle in which a tensor is a call of a
rebuilding function with a storage, which is a persistent id; the storage's bytes are the entry `data/<key>`, not compressed.
"""

import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsyolo.base.plain_pickle import Inert, PickleRefusedError, PlainUnpickler

MOST_PICKLE_BYTES = 64 << 20  # without tensors; that of a training's checkpoint has a tenth of 1 MiB
MOST_ENTRIES = 100_000
STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
# Packages whose objects are left inert. All else is refused, as a name alone says that a file is something else.
INERT_PACKAGES = (
    "models",
    "utils",
    "yolov5",
    "ultralytics",
    "torch.nn",
    "torch.optim",
    "torch.torch_version",
    "argparse",
)
DATA_NAMES = (
    *STORAGES,
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib.PurePosixPath",
    "builtins.object",
    "__builtin__.object",
)


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    num_elements: int


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is in the file, and is read where it is asked for."""

    read: Callable[[], torch.Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype


class TorchFile:
    """An open file of `torch.save`; use it in a `with`.

    Raises:
        PickleRefusedError: it is damaged, compressed, or holds more than plain data, tensors and inert objects.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
            raise PickleRefusedError(f"it is not a complete file of torch.save ({error})") from None
        try:
            self._entries = self._checked(path.stat().st_size)
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def content(self) -> Any:
        """Return what was saved; its tensors are `LazyTensor`s."""
        data = self._read("data.pkl", MOST_PICKLE_BYTES)
        return PlainUnpickler(self._makes(), _may_be, self._storage).load(data)

    def _checked(self, file_bytes: int) -> dict[str, zipfile.ZipInfo]:
        """Return the entries by name within the archive's folder."""
        infos = self._zip.infolist()
        roots = {info.filename.partition("/")[0] for info in infos}
        if len(infos) > MOST_ENTRIES or len(roots) != 1:
            raise PickleRefusedError("it is a zip file of something else than torch.save")
        packed = [
            info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1
        ]
        if packed:
            raise PickleRefusedError(
                f"its part {packed[0]} is compressed or encrypted, and torch.save does neither"
            )
        if sum(info.file_size for info in infos) > file_bytes:
            raise PickleRefusedError("its parts are larger than the file, as those of a zip bomb")
        entries = {info.filename.partition("/")[2]: info for info in infos}
        if len(entries) < len(infos):
            raise PickleRefusedError("two of its parts have one name")
        if "data.pkl" not in entries:
            raise PickleRefusedError("it is a zip file of something else than torch.save")
        return entries

    def _read(self, name: str, most_bytes: int) -> bytes:
        info = self._entries.get(name)
        if info is None:
            raise PickleRefusedError(f"its part {name} is missing")
        if info.file_size > most_bytes:
            raise PickleRefusedError(
                f"its part {name} has {info.file_size:,} bytes, and {most_bytes:,} at most are read"
            )
        try:
            return self._zip.read(info)
        except (
            zipfile.BadZipFile,
            EOFError,
            OSError,
            ValueError,
            NotImplementedError,
            RuntimeError,
        ) as error:
            raise PickleRefusedError(f"its part {name} is damaged ({error})") from None

    def _storage(self, given: Any) -> _Storage:
        kind, named, key, _, number = given
        dtype = STORAGES.get(getattr(named, "path", ""))
        if kind != "storage" or dtype is None or not isinstance(key, str) or not isinstance(number, int):
            raise PickleRefusedError("it refers to something else than the storage of a tensor")
        return _Storage(key, dtype, number)

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> LazyTensor:
        whole = [offset, *shape, *stride]
        if not isinstance(storage, _Storage) or not all(type(one) is int and one >= 0 for one in whole):
            raise PickleRefusedError("it has a tensor of another form")
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if math.prod(shape) > storage.num_elements or (math.prod(shape) and last >= storage.num_elements):
            raise PickleRefusedError("it has a tensor that is larger than its storage")

        def read() -> torch.Tensor:
            expected = storage.num_elements * storage.dtype.itemsize
            data = self._read(f"data/{storage.key}", expected)
            if len(data) != expected:
                raise PickleRefusedError(
                    f"its part data/{storage.key} has {len(data):,} of {expected:,} bytes"
                )
            flat = (
                torch.frombuffer(bytearray(data), dtype=storage.dtype)
                if data
                else torch.empty(0, dtype=storage.dtype)
            )
            return flat.as_strided(shape, stride, offset).clone()

        return LazyTensor(read, tuple(shape), storage.dtype)

    def _makes(self) -> dict[str, Callable[..., Any]]:
        numpy_names: Mapping[str, Callable[..., Any]] = {
            "multiarray.scalar": _scalar,
            "multiarray._reconstruct": _array,
        }
        return {
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
            "torch.Size": lambda sizes=(): tuple(sizes),
            "torch.device": lambda *parts: ":".join(map(str, parts)),
            "collections.OrderedDict": _pairs,
            "_codecs.encode": _encode,
            "numpy.dtype": lambda *args: Inert("numpy.dtype", args),
            "copyreg._reconstructor": Inert,
            "copy_reg._reconstructor": Inert,
            **{
                f"{module}.{name}": list
                for module in ("builtins", "__builtin__")
                for name in ("set", "frozenset", "list")
            },
            **{
                f"{package}.{name}": made
                for package in ("numpy.core", "numpy._core")
                for name, made in numpy_names.items()
            },
            **{
                f"pathlib.{name}": lambda *parts: "/".join(map(str, parts))
                for name in ("PosixPath", "WindowsPath", "PurePosixPath")
            },
        }


def _may_be(path: str) -> bool:
    return (
        path in DATA_NAMES
        or path == "numpy.ndarray"
        or any(path.startswith(f"{one}.") for one in INERT_PACKAGES)
    )


def _pairs(pairs: Sequence[Any] = ()) -> dict[Any, Any]:
    found = {}
    for key, value in pairs:
        if not isinstance(key, str | int):
            raise PickleRefusedError("it has a dictionary with other keys than names")
        found[key] = value
    return found


def _encode(text: Any, encoding: Any = "utf-8", *_: Any) -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8", "utf8") or not isinstance(text, str):
        raise PickleRefusedError("it has bytes of another form")
    return text.encode(encoding)


def _scalar(dtype: Any, data: Any = b"") -> Any:
    """Return a numpy scalar as a plain number; inert where it is another."""
    code = dtype.args[0] if isinstance(dtype, Inert) and dtype.path == "numpy.dtype" and dtype.args else None
    if code not in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1") or not isinstance(
        data, bytes
    ):
        return Inert("numpy scalar")
    return np.frombuffer(data, np.dtype(code), count=1)[0].item()


def _array(*_: Any) -> Inert:
    return Inert("numpy.ndarray")
