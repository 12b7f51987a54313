"""FP8 weights as DeepSeek-V3 stores them: E4M3 numbers with one float32 scale a block of 128 x 128.

The last block of a row or column may be partial (a latent projection of 576 rows has 4.5). Despite the name
`weight_scale_inv` in the files, the scale is multiplied.
"""

import ml_dtypes
import numpy as np

BLOCK = 128
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = 448.0  # of E4M3


def scale_shape(shape: tuple[int, int]) -> tuple[int, int]:
  """Blocks along each axis of a matrix."""
  return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def dequantise(values: np.ndarray, scale: np.ndarray, row: int = 0, column: int = 0) -> np.ndarray:
  """float32(value) * its block's scale, float32 [R, C]; exact, as each product is rounded once.

  values: E4M3 [R, C], the part of a matrix that begins at (row, column), anywhere; scale: float32, of the whole matrix.
  """
  out = values.astype(np.float32)
  rows, columns = ((start + np.arange(n)) // BLOCK for start, n in zip((row, column), out.shape, strict=True))
  for block in np.unique(rows):
    out[rows == block] *= scale[block, columns]
  return out


def block_scale(values: np.ndarray) -> np.ndarray:
  """float32 [blocks, blocks]: the largest magnitude of each block of values [R, C] over 448; 1 for a block of zeros."""
  rows, columns = scale_shape(values.shape)
  padded = np.zeros((rows * BLOCK, columns * BLOCK), np.float32)
  padded[:values.shape[0], :values.shape[1]] = np.abs(values.astype(np.float32))
  largest = padded.reshape(rows, BLOCK, columns, BLOCK).max(axis=(1, 3))
  scale = np.maximum(largest / np.float32(LARGEST), np.finfo(np.float32).tiny)  # a scale of 0 would divide by 0
  return np.where(largest > 0, scale, np.float32(1))


def quantise(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """E4M3 [R, C], rounded to nearest: values over their `block_scale`.

  values: any float type, finite. An entry moves by at most 2^-4 of itself (three bits of mantissa), or by 2^-10 of the
  scale where it is subnormal.
  """
  spread = np.repeat(np.repeat(scale, BLOCK, axis=0)[:values.shape[0]], BLOCK, axis=1)[:, :values.shape[1]]
  # Rounded division may give a hair above 448, which E4M3 would turn into NaN.
  return np.clip(values.astype(np.float32) / spread, -LARGEST, LARGEST).astype(E4M3)
