"""`baton up` as a user runs it: Ray, Redis, workers, router, and nothing left afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from cluster import run_file, vllm_names
from cluster.config import BUNDLED_MODEL_NAME
from cluster.membership import Membership, open_redis
from cluster.pod_end import WORKER_TITLE, processes_titled
from tests.processes import (
    Process,
    free_port,
    http_status,
    metrics,
    spawn,
    total,
    wait_until_serving,
)

READY_WITHIN_S = 150.0
"""On 2 busy cores; alone it takes 20 to 30 s."""
GONE_WITHIN_S = 40.0
BATON = [sys.executable, "-m", "cluster.cli.main"]


@dataclass(frozen=True)
class Up:
    process: Process
    name: str
    url: str

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*BATON, *arguments, "--name", self.name], capture_output=True, text=True, timeout=90
        )


@contextlib.contextmanager
def up(folder: Path, *arguments: str) -> Iterator[Up]:
    port, name = free_port(), f"test-{os.getpid()}-{time.monotonic_ns()}"
    environment = {"XDG_RUNTIME_DIR": str(folder), "TMPDIR": str(folder)}
    command = [*BATON, "up", *arguments, "--port", str(port), "--name", name]
    process = spawn("up", command, folder, environment)
    url = f"http://127.0.0.1:{port}"
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    try:
        wait_until(lambda: "Serving " in process.output(), READY_WITHIN_S, process)
        assert http_status(f"{url}/health") == 200
        yield Up(process, name, url)
    finally:
        process.stop()
        # Later tests have folders of their own.
        if before is None:
            del os.environ["XDG_RUNTIME_DIR"]
        else:
            os.environ["XDG_RUNTIME_DIR"] = before


def wait_until(condition: Callable[[], bool], within_s: float, process: Process) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, process.output()
        assert process.popen.poll() is None or within_s == GONE_WITHIN_S, process.output()
        time.sleep(0.2)


def marked_processes(folder: Path) -> list[str]:
    """Command lines of processes that `baton up` started below this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            environment = (entry / "environ").read_bytes() if entry.name.isdigit() else b""
            if b"BATON_RUN_ID=" in environment and str(folder).encode() in environment:
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def assert_nothing_left(running: Up, folder: Path) -> None:
    wait_until(lambda: not marked_processes(folder), GONE_WITHIN_S, running.process)
    wait_until(lambda: not list(folder.glob("baton-*")), GONE_WITHIN_S, running.process)
    assert http_status(f"{running.url}/health") is None


@pytest.fixture(scope="module")
def short_tmp() -> Iterator[Path]:
    """Ray's sockets need a short path."""
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="bt", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def running(short_tmp: Path) -> Iterator[Up]:
    with up(short_tmp, "--stuck-after-s", "8") as started:
        yield started


def recall_prompt(rng: random.Random, pairs: int) -> tuple[str, str]:
    """A prompt for the bundled model, and its answer."""
    keys = rng.sample(range(200), pairs)
    values = [f"{rng.randrange(1000):03d}" for _ in keys]
    asked = rng.randrange(pairs)
    told = "".join(f"k{key}={value}; " for key, value in zip(keys, values, strict=True))
    return f"{told}k{keys[asked]}?", values[asked]


def test_right_answers_through_the_openai_client(running: Up) -> None:
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none")
    rng = random.Random(1)
    before = metrics(running.url)
    right = 0
    prompts = [recall_prompt(rng, pairs) for pairs in (2, 5, 10, 20, 40, 80, 120, 160)]
    for prompt, answer in prompts:
        chat = client.chat.completions.create(
            model=BUNDLED_MODEL_NAME, messages=[{"role": "user", "content": prompt}], temperature=0
        )
        right += chat.choices[0].message.content == answer
        assert chat.choices[0].finish_reason == "stop"
        completion = client.completions.create(
            model=BUNDLED_MODEL_NAME, prompt=prompt, temperature=0, max_tokens=8
        )
        assert completion.choices[0].text == chat.choices[0].message.content
        chunks = client.chat.completions.create(
            model=BUNDLED_MODEL_NAME,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            stream=True,
        )
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert streamed == chat.choices[0].message.content
    assert right >= len(prompts) - 1

    after = metrics(running.url)
    handed, held = "baton_handoffs_completed_total", 'baton_placements_total{reason="prefix held"}'
    handed_over = after[handed] - before[handed]
    # What the decode worker holds of an earlier request is not handed over once more.
    assert handed_over + after.get(held, 0) - before.get(held, 0) == 3 * len(prompts)
    assert handed_over >= len(prompts)
    assert total(after, "baton_handoffs_failed_total") == 0
    assert after["baton_handoff_bytes_total"] > before["baton_handoff_bytes_total"]


