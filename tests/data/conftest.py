"""The fixtures of this folder's tests, from tests/support."""

from tests.support.coco_folder import folder, logged
from tests.support.sample import remade
from tests.support.workspace import (
    eval_loader,
    make_record,
    per_image,
    per_window,
    plain,
    train_loader,
    workspace,
)
