"""Where a value comes from, and what is said about a wrong one."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from cluster.cli.options import POSITIONAL, config_options, flags_given
from cluster.config import BUNDLED_MODEL, BadConfig, BatonConfig, LocalNode, load_config
from cluster.config_names import leaves, variable
from cluster.scheduler.view import Pool
from cluster.supervisor import ROUTERS_HANDOFF
from cluster.vllm_args import flag_value, tensor_parallel, vllm_args
from workers.settings import HandoffSettings


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with no BATON_ variable set."""
    for name in [name for name in os.environ if name.upper().startswith("BATON_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def problem(flags: dict[str, Any] | None = None) -> str:
    with pytest.raises(BadConfig) as caught:
        load_config(flags or {})
    return str(caught.value)


# --- precedence -----------------------------------------------------------------------------------


def test_nothing_given_means_the_defaults() -> None:
    config = load_config({})
    assert (config.port, config.prefill, config.decode, config.name) == (8000, 1, 1, "baton")
    assert config.model_path == str(BUNDLED_MODEL)
    assert config.handoff.inbox_bytes == 1 << 30


def test_flags_then_environment_then_file(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(empty_folder / "baton.yaml", "port: 1\nprefill: 2\ndecode: 3\n")
    monkeypatch.setenv("BATON_PORT", "11")
    monkeypatch.setenv("BATON_PREFILL", "12")
    config = load_config({"port": "21"})
    assert (config.port, config.prefill, config.decode) == (21, 12, 3)


def test_nested_values_are_mixed_one_by_one(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(empty_folder / "baton.yaml", "handoff:\n  inbox_bytes: 1\n  idle_s: 2\n  staged_bytes: 3")
    monkeypatch.setenv("BATON_HANDOFF__INBOX_BYTES", "11")
    monkeypatch.setenv("BATON_HANDOFF__IDLE_S", "12.5")
    handoff = load_config({"handoff": {"idle_s": "21.5"}}).handoff
    assert (handoff.idle_s, handoff.inbox_bytes, handoff.staged_bytes) == (21.5, 11, 3)
    assert handoff.adopt_deadline_s == 10


def test_baton_config_names_another_file(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(empty_folder / "baton.yaml", "port: 1\nprefill: 7\n")
    monkeypatch.setenv("BATON_CONFIG", str(write(empty_folder / "other.yaml", "port: 2\n")))
    config = load_config({})
    # The file here is not read beside it.
    assert (config.port, config.prefill) == (2, 1)


def test_an_empty_file_says_nothing(empty_folder: Path) -> None:
    write(empty_folder / "baton.yaml", "# nothing yet\n")
    assert load_config({}).port == 8000


def test_names_without_a_value_say_nothing(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(empty_folder / "baton.yaml", "port:\nhandoff:\n  # codec: fp8\nvllm_args:\n")
    assert load_config({}) == BatonConfig()
    monkeypatch.setenv("BATON_HANDOFF__CODEC", "int8")
    assert load_config({}).handoff.codec == "int8"


def test_lists_are_json_in_the_environment_and_yaml_in_the_file(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(empty_folder / "baton.yaml", "local_nodes:\n  - accelerator: H100\n    gpus: 8\n")
    monkeypatch.setenv("BATON_VLLM_ARGS", '["--max-model-len", "512"]')
    config = load_config({})
    assert config.local_nodes == [LocalNode(accelerator="H100", gpus=8)]
    assert config.vllm_args == ["--max-model-len", "512"]


def test_a_pools_own_arguments_come_last_and_win(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        empty_folder / "baton.yaml",
        'model: m\nvllm_args: [--tensor-parallel-size, "1"]\n'
        'decode_vllm_args: [-tp, "2", --served-model-name=x]\n',
    )
    monkeypatch.setenv("BATON_PREFILL_VLLM_ARGS", '["--block-size", "32"]')
    config = load_config({})
    prefill, decode = (vllm_args(config, pool) for pool in Pool)
    assert (tensor_parallel(prefill), tensor_parallel(decode)) == (1, 2)
    assert flag_value(prefill, "--block-size") == "32" and "--block-size" not in decode
    # Defaults do not stand behind what was given.
    assert flag_value(decode, "--served-model-name") == "x"
    assert flag_value(prefill, "--served-model-name") == "m"
    assert "--block-size" not in vllm_args(config) and tensor_parallel(vllm_args(config)) == 1


# --- wrong values ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot: 8001", "prot: unknown, did you mean port?"),
        ("handof:", "handof: unknown, did you mean handoff?"),
        ("somewhere: 1", "somewhere: unknown"),
        ("handoff:\n  somewhere: 1", "handoff.somewhere: unknown"),
        ("handoff:\n  inbox: 1", "handoff.inbox: unknown, did you mean inbox_bytes?"),
        ("handoff: fp8", "handoff: it must hold names and values, got 'fp8'"),
        (
            "slo_classes:\n  chat: {ttft: 1}",
            "slo_classes.chat.ttft: unknown, did you mean ttft_ms?",
        ),
        ("slo_classes:\n  chat:", "slo_classes.chat: it must hold names and values, got None"),
        (
            "local_nodes:\n  - gpu: 1",
            "local_nodes.0.gpu: unknown, did you mean gpus?",
        ),
        (
            "vllm_args: [--max-model-len, 4096]",
            "vllm_args.1: input should be a valid string, got 4096: put it in quotes",
        ),
        (
            "handoff: {adopt_deadline_s: .inf}",
            "handoff.adopt_deadline_s: input should be a finite number, got inf",
        ),
        ("lease_s: .inf", "lease_s: input should be a finite number, got inf"),
        ("port: 99999", "port: input should be less than or equal to 65535, got 99999"),
        ("port: http", "port: input should be a valid integer"),
        ("local_nodes:\n  - cpus: 0", "local_nodes.0.cpus: input should be greater than 0, got 0"),
        (
            "policy: nearest",
            "policy: input should be 'splitwise', 'round_robin', 'random', 'power_of_two', "
            "'prefix_aware' or 'predicted_latency', got 'nearest'",
        ),
        ("name: a/b", "name: string should match pattern"),
        ("- port", "baton.yaml: it must hold names and values"),
        ("port", "baton.yaml: it must hold names and values"),
        ("port: [", "baton.yaml: while parsing"),
    ],
)
def test_a_wrong_file_is_named(empty_folder: Path, text: str, said: str) -> None:
    write(empty_folder / "baton.yaml", text)
    assert said in problem()


def test_every_wrong_value_is_named() -> None:
    said = problem({"port": "0", "lease_s": "-1"})
    assert "port: " in said and "lease_s: " in said


def test_a_wrong_variable_is_named(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_HANDOFF__INBOX_BYTES", "0")
    assert problem() == "handoff.inbox_bytes: input should be greater than 0, got '0'"
    # A file is not blamed for it.
    write(empty_folder / "baton.yaml", "port: 1\n")
    monkeypatch.setenv("BATON_VLLM_ARGS", "--max-model-len")
    said = problem()
    assert said.startswith("BATON_VLLM_ARGS: not JSON (")
    assert said.endswith('; it is written as ["--max-model-len", "4096"]')
    monkeypatch.setenv("BATON_VLLM_ARGS", "[]")
    monkeypatch.delenv("BATON_HANDOFF__INBOX_BYTES")
    monkeypatch.setenv("BATON_HANDOFF__CODEK", "fp8")
    assert problem() == "handoff.codek: unknown, did you mean codec?"


def test_every_value_that_is_json_has_an_example() -> None:
    for name, field in BatonConfig.model_fields.items():
        if field.default_factory is not None or name == "handoff":
            (example,) = field.examples or ()
            if name != "api_key_classes":
                load_config({name: example})


def test_a_named_file_must_be_there(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (empty_folder / "absent.yaml", empty_folder):
        monkeypatch.setenv("BATON_CONFIG", str(path))
        assert problem() == f"BATON_CONFIG names {path}, which is not a file"


def test_a_cluster_has_a_worker() -> None:
    assert "at least one worker" in problem({"prefill": 0, "decode": 0})
    assert load_config({"prefill": 0}).decode == 1


# --- misspelt variables ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("BATON_HANDOFF_CODEC", "BATON_HANDOFF__CODEC"),
        ("BATON_HANDOF__CODEC", "BATON_HANDOFF__CODEC"),
        ("BATON_PROT", "BATON_PORT"),
        ("baton_prefil", "BATON_PREFILL"),
        ("BATON_KEEP_WORKER", "BATON_KEEP_WORKERS"),
        ("BATON_CONFIG_", "BATON_CONFIG"),
        ("BATON_LOGFORMAT", "BATON_LOG_FORMAT"),
    ],
)
def test_a_misspelt_variable_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, meant: str
) -> None:
    monkeypatch.setenv(name, "1")
    assert problem() == f"{name}: unknown, did you mean {meant}?"


def test_kubernetes_variables_are_let_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod has them for each Service of its namespace, whatever that is called."""
    for service in ("BATON", "BATON_ROUTER", "BATON_ROUTERS", "BATON_PREFILL", "BATON_REDIS_URL"):
        for end in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP"):
            monkeypatch.setenv(f"{service}_{end}", "10.0.0.1")
        for end in ("", "_PROTO", "_PORT", "_ADDR"):
            monkeypatch.setenv(f"{service}_PORT_8000_TCP{end}", "tcp://10.0.0.1:8000")
        if service != "BATON":
            monkeypatch.setenv(f"{service}_PORT", "tcp://10.0.0.1:8000")
    assert load_config({}) == BatonConfig()


def test_variables_that_baton_has_for_itself_are_let_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its processes, images, chart and tests; and who has others has them for himself."""
    root, suffixes = Path(__file__).parents[2], (".py", ".sh", ".yaml", ".tpl", ".md")
    names = {"BATON_HOME", "BATON_VERSION", "BATON_IMAGE_TAG"}
    for folder in ("cluster", "router", "workers", "deploy", "helm", "docs", "tests"):
        for file in (root / folder).rglob("*"):
            if file.suffix in suffixes and file != Path(__file__):
                names |= set(re.findall(r"\bBATON_[A-Z0-9_]+", file.read_text()))
    paths = [*((name,) for name in BatonConfig.model_fields), *(p for p, _ in leaves(BatonConfig))]
    # The last is no variable, but a constant of the code.
    own = names - set(map(variable, paths)) - {"BATON_CONFIG", "BATON_STOP_DEADLINE_S"}
    assert {"BATON_RUN_ID", "BATON_LOG_FORMAT", "BATON_RAY_RESOURCES"} <= own
    for name in own:
        monkeypatch.setenv(name, "1")
    assert load_config({}) == BatonConfig()


def test_a_variable_can_hold_a_section_and_one_of_a_values_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BATON_HANDOFF", '{"codec": "fp8"}')
    monkeypatch.setenv("BATON_SLO_CLASSES__CHAT", '{"priority": 1}')
    config = load_config({})
    assert config.handoff.codec == "fp8" and config.slo_classes["chat"].priority == 1


# --- flags ----------------------------------------------------------------------------------------


@click.command()
@config_options()
def command(**flags: Any) -> None:
    click.echo(repr(flags_given(flags)))


def given(*args: str) -> dict[str, Any]:
    result = CliRunner().invoke(command, args)
    assert result.exit_code == 0, result.output
    flags: dict[str, Any] = eval(result.output)
    return flags


def test_every_value_has_a_flag_with_a_help_text() -> None:
    options = {param.opts[0]: param for param in command.params if isinstance(param, click.Option)}
    expected = {
        "--" + "-".join(path).replace("_", "-"): field
        for path, field in leaves(BatonConfig)
        if path[0] not in POSITIONAL
    }
    assert options.keys() == expected.keys()
    assert "--handoff-inbox-bytes" in options
    for name, field in expected.items():
        assert field.description and field.description in (options[name].help or "")


def test_only_flags_that_are_given_count() -> None:
    assert given() == {}
    assert given("--port", "9000", "--handoff-idle-s", "3", "--no-keep-workers") == {
        "port": "9000",
        "handoff": {"idle_s": "3"},
        "keep_workers": False,
    }


def test_flags_make_a_configuration() -> None:
    nodes = '[{"accelerator": "H100", "cpus": 2}, {"gpus": 1}]'
    config = load_config(given("--local-nodes", nodes, "--verbose", "--lease-s", "1.5"))
    assert config.local_nodes == [LocalNode(accelerator="H100", cpus=2), LocalNode(gpus=1)]
    assert config.verbose is True
    assert config.lease_s == 1.5


def test_a_flag_that_is_not_json_says_so() -> None:
    result = CliRunner().invoke(command, ["--local-nodes", "H100"])
    assert result.exit_code == 2
    assert "--local-nodes" in result.output and "is not JSON" in result.output
    assert '[{"accelerator": "H100", "cpus": 2}]' in result.output


def test_some_commands_take_some_flags() -> None:
    @click.command()
    @config_options("name", "lease_s")
    def some(**flags: Any) -> None: ...

    assert [param.opts for param in some.params] == [["--name"], ["--lease-s"]]


def test_workers_know_all_that_they_are_told_of_the_hand_off() -> None:
    told = BatonConfig().handoff.model_dump(exclude=ROUTERS_HANDOFF)
    assert told.keys() == {field.name for field in fields(HandoffSettings)}
