"""A soft prompt that is trained through a small network with a residual connection (arXiv 2305.03937)."""

from __future__ import annotations

from torch import Tensor, nn

BOTTLENECK = 128


class ResidualEmbedding(nn.Embedding):
    """A prompt's vectors, each plus what a bottleneck that all share makes of it: at first nothing."""

    def __init__(self, vectors: Tensor) -> None:
        """`vectors` [P, hidden] are what the prompt begins with."""
        tokens, width = vectors.shape
        super().__init__(tokens, width, _weight=vectors.clone())
        self.change = nn.Sequential(
            nn.Linear(width, BOTTLENECK), nn.ReLU(), nn.Linear(BOTTLENECK, width), nn.LayerNorm(width)
        )
        nn.init.zeros_(self.change[3].weight)

    def forward(self, input: Tensor) -> Tensor:
        """Vectors [..., hidden] of indices [...]."""
        vectors = super().forward(input)
        change: Tensor = self.change(vectors)
        return vectors + change
