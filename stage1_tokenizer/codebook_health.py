"""When codes or latent dimensions go to waste, and what to do about it. Knows metrics and options;
no tensors."""

from __future__ import annotations

from collections.abc import Mapping

from stage1_tokenizer.config import TokenizerConfig

ALARM_BELOW = 0.5
"""Fraction of the codes in use below which training warns."""
ALARM_AFTER = 300
"""Steps before the first warning: codes need some to settle."""
ACTIVE_BELOW = 0.1
"""Fraction of active latent dimensions below which training warns of posterior collapse."""


def check(config: TokenizerConfig, metrics: Mapping[str, float], step: int) -> str | None:
    """One line on the worst level of a codebook that is hardly used, or on a posterior that
    collapsed, with what to change; None where all is well."""
    active = metrics.get("active_dimensions", 1.0)
    if step >= ALARM_AFTER and active < ACTIVE_BELOW:
        return (
            f"only {active:.0%} of the latent dimensions are active at step {step} (posterior "
            f"collapse: the others are the same for every image); {suggestion(config)}"
        )
    shares = {name: value for name, value in metrics.items() if name.startswith("codebook_usage")}
    if step < ALARM_AFTER or not shares or min(shares.values()) >= ALARM_BELOW:
        return None
    worst = min(shares, key=lambda name: shares[name])
    where = worst.removeprefix("codebook_usage").replace("_", " ")
    return (
        f"only {shares[worst]:.0%} of the codes{' of' + where if where else ''} are in use "
        f"at step {step}; {suggestion(config)}"
    )


def suggestion(config: TokenizerConfig) -> str:
    """What to change against codes that fall out of use, or a posterior that collapses."""
    fewer = f"or have fewer codes (tokenizer.model.num_codes is {config.num_codes})"
    match config.quantizer:
        case "vq" | "residual" | "hierarchical":
            now = config.vq.dead_code_threshold
            first = (
                f"raise tokenizer.model.vq.dead_code_threshold (now {now:g}, 0.4 is much)"
                if now
                else "set tokenizer.model.vq.dead_code_threshold to 0.1"
            )
            return f"{first}, lower tokenizer.train.learning_rate, {fewer}"
        case "lfq" | "bsq":
            return (
                "raise tokenizer.model.sign.entropy_weight (now "
                f"{config.sign.entropy_weight:g}) or tokenizer.model.sign.diversity, {fewer}"
            )
        case "gumbel" | "score_function" | "binary":
            options = getattr(config, config.quantizer)
            return (
                f"raise tokenizer.model.{config.quantizer}.diversity (now "
                f"{options.diversity:g}), {fewer}"
            )
        case "gaussian":
            now = config.gaussian.free_bits
            return (
                "lower tokenizer.objective.kl_weight, raise tokenizer.objective.kl_ramp_steps, or "
                f"set tokenizer.model.gaussian.free_bits (now {now:g}) to {now + 0.1:g}, which a "
                "learned prior does not allow"
            )
        case _:
            return (
                f"lower tokenizer.train.learning_rate, {fewer} and fewer tokenizer.model.fsq.levels"
            )
