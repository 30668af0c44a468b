// SPDX-License-Identifier: Apache-2.0
// CUDA graphs captured once and replayed thousands of times while routing and rows change: before
// each replay other inputs are copied, on the stream, into the buffers whose addresses the graph
// holds, and after it the results are compared on the device with those of the host.
//
//   replay_test [--replays N] [--ranks R] [--devices D] [--seed S]
//
// A graph is a whole exchange, dispatch -> its rows are combine's operand -> combine, by plan and
// dispatch, through slots, or in halves, in one of several shapes. Which graph comes next, and on
// which inputs, is random, so that each is replayed at every parity of the slots and of the plan,
// after every other. No host waits between replays.
#include <cstdlib>
#include <iterator>

#include "harness.cuh"
#include "options.h"
#include "replay.h"
#include "semantics.h"

namespace jax_ep {
namespace {

struct Options {
  int replays = 20000, ranks = 2, devices = 1, seed = 1;
};

constexpr int kInputs = 12;  // different ones of each shape
constexpr SlotSize kSlots{64, 2048};

// The words in which `got` is not `want`, added to `*count`.
__global__ void count_differences(const uint32_t* got, const uint32_t* want, size_t words,
                                  unsigned long long* count) {
  unsigned long long mine = 0;
  const size_t first = blockIdx.x * size_t(blockDim.x) + threadIdx.x;
  for (size_t i = first; i < words; i += size_t(gridDim.x) * blockDim.x) mine += got[i] != want[i];
  if (mine != 0) atomicAdd(count, mine);
}

enum class Path { kDirect, kSlots, kHalves };
constexpr Path kPaths[] = {Path::kDirect, Path::kSlots, Path::kHalves};
constexpr const char* kPathNames[] = {"plan, dispatch, combine", "slots", "halves"};

// Sizes and types, without routing and rows.
Case shape(int R, int T, int K, int local, int hidden, Wire wire, int alignment, bool batched) {
  Case c;
  c.x = Exchange{R, R * local, T, K, 0, alignment, batched};
  const int pairs = R * T * std::min(K, local);
  c.x.num_rows = batched
                     ? local * R * T
                     : (pairs + (alignment - 1) * std::min(local, pairs)) / alignment * alignment;
  c.hidden = hidden;
  c.wire = wire;
  c.num_sms = 6;
  return c;
}

std::vector<Case> shapes(int R) {
  return {shape(R, 40, 4, 4, 256, Wire::kCopy, 1, false),
          shape(R, 7, 8, 16, 1024, Wire::kDequantized, 8, false),
          shape(R, 64, 2, 3, 64, Wire::kCopy, 1, true),
          shape(R, 1, 1, 1, 8, Wire::kCopy, 1, false)};
}

// Fill in routing of distinct experts, some of them none, rows and weights.
void draw_inputs(Case& c, std::mt19937& rng) {
  const Exchange& x = c.x;
  std::vector<int> experts(x.num_experts);
  for (int e = 0; e < x.num_experts; ++e) experts[e] = e;
  std::normal_distribution<float> normal(0, 2);
  for (int t = 0; t < x.num_ranks * x.num_tokens; ++t) {
    std::shuffle(experts.begin(), experts.end(), rng);
    for (int k = 0; k < x.top_k; ++k) {
      const bool none = k >= x.num_experts || rng() % 8 == 0;
      c.topk_idx.push_back(none ? -1 : experts[k]);
    }
  }
  for (int r = 0; r < x.num_ranks; ++r) {
    Bytes rows(size_t(x.num_tokens) * c.hidden * 2);
    for (size_t i = 0; i < rows.size() / 2; ++i) set_element(rows, c.type, i, normal(rng));
    std::vector<float> scalars(x.num_pairs());
    for (float& s : scalars) s = normal(rng);
    c.rows_in.push_back(rows);
    c.scalars_in.push_back(scalars);
  }
}

// Inputs of one rank and what must come of them, on its device.
struct Expected {
  Buffer<int> topk_idx, pair_row, counts;
  Buffer<char> x, rows, out;
  Buffer<float> scalars, row_scalars;
};

template <typename T>
std::vector<T> part(const std::vector<T>& all, int r, size_t count) {
  return std::vector<T>(all.begin() + r * count, all.begin() + (r + 1) * count);
}

// A shape: the arrays whose addresses its graphs hold, inputs and results to choose from.
class Exchanges {
 public:
  Exchanges(Group& group, const Case& empty, std::mt19937& rng)
      : group_(group), cases_(kInputs, empty) {
    for (Case& c : cases_) draw_inputs(c, rng);
    for (const Case& c : cases_) expect(c);
    h_ = std::make_unique<Harness>(group, cases_[0]);
    for (Path path : kPaths) {
      for (int r = 0; r < empty.x.num_ranks; ++r) {
        require(cudaSetDevice(group.devices()[r]), "cudaSetDevice");
        graphs_.push_back(std::make_unique<Replay>(h_->streams[r], [&] { issue(path, r); }));
      }
    }
  }