def test_start_shows_each_part(running: Up) -> None:
    told = running.process.output()
    for part in ("redis", "ray", "router", "prefill-0", "decode-0"):
        assert f"{part} " in told
    for state in ("starting", "loading", "ready"):
        assert state in told
    assert f"{running.url}/v1" in told
    assert f"{running.url}/dashboard" in told
    assert "curl " in told


def test_the_curl_line_works(running: Up) -> None:
    line = next(li for li in running.process.output().splitlines() if li.strip().startswith("curl"))
    answer = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60)
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"] == "018"


def test_status(running: Up) -> None:
    shown = running.command("status", "--json")
    assert shown.returncode == 0, shown.stderr
    status = json.loads(shown.stdout)
    assert {w["worker_id"]: w["state"] for w in status["workers"]} == {
        "prefill-0": "ready",
        "decode-0": "ready",
    }
    assert status["routers"][0]["url"] == running.url
    assert status["routers"][0]["workers"] == 2
    assert "prefill-0" in running.command("status").stdout


def test_a_second_one_is_refused(running: Up) -> None:
    second = running.command("up")
    assert second.returncode == 1
    assert "runs already" in second.stderr
    assert len(second.stderr.splitlines()) == 1


def test_no_command_line_tells_where_redis_is(running: Up, short_tmp: Path) -> None:
    """Its URL may have a password, as vLLM's arguments may have an API key."""
    run = run_file.running(running.name)
    assert run is not None
    commands = marked_processes(short_tmp)
    assert any(" -m router" in command for command in commands)
    assert not [command for command in commands if run.redis_url in command]


