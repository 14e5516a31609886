#include "cuda/launch.h"

// Streams that count how often the host waits for them, and events.
using cudaEvent_t = int64_t*;
constexpr unsigned cudaEventDisableTiming = 2;
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = new int64_t(0), cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return delete event, cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  return *event = 1, cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return ++*static_cast<int64_t*>(stream), cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return *event == 1 ? cudaSuccess : (std::abort(), 1);
}

#include "cuda/packing/packing.cu"
#include "driver.h"

namespace packing = losa::packing;

struct Arguments {
  int64_t rows, columns, weight_stride, mask_stride;
  bool aligned;
  int64_t keep_n, m;
  int shares;
  int64_t lead;  // elements before the values

  // ROWS COLUMNS WEIGHT_STRIDE MASK_STRIDE ALIGNED SIZE KEEP_N M SHARES LEAD
  explicit Arguments(const Driver& driver)
      : rows(driver[0]),
        columns(driver[1]),
        weight_stride(driver[2]),
        mask_stride(driver[3]),
        aligned(driver[4] != 0),
        keep_n(driver[6]),
        m(driver[7]),
        shares(static_cast<int>(driver[8])),
        lead(driver[9]) {}

  packing::Mask mask(const std::vector<uint8_t>& bits) const {
    return {.bits = bits.data(), .stride = mask_stride, .rows = rows, .columns = static_cast<int>(columns)};
  }
};

// pack: weight, mask -> LEAD elements and values; offsets and total (m = 0) or stored (m > 0)
template <class Element>
void pack(const Driver& driver, const Arguments& a) {
  const auto weight = driver.read<Element>("weight");
  const auto bits = driver.read<uint8_t>("mask");
  const packing::Mask mask = a.mask(bits);
  std::vector<int64_t> offsets(a.rows, -1), total(1, -1);
  std::vector<uint8_t> stored(a.rows * losa::packed_width(a.columns), 0xa5);
  int64_t length = 0;
  if (a.m == 0) {
    packing::launch_offsets(mask, offsets.data(), total.data(), nullptr);
    packing::launch_prefetch(weight.data(), static_cast<int64_t>(weight.size() * sizeof(Element)), nullptr);
  } else {
    length = a.columns / a.m * a.keep_n;
    total[0] = a.rows * length;
  }
  std::vector<Element> values(a.lead + total[0], Element(0xa5));
  const packing::Packing task{.mask = mask,
                              .weight = weight.data(),
                              .weight_stride = a.weight_stride,
                              .aligned = a.aligned,
                              .offsets = a.m == 0 ? offsets.data() : nullptr,
                              .length = length,
                              .keep_n = static_cast<int>(a.keep_n),
                              .stored = stored.data(),
                              .values = values.data() + a.lead};
  packing::launch_pack<sizeof(Element)>(task, a.m, nullptr, a.shares);
  driver.write("values", values);
  driver.write("offsets", offsets);
  driver.write("stored", stored);
}

// unpack: LEAD elements and values, mask, offsets (or no file) -> dense
template <class Element>
void unpack(const Driver& driver, const Arguments& a) {
  const auto values = driver.read<Element>("values");
  const auto bits = driver.read<uint8_t>("mask");
  auto offsets = driver.read<int64_t>("offsets");
  std::vector<Element> dense(a.rows * a.columns, Element(0xa5));
  const auto total = static_cast<int64_t>(values.size()) - a.lead;
  const packing::Unpacking task{.mask = a.mask(bits),
                                .values = values.data() + a.lead,
                                .total = total,
                                .offsets = data_or_null(offsets),
                                .length = total / a.rows,
                                .dense = dense.data(),
                                .aligned = a.aligned};
  packing::launch_unpack<sizeof(Element)>(task, nullptr, a.shares);
  driver.write("dense", dense);
}

template <class Element>
void run(const Driver& driver, const Arguments& a) {
  if (driver.command == "pack") pack<Element>(driver, a);
  if (driver.command == "unpack") unpack<Element>(driver, a);
}

// largest: mask -> largest
void largest(const Driver& driver, const Arguments& a) {
  const auto bits = driver.read<uint8_t>("mask");
  std::vector<unsigned long long> found(1, 99);
  packing::launch_largest(a.mask(bits), a.m, found.data(), nullptr);
  driver.write("largest", found);
}

// late FAILS: -> waits, how often the stream was waited for, and the number or -1 where the work before `wait` failed
void late(const Driver& driver) {
  std::vector<int64_t> waits(2, 0);
  const int64_t memory = 7;
  try {
    losa::LateNumber number(&memory, waits.data());
    number.launched();
    if (driver[0] != 0) throw 1;
    waits[1] = number.wait();
  } catch (int) {
    waits[1] = -1;
  }
  driver.write("waits", waits);
}

int main(int argc, char** argv) {
  const Driver driver(argc, argv);
  if (driver.command == "late") return late(driver), 0;
  const Arguments a(driver);
  if (driver.command == "largest") largest(driver, a);
  switch (driver[5]) {
    case 1: run<uint8_t>(driver, a); break;
    case 2: run<uint16_t>(driver, a); break;
    case 4: run<uint32_t>(driver, a); break;
    default: run<uint64_t>(driver, a);
  }
}
