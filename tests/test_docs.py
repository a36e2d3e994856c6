"""What the README shows is run, in its order, in a folder that holds only `clips/` and `query.png`."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from motionrag.pocket.folder import render_domain
from motionrag.pocket.world import named_domain, sample_clip
from tests.test_cli import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    render_domain(tmp_path / "clips", named_domain("blick"), 18)
    Image.fromarray(sample_clip(named_domain("blick"), 99).frames[0]).save(tmp_path / "query.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_blocks_print_what_they_say(workplace, capsys):
    namespace: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), namespace)  # the README is ours
    printed = capsys.readouterr().out
    assert "18 new, 0 changed, 0 unchanged" in printed
    assert "1 a red box blicks" in printed
    assert "5 True" in printed
    assert (workplace / "out.mp4").stat().st_size > 0
    assert (workplace / "out.json").stat().st_size > 0


def test_commands_print_what_they_say(workplace):
    shutil.rmtree(workplace / "clips")  # the first command renders them
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL):
        lines = block.splitlines()
        for number, line in enumerate(lines):
            if not line.startswith("$ motionrag "):
                continue
            done = run(*shlex.split(line.removeprefix("$ motionrag "), comments=True))
            assert done.returncode == 0, done.stderr
            shown = next((i for i in range(number + 1, len(lines)) if lines[i].startswith("$")), len(lines))
            assert set(lines[number + 1 : shown]) <= set(done.stdout.splitlines())


def test_every_figure_names_its_command():
    rows = [line for line in README.split("## Figures")[1].split("## ")[0].splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 5
    for row in rows:
        what, figure, command = (cell.strip() for cell in row.strip("|").split("|"))
        assert re.search(r"\d", figure), what
        assert command.startswith("`"), what


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
