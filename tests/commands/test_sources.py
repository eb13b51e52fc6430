"""The sources of `dsyolo detect`: patterns are expanded; cameras, videos and addresses are answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsyolo.base.errors import UserError
from dsyolo.commands.sources import expanded
from dsyolo.data.formats.yolo import list_images


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "imgs/b.jpg",
        "imgs/a.jpg",
        "imgs/c.png",
        "imgs/deep/d.jpg",
        "v.mp4",
        "odd[1].jpg",
        "frames.mov/e.jpg",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    Path("7").mkdir()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("imgs/*.jpg", ["imgs/a.jpg", "imgs/b.jpg"]),
        ("imgs/[bc].*", ["imgs/b.jpg", "imgs/c.png"]),
        ("imgs/**/d.jpg", ["imgs/deep/d.jpg"]),
        ("odd[1].jpg", ["odd[1].jpg"]),
        ("imgs", ["imgs"]),
        ("7", ["7"]),
        ("frames.mov", ["frames.mov"]),
        ("nothing", ["nothing"]),  # list_images names the nearest
        ("a\0b", ["a\0b"]),
        ("i" * 5000, ["i" * 5000]),
    ],
)
def test_what_is_read(source: str, found: list[str]) -> None:
    assert expanded([Path(source)]) == [Path(name) for name in found]


@pytest.mark.parametrize(
    ("source", "answer"),
    [
        *(("0", "no videos"), ("12", "no videos"), ("screen", "no videos"), ("/dev/video0", "no videos")),
        *(
            ("rtsp://cam/stream", "no videos"),
            ("https://youtu.be/x", "no videos"),
            ("list.streams", "no videos"),
        ),
        *(("v.mp4", "no videos"), ("missing.MOV", "no videos")),
        ("https://host/bus.jpg", "nothing is downloaded. Download the image, and give its path."),
        ("https://host/bus.jpg?raw=1", "nothing is downloaded."),
        ("imgs/*.bmp", "no file matches this pattern."),
    ],
)
def test_what_is_answered(source: str, answer: str) -> None:
    with pytest.raises(UserError) as caught:
        expanded([Path("imgs"), Path(source)])
    (problem,) = caught.value.problems
    assert answer in problem
    if answer == "no videos":
        assert "extract frames, and give their folder to dsyolo detect." in problem


def test_all_are_answered_together() -> None:
    with pytest.raises(UserError) as caught:
        expanded([Path("0"), Path("imgs"), Path("v.mp4"), Path("x*.jpg")])
    assert [line.partition(":")[0] for line in caught.value.problems] == ["0", "v.mp4", "x*.jpg"]


def test_only_a_txt_file_is_a_list() -> None:
    for name in ("list.txt", "LIST.TXT", "list.csv"):
        Path(name).write_text("imgs/a.jpg\n", encoding="utf-8")
    assert list_images(["list.txt", "LIST.TXT"]) == [Path("imgs/a.jpg")] * 2
    with pytest.raises(
        UserError, match=r"list.csv: it is no image .* by its suffix, and lists of images end in .txt"
    ):
        list_images(["list.csv"])
