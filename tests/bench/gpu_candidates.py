"""What the benchmarks on one GPU measure: the problem, our model in its two forms, and transformers' model."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from megatron_mixtral.mcore import ranks
from megatron_mixtral.model import build
from megatron_mixtral.spec.jobs import FinetuneConfig
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.training import optimizer

SHAPE = MixtralShape(
    num_hidden_layers=2,
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    num_local_experts=8,
    num_experts_per_tok=2,
    vocab_size=32000,
)
CONFIG = FinetuneConfig(model="", data="")  # the learning rate and its warm-up are what a finetuning job has


@dataclass(frozen=True, kw_only=True)
class Task:
    """One training problem: what is fed, how often, and what it costs."""

    sequence: int
    rows: int  # of a micro batch
    repeats: int

    @property
    def flops(self) -> float:
        """Of one forward and backward pass over a micro batch."""
        s = SHAPE
        heads = s.num_attention_heads * s.head_dim
        qkv = s.hidden_size * (heads + 2 * s.num_key_value_heads * s.head_dim)
        router = s.hidden_size * s.num_local_experts
        experts = s.num_experts_per_tok * 3 * s.hidden_size * s.intermediate_size
        attention = (self.sequence + 1) * heads  # scores and values over half the square
        layer = 2 * (qkv + heads * s.hidden_size + router + experts) + 2 * attention
        token = s.num_hidden_layers * layer + 2 * s.hidden_size * s.vocab_size
        return 3.0 * token * self.sequence * self.rows

    def batch(self, seed: int) -> torch.Tensor:
        """ids [B, S + 1]: words as unevenly frequent as in a text."""
        generator = torch.Generator(device="cuda").manual_seed(seed)
        weights = 1 / torch.arange(1, SHAPE.vocab_size + 1, device="cuda")
        count = self.rows * (self.sequence + 1)
        return torch.multinomial(weights, count, replacement=True, generator=generator).view(self.rows, -1)


class Ours:
    """Our model under megatron-core's data parallelism and distributed optimizer, gradients kept in fp32."""

    def __init__(
        self, fuse: bool, *, precision: Any = "bf16", shape: MixtralShape = SHAPE, nudge: bool = False
    ) -> None:
        ranks.seed_ranks(1)
        built = build.build(
            shape, Layout(), precision=precision, fuse=fuse, max_sequence_length=8192, random_weights=False
        )
        set_weights(built, nudge=nudge)
        self.parts = optimizer.build(dataclasses.replace(CONFIG, precision=precision), built)
        self.steps = 0

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        return dict(self.parts.chunks[0].module.named_parameters())

    def forward_backward(self, ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1] - 1, device="cuda").expand(len(ids), -1)
        chunk = self.parts.chunks[0]
        with chunk.no_sync():
            loss = chunk(ids[:, :-1], positions, None, labels=ids[:, 1:]).float().mean()
            loss.backward()
        return loss.detach()

    def close(self) -> None:
        """Give the memory back; hooks that no garbage collector sees through keep the objects alive."""
        for chunk in self.parts.chunks:
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                for data in (buffer.param_data, buffer.grad_data):
                    if data is not None:
                        data.untyped_storage().resize_(0)

    def begin(self) -> None:
        optimizer.zero_grad(self.parts)

    def end(self) -> None:
        self.steps += 1
        optimizer.set_step(self.parts, self.steps)
        for chunk in self.parts.chunks:
            chunk.start_grad_sync()
            chunk.finish_grad_sync()
        updated, _ = optimizer.step(self.parts)
        assert updated, "a gradient isn't finite"


@torch.no_grad()
def set_weights(model: torch.nn.Module, *, nudge: bool) -> None:
    """The same numbers, exact in bf16, in any precision; with `nudge` one in a hundred moved to a neighbour."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            values = torch.randn(parameter.shape, device="cuda", generator=generator) * SHAPE.initializer_range
            parameter.copy_(values.bfloat16())
            if nudge:
                parameter.view(torch.int16).bitwise_xor_((torch.rand_like(values) < 0.01).short())


class Transformers:
    """MixtralForCausalLM with torch's fused AdamW: in bf16 throughout, or fp32 weights under autocast."""

    def __init__(self, experts: str, dtype: torch.dtype = torch.bfloat16) -> None:
        import transformers

        config = transformers.MixtralConfig(
            **{f.name: getattr(SHAPE, f.name) for f in dataclasses.fields(SHAPE) if f.name != "rope_theta"},
            rope_parameters={"rope_type": "default", "rope_theta": SHAPE.rope_theta},
            use_cache=False,
        )
        torch.manual_seed(1)
        with torch.device("cuda"):
            self.model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa", experts_implementation=experts
            )
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def forward_backward(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.model.dtype != torch.bfloat16):
            logits = self.model(input_ids=ids[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        return loss.detach()

    def close(self) -> None: ...

    def begin(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def end(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
