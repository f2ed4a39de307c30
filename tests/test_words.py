"""Words that standard terms replaced do not return: in identifiers, comments, docstrings, messages,
docs, configurations and the changelog."""

from __future__ import annotations

import re

import pytest

from tests.helpers.architecture import PACKAGES, ROOT

FOLDERS = (*PACKAGES, "tests", "benchmarks", "configs", "deploy", "docs", "examples")
SUFFIXES = {".py", ".md", ".yaml", ".toml", ".ipynb", ".sh", ".html"}

COUNTED = (
    "images?|codes?|tokens?|nats|bits|steps|samples?|rows|bytes|captions?|positions|"
    "parameters|operations|vectors|files?|[KMG]i?B|s|ms|seconds?|milliseconds|minutes|hours"
)
UNITS = (
    "second|step|code|image|pixel|position|epoch|process|token|sample|batch|minute|row|shard|level|"
    "card|GPU|vector|word"
)
REPLACED = {
    r"foretell\w*|foretold": "estimate",
    r"taken back|put back|put aside": "rolled back, restored, snapshotted",
    r"anew": "again, rebuilt, resampled",
    r"passed over": "skipped",
    r"(go|goes|gone|going|went) on (from|after a kill|where)": "resumes from",
    r"(is|are|was|were|be|been) (said|told)": "is reported, is given",
    r"unsaid": "silently",
    r"verbs?": "command",
    r"rehears\w*": "profiling, a run at a tiny size",
    r"kept from training": "held out",
    r"averages? of( the)? weights|weight averages?": "weight EMA",
    r"adversar(y|ies)": "discriminator",
    r"figures?": "metrics",
    rf"({COUNTED}) an? ({UNITS})": "per",
    r"pictures?": "image",
    r"gradient_?watch|weight_?average|held_?out_?share|as_they_were": "names that went",
}
"""Pattern of whole words -> what to write instead. Underscores separate words."""

ALLOWED = {
    ("tests/test_words.py", r".*"): "the list itself",
    ("benchmarks/gradient_variance.py", r"figure"): "matplotlib's class",
    ("tests/examples/test_first_pictures.py", r"pictures"): "the name of the notebook",
    ("README.md", r"pictures"): "the name of the notebook",
    ("docs/first-hour.md", r"pictures"): "the name of the notebook",
    ("benchmarks/same_numbers.py", r"adversary|pictures?"): "names and captions of earlier commits",
    ("pipeline/stages/compare_tokenizers.py", r"figure"): "matplotlib's class",
    ("examples/lectures/plots.py", r"figure"): "matplotlib's class",
    ("pipeline/doctor/html_report.html", r"figure"): "HTML's element",
    ("CHANGELOG.md", r"figures"): "a name that went",
    ("pipeline/data/builtin/shapes_captions.py", r"picture"): "a caption template, which is data",
    ("pipeline/data/readers/base.py", r"picture"): "a column's name that users have",
}
"""(File, words that it may have) -> the reason."""


def sources() -> dict[str, str]:
    """Path -> text of every file that people read."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    files += [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.yml"), ROOT / "Makefile"]
    return {
        str(path.relative_to(ROOT)): path.read_text()
        for path in sorted(files)
        if path.suffix in {*SUFFIXES, ".yml"} or path.name in ("Makefile", "Dockerfile")
    }


def found(pattern: str, texts: dict[str, str]) -> list[str]:
    """Places of the pattern's words, as file:line: words."""
    words = re.compile(rf"(?<![A-Za-z])(?:{pattern})(?![A-Za-z])", re.IGNORECASE)
    places = []
    for file, text in texts.items():
        for match in words.finditer(text):
            if not any(
                file == allowed and re.fullmatch(may, match[0], re.IGNORECASE)
                for allowed, may in ALLOWED
            ):
                places.append(f"{file}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}")
    return places


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return sources()


@pytest.mark.parametrize(("pattern", "instead"), REPLACED.items(), ids=REPLACED.values())
def test_replaced_words_do_not_return(texts, pattern, instead):
    places = found(pattern, texts)
    assert not places, f"write {instead!r}:\n" + "\n".join(places)


def test_words_are_found_in_prose_and_identifiers():
    def count(pattern: str, text: str) -> int:
        return len(found(pattern, {"a.py": text}))

    assert count(r"figures?", "write_figures(Figures, configures, prefigured)") == 2
    per = next(pattern for pattern in REPLACED if "second|" in pattern)
    assert count(per, "9 images a second, 2 codes an image, nats a code; steps a user takes") == 3
    assert count(per, "5 s a step, items a second") == 1
