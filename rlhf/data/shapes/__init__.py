"""What the rows of a data set are: detected once from its columns, then read one way.

`SHAPES` is the table (docs/data.md shows it), `detect` chooses one of it or refuses, `Reader` turns
rows into `Example`s. No torch, no tokenizer, no template: the checks before a run use it too.
"""

from rlhf.data.shapes.base import ANSWERS, SLOTS, Example, Kind
from rlhf.data.shapes.detect import Shape, detect, shapes_of
from rlhf.data.shapes.reader import Reader
from rlhf.data.shapes.table import SHAPES

__all__ = [
    "ANSWERS",
    "SHAPES",
    "SLOTS",
    "Example",
    "Kind",
    "Reader",
    "Shape",
    "detect",
    "shapes_of",
]
