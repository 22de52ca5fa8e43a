"""Dense networks to mixtures of experts (Dense2MoE, arXiv:2510.09094): find feed-forward layers, measure their neurons, split, route, account."""

from fastgen.surgery.moe.blocks import BlockRouter, Groups, block_routers, centre, keeping_all, mix_blocks, recording_blocks, set_kept
from fastgen.surgery.moe.capacity import Capacity, follow
from fastgen.surgery.moe.conversion import Conversion, converted, use
from fastgen.surgery.moe.convert import convert, to_convert
from fastgen.surgery.moe.held import Held, holding
from fastgen.surgery.moe.importance import magnitude, random, taylor
from fastgen.surgery.moe.layer import ExpertLayer, even_out, expert_layers, part, recording, set_active, using
from fastgen.surgery.moe.modulation import Slim, find_modulation, slim
from fastgen.surgery.moe.operators import gradient_utility, learn_bias, prune, remove, resize, sizes_of, upcycle, weight_utility
from fastgen.surgery.moe.routing import Routing, balance_loss, by_time, counts
from fastgen.surgery.moe.split import Experts

__all__ = [
    "BlockRouter",
    "Capacity",
    "Conversion",
    "ExpertLayer",
    "Experts",
    "Groups",
    "Held",
    "Routing",
    "Slim",
    "balance_loss",
    "block_routers",
    "by_time",
    "centre",
    "convert",
    "converted",
    "counts",
    "even_out",
    "expert_layers",
    "find_modulation",
    "follow",
    "gradient_utility",
    "holding",
    "keeping_all",
    "learn_bias",
    "magnitude",
    "mix_blocks",
    "part",
    "prune",
    "random",
    "recording",
    "recording_blocks",
    "remove",
    "resize",
    "set_active",
    "set_kept",
    "sizes_of",
    "slim",
    "taylor",
    "to_convert",
    "upcycle",
    "use",
    "using",
    "weight_utility",
]
