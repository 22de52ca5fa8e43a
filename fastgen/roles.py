"""Roles: the networks of one run (student, teacher, fake score, ...), how each is initialised and which parameters it trains.

Full fine-tuning copies the teacher for each trainable role. With LoRA all roles share one frozen base: a trainable role is an
adapter, the teacher is the base with every adapter off. A student that is another network than its teacher (of experts, say) has a frozen base
of its own beside that, to which its adapter belongs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgen import shards
from fastgen.denoiser import Denoiser, Predictor
from fastgen.families.base import Family
from fastgen.surgery import lora
from fastgen.surgery.heads import Heads, Taps, choose_taps
from fastgen.surgery.held import AS_LOADED, Storage, hold, rounded_weights
from fastgen.surgery.log_variance import LogVariance
from fastgen.surgery.moe.conversion import Conversion, converted
from fastgen.surgery.moe.importance import Importance
from fastgen.surgery.moe.layer import is_router, round_experts
from fastgen.surgery.offload import offload
from fastgen.surgery.precision import narrow
from fastgen.surgery.recompute import recompute_blocks
from fastgen.surgery.second_time import Defaults, Input, ScalarInputs
from fastgen.surgery.shrink import Shrink, shrunk


@dataclass(frozen=True)
class RoleSpec:
    """What a distiller asks for. init: where the weights come from. inputs: scalar inputs that the network gets beside the time.
    log_variance: whether it learns the log-variance of its loss. averaged: whether an EMA follows it, which is what is sampled and
    exported. heads: blocks whose features discriminator heads listen to. frozen_network: only the additions train."""

    trainable: bool
    init: Literal["teacher"] = "teacher"
    inputs: tuple[Input, ...] = ()
    log_variance: bool = False
    averaged: bool = False
    heads: Taps | None = None
    frozen_network: bool = False

    @property
    def trains_network(self) -> bool:
        return self.trainable and not self.frozen_network


def student(*, inputs: tuple[Input, ...] = ()) -> RoleSpec:
    """A network that is exported, or one of its experts."""
    return RoleSpec(True, inputs=inputs, averaged=True)


def trainable(*, inputs: tuple[Input, ...] = (), heads: Taps | None = None) -> RoleSpec:
    """A network that helps in training only."""
    return RoleSpec(True, inputs=inputs, heads=heads)


def judge(taps: Taps) -> RoleSpec:
    """A discriminator: trained heads on features of the frozen teacher, which it shares with the other roles."""
    return RoleSpec(True, heads=taps, frozen_network=True)


def frozen() -> RoleSpec:
    return RoleSpec(False)


@dataclass(frozen=True)
class LoraTuning:
    rank: int
    alpha: float
    targets: tuple[str, ...]
    seed: int = 0


@dataclass
class Role:
    """One network of the run. `module` is what is called (the prepared Denoiser); `denoiser` owns the parameters. own_base: whether the frozen
    network under its adapter is its own, and not the teacher's."""

    name: str
    spec: RoleSpec
    denoiser: Denoiser
    own_base: bool = False
    module: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.module = self.denoiser

    @property
    def predictor(self) -> Predictor:
        return Predictor(self.module, self.denoiser.family)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters this role trains, by name within the backbone, those of its additions behind `inputs.`, `log_variance.` and
        `heads.`; empty for a frozen role."""
        if not self.spec.trainable:
            return {}
        own = self.network_parameters() if self.spec.trains_network else {}
        additions = {"inputs": self.denoiser.inputs, "log_variance": self.denoiser.log_variance, "heads": self.denoiser.heads}
        for prefix, addition in additions.items():
            if addition is not None:
                own |= {f"{prefix}.{name}": value for name, value in addition.named_parameters()}
        return own

    def network_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of its network or of its adapter, by name within the backbone. Routers of a base of its own train whole: they are smaller
        than adapters would be, and new."""
        backbone, adapter = self.denoiser.backbone, self.denoiser.adapter
        if adapter is None:
            return dict(backbone.named_parameters())
        routers = {name: p for name, p in backbone.named_parameters() if self.own_base and is_router(name)}
        return lora.parameters(backbone, adapter) | routers

    def base(self) -> dict[str, Tensor]:
        """Of a base of its own what does not train, as it is kept, by the names that it has without adapters: what a run cannot read from its
        teacher again. Empty for other roles."""
        if not self.own_base:
            return {}
        trained = self.network_parameters()
        frozen = {name: p.detach() for name, p in self.denoiser.backbone.named_parameters() if name not in trained}
        return {lora.base_name(name): value for name, value in (frozen | rounded_weights(self.denoiser.backbone)).items()}

    def whole(self) -> dict[str, Tensor]:
        """`base` with all that trains but the adapter: as one that trains its whole network has them."""
        return self.base() | {name: value for name, value in self.state_dict().items() if not lora.is_factor(name)}

    def own_network_parameters(self) -> dict[str, nn.Parameter]:
        """The same without the adapter's name, so that two roles' parameters of one place have one name."""
        return {lora.own_name(name, self.denoiser.adapter): value for name, value in self.network_parameters().items()}

    @torch.no_grad()
    def blend(self, source: Role, weight: float) -> None:
        """Move this role's network towards another's of the same architecture: p <- (1 - weight) p + weight p'.

        Adapters move factor by factor: as they start with the same A, that is the average of the two products B A to first order.
        """
        theirs = source.own_network_parameters()
        for name, parameter in self.own_network_parameters().items():
            own = shards.own(parameter)
            own.lerp_(shards.own(theirs[name]).to(own.dtype), weight)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters().items()}

    def check_shapes(self, shapes: Mapping[str, torch.Size], own: Mapping[str, Tensor] | None = None) -> None:
        """ValueError unless a state of these shapes is one of exactly this role's parameters, or of these tensors of its own."""
        own = self.parameters() if own is None else own
        if own.keys() != shapes.keys():
            raise ValueError(f"weights of role {self.name!r} do not match: {sorted(own.keys() ^ shapes.keys())[:4]} …")
        for name, parameter in own.items():
            if parameter.shape != shapes[name]:
                raise ValueError(f"weights of role {self.name!r}: {name} is {tuple(shapes[name])}, not {tuple(parameter.shape)}")

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Strict, as `check_shapes` is."""
        self.check_shapes({name: value.shape for name, value in state.items()})
        for name, parameter in self.parameters().items():
            shards.assign(parameter, state[name])


class Roles(dict[str, Role]):
    """The roles of a run by name."""

    @property
    def trained(self) -> dict[str, Role]:
        return {name: role for name, role in self.items() if role.spec.trainable}

    @contextmanager
    def training(self, names: Iterable[str], only: Callable[[str], bool] | None = None) -> Iterator[None]:
        """Only the named roles' parameters require gradients inside, so a turn cannot leak gradients into another role. only: of these, those whose
        names it accepts."""
        names = set(names)

        def trains(role: str, parameter: str) -> bool:
            return role in names and (only is None or only(parameter))

        parameters = [(p, trains(name, key)) for name, role in self.trained.items() for key, p in role.parameters().items()]
        before = [parameter.requires_grad for parameter, _ in parameters]
        try:
            for parameter, train in parameters:
                parameter.requires_grad_(train)
            yield
        finally:
            for (parameter, _), required in zip(parameters, before, strict=True):
                parameter.requires_grad_(required)

    @torch.no_grad()
    def align_adapters(self, taken: Sequence[str]) -> None:
        """Give every adapter but those `taken` over from another run, which are still the identity (B = 0), the A of the first of these: all
        start with the same A again, whatever seed that run had, as `Role.blend` needs it."""
        if not taken or self[taken[0]].denoiser.adapter is None:
            return
        source, own_base = self[taken[0]].own_network_parameters(), self[taken[0]].own_base
        for name, role in self.trained.items():
            if role.denoiser.adapter is not None and name not in taken and role.own_base == own_base:
                for key, parameter in role.own_network_parameters().items():
                    if "lora_A" in key:
                        parameter.copy_(source[key])

    def release(self, name: str) -> None:
        """Take a role out of the run and out of memory; what it shares with others stays."""
        denoiser = self.pop(name).denoiser
        if denoiser.adapter is not None:
            lora.remove_adapter(denoiser.backbone, denoiser.adapter)

    def predictors(self) -> dict[str, Predictor]:
        return {name: role.predictor for name, role in self.items()}


def build_roles(
    specs: Mapping[str, RoleSpec],
    family: Family,
    base: nn.Module,
    *,
    tuning: LoraTuning | None = None,
    shrink: Shrink | None = None,
    experts: Conversion | None = None,
    importance: Importance | None = None,
    autocast: torch.dtype | None = None,
    defaults: Defaults | None = None,
    seed: int = 0,
    recompute: bool = False,
    storage: Storage = AS_LOADED,
    device: torch.device | None = None,
    offloaded: bool = False,
) -> Roles:
    """Every role from the teacher's network `base`, which is used up. Trained weights stay fp32; under autocast a teacher that no
    adapter shares keeps its parameters in the compute dtype. tuning: adapters, of students that are made of other layers on networks of their own,
    which are kept in `storage`'s dtype and not quantised. shrink: what those that are exported have of the teacher's blocks; the others have
    all. experts: what becomes of their feed-forward layers, by the neurons' importance; None where weights are
    loaded afterwards. defaults: of scalar inputs, for calls that do not give them. seed: of what
    a role has beside its network (adapters have `tuning.seed`). recompute: blocks keep no activations but compute them again. storage: of
    weights that no role trains. device: where the roles are made; None: where `base` is, of which only what they keep is moved. offloaded: the frozen
    network of full fine-tuning stays on the CPU, see surgery/offload.py."""
    base.requires_grad_(False)
    if recompute:
        recompute_blocks(base)
    device = next(base.parameters()).device if device is None else device
    additions = {name: _additions(name, spec, family, base, defaults, seed, device) for name, spec in specs.items()}
    networks = dict[str, nn.Module]()
    for name, spec in specs.items():
        if spec.trains_network and spec.averaged and (shrink is not None or experts is not None):
            networks[name] = _reshaped(base, family, shrink, experts, importance, name, recompute=recompute)
            _move(networks[name], device)
    if experts is not None:
        for name in networks:
            additions[name] |= {"balance": experts.balance, "bias_rate": experts.bias_rate}
    if tuning is not None:
        for network in networks.values():
            hold(network, (), Storage(storage.dtype))
            round_experts(network, storage.dtype)
        hold(base, family.blocks(base), storage, device)
        _move(base, device)
        return _with_adapters(specs, family, base, networks, tuning, autocast, additions, device)
    roles = Roles()
    for name, spec in specs.items():
        backbone = networks.get(name, base)
        if spec.trains_network and name not in networks:
            backbone = copy.deepcopy(base)
            _move(backbone, device)
        backbone.requires_grad_(spec.trains_network)
        roles[name] = Role(name, spec, Denoiser(backbone, family, autocast=autocast, **additions[name]))
    hold(base, family.blocks(base), storage, torch.device("cpu") if offloaded else device)
    _move(base, torch.device("cpu") if offloaded else device)
    if autocast is not None and storage.dtype == "auto":
        narrow(base, autocast)
    if offloaded:
        offload(base, device)
    return roles


def _move(network: nn.Module, device: torch.device) -> None:
    """To a device in place; what has no weights yet stays so."""
    network._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))


def _reshaped(
    base: nn.Module, family: Family, shrink: Shrink | None, experts: Conversion | None, importance: Importance | None, name: str, *, recompute: bool
) -> nn.Module:
    """What role `name` starts from where it has other layers than its teacher."""
    if experts is not None:
        return converted(base, family.blocks(base), experts, importance, name)
    assert shrink is not None
    network = shrunk(base, shrink)
    if recompute:  # a new network does not know of it
        recompute_blocks(network)
    return network


def _additions(
    name: str, spec: RoleSpec, family: Family, base: nn.Module, defaults: Defaults | None, seed: int, device: torch.device
) -> dict[str, Any]:
    """What a role has beside its network, as arguments of its Denoiser. Each role's start depends on the run's seed and on its name."""
    additions, own_seed = {}, f"{seed}/{name}"
    dtype = torch.promote_types(next(base.parameters()).dtype, torch.float32)
    if spec.inputs:
        assert family.time_projection is not None, "the plan refuses families without a place for scalar inputs"
        width: Any = base.get_submodule(family.time_projection).out_features
        additions["inputs"] = ScalarInputs(spec.inputs, width, defaults=defaults, seed=own_seed, dtype=dtype).to(device)
    if spec.log_variance:
        additions["log_variance"] = LogVariance(seed=own_seed).to(device, dtype)
    if spec.heads is not None:
        widths = family.feature_widths(base)
        taps = choose_taps(spec.heads, len(widths))
        additions["heads"] = Heads(taps, [widths[tap] for tap in taps], seed=own_seed).to(device, dtype)
    return additions


def _with_adapters(
    specs: Mapping[str, RoleSpec],
    family: Family,
    base: nn.Module,
    networks: Mapping[str, nn.Module],
    tuning: LoraTuning,
    autocast: torch.dtype | None,
    additions: Mapping[str, dict[str, Any]],
    device: torch.device,
) -> Roles:
    """Adapters on the base that roles share, or on a role's own in `networks`."""
    roles = Roles()
    for name, spec in specs.items():
        backbone = networks.get(name, base)
        if spec.trains_network:
            lora.add_adapter(backbone, name, rank=tuning.rank, alpha=tuning.alpha, targets=tuning.targets, seed=tuning.seed, device=device)
        denoiser = Denoiser(backbone, family, adapter=name if spec.trains_network else None, autocast=autocast, **additions[name])
        roles[name] = Role(name, spec, denoiser, own_base=name in networks)
    for network in (base, *networks.values()):
        network.requires_grad_(False)
    for role in roles.trained.values():
        for parameter in role.parameters().values():
            parameter.requires_grad_(True)
    return roles
