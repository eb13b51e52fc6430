"""Text of any encoding is read or named, and nothing of it controls a terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys

import pytest

from dsyolo.base.errors import UserError
from dsyolo.base.safe_io import BadYamlError, parse_json, parse_yaml, read_bytes, read_text
from dsyolo.base.stdio import degrade
from dsyolo.base.text import EncodingError, decode, decode_names, escaped, name_fault
from dsyolo.data.formats.yolo import list_images, read_data_yaml
from dsyolo.data.labels import read_labels
from dsyolo.tracking.log_setup import RunLog

CHINESE = "train: images\nval: images\nnames: [猫, 狗, 汽车]\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"])
def test_what_is_certain_is_read(encoding, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "data.yaml").write_bytes(CHINESE.encode(encoding))
    assert read_data_yaml(tmp_path / "data.yaml").names == ("猫", "狗", "汽车")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            "names: [猫, 狗, 行人, 自行车]".encode("gbk"),
            "likely in GBK. Save it as UTF-8: iconv -f GBK -t UTF-8 data.yaml > NEW",
        ),
        (
            "names: [кошка, собака]".encode("cp1251"),
            "likely in Windows-1251. Save it as UTF-8: iconv -f WINDOWS-1251 ",
        ),
        ("names: [고양이, 강아지]".encode("euc-kr"), "EUC-KR"),
        ("names: [ねこ, いぬ, くるま]".encode("shift-jis"), "SHIFT-JIS"),
        ("names: [貓, 狗, 汽車]".encode("big5"), "BIG5"),
        ("names: [café, âge]".encode("latin-1"), "likely in Latin-1 or Windows-1252"),
        (
            ("names: " + "猫" * 30).encode("utf-16-le"),
            "UTF-16 without a byte-order mark, and it must be UTF-8. Save it as UTF-8: iconv -f UTF-16LE ",
        ),
        (
            "names: [cat, dog]".encode("utf-32-be"),
            "UTF-32 without a byte-order mark, and it must be UTF-8. Save it as UTF-8: iconv -f UTF-32BE ",
        ),
        (b"\x7fELF\x02\x01\x01\x00\xff\xfe", "not a text file"),
        (b"\xff\xfea", "begins like UTF-16, and is damaged"),
    ],
)
def test_other_encodings_are_named_with_the_remedy(data, expected, tmp_path):
    (tmp_path / "data.yaml").write_bytes(data)
    with pytest.raises(EncodingError) as caught:
        read_text(tmp_path / "data.yaml")
    assert expected in str(caught.value.strerror)
    with pytest.raises(UserError) as refused:
        read_data_yaml(tmp_path / "data.yaml")
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("text", "encoding"), [("고양이", "euc-kr"), ("ねこ", "shift-jis"), ("汽車", "big5"), ("кошка", "cp1251")]
)
def test_other_scripts_are_not_called_latin(text, encoding):
    with pytest.raises(EncodingError) as caught:
        decode(f"names: [{text}]".encode(encoding))
    assert "1252" not in str(caught.value.strerror)


def test_labels_in_utf_16_are_read(tmp_path):
    """PowerShell's `>` writes them."""
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        (tmp_path / "a.txt").write_bytes("0 0.5 0.5 0.2 0.2\r\n".encode(encoding))
        labels, problems = read_labels(tmp_path / "a.txt", 1)
        assert labels.boxes_xyxy.tolist() == [pytest.approx([0.4, 0.4, 0.6, 0.6])]
        assert not problems


def test_a_name_that_is_no_text_costs_its_line(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "list.txt").write_bytes(b"./caf\xe9.jpg\n./gone\xe9.jpg\n./plain.jpg\n")
    listed = list_images([tmp_path / "list.txt"])
    assert [path.exists() for path in listed] == [True, False, False]
    with pytest.raises(EncodingError, match="likely in Latin-1"):
        decode_names(b"gone\xe9.jpg\n", lambda line: False)


def test_a_list_in_utf_16_is_read_and_a_cut_one_is_named():
    data = "a.jpg\n红.jpg\n".encode("utf-16")
    assert decode_names(data, lambda line: False) == ["a.jpg", "红.jpg"]
    for cut in (data[:3], data[:-1]):
        with pytest.raises(EncodingError):
            decode_names(cut, lambda line: False)


