"""Headings come from the metrics' classes; tables have one order of columns."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

from fastgen.evaluation.headings import COSTS, Number, heading, number, ordered
from fastgen.evaluation.metrics import find_metric, metric_names
from fastgen.evaluation.metrics.base import Heading


def test_every_row_of_every_metric_has_the_heading_that_its_class_gives() -> None:
    shown = [(name, each) for metric in metric_names() for name, each in find_metric(metric).shows.items()]
    twice = [name for name, count in Counter(name for name, _ in shown).items() if count > 1]
    assert sorted(twice) == ["mode_entropy", "vendi"]  # of the digits' own features, of the scenes', and of others
    assert all(heading(name) == each for name, each in shown)
    assert heading("fd_digits") == Heading("FD-digits", "↓", 2)
    assert heading("never_heard_of") == Heading("never heard of", "", -1)


def test_columns_have_one_order_with_costs_and_unknown_names_last() -> None:
    names = ["x", "seconds_per_1000_images", "vendi", "prompt_accuracy", "vendi", "fd_digits", "training_seconds"]
    assert ordered(names) == ["fd_digits", "prompt_accuracy", "vendi", "training_seconds", "seconds_per_1000_images", "x"]


def test_costs_are_printed_in_other_units() -> None:
    rate = number({"name": "seconds_per_1000_images", "value": 2.0, "std": 0.1, "interval": [1.0, 4.0]})
    assert rate == Number(500.0, 25.0, (250.0, 1000.0), 0)
    assert number({"name": "seconds_per_1000_images", "value": 400.0}).text() == "2.50"
    assert number({"name": "peak_memory_bytes", "value": 3 * 2**30}).text() == "3,072"
    assert COSTS.keys() == {"seconds_per_1000_images", "peak_memory_bytes", "training_seconds", "network_passes"}


def test_an_interval_is_shown_before_the_spread_of_single_scores() -> None:
    row = {"name": "prompt_accuracy", "value": 0.9, "std": 0.3, "std_over": "images"}
    assert number(row).spread() == "± 0.300"
    assert number(row | {"interval": [0.85, 0.95]}).spread() == "[0.850, 0.950]"
    assert number({"name": "prompt_accuracy", "value": 0.9}).spread() == ""


def test_finding_headings_imports_no_library_of_an_extractor() -> None:
    heavy = "{'torch_fidelity', 'open_clip', 'transformers', 'diffusers', 'lpips', 'timm', 'torchvision'}"
    code = f"import sys, fastgen.report, fastgen.evaluation.headings as h; h.heading('fid'); print(sorted({heavy} & sys.modules.keys()))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.stdout == "[]\n", process.stdout + process.stderr
