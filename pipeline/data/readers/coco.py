"""Captions in the format of COCO (Lin et al. 2014, arXiv:1405.0312; cocodataset.org/#format-data):
a JSON object of `images` and of `annotations`, which name images by their ids; and as Karpathy and
Fei-Fei (2015, arXiv:1412.2306) split them, with the `sentences` of each image. Opens nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.readers.base import Record, listed


@dataclass(frozen=True)
class CocoFile:
    """What a file says.

    Attributes:
        images: the names of all images.
        captions: pairs of an image's name and a caption, in order. Of an annotation whose image is
            not listed, the name says its id.
    """

    images: list[str]
    captions: list[tuple[str, object]]


def coco_file(path: Path, content: Mapping[str, object]) -> CocoFile | None:
    """What a JSON object says; None where it has not the form.

    Raises:
        ValueError: its annotations are no captions, or an image or annotation is corrupted.
    """
    images = content.get("images")
    annotations = content.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        return None
    names: dict[object, str] = {}
    for number, image in enumerate(images):
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
            raise ValueError(f"{path}: images[{number}] has no file_name; give every image one")
        key = _key(image.get("id"))
        if image.get("id") is None or key in names:
            raise ValueError(
                f"{path}: images[{number}] has the id {image.get('id')!r}; give every image an id "
                "of its own, which annotations name"
            )
        names[key] = image["file_name"]
    captions = []
    for number, annotation in enumerate(annotations):
        if not isinstance(annotation, dict) or "caption" not in annotation:
            has = listed(list(annotation)) if isinstance(annotation, dict) else "no fields"
            raise ValueError(
                f"{path}: annotations[{number}] has no caption ({has}); give the file of captions "
                "(captions_*.json), not that of objects"
            )
        image_id = annotation.get("image_id")
        name = names.get(_key(image_id), f"the image with id {image_id}")
        captions.append((name, annotation["caption"]))
    return CocoFile(list(names.values()), captions)


def karpathy_rows(content: Mapping[str, object]) -> list[Record] | None:
    """The rows of a file such as `dataset_coco.json`, with the columns image, text and split; None
    where it has not the form. As in its users' code, `restval` is trained on."""
    images = content.get("images")
    if not isinstance(images, list) or not images:
        return None
    rows: list[Record] = []
    for image in images:
        sentences = image.get("sentences") if isinstance(image, dict) else None
        if not isinstance(sentences, list) or not isinstance(image.get("filename"), str):
            return None
        texts = [one.get("raw") for one in sentences if isinstance(one, dict)]
        name = "/".join(part for part in (image.get("filepath"), image["filename"]) if part)
        row: Record = {"image": name, "text": texts}
        if "split" in image:
            row["split"] = "train" if image["split"] == "restval" else image["split"]
        rows.append(row)
    return rows


def _key(image_id: object) -> str:
    """An id that compares as the same whether it is a number or a text."""
    return str(image_id)
