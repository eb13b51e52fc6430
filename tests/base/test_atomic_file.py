"""A run writes through no link that somebody planted in its folder."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from dsyolo.base.atomic_file import refuse_planted_link, write_file
from dsyolo.base.errors import UserError
from dsyolo.cluster.run_lock import FILE, RunLock
from dsyolo.config.messages import cannot_hold_files
from dsyolo.data.formats.yolo import list_images
from dsyolo.scaling.html_report import escape
from dsyolo.scaling.tables import plain
from dsyolo.tracking.log_setup import RunLog
from dsyolo.tracking.writers import JsonlWriter


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Somebody's file outside the run's folder."""
    (tmp_path / "run").mkdir()
    file = tmp_path / "victim"
    file.write_text("precious", encoding="utf-8")
    return file


def test_a_lock_is_not_written_through_a_link(victim):
    folder = victim.parent / "run"
    (folder / FILE).symlink_to(victim)
    with pytest.raises(UserError, match="it is a symbolic link, and a run writes through none"):
        RunLock(folder).take(0)
    assert victim.read_text(encoding="utf-8") == "precious"


def test_a_lock_is_not_written_through_a_hard_link_or_a_pipe(victim):
    lock = victim.parent / "run" / FILE
    os.link(victim, lock)
    with pytest.raises(UserError, match="it is a hard link, so that another file would change"):
        RunLock(lock.parent).take(0)
    assert victim.read_text(encoding="utf-8") == "precious"
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(UserError, match="device or pipe"):
        RunLock(lock.parent).take(0)


def test_a_name_as_long_as_the_file_system_allows_is_written(tmp_path):
    for name in ("猫" * 80 + ".jpg", "x" * 255):
        write_file(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 2


def test_metrics_and_files_replace_a_link(victim):
    folder = victim.parent / "run"
    for name in ("metrics.jsonl", "config.yaml"):
        (folder / name).symlink_to(victim)
    writer = JsonlWriter(folder / "metrics.jsonl", step=0, epoch=0)
    writer.write({"kind": "step", "step": 1, "epoch": 0})
    os.remove(folder / "metrics.jsonl")
    (folder / "metrics.jsonl").symlink_to(victim)
    with pytest.warns(UserWarning, match="cannot be written to now"):
        writer.write({"kind": "step", "step": 2, "epoch": 0})  # the file that it had open was removed
    write_file(folder / "config.yaml", b"new")
    assert not (folder / "config.yaml").is_symlink()
    assert victim.read_text(encoding="utf-8") == "precious"


def test_a_log_is_not_written_through_a_link(victim, capsys):
    folder = victim.parent / "run"
    (folder / "logs").mkdir()
    (folder / "logs/rank_0000.log").symlink_to(victim)
    before = logging.root.handlers[:]
    try:
        RunLog(0).open_file(folder)
        logging.getLogger("dsyolo").warning("a line")
    finally:
        logging.root.handlers[:] = before
    assert "it is a symbolic link" in capsys.readouterr().out
    assert victim.read_text(encoding="utf-8") == "precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link away")
def test_a_folder_that_is_anothers_link_is_refused(victim):
    link = victim.parent / "run/weights"
    link.symlink_to(victim.parent)
    refuse_planted_link(link)
    os.lchown(link, 65534, 65534)
    with pytest.raises(OSError, match="symbolic link of another user"):
        refuse_planted_link(link)


def test_a_dangling_link_as_run_folder_is_named_as_such(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    fault = cannot_hold_files(tmp_path / "run")
    assert (
        fault
        == f"{tmp_path}/run is a link to {tmp_path}/gone, which does not exist. Remove the link, or make what it leads to."
    )


def test_a_folder_without_read_permission_is_not_called_empty(tmp_path, monkeypatch):
    (tmp_path / "images/inner").mkdir(parents=True)
    (tmp_path / "images/a.jpg").write_bytes(b"x")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("inner"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(
        UserError, match=r"inner: this folder cannot be read: Permission denied. Change its perm"
    ):
        list_images([tmp_path / "images"])


def test_reports_show_markup_as_text():
    assert escape("<script>\x1b\ud800") == r"&lt;script&gt;\x1b\ud800"
    assert plain("<script>|a") == r"&lt;script&gt;\|a"
