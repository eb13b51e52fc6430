"""Long lines on a terminal: broken between words or figures, never in a command, and whole in the log file."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import struct
import sys
import termios
from pathlib import Path

import pytest

from dsyolo.base.text import columns
from dsyolo.tracking.log_setup import RunLog
from dsyolo.tracking.terminal_lines import wrapped

EPOCH = (
    "epoch 2/3  box 0.1328  obj 0.0098  cls 0.0495  0.57 GiB  2.9 s\n"
    "           val_box 0.0802  val_obj 0.0120  val_cls 0.0323  mAP50 0.0000  mAP50-95 0.0000  * best\n"
    "           117.4 images/s; data 5 %, communication 33 %; peak 0.04 GiB (activations 0.02); 1 % of peak FLOP/s"
)


def test_figures_of_an_epoch_stay_together_and_below_each_other():
    assert wrapped(EPOCH, 80).splitlines() == [
        "epoch 2/3  box 0.1328  obj 0.0098  cls 0.0495  0.57 GiB  2.9 s",
        "           val_box 0.0802  val_obj 0.0120  val_cls 0.0323  mAP50 0.0000",
        "           mAP50-95 0.0000  * best",
        "           117.4 images/s; data 5 %, communication 33 %;",
        "           peak 0.04 GiB (activations 0.02); 1 % of peak FLOP/s",
    ]
    assert wrapped(EPOCH, 120) == EPOCH


@pytest.mark.parametrize("width", [60, 67, 80, 120, 200])
@pytest.mark.parametrize(
    "text",
    [
        EPOCH,
        "WARNING: The run ends during the warm-up, after 15 of 25 steps. Train more epochs, or lower train_batch_size.",
        "classes: 红细胞 白细胞 血小板 红细胞 白细胞 血小板 红细胞 白细胞 血小板 红细胞 白细胞 血小板 红细胞 白细胞",
    ],
    ids=["epoch", "warning", "chinese"],
)
def test_nothing_is_lost_and_no_line_is_wider_than_the_terminal(text: str, width: int):
    lines = wrapped(text, width).splitlines()
    assert " ".join(lines).split() == text.split()
    assert max(map(columns, lines)) <= width


def test_commands_and_long_words_stay_whole():
    command = f"To go on: deepspeed --num_gpus 2 dsyolo/train.py --data {'d' * 60}/data.yaml --resume auto"
    assert wrapped(command, 80) == command
    path = "/" + "p" * 100
    assert wrapped(f"it is in {path} now", 80).splitlines() == ["it is in", f"  {path}", "  now"]
    assert wrapped(EPOCH, None) == wrapped(EPOCH, 59) == EPOCH


def test_a_terminal_gets_short_lines_and_the_file_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    leader, follower = pty.openpty()
    fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 80, 0, 0))
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", root.handlers[:])
    monkeypatch.setattr("warnings.showwarning", None)
    with os.fdopen(follower, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        RunLog(rank=0).open_file(tmp_path)
        logging.getLogger("dsyolo.test").info("%s", EPOCH)
        shown = os.read(leader, 4096).decode().replace("\r\n", "\n")
    os.close(leader)
    assert shown == wrapped(EPOCH, 80) + "\n"
    assert EPOCH in (tmp_path / "logs/rank_0000.log").read_text(encoding="utf-8")
