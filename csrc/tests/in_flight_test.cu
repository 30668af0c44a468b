// SPDX-License-Identifier: Apache-2.0
// What a start leaves behind, and what its done waits for: R ranks on D devices, on one stream
// each.
//
//   rank 0    start | work, on every SM | done ............................|
//   others                                        start | done
//                    ^ nothing of ours is resident     ^ not before this
//
//   in_flight_test [--devices D]
//
// Rank 0's start returns while nobody else has begun; work that needs every SM then takes the time
// that it takes alone; done ends after the others' starts, not before, with the right results. That
// the work's time shows what is resident is checked with a done that waits beside it.
#include <chrono>
#include <cstdlib>
#include <thread>

#include "expect.h"
#include "scene.h"

namespace jax_ep {
namespace {

constexpr double kBound = 10;        // seconds of every wait: nothing here times out
constexpr double kTolerance = 1.03;  // of the work's time alone
constexpr double kTurned = 1.3;      // at least, where some of the SMs are taken
constexpr int kRepeats = 7, kTurns = 200000;
constexpr int kWarmUp = 100;  // a third of a second, until the GPU has left its idle clocks

// A fixed amount of arithmetic.
__global__ void __launch_bounds__(1024, 2) work(float* sink, int turns) {
  float a = threadIdx.x, b = blockIdx.x;
  for (int i = 0; i < turns; ++i) {
    a = fmaf(a, 1.0001f, b);
    b = fmaf(b, 0.9999f, 1.0f);
  }
  if (a == b) *sink = a;  // so that it is not left out
}

class Work {
 public:
  explicit Work(int device) : sink_(device, 1) {
    require(cudaSetDevice(device), "cudaSetDevice");
    require(cudaDeviceGetAttribute(&sms_, cudaDevAttrMultiProcessorCount, device), "attribute");
    for (cudaEvent_t* e : {&begin_, &end_}) require(cudaEventCreate(e), "cudaEventCreate");
  }
  // As many threads as all SMs hold, between two events.
  void issue(cudaStream_t stream) {
    require(cudaEventRecord(begin_, stream), "cudaEventRecord");
    work<<<2 * sms_, 1024, 0, stream>>>(sink_.data(), kTurns);
    require(cudaGetLastError(), "launch of the work");
    require(cudaEventRecord(end_, stream), "cudaEventRecord");
  }
  // When it has ended.
  float milliseconds() {
    float ms = 0;
    require(cudaEventSynchronize(end_), "cudaEventSynchronize");
    require(cudaEventElapsedTime(&ms, begin_, end_), "cudaEventElapsedTime");
    return ms;
  }

  ~Work() {
    for (cudaEvent_t e : {begin_, end_}) cudaEventDestroy(e);
  }

