"""The words that go with an exported student: how plain diffusers must call it, and its model card, from its fastgen.json."""

from __future__ import annotations

from typing import Any


def call_snippet(manifest: dict[str, Any], folder: str = "STUDENT_DIR") -> str:
    """Python that draws a picture with plain diffusers."""
    arguments = "".join(f"    {key}={value!r},\n" for key, value in manifest["call"].items())
    if manifest["weights"] == "lora":
        load = (
            f"import torch\nfrom diffusers import {manifest['pipeline']}, FlowMapEulerDiscreteScheduler\n\n"
            f'pipe = {manifest["pipeline"]}.from_pretrained("{manifest["base"]}", torch_dtype=torch.float32)\npipe.load_lora_weights("{folder}")\n'
            f'pipe.scheduler = FlowMapEulerDiscreteScheduler.from_pretrained("{folder}", subfolder="scheduler")\n'
        )
    else:
        load = f'import torch\nfrom diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("{folder}")\n'
    return f"{load}image = pipe(\n    {manifest['prompts'][0]!r},\n{arguments}    generator=torch.Generator().manual_seed(0),\n).images[0]\n"


def model_card(manifest: dict[str, Any]) -> str:
    """README.md of an export: hub metadata, what it is, how it must be called."""
    teacher, call = manifest["teacher"], manifest["call"]
    relation = "adapter" if manifest["weights"] == "lora" else "finetune"
    on_hub = teacher["pretrained"].count("/") == 1 and not teacher["pretrained"].startswith("/")  # local and bundled teachers have no page to link to
    header = [
        "---",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        *([f"base_model: {teacher['pretrained']}", f"base_model_relation: {relation}"] if on_hub else []),
        "tags: [distillation, few-step, fastgen]" if call["guidance_scale"] == 1 else "tags: [fastgen]",
        "---",
    ]
    guided = "without classifier-free guidance" if call["guidance_scale"] == 1 else f"with guidance {call['guidance_scale']}"
    version, method = manifest["versions"]["fastgen"], manifest["method"]
    what = f"Made by fastgen {version} with `{method}` from `{teacher['pretrained']}` (guidance {teacher['guidance']})."
    how = (
        f"It samples in {manifest['steps']} network evaluation{'s' if manifest['steps'] > 1 else ''}, {guided}, at times "
        f"{[round(t, 4) for t in manifest['grid']]}. A stock pipeline call has its own defaults for steps, guidance and text length, "
        "so these arguments must be passed:"
    )
    if manifest.get("own_steps_only"):
        how = f"{how[:-1]}, and other numbers of steps give no sensible picture:"
    snippet = f"```python\n{call_snippet(manifest)}```"
    return "\n".join([*header, f"# {method}, {manifest['steps']}-step", "", what, "", how, "", snippet, ""])
