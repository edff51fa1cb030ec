// The parts of PyTorch's CUDA library that a CPU build needs to run fake CUDA tensors: device guard,
// hooks, pinned memory, and the kernel choice of scaled_dot_product_attention. Nothing is computed.
// Loaded before torch, which looks for its hooks once.
#include <ATen/Context.h>
#include <ATen/SDPBackend.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>

// Set and read by tests/cuda/cuda_stubs.py.
extern "C" {
int fake_cuda_devices = 8;
int fake_cuda_capability = 90;  // 10 * major + minor
int fake_cuda_has_cudnn = 1;
std::atomic<int64_t> fake_cuda_sdpa_calls[8];  // by at::SDPBackend
thread_local int fake_cuda_chosen_device = -1;  // -1: this thread has not called set_device
int fake_cuda_get_device() { return fake_cuda_chosen_device; }
void fake_cuda_set_device(int device) { fake_cuda_chosen_device = device; }
}

namespace {
using c10::Device;
using c10::DeviceIndex;
using c10::Stream;
constexpr auto CUDA = c10::DeviceType::CUDA;

thread_local DeviceIndex guarded_device = -1;  // inside a DeviceGuard
thread_local int64_t current_stream = 0;

DeviceIndex current_device() {
  if (guarded_device >= 0) return guarded_device;
  return static_cast<DeviceIndex>(fake_cuda_chosen_device < 0 ? 0 : fake_cuda_chosen_device);
}

struct Guard final : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  mutable std::atomic<int64_t> streams{1};

  Device exchangeDevice(Device device) const override {
    Device previous(CUDA, current_device());
    guarded_device = device.index();
    return previous;
  }
  Device getDevice() const override { return Device(CUDA, current_device()); }
  // Called by autograd at the start of its threads; a guard's end calls uncheckedSetDevice.
  void setDevice(Device device) const override { fake_cuda_chosen_device = device.index(); }
  void uncheckedSetDevice(Device device) const noexcept override { guarded_device = device.index(); }
  DeviceIndex deviceCount() const noexcept override { return static_cast<DeviceIndex>(fake_cuda_devices); }

  Stream make_stream(int64_t id) const { return Stream(Stream::UNSAFE, getDevice(), id); }
  Stream getStream(Device) const noexcept override { return make_stream(current_stream); }
  Stream getDefaultStream(Device) const override { return make_stream(0); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return make_stream(streams++); }
  Stream getNewStream(Device, int) const override { return make_stream(streams++); }
  Stream exchangeStream(Stream stream) const noexcept override {
    auto previous = make_stream(current_stream);
    current_stream = stream.id();
    return previous;
  }
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// Page-locked host memory, filled with zeros: what a copy from the device "reads".
std::mutex pinned_mutex;
std::set<const void*> pinned;

void free_pinned(void* memory) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  pinned.erase(memory);
  std::free(memory);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* memory = std::calloc(size ? size : 1, 1);
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.insert(memory);
    return {memory, memory, &free_pinned, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};
}  // namespace

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return fake_cuda_devices > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return ::current_device(); }
  DeviceIndex deviceCount() const override { return static_cast<DeviceIndex>(fake_cuda_devices); }
  DeviceIndex getCurrentDevice() const override { return ::current_device(); }
  void setCurrentDevice(DeviceIndex device) const override { fake_cuda_chosen_device = device; }
  int getNumGPUs() const override { return fake_cuda_devices; }
  void deviceSynchronize(DeviceIndex) const override {}
  Allocator* getPinnedMemoryAllocator() const override {
    static PinnedAllocator allocator;
    return &allocator;
  }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    return pinned.count(data) > 0;
  }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

// ---------------------------------------------------------------- scaled_dot_product_attention