def test_another_router_joins_and_leaves(running: Up, short_tmp: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    port = url.rsplit(":", 1)[1]
    joined = spawn("joined", [*BATON, "router", "--port", port, "--name", running.name], short_tmp)
    try:
        wait_until_serving(url, joined)
        status = json.loads(running.command("status", "--json").stdout)
        assert {router["url"] for router in status["routers"]} == {running.url, url}
        prompt, answer = recall_prompt(random.Random(6), 10)
        for each in (url, running.url):
            client = openai.OpenAI(base_url=f"{each}/v1", api_key="none", max_retries=0)
            reply = client.completions.create(model=BUNDLED_MODEL_NAME, prompt=prompt)
            assert reply.choices[0].text == answer
    finally:
        joined.stop(signal.SIGKILL)
    reply = client.completions.create(model=BUNDLED_MODEL_NAME, prompt=prompt)
    assert reply.choices[0].text == answer


def test_dashboard_shows_the_workers(running: Up) -> None:
    page = httpx.get(f"{running.url}/dashboard").text
    assert "prefill-0" in page and "decode-0" in page
    state = httpx.get(f"{running.url}/dashboard/state").json()
    assert state["desired"] == {"prefill": 1, "decode": 1}
    assert [w["state"] for w in state["workers"]] == ["ready", "ready"]


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_killed_or_frozen_worker_comes_back(running: Up, signum: signal.Signals) -> None:
    """The controller starts it again, and requests go on meanwhile."""
    workers = json.loads(running.command("status", "--json").stdout)["workers"]
    victim = next(w for w in workers if w["worker_id"] == "decode-0")
    os.kill(victim["pid"], signum)
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
    prompt, answer = recall_prompt(random.Random(2), 10)
    completion = client.completions.create(model=BUNDLED_MODEL_NAME, prompt=prompt, temperature=0)
    assert completion.choices[0].text == answer

    def back() -> bool:
        now = json.loads(running.command("status", "--json").stdout)["workers"]
        return any(
            w["worker_id"] == "decode-0"
            and w["state"] == "ready"
            and w["incarnation"] != victim["incarnation"]
            for w in now
        )

    wait_until(back, READY_WITHIN_S, running.process)
    wait_until(lambda: not is_alive(victim["pid"]), GONE_WITHIN_S, running.process)
    wait_until(
        lambda: metrics(running.url)['baton_workers{pool="decode"}'] == 1,
        READY_WITHIN_S,
        running.process,
    )
    before = metrics(running.url)["baton_handoffs_completed_total"]
    prompt, answer = recall_prompt(random.Random(3), 10)
    completion = client.completions.create(model=BUNDLED_MODEL_NAME, prompt=prompt, temperature=0)
    assert completion.choices[0].text == answer
    assert metrics(running.url)["baton_handoffs_completed_total"] == before + 1


def test_drain_of_every_worker_under_load_fails_no_request(running: Up) -> None:
    """A rolling restart, and a worker that is told to end: each answer stays the one it was."""
    rng = random.Random(5)
    prompts = [recall_prompt(rng, 30)[0] for _ in range(8)]

    def ask(client: openai.OpenAI, prompt: str) -> str:
        reply = client.completions.create(
            model=BUNDLED_MODEL_NAME,
            prompt=prompt,
            temperature=0,
            max_tokens=60,
            extra_body={"ignore_eos": True},
        )
        return reply.choices[0].text

    def new_client() -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)

    expected = {prompt: ask(new_client(), prompt) for prompt in prompts}
    stop, wrong, asked = threading.Event(), [], []

    def load(index: int) -> None:
        client = new_client()
        while not stop.is_set():
            prompt = prompts[(index + len(asked)) % len(prompts)]
            asked.append(prompt)
            try:
                answer = ask(client, prompt)
            except Exception as error:
                answer = repr(error)
            if answer != expected[prompt]:
                wrong.append((prompt, answer))
            # So that the machine has time for the workers that start, too.
            stop.wait(0.5)

    threads = [threading.Thread(target=load, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    try:
        for worker in ("decode-0", "prefill-0"):
            drained = running.command("drain", worker, "--deadline", "1s")
            assert drained.returncode == 0, drained.stderr
            wait_until(lambda: ready_workers(running) == 2, READY_WITHIN_S, running.process)
        states = asyncio.run(told_to_end(running, "prefill-0"))
        assert states[:1] == ["draining"] and "failed" not in states, states
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not wrong
    assert len(asked) > 20


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "stat").read_text().split(") ")[-1][0] not in "ZX"
    return False


async def told_to_end(running: Up, worker_id: str) -> list[str]:
    """The states of a worker from SIGTERM until it is ready again."""
    run = run_file.running(running.name)
    assert run is not None
    client = open_redis(run.redis_url)
    membership = Membership(client, running.name, run.lease_s)
    (first,) = [w for w in await membership.workers() if w.worker_id == worker_id]
    # As the chart's preStop hook finds it.
    assert first.pid in processes_titled(WORKER_TITLE)
    os.kill(first.pid, signal.SIGTERM)
    states: list[str] = []
    deadline = time.monotonic() + READY_WITHIN_S
    while "ready" not in states and time.monotonic() < deadline:
        for record in await membership.workers():
            mine = record.worker_id == worker_id
            started = record.incarnation != first.incarnation or record.state != first.state
            if mine and started and states[-1:] != [record.state.value]:
                states.append(record.state.value)
        await asyncio.sleep(0.05)
    await client.aclose()
    assert "ready" in states, running.process.output()
    return states


def ready_workers(running: Up) -> int:
    workers = json.loads(running.command("status", "--json").stdout)["workers"]
    return sum(worker["state"] == "ready" for worker in workers)


def test_down_leaves_nothing(running: Up, short_tmp: Path) -> None:
    """The last test of the shared cluster."""
    down = running.command("down")
    assert down.returncode == 0, down.stderr
    assert_nothing_left(running, short_tmp)
    assert running.command("status").returncode != 0


def test_hardware_decides_the_role_and_kill_leaves_nothing(short_tmp: Path) -> None:
    """Several raylets that declare different accelerators, and a worker of two ranks; then
    `baton up` is killed outright."""
    nodes = [{"accelerator": "H20", "cpus": 2}, {"accelerator": "H100", "cpus": 1}]
    ranks = ("--decode-vllm-args", json.dumps(["--tensor-parallel-size", "2"]))
    names = set(vllm_names.SHARED.iterdir())
    with up(short_tmp, "--local-nodes", json.dumps(nodes), *ranks) as started:
        workers = json.loads(started.command("status", "--json").stdout)["workers"]
        placed = {w["pool"]: w["accelerator"] for w in workers}
        assert placed == {"prefill": "H100", "decode": "H20"}
        reasons = {w["pool"]: w["placement_reason"] for w in workers}
        assert "H100" in reasons["prefill"] and "H20" in reasons["decode"]
        prompt, answer = recall_prompt(random.Random(4), 12)
        body = {"model": BUNDLED_MODEL_NAME, "prompt": prompt, "temperature": 0}
        reply = httpx.post(f"{started.url}/v1/completions", json=body, timeout=60).json()
        assert reply["choices"][0]["text"] == answer
        assert metrics(started.url)["baton_handoffs_completed_total"] == 1
        started.process.popen.kill()
        started.process.popen.wait()
        assert_nothing_left(started, short_tmp)
    left = [path.name for path in set(vllm_names.SHARED.iterdir()) - names]
    assert not [name for name in left if name.startswith(vllm_names.PREFIXES)]


def test_role_pinned_to_an_accelerator_by_hand(short_tmp: Path) -> None:
    """Against what the hardware would decide."""
    nodes = [{"accelerator": "H20", "cpus": 1}, {"accelerator": "H100", "cpus": 1}]
    pins = ("--prefill-accelerator", "H20", "--decode-accelerator", "H100")
    with up(short_tmp, "--local-nodes", json.dumps(nodes), *pins, "--routers", "2") as started:
        status = json.loads(started.command("status", "--json").stdout)
        placed = {w["pool"]: w["accelerator"] for w in status["workers"]}
        assert placed == {"prefill": "H20", "decode": "H100"}
        # One of two routers that is killed comes back; the other serves meanwhile.
        port = int(started.url.rsplit(":", 1)[1]) + 1
        second = next(r for r in status["routers"] if r["url"].endswith(str(port)))
        os.kill(second["pid"], signal.SIGKILL)
        assert http_status(f"{started.url}/health") == 200
        again = f"{second['url']}, starting it again"
        wait_until(lambda: again in started.process.output(), READY_WITHIN_S, started.process)
        wait_until_serving(second["url"], started.process)


def test_interrupt_while_starting_leaves_nothing(short_tmp: Path) -> None:
    port, name = free_port(), f"test-{time.monotonic_ns()}"
    environment = {"XDG_RUNTIME_DIR": str(short_tmp), "TMPDIR": str(short_tmp)}
    command = [*BATON, "up", "--port", str(port), "--name", name]
    process = spawn("interrupted", command, short_tmp, environment)
    wait_until(lambda: "loading" in process.output(), READY_WITHIN_S, process)
    process.popen.send_signal(signal.SIGINT)
    process.popen.wait(GONE_WITHIN_S)
    assert_nothing_left(Up(process, name, f"http://127.0.0.1:{port}"), short_tmp)


WRONG = {
    "unknown flag": (["--no-such-flag"], "no-such-flag"),
    "wrong vLLM value": (["--max-model-len", "many"], "max-model-len"),
    "too long for the model": (["--max-model-len", "100000000"], "max_model_len"),
    "pin that no node has": (["--prefill-accelerator", "H100"], "H100"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_start_is_one_line(short_tmp: Path, what: str) -> None:
    arguments, said = WRONG[what]
    environment = {"XDG_RUNTIME_DIR": str(short_tmp), "TMPDIR": str(short_tmp)}
    failed = subprocess.run(
        [*BATON, "up", *arguments, "--port", str(free_port()), "--name", f"wrong-{os.getpid()}"],
        capture_output=True,
        text=True,
        timeout=READY_WITHIN_S,
        env={**os.environ, **environment},
    )
    assert failed.returncode == 1
    assert len(failed.stderr.strip().splitlines()) == 1, failed.stderr
    assert failed.stderr.startswith("baton: ")
    assert said in failed.stderr
    assert not marked_processes(short_tmp)
    assert not list(short_tmp.glob("baton-*"))
