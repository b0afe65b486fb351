"""Hashed n-gram embeddings in Triton."""

from tests.kernels.test_hash_embedding import *  # noqa: F403
