"""A first-in first-out queue of teacher features: the dictionary of the contrastive loss."""

import torch
from torch import Tensor


class FeatureQueue:
    """The last `size` teacher rows and their groups, on one device.

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

    @torch.no_grad()
    def push(self, features: Tensor, groups: Tensor) -> None:
        """Add rows, in order, dropping the oldest where there is no room.

        Args:
            features: `[n, D]`, any n; of more than `size` rows the last `size` are kept.
            groups: `[n]` int64.

        Raises: ValueError where shapes disagree.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features has shape {list(features.shape)}; expected [rows, {self.dim}]")
        if groups.shape != features.shape[:1]:
            raise ValueError(f"groups has shape {list(groups.shape)}; expected [{features.shape[0]}], one per row")
        if self.size == 0:
            return
        features, groups = features[-self.size :], groups[-self.size :]
        count = features.shape[0]
        until_end = min(count, self.size - self._position)
        for stored, new in ((self._features, features), (self._groups, groups)):
            stored[self._position : self._position + until_end].copy_(new[:until_end])
            stored[: count - until_end].copy_(new[until_end:])
        self._position = (self._position + count) % self.size
        self._fill = min(self.size, self._fill + count)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the rows in the order of their storage, and the position where the next row goes.

        A queue of the same size that loads them goes on exactly as this one.
        """
        position = torch.tensor(self._position, dtype=torch.int64)
        return {"features": self.features.clone(), "groups": self.groups.clone(), "position": position}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the contents. From a queue of another size, the newest rows that fit are kept.

        Raises: ValueError where the width is not this queue's.
        """
        features, groups, position = state["features"], state["groups"], int(state["position"])
        self._fill = self._position = 0
        if features.shape[0] == self.size > 0:
            self.push(features, groups)
            self._position = position % self.size
        else:
            self.push(features.roll(-position, 0), groups.roll(-position, 0))  # oldest first
