// SPDX-License-Identifier: Apache-2.0
#include "speeds.h"

#include <cuda_runtime.h>
#include <dlfcn.h>

#include "group.h"

namespace jax_ep {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  require(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// The little of NVML that is used here, found at run time: the driver has it, the toolkit may not.
struct FieldValue {
  unsigned field, scope;
  long long timestamp, latency;
  int type, error;
  union {
    unsigned as_uint;
    double as_double;
    unsigned long long as_ulonglong;
  } value;
};

class Nvml {
 public:
  Nvml() : library_(dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL)) {
    const auto init = find<int (*)()>("nvmlInit_v2");
    find_device_ = find<decltype(find_device_)>("nvmlDeviceGetHandleByPciBusId_v2");
    link_state_ = find<decltype(link_state_)>("nvmlDeviceGetNvLinkState");
    field_values_ = find<decltype(field_values_)>("nvmlDeviceGetFieldValues");
    usable_ = init && find_device_ && link_state_ && field_values_ && init() == 0;
  }
  ~Nvml() {
    if (usable_) find<int (*)()>("nvmlShutdown")();
    if (library_ != nullptr) dlclose(library_);
  }
  Nvml(const Nvml&) = delete;
  Nvml& operator=(const Nvml&) = delete;

  // Of the active links of a GPU together, one direction; 0 if it does not say.
  double link_gbs(const char* bus_id) const {
    void* device = nullptr;
    if (!usable_ || find_device_(bus_id, &device) != 0) return 0;
    int active = 0;
    unsigned on = 0;
    for (unsigned link = 0; link < kMostLinks && link_state_(device, link, &on) == 0; ++link)
      active += on != 0;
    for (unsigned field : kLinkSpeeds) {
      FieldValue speed{};
      speed.field = field;
      const bool known = field_values_(device, 1, &speed) == 0 && speed.error == 0;
      if (known) return active * (speed.value.as_uint / 1e3);
    }
    return 0;
  }

 private:
  // NVML's numbers of: MB/s of each active link, from Hopper on and before.
  static constexpr unsigned kLinkSpeeds[] = {164, 90};
  static constexpr unsigned kMostLinks = 64;

  template <typename Function>
  Function find(const char* name) const {
    return library_ == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(library_, name));
  }

  void* library_;
  bool usable_ = false;
  int (*find_device_)(const char*, void**) = nullptr;
  int (*link_state_)(void*, unsigned, unsigned*) = nullptr;
  int (*field_values_)(void*, int, FieldValue*) = nullptr;
};

}  // namespace

Speeds speeds_of(int device) {
  Speeds s;
  s.sms = attribute(cudaDevAttrMultiProcessorCount, device);
  // Data moves on both edges of the memory's clock, in kHz.
  s.memory_gbs = 2.0 * attribute(cudaDevAttrMemoryClockRate, device) *
                 attribute(cudaDevAttrGlobalMemoryBusWidth, device) / 8 / 1e6;
  char bus_id[32];
  require(cudaDeviceGetPCIBusId(bus_id, sizeof bus_id, device), "cudaDeviceGetPCIBusId");
  s.link_gbs = Nvml().link_gbs(bus_id);
  return s;
}

}  // namespace jax_ep