namespace {
using at::Tensor;
using at::SDPBackend;

// The rules for dense tensors in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp:
// can_use_cudnn_attention, can_use_flash_attention, can_use_mem_efficient_attention and
// check_prefer_cudnn_attention (cuDNN 9.15.1 and later, as in the wheels for CUDA 13). Sizes are
// compared as SymInts, because the compiler traces this too.
struct Call {
  const Tensor &q, &k, &v;
  bool masked, causal, grouped;

  c10::SymInt head_dim() const { return q.sym_size(-1); }
  bool one_type() const { return q.dtype() == k.dtype() && k.dtype() == v.dtype(); }
  bool one_head_dim() const { return k.sym_size(-1) == head_dim() && v.sym_size(-1) == head_dim(); }
  bool same_heads() const { return q.sym_size(1) == k.sym_size(1) && k.sym_size(1) == v.sym_size(1); }
  bool heads_match() const {
    return same_heads() ||
        (grouped && k.sym_size(1) == v.sym_size(1) && q.sym_size(1) % k.sym_size(1) == 0);
  }
  bool dense_rows() const {
    return q.sym_stride(-1) == 1 && k.sym_stride(-1) == 1 && v.sym_stride(-1) == 1;
  }
  bool sixteen_bit() const {
    auto type = q.scalar_type();
    return type == at::kHalf || (type == at::kBFloat16 && fake_cuda_capability >= 80);
  }
  bool requires_grad() const { return q.requires_grad() || k.requires_grad() || v.requires_grad(); }
};

bool can_use_cudnn(const Call& call) {
  auto& context = at::globalContext();
  bool deterministic = context.deterministicAlgorithms() && !context.deterministicAlgorithmsWarnOnly();
  return fake_cuda_capability >= 80 && call.sixteen_bit() && call.one_type() && !deterministic &&
      call.one_head_dim() && call.head_dim() <= 128 && call.head_dim() % 8 == 0 &&
      call.k.sym_size(2) != 1 && call.heads_match() && call.dense_rows();
}

bool can_use_flash(const Call& call) {
  bool small_memory = fake_cuda_capability == 86 || fake_cuda_capability == 89 ||
      fake_cuda_capability / 10 == 12;
  bool too_large = small_memory && call.requires_grad() && call.head_dim() > 192 && call.head_dim() <= 224;
  bool square = call.q.sym_size(-2) == call.k.sym_size(-2);
  return fake_cuda_capability >= 80 && call.sixteen_bit() && call.one_type() && !call.masked &&
      call.one_head_dim() && call.head_dim() <= 256 && !too_large && call.heads_match() &&
      (square || !call.causal) && call.dense_rows();
}

bool can_use_efficient(const Call& call) {
  bool sixteen_bit = call.q.scalar_type() == at::kHalf || call.q.scalar_type() == at::kBFloat16;
  bool type = call.q.scalar_type() == at::kFloat || call.sixteen_bit();
  auto alignment = sixteen_bit ? 8 : fake_cuda_capability >= 80 ? 4 : 1;
  // Later versions of PyTorch also accept grouped heads.
  return type && call.one_type() && call.same_heads() && call.head_dim() % alignment == 0 &&
      call.v.sym_size(-1) % alignment == 0 && call.dense_rows();
}

int64_t choose(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
               double dropout_p, bool is_causal, std::optional<double> scale, bool enable_gqa) {
  Call call{q, k, v, mask.has_value(), is_causal, enable_gqa};
  auto backend = SDPBackend::math;
  int major = fake_cuda_capability / 10;
  if (fake_cuda_has_cudnn && (major == 9 || major == 10) && can_use_cudnn(call)) {
    backend = SDPBackend::cudnn_attention;
  } else if (can_use_flash(call)) {
    backend = SDPBackend::flash_attention;
  } else if (can_use_efficient(call)) {
    backend = SDPBackend::efficient_attention;
  }
  fake_cuda_sdpa_calls[static_cast<int>(backend)]++;
  return static_cast<int64_t>(backend);
}

struct RegisterChoice {
  RegisterChoice() { at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose); }
} register_choice;
}  // namespace
