"""Students of fewer blocks: what is kept is the teacher's, what is left out passes on, and plain diffusers builds them."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from diffusers_zoo import BUILDERS, build
from pipelines import same_interpreter as same_interpreter
from safetensors.torch import load_file
from torch import Tensor

from fastgen import cli, load_student, run
from fastgen.config import Recipe
from fastgen.errors import UserError
from fastgen.export import verify
from fastgen.families import find_family
from fastgen.families.toy import Toy
from fastgen.outlook import dry_run
from fastgen.plan import plan
from fastgen.roles import Roles, build_roles, frozen, student, trainable
from fastgen.room import CHANGES
from fastgen.surgery.shrink import Shrink, in_words, kept_blocks, shrunk, summary

UNETS = ("sd15", "sdxl")
TRANSFORMERS = [name for name in BUILDERS if name not in UNETS]
DEPTHS = ("num_layers", "num_single_layers", "n_layers", "depth")
DEPTH = 5


class Deep:
    """A network of the zoo with DEPTH blocks in each list, random weights everywhere, and how it is called."""

    def __init__(self, name: str, **options: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            small, shape, time, self._call = BUILDERS[name]()
            config = {key: value for key, value in small.config.items() if key != "_use_default_values"}  # type: ignore[union-attr]
            depths = {key: DEPTH for key in DEPTHS if key in config}
            self.network: Any = type(small).from_config(config | depths | options).eval()  # type: ignore[attr-defined]
            for parameter in self.network.parameters():
                parameter.requires_grad_(False)
                if not parameter.any() or parameter.eq(1).all():
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
            self.network.double()
            self.x, self.t = torch.randn(2, *shape).double(), time * torch.tensor([0.31, 0.68]).double()

    @torch.no_grad()
    def call(self, network: Any) -> Tensor:
        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).double()

        return self._call(network, self.x, self.t, random)


def passing_on(block: Any) -> None:
    """From now on the block gives what it is given: its one stream, or text and picture."""
    signature, forward = inspect.signature(block.forward), block.forward

    def identity(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if isinstance(forward(*args, **kwargs), tuple):
            return given["encoder_hidden_states"], given["hidden_states"]
        return given["hidden_states"] if "hidden_states" in given else given["x"]

    block.forward = identity


def skipping(network: Any, kept: dict[str, list[int]]) -> None:
    for name, places in kept.items():
        for i, block in enumerate(network.get_submodule(name)):
            if i not in places:
                passing_on(block)


def assert_alike(network: Any, other: Any) -> None:
    """The same numbers, to the bit, in every parameter and buffer, those that are not saved among them."""
    ours, theirs = ({**dict(each.named_parameters()), **dict(each.named_buffers())} for each in (network, other))
    assert ours.keys() == theirs.keys()
    assert not [name for name, value in ours.items() if not torch.equal(value, theirs[name])]


def assert_agree(output: Tensor, other: Tensor) -> None:
    """But for rounding, which in matrix products depends on where in memory they are."""
    torch.testing.assert_close(output, other, rtol=1e-12, atol=1e-12)


@pytest.fixture(params=TRANSFORMERS)
def deep(request: pytest.FixtureRequest) -> Deep:
    return Deep(request.param)


def test_a_student_of_every_block_is_the_teacher_to_the_bit(deep: Deep) -> None:
    network = shrunk(deep.network, Shrink(1.0))
    assert type(network) is type(deep.network)
    assert dict(network.config) == dict(deep.network.config)  # type: ignore[arg-type]
    assert_alike(network, deep.network)
    assert_agree(deep.call(network), deep.call(deep.network))
    theirs = {parameter.data_ptr() for parameter in deep.network.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in network.parameters()}


@pytest.mark.parametrize("keep", ["even", "ends"])
def test_blocks_that_are_left_out_pass_on_what_they_got(deep: Deep, keep: Any) -> None:
    whole, shrink = deep.call(deep.network), Shrink(0.4, keep)
    network, kept = shrunk(deep.network, shrink), kept_blocks(deep.network, shrink)
    assert set(map(tuple, kept.values())) == {(0, 4)}
    got = deep.call(network)
    assert_agree(deep.call(deep.network), whole)  # the teacher is as it was
    skipping(deep.network, kept)
    assert_agree(got, deep.call(deep.network))
    assert (got - whole).abs().max() > 1e-3


def test_places_may_differ_from_list_to_list(deep: Deep) -> None:
    lists = list(kept_blocks(deep.network, Shrink(1.0)))
    keep = {lists[0]: [0, 3, 4]}  # a list that is not named stays whole
    network = shrunk(deep.network, Shrink(keep=keep))
    got = deep.call(network)
    skipping(deep.network, keep)
    assert_agree(got, deep.call(deep.network))
    depths = {name: len(network.get_submodule(name)) for name in lists}  # type: ignore[arg-type]
    assert depths == {name: 3 if name == lists[0] else DEPTH for name in lists}


@pytest.mark.parametrize("init", ["pruned", "random"])
def test_plain_diffusers_loads_it_by_its_own_configuration(deep: Deep, init: Any, tmp_path: Path) -> None:
    network: Any = shrunk(deep.network.float(), Shrink(0.6, init=init))
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    wanted = {3, DEPTH} if type(network).__name__ == "Flux3Transformer2DModel" else {3}  # whose lists by mode have one depth, and stay whole
    assert {config[key] for key in DEPTHS if key in config} == wanted
    loaded = type(network).from_pretrained(tmp_path).eval()
    assert_alike(loaded, network)
    assert_agree(deep.call(loaded.double()), deep.call(network.double()))


def test_a_random_start_comes_from_its_seed(deep: Deep) -> None:
    deep.network.float()
    before = torch.random.get_rng_state()
    networks = [shrunk(deep.network, Shrink(0.6, init="random", seed=seed)) for seed in (3, 3, 4)]
    assert torch.equal(torch.random.get_rng_state(), before)
    first, again, other = (dict(network.named_parameters()) for network in networks)
    assert all(torch.equal(first[name], again[name]) for name in first)
    pruned = dict(shrunk(deep.network, Shrink(0.6)).named_parameters())
    assert {name: value.shape for name, value in first.items()} == {name: value.shape for name, value in pruned.items()}
    matrices = [name for name, value in first.items() if value.ndim == 2 and value.std() > 0]
    assert len(matrices) > 10
    assert not [name for name in matrices if torch.equal(first[name], other[name]) or torch.equal(first[name], pruned[name])]
    assert not networks[0].training
    tables = dict(deep.network.named_buffers())
    assert all(torch.equal(table, tables[name]) for name, table in networks[0].named_buffers() if "blocks." not in name)


def test_tables_are_the_teachers_in_any_case() -> None:
    teacher = Deep("sd3").network
    teacher.pos_embed.pos_embed.mul_(1.5)
    for init in ("pruned", "random"):
        network: Any = shrunk(teacher, Shrink(2, init=init))
        assert network.pos_embed.pos_embed.dtype == torch.float64
        assert torch.equal(network.pos_embed.pos_embed, teacher.pos_embed.pos_embed)


def test_refiners_stay() -> None:
    network: Any = shrunk(Deep("zimage", n_refiner_layers=2).network, Shrink(1))
    assert [len(blocks) for blocks in (network.layers, network.noise_refiner, network.context_refiner)] == [1, 2, 2]
    assert (network.config.n_layers, network.config.n_refiner_layers) == (1, 2)


@pytest.mark.parametrize(("kept", "want"), [([1, 2, 3, 5], (0, 2)), ([2, 5], ()), ([0, 1, 2, 3, 4, 5], (0, 1, 3))])
@pytest.mark.parametrize("init", ["pruned", "random"])
def test_second_attentions_are_counted_anew(kept: list[int], want: tuple[int, ...], init: Any, tmp_path: Path) -> None:
    deep = Deep("sd3", num_layers=6, dual_attention_layers=[0, 1, 3])
    network: Any = shrunk(deep.network, Shrink(keep=kept, init=init))
    assert tuple(network.config.dual_attention_layers) == want
    assert [block.use_dual_attention for block in network.transformer_blocks] == [i in (0, 1, 3) for i in kept]
    assert [block.context_pre_only for block in network.transformer_blocks] == [False] * (len(kept) - 1) + [True]
    network.float().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dual_attention_layers"] == list(want)
    loaded = type(network).from_pretrained(tmp_path).eval()
    assert_alike(loaded, network)
    assert_agree(deep.call(loaded.double()), deep.call(network.double()))
    if init == "pruned":
        got = deep.call(shrunk(deep.network, Shrink(keep=kept)))
        skipping(deep.network, {"transformer_blocks": kept})
        assert_agree(got, deep.call(deep.network))


@pytest.mark.parametrize("init", ["pruned", "random"])
def test_a_depth_that_the_teacher_left_at_its_default_does_not_come_back(init: Any, tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel

    small = {key: value for key, value in build("sd3").network.config.items() if key not in ("num_layers", "_use_default_values")}  # type: ignore[union-attr]
    teacher = SD3Transformer2DModel(**small)
    assert "num_layers" in teacher.config["_use_default_values"]
    network: Any = shrunk(teacher, Shrink(2, init=init))
    assert (len(network.transformer_blocks), network.config.num_layers) == (2, 2)
    assert len(SD3Transformer2DModel.from_config(network.config).transformer_blocks) == 2  # type: ignore[union-attr]
    network.save_pretrained(tmp_path)
    assert len(SD3Transformer2DModel.from_pretrained(tmp_path).transformer_blocks) == 2


EVEN = {1: [0], 2: [0, 6], 3: [0, 3, 6], 4: [0, 2, 4, 6], 5: [0, 2, 3, 5, 6], 6: [0, 1, 2, 4, 5, 6], 7: [0, 1, 2, 3, 4, 5, 6]}
ENDS = {1: [0], 2: [0, 6], 3: [0, 1, 6], 4: [0, 1, 5, 6], 5: [0, 1, 2, 5, 6], 6: [0, 1, 2, 4, 5, 6], 7: [0, 1, 2, 3, 4, 5, 6]}


@pytest.mark.parametrize(("keep", "want"), [("even", EVEN), ("ends", ENDS), ("first", {count: list(range(count)) for count in range(1, 8)})])
def test_rules_keep_what_their_names_say(keep: Any, want: dict[int, list[int]]) -> None:
    sana, sd3 = (Deep(name, num_layers=7).network for name in ("sana", "sd3"))
    for count, places in want.items():
        assert kept_blocks(sana, Shrink(count, keep)) == {"transformer_blocks": places}
        assert kept_blocks(sd3, Shrink(count, keep)) == {"transformer_blocks": [*places[:-1], 6]}  # which drops the text


@pytest.mark.parametrize(("share", "count"), [(1.0, 7), (0.5, 4), (0.49, 3), (0.08, 1), (1 / 7, 1), (0.07, 0)])
def test_a_share_is_rounded(share: float, count: int) -> None:
    network = Deep("sana", num_layers=7).network
    if count:
        assert len(kept_blocks(network, Shrink(share))["transformer_blocks"]) == count
        return
    with pytest.raises(UserError) as caught:
        kept_blocks(network, Shrink(share))
    assert str(caught.value) == "recipe key student.shrink.depth: 0.07 of the teacher's 7 transformer_blocks leaves none"


FLUX = "FluxTransformer2DModel has 5 transformer_blocks and 5 single_transformer_blocks"


@pytest.mark.parametrize(
    ("name", "shrink", "message"),
    [
        ("sd15", Shrink(0.5), ": UNet2DConditionModel has no list of alike blocks to leave some out of; remove it"),
        ("sana", Shrink(6), ".depth: 6 blocks, but the teacher has 5 transformer_blocks"),
        ("sana", Shrink(keep=[0, 5]), ".keep: no block 5; the teacher's transformer_blocks are 0 to 4"),
        ("sana", Shrink(0.6, [0, 4]), ".keep: 2 places do not fit student.shrink.depth = 0.6, 3 of the transformer_blocks"),
        (
            "sd3",
            Shrink(keep=[0, 3]),
            ".keep: ends with 3, but the last of the teacher's transformer_blocks is shaped like no other and has to stay the last; end with 4",
        ),
        (
            "dit",
            Shrink(keep=[1, 2, 4]),
            ".keep: begins with 1, but the network's output reads the time embedding of the first of the teacher's transformer_blocks; begin with 0",
        ),
        ("flux", Shrink(2), f".depth: 2 blocks, but {FLUX}; give a share, or keep of each by its name"),
        ("flux", Shrink(keep=[0, 1]), f".keep: one list of places, but {FLUX}; give those of each by its name"),
        (
            "flux",
            Shrink(keep={"single_blocks": [0]}),
            ".keep.single_blocks: no list of FluxTransformer2DModel; did you mean 'single_transformer_blocks'? "
            "allowed: single_transformer_blocks, transformer_blocks",
        ),
    ],
)
def test_what_a_network_does_not_have_is_refused_by_its_key(name: str, shrink: Shrink, message: str) -> None:
    network = build(name).network if name in UNETS else Deep(name).network
    with pytest.raises(UserError) as caught:
        shrunk(network, shrink)
    assert str(caught.value) == f"recipe key student.shrink{message}"


def test_a_summary_counts_from_shapes_alone() -> None:
    family = find_family("fastgen:digits")
    found = summary(family.load_backbone(meta=True), Shrink(0.5))
    teacher = family.load_backbone()
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in (shrunk(teacher, Shrink(0.5)), teacher)]
    assert found == {
        "init": "pruned",
        "kept": {"transformer_blocks": [0, 3]},
        "of": {"transformer_blocks": 4},
        "parameters": counts[0],
        "teacher_parameters": counts[1],
    }
    assert summary(teacher, Shrink(0.5)) == found
    assert in_words(found) == f"2 of 4 transformer_blocks (0, 3), {counts[0]:,} of {counts[1]:,} parameters"
    assert in_words({**found, "init": "random"}) == f"2 of 4 transformer_blocks, {counts[0]:,} of {counts[1]:,} parameters"


SPECS = {"student": student(), "student_2": student(inputs=("second_time",)), "fake_score": trainable(), "teacher": frozen()}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("init", ["pruned", "random"])
def test_the_roles_that_are_exported_are_small(init: Any, recompute: bool) -> None:
    family = find_family("fastgen:digits")
    roles = build_roles(SPECS, family, family.load_backbone(), shrink=Shrink(2, init=init), recompute=recompute)
    blocks = {name: len(family.blocks(role.denoiser.backbone)) for name, role in roles.items()}
    assert blocks == {"student": 2, "student_2": 2, "fake_score": 4, "teacher": 4}
    networks: list[Any] = [roles[name].denoiser.backbone for name in SPECS]
    assert [network.is_gradient_checkpointing for network in networks] == [recompute] * 4
    trained = [{parameter.requires_grad for parameter in network.parameters()} for network in networks]
    assert trained == [{True}, {True}, {True}, {False}]
    first, second = (roles[name].denoiser.backbone.state_dict() for name in ("student", "student_2"))
    assert all(torch.equal(first[name], second[name]) for name in first)  # experts start alike
    assert first["proj_out.weight"].data_ptr() != second["proj_out.weight"].data_ptr()
    same = torch.equal(first["proj_out.weight"], roles["teacher"].denoiser.backbone.state_dict()["proj_out.weight"])
    assert same == (init == "pruned")
    assert _gradient(roles, family) > 1e-3


def _gradient(roles: Roles, family: Any) -> float:
    """The largest gradient in the student's first block."""
    x, t = torch.randn(2, *family.latent.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.4, 0.8])
    roles["student"].predictor(x, t, family.encode_prompts(["a handwritten seven", ""])).square().sum().backward()
    gradients = [p.grad for name, p in roles["student"].parameters().items() if name.startswith("transformer_blocks.0.")]
    return max(float(gradient.abs().max()) for gradient in gradients if gradient is not None)


