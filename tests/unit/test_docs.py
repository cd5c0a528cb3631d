"""The documents are true: what they link, name and list is there, and nothing is left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter
from pydantic import BaseModel

from cluster.cli.options import POSITIONAL
from cluster.config import BUNDLED_MODEL_NAME, BatonConfig, LocalNode, SloClassConfig
from cluster.config_names import leaves, variable
from cluster.vllm_args import vllm_args
from router.metrics import RouterMetrics

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("helm/*/*.md")])
README_LINES_MAX = 250
LINK = re.compile(r"\[[^\]]*\]\(([^)\s#]*)(?:#[^)\s]*)?\)")
FIELDS = {".".join(path): (path, field) for path, field in leaves(BatonConfig)}

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def text(name: str) -> str:
    return (ROOT / name).read_text()


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.M | re.S)


def table(name: str, heading: str) -> dict[str, list[str]]:
    """Cells of the first table below a heading, by the name in its first column."""
    below = f"\n{text(name)}".split(f"\n{heading}\n", 1)[1].splitlines()
    first = next(i for i, line in enumerate(below) if line.startswith("|"))
    rows = {}
    for line in below[first + 2 :]:
        if not line.startswith("|"):
            break
        name_cell, *others = [cell.strip() for cell in line.strip("|").split("|")]
        rows[name_cell.strip("`")] = others
    return rows


def test_readme_is_short_and_has_a_picture() -> None:
    assert len(text("README.md").splitlines()) < README_LINES_MAX
    (picture,) = blocks(ROOT / "README.md", "mermaid")
    for process in ("client", "router", "prefill", "decode", "controller", "redis"):
        assert process in picture


@documents
def test_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(document.read_text()):
        if target and not target.startswith("https://"):
            assert (document.parent / target).exists(), target


def test_readme_leads_to_every_document() -> None:
    linked = {(ROOT / target).resolve() for target in LINK.findall(text("README.md"))}
    assert set(DOCUMENTS) - {ROOT / "README.md"} <= linked
    assert ROOT / "LICENSE" in linked


@documents
def test_files_named_are_there(document: Path) -> None:
    """Names in backticks that look like files of this repository."""
    folders = "cluster|deploy|docs|helm|proto|router|tests|workers"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", document.read_text()):
        assert (ROOT / name).exists(), name


@documents
def test_environment_variables_are_read_somewhere(document: Path) -> None:
    code = [p for folder in ("cluster", "tests", "deploy") for p in (ROOT / folder).rglob("*")]
    sources = [p.read_text() for p in code if p.suffix in (".py", ".yaml") and p != Path(__file__)]
    known = {variable(path) for path, _ in FIELDS.values()}
    for name in re.findall(r"\bBATON_\w+", document.read_text()):
        assert name in known or any(name in source for source in sources), name


@documents
def test_examples_of_baton_yaml_are_valid(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for example in blocks(document, "yaml"):
        values = yaml.safe_load(example)
        if "helm" not in document.parts:
            BatonConfig(**values)


# --- docs/configuration.md ------------------------------------------------------------------------


def test_configuration_has_every_value_and_no_other() -> None:
    assert list(table("docs/configuration.md", "# Configuration")) == list(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_configuration_row(name: str) -> None:
    path, field = FIELDS[name]
    flag, environment, default, _ = table("docs/configuration.md", "# Configuration")[name]
    assert environment == f"`{variable(path)}`"
    if name not in POSITIONAL:
        assert f"`--{'-'.join(path).replace('_', '-')}`" in flag
    value = field.get_default(call_default_factory=True)
    if value is None:
        assert default == ("the bundled model" if name == "model" else "none")
    else:
        assert yaml.safe_load(default.strip("`")) == value


@pytest.mark.parametrize(
    ("heading", "model"),
    [("## Local nodes", LocalNode), ("## Classes and queues", SloClassConfig)],
)
def test_configuration_of_nested_values(heading: str, model: type[BaseModel]) -> None:
    rows = table("docs/configuration.md", heading)
    assert list(rows) == list(model.model_fields)
    for name, field in model.model_fields.items():
        assert rows[name][0].strip("`") == ("none" if field.default is None else str(field.default))


def test_configuration_tells_what_vllm_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.vllm_args.on_gpu", lambda: False)
    section = text("docs/configuration.md").split("\n## What Baton sets for vLLM\n")[1]
    told = " ".join(section.split("\n## ")[0].split())
    args = vllm_args(BatonConfig.model_construct())[2:]
    flags = [i for i, arg in enumerate(args) if arg.startswith("--")]
    for start, end in zip(flags, [*flags[1:], len(args)], strict=True):
        if args[start] != "--served-model-name":
            assert " ".join(args[start:end]) in told
    assert f"`{BUNDLED_MODEL_NAME}`" in told


# --- metrics and the life of a request ------------------------------------------------------------


def test_readme_has_every_metric_and_no_other() -> None:
    metrics = vars(RouterMetrics(CollectorRegistry())).values()
    names = {m._name + ("_total" if isinstance(m, Counter) else "") for m in metrics}
    rows = " ".join(table("README.md", "## Metrics and dashboard"))
    assert set(re.findall(r"baton_\w+", rows)) == names


def steps() -> list[str]:
    section = text("docs/life-of-a-request.md").split("## Step by step")[1].split("\n## ")[0]
    return re.split(r"^\d+\. ", section, flags=re.M)[1:]


@pytest.mark.parametrize("step", steps(), ids=lambda step: step.split("**")[1].strip("."))
def test_step_names_what_its_files_have(step: str) -> None:
    linked = [(ROOT / "docs" / target) for target in LINK.findall(step)]
    assert linked, "the step names no file"
    sources = "\n".join(path.read_text() for path in linked)
    names = [part for name in re.findall(r"`([\w.]+)`", step) for part in name.split(".")]
    assert names, "the step names no code"
    for name in names:
        assert re.search(rf"\b{name}\b", sources), name
