"""A teacher tuned with LoRA adapters is the stock pipeline with the same adapters, whatever wrote their keys, and what does not fit it is refused."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cells import PROMPTS, recipe
from pipelines import tiny_sd3
from safetensors.torch import load_file, save_file
from stock import check_pictures, drawn_by_stock
from tiny_dit import tiny_dit
from tiny_flux import tiny_flux
from tiny_pixart import tiny_pixart
from tiny_qwen import tiny_qwen
from tiny_sana import tiny_sana
from tiny_sd15 import tiny_sd15
from tiny_sdxl import tiny_sdxl
from tiny_wan import tiny_wan
from tiny_zimage import tiny_zimage
from tuned import diffusers, factors, kohya, native_wan, peft, saved, stock_with, trained_by_peft, xlabs_flux

from fastgen import load_teacher
from fastgen.config import Recipe, validate
from fastgen.data.encoders import origin_of
from fastgen.errors import UserError
from fastgen.families import find_family, parts_hash, source_hash
from fastgen.plan import identified_teacher, plan
from fastgen.run import dry_run

torch.set_num_threads(1)
OPTIONS: Mapping[str, dict[str, Any]] = {
    "sd": {}, "sdxl": {"size": [16, 24]}, "sd3": {"max_sequence_length": 16}, "flux": {"size": [16, 16], "max_sequence_length": 20},
    "wan": {"size": [16, 16], "frames": 5, "max_sequence_length": 19}, "sana": {"max_sequence_length": 18},
    "qwen_image": {"size": [32, 32], "max_sequence_length": 40}, "z_image": {"size": [16, 16], "max_sequence_length": 40},
    "dit": {}, "pixart": {"max_sequence_length": 22},
}  # fmt: skip
BUILD: Mapping[str, Callable[[], Any]] = {
    "sd": tiny_sd15, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux, "wan": tiny_wan, "sana": tiny_sana, "qwen_image": tiny_qwen,
    "z_image": tiny_zimage, "dit": tiny_dit, "pixart": tiny_pixart,
}  # fmt: skip
DIALECTS = [(name, peft) for name in BUILD if name not in ("dit", "pixart")]
DIALECTS += [(name, dialect) for name in ("sd", "sdxl") for dialect in (diffusers, kohya)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def made(name: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / "tuned" / name
        if not folder.exists():
            BUILD[name]().save_pretrained(folder)
        return folder

    return made


def lora(*files: tuple[Path, float]) -> list[dict[str, Any]]:
    return [{"path": str(file), "weight": weight} for file, weight in files]


@pytest.mark.parametrize(("name", "dialect"), [pytest.param(*case, id=f"{case[0]}-{case[1].__name__}") for case in DIALECTS])
def test_it_draws_what_stock_draws_with_the_same_adapters(name: str, dialect: Any, folders: Any, tmp_path: Path) -> None:
    folder, pipeline = folders(name), BUILD[name]()
    size = 0.1 if name == "wan" else 0.2  # of which its pictures saturate
    one = (saved(dialect(factors(pipeline, size=size)), tmp_path / "one.safetensors"), 0.7)
    two = (saved(peft(factors(pipeline, seed=1, size=size)), tmp_path / "two.safetensors"), -0.4)
    stock = stock_with(folder, one, two)
    family = find_family(folder, lora=lora(one, two), **OPTIONS[name])
    assert not family.warnings
    pictures = check_pictures(family, stock, steps=2, slack=5)  # ours are fused, stock's go beside: other sums
    plain = drawn_by_stock(family, BUILD[name](), steps=2)
    assert (pictures - plain).abs().max() > 0.003, "the adapters must show"


@pytest.mark.parametrize(("name", "state"), [("flux", xlabs_flux(32)), ("wan", native_wan(24, 2))], ids=["XLabs", "Wan's own"])
def test_keys_of_other_trainers_are_what_stock_takes_them_for(name: str, state: Any, folders: Any, tmp_path: Path) -> None:
    own = (saved(state, tmp_path / "own.safetensors"), 0.6)
    family = find_family(folders(name), lora=lora(own), **OPTIONS[name])
    assert not family.warnings
    x, t, cond = torch.randn(2, *family.latent.shape), torch.tensor([0.9, 0.4]), family.encode_prompts(PROMPTS)
    with torch.no_grad():
        ours = family.call(family.load_backbone(), x, t, cond)
        theirs, plain = (family.call(each.transformer, x, t, cond) for each in (stock_with(folders(name), own), BUILD[name]()))
    assert (ours - theirs).abs().max() <= 2e-6 and (ours - plain).abs().max() > 0.01


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_an_adapter_of_one_part_leaves_the_others(name: str, folders: Any, tmp_path: Path) -> None:
    folder, pipeline = folders(name), BUILD[name]()
    for part in pipeline._lora_loadable_modules:
        file = saved(factors(pipeline, parts=(part,)), tmp_path / f"{part}.safetensors")
        family, bare = find_family(folder, lora=lora((file, 1.0)), **OPTIONS[name]), find_family(folder, **OPTIONS[name])
        texts, own = family.encode_prompts(PROMPTS), bare.encode_prompts(PROMPTS)
        assert any(not torch.equal(texts[key], own[key]) for key in own) == part.startswith("text")
        weights, plain = family.load_backbone().state_dict(), bare.load_backbone().state_dict()
        assert weights.keys() == plain.keys()
        changed = {key for key in plain if not torch.equal(weights[key], plain[key])}
        assert bool(changed) == (not part.startswith("text"))
        check_pictures(family, stock_with(folder, (file, 1.0)), steps=1, slack=5)


def test_weights_are_the_base_and_the_sum_of_what_is_added(folders: Any, tmp_path: Path) -> None:
    pipeline, weights = tiny_sd15(), (1.5, -0.25)
    states = [factors(pipeline, seed=seed, parts=("unet",)) for seed in range(2)]
    files = [(saved(kohya(state), tmp_path / f"{seed}.safetensors"), weights[seed]) for seed, state in enumerate(states)]
    network = find_family(folders("sd"), lora=lora(*files)).load_backbone()
    for key in (key.removesuffix(".lora_A.weight") for key in states[0] if key.endswith("lora_A.weight")):
        place = key.removeprefix("unet.")
        added = [
            2.0 / 3 * weight * state[f"{key}.lora_B.weight"].double() @ state[f"{key}.lora_A.weight"].double()
            for state, weight in zip(states, weights, strict=True)
        ]
        expected = pipeline.unet.get_submodule(place).weight.double() + sum(added)
        assert (network.get_submodule(place).weight - expected).abs().max() <= 1e-6 * expected.abs().max()


SCALES: dict[str, tuple[dict[str, Any], Callable[[str], float]]] = {
    "alpha over rank": ({"lora_alpha": 2.0}, lambda name: 2 / 3),
    "over its root": ({"lora_alpha": 2.0, "use_rslora": True}, lambda name: 2 / 3**0.5),
    "of each layer": (
        {"lora_alpha": 2.0, "alpha_pattern": {"to_v": 5.0}, "rank_pattern": {"to_v": 2}}, lambda name: 5 / 2 if name.endswith("to_v") else 2 / 3
    ),
    "of convolutions": ({"lora_alpha": 2.0, "targets": ("conv1", "to_q")}, lambda name: 2 / 3),
}  # fmt: skip


@pytest.mark.parametrize("case", SCALES)
def test_weights_are_a_sum_however_the_file_scales_its_factors(case: str, folders: Any, tmp_path: Path) -> None:
    (config, scale), weights, plain = SCALES[case], (0.7, -1.3), tiny_sd15().unet
    files, tuned = zip(*(trained_by_peft(tiny_sd15(), tmp_path / str(seed), seed=seed, **config) for seed in range(2)), strict=True)
    network = find_family(folders("sd"), lora=lora(*zip(files, weights, strict=True))).load_backbone()
    places = [name for name, module in tuned[0].named_modules() if hasattr(module, "lora_A")]
    for name in places:
        expected = plain.get_submodule(name).weight.double()
        for weight, each in zip(weights, tuned, strict=True):
            layer: Any = each.get_submodule(name)
            down, up = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
            expected = expected + weight * scale(name) * (up.flatten(1) @ down.flatten(1)).view(expected.shape)
        assert (network.get_submodule(name).weight - expected).abs().max() <= 1e-6 * expected.abs().max(), name
    others = {key for key in plain.state_dict() if key.removesuffix(".weight") not in places}
    assert others and all(torch.equal(network.state_dict()[key], plain.state_dict()[key]) for key in others)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_alphas_that_diffusers_confuses_are_refused(part: str, folders: Any, tmp_path: Path) -> None:
    """In kohya's keys it gives all layers the most frequent alpha. Where that is each one's, or where the factors hold it, weights are sums."""
    state, weight = factors(tiny_sd15(), parts=(part,)), 0.6
    named = kohya(state)
    alphas = {key: 2.0 + (i == 1) for i, key in enumerate(key for key in named if key.endswith(".alpha"))}
    mixed = saved(named | {key: torch.tensor(alpha) for key, alpha in alphas.items()}, tmp_path / "mixed.safetensors")
    refused = r"^recipe key teacher\.lora\.0\.path: 'mixed\.safetensors' has alphas that differ from layer to layer, .*"
    with pytest.raises(UserError, match=refused) as error:
        dry_run(tuned_recipe(folders, tmp_path, lora=lora((mixed, weight))), tmp_path / "run")
    assert "\n" not in str(error.value)
    scaled = {key: value * alphas.get(key.replace("lora_up.weight", "alpha"), 3.0) / 3 for key, value in named.items() if key not in alphas}
    family = find_family(folders("sd"), lora=lora((saved(scaled, tmp_path / "scaled.safetensors"), weight)))
    loaded = family.load_backbone() if part == "unet" else family.source.pipeline(without=("unet", "vae")).text_encoder  # type: ignore[attr-defined]
    for key in (key.removesuffix(".lora_A.weight") for key in state if key.endswith("lora_A.weight")):
        alpha = next(alphas[name] for name in kohya({f"{key}.lora_A.weight": state[f"{key}.lora_A.weight"]}) if name in alphas)
        added = weight * alpha / 3 * state[f"{key}.lora_B.weight"].double() @ state[f"{key}.lora_A.weight"].double()
        place = key.removeprefix(f"{part}.")
        expected = getattr(tiny_sd15(), part).get_submodule(place).weight.double() + added
        assert (loaded.get_submodule(place).weight - expected).abs().max() <= 1e-6 * expected.abs().max(), key


def test_krons_factors_sum_too(folders: Any, tmp_path: Path) -> None:
    generator, weights = torch.Generator().manual_seed(0), (0.7, -1.3)
    name, plain = "layers.0.attention.to_q", tiny_zimage().transformer
    layer: Any = plain.get_submodule(name)
    rows, columns = (size // 4 for size in layer.weight.shape)
    made = [(0.3 * torch.randn(4, 4, generator=generator), 0.3 * torch.randn(rows, columns, generator=generator)) for _ in weights]
    files = [
        (saved({f"diffusion_model.{name}.lokr_w1": small, f"diffusion_model.{name}.lokr_w2": large}, tmp_path / f"{i}.safetensors"), weights[i])
        for i, (small, large) in enumerate(made)
    ]
    network = find_family(folders("z_image"), lora=lora(*files), **OPTIONS["z_image"]).load_backbone()
    added = sum(weight * torch.kron(small.double(), large.double()) for weight, (small, large) in zip(weights, made, strict=True))
    found: Any = network.get_submodule(name).weight
    assert (found - layer.weight.double() - added).abs().max() <= 1e-6


def test_magnitudes_are_fused_alone_and_whole_or_not_at_all(folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA (Liu et al. 2024, eq. 5): m (W + B A) over the norm of each row, which is the adapter's effect once and no multiple of it."""
    file, tuned = trained_by_peft(tiny_sd15(), tmp_path / "dora", lora_alpha=2.0, use_dora=True)
    plain, network = tiny_sd15().unet, find_family(folders("sd"), lora=lora((file, 1.0))).load_backbone()
    for name in (name for name, module in tuned.named_modules() if hasattr(module, "lora_A")):
        layer: Any = tuned.get_submodule(name)
        summed = plain.get_submodule(name).weight.double() + 2 / 3 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        expected = layer.lora_magnitude_vector["default"].weight.double()[:, None] * summed / summed.norm(dim=1, keepdim=True)
        assert (network.get_submodule(name).weight - expected).abs().max() <= 1e-6 * expected.abs().max()
    monkeypatch.setattr("fastgen.families.source.Source.network", lambda *_: pytest.fail("a network was loaded"))
    other = saved(factors(tiny_sd15(), parts=("unet",)), tmp_path / "other.safetensors")
    for asked, place, why in (
        ([(file, 0.7)], 0, "weight 0.7"), ([(file, -1.0)], 0, "weight -1"), ([(other, 0.5), (file, 1.0)], 1, "2 adapters"),
        ([(file, 1.0), (other, 0.5)], 0, "2 adapters"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"^recipe key teacher\.lora\.{place}\.path: '.*' scales whole layers anew .* not with {why}$") as error:
            dry_run(tuned_recipe(folders, tmp_path, lora=lora(*asked)), tmp_path / "run")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("weight", "why"), [(0.0, "0 of '.*' is nothing; leave it out"), (float("nan"), "nan of '.*' is no finite number")])
