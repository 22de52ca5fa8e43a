from __future__ import annotations

import pytest
import torch

from fastgen import conditioning
from fastgen.conditioning import Conditioning


def make(batch: int, start: int = 0) -> Conditioning:
    rows = torch.arange(start, start + batch)
    return {"text": rows[:, None, None] + torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]), "label": rows}


def test_batch_size() -> None:
    assert conditioning.batch_size(make(3)) == 3
    assert conditioning.batch_size({}) == 0


def test_cat_undoes_select() -> None:
    whole = make(5)
    parts = [conditioning.select(whole, torch.tensor(rows)) for rows in ([0, 1], [2], [3, 4])]
    for key, value in conditioning.cat(parts).items():
        assert torch.equal(value, whole[key])
    assert conditioning.cat([{}, {}]) == {}


def test_cat_refuses_different_keys() -> None:
    with pytest.raises(ValueError, match=r"\['label', 'text'\] and \['label'\]"):
        conditioning.cat([make(1), {"label": torch.zeros(1)}])


def test_select_takes_rows_in_the_order_given() -> None:
    picked = conditioning.select(make(4, start=10), torch.tensor([3, 0, 0]))
    assert picked["label"].tolist() == [13, 10, 10]
    assert torch.equal(picked["text"][0], make(1, start=13)["text"][0])


def test_to_casts_floating_point_only() -> None:
    moved = conditioning.to(make(3) | {"mask": torch.tensor([True, False, True])}, dtype=torch.bfloat16)
    assert moved["text"].dtype == torch.bfloat16
    assert torch.equal(moved["text"], make(3)["text"].bfloat16())
    assert moved["label"].dtype == torch.int64
    assert moved["mask"].dtype == torch.bool
    assert conditioning.to(make(2), device="meta")["label"].device.type == "meta"
    assert torch.equal(conditioning.to(make(2))["text"], make(2)["text"])


def test_repeat() -> None:
    repeated = conditioning.repeat(make(1, start=7), 3)
    assert repeated["label"].tolist() == [7, 7, 7]
    assert torch.equal(repeated["text"][2], make(1, start=7)["text"][0])


def test_drop_replaces_masked_rows() -> None:
    null = {"text": torch.full((1, 2, 3), -1.0, dtype=torch.float64), "label": torch.tensor([-1])}
    dropped = conditioning.drop(make(4), null, torch.tensor([True, False, False, True]))
    assert dropped["label"].tolist() == [-1, 1, 2, -1]
    assert torch.equal(dropped["text"][1:3], make(4)["text"][1:3])
    assert (dropped["text"][[0, 3]] == -1).all()
    assert dropped["text"].dtype == torch.float32


def test_gradients_pass_through_kept_rows_only() -> None:
    text = make(3)["text"].requires_grad_()
    dropped = conditioning.drop({"text": text}, {"text": torch.zeros(1, 2, 3)}, torch.tensor([False, True, False]))
    (2 * dropped["text"]).sum().backward()
    assert text.grad is not None
    assert text.grad[:, 0, 0].tolist() == [2, 0, 2]
