"""jvp_attention's bad input, and its plain PyTorch reference. No Triton here."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import FACTORS, Case, naive, per_head, tensors, truth
from fastgen_kernels import jvp_attention as package
from fastgen_kernels.jvp_attention import jvp_attention, reference

X = torch.zeros(2, 4, 6, 8)


def inputs(**changes: Any) -> dict[str, Any]:
    """Right arguments, but for the changes."""
    return {"q": X, "k": X[:, :2], "v": X[:, :2], "tq": X, "tk": X[:, :2], "tv": X[:, :2]} | changes


BAD = [
    ({"q": X[0]}, "q must be (batch, heads, tokens, head size); got shape (4, 6, 8)"),
    ({"q": X.long()}, "q must be float16, bfloat16, float32 or float64; got int64"),
    ({"k": X[:, :2].bool()}, "k must be float16, bfloat16, float32 or float64; got bool"),
    ({"k": X[:, :2, :0], "v": X[:, :2, :0]}, "k must not be empty; got shape (2, 2, 0, 8)"),
    ({"q": X.new_zeros(2, 4, 6, 257)}, "q has head size 257; at most 256 is supported"),
    ({"k": X[:1, :2]}, "k must have q's batch and head size; got k (1, 2, 6, 8) for q (2, 4, 6, 8)"),
    ({"k": X[:, :2, :, :4]}, "k must have q's batch and head size; got k (2, 2, 6, 4) for q (2, 4, 6, 8)"),
    ({"k": X[:, :3], "v": X[:, :3]}, "k's number of heads must divide q's; got 3 for 4"),
    ({"v": X[:, :2, :5]}, "v must have k's shape (2, 2, 6, 8); got (2, 2, 5, 8)"),
    ({"v": X[:, :2, :, :4]}, "v must have k's shape (2, 2, 6, 8); got (2, 2, 6, 4)"),
    ({"k": X[:, :2].half()}, "k must have q's dtype float32; got float16"),
    ({"v": X[:, :2].to("meta")}, "v must be on k's device cpu; got meta"),
    ({"tq": X[:, :2]}, "tq must have q's shape (2, 4, 6, 8); got (2, 2, 6, 8)"),
    ({"tk": X[:, :2].double()}, "tk must have k's dtype float32; got float64"),
    ({"tv": X[:, :2].to("meta")}, "tv must be on v's device cpu; got meta"),
    ({"mask": torch.zeros(())}, "mask must have one to four dimensions that broadcast to (batch, heads, queries, keys) = (2, 4, 6, 6); got ()"),
    ({"mask": torch.zeros(1, 1, 1, 1, 6)}, "mask must have one to four dimensions"),
    ({"mask": torch.zeros(6, 5)}, "mask must have one to four dimensions"),
    ({"mask": torch.zeros(3, 1, 1, 6)}, "mask must have one to four dimensions"),
    ({"mask": torch.zeros(6, 6, dtype=torch.int64)}, "mask must be bool (True = attend) or floating point (added to the scores); got int64"),
    ({"mask": torch.zeros(6, 6, device="meta")}, "mask must be on q's device cpu; got meta"),
    ({"mask": torch.zeros(6, 6, requires_grad=True)}, "mask must not require a gradient"),
    ({"dropout_p": 0.1}, "dropout_p must be 0: attention with dropout has no tangent here (got 0.1)"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[f"{next(iter(changes))}-{i}" for i, (changes, _) in enumerate(BAD)])
@pytest.mark.parametrize("attention", [jvp_attention, reference.jvp_attention], ids=["public", "reference"])
def test_bad_input_is_named(attention: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        attention(**inputs(**changes))


@pytest.mark.parametrize("attention", [jvp_attention, reference.jvp_attention], ids=["public", "reference"])
def test_tensors_that_carry_a_tangent_are_refused(attention: Callable[..., Any]) -> None:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, X)
        for name in ("q", "tq", "mask"):
            with pytest.raises(ValueError, match=f"^{name} carries a forward-mode tangent"):
                attention(**inputs(**{name: dual if name != "mask" else dual[..., :6]}))
    with pytest.raises(ValueError, match=r"fastgen\.jvp\.tangent"):
        torch.func.jvp(lambda q: attention(q, X, X)[0], (X,), (X,))


@pytest.mark.parametrize("mask", FACTORS["mask"])
@pytest.mark.parametrize("tangents", FACTORS["tangents"])
def test_reference_equals_forward_mode_autograd(mask: str, tangents: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(mask=mask, tangents=tangents, lengths=(20, 30), heads=(4, 2), batch=2)
    given = {name: x.double() if x is not None and x.is_floating_point() else x for name, x in tensors(case).items()}
    causal = mask.startswith("causal")
    o, to, lse = truth(given, causal)
    for chunk in (2**26, 1000):
        monkeypatch.setattr(reference, "CHUNK", chunk)
        got_o, got_to, got_lse = jvp_attention(**given, causal=causal)  # pyright: ignore[reportArgumentType]
        assert got_to is not None and got_o.dtype == got_lse.dtype == torch.float64
        torch.testing.assert_close((got_o, got_to, got_lse), (o, to, lse), atol=1e-12, rtol=1e-12)


def test_reference_gradient() -> None:
    q, k, v = (torch.randn(1, heads, 5, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    mask = torch.rand(5, 5) < 0.6
    mask[2] = False
    for causal in (False, True):
        assert torch.autograd.gradcheck(lambda q, k, v, causal=causal: jvp_attention(q, k, v, q, k, v, mask=mask, causal=causal)[0], (q, k, v))
    o, to, lse = jvp_attention(q, k, v, q, k, v)
    assert o.requires_grad and to is not None and not to.requires_grad and not lse.requires_grad


def reference_errors(given: dict[str, Any], causal: bool) -> dict[str, float]:
    """Of o, to, lse (all fp32) and the gradients against float64, the truth's own definition differentiated."""
    given = given | {name: given[name].requires_grad_() for name in "qkv"}
    wide = given | {name: given[name].detach().double().requires_grad_() for name in "qkv"}
    do = torch.randn(given["q"].shape, generator=torch.Generator().manual_seed(5))
    o, to, lse = jvp_attention(**given, causal=causal)
    true_o, true_to, true_lse = truth({name: None if x is None else x.detach() for name, x in given.items()}, causal)
    assert to is not None
    found = {"o": per_head(o.detach(), true_o, 1e-9), "to": per_head(to, true_to, 1e-9)}
    assert torch.equal(lse == -torch.inf, true_lse == -torch.inf)
    # Relative to the largest, since q·(offset) is rounded like a number of that size.
    found["lse"] = ((lse - true_lse).nan_to_num(0.0).abs().max() / true_lse.masked_fill(true_lse == -torch.inf, 1.0).abs().max()).item()
    got = torch.autograd.grad(o, [given[name] for name in "qkv"], do)
    true = torch.autograd.grad(naive(wide["q"], wide["k"], wide["v"], given["mask"], causal)[0], [wide[name] for name in "qkv"], do.double())
    return found | {f"d{name}": per_head(a, b, 1e-9) for name, a, b in zip("qkv", got, true, strict=True)}