  // On rank r's `stream`: inputs number `i`, the graph of `path`, and what differs into `count`.
  void replay(Path path, int i, int r, cudaStream_t stream, unsigned long long* count) {
    const int R = cases_[0].x.num_ranks;
    const Arrays& a = h_->a;
    const Expected& e = *expected_[i * R + r];
    require(cudaSetDevice(group_.devices()[r]), "cudaSetDevice");
    copy(*a.topk_idx[r], e.topk_idx, stream);
    copy(*a.x[r], e.x, stream);
    copy(*a.scalars[r], e.scalars, stream);
    for (auto* b : {&a.rows, &a.out}) {
      require(cudaMemsetAsync((*b)[r]->data(), 0xff, (*b)[r]->bytes(), stream), "cudaMemsetAsync");
    }
    graphs_[int(path) * R + r]->launch(stream);
    compare(*a.rows[r], e.rows, stream, count);
    compare(*a.row_scalars[r], e.row_scalars, stream, count);
    compare(*a.out[r], e.out, stream, count);
    compare(*a.pair_row[r], e.pair_row, stream, count);
    compare(*a.counts[r], e.counts, stream, count);
  }

 private:
  template <typename T>
  static void copy(const Buffer<T>& to, const Buffer<T>& from, cudaStream_t stream) {
    require(cudaMemcpyAsync(to.data(), from.data(), from.bytes(), cudaMemcpyDeviceToDevice, stream),
            "cudaMemcpyAsync");
  }
  template <typename T>
  static void compare(const Buffer<T>& got, const Buffer<T>& want, cudaStream_t stream,
                      unsigned long long* count) {
    count_differences<<<8, 256, 0, stream>>>(reinterpret_cast<const uint32_t*>(got.data()),
                                             reinterpret_cast<const uint32_t*>(want.data()),
                                             want.bytes() / 4, count);
    require(cudaGetLastError(), "count_differences");
  }

  void expect(const Case& c) {
    const HostPlan plan = host_plan(c.x, c.topk_idx);
    const int R = c.x.num_ranks;
    std::vector<Bytes> y;
    std::vector<std::vector<float>> weights;
    for (int r = 0; r < R; ++r) {
      const HostRows rows = host_dispatch(c, plan, r);
      y.push_back(rows.rows);
      weights.push_back(rows.scalars);
    }
    const size_t pairs = c.x.num_pairs(), local = c.x.local_experts();
    for (int r = 0; r < R; ++r) {
      const int d = group_.devices()[r];
      expected_.push_back(std::unique_ptr<Expected>(new Expected{
          {d, part(c.topk_idx, r, pairs)},
          {d, part(plan.pair_row, r, pairs)},
          {d, part(plan.counts, r, local)},
          {d, c.rows_in[r]},
          {d, y[r]},
          {d, host_combine(c, plan, y, weights, r)},
          {d, c.scalars_in[r]},
          {d, weights[r]},
      }));
    }
  }

