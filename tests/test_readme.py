"""What the README shows runs."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_python_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_commands_name_modules_that_exist():
    import importlib.util

    modules = set(re.findall(r"python -m (lnfree_interp\.\w+)", README))
    assert "lnfree_interp.dla" in modules
    for module in modules:
        assert importlib.util.find_spec(module), module
