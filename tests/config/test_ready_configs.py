"""The files of ds_configs/ by name, from any folder, in a checkout and installed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from runs import ROOT

from dsyolo.base.errors import UserError
from dsyolo.config import ready_configs
from dsyolo.config.cli_args import parse
from dsyolo.config.ready_configs import locate, ready_names

NAMES = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("data.yaml").write_text("names: [a]\n", encoding="utf-8")
    return tmp_path


def test_every_ready_file_has_a_name(elsewhere: Path) -> None:
    assert list(ready_names()) == NAMES
    for name in NAMES:
        expected = ROOT / "ds_configs" / f"{name}.json"
        assert locate(name) == locate(f"{name}.json") == locate(f"ds_configs/{name}.json") == expected


def test_a_file_of_the_user_comes_first(elsewhere: Path) -> None:
    Path("ds_configs").mkdir()
    for own in ("zero2", "ds_configs/zero2.json"):
        Path(own).write_text("{}", encoding="utf-8")
        assert locate(own) == Path(own)
    assert locate("other/zero2.json") == Path("other/zero2.json")
    assert locate("mine") == Path("mine")


def test_a_run_takes_them_by_name_and_plans_without_one(elsewhere: Path) -> None:
    assert parse(["--data", "data.yaml", "--deepspeed_config", "zero2"]).deepspeed_config == "zero2"
    assert parse(["--data", "data.yaml"]).deepspeed_config == "auto"
    with pytest.raises(UserError) as caught:
        parse(["--data", "data.yaml", "--deepspeed_config", "fsdp"])
    assert "--deepspeed_config: fsdp does not exist. The ready ones are adamw," in str(caught.value)


def test_an_installed_package_holds_them_inside(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = elsewhere / "dsyolo/ds_configs"
    inside.mkdir(parents=True)
    (inside / "mine.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(ready_configs, "_PLACES", (inside, elsewhere / "ds_configs"))
    assert ready_names() == ("mine",)
    assert locate("mine") == inside / "mine.json"


@pytest.mark.soak
def test_a_wheel_holds_the_ready_files_and_the_presets(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--wheel-dir", str(tmp_path / "out"), str(_copy(tmp_path))], check=True, timeout=300
    )
    (wheel,) = (tmp_path / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {f"dsyolo/ds_configs/{name}.json" for name in NAMES} <= names
    assert {f"dsyolo/config/presets/{name}.yaml" for name in ("low", "med", "high")} <= names
    code = "from dsyolo.config.ready_configs import locate; print(locate('zero2').read_text())"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == (ROOT / "ds_configs/zero2.json").read_text(encoding="utf-8").strip()


def _copy(folder: Path) -> Path:
    """Return a copy of what a wheel is built from: building leaves files beside it."""
    checkout = folder / "checkout"
    done = subprocess.run(
        [
            "git",
            "ls-files",
            "dsyolo",
            "ds_configs",
            "pyproject.toml",
            "setup.py",
            "MANIFEST.in",
            "README.md",
            "LICENSE",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in done.stdout.splitlines():
        target = checkout / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    return checkout
