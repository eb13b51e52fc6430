"""What a host may answer, section by section. Everything that comes from another host passes through here."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """A section; where `error` is set, nothing else of it was found."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    error: str = ""


class Hello(Answer):
    """The beginning. `machine` and `network` together are a host."""

    time: float = 0.0  # s since 1970
    hostname: str = ""
    machine: str = ""
    network: str = ""


class Python(Answer):
    """The interpreter, and the variables that matter."""

    executable: str = ""
    version: str = ""
    folder: str = ""
    environment: dict[str, str] = {}


class Package(BaseModel):
    """None for what is not known; the path of those only that were imported."""

    version: str | None = None
    path: str | None = None
    error: str | None = None


class Packages(Answer):
    """By name."""

    packages: dict[str, Package] = {}


class Sources(Answer):
    """Hashes of dsyolo's files."""

    folder: str = ""
    files: dict[str, str] = {}


class Devices(Answer):
    """What ranks compute on."""

    cores: int = 0
    gpus: list[str] = []
    accelerator: str = ""


class Compilers(Answer):
    """Paths, None where there is none."""

    compiler: str | None = None
    ninja: str | None = None


class DeepSpeedJson(Answer):
    """The SHA-256 of the file, None where it is missing, and what is wrong with its content."""

    digest: str | None = None
    problems: list[str] = []


class Split(BaseModel):
    """See data/fingerprint.py."""

    num_images: int
    one_in: dict[str, int]
    buckets: list[str]


class DataAnswer(Answer):
    """The data set: fingerprints, or at a second look the images of some buckets."""

    digest: str = ""
    problems: list[str] = []
    splits: dict[str, Split] = {}
    listed: dict[str, dict[str, str]] = {}


class Room(BaseModel):
    """Bytes on the disk of a folder, and why it cannot be written to."""

    path: str
    free: int
    fault: str | None


class Disk(Answer):
    """By what the folder is for."""

    folders: dict[str, Room] = {}


class Lock(BaseModel):
    """Of a compiled op's build. `state`: stale, removed, or why it stays."""

    path: str
    age_s: float
    owner: str
    state: str


class Locks(Answer):
    """Under the folder of torch's extensions."""

    root: str = ""
    locks: list[Lock] = []


class Interface(BaseModel):
    """Of the network."""

    address: str | None
    is_up: bool
    is_loopback: bool


class NetworkAnswer(Answer):
    """Interfaces, addresses that asked names have here, and the one that the host's own name gives gloo."""

    interfaces: dict[str, Interface] = {}
    names: dict[str, list[str]] = {}
    own: str | None = None


class Port(Answer):
    """Why nobody can listen at the master port, and who does."""

    fault: str | None = None
    holder: str | None = None


class LinkAnswer(BaseModel):
    """From a rank to the one after it."""

    to: int
    latency_s: float
    bytes_per_s: float


class Result(Answer):
    """What a rank of the network's probe found. `fault`: which step failed; `unreached`: ranks that it cannot reach."""

    fault: str = ""
    text: str = ""
    unreached: list[int] = []
    sees_token: bool | None = None
    links: list[LinkAnswer] = []


ANSWERS: dict[str, type[Answer]] = {
    "hello": Hello,
    "python": Python,
    "packages": Packages,
    "sources": Sources,
    "devices": Devices,
    "compilers": Compilers,
    "deepspeed_json": DeepSpeedJson,
    "disk": Disk,
    "locks": Locks,
    "network": NetworkAnswer,
    "port": Port,
    "data": DataAnswer,
    "result": Result,
}
