# SPDX-License-Identifier: Apache-2.0
"""`jax_ep` in the shapes of other libraries; they are not imported here."""
