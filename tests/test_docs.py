from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import yaml

from engine.config import Config
from engine.config_file import load_config
from engine.presets import PRESETS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ALGORITHMS = ROOT / "docs" / "algorithms"


def test_the_configuration_page_is_made_from_the_configuration():
    made = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))["reference"]()
    assert (ROOT / "docs" / "configuration.md").read_text() == made, "run: python docs/make_configuration.py"


def test_there_are_fewer_than_150_knobs():
    def knobs(section) -> int:
        return sum(
            knobs(f.annotation) if hasattr(f.annotation, "model_fields") else 1 for f in section.model_fields.values()
        )

    assert knobs(Config) < 150


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_preset_has_a_page_whose_configuration_is_valid(tmp_path):
    assert {page.stem for page in ALGORITHMS.glob("*.md")} == set(PRESETS)
    for page in ALGORITHMS.glob("*.md"):
        texts = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.S)
        assert texts, page.name
        for text in texts:
            (tmp_path / "run.yaml").write_text(text)
            assert load_config(tmp_path / "run.yaml").algorithm.name == page.stem


def test_the_readmes_run_is_a_valid_configuration(tmp_path):
    [text] = [b for b in re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "my_run.yaml" in b]
    (tmp_path / "my_run.yaml").write_text(text)
    assert load_config(tmp_path / "my_run.yaml").name == "my-run"


def test_the_readmes_reward_works(tmp_path, monkeypatch):
    from engine.config import RewardConfig, RewardsConfig
    from engine.rewards.contract import Row, Sample, resolve

    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    entry = RewardConfig(function="my_rewards.py:correct")
    function = resolve(entry, RewardsConfig(functions=[entry]))
    samples = [Sample(i, "1 + 1", text, Row({"answer": "2"})) for i, text in enumerate([" 2\n", "3"])]
    assert [list(outcome.values()) for outcome in function(samples)] == [[1.0], [0.0]]


@pytest.mark.parametrize("example", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda p: p.name)
def test_an_example_is_a_valid_configuration(example):
    load_config(example)


def test_the_quickstart_is_a_valid_configuration():
    config = load_config(ROOT / "examples" / "quickstart" / "quickstart.yaml")
    assert yaml.safe_load((ROOT / "examples" / "quickstart" / "quickstart.yaml").read_text())["name"] == config.name
