"""Settings of a prior over Gaussian latents. Knows sizes and their relations; knows nothing of
tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from stage2_prior.config import refuse

LatentPriorKind = Literal["standard", "mixture", "vamp", "aggregated", "realnvp", "maf"]
Permutation = Literal["reverse", "random"]
_UNCONDITIONAL = ("standard", "aggregated")


@dataclass(kw_only=True)
class LatentPriorConfig:
    """A prior over latent vectors. Messages call its fields `prior.latent.FIELD`."""

    kind: LatentPriorKind = "realnvp"
    """`standard`: N(0, I). `mixture`: Gaussians. `vamp`: posteriors of learned pseudo-inputs.
    `aggregated`: posteriors of given inputs. `realnvp` and `maf`: flows; `maf` samples one
    dimension after the other."""
    components: int = 64
    """Gaussians of `mixture`, pseudo-inputs of `vamp`, posteriors of `aggregated`."""
    transforms: int = 8
    """Invertible transforms of a flow."""
    width: int = 128
    """Features of a hidden layer of a flow's networks."""
    depth: int = 2
    """Hidden layers of a flow's networks."""
    context_features: int = 0
    """Features of the context (caption or class); 0 for an unconditional prior."""
    permutation: Permutation = "random"
    """Orders of the dimensions in a flow. `reverse`: ascending and descending in turn. `random`:
    random orders, each followed by its reverse."""

    def __post_init__(self) -> None:
        kinds = get_args(LatentPriorKind)
        sizes = ("components", "transforms", "width", "depth")
        refuse(
            (
                self.kind not in kinds,
                f"prior.latent.kind is {self.kind!r}; it must be one of {', '.join(kinds)}",
            ),
            *(
                (value < 1, f"prior.latent.{name} is {value}; it must be at least 1")
                for name, value in ((name, getattr(self, name)) for name in sizes)
            ),
            (
                self.kind == "realnvp" and self.transforms == 1,
                "prior.latent.transforms is 1; realnvp needs at least 2, since each changes half "
                "of the dimensions",
            ),
            (
                self.context_features < 0,
                f"prior.latent.context_features is {self.context_features}; it must be 0 or more",
            ),
            (
                self.kind in _UNCONDITIONAL and self.context_features > 0,
                f"prior.latent.context_features is {self.context_features}, and prior.latent.kind "
                f"{self.kind} takes no context; set it to 0, or choose mixture, vamp, realnvp or "
                "maf",
            ),
            (
                self.permutation not in get_args(Permutation),
                f"prior.latent.permutation is {self.permutation!r}; it must be reverse or random",
            ),
        )
