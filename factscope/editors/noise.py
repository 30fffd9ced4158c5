"""Noise on the subject while an edit is made: fact forcing, and the target of tracing reversal (Hase et al. 2023).

Aligned (the default): one draw for each row, the same at every step, at that row's own subject. The draws are those of
a causal trace with as many samples, so that row 0, the plain prompt, sees what the trace's first sample saw.

As the released code does it (``compat``): fresh draws from one stream at every forward, at the positions where the
plain prompt has its subject, also in rows where a context has moved it and in the row about the subject's essence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factscope.interventions.noise import NoiseSource


class RowNoise:
    """Noise for the rows of one edit.

    Args:
        source: scale and kind.
        subjects: each row's subject, positions [start, stop); row 0 is the plain prompt.
        fresh: as the released code does it.
    """

    def __init__(
        self, source: NoiseSource, subjects: Sequence[tuple[int, int]], *, seed: int, fresh: bool = False
    ) -> None:
        self.fresh = fresh
        self._source, self._subjects = source, tuple(subjects)
        self._stream = np.random.RandomState(seed)
        longest = max(stop - start for start, stop in subjects)
        self._values = None if fresh else source.draw(seed, len(subjects), longest)

    def on(self, rows: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """The change of what the embedding module gives for some of the rows."""
        return lambda embedded: self._apply(embedded, rows)

    def _apply(self, embedded: Tensor, rows: Sequence[int]) -> Tensor:
        changed = embedded.clone()
        for index, row in enumerate(rows):
            start, stop = self._subjects[0 if self.fresh else row]
            stop = min(stop, embedded.shape[1])
            values = self._drawn(row, stop - start).to(embedded.device)
            changed[index, start:stop] = (embedded[index, start:stop].double() + values).to(embedded.dtype)
        return changed

    def _drawn(self, row: int, tokens: int) -> Tensor:
        if self._values is not None:
            return self._values[row, :tokens]
        drawn: Any = self._stream.randn(tokens, self._source.width)
        return self._source.std * torch.from_numpy(drawn)