def test_a_weight_that_adds_nothing_is_refused(weight: float, why: str, folders: Any, tmp_path: Path) -> None:
    file = saved(factors(tiny_sd15()), tmp_path / "a.safetensors")
    folder, asked = folders("sd"), lora((file, weight))
    for refuse in (lambda: find_family(folder, lora=asked), lambda: source_hash(str(folder), None, asked)):
        with pytest.raises(UserError, match=rf"^recipe key teacher\.lora\.0\.weight: {why}$"):
            refuse()
    if weight == 0:
        with pytest.raises(UserError, match=rf"^recipe key teacher\.lora\.0\.weight: {why}$"):
            dry_run(tuned_recipe(folders, tmp_path, lora=asked), tmp_path / "run")


def test_a_folder_stands_for_the_adapter_in_it(folders: Any, tmp_path: Path) -> None:
    state = factors(tiny_sd15())
    saved(state, tmp_path / "a/pytorch_lora_weights.safetensors")
    saved(factors(tiny_sd15(), seed=1), tmp_path / "a/other.safetensors")
    saved(state, tmp_path / "b/style.safetensors")
    hashes = {source_hash(str(folders("sd")), None, lora((tmp_path / name, 1.0))) for name in ("a", "b", "b/style.safetensors")}
    assert len(hashes) == 1
    saved(state, tmp_path / "b/again.safetensors")
    with pytest.raises(UserError, match=r"^recipe key teacher\.lora\.0\.path: the folder '.*b' holds several \(again\.safetensors, style"):
        find_family(folders("sd"), lora=lora((tmp_path / "b", 1.0)))


