"""Networks of transformers from a folder as model hubs have it: safetensors only, nothing downloaded, no code of the folder's run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastgen.errors import UserError
from fastgen.files import loading

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def load_model(kind: Any, folder: Path, device: torch.device) -> Any:
    """A model of class `kind`, in fp32, frozen. UserError where the folder cannot be read, or its weights are not all those of the model (which
    transformers would draw at random)."""
    options = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    with loading(folder):
        model, found = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **options)
    lacking = [*found["missing_keys"], *found["mismatched_keys"]]
    if lacking:
        raise UserError(f"cannot read {str(folder / WEIGHTS)!r}: {len(lacking)} of the model's weights are not in it, such as {lacking[0]}")
    return model.to(device).eval().requires_grad_(False)
