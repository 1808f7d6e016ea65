"""How a model is divided over ranks: the arithmetic of tensor, pipeline, context, expert and data parallelism.

world = TP x PP x CP x DP, and ETP x EP divides world / PP (experts borrow ranks of the data and tensor axes).
"""

import math
from dataclasses import dataclass

from megatron_mixtral.spec.options import LayoutSpecError, option
from megatron_mixtral.spec.shape import MixtralShape


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the axes that divide the model; the remaining ranks are data parallel."""

    tensor: int = option(1, least=1, typed="--tp", help="Tensor parallel size.")
    pipeline: int = option(1, least=1, typed="--pp", help="Pipeline parallel size.")
    expert: int = option(1, least=1, typed="--ep", help="Expert parallel size.")
    expert_tensor: int = option(1, least=1, typed="--etp", help="Expert tensor parallel size.")
    context: int = option(1, least=1, typed="--cp", help="Context parallel size.")

    @property
    def unit(self) -> int:
        """The fewest ranks that this layout needs; every valid number of ranks is a multiple."""
        return self.pipeline * math.lcm(self.tensor * self.context, self.expert_tensor * self.expert)

    def data_parallel(self, world: int) -> int:
        """DP on `world` ranks; `LayoutSpecError` carries the equation when it isn't whole."""
        if world % self.unit:
            below = world - world % self.unit
            near = f"{below} or {below + self.unit}" if below else str(self.unit)
            who = "1 rank doesn't" if world == 1 else f"{world} ranks don't"
            equation = "; ".join(self.equation(world))
            raise LayoutSpecError("{} fit: {}. Nearest that fit: {} ranks", who, equation, near)
        return world // (self.tensor * self.pipeline * self.context)

    def equation(self, world: int) -> tuple[str, str]:
        """The two divisions that must be whole; one that isn't is marked."""
        dense = self.tensor * self.pipeline * self.context
        sparse = self.expert_tensor * self.expert * self.pipeline
        dense_axes = f"TP {self.tensor} x PP {self.pipeline} x CP {self.context}"
        sparse_axes = f"ETP {self.expert_tensor} x EP {self.expert} x PP {self.pipeline}"
        return (
            f"DP = {world} / ({dense_axes}) = {_quotient(world, dense)}",
            f"expert DP = {world} / ({sparse_axes}) = {_quotient(world, sparse)}",
        )

    def describe(self, world: int) -> str:
        """One line for people: `32 ranks = TP1 x PP4 x CP1 x DP8, experts EP8 x ETP1`."""
        axes = f"TP{self.tensor} x PP{self.pipeline} x CP{self.context} x DP{self.data_parallel(world)}"
        return f"{world} rank{'s' * (world != 1)} = {axes}, experts EP{self.expert} x ETP{self.expert_tensor}"

    def check(self, shape: MixtralShape) -> None:
        """`LayoutSpecError` with every division of the model that doesn't come out."""
        divisions = (
            ("experts / EP", shape.num_local_experts, self.expert),
            ("attention heads / TP", shape.num_attention_heads, self.tensor),
            ("query groups / TP", shape.num_key_value_heads, self.tensor),
            ("expert width / ETP", shape.intermediate_size, self.expert_tensor),
        )
        bad = [f"{what} = {whole} / {parts} isn't whole" for what, whole, parts in divisions if whole % parts]
        if shape.num_hidden_layers < self.pipeline:
            bad.append(f"layers / PP = {shape.num_hidden_layers} / {self.pipeline} leaves stages without layers")
        if bad:
            raise LayoutSpecError("this model can't be divided like this: {}", ", ".join(bad))

    def padded_vocabulary(self, shape: MixtralShape) -> int:
        """Rows of the embedding: the vocabulary, and as few more as make it divide over TP."""
        return -(-shape.vocab_size // self.tensor) * self.tensor

    def stages(self, layers: int, first: int = 0, last: int = 0) -> tuple[int, ...]:
        """Layers of each pipeline stage. Those of the first and the last may be given; the rest is shared evenly.

        Where nothing is given and they don't divide, the earlier stages take one more.
        """
        if not first and not last:
            whole, rest = divmod(layers, self.pipeline)
            return tuple(whole + (stage < rest) for stage in range(self.pipeline))
        between, left = self.pipeline - bool(first) - bool(last), layers - first - last
        if self.pipeline < 2 or left < between or (left % between if between else left):
            raise LayoutSpecError(
                "{first_stage_layers} {}, {last_stage_layers} {}: {} layers leave {} for {} other stages of PP {}: "
                "not the same whole number, at least 1, for each",
                *(first, last, layers, left, max(between, 0), self.pipeline),
            )
        middle = (left // between,) * between if between else ()
        return ((first,) if first else ()) + middle + ((last,) if last else ())


def _quotient(whole: int, parts: int) -> str:
    return str(whole // parts) if whole % parts == 0 else f"{whole / parts:.3g}, not whole"
