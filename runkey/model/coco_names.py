"""The names of COCO's category ids, for heads that were trained with ids as class indices."""

from __future__ import annotations

# COCO's ids run to 90 with gaps: (first id, names of it and the ids after it).
_RUNS: tuple[tuple[int, str], ...] = (
    (1, "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant"),
    (13, "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe"),
    (27, "backpack,umbrella"),
    (31, "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat"),
    (40, "baseball glove,skateboard,surfboard,tennis racket,bottle"),
    (46, "wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot"),
    (58, "hot dog,pizza,donut,cake,chair,couch,potted plant,bed"),
    (67, "dining table"),
    (70, "toilet"),
    (72, "tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator"),
    (84, "book,clock,vase,scissors,teddy bear,hair drier,toothbrush"),
)

# Logits of the reference's COCO models without no-object: ids 0..90.
NUM_COCO_IDS = 91


def coco_names() -> list[str]:
    """Name of each id 0..90, empty where COCO has no category."""
    names = [""] * NUM_COCO_IDS
    for first, run in _RUNS:
        for offset, name in enumerate(run.split(",")):
            names[first + offset] = name
    return names
