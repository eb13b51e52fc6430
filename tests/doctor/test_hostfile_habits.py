"""Marks, ports and quotes that people write into hostfiles and .deepspeed_env."""

from __future__ import annotations

from dsyolo.doctor.findings import FAIL
from dsyolo.doctor.hosts import _read_env_file, read_hostfile


def test_a_byte_order_mark_is_named(tmp_path):
    (tmp_path / "hostfile").write_bytes("node1 slots=8\n".encode("utf-8-sig"))
    hosts, (finding,) = read_hostfile(tmp_path / "hostfile")
    assert [host.name for host in hosts] == ["node1"]
    assert finding.verdict == FAIL
    assert "begins with a byte-order mark" in finding.found
    assert "UTF-8 without one" in finding.remedy


def test_a_port_belongs_elsewhere(tmp_path):
    (tmp_path / "hostfile").write_text("node1:2222 slots=8\n", encoding="utf-8")
    _, (finding,) = read_hostfile(tmp_path / "hostfile")
    assert "'node1:2222' has a port" in finding.found
    assert "Write node1 here, and start with `deepspeed --ssh_port 2222`" in finding.remedy


def test_slots_of_thousands_of_digits(tmp_path):
    (tmp_path / "hostfile").write_text(f"node1 slots={'9' * 5000}\n", encoding="utf-8")
    _, (finding,) = read_hostfile(tmp_path / "hostfile")
    assert "node1 has 999999... slots" in finding.found


def test_quotes_in_the_environment_file(tmp_path):
    file = tmp_path / ".deepspeed_env"
    file.write_text("A=\"x y\"\nB='x'\nC=x y\n", encoding="utf-8")
    faults = _read_env_file(file, {})
    assert [fault for fault, _ in faults] == [
        f"line {n}: {key} has quotes in its value, and the launcher puts its own around them"
        for n, key in ((1, "A"), (2, "B"))
    ]
    assert [remedy for _, remedy in faults] == ["Write A=x y", "Write B=x"]
    file.write_bytes("A=1\n".encode("utf-8-sig"))
    assert "byte-order mark" in _read_env_file(file, {})[0][0]
