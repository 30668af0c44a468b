// SPDX-License-Identifier: Apache-2.0
// The extension jax_ep._ext: facts about how it was built. FFI handlers are registered from here.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

namespace {

nb::dict build_facts() {
  nb::dict facts;
  facts["version"] = JAX_EP_VERSION;
  facts["compiler"] = __VERSION__;
  facts["cxx_standard"] = static_cast<long>(__cplusplus);
  facts["cuda"] = nb::none();  // no CUDA kernels in this build
  return facts;
}

}  // namespace

NB_MODULE(_ext, m) {
  m.doc() = "Compiled part of jax_ep.";
  m.def("build_facts", &build_facts, "Version, compiler and CUDA version of this build.");
}