# The recipe's key


def digits(*overrides: str) -> Recipe:
    keys = ["train.batch_size=4", "train.sample_every=0", "train.device=cpu", "evaluate.protocol=null"]
    return Recipe.load("digits_dmd2_1step", [*keys, *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["depth=0"], ".depth: a share of the blocks in (0, 1], such as 0.5, or a number of them, 1 or more (given: 0)"),
        (["depth=0.0"], ".depth: a share of the blocks in (0, 1], such as 0.5, or a number of them, 1 or more (given: 0.0)"),
        (["depth=1.5"], ".depth: a share of the blocks in (0, 1], such as 0.5, or a number of them, 1 or more (given: 1.5)"),
        (["depth=true"], ".depth: a share of the blocks in (0, 1], such as 0.5, or a number of them, 1 or more (given: True)"),
        (["depth=half"], ".depth: a share of the blocks in (0, 1], such as 0.5, or a number of them, 1 or more (given: 'half')"),
        (["keep=first"], ".keep: first of how many blocks? give student.shrink.depth too (given: 'first')"),
        (["init=random"], ".keep: even of how many blocks? give student.shrink.depth too (given: 'even')"),
        (["keep=[]"], ".keep: leaves no block (given: [])"),
        (["keep=[0, 0, 3]"], ".keep: places of blocks must ascend from 0, each once (given: [0, 0, 3])"),
        (["keep=[3, 1]"], ".keep: places of blocks must ascend from 0, each once (given: [3, 1])"),
        (["keep=[-1, 3]"], ".keep: places of blocks must ascend from 0, each once (given: [-1, 3])"),
        (["depth=3", "keep=[0, 3]"], ".keep: 2 places do not fit student.shrink.depth = 3 (given: [0, 3])"),
        (["keep.transformer_blocks=[]"], ".keep: leaves no block (given: {'transformer_blocks': []})"),
        (["depth=2", "width=0.5"], ".width: unknown key; did you mean 'depth'? allowed: calibration, depth, init, keep"),
    ],
)
def test_what_keeps_no_blocks_is_refused_by_its_key(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        digits(*(f"student.shrink.{override}" for override in overrides))
    assert str(caught.value) == f"recipe key student.shrink{message}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.shrink.depth=0.1"], ".depth: 0.1 of the teacher's 4 transformer_blocks leaves none"),
        (["student.shrink.keep=[0, 4]"], ".keep: no block 4; the teacher's transformer_blocks are 0 to 3"),
        (
            ["student.shrink.depth=0.5", "student.shrink.keep=[3]"],
            ".keep: 1 places do not fit student.shrink.depth = 0.5, 2 of the transformer_blocks",
        ),
        (
            ["student.shrink.depth=2", "student.tune.lora.rank=2"],
            ": adapters (student.tune.lora) share the teacher's network, of which they have every block; train with student.tune: full, or remove it",
        ),
        (
            ["student.shrink.depth=2", "distiller.ida=0.1"],
            ": distiller.ida (0.1) moves the fake score towards a student of its own shape; remove one",
        ),
        (
            ["student.shrink.depth=2", "teacher.pretrained=toy:mixture"],
            ": Backbone has no list of alike blocks to leave some out of; remove it",
        ),
    ],
)
def test_what_cannot_be_trained_so_is_refused_by_the_plan(overrides: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("0\n")
    more = ["data.prompts=" + str(tmp_path / "prompts.txt")] if "teacher.pretrained=toy:mixture" in overrides else []
    with pytest.raises(UserError) as caught:
        plan(digits(*overrides, *more), only="train")
    assert str(caught.value) == f"recipe key student.shrink{message}"


def test_a_closed_form_teacher_has_no_blocks() -> None:
    with pytest.raises(UserError, match=r"^recipe key student\.shrink: Backbone has no list of alike blocks"):
        kept_blocks(Toy("toy:mixture").load_backbone(), Shrink(0.5))


def test_a_dry_run_and_a_plan_say_how_large_the_student_is(capsys: pytest.CaptureFixture[str]) -> None:
    found, whole = dry_run(digits("student.shrink.depth=0.5")), dry_run(digits())
    trains = {name: role["trains"] for name, role in found["roles"].items()}
    teacher = whole["roles"]["student"]["trains"]
    assert trains == {"student": found["student"]["parameters"], "fake_score": teacher, "teacher": 0}
    assert found["student"]["teacher_parameters"] == teacher
    assert found["parameters"] == whole["parameters"] - teacher + trains["student"]
    assert found["network_bytes"] < whole["network_bytes"]
    assert "student" not in whole
    line = f"2 of 4 transformer_blocks (0, 3), {trains['student']:,} of {teacher:,} parameters"
    keys = ["digits_dmd2_1step", "student.shrink.depth=0.5", "train.batch_size=4"]
    assert cli.main(["train", *keys, "--dry-run"]) == 0
    assert f"student     {line}\n" in capsys.readouterr().out
    assert cli.main(["plan", *keys]) == 0
    assert f"student: {line}\n" in capsys.readouterr().out
    assert cli.main(["plan", *keys, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["student"] == found["student"]


def test_no_adapters_are_offered_to_a_smaller_student() -> None:
    for overrides, offered in (([], True), (["student.shrink.depth=0.5"], False)):
        recipe = digits(*overrides)
        assert offered == any("lora" in key for change in CHANGES for key in change.keys(recipe))


# From recipe to student

SHRINK = ["student.shrink.depth=0.5", "train.steps=4", "train.checkpoint_every=2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of four steps."""
    return run.train(digits(*SHRINK), tmp_path_factory.mktemp("shrink") / "run", only="train")


@pytest.fixture(scope="module")
def exported(whole: Path) -> Path:
    return run.export(whole, whole.parent / "student")


def test_the_exported_student_is_the_same_class_with_fewer_blocks(exported: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(exported)
    network = pipe.transformer
    assert type(network).__name__ == "SD3Transformer2DModel"
    assert (len(network.transformer_blocks), network.config.num_layers) == (2, 2)
    assert json.loads((exported / "transformer" / "config.json").read_text())["num_layers"] == 2
    manifest = json.loads((exported / "fastgen.json").read_text())
    want = summary(find_family("fastgen:digits").load_backbone(meta=True), Shrink(0.5))
    assert manifest["surgery"]["shrink"] == want
    assert manifest["recipe"]["student"]["shrink"] == {"depth": 0.5, "keep": "even", "init": "pruned", "calibration": 8}
    assert f"It is smaller than its teacher: {in_words(want)}." in (exported / "README.md").read_text()


@pytest.mark.usefixtures("same_interpreter")
def test_plain_diffusers_draws_what_we_draw(exported: Path, whole: Path) -> None:
    result = verify(exported)
    assert result.passed
    prompts, seeds = ["a handwritten seven", "an even digit"], [0, 1]
    pictures = load_student(exported)(prompts, seeds)
    running = run.build(plan(Recipe.load(whole / "recipe.yaml"), only="train"), run.Progress())
    untrained = running.generator("student")(prompts, seeds)
    assert (pictures - untrained).abs().max() > 1e-4
    state = load_file(whole / "checkpoints/step_000004/ema_student.safetensors")
    state.pop("updates")
    running.roles["student"].load_state_dict(state)
    torch.testing.assert_close(running.generator("student")(prompts, seeds), pictures, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("same_interpreter")
def test_verify_takes_it_on_the_command_line(exported: Path) -> None:
    assert cli.main(["verify", str(exported)]) == 0


def test_a_resumed_run_ends_as_if_nothing_had_happened(whole: Path, tmp_path: Path) -> None:
    resumed = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(resumed / "checkpoints/step_000004")
    run.train(digits(*SHRINK), resumed, resume=True, only="train")
    files = sorted(file.name for file in (whole / "checkpoints/step_000004").glob("*.safetensors"))
    assert "ema_student.safetensors" in files
    for name in files:
        got, want = (load_file(folder / "checkpoints/step_000004" / name) for folder in (resumed, whole))
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want), name


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("student.shrink.depth=0.75", "student.shrink.depth is 0.75, the run in '{}' has 0.5"),
        ("student.shrink.init=random", "student.shrink.init is 'random', the run in '{}' has 'pruned'"),
    ],
)
def test_a_run_is_resumed_with_the_same_student(whole: Path, override: str, key: str) -> None:
    with pytest.raises(UserError) as caught:
        run.train(digits(*SHRINK, override), whole, resume=True, only="train")
    assert str(caught.value) == f"--resume: recipe key {key.format(whole)}; resume with the same recipe"
    with pytest.raises(UserError, match=r"--allow-change: student\.shrink\.\w+ decides what is trained"):
        run.train(digits(*SHRINK, override), whole, resume=True, only="train", allow_change=[override.partition("=")[0]])


def test_a_run_from_before_the_key_goes_on(tmp_path: Path) -> None:
    keys = ["train.steps=2", "train.checkpoint_every=1"]
    folder = run.train(digits(*keys), tmp_path / "run", only="train")
    shutil.rmtree(folder / "checkpoints/step_000002")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    del recipe["student"]["shrink"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match=r"--resume: recipe key student\.shrink\S* is .*resume with the same recipe$"):
        run.train(digits(*keys, "student.shrink.depth=0.5"), folder, resume=True, only="train")
    run.train(digits(*keys), folder, resume=True, only="train")
    assert (folder / "checkpoints/step_000002/state.json").is_file()


def test_a_run_from_before_a_key_of_the_block_goes_on(whole: Path, tmp_path: Path) -> None:
    resumed = Path(shutil.copytree(whole, tmp_path / "run"))
    recipe = yaml.safe_load((resumed / "recipe.yaml").read_text(encoding="utf-8"))
    del recipe["student"]["shrink"]["calibration"]
    (resumed / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    shutil.rmtree(resumed / "checkpoints/step_000004")
    run.train(digits(*SHRINK), resumed, resume=True, only="train")
    assert (resumed / "checkpoints/step_000004/state.json").is_file()


def test_a_run_begins_with_a_smaller_student_of_another(whole: Path) -> None:
    init = f"student.init={whole}"
    for override in ("student.shrink.init=pruned", "student.shrink.init=random"):  # whose start is overwritten
        running = run.build(plan(digits(*SHRINK, init, override), only="train"), run.Progress())
        state = load_file(whole / "checkpoints/step_000004/ema_student.safetensors")
        own = running.roles["student"].parameters()
        assert own.keys() == state.keys() - {"updates"}
        assert all(torch.equal(own[name], state[name]) for name in own)
    assert len(running.plan.family.blocks(running.roles["fake_score"].denoiser.backbone)) == 4


OTHER: list[tuple[list[str], Callable[[str], str]]] = [
    (["student.shrink.depth=0.75"], lambda had: f"{had}, here {{'depth': 0.75, 'keep': 'even', 'init': 'pruned', 'calibration': 8}}"),
    (
        ["student.shrink.keep=[1, 3]", "student.shrink.depth=2"],
        lambda had: f"{had}, here {{'depth': 2, 'keep': [1, 3], 'init': 'pruned', 'calibration': 8}}",
    ),
    (["student.shrink=null"], lambda had: f"{had}, here None"),
]


@pytest.mark.parametrize(("overrides", "said"), OTHER)
def test_a_student_of_other_blocks_is_refused_with_both(whole: Path, overrides: list[str], said: Callable[[str], str]) -> None:
    had = "{'depth': 0.5, 'keep': 'even', 'init': 'pruned', 'calibration': 8}"
    with pytest.raises(UserError) as caught:
        plan(digits(*SHRINK, f"student.init={whole}", *overrides), only="train")
    assert str(caught.value) == f"recipe key student.init: {str(whole)!r} holds a student with student.shrink {said(had)}; both need the same"


def test_one_block_is_not_all_of_them(tmp_path: Path) -> None:
    keys = ["train.steps=1", "student.shrink.depth=1"]
    folder = run.train(digits(*keys), tmp_path / "run", only="train")
    with pytest.raises(UserError, match=r"'depth': 1, .* here \{'depth': 1\.0, .*; both need the same$"):
        plan(digits(*keys, "student.shrink.depth=1.0", f"student.init={folder}"), only="train")