 private:
  Buffer<float> sink_;
  int sms_ = 0;
  cudaEvent_t begin_, end_;
};

float median(std::vector<float> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

struct Kind {
  const char* name;
  Program start, done;
};
const Kind kKinds[] = {{"dispatch", kStart, kDone}, {"combine", kCombineStart, kCombineDone}};

// For all ranks but the first.
template <typename F>
void others(Scene& s, F&& f) {
  for (int r = 1; r < s.num_ranks(); ++r) f(r);
}

void prepare(Scene& s, const Kind& kind) {
  if (!s.replayed) return;
  for (int r = 0; r < s.num_ranks(); ++r) {
    s.prepare(r, kind.start);
    s.prepare(r, kind.done);
  }
}

void synchronize(Scene& s, int r) {
  require(cudaStreamSynchronize(s.h.streams[r]), "cudaStreamSynchronize");
}

// Whether all that is on rank 0's stream has ended.
bool has_ended(Scene& s) {
  const cudaError_t state = cudaStreamQuery(s.h.streams[0]);
  if (state == cudaErrorNotReady) {
    cudaGetLastError();  // or the next launch would seem to fail
    return false;
  }
  require(state, "cudaStreamQuery");
  return true;
}

float time_alone(Scene& s, Work& w) {
  require(cudaSetDevice(s.group.devices()[0]), "cudaSetDevice");
  w.issue(s.h.streams[0]);
  return w.milliseconds();
}

// One turn of the picture above. The work's time between start and done.
float one_turn(Scene& s, Work& w, const Kind& kind) {
  s.issue(0, kind.start);
  synchronize(s, 0);  // it ends though nobody else has begun
  w.issue(s.h.streams[0]);
  s.issue(0, kind.done);
  const float took = w.milliseconds();
  others(s, [&](int r) {
    for (int i = 0; i < 3; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      EXPECT(!has_ended(s));  // done waits for every one of them
    }
    s.issue(r, kind.start);
  });
  synchronize(s, 0);  // and for no more than their starts
  others(s, [&](int r) { s.issue(r, kind.done); });
  others(s, [&](int r) { synchronize(s, r); });
  return took;
}

void work_between_start_and_done(Scene& s, Work& w, const Kind& kind) {
  EXPECT(s.works(kHalves));
  s.poison_all();
  std::vector<float> alone, between;
  for (int i = 0; i < kRepeats; ++i) {  // in turn, as clocks drift
    alone.push_back(time_alone(s, w));
    between.push_back(one_turn(s, w, kind));
  }
  EXPECT(median(between) < kTolerance * median(alone));
  std::printf("%s, %s: %.3f ms of work between start and done, %.3f alone\n", kind.name,
              s.replayed ? "replayed" : "plain", median(between), median(alone));
  EXPECT(s.group.describe_fault().empty());
  for (int r = 0; r < s.num_ranks(); ++r) {
    EXPECT(&kind == &kKinds[0] ? s.rows_are_right(r) : s.out_is_right(r));
  }
}

// What the measure above is worth: a done that waits takes SMs from work on another stream.
void work_beside_a_done_that_waits(Scene& s, Work& w, const Kind& kind) {
  EXPECT(s.works(kHalves));
  cudaStream_t side;
  require(cudaSetDevice(s.group.devices()[0]), "cudaSetDevice");
  require(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking), "cudaStreamCreate");
  const float alone = time_alone(s, w);
  s.issue(0, kind.start);
  synchronize(s, 0);
  EXPECT(s.issue_until_it_runs(0, kind.done));
  require(cudaSetDevice(s.group.devices()[0]), "cudaSetDevice");
  w.issue(side);
  const float beside = w.milliseconds();
  EXPECT(!has_ended(s));
  EXPECT(beside > kTurned * alone);
  std::printf("%s, %s: %.3f ms of work beside a done that waits\n", kind.name,
              s.replayed ? "replayed" : "plain", beside);
  others(s, [&](int r) { s.issue(r, kind.start); });
  others(s, [&](int r) { s.issue(r, kind.done); });
  for (int r = 0; r < s.num_ranks(); ++r) synchronize(s, r);
  EXPECT(s.group.describe_fault().empty());
  require(cudaStreamDestroy(side), "cudaStreamDestroy");
}

void run(const std::vector<int>& devices) {
  std::printf("%zu ranks, rank 1 on device %d\n", devices.size(), devices[1]);
  Scene s(devices, kBound);
  Work w(devices[0]);
  for (int i = 0; i < kWarmUp; ++i) time_alone(s, w);
  for (bool replayed : {false, true}) {
    s.replayed = replayed;
    for (const Kind& kind : kKinds) {
      prepare(s, kind);
      work_between_start_and_done(s, w, kind);
      work_beside_a_done_that_waits(s, w, kind);
    }
  }
}

}  // namespace
}  // namespace jax_ep

int main(int argc, char** argv) {
  using namespace jax_ep;
  setvbuf(stdout, nullptr, _IOLBF, 0);
  const bool given = argc == 3 && std::string(argv[1]) == "--devices";
  const int devices = given ? std::atoi(argv[2]) : 1;
  if ((argc != 1 && !given) || devices < 1) {
    return std::fprintf(stderr, "usage: %s [--devices D]\n", argv[0]), 2;
  }
  try {
    for (int R : {2, 4}) {
      std::vector<int> of_ranks;
      for (int r = 0; r < R; ++r) of_ranks.push_back(r % devices);
      run(of_ranks);
    }
  } catch (const std::exception& e) {
    std::printf("failed: %s\n", e.what());
    return 3;
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
