// SPDX-License-Identifier: Apache-2.0
// How the kernels of small batches share out their work: what the host works out, once a launch. A
// row is cut into tasks of one warp, its vectors by 32.
#pragma once
#include "../plan/tiling.h"

namespace jax_ep {

constexpr int kSlotGroup = 8;  // tokens that a block takes at a time
constexpr int kPart = 4;       // choices that one thread gathers: two words

// Of a dispatch. A row has one more task, for its scales and scalars.
struct SlotDispatchSizes {
  PlanSizes plan;
  int parts;       // of a token's choices
  int x_vecs;      // of a row of x
  int slot_lanes;  // that a row in its slot keeps busy, each with a part of it
  int x_tasks, slot_tasks;
  Divider by_parts, by_x_tasks, by_slot_tasks, by_top_k, by_blocks;

  SlotDispatchSizes(const Exchange& x, int blocks, int x_vecs, int slot_lanes)
      : plan(x, blocks),
        parts(ceil_div(x.top_k, kPart)),
        x_vecs(x_vecs),
        slot_lanes(slot_lanes),
        x_tasks(ceil_div(x_vecs, 32) + 1),
        slot_tasks(ceil_div(slot_lanes, 32) + 1),
        by_parts(parts),
        by_x_tasks(x_tasks),
        by_slot_tasks(slot_tasks),
        by_top_k(x.top_k),
        by_blocks(blocks) {}
};

// Of a combine.
struct SlotCombineSizes {
  int vecs, tasks;  // of a row
  Divider by_tasks, by_tokens, by_blocks;

  SlotCombineSizes(const Exchange& x, int blocks, int vecs)
      : vecs(vecs),
        tasks(ceil_div(vecs, 32)),
        by_tasks(tasks),
        by_tokens(x.num_tokens),
        by_blocks(blocks) {}
};

}  // namespace jax_ep
