"""Choosing how ternary matrices are held and read, from the file alone; numpy only, no kernels.

Whether activations get one scale for each token, as BitNet models are trained, or one for each 256 values
is decided by what it costs this model: the error of products of its own matrices with its own normed
embeddings, quantised both ways.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...workers.checkpoint.file import names
from ...workers.checkpoint.file.gguf import GgufFile, TensorInfo
from ...workers.checkpoint.file.tilings import find_tiling
from ...workers.checkpoint.held.formats import ROW_SCALED
from ...workers.checkpoint.types.bitnet import TILED
from ...workers.checkpoint.types.table import dequantize, ternary_matrix
from .families.family import read_hyperparameters

F32 = npt.NDArray[np.float32]

MAX_RATIO = 2.0
"""One scale a token is taken if its error is at most twice that of blocks (3 dB)."""

_TOKENS, _ROWS, _MATRICES, _BLOCK = 32, 64, 8, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationError:
    """Normalised mean squared error of products, by how activations are quantised; over how many matrices.

    sum |W q(x) - W x|^2 / sum |W x|^2.
    """

    block: float
    token: float
    matrices: int

    @property
    def per_token(self) -> bool:
        """Whether one scale for each token is good enough."""
        return self.token <= MAX_RATIO * self.block


def measure_activations(file: GgufFile) -> ActivationError | None:
    """Measure both ways on up to eight row-scaled ternary matrices that read the hidden state.

    None when the file has none. Raises ModelFileError for a matrix that cannot be decoded.
    """
    hyper = read_hyperparameters(file)
    chosen = [
        tensor
        for tensor in file.tensors.values()
        if tensor.type.name in ROW_SCALED and len(tensor.shape) == 2 and tensor.shape[1] == hyper.d_model
    ]
    embedding = names.find(file, "token_embd")
    if not chosen or embedding is None:
        return None
    x = _normed_embeddings(file, embedding, np.float32(hyper.eps))
    step = -(-len(chosen) // _MATRICES)
    squares = np.zeros(3)
    for tensor in chosen[::step]:
        w = _some_rows(file, tensor)
        exact = x @ w.T
        squares += [np.square(_quantised(x, block) @ w.T - exact).sum() for block in (_BLOCK, x.shape[1])] + [
            np.square(exact).sum()
        ]
    return ActivationError(
        block=float(squares[0] / squares[2]),
        token=float(squares[1] / squares[2]),
        matrices=len(chosen[::step]),
    )


def _normed_embeddings(file: GgufFile, embedding: TensorInfo, eps: np.float32) -> F32:
    """Return the embeddings of tokens spread over the vocabulary, as the first norm leaves them."""
    vocabulary, width = embedding.shape
    row_nbytes = embedding.type.row_bytes(width)
    raw = file.data(embedding).reshape(vocabulary, row_nbytes)
    picked = raw[np.linspace(0, vocabulary - 1, min(_TOKENS, vocabulary)).astype(np.int64)]
    x = dequantize(embedding.type, np.ascontiguousarray(picked).reshape(-1), (len(picked), width))
    x /= np.sqrt(np.square(x).mean(axis=1, keepdims=True) + eps)
    norm = names.find(file, "attn_norm", 0)
    return x if norm is None else x * dequantize(norm.type, file.data(norm), norm.shape)


def _some_rows(file: GgufFile, tensor: TensorInfo) -> F32:
    rows, columns = tensor.shape
    tiling = find_tiling(file, tensor.type.name, rows, columns) if tensor.type.name in TILED else None
    matrix = ternary_matrix(tensor.type, file.data(tensor), tensor.shape, tiling)
    return matrix.values()[:: -(-rows // _ROWS)]


def _quantised(x: F32, block: int) -> F32:
    """Return `x` after int8 quantisation with one scale for each `block` values."""
    parts = x.reshape(len(x), -1, block)
    scale = np.abs(parts).max(axis=2, keepdims=True) / np.float32(127)
    scale[scale == 0] = 1
    return np.asarray((np.rint(parts / scale) * scale).reshape(x.shape), np.float32)
