// A kernel per number of rows of a block, type and cache.
#include "attention_latent.cuh"

ATTENTION_LATENT(16)
ATTENTION_LATENT(64)
