"""Dense networks to mixtures of experts (Dense2MoE, arXiv:2510.09094): find feed-forward layers, measure their neurons, split, route, account."""

from fastgen.surgery.moe.conversion import Conversion, converted
from fastgen.surgery.moe.convert import convert, to_convert
from fastgen.surgery.moe.importance import magnitude, random, taylor
from fastgen.surgery.moe.layer import ExpertLayer, even_out, expert_layers, part, recording, set_active, using
from fastgen.surgery.moe.routing import Routing, balance_loss, counts, scheduled_active
from fastgen.surgery.moe.split import Experts

__all__ = [
    "Conversion",
    "ExpertLayer",
    "Experts",
    "Routing",
    "balance_loss",
    "convert",
    "converted",
    "counts",
    "even_out",
    "expert_layers",
    "magnitude",
    "part",
    "random",
    "recording",
    "scheduled_active",
    "set_active",
    "taylor",
    "to_convert",
    "using",
]
