"""Of every class among diffusers' transformers that looks like a feed-forward layer it is known what becomes of it: read from their source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest

from fastgen.surgery.moe.layouts import BLOCKS, LAYERS

TRANSFORMERS = Path(diffusers.__file__).parent / "models" / "transformers"
# What looks like one and is split in another way, or not.
SEQUENCES = {"transformer_wan_animate_2.WanAnimate2TransformerBlock"}  # a sequence in the block, which is found without a name
REFUSED = {
    "transformer_minimax_music3.MiniMaxMusic3TransformerBlock": "computes its activation in the block's own code",
    "minimax_music3_rvq_depth_decoder.MiniMaxMusic3DepthDecoderBlock": "the same",
    "transformer_rfd4_proteina.RFD4ProteinaTransition": "is given a mask, and the same",
    "transformer_rfd4_proteina.RFD4ProteinaPairTransition": "the same, and has a norm in it",
}
OTHERS = {
    "consisid_transformer_3d.LocalFacialExtractor": "embeds",
    "t5_film_transformer.T5FilmDecoder": "embeds times, outside its blocks",
    "transformer_stable_audio3.StableAudio3DiTModel": "the same",
    "transformer_longcat_audio_dit.AudioDiTTimestepEmbedding": "embeds",
    "transformer_stable_audio3.StableAudio3DiTBlock": "embeds, beside a layer that is a module of its own",
    "transformer_wan_animate_2.WanAnimate2Transformer3DModel": "embeds",
    "transformer_cosmos.CosmosAdaLayerNorm": "modulates",
    "transformer_cosmos.CosmosAdaLayerNormZero": "modulates",
    "transformer_longcat_audio_dit.AudioDiTConvNeXtV2Block": "convolves over text, outside the blocks",
    "transformer_rfd4_proteina.RFD4ProteinaTriangleMultiplication": "mixes pairs of residues",
    "transformer_cosmos3.Cosmos3OmniTransformer": "leads into blocks and out of them",
    "transformer_flux3.Flux3Transformer2DModel": "the same",
    "transformer_minimax_h3.MiniMaxH3Transformer3DModel": "the same",
    "transformer_temporal.TransformerSpatioTemporalModel": "the same",
    "transformer_temporal.TransformerTemporalModel": "the same",
}


def is_linear(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Linear") and len(node.args) >= 2


def widths(node: ast.Call) -> tuple[str, str]:
    return ast.unparse(node.args[0]), ast.unparse(node.args[1])


def leads_there_and_back(cls: ast.ClassDef) -> bool:
    """Whether it has a linear layer to a width, or twice that, and one back from it, and is not attention."""
    layers = [widths(node) for node in ast.walk(cls) if isinstance(node, ast.Call) and is_linear(node)]
    names = {node.attr for node in ast.walk(cls) if isinstance(node, ast.Attribute)}
    return not names & {"to_q", "to_qkv", "heads"} and any(
        (second[0] in first[1] or first[1] in second[0]) and first[0] in second[1] and first[0] != second[0] for first in layers for second in layers
    )


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for file in sorted(TRANSFORMERS.glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                yield f"{file.stem}.{node.name}", node


@pytest.mark.skipif(not diffusers.__version__.startswith("0.42."), reason="read for the classes of diffusers 0.42")
def test_there_is_no_other_that_looks_like_one() -> None:
    names = {name for name, _ in classes()}
    found = {name for name, node in classes() if leads_there_and_back(node)}
    known = {*LAYERS, *BLOCKS, *SEQUENCES, *REFUSED, *OTHERS}
    assert sorted(found - known) == []
    assert sorted(name for name in known - names if not name.startswith("attention.")) == []
    assert len(found & {*LAYERS, *BLOCKS}) > 25  # so that it is these that are recognised
