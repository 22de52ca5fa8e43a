"""A recipe's `evaluate` block, opened: its protocol, and what that is measured with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastgen.config import EvaluateBlock
from fastgen.errors import UserError
from fastgen.evaluation.extractors.base import Resources
from fastgen.evaluation.protocol import Protocol, load_protocol
from fastgen.evaluation.weights import Weights
from fastgen.files import check_folder, expanded

PROTOCOL = "evaluate.protocol"


def protocol_of(block: EvaluateBlock) -> Protocol | None:
    """The protocol with its prompts read; None where nothing is to be measured. UserError that names the recipe key of what is amiss."""
    if block.protocol is None:
        if block.every:
            raise UserError(f"recipe key evaluate.every: needs {PROTOCOL}, which is null")
        return None
    for name, folder in (("data_dir", block.data_dir), ("weights_dir", block.weights_dir)):
        check_folder(None if folder is None else expanded(folder), f"recipe key evaluate.{name}")
    with naming_the_key():
        return load_protocol(block.protocol, data_dir=block.data_dir)


def resources_of(block: EvaluateBlock, device: torch.device | str = "cpu") -> Resources:
    """What the evaluation is built from."""
    weights, data = (None if given is None else expanded(given) for given in (block.weights_dir, block.data_dir))
    return Resources(weights=Weights(weights), data_dir=data, device=torch.device(device))


@contextmanager
def naming_the_key() -> Iterator[None]:
    """Around what refuses a protocol, whoever has named it: the UserError begins with the recipe key, unless it names that."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if f"recipe key {PROTOCOL}" in str(error) else f"recipe key {PROTOCOL}: {error}") from error
