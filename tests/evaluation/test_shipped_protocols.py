"""Every shipped protocol: it can be read, its metrics can be built, and it says what its project's own evaluation does."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fastgen import cli
from fastgen.config import validate
from fastgen.errors import UserError
from fastgen.evaluation.protocol import Protocol, ProtocolFile, load_protocol, protocol_from, shipped_protocols
from fastgen.yaml_files import read_yaml

# Prompt files that are not shipped, and how many prompts the real ones hold.
FILES = {"coco10k/all_prompts.txt": 10_000, "captions_coco14_test.txt": 30_000, "MJHQ-30K/prompts.jsonl": 30_000, "PartiPrompts.txt": 1_632}
TF1 = {"resize": "tf1"}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, count in FILES.items():
        form = '{{"prompt": "prompt {}"}}\n' if name.endswith(".jsonl") else "prompt {}\n"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(form.format(index) for index in range(count)))
    return folder


def stood_in(name: str, folder: Path) -> Protocol:
    """A shipped protocol, read with stand-ins, whose hashes cannot be those recorded."""
    content = read_yaml(shipped_protocols()[name])
    for block in content["sets"].values():
        block.pop("sha256", None)
    return protocol_from(content, data_dir=folder)


def spec_of(name: str) -> ProtocolFile:
    return validate(ProtocolFile, read_yaml(shipped_protocols()[name]))


def test_those_that_are_shipped() -> None:
    known = {"adm50k", "coco10k-sdxl", "coco30k-sd15", "digits", "edm50k", "few-step-2026", "imagenet256-adm", "mjhq30k", "scenes"}
    assert shipped_protocols().keys() == known


@pytest.mark.parametrize("name", shipped_protocols())
def test_it_is_read_and_its_metrics_are_built(name: str, stand_ins: Path) -> None:
    protocol = stood_in(name, stand_ins)
    assert protocol.name == name
    for metric in protocol.metrics(protocol.resources).values():
        assert metric.set in protocol.sets and metric.config is not None
    seeds = [seed for samples in protocol.sets.values() for seed in samples.seeds]
    assert len(set(seeds)) == len(seeds) == sum(map(len, protocol.sets.values()))


@pytest.mark.parametrize("name", shipped_protocols())
def test_its_first_comment_is_its_command(name: str) -> None:
    first, _, rest = shipped_protocols()[name].read_text().partition("\n")
    assert re.match(rf"# fastgen evaluate \w+ --protocol {name}( --data-dir DATA --weights-dir WEIGHTS)?     \S", first)
    assert len(first) <= 150 and rest.startswith(f"name: {name}\n")


@pytest.mark.parametrize("name", shipped_protocols())
def test_what_is_not_shipped_says_where_it_can_be_had(name: str) -> None:
    spec = spec_of(name)
    for block in [*spec.sets.values(), *([] if spec.reference is None else [spec.reference])]:
        file = getattr(block, "prompts", None) or getattr(block, "file", None) or getattr(block, "images", None)
        if file is not None and not file.startswith("fastgen:") and block.source is None:
            assert file in {other.prompts for other in spec.sets.values() if other.source}, "said once a file"


@pytest.mark.parametrize("name", [name for name in shipped_protocols() if any(FILES.get(str(each.prompts)) for each in spec_of(name).sets.values())])
def test_a_prompt_file_that_is_missing_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^protocol {name}: sets\.main\.prompts: no file '.*': get it from https://") as refused:
        load_protocol(name, data_dir=tmp_path)
    assert "\n" not in str(refused.value)


def test_a_prompt_file_that_is_another_is_refused(stand_ins: Path) -> None:
    with pytest.raises(UserError, match=r"is not the recorded file: its SHA-256 is [0-9a-f]{64}, not edabd2a5"):
        load_protocol("coco30k-sd15", data_dir=stand_ins)


@pytest.mark.parametrize(
    ("name", "size", "counts", "quantisation", "prepare", "metrics"),
    [
        (
            "coco10k-sdxl", 1024, [10_000], "truncate", ("centre", 512, "lanczos"),
            {"fid": {"resize": "clean"}, "patch_fid": {}, "clip_score": {"preset": "dmd2", "prefix": "A photo depicts ", "square": 256}},
        ),
        (
            "coco30k-sd15", 512, [30_000], "truncate", ("centre", 256, "lanczos"),
            {"fid": {"resize": "clean"}, "clip_score": {"model": "ViT-g-14", "pretrained": "laion2b_s12b_b42k", "square": None}},
        ),
        (
            "mjhq30k", 1024, [30_000], "edm", ("centre", 1024, "bilinear"),
            {"fid": {"resize": "pytorch_fid"}, "clip_score": {"model": "ViT-L-14", "pretrained": "openai", "prefix": "", "scale": 100.0}},
        ),
        ("edm50k", 32, [50_000], "edm", ("none", None, "lanczos"), {"fid": TF1, "fid_infinity": TF1}),
        (
            "adm50k", 256, [50_000], "edm", ("none", None, "lanczos"),
            {"fid": TF1, "sfid": TF1, "inception_score": {"splits": 10}, "precision_recall": {"k": 3}},
        ),
        (
            "imagenet256-adm", 256, [50_000], "edm", ("none", None, "lanczos"),
            {"fid": TF1, "sfid": TF1, "inception_score": {"splits": 10}, "precision_recall": {"k": 3}},
        ),
        (
            "few-step-2026", None, [1_632, 1_600], "edm", ("none", None, "lanczos"),
            {"clip_score": {}, "pick_score": {}, "hps_v21": {}, "image_reward": {}, "aesthetic": {}, "dino_diversity": {"set": "diverse"},
             "lpips_diversity": {"set": "diverse", "size": 512, "range": "unit"}},
        ),
    ],
)  # fmt: skip
def test_conventions(
    name: str, size: int | None, counts: list[int], quantisation: str, prepare: tuple[Any, ...], metrics: dict[str, dict[str, Any]], stand_ins: Path
) -> None:
    protocol = stood_in(name, stand_ins)
    spec = protocol.spec
    assert spec.size == (None if size is None else [size, size])
    assert [len(samples) for samples in protocol.sets.values()] == counts
    assert spec.quantisation == quantisation and (spec.prepare.crop, spec.prepare.resize, spec.prepare.filter) == prepare
    built = protocol.metrics(protocol.resources)
    assert metrics.keys() == built.keys() - ({"fid_infinity"} - metrics.keys())
    for which, options in metrics.items():
        assert {key: getattr(built[which].config, key) for key in options} == options


def test_classes_are_drawn_equally_often() -> None:
    prompts = load_protocol("imagenet256-adm").sets["main"].prompts
    assert set(Counter(prompts).values()) == {50} and set(prompts) == set(map(str, range(1000)))


def test_seeds_of_edm_count_up() -> None:
    assert load_protocol("edm50k").sets["main"].seeds == tuple(range(50_000))


def test_few_step_students_are_not_judged_by_distance_alone(stand_ins: Path) -> None:
    protocol = stood_in("few-step-2026", stand_ins)
    assert not {"fid", "kid", "fd_dinov2", "cmmd"} & protocol.spec.metrics.keys()
    diverse = protocol.sets["diverse"]
    assert diverse.per_prompt == 8 and diverse.prompts[:9] == ("prompt 0",) * 8 + ("prompt 1",)


def test_list_names_every_protocol_with_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["protocols", "list"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in lines] == sorted(shipped_protocols())
    assert all("fastgen evaluate" in line for line in lines)


def test_show_prints_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["protocols", "show", "coco10k-sdxl"]) == 0
    assert capsys.readouterr().out.strip() == shipped_protocols()["coco10k-sdxl"].read_text().strip()


def test_show_of_another_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["protocols", "show", "coco10k"]) == 2
    assert re.fullmatch(r"error: unknown protocol 'coco10k' \(NAME\): did you mean 'coco10k-sdxl'\?.*\n", capsys.readouterr().err)
