"""The doctor's report is complete, true of this machine, and says what is missing."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

import fastgen
from fastgen import doctor


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty package fastgen_kernels that hides an installed one."""
    package = tmp_path / "fastgen_kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in [name for name in sys.modules if name.partition(".")[0] == "fastgen_kernels"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "fastgen_kernels"]:
        del sys.modules[name]


def test_report_names_versions_devices_and_places() -> None:
    began = time.perf_counter()
    report = dict(doctor.doctor_report())
    assert time.perf_counter() - began < 60  # waits for nobody
    assert report["fastgen"] == fastgen.__version__
    assert report["python"].startswith(platform.python_version())
    assert report["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"diffusers", "transformers", "accelerate", "peft", "triton"} <= report.keys()
    assert report["CPU"] == f"{torch.get_num_threads()} threads"
    assert report["hub cache"].startswith(constants.HF_HUB_CACHE)


def test_the_path_that_attention_tangents_take_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    report = dict(doctor.doctor_report())
    assert ("Triton" if torch.cuda.is_available() else "plain PyTorch reference") in report["kernel jvp_attention"]


def test_a_package_that_is_missing_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package-of-fastgen"))
    assert dict(doctor.doctor_report())["no-such-package-of-fastgen"] == "not installed"


def test_cuda_devices_are_listed_with_memory_and_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: device)
    report = dict(doctor.doctor_report())
    assert report["cuda:0"] == report["cuda:1"] == "NVIDIA H200, 140.0 GiB, compute capability 9.0"
    assert "CUDA" not in report


def test_kernels_describe_themselves(kernels: Path) -> None:
    for name, code in {
        "attention": "def describe():\n    return 'triton, forward and jvp'\n",
        "plain": "",
        "broken": "import no_such_package_of_fastgen\n",
    }.items():
        (kernels / name).mkdir()
        (kernels / name / "__init__.py").write_text(code)
    report = dict(doctor.doctor_report())
    assert report["kernel attention"] == "triton, forward and jvp"
    assert report["kernel plain"] == "present"
    assert report["kernel broken"] == "cannot be imported: No module named 'no_such_package_of_fastgen'"


def test_without_kernels_attention_is_native(kernels: Path) -> None:
    assert dict(doctor.doctor_report())["kernels"] == "no kernels in this version: native PyTorch attention"


@pytest.mark.parametrize(("offline", "start"), [(True, "offline"), (False, "online")])
def test_hub_access(offline: bool, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert dict(doctor.doctor_report())["hub access"].startswith(start)


def test_bundled_teachers_are_folders_with_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ASSETS", tmp_path)
    assert ("bundled teachers", "none") in doctor.doctor_report()
    for name in ("digits", "shapes", "classifier"):
        (tmp_path / name).mkdir()
    (tmp_path / "digits" / "model_index.json").write_text("{}")
    (tmp_path / "shapes" / "model_index.json").write_text("{}")
    (tmp_path / "shapes" / "weights.safetensors").write_bytes(bytes(2_500_000))
    teachers = [value for name, value in doctor.doctor_report() if name == "bundled teacher"]
    assert teachers == ["fastgen:digits (0.0 MB)", "fastgen:shapes (2.5 MB)"]


def test_printed_columns_are_aligned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "doctor_report", lambda: [("a", "1"), ("long name", "2")])
    doctor.print_doctor()
    assert capsys.readouterr().out == "a          1\nlong name  2\n"
