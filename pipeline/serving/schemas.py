"""Bodies of requests and responses. Names are those of OpenAI's images API where it has them; the
others are the sampling options of this project."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from pipeline.inference.reranking import JudgeName

Prompt = Annotated[str, StringConstraints(max_length=100_000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Format = Literal["png", "jpeg", "webp"]
Grid = Annotated[list[int], Field(min_length=2, max_length=2)]
"""Height and width. No tuple, whose schema not every reader of OpenAPI knows."""


class Request(BaseModel):
    """A body whose unknown fields are refused, so that no option is dropped in silence."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class SamplingFields(Request):
    """How images are sampled. What is left out is as in the bundle."""

    seed: Seed | None = Field(None, description="the same seed gives the same images; else random")
    guidance_scale: float | None = Field(None, ge=0, le=100)
    temperature: float | None = Field(None, ge=0, le=100)
    top_k: int | None = Field(None, ge=1, le=2**31)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, lt=1)
    steps: int | None = Field(
        None, ge=1, le=2**20, description="sample in this many steps (priors of random orders)"
    )

    def sampling(self) -> dict[str, Any]:
        """The fields of `SamplingOptions` that were given."""
        names = ("guidance_scale", "temperature", "top_k", "top_p", "min_p")
        return {name: getattr(self, name) for name in names} | {"num_inference_steps": self.steps}


class ImageFields(SamplingFields):
    """What all requests for images have."""

    model: str | None = Field(None, max_length=200, description="as in /v1/models")
    n: int | None = Field(None, ge=1, le=2**20, description="images; 1 where absent")
    size: str | None = Field(None, max_length=20, description="auto, or the bundle's, as 64x64")
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Format | None = None
    output_compression: int | None = Field(
        None,
        ge=0,
        le=100,
        description="quality of a jpeg or webp; 95 where absent, and a webp is lossless then",
    )
    background: Literal["transparent", "opaque", "auto"] | None = None
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=64, description="previews per image")
    preview_every: int | None = Field(
        None,
        ge=1,
        le=2**31,
        description="sampled codes between two previews, in place of partial_images",
    )
    user: str | None = Field(None, max_length=1000, description="ignored")
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = Field(
        None, description="ignored: a bundle draws in one quality"
    )
    moderation: Literal["auto", "low"] | None = Field(
        None, description="ignored: prompts are not moderated"
    )
    input_fidelity: Literal["high", "low"] | None = Field(
        None, description="ignored: what an edit keeps is kept exactly"
    )


class GenerationRequest(ImageFields):
    """`POST /v1/images/generations`."""

    prompt: Prompt
    best_of: int | None = Field(
        None, ge=1, le=2**20, description="images sampled for each one returned"
    )
    judge: JudgeName = Field(
        "likelihood",
        description="what best_of chooses by: the prior's likelihoods, or the image nearest to the "
        "mean of all",
    )


class EditFields(ImageFields):
    """`POST /v1/images/edits`, besides its files."""

    prompt: Prompt
    outpaint_at: Annotated[str, StringConstraints(pattern=r"^\d{1,6},\d{1,6}$")] | None = Field(
        None, description="x,y of a smaller image on the canvas, in place of a mask"
    )


class VariationFields(ImageFields):
    """`POST /v1/images/variations`, besides its file."""

    prompt: Prompt = ""
    strength: float = Field(0.5, gt=0, le=1, description="fraction of the codes that is resampled")


class ScoreRequest(Request):
    """`POST /v1/score`: an image, or its codes."""

    prompt: Prompt
    image: str | None = Field(None, description="in base64")
    codes: list[int] | None = None


class CaptionRequest(Request):
    """`POST /v1/captions`."""

    image: str = Field(description="in base64")
    candidates: list[Prompt] | None = Field(None, min_length=1, max_length=1000)
    n: int = Field(1, ge=1, le=64)
    seed: Seed = 0
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)


class TokensRequest(Request):
    """`POST /v1/tokens`: an image to encode, or codes to decode."""

    image: str | None = Field(None, description="in base64")
    codes: list[int] | None = None


class ErrorDetail(BaseModel):
    """Why a request failed."""

    message: str
    type: str
    param: str | None
    """The field that is wrong."""
    code: str | None


class ErrorResponse(BaseModel):
    """What a request that failed gets."""

    error: ErrorDetail


class Status(BaseModel):
    """What `/healthz` and `/readyz` say."""

    status: Literal["ok", "broken", "starting", "ready", "stopping"]


class ImageData(BaseModel):
    """One image of a response."""

    b64_json: str | None = None
    url: str | None = None
    codes: list[int]
    log_likelihood: float
    """Nats."""


class Usage(BaseModel):
    """Tokens of a request."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: dict[str, int]


class ImagesResponse(BaseModel):
    """What the endpoints of images return."""

    created: int
    data: list[ImageData]
    background: Literal["transparent", "opaque"]
    output_format: Format
    size: str
    usage: Usage
    seed: int
    warnings: list[str]


class ScoreResponse(BaseModel):
    log_likelihood: float
    pmi: float | None
    codes: list[int]
    nats: list[float]
    """-log p(code | prompt, codes before it) of each code."""


class Caption(BaseModel):
    text: str
    log_likelihood: float


class CaptionResponse(BaseModel):
    data: list[Caption]


class TokensResponse(BaseModel):
    codes: list[int]
    grids: list[Grid]
    """Height and width of each level, coarse ones first."""
    b64_json: str
    """The image of the codes, as PNG."""


class Model(BaseModel):
    """A bundle, with what it can do."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    width: int
    height: int
    transparent: bool
    """Whether images have transparency."""
    grids: list[Grid]
    can_edit: bool
    """Whether the prior was trained on random orders, so that any part can be resampled."""
    can_caption: bool
    can_guide: bool
    """Whether guidance and `best_of` by likelihoods work: the prior was trained with caption
    dropout."""
    styles: list[str]
    examples: list[str]
    """Prompts that the bundle knows."""
    defaults: dict[str, Any]
    limits: dict[str, int]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