@pytest.mark.parametrize("mask", FACTORS["mask"])
@pytest.mark.parametrize("offset", [0, 6, 64])
def test_common_offsets_cost_the_reference_nothing(offset: int, mask: str) -> None:
    """Of keys, values and the keys' tangents. Seen: 4e-7 throughout, and uncentred 4e-5 at 6 and 4e-3 at 64 (tangent and dq)."""
    given: dict[str, Any] = tensors(Case(mask=mask, lengths=(40, 70), head_size=32, heads=(4, 2), batch=2))
    given |= {name: given[name] + offset for name in ("k", "v", "tk")}
    assert max(reference_errors(given, mask.startswith("causal")).values()) <= 3e-6


def test_keys_that_nobody_sees_move_no_centre() -> None:
    """Padding may hold anything: 1e20 in a mean would leave nothing of the rest."""
    given: dict[str, Any] = tensors(Case(lengths=(20, 30), heads=(2, 2)))
    hidden = torch.arange(30) >= 20
    masks = (~hidden, torch.zeros(30).masked_fill(hidden, -torch.inf), -1e4 * hidden.float(), None)
    for mask in masks:
        given |= {"mask": mask, **{name: given[name].masked_fill(hidden[:, None], 30.0 if mask is masks[2] else 1e20) for name in ("k", "tk", "v")}}
        assert max(reference_errors(given, causal=mask is None).values()) <= 3e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reference_rounds_half_precision_once(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 40, 16).to(dtype) for _ in range(3))
    o, to, lse = truth({"q": q, "k": k, "v": v, "tq": q, "tk": k, "tv": v, "mask": None}, causal=False)
    with torch.autocast("cpu", torch.bfloat16):
        got_o, got_to, got_lse = jvp_attention(q, k, v, q, k, v)
    assert got_to is not None and got_o.dtype == got_to.dtype == dtype and got_lse.dtype == torch.float32
    assert max(per_head(got_o, o, 1e-9), per_head(got_to, to, 1e-9)) <= torch.finfo(dtype).eps / 2
    torch.testing.assert_close(got_lse.double(), lse, atol=1e-6, rtol=1e-6)


def test_scale_and_lack_of_tangents() -> None:
    q = torch.randn(1, 1, 9, 4, dtype=torch.float64)
    o, to, _ = jvp_attention(q, q, q, scale=0.3)
    assert to is None
    torch.testing.assert_close(o, torch.nn.functional.scaled_dot_product_attention(q, q, q, scale=0.3))


def test_compiled_code_breaks_its_graph_and_stays_right() -> None:
    q = torch.randn(1, 1, 9, 4)
    doubled = torch.compile(lambda q: jvp_attention(2 * q, q, q, q)[1], backend="eager")
    torch.testing.assert_close(doubled(q), jvp_attention(2 * q, q, q, q)[1])
    with pytest.raises(Exception, match="disable"):
        torch.compile(lambda q: jvp_attention(q, q, q, q)[1], backend="eager", fullgraph=True)(q)


def test_the_path_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(package, "_triton_version", lambda: "")
    assert package.describe() == "plain PyTorch reference (Triton is not installed)"
    monkeypatch.setattr(package, "_triton_version", lambda: "3.9.0")
    monkeypatch.setattr(package, "_interpreted", lambda: False)
    assert package.describe() == "plain PyTorch reference (no CUDA device)"
    monkeypatch.setattr(package, "_interpreted", lambda: True)
    assert "interpreter" in package.describe()


def test_a_slow_path_on_an_accelerator_says_so_once(recwarn: pytest.WarningsRecorder) -> None:
    package._warn_once.cache_clear()
    for _ in range(2):
        assert not package._has_kernel(torch.device("cuda"), torch.float64)
        assert not package._has_kernel(torch.device("mps"), torch.float32)
        jvp_attention(X, X, X)
    said = [str(warning.message) for warning in recwarn if "plain PyTorch path" in str(warning.message)]
    assert len(said) == 2 and "float64" in said[0] and "mps" in said[1]
