// Lets a CPU build of PyTorch believe that a CUDA device is there: it has one stream, and nothing is behind it.
// To be loaded before PyTorch (LD_PRELOAD), so that `getAccelerator` is found here and not there.
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr c10::DeviceType kind = c10::DeviceType::CUDA;
using Guard = c10::impl::NoOpDeviceGuardImpl<kind>;

// PyTorch's guard that does nothing names device -1; tensors are on device 0.
struct ClaimedGuard final : Guard {
  c10::Device exchangeDevice(c10::Device) const override {
    return {kind, 0};
  }
  c10::Device getDevice() const override {
    return {kind, 0};
  }
  c10::Stream getStream(c10::Device) const noexcept override {
    return stream();
  }
  c10::Stream getDefaultStream(c10::Device) const override {
    return stream();
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override {
    return stream();
  }
  static c10::Stream stream() {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(kind, 0));
  }
};

C10_REGISTER_GUARD_IMPL(CUDA, ClaimedGuard)

} // namespace

namespace at {

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override {
    return true;
  }
  bool hasPrimaryContext(DeviceIndex) const override {
    return false;
  }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

namespace accelerator {

std::optional<c10::DeviceType> getAccelerator(bool) {
  return kind;
}

} // namespace accelerator
} // namespace at
