"""What docs/trajectories.md shows is run, and prints what it says."""

import re
from pathlib import Path

from motionrag.trajectory import CAMERA_MOVES, FORMATS

PAGE = (Path(__file__).parents[2] / "docs" / "trajectories.md").read_text(encoding="utf-8")


def test_python_blocks_print_what_they_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "trajectories.md", "exec"), namespace)  # the page is ours
    assert capsys.readouterr().out.splitlines() == [
        "torch.Size([16, 96, 160, 2]) torch.Size([16, 96, 160, 1])",
        "[100.0, 30.0] 192",
        "(20.0, 15.0) (20.0, 30.0)",
        "True 1.0",
    ]


def test_all_moves_and_formats_are_on_the_page():
    assert [name for name in [*CAMERA_MOVES, *FORMATS] if f"`{name}`" not in PAGE] == []
