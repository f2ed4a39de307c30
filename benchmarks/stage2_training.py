"""Tokens per second of training a prior: ours, dalle-pytorch's DALLE and transformers'
LlamaForCausalLM. 96 tokens, batch 64, AdamW.

    benchmarks/.venv/bin/python -m benchmarks.stage2_training [--compile] [--peers-fp32]
        [--out FILE]

Ours computes in bf16 autocast, as `precision: auto` does. The peers have the same autocast, or
their default fp32 with `--peers-fp32`.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import torch

from benchmarks import peers
from benchmarks.timing import interleave, report
from stage2_prior import PriorObjective, PriorObjectiveConfig

BATCH = 64
TOKENS = peers.TEXT + peers.CODES


def main() -> None:
    torch.manual_seed(0)
    text = torch.randint(3, peers.VOCABULARY, (BATCH, peers.TEXT))
    codes = torch.randint(0, peers.NUM_CODES, (BATCH, peers.CODES))
    joint = torch.cat([text, codes + peers.VOCABULARY], 1)
    ours = peers.ours()
    dalle = peers.dalle()
    llama = peers.llama()
    objective = PriorObjective(ours, PriorObjectiveConfig())

    def step(model, loss):
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True
        )

        bf16 = model is ours or "--peers-fp32" not in sys.argv

        def run():
            with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    sides = {
        "ours": step(
            ours, lambda: next(objective.losses({"text_ids": text, "codes": codes}, 0)).value
        ),
        "dalle-pytorch DALLE": step(dalle, lambda: dalle(text, codes, return_loss=True)),
        "LlamaForCausalLM": step(llama, lambda: llama(input_ids=joint, labels=joint).loss),
    }
    if "--compile" in sys.argv:
        objective.compile()
        compiled = peers.llama()
        compiled.compile()
        sides["LlamaForCausalLM compiled"] = step(
            compiled, lambda: compiled(input_ids=joint, labels=joint).loss
        )
    seconds = interleave(sides, rounds=7, warm_up=2)
    sizes = {
        "ours, M parameters": peers.millions(ours),
        "DALLE, M": peers.millions(dalle),
        "Llama, M": peers.millions(llama),
    }
    name = "stage 2 training" + (", ours compiled" if "--compile" in sys.argv else "")
    name += ", peers in fp32" if "--peers-fp32" in sys.argv else ""
    report(name, "tokens/s", {k: BATCH * TOKENS / v for k, v in seconds.items()}, sizes)


if __name__ == "__main__":
    main()
