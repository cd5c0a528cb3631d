"""vLLM's flags for its HTTP server, in a router."""

from __future__ import annotations

import ssl
import subprocess
import time
from pathlib import Path

import httpx

from tests.integration.stubs import DEADLINE_S, stub_workers
from tests.nursery import Nursery


def test_tls_whose_certificate_changes_and_a_quiet_access_log(
    tmp_path: Path, vllm_args: list[str], nursery: Nursery
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"

    def certify(serial: int) -> None:
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
        command += ["-set_serial", str(serial), "-keyout", str(key), "-out", str(certificate)]
        subprocess.run(command, check=True, capture_output=True)

    def serves() -> bool:
        """With the latest certificate."""
        try:
            trust = ssl.create_default_context(cafile=str(certificate))
            return httpx.get(f"{url}/health", verify=trust, timeout=5).status_code == 200
        except (httpx.HTTPError, ssl.SSLError):
            return False

    def wait_until_it_serves() -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not serves():
            assert router.popen.poll() is None, router.output()
            assert time.monotonic() < deadline_s, router.output()
            time.sleep(0.1)

    certify(1)
    flags = ["--ssl-keyfile", str(key), "--ssl-certfile", str(certificate), "--enable-ssl-refresh"]
    flags += ["--disable-access-log-for-endpoints", "/health"]
    with stub_workers(tmp_path, [*vllm_args, *flags], nursery) as cluster:
        url, router = cluster.start_another_router()
        url = url.replace("http://", "https://")
        try:
            wait_until_it_serves()
            certify(2)
            wait_until_it_serves()
            httpx.get(f"{url}/version", verify=False)
        finally:
            cluster.stop()
        said = router.output()
        assert "GET /version" in said and "GET /health" not in said