def test_another_adapter_is_another_teacher(folders: Any, tmp_path: Path) -> None:
    folder, one = str(folders("sd")), saved(factors(tiny_sd15()), tmp_path / "one.safetensors")
    two = saved(factors(tiny_sd15(), seed=1), tmp_path / "two.safetensors")
    moved = Path(shutil.copy(one, tmp_path / "moved.safetensors"))
    asked = [[], lora((one, 1.0)), lora((one, 0.5)), lora((two, 1.0)), lora((one, 1.0), (two, 1.0))]
    for identity in (lambda given: source_hash(folder, None, given), lambda given: parts_hash(folder, None, ("text_encoder", "tokenizer"), given)):
        assert len({identity(given) for given in asked}) == len(asked)
        assert identity(lora((moved, 1.0))) == identity(lora((one, 1.0)))
    assert source_hash(folder, None, []) == source_hash(folder)


def tuned_recipe(folders: Any, tmp_path: Path, name: str = "sd", *, lora: Any, tune: bool = False, **teacher: Any) -> Recipe:
    (tmp_path / "cell").mkdir(parents=True, exist_ok=True)
    data = recipe(folders(name), "dmd2", tmp_path / "cell", lora=tune, **OPTIONS[name]).dump()
    data["teacher"] |= {"lora": lora, **teacher}
    return validate(Recipe, data)


