"""Files that look like labels: what is never waited for."""

from __future__ import annotations

import os

from dsyolo.data.label_signs import is_for_all, is_of_image


def test_a_pipe_in_the_place_of_labels_is_not_waited_for(tmp_path):
    for name in ("im0.txt", "im0.xml", "all.json"):
        os.mkfifo(tmp_path / name)
    assert not is_of_image(str(tmp_path / "im0.txt"), ".txt")
    assert not is_of_image(str(tmp_path / "im0.xml"), ".xml")
    assert not is_for_all(str(tmp_path / "all.json"), ".json")
