"""Which module each pair of lora_A and lora_B changes, and how. Names and shapes decide; no value is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from gptoss_nf4.adapters.config import AdapterConfig
from gptoss_nf4.adapters.names import FORMS, FUSED, INNER, PARAMETERS, W2, W13, Pair, pair_keys, target_shapes
from gptoss_nf4.errors import UserError
from gptoss_nf4.format import names
from gptoss_nf4.format.dimensions import Dimensions

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Factors:
    """One pair of lora_A and lora_B: its keys `a` and `b`, and how to read them."""

    a: str
    b: str
    rank: int
    """Where the pair holds all experts, that of each."""
    scale: float
    expert: int | None = None
    """The expert that the pair belongs to. None where it belongs to all of them, or the module has none."""
    swapped: bool = False
    """lora_A is on the weight's outputs, and lora_B on its inputs."""
    grouped_by_expert: bool = False
    """Order of the columns of a fused lora_B, see `config.LAYOUTS`."""


@dataclass(frozen=True)
class Module:
    """A module of the base that the adapter changes."""

    name: str
    """Full name of the target, such as `model.layers.0.mlp.experts.w13`."""
    shape: tuple[int, int]
    """[out, in] of its weight; with experts, of the weight of one."""
    experts: int | None
    factors: tuple[Factors, ...]


def resolve(config: AdapterConfig, shapes: Shapes, d: Dimensions, where: object) -> dict[int, list[Module]]:
    """The modules that an adapter changes, by layer. `shapes` has the shape of each of its tensors, by key.

    Every key is used exactly once. UserError, which calls the adapter `where`, for a key of no module, a size that does not
    fit the base, or another rank than the configuration's.
    """
    return _Resolver(config, shapes, d, where).by_layer()