def test_what_controls_a_terminal_is_escaped():
    assert (
        escaped("a\x1b[2Jb\x07\x9b\u202egnp\u2028\udce9\n\tc")
        == r"a\x1b[2Jb\x07\x9b\u202egnp\u2028\udce9" + "\n\tc"
    )
    assert escaped("a\nb", lines=False) == r"a\nb"
    assert escaped("猫 café\u00a0") == "猫 café\u00a0"


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("", "empty"), ("  ", "empty"), (b"cat", "binary"), ("a\x1b[31m", r"a\x1b[31m has characters"),
        ("\ud800", r"\ud800 has characters"), ("a\nb", "cannot be shown"), ("x" * 2000, "2,000 characters"),
        ("\u202egnp", "cannot be shown"),
    ],
)  # fmt: skip
def test_names_that_no_class_can_have(name, rule, tmp_path):
    assert rule in str(name_fault(name))


@pytest.mark.parametrize(
    "name", ['""', "!!binary aGk=", r'"\ud800"', r'"a\e[31m"', r'"a\nb"', '"  "', r'"\0"']
)
def test_a_data_yaml_with_such_a_class_is_refused(name, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "data.yaml").write_text(
        f"train: images\nval: images\nnames: [cat, {name}]\n", encoding="utf-8"
    )
    with pytest.raises(UserError, match="names: class 1: "):
        read_data_yaml(tmp_path / "data.yaml")


@pytest.mark.parametrize("name", ["猫", "café", "stop sign", "a/b", "<b>", "2024"])
def test_usual_names_pass(name):
    assert name_fault(name) is None


@pytest.mark.parametrize(
    "text",
    ["!!timestamp maybe", "!!int ''", "!!map x", "!!set x", "!!omap x", "!!pairs x", "!!float ''", "!!bool x",
     "!!binary é", "!!null x", "!!seq x", "!!str {a: 1}", "!!int [1]", "!!timestamp 2020-99-99", "0x" + "f" * 5000,
     "9" * 5000, "!!int x", "1:" * 4000 + "1", "2020-02-30", "!foo x", "!!python/name:os.system ''", "<<: 1", "? [a]\n: b"],
)  # fmt: skip
def test_odd_tags_and_numbers_are_no_tracebacks(text):
    found: object = None
    with contextlib.suppress(BadYamlError):  # anything else fails the test
        found = parse_yaml(f"a: {text}" if not text.startswith(("<<", "?")) else text)
    assert len(repr(found)) < 6000


def test_numbers_that_nobody_can_use_are_refused():
    assert parse_json('[1, 2.5, "12345678901234567890"]') == [1, 2.5, "12345678901234567890"]
    for text in ("9" * 5000, f"[-{'9' * 30}]", "[" * 100_000):
        with pytest.raises(ValueError, match=r"digits|deeper"):
            parse_json(text)


def test_a_pipe_does_not_hold_the_reader(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe"):
        read_bytes(tmp_path / "pipe")


def test_letters_that_the_locale_lacks_become_escapes(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    degrade()
    print("猫 é", flush=True)
    assert raw.getvalue() == b"\\u732b \xe9\n"


def test_nothing_in_a_log_controls_the_terminal_of_its_reader(tmp_path, capsys):
    state = (logging.root.handlers[:], logging.root.level)
    try:
        run_log = RunLog(0)
        run_log.open_file(tmp_path)
        logging.getLogger("dsyolo").warning("class \x1b[2J and \u202e")
        logging.getLogger("dsyolo").error("no \x1b]0;title\x07")
    finally:
        for handler in logging.root.handlers:
            handler.close()
        logging.root.handlers[:] = state[0]
    text = (tmp_path / "logs/rank_0000.log").read_text(encoding="utf-8") + "".join(capsys.readouterr())
    assert text.count(r"class \x1b[2J and \u202e") == 2
    assert r"no \x1b]0;title\x07" in text
    assert not {"\x1b", "\x07", "\u202e"} & set(text)
