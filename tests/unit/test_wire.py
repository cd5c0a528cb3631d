"""The generated modules say what the .proto files say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTO = ROOT / "proto" / "baton" / "v1"
WIRE = ROOT / "cluster" / "wire"
PROTOS = sorted(path.stem for path in PROTO.glob("*.proto"))
ENDS = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make proto` would write."""
    folder = tmp_path_factory.mktemp("proto")
    outputs = [f"--{kind}={folder}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    sources = [f"cluster/wire/{name}.proto" for name in PROTOS]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Icluster/wire=proto/baton/v1"]
    subprocess.run([*command, *outputs, *sources], cwd=ROOT, check=True)
    return folder / "cluster" / "wire"


def test_every_proto_is_generated(generated: Path) -> None:
    names = {path.name for path in generated.iterdir()}
    assert names == {f"{name}{end}" for name in PROTOS for end in ENDS}
    assert names == {path.name for path in WIRE.glob("*_pb2*")}


@pytest.mark.parametrize("name", [f"{name}{end}" for name in PROTOS for end in ENDS])
def test_generated_module_is_up_to_date(generated: Path, name: str) -> None:
    assert (WIRE / name).read_text() == (generated / name).read_text(), "run `make proto`"
