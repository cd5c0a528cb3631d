"""The catalogue: names as Ray, nvidia-smi and people write them, and a user's own entries."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.accelerators import (
    CPU,
    Accelerator,
    Catalogue,
    UnknownAccelerator,
    accelerator_from,
)


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue.load()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("H100", "H100"),
        ("h100", "H100"),
        ("accelerator_type:H100", "H100"),
        ("NVIDIA-H100-80GB-HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("A100", "A100-80G"),
        ("a100 80g", "A100-80G"),
        ("A100-40G", "A100-40G"),
        ("NVIDIA-A100-SXM4-40GB", "A100-40G"),
        ("A10G", "A10G"),
        ("A10", "A10"),
        ("L40S", "L40S"),
        ("L40", "L40"),
        ("L4", "L4"),
        ("T4", "T4"),
        ("Tesla T4", "T4"),
        ("V100", "V100"),
        ("H200", "H200"),
        ("H20", "H20"),
        ("L20", "L20"),
        ("B200", "B200"),
        ("GB200", "GB200"),
        ("AMD-Instinct-MI300X-OAM", "MI300X"),
        ("AMD-Instinct-MI300X-HF", "MI300X"),
        ("mi300x", "MI300X"),
        ("GeForce-RTX-4090", "RTX-4090"),
        ("Ascend910B", "Ascend 910B"),
        ("cpu", CPU),
    ],
)
def test_finds_every_spelling(catalogue: Catalogue, name: str, expected: str) -> None:
    assert catalogue.find(name).name == expected


def test_every_row_is_whole(catalogue: Catalogue) -> None:
    for name in catalogue.names:
        one = catalogue.find(name)
        assert one.name == name
        assert one.source not in ("", "user")
        assert one.power_w
        assert (one.link_gb_s is None) == (one.link is None)
        assert one.fp8_tflops is None or 1.9 < one.fp8_tflops / one.fp16_tflops < 2.1
    assert [name for name in catalogue.names if catalogue.find(name).nominal] == [CPU]


# Transcribed from the accelerator table of the deployment article: dense fp16 TFLOP/s, GB, GB/s, W.
@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("H800", (989, 80, 3350, 700)),
        ("A800", (312, 80, 2039, 400)),
        ("H20", (148, 96, 4000, 400)),
        ("L20", (119.5, 48, 864, 275)),
        ("A10", (125, 24, 600, 150)),
        ("A30", (165, 24, 933, 165)),
        ("V100", (125, 32, 900, 300)),
        ("Ascend 910B", (376, 64, 1600, 400)),
        ("Enflame Suisi 2.0", (160, 64, 1800, 300)),
        ("Kunlun XPU 2.0", (128, 32, 512, 150)),
    ],
)
def test_figures_are_the_published_ones(
    catalogue: Catalogue, name: str, figures: tuple[float, ...]
) -> None:
    one = catalogue.find(name)
    assert (one.fp16_tflops, one.memory_gb, one.bandwidth_gb_s, one.power_w) == figures


def test_unknown_name_says_what_is_known_and_how_to_add_one(catalogue: Catalogue) -> None:
    with pytest.raises(UnknownAccelerator) as error:
        catalogue.find("H101")
    message = str(error.value)
    assert "'H101'" in message
    assert "Did you mean H100?" in message
    assert all(name in message for name in catalogue.names)
    assert "extra_csv" in message
    assert "bandwidth_gb_s" in message
    assert catalogue.get("H101") is None


def test_own_accelerators_from_a_dict() -> None:
    own = {"Fast 1": {"fp16_tflops": 500, "memory_gb": "64", "bandwidth_gb_s": 3000}}
    found = Catalogue.load(extra=own).find("fast-1")
    assert found == Accelerator("Fast 1", 500.0, 64.0, 3000.0)


def test_own_csv_takes_names_over_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text(
        "name,aliases,fp16_tflops,memory_gb,bandwidth_gb_s,prefill_efficiency\n"
        "H100,,900,80,3000,0.65\nMine,A100|My GPU,300,40,1555,\n"
    )
    catalogue = Catalogue.load(extra_csv=path)
    assert catalogue.find("h100").prefill_efficiency == 0.65
    assert catalogue.find("A100").name == "Mine"
    assert catalogue.find("my-gpu").name == "Mine"
    assert catalogue.find("A100-80G").name == "A100-80G"
    assert set(Catalogue.load().names) | {"Mine"} == set(catalogue.names)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"fp16_tflops": 1, "memory_gb": 1}, "missing bandwidth_gb_s"),
        ({"fp16_tflops": "fast", "memory_gb": 1, "bandwidth_gb_s": 1}, "no number: 'fast'"),
        ({"fp16_tflops": 0, "memory_gb": 1, "bandwidth_gb_s": 1}, "fp16_tflops must be positive"),
        ({"fp16_tflops": "nan", "memory_gb": 1, "bandwidth_gb_s": 1}, "must be positive"),
        ({"fp16_tflops": 1, "memory_gb": 1, "bandwidth_gb_s": 1, "tflops": 2}, "tflops"),
        (
            {"fp16_tflops": 1, "memory_gb": 1, "bandwidth_gb_s": 1, "prefill_efficiency": 50},
            "share of 1",
        ),
    ],
)
def test_refuses_a_wrong_row(row: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accelerator_from({"name": "Mine", **row})


def test_a_name_belongs_to_one_accelerator() -> None:
    one = Accelerator("One", 1, 1, 1, aliases=("Same",))
    with pytest.raises(ValueError, match="'same' names both One and Two"):
        Catalogue([one, Accelerator("Two", 1, 1, 1, aliases=("same",))])


def test_a_csv_names_the_line_that_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("name,fp16_tflops,memory_gb,bandwidth_gb_s\nA,1,1,1\nB,x,1,1\n")
    with pytest.raises(ValueError, match=r"own\.csv line 3: B: fp16_tflops"):
        Catalogue.load(extra_csv=path)
    path.write_text("name,fp16_tflops,memory_gb,bandwidth_gb_s\nA,1,1,1\na,1,1,1\n")
    with pytest.raises(ValueError, match="listed twice"):
        Catalogue.load(extra_csv=path)


def test_the_fast_link_joins_only_so_many(catalogue: Catalogue) -> None:
    assert catalogue.find("A30").interconnect_gb_s(2) == 200
    assert catalogue.find("A30").interconnect_gb_s(4) == 64
    assert catalogue.find("L40S").interconnect_gb_s(2) == 64