@dataclass(frozen=True)
class _Resolver:
    config: AdapterConfig
    shapes: Shapes
    d: Dimensions
    where: object

    def by_layer(self) -> dict[int, list[Module]]:
        pairs = pair_keys(self.shapes, self.d, self.where)
        for pair in pairs:
            self._require_matrices(pair)
        fused = {pair: self._parameter(pair) for pair in pairs if FORMS[pair.place.form] == FUSED}
        self._require_whole_layers(fused)
        swapped = self._swapped(fused)

        found: dict[int, dict[str, list[Factors]]] = {}
        for pair in pairs:
            if pair in fused:
                target, factors = PARAMETERS[fused[pair]], self._fused_factors(pair, fused[pair], swapped)
            else:
                target, factors = FORMS[pair.place.form], self._factors(pair)
            found.setdefault(pair.place.layer, {}).setdefault(target, []).append(factors)
        return {layer: self._modules(layer, targets) for layer, targets in found.items()}

    @cached_property
    def _targets(self) -> dict[str, tuple[int, int]]:
        return target_shapes(self.d)

    def _modules(self, layer: int, targets: dict[str, list[Factors]]) -> list[Module]:
        """One layer's modules in the order of `target_shapes`. UserError where keys of two forms change the same weight."""
        modules = []
        for target, shape in self._targets.items():
            factors = targets.get(target, [])
            name = names.prefix(layer) + target
            if len(factors) > 1 and any(one.expert is None for one in factors):
                raise UserError(
                    "duplicated delta",
                    where=self.where,
                    got=f"{factors[0].a[:200]} and {factors[1].a[:200]}",
                    expected=f"one form of {name}",
                    next_step="save the adapter again",
                )
            if factors:
                experts = self.d.experts if target in (W13, W2) else None
                modules.append(Module(name, shape, experts, tuple(factors)))
        return modules

    def _require_matrices(self, pair: Pair) -> None:
        """UserError where lora_A and lora_B are not matrices [R, x] and [y, R]."""
        a, b = self.shapes[pair.a], self.shapes[pair.b]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or min(*a, *b) < 1:
            raise self._wrong_size(pair, "[r, in] and [out, r]", "save the adapter again")

    def _factors(self, pair: Pair) -> Factors:
        """The factors of a linear module, or of the module of one expert."""
        out_features, in_features = self._targets[FORMS[pair.place.form]]
        if self._outer_sizes(pair) != (out_features, in_features):
            raise self._wrong_size(pair, f"[r, {in_features}] and [{out_features}, r]")
        # Where a parameter was the target, PEFT matches its patterns against the parameter's name.
        parameter = f"{pair.place.module}.weight"
        name = parameter if self.config.targets_parameter(parameter) else pair.place.module
        rank = self.config.rank(name)
        if self.shapes[pair.a][0] != rank:  # the scale depends on it
            raise UserError(
                "contradicting ranks",
                where=self.where,
                got=f"rank {self.shapes[pair.a][0]} in the tensors of {name}",
                expected=f"{rank} from r and rank_pattern",
                next_step="restore the adapter_config.json that was saved with the tensors",
            )
        return Factors(pair.a, pair.b, rank, self.config.scale(name), pair.place.expert)

    def _fused_factors(self, pair: Pair, parameter: str, swapped: bool) -> Factors:
        """The factors of all experts together: lora_A [E * r, in] and lora_B [out, r * E]."""
        rows = self.shapes[pair.a][0]
        name = _parameter_name(pair.place.layer, parameter)
        rank = self.config.rank(name)
        if rows != self.d.experts * rank:
            raise UserError(
                "wrong number of ranks",
                where=self.where,
                got=f"{rows} rows of lora_A of {name}",
                expected=f"{self.d.experts * rank}, {rank} for each of {self.d.experts} experts",
                next_step="use the base that the adapter was trained on, and the adapter_config.json saved with it",
            )
        grouped = self.config.grouped_by_expert(parameter)
        return Factors(pair.a, pair.b, rank, self.config.scale(name), swapped=swapped, grouped_by_expert=grouped)

    def _parameter(self, pair: Pair) -> str:
        """`gate_up_proj` or `down_proj`, told by the sizes: these differ in every model, swapped or not."""
        for parameter, target in PARAMETERS.items():
            if sorted(self._outer_sizes(pair)) == sorted(self._targets[target]):
                return parameter
        expected = " or ".join(str(list(self._targets[target])) for target in PARAMETERS.values())
        raise self._wrong_size(pair, f"outer sizes of {expected}")

    def _require_whole_layers(self, fused: Mapping[Pair, str]) -> None:
        """UserError where a layer lacks a fused parameter that target_parameters names, or has one twice."""
        by_layer: dict[int, list[Pair]] = {}
        for pair in fused:
            by_layer.setdefault(pair.place.layer, []).append(pair)
        for layer, pairs in by_layer.items():
            found = sorted(fused[pair] for pair in pairs)
            named = sorted(name for name in PARAMETERS if self.config.targets_parameter(_parameter_name(layer, name)))
            inner_alone = len(pairs) == 1 and pairs[0].place.form == INNER
            if (named and found != named) or len(set(found)) < len(found) or inner_alone:
                raise UserError(
                    "wrong expert tensors",
                    where=self.where,
                    got=f"those of {' and '.join(found)} in layer {layer}"
                    + (" as an inner wrapper" if inner_alone else ""),
                    expected=f"those of {' and '.join(named)}" if named else f"those of {' and '.join(PARAMETERS)}",
                    next_step="save the adapter again",
                )

    def _swapped(self, fused: Mapping[Pair, str]) -> bool:
        """Whether the fused pairs are swapped. Sizes decide; where they fit either way, the versions do."""
        if not fused:
            return False
        possible = {False, True}
        for pair, parameter in fused.items():
            straight = self._targets[PARAMETERS[parameter]]
            fitting = {swapped for swapped in possible if self._outer_sizes(pair) == straight[:: -1 if swapped else 1]}
            if not fitting:
                raise self._wrong_size(pair, "inputs and outputs the same way round in all of the adapter")
            possible = fitting
        if len(possible) == 1:
            return possible == {True}
        swapped = self.config.swapped_experts()
        if swapped is None:
            raise UserError(
                "orientation unknown",
                where=self.config.where,
                got=f"fused experts whose sizes fit either way round, and peft_version={self.config.peft_version}",
                expected="gate_up_proj too, or the version of transformers, which tells the orientation",
                next_step='add "transformers_version": "X.Y.Z", that of the training, to adapter_config.json',
            )
        return swapped

    def _outer_sizes(self, pair: Pair) -> tuple[int, int]:
        """(rows of lora_B, columns of lora_A). They are [out, in] of the weight, or [in, out] if swapped."""
        return self.shapes[pair.b][0], self.shapes[pair.a][1]

    def _wrong_size(
        self, pair: Pair, expected: str, next_step: str = "use the base that the adapter was trained on"
    ) -> UserError:
        return UserError(
            "wrong size",
            where=self.where,
            got=f"lora_A {list(self.shapes[pair.a])} and lora_B {list(self.shapes[pair.b])} of {pair.place.module}",
            expected=expected,
            next_step=next_step,
        )


def _parameter_name(layer: int, parameter: str) -> str:
    """The full name by which PEFT knows a fused parameter, without the wrappers of the experts module."""
    return f"{names.prefix(layer)}mlp.experts.{parameter}"
