"""A first-in first-out queue of teacher features: the dictionary of the contrastive loss."""

import torch
from torch import Tensor


UNKNOWN_TEXT = -2  # the text_id of rows that came without one: equal to none that a batch has


class FeatureQueue:
    """The last `size` teacher rows, their groups and, where captions may be equal, their texts, on one device.

    It starts empty, and its length counts only rows that were pushed. Length and position are Python ints, so no call
    waits for the device. The default dtype is float32: normalising float16 features gives numbers that float16 would
    round, and every step would widen a narrower queue again for its matrix products.

    Args:
        size: the most rows that are kept, 0 or more; a queue of 0 stays empty.
        dim: width D of a row.
        device, dtype: of the stored features.

    Raises: ValueError where size is below 0 or dim below 1.
    """

    def __init__(
        self, size: int, dim: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ):
        if size < 0 or dim < 1:
            raise ValueError(
                f"FeatureQueue got size {size} and dim {dim}; expected a size of 0 or more, a dim of 1 or more"
            )
        self.size = size
        self.dim = dim
        self._features = torch.zeros(size, dim, device=device, dtype=dtype)
        self._groups = torch.zeros(size, device=device, dtype=torch.int64)
        self._texts = torch.zeros(size, 0, device=device, dtype=torch.int64)
        self._fill = 0
        self._position = 0  # where the next row goes; the oldest row once the queue is full

    def __len__(self) -> int:
        return self._fill

    @property
    def features(self) -> Tensor:
        """`[len, D]`, in no particular order; a view that the next push overwrites, so run backward before it."""
        return self._features[: self._fill]

    @property
    def groups(self) -> Tensor:
        """`[len]` int64, the group of each row of `features`."""
        return self._groups[: self._fill]

    @property
    def texts(self) -> Tensor | None:
        """`[len, K]` int64, the text_ids of each row of `features`; None where no row came with any.

        UNKNOWN_TEXT fills up rows that came with fewer.
        """
        return self._texts[: self._fill] if self._texts.shape[1] else None

    @torch.no_grad()
    def push(self, features: Tensor, groups: Tensor, texts: Tensor | None = None) -> None:
        """Add rows, in order, dropping the oldest where there is no room.

        Args:
            features: `[n, D]`, any n; of more than `size` rows the last `size` are kept.
            groups: `[n]` int64.
            texts: `[n, K]` int64, the text_ids of each row, any K.

        Raises: ValueError where shapes disagree.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features has shape {list(features.shape)}; expected [rows, {self.dim}]")
        if groups.shape != features.shape[:1]:
            raise ValueError(f"groups has shape {list(groups.shape)}; expected [{features.shape[0]}], one per row")
        texts = groups.new_empty(len(groups), 0) if texts is None else texts
        if texts.ndim != 2 or len(texts) != len(groups):
            raise ValueError(f"texts has shape {list(texts.shape)}; expected [{features.shape[0]}, texts of a row]")
        if self.size == 0:
            return
        width = max(texts.shape[1], self._texts.shape[1])
        self._texts, texts = _widened(self._texts, width), _widened(texts, width)
        features, groups, texts = features[-self.size :], groups[-self.size :], texts[-self.size :]
        count = features.shape[0]
        until_end = min(count, self.size - self._position)
        for stored, new in ((self._features, features), (self._groups, groups), (self._texts, texts)):
            stored[self._position : self._position + until_end].copy_(new[:until_end])
            stored[: count - until_end].copy_(new[until_end:])
        self._position = (self._position + count) % self.size
        self._fill = min(self.size, self._fill + count)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the rows in the order of their storage, and the position where the next row goes.

        A queue of the same size that loads them goes on exactly as this one.
        """
        position = torch.tensor(self._position, dtype=torch.int64)
        state = {"features": self.features.clone(), "groups": self.groups.clone(), "position": position}
        return state if self.texts is None else {**state, "texts": self.texts.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the contents. From a queue of another size, the newest rows that fit are kept.

        The state of an earlier release has no texts.

        Raises: ValueError where the width is not this queue's.
        """
        rows, position = [state["features"], state["groups"]], int(state["position"])
        rows += [state["texts"]] if "texts" in state else []
        self._fill = self._position = 0
        self._texts = self._texts[:, :0]
        if len(rows[0]) == self.size > 0:
            self.push(*rows)
            self._position = position % self.size
        else:
            self.push(*(stored.roll(-position, 0) for stored in rows))  # oldest first


def _widened(texts: Tensor, width: int) -> Tensor:
    """Text_ids `[n, K]` of each row as `[n, width]`."""
    missing = width - texts.shape[1]
    return torch.nn.functional.pad(texts, (0, missing), value=UNKNOWN_TEXT) if missing else texts
