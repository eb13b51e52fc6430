"""Models of what a host answers, section by section. All that comes from another host is validated here."""

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """A section; where `error` is set, nothing else in it is."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    error: str = ""


class Hello(Answer):
    """The first section. `machine` and `network` together identify a host."""

    time: float = 0.0  # s since 1970
    machine: str = ""
    network: str = ""


class Python(Answer):
    """The interpreter, and its GLOO_SOCKET_IFNAME."""

    executable: str = ""
    version: str = ""
    gloo_ifname: str | None = None


class Package(BaseModel):
    """An installed package; its path only if it was imported."""

    version: str | None = None
    path: str | None = None
    error: str | None = None


class Packages(Answer):
    """Packages by name."""

    packages: dict[str, Package] = {}


class Sources(Answer):
    """Hashes of dsyolo's files, by path in its folder."""

    folder: str = ""
    files: dict[str, str] = {}


class Devices(Answer):
    """The devices that ranks can compute on, and the paths of build tools."""

    cores: int = 0
    gpus: list[str] = []
    accelerator: str = ""
    compiler: str | None = None
    ninja: str | None = None


class DeepSpeedJson(Answer):
    """The SHA-256 of the file (None: missing), and what is wrong with its content."""

    digest: str | None = None
    problems: list[str] = []


class Split(BaseModel):
    """The fingerprint of a split: data/fingerprint.py."""

    num_images: int
    num_unread: int  # label files whose rows were not checked
    problems: list[str]  # rows that a training leaves out or clips
    one_in: dict[str, int]
    buckets: list[str]


class DataAnswer(Answer):
    """Fingerprints of the data set; if asked for, the files of some buckets."""

    digest: str = ""
    problems: list[str] = []
    warnings: list[str] = []
    splits: dict[str, Split] = {}
    listed: dict[str, dict[str, str]] = {}


class DiskSpace(BaseModel):
    """Free bytes on the disk of a folder, and why it cannot be written to."""

    path: str
    free: int
    fault: str | None


class Disk(Answer):
    """Disk space by what the folder is for: runs, cache, shm."""

    folders: dict[str, DiskSpace] = {}


class Lock(BaseModel):
    """The lock of an op's build. `state`: stale, removed, or why it stays."""

    path: str
    age_s: float
    owner: str
    state: str


class Locks(Answer):
    """Build locks under the folder of torch's extensions."""

    root: str = ""
    locks: list[Lock] = []


class Interface(BaseModel):
    """A network interface."""

    address: str | None
    is_up: bool
    is_loopback: bool


class NetworkAnswer(Answer):
    """Interfaces, addresses of the names asked for, and the address that gloo takes from the host's own name."""

    interfaces: dict[str, Interface] = {}
    names: dict[str, list[str]] = {}
    own: str | None = None


class Port(Answer):
    """Why nobody can listen at the master port, and which process does."""

    fault: str | None = None
    holder: str | None = None


class LinkAnswer(BaseModel):
    """The speed of the link from a rank to the next one."""

    to: int
    latency_s: float
    bytes_per_s: float


class Result(Answer):
    """The findings of one rank of the network test. `fault`: the step that failed; `unreached`: ranks out of reach."""

    fault: str = ""
    text: str = ""
    unreached: list[int] = []
    sees_token: bool | None = None
    links: list[LinkAnswer] = []


ANSWERS: dict[str, type[Answer]] = {
    **{"hello": Hello, "python": Python, "packages": Packages, "sources": Sources, "devices": Devices},
    **{"deepspeed_json": DeepSpeedJson, "data": DataAnswer, "disk": Disk},
    **{"locks": Locks, "network": NetworkAnswer, "port": Port, "result": Result},
}
