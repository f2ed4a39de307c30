"""Training a prior: tokens a second of ours, dalle-pytorch's DALLE and transformers' LlamaForCausalLM. 96 tokens, batch 64, AdamW.

benchmarks/.venv/bin/python -m benchmarks.stage2_training [--compile] [--out FILE]
Ours computes in bf16 autocast as `precision: auto` does; peers are given the same autocast.
"""

from __future__ import annotations

import sys

import torch

from benchmarks import peers
from benchmarks.timing import interleave, report
from stage2_prior import PriorObjective, PriorObjectiveConfig

BATCH, TOKENS = 64, peers.TEXT + peers.CODES


def main() -> None:
    torch.manual_seed(0)
    text = torch.randint(3, peers.VOCABULARY, (BATCH, peers.TEXT))
    codes = torch.randint(0, peers.NUM_CODES, (BATCH, peers.CODES))
    joint = torch.cat([text, codes + peers.VOCABULARY], 1)
    ours, dalle, llama = peers.ours(), peers.dalle(), peers.llama()
    objective = PriorObjective(ours, PriorObjectiveConfig())
    if "--compile" in sys.argv:
        ours.compile_networks()

    def step(model, loss):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

        def run():
            with torch.autocast("cpu", torch.bfloat16):
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    seconds = interleave(
        {
            "ours": step(ours, lambda: next(objective.losses({"text_ids": text, "codes": codes}, 0)).value),
            "dalle-pytorch DALLE": step(dalle, lambda: dalle(text, codes, return_loss=True)),
            "LlamaForCausalLM": step(llama, lambda: llama(input_ids=joint, labels=joint).loss),
        },
        rounds=7,
        warm_up=2,
    )
    sizes = {"ours, M parameters": peers.millions(ours), "DALLE, M": peers.millions(dalle), "Llama, M": peers.millions(llama)}
    name = "stage 2 training" + (", ours compiled" if "--compile" in sys.argv else "")
    report(name, "tokens/s", {k: BATCH * TOKENS / v for k, v in seconds.items()}, sizes)


if __name__ == "__main__":
    main()