  // What a graph of rank r holds.
  void issue(Path path, int r) {
    Harness& h = *h_;
    if (path == Path::kDirect) {
      h.plan(r);
      h.dispatch(r);
    } else if (path == Path::kSlots) {
      h.slot_dispatch(r);
    } else {
      h.slot_dispatch(r, Half::kStart);
      h.slot_dispatch(r, Half::kDone);
    }
    copy(*h.a.y[r], *h.a.rows[r], h.streams[r]);
    copy(*h.a.weights[r], *h.a.row_scalars[r], h.streams[r]);
    if (path == Path::kDirect) {
      h.combine(r);
    } else if (path == Path::kSlots) {
      h.slot_combine(r);
    } else {
      h.slot_combine(r, Half::kStart);
      h.slot_combine(r, Half::kDone);
    }
  }

  Group& group_;
  std::vector<Case> cases_;
  std::vector<std::unique_ptr<Expected>> expected_;  // [inputs, rank]
  std::unique_ptr<Harness> h_;
  std::vector<std::unique_ptr<Replay>> graphs_;  // [path, rank]
};

int run(const Options& o) {
  std::mt19937 rng(o.seed);
  std::vector<int> devices;
  for (int r = 0; r < o.ranks; ++r) devices.push_back(r % o.devices);
  Group group(devices, kSlots);
  group.reset(1, 20.0, (o.ranks + o.devices - 1) / o.devices);
  std::vector<std::unique_ptr<Exchanges>> all;
  for (const Case& c : shapes(o.ranks)) all.push_back(std::make_unique<Exchanges>(group, c, rng));
  std::vector<cudaStream_t> streams(o.ranks);
  Buffers<unsigned long long> counts;  // [rank][shape, path]
  const std::vector<unsigned long long> zeros(all.size() * std::size(kPaths));
  for (int r = 0; r < o.ranks; ++r) {
    counts.push_back(std::make_unique<Buffer<unsigned long long>>(devices[r], zeros));
    require(cudaSetDevice(devices[r]), "cudaSetDevice");
    require(cudaStreamCreateWithFlags(&streams[r], cudaStreamNonBlocking), "cudaStreamCreate");
    cudaFuncAttributes loaded;  // not between two ranks' graphs: that would wait for the first
    require(cudaFuncGetAttributes(&loaded, count_differences), "cudaFuncGetAttributes");
  }
  std::vector<int> replays(zeros.size());
  for (int n = 0; n < o.replays; ++n) {
    const int one = int(rng() % zeros.size()), i = int(rng() % kInputs);
    const int path = one % int(std::size(kPaths)), shape = one / int(std::size(kPaths));
    for (int r = 0; r < o.ranks; ++r) {
      all[shape]->replay(kPaths[path], i, r, streams[r], counts[r]->data() + one);
    }
    ++replays[one];
  }
  for (cudaStream_t s : streams) require(cudaStreamSynchronize(s), "cudaStreamSynchronize");
  if (!group.describe_fault().empty()) throw std::runtime_error(group.describe_fault());
  unsigned long long differences = 0;
  for (size_t one = 0; one < zeros.size(); ++one) {
    unsigned long long words = 0;
    for (auto& c : counts) words += c->host()[one];
    std::printf("shape %zu, %s: %d replays, %llu words differ\n", one / std::size(kPaths),
                kPathNames[one % std::size(kPaths)], replays[one], words);
    differences += words;
  }
  std::printf("%d replays, %llu differences\n", o.replays, differences);
  return differences != 0;
}

}  // namespace
}  // namespace jax_ep

int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  jax_ep::Options o;
  const bool known = jax_ep::take_options(argc, argv,
                                          {{"--replays", &o.replays},
                                           {"--ranks", &o.ranks},
                                           {"--devices", &o.devices},
                                           {"--seed", &o.seed}});
  if (!known) return 2;
  if (o.replays < 1 || o.ranks < 1 || o.devices < 1) {
    return std::fprintf(stderr, "expected numbers above 0\n"), 2;
  }
  try {
    return jax_ep::run(o);
  } catch (const std::exception& e) {
    std::printf("failed: %s\n", e.what());
    return 3;
  }
}