def test_stores_of_prompts_and_of_pairs_know_it(folders: Any, tmp_path: Path) -> None:
    files = [saved(factors(tiny_sd15(), seed=seed), tmp_path / f"{seed}.safetensors") for seed in range(2)]
    made = []
    for given in (None, lora((files[0], 1.0)), lora((files[0], 0.5)), lora((files[1], 1.0))):
        asked = tuned_recipe(folders, tmp_path, lora=given)
        origin = origin_of(find_family(asked.teacher.pretrained), asked.teacher, asked.data, torch.float32)
        made.append((origin("prompts")["text encoders"], origin("latents")["vae"], identified_teacher(asked)["sha256"]))
    prompts, latents, pairs = zip(*made, strict=True)
    assert (len(set(prompts)), len(set(latents)), len(set(pairs))) == (4, 1, 4)


def test_the_teacher_of_the_python_call_is_tuned_too(folders: Any, tmp_path: Path) -> None:
    file = saved(factors(tiny_sd15()), tmp_path / "style.safetensors")
    tuned = load_teacher(folders("sd"), steps=2, guidance=1.0, lora=lora((file, 1.0)))
    plain = load_teacher(folders("sd"), steps=2, guidance=1.0)
    assert (tuned(PROMPTS, [0, 1]) - plain(PROMPTS, [0, 1])).abs().max() > 0.01
    with pytest.raises(UserError, match=r"^recipe key teacher\.lora: applies to a folder or a hub id; a live pipeline"):
        load_teacher(tiny_sd15(), lora=lora((file, 1.0)))
    with pytest.raises(UserError, match=r"^recipe key teacher\.lora: does not apply to a closed-form teacher"):
        load_teacher("toy:ring", lora=lora((file, 1.0)))


