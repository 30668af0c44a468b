// SPDX-License-Identifier: Apache-2.0
// What `issue` puts on `stream`, captured once as a CUDA graph: replayed, no host code of ours
// runs.
#pragma once
#include <functional>

#include "../runtime/group.h"

namespace jax_ep {

class Replay {
 public:
  // `edit`, if given, may change the graph before it is made executable.
  Replay(cudaStream_t stream, const std::function<void()>& issue,
         const std::function<void(cudaGraph_t)>& edit = nullptr) {
    cudaGraph_t graph;
    require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin capture");
    issue();
    require(cudaStreamEndCapture(stream, &graph), "end capture");
    if (edit) edit(graph);
    require(cudaGraphInstantiate(&exec_, graph, 0), "cudaGraphInstantiate");
    require(cudaGraphDestroy(graph), "cudaGraphDestroy");
    require(cudaGraphUpload(exec_, stream), "cudaGraphUpload");
    require(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  }
  ~Replay() { cudaGraphExecDestroy(exec_); }
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;

  void launch(cudaStream_t stream) const {
    require(cudaGraphLaunch(exec_, stream), "cudaGraphLaunch");
  }

 private:
  cudaGraphExec_t exec_ = nullptr;
};

}  // namespace jax_ep
