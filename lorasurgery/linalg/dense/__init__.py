"""Dense matrices of a model's size: truncated SVDs on the CPU or a GPU. Importing this package imports torch."""

from lorasurgery.linalg.dense.adaptive import svd_until
from lorasurgery.linalg.dense.exact import full_spectrum
from lorasurgery.linalg.dense.precision import full_precision
from lorasurgery.linalg.dense.result import DenseSvd
from lorasurgery.linalg.dense.threads import torch_threads
from lorasurgery.linalg.dense.truncated import truncated_svd, truncated_svds

__all__ = ["DenseSvd", "full_precision", "full_spectrum", "svd_until", "torch_threads", "truncated_svd", "truncated_svds"]
