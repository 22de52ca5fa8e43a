"""Metrics of external programs: real programs on real dumped pictures."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastgen.errors import UserError
from fastgen.evaluation.dumps import PngFolder
from fastgen.evaluation.external import External
from fastgen.evaluation.extractors.base import Resources
from fastgen.evaluation.metrics import find_metric
from fastgen.evaluation.metrics.base import Measured, Metric
from fastgen.evaluation.metrics.external_process import ExternalMetric, further_metrics
from fastgen.evaluation.protocol import SampleSet, protocol_from
from fastgen.evaluation.weights import Unavailable

SET = SampleSet("main", ("one", "one", "three", "three"), (1, 2, 3, 4), per_prompt=2, chunk=4)
MEAN_RED = """if True:
    import json, pathlib, sys
    from PIL import Image
    folder = pathlib.Path(sys.argv[-1])
    with (folder.parent / "asked").open("a") as asked:
        asked.write("x")
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").open()]
    reds = [Image.open(folder / row["file_name"]).getpixel((0, 0))[0] for row in rows]
    print(json.dumps({"scores": [red * len(row["prompt"]) for red, row in zip(reds, rows)]}))
"""


def resources(name: str, code: str) -> Resources:
    return Resources(external={name: External((sys.executable, "-c", code), 60)})


def metric(name: str, given: Resources) -> Metric:
    kind = find_metric(name)
    return kind(kind.Config(), ["main", "other"], given)


@pytest.fixture
def measured(tmp_path: Path) -> Measured:
    pixels = torch.tensor([10, 20, 30, 40], dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 3, 8, 8)
    dump = PngFolder(tmp_path / "main", SET, "m")
    dump.write(range(4), pixels)
    return Measured({"main": SET}, {}, pictures={"main": dump.folder})


def test_scores_are_of_each_picture_and_the_interval_is_over_prompts(measured: Measured, tmp_path: Path) -> None:
    reward = metric("image_reward", resources("image_reward", MEAN_RED))
    assert reward.needs().pictures == ("main",)
    (value,) = reward.measure(measured)
    assert value.name == "image_reward"
    assert (value.value, value.n) == (110.0, 4)  # 10 and 20 times 3, 30 and 40 times 5
    assert torch.equal(reward.scores(measured)["image_reward"], torch.tensor([30.0, 60.0, 150.0, 200.0], dtype=torch.float64))
    assert (tmp_path / "asked").read_text() == "x", "a program of minutes is asked once"


def test_without_a_program_it_says_what_to_install() -> None:
    with pytest.raises(Unavailable, match=r"^needs a program in an environment of its own: pip install image-reward there; name it with "):
        metric("image_reward", Resources()).needs()
    with pytest.raises(Unavailable, match=r"improved-aesthetic-predictor.*; name it with --external aesthetic='COMMAND'$"):
        metric("aesthetic", Resources()).needs()


def test_a_single_value_has_no_interval(measured: Measured) -> None:
    one = metric("aesthetic", resources("aesthetic", 'print(\'{"value": 5.5, "n": 3}\')'))
    (value,) = one.measure(measured)
    assert (value.name, value.value, value.n, value.std, value.interval) == ("aesthetic", 5.5, 3, None, None)
    assert one.scores(measured) == {}


def test_a_program_that_fails_leaves_its_log_beside_the_pictures(measured: Measured, tmp_path: Path) -> None:
    code = "import sys; sys.exit('no module named timm')"
    with pytest.raises(
        Unavailable, match=r"ended with exit status 1; it wrote last 'no module named timm', and the rest is in '.*main\.aesthetic\.log'"
    ):
        metric("aesthetic", resources("aesthetic", code)).measure(measured)
    assert (tmp_path / "main.aesthetic.log").read_text() == "no module named timm\n"


def test_pictures_that_were_not_kept_are_asked_for(measured: Measured) -> None:
    with pytest.raises(Unavailable, match="needs the pictures of the set main as PNGs"):
        metric("aesthetic", resources("aesthetic", MEAN_RED)).measure(replace(measured, pictures=None))


def test_a_users_own_program_is_a_metric_of_its_name(measured: Measured) -> None:
    given = Resources(external={"my_score": resources("x", MEAN_RED).external["x"], "image_reward": External(("true",))})
    found = further_metrics(["main"], given)
    assert list(found) == ["my_score"], "image_reward is a metric already"
    (value,) = found["my_score"].measure(measured)
    assert value.name == "my_score" and value.value == 110
    assert found["my_score"].shows["my_score"].text == "my score"


@pytest.mark.parametrize("name", ["digits", "clip_score", "cmmd", "fd_digits", "peak_memory_bytes"])
def test_no_program_takes_the_name_of_what_is_measured_here(name: str) -> None:
    with pytest.raises(UserError, match=rf"^--external {name}: fastgen measures that itself; give the program another name$"):
        further_metrics(["main"], resources(name, ""))


def test_a_protocol_file_names_the_metric_and_no_command() -> None:
    content = {"name": "mine", "sets": {"main": {"prompts": "fastgen:classes/4"}}, "metrics": {"image_reward": None}}
    assert list(protocol_from(content).metrics(Resources())) == ["image_reward"]
    content["metrics"] = {"image_reward": {"command": "rm -r /"}}
    with pytest.raises(UserError, match=r"metrics\.image_reward\.command"):
        protocol_from(content)


def test_the_interval_is_students_over_two_prompts(measured: Measured) -> None:
    (value,) = metric("image_reward", resources("image_reward", MEAN_RED)).measure(measured)
    assert value.std_over == value.interval_over == "prompts"
    assert value.std == pytest.approx((175 - 45) / math.sqrt(2))
    assert value.interval == pytest.approx((110 - 12.706204736432095 * 65, 110 + 12.706204736432095 * 65))


def test_external_metrics_declare_one_row_of_their_own_name() -> None:
    for name in ("image_reward", "aesthetic"):
        kind = find_metric(name)
        assert issubclass(kind, ExternalMetric) and list(kind.shows) == [name] and kind.install
