"""Rewards: the bundled one against the classifier's own probabilities, users' functions by module and by file, and every way to name a wrong one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgen.assets.classifier import load_classifier
from fastgen.config import validate
from fastgen.data import digits
from fastgen.errors import UserError
from fastgen.rewards import RewardConfig, load_reward, log_weights

KEY = r"recipe key distiller\.reward\.name: "


def brightness(pixels: Tensor, prompts: list[str]) -> Tensor:
    return pixels.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])


NOT_A_FUNCTION = 3


def pixels(count: int = 4) -> Tensor:
    """Real digits (count, 3, 8, 8) in [0, 1]: 0, 1, 2, …"""
    return digits.load_images()[0][:count] / 2 + 0.5


@pytest.fixture
def probabilities() -> Tensor:
    with torch.no_grad():
        return load_classifier()(2 * pixels() - 1).double().softmax(1)


def test_the_digit_reward_is_the_log_probability_of_what_the_prompt_names(probabilities: Tensor) -> None:
    prompts = ["a handwritten three", "the digit one", "a drawing of the number zero", "a handwritten three"]
    expected = probabilities[torch.arange(4), torch.tensor([3, 1, 0, 3])].log()
    rewards = load_reward("fastgen:digits")(pixels(), prompts)
    torch.testing.assert_close(rewards.double(), expected, rtol=1e-4, atol=1e-5)
    assert rewards[1] > -0.3  # it is a one
    assert rewards[2] < -2  # it is no zero


def test_the_digit_reward_of_a_parity_is_that_of_any_of_its_digits(probabilities: Tensor) -> None:
    prompts = ["an even digit", "a handwritten odd number", "an odd digit", "a handwritten even number"]
    even, odd = probabilities[:, 0::2].sum(1), probabilities[:, 1::2].sum(1)
    expected = torch.stack([even[0], odd[1], odd[2], even[3]]).log()
    rewards = load_reward("fastgen:digits")(pixels(), prompts)
    torch.testing.assert_close(rewards.double(), expected, rtol=1e-4, atol=1e-5)
    assert (rewards <= 0).all()
    assert rewards[0] > rewards[2]


def test_the_digit_reward_says_nothing_of_prompts_that_name_no_digit() -> None:
    rewards = load_reward("fastgen:digits")(pixels(), [*digits.GENERIC, ""])
    torch.testing.assert_close(rewards, torch.zeros(4), rtol=0, atol=1e-5)
    assert (rewards <= 0).all()


def test_the_digit_reward_knows_every_caption() -> None:
    captions = list(digits.prompts())
    rewards = load_reward("fastgen:digits")(pixels(1).expand(len(captions), -1, -1, -1), captions)
    zero = [text in digits.captions(0) for text in captions]
    assert rewards[torch.tensor(zero)].min() > -0.3
    assert rewards[~torch.tensor(zero)].max() < -1


def test_the_digit_reward_refuses_what_it_cannot_judge() -> None:
    reward = load_reward("fastgen:digits")
    with pytest.raises(UserError, match=KEY + r"fastgen:digits knows the captions of data\.prompts: fastgen:digits only, not 'a red cat'"):
        reward(pixels(2), ["any digit", "a red cat"])
    with pytest.raises(UserError, match=KEY + r"fastgen:digits judges pictures \(3, 8, 8\), the teacher's are \(3, 16, 16\)"):
        reward(torch.zeros(1, 3, 16, 16), ["any digit"])


def test_a_function_is_found_in_an_importable_module() -> None:
    reward = load_reward(f"{__name__}:brightness")
    torch.testing.assert_close(reward(pixels(2), ["ab", ""]), pixels(2).mean((1, 2, 3)) + torch.tensor([2.0, 0.0]))


def test_a_function_is_found_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my.reward.py"
    file.write_text("import torch\ndef red(pixels, prompts):\n    return pixels[:, 0].mean((1, 2))\n")
    picture = torch.rand((3, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_reward(f"{file}:red")(picture, [""] * 3), picture[:, 0].mean((1, 2)))
    monkeypatch.chdir(tmp_path)
    assert torch.equal(load_reward("my.reward.py:red")(picture, [""] * 3), picture[:, 0].mean((1, 2)))


def test_a_file_runs_once_until_it_changes(tmp_path: Path) -> None:
    """A reward may load a model at its import, and is looked up when a recipe is checked and by the run."""
    file, log = tmp_path / "own.py", tmp_path / "log"
    code = f"with open({str(log)!r}, 'a') as log:\n    log.write('run ')\ndef f(pixels, prompts):\n    return {{}} * pixels.mean((1, 2, 3))\n"
    for factor, runs in ((2.0, 1), (3.0, 2)):
        file.write_text(code.format(factor))
        os.utime(file, ns=(runs, runs))
        for _ in range(2):
            torch.testing.assert_close(load_reward(f"{file}:f")(pixels(2), ["", ""]), factor * pixels(2).mean((1, 2, 3)))
        assert log.read_text() == "run " * runs


def test_a_file_may_define_dataclasses(tmp_path: Path) -> None:
    """Which, with postponed annotations, look their own module up."""
    code = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Weights:\n    red: float = 2.0\n"
    (tmp_path / "own.py").write_text(f"{code}def f(pixels, prompts):\n    return Weights().red * pixels.mean((1, 2, 3))\n")
    torch.testing.assert_close(load_reward(f"{tmp_path / 'own.py'}:f")(pixels(2), ["", ""]), 2 * pixels(2).mean((1, 2, 3)))


def test_no_gradient_is_taken_through_a_reward() -> None:
    assert not load_reward(f"{__name__}:brightness")(pixels(2).requires_grad_(), ["", ""]).requires_grad
    assert not load_reward("fastgen:digits")(pixels(2).requires_grad_(), ["", "any digit"]).requires_grad


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits", "'digits' is none of fastgen:digits, module:function, path/to/file.py:function"),
        (":brightness", "':brightness' is none of"),
        ("math:", "'math:' is none of"),
        ("fastgen:digit", r"no bundled reward 'fastgen:digit'; did you mean 'digits'\? allowed: digits"),
        ("no_such_module:f", r"'no_such_module:f': cannot import 'no_such_module' \(ModuleNotFoundError: .*\)"),
        ("./nowhere.py:f", r"'\./nowhere\.py:f': no file '\./nowhere\.py'"),
        (f"{__name__}:bright", rf"'{__name__}:bright': .* has no 'bright'; did you mean 'brightness'\?"),
        ("builtins:len", r"'builtins:len' is no function of \(pixels, prompts\): too many positional arguments"),
        (f"{__name__}:NOT_A_FUNCTION", r"is a int, not a function of \(pixels, prompts\)"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_clear_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=KEY + ".*" + message):
        load_reward(name)


@pytest.mark.parametrize("code", ["def f(:", "import no_such_module", "1 / 0"])
def test_a_file_that_cannot_run_is_one_clear_line(tmp_path: Path, code: str) -> None:
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(UserError, match=KEY + r".*cannot import .*broken\.py' \((SyntaxError|ModuleNotFoundError|ZeroDivisionError): "):
        load_reward(f"{tmp_path / 'broken.py'}:f")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("pixels.mean()", r"returned a tensor \(\) for 2 pictures; a tensor \(2,\) is needed"),
        ("pixels.mean((2, 3))", r"returned a tensor \(2, 3\) for 2 pictures"),
        ("[1.0, 2.0]", "returned a list for 2 pictures"),
        ("pixels.mean((1, 2, 3)) / 0 * 0", "returned a reward that is not finite"),
    ],
)
def test_what_a_function_returns_is_checked(tmp_path: Path, code: str, message: str) -> None:
    (tmp_path / "own.py").write_text(f"def f(pixels, prompts):\n    return {code}\n")
    with pytest.raises(UserError, match=KEY + ".*" + message):
        load_reward(f"{tmp_path / 'own.py'}:f")(pixels(2), ["", ""])


def test_log_weights_are_beta_times_the_reward_in_fp64() -> None:
    rewards = torch.tensor([0.0, 1.5, -2000.0, 3000.0])
    weights = log_weights(rewards, 0.5)
    assert weights.dtype == torch.float64
    assert weights.tolist() == [0.0, 0.75, -1000.0, 1500.0]
    ratio = (weights - weights.max()).exp()
    assert ratio.isfinite().all()
    assert ratio[3] == 1


def test_the_block_has_its_default_and_refuses_others() -> None:
    config = validate(RewardConfig, {"name": "fastgen:digits"}, "distiller.reward")
    assert (config.name, config.beta) == ("fastgen:digits", 2.0)
    for given, message in (
        ({"name": "a:b", "beta": 0}, r"recipe key distiller\.reward\.beta: .*greater than 0"),
        ({"name": "a:b", "beta": float("inf")}, r"recipe key distiller\.reward\.beta: .*finite"),
        ({"name": "a:b", "bata": 1}, r"recipe key distiller\.reward\.bata: unknown key; did you mean 'beta'"),
        ({}, r"recipe key distiller\.reward\.name: missing"),
    ):
        with pytest.raises(UserError, match=message):
            validate(RewardConfig, given, "distiller.reward")


def test_a_file_is_kept_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text("def f(pixels, prompts): ...")
    monkeypatch.chdir(tmp_path)
    assert RewardConfig(name="own.py:f").name == f"{tmp_path / 'own.py'}:f"
    for name in ("nowhere.py:f", "fastgen:digits", "own:f", "own.py"):
        assert RewardConfig(name=name).name == name
