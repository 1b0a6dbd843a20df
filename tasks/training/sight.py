"""Page images as a model that sees is trained on them: how many tokens each is, where these lie, and its pixels.

In an example an image's tokens are negative: −1 − n for image n of the training set. So two examples share a beginning only where
they show the same images, and whoever lays out a batch knows which images it holds. For models of the Qwen-VL series, whose
images are squares of patches behind one another, in three-dimensional positions (M-RoPE).
"""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks import storage
from tasks.agent.message import Image
from tasks.errors import TrainingError

_NOT_SEEING = (
    "page images are shown, and {} is no model of the Qwen-VL series, which alone are trained with them, and asked in process: "
    "take one that is, or observation text"
)
_KEPT = 64  # images whose pixels are kept, as the queries of a question show the same ones
_BLANK = Image(file="", page=0, key="", width=32, height=32)  # which a processor makes as large as images are at least


class Sight:
    """What a model makes of images.

    Args:
        folder: of the model, with its processor's configuration.
        root: storage root that the images lie below.

    Raises:
        TrainingError: the model does not see.
    """

    def __init__(self, folder: Path, root: str) -> None:
        from transformers import AutoConfig, AutoImageProcessor

        config = AutoConfig.from_pretrained(folder)
        if not hasattr(config, "image_token_id"):
            raise TrainingError(_NOT_SEEING.format(folder.name))
        self.token_id: int = config.image_token_id
        self._processor = AutoImageProcessor.from_pretrained(folder)
        self._root = root
        self._place: Callable[..., tuple[Any, Any]] | None = None
        self._images: list[Image] = []
        self._numbers: dict[str, int] = {}
        self._pixels = functools.lru_cache(_KEPT)(self._read)

    @property
    def count(self) -> int:
        """How many images there are, of pages."""
        return len(self._images) - (_BLANK["key"] in self._numbers)

    def bind(self, model: Any) -> None:
        """Take from the loaded model how it places images.

        Raises:
            TrainingError: it is of another kind than those that this is written for.
        """
        self._place = getattr(getattr(model, "model", None), "get_rope_index", None)
        if self._place is None:
            raise TrainingError(_NOT_SEEING.format(type(model).__name__))

    def tokens(self, image: Image) -> list[int]:
        """An image's tokens."""
        number = self._numbers.setdefault(image["key"], len(self._images))
        if number == len(self._images):
            self._images.append(image)
        patches = self._processor.get_number_of_image_patches(image["height"], image["width"])
        return [-1 - number] * (patches // self._processor.merge_size**2)

    def blank(self) -> list[int]:
        """The tokens of a white image, of no page."""
        return self.tokens(_BLANK)

    def positions(self, ids: Sequence[int]) -> Any:
        """Where an example's tokens lie, [4, T]: in their order, and in time, height and width."""
        import torch

        assert self._place is not None
        grids = [self._pixels(number)["image_grid_thw"] for number in shown(ids)]
        axes, _ = self._place(
            torch.tensor([[self.token_id if i < 0 else i for i in ids]]),
            mm_token_type_ids=torch.tensor([[int(i < 0) for i in ids]]),
            image_grid_thw=torch.cat(grids) if grids else None,
        )
        return torch.cat([torch.arange(len(ids))[None], axes[:, 0]])

    def inputs(self, numbers: Sequence[int]) -> Mapping[str, Any]:
        """What the model is given of some images, in the order in which their tokens lie."""
        import torch

        each = [self._pixels(number) for number in numbers]
        return {name: torch.cat([one[name] for one in each]) for name in ("pixel_values", "image_grid_thw") if each}

    def _read(self, number: int) -> Mapping[str, Any]:
        from PIL import Image as Picture

        image = self._images[number]
        if image["key"] == _BLANK["key"]:
            picture = Picture.new("RGB", (image["width"], image["height"]), "white")
        else:
            data = storage.read_bytes(storage.join(self._root, image["key"]))
            picture = Picture.open(io.BytesIO(data)).convert("RGB")
        return dict(self._processor(images=picture, return_tensors="pt"))


def shown(ids: Sequence[int]) -> list[int]:
    """Which images stand in tokens, one after another; of one of which only a part is there, too."""
    return [-1 - i for before, i in zip([0, *ids], ids, strict=False) if i < 0 and i != before]
