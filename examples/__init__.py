# SPDX-License-Identifier: Apache-2.0
"""Models that use jax_ep: Flax MoE layers (NNX and Linen) and a small byte-level transformer."""