def wrong_width(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a base of the same names and other widths."""
    return {key: torch.cat([value, value], dim=1 if "lora_A" in key else 0) for key, value in state.items()}


def damaged(file: Path) -> None:
    state = load_file(file)
    next(iter(state.values()))[0, 0] = float("nan")
    save_file(state, file)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda at: at / "none.safetensors", r"0\.path: no file '.*none\.safetensors'; allowed: "),
    "missing beside others": (lambda at: "styles/none.safetensors", r"0\.path: no file 'styles/none\.safetensors'; allowed: "),
    "not on the hub": (lambda at: "somebody/style", r"0\.path: no file 'somebody/style', and the hub does not give it \("),
    "empty folder": (lambda at: (at / "empty").mkdir() or at / "empty", r"0\.path: the folder '.*empty' holds no \.safetensors file"),
    "pickle": (lambda at: (at / "a.bin").write_bytes(b"x") and at / "a.bin", r"0\.path: '.*a\.bin' is no \.safetensors file"),
    "not safetensors": (lambda at: (at / "b.safetensors").write_bytes(b"no") and at / "b.safetensors", r"0\.path: cannot read '.*b\.safetensors'"),
    "no adapter": (lambda at: saved({"unet.conv_in.weight": torch.ones(2, 2)}, at / "c.safetensors"), r"0\.path: '.*' is no LoRA adapter: "),
    "not finite": (lambda at: damaged(file := saved(factors(tiny_sd15()), at / "d.safetensors")) or file, r"0\.path: '.*' has numbers that are not"),
    "another's network": (
        lambda at: saved(factors(tiny_flux()), at / "e.safetensors"),
        r"0\.path: 'e\.safetensors' fits no layer of this StableDiffusionPipeline's network: its keys are of transformer",
    ),
    "another's network alone": (
        lambda at: saved(factors(tiny_flux(), parts=("transformer",)), at / "f.safetensors"), r"0\.path: 'f\.safetensors' fits no layer"
    ),
    "other names": (
        lambda at: saved({key.replace("blocks", "b"): value for key, value in factors(tiny_sd15(), parts=("unet",)).items()}, at / "h.safetensors"),
        r"0\.path: 'h\.safetensors' does not fit this StableDiffusionPipeline: none of its layers is here",
    ),
    "other base": (
        lambda at: saved(wrong_width(factors(tiny_sd15())), at / "g.safetensors"),
        r"0\.path: 'g\.safetensors' does not fit this StableDiffusionPipeline: it was made for another base: \S+ has the shape \(",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_before_anything_loads(case: str, folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, said = BAD[case]
    monkeypatch.setattr("fastgen.families.source.Source.network", lambda *_: pytest.fail("a network was loaded"))
    asked = tuned_recipe(folders, tmp_path, lora=[{"path": str(path(tmp_path)), "weight": 1.0}])
    for refuse in (lambda: plan(asked), lambda: dry_run(asked, tmp_path / "run")):
        with pytest.raises(UserError, match=rf"^recipe key teacher\.lora\.{said}") as error:
            refuse()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_pipelines_that_load_no_adapters_say_so(name: str, folders: Any, tmp_path: Path) -> None:
    file = saved(factors(tiny_sd15()), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"^recipe key teacher\.lora: (DiT|PixArtSigma)Pipeline loads no LoRA files"):
        find_family(folders(name), lora=lora((file, 1.0)), **OPTIONS[name])


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "much", True, 1e9])
def test_a_weight_is_a_finite_number(weight: Any) -> None:
    with pytest.raises(UserError, match=r"^recipe key teacher\.lora\.0\.weight: "):
        validate(Recipe, {"teacher": {"pretrained": "fastgen:digits", "lora": [{"path": "a", "weight": weight}]}, **REST})


def test_a_file_alone_is_no_list() -> None:
    said = r"^recipe key teacher\.lora: a list in brackets, such as \[\{path: style\.safetensors, weight: 0\.8\}\] \(given: 'style"
    with pytest.raises(UserError, match=said):
        validate(Recipe, {"teacher": {"pretrained": "fastgen:digits", "lora": "style.safetensors"}, **REST})


def test_an_empty_list_is_none() -> None:
    with pytest.raises(UserError, match=r"^recipe key teacher\.lora: "):
        validate(Recipe, {"teacher": {"pretrained": "fastgen:digits", "lora": []}, **REST})


REST: dict[str, Any] = yaml.safe_load(
    "{student: {steps: 1}, distiller: {name: dmd2}, data: {}, optimizer: {student: {lr: 1}}, train: {steps: 1, batch_size: 1}}"
)


def test_a_dry_run_needs_the_configurations_alone(folders: Any, tmp_path: Path) -> None:
    bare = shutil.copytree(folders("sd"), tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    fits, other = saved(factors(tiny_sd15()), tmp_path / "a.safetensors"), saved(wrong_width(factors(tiny_sd15())), tmp_path / "b.safetensors")
    dry_run(tuned_recipe(folders, tmp_path, lora=lora((fits, 1.0)), pretrained=str(bare)), tmp_path / "run")
    with pytest.raises(UserError, match=r"^recipe key teacher\.lora\.1\.path: 'b\.safetensors' does not fit"):
        dry_run(tuned_recipe(folders, tmp_path / "b", lora=lora((fits, 1.0), (other, 1.0)), pretrained=str(bare)), tmp_path / "run")


def test_encoders_in_half_precision_are_tuned_too(folders: Any, tmp_path: Path) -> None:
    file = saved(factors(tiny_sd15(), parts=("text_encoder",)), tmp_path / "a.safetensors")
    family = find_family(folders("sd"), lora=lora((file, 0.5)))
    single, plain = family.encode_prompts(PROMPTS), find_family(folders("sd")).encode_prompts(PROMPTS)
    family.encode_with(torch.device("cpu"), torch.bfloat16)
    for key, half in family.encode_prompts(PROMPTS).items():
        assert (half - single[key]).abs().max() < 0.1 * (plain[key] - single[key]).abs().max()


@pytest.mark.parametrize("quiet", [False, True])
def test_what_is_used_in_part_is_said(quiet: bool, folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "level", logging.CRITICAL if quiet else logging.WARNING)  # as the command line has it
    logging.getLogger("diffusers")._cache.clear()  # type: ignore[attr-defined]
    state = factors(tiny_sd15(), parts=("unet",))
    key = next(iter(state)).replace("down_blocks.0", "down_blocks.7")
    more = {key: state[next(iter(state))], key.replace("lora_A", "lora_B"): next(value for name, value in state.items() if "lora_B" in name)}
    asked = tuned_recipe(folders, tmp_path, lora=lora((saved(state | more, tmp_path / "a.safetensors"), 1.0)))
    assert any(re.match(r"teacher\.lora: of 'a\.safetensors' some is not used: .*down_blocks\.7", said) for said in plan(asked).warnings)
