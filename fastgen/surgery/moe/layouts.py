"""How the feed-forward layers of diffusers' classes lie: which layers of a module lead to values and gates, and which leads back.

Names are those of the file and the class that diffusers defines. A class with one layout more is one line here, and one in the tests.
"""

from __future__ import annotations

from typing import NamedTuple

from fastgen_kernels.moe_ffn import Activation


class Layout(NamedTuple):
    """A module that is a feed-forward layer, and is replaced as a whole. value, gate: names of linear layers, gate "" where there are no gates, and
    value's where one layer makes both, values first unless gates_first; down: of the layer that leads back."""

    value: str
    gate: str
    down: str
    activation: Activation
    gates_first: bool = False

    @property
    def up(self) -> tuple[str, ...]:
        return (self.value,) if self.gate in ("", self.value) else (self.value, self.gate)


class BlockLayout(NamedTuple):
    """A module that holds a feed-forward layer among others, and whose own code stays (inside.py). As in `Layout`; act: the module that computes the
    activation, of values and gates together unless multiplies, where the code multiplies values by what it makes of gates; hidden: the attribute that
    says how many hidden neurons there are, where the code splits by it; splits: whether it splits values from gates; others: attributes that
    it multiplies `hidden` by, which are 1 with experts."""

    up: tuple[str, ...]
    act: str
    down: str
    activation: Activation
    gates_first: bool = False
    multiplies: bool = False
    splits: bool = False
    hidden: str = ""
    others: tuple[str, ...] = ()


_W = Layout("w3", "w1", "w2", "swiglu")
_GATE_UP = Layout("up_proj", "gate_proj", "down_proj", "swiglu")

LAYERS: dict[str, Layout] = {
    "transformer_z_image.FeedForward": _W,
    "transformer_bria_fibo2.FeedForward": _W,
    "transformer_hidream_image.HiDreamImageFeedForwardSwiGLU": _W,
    "transformer_ideogram4.Ideogram4MLP": _W,
    "attention.LuminaFeedForward": Layout("linear_3", "linear_1", "linear_2", "swiglu"),
    "auraflow_transformer_2d.AuraFlowFeedForward": Layout("linear_2", "linear_1", "out_projection", "swiglu"),
    "transformer_krea2.Krea2SwiGLU": Layout("up", "gate", "down", "swiglu"),
    "transformer_qwenimage21.QwenImage21SwiGLUFeedForward": Layout("proj", "gate_layer", "out", "swiglu"),
    "ace_step_transformer.AceStepMLP": _GATE_UP,
    "transformer_cosmos3.Cosmos3VLTextMLP": _GATE_UP,  # with "silu"; with "relu2" it has no gates, and no layout
    "transformer_ernie_image.ErnieImageFeedForward": Layout("up_proj", "gate_proj", "linear_fc2", "geglu"),
    "t5_film_transformer.T5DenseGatedActDense": Layout("wi_1", "wi_0", "wo", "geglu-approximate"),
    "transformer_flux2.Flux2FeedForward": Layout("linear_in", "linear_in", "linear_out", "swiglu", gates_first=True),
    "transformer_flux3.Flux3FeedForward": Layout("linear_in", "linear_in", "linear_out", "swiglu", gates_first=True),
    "transformer_omnigen.OmniGenFeedForward": Layout("gate_up_proj", "gate_up_proj", "down_proj", "swiglu", gates_first=True),
    "transformer_stable_audio3.StableAudio3FeedForward": Layout("proj_in", "proj_in", "proj_out", "swiglu"),
    "transformer_kandinsky.Kandinsky5FeedForward": Layout("in_layer", "", "out_layer", "gelu"),
    "transformer_longcat_audio_dit.AudioDiTFeedForward": Layout("ff.0", "", "ff.3", "gelu-approximate"),
}

_SINGLE = BlockLayout(("proj_mlp",), "act_mlp", "proj_out", "gelu-approximate")

BLOCKS: dict[str, BlockLayout] = {
    "transformer_flux.FluxSingleTransformerBlock": _SINGLE,
    "transformer_bria.BriaSingleTransformerBlock": _SINGLE,
    "transformer_bria_fibo.BriaFiboSingleTransformerBlock": _SINGLE,
    "transformer_chroma.ChromaSingleTransformerBlock": _SINGLE,
    "transformer_hunyuan_video.HunyuanVideoSingleTransformerBlock": _SINGLE,
    "transformer_hunyuan_video.HunyuanVideoTokenReplaceSingleTransformerBlock": _SINGLE,
    "transformer_hunyuanimage.HunyuanImageSingleTransformerBlock": _SINGLE,
    "transformer_longcat_image.LongCatImageSingleTransformerBlock": _SINGLE,
    "transformer_motif_video.MotifVideoSingleTransformerBlock": _SINGLE,
    "transformer_ovis_image.OvisImageSingleTransformerBlock": BlockLayout(
        ("proj_mlp",), "act_mlp", "proj_out", "swiglu", multiplies=True, splits=True, hidden="mlp_hidden_dim"
    ),
    "transformer_flux2.Flux2ParallelSelfAttention": BlockLayout(
        ("to_qkv_mlp_proj",), "mlp_act_fn", "to_out", "swiglu", gates_first=True, hidden="mlp_hidden_dim", others=("mlp_mult_factor",)
    ),
    "transformer_prx.PRXBlock": BlockLayout(("up_proj", "gate_proj"), "mlp_act", "down_proj", "geglu-approximate", multiplies=True),
    "transformer_sana_wm.SanaWMMlp": BlockLayout(("fc1",), "act", "fc2", "gelu-approximate"),  # which is called with sizes beside tokens
}
