"""`gencontrol pretrain classifier`: classifiers of labelled images, one per attribute: the first step of CTRL.

The data is a manifest, {"file": "1.png", "labels": {"style": "ink", "size": "large"}} a line ("prompt" may be there and
is not used: one file serves `cfg-finetune` too).  A line may lack attributes: each can come from data of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gencontrol.config import Count, Natural, NonNegative, Positive, dump_toml, options
from gencontrol.errors import UsageError, nearest
from gencontrol.jobs.setup.environment import prepare
from gencontrol.jobs.setup.settings import check_output, describe

if TYPE_CHECKING:
    from torch import Tensor

    from gencontrol.data.manifest import Entry


@options
class ClassifierRun:
    """The [run] section: classifiers of labelled images.

    Args:
        data: the manifest.
        output: folder of the classifiers, one folder for each attribute.
        classes: attribute → list of its classes; where it is not named, those that occur.
        size: images are shrunk to this side, which is even; 0 takes theirs, or 64 if they are larger.
        folds: of cross-fitting; 1 sets a fifth of the images aside instead.
        steps, batch, lr, noise, width: see `gencontrol.models.readers.classifier_fit.fit_classifier`.
        seed: of everything drawn.
        threads: CPU threads; 0 leaves it to the library.
    """

    data: str = ""
    output: str = "runs/classifier"
    classes: dict[str, list[str]] | None = None
    size: Natural = 0
    folds: Count = 5
    steps: Count = 200
    batch: Count = 32
    lr: Positive = 2e-3
    noise: NonNegative = 0.3
    width: Count = 24
    seed: Natural = 0
    threads: Natural = 0

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data is empty; name the manifest of labelled images, --data FILE.jsonl")
        if self.size % 2 or self.width % 8:
            raise ValueError("size is even (0: that of the images), width a positive multiple of 8")
        for attribute, names in (self.classes or {}).items():
            if len(names) < 2:
                raise ValueError(f"classes: {attribute} = {names!r}; expected a list of at least two names")


def fit_classifiers(config: ClassifierRun, *, dry_run: bool) -> Path | None:
    """Check everything, fit, write the classifiers and labels.json, and print what was found; returns the folder.

    Raises:
        UsageError: a fault of the manifest, or a class with too few images.
    """
    folder = check_output(config.output)
    if dry_run:
        print(dump_toml(describe([("run", config)])), end="")
        return None
    prepare(threads=config.threads)
    entries = read_labels(config.data)
    classes = classes_of(entries, config.classes)
    images = _images(entries, config.size)
    summary = {name: _fit(config, folder, name, classes[name], entries, images) for name in classes}
    (folder / "labels.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, row in summary.items():
        counts = ", ".join(f"{label} {count}" for label, count in row["images"].items())
        found = f"unseen images right {row['accuracy']:.0%}, temperature {row['temperature']:.2f}"
        print(f"{folder / name}  {counts}; {found}")
    return folder


def read_labels(path: str | Path) -> list[Entry]:
    """Return the entries of a manifest of labelled images; a prompt may stand beside them.

    Raises:
        UsageError: a fault; the message gives the line.
    """
    from gencontrol.data.manifest import check_labels, read_manifest

    try:
        first = Path(path).read_text(encoding="utf-8").lstrip().partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        first = ""  # read_manifest says what is wrong
    texts = ("prompt",) if '"prompt"' in first else ()
    entries = read_manifest(path, texts=texts, files=("file",), other=("labels",))
    for entry in entries:
        check_labels(entry)
    return entries


def classes_of(entries: Sequence[Entry], given: Mapping[str, Sequence[str]] | None) -> dict[str, tuple[str, ...]]:
    """Return the classes of every attribute: the given ones, elsewhere the labels that occur, sorted.

    Raises:
        UsageError: a label that is none of the given classes, a given attribute that never occurs, or one class alone.
    """
    found: dict[str, set[str]] = {}
    for entry in entries:
        for attribute, label in entry.other["labels"].items():
            known = (given or {}).get(attribute)
            if known is not None and label not in known:
                raise UsageError(
                    f"{entry.place}: '{label}' is no class of '{attribute}'.{nearest(label, known)} "
                    f"Classes: {', '.join(known)}."
                )
            found.setdefault(attribute, set()).add(label)
    for attribute in given or {}:
        if attribute not in found:
            raise UsageError(f"no image has a label of '{attribute}'.{nearest(attribute, found)}")
    classes = {name: tuple((given or {}).get(name) or sorted(labels)) for name, labels in sorted(found.items())}
    for attribute, names in classes.items():
        if "/" in attribute or attribute.startswith("."):
            raise UsageError(f"attribute '{attribute}' cannot name a folder; rename it without / and leading dots.")
        if len(names) < 2:
            raise UsageError(f"'{attribute}' has the one label '{names[0]}'; a classifier needs images of two or more.")
    return classes


def _images(entries: Sequence[Entry], size: int) -> Tensor:
    """All images [n 3 s s] in [-1, 1], shrunk to one even side.

    Raises:
        UsageError: an image that cannot be read, is not square, or is smaller than the side.
    """
    import torch

    from gencontrol.data.images import shrunk
    from gencontrol.data.manifest import read_sample

    found: list[Tensor] = []
    for entry in entries:
        image, is_latent = read_sample(entry.files["file"], None)
        if is_latent or image.shape[-1] != image.shape[-2]:
            raise UsageError(f"{entry.place}: '{entry.files['file'].name}' is no square image; cut it to a square.")
        side = size or (found[0].shape[-1] if found else min(64, image.shape[-1] // 2 * 2))
        if image.shape[-1] < side:
            raise UsageError(
                f"{entry.place}: '{entry.files['file'].name}' is {image.shape[-1]} pixels wide, less than {side}; give "
                "a smaller --set run.size."
            )
        found.append(shrunk(image[None], side)[0])
    return torch.stack(found) * 2 - 1


def _fit(
    config: ClassifierRun,
    folder: Path,
    name: str,
    classes: tuple[str, ...],
    entries: Sequence[Entry],
    images: Tensor,
) -> dict[str, Any]:
    """Fit and write one attribute's classifier; returns its row of labels.json."""
    import torch

    from gencontrol.models.readers.classifier_fit import fit_classifier

    rows = [row for row, entry in enumerate(entries) if name in entry.other["labels"]]
    labels = torch.tensor([classes.index(entries[row].other["labels"][name]) for row in rows])
    try:
        model, right = fit_classifier(
            images[rows],
            labels,
            classes,
            folds=config.folds,
            steps=config.steps,
            batch=config.batch,
            lr=config.lr,
            noise=config.noise,
            width=config.width,
            seed=config.seed,
        )
    except UsageError as error:
        raise UsageError(f"'{name}': {error}") from error
    model.save_pretrained(folder / name)
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    return {
        "images": dict(zip(classes, counts, strict=True)),
        "accuracy": right,
        "temperature": model.config.temperature,
    }
